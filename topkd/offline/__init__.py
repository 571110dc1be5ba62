"""Never ask twice. Knows: keys, records, segments. Does not know: HTTP, torch."""

from topkd.offline.caching import CacheMetrics, CachingSampler, CachingScorer, ReplaySampler, ReplayScorer
from topkd.offline.compaction import Compaction, gc, merge
from topkd.offline.exchange import Exchange, export_parquet, from_dataset, import_parquet, to_dataset
from topkd.offline.imports import import_axolotl, import_distillkit
from topkd.offline.keys import TeacherIdentity
from topkd.offline.store import ScoreStore
from topkd.offline.upkeep import CacheStats, Verification, profile, stats, verify

__all__ = [
    "CacheMetrics",
    "CacheStats",
    "CachingSampler",
    "CachingScorer",
    "Compaction",
    "Exchange",
    "ReplaySampler",
    "ReplayScorer",
    "ScoreStore",
    "TeacherIdentity",
    "Verification",
    "export_parquet",
    "from_dataset",
    "gc",
    "import_axolotl",
    "import_distillkit",
    "import_parquet",
    "merge",
    "profile",
    "stats",
    "to_dataset",
    "verify",
]

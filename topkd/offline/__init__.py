"""The score cache: every score is requested once, and a run can be repeated without a server.

Knows: keys, records, segments, import and export. Does not know: HTTP, torch.
"""

from topkd.offline.caching import CacheMetrics, CachingScorer, ReplayScorer
from topkd.offline.exchange.exchange import Exchange, export_parquet, from_dataset, import_parquet, to_dataset
from topkd.offline.exchange.imports import import_axolotl, import_distillkit
from topkd.offline.store.compaction import Compaction, gc, merge
from topkd.offline.store.keys import TeacherIdentity
from topkd.offline.store.maintenance import CacheStats, Verification, profile, stats, verify
from topkd.offline.store.store import ScoreStore, open_store

__all__ = [
    "CacheMetrics",
    "CacheStats",
    "CachingScorer",
    "Compaction",
    "Exchange",
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
    "open_store",
    "profile",
    "stats",
    "to_dataset",
    "verify",
]

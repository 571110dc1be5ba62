"""Never ask twice. Knows: keys, records, segments. Does not know: HTTP, torch."""

from topkd.offline.caching import CacheMetrics, CachingSampler, CachingScorer, ReplaySampler, ReplayScorer
from topkd.offline.compaction import Compaction, gc, merge
from topkd.offline.keys import TeacherIdentity
from topkd.offline.store import ScoreStore
from topkd.offline.upkeep import CacheStats, Verification, stats, verify

__all__ = [
    "CacheMetrics",
    "CacheStats",
    "CachingSampler",
    "CachingScorer",
    "Compaction",
    "ReplaySampler",
    "ReplayScorer",
    "ScoreStore",
    "TeacherIdentity",
    "Verification",
    "gc",
    "merge",
    "stats",
    "verify",
]

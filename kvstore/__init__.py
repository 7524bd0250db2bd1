"""Keys and values: in memory with the compute, or over memory and disk. Knows nothing of experts."""

from kvstore.attention import Rule
from kvstore.reserved import ReservedLayer, make_cache, rollback
from kvstore.store import ChunkStore, KVBooks, KVDisk
from kvstore.tiered import TieredCache, TieredLayer, attend

__all__ = [
    "ChunkStore", "KVBooks", "KVDisk", "ReservedLayer", "Rule", "TieredCache", "TieredLayer", "attend", "make_cache",
    "rollback",
]  # fmt: skip

"""Keys and values: in memory with the compute, or over memory and disk. Knows nothing of experts."""

from kvstore.attend import FewTokens, attend
from kvstore.attention import Rule
from kvstore.chunks import KVShape
from kvstore.reserved import ReservedLayer, make_cache, rollback
from kvstore.store import ChunkStore, KVBooks, KVDisk, chunk_tokens, slots_for
from kvstore.tiered import TieredCache, TieredLayer

__all__ = [
    "ChunkStore", "FewTokens", "KVBooks", "KVDisk", "KVShape", "ReservedLayer", "Rule", "TieredCache", "TieredLayer",
    "attend", "chunk_tokens", "make_cache", "rollback", "slots_for",
]  # fmt: skip

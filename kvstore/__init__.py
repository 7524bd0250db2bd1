"""Keys and values: in memory with the compute, over memory and disk, and kept on disk as a tree of prefixes.

Knows nothing of experts.
"""

from kvstore.attention import Rule
from kvstore.chunks import KVShape
from kvstore.cold import CodedStore, KVCodecs
from kvstore.loss import NO_LOSS, KVLoss
from kvstore.nodes import NODE_TOKENS, Layer, Segment
from kvstore.prefixes import Match, PrefixStore
from kvstore.pruning import Pruned
from kvstore.ragged import RaggedCache, attend_ragged
from kvstore.reserved import ReservedLayer, make_cache
from kvstore.sessions import Session, Sessions, Summary
from kvstore.sparse import SparseOptions
from kvstore.states import Snapshot, rollback, spoil
from kvstore.store import ChunkStore, KVBooks, KVDisk, chunk_tokens, slots_for
from kvstore.tiered import TieredCache, TieredLayer
from kvstore.tiered_attention import FewTokens, attend
from kvstore.windows import WindowLayer

__all__ = [
    "NODE_TOKENS", "NO_LOSS", "ChunkStore", "CodedStore", "FewTokens", "KVBooks", "KVCodecs", "KVDisk", "KVLoss",
    "KVShape", "Layer", "Match", "PrefixStore", "Pruned", "RaggedCache", "ReservedLayer", "Rule", "Segment",
    "Session", "Sessions", "Snapshot", "SparseOptions", "Summary", "TieredCache", "TieredLayer", "WindowLayer",
    "attend", "attend_ragged", "chunk_tokens", "make_cache", "rollback", "slots_for", "spoil",
]  # fmt: skip

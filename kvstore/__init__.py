"""Keys and values: in memory with the compute, and on disk as a tree of prefixes. Knows nothing of experts."""

from kvstore.nodes import NODE_TOKENS, Layer, Segment
from kvstore.prefixes import Match, PrefixStore
from kvstore.pruning import Pruned
from kvstore.reserved import ReservedLayer, make_cache, rollback
from kvstore.sessions import Session, Sessions, Summary, mismatch

__all__ = [
    "NODE_TOKENS", "Layer", "Match", "PrefixStore", "Pruned", "ReservedLayer", "Segment", "Session", "Sessions",
    "Summary", "make_cache", "mismatch", "rollback",
]  # fmt: skip

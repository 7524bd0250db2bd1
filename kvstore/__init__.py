"""Keys and values: for now in memory, with the compute. Knows nothing of experts."""

from kvstore.reserved import ReservedLayer, make_cache, rollback

__all__ = ["ReservedLayer", "make_cache", "rollback"]

"""Eviction policies: which resident block gives up its slot.

The seam has three implementations: `LRU` and `LFU` for what is chosen at run time (experts), `NextUse` for what follows
a known cyclic schedule (dense layers), where LRU hits nothing and Belady's choice is known exactly
(Belady 1966, "A study of replacement algorithms for a virtual-storage computer").
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Protocol


class EvictionPolicy(Protocol):
    """Told of every use; asked for victims. Never consulted about leased blocks. Called under a lock."""

    def touched(self, key: str) -> None:
        """The block was used (or has just been fetched)."""
        ...

    def removed(self, key: str) -> None:
        """The block has left memory."""
        ...

    def victim(self, evictable: Callable[[str], bool], incoming: str) -> str | None:
        """The block to drop so that `incoming` can come; None if nothing evictable is worth less than it."""
        ...


class LRU:
    """Least recently used goes first."""

    def __init__(self) -> None:
        self._order: OrderedDict[str, None] = OrderedDict()

    def __iter__(self) -> Iterator[str]:
        """Oldest first."""
        return iter(self._order)

    def touched(self, key: str) -> None:
        """Move to the young end."""
        self._order[key] = None
        self._order.move_to_end(key)

    def removed(self, key: str) -> None:
        """Forget it."""
        self._order.pop(key, None)

    def victim(self, evictable: Callable[[str], bool], incoming: str) -> str | None:
        """The oldest evictable block."""
        return next((k for k in self._order if evictable(k)), None)


class LFU:
    """Least frequently used goes first, the longer unused among equals. Counts are forgotten with the block."""

    def __init__(self) -> None:
        self._uses: dict[str, int] = {}
        self._order = LRU()

    def touched(self, key: str) -> None:
        """Count the use."""
        self._uses[key] = self._uses.get(key, 0) + 1
        self._order.touched(key)

    def removed(self, key: str) -> None:
        """Forget it."""
        self._uses.pop(key, None)
        self._order.removed(key)

    def victim(self, evictable: Callable[[str], bool], incoming: str) -> str | None:
        """The evictable block used least."""
        return min(filter(evictable, self._order), key=self._uses.__getitem__, default=None)


class NextUse:
    """The block whose next use is farthest goes, and only if that is farther than the incoming block's."""

    def __init__(self, next_use: Callable[[str], int]) -> None:
        self._next_use = next_use
        self._keys: set[str] = set()

    def touched(self, key: str) -> None:
        """Remember it."""
        self._keys.add(key)

    def removed(self, key: str) -> None:
        """Forget it."""
        self._keys.discard(key)

    def victim(self, evictable: Callable[[str], bool], incoming: str) -> str | None:
        """Belady's choice over the known schedule."""
        farthest = max((k for k in self._keys if evictable(k)), key=lambda k: (self._next_use(k), k), default=None)
        if farthest is None or self._next_use(farthest) <= self._next_use(incoming):
            return None
        return farthest

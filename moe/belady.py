"""The best that a cache of experts can do on a known trace; for replays, which name blocks by layer and expert."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from moe.traces import RoutingTrace


def key_of(layer: int, expert: int) -> str:
    """How a replay names an expert's block."""
    return f"{layer}.{expert}"


def layer_of(key: str) -> int:
    """The layer of a block so named."""
    return int(key.partition(".")[0])


class Belady:
    """The block whose next use in the trace is farthest goes: no policy misses less (Belady 1966). Replays only.

    Holds for fetching on demand, and while each layer's experts fit into the slots together.
    """

    def __init__(self, trace: RoutingTrace) -> None:
        self._next: list[dict[str, int]] = []  # at each routing: its blocks → when they are needed again
        seen: dict[str, int] = {}
        every = [r for p in trace for r in p]
        for at in range(len(every) - 1, -1, -1):
            keys = [key_of(every[at].layer, e) for e in every[at].needed()]
            self._next.append({key: seen.get(key, 1 << 60) for key in keys})
            seen.update(dict.fromkeys(keys, at))
        self._next.reverse()
        self._now = 0
        self._due: dict[str, int] = {}  # what is here → when it is needed next
        self._farthest: list[tuple[int, str]] = []

    def moment(self, at: int) -> None:
        """Routing number `at` begins."""
        self._now = at

    def touched(self, key: str) -> None:
        """Look up when it is needed next."""
        due = self._next[self._now].get(key)
        assert due is not None, "Belady's choice is for fetching on demand"
        if self._due.get(key) != due:
            self._due[key] = due
            heapq.heappush(self._farthest, (-due, key))

    def removed(self, key: str) -> None:
        """Forget it."""
        self._due.pop(key, None)

    def victim(self, evictable: Callable[[str], bool], incoming: str) -> str | None:
        """The farthest, whether or not the incoming block is needed farther still: it is needed now."""
        passed, found = [], None
        while self._farthest and found is None:
            top = heapq.heappop(self._farthest)
            if self._due.get(top[1]) == -top[0]:  # else of an earlier use
                passed.append(top)
                found = top[1] if evictable(top[1]) else None
        for entry in passed:
            heapq.heappush(self._farthest, entry)
        return found

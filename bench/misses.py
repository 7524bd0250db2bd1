"""How often caches of experts miss: the best there could be, and least recently used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def routes_by_step(routes: Sequence[Sequence[int]], layers: int) -> list[list[tuple[int, int]]]:
    """One list per layer and pass → per pass, the (layer, expert) needed, in order."""
    steps = [routes[at : at + layers] for at in range(0, len(routes), layers)]
    return [[(layer, e) for layer, chosen in enumerate(step) for e in chosen] for step in steps]


def belady_misses(accesses: Sequence[Any], slots: int) -> int:
    """Misses of the best possible cache of `slots`, starting empty, that may also let a block pass without keeping it.

    No start can save more than `slots` of them.
    """
    following: list[float] = [math.inf] * len(accesses)
    seen: dict[Any, int] = {}
    for i in range(len(accesses) - 1, -1, -1):
        following[i] = seen.get(accesses[i], math.inf)
        seen[accesses[i]] = i
    kept: dict[Any, float] = {}
    misses = 0
    for key, after in zip(accesses, following, strict=True):
        misses += key not in kept
        kept[key] = after
        if len(kept) > slots:
            del kept[max(kept, key=kept.__getitem__)]
    return misses


def lru_misses(accesses: Sequence[Any], slots: int, warm: Sequence[Any] = ()) -> int:
    """Misses of a least-recently-used cache that has seen `warm` before."""
    kept: dict[Any, None] = {}
    misses = 0
    for i, key in enumerate([*warm, *accesses]):
        if key in kept:
            del kept[key]
        elif i >= len(warm):
            misses += 1
        kept[key] = None
        if len(kept) > slots:
            del kept[next(iter(kept))]
    return misses

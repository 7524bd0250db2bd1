"""How many of a cache's slots each layer's experts are due: pure functions for `moe.policies.PerLayer`.

All give each layer at least min(top_k, experts) where the slots reach that far, and hand out every slot that can be
used.
"""

from __future__ import annotations

from collections.abc import Sequence

from moe.traces import RoutingTrace


def equal(slots: int, experts: Sequence[int], top_k: int) -> dict[int, int]:
    """The same for every layer."""
    return _apportion(slots, experts, top_k, [1.0] * len(experts))


def shallow(slots: int, experts: Sequence[int], top_k: int, tilt: float = 0.5) -> dict[int, int]:
    """More for the first layers, where prediction is worst (Fate, Fang et al. 2025).

    Falling in a line from 1 + tilt of the mean to 1 - tilt. 0 ≤ tilt ≤ 1.
    """
    n = max(len(experts) - 1, 1)
    return _apportion(slots, experts, top_k, [1 + tilt * (1 - 2 * i / n) for i in range(len(experts))])


def optimised(slots: int, trace: RoutingTrace) -> dict[int, int]:
    """The shares with the most hits on the trace, LRU within each layer.

    Slots go where they gain most hits each, looking past plateaus: the lookahead algorithm of utility-based cache
    partitioning (Qureshi and Patt, MICRO '06), over hits at every size from reuse distances (Mattson et al. 1970).
    """
    curves = hit_curves(trace)
    shares = dict.fromkeys(range(trace.layers), 0)
    left = slots
    for i in sorted(shares, key=lambda i: -curves[i][-1]):
        shares[i] = min(trace.top_k, trace.experts[i], left)
        left -= shares[i]
    while left > 0:
        best = (-1.0, 0, 0)
        for i, hits in enumerate(curves):
            have = shares[i]
            for more in range(1, min(left, trace.experts[i] - have) + 1):
                gain = (hits[have + more] - hits[have]) / more
                if gain > best[0]:
                    best = (gain, i, more)
        if best[2] == 0:
            break  # everything fits
        shares[best[1]] += best[2]
        left -= best[2]
    return shares


def hit_curves(trace: RoutingTrace) -> list[list[int]]:
    """For each layer, the hits of an LRU cache of its own with 0, 1, … slots over the whole trace."""
    curves = []
    for layer, experts in enumerate(trace.experts):
        counts = [0] * experts  # counts[d]: uses with d other experts since the last one
        recent: list[int] = []  # the one used last at the end
        for p in trace:
            # what is there is used before the rest is asked for, the youngest first
            needed = set(p[layer].needed())
            for e in [e for e in reversed(recent) if e in needed]:
                at = recent.index(e)
                counts[len(recent) - 1 - at] += 1
                del recent[at]
                recent.append(e)
                needed.discard(e)
            recent.extend(sorted(needed))
        hits = [0]
        for d in range(experts):
            hits.append(hits[-1] + counts[d])
        curves.append(hits)
    return curves


def _apportion(slots: int, experts: Sequence[int], top_k: int, weights: Sequence[float]) -> dict[int, int]:
    """Whole slots in proportion to the weights, the least first; none gets more than it has experts."""
    shares = dict.fromkeys(range(len(experts)), 0)
    for i in shares:
        shares[i] = min(top_k, experts[i], slots - sum(shares.values()))
    for _ in range(min(slots, sum(experts)) - sum(shares.values())):
        open_ = [i for i in shares if shares[i] < experts[i]]
        poorest = min(open_, key=lambda i: ((shares[i] + 1) / weights[i] if weights[i] > 0 else float("inf"), i))
        shares[poorest] += 1
    return shares

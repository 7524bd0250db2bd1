"""How many experts of a layer are not in memory when they are needed: expected misses of a cache.

Routing is drawn at random with a fixed seed: each token's experts are uniform, except that with probability `repeat` a
choice is one of the previous token's (measured per model, see `calibration`). Reuse distances are computed once
(Mattson et al. 1970, "Evaluation techniques for storage hierarchies"); they answer for every LRU cache size. A cache
that goes by router scores does not lose everything when all experts take turns, as in a prompt or a large batch: it
finds at least what its share of all experts is, and that is expected where LRU would find less. More slots never miss
more.
"""

from __future__ import annotations

import functools
import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Routing:
    """What is known of a model's router, from runs.

    `repeat`: how likely a token's expert was its predecessor's. `recall`: the share of the experts needed that were
    foreseen a layer ahead; `precision`: the share of those foreseen that were needed.
    """

    repeat: float = 0.0
    recall: float = 0.0
    precision: float = 1.0


# Before a model has run: every expert is as likely as the others; foreseen as often as was seen with random weights
# (bench/results/olmoe.json: recall 0.90 of the layers that are foreseen at all, precision 0.90), with a margin.
EVEN = Routing(recall=0.8, precision=0.9)
BLIND = Routing()  # nothing is foreseen
MAX_STEPS = 16  # decode steps drawn; what follows is like the last quarter of them
_MAX_TOUCHES = 60_000  # bounds the time of a plan; very large models are drawn for fewer steps
_SEED = 1
_NEVER = 1 << 60  # the distance of what has not been used before


@dataclass(frozen=True, slots=True)
class PassMisses:
    """One pass: `distances[layer]` are the sorted reuse distances of the experts that the layer needs.

    `total` are the experts of all layers, if most of them are needed at once; 0 asks for LRU.
    """

    distances: tuple[tuple[int, ...], ...]
    total: int = 0

    def needed(self, layer: int) -> int:
        """Distinct experts of the layer."""
        return len(self.distances[layer])

    def missed(self, layer: int, slots: int) -> int:
        """Those of them that a cache of `slots` does not hold."""
        return round(absent(self.distances[layer], slots, self.total))


def crowded(needed: float, total: int) -> bool:
    """Whether a pass needs so many of all experts that they take turns."""
    return 2 * needed >= total


def absent(distances: Sequence[int], slots: int, total: int) -> float:
    """How many of the experts with these reuse distances, ascending, `slots` of `total` do not hold (see above)."""
    least_recent = len(distances) - bisect_left(distances, slots)
    if not total or slots >= total:
        return least_recent
    never = len(distances) - bisect_left(distances, _NEVER)
    return min(least_recent, never + (len(distances) - never) * (1 - slots / total))


@functools.lru_cache(maxsize=32)
def draw(
    layers: tuple[tuple[int, int], ...],
    prefill: tuple[int, ...],
    decode: int,
    batch: int,
    repeat: float,
    warm: bool = False,
) -> tuple[tuple[PassMisses, ...], tuple[PassMisses, ...]]:
    """(prefill passes, decode passes) for `layers` of (experts, top_k) each.

    `prefill` are the tokens of each pass over the prompt, `decode` the number of steps of `batch` tokens drawn at most.
    `warm`: an earlier request has filled the cache; otherwise it begins empty.
    """
    per_step = sum(min(e, k * batch) for e, k in layers)
    whole = sum(e for e, _ in layers)
    prefill = prefill[-2:] if whole * len(prefill) > _MAX_TOUCHES // 2 else prefill  # earlier ones are like them
    steps = max(2, min(decode, MAX_STEPS, _MAX_TOUCHES // max(1, per_step)))
    rng = random.Random(_SEED)
    recent: list[int] = []  # times of last use, ascending: the LRU stack
    last: dict[tuple[int, int], int] = {}
    clock = 0
    previous: list[list[list[int]]] = [[[] for _ in range(batch)] for _ in layers]

    def touch(layer: int, chosen: set[int]) -> tuple[int, ...]:
        nonlocal clock
        distances = []
        # those used last are touched first: a layer computes what is there before it asks for the rest
        for e in sorted(chosen, key=lambda e: (-last.get((layer, e), -1), e)):
            at = last.get((layer, e))
            if at is None:
                distances.append(_NEVER)
            else:
                i = bisect_left(recent, at)
                distances.append(len(recent) - 1 - i)
                del recent[i]
            recent.append(clock)
            last[layer, e] = clock
            clock += 1
        return tuple(sorted(distances))

    def run(tokens: int, *, stepping: bool) -> PassMisses:
        out = []
        for number, (experts, k) in enumerate(layers):
            if tokens * k >= 8 * experts:
                chosen = set(range(experts))  # all but surely
            else:
                chosen = set()
                for s in range(tokens):
                    held = previous[number][s] if stepping else []
                    picks: set[int] = {e for e in held if rng.random() < repeat}
                    while len(picks) < min(k, experts):
                        picks.add(rng.randrange(experts))
                    if stepping:
                        previous[number][s] = list(picks)
                    chosen |= picks
            out.append(touch(number, chosen))
        return PassMisses(tuple(out), whole if crowded(sum(map(len, out)), whole) else 0)

    if warm:
        every = [(number, e) for number, (experts, _) in enumerate(layers) for e in range(experts)]
        rng.shuffle(every)
        for number, e in every:
            touch(number, {e})
    first = tuple(run(n, stepping=False) for n in prefill)
    return first, tuple(run(batch, stepping=True) for _ in range(steps))

"""How many chunks go together, how many each layer may have, and which it will want next: from measured attention.

LeoAM (https://arxiv.org/abs/2506.20187) observes that attention is skewed, by how much differs from layer to layer, and
that one chunk size and one budget for all layers move bytes that nobody looks at. Pure functions of what was measured.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from torch import Tensor

from kvstore.search import groups

GRAINS = (1, 2, 4, 8)  # neighbouring chunks that are chosen together
# With one group being enough, demo-moe answers 27, 22 and 15 of 30 questions at 25, 12.5 and 6 % of 512 to 2048 tokens;
# with four at least 27, 23 and 14, as with single chunks (`bench/sparse_quality.py` asks them)
LEAST_GROUPS = 4


def grain(mass: Tensor, budget: int, first: int, last: int, grains: Sequence[int] = GRAINS, keep: float = 0.99) -> int:
    """How many neighbouring chunks are best chosen together: the most at which no head loses much of its attention.

    mass [heads, chunks]: attention that fell on each chunk. Of the `budget` chunks those before `first` and from `last`
    on are chosen in any case, and prove nothing: the first ones take up most of the attention as it is. Of what is
    between them the groups that hold most (`kvstore.search.groups`) must keep for every head at least `keep` of what as
    many single chunks keep. A layer whose attention is on few places far apart gets 1; one that looks at stretches of
    text, or everywhere alike, gets more, and reads fewer and longer runs. A grain of which the budget does not buy
    `LEAST_GROUPS` is out of the question: what a later token asks for may be in several places.
    """
    if mass.dim() != 2 or mass.numel() == 0:
        raise ValueError(f"mass {tuple(mass.shape)}: need [heads, chunks], one of each at least")
    last = max(first, last)
    room, mass = budget - first - (mass.shape[1] - last), mass.float()
    if room < 1 or last == first:
        return 1

    def held(size: int) -> Tensor:
        return mass[:, groups(mass.sum(0), size, room, first, last)].sum(1)

    least = keep * held(1)
    fitting = (g for g in grains if 1 < g <= room // LEAST_GROUPS)
    return max((g for g in fitting if bool((held(g) >= least).all())), default=1)


def layer_budgets(masses: Sequence[Sequence[float] | Tensor], total: int, least: int = 1) -> list[int]:
    """Chunks for each layer, `total` together, so that the attention on the chunks left out is least.

    masses[i]: attention on each chunk of layer i, in any order and in one unit for all layers (tokens seen, say).
    Every layer gets `least` chunks (its sinks and recent ones, if it has as many), even beyond the total. Sorted from
    the largest on, a layer's sums are concave, so giving each next chunk to the layer that gains most is optimal (the
    per-layer budgets of PrefixKV and LeoAM have the same aim).
    """
    curves = [sorted(map(float, m), reverse=True) for m in masses]
    given = [min(least, len(c)) for c in curves]
    heap = [(-c[g], i) for i, (c, g) in enumerate(zip(curves, given, strict=True)) if g < len(c)]
    heapq.heapify(heap)
    for _ in range(total - sum(given)):
        if not heap:
            break
        _, i = heapq.heappop(heap)
        given[i] += 1
        if given[i] < len(curves[i]):
            heapq.heappush(heap, (-curves[i][given[i]], i))
    return given


class Ahead:
    """Which chunks a layer will choose for the next token: those it chose last, as long as that proves right.

    Neighbouring tokens look at much the same chunks, so these can be fetched while the layer before computes; a wrong
    guess costs bytes and never changes what is attended to. Held to its word: see `recall`.
    """

    def __init__(self, fade: float = 0.95) -> None:
        """`fade`: what a choice counts for, in the order and in the recall, when one more has been made."""
        self._fade = fade
        self._last: dict[int, frozenset[int]] = {}
        self._weights: dict[int, dict[int, float]] = {}  # how often each chunk was chosen, lately above all
        self._right: dict[int, tuple[float, float]] = {}  # (foreseen, chosen), faded

    def foresee(self, layer: int, most: int | None = None) -> list[int]:
        """Chunks the layer chose last, those it chooses most often first, `most` of them (None: all)."""
        weights = self._weights.get(layer, {})
        return sorted(self._last.get(layer, ()), key=lambda c: (-weights[c], -c))[:most]

    def noted(self, layer: int, chosen: Sequence[int], always: int = 0) -> None:
        """The layer has chosen. `always`: how many of these are chosen whatever the query; they prove nothing."""
        now = frozenset(chosen)
        last = self._last.get(layer)
        if last is not None and len(now) > always:
            right, cases = self._right.get(layer, (0.0, 0.0))
            hits = max(len(now & last) - always, 0)
            self._right[layer] = (right * self._fade + hits, cases * self._fade + len(now) - always)
        weights = {c: w * self._fade for c, w in self._weights.get(layer, {}).items() if w * self._fade > 0.05}
        for c in now:
            weights[c] = weights.get(c, 0.0) + 1.0
        self._weights[layer], self._last[layer] = weights, now

    @property
    def recall(self) -> float | None:
        """Share of what was chosen that was foreseen, over all layers; None before there is a case."""
        right, cases = (sum(x) for x in zip(*self._right.values(), strict=True)) if self._right else (0.0, 0.0)
        return right / cases if cases else None

    def recall_of(self, layer: int) -> float | None:
        """The same of one layer."""
        right, cases = self._right.get(layer, (0.0, 0.0))
        return right / cases if cases else None

    def truncated(self, layer: int, chunks: int) -> None:
        """Only the first so many chunks of the layer remain."""
        self._last[layer] = frozenset(c for c in self._last.get(layer, ()) if c < chunks)
        self._weights[layer] = {c: w for c, w in self._weights.get(layer, {}).items() if c < chunks}

    def forget(self) -> None:
        """Another sequence begins: nothing is foreseen at first. What has proved true stays."""
        self._last.clear()
        self._weights.clear()

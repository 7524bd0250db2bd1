"""The next layer's experts, fetched while this layer computes.

The next layer's router is run on this layer's input (Fate, arXiv 2502.12224; the residual stream changes little from
layer to layer), what it chooses is fetched if it is not there, and kept if it is. A prediction only ever costs
transfers that nobody waits for and the slots they land in; where too few turn out useful, looking ahead pauses.

Not covered: how experts are computed (`moe.experts`), and which one gives up its slot (`tiers.policy`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tiers import Residency

Gate = Callable[[torch.Tensor], torch.Tensor]  # [T, H] → indices [T, k]
_LEAST_USEFUL = 0.25  # share of what was fetched ahead that must be used
_JUDGED = 64  # fetches after which that is looked at
_PAUSE = 512  # layers without looking ahead after that; then it is tried again


@dataclass(slots=True)
class LayerUse:
    """Experts of one layer, counted: needed = hit + ahead + late + missed.

    `ahead` came in time because they were foreseen, `late` were foreseen but still on their way. `fetched` ahead in
    all, of which `wasted` were not what the layer then chose.
    """

    needed: int = 0
    hit: int = 0
    ahead: int = 0
    late: int = 0
    missed: int = 0
    predicted: int = 0
    right: int = 0
    fetched: int = 0
    wasted: int = 0

    def __add__(self, other: LayerUse) -> LayerUse:
        return LayerUse(*(getattr(self, n) + getattr(other, n) for n in self.__slots__))

    def __sub__(self, other: LayerUse) -> LayerUse:
        return LayerUse(*(getattr(self, n) - getattr(other, n) for n in self.__slots__))

    @property
    def recall(self) -> float | None:
        """Share of the experts needed that were foreseen."""
        return self.right / self.needed if self.needed else None

    @property
    def precision(self) -> float | None:
        """Share of the experts foreseen that were needed."""
        return self.right / self.predicted if self.predicted else None


class ExpertLookahead:
    """One model's experts: `keys[layer][e]` are blocks, `gates[layer]` the layer's router or None.

    `most` bounds the experts fetched ahead of one layer; the slots they take are slots others lose.
    """

    def __init__(
        self, residency: Residency, keys: Sequence[Sequence[str]], gates: Sequence[Gate | None], most: int
    ) -> None:
        self._residency = residency
        self._keys = keys
        self._gates = gates
        self._most = most
        self.use = [LayerUse() for _ in keys]
        self._foreseen: set[int] = set()  # experts foreseen for the layer in `_for`
        self._for = -1
        self._fetched: set[int] = set()  # of these, the ones fetched
        self._judged = self._useful = 0
        self._paused = 0

    def needs(self, layer: int, experts: Sequence[int]) -> None:
        """The router has chosen these experts (distinct), and none of them is leased yet."""
        use, keys = self.use[layer], self._keys[layer]
        foreseen, fetched = (self._foreseen, self._fetched) if self._for == layer else (set(), set())
        self._for = -1
        use.needed += len(experts)
        use.predicted += len(foreseen)
        use.right += len(foreseen.intersection(experts))
        use.wasted += len(fetched.difference(experts))
        self._useful += len(fetched.intersection(experts))
        for e in experts:
            there = self._residency.resident(keys[e])
            if e in fetched:
                use.ahead += there
                use.late += not there
            else:
                use.hit += there
                use.missed += not there

    def look(self, layer: int, hidden: torch.Tensor) -> None:
        """The layer's own experts are leased or asked for: see to the next layer's. hidden [T, H]."""
        following = layer + 1
        if following >= len(self._gates) or not self._willing():
            return
        gate = self._gates[following]
        if gate is None:
            return
        keys, use = self._keys[following], self.use[following]
        experts = [e for e in torch.unique(gate(hidden)).tolist() if e < len(keys)]
        self._foreseen, self._fetched, self._for = set(experts), set(), following
        absent = [e for e in experts if not self._residency.keep(keys[e])]
        for e in absent[: self._most]:
            if not self._residency.prefetch(keys[e]):
                break
            self._fetched.add(e)
        self._judged += len(self._fetched)
        use.fetched += len(self._fetched)

    def _willing(self) -> bool:
        """Whether looking ahead pays, by what became of the last fetches."""
        if self._paused:
            self._paused -= 1
            return False
        if self._judged >= _JUDGED:
            if self._useful < _LEAST_USEFUL * self._judged:
                self._paused = _PAUSE
            self._judged = self._useful = 0
        return True

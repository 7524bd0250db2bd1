"""A routing trace against a cache of n slots: what a policy and a predictor would have hit, missed, fetched in vain.

Follows `moe.LayerExperts` over `tiers.Residency` call by call, except that nothing takes time: whatever is fetched
ahead is there when its layer runs. Seconds are the simulator's business.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe import shares
from moe.belady import Belady, key_of, layer_of
from moe.policies import Adaptive, ExpectedUse, HearsRouter, PerLayer, RouterScore
from moe.predictors import HearsGate
from moe.traces import Routed, RoutingTrace, mean_probability
from prefetch.predictor import Predictor
from prefetch.worth import ThrashGuard
from tiers import LFU, LRU, EvictionPolicy


@dataclass(slots=True)
class Counts:
    """One layer, or all of them, in blocks: needed = hits + late + missed."""

    needed: int = 0
    hits: int = 0  # here since an earlier use
    late: int = 0  # predicted, and fetched ahead for this use
    missed: int = 0  # fetched when it was needed
    useful: int = 0  # prefetches that were used before they went
    wasted: int = 0  # prefetches that were not

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f) + getattr(other, f) for f in self.__slots__))


@dataclass(frozen=True, slots=True)
class Replayed:
    """The outcome; bytes are blocks times `nbytes`."""

    layers: tuple[Counts, ...]
    nbytes: int

    @property
    def total(self) -> Counts:
        """All layers."""
        return sum(self.layers, Counts())

    @property
    def useful_bytes(self) -> int:
        """Fetched ahead and used."""
        return self.total.useful * self.nbytes

    @property
    def wasted_bytes(self) -> int:
        """Fetched ahead and not used."""
        return self.total.wasted * self.nbytes

    @property
    def link_bytes(self) -> int:
        """All that crossed the link."""
        t = self.total
        return (t.missed + t.useful + t.wasted) * self.nbytes


class _Cache:
    """Slots, and who is in them."""

    def __init__(self, slots: int, policy: EvictionPolicy, layers: int) -> None:
        self.slots, self.policy = slots, policy
        self.here: set[str] = set()
        self.ahead: set[str] = set()  # fetched ahead and not used yet
        self.held: set[str] = set()  # leased, or about to be
        self.counts = [Counts() for _ in range(layers)]

    def fetch(self, key: str) -> bool:
        """False if every slot is held."""
        if len(self.here) >= self.slots:
            held = self.held
            gone = self.policy.victim(lambda k: k not in held, key)
            if gone is None:
                gone = next((k for k in self.here if k not in held), None)  # as residency does
            if gone is None:
                return False
            self.here.remove(gone)
            self.policy.removed(gone)
            if gone in self.ahead:
                self.ahead.discard(gone)
                self.counts[layer_of(gone)].wasted += 1
        self.here.add(key)
        self.policy.touched(key)
        return True

    def run(self, layer: int, keys: Sequence[str]) -> None:
        """A layer needs these, held until it is done; if they are too many, those computed first are let go."""
        self.held = set(keys)
        count = self.counts[layer]
        count.needed += len(keys)
        done = deque(k for k in keys if k in self.here)
        missing = [k for k in keys if k not in self.here]
        for key in done:
            if key in self.ahead:
                self.ahead.discard(key)
                count.late += 1
                count.useful += 1
            else:
                count.hits += 1
            self.policy.touched(key)
        for key in missing:
            while not self.fetch(key):
                self.held.discard(done.popleft())
            count.missed += 1
            self.policy.touched(key)  # a fetch, then its use
            done.append(key)

    def prefetch(self, keys: Sequence[str]) -> None:
        """Fetch these ahead, for as long as slots can be had; none pushes out another."""
        held = self.held
        self.held = held.union(keys)
        for key in keys:
            if key in self.here:
                continue
            if isinstance(self.policy, ThrashGuard):
                came = self.policy.fetch_ahead(key, functools.partial(self.fetch, key))
            else:
                came = self.fetch(key)
            if not came:
                break
            self.ahead.add(key)
        self.held = held


Choose = Callable[[list[tuple[int, float]]], list[tuple[int, float]]]


def replay(
    trace: RoutingTrace,
    slots: int,
    policy: EvictionPolicy,
    predictor: Predictor | None = None,
    *,
    width: int | None = None,
    choose: Choose | None = None,
    nbytes: int = 1,
) -> Replayed:
    """Run the trace through an empty cache of `slots` blocks of `nbytes`.

    While a layer runs, the first `width` (default: top_k) predictions for the next one are fetched, those that `choose`
    (see `prefetch.worthwhile`) leaves of them. A `ThrashGuard` around the policy has the last word.
    """
    if slots < 1:
        raise ValueError("a cache needs a slot")
    cache = _Cache(slots, policy, trace.layers)
    inner = policy.policy if isinstance(policy, ThrashGuard) else policy
    keys = [[key_of(layer, e) for e in range(n)] for layer, n in enumerate(trace.experts)]
    width = trace.top_k if width is None else width
    for number, p in enumerate(trace):
        for r in p:
            if isinstance(inner, Belady):
                inner.moment(number * trace.layers + r.layer)
            if isinstance(inner, HearsRouter):
                inner.routed(keys[r.layer], router_mean(r, trace.experts[r.layer]))
            cache.run(r.layer, [keys[r.layer][e] for e in r.needed()])
            if predictor is None:
                continue
            following = (r.layer + 1) % trace.layers
            predictor.observe(r.layer, r.index)
            if r.ahead is not None and isinstance(predictor, HearsGate):
                predictor.ahead(following, r.ahead)
            said = predictor.predict(following)
            said = (said if choose is None else choose(said))[:width]
            cache.prefetch([keys[following][e] for e, _ in said])
    for key in cache.ahead:
        cache.counts[layer_of(key)].wasted += 1
    return Replayed(tuple(cache.counts), nbytes)


def router_mean(r: Routed, experts: int) -> NDArray[np.float64]:
    """[experts]: each expert's mean probability over the tokens; of the chosen ones only, if no more was recorded."""
    return mean_probability(r.probabilities, r.index, r.weights, experts)


MakePolicy = Callable[[int], EvictionPolicy]  # slots →
MakePredictor = Callable[[], Predictor | None]


def policies(trace: RoutingTrace, learned: RoutingTrace | None = None) -> dict[str, MakePolicy]:
    """Every policy there is, for a replay of `trace`; shares are optimised on `learned` (default: its first half)."""
    n, k = trace.experts, trace.top_k
    before = learned if learned is not None else trace[: max(1, len(trace) // 2)]
    return {
        "lru": lambda slots: LRU(),
        "lfu": lambda slots: LFU(),
        "adaptive": lambda slots: Adaptive(),
        "router score": lambda slots: RouterScore(top=2 * k),
        "expected use": lambda slots: ExpectedUse(k),
        "equal shares": lambda slots: PerLayer(layer_of, shares.equal(slots, n, k)),
        "shallow shares": lambda slots: PerLayer(layer_of, shares.shallow(slots, n, k)),
        "optimised shares": lambda slots: PerLayer(layer_of, shares.optimised(slots, before)),
        "belady": lambda slots: Belady(trace),
    }


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table."""

    policy: str
    predictor: str
    slots: int
    result: Replayed


def table(
    trace: RoutingTrace,
    slots: Iterable[int],
    policies: Mapping[str, MakePolicy],
    predictors: Mapping[str, MakePredictor],
) -> list[Row]:
    """Every policy with every predictor at every size. Belady's optimum is replayed without predictors only."""
    rows = []
    for n in slots:
        for policy, make in policies.items():
            for predictor, predict in predictors.items():
                chosen, said = make(n), predict()
                if not (isinstance(chosen, Belady) and said is not None):
                    rows.append(Row(policy, predictor, n, replay(trace, n, chosen, said)))
    return rows

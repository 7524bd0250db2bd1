"""The policies and predictors that can be chosen by name, and which are chosen if nobody says otherwise.

The defaults are what bench/results/routing.json found best on learned routing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moe import shares
from moe.measured import Measured
from moe.policies import Adaptive, ExpectedUse, PerLayer, RouterScore
from moe.predictors import Combination, GateAhead, LongRun, Repetition, RequestFrequency, Transitions
from tiers import LFU, LRU, EvictionPolicy, UsageError

POLICY, PREDICTOR = "router", "gate"  # the defaults

_POLICIES: dict[str, Callable[[Sequence[Sequence[str]], int, int], EvictionPolicy]] = {
    "router": lambda keys, top_k, slots: RouterScore(top=2 * top_k),
    "expected": lambda keys, top_k, slots: ExpectedUse(top_k),
    "lru": lambda keys, top_k, slots: LRU(),
    "lfu": lambda keys, top_k, slots: LFU(),
    "adaptive": lambda keys, top_k, slots: Adaptive(),
    "equal": lambda keys, top_k, slots: _per_layer(keys, shares.equal(slots, [len(k) for k in keys], top_k)),
    "shallow": lambda keys, top_k, slots: _per_layer(keys, shares.shallow(slots, [len(k) for k in keys], top_k)),
}
_PREDICTORS: dict[str, Callable[[Sequence[int]], Measured] | None] = {
    "gate": GateAhead,
    "router": GateAhead,  # as it is, without `moe.gates.GateCorrection`
    "transitions": Transitions,
    "repetition": Repetition,
    "request": RequestFrequency,
    "history": LongRun,
    "combination": Combination,
    "none": None,
}
POLICIES, PREDICTORS = tuple(_POLICIES), tuple(_PREDICTORS)


def policy(name: str, keys: Sequence[Sequence[str]], top_k: int, slots: int) -> EvictionPolicy:
    """The eviction policy of that name for experts `keys[layer][e]` in so many slots. Raises `UsageError`."""
    return _POLICIES[checked(name, POLICIES, "--expert-policy")](keys, top_k, slots)


def predictor(name: str, experts: Sequence[int]) -> Measured | None:
    """The predictor of that name for `experts[layer]`; None for `none`. Raises `UsageError`."""
    make = _PREDICTORS[checked(name, PREDICTORS, "--expert-predictor")]
    return None if make is None else make(experts)


def corrects(name: str) -> bool:
    """Whether what routers say early is to be corrected for this predictor (see `moe.gates`)."""
    return name in ("gate", "combination")


def checked(name: str, known: Sequence[str], flag: str) -> str:
    """The name, if it is one of those known. Raises `UsageError`."""
    if name not in known:
        raise UsageError(f"{flag}: {name!r} is not one of {', '.join(known)}")
    return name


def _per_layer(keys: Sequence[Sequence[str]], due: dict[int, int]) -> PerLayer:
    layer_of = {key: n for n, layer in enumerate(keys) for key in layer}
    return PerLayer(layer_of.__getitem__, due)

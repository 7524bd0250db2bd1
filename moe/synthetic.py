"""Made-up routing traces, each with one property that a cache or a predictor lives on, or dies of. Seeded."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from moe.traces import NONE, Routed, RoutingTrace

Logits = Callable[[int, int], NDArray[np.float64]]  # (pass, layer) → [T, experts]


def even(layers: int, experts: int, top_k: int, passes: int, *, tokens: int = 1, seed: int = 0) -> RoutingTrace:
    """Every expert equally likely, every time: nothing to learn."""
    rng = np.random.default_rng(seed)
    return _draw(layers, experts, top_k, passes, lambda p, layer: rng.gumbel(size=(tokens, experts)))


def skewed(
    layers: int, experts: int, top_k: int, passes: int, *, zipf: float = 1.2, tokens: int = 1, seed: int = 0
) -> RoutingTrace:
    """The r-th favourite of a layer is chosen in proportion to r^-zipf; each layer has its own favourites."""
    rng = np.random.default_rng(seed)
    base = [rng.permutation(-zipf * np.log(np.arange(1, experts + 1))) for _ in range(layers)]
    return _draw(layers, experts, top_k, passes, lambda p, layer: base[layer] + rng.gumbel(size=(tokens, experts)))


def sticky(
    layers: int, experts: int, top_k: int, passes: int, *, repeat: float = 0.7, tokens: int = 1, seed: int = 0
) -> RoutingTrace:
    """Each of a token's experts is kept for the next token with probability `repeat`, else drawn anew.

    The router is sure of all that it chooses, whether kept or new.
    """
    rng = np.random.default_rng(seed)
    held: dict[int, NDArray[np.bool_]] = {}

    def logits(p: int, layer: int) -> NDArray[np.float64]:
        drawn = rng.gumbel(size=(tokens, experts))
        if layer in held:
            drawn += 20.0 * (held[layer] & (rng.random((tokens, experts)) < repeat))
        chosen = np.zeros((tokens, experts), bool)
        np.put_along_axis(chosen, np.argsort(-drawn, axis=1)[:, :top_k], True, axis=1)
        held[layer] = chosen
        return np.where(chosen, 5 + 0.1 * drawn, 0.5 * drawn)

    return _draw(layers, experts, top_k, passes, logits)


def affine(
    layers: int, experts: int, top_k: int, passes: int, *, strength: float = 4.0, seed: int = 0, world: int = 0
) -> RoutingTrace:
    """A layer's experts each favour `top_k` others in the next layer (ExFlow, IPDPS '24); nothing else is regular.

    `seed` draws the tokens and `world` the affinities: the same world with another seed is another prompt.
    """
    rng, nature = np.random.default_rng(seed), np.random.default_rng(world)
    favours = np.zeros((layers, experts, experts))
    for layer in range(layers):
        for e in range(experts):
            favours[layer, e, nature.choice(experts, top_k, replace=False)] = strength
    last: list[NDArray[np.intp]] = []

    def logits(p: int, layer: int) -> NDArray[np.float64]:
        drawn = rng.gumbel(size=(1, experts))
        if layer:
            drawn += favours[layer, last[0]].sum(axis=0)
        last[:] = [np.argsort(-drawn[0])[:top_k]]
        return drawn

    return _draw(layers, experts, top_k, passes, logits)


def adversarial(layers: int, experts: int, top_k: int, passes: int, *, period: int) -> RoutingTrace:
    """Built against prefetching: `period` disjoint sets take turns in every layer, and all that is said ahead is wrong.

    LRU hits everything with layers x top_k x period slots, and one block fetched in vain then costs a whole turn of
    misses. What was used last is never used next. `ahead` names experts that are never used at all.
    Needs experts ≥ top_k x (period + 1).
    """
    if experts < top_k * (period + 1) or period < 2:
        raise ValueError("too few experts for sets that take turns, or no turns")
    weights = np.full((1, top_k), 1 / top_k, np.float16)
    wrong = np.arange(experts - top_k, experts, dtype=np.int16)[None]

    def routed(p: int, layer: int) -> Routed:
        start = top_k * ((p + layer) % period)
        return Routed(layer, np.arange(start, start + top_k, dtype=np.int16)[None], weights, wrong)

    return RoutingTrace([experts] * layers, [[routed(p, n) for n in range(layers)] for p in range(passes)])


def with_gate_ahead(trace: RoutingTrace, accuracy: float, *, seed: int = 0) -> RoutingTrace:
    """The same trace with an `ahead` that names each of the next layer's experts with probability `accuracy`."""
    rng = np.random.default_rng(seed)
    flat = [r for p in trace for r in p]
    said = []
    for now, then in zip(flat, [*flat[1:], None], strict=True):
        ahead = np.full_like(now.index, NONE)
        if then is not None and then.index.shape == now.index.shape:
            other = rng.integers(0, trace.experts[then.layer], now.index.shape, dtype=np.int16)
            ahead = np.where(rng.random(now.index.shape) < accuracy, then.index, other)
        said.append(Routed(now.layer, now.index, now.weights, ahead, now.probabilities))
    n = trace.layers
    return RoutingTrace(trace.experts, [said[i : i + n] for i in range(0, len(said), n)])


def _draw(layers: int, experts: int, top_k: int, passes: int, logits: Logits) -> RoutingTrace:
    def routed(p: int, layer: int) -> Routed:
        x = logits(p, layer)
        e = np.exp(x - x.max(axis=1, keepdims=True))
        probabilities = (e / e.sum(axis=1, keepdims=True)).astype(np.float16)
        index = np.argsort(-x, axis=1, kind="stable")[:, :top_k].astype(np.int16)
        return Routed(layer, index, np.take_along_axis(probabilities, index, 1), None, probabilities)

    return RoutingTrace([experts] * layers, [[routed(p, n) for n in range(layers)] for p in range(passes)])

"""What routers chose, pass by pass and layer by layer: recorded live, kept in a file, replayed against caches.

Synthetic ones are in `moe.synthetic`. A trace holds expert numbers and router weights, never tokens or text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe.store import load_arrays, save_arrays
from tiers import ModelError, UsageError

Index = NDArray[np.int16]
Weights = NDArray[np.float16]

NONE = -1  # in `ahead`: nothing was said

_VERSION = 1
_MAX_LAYERS, _MAX_EXPERTS, _MAX_TOP_K = 1024, 1 << 14, 256
_TYPES = {
    "version": "int64", "experts": "int32", "tokens": "int64",
    "index": "int16", "weights": "float16", "ahead": "int16", "probabilities": "float16",
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Routed:
    """What one layer's router did in one pass over T tokens."""

    layer: int
    index: Index  # [T, k]: the experts chosen
    weights: Weights  # [T, k]: the router's weight of each
    ahead: Index | None = None  # [T, n]: what was said here of the next layer's choice, the surest first; or `NONE`
    probabilities: Weights | None = None  # [T, experts]: the router's, of all experts

    def needed(self) -> list[int]:
        """The distinct experts, in the order in which they first appear."""
        return list(dict.fromkeys(self.index.ravel().tolist()))


class RoutingTrace:
    """Passes of T tokens each through the same layers. Iterating gives, per pass, one `Routed` for each layer."""

    def __init__(self, experts: Sequence[int], passes: Iterable[Sequence[Routed]]) -> None:
        """`experts[layer]` is how many the layer has. Raises `ValueError` if a pass does not fit that."""
        self.experts = tuple(int(e) for e in experts)
        self._passes = tuple(tuple(p) for p in passes)
        for p in self._passes:
            if [r.layer for r in p] != list(range(len(self.experts))):
                raise ValueError("a pass does not go through every layer once, in order")
            for r in p:
                _check(r, self.experts[r.layer], self.top_k, len(p[0].index))
                following = self.experts[(r.layer + 1) % self.layers]
                if r.ahead is not None and not NONE <= int(r.ahead.min()) <= int(r.ahead.max()) < following:
                    raise ValueError("what was said ahead names experts that the next layer does not have")

    @property
    def layers(self) -> int:
        """How many layers have experts."""
        return len(self.experts)

    @property
    def top_k(self) -> int:
        """Experts per token and layer; 0 if nothing was recorded."""
        return self._passes[0][0].index.shape[1] if self._passes else 0

    @property
    def tokens(self) -> int:
        """In all passes together."""
        return sum(len(p[0].index) for p in self._passes)

    def use(self) -> list[NDArray[np.float64]]:
        """For each layer [experts]: the share of tokens that chose the expert; each layer's shares sum to top_k."""
        return [
            np.bincount(chosen.ravel(), minlength=wide) / max(len(chosen), 1)
            for chosen, wide in zip(self._chosen(), self.experts, strict=True)
        ]

    def repeats(self) -> float:
        """The share of choices that were the previous token's too; rows are taken for tokens in order.

        Of a trace of several sequences at once it says little. 0 if there are no two tokens.
        """
        same = asked = 0
        for chosen in self._chosen():
            for k in range(self.top_k):  # one column at a time bounds the memory
                same += int((chosen[1:, k, None] == chosen[:-1]).any(axis=1).sum())
                asked += max(len(chosen) - 1, 0)
        return same / max(asked, 1)

    def _chosen(self) -> list[Index]:
        """For each layer [tokens, k]."""
        none = np.zeros((0, self.top_k), np.int16)
        return [np.concatenate([none, *(p[layer].index for p in self._passes)]) for layer in range(self.layers)]

    def __len__(self) -> int:
        return len(self._passes)

    def __iter__(self) -> Iterator[tuple[Routed, ...]]:
        return iter(self._passes)

    def __getitem__(self, part: slice) -> RoutingTrace:
        """The passes of a slice."""
        cut = RoutingTrace(self.experts, ())
        cut._passes = self._passes[part]
        return cut

    def save(self, path: Path) -> None:
        """Write it whole, 0600, with a checksum (`moe.store`). Raises `UsageError` if that is impossible."""
        every = [r for p in self._passes for r in p]
        shape = (0, self.top_k)
        arrays = {
            "version": np.array([_VERSION]),
            "experts": np.array(self.experts, np.int32),
            "tokens": np.array([len(p[0].index) for p in self._passes], np.int64),
            "index": np.concatenate([r.index for r in every] or [np.zeros(shape, np.int16)]),
            "weights": np.concatenate([r.weights for r in every] or [np.zeros(shape, np.float16)]),
        }
        said = [r.ahead.shape[1] for r in every if r.ahead is not None]
        if said:
            arrays["ahead"] = np.concatenate([_widened(r, max(said)) for r in every])
        given = [r.probabilities for r in every if r.probabilities is not None]
        if given and len(given) == len(every):  # layers differ in width: kept flat
            arrays["probabilities"] = np.concatenate([g.ravel() for g in given])
        save_arrays(path, arrays)

    @classmethod
    def load(cls, path: Path) -> RoutingTrace:
        """Read it back, believing nothing. Raises `UsageError` (no such file) or `ModelError` (damaged)."""
        a = load_arrays(path, _TYPES)
        try:
            if a["version"].tolist() != [_VERSION]:
                raise ValueError("it was written by another version")
            experts, tokens = a["experts"].tolist(), a["tokens"].tolist()
            k = a["index"].shape[1]
            if not (0 < len(experts) <= _MAX_LAYERS and all(0 < e <= _MAX_EXPERTS for e in experts)):
                raise ValueError("its layers are out of bounds")
            if not (0 <= k <= _MAX_TOP_K and all(t > 0 for t in tokens)):
                raise ValueError("its passes are out of bounds")
            return cls(experts, _cut(a, experts, tokens))
        except (ValueError, KeyError, IndexError, TypeError) as e:
            raise ModelError(f"{path} is no routing trace ({e}): record it again") from None


def _widened(r: Routed, width: int) -> Index:
    """What was said ahead, [T, width]."""
    out = np.full((len(r.index), width), NONE, np.int16)
    if r.ahead is not None:
        out[:, : r.ahead.shape[1]] = r.ahead
    return out


def _cut(a: dict[str, NDArray[np.generic]], experts: list[int], tokens: list[int]) -> Iterator[list[Routed]]:
    """Rows back into passes. Every array must be used up exactly."""
    rows = sum(tokens) * len(experts)
    for name in ("index", "weights"):
        if a[name].shape != (rows, a["index"].shape[1]):
            raise ValueError(f"the shape of {name} does not fit")
    if "ahead" in a and (a["ahead"].ndim != 2 or len(a["ahead"]) != rows):
        raise ValueError("the shape of ahead does not fit")
    flat = a.get("probabilities")
    if flat is not None and flat.shape != (sum(tokens) * sum(experts),):
        raise ValueError("the shape of probabilities does not fit")
    row = at = 0
    for t in tokens:
        routed = []
        for layer, wide in enumerate(experts):
            part = slice(row, row + t)
            probabilities = None if flat is None else flat[at : at + t * wide].reshape(t, wide)
            ahead = a["ahead"][part] if "ahead" in a else None
            routed.append(Routed(layer, a["index"][part], a["weights"][part], ahead, probabilities))  # type: ignore[arg-type]
            row, at = row + t, at + t * wide
        yield routed


def _check(r: Routed, experts: int, k: int, tokens: int) -> None:
    """Every number of one layer's routing. Raises `ValueError`."""
    if r.index.shape != (tokens, k) or r.weights.shape != (tokens, k) or not tokens or not k:
        raise ValueError("a choice or its weights have the wrong shape")
    if int(r.index.min()) < 0 or int(r.index.max()) >= experts:
        raise ValueError(f"a layer of {experts} experts chose one that it does not have")
    if not np.isfinite(r.weights).all():
        raise ValueError("a router weight is no number")
    if r.ahead is not None and (r.ahead.ndim != 2 or len(r.ahead) != tokens or not r.ahead.size):
        raise ValueError("what was said ahead has the wrong shape")
    if r.probabilities is not None:
        p = r.probabilities
        if p.shape != (tokens, experts) or not np.isfinite(p).all() or p.min() < 0 or p.max() > 1:
            raise ValueError("the router's probabilities are none")


class Recorder:
    """Collects a trace while a model runs.

    A pass begins when the first layer is noted again; a pass that was cut short is left out. `note` copies what it is
    given (numpy arrays, or CPU tensors) and looks no further: numbers are checked when `trace` is asked for.
    """

    def __init__(self, experts: Sequence[int], *, max_rows: int = 1 << 22) -> None:
        """`experts[layer]`; after `max_rows` (tokens x layers) recording ends, so that memory is bounded."""
        self._experts = tuple(experts)
        self._left = max_rows
        self._passes: list[list[Routed]] = []
        self._open: list[Routed] = []

    def note(
        self,
        layer: int,
        index: ArrayLike,
        weights: ArrayLike,
        *,
        ahead: ArrayLike | None = None,
        probabilities: ArrayLike | None = None,
    ) -> None:
        """The router of `layer` chose index [T, k] with weights [T, k]; the rest as in `Routed`."""
        if layer == 0:
            self._open = []
        if layer != len(self._open) or self._left <= 0:
            return  # the beginning of this pass is missing, or there is enough
        chosen = np.array(index, np.int16)
        self._open.append(
            Routed(
                layer,
                chosen,
                np.array(weights, np.float16),
                None if ahead is None else np.array(ahead, np.int16),
                None if probabilities is None else np.array(probabilities, np.float16),
            )
        )
        if len(self._open) == len(self._experts):
            self._passes.append(self._open)
            self._left -= len(chosen) * len(self._open)
            self._open = []

    def trace(self) -> RoutingTrace:
        """What has been recorded. Raises `ValueError` if it does not fit the layers that were announced."""
        return RoutingTrace(self._experts, self._passes)


class Replay:
    """A trace's tokens, one after another, in the place of what a model's routers choose; and again from the start.

    So a model of random weights has real routing, at its own size. What it says means nothing then.
    """

    def __init__(self, trace: RoutingTrace, experts: Sequence[int], top_k: int) -> None:
        """For a model of `experts[layer]` and `top_k`. Raises `UsageError` if the trace is of another shape."""
        if trace.experts != tuple(experts) or trace.top_k != top_k or not len(trace):
            raise UsageError(
                f"the trace is of {trace.layers} layers of {_span(trace.experts)} experts, top {trace.top_k}; "
                f"the model has {len(experts)} of {_span(experts)}, top {top_k}: record one of this shape"
            )
        self._layers = [_joined([p[layer] for p in trace]) for layer in range(trace.layers)]
        self._at = self._end = 0

    def next(self, layer: int, tokens: int) -> Routed:
        """The routing of `layer` for so many tokens; layer 0 goes on to the next ones."""
        rows = len(self._layers[0].index)
        if layer == 0:
            self._at = self._end % rows
            self._end = self._at + tokens
        part = np.arange(self._at, self._at + tokens) % rows
        whole = self._layers[layer]
        return Routed(
            layer, whole.index[part], whole.weights[part],
            None if whole.ahead is None else whole.ahead[part],
            None if whole.probabilities is None else whole.probabilities[part],
        )  # fmt: skip


def _joined(parts: Sequence[Routed]) -> Routed:
    """One layer's passes behind each other; what only some of them have is left out."""
    ahead = [p.ahead for p in parts if p.ahead is not None]
    probabilities = [p.probabilities for p in parts if p.probabilities is not None]
    width = max((a.shape[1] for a in ahead), default=0)
    return Routed(
        parts[0].layer,
        np.concatenate([p.index for p in parts]),
        np.concatenate([p.weights for p in parts]),
        np.concatenate([_widened(p, width) for p in parts]) if ahead else None,
        np.concatenate(probabilities) if len(probabilities) == len(parts) else None,
    )


def _span(experts: Sequence[int]) -> str:
    return str(experts[0]) if len(set(experts)) == 1 else f"{min(experts)} to {max(experts)}"


def mean_probability(
    probabilities: NDArray[Any] | None, index: NDArray[Any], weights: NDArray[Any], experts: int
) -> NDArray[np.float64]:
    """[experts]: each expert's mean probability over the tokens; of the chosen ones' weights, if no more is known."""
    if probabilities is not None:
        total = probabilities.sum(axis=0, dtype=np.float64)
    else:
        total = np.bincount(index.ravel(), weights.ravel().astype(np.float64), minlength=experts)[:experts]
    mean: NDArray[np.float64] = total / len(index)
    return mean

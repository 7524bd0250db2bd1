"""Which experts a layer will need: predictors behind `prefetch.Predictor`, all of them held to what they say.

Whatever they predict only moves bytes earlier; it never changes what is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from moe.measured import Guesses, Measured, label_of
from moe.store import load_arrays, save_arrays
from prefetch.predictor import Choice
from tiers import ModelError

_LAST = 64  # tokens of a long pass that are learned from
_FADE = 4096  # a count that reaches this is halved, with all that is compared to it


@runtime_checkable
class HearsGate(Protocol):
    """A predictor that wants the router of a layer that has not run, applied by the caller to what is known so far."""

    def ahead(self, layer: int, index: Choice) -> None:
        """The router of `layer` would choose index [T, n], each token's most probable first; negative: nothing."""
        ...


class GateAhead(Measured):
    """The next layer's router run early by the caller (Fate, Pre-gated MoE); a rank is as sure as it proved to be."""

    def __init__(self, experts: Sequence[int]) -> None:
        super().__init__(experts, prior=lambda rank: 0.5)
        self._ahead: dict[int, Guesses] = {}

    def ahead(self, layer: int, index: Choice) -> None:
        """See `HearsGate`."""
        self._ahead[layer] = _by_rank(index, self._experts[layer])

    def _guess(self, layer: int) -> Guesses:
        return self._ahead.get(layer, [])

    def _learn(self, layer: int, index: Choice) -> None:
        self._ahead.pop(layer, None)


class Repetition(Measured):
    """What the layer needed in the pass before; each rank is as sure as it proved to be."""

    def __init__(self, experts: Sequence[int]) -> None:
        super().__init__(experts, prior=lambda rank: 0.3)
        self._last: dict[int, Choice] = {}

    def begin(self) -> None:
        """The first pass of a request has none before it."""
        self._last.clear()

    def _guess(self, layer: int) -> Guesses:
        last = self._last.get(layer)
        return [] if last is None else _by_rank(last, self._experts[layer])

    def _learn(self, layer: int, index: Choice) -> None:
        self._last[layer] = index[-_LAST:].copy()


class LongRun(Measured):
    """How often the layer has needed each expert, in all runs: counts are kept in a file between them."""

    def __init__(self, experts: Sequence[int]) -> None:
        super().__init__(experts)
        self._counts = [np.zeros(e) for e in experts]  # tokens that chose the expert
        self._tokens = np.zeros(len(self._experts))
        self._together = [1] * len(self._experts)  # tokens of the last pass

    def _guess(self, layer: int) -> Guesses:
        n = self._tokens[layer]
        if n == 0:
            return []
        counts = self._counts[layer]
        p = (counts + counts.sum() / n / len(counts)) / (n + 1)  # one imagined token that is indifferent
        return _by_probability(1 - (1 - np.minimum(p, 1.0)) ** self._together[layer], self._needed.get(layer, 4))

    def _learn(self, layer: int, index: Choice) -> None:
        self._together[layer] = len(index)
        valid = index[(index >= 0) & (index < self._experts[layer])]
        self._counts[layer] += np.bincount(valid, minlength=self._experts[layer])
        self._tokens[layer] += len(index)

    def save(self, path: Path) -> None:
        """Keep the counts: a checksummed file of 4 bytes an expert (`moe.store`). Raises `UsageError`."""
        fade = max(1.0, float(self._tokens.max()) / 2**24)  # so that what is learned later still counts
        arrays = {
            "frequency_of": np.array(self._experts, np.int32),
            "tokens": np.round(self._tokens / fade).astype(np.uint32),
            "counts": np.round(np.concatenate(self._counts) / fade).astype(np.uint32),
        }
        save_arrays(path, arrays)

    def load(self, path: Path) -> None:
        """Begin with the counts of that file. Raises `UsageError` (no such file), `ModelError` (damaged, foreign)."""
        types = {"frequency_of": "int32", "tokens": "uint32", "counts": "uint32"}
        a = load_arrays(path, types, max_bytes=1 << 24)
        layers, total = len(self._experts), sum(self._experts)
        if a.keys() != types.keys() or a["frequency_of"].tolist() != list(self._experts):
            raise ModelError(f"{path} is about another model: delete it and have it written again")
        if a["tokens"].shape != (layers,) or a["counts"].shape != (total,):
            raise ModelError(f"{path} does not hold a count per expert: delete it and have it written again")
        counts = np.split(a["counts"].astype(float), np.cumsum(self._experts)[:-1])
        if any((c > t).any() for c, t in zip(counts, a["tokens"].tolist(), strict=True)):
            raise ModelError(f"{path} counts experts more often than tokens: delete it and have it written again")
        self._counts, self._tokens = counts, a["tokens"].astype(float)


class RequestFrequency(LongRun):
    """How often the layer has needed each expert since the request began (`begin`)."""

    def begin(self) -> None:
        """Forget the last request."""
        for counts in self._counts:
            counts[:] = 0
        self._tokens[:] = 0


class Transitions(Measured):
    """Which experts follow those that the layer before has chosen (ExFlow, Yao et al., IPDPS '24).

    P(expert e here | expert s before) from counts, Laplace-smoothed, averaged over the token's experts s; after the
    last layer comes the first one of the next pass. Two bytes for every pair of experts of adjacent layers (`nbytes`).
    """

    def __init__(self, experts: Sequence[int], smoothing: float = 2.0) -> None:
        super().__init__(experts)
        before = [self._experts[i - 1] for i in range(len(self._experts))]
        self._pairs = [np.zeros((b, e), np.uint16) for b, e in zip(before, self._experts, strict=True)]
        self._times = [np.zeros(b, np.uint16) for b in before]
        self._smoothing = smoothing
        self._last: tuple[int, Choice] | None = None

    @property
    def nbytes(self) -> int:
        """Memory that the counts take."""
        return sum(p.nbytes for p in self._pairs)

    def begin(self) -> None:
        """The first pass of a request follows none."""
        self._last = None

    def _before(self, layer: int) -> Choice | None:
        if self._last is None or self._last[0] != (layer - 1) % len(self._experts):
            return None
        return self._last[1]

    def _guess(self, layer: int) -> Guesses:
        before = self._before(layer)
        if before is None:
            return []
        experts = self._experts[layer]
        even = before.shape[1] / experts
        pairs = self._pairs[layer][before].astype(np.float32)  # [T, k, E]
        times = self._times[layer][before].astype(np.float32)[..., None]
        p = ((pairs + self._smoothing * even) / (times + self._smoothing)).mean(axis=1)  # [T, E]
        return _by_probability(1 - np.prod(1 - np.minimum(p, 1.0), axis=0), self._needed.get(layer, 4))

    def _learn(self, layer: int, index: Choice) -> None:
        index = index[-_LAST:]
        before = self._before(layer)
        if before is not None:
            n = min(len(before), len(index))  # a prompt's last token is followed by the first answer
            pairs, times = self._pairs[layer], self._times[layer]
            for old, new in zip(before[-n:], index[-n:], strict=True):
                pairs[np.ix_(old, new[(new >= 0) & (new < self._experts[layer])])] += 1
                times[old] += 1
            full = np.flatnonzero(times >= _FADE)
            pairs[full] >>= 1
            times[full] >>= 1
        valid = ((index >= 0) & (index < self._experts[layer])).all(axis=1)
        self._last = (layer, index[valid].astype(np.intp)) if valid.any() else None


class Combination(Measured):
    """All of them together, each weighed by what it has proved to add to the others.

    Each gives its measured probability as log-odds over chance; a logistic regression of what came true on these,
    learned as it goes, sets the weights (as in Mattern, DCC '13, "Linear and geometric mixtures: analysis").
    So predictors that know the same are not counted twice, and one that knows nothing has no say. What comes of it is
    measured again.
    """

    def __init__(self, experts: Sequence[int], members: Sequence[Measured] = (), rate: float = 0.005) -> None:
        """`members`: all predictors of this module if none are given. `rate`: how fast weights are learned."""
        super().__init__(experts)
        every = (GateAhead, Transitions, Repetition, RequestFrequency, LongRun)
        self.members = tuple(members) or tuple(kind(experts) for kind in every)
        self.weights = np.full(len(self.members), 1 / len(self.members) ** 0.5)
        self._rate = rate
        self._mixed: dict[int, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}

    def begin(self) -> None:
        """Each member's."""
        for m in self.members:
            m.begin()

    def ahead(self, layer: int, index: Choice) -> None:
        """For those of them that want it."""
        for m in self.members:
            if isinstance(m, HearsGate):
                m.ahead(layer, index)

    def _guess(self, layer: int) -> Guesses:
        experts, needed = self._experts[layer], self._needed.get(layer, 4)
        chance = _log_odds(np.array([needed / experts]))
        evidence = np.zeros((len(self.members), experts))
        for row, m in zip(evidence, self.members, strict=True):
            said = m.predict(layer)
            if said:
                named = np.array([e for e, _ in said])
                p = np.array([p for _, p in said])
                q = np.full(experts, max(needed - p.sum(), 0.0) / max(experts - len(said), 1))
                q[named] = p
                row[:] = _log_odds(q) - chance
        if not evidence.any():
            return []
        mixed = 1 / (1 + np.exp(-self.weights @ evidence - chance))
        self._mixed[layer] = (evidence, mixed)
        return _by_probability(mixed, needed)

    def _learn(self, layer: int, index: Choice) -> None:
        evidence, mixed = self._mixed.pop(layer, (None, None))
        if evidence is not None and mixed is not None:
            came = np.zeros(self._experts[layer])
            came[index[(index >= 0) & (index < len(came))]] = 1.0
            self.weights = np.maximum(self.weights + self._rate * (evidence @ (came - mixed)), 0.0)
        for m in self.members:
            m.observe(layer, index)


def _log_odds(p: NDArray[np.float64]) -> NDArray[np.float64]:
    q = np.clip(p, 0.002, 0.998)
    out: NDArray[np.float64] = np.log(q / (1 - q))
    return out


def _by_rank(index: Choice, experts: int) -> Guesses:
    """(expert, best rank at which a token has it), the best first."""
    best: dict[int, int] = {}
    for rank, column in enumerate(index.T.tolist()):
        for e in column:
            if 0 <= e < experts:
                best.setdefault(e, rank)
    return list(best.items())


def _by_probability(p: NDArray[np.floating[Any]], needed: int) -> Guesses:
    """(expert, bin of its probability) of the most probable, the best first."""
    n = min(max(2 * needed, 4), len(p))
    top = np.argpartition(-p, n - 1)[:n]
    top = top[np.argsort(-p[top], kind="stable")]
    return [(e, label_of(x)) for e, x in zip(top.tolist(), p[top].tolist(), strict=True) if x > 0]

"""What every predictor shares: it is held to what it said, and says next time how often that came true."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np

from prefetch.predictor import Choice

Guesses = list[tuple[int, int]]  # (expert, label), the best first; labels are what reliability is measured by

BINS = 20  # labels of predictors that have a probability of their own


def label_of(p: float) -> int:
    """The bin of a probability."""
    return min(int(p * BINS), BINS - 1)


def middle_of(label: int) -> float:
    """What a bin promises before anything has been measured."""
    return (label + 0.5) / BINS


class Ratio:
    """How often something came true. Old cases fade: at `most` of them all are halved."""

    __slots__ = ("cases", "most", "true")

    def __init__(self, most: float = 2048) -> None:
        self.true = self.cases = 0.0
        self.most = most

    def note(self, true: float, cases: float = 1.0) -> None:
        """`true` of `cases` came true."""
        self.true += true
        self.cases += cases
        if self.cases > self.most:
            self.true, self.cases = self.true / 2, self.cases / 2

    def given(self, prior: float, weight: float) -> float:
        """The ratio, with `weight` imagined cases of `prior`."""
        return (self.true + weight * prior) / (self.cases + weight)


class Reliability:
    """How often guesses of each label came true: in a layer, starting from what holds for all layers."""

    def __init__(self, prior: Callable[[int], float], weight: float = 8.0) -> None:
        self._prior = prior
        self._weight = weight
        self._all: dict[int, Ratio] = {}
        self._layers: dict[tuple[int, int], Ratio] = {}

    def probability(self, layer: int, label: int) -> float:
        """What a guess of this label is worth in this layer."""
        whole = self._all.get(label)
        p = self._prior(label) if whole is None else whole.given(self._prior(label), self._weight)
        own = self._layers.get((layer, label))
        return p if own is None else own.given(p, self._weight)

    def note(self, layer: int, label: int, true: bool) -> None:
        """A guess is settled."""
        whole, own = self._all.get(label), self._layers.get((layer, label))
        if whole is None:
            whole = self._all[label] = Ratio()
        if own is None:
            own = self._layers[layer, label] = Ratio()
        whole.note(true)
        own.note(true)


class Measured(ABC):
    """A `Predictor` whose probabilities are measured. Subclasses guess (`_guess`) and learn (`_learn`).

    `precision` and `recall` are those of the first n guesses where the layer turned out to need n experts, over the
    recent past.
    """

    def __init__(self, experts: Sequence[int], prior: Callable[[int], float] = middle_of) -> None:
        """`experts[layer]`: how many there are. `prior(label)`: a label's probability before it has been measured."""
        self._experts = tuple(experts)
        self._reliability = Reliability(prior)
        self._said: dict[int, Guesses] = {}
        self._needed: dict[int, int] = {}  # distinct experts that the layer needed last
        self._right, self._found = Ratio(), Ratio()

    @property
    def precision(self) -> float:
        """The share of guesses that came true."""
        return self._right.given(0.5, 2.0)

    @property
    def recall(self) -> float:
        """The share of what was needed that had been guessed."""
        return self._found.given(0.5, 2.0)

    def begin(self) -> None:  # noqa: B027 (most have nothing to forget)
        """A new request begins."""

    def observe(self, layer: int, index: Choice) -> None:
        """See `Predictor`. Numbers that are no expert of the layer are padding and ignored."""
        chosen = np.unique(index)
        needed = set(chosen[(chosen >= 0) & (chosen < self._experts[layer])].tolist())
        said = self._said.pop(layer, None)
        if said is not None and needed:
            n = len(needed)
            for expert, label in said:
                self._reliability.note(layer, label, expert in needed)
            right = sum(expert in needed for expert, _ in said[:n])
            self._right.note(right, len(said[:n]))
            self._found.note(right, n)
        self._needed[layer] = len(needed)
        self._learn(layer, index)

    def predict(self, layer: int) -> list[tuple[int, float]]:
        """See `Predictor`. At most twice as many as the layer needed last time."""
        found = self._guess(layer)[: max(2 * self._needed.get(layer, 4), 4)]
        rated = [(self._reliability.probability(layer, label), expert, label) for expert, label in found]
        rated.sort(key=lambda r: -r[0])
        self._said[layer] = [(expert, label) for _, expert, label in rated]
        return [(expert, p) for p, expert, _ in rated]

    @abstractmethod
    def _guess(self, layer: int) -> Guesses: ...

    @abstractmethod
    def _learn(self, layer: int, index: Choice) -> None: ...

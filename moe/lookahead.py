"""What the layers' routers choose, and what the next layers' will: heard, recorded, foreseen, and fetched ahead.

While a layer computes its experts, the next layer's router is run on this layer's input (`moe.gates`), a predictor
says how sure what it names is (`moe.predictors`), and what pays (`prefetch.worth`) is fetched if it is not there, and
kept if it is. A prediction only ever costs transfers that nobody waits for and the slots they land in.

Not covered: how experts are computed (`moe.experts`), and which one gives up its slot (`moe.policies`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moe.gates import GateCorrection, Router
from moe.measured import Measured
from moe.policies import HearsRouter
from moe.predictors import HearsGate
from moe.traces import Recorder, Replay, Routed, mean_probability
from prefetch.worth import worthwhile
from tiers import Residency

# Start fetching a block: False if it may not be, or no slot can be had; None if it is well where it is.
Fetch = Callable[[str], bool | None]

_IDLE = 32  # passes in which nothing that was foreseen of a layer was worth a fetch: then it is asked less often
_SELDOM = 4  # one pass in so many


@dataclass(slots=True)
class LayerUse:
    """Experts of one layer, counted: needed = hit + ahead + late + missed + cpu.

    `cpu` were computed on the CPU beside a device, where they lay (`moe.beside`). `ahead` came in time because they
    were foreseen, `late` were foreseen but still on their way. `fetched` ahead in all, of which `wasted` were not what
    the layer then chose. `asked` were needed in passes of which something was said; `predicted` are the guesses, as
    many as were needed, and `right` those of them that came true; `named` are the experts needed that were among all
    guesses.
    """

    needed: int = 0
    hit: int = 0
    ahead: int = 0
    late: int = 0
    missed: int = 0
    cpu: int = 0
    asked: int = 0
    predicted: int = 0
    right: int = 0
    named: int = 0
    fetched: int = 0
    wasted: int = 0

    def __add__(self, other: LayerUse) -> LayerUse:
        return LayerUse(*(getattr(self, n) + getattr(other, n) for n in self.__slots__))

    def __sub__(self, other: LayerUse) -> LayerUse:
        return LayerUse(*(getattr(self, n) - getattr(other, n) for n in self.__slots__))

    @property
    def recall(self) -> float | None:
        """Share of the experts needed that were foreseen, with as many guesses as were needed."""
        return self.right / self.asked if self.asked else None

    @property
    def precision(self) -> float | None:
        """Share of the experts foreseen that were needed."""
        return self.right / self.predicted if self.predicted else None


@dataclass(slots=True)
class _Foreseen:
    """What was said of a layer's next pass, the surest first, and what was fetched because of it."""

    said: list[int]
    fetched: set[int]


@dataclass(slots=True)
class _Heard:
    """A pass's routing of one layer, on the CPU."""

    index: NDArray[np.integer[Any]]
    weights: torch.Tensor
    probabilities: NDArray[np.floating[Any]] | None
    ahead: NDArray[np.integer[Any]] | None = None


class ExpertLookahead:
    """One model's experts: `keys[layer][e]` are blocks, `routers[layer]` can be asked early (None: it cannot).

    Called for each layer in turn: `heard` when its router has run, `routed` before its experts are computed, `needs`
    when they are known, `look` once those that are missing have been asked for.
    """

    def __init__(
        self,
        residency: Residency,
        keys: Sequence[Sequence[str]],
        routers: Sequence[Router | None],
        most: int,
        *,
        predictor: Measured | None = None,
        correction: GateCorrection | None = None,
        fetch: Fetch | None = None,
        policies: Sequence[HearsRouter] = (),
        busy: Callable[[], float] = lambda: 1.0,
        depth: int = 1,
        recorder: Recorder | None = None,
        replay: Replay | None = None,
    ) -> None:
        """`most` bounds the experts fetched ahead of one layer; the slots they take are slots others lose.

        Without a `predictor` nothing is fetched ahead. `correction` improves what routers say early; `policies` are
        told of every routing; `fetch` starts a transfer (default: the residency's prefetch); `busy` is the share of
        time in which the link has other things to do; `depth` is how many layers ahead are looked at. With `replay`,
        routing is a trace's and the model's own is ignored.
        """
        self._residency = residency
        self._keys = keys
        self._routers = routers
        self._most = most
        self._predictor = predictor
        self._hears = isinstance(predictor, HearsGate)
        self._correction = correction
        self._fetch: Fetch = fetch or residency.prefetch
        self._policies = policies
        self._busy = busy
        self._depth = depth
        self._recorder = recorder
        self._replay = replay
        self.use = [LayerUse() for _ in keys]
        self._share = [0.0] * len(keys)  # of its experts, what the layer needed last
        self._foreseen: dict[int, _Foreseen] = {}
        self._logits: dict[int, torch.Tensor] = {}
        self._now = _Heard(np.zeros((0, 0), np.int64), torch.zeros(0), None)
        self._said: dict[int, list[tuple[int, float]]] = {}
        self._idle = [0] * len(keys)  # passes without a fetch, by the layer that it would have been for
        self._passes = 0

    def begin(self) -> None:
        """A request begins."""
        if self._predictor is not None:
            self._predictor.begin()

    def heard(self, layer: int, logits: torch.Tensor) -> None:
        """The layer's router has run: logits [T, experts]."""
        self._logits[layer] = logits

    def routed(self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The layer's input is hidden [T, H], its router chose index [T, k] with weights [T, k].

        Returns the index to compute with: the same, or the replayed trace's. All that is on a device comes over at
        once: one synchronisation.
        """
        compute_with = index
        self._passes += layer == 0
        asked: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        logits = self._logits.pop(layer, None)
        if self._replay is None and (self._predictor is not None or self._recorder is not None):
            for later in range(layer + 1, min(layer + self._depth + 1, len(self._routers))):
                router = self._routers[later]
                if router is not None and self._worth_asking(later):
                    asked[later] = router(hidden)
        if hidden.device.type != "cpu":
            index, weights, logits, hidden, asked = _to_cpu(index, weights, logits, hidden, asked)
        trace: Routed | None = None
        if self._replay is not None:
            trace = self._replay.next(layer, len(index))
            index = torch.from_numpy(trace.index.astype(np.int64))
            compute_with, logits = index.to(compute_with.device), None
        self._now = now = _Heard(index.numpy(), weights, None)
        experts = len(self._keys[layer])
        if trace is not None:
            now.probabilities = trace.probabilities
        elif logits is not None and (self._policies or self._recorder is not None):
            now.probabilities = torch.softmax(logits.float(), -1).numpy()
        if self._policies:
            mean = mean_probability(now.probabilities, now.index, weights.float().numpy(), experts)
            for policy in self._policies:
                policy.routed(self._keys[layer], mean)
        if self._correction is not None and logits is not None:
            self._correction.heard(layer, logits, index)
        if self._predictor is not None:
            self._predictor.observe(layer, now.index)
        self._said = {}
        if trace is not None and trace.ahead is not None and layer + 1 < len(self._keys):
            self._foresee(layer + 1, trace.ahead)
        for later, (said, choice) in asked.items():
            if self._correction is not None:
                choice = self._correction.ahead(layer, later, hidden, said, choice, 2 * choice.shape[-1])
            guess = choice.numpy()
            self._foresee(later, guess)
            if later == layer + 1:
                now.ahead = guess
        if trace is None and not asked and layer + 1 < len(self._keys):
            self._foresee(layer + 1, None)
        return compute_with

    def _worth_asking(self, later: int) -> bool:
        """Looking ahead takes time of its own: where it has come to nothing for a while, it is done now and then."""
        return self._recorder is not None or self._idle[later] < _IDLE or self._passes % _SELDOM == 0

    def _foresee(self, later: int, guess: NDArray[np.integer[Any]] | None) -> None:
        if self._predictor is None or not self._worth_asking(later):
            return
        if guess is not None and self._hears:
            self._predictor.ahead(later, guess)  # type: ignore[attr-defined]
        self._said[later] = self._predictor.predict(later)

    def needs(self, layer: int, experts: Sequence[int], cpu: Sequence[int] = ()) -> None:
        """The experts to be computed (distinct), of which some on the CPU beside; none of them is leased yet."""
        use, keys = self.use[layer], self._keys[layer]
        self._share[layer] = len(experts) / len(keys)
        foreseen = self._foreseen.pop(layer, None) or _Foreseen([], set())
        guessed = foreseen.said[: len(experts)]
        use.needed += len(experts)
        use.asked += len(experts) if foreseen.said else 0
        use.predicted += len(guessed)
        use.right += len(set(guessed).intersection(experts))
        use.named += len(set(foreseen.said).intersection(experts))
        use.wasted += len(foreseen.fetched.difference(experts))
        use.cpu += len(cpu)
        for e in set(experts).difference(cpu):
            there = self._residency.resident(keys[e])
            if e in foreseen.fetched:
                use.ahead += there
                use.late += not there
            else:
                use.hit += there
                use.missed += not there

    def look(self, layer: int) -> None:
        """The layer's own experts are leased or asked for: see to the next layers'."""
        for later, said in self._said.items():
            self._see_to(later, said)
        if self._recorder is not None:
            now = self._now
            self._recorder.note(
                layer, now.index, now.weights.float().numpy(), ahead=now.ahead, probabilities=now.probabilities
            )

    def _see_to(self, later: int, said: list[tuple[int, float]]) -> None:
        """Keep what is there of what may be needed, fetch what is not and pays."""
        keys, use = self._keys[later], self.use[later]
        foreseen = self._foreseen.setdefault(later, _Foreseen([], set()))
        foreseen.said = [e for e, _ in said]
        # times are in those of one transfer; what has to go is as likely to be needed as any expert
        share = self._share[later]
        paying = worthwhile(said, gain_s=1.0, link_s=1.0, busy=self._busy(), evict_probability=share)
        absent = [e for e, p in said if p > share and not self._residency.keep(keys[e])]
        wanted = {e for e, _ in paying}
        for e in [e for e in absent if e in wanted][: self._most]:
            started = self._fetch(keys[e])
            if started is False:
                break
            if started:
                foreseen.fetched.add(e)
                use.fetched += 1
        self._idle[later] = 0 if foreseen.fetched else self._idle[later] + 1


def _to_cpu(
    index: torch.Tensor,
    weights: torch.Tensor,
    logits: torch.Tensor | None,
    hidden: torch.Tensor,
    asked: dict[int, tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    """Everything in one copy, and so one synchronisation: float32 holds expert numbers exactly."""
    parts = [index, weights, hidden, *(() if logits is None else (logits,))]
    parts += [t for pair in asked.values() for t in pair]
    flat = torch.cat([t.reshape(-1).float() for t in parts]).cpu()
    cut = torch.split(flat, [t.numel() for t in parts])
    back = iter([p.view(t.shape).to(t.dtype) for p, t in zip(cut, parts, strict=True)])
    index, weights, hidden = next(back), next(back), next(back)
    logits = None if logits is None else next(back)
    return index, weights, logits, hidden, {later: (next(back), next(back)) for later in asked}

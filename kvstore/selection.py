"""Which chunks of a layer's keys and values one new token attends to: the policies of sparse attention (opt-in, lossy).

Nothing is thrown away: a chunk that is not chosen stays where it is and may be chosen for the next token. A chunk is
chosen for all heads of a layer, because it moves as one block. Always chosen are the first chunks, which take up
attention that has nowhere else to go (attention sinks: StreamingLLM, Xiao et al., https://arxiv.org/abs/2309.17453),
and the last ones; InfLLM (https://arxiv.org/abs/2402.04617) adds to these what the query looks up, and so does this.

A selector serves one sequence. It neither fetches nor attends: whoever does tells it where the attention fell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvstore.abstracts import Abstracts
from kvstore.search import PLAIN, Search, groups, top
from tiers import UsageError


@dataclass(slots=True)
class LayerView:
    """What a selector may know of a layer.

    `abstracts` may lack the last chunks, as long as these are `recent`; an older chunk without one is always wanted.
    `mass` gives the truth, for `Oracle`: (query, scale) → share of each head's softmax on every chunk [heads, chunks].
    `grain` neighbouring chunks are chosen together by policies that `group` (`kvstore.shares.grain`).
    """

    number: int
    chunks: int
    abstracts: Abstracts | None = None
    mass: Callable[[Tensor, float], Tensor] | None = None
    grain: int = 1


class ChunkSelector(Protocol):
    """Chooses the chunks of a layer for one new token, and learns where the attention fell."""

    sinks: int
    recent: int
    needs_abstracts: bool
    needs_mass: bool
    group: bool

    def choose(self, layer: LayerView, query: Tensor, scale: float, budget: int) -> list[int]:
        """Ascending chunk numbers: `budget` of them (all if there are no more), at least those always chosen.

        query [heads, D] is the new token's, after rotary embedding as its keys are; scale: of q·k.
        """
        ...

    def attended(self, layer: LayerView, chunks: Sequence[int], mass: Tensor) -> None:
        """Attention is done: mass [heads, len(chunks)] is the share of each head's softmax that fell on each chunk."""
        ...

    def prompt_ended(self, layer: LayerView, mass: Tensor) -> None:
        """The prompt's last queries, taken together, gave each chunk mass [heads, chunks] (SnapKV's window)."""
        ...

    def truncated(self, layer: LayerView, chunks: int) -> None:
        """Only the first so many chunks of the layer remain."""
        ...

    def forget(self) -> None:
        """Another sequence begins."""
        ...


class Recent:
    """The first chunks and the last ones, whatever the query: StreamingLLM's window. What the others start from."""

    needs_abstracts = False  # whether `LayerView.abstracts` is looked at
    needs_mass = False  # whether anything comes of `attended`
    group = False  # whether chunks are chosen `LayerView.grain` at a time

    def __init__(self, sinks: int = 1, recent: int = 2) -> None:
        """`sinks`: first chunks always chosen; `recent`: last ones (at least 1, the new token's own)."""
        if sinks < 0 or recent < 1:
            raise ValueError(f"{sinks} sinks, {recent} recent chunks: need at least 0 and 1")
        self.sinks, self.recent = sinks, recent

    def choose(self, layer: LayerView, query: Tensor, scale: float, budget: int) -> list[int]:
        """See `ChunkSelector`."""
        first, last = self.sinks, layer.chunks - self.recent
        if budget >= layer.chunks or first >= last:
            return list(range(layer.chunks))
        always = [*range(first), *range(last, layer.chunks)]
        room = budget - len(always)
        return sorted([*always, *self._best(layer, query, scale, room, first, last)]) if room > 0 else always

    def attended(self, layer: LayerView, chunks: Sequence[int], mass: Tensor) -> None:
        """See `ChunkSelector`."""

    def prompt_ended(self, layer: LayerView, mass: Tensor) -> None:
        """See `ChunkSelector`."""

    def truncated(self, layer: LayerView, chunks: int) -> None:
        """See `ChunkSelector`."""

    def forget(self) -> None:
        """See `ChunkSelector`."""

    def _best(self, layer: LayerView, query: Tensor, scale: float, count: int, first: int, last: int) -> list[int]:
        """The `count` best of the chunks first ≤ c < last, in any order; there are more than `count`."""
        return list(range(last - count, last))


class Bounds(Recent):
    """By the most that a query can find in a chunk: Quest's bounds, coarse to fine as in LeoAM (`kvstore.search`).

    No key that matches the query is missed for being among others; but bounds of long chunks are loose: what goes
    together is scored chunk by chunk.
    """

    needs_abstracts = True
    group = True

    def __init__(self, sinks: int = 1, recent: int = 2) -> None:
        super().__init__(sinks, recent)
        self.looked_at = 0  # abstracts, since the beginning
        self._vain: dict[int, tuple[int, int]] = {}  # layer → (searches to score all chunks in, next time so many)

    def _best(self, layer: LayerView, query: Tensor, scale: float, count: int, first: int, last: int) -> list[int]:
        abstracts = _abstracts(layer)
        unknown = list(range(max(len(abstracts), first), last))[-count:]
        if len(unknown) == count:
            return unknown
        search = Search(abstracts, query, scale)
        last = min(last, len(abstracts))
        if layer.grain > 1:
            together = _together(search.all(), layer.grain, count - len(unknown), first, last)
            self.looked_at += search.looked_at
            return [*together, *unknown]
        wait, penalty = self._vain.get(layer.number, (0, 1))
        plain = wait > 0 or last - first <= PLAIN
        best: list[int] = search.best(count - len(unknown), first, last, plain).tolist()
        if search.told_little:  # the layer's keys are not of that kind: seldom tried again, the result is the same
            self._vain[layer.number] = (penalty, min(2 * penalty, 64))
        elif plain:
            self._vain[layer.number] = (max(wait - 1, 0), penalty)
        else:
            self._vain.pop(layer.number, None)
        self.looked_at += search.looked_at
        return [*best, *unknown]


class Landmarks(Recent):
    """By what the query finds in a chunk's mean key (InfLLM's representatives, ShadowKV's landmarks).

    Half the work of `Bounds`. It keeps more of the attention on average, and misses the one key among others that
    differ which the answer hangs on: of questions for a code it answers a small part of what `Bounds` does.
    """

    needs_abstracts = True
    group = True

    def _best(self, layer: LayerView, query: Tensor, scale: float, count: int, first: int, last: int) -> list[int]:
        abstracts = _abstracts(layer)
        unknown = list(range(max(len(abstracts), first), last))[-count:]
        if len(unknown) == count:
            return unknown
        logits = self._logits(abstracts, query, scale)
        scores = (logits - logits.logsumexp(-1, keepdim=True)).logsumexp(0)  # heads count alike, see kvstore.search
        if layer.grain > 1:
            last = min(last, len(abstracts))
            return [*_together(scores, layer.grain, count - len(unknown), first, last), *unknown]
        best: list[int] = (first + top(scores[first:last], count - len(unknown))).tolist()
        return [*best, *unknown]

    def _logits(self, abstracts: Abstracts, query: Tensor, scale: float) -> Tensor:
        return abstracts.landmarks(query, scale)


class Blend(Landmarks):
    """Halfway between `Bounds` and `Landmarks`: a chunk's best key lies above its mean and below its bound."""

    def _logits(self, abstracts: Abstracts, query: Tensor, scale: float) -> Tensor:
        return abstracts.landmarks(query, scale).add_(abstracts.bounds(query, scale)).mul_(0.5)


class HeavyHitters(Recent):
    """By the attention a chunk has had so far: H2O (Zhang et al., NeurIPS '23, https://arxiv.org/abs/2306.14048).

    Sums over heads and tokens; those of the prompt that are known are its last ones (`prompt_ended`). In the paper what
    is not kept is lost; here a chunk not chosen keeps its sum and comes back when others fall behind.
    """

    needs_mass = True

    def __init__(self, sinks: int = 1, recent: int = 2) -> None:
        super().__init__(sinks, recent)
        self._sums: dict[int, Tensor] = {}

    def attended(self, layer: LayerView, chunks: Sequence[int], mass: Tensor) -> None:
        """See `ChunkSelector`."""
        sums = self._of(layer)
        sums[torch.as_tensor(chunks, dtype=torch.long)] += mass.sum(0).to(sums)

    def prompt_ended(self, layer: LayerView, mass: Tensor) -> None:
        """See `ChunkSelector`."""
        sums = self._of(layer)
        sums[: mass.shape[1]] += mass.sum(0).to(sums)

    def truncated(self, layer: LayerView, chunks: int) -> None:
        """See `ChunkSelector`."""
        if layer.number in self._sums:
            self._sums[layer.number] = self._sums[layer.number][:chunks].clone()

    def forget(self) -> None:
        """See `ChunkSelector`."""
        self._sums.clear()

    def _of(self, layer: LayerView) -> Tensor:
        """Sums of the layer's chunks [chunks]."""
        return _grown(self._sums, layer)

    def _best(self, layer: LayerView, query: Tensor, scale: float, count: int, first: int, last: int) -> list[int]:
        best: list[int] = (first + top(self._of(layer)[first:last], count)).tolist()
        return best


class PromptWindow(Recent):
    """By what the end of the prompt attended to: SnapKV (Li et al., NeurIPS '24, https://arxiv.org/abs/2404.14469).

    Its votes hold until the next prompt ends. Chunks that came since, which the paper keeps beside the budget, share
    it: the newest of them, up to half of it while the prompt's wait. Votes are not smoothed over neighbours: a chunk
    is a neighbourhood.
    """

    needs_mass = True

    def __init__(self, sinks: int = 1, recent: int = 2) -> None:
        super().__init__(sinks, recent)
        self._votes: dict[int, Tensor] = {}

    def prompt_ended(self, layer: LayerView, mass: Tensor) -> None:
        """See `ChunkSelector`."""
        self._votes[layer.number] = mass.sum(0).to("cpu", torch.float32)

    def truncated(self, layer: LayerView, chunks: int) -> None:
        """See `ChunkSelector`."""
        if layer.number in self._votes:
            self._votes[layer.number] = self._votes[layer.number][:chunks].clone()

    def forget(self) -> None:
        """See `ChunkSelector`."""
        self._votes.clear()

    def _best(self, layer: LayerView, query: Tensor, scale: float, count: int, first: int, last: int) -> list[int]:
        votes = self._votes.get(layer.number)
        prompt = min(max(len(votes) if votes is not None else 0, first), last)  # chunks before it are the prompt's
        since = min(last - prompt, max(count // 2, count - (prompt - first)))
        newest = list(range(last - since, last))
        if votes is None or count == since:
            return newest
        best: list[int] = (first + top(votes[first:prompt], count - since)).tolist()
        return [*best, *newest]


class Oracle(Recent):
    """By the attention that full attention would give: what a policy can reach at most. Needs `LayerView.mass`."""

    needs_mass = True

    def _best(self, layer: LayerView, query: Tensor, scale: float, count: int, first: int, last: int) -> list[int]:
        if layer.mass is None:
            raise ValueError("the oracle needs a layer that tells the true attention (LayerView.mass)")
        best: list[int] = (first + top(layer.mass(query, scale).sum(0)[first:last], count)).tolist()
        return best


SELECTORS: dict[str, Callable[[int, int], ChunkSelector]] = {
    "bounds": Bounds,
    "landmarks": Landmarks,
    "blend": Blend,
    "h2o": HeavyHitters,
    "snapkv": PromptWindow,
    "recent": Recent,
    "oracle": Oracle,
}
DEFAULT_SELECTOR = "bounds"


def make_selector(name: str = DEFAULT_SELECTOR, sinks: int = 1, recent: int = 2) -> ChunkSelector:
    """The selector of that name for one sequence. Raises `UsageError` for a name that is not in `SELECTORS`."""
    if name not in SELECTORS:
        raise UsageError(f"{name!r} is not a policy of sparse attention; there are {', '.join(SELECTORS)}")
    return SELECTORS[name](sinks, recent)


def _abstracts(layer: LayerView) -> Abstracts:
    if layer.abstracts is None:
        raise ValueError(f"layer {layer.number} has no abstracts to choose by")
    return layer.abstracts


def _together(scores: Tensor, grain: int, count: int, first: int, last: int) -> list[int]:
    """The best groups by the sums of what scores [chunks], logarithms, stand for."""
    if first >= last:
        return []
    best: list[int] = groups((scores - scores[first:last].max()).exp(), grain, count, first, last).tolist()
    return best


def _grown(held: dict[int, Tensor], layer: LayerView) -> Tensor:
    """The layer's own tensor, with a zero for every chunk that is new."""
    have = held.get(layer.number)
    if have is None:
        have = held[layer.number] = torch.zeros(layer.chunks)
    elif len(have) < layer.chunks:
        have = held[layer.number] = torch.cat((have, have.new_zeros(layer.chunks - len(have))))
    return have

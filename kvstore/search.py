"""The chunks whose abstracts promise most, found from coarse to fine. The result is that of scoring them all.

A chunk's score is what its bounds allow of each head's softmax, averaged over heads: log Σ_h exp(bound_hc - norm_h),
where norm_h is the logarithm of the head's sum over the groups of one coarse level, so that heads count alike whatever
the spread of their scores, and that the score of a group is never below that of a chunk in it.

Why the mean of softmaxes: of 40 questions for a code in 1024 and 2048 tokens of dialogue the bundled mixture of
experts answers, with 25 / 12.5 / 8 % of the chunks, 38 / 35 / 30; with the maximum over heads 38 / 34 / 29; with
scores relative to each head's best, summed, 37 / 34 / 26, and their maximum 37 / 26 / 14. Norms over all chunks in
place of groups make no difference. (`bench/sparse_quality.py` asks such questions; the dense one: 23 / 16 / 12 with
the mean, 24 / 18 / 13 with the maximum, 15 / 11 / 4 with the last.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvstore.abstracts import FAN, Abstracts

NORM_GROUPS = 128  # norms come from the finest level with no more entries than this
PLAIN = 512  # up to so many candidates, scoring all is never slower: one product of many rows beats several of few
_SLACK = 1e-3  # a group is passed over if it scores less than needed by more than this: rounding is far below it


def pooled(logits: Tensor, norm: Tensor) -> Tensor:
    """Scores of chunks [n] from what each head gives them [heads, n] and the heads' norms [heads]."""
    return (logits - norm[:, None]).logsumexp(0)


def top(scores: Tensor, count: int) -> Tensor:
    """Positions of the `count` highest scores, best first; of equals the newest."""
    order = scores.flip(0).argsort(descending=True, stable=True)[:count]
    return len(scores) - 1 - order


def groups(scores: Tensor, grain: int, count: int, first: int, last: int) -> Tensor:
    """`count` of the chunks first ≤ c < last: whole groups, those whose scores [chunks] sum to most.

    Groups are `grain` chunks, a power of two, from a multiple of `grain` on; the first and the last may lack what lies
    outside. What remains of `count` goes to groups of half the size, and so on, down to single chunks.
    """
    count = min(count, last - first)
    free = torch.zeros(len(scores), dtype=torch.bool)
    free[first:last] = True
    found = []
    while count > 0:
        where = free.nonzero()[:, 0] // grain
        sums = torch.full((int(where[-1]) + 1,), -torch.inf)
        sums[where] = 0.0
        sums.index_add_(0, where, scores[free].float())
        chunks = (top(sums, count // grain)[:, None] * grain + torch.arange(grain)).flatten()
        chunks = chunks[chunks < last]
        chunks = chunks[free[chunks]]
        found.append(chunks)
        free[chunks] = False
        count, grain = count - len(chunks), max(grain // 2, 1)
    return torch.cat(found) if found else torch.empty(0, dtype=torch.long)


class Search:
    """Looks for the best chunks of one layer for one query.

    From coarse to fine it takes half the time of scoring all where neighbouring chunks are alike and the coarse levels
    tell them apart, and a third more where they do not, which is soon seen: it scores all then (`told_little`). Whether
    that is so hangs on the layer, not on the size: `kvstore.selection.Bounds` goes by what came of it before.
    """

    def __init__(self, abstracts: Abstracts, query: Tensor, scale: float) -> None:
        self._abstracts, self._query, self._scale = abstracts, query, scale
        self._sizes = abstracts.levels
        self._top = next((i for i, n in enumerate(self._sizes) if n <= NORM_GROUPS), len(self._sizes) - 1)
        logits = abstracts.bounds(query, scale, level=self._top)
        self._norm = logits.logsumexp(-1)
        self._coarse = pooled(logits, self._norm)
        self.looked_at = self._sizes[self._top]  # abstracts it took so far
        self.told_little = False  # the coarse levels left more than half of the candidates in question

    def best(self, count: int, first: int, last: int, plain: bool | None = None) -> Tensor:
        """The `count` best of the chunks first ≤ c < last, best first. `plain`: score all (None: if they are few)."""
        count = min(count, max(last - first, 0))
        if count <= 0:
            return torch.empty(0, dtype=torch.long)
        if plain is None:
            plain = last - first <= PLAIN
        plain = plain or self._top == 0  # all have been scored for the norms
        candidates = torch.arange(first, last) if plain else self._unbeaten(count, first, last)
        if len(candidates) == last - first:
            return first + top(self.all()[first:last], count)
        return candidates[top(self._scores(0, candidates), count)]

    def all(self) -> Tensor:
        """Scores of all chunks [n]."""
        if self._top == 0:
            return self._coarse
        self.looked_at += self._sizes[0]
        return pooled(self._abstracts.bounds(self._query, self._scale), self._norm)

    def _scores(self, level: int, index: Tensor) -> Tensor:
        """Scores of some entries of a level."""
        if level == self._top:
            return self._coarse[index]
        self.looked_at += len(index)
        return pooled(self._abstracts.bounds(self._query, self._scale, level, index), self._norm)

    def _unbeaten(self, count: int, first: int, last: int) -> Tensor:
        """The chunks among which the best are, ascending; all of them where the coarse levels tell too little.

        Down once along the best groups alone: the score of the `count`-th chunk found there is one the true best
        reach at least. Down again into every group that could hold one of them.
        """
        index = torch.arange(self._sizes[self._top])
        scores = self._coarse
        for level in range(self._top - 1, -1, -1):
            index = index[top(scores, 2 + count // FAN ** (level + 1))]
            index = self._inside(_children(index, self._sizes[level]), level, first, last)
            scores = self._scores(level, index)
        if len(scores) < count:
            return torch.arange(first, last)
        needed = scores.topk(count).values[-1] - _SLACK
        index, scores = torch.arange(self._sizes[self._top]), self._coarse
        for level in range(self._top - 1, -1, -1):
            index = self._inside(_children(index[scores >= needed], self._sizes[level]), level, first, last)
            if len(index) * FAN**level > (last - first) // 2:
                self.told_little = True
                return torch.arange(first, last)
            if level:
                scores = self._scores(level, index)
        return index

    def _inside(self, index: Tensor, level: int, first: int, last: int) -> Tensor:
        """Those that hold a chunk from `first` to `last`."""
        width = FAN**level
        return index[(index * width < last) & (index * width + width > first)]


def _children(groups: Tensor, size: int) -> Tensor:
    """The entries of the finer level, of `size` entries, that are in these groups."""
    index = (groups[:, None] * FAN + torch.arange(FAN)).flatten()
    return index[index < size]

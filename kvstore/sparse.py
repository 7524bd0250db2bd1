"""Sparse attention of one layer of one sequence: what is known of its chunks, and which of them a new token attends to.

Opt-in and lossy. What is not chosen stays where it is, and can be chosen for the next token.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvstore.abstracts import Abstracts
from kvstore.chunks import KVShape
from kvstore.selection import DEFAULT_SELECTOR, LayerView, make_selector
from kvstore.shares import Ahead, grain, layer_budgets

SINKS, RECENT = 1, 2  # chunks that are always attended to
_BY_BOUNDS, _BY_MEANS = ("bounds",), ("landmarks", "blend")
OBSERVED = 16  # the prompt's last queries, whose attention is measured (SnapKV's window)


@dataclass(frozen=True, slots=True)
class SparseOptions:
    """`budget`: tokens that a new token attends to (int), or the share of all there are (float, above 0 and up to 1).

    How many neighbouring chunks a layer chooses together, it decides at the end of the prompt (`SparseRow.grain`).
    With `by_layer` the layers share what they have together by how their attention is spread over the prompt.
    """

    budget: int | float
    policy: str = DEFAULT_SELECTOR
    by_layer: bool = False

    def abstract_nbytes(self, shape: KVShape, capacity: int, tokens: int) -> int:
        """Bytes of the abstracts of a layer of one sequence of `capacity` tokens in chunks of `tokens`."""
        if self.policy not in _BY_BOUNDS and self.policy not in _BY_MEANS:
            return 0
        parts = 3 if self.policy in _BY_MEANS else 2
        one = shape.kv_heads * shape.key_dim * _kept(shape).itemsize
        return -(-capacity // tokens) * parts * one * 4 // 3  # and the groups above them


class SparseRow:
    """Abstracts, a selector and a guess at the next choice, of one layer of one sequence in chunks of `tokens`."""

    def __init__(self, options: SparseOptions, layer: int, shape: KVShape, tokens: int, chunks: int) -> None:
        """`chunks` are foreseen; there may be more."""
        self._options = options
        self._tokens = tokens
        self.selector = make_selector(options.policy, SINKS, RECENT)
        self.view = LayerView(layer, 0)
        if self.selector.needs_abstracts:
            means = options.policy in _BY_MEANS
            self.view.abstracts = Abstracts(shape.kv_heads, shape.key_dim, _kept(shape), means=means)
            self.view.abstracts.reserve(chunks)
        self.ahead = Ahead()
        self.mass: torch.Tensor | None = None  # [heads, chunks] of the prompt's last queries
        self._measured = 0  # chunks of the prompt whose end was
        self.factor = 1.0  # of the budget, by how the layer's attention is spread
        self.attended = self.held = 0  # tokens, of all choices

    def full(self, number: int, keys: torch.Tensor) -> None:
        """Chunk `number` holds keys [kv heads, n, Dk], and will not change for now."""
        if self.view.abstracts is not None:
            self.view.abstracts.set(number, keys)

    def crop(self, chunks: int) -> None:
        """Only the first so many full chunks remain."""
        self.view.chunks = chunks
        if chunks < self._measured - 1:  # the last one may not have been full
            self.mass, self._measured, self.view.grain = None, 0, 1
        if self.view.abstracts is not None:
            self.view.abstracts.truncate(chunks)
        self.selector.truncated(self.view, chunks)
        self.ahead.truncated(self.view.number, chunks)

    def choose(self, length: int, query: torch.Tensor, scale: float) -> Sequence[int] | None:
        """Chunks for query [heads, D], of `length` tokens held, ascending; None: all of them."""
        self.view.chunks = -(-length // self._tokens)
        budget = self._budget(length)
        self.held += length
        if budget >= self.view.chunks:
            self.attended += length
            return None
        chosen = self.selector.choose(self.view, query, scale, budget)
        self.ahead.noted(self.view.number, chosen, SINKS + RECENT)
        self.attended += min(length, len(chosen) * self._tokens)
        return chosen

    def observed(self, mass: torch.Tensor) -> None:
        """The prompt's last queries gave each chunk so much of their attention: mass [heads, chunks]."""
        self.mass, self._measured = mass, mass.shape[1]
        self.view.chunks = mass.shape[1]
        self.selector.prompt_ended(self.view, mass)
        self.suit()

    def suit(self) -> None:
        """Choose as many neighbouring chunks together as the attention measured last allows."""
        if self.mass is not None and self.selector.group:
            n = self.mass.shape[1]
            self.view.grain = grain(self.mass, self._budget(n * self._tokens), min(SINKS, n), n - RECENT)

    @property
    def grain(self) -> int:
        """Neighbouring chunks that are chosen, and fetched, together; 1 until the end of a prompt has been seen."""
        return self.view.grain

    def _budget(self, length: int) -> int:
        """Chunks that one of `length` tokens may attend to."""
        given = self._options.budget
        tokens = given * length if isinstance(given, float) else given
        return max(1, math.ceil(self.factor * tokens / self._tokens))

    def copy(self) -> SparseRow:
        """The same, for a sequence that goes on from here otherwise."""
        return copy.deepcopy(self)


def _kept(shape: KVShape) -> torch.dtype:
    return shape.dtype if shape.dtype is torch.bfloat16 else torch.float32


def share_out(rows: Sequence[SparseRow]) -> None:
    """Split what one sequence's layers may attend to together by their attention over the prompt.

    Does nothing before all have seen its end. In place: each row's `factor`.
    """
    masses = [row.mass.sum(0) if row.mass is not None else None for row in rows]
    known = [m for m in masses if m is not None]
    if not rows or len(known) < len(rows) or not rows[0]._options.by_layer:
        return
    given = rows[0]._options.budget
    each = [
        max(1, math.ceil((given * len(m) * row._tokens if isinstance(given, float) else given) / row._tokens))
        for row, m in zip(rows, known, strict=True)
    ]
    shared = layer_budgets(known, sum(each), SINKS + RECENT)
    for row, mine, before in zip(rows, shared, each, strict=True):
        row.factor = mine / before
        row.suit()
        row.mass = None

"""Chunks: some tokens' keys and values of one layer of one sequence, in one slot; and the lists of them.

A slot holds keys [kv heads, tokens, Dk] and behind them values [kv heads, tokens, Dv], each head's tokens one behind
the other, so that attention reads memory in long runs whatever part of the chunk is filled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from tiers import Lease, Slot, page_up

if TYPE_CHECKING:
    from kvstore.codecs import Grouped
    from kvstore.sparse import SparseRow

TARGET_BYTES = 1 << 20  # of a chunk: what one direct read is best at
LEAST_TOKENS, MOST_TOKENS = 16, 256


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one layer keeps of one token of one sequence. Widths in elements, of keys and of values."""

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor) -> KVShape:
        """From keys [B, kv heads, n, Dk] and values [B, kv heads, n, Dv]."""
        return cls(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype)

    @property
    def token_nbytes(self) -> int:
        """Bytes of one token."""
        return self.kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize

    def chunk_tokens(self) -> int:
        """Tokens of a chunk that is read well, a power of two."""
        tokens = MOST_TOKENS
        while tokens > LEAST_TOKENS and tokens * self.token_nbytes > TARGET_BYTES:
            tokens //= 2
        return tokens

    def chunk_nbytes(self, tokens: int) -> int:
        """Bytes of a chunk's slot."""
        return page_up(tokens * self.token_nbytes)

    def views(self, slot: Slot, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The slot as keys [kv heads, tokens, Dk] and values [kv heads, tokens, Dv]."""
        keys = self.kv_heads * tokens * self.key_dim * self.dtype.itemsize
        values = self.kv_heads * tokens * self.value_dim * self.dtype.itemsize
        k = slot.tensor[:keys].view(self.dtype).view(self.kv_heads, tokens, self.key_dim)
        v = slot.tensor[keys : keys + values].view(self.dtype).view(self.kv_heads, tokens, self.value_dim)
        return k, v


class Chunk:
    """One block of the store. `owners` sequences share it; one that wants to change it needs it for itself alone.

    While `lease` is held the chunk stays in its slot, and `views` are good: the chunk being filled, and those that
    `stay`. Others come and go. One that is coded (`codec`) has no views: it is decoded to be attended to.
    """

    __slots__ = ("codec", "coded", "key", "layer", "lease", "offset", "owners", "stays", "views", "whole")

    def __init__(self, key: str, layer: int) -> None:
        self.key = key
        self.layer = layer
        self.owners = 1
        self.stays = False
        self.offset: int | None = None  # in the spill file, once it has been written
        self.lease: Lease | None = None
        self.views: tuple[torch.Tensor, torch.Tensor] | None = None
        self.codec: Grouped | None = None  # None: as it is
        self.coded = 0  # how often what it holds has been coded
        self.whole = False  # filled to the end, as far as a store that codes has been told


class Store(Protocol):
    """What a list asks of who owns the slots."""

    def create(self, layer: int) -> Chunk:
        """A new chunk, leased."""
        ...

    def open(self, chunk: Chunk) -> None:
        """Lease the chunk, to be written to."""
        ...

    def looking(self, chunk: Chunk) -> AbstractContextManager[tuple[torch.Tensor, torch.Tensor]]:
        """The chunk's views, to be read while the context lasts."""
        ...

    def full(self, chunk: Chunk) -> None:
        """The chunk, which is leased, will not change for now."""
        ...

    def give_up(self, chunk: Chunk) -> None:
        """Nobody owns the chunk any more."""
        ...


class ChunkList:
    """One layer of one sequence: its tokens in chunks of `tokens`, the last one partly filled.

    `sparse` is told of full chunks, if there is one.
    """

    __slots__ = ("_store", "chunks", "layer", "length", "sparse", "tokens")

    def __init__(self, store: Store, layer: int, tokens: int, sparse: SparseRow | None = None) -> None:
        self.sparse = sparse
        self._store = store
        self.layer = layer
        self.tokens = tokens
        self.chunks: list[Chunk] = []
        self.length = 0

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """keys [kv heads, n, Dk] and values [kv heads, n, Dv] of the next n tokens."""
        done, n = 0, keys.shape[1]
        while done < n:
            at = self.length % self.tokens
            if at == 0:
                self.chunks.append(self._store.create(self.layer))
            chunk = self._own(len(self.chunks) - 1, at)
            part = min(n - done, self.tokens - at)
            assert chunk.views is not None
            k, v = chunk.views
            k[:, at : at + part] = keys[:, done : done + part]
            v[:, at : at + part] = values[:, done : done + part]
            done, self.length = done + part, self.length + part
            if at + part == self.tokens:
                if self.sparse is not None:
                    self.sparse.full(len(self.chunks) - 1, k)
                self._store.full(chunk)

    def _own(self, number: int, filled: int) -> Chunk:
        """The chunk, leased and nobody else's: copied first if it is shared (copy on write)."""
        chunk = self.chunks[number]
        if chunk.owners == 1:
            if filled:
                self._store.open(chunk)
            return chunk
        mine = self._store.create(self.layer)
        try:
            with self._store.looking(chunk) as views:
                assert mine.views is not None
                for new, old in zip(mine.views, views, strict=True):
                    new[:, :filled] = old[:, :filled]
        except BaseException:
            self._store.give_up(mine)
            raise
        mine.coded = chunk.coded
        chunk.owners -= 1
        self.chunks[number] = mine
        return mine

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens."""
        keep = -(-length // self.tokens)
        for chunk in self.chunks[keep:]:
            self._leave(chunk)
        del self.chunks[keep:]
        self.length = length
        if self.sparse is not None:
            self.sparse.crop(length // self.tokens)

    def fork(self) -> ChunkList:
        """Another sequence with the same tokens so far; nothing is copied before one of the two changes."""
        sparse = self.sparse.copy() if self.sparse is not None else None
        other = ChunkList(self._store, self.layer, self.tokens, sparse)
        other.chunks, other.length = list(self.chunks), self.length
        for chunk in self.chunks:
            chunk.owners += 1
        return other

    def spans(self, start: int, stop: int, only: Sequence[int] | None = None) -> Iterator[tuple[Chunk, int, int]]:
        """The chunks that hold tokens [start, stop), and which of their tokens those are; `only` those numbers."""
        first, end = start // self.tokens, -(-stop // self.tokens)
        for number in range(first, end) if only is None else (n for n in only if first <= n < end):
            at = number * self.tokens
            yield self.chunks[number], max(start - at, 0), min(stop - at, self.tokens)

    def _leave(self, chunk: Chunk) -> None:
        chunk.owners -= 1
        if chunk.owners == 0:
            self._store.give_up(chunk)

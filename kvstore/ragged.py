"""Ragged sequences: the new tokens of many sequences, of any length each, as one row of a pass over the model.

To transformers the row is one sequence without a past; positions are given with it, and attention, which alone looks
at more than one token, takes the row apart again: every sequence attends to its own keys and values, which are a
`TieredCache` on a store that all of them share. Continuous batching (Yu et al. 2022, Orca) with prompts in pieces that
ride along with decoding (Agrawal et al. 2023, https://arxiv.org/abs/2308.16369).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from kvstore.attention import Expand, Rule
from kvstore.chunks import Chunk, ChunkList, KVShape
from kvstore.store import ChunkStore, KVBooks
from kvstore.tiered import MakeStore, TieredCache, TieredLayer
from kvstore.tiered_attention import FewTokens, attend, one_token


class RaggedLayer(CacheLayerMixin):  # type: ignore[misc]
    """Holds what the row under way has been given, until attention takes it apart."""

    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.given: tuple[torch.Tensor, torch.Tensor] | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: sequences make their own."""
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take key_states [1, kv heads, N, Dk] and value_states [1, kv heads, N, Dv] of the row, and give them back."""
        self.given = key_states, value_states
        return key_states, value_states

    def get_seq_length(self) -> int:
        """None of its own."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys seen by so many queries, the first one's position)."""
        return query_length, 0

    def get_max_length(self) -> int:
        """No bound of its own."""
        return -1


class RaggedCache(Cache):  # type: ignore[misc]
    """What transformers is given as the cache of a row; `new_sequence` makes those it is made of.

    `windows[i]` is the window of layer i (None: it sees everything). `parts`: the row's sequences, in order, each with
    how many of the row's tokens are its own.
    """

    def __init__(self, windows: Sequence[int | None], make_store: MakeStore, **options: Any) -> None:
        """`options` as for `TieredCache`."""
        super().__init__(layers=[RaggedLayer() for _ in windows])
        self._windows = list(windows)
        self._make_store = make_store
        self._options = options
        self._store: ChunkStore | None = None
        self.parts: list[tuple[TieredCache, int]] = []
        self._seen = KVBooks()

    def new_sequence(self) -> TieredCache:
        """An empty sequence. `close` it when it leaves: its memory is the next one's."""
        return TieredCache(self._windows, self._store_for, owns_store=False, **self._options)

    def fork(self, sequence: TieredCache, length: int) -> TieredCache:
        """Another sequence with the first `length` tokens of this one; nothing is copied before one of them changes."""
        other = self.new_sequence()
        for mine, its in zip(other.tiered, sequence.tiered, strict=True):
            its.append_new()
            if its.is_initialized:
                mine.take(its, length)
        return other

    def _store_for(self, shape: KVShape, batch: int) -> ChunkStore:
        if self._store is None:
            self._store = self._make_store(shape, batch)
        return self._store

    @property
    def store(self) -> ChunkStore | None:
        """What the sequences share; None before the first pass."""
        return self._store

    def unseen(self) -> KVBooks:
        """What was moved since this was asked last."""
        if self._store is None:
            return KVBooks()
        now, then = self._store.books, self._seen
        now.bytes_read = self._store.bytes_read
        self._seen = now.copy()
        return now - then

    def close(self) -> None:
        """Give memory and disk back; sequences are of no use after this."""
        store, self._store = self._store, None
        self.parts = []
        if store is not None:
            store.close()


def attend_ragged(
    cache: RaggedCache, number: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rule: Rule, *,
    sinks: torch.Tensor | None = None, expand: Expand | None = None, few: FewTokens | None = None,
) -> torch.Tensor:  # fmt: skip
    """Attention of a row's query [1, heads, N, D] in layer `number`, each part to its own sequence, whose new keys
    [1, kv heads, N, D] and values [1, kv heads, N, Dv] are: → [1, N, heads, Dv] of the type of `query`.

    `sinks`, `expand` and `few` as for `attend`.
    """
    layer = cache.layers[number]
    given, layer.given = layer.given, None
    assert given is not None, "attention to what was not given to the cache"
    out = query.new_empty(1, query.shape[2], query.shape[1], values.shape[3])
    decoding: list[tuple[int, TieredCache, TieredLayer]] = []
    at = 0
    for sequence, count in cache.parts:
        part = slice(at, at + count)
        mine = sequence.layers[number]
        mine.update(given[0][:, :, part], given[1][:, :, part])
        if count == 1 and expand is None and few is not None and mine.past:
            decoding.append((at, sequence, mine))
        else:
            out[:, part] = attend(
                sequence, mine, query[:, :, part], keys[:, :, part], values[:, :, part], rule, [0], sinks=sinks,
                expand=expand, few=few,
            )  # fmt: skip
        at += count
    if decoding:
        assert few is not None
        _decode(cache, number, decoding, query, keys, values, out, rule, sinks, few)
    return out


def _decode(
    cache: RaggedCache, number: int, decoding: Sequence[tuple[int, TieredCache, TieredLayer]], query: torch.Tensor,
    keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor, rule: Rule, sinks: torch.Tensor | None,
    few: FewTokens,
) -> None:  # fmt: skip
    """One new token of each of these sequences, in one call of the kernel."""
    places = [at for at, *_ in decoding]
    rows: list[ChunkList] = []
    for _, _, layer in decoding:
        layer.append_new()
        rows.append(layer.rows[0])
    store = decoding[0][1].store
    queries = query[0, :, places].transpose(0, 1).unsqueeze(2).cpu()  # [B, heads, 1, D]
    found = None
    if not any(row.sparse is not None and row.sparse.selector.needs_mass for row in rows):
        found = one_token(store, rows, queries, rule, [0] * len(rows), few, lambda b: _later(cache, number, rows, b))
    if found is None:  # not the kernel's kind: one after another
        for at, sequence, layer in decoding:
            # what was given has been appended: it is all past now, and nothing is new
            out[:, at : at + 1] = attend(
                sequence, layer, query[:, :, at : at + 1], keys[:, :, :0], values[:, :, :0], rule, [0], sinks=sinks
            )
        return
    if sinks is not None:
        batch, heads = found.largest.shape
        found.merge(torch.zeros_like(found.mixed)[:, :, None], sinks.float().cpu().expand(batch, heads))
    out[0, places] = found.result()[0][:, :, 0].to(out)


def _later(cache: RaggedCache, number: int, rows: Sequence[ChunkList], row: int) -> Iterator[Chunk]:
    """What attention will read after this sequence of this layer, around to the next step's first layer."""
    store = cache.store
    if store is None or store.holds_all:
        return
    for other in rows[row + 1 :]:
        yield from (chunk for chunk in other.chunks if chunk.lease is None)
    n = len(cache.layers)
    for i in range(1, n):
        for sequence, _ in cache.parts:
            yield from sequence.tiered[(number + i) % n].passing()

"""The cache whose chunks are in memory, on their way, or on disk: transformers' `Cache`, one layer at a time.

`update` hands back the new keys and values only; `kvstore.tiered_attention` reads what came before, chunk by
chunk, from the store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from kvstore.attention import gathered
from kvstore.chunks import Chunk, ChunkList, KVShape
from kvstore.front import Front
from kvstore.store import ChunkStore, KVBooks

MakeStore = Callable[[KVShape, int], ChunkStore]  # (of the first layer, sequences)


class TieredLayer(CacheLayerMixin):  # type: ignore[misc]
    """One attention layer of a `TieredCache`: a list of chunks per sequence."""

    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: TieredCache, number: int, window: int | None) -> None:
        super().__init__()
        self._cache = cache
        self.number = number  # among the tiered layers
        self.window = window
        self.is_sliding = window is not None
        self.front: Front | None = None  # in device memory; `rows` hold what comes after
        self.rows: list[ChunkList] = []
        self._new: tuple[torch.Tensor, torch.Tensor] | None = None  # given, and not yet appended
        self._freed = 0  # chunks at the front of each sequence that the window has left behind

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make an empty sequence for each row of key_states [B, kv heads, n, Dk]."""
        shape = KVShape.of(key_states, value_states)
        store = self._cache.store_for(shape, key_states.shape[0])
        windowed = self.window is not None
        ahead = self._cache.front_tokens(shape, key_states.shape[0])
        if ahead and not windowed:  # a window moves on: nothing of it is worth keeping
            self.front = Front(ahead, key_states, value_states)
        self.rows = [store.new_list(self.number, shape, window=windowed) for _ in range(key_states.shape[0])]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take key_states [B, kv heads, n, Dk], value_states [B, kv heads, n, Dv] of n further tokens, and give them
        back: attention itself asks for what came before."""
        self.append_new()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._new = key_states, value_states
        return key_states, value_states

    @property
    def past(self) -> int:
        """Tokens before those given last."""
        return self.ahead + (self.rows[0].length if self.rows else 0)

    @property
    def ahead(self) -> int:
        """Tokens in device memory: the position of the first in `rows`, once there is one."""
        return self.front.length if self.front is not None else 0

    def append_new(self) -> None:
        """Write the tokens given last to their chunks."""
        new, self._new = self._new, None
        if new is None:
            return
        taken = self.front.append(*new) if self.front is not None else 0
        for row, keys, values in zip(self.rows, *new, strict=True):
            row.append(keys[:, taken:], values[:, taken:])
        self._leave_behind()

    def _leave_behind(self) -> None:
        """Chunks out of the window leave memory; they stay on disk, for going back."""
        if self.window is None or not self.rows:
            return
        store, first = self._cache.store, max(0, self.past - self.window + 1) // self.rows[0].tokens
        for row in self.rows:
            for chunk in row.chunks[self._freed : first]:
                if chunk.lease is not None:
                    store.spill(chunk)
        self._freed = max(self._freed, first)

    def passing(self, first_row: int = 0) -> Iterator[Chunk]:
        """The chunks that the next token's attention will have to wait for, as far as that is known, from one of the
        sequences on."""
        low = 0 if self.window is None else max(0, self.past - self.window + 1)
        for row in self.rows[first_row:]:
            if row.sparse is not None:
                foreseen = (row.chunks[c] for c in row.sparse.ahead.foresee(self.number) if c < len(row.chunks))
                yield from (chunk for chunk in foreseen if chunk.lease is None)
                continue
            for chunk, *_ in row.spans(low, row.length):
                if chunk.lease is None:
                    yield chunk

    def read(self, start: int, stop: int, row: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [start, stop) of one sequence: keys [kv heads, n, Dk], values [kv heads, n, Dv], copied."""
        self.append_new()
        parts = []
        if start < self.ahead:
            assert self.front is not None
            held = slice(start, min(stop, self.ahead))
            parts.append((self.front.keys[row, :, held].cpu(), self.front.values[row, :, held].cpu()))
        if stop > self.ahead:
            spans = list(self.rows[row].spans(max(start - self.ahead, 0), stop - self.ahead))
            ((keys, values),) = gathered(self._cache.store.reading(spans, ()), stop - start + 1)
            parts.append((keys[0], values[0]))
        return torch.cat([k for k, _ in parts], 1), torch.cat([v for _, v in parts], 1)

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.past + (self._new[0].shape[2] if self._new is not None else 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys seen by so many further queries, the first one's position)."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No bound of its own."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens."""
        if tokens_to_remove > 0:
            raise ValueError("crop takes the number of tokens to take back as a negative number")
        length = max(0, self.get_seq_length() + tokens_to_remove)
        if self._new is not None and tokens_to_remove:
            # what is not to be kept is not appended: an interrupted pass must not wait for a disk to be taken back
            keep = length - self.past
            self._new = tuple(t[:, :, :keep] for t in self._new) if keep > 0 else None  # type: ignore[assignment]
        self.append_new()
        for row in self.rows:  # a pass that was cut short may have left them uneven
            row.crop(min(row.length, max(0, length - self.ahead)))
        if self.front is not None:
            self.front.crop(length)
        self._freed = min(self._freed, length // self.rows[0].tokens if self.rows else 0)

    def reset(self) -> None:
        """Forget all tokens, and give the memory back."""
        self._replace([])
        self.front = None
        self._new, self._freed, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row beam_idx[i] is; shared until it changes."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, in this order; a row may come several times."""
        self.append_new()
        if self.rows:
            chosen = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
            self._select([int(i) for i in chosen])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self.append_new()
        self._select([i for i in range(len(self.rows)) for _ in range(repeats)])

    def _select(self, rows: list[int]) -> None:
        if self.front is not None:
            self.front.select(rows)
        self._replace([self.rows[i].fork() for i in rows])

    def take(self, other: TieredLayer, length: int) -> None:
        """Become the first `length` tokens of another layer like this one, of another sequence of the same store."""
        assert other.front is None, "what is in device memory cannot be shared"
        self._cache.store_for(other._cache.store.shape_of(other.number), len(other.rows))
        self._replace([row.fork() for row in other.rows])
        for row in self.rows:
            row.crop(min(row.length, length))
        self._freed = min(other._freed, length // self.rows[0].tokens if self.rows else 0)
        self.is_initialized = True

    def _replace(self, rows: list[ChunkList]) -> None:
        old, self.rows = self.rows, rows
        for row in old:
            row.crop(0)


class TieredCache(Cache):  # type: ignore[misc]
    """A request's cache. `windows[i]` is the window of layer i (None: it sees everything); a layer that is no
    attention layer comes as transformers' own object instead.

    `make_store` is asked once, when the first layer's shape is known. On a device with memory of its own the first
    `front_tokens(shape, sequences)` stay there; what follows is attended to on the host if `on_host` says so of that
    many queries, or brought up by `lift`. One that does not own its store leaves it to others when it is closed.
    """

    def __init__(
        self,
        layers: Sequence[int | CacheLayerMixin | None],
        make_store: MakeStore,
        *,
        front_tokens: Callable[[KVShape, int], int] = lambda shape, batch: 0,
        on_host: Callable[[int], bool] = lambda queries: True,
        lift: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
        owns_store: bool = True,
    ) -> None:
        self.front_tokens = front_tokens
        self.on_host = on_host
        self.lift = lift
        self._owns_store = owns_store
        made: list[Any] = []
        self.tiered: list[TieredLayer] = []
        for layer in layers:
            if isinstance(layer, CacheLayerMixin) or not (layer is None or isinstance(layer, int)):
                made.append(layer)
            else:
                self.tiered.append(TieredLayer(self, len(self.tiered), layer))
                made.append(self.tiered[-1])
        super().__init__(layers=made)
        self._make_store = make_store
        self._store: ChunkStore | None = None
        self._seen = KVBooks()
        self.prompt_ends = True  # whether the pass under way holds the last of a prompt

    @property
    def store(self) -> ChunkStore:
        """Where the chunks are."""
        assert self._store is not None, "nothing has been given to the cache yet"
        return self._store

    def store_for(self, shape: KVShape, batch: int) -> ChunkStore:
        """The store, made now if it must be."""
        if self._store is None:
            self._store = self._make_store(shape, batch)
        return self._store

    @property
    def books(self) -> KVBooks:
        """What was moved for this cache."""
        if self._store is None:
            return KVBooks()
        books = self._store.books
        books.bytes_read = self._store.bytes_read
        return books

    @property
    def grains(self) -> tuple[int, ...]:
        """Neighbouring chunks that the first sequence chooses together, of each layer attended to sparsely."""
        rows = (layer.rows[0] for layer in self.tiered if layer.rows)
        return tuple(row.sparse.grain for row in rows if row.sparse is not None)

    def unseen(self) -> KVBooks:
        """What was moved since this was asked last."""
        now, then = self.books, self._seen
        self._seen = now.copy()
        return now - then

    def close(self) -> None:
        """Give memory and disk back. The cache is empty afterwards, and may be filled anew."""
        store, self._store = self._store, None
        for layer in self.tiered:
            layer.reset()
        if store is not None and self._owns_store:
            store.close()

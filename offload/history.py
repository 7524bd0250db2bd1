"""A sequence that goes on: its tokens, the cache that holds them, and what of it is on disk.

What is asked next is computed from the longest front that is known: cut back in memory, gone back to a snapshot, or
read from the store; only the rest is prefilled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from transformers.cache_utils import Cache

from kvstore import NODE_TOKENS, PrefixStore, Segment, Snapshot, TieredCache, WindowLayer, rollback, states
from tiers import DamagedError, GoneError, OffloadError, StoreError

_SNAPSHOTS = 64  # of bounded layers; the oldest go


class Computes(Protocol):
    """What is asked of an engine."""

    def new_cache(self, capacity: int) -> Cache:
        """An empty cache."""
        ...


class History:
    """`tokens` are what `cache` holds. With a `store`, what is computed is written there as it grows.

    `reused` and `read_s`: tokens that the last `begin` did not have to compute, and seconds spent on reading them.
    """

    def __init__(self, engine: Computes, capacity: int, device: torch.device, store: PrefixStore | None = None) -> None:
        self._engine = engine
        self._capacity = capacity
        self._device = device
        self.store = store
        self.cache: Cache | None = None
        self.tokens: list[int] = []
        self.head: str | None = None  # the last node stored, and
        self.stored: list[int] = []  # the tokens up to its end
        self.reused = 0
        self.read_s = 0.0
        self.notes: list[str] = []
        self.on_stored: Callable[[], None] = lambda: None
        self._snapshots: list[Snapshot] = []

    def begin(self, ids: Sequence[int]) -> Cache:
        """A cache that holds the longest known front of `ids`, all but the last token at most."""
        began = time.perf_counter()
        wanted = len(ids) - 1
        common = min(_common(self.tokens, ids), wanted)
        kept = self._back_to(common)
        if kept < wanted and self.store is not None:
            self._from_store(ids[:wanted], kept)
        if self.cache is None:
            self.cache = self._engine.new_cache(self._capacity)
        self._keep_windows()
        self.reused = len(self.tokens)
        self.read_s = time.perf_counter() - began
        return self.cache

    def passed(self, cache: Cache | None, tokens: torch.Tensor) -> None:
        """A pass over tokens [1, n] has ended well."""
        if cache is None or cache is not self.cache:
            return
        before = len(self.tokens)
        self.tokens += tokens[0].tolist()
        if self.store is None:
            return
        new = len(self.tokens)
        if new // NODE_TOKENS > before // NODE_TOKENS or (new - before > 1 and states.has_states(cache)):
            self._write(new if states.has_states(cache) else new // NODE_TOKENS * NODE_TOKENS)

    def mark(self) -> None:
        """A turn ends here: write down what is not on disk yet, and remember what cannot be cut."""
        if self.cache is None or not self.tokens or rollback(self.cache, len(self.tokens)) is False:
            self.forget()
            return
        if self.store is not None:
            self._write(len(self.tokens))
        if Snapshot.needed(self.cache):
            self._snapshots = [*self._snapshots[1 - _SNAPSHOTS :], Snapshot(self.cache, len(self.tokens))]

    def forget(self) -> None:
        """Nothing is held any more; what is on disk stays there."""
        if isinstance(self.cache, TieredCache):
            self.cache.close()
        self.cache, self.tokens, self._snapshots = None, [], []

    def _back_to(self, length: int) -> int:
        """Make the cache hold `length` tokens of its own, or fewer if it cannot be cut there; returns how many."""
        if self.cache is None or not length:
            self.forget()
            return 0
        if not rollback(self.cache, length):
            fitting = [s for s in self._snapshots if s.length <= length]
            if not fitting or not fitting[-1].restore(self.cache):
                self.forget()
                return 0
            length = fitting[-1].length
        self._snapshots = [s for s in self._snapshots if s.length <= length]
        self.tokens = self.tokens[:length]
        return length

    def _from_store(self, ids: Sequence[int], kept: int) -> None:
        """Read a longer front than `kept` tokens from the store, if it has one."""
        assert self.store is not None
        cache = self._engine.new_cache(self._capacity)
        recurrent = states.has_states(cache)
        if not states.storable(cache):
            self.notes.append("this model keeps what cannot be stored: nothing is kept on disk")
            self.store = None
            return
        try:
            match = self.store.match(ids, needs_states=recurrent)
            if match.length <= kept:
                return
            held: list[int] = []
            for window in (y for y in cache.layers if isinstance(y, WindowLayer)):
                window.keep_from = match.length // NODE_TOKENS * NODE_TOKENS
            last: Segment | None = None
            for segment in self.store.read_chain(match):
                states.write(cache, segment.layers, self._device)
                held += segment.tokens
                last = segment
        except OffloadError as e:
            self.notes.append(f"what is stored cannot be read, and is computed again: {e}")
            return
        whole = len(held) == match.length
        if not whole:
            self.notes.append("a part of what is stored is damaged or gone, and is computed again")
        if recurrent and last is not None:
            if not last.states:
                return
            states.put_states(cache, last.states, self._device)
        if len(held) > kept:
            self.forget()
            self.cache, self.tokens, self._snapshots = cache, held, []

    def _keep_windows(self) -> None:
        """Windows hand out what is not written yet; what left them before that is prefilled again, not stored."""
        if self.store is None or self.cache is None:
            return
        for layer in self.cache.layers:
            if isinstance(layer, WindowLayer):
                layer.keep_from = len(self.tokens) // NODE_TOKENS * NODE_TOKENS

    def _write(self, length: int) -> None:
        """Store the first `length` tokens, as far as they are not yet. A full disk ends storing, with a note."""
        assert self.store is not None and self.cache is not None
        cache = self.cache
        if not length:
            return

        def take(begin: int, end: int) -> Segment:
            now = states.states(cache) if end == len(self.tokens) else {}
            return Segment(tuple(self.tokens[begin:end]), states.read(cache, begin, end), now)

        try:
            self.head = self.store.extend(self.tokens[:length], take)
            self.stored = self.tokens[:length]
            self._keep_windows()
            self.on_stored()
        except IndexError:
            self.notes.append("what has left a layer's window is not stored: its front was freed meanwhile")
        except (StoreError, GoneError, DamagedError) as e:
            self.notes.append(f"nothing more is stored: {e}")
            self.store = None


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common front."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

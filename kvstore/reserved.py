"""Keys and values that live with the compute, in memory reserved for the whole context.

transformers' `DynamicLayer` concatenates at every step, which copies the layer's whole KV and doubles it for a
moment. Here a layer reserves address space for `capacity` tokens once; pages become resident as tokens are written,
so the memory used is exactly the tokens held. Sliding-window and recurrent layers are transformers' own: their state is
bounded.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from kvstore.windows import WindowLayer


class ReservedLayer(DynamicLayer):  # type: ignore[misc]
    """`DynamicLayer` with room for `capacity` tokens; grows past it, by doubling, only if asked to hold more."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self._room: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append key_states [B, heads, q, D] and value_states [B, heads, q, Dv]; returns all held so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self.get_seq_length()
        total = held + key_states.shape[-2]
        if not self._fits(key_states.shape[0], held, total):
            self._reserve(key_states, value_states, held, total)
        assert self._room is not None
        keys, values = self._room
        keys[..., held:total, :] = key_states
        values[..., held:total, :] = value_states
        self.keys, self.values = keys[..., :total, :], values[..., :total, :]
        return self.keys, self.values

    def _fits(self, batch: int, held: int, total: int) -> bool:
        """Whether the tokens held are the front of our own room (cropping keeps that, reordering beams does not)."""
        if self._room is None or self._room[0].shape[0] != batch or self._room[0].shape[-2] < total:
            return False
        return held == 0 or (self.keys is not None and self.keys.data_ptr() == self._room[0].data_ptr())

    def _reserve(self, k: torch.Tensor, v: torch.Tensor, held: int, total: int) -> None:
        capacity = self.capacity if total <= self.capacity else max(total, 2 * self.capacity)

        def room(like: torch.Tensor, old: torch.Tensor | None) -> torch.Tensor:
            new = like.new_empty(*like.shape[:-2], capacity, like.shape[-1])
            if held and old is not None:
                new[..., :held, :] = old
            return new

        self._room = room(k, self.keys), room(v, self.values)

    def reset(self) -> None:
        """Forget all tokens and give the memory back."""
        self._room = None
        super().reset()


def make_cache(config: Any, capacity: int) -> Cache:
    """A transformers cache for one request: full-attention layers reserve `capacity` tokens each."""
    cache = DynamicCache(config=config)
    cache.layers = [_ours(layer, capacity) for layer in cache.layers]
    return cache


def _ours(layer: Any, capacity: int) -> Any:
    if type(layer) is DynamicSlidingWindowLayer:
        return WindowLayer(layer.sliding_window)
    return ReservedLayer(capacity) if type(layer) is DynamicLayer else layer

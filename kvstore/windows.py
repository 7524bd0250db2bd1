"""A sliding-window layer in memory that can hand out, for a while, what has left its window."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer


class WindowLayer(DynamicSlidingWindowLayer):  # type: ignore[misc]
    """transformers' layer; with `keep_from` set, tokens from that position on can be `read` after they are gone from
    the window, until somebody who writes them down has raised it."""

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window)
        self._keep_from: int | None = None
        self._kept: list[tuple[int, torch.Tensor, torch.Tensor]] = []  # (first position, keys, values), in order

    @property
    def keep_from(self) -> int | None:
        """The first position that can still be read; None: nothing is kept beyond the window."""
        return self._keep_from

    @keep_from.setter
    def keep_from(self, position: int | None) -> None:
        self._keep_from = position
        self._kept = [p for p in self._kept if position is not None and p[0] + p[1].shape[2] > position]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `DynamicSlidingWindowLayer`."""
        if self._keep_from is not None:
            self._kept.append((self.cumulative_length, key_states, value_states))
        found: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)
        return found

    def read(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [start, stop) of the first sequence: keys [heads, n, Dk], values [heads, n, Dv].

        Raises `IndexError` for what is not kept.
        """
        if self._keep_from is None or start < self._keep_from or stop > self.cumulative_length:
            raise IndexError(f"tokens {start} to {stop} are not kept")
        parts = [
            (k[0, :, max(start - first, 0) : stop - first], v[0, :, max(start - first, 0) : stop - first])
            for first, k, v in self._kept
            if first < stop and first + k.shape[2] > start
        ]
        return torch.cat([k for k, _ in parts], 1), torch.cat([v for _, v in parts], 1)

    def crop(self, tokens_to_remove: int) -> None:
        """See `DynamicSlidingWindowLayer`."""
        super().crop(tokens_to_remove)
        end = self.cumulative_length
        self._kept = [(f, k[:, :, : end - f], v[:, :, : end - f]) for f, k, v in self._kept if f < end]

    def reset(self) -> None:
        """Forget all tokens."""
        self._kept = []
        super().reset()

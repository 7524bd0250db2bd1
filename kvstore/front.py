"""The first tokens of a layer's sequences in device memory: attended to where they lie, and never moved.

Exact attention reads every token in every step, so that any fixed share in the fastest memory is as good as any other;
the first ones never have to make room for what comes. What follows lies in host memory or on disk.
"""

from __future__ import annotations

import torch


class Front:
    """Up to `capacity` tokens of each of `batch` sequences: keys [B, kv heads, n, Dk], values [B, kv heads, n, Dv]."""

    def __init__(self, capacity: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """With the shapes, type and device of `keys` and `values` [B, kv heads, any, D]."""
        self.capacity = capacity
        self.length = 0
        self._keys, self._values = (t.new_empty(*t.shape[:2], capacity, t.shape[3]) for t in (keys, values))

    @property
    def keys(self) -> torch.Tensor:
        """What is held of them."""
        return self._keys[:, :, : self.length]

    @property
    def values(self) -> torch.Tensor:
        """What is held of them."""
        return self._values[:, :, : self.length]

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> int:
        """Take as many of these tokens as there is room for; returns how many."""
        n = min(keys.shape[2], self.capacity - self.length)
        end = self.length + n
        self._keys[:, :, self.length : end] = keys[:, :, :n]
        self._values[:, :, self.length : end] = values[:, :, :n]
        self.length = end
        return n

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens."""
        self.length = min(self.length, length)

    def select(self, rows: list[int]) -> None:
        """Row i becomes what row rows[i] is."""
        index = torch.tensor(rows, device=self._keys.device)
        self._keys, self._values = self._keys.index_select(0, index), self._values.index_select(0, index)

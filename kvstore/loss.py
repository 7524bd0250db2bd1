"""What coding keys and values did: bytes before and after, and how far what comes back is off."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True, slots=True)
class KVLoss:
    """Adds up. `*_off` and `*_whole`: sums of squares of the error, and of what it is an error of, over the chunks that
    were looked at."""

    raw_bytes: int = 0  # of all that was coded
    coded_bytes: int = 0
    keys_off: float = 0.0
    keys_whole: float = 0.0
    values_off: float = 0.0
    values_whole: float = 0.0

    def __add__(self, other: KVLoss) -> KVLoss:
        return KVLoss(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: KVLoss) -> KVLoss:
        return KVLoss(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    @classmethod
    def between(
        cls, was: tuple[torch.Tensor, torch.Tensor], now: tuple[torch.Tensor, torch.Tensor], raw: int, coded: int
    ) -> KVLoss:
        """Keys and values before and after, and the bytes they took."""
        squares = [
            float(x.float().square().sum()) for a, b in zip(was, now, strict=True) for x in (b.float() - a.float(), a)
        ]
        return cls(raw, coded, *squares)

    @property
    def keys(self) -> float | None:
        """Root mean square of the error of keys, of that of keys; None if none were looked at."""
        return (self.keys_off / self.keys_whole) ** 0.5 if self.keys_whole > 0 else None

    @property
    def values(self) -> float | None:
        """The same of values."""
        return (self.values_off / self.values_whole) ** 0.5 if self.values_whole > 0 else None


NO_LOSS = KVLoss()

"""The order in which streamed blocks are needed, as a pure object: told what happened, asked what comes next.

Owns no threads and moves no bytes; live hooks and a simulator can both drive it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence


class CyclicSchedule:
    """Blocks used in the same order once per step, step after step (a dense model's layers and head)."""

    def __init__(self, order: Sequence[str]) -> None:
        self.order = tuple(order)
        self._index = {key: i for i, key in enumerate(self.order)}
        if len(self._index) != len(self.order):
            raise ValueError("a block appears twice in one step")
        self._next = 0

    def knows(self, key: str) -> bool:
        """Whether the block is part of the cycle."""
        return key in self._index

    def used(self, key: str) -> None:
        """The step has reached this block."""
        self._next = (self._index[key] + 1) % len(self.order)

    def restart(self) -> None:
        """The next step begins from the first block (the last one was cut short)."""
        self._next = 0

    def next_use(self, key: str) -> int:
        """How many other uses come before this block is needed; 0 for the very next."""
        return (self._index[key] - self._next) % len(self.order)

    def upcoming(self) -> Iterator[str]:
        """One full cycle, starting with the block needed next."""
        for i in range(len(self.order)):
            yield self.order[(self._next + i) % len(self.order)]

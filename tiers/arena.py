"""Preallocated memory of a tier, cut into slots.

One anonymous mapping per arena, taken at start; slots are carved off its front and never returned, so the
books are exact and nothing can fragment. Pages are only touched (and so only resident) once written.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Protocol

import torch

from tiers.block import page_up


class Fence(Protocol):
    """Compute that may still be using a slot."""

    def synchronize(self) -> None:
        """Block until it is finished."""
        ...


class Slot:
    """A block's place in an arena: `tensor` is the slot as flat uint8, `view` the same bytes for readers.

    `fence` is compute that may still read the slot though its lease is back: whoever writes next waits for it.
    """

    __slots__ = ("_view", "address", "fence", "nbytes", "tensor")

    def __init__(self, tensor: torch.Tensor, view: memoryview | None) -> None:
        self.tensor = tensor
        self._view = view
        self.nbytes = tensor.numel()
        self.address = tensor.data_ptr()
        self.fence: Fence | None = None

    @property
    def view(self) -> memoryview:
        """The bytes, for readers; device memory has none."""
        assert self._view is not None
        return self._view

    def part(self, start: int, stop: int) -> Slot:
        """Bytes [start, stop) as a slot of their own; shares the memory, not the fence."""
        return Slot(self.tensor[start:stop], self._view[start:stop] if self._view is not None else None)


class Arena:
    """`nbytes` of page-aligned memory. `allocate` returns page-aligned slots until it is used up."""

    def __init__(self, nbytes: int, device: torch.device | None = None) -> None:
        self.nbytes = max(page_up(nbytes), mmap.PAGESIZE)
        self.used = 0
        self._view: memoryview | None = None
        if device is not None and device.type != "cpu":
            self.tensor = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
            return
        self._map = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if self.nbytes >= 8 << 20 and hasattr(mmap, "MADV_HUGEPAGE"):
            # fewer page-table walks in the kernels, and fewer pages to pin per direct read
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.tensor = torch.frombuffer(self._map, dtype=torch.uint8)
        self._view = memoryview(self._map)

    def reset(self) -> None:
        """Carve anew from the front. The caller knows that nobody uses the slots handed out before."""
        self.used = 0

    def allocate(self, nbytes: int) -> Slot:
        """The next `nbytes`, rounded up to pages. Raises `MemoryError` when the arena is used up (a plan's bug)."""
        size = page_up(nbytes)
        if self.used + size > self.nbytes:
            raise MemoryError(f"arena of {self.nbytes} bytes has {self.nbytes - self.used} left, {size} asked for")
        start, self.used = self.used, self.used + size
        return Slot(self.tensor[start : start + size], self._view[start : start + size] if self._view else None)


class Pool:
    """Slots of one size class in an arena, one behind the other, handed out and taken back.

    `memory` are all of them, [count, slot_nbytes] uint8.
    """

    def __init__(self, arena: Arena, slot_nbytes: int, count: int) -> None:
        self.slot_nbytes = page_up(slot_nbytes)
        start = arena.used
        self.slots: Sequence[Slot] = [arena.allocate(self.slot_nbytes) for _ in range(count)]
        self.memory = arena.tensor[start : arena.used].view(count, self.slot_nbytes)
        self._free = list(reversed(self.slots))
        self._is_free = {slot.address for slot in self.slots}

    def number(self, slot: Slot) -> int:
        """Which of the pool's slots this is: its row in `memory`."""
        number, rest = divmod(slot.address - self.memory.data_ptr(), self.slot_nbytes)
        assert rest == 0 and 0 <= number < len(self.slots)
        return number

    def take(self) -> Slot | None:
        """A free slot, or None."""
        if not self._free:
            return None
        slot = self._free.pop()
        self._is_free.remove(slot.address)
        return slot

    def give(self, slot: Slot) -> None:
        """Take a slot back. Each slot is free at most once."""
        assert slot.address not in self._is_free
        self._free.append(slot)
        self._is_free.add(slot.address)

    @property
    def free(self) -> int:
        """Number of free slots."""
        return len(self._free)

"""Blocks: the unit of transfer. A block is a gather of byte ranges of files into one contiguous slot.

Says nothing about what the bytes mean; the owner of a block keeps its own map from names to offsets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

PAGE = 4096  # alignment O_DIRECT accepts on every common block device (logical blocks are 512 or 4096)


class Codec(Protocol):
    """Turns stored bytes into compute bytes on arrival. Raw copies have no codec (`None`)."""

    @property
    def stored_itemsize(self) -> int:
        """Bytes of one stored element; a transfer is only ever cut between elements."""
        ...

    @property
    def compute_itemsize(self) -> int:
        """Bytes of one element after decoding."""
        ...

    def decode(self, stored: memoryview, compute: memoryview) -> None:
        """Fill `compute` from `stored`. Called on a worker thread."""
        ...


@dataclass(frozen=True, slots=True)
class Segment:
    """One byte range of a file and where it goes in the slot.

    `padded` promises that the slot bytes of the enclosing pages belong to this segment alone and that
    `dst` and `offset` agree modulo the page, so whole pages may be read straight into the slot.
    """

    file: int
    offset: int
    nbytes: int
    dst: int
    codec: Codec | None = None
    padded: bool = False


@dataclass(frozen=True, slots=True)
class Move:
    """Bytes [start, stop) of a host slot that lie at `dst` in a device's slot."""

    start: int
    stop: int
    dst: int


@dataclass(frozen=True, slots=True)
class Block:
    """What is fetched together.

    `nbytes` are the bytes of the tensors in compute form (what budgets given by the user count);
    `slot_nbytes` are the bytes a slot needs to hold it, padding included, on the host and on a device.
    `moves` say, in the order of `start`, what goes where on a device; without, every byte goes to its own place.
    """

    key: str
    nbytes: int
    slot_nbytes: int
    segments: tuple[Segment, ...]
    moves: tuple[Move, ...] = ()

    @property
    def stored_nbytes(self) -> int:
        """Bytes read from disk to fetch the block once."""
        return sum(s.nbytes for s in self.segments)


def page_up(n: int) -> int:
    """The next multiple of the page size."""
    return -(-n // PAGE) * PAGE


def page_down(n: int) -> int:
    """The previous multiple of the page size."""
    return n // PAGE * PAGE

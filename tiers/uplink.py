"""From host slots to device slots: the link between two residencies.

A block wanted on the device is leased in the tier below, which fetches it from disk if it is not there; its first
part goes up while the rest is still being read. The lease below is given back when the copy is complete.

With a direct reader, blocks that have no place in the tier below are read from their files straight into the device
slot instead: nothing is leased below, and the bytes are the disk's, not the link's.
"""

from __future__ import annotations

from collections.abc import Sequence

from tiers.block import PAGE, Block, Move, Segment, page_up
from tiers.device import Device
from tiers.queue import Cause, Ticket, verify_files
from tiers.reader import BlockReader, Piece
from tiers.residency import Lease, Residency

UP_CHUNK = 4 << 20  # bytes per copy: long enough to reach a link's rate, short enough for a demand to overtake
COPIES = 2  # transfers in flight: one is carried while the next is being prepared


def readable_directly(block: Block) -> bool:
    """Whether the block's bytes can go past the host: what must be decoded or placed otherwise cannot."""
    return not block.moves and all(s.codec is None for s in block.segments)


def _moves(block: Block) -> tuple[Move, ...]:
    return block.moves or (Move(0, page_up(block.slot_nbytes), 0),)


class UpLink:
    """`Link` from `below` to a device, where a block's `moves` place it; `direct`, if given, reads into its slots."""

    name = "link"
    poll_s = 0.0005  # the tier below has no way to call up, so it is asked

    def __init__(self, below: Residency, device: Device, direct: BlockReader | None = None) -> None:
        self.below = below  # exchanged once, when loading is over and nothing is under way
        self._device = device
        self._direct = direct

    def cut(self, ticket: Ticket, segments: Sequence[Segment]) -> list[Piece]:
        """The block's slot in chunks, front to back; or, read directly, its segments as the reader likes them."""
        block = ticket.block
        assert block is not None
        if self._direct is not None and not self.below.knows(ticket.key) and readable_directly(block):
            ticket.direct = True
            return [p for s in segments for p in self._direct.split(s, ticket.slot)]
        return [
            Piece(0, at, min(UP_CHUNK, m.stop - at), m.dst + at - m.start, None, True)
            for m in _moves(block)
            for at in range(m.start, m.stop, UP_CHUNK)
        ]

    def ready(self, ticket: Ticket, piece: Piece) -> bool:
        """Whether the bytes have arrived below. The first question leases the block there. A file is always there."""
        if ticket.direct:
            return True
        if ticket.lease is None:
            ticket.lease = self.below.request(ticket.key, must=False, cause=ticket.cause)
            if ticket.lease is None:
                return False  # every slot below is on its way up; one comes free
        lease: Lease = ticket.lease
        if ticket.cause is Cause.DEMAND:
            self.below.promote(ticket.key)
        assert ticket.block is not None
        last = piece.offset + piece.nbytes >= _moves(ticket.block)[-1].stop
        return lease.ready_to(None if last else piece.offset + piece.nbytes + PAGE)

    def move(self, ticket: Ticket, piece: Piece) -> int:
        """Copy one chunk, or read one request."""
        if ticket.direct:
            assert self._direct is not None
            return self._direct.read(piece, ticket.slot)
        below, end = ticket.lease.slot, piece.offset + piece.nbytes
        if piece.dst == piece.offset:
            self._device.copy(below, ticket.slot, piece.offset, end)
        else:
            there = ticket.slot.part(piece.dst, piece.dst + piece.nbytes)
            self._device.copy(below.part(piece.offset, end), there, 0, piece.nbytes)
        return piece.nbytes

    def finish(self, ticket: Ticket, whole: bool) -> None:
        """Nothing reads the slot below any more. Bytes of a changed file never reach a model."""
        lease, ticket.lease = ticket.lease, None
        if lease is not None:
            lease.release()
        if whole and ticket.direct:
            assert self._direct is not None and ticket.block is not None
            verify_files(self._direct, ticket.block)

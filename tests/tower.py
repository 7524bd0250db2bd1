"""Two tiers over a real file, every part of which can be held back or made to fail, and all that holds of the whole.

Disk → host residency → link → device residency. Used by the fault tests and by the property test of the same tiers.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import tiers.uplink
from prefetch import CyclicSchedule
from tiers import (
    LRU,
    PAGE,
    Arena,
    Block,
    DirectReader,
    EmulatedDevice,
    NextUse,
    Piece,
    Residency,
    Segment,
    Slot,
    Ticket,
    TransferQueue,
    UpLink,
)

PATIENCE = 10.0  # seconds until something that should have happened is declared stuck
PAGES = 6  # of a block
SLOT = PAGES * PAGE
STEP = 2 * PAGE  # one copy upward; the first two can go before the block has been read to its end
USED = SLOT - 40
LRU_KEYS = tuple(f"l{i}" for i in range(5))
CYCLIC_KEYS = tuple(f"c{i}" for i in range(4))
PINNED = "c0"  # comes and goes on the device, stays in the host
KEYS = (*LRU_KEYS, *CYCLIC_KEYS)
DATA = random.Random(9).randbytes(len(KEYS) * SLOT + PAGE)
Fault = Callable[[], BaseException]


class Odd(BaseException):
    """Of no kind that anybody expects."""


@dataclass(frozen=True)
class Invert:
    """A codec that shows whether it ran: every byte is complemented."""

    stored_itemsize: int = 1
    compute_itemsize: int = 1

    def decode(self, stored: memoryview, compute: memoryview) -> None:
        compute[:] = bytes(255 - b for b in stored)


def make_block(key: str) -> Block:
    """Five reads: whole pages, an unaligned range, one that is decoded, two whole pages, and an unaligned end."""
    at = KEYS.index(key) * SLOT
    segments = (
        Segment(0, at + 8, PAGE - 8, 8, None, True),
        Segment(0, at + PAGE + 1, PAGE, PAGE, None),
        Segment(0, at + 2 * PAGE + 1, PAGE, 2 * PAGE, Invert()),
        Segment(0, at + 3 * PAGE, 2 * PAGE, 3 * PAGE, None, True),
        Segment(0, at + 5 * PAGE + 1, PAGE - 40, 5 * PAGE, None),
    )
    return Block(key, USED - 8, USED, segments)


def offsets(key: str) -> list[int]:
    """Where in the file the block's reads begin."""
    return [s.offset - s.offset % PAGE if s.padded else s.offset for s in make_block(key).segments]


def owner_of(offset: int) -> str:
    """The block that a read at this place of the file belongs to."""
    return KEYS[offset // SLOT]


def image(key: str) -> bytes:
    """The block in its slot, from byte 8 on."""
    at = KEYS.index(key) * SLOT
    inverted = bytes(255 - b for b in DATA[at + 2 * PAGE + 1 : at + 3 * PAGE + 1])
    return (
        DATA[at + 8 : at + PAGE]
        + DATA[at + PAGE + 1 : at + 2 * PAGE + 1]
        + inverted
        + DATA[at + 3 * PAGE : at + 5 * PAGE]
        + DATA[at + 5 * PAGE + 1 : at + 6 * PAGE - 39]
    )


IMAGES = {key: image(key) for key in KEYS}


def content(slot: Slot) -> bytes:
    return bytes(slot.view[8:USED])


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"never happened: {what}"
        time.sleep(0.0005)


class Wild:
    """A gate, faults, and the books of what is under way."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.gate = threading.Event()
        self.gate.set()
        self.longest_hold = PATIENCE
        self.moved = 0

    def hold(self) -> None:
        self.gate.wait(self.longest_hold)


class WildDisk(Wild):
    """A reader around a real one."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.inner = DirectReader([path])
        self.asked: list[int] = []  # file offsets, in order
        self.writing: list[tuple[int, int]] = []  # slot address and file offset of what is under way
        self.faults: dict[int, Fault] = {}  # file offset → what happens there
        self.split_fault: Fault | None = None
        self.verify_fault: Fault | None = None
        self.held_back: set[int] = set()  # file offsets that wait at the gate; empty: all do

    def split(self, segment: Segment, slot: Slot) -> list[Piece]:
        if self.split_fault is not None:
            raise self.split_fault()
        return self.inner.split(segment, slot)

    def read(self, piece: Piece, slot: Slot) -> int:
        with self.lock:
            self.asked.append(piece.offset)
            self.writing.append((slot.address, piece.offset))
        try:
            if not self.held_back or piece.offset in self.held_back:
                self.hold()
            fault = self.faults.get(piece.offset)
            if fault is not None:
                raise fault()
            n = self.inner.read(piece, slot)
            with self.lock:
                self.moved += n
            return n
        finally:
            with self.lock:
                self.writing.remove((slot.address, piece.offset))

    def verify(self, file: int) -> None:
        if self.verify_fault is not None:
            raise self.verify_fault()
        self.inner.verify(file)

    def close(self) -> None:
        self.inner.close()


class WildDevice(EmulatedDevice, Wild):
    """A fast link."""

    def __init__(self) -> None:
        Wild.__init__(self)
        EmulatedDevice.__init__(self, 20e9, 0.0)
        self.writing: list[tuple[int, int]] = []  # addresses of the slots above and below
        self.faults: dict[int, Fault] = {}  # first byte of a copy → what happens then

    def copy(self, src: Slot, dst: Slot, start: int, stop: int) -> None:
        with self.lock:
            self.writing.append((dst.address, src.address))
        try:
            self.hold()
            fault = self.faults.get(start)
            if fault is not None:
                raise fault()
            super().copy(src, dst, start, stop)
            with self.lock:
                self.moved += stop - start
        finally:
            with self.lock:
                self.writing.remove((dst.address, src.address))


class WildLink(UpLink):
    """The link itself, with its own faults, and a stop after the last copy of a block."""

    def __init__(self, below: Residency, device: WildDevice) -> None:
        super().__init__(below, device)
        self.faults: dict[str, Fault] = {}  # "ready", "moved" or "finish" → what happens there
        self.tickets: list[Ticket] = []
        self.finished: Counter[Ticket] = Counter()
        self.not_whole: list[Ticket] = []  # finished as if they were
        self.lost = 0  # bytes copied that the queue was not told of
        self.last_gate = threading.Event()
        self.last_gate.set()
        self.asked = 0

    def _fail(self, where: str) -> None:
        fault = self.faults.get(where)
        if fault is not None:
            raise fault()

    def cut(self, ticket: Ticket, segments: Sequence[Segment]) -> list[Piece]:
        self.tickets.append(ticket)
        return super().cut(ticket, segments)

    def ready(self, ticket: Ticket, piece: Piece) -> bool:
        self.asked += 1
        if super().ready(ticket, piece):
            self._fail("ready")  # with the block leased below
            return True
        return False

    def move(self, ticket: Ticket, piece: Piece) -> int:
        n = super().move(ticket, piece)
        if piece.offset + piece.nbytes == SLOT:
            self.last_gate.wait(PATIENCE)
        if "moved" in self.faults:
            self.lost += n
        self._fail("moved")
        return n

    def finish(self, ticket: Ticket, whole: bool) -> None:
        self.finished[ticket] += 1
        if whole and (ticket.cancelled or ticket.error is not None or ticket.nbytes != SLOT):
            self.not_whole.append(ticket)
        super().finish(ticket, whole)
        if whole:
            self._fail("finish")


class Tower:
    """Both tiers have a pool for what is chosen (LRU) and one for what is streamed in order (NextUse)."""

    def __init__(self, path: Path, *, readers: int = 3, copies: int = 2) -> None:
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(tiers.uplink, "UP_CHUNK", STEP)
        self.depths = readers, copies
        self.reader = WildDisk(path)
        self.device = WildDevice()
        self.schedule = CyclicSchedule(CYCLIC_KEYS)
        self.disk = TransferQueue(self.reader, readers)
        self.host = Residency(Arena(6 * SLOT), self.disk)  # room for one more to be pinned
        self.link = WildLink(self.host, self.device)
        self.up = TransferQueue(self.link, copies)
        self.top = Residency(self.device.arena(5 * SLOT), self.up, self.device)
        self.slots = {(self.top, "lru"): 3, (self.top, "cyclic"): 2, (self.host, "lru"): 2, (self.host, "cyclic"): 2}
        for (tier, name), count in self.slots.items():
            tier.add_pool(name, USED, count, LRU() if name == "lru" else NextUse(self.schedule.next_use))
        for key in KEYS:
            for tier in (self.top, self.host):
                if (tier, key) != (self.host, PINNED):
                    tier.add(make_block(key), "lru" if key in LRU_KEYS else "cyclic")
        self.host.pin(make_block(PINNED))
        until(lambda: self.host.resident(PINNED), "the pinned block is there")

    def workers(self) -> int:
        threads = [*self.disk._threads, *self.up._threads]
        return sum(t.is_alive() for t in threads)

    def open(self) -> None:
        for gate in (self.reader.gate, self.device.gate, self.link.last_gate):
            gate.set()

    def repair(self) -> None:
        """All faults are over."""
        self.reader.faults.clear()
        self.reader.split_fault = self.reader.verify_fault = None
        self.device.faults.clear()
        self.link.faults.clear()

    def settle(self) -> None:
        """Until nothing is under way. What the policy below has no room for is asked for as if it were needed."""
        self.open()

        def quiet() -> bool:
            for key in KEYS:
                self.top.promote(key)
            with self.frozen():
                tickets = [e.ticket for tier in (self.top, self.host) for e in tier._entries.values()]
                idle = self.up.meter._in_flight == self.disk.meter._in_flight == 0
                return idle and all(t is None or t.done for t in tickets)

        until(quiet, "nothing is under way")
        assert {k: e.leases for k, e in self.host._entries.items() if e.leases} == {}, "a lease below has leaked"
        assert self.workers() == sum(self.depths), "a worker has died"
        # nothing that crossed a link is missing from the books, failed and cancelled transfers included
        assert sum(self.disk.bytes_read.values()) == self.reader.moved
        assert sum(self.up.bytes_read.values()) + self.link.lost == self.device.moved

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Nothing changes hands meanwhile, though bytes may move. In the order in which the tiers take the locks."""
        with self.top._lock, self.up._cond, self.host._lock, self.disk._cond:
            yield

    def check(self, out: Counter[str], out_below: Counter[str] | None = None) -> None:
        """Every invariant there is. `out`, `out_below`: how many leases we hold, by block."""
        with self.frozen():
            above = self._check_tier(self.top, self.up, out)
            held = Counter(
                key for key, e in self.top._entries.items() if e.ticket is not None and e.ticket.lease is not None
            )
            below = self._check_tier(self.host, self.disk, held + (out_below or Counter()))
            assert not self.link.not_whole
            for ticket in self.link.tickets:
                assert self.link.finished[ticket] == ticket.done, f"the transfer of {ticket.key} ends once"
                assert ticket.lease is None or not ticket.done, f"an ended transfer of {ticket.key} holds it below"
            with self.reader.lock:
                for address, offset in self.reader.writing:
                    assert below[address] == owner_of(offset), "a slot below is written for another block"
            with self.device.lock:
                for dst, src in self.device.writing:
                    assert above[dst] == below[src], "a copy between the slots of two blocks"
                    assert held[below[src]] == 1, "a copy from a slot that may be taken at any time"

    def _check_tier(self, r: Residency, queue: TransferQueue, leases: Counter[str]) -> dict[int, str]:
        """One tier's own; returns who has each slot, by address."""
        places: dict[int, str] = {}
        running = 0
        for name, (pool, policy) in r._pools.items():
            for slot in pool._free:
                assert slot.address not in places, f"a slot of {name} is free twice"
                places[slot.address] = f"free in {name}"
            has = {k for k, e in r._entries.items() if e.pool == name and e.slot is not None}
            known = set(policy._order) if isinstance(policy, LRU) else set(policy._keys)  # type: ignore[attr-defined]
            assert known == has, "the policy knows exactly the blocks that have a slot"
        for key, e in r._entries.items():
            assert e.leases == leases[key], f"leases of {key}: {e.leases}, {leases[key]} are known"
            if e.slot is None:
                assert (e.ticket, e.leases, e.unused) == (None, 0, False), f"{key} has no slot, but a past"
                continue
            assert e.slot.address not in places, f"{key} shares its slot: {places.get(e.slot.address)}"
            places[e.slot.address] = key
            t = e.ticket
            assert t is not None and t.slot is e.slot and t.key == key
            assert not t.cancelled, f"{key} waits for a cancelled transfer"
            assert not (e.leases and e.unused)
            running += len(t._running)
            if t.done:
                assert not t._pieces and not t._running, f"{key} is done, and still moves"
                assert r.resident(key) == (t.error is None)
            else:
                assert t._pieces or t._running, f"nothing will ever end the transfer of {key}"
                assert not t._pieces or any(x[-1] is t for x in queue._heap), f"the queue has forgotten {key}"
                assert not r.resident(key)
            if r.resident(key):
                assert content(e.slot) == IMAGES[key], f"the bytes of {key}"
        assert running == queue.meter._in_flight, "something moves that no block waits for"
        for name, (pool, _) in r._pools.items():
            mine = {s.address for s in pool.slots}
            assert mine <= set(places), f"a slot of {name} is nowhere"
            owners = {k for k, e in r._entries.items() if e.pool == name}
            assert {places[a] for a in mine} <= {f"free in {name}", *owners}
        return places

    def close(self) -> None:
        self.open()
        self.up.close()
        self.disk.close()
        self.reader.close()
        self._patch.undo()

"""Residency and its queue, driven at random with a slow and failing disk; the whole state is checked after every step.

The machine works on a real file through `DirectReader`, wrapped so that pieces can be held back or made to fail.
"""

from __future__ import annotations

import os
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from prefetch import CyclicSchedule, Prefetcher
from tiers import (
    LRU,
    PAGE,
    Arena,
    Block,
    Cause,
    DirectReader,
    EvictionPolicy,
    Interrupted,
    Lease,
    NextUse,
    OffloadError,
    Piece,
    ReadError,
    Residency,
    Segment,
    Slot,
    TransferQueue,
)

PATIENCE = 10.0  # seconds until something that should have happened is declared stuck
BLOCK_BYTES = 3 * PAGE  # of the file, per block
BLOCK_MOVED = 4 * PAGE  # over the link: its pieces touch 1, 2 and 1 pages
ROUNDED = 3 * PAGE - 40
DATA = random.Random(3).randbytes(20 * BLOCK_BYTES)


@dataclass(frozen=True)
class Invert:
    """A codec that shows whether it ran: every byte is complemented."""

    stored_itemsize: int = 1
    compute_itemsize: int = 1

    def decode(self, stored: memoryview, compute: memoryview) -> None:
        compute[:] = bytes(255 - b for b in stored)


class WildDisk:
    """A reader around a real one. Pieces can be held back, made to fail, or the file be declared changed.

    Keeps its own books: every piece asked for, in order, and the bytes that crossed the link.
    """

    def __init__(self, path: Path) -> None:
        self.inner = DirectReader([path])
        self.lock = threading.Lock()
        self.asked: list[int] = []  # file offsets, in the order in which they were asked for
        self.moved = 0
        self.writing: list[tuple[int, int]] = []  # slot address and file offset of what is under way
        self.faults: dict[int, Callable[[], Exception]] = {}  # file offset → what happens there
        self.changed = False
        self.gate = threading.Event()
        self.gate.set()
        self.longest_hold = PATIENCE

    def split(self, segment: Segment, slot: Slot) -> list[Piece]:
        return self.inner.split(segment, slot)

    def read(self, piece: Piece, slot: Slot) -> int:
        with self.lock:
            self.asked.append(piece.offset)
            self.writing.append((slot.address, piece.offset))
        try:
            self.gate.wait(self.longest_hold)
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
        if self.changed:
            raise ReadError("injected: the file was modified while in use")
        self.inner.verify(file)

    def close(self) -> None:
        self.inner.close()


FAULTS: dict[str, Callable[[], Exception]] = {
    "ReadError": lambda: ReadError("injected: Input/output error"),
    "OSError": lambda: OSError(5, "injected"),
    "ValueError": lambda: ValueError("injected by a codec"),
}


def make_block(key: str, number: int) -> Block:
    """Three pieces: a page read straight into the slot, an unaligned range, and one that is decoded."""
    at = number * BLOCK_BYTES
    segments = (
        Segment(0, at + 8, PAGE - 8, 8, None, True),
        Segment(0, at + PAGE + 1, PAGE, PAGE, None),
        Segment(0, at + 2 * PAGE + 1, PAGE - 40, 2 * PAGE, Invert()),
    )
    return Block(key, ROUNDED - 8, ROUNDED, segments)


def offsets(block: Block) -> list[int]:
    """Where in the file the block's pieces begin, as the disk sees them."""
    return [s.offset - s.offset % PAGE if s.padded else s.offset for s in block.segments]


def image(block: Block) -> bytes:
    """The block's bytes in its slot, from `8` on."""
    at = block.segments[0].offset - 8
    last = DATA[at + 2 * PAGE + 1 : at + 3 * PAGE - 39]
    return DATA[at + 8 : at + PAGE] + DATA[at + PAGE + 1 : at + 2 * PAGE + 1] + bytes(255 - b for b in last)


def content(slot: Slot) -> bytes:
    return bytes(slot.view[8:ROUNDED])


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"never happened: {what}"
        time.sleep(0.0005)


@dataclass
class World:
    """A residency with two pools and pinned blocks, over one file."""

    disk: WildDisk
    queue: TransferQueue
    residency: Residency
    schedule: CyclicSchedule
    lru: list[str]
    cyclic: list[str]
    pinned: list[str]
    slots: dict[str, int]  # of each pool

    @classmethod
    def make(
        cls,
        path: Path,
        *,
        depth: int = 3,
        lru: tuple[int, int] = (6, 3),
        cyclic: tuple[int, int] = (5, 2),
        pinned: int = 2,
    ) -> World:
        """`lru` and `cyclic`: how many blocks go through how many slots. The arena has room for one more block."""
        names = [f"l{i}" for i in range(lru[0])], [f"c{i}" for i in range(cyclic[0])], [f"p{i}" for i in range(pinned)]
        disk = WildDisk(path)
        queue = TransferQueue(disk, depth)
        residency = Residency(Arena((lru[1] + cyclic[1] + pinned + 1) * 3 * PAGE), queue)
        schedule = CyclicSchedule(names[1])
        world = cls(disk, queue, residency, schedule, *names, {"lru": lru[1], "cyclic": cyclic[1]})
        residency.add_pool("lru", ROUNDED, lru[1], LRU())
        residency.add_pool("cyclic", ROUNDED, cyclic[1], NextUse(schedule.next_use))
        for number, key in enumerate([*names[0], *names[1], *names[2]]):
            block = make_block(key, number)
            if key in names[2]:
                residency.pin(block)
            else:
                residency.add(block, "lru" if key in names[0] else "cyclic")
        return world

    def block(self, key: str) -> Block:
        return self.residency._entries[key].block

    def slots_of(self, pool: str) -> Sequence[Slot]:
        return self.residency._pools[pool][0].slots

    def settle(self) -> None:
        """Until nothing is under way."""
        self.disk.gate.set()
        for entry in list(self.residency._entries.values()):
            ticket = entry.ticket
            if ticket is not None:
                until(lambda t=ticket: t.done, f"the ticket of {entry.block.key}")  # type: ignore[misc]
        until(lambda: self.queue.meter._in_flight == 0, "the queue is idle")

    def check(self, leases: Counter[str]) -> None:
        """Every invariant there is. `leases`: how many leases are out, by block."""
        r = self.residency
        with r._lock:
            places: dict[int, str] = {}  # slot address → who has it
            for name, (pool, policy) in r._pools.items():
                for slot in pool._free:
                    assert slot.address not in places, f"a slot of {name} is free twice"
                    places[slot.address] = f"free in {name}"
                held = {k for k, e in r._entries.items() if e.pool == name and e.slot is not None}
                known = set(policy._order) if isinstance(policy, LRU) else set(policy._keys)  # type: ignore[attr-defined]
                assert known == held, "the policy knows exactly the blocks that have a slot"
            for key, e in r._entries.items():
                assert e.leases == leases[key], f"leases of {key}"
                if e.slot is None:
                    assert (e.ticket, e.leases, e.unused) == (None, 0, False), f"{key} has no slot, but a past"
                    continue
                assert e.slot.address not in places, f"{key} shares its slot: {places.get(e.slot.address)}"
                places[e.slot.address] = key
                assert e.ticket is not None
                assert e.ticket.slot is e.slot
                assert e.ticket.key == key
                assert not e.ticket.cancelled, f"{key} waits for a cancelled ticket"
                assert not (e.leases and e.unused)
                done = e.ticket.done  # it may end at any moment
                resident = r.resident(key)
                assert resident or not done or e.ticket.error is not None
                if resident:
                    assert e.ticket.done
                    assert e.ticket.error is None
                    assert content(e.slot) == image(e.block), f"the bytes of {key}"
            with self.disk.lock:
                for address, offset in self.disk.writing:
                    owner = r._entries.get(places[address])
                    assert owner is not None, "a free slot is being written"
                    assert offset in offsets(owner.block), f"the slot of {owner.block.key} is written for another block"
            pooled = {s.address for name in r._pools for s in self.slots_of(name)}
            pinned = {e.slot.address for e in r._entries.values() if e.pool is None and e.slot is not None}
            assert len(pinned) == len(self.pinned)
            assert set(places) == pooled | pinned, "every slot is in exactly one place"
            for name in r._pools:
                mine = {s.address for s in self.slots_of(name)}
                owners = {k for k, e in r._entries.items() if e.pool == name}
                assert {places[a] for a in mine} <= {f"free in {name}", *owners}

    def close(self) -> None:
        self.disk.gate.set()
        self.queue.close()
        self.disk.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("residency") / "blocks.bin"
    path.write_bytes(DATA)
    return path


class Machine(RuleBasedStateMachine):
    """Everything that can be done to a residency, in any order, while the disk is slow and fails."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name) / "blocks.bin"
        path.write_bytes(DATA)
        self.world = World.make(path)
        self.world.disk.longest_hold = 0.004  # slow, not stuck: what must wait may be waited for at any time
        self.leases: list[tuple[Lease, bool]] = []  # and whether it has been waited for
        self.suspects: set[str] = set()  # blocks that a fault may have hit
        self.needed = 0

    # what the model knows

    @property
    def keys(self) -> list[str]:
        return [*self.world.lru, *self.world.cyclic, *self.world.pinned]

    def out(self) -> Counter[str]:
        return Counter(lease.key for lease, _ in self.leases)

    def room(self, key: str) -> bool:
        """Whether a demand for `key` can be met: it has a slot, or not every slot of its pool is leased."""
        entry = self.world.residency._entries[key]
        if entry.slot is not None:
            return True
        leased = {k for k in self.out() if self.world.residency._entries[k].pool == entry.pool}
        return len(leased) < self.world.slots[str(entry.pool)]

    def faulty(self, key: str) -> bool:
        disk = self.world.disk
        return disk.changed or any(o in disk.faults for o in offsets(self.world.block(key)))

    def arrived(self, lease: Lease) -> None:
        self.leases.append((lease, True))
        block = self.world.block(lease.key)
        self.needed += block.nbytes
        assert lease.ready
        assert content(lease.slot) == image(block)
        if not self.faulty(lease.key):
            self.suspects.discard(lease.key)

    def failed(self, key: str, error: OffloadError, was_missing: bool) -> None:
        self.needed += self.world.block(key).nbytes
        assert key in self.suspects, f"{key} failed without a fault: {error}"
        assert isinstance(error, ReadError)
        assert "injected" in str(error)
        if not self.faulty(key) and key not in self.out() and self.world.residency._entries[key].pool is not None:
            # whoever got the error was the last to hold the block: the next fetch starts afresh
            assert self.world.residency._entries[key].slot is None
            self.suspects.discard(key)

    # what can happen

    @rule(data=st.data())
    def acquire(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.keys))
        missing = self.world.residency._entries[key].slot is None
        if not self.room(key):
            with pytest.raises(RuntimeError, match="every slot of pool"):
                self.world.residency.acquire(key)
            return
        try:
            lease = self.world.residency.acquire(key)
        except ReadError as e:
            self.failed(key, e, missing)
            return
        assert not (missing and self.faulty(key)), f"{key} cannot have been read"
        self.arrived(lease)
        if key in self.world.cyclic:
            self.world.schedule.used(key)

    @rule(data=st.data(), must=st.booleans())
    def request(self, data: st.DataObject, must: bool) -> None:
        key = data.draw(st.sampled_from(self.keys))
        if not self.room(key):
            if must:
                with pytest.raises(RuntimeError, match="every slot of pool"):
                    self.world.residency.request(key)
            else:
                assert self.world.residency.request(key, must=False) is None
            return
        lease = self.world.residency.request(key, must=must)
        assert lease is not None
        assert lease.key == key
        self.needed += self.world.block(key).nbytes
        self.leases.append((lease, False))

    @precondition(lambda self: any(not waited for _, waited in self.leases))
    @rule(data=st.data())
    def wait(self, data: st.DataObject) -> None:
        i = data.draw(st.sampled_from([i for i, (_, waited) in enumerate(self.leases) if not waited]))
        lease, _ = self.leases.pop(i)
        self.needed -= self.world.block(lease.key).nbytes  # counted again below
        try:
            assert lease.wait() is lease
        except ReadError as e:
            self.failed(lease.key, e, False)
        else:
            self.arrived(lease)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), twice=st.booleans())
    def release(self, data: st.DataObject, twice: bool) -> None:
        lease, _ = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        lease.release()
        if twice:
            lease.release()

    @rule(data=st.data(), n=st.integers(2, 4))
    def acquire_from_threads(self, data: st.DataObject, n: int) -> None:
        """Several waiters for one block: each gets its lease or the error, none is forgotten."""
        key = data.draw(st.sampled_from(self.keys))
        if not self.room(key):
            return
        results: list[Lease | ReadError] = []

        def work() -> None:
            try:
                results.append(self.world.residency.acquire(key))
            except ReadError as e:
                results.append(e)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(n)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(PATIENCE)
        assert len(results) == n, "every waiter is answered"
        for got in results:
            if isinstance(got, Lease):
                self.arrived(got)
        for got in results:
            if isinstance(got, ReadError):
                self.needed += self.world.block(key).nbytes
                assert key in self.suspects

    @rule(data=st.data(), deadline=st.floats(0, 10))
    def prefetch(self, data: st.DataObject, deadline: float) -> None:
        key = data.draw(st.sampled_from(self.keys))
        r = self.world.residency
        had = {k for k, e in r._entries.items() if e.slot is not None}
        leased = set(self.out())
        taken = r.prefetch(key, deadline)
        has = {k for k, e in r._entries.items() if e.slot is not None}
        assert key in has if taken else has == had, "a refusal changes nothing"
        assert leased <= has
        assert len(had - has) <= 1, "at most one block makes room"

    @rule()
    def cancel_prefetches(self) -> None:
        self.world.residency.cancel_prefetches()
        with self.world.residency._lock:
            for e in self.world.residency._entries.values():
                assert e.ticket is None or e.ticket.done or e.leases or e.pool is None

    @rule()
    def hold(self) -> None:
        """From here on the disk is slow."""
        self.world.disk.gate.clear()

    @rule()
    def let_go(self) -> None:
        self.world.disk.gate.set()

    @rule(data=st.data(), piece=st.integers(0, 2), kind=st.sampled_from(sorted(FAULTS)))
    def break_piece(self, data: st.DataObject, piece: int, kind: str) -> None:
        key = data.draw(st.sampled_from(self.keys))
        self.world.disk.faults[offsets(self.world.block(key))[piece]] = FAULTS[kind]
        self.suspects.add(key)

    @rule()
    def change_file(self) -> None:
        self.world.disk.changed = True
        self.suspects.update(self.keys)

    @rule()
    def repair(self) -> None:
        self.world.disk.faults.clear()
        self.world.disk.changed = False

    @rule()
    def settle(self) -> None:
        """When nothing is under way, the books balance."""
        self.world.settle()
        assert sum(self.world.queue.bytes_read.values()) == self.world.disk.moved

    @initialize()
    def check_pins(self) -> None:
        self.world.settle()
        assert all(self.world.residency.resident(k) for k in self.world.pinned)

    @invariant()
    def whole_state(self) -> None:
        self.world.check(self.out())
        c = self.world.residency.counters
        assert c.needed == self.needed
        assert min(c.hit, c.late, c.missed, c.stall_s) >= 0
        assert c.hit + c.late + c.missed <= c.needed
        for lease, waited in self.leases:
            if waited:
                assert content(lease.slot) == image(self.world.block(lease.key)), "leased bytes stay"

    def teardown(self) -> None:
        try:
            self.world.disk.faults.clear()
            self.world.disk.changed = False
            self.settle()
            for lease, _ in self.leases:
                lease.release()
            self.leases.clear()
            self.whole_state()
            for key in self.keys:  # whatever happened, everything can be had again
                for last in (False, True):
                    try:
                        self.world.residency.acquire(key).release()
                        break
                    except ReadError:
                        assert key in self.suspects
                        assert not last, "an old error is told once"
            self.settle()
        finally:
            self.world.close()
            self.folder.cleanup()


Machine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None, database=None)
TestMachine = Machine.TestCase


@pytest.fixture
def world(path: Path) -> Iterator[World]:
    world = World.make(path)
    world.settle()
    yield world
    world.close()


@pytest.fixture
def narrow(path: Path) -> Iterator[World]:
    """One reader thread, so that the order of requests is the order of reads; nothing pinned."""
    world = World.make(path, depth=1, pinned=0)
    yield world
    world.close()


# policies


def choose(policy: EvictionPolicy, incoming: str, busy: str = "") -> str | None:
    return policy.victim(lambda k: k not in busy, incoming)


def test_lru_choices() -> None:
    policy = LRU()
    assert choose(policy, "x") is None
    for key in "abc":
        policy.touched(key)
    assert choose(policy, "x") == "a"
    policy.touched("a")
    assert choose(policy, "x") == "b"
    assert choose(policy, "x", busy="bc") == "a"
    assert choose(policy, "x", busy="abc") is None
    policy.removed("b")
    assert choose(policy, "x") == "c"
    policy.removed("never there")
    assert choose(policy, "x") == "c", "asking changes nothing"


def test_next_use_choices() -> None:
    schedule = CyclicSchedule("abcde")
    policy = NextUse(schedule.next_use)
    assert choose(policy, "a") is None
    for key in "abd":
        policy.touched(key)
    # the order from here is a b c d e
    assert choose(policy, "c") == "d"
    assert choose(policy, "e") is None, "all that is here is needed sooner"
    assert choose(policy, "d") is None, "nor is anything needed later than d"
    assert choose(policy, "c", busy="d") is None
    assert choose(policy, "a", busy="d") == "b"
    schedule.used("b")  # c d e a b
    assert choose(policy, "c") == "b"
    assert choose(policy, "c", busy="b") == "a"
    policy.removed("b")
    assert choose(policy, "e") == "a"


def belady(order: Sequence[str], slots: int) -> int:
    """Hits of the best possible policy where every use needs a slot, by looking ahead in the whole sequence."""
    here: set[str] = set()
    hits = 0
    for i, key in enumerate(order):
        if key in here:
            hits += 1
            continue
        if len(here) == slots:
            rest = order[i + 1 :]
            here.remove(max(here, key=lambda k: rest.index(k) if k in rest else len(rest)))
        here.add(key)
    return hits


@pytest.mark.parametrize("slots", [1, 2, 4, 9])
def test_next_use_keeps_a_fixed_share_of_a_cycle(path: Path, slots: int) -> None:
    n, cycles = 10, 9
    world = World.make(path, depth=2, lru=(n, slots), cyclic=(n, slots), pinned=0)
    try:
        for _ in range(cycles):
            for key in world.cyclic:
                world.residency.acquire(key).release()
                world.schedule.used(key)
        c, size = world.residency.counters, world.block("c0").nbytes
        assert c.hit == belady(world.cyclic * cycles, slots) * size
        assert (c.needed, c.hit + c.missed, c.late) == (n * cycles * size, n * cycles * size, 0)
        if slots > 1:
            assert c.hit >= (cycles - 1) * (slots - 1) * size
        before = c.hit
        for key in world.lru * 3:
            world.residency.acquire(key).release()
        assert c.hit == before, "and the least recently used is always the wrong one to drop"
    finally:
        world.close()


def run_cycles(world: World, cycles: int) -> list[int]:
    """Blocks read in each cycle, when every transfer has ended before the next use."""
    prefetcher = Prefetcher(world.residency, world.schedule)
    prefetcher.start()
    moved = []
    for _ in range(cycles):
        world.settle()
        before = world.disk.moved
        for key in world.cyclic:
            with world.residency.acquire(key):
                prefetcher.entered([key])
            prefetcher.left()  # as the engine does: the slot just left takes the next block
            world.settle()
        moved.append((world.disk.moved - before) // BLOCK_MOVED)
        world.check(Counter())
    return moved


@pytest.mark.parametrize("slots", [1, 2])
def test_the_prefetcher_is_never_late_on_a_fast_disk(path: Path, slots: int) -> None:
    """The plan's streaming pools: no use finds its block missing, and none is read twice for one use."""
    n, cycles = 10, 6
    world = World.make(path, depth=2, cyclic=(n, slots), pinned=0)
    try:
        assert run_cycles(world, cycles) == [n] * cycles
        c = world.residency.counters
        assert (c.missed, c.late, c.hit, c.needed) == (0, 0, 0, n * cycles * world.block("c0").nbytes)
        assert world.queue.bytes_read == {Cause.DEMAND: 0, Cause.PREFETCH: world.disk.moved}
    finally:
        world.close()


@pytest.mark.parametrize("slots", [4, 9])
def test_the_prefetcher_keeps_a_fixed_share_of_a_wide_pool(path: Path, slots: int) -> None:
    """Fetching ahead must not cost more reads than fetching on demand, where the share is kept."""
    n, cycles = 10, 6
    world = World.make(path, depth=2, cyclic=(n, slots), pinned=0)
    try:
        assert max(run_cycles(world, cycles)[1:]) <= n - slots + 2
    finally:
        world.close()


# refusals, promotion, cancelling


def test_a_request_is_refused_only_when_every_slot_is_leased(world: World) -> None:
    leases = [world.residency.acquire(k) for k in ("l0", "l1", "l2")]
    assert world.residency.request("l3", must=False) is None
    assert not world.residency.prefetch("l3")
    with pytest.raises(RuntimeError, match="every slot of pool lru is leased"):
        world.residency.request("l3")
    world.check(Counter(["l0", "l1", "l2"]))
    assert world.residency.request("l1", must=False) is not None, "what is here can be leased again"
    leases[0].release()
    lease = world.residency.request("l3", must=False)
    assert lease is not None
    assert content(lease.wait().slot) == image(world.block("l3"))
    assert not world.residency.resident("l0")
    world.check(Counter(["l1", "l1", "l2", "l3"]))
    assert world.residency.counters.needed == 5 * world.block("l0").nbytes


def test_a_block_that_fits_no_slot_is_refused(world: World) -> None:
    block = make_block("big", 15)
    with pytest.raises(ValueError, match="big"):
        world.residency.add(Block("big", block.nbytes, 3 * PAGE + 1, block.segments), "lru")
    assert block.key not in {b.key for b in world.residency.blocks()}


def test_demand_promotes_a_prefetch(narrow: World) -> None:
    r, disk = narrow.residency, narrow.disk
    disk.gate.clear()
    for deadline, key in enumerate(("l0", "l1", "l2")):
        assert r.prefetch(key, float(deadline))
    until(lambda: len(disk.asked) == 1, "the first piece is under way")
    ticket = r._entries["l2"].ticket
    assert ticket is not None
    assert ticket.cause is Cause.PREFETCH
    lease = r.request("l2")
    assert lease is not None
    assert not lease.ready
    assert r._entries["l2"].ticket is ticket, "no second transfer"
    assert ticket.cause is Cause.DEMAND
    assert r.counters.late == r.counters.needed == narrow.block("l2").nbytes
    disk.gate.set()
    assert content(lease.wait().slot) == image(narrow.block("l2"))
    narrow.settle()
    first, *rest = offsets(narrow.block("l0"))
    assert disk.asked == [first, *offsets(narrow.block("l2")), *rest, *offsets(narrow.block("l1"))]
    assert narrow.queue.bytes_read[Cause.DEMAND] == ticket.nbytes
    assert sum(narrow.queue.bytes_read.values()) == disk.moved
    narrow.check(Counter(["l2"]))


def test_demand_overtakes_prefetches_and_deadlines_order_them(narrow: World) -> None:
    r, disk = narrow.residency, narrow.disk
    disk.gate.clear()
    assert r.prefetch("l0", 5.0)
    until(lambda: len(disk.asked) == 1, "the first piece is under way")
    assert r.prefetch("l1", 9.0)
    assert r.prefetch("c0", 7.0)
    lease = r.request("l2")
    disk.gate.set()
    narrow.settle()
    first, *rest = offsets(narrow.block("l0"))
    order = [first, *offsets(narrow.block("l2")), *rest, *offsets(narrow.block("c0")), *offsets(narrow.block("l1"))]
    assert disk.asked == order
    assert lease is not None
    assert lease.ready
    narrow.check(Counter(["l2"]))


def test_cancelling_frees_the_slots(narrow: World) -> None:
    r, disk = narrow.residency, narrow.disk
    disk.gate.clear()
    assert all(r.prefetch(k) for k in ("l0", "l1", "c0"))
    until(lambda: len(disk.asked) == 1, "the first piece is under way")
    lease = r.request("l1")  # wanted: stays
    threading.Timer(0.05, disk.gate.set).start()
    r.cancel_prefetches()  # waits for the piece under way: its slot is being written
    narrow.check(Counter(["l1"]))
    assert [k for k in ("l0", "l1", "c0") if r._entries[k].slot is not None] == ["l1"]
    assert (r._pools["lru"][0].free, r._pools["cyclic"][0].free) == (2, 2)
    assert lease is not None
    lease.wait()
    narrow.settle()
    assert disk.asked == [offsets(narrow.block("l0"))[0], *offsets(narrow.block("l1"))]
    narrow.check(Counter(["l1"]))
    assert r.counters.hit == 0
    for key in ("l0", "c0"):
        with r.acquire(key) as again:
            assert content(again.slot) == image(narrow.block(key))


def test_demand_takes_the_least_urgent_prefetch_back(narrow: World) -> None:
    r, disk = narrow.residency, narrow.disk
    disk.gate.clear()
    assert all(r.prefetch(f"l{i}", d) for i, d in enumerate((1.0, 3.0, 2.0)))
    until(lambda: len(disk.asked) == 1, "the first piece is under way")
    lease = r.request("l5")
    assert lease is not None
    assert {k for k in narrow.lru if r._entries[k].slot is not None} == {"l0", "l2", "l5"}
    disk.gate.set()
    assert content(lease.wait().slot) == image(narrow.block("l5"))
    narrow.settle()
    assert set(disk.asked).isdisjoint(offsets(narrow.block("l1")))
    narrow.check(Counter(["l5"]))


def test_counters(world: World) -> None:
    r, size = world.residency, world.block("l0").nbytes
    r.acquire("l0").release()
    assert (r.counters.needed, r.counters.hit, r.counters.late, r.counters.missed) == (size, 0, 0, size)
    assert r.counters.stall_s > 0
    r.acquire("l0").release()
    assert (r.counters.needed, r.counters.hit, r.counters.late, r.counters.missed) == (2 * size, size, 0, size)
    assert r.prefetch("l1")
    world.settle()
    r.acquire("l1").release()  # there in time, but not for nothing: it was read for this use
    assert (r.counters.needed, r.counters.hit, r.counters.late, r.counters.missed) == (3 * size, size, 0, size)
    r.acquire("p0").release()
    assert r.counters.hit == 2 * size


# errors and interruption


@pytest.mark.parametrize("kind", sorted(FAULTS))
def test_an_error_reaches_every_waiter_and_the_next_request_works(world: World, kind: str) -> None:
    r, disk = world.residency, world.disk
    disk.gate.clear()
    disk.faults[offsets(world.block("l0"))[1]] = FAULTS[kind]
    errors: list[Any] = []

    def work() -> None:
        try:
            r.acquire("l0")
        except OffloadError as e:
            errors.append(e)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
    for t in threads:
        t.start()
    until(lambda: r._entries["l0"].leases == 3, "all three wait")
    disk.gate.set()
    for t in threads:
        t.join(PATIENCE)
    assert [type(e) for e in errors] == [ReadError] * 3
    assert all("injected" in str(e) and "\n" not in str(e) for e in errors)
    assert r._entries["l0"].slot is None
    world.check(Counter())
    disk.faults.clear()
    with r.acquire("l0") as lease:
        assert content(lease.slot) == image(world.block("l0"))
        world.check(Counter(["l0"]))
    world.settle()
    assert sum(world.queue.bytes_read.values()) == disk.moved


def test_the_other_blocks_are_unharmed_by_a_failure(world: World) -> None:
    r = world.residency
    with r.acquire("l1"):
        world.disk.faults[offsets(world.block("l0"))[0]] = FAULTS["ReadError"]
        for _ in range(2):
            with pytest.raises(ReadError):
                r.acquire("l0")
        world.check(Counter(["l1"]))
        r.acquire("l2").release()


def test_a_failed_prefetch_harms_nobody_for_long(world: World) -> None:
    r = world.residency
    world.disk.faults[offsets(world.block("l0"))[2]] = FAULTS["ReadError"]
    assert r.prefetch("l0")
    world.settle()
    assert not r.resident("l0")
    assert not r.prefetch("l0")
    with pytest.raises(ReadError):
        r.acquire("l0")
    world.disk.faults.clear()
    with r.acquire("l0") as lease:
        assert content(lease.slot) == image(world.block("l0"))
    world.check(Counter())


def test_a_lease_given_back_unread_does_not_leave_its_error_behind(world: World) -> None:
    """The step that wanted the block was cut short by another error; the next step starts afresh."""
    r = world.residency
    world.disk.faults[offsets(world.block("l0"))[0]] = FAULTS["ReadError"]
    lease = r.request("l0")
    assert lease is not None
    until(lambda: lease.ready, "the fetch has failed")
    lease.release()
    world.disk.faults.clear()
    with r.acquire("l0") as again:
        assert content(again.slot) == image(world.block("l0"))
    assert r.counters.hit == 0


def test_a_lease_that_failed_never_says_it_is_there(world: World) -> None:
    r = world.residency
    world.disk.faults[offsets(world.block("l0"))[0]] = FAULTS["ReadError"]
    lease = r.request("l0")
    assert lease is not None
    with pytest.raises(ReadError):
        lease.wait()
    with pytest.raises((ReadError, RuntimeError)):
        lease.wait()
    world.check(Counter())


def test_a_pinned_block_that_failed_is_read_again(path: Path) -> None:
    world = World.make(path, pinned=0)
    try:
        block = make_block("p", 14)
        world.disk.faults[offsets(block)[0]] = FAULTS["OSError"]
        world.residency.pin(block)
        world.pinned.append("p")
        with pytest.raises(ReadError):
            world.residency.acquire("p")
        world.disk.faults.clear()
        until(lambda: world.residency._entries["p"].ticket.done, "the second try")  # type: ignore[union-attr]
        try:
            lease = world.residency.acquire("p")
        except ReadError:  # the second try was under way before the repair
            lease = world.residency.acquire("p")
        assert content(lease.slot) == image(block)
        world.check(Counter(["p"]))
    finally:
        world.close()


def test_a_changed_file_never_reaches_the_model(world: World) -> None:
    world.disk.changed = True
    with pytest.raises(ReadError, match="modified while in use"):
        world.residency.acquire("l0")
    assert not world.residency.resident("l0")
    world.disk.changed = False
    world.residency.acquire("l0").release()
    world.check(Counter())


def test_a_reader_that_breaks_its_contract_strands_nobody(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is raised wherever, the ticket ends and the worker lives."""

    def broken(file: int) -> None:
        raise ValueError("injected: not an error a reader may raise")

    errors: list[BaseException] = []

    def work() -> None:
        try:
            world.residency.acquire("l0")
        except BaseException as e:
            errors.append(e)

    threads = len(reader_threads())
    with monkeypatch.context() as m:
        m.setattr(world.disk, "verify", broken)
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(2)
    assert [type(e) for e in errors] == [ReadError]
    assert len(reader_threads()) == threads
    with world.residency.acquire("l0") as lease:
        assert content(lease.slot) == image(world.block("l0"))


def test_an_interrupted_wait_ends_soon(world: World) -> None:
    r, disk = world.residency, world.disk
    stop = threading.Event()
    r.interrupted = stop.is_set
    disk.gate.clear()
    asked = [0.0]

    def interrupt() -> None:
        asked[0] = time.monotonic()
        stop.set()

    threading.Timer(0.15, interrupt).start()
    with pytest.raises(Interrupted):
        r.acquire("l0")
    assert 0 < time.monotonic() - asked[0] < 0.2
    world.check(Counter())
    assert r.counters.stall_s > 0.1
    stop.clear()
    disk.gate.set()
    with r.acquire("l0") as lease:
        assert content(lease.slot) == image(world.block("l0"))
    world.settle()
    assert disk.asked.count(offsets(world.block("l0"))[0]) == 1, "what was under way was not thrown away"


# the end


def reader_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("offload-read-")]


def open_files(path: Path) -> int:
    fds = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    return sum(os.path.exists(fd) and os.readlink(fd) == str(path) for fd in fds)


def test_closing_leaves_nothing(path: Path) -> None:
    assert reader_threads() == []
    assert open_files(path) == 0
    world = World.make(path, depth=4, pinned=0)
    world.disk.gate.clear()
    here, torn = world.residency.request("l0"), world.residency.request("l1")
    assert world.residency.prefetch("c0")
    assert here is not None
    assert torn is not None
    until(lambda: len(world.disk.asked) == 4, "four pieces are under way")
    assert len(reader_threads()) == 4
    assert open_files(path) == 1
    threading.Timer(0.05, world.disk.gate.set).start()
    world.queue.close()
    world.disk.close()
    assert reader_threads() == []
    assert open_files(path) == 0
    assert content(here.wait().slot) == image(world.block("l0")), "what was under way came in"
    with pytest.raises(ReadError, match="closed"):
        torn.wait()
    for key in ("l1", "l2", "c0"):
        with pytest.raises(ReadError, match="closed"):
            world.residency.acquire(key)
    world.check(Counter(["l0"]))
    assert sum(world.queue.bytes_read.values()) == world.disk.moved


def test_closing_ends_every_waiter(path: Path) -> None:
    world = World.make(path, depth=1, pinned=0)
    world.disk.gate.clear()
    ended: list[str] = []

    def work(key: str) -> None:
        try:
            world.residency.acquire(key)
        except ReadError as e:
            ended.append(str(e))

    threads = [threading.Thread(target=work, args=(k,), daemon=True) for k in ("l0", "l1", "c0", "c0")]
    for t in threads:
        t.start()
    until(lambda: sum(e.leases for e in world.residency._entries.values()) == 4, "all wait")
    threading.Timer(0.05, world.disk.gate.set).start()
    world.close()
    for t in threads:
        t.join(PATIENCE)
    assert len(ended) == 4
    assert all("closed" in e for e in ended)


def test_an_empty_block_is_there_at_once(world: World) -> None:
    world.residency.add(Block("empty", 0, 1, ()), "lru")
    with world.residency.acquire("empty") as lease:
        assert lease.ready
        assert world.residency.resident("empty")
    assert world.disk.moved == 2 * BLOCK_MOVED, "only the pinned blocks were read"

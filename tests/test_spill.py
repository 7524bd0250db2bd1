"""Writing downward: the spill file and its faults, the way down, and blocks made here that come and go."""

from __future__ import annotations

import errno
import os
import random
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tiers import (
    CHUNK,
    LRU,
    PAGE,
    Arena,
    Block,
    Cause,
    DirectReader,
    Interrupted,
    Lease,
    OffloadError,
    Residency,
    Segment,
    Slot,
    SpillFile,
    SpillLink,
    TransferQueue,
    UsageError,
    page_up,
)

PATIENCE = 10.0
SLOT = 3 * PAGE
NBYTES = SLOT - 100  # of a block


def pattern(seed: int, nbytes: int) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def filled(seed: int, nbytes: int = SLOT) -> Slot:
    slot = Arena(nbytes).allocate(nbytes)
    slot.view[:] = pattern(seed, nbytes)
    return slot


def read_back(file: SpillFile, offset: int, nbytes: int) -> bytes:
    """Past our own code."""
    return Path(f"/proc/self/fd/{file.fd}").read_bytes()[offset : offset + nbytes]


@pytest.fixture
def file(tmp_path: Path) -> Iterator[SpillFile]:
    file = SpillFile(tmp_path / "spill")
    yield file
    file.close()


class Failing:
    """`os.pwritev`, which from the `after`-th call on answers with `fault`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fault: Callable[[Any, int], int], after: int = 0) -> None:
        self.real = os.pwritev
        self.fault: Callable[[Any, int], int] | None = fault
        self.left = after
        self.calls: list[int] = []
        monkeypatch.setattr(os, "pwritev", self)

    def __call__(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        self.calls.append(len(buffers[0]))
        self.left -= 1
        if self.fault is not None and self.left < 0:
            n = self.fault(fd, len(buffers[0]))
            buffers = [buffers[0][:n]]
        return self.real(fd, buffers, offset)


def error(code: int) -> Callable[[Any, int], int]:
    def fault(fd: Any, n: int) -> int:
        raise OSError(code, os.strerror(code))

    return fault


# the file


def test_nobody_else_can_find_or_read_it(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "here"
    before = set(os.listdir("/proc/self/fd"))
    file = SpillFile(folder)
    assert list(folder.iterdir()) == [], "it has no name"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    s = os.fstat(file.fd)
    assert (stat.S_IMODE(s.st_mode), s.st_nlink) == (0o600, 0)
    assert not os.get_inheritable(file.fd)
    assert set(os.listdir("/proc/self/fd")) - before == {str(file.fd)}, "one descriptor"
    file.close()


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs to try")
def test_never_in_memory() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        for name in (".", "to/be/made"):
            with pytest.raises(UsageError, match=r"--spill-dir .* lies in memory"):
                SpillFile(Path(folder) / name)
        assert os.listdir(folder) == []


@pytest.mark.parametrize("where", ["/proc/x", "{tmp}/a-file", "{tmp}/a-file/below"])
def test_a_folder_that_cannot_be_used(tmp_path: Path, where: str) -> None:
    (tmp_path / "a-file").write_bytes(b"")
    with pytest.raises(UsageError, match=r"--spill-dir .* cannot be written to"):
        SpillFile(Path(where.format(tmp=tmp_path)))


def test_extents_do_not_overlap_and_come_back(file: SpillFile) -> None:
    """Whatever the sizes, in whatever order: a dict of who has which page is the model."""
    r = random.Random(5)
    held: dict[int, int] = {}
    for _ in range(400):
        if held and r.random() < 0.5:
            at = r.choice(list(held))
            file.free(at, held.pop(at))
        else:
            nbytes = r.randrange(1, 5 * PAGE)
            at = file.allocate(nbytes)
            assert at % PAGE == 0
            held[at] = nbytes
        pages = [p for at, n in held.items() for p in range(at, at + page_up(n), PAGE)]
        assert len(pages) == len(set(pages)), "a page belongs to one extent"
        assert file.used == len(pages) * PAGE
    for at, nbytes in held.items():
        file.free(at, nbytes)
    assert file.used == 0
    assert file.allocate(100 * PAGE) == 0, "what was given back in parts is one again"


def test_the_limit(tmp_path: Path) -> None:
    file = SpillFile(tmp_path, limit=5 * PAGE + 1)
    first = file.allocate(4 * PAGE)
    with pytest.raises(OffloadError, match="--disk"):
        file.allocate(PAGE + 1)
    assert file.used == 4 * PAGE, "a refusal takes nothing"
    assert file.allocate(PAGE) == 4 * PAGE
    with pytest.raises(OffloadError, match="--disk"):
        file.allocate(1)
    file.free(first, 4 * PAGE)
    for at in range(4):  # what another size left is good for this one
        assert file.allocate(PAGE) == at * PAGE
    file.close()


def test_disk_space_is_given_back_at_the_end(file: SpillFile) -> None:
    at = [file.allocate(SLOT) for _ in range(3)]
    for offset in at:
        file.write(filled(1).view, offset)
    assert os.fstat(file.fd).st_size == 3 * SLOT
    for offset in at:
        file.free(offset, SLOT)
    assert (os.fstat(file.fd).st_size, os.fstat(file.fd).st_blocks) == (0, 0)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails(file: SpillFile, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    Failing(monkeypatch, error(code))
    with pytest.raises(OffloadError) as told:
        file.write(filled(1).view, 0)
    assert str(file.path) in str(told.value)
    assert ("--spill-dir" in str(told.value)) == (code != errno.EIO), "a remedy where there is one"


@pytest.mark.parametrize("most", [500, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE])
def test_short_writes(file: SpillFile, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """A kernel may always take less than it is given, O_DIRECT or not, and every time."""
    slot = filled(most)
    failing = Failing(monkeypatch, lambda fd, n: min(n, most))
    real = failing.real

    def plain(fd: int, buffers: list[memoryview], offset: int) -> int:
        other = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY)  # a direct write of that length would be refused
        try:
            return real(other, buffers, offset)
        finally:
            os.close(other)

    failing.real = plain
    assert within(PATIENCE, lambda: file.write(slot.view, PAGE)) is None
    assert read_back(file, PAGE, SLOT) == bytes(slot.view)
    assert len(failing.calls) <= 1 + -(-SLOT // most)


def test_a_disk_that_takes_nothing(file: SpillFile, monkeypatch: pytest.MonkeyPatch) -> None:
    Failing(monkeypatch, lambda fd, n: 0)
    with pytest.raises(OffloadError, match="takes no more"):
        file.write(filled(1).view, 0)


def test_o_direct_refused_at_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    file = SpillFile(tmp_path)
    assert file.buffered
    assert list(tmp_path.iterdir()) == []
    slot = filled(2)
    file.write(slot.view, PAGE)
    assert read_back(file, PAGE, SLOT) == bytes(slot.view)
    file.close()


def test_o_direct_refused_at_the_first_write(file: SpillFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """By two writers at once: one of them finds that the other has been told already."""
    file.buffered = False
    meet = threading.Barrier(2, timeout=PATIENCE)

    def refuse(fd: Any, n: int) -> int:
        if threading.current_thread() not in told:
            told.add(threading.current_thread())
            meet.wait()
            raise OSError(errno.EINVAL, "Invalid argument")
        return n

    told: set[threading.Thread] = set()
    errors: list[BaseException] = []
    Failing(monkeypatch, refuse)
    slots = [filled(n) for n in range(2)]

    def write(n: int) -> None:
        try:
            file.write(slots[n].view, n * SLOT)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(PATIENCE)
    assert errors == []
    assert file.buffered
    assert read_back(file, 0, 2 * SLOT) == bytes(slots[0].view) + bytes(slots[1].view)


def test_reading_what_was_never_written(file: SpillFile) -> None:
    reader = DirectReader([])
    queue = TransferQueue(reader, 1)
    try:
        ticket = queue.submit("x", [Segment(reader.add(file), 0, NBYTES, 0, None, True)], filled(1), Cause.DEMAND)
        with pytest.raises(OffloadError, match=r"the spill file in .* ends at byte 0"):
            ticket.wait(None)
    finally:
        queue.close()


# the way down


@dataclass
class Way:
    """A file, the queue down to it and the queue up from it."""

    file: SpillFile
    reader: DirectReader
    number: int
    down: TransferQueue
    up: TransferQueue

    @classmethod
    def make(cls, folder: Path, limit: int | None = None) -> Way:
        file, reader = SpillFile(folder, limit), DirectReader([])
        number = reader.add(file)
        return cls(file, reader, number, TransferQueue(SpillLink(file), 2), TransferQueue(reader, 2))

    def close(self) -> None:
        self.down.close()
        self.up.close()
        self.reader.close()


@pytest.fixture
def way(tmp_path: Path) -> Iterator[Way]:
    way = Way.make(tmp_path)
    yield way
    way.close()


@pytest.mark.parametrize("nbytes", [1, PAGE, NBYTES, CHUNK, 2 * CHUNK + 5])
def test_down_and_up_again(way: Way, nbytes: int) -> None:
    way.file.allocate(PAGE)
    segment = Segment(way.number, way.file.allocate(nbytes), nbytes, 0, None, True)
    slot, back = filled(nbytes, page_up(nbytes)), filled(0, page_up(nbytes))
    way.down.submit("x", [segment], slot, Cause.PREFETCH).wait()
    assert way.down.bytes_read[Cause.PREFETCH] == page_up(nbytes)
    way.up.submit("x", [segment], back, Cause.DEMAND).wait()
    assert bytes(back.view[:nbytes]) == pattern(nbytes, page_up(nbytes))[:nbytes]


def test_the_ticket_tells_what_went_wrong(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second of three pieces, and once: what had not been begun is left out."""
    nbytes = 3 * CHUNK
    failing = Failing(monkeypatch, error(errno.ENOSPC), after=1)
    segment = Segment(way.number, way.file.allocate(nbytes), nbytes, 0, None, True)
    ticket = way.down.submit("x", [segment], filled(1, nbytes), Cause.PREFETCH)
    with pytest.raises(OffloadError, match="is full") as told:
        ticket.wait()
    assert type(told.value) is OffloadError
    failing.fault = None
    way.down.submit("x", [segment], filled(1, nbytes), Cause.PREFETCH).wait()


# blocks that are made here


class World(Way):
    """A residency of two slots (or more) over a spill file."""

    residency: Residency

    @classmethod
    def of(cls, folder: Path, slots: int = 2) -> World:
        way = Way.make(folder)
        world = cls(way.file, way.reader, way.number, way.down, way.up)
        world.residency = Residency(Arena(slots * SLOT), way.up, down=way.down)
        world.residency.add_pool("kv", SLOT, slots, LRU())
        return world

    def create(self, key: str, seed: int) -> Lease:
        lease = self.residency.create(Block(key, NBYTES, SLOT, ()), "kv")
        lease.slot.view[:NBYTES] = pattern(seed, NBYTES)
        return lease

    def extent(self) -> list[Segment]:
        return [Segment(self.number, self.file.allocate(NBYTES), NBYTES, 0, None, True)]

    def content(self, key: str) -> bytes:
        with self.residency.acquire(key) as lease:
            return bytes(lease.slot.view[:NBYTES])


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World.of(tmp_path)
    yield world
    world.close()


def within(patience: float, work: Callable[[], Any]) -> BaseException | None:
    """What `work` raises, in a thread of its own so that what never ends shows."""
    told: list[BaseException | None] = []

    def target() -> None:
        try:
            work()
            told.append(None)
        except BaseException as e:
            told.append(e)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(patience)
    assert told, "it never ended"
    return told[0]


def test_create_waits_for_a_spill(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    Failing(monkeypatch, lambda fd, n: n if gate.wait(PATIENCE) else 0)
    for n in range(2):
        with world.create(str(n), n):
            assert world.residency.spill(str(n), world.extent())
            assert not world.residency.spill(str(n), world.extent()), "it is under way"
    threading.Timer(0.1, gate.set).start()
    began = time.monotonic()
    assert within(PATIENCE, lambda: world.create("2", 2).release()) is None
    assert time.monotonic() - began >= 0.09, "no dirty block gave up its slot before it was written"
    world.residency.spill("2", world.extent())
    assert [world.content(str(n)) for n in range(3)] == [pattern(n, NBYTES) for n in range(3)]


def test_a_spill_that_ends_while_a_slot_is_looked_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look for a slot and the wait for one: that is no reason to say that every slot is leased."""
    gate = threading.Event()
    Failing(monkeypatch, lambda fd, n: n if gate.wait(PATIENCE) else 0)
    for n in range(2):
        with world.create(str(n), n):
            world.residency.spill(str(n), world.extent())
    tickets = [e.spilling for e in world.residency._entries.values()]
    wait = world.residency._await_spill

    def late(pool: str) -> None:
        gate.set()
        for ticket in tickets:
            assert ticket is not None
            ticket.wait()
        wait(pool)

    monkeypatch.setattr(world.residency, "_await_spill", late)
    assert within(PATIENCE, lambda: world.create("2", 2).release()) is None


def test_no_slot_can_ever_come_free(world: World) -> None:
    leases = [world.create("0", 0), world.create("1", 1)]
    with pytest.raises(RuntimeError, match="every slot of pool kv is leased"):
        world.create("2", 2)
    assert not world.residency.knows("2")
    leases[0].release()  # it is dirty, and nobody spills it
    with pytest.raises(RuntimeError, match="every slot of pool kv is leased"):
        world.create("2", 2)
    world.residency.remove("0")
    world.create("2", 2)


def test_interrupted_while_waiting(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, stop = threading.Event(), threading.Event()
    Failing(monkeypatch, lambda fd, n: n if gate.wait(PATIENCE) else 0)
    world.residency.interrupted = stop.is_set
    for n in range(2):
        with world.create(str(n), n):
            world.residency.spill(str(n), world.extent())
    threading.Timer(0.05, stop.set).start()
    assert isinstance(within(PATIENCE, lambda: world.create("2", 2)), Interrupted)
    assert not world.residency.knows("2")
    lease = world.residency.acquire("0")
    assert isinstance(within(PATIENCE, lambda: world.residency.soil("0")), Interrupted)
    lease.release()
    stop.clear()
    gate.set()
    with world.create("2", 2):
        world.residency.spill("2", world.extent())
    assert [world.content(str(n)) for n in range(3)] == [pattern(n, NBYTES) for n in range(3)]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failed_spill_is_told_and_tried_again(world: World, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    failing = Failing(monkeypatch, error(code))
    for n in range(2):
        with world.create(str(n), n):
            world.residency.spill(str(n), world.extent())
    for _ in range(2):
        with pytest.raises(OffloadError, match="the disk of"):
            world.create("2", 2)
        assert not world.residency.knows("2")
    assert [world.content(str(n)) for n in range(2)] == [pattern(n, NBYTES) for n in range(2)], "nothing is lost"
    failing.fault = None
    for n in range(2):
        with world.residency.acquire(str(n)):
            assert world.residency.spill(str(n), world.extent())
    with world.create("2", 2):
        world.residency.spill("2", world.extent())
    assert [world.content(str(n)) for n in range(3)] == [pattern(n, NBYTES) for n in range(3)]


def test_remove_while_it_is_written(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slot is nobody's before the write under way has ended."""
    writing, gate = threading.Event(), threading.Event()

    def slow(fd: Any, n: int) -> int:
        writing.set()
        assert gate.wait(PATIENCE)
        return n

    Failing(monkeypatch, slow)
    with world.create("0", 0):
        world.residency.spill("0", world.extent())
    assert writing.wait(PATIENCE)
    threading.Timer(0.05, gate.set).start()
    assert within(PATIENCE, lambda: world.residency.remove("0")) is None
    assert gate.is_set()
    assert world.residency._pools["kv"][0].free == 2


class Machine(RuleBasedStateMachine):
    """Blocks made, changed, spilled, evicted, fetched and removed, over a disk that is slow and fails."""

    SLOTS = 3

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.world = World.of(Path(self.folder.name), self.SLOTS)
        self.residency = self.world.residency
        self.model: dict[str, int] = {}  # key → seed of what is in it
        self.leases: dict[str, Lease] = {}
        self.where: dict[str, list[Segment]] = {}
        self.hot: set[str] = set()  # dirty, and not being spilled as they are now
        self.made = 0
        self.broken = self.suspect = False
        self.slow = 0.0
        self.real = self.world.file.write
        self.world.file.write = self.write  # type: ignore[method-assign]

    def write(self, view: memoryview, offset: int) -> None:
        """As the file does, with slots watched: what is written belongs to who has the extent."""
        time.sleep(self.slow)
        if self.broken:
            raise OffloadError("injected: the disk is full")
        self.real(view, offset)

    @property
    def room(self) -> bool:
        """Whether a slot can come free: the leased keep theirs, and so do those that nobody writes."""
        return len(set(self.leases) | self.hot) < self.SLOTS

    def told(self, work: Callable[[], Any]) -> Any:
        """What `work` returns; None where a spill has failed, which may be told to whoever comes next."""
        if not self.suspect:
            return work()
        self.settle()
        try:
            return work()
        except OffloadError as e:
            if "injected" not in str(e):
                raise
            return None

    def settle(self) -> None:
        """Wait for what is being written: who is told that it failed must not hang on threads, or hypothesis finds that
        the same steps go another way."""
        for entry in self.residency._entries.values():
            if entry.spilling is not None:
                assert entry.spilling._done.wait(PATIENCE)

    def demand(self, work: Callable[[], Lease]) -> Lease | None:
        """What a demand for a slot may say."""
        if self.suspect:
            self.settle()
        if self.room:
            return self.told(work)  # type: ignore[no-any-return]
        with pytest.raises((RuntimeError, OffloadError), match=r"every slot|injected") as refusal:
            work()
        assert self.suspect or isinstance(refusal.value, RuntimeError)
        return None

    @rule(seed=st.integers(0, 1000))
    def create(self, seed: int) -> None:
        key = f"b{self.made}"
        lease = self.demand(lambda: self.world.create(key, seed))
        if lease is None:
            assert not self.residency.knows(key)
            return
        self.made += 1
        self.model[key], self.leases[key] = seed, lease
        self.hot.add(key)

    @precondition(lambda self: set(self.model) - set(self.leases))
    @rule(data=st.data(), keep=st.booleans())
    def acquire(self, data: st.DataObject, keep: bool) -> None:
        key = data.draw(st.sampled_from(sorted(set(self.model) - set(self.leases))))
        if self.residency._entries[key].slot is not None:
            lease: Lease | None = self.residency.acquire(key)
        else:
            lease = self.demand(lambda: self.residency.acquire(key))
        if lease is None:
            return
        assert bytes(lease.slot.view[:NBYTES]) == pattern(self.model[key], NBYTES)
        if keep:
            self.leases[key] = lease
        else:
            lease.release()

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def prefetch(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.model)))
        self.told(lambda: self.residency.prefetch(key))

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), seed=st.integers(0, 1000))
    def change(self, data: st.DataObject, seed: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.leases)))
        if self.told(lambda: [self.residency.soil(key)]) is None:
            return
        self.leases[key].slot.view[:NBYTES] = pattern(seed, NBYTES)
        self.model[key] = seed
        self.hot.add(key)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), release=st.booleans())
    def spill(self, data: st.DataObject, release: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.leases)))
        if key not in self.where:
            self.where[key] = self.world.extent()
        started = self.residency.spill(key, self.where[key])
        assert started or key not in self.hot
        self.hot.discard(key)
        if release:
            self.leases.pop(key).release()

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.leases.pop(data.draw(st.sampled_from(sorted(self.leases)))).release()

    @precondition(lambda self: set(self.model) - set(self.leases))
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(set(self.model) - set(self.leases))))
        self.residency.remove(key)
        del self.model[key]
        self.hot.discard(key)
        for s in self.where.pop(key, ()):
            self.world.file.free(s.offset, s.nbytes)

    @rule(on=st.booleans())
    def slower(self, on: bool) -> None:
        self.slow = 0.002 if on else 0.0

    @rule()
    def break_the_disk(self) -> None:
        self.broken = self.suspect = True

    @precondition(lambda self: self.broken)
    @rule()
    def repair(self) -> None:
        """And write what could not be written."""
        self.broken = False
        self.settle()
        for key in self.model:
            entry = self.residency._entries[key]
            if entry.spilling is not None and entry.spilling.error is not None:
                assert self.residency.spill(key, self.where[key])
        self.suspect = False

    @invariant()
    def whole_state(self) -> None:
        r = self.residency
        with r._lock:
            pool, policy = r._pools["kv"]
            places = [s.address for s in pool._free]
            for key, e in r._entries.items():
                assert e.leases == (key in self.leases)
                if e.slot is None:
                    assert not e.dirty, f"{key} was evicted dirty"
                    assert e.spilling is None
                    continue
                places.append(e.slot.address)
                if e.dirty or r.resident(key):
                    assert bytes(e.slot.view[:NBYTES]) == pattern(self.model[key], NBYTES)
                if e.dirty and e.spilling is None:
                    assert key in self.hot
            assert sorted(places) == sorted(s.address for s in pool.slots), "every slot is in exactly one place"
            assert set(r._entries) == set(self.model)
            assert isinstance(policy, LRU)
            assert set(policy) == {k for k, e in r._entries.items() if e.slot is not None}
            for key in self.model:  # what is not in memory is in the file
                e = r._entries[key]
                if e.slot is None or (e.spilling is not None and e.spilling.done and e.spilling.error is None):
                    at = e.block.segments[0].offset
                    assert read_back(self.world.file, at, NBYTES) == pattern(self.model[key], NBYTES)
            assert self.world.file.used == len(self.where) * SLOT

    def teardown(self) -> None:
        try:
            if self.broken:
                self.repair()
            for lease in self.leases.values():
                lease.release()
            self.leases = {}
            for key in self.hot:
                self.where.setdefault(key, self.world.extent() if key not in self.where else [])
                self.residency.spill(key, self.where[key])
            self.hot = set()
            for key, seed in self.model.items():
                assert self.world.content(key) == pattern(seed, NBYTES)
            for key in list(self.model):
                self.residency.remove(key)
                for s in self.where.pop(key, ()):
                    self.world.file.free(s.offset, s.nbytes)
            assert self.world.file.used == 0
            assert self.residency._pools["kv"][0].free == self.SLOTS
        finally:
            self.world.close()
            self.folder.cleanup()


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, database=None)
TestMachine = Machine.TestCase

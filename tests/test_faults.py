"""Everything that can go wrong between a file and the device, one thing at a time, through both tiers.

Each time: the error reaches whoever waits, nothing hangs, no slot and no lease below is lost, no worker dies, and the
next request works. What one reader or one tier does by itself is in `test_reader` and `test_residency`.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tower import DATA, IMAGES, PATIENCE, SLOT, STEP, Odd, Tower, content, make_block, offsets, until

from tiers import PAGE, Cause, Interrupted, Lease, ReadError, probe

PREADV = os.preadv


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "blocks.bin"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def tower(path: Path) -> Iterator[Tower]:
    tower = Tower(path)
    yield tower
    tower.close()


def asking(tower: Tower, keys: Sequence[str]) -> tuple[list[threading.Thread], list[Any]]:
    """Waiters, a thread each, and what they were told."""
    told: list[Any] = []

    def work(key: str) -> None:
        try:
            told.append(tower.top.acquire(key))
        except BaseException as e:
            told.append(e)

    threads = [threading.Thread(target=work, args=(key,), daemon=True) for key in keys]
    for t in threads:
        t.start()
    until(lambda: len(told) + sum(e.leases for e in tower.top._entries.values()) >= len(keys), "all have asked")
    return threads, told


def join(threads: Sequence[threading.Thread]) -> None:
    for t in threads:
        t.join(PATIENCE)
    assert not any(t.is_alive() for t in threads), "somebody waits for ever"


def works_again(tower: Tower, key: str) -> None:
    """A request like any other, and nothing is left of the past."""
    threads, told = asking(tower, [key])
    tower.open()
    join(threads)
    assert isinstance(told[0], Lease), told
    assert content(told[0].slot) == IMAGES[key]
    tower.check(Counter([key]))
    told[0].release()
    tower.settle()
    tower.check(Counter())


# a part fails

PLACES = {
    "cut": lambda t, f: setattr(t.reader, "split_fault", f),
    "first read": lambda t, f: t.reader.faults.__setitem__(offsets("l0")[0], f),
    "last read": lambda t, f: t.reader.faults.__setitem__(offsets("l0")[-1], f),
    "found bad when read": lambda t, f: setattr(t.reader, "verify_fault", f),
    "ready": lambda t, f: t.link.faults.__setitem__("ready", f),
    "first copy": lambda t, f: t.device.faults.__setitem__(0, f),
    "last copy": lambda t, f: t.device.faults.__setitem__(SLOT - STEP, f),
    "after a copy": lambda t, f: t.link.faults.__setitem__("moved", f),
    "finish": lambda t, f: t.link.faults.__setitem__("finish", f),
}
KINDS: dict[str, Callable[[], BaseException]] = {
    "ReadError": lambda: ReadError("blocks.bin: injected"),
    "OSError": lambda: OSError(errno.EIO, "injected"),
    "MemoryError": lambda: MemoryError("injected"),
    "SystemExit": lambda: SystemExit("injected"),
    "KeyboardInterrupt": lambda: KeyboardInterrupt("injected"),
    "Odd": lambda: Odd("injected"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_a_failing_part(tower: Tower, place: str, kind: str) -> None:
    tower.reader.gate.clear()  # until all wait
    PLACES[place](tower, KINDS[kind])
    threads, told = asking(tower, ["l0"] * 3)
    tower.open()
    join(threads)
    assert [type(e) for e in told] == [ReadError] * 3
    for e in told:
        assert "injected" in str(e)
        assert "\n" not in str(e)
        if kind == "ReadError":
            assert str(e) == "blocks.bin: injected", "what names the file is passed on as it is"
        else:
            assert "l0" in str(e)
            assert kind in str(e)
    assert not tower.top.resident("l0")
    tower.check(Counter())
    tower.settle()
    tower.repair()
    tower.check(Counter())
    works_again(tower, "l0")
    works_again(tower, "l1")


@pytest.mark.parametrize("place", PLACES)
def test_a_part_that_fails_while_nobody_waits(tower: Tower, place: str) -> None:
    """A block fetched ahead of its use: whoever then needs it starts afresh and is told nothing of it."""
    PLACES[place](tower, KINDS["Odd"])
    assert tower.top.prefetch("l0")
    tower.settle()
    tower.check(Counter())
    assert not tower.top.resident("l0")
    tower.repair()
    works_again(tower, "l0")


def test_the_other_blocks_are_unharmed(tower: Tower) -> None:
    tower.reader.faults[offsets("l0")[2]] = KINDS["SystemExit"]
    with tower.top.acquire("l1"):
        for _ in range(5):  # more often than there are workers
            with pytest.raises(ReadError, match="injected"):
                tower.top.acquire("l0")
            works = tower.top.acquire("c1")
            assert content(works.slot) == IMAGES["c1"]
            works.release()
        tower.check(Counter(["l1"]))
    tower.settle()


@pytest.mark.parametrize("place", ["first read", "first copy"])
def test_what_has_failed_is_not_moved_further(path: Path, place: str) -> None:
    tower = Tower(path, readers=1, copies=1)
    try:
        reads, copied = len(tower.reader.asked), tower.device.moved
        PLACES[place](tower, KINDS["OSError"])
        with pytest.raises(ReadError, match="injected"):
            tower.top.acquire("l0")
        tower.settle()
        assert tower.device.moved == copied
        if place == "first read":
            assert tower.reader.asked[reads:] == offsets("l0")[:1]
    finally:
        tower.close()


def test_both_copies_in_flight_fail(tower: Tower) -> None:
    """The transfer ends once, when the last of them is through."""
    tower.device.gate.clear()
    for start in range(0, SLOT, STEP):
        tower.device.faults[start] = KINDS["OSError"]
    threads, told = asking(tower, ["l0", "l0"])
    until(lambda: len(tower.device.writing) == 2, "two copies of one block are under way")
    tower.check(Counter(["l0", "l0"]))
    tower.open()
    join(threads)
    assert [type(e) for e in told] == [ReadError] * 2
    tower.check(Counter())
    tower.repair()
    works_again(tower, "l0")


def test_a_block_pinned_below_is_read_again_for_whoever_needs_it_above(tower: Tower) -> None:
    """A pinned block's slot is its own: when the read has failed there is nobody below to ask for a second."""
    tower.reader.faults[offsets("c1")[0]] = KINDS["SystemExit"]
    ticket = tower.host.pin(make_block("c1"))
    until(lambda: ticket.done, "the first try")
    with pytest.raises(ReadError, match="injected"):
        tower.top.acquire("c1")
    tower.settle()
    tower.check(Counter())
    tower.repair()
    works_again(tower, "c1")
    works_again(tower, "c2")


# what a file can do, by the system calls


def test_a_failing_disk_is_named_above(tower: Tower, monkeypatch: pytest.MonkeyPatch) -> None:
    at = offsets("l0")[3]

    def failing(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset <= at < offset + len(buffers[0]):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return PREADV(fd, buffers, offset)

    with monkeypatch.context() as m:
        m.setattr(os, "preadv", failing)
        with pytest.raises(ReadError, match=r"blocks\.bin at byte \d+ failed: Input/output error"):
            tower.top.acquire("l0")
        tower.check(Counter())
    works_again(tower, "l0")


def test_short_reads_are_continued_above(tower: Tower, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel returns less than was asked for: no error, and no byte of it is missing."""
    short: set[int] = set()

    def tearing(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset in short:
            return PREADV(fd, buffers, offset)
        short.add(offset)
        return PREADV(fd, [buffers[0][:PAGE]], offset)

    monkeypatch.setattr(os, "preadv", tearing)
    works_again(tower, "l0")
    assert len(short) > 4


@pytest.mark.parametrize("size", [0, 5 * PAGE, SLOT - 100])
@pytest.mark.parametrize("when", ["before", "under way"])
def test_a_file_that_shrinks_is_named_above(tmp_path: Path, size: int, when: str) -> None:
    mine = tmp_path / "own.bin"
    mine.write_bytes(DATA)
    tower = Tower(mine)
    try:
        here = tower.top.acquire("l4")
        if when == "before":
            os.truncate(mine, size)
            threads, told = asking(tower, ["l0", "l0"])
        else:
            tower.reader.gate.clear()
            threads, told = asking(tower, ["l0", "l0"])
            until(lambda: len(tower.reader.writing) == 3, "reads are under way")
            os.truncate(mine, size)
            tower.open()
        join(threads)
        assert [type(e) for e in told] == [ReadError] * 2
        assert all("own.bin" in str(e) for e in told)
        tower.check(Counter(["l4"]))
        with pytest.raises(ReadError, match=r"own\.bin"):
            tower.top.acquire("l1")  # the file is not what it was, whatever is left of it
        assert content(here.slot) == IMAGES["l4"]
        here.release()
        tower.settle()
        tower.check(Counter())
    finally:
        tower.close()
    mine.write_bytes(DATA)
    again = Tower(mine)
    try:
        works_again(again, "l0")
    finally:
        again.close()


# cut short at each point


def no_room_below(tower: Tower) -> list[Lease]:
    held = [tower.host.acquire(key) for key in ("l3", "l4")]
    asked = tower.link.asked
    assert tower.top.prefetch("l0")
    until(lambda: tower.link.asked > asked + 1, "the link has asked below")
    assert tower.host._entries["l0"].slot is None
    return held


def being_read(tower: Tower) -> list[Lease]:
    before = tower.device.moved
    tower.reader.gate.clear()
    assert tower.top.prefetch("l0")
    until(lambda: len(tower.reader.writing) == 3, "it is being read")
    assert tower.device.moved == before
    return []


def copies_in_flight(tower: Tower) -> list[Lease]:
    tower.device.gate.clear()
    assert tower.top.prefetch("l0")
    until(lambda: len(tower.device.writing) == 2, "two copies are under way")
    return []


def between_copies(tower: Tower) -> list[Lease]:
    before = tower.device.moved
    tower.reader.held_back = {offsets("l0")[-1]}
    tower.reader.gate.clear()
    assert tower.top.prefetch("l0")
    until(lambda: tower.device.moved == before + 2 * STEP, "what has been read is up")
    until(lambda: tower.up.meter._in_flight == 0, "nothing goes up")
    return []


def all_copied(tower: Tower) -> list[Lease]:
    before = tower.device.moved
    tower.link.last_gate.clear()
    assert tower.top.prefetch("l0")
    until(lambda: tower.device.moved == before + SLOT, "all is up")
    until(lambda: tower.up.meter._in_flight == 1, "one copy has not been reported")
    return []


# how far a transfer of l0 can have come; each returns the leases it took below
POINTS = {
    "no room below": no_room_below,
    "being read below": being_read,
    "copies in flight": copies_in_flight,
    "between copies": between_copies,
    "all copied": all_copied,
}
HOLDS = {"copies in flight", "all copied"}  # the slot above is being written: that must be waited for


def keys(leases: Sequence[Lease]) -> Counter[str]:
    return Counter(lease.key for lease in leases)


def release(leases: Sequence[Lease]) -> None:
    for lease in leases:
        lease.release()


def waits_for_what_is_in_flight(tower: Tower, point: str, action: Callable[[], object]) -> None:
    """Do `action`, which ends a transfer: it takes until the copies in flight are through, and no longer."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    if point in HOLDS:
        thread.join(0.03)
        assert thread.is_alive(), "the slot is still being written"
        tower.open()
    join([thread])


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("point", POINTS)
def test_cancelled(tower: Tower, point: str, restart: bool) -> None:
    """From above, and then, as when a step was cut short, below too."""
    below = POINTS[point](tower)
    tower.check(Counter(), keys(below))
    ticket = tower.top._entries["l0"].ticket
    waits_for_what_is_in_flight(tower, point, tower.top.cancel_prefetches)
    assert ticket is not None
    assert (ticket.done, ticket.cancelled, ticket.error) == (True, True, None)
    assert not tower.device.writing
    assert tower.top._entries["l0"].slot is None
    assert tower.host._entries["l0"].leases == 0
    tower.check(Counter(), keys(below))
    if restart:
        thread = threading.Thread(target=tower.host.cancel_prefetches, daemon=True)
        thread.start()
        until(lambda: not thread.is_alive() or bool(tower.reader.writing), "only a read can keep it")
        tower.open()
        join([thread])
        tower.check(Counter(), keys(below))
    release(below)
    works_again(tower, "l0")  # otherwise it joins the read that is still under way


@pytest.mark.parametrize("point", POINTS)
def test_taken_back_for_a_demand(tower: Tower, point: str) -> None:
    """Every slot above is taken, and compute waits for another block: the prefetch gives way."""
    held = [tower.top.acquire(key) for key in ("l1", "l2")]
    below = POINTS[point](tower)
    wanted = "l3" if below else "l4"
    waits_for_what_is_in_flight(tower, point, lambda: held.append(tower.top.request(wanted)))  # type: ignore[arg-type]
    tower.check(Counter(["l1", "l2", wanted]), keys(below))
    assert tower.top._entries["l0"].slot is None
    tower.open()
    until(lambda: held[-1].ready, "the block asked for")
    assert content(held[-1].wait().slot) == IMAGES[wanted]
    release(held)
    release(below)
    works_again(tower, "l0")


@pytest.mark.parametrize("point", POINTS)
def test_failing_after_it_was_cancelled(tower: Tower, point: str) -> None:
    """What is in flight may still fail: nobody is told, and everything is given back once."""
    below = POINTS[point](tower)
    ticket = tower.top._entries["l0"].ticket
    assert ticket is not None
    thread = threading.Thread(target=tower.top.cancel_prefetches, daemon=True)
    thread.start()
    until(lambda: ticket.cancelled, "it is being cancelled")
    for place in ("first read", "last read", "first copy", "last copy", "after a copy"):
        PLACES[place](tower, KINDS["Odd"])
    tower.open()
    join([thread])
    tower.check(Counter(), keys(below))
    release(below)
    tower.settle()
    tower.repair()
    works_again(tower, "l0")


@pytest.mark.parametrize("point", POINTS)
def test_interrupted(tower: Tower, point: str) -> None:
    """Whoever waits leaves at once, wherever the transfer is; the tiers are then cleared as the engine does it."""
    below = POINTS[point](tower)
    tower.top.interrupted = lambda: True
    threads, told = asking(tower, ["l0"])
    join(threads)
    assert [type(e) for e in told] == [Interrupted]
    tower.check(Counter(), keys(below))
    tower.open()
    for tier in (tower.top, tower.host):
        tier.cancel_prefetches()
        tower.check(Counter(), keys(below))
    tower.top.interrupted = None
    release(below)
    works_again(tower, "l0")


@pytest.mark.parametrize("point", POINTS)
def test_closed(tower: Tower, point: str) -> None:
    """From above: all who wait are told, no thread and no lease below is left."""
    below = POINTS[point](tower)
    threads, told = asking(tower, ["l0", "l0"])
    waits_for_what_is_in_flight(tower, point, tower.up.close)
    join(threads)
    tower.open()
    tower.disk.close()
    assert tower.workers() == 0
    here = [got for got in told if isinstance(got, Lease)]
    assert len(here) == (2 if point == "all copied" else 0), "what was wholly under way came in"
    assert all(content(lease.slot) == IMAGES["l0"] for lease in here)
    assert all("closed" in str(e) for e in told if e not in here)
    tower.check(keys(here), keys(below))
    with pytest.raises(ReadError, match="closed"):
        tower.top.acquire("l1")
    tower.check(keys(here), keys(below))


# elsewhere


def test_an_ad_hoc_gather(tower: Tower) -> None:
    """Embedding rows have no residency to look after them."""
    slot = tower.top._pools["lru"][0].slots[0]
    segments = make_block("l0").segments

    def fetch() -> None:
        ticket = tower.disk.submit("rows", segments, slot, Cause.DEMAND)
        until(lambda: ticket.done, "the rows are there, or not")
        ticket.wait()

    for kind in KINDS.values():
        tower.reader.faults[offsets("l0")[1]] = kind
        with pytest.raises(ReadError, match="injected"):
            fetch()
    tower.repair()
    fetch()
    assert content(slot) == IMAGES["l0"]
    assert tower.workers() == sum(tower.depths)


def test_a_disk_that_fails_while_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`offload profile` says so in one line, like anything else that reads."""
    path = tmp_path / "model.bin"
    path.write_bytes(bytes(8 << 20))

    def failing(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(ReadError, match=r"model\.bin.*Input/output error"):
        probe.disk(path, seconds=0.01)
    assert not any(str(path) in os.readlink(f) for f in Path("/proc/self/fd").iterdir() if f.exists())

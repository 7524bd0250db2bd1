"""Blocks that lie next to each other in a file and wait together are read in one request, each as if alone."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiers.reader
from tiers import PAGE, Arena, Cause, DirectReader, ReadError, Segment, Slot, SpillFile, TransferQueue, page_up
from tiers.queue import JOINED, Ticket

NBYTES = 2 * PAGE - 100  # of a block: its last page is not full
STEP = page_up(NBYTES)
BLOCKS = 80
CONTENT = [random.Random(i).randbytes(STEP) for i in range(BLOCKS)]


class Held:
    """A queue with one worker, which waits in its first read until let go; requests of the system are noted."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, depth: int = 1) -> None:
        self.file = SpillFile(folder)
        self.reader = DirectReader([])
        self.number = self.reader.add(self.file)
        slot = Arena(STEP).allocate(STEP)
        self.file.allocate(BLOCKS * STEP)
        for i, content in enumerate(CONTENT):
            slot.view[:] = content
            self.file.write(slot.view, i * STEP)
        self.queue = TransferQueue(self.reader, depth)
        self.gate = threading.Event()
        self.requests: list[tuple[int, int]] = []  # (block it begins with, buffers)
        self.preadv = os.preadv
        monkeypatch.setattr(tiers.reader.os, "preadv", self._preadv)

    def _preadv(self, fd: int, views: Sequence[Any], offset: int) -> int:
        self.gate.wait(10)
        self.requests.append((offset // STEP, len(views)))
        return self.preadv(fd, views, offset)

    def ask(self, block: int, cause: Cause = Cause.DEMAND, nbytes: int = NBYTES) -> tuple[int, Slot, Ticket]:
        size = page_up(nbytes)
        slot = Arena(size).allocate(size)
        segment = Segment(self.number, block * STEP, nbytes, 0, None, True)
        return block, slot, self.queue.submit(f"b{block}", (segment,), slot, cause)

    def busy(self) -> tuple[int, Slot, Ticket]:
        """The worker is in a read of the last block."""
        asked = self.ask(BLOCKS - 1)
        while not asked[2].started:
            pass
        return asked

    def go(self, asked: Sequence[tuple[int, Slot, Ticket]]) -> None:
        """Let go; everything is there, and right."""
        self.gate.set()
        for block, slot, ticket in asked:
            ticket.wait()
            assert bytes(slot.view[:NBYTES]) == CONTENT[block][:NBYTES]
            assert ticket.nbytes == STEP

    def close(self) -> None:
        self.gate.set()
        self.queue.close()
        self.reader.close()


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    held = Held(tmp_path, monkeypatch)
    if held.file.buffered:
        held.close()
        pytest.skip("no direct reads here")
    yield held
    held.close()


def test_neighbours_go_together(held: Held) -> None:
    asked = [held.busy(), *(held.ask(i) for i in (4, 5, 6, 7, 9, 8, 20, 21))]
    held.go(asked)
    assert held.requests == [(BLOCKS - 1, 1), (4, 4), (9, 1), (8, 1), (20, 2)]
    assert sum(held.queue.bytes_read.values()) == 9 * STEP
    assert held.queue.meter._in_flight == 0


def test_what_is_needed_now_goes_first(held: Held) -> None:
    asked = [held.busy(), held.ask(3, Cause.PREFETCH), held.ask(4, Cause.PREFETCH), held.ask(2), held.ask(30)]
    held.go(asked)
    assert held.requests == [(BLOCKS - 1, 1), (2, 1), (30, 1), (3, 2)]
    assert held.queue.bytes_read == {Cause.DEMAND: 3 * STEP, Cause.PREFETCH: 2 * STEP}


def test_no_request_is_longer_than_one_read_well(held: Held) -> None:
    most = JOINED // NBYTES
    assert most < BLOCKS - 2
    held.go([held.busy(), *(held.ask(i) for i in range(most + 2))])
    assert held.requests == [(BLOCKS - 1, 1), (0, most), (most, 2)]


def test_one_that_is_cancelled_is_not_read(held: Held) -> None:
    first, *asked = [held.busy(), *(held.ask(i) for i in (10, 11, 12, 13))]
    held.queue.cancel(asked.pop(1)[2])
    held.go([first, *asked])
    assert held.requests == [(BLOCKS - 1, 1), (10, 1), (12, 2)]


@pytest.mark.parametrize("how", ["short", "refused"])
def test_a_request_that_fails_is_made_one_by_one(held: Held, how: str) -> None:
    plain = held.preadv

    def failing(fd: int, views: Sequence[Any], offset: int) -> int:
        if len(views) == 1:
            return plain(fd, views, offset)
        if how == "refused":
            raise OSError(errno.EIO, "Input/output error")
        return plain(fd, views[:1], offset)

    held.preadv = failing
    held.go([held.busy(), *(held.ask(i) for i in (4, 5, 6))])
    assert held.requests == [(BLOCKS - 1, 1), (4, 3), (4, 1), (5, 1), (6, 1)]


def test_only_the_one_that_cannot_be_read_fails(held: Held) -> None:
    os.ftruncate(held.file.fd, (BLOCKS - 3) * STEP + PAGE)
    asked = [held.ask(2), *(held.ask(BLOCKS - k) for k in (5, 4, 3))]
    held.go(asked[:3])
    with pytest.raises(ReadError, match="ends at byte"):
        asked[3][2].wait()
    assert held.queue.meter._in_flight == 0


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_everything_gets_its_own(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        held = Held(tmp_path_factory.mktemp("spill"), patch, depth=data.draw(st.integers(1, 3)))
        try:
            runs = data.draw(st.lists(st.tuples(st.integers(0, BLOCKS - 7), st.integers(1, 6)), max_size=8))
            blocks = list(dict.fromkeys(b for begin, n in runs for b in range(begin, begin + n)))
            asked = [held.ask(b, data.draw(st.sampled_from(Cause))) for b in blocks]
            dropped = [a for a in asked if data.draw(st.booleans()) and data.draw(st.booleans())]
            for a in dropped[: len(dropped) // 2]:
                if not a[2].started:
                    held.queue.cancel(a[2])
            held.go([a for a in asked if not a[2].cancelled])
            assert held.queue.meter._in_flight == 0
        finally:
            held.close()

"""The transfer queue: worker threads that fulfil tickets, demand before prefetch.

A ticket is one block (or an ad-hoc gather) on its way into a slot, cut into pieces so that a demand never waits
behind a whole prefetched layer. Completion is a state of the ticket, never a callback.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from enum import IntEnum

from tiers.arena import Slot
from tiers.block import Segment
from tiers.errors import Interrupted, OffloadError, ReadError
from tiers.reader import BlockReader, Piece


class Cause(IntEnum):
    """Why bytes move; lower goes first."""

    DEMAND = 0
    PREFETCH = 1


class Ticket:
    """A transfer under way. `wait` returns once every byte is in the slot, or raises what went wrong."""

    __slots__ = (
        "_done",
        "_pieces",
        "_running",
        "cancelled",
        "cause",
        "deadline",
        "error",
        "files",
        "finished",
        "key",
        "nbytes",
        "slot",
        "started",
    )  # fmt: skip

    def __init__(
        self, key: str, slot: Slot, pieces: Sequence[Piece], cause: Cause, deadline: float, done: threading.Event
    ) -> None:
        self.key = key
        self.slot = slot
        self.cause = cause
        self.deadline = deadline
        self.error: OffloadError | None = None
        self.cancelled = False
        self.nbytes = 0  # bytes that crossed the link so far
        self.files = sorted({p.file for p in pieces})
        self.started = self.finished = 0.0
        self._pieces = deque(pieces)
        self._running = 0
        self._done = done

    @property
    def done(self) -> bool:
        """Whether the transfer has ended, well or badly; the slot is no longer being written."""
        return self._done.is_set()

    def wait(self, interrupted: Callable[[], bool] | None = None) -> None:
        """Block until done. `interrupted` is polled; raises `Interrupted` or the transfer's `ReadError`."""
        while not self._done.wait(0.05 if interrupted else None):
            if interrupted is not None and interrupted():
                raise Interrupted("interrupted")
        if self.error is not None:
            raise self.error


class TransferQueue:
    """`depth` threads reading through one `BlockReader`; so many requests are in flight at once."""

    def __init__(self, reader: BlockReader, depth: int = 8) -> None:
        self._reader = reader
        self._heap: list[tuple[int, float, int, Ticket]] = []
        self._order = itertools.count()
        self._cond = threading.Condition()
        self._closed = False
        self._in_flight = 0
        self._busy_since = 0.0
        self._busy_s = 0.0
        self.bytes_read = dict.fromkeys(Cause, 0)
        self._threads = [
            threading.Thread(target=self._work, name=f"offload-read-{i}", daemon=True) for i in range(depth)
        ]
        for t in self._threads:
            t.start()

    @property
    def busy_s(self) -> float:
        """Wall time so far with at least one request in flight, in seconds."""
        with self._cond:
            return self._busy_s + (time.perf_counter() - self._busy_since if self._in_flight else 0.0)

    def submit(self, key: str, segments: Sequence[Segment], slot: Slot, cause: Cause, deadline: float = 0.0) -> Ticket:
        """Start moving `segments` into `slot`. Among equals the smaller `deadline` goes first."""
        pieces = [p for s in segments for p in self._reader.split(s, slot)]
        ticket = Ticket(key, slot, pieces, cause, deadline, threading.Event())
        with self._cond:
            if self._closed:
                raise ReadError("the transfer queue is closed")
            if not pieces:
                ticket._done.set()
                return ticket
            self._push(ticket)
            self._cond.notify(len(pieces))
        return ticket

    def promote(self, ticket: Ticket) -> None:
        """A prefetch turned out to be needed now."""
        with self._cond:
            if ticket.cause is not Cause.DEMAND and not ticket.done:
                ticket.cause = Cause.DEMAND
                self._push(ticket)  # the old heap entry is skipped when met

    def cancel(self, ticket: Ticket) -> None:
        """Drop what has not been requested yet, and wait for the requests in flight: the slot is then free."""
        with self._cond:
            ticket.cancelled = True
            ticket._pieces.clear()
            if ticket._running == 0 and not ticket.done:
                self._finish(ticket)
        ticket._done.wait()

    def close(self) -> None:
        """Stop all threads; transfers under way end with an error. Returns when the last thread is gone."""
        with self._cond:
            self._closed = True
            for *_, ticket in self._heap:
                if ticket.done or not ticket._pieces:
                    continue  # what is wholly under way comes in
                ticket._pieces.clear()
                ticket.error = ticket.error or ReadError("the transfer queue was closed")
                if ticket._running == 0:
                    self._finish(ticket)
            self._cond.notify_all()
        for t in self._threads:
            t.join()

    def _push(self, ticket: Ticket) -> None:
        heapq.heappush(self._heap, (ticket.cause, ticket.deadline, next(self._order), ticket))

    def _next(self) -> tuple[Ticket, Piece] | None:
        """The most urgent piece, or None. Called under the lock; entries without pieces left are dropped."""
        while self._heap:
            ticket = self._heap[0][-1]
            if ticket._pieces:
                return ticket, ticket._pieces.popleft()
            heapq.heappop(self._heap)
        return None

    def _finish(self, ticket: Ticket) -> None:
        ticket.finished = time.perf_counter()
        ticket._done.set()

    def _work(self) -> None:
        while True:
            with self._cond:
                while (job := self._next()) is None:
                    if self._closed:
                        return
                    self._cond.wait()
                ticket, piece = job
                now = time.perf_counter()
                if not ticket.started:
                    ticket.started = now
                ticket._running += 1
                if self._in_flight == 0:
                    self._busy_since = now
                self._in_flight += 1
            error: OffloadError | None = None
            moved = 0
            try:
                moved = self._reader.read(piece, ticket.slot)
            except OffloadError as e:
                error = e
            except Exception as e:  # a worker must never die with a ticket in its hands
                error = ReadError(f"reading block {ticket.key} failed: {type(e).__name__}: {e}")
            with self._cond:
                ticket._running -= 1
                ticket.nbytes += moved
                self.bytes_read[ticket.cause] += moved
                self._in_flight -= 1
                if self._in_flight == 0:
                    self._busy_s += time.perf_counter() - self._busy_since
                if error is not None:
                    ticket.error = ticket.error or error
                    ticket._pieces.clear()
                last = not ticket._pieces and ticket._running == 0 and not ticket.done
                if last and ticket.error is None and not ticket.cancelled:
                    try:
                        for file in ticket.files:
                            self._reader.verify(file)  # bytes of a changed file never reach a model
                    except OffloadError as e:
                        ticket.error = e
                if last:
                    self._finish(ticket)

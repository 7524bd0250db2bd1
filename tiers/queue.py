"""The transfer queue: worker threads that fulfil tickets over one link, demand before prefetch.

A ticket is one block (or an ad-hoc gather) on its way into a slot, cut into pieces so that a demand never waits
behind a whole prefetched layer. Completion is a state of the ticket, never a callback. What a piece is and how it is
moved is the link's business: `DiskLink` reads files, `UpLink` (`tiers.uplink`) copies from the tier below.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, Protocol, runtime_checkable

from tiers.arena import Slot
from tiers.block import Block, Segment
from tiers.errors import Interrupted, OffloadError, ReadError
from tiers.reader import BlockReader, DirectReader, Piece
from tiers.trace import Trace

JOINED = 256 << 10  # most bytes of a request for several blocks: larger ones gain little


class Cause(IntEnum):
    """Why bytes move; lower goes first."""

    DEMAND = 0
    PREFETCH = 1


class Ticket:
    """A transfer under way. `wait` returns once every byte is in the slot, or raises what went wrong."""

    __slots__ = (
        "_done", "_pieces", "_running", "block", "cancelled", "cause", "deadline", "direct", "error", "finished",
        "key", "lease", "nbytes", "slot", "started",
    )  # fmt: skip

    def __init__(self, key: str, block: Block | None, slot: Slot, cause: Cause, deadline: float) -> None:
        self.key = key
        self.block = block
        self.slot = slot
        self.cause = cause
        self.deadline = deadline
        self.error: OffloadError | None = None
        self.cancelled = False
        self.nbytes = 0  # bytes that crossed the link so far
        self.lease: Any = None  # what an upward link holds in the tier below
        self.direct = False  # read from files straight into the slot, past the tier below
        self.started = self.finished = 0.0
        self._pieces: deque[Piece] = deque()
        self._running: list[Piece] = []
        self._done = threading.Event()

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


class Link(Protocol):
    """One way between two places. Called by the queue's workers; errors are `OffloadError`s."""

    @property
    def name(self) -> str:
        """Its lane in a timeline."""
        ...

    @property
    def poll_s(self) -> float | None:
        """How soon to ask again whether a piece is ready; None: pieces always are."""
        ...

    def cut(self, ticket: Ticket, segments: Sequence[Segment]) -> list[Piece]:
        """The pieces of a transfer, in the order in which they should go."""
        ...

    def ready(self, ticket: Ticket, piece: Piece) -> bool:
        """Whether the piece can be moved now. Raises what makes that impossible for good."""
        ...

    def move(self, ticket: Ticket, piece: Piece) -> int:
        """Move one piece; returns the bytes that crossed the link."""
        ...

    def finish(self, ticket: Ticket, whole: bool) -> None:
        """The last piece is in (`whole`), or there will be no more. May raise to fail the ticket."""
        ...


@runtime_checkable
class Joining(Protocol):
    """A link that may move several pieces in one request."""

    def joins(self, piece: Piece, after: Piece) -> bool:
        """Whether `after` lies just behind `piece`."""
        ...

    def move_joined(self, parts: Sequence[tuple[Ticket, Piece]]) -> list[int] | None:
        """Move them all; returns the bytes of each. None: it cannot be done together, and each must go by itself."""
        ...


class Meter:
    """What one link carried: bytes by cause, and wall time with at least one request in flight. Thread-safe.

    `name` is the link's lane in a timeline.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.bytes = dict.fromkeys(Cause, 0)
        self._lock = threading.Lock()
        self._in_flight = 0
        self._since = 0.0
        self._busy_s = 0.0

    def begin(self) -> None:
        """A request goes out."""
        with self._lock:
            if self._in_flight == 0:
                self._since = time.perf_counter()
            self._in_flight += 1

    def end(self, cause: Cause, nbytes: int) -> None:
        """A request has ended, and so many bytes came."""
        with self._lock:
            self.bytes[cause] += nbytes
            self._in_flight -= 1
            if self._in_flight == 0:
                self._busy_s += time.perf_counter() - self._since

    @property
    def busy_s(self) -> float:
        """Seconds so far."""
        with self._lock:
            return self._busy_s + (time.perf_counter() - self._since if self._in_flight else 0.0)


class DiskLink:
    """From files to host slots."""

    name = "disk"
    poll_s = None

    def __init__(self, reader: BlockReader) -> None:
        self._reader = reader

    def cut(self, ticket: Ticket, segments: Sequence[Segment]) -> list[Piece]:
        """Requests as the reader likes them."""
        return [p for s in segments for p in self._reader.split(s, ticket.slot)]

    def ready(self, ticket: Ticket, piece: Piece) -> bool:
        """A file is always there."""
        return True

    def move(self, ticket: Ticket, piece: Piece) -> int:
        """Read."""
        return self._reader.read(piece, ticket.slot)

    def joins(self, piece: Piece, after: Piece) -> bool:
        """See `Joining`."""
        return isinstance(self._reader, DirectReader) and self._reader.joins(piece, after)

    def move_joined(self, parts: Sequence[tuple[Ticket, Piece]]) -> list[int] | None:
        """See `Joining`."""
        assert isinstance(self._reader, DirectReader)
        return self._reader.read_joined([(piece, ticket.slot) for ticket, piece in parts])

    def finish(self, ticket: Ticket, whole: bool) -> None:
        """Bytes of a changed file never reach a model."""
        if whole and ticket.block is not None:
            verify_files(self._reader, ticket.block)


def verify_files(reader: BlockReader, block: Block) -> None:
    """Raise `ReadError` if a file the block lies in is not the one that was opened."""
    for file in sorted({s.file for s in block.segments}):
        reader.verify(file)


class TransferQueue:
    """`depth` threads moving pieces over one link; so many are in flight at once.

    `direct` is the meter that counts tickets whose bytes come straight from files (the disk's); by default they are
    counted like all others.
    """

    def __init__(
        self, link: Link | BlockReader, depth: int = 8, trace: Trace | None = None, direct: Meter | None = None
    ) -> None:
        self._link: Link = link if hasattr(link, "cut") else DiskLink(link)  # type: ignore[assignment]
        self._joining = self._link if isinstance(self._link, Joining) else None
        self._trace = trace
        self.meter = Meter(self._link.name)
        self._direct = direct or self.meter
        self._heap: list[tuple[int, float, int, Ticket]] = []
        self._order = itertools.count()
        self._cond = threading.Condition()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"offload-read-{self._link.name}-{i}", daemon=True)
            for i in range(depth)
        ]
        for t in self._threads:
            t.start()

    @property
    def busy_s(self) -> float:
        """Wall time so far with at least one request in flight, in seconds."""
        return self.meter.busy_s

    @property
    def bytes_read(self) -> dict[Cause, int]:
        """Bytes that crossed the link so far, by cause."""
        return self.meter.bytes

    def submit(self, key: str, segments: Sequence[Segment], slot: Slot, cause: Cause, deadline: float = 0.0) -> Ticket:
        """Start moving `segments` into `slot`. Among equals the smaller `deadline` goes first."""
        return self.fetch(Block(key, 0, slot.nbytes, tuple(segments)), slot, cause, deadline)

    def fetch(self, block: Block, slot: Slot, cause: Cause, deadline: float = 0.0) -> Ticket:
        """Start moving `block` into `slot`."""
        ticket = Ticket(block.key, block, slot, cause, deadline)
        pieces = self._link.cut(ticket, block.segments)
        with self._cond:
            if self._closed:
                raise ReadError("the transfer queue is closed")
            if not pieces:
                ticket._done.set()
                return ticket
            ticket._pieces.extend(pieces)
            self._push(ticket)
            self._cond.notify(len(pieces))
        return ticket

    def promote(self, ticket: Ticket) -> None:
        """A prefetch turned out to be needed now."""
        with self._cond:
            if ticket.cause is not Cause.DEMAND and not ticket.done:
                ticket.cause = Cause.DEMAND
                self._push(ticket)  # the old heap entry is skipped when met

    def arrived(self, ticket: Ticket, nbytes: int) -> bool:
        """Whether the first `nbytes` of the ticket's slot are there. Raises the ticket's error.

        Pieces go in slot order, so everything below the first one not finished is. The end counts only once the
        whole transfer has been found good.
        """
        if ticket.done:
            if ticket.error is not None:
                raise ticket.error
            return True
        with self._cond:
            open_ = [p.dst for p in ticket._running] + [p.dst for p in itertools.islice(ticket._pieces, 1)]
            return nbytes < ticket.slot.nbytes and min(open_, default=0) >= nbytes

    def cancel(self, ticket: Ticket) -> None:
        """Drop what has not been requested yet, and wait for the requests in flight: the slot is then free."""
        with self._cond:
            ticket.cancelled = True
            ticket._pieces.clear()
            if not ticket._running and not ticket.done:
                self._finish(ticket, False)
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
                if not ticket._running:
                    self._finish(ticket, False)
            self._cond.notify_all()
        for t in self._threads:
            t.join()

    def _push(self, ticket: Ticket) -> None:
        heapq.heappush(self._heap, (ticket.cause, ticket.deadline, next(self._order), ticket))

    def _next(self) -> tuple[Ticket, Piece] | None:
        """The most urgent piece that can go, or None. Called under the lock."""
        while self._heap and not self._heap[0][-1]._pieces:
            heapq.heappop(self._heap)
        for *_, ticket in self._heap[:1] if self._link.poll_s is None else sorted(self._heap):
            if not ticket._pieces:
                continue
            try:
                if self._link.ready(ticket, ticket._pieces[0]):
                    return ticket, ticket._pieces.popleft()
            except BaseException as e:
                ticket.error = _as_error(ticket, e)
                ticket._pieces.clear()
                if not ticket._running:
                    self._finish(ticket, False)
        return None

    def _request(self) -> list[tuple[Ticket, Piece]] | None:
        """The most urgent piece, and those that would go next and lie just behind it. Called under the lock."""
        first = self._next()
        if first is None:
            return None
        parts, total = [first], first[1].nbytes
        while self._joining is not None:
            while self._heap and not self._heap[0][-1]._pieces:
                heapq.heappop(self._heap)
            if not self._heap:
                break
            ticket = self._heap[0][-1]
            piece = ticket._pieces[0]
            total += piece.nbytes
            if total > JOINED or not self._joining.joins(parts[-1][1], piece):
                break
            parts.append((ticket, ticket._pieces.popleft()))
        return parts

    def _finish(self, ticket: Ticket, whole: bool) -> None:
        try:
            self._link.finish(ticket, whole)
        except BaseException as e:  # whatever it is, the ticket ends
            ticket.error = ticket.error or _as_error(ticket, e)
        ticket.finished = time.perf_counter()
        if self._trace is not None and ticket.started:
            self._trace.transfer(self._meter(ticket).name, ticket)
        ticket._done.set()

    def _meter(self, ticket: Ticket) -> Meter:
        return self._direct if ticket.direct else self.meter

    def _work(self) -> None:
        while True:
            with self._cond:
                while (parts := self._request()) is None:
                    if self._closed:
                        return
                    self._cond.wait(self._link.poll_s if self._heap else None)
                for ticket, piece in parts:
                    if not ticket.started:
                        ticket.started = time.perf_counter()
                    ticket._running.append(piece)
                    self._meter(ticket).begin()
            moved = self._joined(parts) if len(parts) > 1 else None
            for i, (ticket, piece) in enumerate(parts):
                error: OffloadError | None = None
                nbytes = 0
                try:
                    nbytes = self._moved(ticket, piece) if moved is None else moved[i]
                except BaseException as e:  # a worker must never die with a ticket in its hands
                    error = _as_error(ticket, e)
                with self._cond:
                    ticket._running.remove(piece)
                    ticket.nbytes += nbytes
                    self._meter(ticket).end(ticket.cause, nbytes)
                    if error is not None:
                        ticket.error = ticket.error or error
                        ticket._pieces.clear()
                    if not ticket._pieces and not ticket._running and not ticket.done:
                        self._finish(ticket, ticket.error is None and not ticket.cancelled)

    def _moved(self, ticket: Ticket, piece: Piece) -> int:
        _free(ticket)
        return self._link.move(ticket, piece)

    def _joined(self, parts: Sequence[tuple[Ticket, Piece]]) -> list[int] | None:
        """Bytes of each, in one request; None: whatever stands in the way, each finds it by itself."""
        assert self._joining is not None
        try:
            for ticket, _ in parts:
                _free(ticket)
            return self._joining.move_joined(parts)
        except BaseException:
            return None


def _free(ticket: Ticket) -> None:
    """Wait for the compute that read the slot: it is reused only after that."""
    fence = ticket.slot.fence
    if fence is not None:
        fence.synchronize()
        ticket.slot.fence = None


def _as_error(ticket: Ticket, e: BaseException) -> OffloadError:
    """What waiters are told."""
    return e if isinstance(e, OffloadError) else ReadError(f"block {ticket.key} failed: {type(e).__name__}: {e}")

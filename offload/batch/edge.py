"""The asynchronous edge of a batch job: files are read and written while the synchronous core computes.

Two threads with an event loop each: `AsyncOutput` takes finished lines and writes whatever has gathered as one group;
`ReadAhead` has the next requests' lines in memory before they are asked for. Both hold a bounded number of bytes, and
give their errors to who calls next. The core never waits for a disk, unless it is so far ahead that memory ends.

The only import of aiofiles. Not covered: what is written and when it counts (`offload.batch.output`).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import aiofiles
import aiofiles.os

from offload.batch.journal import Checkpoint, Pending
from offload.batch.lines import Source
from offload.batch.output import Output
from offload.batch.results import Answer

WAITING = 16 << 20  # bytes that wait to be written, or are read ahead
_ROW = 64  # bytes that the shortest line counts for


class AsyncOutput:
    """Writes to `output` in a thread of its own, which alone uses it. A context manager; safe from several threads.

    While one group is being made durable the next gathers, so a slow disk means larger groups, not a slower job.
    """

    def __init__(self, output: Output, *, waiting: int = WAITING) -> None:
        self._output = output
        self._waiting = waiting
        self._changed = threading.Condition()  # of what follows
        self._answers: deque[Answer] = deque()
        self._checkpoints: dict[tuple[int, int], Checkpoint] = {}  # the last of each choice
        self._held = 0  # bytes, with those being written
        self._closing = False
        self._error: BaseException | None = None
        self._loop = asyncio.new_event_loop()
        self._wake = asyncio.Event()
        self._thread = threading.Thread(target=self._serve, name="batch-output", daemon=True)
        self._thread.start()

    def __enter__(self) -> AsyncOutput:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        # what is finished is kept in any case; an error on the way out must not hide the one that led there
        with contextlib.suppress(Exception) if kind is not None else contextlib.nullcontext():
            self.close()

    def put(self, answer: Answer) -> None:
        """Have it written soon. Raises what `Output.write` raised for an earlier one."""
        with self._changed:
            self._room()
            self._answers.append(answer)
            self._held += len(answer.line)
        self._notify()

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        """Have it recorded soon, unless a later one of the same choice comes first. Raises like `put`."""
        with self._changed:
            self._room()
            before = self._checkpoints.get(checkpoint[:2])
            self._checkpoints[checkpoint[:2]] = checkpoint
            self._held += len(checkpoint.state) - (len(before.state) if before is not None else 0)
        self._notify()

    def flush(self) -> None:
        """Wait until all that was put is durable. Raises like `put`."""
        self._notify()
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or not self._busy())
            self._raise()

    def close(self) -> None:
        """Write what waits, and stop. Raises like `put`."""
        with self._changed:
            self._closing = True
        self._notify()
        self._thread.join()
        with self._changed:
            self._raise()

    def _busy(self) -> bool:
        return bool(self._held or self._answers or self._checkpoints)

    def _room(self) -> None:
        """Wait until there is some."""
        assert not self._closing
        self._changed.wait_for(lambda: self._error is not None or self._held < self._waiting)
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _notify(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._wake.set)

    def _serve(self) -> None:
        try:
            self._loop.run_until_complete(self._run())
        except BaseException as e:
            with self._changed:
                self._error = e
                self._changed.notify_all()
        finally:
            self._loop.close()

    async def _run(self) -> None:
        write = aiofiles.os.wrap(self._output.write)
        with ThreadPoolExecutor(1, "batch-write") as thread:
            while True:
                await self._wake.wait()
                self._wake.clear()
                with self._changed:
                    answers, checkpoints = list(self._answers), list(self._checkpoints.values())
                    self._answers.clear()
                    self._checkpoints.clear()
                    closing, held = self._closing, self._held
                if answers or checkpoints:
                    await write(answers, checkpoints, loop=self._loop, executor=thread)
                    with self._changed:
                        self._held -= held
                        self._changed.notify_all()
                if closing:
                    return


class ReadAhead:
    """The lines of requests, in the order of `rows`, read before they are asked for. An iterator; close it.

    Raises `ReadError` when it comes to a line that cannot be read or is not what it was.
    """

    def __init__(self, source: Source, rows: Iterator[Pending], *, waiting: int = WAITING) -> None:
        self._source = source
        self._rows = rows
        self._waiting = waiting
        self._changed = threading.Condition()  # of what follows
        self._ready: deque[tuple[Pending, bytes]] = deque()
        self._held = 0
        self._closing = self._ended = False
        self._error: BaseException | None = None
        self._loop = asyncio.new_event_loop()
        self._wake = asyncio.Event()
        self._thread = threading.Thread(target=self._serve, name="batch-input", daemon=True)
        self._thread.start()

    def __iter__(self) -> ReadAhead:
        return self

    def __next__(self) -> tuple[Pending, bytes]:
        """The next request and its line."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._ended)
            if not self._ready:
                if self._error is not None:
                    raise self._error
                raise StopIteration
            row, line = self._ready.popleft()
            self._held -= _ROW + len(line)
        self._notify()
        return row, line

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading."""
        with self._changed:
            self._closing = True
        self._notify()
        self._thread.join()

    def _notify(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._wake.set)

    def _serve(self) -> None:
        try:
            self._loop.run_until_complete(self._run())
        except BaseException as e:
            self._error = e
        finally:
            self._loop.close()
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    async def _run(self) -> None:
        following = aiofiles.os.wrap(next)
        with ThreadPoolExecutor(1, "batch-read") as thread:
            # a spooled input has no name to open it by
            async with aiofiles.open(f"/proc/self/fd/{self._source.fd}", "rb", executor=thread) as file:
                while not self._closing:
                    if self._held >= self._waiting:
                        await self._wake.wait()
                        self._wake.clear()
                        continue
                    row = await following(self._rows, None, loop=self._loop, executor=thread)
                    if row is None:
                        return
                    await file.seek(row.offset)
                    line = self._source.checked(await file.read(row.length), row.digest)
                    with self._changed:
                        self._ready.append((row, line))
                        self._held += _ROW + len(line)
                        self._changed.notify_all()

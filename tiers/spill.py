"""Writing downward: a scratch file that blocks made at run time (keys and values) are spilled to and read back from.

The file has no name (it is unlinked as soon as it is open, mode 0600) and is gone with the process, however that ends;
nobody else can write to it, so unlike files that stay, what is read back is not checksummed.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import fcntl
import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from tiers.block import PAGE, Segment, page_up
from tiers.errors import OffloadError, ReadError, UsageError
from tiers.queue import Ticket
from tiers.reader import CHUNK, OpenFile, Piece


class SpillFile(OpenFile):
    """Extents of one unnamed file. `allocate` and `free` are safe from any thread."""

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        """At most `limit` bytes. Raises `UsageError` for a folder that cannot be written to or lies in memory."""
        self.path = folder
        self.limit = limit
        self._lock = threading.Lock()
        self._end = 0
        self._free: list[tuple[int, int]] = []  # (offset, bytes) in order, no two of them side by side
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if _in_memory(folder):
                raise UsageError(f"--spill-dir {folder} lies in memory (tmpfs); name a folder on a disk")
            fd, name = tempfile.mkstemp(prefix="offload-spill-", dir=folder)
        except OSError as e:
            raise UsageError(f"--spill-dir {folder} cannot be written to: {e.strerror}") from e
        try:
            os.fchmod(fd, 0o600)
            self.fd = fd
            self.buffered = True
            with contextlib.suppress(OSError):  # some file systems refuse the flag
                self.fd = os.open(name, os.O_RDWR | os.O_CLOEXEC | getattr(os, "O_DIRECT", 0))
                os.close(fd)
                self.buffered = False
        finally:
            os.unlink(name)

    @property
    def used(self) -> int:
        """Bytes allocated and not freed."""
        with self._lock:
            return self._end - sum(size for _, size in self._free)

    def allocate(self, nbytes: int) -> int:
        """The offset of an extent of so many bytes, whole pages. Raises `OffloadError` over the limit."""
        size = page_up(nbytes)
        with self._lock:
            for i, (at, free) in enumerate(self._free):
                if free >= size:
                    self._free[i : i + 1] = [(at + size, free - size)] if free > size else []
                    return at
            if self.limit is not None and self._end + size > self.limit:
                raise OffloadError(
                    f"--disk: {self.limit} bytes are all used up by what is spilled; allow more, or keep more in memory"
                )
            at, self._end = self._end, self._end + size
            return at

    def free(self, offset: int, nbytes: int) -> None:
        """Give an extent back, which nobody reads or writes any more; once all are back, so is the disk's space."""
        with self._lock:
            i = bisect.bisect(self._free, (offset, 0))
            at, end = offset, offset + page_up(nbytes)
            if i < len(self._free) and self._free[i][0] == end:
                end += self._free.pop(i)[1]
            if i and sum(self._free[i - 1]) == at:
                i -= 1
                at = self._free.pop(i)[0]
            if end < self._end:
                self._free.insert(i, (at, end - at))
                return
            self._end = at
            if at == 0:
                with contextlib.suppress(OSError):
                    os.ftruncate(self.fd, 0)

    def write(self, view: memoryview, offset: int) -> None:
        """Write all of `view` (whole pages of an aligned slot). Raises `OffloadError`."""
        done = 0
        while done < len(view):
            direct = not self.buffered  # as it is now: another writer may be the one to find out
            try:
                n = os.pwritev(self.fd, [view[done:]], offset + done)
            except OSError as e:
                if e.errno == errno.EINVAL and direct:
                    self.use_buffered()
                    continue
                full = e.errno in (errno.ENOSPC, errno.EDQUOT)
                what = "is full" if full else f"cannot be written to: {e.strerror}"
                remedy = "; free some space, name another folder with --spill-dir, or keep more in memory"
                raise OffloadError(f"the disk of {self.path} {what}{remedy if full else ''}") from e
            if n == 0:
                raise OffloadError(f"the disk of {self.path} takes no more bytes")
            if direct and n % PAGE and done + n < len(view):
                self.use_buffered()  # direct writes must go on at a page, and this one may end here every time
            done += n
        if self.buffered:
            os.posix_fadvise(self.fd, offset, len(view), os.POSIX_FADV_DONTNEED)

    def verify(self) -> None:
        """Nobody else has the file."""

    def use_buffered(self) -> None:
        """Without O_DIRECT from here on."""
        with self._lock:
            flags = fcntl.fcntl(self.fd, fcntl.F_GETFL)
            fcntl.fcntl(self.fd, fcntl.F_SETFL, flags & ~getattr(os, "O_DIRECT", 0))
            self.buffered = True

    def truncated(self, end: int, needed: int) -> ReadError:
        """The error for an extent that was never written."""
        return ReadError(f"the spill file in {self.path} ends at byte {end} where {needed} are needed")


class SpillLink:
    """From host slots to the file: the way down, for a `TransferQueue` of its own."""

    name = "spill"
    poll_s = None

    def __init__(self, file: SpillFile) -> None:
        self._file = file

    def cut(self, ticket: Ticket, segments: Sequence[Segment]) -> list[Piece]:
        """Whole pages, `CHUNK` at a time."""
        return [
            Piece(s.file, s.offset + at, min(CHUNK, page_up(s.nbytes) - at), s.dst + at, None, True)
            for s in segments
            for at in range(0, page_up(s.nbytes), CHUNK)
        ]

    def ready(self, ticket: Ticket, piece: Piece) -> bool:
        """A disk always takes what comes."""
        return True

    def move(self, ticket: Ticket, piece: Piece) -> int:
        """Write."""
        self._file.write(ticket.slot.view[piece.dst : piece.dst + piece.nbytes], piece.offset)
        return piece.nbytes

    def finish(self, ticket: Ticket, whole: bool) -> None:
        """Nothing to check."""


def _in_memory(folder: Path) -> bool:
    """Whether the folder is on a file system that lives in RAM."""
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            before, _, after = line.partition(" - ")
            if before.split()[2] == number:
                return after.split()[0] in ("tmpfs", "ramfs")
    return False

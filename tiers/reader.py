"""Reading byte ranges of files into slots, past the page cache.

`BlockReader` is the seam; `DirectReader` is the implementation with O_DIRECT (buffered where the file system
refuses it), `tiers.gds` has the one that reads into device memory. Not covered: which thread calls it and in what
order (`tiers.queue`).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tiers.arena import Slot
from tiers.block import PAGE, Codec, Segment, page_down, page_up
from tiers.errors import ReadError

CHUNK = 1 << 20  # bytes per request: sequential direct reads level off here (bench/disk.py)


@dataclass(frozen=True, slots=True)
class Piece:
    """One request: a range of a file. `direct` ones land in the slot, others pass a bounce buffer."""

    file: int
    offset: int
    nbytes: int
    dst: int
    codec: Codec | None
    direct: bool


class BlockReader(Protocol):
    """Reads pieces of a fixed set of files. Thread-safe; errors are `ReadError` and name the file."""

    def split(self, segment: Segment, slot: Slot) -> list[Piece]:
        """Cut a segment into requests."""
        ...

    def read(self, piece: Piece, slot: Slot) -> int:
        """Fulfil one request; returns the bytes that crossed the link (pages, so a little more than asked)."""
        ...

    def verify(self, file: int) -> None:
        """Raise `ReadError` if the file is not the one that was opened."""
        ...

    def close(self) -> None:
        """Close all files. Reads after this raise."""
        ...


class OpenFile:
    """A file and the identity it had when it was opened. Raises `ReadError` if it cannot be opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.buffered = False
        self._lock = threading.Lock()
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_DIRECT", 0))
        except OSError as e:
            if e.errno != errno.EINVAL:
                raise ReadError(f"cannot open {path}: {e.strerror}") from e
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # tmpfs and some overlays refuse O_DIRECT
            self.buffered = True
        self.identity = self._identity(os.fstat(self.fd))

    @staticmethod
    def _identity(s: os.stat_result) -> tuple[int, int, int, int]:
        return (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns)

    def verify(self) -> None:
        """The open file and the one now at its path are both still what was opened."""
        try:
            same = (
                self._identity(os.fstat(self.fd)) == self.identity
                and self._identity(os.stat(self.path)) == self.identity
            )
        except OSError as e:
            raise ReadError(f"{self.path} went away while in use: {e.strerror}; load the model again") from e
        if not same:
            raise ReadError(f"{self.path} was replaced or modified while in use; load the model again")

    def size(self) -> int:
        """Bytes of the file now."""
        return os.fstat(self.fd).st_size

    def truncated(self, end: int, needed: int) -> ReadError:
        """The error for a file that ends at byte `end` where `needed` are needed."""
        return ReadError(f"{self.path} ends at byte {end} where {needed} are needed: truncated while in use")

    def use_buffered(self) -> None:
        """Some file systems accept the flag at open and refuse the first read."""
        with self._lock:
            if self.buffered:
                return
            try:
                fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as e:
                raise ReadError(f"{self.path} went away while in use: {e.strerror}; load the model again") from e
            if self._identity(os.fstat(fd)) != self.identity:
                os.close(fd)
                raise ReadError(f"{self.path} was replaced or modified while in use; load the model again")
            os.dup2(fd, self.fd, inheritable=False)
            os.close(fd)
            self.buffered = True

    def close(self) -> None:
        """Close the descriptor."""
        with contextlib.suppress(OSError):
            os.close(self.fd)


def cut_segment(segment: Segment, chunk: int) -> list[Piece]:
    """Requests of at most `chunk` bytes (whole pages): page by page into the slot where the segment is padded."""
    pieces: list[Piece] = []
    end = segment.offset + segment.nbytes
    if segment.padded:
        at, dst = page_down(segment.offset), segment.dst - segment.offset % PAGE
        assert dst % PAGE == 0 and segment.codec is None
        while at < end:
            n = min(chunk, page_up(end) - at)
            pieces.append(Piece(segment.file, at, min(n, end - at), dst, None, True))
            at, dst = at + n, dst + n
        return pieces
    step = chunk
    scale_out, scale_in = 1, 1
    if segment.codec is not None:
        scale_out, scale_in = segment.codec.compute_itemsize, segment.codec.stored_itemsize
        step = chunk // scale_in * scale_in
    for done in range(0, segment.nbytes, step):
        n = min(step, segment.nbytes - done)
        dst = segment.dst + done // scale_in * scale_out
        pieces.append(Piece(segment.file, segment.offset + done, n, dst, segment.codec, False))
    return pieces


class DirectReader:
    """`BlockReader` over O_DIRECT `preadv`; each thread keeps one aligned bounce buffer of `CHUNK` and two pages."""

    def __init__(self, paths: Sequence[Path], *, direct: bool = True) -> None:
        self._files: list[OpenFile] = []
        self._local = threading.local()
        try:
            for p in paths:
                self._files.append(OpenFile(p))
                if not direct:
                    self._files[-1].use_buffered()
        except BaseException:
            self.close()
            raise

    def add(self, file: OpenFile) -> int:
        """Read from this file too, which is closed with the others; returns its number."""
        self._files.append(file)
        return len(self._files) - 1

    @property
    def buffered(self) -> bool:
        """Whether any file had to be opened without O_DIRECT."""
        return any(f.buffered for f in self._files)

    def split(self, segment: Segment, slot: Slot) -> list[Piece]:
        """Whole pages straight into the slot where the layout allows it, else at most `CHUNK` through the bounce."""
        return cut_segment(segment, CHUNK)

    def read(self, piece: Piece, slot: Slot) -> int:
        """One request. A short read that stops before the piece's end means the file shrank."""
        f = self._files[piece.file]
        if piece.direct:
            whole = page_up(piece.nbytes)
            self._pread(f, slot.view[piece.dst : piece.dst + whole], piece.offset, piece.nbytes)
            return whole
        start = page_down(piece.offset)
        skip = piece.offset - start
        whole = page_up(skip + piece.nbytes)
        bounce, address = self._bounce()
        self._pread(f, bounce[:whole], start, skip + piece.nbytes)
        if piece.codec is None:
            ctypes.memmove(slot.address + piece.dst, address + skip, piece.nbytes)  # releases the GIL
        else:
            out = piece.nbytes // piece.codec.stored_itemsize * piece.codec.compute_itemsize
            piece.codec.decode(bounce[skip : skip + piece.nbytes], slot.view[piece.dst : piece.dst + out])
        return whole

    def joins(self, piece: Piece, after: Piece) -> bool:
        """Whether both can be read in one request: whole pages into their slots, one behind the other in the file."""
        return (
            piece.direct
            and after.direct
            and piece.file == after.file
            and piece.offset + page_up(piece.nbytes) == after.offset
            and not self._files[piece.file].buffered
        )

    def read_joined(self, parts: Sequence[tuple[Piece, Slot]]) -> list[int] | None:
        """Read pieces that join in one request; returns the bytes of each. None: they have to be read one by one, be it
        because the file ends before they do."""
        first, sizes = parts[0][0], [page_up(piece.nbytes) for piece, _ in parts]
        views = [slot.view[p.dst : p.dst + size] for (p, slot), size in zip(parts, sizes, strict=True)]
        try:
            got = os.preadv(self._files[first.file].fd, views, first.offset)
        except OSError:
            return None
        return sizes if got == sum(sizes) else None

    def _pread(self, f: OpenFile, into: memoryview, offset: int, needed: int) -> None:
        got = torn = 0
        while got < needed:
            direct = not f.buffered
            try:
                n = os.preadv(f.fd, [into[got:]], offset + got)
            except OSError as e:
                if e.errno == errno.EINVAL and direct:
                    f.use_buffered()
                    continue
                raise ReadError(f"reading {f.path} at byte {offset + got} failed: {e.strerror}") from e
            if n == 0 or (torn and got + n <= torn):
                raise f.truncated(offset + max(got, torn), offset + needed)
            got += n
            torn = 0
            if got < needed and got % PAGE and direct:
                got, torn = page_down(got), got  # direct reads must continue on a page: read the torn one again
        if f.buffered:
            # our own copy is the only one wanted in memory
            os.posix_fadvise(f.fd, offset, needed, os.POSIX_FADV_DONTNEED)

    def _bounce(self) -> tuple[memoryview, int]:
        buffer: tuple[memoryview, int] | None = getattr(self._local, "bounce", None)
        if buffer is None:
            m = mmap.mmap(-1, CHUNK + 2 * PAGE)
            buffer = memoryview(m), ctypes.addressof(ctypes.c_char.from_buffer(m))
            self._local.bounce = buffer
        return buffer

    def verify(self, file: int) -> None:
        """Raise `ReadError` if the file was replaced, truncated or written to since it was opened."""
        self._files[file].verify()

    def close(self) -> None:
        """Close all files."""
        for f in self._files:
            f.close()
        self._files = []

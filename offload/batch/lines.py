"""The input of a batch job: who it is, its lines one by one, and any of them again by where it is.

Lines are found in blocks, so memory does not grow with the file, nor with a line: one that is longer than the limit
is passed over and reported with its first KiB. What cannot be read twice (stdin, a pipe) is kept in a file without a
name while it is hashed. Not covered: what a line says (`offload.batch.requests`).
"""

from __future__ import annotations

import errno
import hashlib
import os
import select
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from tiers import OffloadError, ReadError, StoreError, StoreFull, UsageError

MAX_LINE = 16 << 20
HEAD = 1024
_BLOCK = 1 << 20
_WAIT_MS = 200
_BOM = b"\xef\xbb\xbf"

Seen = Callable[[bytes], object]


class Identity(NamedTuple):
    """What a file is known by: its bytes in all, and their BLAKE2b (32 bytes, in hex)."""

    size: int
    digest: str


class Line(NamedTuple):
    """A line that is not blank. `number` counts all lines from 1; `offset` and `length` in bytes, without its newline.

    `data` is None for a line above the limit; `head` is its first KiB. `ended`: whether a newline follows.
    """

    number: int
    offset: int
    length: int
    data: bytes | None
    head: bytes
    ended: bool


def line_digest(data: bytes) -> int:
    """BLAKE2b of a line, as a signed 64-bit number."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def split(fd: int, *, begin: int = 0, limit: int = MAX_LINE, seen: Seen | None = None) -> Iterator[Line]:
    """The lines from offset `begin` on. `seen` is called with every block that is read. Raises OSError."""
    number, offset = 0, begin
    start = begin  # of the present line
    parts: list[bytes] = []  # of it, from earlier blocks: all of it, or its head if it is too long
    length = 0  # of it, in earlier blocks
    while block := os.pread(fd, _BLOCK, offset):
        if seen is not None:
            seen(block)
        at = 0
        while (newline := block.find(b"\n", at)) >= 0:
            number += 1
            yield from _line(number, start, parts, length, block[at:newline], limit, True)
            if parts:
                parts = []
            at = newline + 1
            start, length = offset + at, 0
        if at < len(block):
            parts.append(block[at:] if at else block)
            length += len(block) - at
            if length > limit:
                parts = [_head(parts)]
        offset += len(block)
    if length:
        yield from _line(number + 1, start, parts, length, b"", limit, False)


def _line(number: int, start: int, parts: list[bytes], held: int, last: bytes, limit: int, ended: bool) -> list[Line]:
    length = held + len(last)
    if length > limit:
        return [Line(number, start, length, None, _head([*parts, last]), ended)]
    data = b"".join([*parts, last]) if parts else last
    if not data or data.isspace():
        return []
    return [Line(number, start, length, data, data[:HEAD], ended)]


def _head(parts: list[bytes]) -> bytes:
    return b"".join(part[:HEAD] for part in parts)[:HEAD]


class Source:
    """A job's input. A context manager; `name` is what the user called it, `identity` says what is in it.

    `read` may be called from any thread.
    """

    def __init__(self, name: str, fd: int, identity: Identity, limit: int = MAX_LINE) -> None:
        self.name = name
        self.fd = fd
        self.identity = identity
        self.limit = limit

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        folder: Path | None = None,
        limit: int = MAX_LINE,
        seen: Seen | None = None,
        stdin: int = 0,
    ) -> Source:
        """The file at `path`, or what comes on stdin for `-`; its identity is known when this returns.

        What is no file that can be read from its beginning is kept in an unnamed one in `folder` (default: that for
        temporary files): the same command with the same stdin finds the same job. `seen` is called with every block,
        and with none while it waits for one; it may raise. Raises `UsageError` if it is not there, `ReadError`,
        `StoreFull` and `StoreError`.
        """
        name = "stdin" if str(path) == "-" else str(path)
        try:
            fd = os.dup(stdin) if str(path) == "-" else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise UsageError(f"{name}: {e.strerror}; -i names the file with the requests, or - for stdin") from None
        try:
            kind = os.fstat(fd).st_mode
            if stat.S_ISDIR(kind):
                raise UsageError(f"{name} is a folder; -i names the file with the requests, or - for stdin")
            # a file that the shell opened for us is one, unless something has read of it already
            if not stat.S_ISREG(kind) or (str(path) == "-" and os.lseek(fd, 0, os.SEEK_CUR)):
                kept, identity = _spool(fd, name, folder, seen)
                os.close(fd)
                fd = kept
            else:
                identity = _identity(fd, name, seen)
        except BaseException:
            os.close(fd)
            raise
        return cls(name, fd, identity, limit)

    def __enter__(self) -> Source:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def lines(self) -> Iterator[Line]:
        """All lines that are not blank. Raises `ReadError`, also at the end if the file is not what it was."""
        hashed = hashlib.blake2b(digest_size=32)
        try:
            bom = os.pread(self.fd, len(_BOM), 0) == _BOM
            if bom:
                hashed.update(_BOM)
            yield from split(self.fd, begin=len(_BOM) if bom else 0, limit=self.limit, seen=hashed.update)
        except OSError as e:
            raise _unreadable(self.name, e) from None
        if hashed.hexdigest() != self.identity.digest:
            raise self._changed()

    def read(self, offset: int, length: int, digest: int) -> bytes:
        """A line again. Raises `ReadError` if it is not the one whose `line_digest` that was."""
        try:
            data = os.pread(self.fd, length, offset)
        except OSError as e:
            raise _unreadable(self.name, e) from None
        return self.checked(data, digest)

    def checked(self, data: bytes, digest: int) -> bytes:
        """The line itself. Raises `ReadError` if it is not the one whose `line_digest` that was."""
        if line_digest(data) != digest:
            raise self._changed()
        return data

    def _changed(self) -> OffloadError:
        return ReadError(
            f"{self.name} was changed while the job ran; put it back as it was and run the same command again, or "
            "name another output with -o"
        )


def _identity(fd: int, name: str, seen: Seen | None) -> Identity:
    hashed, size = hashlib.blake2b(digest_size=32), 0
    try:
        while block := os.pread(fd, _BLOCK, size):
            if seen is not None:
                seen(block)
            hashed.update(block)
            size += len(block)
    except OSError as e:
        raise _unreadable(name, e) from None
    return Identity(size, hashed.hexdigest())


def _spool(fd: int, name: str, folder: Path | None, seen: Seen | None) -> tuple[int, Identity]:
    """A copy of what comes from `fd`, in a file that nobody else can open and that goes with its descriptor."""
    hashed, size = hashlib.blake2b(digest_size=32), 0
    where = folder if folder is not None else Path(tempfile.gettempdir())
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as kept:
            while block := _received(fd, name, seen):
                if seen is not None:
                    seen(block)
                hashed.update(block)
                rest = memoryview(block)
                while rest:
                    rest = rest[os.write(kept.fileno(), rest) :]
                size += len(block)
            return os.dup(kept.fileno()), Identity(size, hashed.hexdigest())
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StoreFull(f"{where}: no space to keep what comes from {name}; free some, or give a file") from None
        raise StoreError(f"{where}: {e.strerror}; what comes from {name} is kept there: give a file instead") from None


def _received(fd: int, name: str, seen: Seen | None) -> bytes:
    """The next of it; `seen` is called while there is none, which may be for ever."""
    coming = select.poll()
    coming.register(fd, select.POLLIN)
    try:
        while seen is not None and not coming.poll(_WAIT_MS):
            seen(b"")
        return os.read(fd, _BLOCK)
    except OSError as e:
        raise _unreadable(name, e) from None


def _unreadable(name: str, e: OSError) -> ReadError:
    return ReadError(f"{name}: {e.strerror or e}; the requests cannot be read: check the disk, or give a copy with -i")

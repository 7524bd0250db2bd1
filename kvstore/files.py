"""Private files that are there whole or not at all, and folders that two processes may use at once.

A file is written beside its place, made durable, renamed, and the folder made durable: killed at any moment, it is
there or not. While it is being written its writer holds a lock on it, so whoever finds it unlocked knows that its
writer died, in whatever container that was. What is opened must be a plain file of this user that no one else may
write.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

from tiers import DamagedError, GoneError, StoreError, StoreFull

_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_LOCK = ".lock"


def private_folder(folder: Path) -> Path:
    """The folder, made (0700) if it is not there. Raises `StoreError` if others may write it or it is not ours."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
    except OSError as e:
        raise explained(e, folder) from None
    if found.st_uid != os.geteuid():
        raise StoreError(f"{folder}: belongs to another user; set OFFLOAD_HOME to a folder of your own")
    if found.st_mode & _OTHERS:
        raise StoreError(f"{folder}: others may write it; `chmod 700 {folder}` if what is in it is yours")
    return folder


def explained(e: OSError, folder: Path) -> StoreError:
    """The error for a user of the folder."""
    if e.errno in _FULL:
        return StoreFull(
            f"{folder}: no space left; free some with `offload sessions prune`, or name another folder with --spill-dir"
        )
    return StoreError(f"{folder}: {e.strerror or e}; OFFLOAD_HOME or --spill-dir name another folder")


def open_private(path: Path) -> int:
    """A descriptor to read from. Raises `GoneError` or `DamagedError`: a link, a pipe or another's file is not ours."""
    try:
        # a pipe must not block us, a link must not lead us elsewhere
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise GoneError(f"{path} is not there") from None
    except OSError as e:
        what = "is a link, not a file" if e.errno == errno.ELOOP else e.strerror
        raise DamagedError(f"{path}: {what}; remove it") from None
    found = os.fstat(fd)
    if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & _OTHERS:
        return fd
    os.close(fd)
    if not stat.S_ISREG(found.st_mode):
        raise DamagedError(f"{path}: not a plain file; remove it")
    if found.st_uid != os.geteuid():
        raise DamagedError(f"{path}: belongs to another user; remove it")
    raise DamagedError(f"{path}: others may write it; `chmod 600` it if you trust what it says, or remove it")


class Temporary:
    """A file (0600) in `folder` that becomes `commit`'s name all at once, or goes. A context manager.

    Methods raise `StoreFull` or `StoreError`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path: Path | None = None
        try:
            while self._path is None:
                path = folder / f".{secrets.token_hex(8)}.tmp"
                self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                fcntl.flock(self._fd, fcntl.LOCK_EX)
                if os.fstat(self._fd).st_nlink:  # else somebody took it for a dead writer's before it was locked
                    self._path = path
                else:
                    os.close(self._fd)
        except OSError as e:
            raise explained(e, folder) from None

    def __enter__(self) -> Temporary:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if self._path is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
        os.close(self._fd)

    def write(self, parts: Iterable[bytes | memoryview]) -> None:
        """Write all of `parts` (memoryviews of bytes), and make them durable."""
        try:
            for part in parts:
                rest = memoryview(part)
                while rest:
                    rest = rest[os.write(self._fd, rest) :]
            os.fsync(self._fd)
        except OSError as e:
            raise explained(e, self._folder) from None

    def commit(self, name: str) -> os.stat_result:
        """Give the file its name, durably; what had that name before is replaced."""
        assert self._path is not None
        try:
            os.rename(self._path, self._folder / name)
            self._path = None
            sync_folder(self._folder)
            return os.fstat(self._fd)
        except OSError as e:
            raise explained(e, self._folder) from None


def sync_folder(folder: Path) -> None:
    """Make what was renamed or removed in it durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def locked(folder: Path, *, alone: bool, name: str = _LOCK, wait: bool = True) -> Iterator[None]:
    """Hold the folder's lock, with others who do not want it alone. Raises BlockingIOError if it must not `wait`."""
    try:
        fd = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as e:
        raise explained(e, folder) from None
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(fd)


def sweep(folder: Path) -> int:
    """Remove what writers that died have left behind; returns the bytes freed."""
    freed = 0
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            if _TEMPORARY.fullmatch(entry.name):
                freed += _remove_if_dead(Path(entry.path))
    return freed


def _remove_if_dead(path: Path) -> int:
    try:
        fd = open_private(path)
    except DamagedError:
        return 0
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        size = os.fstat(fd).st_size
        os.unlink(path)
        return size
    except OSError:  # its writer lives, or has just given it its name
        return 0
    finally:
        os.close(fd)

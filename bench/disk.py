"""Measures how fast a file can be read past the page cache: sequentially, and in random places, 1 MiB at a time.

This is the speed of the link that streamed weights cross, used as the floor by `compare.py` in the same run. It does
not measure small reads, writes or what the page cache can do. Where the file system refuses O_DIRECT, reads go
through the cache after it was told to forget the file, and the result says so.
"""

from __future__ import annotations

import argparse
import errno
import json
import mmap
import os
import random
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from common import BenchError, say

REQUEST = 1 << 20
DEPTH = 8
BUFFERS = 64 << 20


@dataclass(frozen=True)
class Disk:
    """Bytes per second with `depth` threads, each with one request of `request_bytes` in flight."""

    sequential: float
    random: float
    request_bytes: int
    depth: int
    direct: bool
    bytes_read: int


def measure(files: Sequence[Path], *, seconds: float = 4.0, depth: int = DEPTH, request: int = REQUEST) -> Disk:
    """Read `files` one after the other for `seconds` (or to the end), then random places for half as long."""
    if not any(f.stat().st_size for f in files):
        raise BenchError("nothing to read: the files are empty")
    fds: list[int] = []
    try:
        direct = True
        for f in files:
            fd, was_direct = _open(f)
            fds.append(fd)
            direct &= was_direct
        if not direct:
            for fd in fds:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        places = [(fd, at) for fd, f in zip(fds, files, strict=True) for at in range(0, f.stat().st_size, request)]
        n1, s1 = _read(iter(places), seconds, depth, request)
        whole = [p for p in places if p[1] + request <= os.fstat(p[0]).st_size] or places
        rng = random.Random(0)
        n2, s2 = _read(iter(lambda: rng.choice(whole), None), seconds / 2, depth, request)
    finally:
        for fd in fds:
            os.close(fd)
    return Disk(n1 / s1, n2 / s2, request, depth, direct, n1 + n2)


def _open(path: Path) -> tuple[int, bool]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        os.preadv(fd, [mmap.mmap(-1, 4096)], 0)  # some file systems refuse only the first read
        return fd, True
    except OSError as e:
        if e.errno != errno.EINVAL:
            raise BenchError(f"cannot read {path.name}: {e.strerror}") from e
        return os.open(path, os.O_RDONLY), False


def _read(places: Iterator[tuple[int, int]], seconds: float, depth: int, request: int) -> tuple[int, float]:
    """(bytes, seconds) of reading at `places` until they or the time run out."""
    lock = threading.Lock()
    counts = [0] * depth
    errors: list[OSError] = []

    # large pages, touched before: what blocks are read into in use; with small ones a virtual disk gives a third
    # (private ones: memory that could be shared gets large pages only where the system is set so)
    pages = mmap.mmap(-1, max(BUFFERS, depth * request), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    for at in range(0, len(pages), mmap.PAGESIZE):
        pages[at] = 0
    whole = memoryview(pages)

    def work(me: int) -> None:
        buffer = whole[me * request : (me + 1) * request]
        try:
            while time.perf_counter() - began < seconds:
                with lock:
                    place = next(places, None)
                if place is None:
                    break
                counts[me] += os.preadv(place[0], [buffer], place[1])
        except OSError as e:
            errors.append(e)

    began = time.perf_counter()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(depth)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise BenchError(f"reading failed: {errors[0].strerror}")
    return sum(counts), time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="+", help="large files to read, a checkpoint's for instance")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--depth", type=int, default=DEPTH, help="requests in flight")
    args = parser.parse_args()
    try:
        result = measure(args.file, seconds=args.seconds, depth=args.depth)
    except (BenchError, OSError) as e:
        say(f"error: {e}")
        return 1
    print(json.dumps(asdict(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

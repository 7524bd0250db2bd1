"""Reading files straight into device memory: the `BlockReader` over kvikio and GPUDirect Storage.

kvikio is optional (`pip install 'offload[gpu]'`) and imported here only. NOT YET RUN ON A GPU: what is tested is
everything up to kvikio's own calls, with a stand-in for them.

Source: the KvikIO API reference, https://docs.rapids.ai/api/kvikio/stable/api/ (`CuFile.pread`, runtime settings).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tiers.arena import Slot
from tiers.block import Segment, page_down, page_up
from tiers.errors import ReadError
from tiers.reader import CHUNK, OpenFile, Piece, cut_segment

DIRECT_CHUNK = 4 << 20  # bytes per request; kvikio reads it as tasks of `CHUNK`
THREADS = 8  # of kvikio: with two requests in flight, two times four tasks
# Device memory libcufile may take for itself: its cache for buffers that are not registered (max_device_cache_size).
DEVICE_CACHE = 128 << 20


def unusable() -> str | None:
    """Why files cannot be read straight into device memory here; None if they can. Imports kvikio."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        _, defaults = _kvikio()
    except ImportError:
        return "kvikio is not installed (pip install 'offload[gpu]')"
    except Exception as e:  # its libraries are looked for while it is imported, and missed with errors of many kinds
        return f"kvikio cannot be loaded: {' '.join(str(e).split())[:200]}"
    if defaults.is_compat_mode_preferred():
        return "kvikio finds no GPUDirect Storage (libcufile, a readable /run/udev) and would read through the host"
    return None


def _kvikio() -> tuple[Any, Any]:
    import kvikio
    from kvikio import defaults

    return kvikio, defaults


class KvikioReader:
    """`BlockReader` for slots in device memory. Segments with a codec cannot be read: decoding needs the host.

    Raises `ReadError` where a file cannot be opened, `ImportError` without kvikio.
    """

    def __init__(self, paths: Sequence[Path], chunk: int = DIRECT_CHUNK) -> None:
        kvikio, defaults = _kvikio()
        # the defaults, one thread and 16 MiB of locked host memory for each, are made for few and large requests
        defaults.set({"num_threads": THREADS, "bounce_buffer_size": CHUNK})
        self._chunk = chunk
        self._files: list[tuple[OpenFile, Any]] = []
        try:
            for path in paths:
                f = OpenFile(path)  # what it opens is only looked at: the identity is checked as `DirectReader` does
                try:
                    self._files.append((f, kvikio.CuFile(path, "r")))
                except Exception as e:  # kvikio's own are RuntimeErrors
                    f.close()
                    raise ReadError(f"cannot open {path} for reading into device memory: {e}") from e
        except BaseException:
            self.close()
            raise

    def split(self, segment: Segment, slot: Slot) -> list[Piece]:
        """Requests of `chunk` bytes. Raises `ValueError` for a segment with a codec."""
        if segment.codec is not None:
            raise ValueError("a segment that must be decoded cannot be read straight into device memory")
        return cut_segment(segment, self._chunk)

    def read(self, piece: Piece, slot: Slot) -> int:
        """One request; returns once the bytes are in device memory. kvikio goes on reading where the kernel stops."""
        f, cufile = self._files[piece.file]
        end = piece.offset + piece.nbytes
        into = slot.tensor[piece.dst : piece.dst + piece.nbytes]
        try:
            got = cufile.pread(into, piece.nbytes, piece.offset, CHUNK).get()
        except Exception as e:
            if (size := f.size()) < end:
                raise f.truncated(size, end) from e
            raise ReadError(f"reading {f.path} at byte {piece.offset} failed: {e}") from e
        if got < piece.nbytes:
            raise f.truncated(piece.offset + got, end)
        return page_up(end) - page_down(piece.offset)

    def verify(self, file: int) -> None:
        """Raise `ReadError` if the file was replaced, truncated or written to since it was opened."""
        self._files[file][0].verify()

    def close(self) -> None:
        """Close all files."""
        for f, cufile in self._files:
            cufile.close()
            f.close()
        self._files = []

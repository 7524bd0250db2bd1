"""A stand-in for kvikio that reads into tensors on the CPU, with the system calls tests make fail: `os.preadv`.

It behaves as kvikio 26.10 does where `tiers.gds` relies on it: reads go on where the kernel stops, what is beyond the
end of the file is missing from the result, and everything that goes wrong is a `RuntimeError`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

calls: list[tuple[int, int, int]] = []  # (bytes, offset in the file, bytes per task) of every read
settings: dict[str, int] = {}
gds = True  # whether the machine is said to have GPUDirect Storage


class Future:
    """A read under way; here it is done when its result is asked for."""

    def __init__(self, fd: int, into: memoryview, offset: int) -> None:
        self._fd, self._into, self._offset = fd, into, offset

    def get(self) -> int:
        got = 0
        while got < len(self._into):
            try:
                n = os.preadv(self._fd, [self._into[got:]], self._offset + got)
            except OSError as e:
                raise RuntimeError(f"KvikIO failure at: posix_io.cpp:42:\n{e.strerror}") from e
            if n == 0:
                break
            got += n
        return got


class CuFile:
    """An open file."""

    def __init__(self, path: Path, flags: str) -> None:
        assert flags == "r"
        self._fd = os.open(path, os.O_RDONLY)

    def pread(self, into: torch.Tensor, size: int, file_offset: int, task_size: int) -> Future:
        assert into.dtype == torch.uint8
        assert into.is_contiguous()
        assert into.numel() == size
        calls.append((size, file_offset, task_size))
        return Future(self._fd, memoryview(into.numpy()), file_offset)

    def close(self) -> None:
        os.close(self._fd)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on `import kvikio` gives this."""
    kvikio: Any = ModuleType("kvikio")
    defaults: Any = ModuleType("kvikio.defaults")
    kvikio.CuFile, kvikio.defaults = CuFile, defaults
    defaults.set = settings.update
    defaults.is_compat_mode_preferred = lambda: not gds
    monkeypatch.setitem(sys.modules, "kvikio", kvikio)
    monkeypatch.setitem(sys.modules, "kvikio.defaults", defaults)

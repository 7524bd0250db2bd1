"""Where compute happens and what memory it has of its own: the Device seam.

Three implementations. `CpuDevice` has no memory of its own: the host's is where it computes. `EmulatedDevice` is a
RAM arena behind a rate-limited full-duplex link, so that all three tiers run, and are tested, on a machine without an
accelerator; whatever it measures is *emulated*. `CudaDevice` is the real thing.

Not covered: which block goes where and when (`tiers.residency`, `tiers.queue`).
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
import warnings
from typing import Protocol

import torch

from tiers.arena import Arena, Fence, Slot
from tiers.errors import UsageError

CUDA_WORKSPACE = 128 << 20  # matrix-product workspaces and the allocator's rounding; checked by the gpu tests
PINNING_HINT = (
    "could not lock {n} bytes of host memory; transfers to the GPU will be slower (often by half) and block: "
    "raise the limit with `ulimit -l unlimited` or in /etc/security/limits.conf"
)


class Device(Protocol):
    """A place to compute. `copy` may be called from worker threads, everything else from the engine's."""

    @property
    def kind(self) -> str:
        """`cpu`, `emulated` or `cuda`."""
        ...

    @property
    def torch_device(self) -> torch.device:
        """Where tensors that take part in compute live."""
        ...

    @property
    def own_memory(self) -> bool:
        """Whether blocks must be moved from the host before they can be computed on."""
        ...

    def arena(self, nbytes: int) -> Arena:
        """Memory of the device, in one allocation."""
        ...

    def pin(self, arena: Arena) -> bool:
        """Lock a host arena for transfers. False, with a warning that says what it costs, if refused."""
        ...

    def copy(self, src: Slot, dst: Slot, start: int, stop: int) -> None:
        """Move bytes [start, stop) of a host slot into the same place of a device slot; returns when they are there."""
        ...

    def lift(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of host memory, where compute is."""
        ...

    def fence(self) -> Fence | None:
        """The compute issued so far; None where compute is finished when it returns."""
        ...

    def close(self) -> None:
        """Undo `pin`."""
        ...


class CpuDevice:
    """Computes in host memory; there is no link."""

    kind = "cpu"
    torch_device = torch.device("cpu")
    own_memory = False

    def arena(self, nbytes: int) -> Arena:
        """Host memory."""
        return Arena(nbytes)

    def pin(self, arena: Arena) -> bool:
        """Nothing to lock for."""
        return True

    def copy(self, src: Slot, dst: Slot, start: int, stop: int) -> None:
        """Never asked for: there is one memory only."""
        raise RuntimeError("a CPU device has no link")

    def lift(self, tensor: torch.Tensor) -> torch.Tensor:
        """It is there."""
        return tensor

    def fence(self) -> None:
        """Compute is finished when it returns."""
        return None

    def close(self) -> None:
        """Nothing to undo."""


class EmulatedDevice:
    """A RAM arena behind a link of `bytes_per_s` upward, with `latency_s` for each transfer. Computes on the CPU.

    The other direction would have the same rate of its own (full duplex); nothing is spilled downward yet.
    """

    kind = "emulated"
    torch_device = torch.device("cpu")
    own_memory = True

    def __init__(self, bytes_per_s: float, latency_s: float = 20e-6) -> None:
        self.bytes_per_s = bytes_per_s
        self.latency_s = latency_s
        self._lock = threading.Lock()
        self._free_at = 0.0  # when the link will have carried everything accepted so far

    def arena(self, nbytes: int) -> Arena:
        """RAM that stands for device memory."""
        return Arena(nbytes)

    def pin(self, arena: Arena) -> bool:
        """Emulated transfers need no locked memory."""
        return True

    def copy(self, src: Slot, dst: Slot, start: int, stop: int) -> None:
        """Copy, and take as long as the link would; transfers queue up behind one another."""
        end = self._carried(stop - start)
        ctypes.memmove(dst.address + start, src.address + start, stop - start)  # releases the GIL
        self._until(end)

    def lift(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy, which takes as long as the link would."""
        end = self._carried(tensor.nbytes)
        there = tensor.clone()
        self._until(end)
        return there

    def _carried(self, nbytes: int) -> float:
        """When the link will have carried so many bytes more."""
        with self._lock:
            begin = max(time.perf_counter(), self._free_at)
            self._free_at = begin + self.latency_s + nbytes / self.bytes_per_s
            return self._free_at

    @staticmethod
    def _until(end: float) -> None:
        wait = end - time.perf_counter()
        if wait > 0:
            time.sleep(wait)

    def fence(self) -> None:
        """Compute is finished when it returns."""
        return None

    def close(self) -> None:
        """Nothing to undo."""


class CudaDevice:
    """A CUDA device: one stream for transfers beside the compute stream, host arenas locked in place.

    Our own aligned memory is registered (`cudaHostRegister`) instead of allocated pinned, so that nothing is rounded
    up and the books stay ours.
    """

    kind = "cuda"
    own_memory = True

    def __init__(self, index: int | None = None) -> None:
        if not torch.cuda.is_available():
            raise UsageError("--device cuda: torch sees no CUDA device here; use --device cpu")
        self.torch_device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
        self._stream = torch.cuda.Stream(self.torch_device)
        self._pinned: list[Arena] = []
        self._warned = False

    def memory(self) -> tuple[int, int]:
        """(bytes the context and libraries take, bytes free to us including those)."""
        torch.zeros(1, device=self.torch_device)  # the context exists from here on
        free, total = torch.cuda.mem_get_info(self.torch_device)
        taken = min(total - free, 1 << 30)
        return taken + CUDA_WORKSPACE, free + taken

    def arena(self, nbytes: int) -> Arena:
        """One allocation of device memory."""
        return Arena(nbytes, self.torch_device)

    def pin(self, arena: Arena) -> bool:
        """Register the arena's pages with the driver."""
        error = int(torch.cuda.cudart().cudaHostRegister(arena.tensor.data_ptr(), arena.nbytes, 0))
        if error != 0:
            with contextlib.suppress(RuntimeError):
                # the refusal stays behind as the runtime's last error, which the next launch reports: take it out
                torch.zeros(1, device=self.torch_device).add_(1)
            if not self._warned:
                warnings.warn(PINNING_HINT.format(n=arena.nbytes), RuntimeWarning, stacklevel=2)
            self._warned = True
            return False
        self._pinned.append(arena)
        return True

    def copy(self, src: Slot, dst: Slot, start: int, stop: int) -> None:
        """Copy on the transfer stream, and wait for that copy alone."""
        with torch.cuda.stream(self._stream):
            dst.tensor[start:stop].copy_(src.tensor[start:stop], non_blocking=True)
            done = torch.cuda.Event()
            done.record(self._stream)
        done.synchronize()  # releases the GIL; compute goes on

    def lift(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the compute stream."""
        return tensor.to(self.torch_device, non_blocking=True)

    def fence(self) -> Fence:
        """An event behind all kernels launched so far."""
        event: Fence = torch.cuda.current_stream(self.torch_device).record_event()
        return event

    def close(self) -> None:
        """Unregister what was locked, once nothing uses it any more."""
        torch.cuda.synchronize(self.torch_device)
        for arena in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(arena.tensor.data_ptr())
        self._pinned = []

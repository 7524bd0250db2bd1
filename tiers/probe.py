"""How fast this machine is: disk, memory, link, compute. Measured, never assumed; seconds, not minutes.

Every figure is the median of a few short readings, in bytes or operations per second. Nothing is cached here
(`offload.hardware` keeps results) and nothing is decided.
"""

from __future__ import annotations

import os
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tiers.arena import Arena
from tiers.block import Segment, page_up
from tiers.device import Device
from tiers.reader import DirectReader

REQUESTS = (4 << 10, 128 << 10, 1 << 20)
DEPTHS = (1, 4, 8)
TOKENS = (1, 4, 16, 128)  # decode, small batches, prefill
_BUFFERS = 64 << 20
MATRIX = (4096, 4096)  # a typical projection; larger than any cache at two bytes


@dataclass(frozen=True, slots=True)
class DiskReading:
    """Direct reads of `request` bytes with `depth` in flight; `latency_s` is a request's median time."""

    request: int
    depth: int
    sequential: bool
    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True, slots=True)
class ComputeReading:
    """A product of `tokens` rows with a `MATRIX` of `dtype`: operations and weight bytes per second."""

    device: str
    dtype: str
    tokens: int
    flops_per_s: float
    weight_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class LinkReading:
    """Copies between host and device memory."""

    up_bytes_per_s: float
    down_bytes_per_s: float
    pageable_up_bytes_per_s: float


def disk(path: Path, seconds: float = 0.25) -> list[DiskReading]:
    """Direct reads of the file at `path`, by request size and depth. Files under 8 MiB give nothing."""
    size = path.stat().st_size
    if size < 8 << 20:
        return []
    readings = [_disk(path, size, request, depth, request >= 1 << 20, seconds) for request in REQUESTS
                for depth in DEPTHS]  # fmt: skip
    readings.append(_disk(path, size, 1 << 20, max(DEPTHS), False, seconds))
    return readings


def _disk(path: Path, size: int, request: int, depth: int, sequential: bool, seconds: float) -> DiskReading:
    reader = DirectReader([path])
    # large pages, touched before: what blocks are read into in use; small ones cost a virtual disk two thirds
    arena = Arena(_BUFFERS)
    arena.tensor[: depth * page_up(request)].zero_()
    slots = [arena.allocate(request) for _ in range(depth)]
    count = size // request
    start = random.Random(size + request + depth).randrange(count)  # elsewhere each time: devices have caches too
    lock = threading.Lock()
    issued, moved = 0, 0
    latencies: list[float] = []
    errors: list[BaseException] = []
    until = time.perf_counter() + seconds

    def work(slot_number: int) -> None:
        try:
            read(slot_number)
        except BaseException as e:
            errors.append(e)

    def read(slot_number: int) -> None:
        nonlocal issued, moved
        slot = slots[slot_number]
        rng = random.Random(slot_number)
        while (now := time.perf_counter()) < until or not latencies:  # however late this thread starts
            with lock:
                at, issued = issued, issued + 1
            offset = ((start + at) % count if sequential else rng.randrange(count)) * request
            segment = Segment(0, offset, request, 0, None, padded=True)
            for piece in reader.split(segment, slot):
                reader.read(piece, slot)
            took = time.perf_counter() - now
            with lock:
                moved += request
                latencies.append(took)

    began = time.perf_counter()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(depth)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    took = time.perf_counter() - began
    reader.close()
    if errors:
        raise errors[0]
    return DiskReading(request, depth, sequential, moved / took, statistics.median(latencies))


def memory_bandwidth(nbytes: int = 256 << 20, repeats: int = 5) -> float:
    """Bytes per second at which all cores together read memory (a sum over `nbytes`)."""
    source = torch.zeros(nbytes // 8, dtype=torch.int64)
    return nbytes / _median(lambda: source.sum(), repeats)


def compute(device: Device, dtypes: Sequence[torch.dtype], repeats: int = 5) -> list[ComputeReading]:
    """Products of a few rows with a matrix, by dtype and number of rows."""
    where = device.torch_device
    readings = []
    for dtype in dtypes:
        # several matrices in turn: one alone would stay in the cache and read too fast
        weights = [torch.randn(*MATRIX, device=where).to(dtype) for _ in range(4)]
        nbytes = weights[0].numel() * dtype.itemsize
        for tokens in TOKENS:
            x = torch.randn(tokens, MATRIX[1], device=where).to(dtype)

            def work(x: torch.Tensor = x, weights: list[torch.Tensor] = weights) -> None:
                for w in weights:
                    torch.nn.functional.linear(x, w)
                if where.type == "cuda":
                    torch.cuda.synchronize(where)

            took = _median(work, repeats) / len(weights)
            flops = 2 * tokens * MATRIX[0] * MATRIX[1] / took
            name = str(dtype).removeprefix("torch.")
            readings.append(ComputeReading(device.kind, name, tokens, flops, nbytes / took))
    return readings


def link(device: Device, nbytes: int = 64 << 20, repeats: int = 3) -> LinkReading | None:
    """Both directions between host and device, locked and pageable; None where there is no link.

    An emulated link is what it is set to, and measured upward like a real one; downward it would be the same.
    """
    if not device.own_memory:
        return None
    host, pageable = Arena(nbytes), Arena(nbytes)
    locked = device.pin(host)
    there = device.arena(nbytes).allocate(nbytes)
    here, loose = host.allocate(nbytes), pageable.allocate(nbytes)
    here.tensor.zero_()
    loose.tensor.zero_()
    up = nbytes / _median(lambda: device.copy(here, there, 0, nbytes), repeats)
    slow = nbytes / _median(lambda: device.copy(loose, there, 0, nbytes), repeats)
    down = up
    if device.torch_device.type == "cuda":

        def back() -> None:
            here.tensor.copy_(there.tensor, non_blocking=locked)
            torch.cuda.synchronize(device.torch_device)

        down = nbytes / _median(back, repeats)
    return LinkReading(up, down, slow)


def machine() -> dict[str, str | int]:
    """What tells this machine from another: processor, cores, memory, kernel."""
    model = "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": os.uname().release,
        "torch": torch.__version__,
    }


def _median(work: Callable[[], object], repeats: int) -> float:
    work()  # the first one pays for pages and libraries
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)

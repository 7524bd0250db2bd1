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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from tiers import gds
from tiers.arena import Arena, Slot
from tiers.block import Segment, page_up
from tiers.device import Device
from tiers.reader import BlockReader, DirectReader
from tiers.uplink import COPIES

REQUESTS = (4 << 10, 128 << 10, 1 << 20)
DEPTHS = (1, 4, 8)
TOKENS = (1, 2, 4, 8, 16, 32, 128, 512)  # decode, small batches, prefill
_BUFFERS = 64 << 20
LARGE, SMALL = (4096, 4096), (1024, 1024)  # two sizes tell a product's fixed cost from its rate
ROUGH = ((2048, 2048), (512, 512))  # for a first look that must not take memory or time
_WORKING_SET = 64 << 20  # bytes of matrices used in turn: one alone would stay in the cache and read too fast
_READING_S = 0.2  # most time for one reading

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # x [n, K] times weight [N, K] transposed


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
    """Products of `tokens` rows with matrices of `dtype`: operations and weight bytes per second, and what a product
    costs whatever its size (starting the threads, for one)."""

    device: str
    dtype: str
    tokens: int
    flops_per_s: float
    weight_bytes_per_s: float
    call_s: float


@dataclass(frozen=True, slots=True)
class LinkReading:
    """Copies between host and device memory."""

    up_bytes_per_s: float
    down_bytes_per_s: float
    pageable_up_bytes_per_s: float


def disk(path: Path, seconds: float = 0.25, cases: Sequence[tuple[int, int, bool]] | None = None) -> list[DiskReading]:
    """Direct reads of the file at `path`, by request size and depth. Files under 8 MiB give nothing.

    `cases` are (bytes, depth, sequential); by default each size at each depth, the large ones sequential, and the
    largest at random too.
    """
    size = path.stat().st_size
    if size < 8 << 20:
        return []
    if cases is None:
        cases = [(request, depth, request >= 1 << 20) for request in REQUESTS for depth in DEPTHS]
        cases = [*cases, (1 << 20, max(DEPTHS), False)]
    reader = DirectReader([path])
    try:
        return [_disk(reader, Arena(_BUFFERS), size, *case, seconds) for case in cases]
    finally:
        reader.close()


def direct(path: Path, device: Device, seconds: float = 0.25) -> float | None:
    """Bytes per second of the file at `path` read in sequence straight into device memory, as blocks are in use.

    None where that cannot be done (`gds.unusable` says why) and for files under 8 MiB. Raises `ReadError`.
    """
    size = path.stat().st_size
    if device.kind != "cuda" or gds.unusable() is not None or size < 8 << 20:
        return None
    reader = gds.KvikioReader([path])
    try:
        arena = device.arena(_BUFFERS)
        for lasting in (0.02, seconds):  # the first reads pay for opening the driver
            arena.reset()
            reading = _disk(reader, arena, size, gds.DIRECT_CHUNK, COPIES, True, lasting)
        return reading.bytes_per_s
    finally:
        reader.close()


def _disk(
    reader: BlockReader, arena: Arena, size: int, request: int, depth: int, sequential: bool, seconds: float
) -> DiskReading:
    # large pages, touched before: what blocks are read into in use; small ones cost a virtual disk two thirds
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
    if errors:
        raise errors[0]
    return DiskReading(request, depth, sequential, moved / took, statistics.median(latencies))


def memory_bandwidth(nbytes: int = 256 << 20, repeats: int = 5) -> float:
    """Bytes per second at which all cores together read memory (a sum over `nbytes`)."""
    source = torch.zeros(nbytes // 8, dtype=torch.int64)
    return nbytes / _median(lambda: source.sum(), repeats)


def compute(
    device: Device,
    dtypes: Sequence[torch.dtype],
    repeats: int = 5,
    tokens: Sequence[int] = TOKENS,
    sizes: tuple[tuple[int, int], tuple[int, int]] = (LARGE, SMALL),
    working_set: int = _WORKING_SET,
    product: Product = torch.nn.functional.linear,
) -> list[ComputeReading]:
    """Products of a few rows with matrices of two sizes, by dtype and number of rows, as `product` computes them."""
    where = device.torch_device
    readings = []
    for dtype in dtypes:
        matrices = []
        for rows, columns in sizes:
            copies = max(1, working_set // (rows * columns * dtype.itemsize))
            matrices.append([torch.randn(rows, columns, device=where).to(dtype) for _ in range(copies)])
        for n in tokens:
            each = []
            for (_, columns), weights in zip(sizes, matrices, strict=True):
                x = torch.randn(n, columns, device=where).to(dtype)

                def work(x: torch.Tensor = x, weights: list[torch.Tensor] = weights) -> None:
                    for w in weights:
                        product(x, w)
                    if where.type == "cuda":
                        torch.cuda.synchronize(where)

                each.append(_median(work, repeats, _READING_S) / len(weights))
            large, small = (rows * columns * dtype.itemsize for rows, columns in sizes)
            per_byte = max((each[0] - each[1]) / (large - small), 0.5 * each[0] / large)
            call = max(0.0, each[0] - large * per_byte)
            name = str(dtype).removeprefix("torch.")
            rate = 1 / per_byte
            readings.append(ComputeReading(device.kind, name, n, 2 * n * rate / dtype.itemsize, rate, call))
    return readings


def drag(
    device: Device,
    beside: Callable[[], object],
    seconds: float = 0.4,
    product: Product = torch.nn.functional.linear,
) -> float:
    """How many seconds longer compute takes per second that `beside` (a transfer, called over and over) runs with it.

    Compute is one row times matrices in bfloat16 by `product`: the case that needs memory bandwidth most.
    """
    where = device.torch_device
    weights = [torch.randn(*LARGE, device=where).to(torch.bfloat16) for _ in range(4)]
    x = torch.randn(1, LARGE[1], device=where).to(torch.bfloat16)

    def work() -> None:
        for w in weights:
            product(x, w)
        if where.type == "cuda":
            torch.cuda.synchronize(where)

    def rate() -> float:
        count, began = 0, time.perf_counter()
        while (now := time.perf_counter()) - began < seconds / 2:
            work()
            count += 1
        return count / (now - began)

    rate()
    alone = rate()
    stop = threading.Event()

    def move() -> None:
        while not stop.is_set():
            beside()

    thread = threading.Thread(target=move)
    thread.start()
    try:
        rate()
        together = rate()
    finally:
        stop.set()
        thread.join()
    return max(0.0, alone / together - 1)


class Reading:
    """Reads of a file as the runtime makes them, for as long as `once` is called: eight requests of 1 MiB at a time."""

    def __init__(self, path: Path) -> None:
        self._reader = DirectReader([path])
        self._count = max(1, path.stat().st_size // (1 << 20))
        arena = Arena(_BUFFERS)
        self._slots = [arena.allocate(1 << 20) for _ in range(max(DEPTHS))]
        self._pool = ThreadPoolExecutor(max(DEPTHS))
        self._at = 0

    def once(self) -> None:
        """64 MiB."""
        todo = iter(range(self._at, self._at + 64))
        self._at += 64

        def work(slot: Slot) -> None:
            for at in todo:
                segment = Segment(0, at % self._count << 20, 1 << 20, 0, None, padded=True)
                for piece in self._reader.split(segment, slot):
                    self._reader.read(piece, slot)

        list(self._pool.map(work, self._slots))

    def close(self) -> None:
        """Close the file and end the threads."""
        self._pool.shutdown()
        self._reader.close()


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


def _median(work: Callable[[], object], repeats: int, most_s: float = float("inf")) -> float:
    first = time.perf_counter()
    work()  # the first one pays for pages and libraries
    times: list[float] = []
    for _ in range(repeats):
        began = time.perf_counter()
        if times and began - first > most_s:
            break
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)

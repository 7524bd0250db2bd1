"""The Device seam: one contract for every implementation, and two tiers stacked on each other."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_kvikio
import pytest
import torch

import offload
from tiers import (
    LRU,
    PAGE,
    Arena,
    Block,
    Cause,
    CpuDevice,
    CudaDevice,
    Device,
    DirectReader,
    EmulatedDevice,
    KvikioReader,
    Move,
    Piece,
    ReadError,
    Residency,
    Segment,
    Slot,
    Trace,
    TransferQueue,
    UpLink,
    readable_directly,
)

MIB = 1 << 20


class DeviceContract:
    """What holds for every device with memory of its own."""

    @pytest.fixture
    def device(self) -> Iterator[Device]:
        raise AssertionError("a subclass makes the device")

    def test_a_copy_is_whole_and_leaves_its_neighbours_alone(self, device: Device) -> None:
        host, there = Arena(4 * MIB), device.arena(4 * MIB)
        device.pin(host)
        src, dst = host.allocate(2 * MIB), there.allocate(2 * MIB)
        src.tensor.copy_(torch.randint(0, 256, (2 * MIB,), dtype=torch.uint8))
        dst.tensor.fill_(7)
        device.copy(src, dst, PAGE, MIB)
        assert torch.equal(dst.tensor[PAGE:MIB].cpu(), src.tensor[PAGE:MIB])
        assert bool((dst.tensor[:PAGE] == 7).all())
        assert bool((dst.tensor[MIB:] == 7).all())

    def test_views_of_a_slot_are_where_compute_is(self, device: Device) -> None:
        slot = device.arena(MIB).allocate(MIB)
        assert slot.tensor.view(torch.float32).device == torch.empty(0, device=device.torch_device).device

    def test_an_arena_is_used_up_exactly(self, device: Device) -> None:
        arena = device.arena(3 * PAGE)
        slots = [arena.allocate(PAGE) for _ in range(3)]
        assert len({s.address for s in slots}) == 3
        with pytest.raises(MemoryError):
            arena.allocate(1)

    def test_a_fence_is_passed_once_compute_is_finished(self, device: Device) -> None:
        x = torch.ones(256, 256, device=device.torch_device)
        for _ in range(20):
            x = x @ x * 1e-3
        fence = device.fence()
        if fence is not None:
            fence.synchronize()
        assert x.isfinite().all()

    def test_two_threads_may_copy(self, device: Device) -> None:
        host, there = Arena(8 * MIB), device.arena(8 * MIB)
        pairs = [(host.allocate(MIB), there.allocate(MIB)) for _ in range(8)]
        for i, (src, _) in enumerate(pairs):
            src.tensor.fill_(i + 1)
        threads = [threading.Thread(target=device.copy, args=(src, dst, 0, MIB)) for src, dst in pairs]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert [int(dst.tensor[MIB // 2]) for _, dst in pairs] == list(range(1, 9))


class TestEmulated(DeviceContract):
    @pytest.fixture
    def device(self) -> Iterator[Device]:
        device = EmulatedDevice(8e9)
        yield device
        device.close()

    def test_the_link_takes_the_time_it_should(self) -> None:
        device = EmulatedDevice(200e6, latency_s=0.01)
        src, dst = Arena(4 * MIB).allocate(4 * MIB), device.arena(4 * MIB).allocate(4 * MIB)
        floor = 2 * (4 * MIB / 200e6 + 0.01)
        began = time.perf_counter()
        threads = [threading.Thread(target=device.copy, args=(src, dst, 0, 4 * MIB)) for _ in range(2)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        took = time.perf_counter() - began
        assert took >= floor, "two transfers at once do not make the link faster"
        assert took < 3 * floor


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestCuda(DeviceContract):
    @pytest.fixture
    def device(self) -> Iterator[Device]:
        device = CudaDevice()
        yield device
        device.close()


class Cudart:
    """The runtime calls `CudaDevice` makes: registers at most `limit` bytes, as a locked-memory limit would."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.registered: dict[int, int] = {}
        self.unregistered: list[int] = []

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        if sum(self.registered.values()) + nbytes > self.limit:
            return 304  # cudaErrorOperatingSystem
        self.registered[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.unregistered.append(address)
        del self.registered[address]
        return 0


class Event:
    """An event that counts how often it was waited for."""

    waited = 0

    def record(self, stream: object) -> None:
        pass

    def synchronize(self) -> None:
        Event.waited += 1


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> Cudart:
    """`torch.cuda` of a machine with a device, as far as `CudaDevice` looks; its memory is the CPU's."""
    runtime = Cudart(3 * MIB)
    for name, stand_in in {
        "is_available": lambda: True, "current_device": lambda: 0, "Stream": lambda device: object(), "Event": Event,
        "stream": lambda stream: contextlib.nullcontext(), "synchronize": lambda device: None,
        "cudart": lambda: runtime,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return runtime


def cuda_device() -> CudaDevice:
    device = CudaDevice()
    assert device.torch_device == torch.device("cuda", 0)
    device.torch_device = torch.device("cpu")  # where the stand-in's memory is
    return device


def test_refused_pinning_is_told_once_and_transfers_still_work(cudart: Cudart) -> None:
    device = cuda_device()
    locked, refused, more = Arena(2 * MIB), Arena(2 * MIB), Arena(4 * MIB)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert device.pin(locked)
    with pytest.warns(RuntimeWarning) as told:
        assert [device.pin(refused), device.pin(more)] == [False, False]
    (message,) = [str(w.message) for w in told]
    assert str(2 * MIB) in message
    assert "slower" in message
    assert "ulimit -l" in message
    assert "limits.conf" in message
    src, dst = refused.allocate(2 * MIB), Arena(2 * MIB).allocate(2 * MIB)
    src.tensor.copy_(torch.randint(0, 256, (2 * MIB,), dtype=torch.uint8))
    before = Event.waited
    device.copy(src, dst, PAGE, MIB)
    assert torch.equal(dst.tensor[PAGE:MIB], src.tensor[PAGE:MIB])
    assert not dst.tensor[MIB:].any()
    assert Event.waited == before + 1, "a copy returns when its bytes are there"
    device.close()
    assert cudart.unregistered == [locked.tensor.data_ptr()], "only what was registered"
    device.close()
    assert len(cudart.unregistered) == 1


def test_a_refusal_leaves_no_error_behind(cudart: Cudart, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA runtime hands the error of a refused call to whichever launch comes next."""
    device = cuda_device()
    launched = []

    def failing(*args: Any, **kwargs: Any) -> torch.Tensor:
        launched.append(args)
        raise RuntimeError("CUDA error: OS call failed or operation not supported on this OS")

    monkeypatch.setattr(torch, "zeros", failing)
    with pytest.warns(RuntimeWarning):
        assert not device.pin(Arena(4 * MIB))
    assert len(launched) == 1


def test_a_cpu_has_no_link() -> None:
    device = CpuDevice()
    assert not device.own_memory
    with pytest.raises(RuntimeError):
        device.copy(Arena(PAGE).allocate(PAGE), Arena(PAGE).allocate(PAGE), 0, PAGE)


class GatedReader(DirectReader):
    """Reads wait until they are let through; some fail."""

    def __init__(self, path: Path) -> None:
        super().__init__([path])
        self.let = threading.Semaphore(0)
        self.fail_at: int | None = None

    def read(self, piece: Piece, slot: Slot) -> int:
        self.let.acquire()
        if piece.offset == self.fail_at:
            raise ReadError("data.bin: injected")
        return super().read(piece, slot)


class Stack:
    """Disk → host (2 slots) → emulated device (3 slots), with blocks of six reads each."""

    BLOCK = 6 * MIB

    def __init__(self, path: Path, blocks: int = 6) -> None:
        self.reader = GatedReader(path)
        self.trace = Trace()
        self.disk = TransferQueue(self.reader, 2, self.trace)
        self.host = Residency(Arena(2 * self.BLOCK), self.disk)
        self.host.add_pool("all", self.BLOCK, 2, LRU())
        self.device = EmulatedDevice(4e9)
        self.up = TransferQueue(UpLink(self.host, self.device), 2, self.trace)
        self.top = Residency(self.device.arena(3 * self.BLOCK), self.up, self.device)
        self.top.add_pool("all", self.BLOCK, 3, LRU())
        self.data = path.read_bytes()
        for i in range(blocks):
            block = Block(f"b{i}", self.BLOCK, self.BLOCK, (Segment(0, i * self.BLOCK, self.BLOCK, 0, None, True),))
            self.host.add(block, "all")
            self.top.add(block, "all")

    def image(self, i: int) -> bytes:
        return self.data[i * self.BLOCK : (i + 1) * self.BLOCK]

    def open(self) -> None:
        self.reader.let.release(1 << 20)

    def check(self) -> None:
        """Whole state: no slot twice, leases below only for what is on its way up."""
        for tier in (self.top, self.host):
            held = [e.slot.address for e in tier._entries.values() if e.slot is not None]
            free = [s.address for s in tier._pools["all"][0]._free]
            assert len(set(held) | set(free)) == len(held) + len(free) == len(tier._pools["all"][0].slots)
        under_way = {e.block.key for e in self.top._entries.values() if e.ticket is not None and not e.ticket.done}
        assert {k for k, e in self.host._entries.items() if e.leases} <= under_way

    def close(self) -> None:
        self.open()
        self.up.close()
        self.disk.close()
        self.reader.close()


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end, f"never happened: {what}"
        time.sleep(0.001)


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    path = tmp_path / "data.bin"
    path.write_bytes(torch.randint(0, 256, (6 * Stack.BLOCK,), dtype=torch.uint8).numpy().tobytes())
    s = Stack(path)
    yield s
    s.close()


def test_blocks_come_up_whole_from_disk(stack: Stack) -> None:
    stack.open()
    for i in (0, 1, 2, 3, 0, 4, 5, 1):
        with stack.top.acquire(f"b{i}") as lease:
            assert lease.slot.tensor.numpy().tobytes() == stack.image(i)
        stack.check()
    assert sum(stack.up.bytes_read.values()) >= 6 * Stack.BLOCK


def test_the_first_part_goes_up_while_the_rest_is_being_read(stack: Stack) -> None:
    lease = stack.top.request("b0")
    assert lease is not None
    stack.reader.let.release(5)  # five of the six reads: enough for the first chunk of four
    until(lambda: sum(stack.up.bytes_read.values()) > 0, "the first chunk goes up")
    assert sum(stack.up.bytes_read.values()) == 4 * MIB
    assert not lease.ready
    stack.open()
    assert lease.wait().slot.tensor.numpy().tobytes() == stack.image(0)
    lease.release()
    stack.check()


def test_what_is_placed_otherwise_on_the_device(stack: Stack) -> None:
    """A middle that goes to the front in two chunks, an end that stays, a front that is left out."""
    block, size = stack.host._entries["b1"].block, Stack.BLOCK
    placed = replace(block, moves=(Move(PAGE + 1, size - PAGE, 0), Move(size - PAGE, size, size - PAGE)))
    for tier in (stack.host, stack.top):
        tier.add(placed, "all")
    assert not readable_directly(placed)
    assert readable_directly(block)
    lease = stack.top.request("b1")
    assert lease is not None
    stack.reader.let.release(5)
    until(lambda: sum(stack.up.bytes_read.values()) > 0, "the first chunk goes up while the rest is being read")
    assert sum(stack.up.bytes_read.values()) == 4 * MIB
    stack.open()
    got, image = lease.wait().slot.tensor.numpy().tobytes(), stack.image(1)
    assert got[: size - 2 * PAGE - 1] == image[PAGE + 1 : size - PAGE]
    assert got[size - PAGE :] == image[size - PAGE :]
    assert sum(stack.up.bytes_read.values()) == size - PAGE - 1
    lease.release()
    stack.check()


def test_a_read_error_reaches_the_top_and_the_next_request_works(stack: Stack) -> None:
    stack.reader.fail_at = 3 * MIB
    stack.open()
    with pytest.raises(ReadError, match=r"data\.bin"):
        stack.top.acquire("b0")
    stack.check()
    stack.reader.fail_at = None
    with stack.top.acquire("b0") as lease:
        assert lease.slot.tensor.numpy().tobytes() == stack.image(0)
    stack.check()


def test_more_fetches_than_slots_below_wait_their_turn(stack: Stack) -> None:
    leases = [stack.top.request(f"b{i}") for i in range(3)]
    stack.open()
    for i, lease in enumerate(leases):
        assert lease is not None
        assert lease.wait().slot.tensor.numpy().tobytes() == stack.image(i)
        lease.release()
    stack.check()


def test_a_cancelled_fetch_gives_everything_back(stack: Stack) -> None:
    assert stack.top.prefetch("b0")
    assert stack.top.prefetch("b1")
    stack.open()
    stack.top.cancel_prefetches()
    stack.host.cancel_prefetches()
    stack.check()
    with stack.top.acquire("b3") as lease:
        assert lease.slot.tensor.numpy().tobytes() == stack.image(3)
    stack.check()


def test_a_demand_overtakes_a_prefetch_on_both_links(stack: Stack) -> None:
    assert stack.top.prefetch("b0")
    assert stack.top.prefetch("b1")
    below = [stack.host._entries[key] for key in ("b0", "b1")]
    until(lambda: all(e.leases for e in below), "both are fetched ahead below")
    assert [e.ticket.cause for e in below if e.ticket] == [Cause.PREFETCH] * 2
    lease = stack.top.request("b1")
    assert lease is not None
    until(lambda: [e.ticket.cause for e in below if e.ticket] == [Cause.PREFETCH, Cause.DEMAND], "the demand goes down")
    stack.open()
    lease.wait()
    with stack.top.acquire("b0"):
        pass
    slices = {(lane, name): stop for lane, name, _, stop, _ in stack.trace.slices}
    assert slices["link", "b1"] < slices["link", "b0"]
    lease.release()


class Invert:
    """A codec: needs the host."""

    stored_itemsize = compute_itemsize = 1

    def decode(self, stored: memoryview, compute: memoryview) -> None:
        compute[:] = bytes(255 - b for b in stored)


class DirectStack(Stack):
    """Of six blocks, b0 to b3 have no place on the host, b4 is cached there, b5 must be decoded."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with pytest.MonkeyPatch.context() as m:
            fake_kvikio.install(m)
            self.gds = KvikioReader([path])
        self.up.close()
        link = UpLink(self.host, self.device, self.gds)
        self.up = TransferQueue(link, 2, self.trace, self.disk.meter)
        self.top = Residency(self.device.arena(3 * self.BLOCK), self.up, self.device)
        self.top.add_pool("all", self.BLOCK, 3, LRU())
        for i in range(6):
            codec = Invert() if i == 5 else None
            segment = Segment(0, i * self.BLOCK, self.BLOCK, 0, codec, codec is None)
            self.top.add(Block(f"b{i}", self.BLOCK, self.BLOCK, (segment,)), "all")
        for i in range(4):
            del self.host._entries[f"b{i}"]
        self.host._entries["b5"].block = self.top._entries["b5"].block

    def image(self, i: int) -> bytes:
        image = super().image(i)
        return bytes(255 - b for b in image) if i == 5 else image

    def close(self) -> None:
        super().close()
        self.gds.close()


@pytest.fixture
def direct(tmp_path: Path) -> Iterator[DirectStack]:
    path = tmp_path / "data.bin"
    path.write_bytes(torch.randint(0, 256, (6 * Stack.BLOCK,), dtype=torch.uint8).numpy().tobytes())
    s = DirectStack(path)
    yield s
    s.close()


def test_blocks_without_a_place_below_are_read_past_it(direct: DirectStack) -> None:
    # the host's reader lets nothing through: whoever asked it would wait for ever
    for i in (0, 1, 2, 3):
        with direct.top.acquire(f"b{i}") as lease:
            assert lease.slot.tensor.numpy().tobytes() == direct.image(i)
        direct.check()
    assert all(e.slot is None for e in direct.host._entries.values()), "nothing was leased below"
    size = 4 * Stack.BLOCK
    assert sum(direct.disk.bytes_read.values()) == size, "they are the disk's bytes"
    assert sum(direct.up.bytes_read.values()) == 0, "and not the link's"
    assert direct.disk.busy_s > 0
    assert direct.up.busy_s == 0
    assert {lane for lane, name, *_ in direct.trace.slices if name in ("b0", "b1", "b2", "b3")} == {"disk"}


@pytest.mark.parametrize("i", [4, 5], ids=["cached below", "with a codec"])
def test_other_blocks_come_by_way_of_the_host(direct: DirectStack, i: int) -> None:
    direct.open()
    with direct.top.acquire(f"b{i}") as lease:
        assert lease.slot.tensor.numpy().tobytes() == direct.image(i)
    assert direct.host._entries[f"b{i}"].slot is not None
    assert sum(direct.up.bytes_read.values()) == Stack.BLOCK
    assert sum(direct.disk.bytes_read.values()) >= Stack.BLOCK
    direct.check()


def test_a_block_with_a_codec_and_no_place_below_is_a_bug_that_is_told(direct: DirectStack) -> None:
    del direct.host._entries["b5"]
    with pytest.raises(ReadError, match="b5"):
        direct.top.acquire("b5")


def test_a_failing_direct_read_reaches_the_top_and_the_next_one_works(
    direct: DirectStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv = os.preadv

    def failing(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset >= 4 * MIB:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(fd, buffers, offset)

    with monkeypatch.context() as m:
        m.setattr(os, "preadv", failing)
        with pytest.raises(ReadError, match=r"data\.bin at byte .* Input/output error"):
            direct.top.acquire("b0")
        direct.check()
    with direct.top.acquire("b0") as lease:
        assert lease.slot.tensor.numpy().tobytes() == direct.image(0)
    direct.check()


def test_a_changed_file_is_not_read_directly(direct: DirectStack, tmp_path: Path) -> None:
    direct.top.acquire("b0").release()
    (tmp_path / "new.bin").write_bytes(direct.data)
    (tmp_path / "new.bin").rename(tmp_path / "data.bin")
    with pytest.raises(ReadError, match=r"data\.bin was replaced"):
        direct.top.acquire("b1")
    direct.check()


class CountingFence:
    def __init__(self) -> None:
        self.waited = 0

    def synchronize(self) -> None:
        self.waited += 1


def test_a_slot_is_written_again_only_after_its_fence(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    fences: list[CountingFence] = []

    def fence() -> CountingFence:
        fences.append(CountingFence())
        return fences[-1]

    monkeypatch.setattr(stack.device, "fence", fence)
    stack.open()
    for i in range(3):
        stack.top.acquire(f"b{i}").release()
    assert [f.waited for f in fences] == [0, 0, 0]
    stack.top.acquire("b3").release()
    assert fences[0].waited >= 1, "b3 took b0's slot"
    assert [f.waited for f in fences[1:3]] == [0, 0]


def test_the_trace_is_a_chrome_trace(tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    options = {"device": "emulated", "vram": "12MiB", "link": "500MB", "resident": "90%", "trace": str(out)}
    with offload.load(**options) as model:
        model.generate("Mara is", max_new_tokens=6)
    events = json.loads(out.read_text())["traceEvents"]
    lanes = {e["args"]["name"].split(" ")[0] for e in events if e["name"] == "thread_name"}
    assert {"compute", "link", "disk", "stall"} <= lanes
    slices = [e for e in events if e["ph"] == "X"]
    assert all(e["dur"] >= 0 and e["ts"] >= 0 for e in slices)
    causes = {e["args"]["cause"] for e in slices if e["cat"] == "link"}
    assert "demand" in causes
    up = sum(e["args"]["bytes"] for e in slices if e["cat"] == "link")
    assert up >= model.stats.total.bytes_up > 0
    for tid in {e["tid"] for e in slices}:
        mine = sorted((e["ts"], e["ts"] + e["dur"]) for e in slices if e["tid"] == tid)
        assert all(a[1] <= b[0] + 1e-3 for a, b in itertools.pairwise(mine)), "slices of a lane overlap"


def test_busy_time_counts_overlaps_once() -> None:
    t = Trace()
    for a, b in ((0, 2), (1, 3), (5, 6)):
        t.slice("link", "x", a, b)
    t.slice("disk", "x", 0, 100)
    assert t.busy("link", 0, 10) == 4
    assert t.busy("link", 2.5, 5.5) == 1
    assert t.busy("link", 3.5, 4.5) == 0, "slices before and after do not count"

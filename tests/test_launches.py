"""Launches and host synchronisations: what counts, on lists of events as torch's profiler gives them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import offload
from offload import engine as engine_module
from offload import launches
from offload.stats import StepStats
from tiers import EmulatedDevice

ME, TRANSFERS = 100, 200


@dataclass
class Call:
    name: str
    device_resource_id: int = ME


@pytest.mark.parametrize(
    ("name", "launch", "sync"),
    [
        ("cudaLaunchKernel", 1, 0),
        ("cudaLaunchKernelExC", 1, 0),
        ("cudaLaunchCooperativeKernel", 1, 0),
        ("cuLaunchKernel", 1, 0),
        ("cuLaunchKernelEx", 1, 0),
        ("cudaGraphLaunch", 1, 0),
        ("cudaStreamSynchronize", 0, 1),
        ("cudaDeviceSynchronize", 0, 1),
        ("cudaEventSynchronize", 0, 1),
        ("cudaMemcpy", 0, 1),
        ("cudaMemcpy2D", 0, 1),
        ("cudaMemcpyAsync", 0, 0),
        ("cudaMemcpy2DAsync", 0, 0),
        ("cudaMemsetAsync", 0, 0),
        ("cudaEventRecord", 0, 0),
        ("cudaEventQuery", 0, 0),
        ("cudaStreamWaitEvent", 0, 0),
        ("cudaMalloc", 0, 0),
        ("cudaGraphInstantiate", 0, 0),
        ("aten::mm", 0, 0),
        ("void cutlass::Kernel<cudaLaunchKernel>()", 0, 0),
    ],
)
def test_what_counts(name: str, launch: int, sync: int) -> None:
    assert launches.count([Call(name)], ME) == (launch, sync)


def test_only_the_computing_thread_counts() -> None:
    events = [Call("cudaLaunchKernel"), Call("cudaEventSynchronize", TRANSFERS), Call("cudaMemcpyAsync", TRANSFERS),
              Call("cudaLaunchKernel"), Call("cudaStreamSynchronize"), Call("cudaLaunchKernel", TRANSFERS)]  # fmt: skip
    assert launches.count(events, ME) == (2, 1)
    assert launches.count(events, TRANSFERS) == (1, 1)
    assert launches.count([], ME) == (0, 0)


def test_events_carry_the_thread_that_made_the_call() -> None:
    """What `count` relies on, on the part of the profiler that there is without a GPU."""
    other: list[int | None] = []

    def work() -> None:
        torch.ones(3).mul_(2)
        other.append(threading.get_native_id())

    with profile(activities=[ProfilerActivity.CPU]) as p:
        torch.ones(3).add_(1)
        t = threading.Thread(target=work)
        t.start()
        t.join()
    events = p.events()
    assert events is not None
    mine = {e.device_resource_id for e in events if e.name == "aten::add_"}
    assert mine == {threading.get_native_id()}
    assert mine.isdisjoint(other)


def test_a_block_is_counted_into_its_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    me = threading.get_native_id()
    events = [Call("cudaLaunchKernel", me), Call("cudaLaunchKernel", me), Call("cudaStreamSynchronize", me)]
    asked: list[object] = []

    @contextmanager
    def profiling(activities: list[object]) -> Iterator[SimpleNamespace]:
        asked.extend(activities)
        yield SimpleNamespace(events=lambda: events)

    monkeypatch.setattr(launches, "profile", profiling)
    stats = StepStats()
    with launches.counted(stats):
        assert stats.counted == 0
    assert (stats.launches, stats.syncs, stats.counted) == (2, 1, 1)
    assert set(asked) == {ProfilerActivity.CPU, ProfilerActivity.CUDA}
    both = stats + stats + StepStats(seconds=1.0)
    assert (both.launches, both.syncs, both.counted) == (4, 2, 2), "a pass that was not counted is none with 0 launches"
    with pytest.raises(ValueError, match="cut short"), launches.counted(stats := StepStats()):
        raise ValueError("cut short")
    assert stats.counted == 0


class Device(EmulatedDevice):
    kind = "cuda"


def test_passes_are_counted_when_asked_and_on_cuda_only(monkeypatch: pytest.MonkeyPatch, tiny_moe: Path) -> None:
    counted: list[StepStats] = []

    @contextmanager
    def counting(stats: StepStats) -> Iterator[None]:
        yield
        stats.launches, stats.syncs, stats.counted = 7, 2, 1
        counted.append(stats)

    monkeypatch.setattr(launches, "counted", counting)
    with offload.load(tiny_moe, device="cpu", count_launches=True) as model:
        model.run([[5, 6, 7]], max_new_tokens=3)
        assert model.stats.total.counted == 0
    monkeypatch.setattr(engine_module, "make_device", lambda config: Device(8e9))
    with offload.load(tiny_moe, vram="64MiB", count_launches=True) as model:
        model.run([[5, 6, 7]], max_new_tokens=4)
        assert len(counted) == model.stats.total.counted == 4
        assert model.stats.decode.launches == 3 * 7
        assert model.stats.decode.syncs == 3 * 2
        model.engine.count_launches = False
        model.run([[5, 6, 7]], max_new_tokens=4)
        assert model.stats.total.counted == 0
        assert len(counted) == 4
    with pytest.raises(offload.UsageError, match="count_launches"):
        offload.load(tiny_moe, count_launches="yes")

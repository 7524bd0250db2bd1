"""Reading straight into device memory, end to end: when it is chosen, what then goes where, and what is measured.

kvikio is a stand-in that reads into tensors on the CPU, and the device an emulated one that says it is CUDA's.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import fake_kvikio
import pytest
import torch
from families import build

import offload
from offload import engine as engine_module
from offload import hardware
from offload.hardware import Profile
from tiers import CpuDevice, EmulatedDevice, ReadError, gds, probe

PROMPT = [5, 6, 7, 8, 9]


def known(disk: float, up: float | None, direct: float | None) -> Profile:
    link = None if up is None else probe.LinkReading(up, up, up)
    products = (probe.ComputeReading("cuda", "bfloat16", 1, 1e12, 1e12, 1e-6),)
    return Profile({}, "cuda", 0.0, (probe.DiskReading(1 << 20, 8, True, disk, 1e-3),), 2e10, link, products, 1e-4,
                   1e11, 1e12, 1e-12, 1e-5, 1e-3, direct_bytes_per_s=direct)  # fmt: skip


class Device(EmulatedDevice):
    kind = "cuda"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with a device, kvikio, GPUDirect Storage, and a profile that says that they are worth using."""
    fake_kvikio.install(monkeypatch)
    fake_kvikio.calls.clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(engine_module, "make_device", lambda config: Device(8e9))
    monkeypatch.setattr(hardware, "kept", lambda folder, device: known(1e9, 2e10, 3e9))
    return monkeypatch


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint whose layers are large enough to be read without a bounce buffer."""
    folder = tmp_path_factory.mktemp("dense")
    build("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=6).save_pretrained(folder)
    return folder


def run(folder: Path, **options: Any) -> tuple[list[int], offload.Generation, Any]:
    with pytest.raises(offload.BudgetError) as refusal:
        offload.load(folder, context=64, vram=1, **options)
    least = refusal.value.smallest
    assert least is not None
    with offload.load(folder, context=64, vram=least + (1 << 20), **options) as model:
        result = model.run([PROMPT], max_new_tokens=8)
        return result.token_ids[0], result, model.engine._memory


def oracle(folder: Path) -> list[int]:
    with offload.load(folder, context=64, device="cpu") as model:
        return model.run([PROMPT], max_new_tokens=8).token_ids[0]


def test_dense_blocks_go_past_the_host(machine: pytest.MonkeyPatch, dense: Path) -> None:
    tokens, result, memory = run(dense, resident="60%")
    assert memory.host_prefetcher is None, "the host would read the same blocks a second time"
    steps = result.stats.decode
    asked = sum(size for size, *_ in fake_kvikio.calls)
    assert asked > 0
    assert steps.bytes_read > 0
    pinned_below = bool(memory._plan.host.pinned)
    assert (steps.bytes_up > 0) == pinned_below, "only what the host keeps crosses the link"
    total = sum(memory.disk.bytes_read.values())
    assert total >= asked, "what kvikio read is in the books of the disk"
    assert total < asked * 1.2 + memory._host_arena.nbytes + (1 << 20)
    machine.undo()
    assert tokens == oracle(dense)


def test_nothing_crosses_the_link_where_the_host_keeps_nothing(machine: pytest.MonkeyPatch, dense: Path) -> None:
    with pytest.raises(offload.BudgetError) as refusal:
        offload.load(dense, context=64, vram="1GiB", resident="1B")
    least = refusal.value.smallest
    tokens, result, memory = run(dense, resident=least)
    assert not memory._plan.host.pinned
    total = result.stats.total
    assert total.bytes_up == 0
    assert total.link_busy_s == 0
    assert total.bytes_read > 0
    assert total.read_busy_s > 0
    machine.undo()
    assert tokens == oracle(dense)


def test_experts_come_by_way_of_the_host_that_caches_them(machine: pytest.MonkeyPatch, tiny_moe: Path) -> None:
    tokens, result, memory = run(tiny_moe, resident="70%")
    assert memory._plan.host.experts
    assert all(memory.host.knows(e.block.key) for layer in memory._layout.layers for g in layer.experts
               for e in g.blocks)  # fmt: skip
    assert fake_kvikio.calls
    assert result.stats.total.bytes_up > 0
    machine.undo()
    assert tokens == oracle(tiny_moe)


def test_what_must_be_decoded_comes_by_way_of_the_host(machine: pytest.MonkeyPatch, dense: Path) -> None:
    tokens, _, memory = run(dense, dtype="bfloat16", resident="60%")
    assert memory.host_prefetcher is not None
    assert fake_kvikio.calls == [], "every block has a codec"
    machine.undo()
    with offload.load(dense, context=64, device="cpu", dtype="bfloat16") as model:
        assert tokens == model.run([PROMPT], max_new_tokens=8).token_ids[0]


@pytest.mark.parametrize("missing", ["profile", "gain", "kvikio"])
def test_it_is_chosen_only_where_it_was_measured_to_be_faster(
    machine: pytest.MonkeyPatch, dense: Path, missing: str
) -> None:
    if missing == "profile":
        machine.setattr(hardware, "kept", lambda folder, device: None)
    elif missing == "gain":
        machine.setattr(hardware, "kept", lambda folder, device: known(4e9, 2e10, 3e9))
    else:
        machine.setitem(sys.modules, "kvikio", None)
    tokens, result, memory = run(dense, resident="60%")
    assert fake_kvikio.calls == []
    assert memory.host_prefetcher is not None
    assert result.stats.total.bytes_up > 0
    machine.undo()
    assert tokens == oracle(dense)


def test_a_file_kvikio_cannot_open_goes_through_the_host_with_a_note(machine: pytest.MonkeyPatch, dense: Path) -> None:
    def refusing(path: Path, flags: str) -> None:
        raise RuntimeError("not on this file system")

    machine.setattr(fake_kvikio, "CuFile", refusing)
    fake_kvikio.install(machine)
    _, result, memory = run(dense, resident="60%")
    assert memory.host_prefetcher is not None
    (note,) = result.notes
    assert "through host memory" in note
    assert "not on this file system" in note


@pytest.mark.parametrize(
    ("disk", "up", "direct", "prefers"),
    [
        (1e9, 2e10, 1.5e9, True),  # more than the disk into host memory
        (6e9, 3e9, 4e9, True),  # more than the link
        (4e9, 2e10, 4e9, False),
        (4e9, 2e10, 3e9, False),
        (1e9, None, 3e9, False),
        (1e9, 2e10, None, False),
    ],
)
def test_prefers_direct(disk: float, up: float | None, direct: float | None, prefers: bool) -> None:
    assert known(disk, up, direct).prefers_direct is prefers


def test_why_it_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in str(gds.unusable())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "kvikio", None)
    assert "offload[gpu]" in str(gds.unusable())
    fake_kvikio.install(monkeypatch)
    assert gds.unusable() is None
    monkeypatch.setattr(fake_kvikio, "gds", False)
    assert "GPUDirect" in str(gds.unusable())

    def failing() -> None:
        raise RuntimeError('Failure finding "libcufile.so.0":\n No such file')

    monkeypatch.setattr(gds, "_kvikio", failing)
    assert "libcufile.so.0" in str(gds.unusable())


@pytest.fixture
def big_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(32 << 20))
    return path


def test_the_rate_is_measured_on_a_device_with_kvikio_only(machine: pytest.MonkeyPatch, big_file: Path) -> None:
    rate = probe.direct(big_file, Device(8e9), seconds=0.02)
    assert rate is not None
    assert rate > 0
    assert {size for size, *_ in fake_kvikio.calls} == {gds.DIRECT_CHUNK}
    assert probe.direct(big_file, CpuDevice(), seconds=0.02) is None
    assert probe.direct(big_file, EmulatedDevice(8e9), seconds=0.02) is None
    machine.setattr(fake_kvikio, "gds", False)
    assert probe.direct(big_file, Device(8e9), seconds=0.02) is None


def test_a_failing_measurement_is_a_note(machine: pytest.MonkeyPatch, big_file: Path) -> None:
    machine.setattr(fake_kvikio.Future, "get", lambda future: 0)
    with pytest.raises(ReadError):
        probe.direct(big_file, Device(8e9), seconds=0.02)
    notes: list[str] = []
    machine.setattr(probe, "disk", lambda path: [])
    assert hardware._disk_speeds(big_file, Device(8e9), notes)[:2] == ([], None)
    assert "device memory failed" in notes[0]
    machine.setattr(fake_kvikio, "gds", False)
    notes.clear()
    assert hardware._disk_speeds(big_file, Device(8e9), notes)[:2] == ([], None)
    assert "cannot be read straight into device memory" in notes[0]


def test_only_a_kept_profile_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path / "cache"))
    device = EmulatedDevice(1e9)
    assert hardware.kept(tmp_path, device) is None
    measured = dataclasses.replace(known(1e9, 2e9, 3e9), measured_at=time.time())
    monkeypatch.setattr(hardware, "measure", lambda folder, device: measured)
    hardware.profile(tmp_path, device)
    kept = hardware.kept(tmp_path, device)
    assert kept is not None
    assert kept.direct_bytes_per_s == 3e9
    assert kept.prefers_direct
    monkeypatch.setattr(hardware, "_VERSION", hardware._VERSION + 1)
    assert hardware.kept(tmp_path, device) is None, "a profile of another version says something else"

"""`offload profile`: plausible figures, kept with a checksum, measured anew when what is kept cannot be trusted."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from cli.main import main
from offload import hardware as profile_module
from offload.hardware import Profile
from tiers import CpuDevice, EmulatedDevice, probe
from tiers.folders import cache_folder


@pytest.fixture
def big_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(32 << 20))
    return path


def test_disk_readings_cover_sizes_and_depths(big_file: Path) -> None:
    def consistent(r: probe.DiskReading) -> bool:
        # in flight = rate × latency (Little's law), give or take scheduling
        return 0.1 < r.bytes_per_s * r.latency_s / r.request / r.depth < 10

    for _ in range(4):  # a thread that is not scheduled for a while spoils a reading of 20 ms
        readings = probe.disk(big_file, seconds=0.02)
        assert {(r.request, r.depth) for r in readings} == {(r, d) for r in probe.REQUESTS for d in probe.DEPTHS}
        assert all(r.bytes_per_s > 0 for r in readings)
        if all(map(consistent, readings)):
            return
    raise AssertionError(f"rate and latency contradict each other in four measurements: {readings}")


def test_a_file_too_small_to_measure_gives_nothing(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.write_bytes(b"x" * 5000)
    assert probe.disk(small) == []


def test_an_emulated_link_measures_as_what_it_is_set_to() -> None:
    reading = probe.link(EmulatedDevice(500e6), nbytes=8 << 20, repeats=3)
    assert reading is not None
    assert 0.5 < reading.up_bytes_per_s / 500e6 <= 1.01
    assert probe.link(CpuDevice()) is None


def test_compute_readings_for_each_dtype_and_batch() -> None:
    readings = probe.compute(CpuDevice(), [torch.float32], repeats=1)
    assert [(r.dtype, r.tokens) for r in readings] == [("float32", t) for t in probe.TOKENS]
    for r in readings:
        assert r.flops_per_s == pytest.approx(r.weight_bytes_per_s / 4 * 2 * r.tokens)


def test_products_are_measured_as_they_are_computed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path / "cache"))  # where nothing has been measured yet
    asked: list[int] = []

    def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        asked.append(len(x))
        return torch.nn.functional.linear(x, weight)

    monkeypatch.setattr(profile_module.native, "product", lambda device: product)
    probe.compute(CpuDevice(), [torch.float32], 1, (1, 3), probe.ROUGH, 1 << 20, product)
    assert set(asked) == {1, 3}
    asked.clear()
    profile_module.look(tmp_path, CpuDevice())
    assert set(asked) == set(profile_module._ROUGH_TOKENS)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Measuring is replaced by something quick; the list counts how often it was done."""
    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path / "cache"))
    calls: list[int] = []

    def quick(folder: Path, device: object) -> Profile:
        import time

        calls.append(1)
        reading = probe.DiskReading(1 << 20, 8, True, 1e9, 1e-3)
        return Profile(dict(probe.machine()), "cpu", time.time(), (reading,), 2e10, None,
                       (probe.ComputeReading("cpu", "float32", 1, 1e9, 2e9, 1e-6),), 1e-4)  # fmt: skip

    monkeypatch.setattr(profile_module, "measure", quick)
    return calls


def kept() -> Path:
    (path,) = (cache_folder() / "profiles").iterdir()
    return path


def test_a_profile_is_kept_privately_and_read_back(measured: list[int], tmp_path: Path) -> None:
    first = profile_module.profile(tmp_path, CpuDevice())
    again = profile_module.profile(tmp_path, CpuDevice())
    assert len(measured) == 1
    assert asdict(first) == asdict(again)
    assert again.disk_bytes_per_s == 1e9
    assert stat.S_IMODE(kept().stat().st_mode) == 0o600
    profile_module.profile(tmp_path, CpuDevice(), fresh=True)
    assert len(measured) == 2


@pytest.mark.parametrize("damage", ["flipped", "truncated", "not json", "old"])
def test_what_cannot_be_trusted_is_measured_anew(measured: list[int], tmp_path: Path, damage: str) -> None:
    profile_module.profile(tmp_path, CpuDevice())
    path = kept()
    text = path.read_text()
    if damage == "old":
        outer = json.loads(text)
        body = json.loads(outer["body"])
        body["measured_at"] -= 400 * 24 * 3600
        changed = json.dumps(body)
        import hashlib

        path.write_text(json.dumps({"sha256": hashlib.sha256(changed.encode()).hexdigest(), "body": changed}))
    else:
        path.write_text({"flipped": text.replace("1000000000.0", "9000000000.0"), "truncated": text[:40],
                         "not json": "nonsense"}[damage])  # fmt: skip
    assert profile_module.profile(tmp_path, CpuDevice()).disk_bytes_per_s == 1e9
    assert len(measured) == 2


def test_devices_have_profiles_of_their_own(measured: list[int], tmp_path: Path) -> None:
    for device in (CpuDevice(), EmulatedDevice(1e9), EmulatedDevice(2e9)):
        profile_module.profile(tmp_path, device)
    assert len(measured) == 3


def test_the_command(measured: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", str(tmp_path), "--device", "cpu", "--json"]) == 0
    d = json.loads(capsys.readouterr().out)
    assert d["disk_bytes_per_s"] == 1e9
    assert d["memory_bytes_per_s"] == 2e10
    assert main(["profile", str(tmp_path), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "1.00 GB/s" in out
    assert "memory read" in out
    assert main(["profile", "/nowhere/at/all"]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1

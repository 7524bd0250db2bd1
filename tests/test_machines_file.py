"""The machine descriptions are complete, of one shape, and say where each figure comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).resolve().parent.parent / "offload" / "machines.json"
DATA: dict[str, Any] = json.loads(FILE.read_text())
MACHINES = [pytest.param(m, id=m["name"]) for m in DATA["machines"]]

NAMES = {
    "desktop-32g-no-gpu", "h100-80g", "h200-141g", "laptop-16g-no-gpu", "mac-48g-unified",
    "rtx3060-12g", "rtx3090-24g", "rtx4060-laptop-8g", "rtx4090-24g", "rtx5090-32g",
}  # fmt: skip
ALWAYS = {
    "ram_bytes", "disk_bytes_per_s", "disk_latency_s", "memory_bytes_per_s",
    "cpu_cores", "cpu_float32_flops_per_s", "cpu_bfloat16_flops_per_s", "layer_call_s",
}  # fmt: skip
LINK = {"link_up_bytes_per_s", "link_down_bytes_per_s"}
DEVICE = {"device_memory_bytes_per_s", "device_flops_per_s"}
TEXT = {"name", "description", "sources", "assumed"}
NOMINAL = {
    "memory_bytes_per_s", "link_bytes_per_s", "device_memory_bytes_per_s", "device_flops_per_s",
    "disk_bytes_per_s", "cpu_float32_flops_per_s",
}  # fmt: skip


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def test_the_file_explains_itself_and_has_every_machine_once():
    assert set(DATA) == {"units", "notes", "machines"}
    assert DATA["units"]
    assert DATA["notes"] and all(isinstance(note, str) and note for note in DATA["notes"])
    names = [m["name"] for m in DATA["machines"]]
    assert len(names) == len(set(names))
    assert set(names) == NAMES


@pytest.mark.parametrize("machine", MACHINES)
def test_every_key_is_there_and_every_number_is_positive(machine: dict[str, Any]):
    assert set(machine) == ALWAYS | LINK | DEVICE | TEXT | {"vram_bytes", "unified", "nominal"}
    assert all(_positive(machine[key]) for key in ALWAYS)
    for key in ("ram_bytes", "vram_bytes", "cpu_cores"):
        assert isinstance(machine[key], int)
    assert isinstance(machine["unified"], bool)
    assert machine["disk_latency_s"] < 1e-3
    assert machine["layer_call_s"] < 1e-2


@pytest.mark.parametrize("machine", MACHINES)
def test_a_link_and_a_device_are_there_together_or_not_at_all(machine: dict[str, Any]):
    own_memory, shared = machine["vram_bytes"] > 0, machine["unified"]
    assert not (own_memory and shared)
    for key in LINK:
        assert _positive(machine[key]) if own_memory else machine[key] is None
    for key in DEVICE:
        assert _positive(machine[key]) if own_memory or shared else machine[key] is None
    if shared:
        assert machine["device_memory_bytes_per_s"] == machine["memory_bytes_per_s"]


@pytest.mark.parametrize("machine", MACHINES)
def test_no_rate_is_above_its_nominal_peak(machine: dict[str, Any]):
    nominal = machine["nominal"]
    assert set(nominal) == NOMINAL
    for key, peak in nominal.items():
        used = [key] if key != "link_bytes_per_s" else sorted(LINK)
        for each in used:
            rate = machine[each]
            assert (rate is None) == (peak is None)
            assert rate is None or peak / 2 < rate < peak


@pytest.mark.parametrize("machine", MACHINES)
def test_memories_get_faster_towards_the_arithmetic(machine: dict[str, Any]):
    assert machine["disk_bytes_per_s"] < machine["memory_bytes_per_s"]
    if machine["vram_bytes"]:
        assert machine["link_up_bytes_per_s"] < machine["memory_bytes_per_s"] < machine["device_memory_bytes_per_s"]


@pytest.mark.parametrize("machine", MACHINES)
def test_sources_and_assumptions_are_named(machine: dict[str, Any]):
    assert machine["description"]
    for key in ("sources", "assumed"):
        assert machine[key] and all(isinstance(line, str) and line for line in machine[key])

"""The hardware profile: what `tiers.probe` measured, kept per machine, per file system and per device.

A file that is damaged, foreign or old is measured anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from offload.plan_cache import cache_folder
from tiers import Device, ReadError, gds, probe

_VERSION = 2  # 2: direct_bytes_per_s
_MAX_AGE_S = 30 * 24 * 3600  # drives and drivers change
_SCRATCH_BYTES = 256 << 20
_LAYER_REPEATS, _LAYERS = 30, 8


@dataclass(frozen=True)
class Profile:
    """Measured speeds of this machine. Rates in bytes or operations per second, times in seconds."""

    machine: dict[str, Any]
    device: str
    measured_at: float
    disk: tuple[probe.DiskReading, ...]
    memory_bytes_per_s: float
    link: probe.LinkReading | None
    compute: tuple[probe.ComputeReading, ...]
    layer_call_s: float  # fixed cost of a decoder layer's forward, whatever its size
    direct_bytes_per_s: float | None = None  # from files straight into device memory; None where that cannot be done
    took_s: float = 0.0
    notes: tuple[str, ...] = field(default_factory=tuple)

    @property
    def disk_bytes_per_s(self) -> float:
        """Best sequential rate."""
        return max((r.bytes_per_s for r in self.disk if r.sequential), default=0.0)

    @property
    def prefers_direct(self) -> bool:
        """Whether reading straight into device memory is faster than by way of the host."""
        if self.direct_bytes_per_s is None or self.link is None:
            return False
        return self.direct_bytes_per_s > min(self.disk_bytes_per_s, self.link.up_bytes_per_s)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**dataclasses.asdict(self), "disk_bytes_per_s": self.disk_bytes_per_s}


def profile(folder: Path, device: Device, *, fresh: bool = False) -> Profile:
    """The profile of this machine for models in `folder`: the one kept, or measured now."""
    known = None if fresh else kept(folder, device)
    if known is None:
        known = measure(folder, device)
        with contextlib.suppress(OSError):
            _save(_path(folder, device), known)
    return known


def kept(folder: Path, device: Device) -> Profile | None:
    """The profile kept from an earlier measurement that still counts, or None; measures nothing."""
    return _load(_path(folder, device))


def _path(folder: Path, device: Device) -> Path:
    return cache_folder() / "profiles" / f"{_key(folder, device)}.json"


def measure(folder: Path, device: Device) -> Profile:
    """Measure everything. Disk speeds are taken on the largest file of `folder`, or on a scratch file beside it."""
    began = time.perf_counter()
    notes: list[str] = []
    files = [p for p in folder.glob("*.safetensors") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size, default=None)
    if largest is not None and largest.stat().st_size >= _SCRATCH_BYTES:
        disk, direct = _disk_speeds(largest, device, notes)
    else:
        disk, direct = _scratch_disk(folder, device, notes)
    if device.kind == "emulated":
        notes.append("the link is emulated")
    dtypes = [torch.float32, torch.bfloat16]
    return Profile(
        machine=dict(probe.machine()),
        device=device.kind,
        measured_at=time.time(),
        disk=tuple(disk),
        memory_bytes_per_s=probe.memory_bandwidth(),
        link=probe.link(device),
        compute=tuple(probe.compute(device, dtypes)),
        layer_call_s=_layer_call(device),
        direct_bytes_per_s=direct,
        took_s=time.perf_counter() - began,
        notes=tuple(notes),
    )


_DiskSpeeds = tuple[list[probe.DiskReading], float | None]


def _disk_speeds(path: Path, device: Device, notes: list[str]) -> _DiskSpeeds:
    """Into host memory and, where that works, straight into the device's, from the same file."""
    readings, direct = probe.disk(path), None
    if device.kind == "cuda" and (why := gds.unusable()) is not None:
        notes.append(f"files cannot be read straight into device memory: {why}")
    try:
        direct = probe.direct(path, device)
    except ReadError as e:
        notes.append(f"reading straight into device memory failed: {e}")
    return readings, direct


def _scratch_disk(folder: Path, device: Device, notes: list[str]) -> _DiskSpeeds:
    where = folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir())
    try:
        with tempfile.NamedTemporaryFile(dir=where, prefix=".offload-probe-") as f:
            block = os.urandom(1 << 20)
            for _ in range(_SCRATCH_BYTES >> 20):
                f.write(block)
            f.flush()
            os.fsync(f.fileno())
            notes.append(f"disk speeds were taken on a new file of {_SCRATCH_BYTES >> 20} MiB in {where}")
            return _disk_speeds(Path(f.name), device, notes)
    except OSError as e:
        notes.append(f"disk speeds could not be taken in {where}: {e.strerror}")
        return [], None


def _layer_call(device: Device) -> float:
    """Time of one token through a decoder layer too small to cost anything but the call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=_LAYERS, num_attention_heads=2, vocab_size=32
    )
    model = LlamaForCausalLM(config).to(device.torch_device).eval()
    token = torch.zeros(1, 1, dtype=torch.long, device=device.torch_device)
    times = []
    with torch.inference_mode():
        for _ in range(_LAYER_REPEATS):
            began = time.perf_counter()
            model.model(token, use_cache=False)
            if device.torch_device.type == "cuda":
                torch.cuda.synchronize(device.torch_device)
            times.append(time.perf_counter() - began)
    return statistics.median(times) / _LAYERS


def _key(folder: Path, device: Device) -> str:
    facts = [_VERSION, probe.machine(), device.kind, getattr(device, "bytes_per_s", None), os.stat(folder).st_dev]
    if device.torch_device.type == "cuda":
        facts.append(torch.cuda.get_device_name(device.torch_device))
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def _save(path: Path, value: Profile) -> None:
    body = json.dumps(dataclasses.asdict(value))
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fd, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(fd, "w") as f:
        json.dump({"sha256": hashlib.sha256(body.encode()).hexdigest(), "body": body}, f)
    os.replace(temporary, path)


def _load(path: Path) -> Profile | None:
    try:
        if path.stat().st_size > 1 << 20:
            return None
        outer = json.loads(path.read_text())
        body = outer["body"]
        if hashlib.sha256(body.encode()).hexdigest() != outer["sha256"]:
            return None
        d = json.loads(body)
        if not 0 <= time.time() - d["measured_at"] < _MAX_AGE_S:
            return None
        d["disk"] = tuple(probe.DiskReading(**r) for r in d["disk"])
        d["compute"] = tuple(probe.ComputeReading(**r) for r in d["compute"])
        d["link"] = probe.LinkReading(**d["link"]) if d["link"] is not None else None
        d["notes"] = tuple(d["notes"])
        return Profile(**d)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None

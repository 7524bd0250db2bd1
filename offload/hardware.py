"""The hardware profile: what `tiers.probe` measured, kept per machine, per file system and per device.

A full profile is measured when asked for and takes seconds. Where there is none, loading a model takes a first look:
fractions of a second, little memory, fewer readings; it says that it is rough. A file that is damaged, foreign or old
is measured anew.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from offload import native
from offload.planning.machine import Machine, Rates
from tiers import Arena, CpuDevice, Device, EmulatedDevice, ReadError, gds, probe
from tiers import memory as mem
from tiers.folders import cache_folder

_VERSION = 3
_MAX_AGE_S = 30 * 24 * 3600  # drives and drivers change
_SCRATCH_BYTES = 256 << 20
_LAYER_REPEATS, _LAYERS = 30, 8
_ROUGH_TOKENS = (1, 8, 64)
_ROUGH_DISK_S = 0.1
_UNKNOWN_DISK = 1e9  # bytes per second: where no file was large enough to measure, what is read hardly matters
_LINK_LATENCY_S = 20e-6  # of one copy
_NEW_TOKENS = 24  # decoded by the bundled models to find what a step costs besides products
# a layer with about the proportions of a 1B model, to find what attention and elementwise work cost
_WIDTH, _INNER, _HEADS, _KV_HEADS, _CONTEXT, _PROMPT = 2048, 4096, 16, 8, 2048, 256


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
    attention_bytes_per_s: float = 0.0  # keys and values read by one token's attention
    attention_flops_per_s: float = 0.0  # a prompt's attention
    elementwise_s: float = 0.0  # norms, activations and residuals of a layer, per token and hidden element
    expert_call_s: float = 0.0  # fixed cost of one expert
    step_call_s: float = 0.0  # fixed cost of one pass, and of choosing the token
    disk_drag: float = 0.0  # seconds longer that compute takes per second the disk is read beside it
    link_drag: float = 0.0  # the same for copies over the link
    rough: bool = False  # a first look
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

    def machine_for(self, ram: int, vram: int, link_bytes_per_s: float | None) -> Machine:
        """What a plan is made for. `link_bytes_per_s` is what an emulated link is set to (None: as measured)."""
        linear: dict[str, list[tuple[int, float, float]]] = {}
        for c in self.compute:
            linear.setdefault(c.dtype, []).append((c.tokens, 1 / c.weight_bytes_per_s, c.call_s))
        for half in ("bfloat16", "float16"):  # what was not measured is taken to be as fast as what was
            linear.setdefault(half, linear.get("bfloat16") or next(iter(linear.values())))
        link = self.link.up_bytes_per_s if self.link is not None else None
        assumptions = [f"measured {time.strftime('%Y-%m-%d', time.gmtime(self.measured_at))}"]
        if self.rough:
            assumptions.append("a first look only: `offload profile` measures properly")
        if self.device == "emulated":
            assumptions.append("the device is emulated")
        latency = min((d.latency_s for d in self.disk if d.depth == 1), default=1e-4)
        return Machine(
            name="this machine",
            ram_bytes=ram,
            vram_bytes=vram,
            disk_bytes_per_s=self.disk_bytes_per_s or _UNKNOWN_DISK,
            disk_latency_s=latency,
            link_bytes_per_s=link_bytes_per_s if link_bytes_per_s is not None else link,
            link_latency_s=0.0 if self.link is None else _LINK_LATENCY_S,
            rates=Rates(
                linear={d: tuple(sorted(points)) for d, points in linear.items()},
                attention_bytes_per_s=self.attention_bytes_per_s,
                attention_flops_per_s=self.attention_flops_per_s,
                elementwise_s=self.elementwise_s,
                layer_call_s=self.layer_call_s,
                expert_call_s=self.expert_call_s,
                step_call_s=self.step_call_s,
            ),
            disk_drag=self.disk_drag,
            link_drag=self.link_drag,
            assumptions=tuple(assumptions),
        )


def profile(folder: Path, device: Device, *, fresh: bool = False) -> Profile:
    """The profile of this machine for models in `folder`: the one kept, or measured now."""
    known = None if fresh else kept(folder, device)
    if known is None or known.rough:
        known = measure(folder, device)
        with contextlib.suppress(OSError):
            _save(_path(folder, device), known)
    return known


def kept(folder: Path, device: Device) -> Profile | None:
    """The profile kept from an earlier measurement that still counts, or None; measures nothing."""
    return _load(_path(folder, device))


def look(folder: Path, device: Device) -> Profile:
    """The profile that is kept, else a first look at the machine, which is kept too until there is a profile."""
    known = kept(folder, device)
    if known is None:
        known = _first_look(folder, device)
        with contextlib.suppress(OSError):
            _save(_path(folder, device), known)
    return known


def machine_of(folder: Path, device: Device, *, ram: int | None = None, vram: int | None = None) -> Machine:
    """This machine as a planner sees it."""
    rate = device.bytes_per_s if isinstance(device, EmulatedDevice) else None
    ram = ram or mem.available()
    machine = look(folder, device).machine_for(ram, vram or 0, rate)
    if not device.own_memory:
        return machine
    if rate is not None:
        return replace(machine, host_rates=machine.rates, alone=True)
    return replace(machine, host_rates=look(folder, CpuDevice()).machine_for(ram, 0, None).rates)


def identity(folder: Path, device: Device) -> str:
    """A name for this machine, this device and the file system of `folder`."""
    return _key(folder, device)


def _first_look(folder: Path, device: Device) -> Profile:
    """A few readings, with little memory: it is taken inside a process that has promised how much it will use."""
    began = time.perf_counter()
    largest = _largest_file(folder)
    disk = probe.disk(largest, _ROUGH_DISK_S, ((1 << 20, 8, True), (4 << 10, 1, False))) if largest is not None else []
    dtypes = [torch.float32, torch.bfloat16]
    compute = probe.compute(device, dtypes, 2, _ROUGH_TOKENS, probe.ROUGH, 16 << 20, _product(device))
    read = max(c.weight_bytes_per_s for c in compute)
    return Profile(
        machine=dict(probe.machine()),
        device=device.kind,
        measured_at=time.time(),
        disk=tuple(disk),
        memory_bytes_per_s=read,
        link=probe.link(device, 4 << 20, 2),
        compute=tuple(compute),
        layer_call_s=_layer_call(device, 5),
        attention_bytes_per_s=read / 4,  # guesses, from the full profiles of a few machines
        attention_flops_per_s=max(c.flops_per_s for c in compute) / 4,
        elementwise_s=50 / read,
        expert_call_s=60e-6,
        step_call_s=1e-3,
        rough=True,
        took_s=time.perf_counter() - began,
        notes=("a first look; attention and fixed costs are guesses",),
    )


def _largest_file(folder: Path) -> Path | None:
    files = [p for p in folder.glob("*.safetensors") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size, default=None)


def measure(folder: Path, device: Device) -> Profile:
    """Measure everything. Disk speeds are taken on the largest file of `folder`, or on a scratch file beside it."""
    began = time.perf_counter()
    notes: list[str] = []
    largest = _largest_file(folder)
    if largest is not None and largest.stat().st_size >= _SCRATCH_BYTES:
        disk, direct, disk_drag = _disk_speeds(largest, device, notes)
    else:
        disk, direct, disk_drag = _scratch_disk(folder, device, notes)
    if device.kind == "emulated":
        notes.append("the link is emulated")
    dtypes = [torch.float32, torch.bfloat16]
    compute = tuple(probe.compute(device, dtypes, product=_product(device)))
    layer_call = _layer_call(device, _LAYER_REPEATS)
    attention_read, attention_work, elementwise = _layer_work(device, compute, layer_call)
    step, expert = _runtime_calls(device, compute, layer_call)
    return Profile(
        machine=dict(probe.machine()),
        device=device.kind,
        measured_at=time.time(),
        disk=tuple(disk),
        memory_bytes_per_s=probe.memory_bandwidth(),
        link=probe.link(device),
        compute=compute,
        layer_call_s=layer_call,
        attention_bytes_per_s=attention_read,
        attention_flops_per_s=attention_work,
        elementwise_s=elementwise,
        expert_call_s=expert,
        step_call_s=step,
        disk_drag=disk_drag,
        link_drag=_link_drag(device),
        direct_bytes_per_s=direct,
        took_s=time.perf_counter() - began,
        notes=tuple(notes),
    )


_DiskSpeeds = tuple[list[probe.DiskReading], float | None, float]


def _disk_speeds(path: Path, device: Device, notes: list[str]) -> _DiskSpeeds:
    """Into host memory and, where that works, straight into the device's, from the same file; and the drag."""
    readings, direct = probe.disk(path), None
    if device.kind == "cuda" and (why := gds.unusable()) is not None:
        notes.append(f"files cannot be read straight into device memory: {why}")
    try:
        direct = probe.direct(path, device)
    except ReadError as e:
        notes.append(f"reading straight into device memory failed: {e}")
    return readings, direct, _disk_drag(path, device)


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
        return [], None, 0.0


def _disk_drag(file: Path, device: Device) -> float:
    reading = probe.Reading(file)
    try:
        return probe.drag(device, reading.once, product=_product(device))
    finally:
        reading.close()


def _link_drag(device: Device) -> float:
    """Copies to the device, as large as those that blocks are cut into."""
    if not device.own_memory:
        return 0.0
    nbytes = 4 << 20
    here, there = Arena(nbytes).allocate(nbytes), device.arena(nbytes).allocate(nbytes)
    return probe.drag(device, lambda: device.copy(here, there, 0, nbytes), product=_product(device))


def _product(device: Device) -> probe.Product:
    """What computes linear layers on this device."""
    return native.product(device.torch_device)


def _layer_call(device: Device, repeats: int) -> float:
    """Time of one token through a decoder layer too small to cost anything but the call."""
    model = _llama(device, torch.float32, hidden=32, inner=32, layers=_LAYERS, heads=2, kv_heads=2)
    return _forward_s(model, device, 1, 0, repeats) / _LAYERS


def _layer_work(
    device: Device, compute: Sequence[probe.ComputeReading], layer_call: float
) -> tuple[float, float, float]:
    """(attention: bytes per second, operations per second; elementwise: seconds per token and hidden element).

    Differences between passes of a small model that has only one of them more.
    """
    layers = 2
    model = _llama(device, torch.bfloat16, hidden=_WIDTH, inner=_INNER, layers=layers, heads=_HEADS, kv_heads=_KV_HEADS)
    head = _WIDTH // _HEADS
    short, long = (_forward_s(model, device, 1, context, 7) / layers for context in (16, _CONTEXT))
    kv = (_CONTEXT - 16) * 2 * _KV_HEADS * head * 2
    prompt, late = (_forward_s(model, device, _PROMPT, context, 3) / layers for context in (0, _CONTEXT))
    flops = 4 * _PROMPT * _CONTEXT * _WIDTH
    rates = {c.tokens: c for c in compute if c.dtype == "bfloat16"}
    weights = _WIDTH * (2 * _WIDTH + 2 * _KV_HEADS * head + 3 * _INNER)
    nearest = min(rates, key=lambda t: abs(t - _PROMPT))
    products = 2 * weights * _PROMPT / rates[nearest].flops_per_s + 7 * rates[nearest].call_s
    rest = prompt - layer_call - products - _PROMPT / (2 * _CONTEXT) * (late - prompt)
    floor = 8 / max(c.weight_bytes_per_s for c in compute)  # each element is at least read and written, in two bytes
    return (
        kv / max(1e-6, long - short),
        flops / max(1e-6, late - prompt),
        max(floor, rest / (_PROMPT * _WIDTH)),
    )


def _llama(
    device: Device, dtype: torch.dtype, *, hidden: int, inner: int, layers: int, heads: int, kv_heads: int
) -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
                         num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=32,
                         max_position_embeddings=2 * _CONTEXT)  # fmt: skip
    with torch.device(device.torch_device):
        model = LlamaForCausalLM(config).to(dtype).eval()
    native.attach(model, device.torch_device)
    return model


def _forward_s(model: PreTrainedModel, device: Device, tokens: int, context: int, repeats: int) -> float:
    """Seconds of a pass over `tokens` new tokens with `context` before them; median."""
    from transformers.cache_utils import DynamicCache

    where = device.torch_device
    times = []
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        if context:
            model.model(torch.zeros(1, context, dtype=torch.long, device=where), past_key_values=cache)
        for i in range(repeats + 1):
            mine = copy.deepcopy(cache)
            new = torch.zeros(1, tokens, dtype=torch.long, device=where)
            began = time.perf_counter()
            model.model(new, past_key_values=mine)
            if where.type == "cuda":
                torch.cuda.synchronize(where)
            if i:
                times.append(time.perf_counter() - began)
    return statistics.median(times)


def _runtime_calls(device: Device, compute: Sequence[probe.ComputeReading], layer_call: float) -> tuple[float, float]:
    """(seconds a pass, seconds an expert) cost besides products, in this runtime: the bundled models, all in memory."""
    from offload.config import RunConfig
    from offload.engine import Engine
    from offload.model import Model
    from offload.resolve import resolve

    options = {"device": device.kind, "context": 256}
    if isinstance(device, EmulatedDevice):
        options |= {"vram": 128 << 20, "link": f"{device.bytes_per_s:.0f}"}
    per_byte = min(1 / c.weight_bytes_per_s for c in compute if c.dtype == "bfloat16")
    found = []
    for name in ("demo-dense", "demo-moe"):
        with Model(Engine(resolve(name), RunConfig.of(options))) as model:
            prompt = [list(range(5, 21))]
            model.run(prompt, max_new_tokens=4, ignore_eos=True)
            stats = model.run(prompt, max_new_tokens=_NEW_TOKENS, ignore_eos=True).stats
            facts = model.engine.description.facts
            work = len(facts.layers) * layer_call + facts.bytes_per_token * per_byte
            found.append((stats.decode_s / (_NEW_TOKENS - 1) - work, sum(y.top_k for y in facts.layers)))
    step = max(1e-4, found[0][0])
    return step, max(1e-6, (found[1][0] - step) / found[1][1])


def _path(folder: Path, device: Device) -> Path:
    return cache_folder() / "profiles" / f"{_key(folder, device)}.json"


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
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None

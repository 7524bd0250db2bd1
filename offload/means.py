"""What a config comes to on this machine: the device, and the bytes that may be used of each memory and of the disk."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from kvstore.chunks import LEAST_TOKENS
from offload import hardware
from offload.config import Job, RunConfig
from offload.planning.budgets import Budgets
from offload.sizes import parse_part, parse_rate, parse_size
from tiers import CpuDevice, CudaDevice, Device, EmulatedDevice, UsageError, gds
from tiers import memory as mem


def make_device(config: RunConfig) -> Device:
    """The device asked for; `auto` is CUDA where there is one. Raises `UsageError`."""
    kind = config.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if config.graphs and kind != "cuda":
        raise UsageError(f"--graphs: there are CUDA graphs on a CUDA device only, and this is --device {kind}")
    if kind == "emulated":
        return EmulatedDevice(parse_rate(config.link, flag="--link"))
    if config.vram is not None and kind == "cpu":
        raise UsageError("--vram: there is no device with memory of its own here; use --device emulated to try one")
    return CudaDevice() if kind == "cuda" else CpuDevice()


def reads_directly(folder: Path, device: Device) -> bool:
    """Whether files are to be read straight into device memory: only where measurements say that it is faster.

    Loads kvikio, which takes memory: before what the process already uses is looked at.
    """
    known = hardware.kept(folder, device) if device.kind == "cuda" else None
    return known is not None and known.prefers_direct and gds.unusable() is None


def device_budget(config: RunConfig, device: Device) -> tuple[int, int | None]:
    """(what the device takes for itself, its budget or None)."""
    if not device.own_memory:
        return 0, None
    if isinstance(device, CudaDevice):
        taken, free = device.memory()
        return taken, parse_size(config.vram, of=free, flag="--vram") if config.vram is not None else int(free * 0.9)
    if config.vram is None:
        raise UsageError("--device emulated needs --vram, the size of the memory to emulate")
    return 0, parse_size(config.vram, of=mem.available(), flag="--vram")


def job_budgets(budgets: Budgets, job: Job, sequences: int) -> Budgets:
    """Room for so many sequences: whole chunks, and for the longest of them."""
    each = -(-job.each // LEAST_TOKENS) * LEAST_TOKENS + LEAST_TOKENS
    context = budgets.context or max(sequences * each, job.longest + LEAST_TOKENS)
    return replace(budgets, context=context, kv_below=True)


def kv_resident(config: RunConfig) -> int | float | None:
    """What is to be kept in memory; sparse attention and codecs are over chunks even if all of them are."""
    if config.kv_resident is None and (config.kv_budget is not None or config.kv_codec is not None):
        return 1.0
    return parse_part(config.kv_resident, flag="--kv-resident")


def stored_at_most(folder: Path) -> int:
    """What stored keys and values may take, all models together, where nobody has said: half of the disk's free space
    and of what they take already."""
    taken = sum(p.stat().st_size for p in folder.glob("*.kv"))
    return (shutil.disk_usage(folder).free + taken) // 2


def ram_budget(config: RunConfig) -> int:
    """`--ram` in bytes; by default, and for a percentage, of what is free within the cgroup."""
    if config.ram is None:
        return int(mem.available() * 0.85)  # the rest is for what else runs here
    return parse_size(config.ram, of=mem.available(), flag="--ram")

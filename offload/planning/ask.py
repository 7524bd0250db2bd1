"""`offload plan`: a model that may not be here on a machine that may not be this one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from offload import hardware
from offload.config import RunConfig
from offload.describe import describe_for_plan
from offload.means import device_budget, make_device, ram_budget
from offload.planning import calibration
from offload.planning.budgets import Budgets, Overrides
from offload.planning.machine import Machine, described
from offload.planning.predict import Workload
from offload.planning.report import Report, report
from offload.planning.routing import EVEN
from offload.resolve import resolve_for_plan
from offload.sizes import parse_part, parse_size
from tiers import UsageError
from tiers import memory as mem

_BASE = 400 << 20  # bytes: interpreter, torch and transformers, as measured on Linux
_DEVICE_BASE = 700 << 20  # bytes: a CUDA context and the libraries' workspaces
_USABLE = 0.85  # of a described machine's memory: the system and what else runs take the rest


def ask(
    model: str | Path | None, name: str | None, config: RunConfig, workload: Workload, *, alternatives: bool
) -> Report:
    """The report for `model` on the machine of that `name` (None: this one). Raises an `OffloadError`."""
    folder = resolve_for_plan(model)
    wanted = described(name) if name is not None else None
    description = describe_for_plan(folder, config.dtype)
    if workload.context > description.demand.max_context * workload.batch:
        raise UsageError(
            f"--prompt-tokens and --new-tokens ask for {workload.context // workload.batch} tokens, the model's "
            f"context is {description.demand.max_context}"
        )
    resident = (
        parse_size(config.resident, of=description.layout.weight_bytes, flag="--resident")
        if config.resident is not None
        else None
    )
    context = config.context or workload.context
    kept = parse_part(config.kv_resident, flag="--kv-resident")
    routing = EVEN
    machine: Machine
    if wanted is not None:
        if config.device not in ("auto", "cuda", "cpu"):
            raise UsageError("--device emulated is for this machine; leave out --hardware to plan for it")
        machine = wanted if config.device != "cpu" else wanted.without_device()
        if config.vram is not None and machine.link_bytes_per_s is None:
            raise UsageError(f"--vram: {name} has no device with memory of its own")
        ram = _size(config.ram, machine.ram_bytes, "--ram")
        vram = _size(config.vram, machine.vram_bytes, "--vram") if machine.link_bytes_per_s is not None else None
        budgets = Budgets(ram, _BASE, vram, _DEVICE_BASE if vram is not None else 0, resident, context, kept)
    else:
        device = make_device(config)
        device_base, vram = device_budget(config, device)
        ram = ram_budget(config)
        machine = hardware.machine_of(folder, device, ram=ram, vram=vram)
        known = calibration.load(hardware.identity(folder, device), description.facts)
        machine, routing = known.apply(machine), known.routing
        budgets = Budgets(ram, max(_BASE, mem.rss()), vram, device_base, resident, context, kept)
    if config.expert_compute == "device":
        machine = replace(machine, host_rates=None)
    overrides = Overrides.of(config.overrides or {})
    if workload.batch > 1:
        description = description.for_batch(workload.batch)
    return report(description, budgets, machine, workload, routing, overrides, alternatives=alternatives)[0]


def _size(given: str | int | None, has: int, flag: str) -> int:
    return int(has * _USABLE) if given is None else parse_size(given, of=has, flag=flag)

"""What a plan is made for: speeds and sizes of a machine, measured (`offload.hardware`) or described in a file.

A described machine is what its data sheet says, derated as `machines.json` tells; whatever is predicted for it is
*simulated* and says so.
"""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tiers import UsageError

_FILE = Path(__file__).parent.parent / "machines.json"
_GRID = tuple(1 << i for i in range(14))  # tokens at which a described machine's products are tabulated
_SINGLE_SHARE = 1 / 8  # float32 products over bfloat16 ones on tensor cores, TF32 left off as torch does
# Python's share of a step where nothing was measured: order of magnitude of the machines this was written on
_EXPERT_CALL_S, _STEP_CALL_S = 60e-6, 1e-3
_LINK_LATENCY_S = 20e-6  # of one copy; data sheets do not give it


@dataclass(frozen=True)
class Rates:
    """Speeds of the place where compute happens.

    `linear[dtype]` are (tokens, seconds per weight byte) of a matrix product, ascending in tokens. `layer_call_s`,
    `expert_call_s` and `step_call_s` are fixed costs of a decoder layer's call, of one expert's and of one pass.
    `elementwise_s` is per token and hidden element of a layer: norms, activations, residuals.
    """

    linear: Mapping[str, tuple[tuple[int, float], ...]]
    attention_bytes_per_s: float
    attention_flops_per_s: float
    elementwise_s: float
    layer_call_s: float
    expert_call_s: float
    step_call_s: float

    def linear_s(self, dtype: str, nbytes: float, tokens: float) -> float:
        """Seconds for `tokens` rows times `nbytes` of weights: interpolated between what was measured."""
        points = self.linear.get(dtype) or self.linear["bfloat16"]
        if tokens <= points[0][0]:
            return nbytes * points[0][1]
        if tokens >= points[-1][0]:
            return nbytes * points[-1][1] * tokens / points[-1][0]
        i = bisect.bisect_right([p[0] for p in points], tokens)
        (t0, s0), (t1, s1) = points[i - 1], points[i]
        share = math.log(tokens / t0) / math.log(t1 / t0)
        return nbytes * math.exp(math.log(s0) + share * math.log(s1 / s0))


@dataclass(frozen=True)
class Machine:
    """Sizes in bytes, speeds in bytes per second.

    `link_bytes_per_s` is None where compute is on the host. `disk_drag` is how many seconds longer compute takes per
    second that the disk is read meanwhile, `link_drag` the same for copies: both share cores and memory with it.
    """

    name: str
    ram_bytes: int
    vram_bytes: int
    disk_bytes_per_s: float
    disk_latency_s: float
    link_bytes_per_s: float | None
    link_latency_s: float
    rates: Rates
    disk_drag: float = 0.0
    link_drag: float = 0.0
    measured: bool = True
    assumptions: tuple[str, ...] = field(default_factory=tuple)

    def with_disk(self, bytes_per_s: float) -> Machine:
        """The same machine with another disk."""
        return replace(self, disk_bytes_per_s=bytes_per_s)

    def slower(self, compute: float) -> Machine:
        """The same machine with every cost of compute multiplied."""
        r = self.rates
        linear = {d: tuple((t, s * compute) for t, s in points) for d, points in r.linear.items()}
        return replace(self, rates=Rates(
            linear, r.attention_bytes_per_s / compute, r.attention_flops_per_s / compute, r.elementwise_s * compute,
            r.layer_call_s * compute, r.expert_call_s * compute, r.step_call_s * compute,
        ))  # fmt: skip


def names() -> list[str]:
    """The machines that are described."""
    return sorted(_entries(_FILE))


def described(name: str) -> Machine:
    """A machine by name, or from the user's own file. Raises `UsageError` in one line."""
    known = _entries(_FILE)
    if name in known:
        return _from_entry(name, known[name])
    path = Path(name).expanduser()
    if path.suffix != ".json" and not path.is_file():
        raise UsageError(f"--hardware: {name!r} is not known; known are {', '.join(sorted(known))}, or give a file")
    try:
        own = _entries(path)
    except OSError as e:
        raise UsageError(f"--hardware {name}: {e.strerror}") from e
    except (ValueError, TypeError, RecursionError) as e:
        raise UsageError(f"--hardware {name}: {e}") from e
    if len(own) != 1:
        raise UsageError(f"--hardware {name}: give one machine; it has {', '.join(sorted(own)) or 'none'}")
    only, entry = next(iter(own.items()))
    try:
        return _from_entry(only, entry)
    except (KeyError, TypeError, ValueError) as e:
        raise UsageError(f"--hardware {name}: {only} lacks or misstates {e}") from e


def _entries(path: Path) -> dict[str, dict[str, Any]]:
    if path.stat().st_size > 1 << 20:
        raise ValueError("larger than a description of machines can be")
    data = json.loads(path.read_text())
    machines = data.get("machines", [data]) if isinstance(data, dict) else None
    if not isinstance(machines, list) or not all(
        isinstance(m, dict) and isinstance(m.get("name"), str) for m in machines
    ):
        raise ValueError('not a machine: an object with "name", or {"machines": [...]}')
    return {m["name"]: m for m in machines}


def _from_entry(name: str, e: Mapping[str, Any]) -> Machine:
    def number(key: str) -> float:
        value = e[key]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e30:
            raise ValueError(f"{key} (a number from 0 up)")
        return float(value)

    vram = int(number("vram_bytes"))
    device = vram > 0 or bool(e.get("unified"))
    memory = number("device_memory_bytes_per_s" if device else "memory_bytes_per_s")
    half = number("device_flops_per_s" if device else "cpu_bfloat16_flops_per_s")
    single = half * _SINGLE_SHARE if device else number("cpu_float32_flops_per_s")
    if min(memory, half, single, number("disk_bytes_per_s"), number("ram_bytes")) <= 0:
        raise ValueError("a speed or size of zero")
    linear = {
        dtype: tuple((t, max(1 / memory, 2 * t / itemsize / flops)) for t in _GRID)
        for dtype, itemsize, flops in (("bfloat16", 2, half), ("float16", 2, half), ("float32", 4, single))
    }
    rates = Rates(
        linear=linear,
        attention_bytes_per_s=memory,
        attention_flops_per_s=half / 2,
        elementwise_s=24 / memory,
        layer_call_s=number("layer_call_s"),
        expert_call_s=_EXPERT_CALL_S,
        step_call_s=_STEP_CALL_S,
    )
    return Machine(
        name=name,
        ram_bytes=int(number("ram_bytes")),
        vram_bytes=vram,
        disk_bytes_per_s=number("disk_bytes_per_s"),
        disk_latency_s=number("disk_latency_s"),
        link_bytes_per_s=number("link_up_bytes_per_s") if vram else None,
        link_latency_s=_LINK_LATENCY_S,
        rates=rates,
        measured=False,
        assumptions=(
            "simulated: speeds from data sheets, derated as machines.json says",
            "attention at half the products' rate; norms and activations move 24 bytes per token and hidden element",
            "fixed costs of calls are of the order of those measured on one machine",
            *(str(a) for a in e.get("assumed", ()) if isinstance(a, str)),
        ),
    )

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
_ALIKE = 4  # passes whose tokens differ by no more are slowed by the same things
_LINK_LATENCY_S = 20e-6  # of one copy; data sheets do not give it


@dataclass(frozen=True)
class Rates:
    """Speeds of the place where compute happens.

    `linear[dtype]` are (tokens, seconds per weight byte, seconds per product) of matrix products, ascending in tokens.
    `layer_call_s`, `expert_call_s` and `step_call_s` are fixed costs of a decoder layer's call, of one expert's and of
    one pass. `elementwise_s` is per token and hidden element of a layer: norms, activations, residuals.
    `corrections` are (tokens, factor) by which this model's passes were seen to differ, ascending in tokens.
    """

    linear: Mapping[str, tuple[tuple[int, float, float], ...]]
    attention_bytes_per_s: float
    attention_flops_per_s: float
    elementwise_s: float
    layer_call_s: float
    expert_call_s: float
    step_call_s: float
    corrections: tuple[tuple[int, float], ...] = ()

    def linear_s(self, dtype: str, nbytes: float, tokens: float, products: int = 1) -> float:
        """Seconds for `tokens` rows times `nbytes` of weights in `products` matrices: interpolated between readings."""
        points = self.linear.get(dtype) or self.linear["bfloat16"]
        if tokens <= points[0][0]:
            return nbytes * points[0][1] + products * points[0][2]
        if tokens >= points[-1][0]:
            return nbytes * points[-1][1] * tokens / points[-1][0] + products * points[-1][2]
        i = bisect.bisect_right([p[0] for p in points], tokens)
        (t0, s0, c0), (t1, s1, c1) = points[i - 1], points[i]
        share = math.log(tokens / t0) / math.log(t1 / t0)
        per_byte = s0 * math.exp(share * math.log(s1 / s0))
        return nbytes * per_byte + products * (c0 + share * (c1 - c0))

    def correction(self, tokens: int) -> float:
        """What passes of about `tokens` were seen to take over what is computed here; 1 where nothing was seen."""
        near = min(self.corrections, key=lambda c: abs(math.log(c[0] / tokens)), default=None)
        if near is None or not tokens / _ALIKE <= near[0] <= tokens * _ALIKE:
            return 1.0
        return near[1]


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
    host_rates: Rates | None = None  # of a machine that has a device: computing without it
    alone: bool = False  # the device is emulated: its compute and the host's are the same cores

    @property
    def computes_beside(self) -> bool:
        """Whether the host computes experts that are not on the device (`moe.beside`)."""
        return self.host_rates is not None and self.link_bytes_per_s is not None

    def without_device(self) -> Machine:
        """The same machine, computing on its processor."""
        if self.host_rates is None:
            return self
        return replace(self, vram_bytes=0, link_bytes_per_s=None, rates=self.host_rates, host_rates=None)


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

    def rates(memory: float, half: float, single: float) -> Rates:
        if min(memory, half, single) <= 0:
            raise ValueError("a speed of zero")
        return Rates(
            linear={
                dtype: tuple((t, max(1 / memory, 2 * t / itemsize / flops), 0.0) for t in _GRID)
                for dtype, itemsize, flops in (("bfloat16", 2, half), ("float16", 2, half), ("float32", 4, single))
            },
            attention_bytes_per_s=memory,
            attention_flops_per_s=half / 2,
            elementwise_s=24 / memory,
            layer_call_s=number("layer_call_s"),
            expert_call_s=_EXPERT_CALL_S,
            step_call_s=_STEP_CALL_S,
        )

    on_host = rates(number("memory_bytes_per_s"), number("cpu_bfloat16_flops_per_s"), number("cpu_float32_flops_per_s"))
    if device:
        half = number("device_flops_per_s")
        used = rates(number("device_memory_bytes_per_s"), half, half * _SINGLE_SHARE)
    if min(number("disk_bytes_per_s"), number("ram_bytes"), number("link_up_bytes_per_s") if vram else 1) <= 0:
        raise ValueError("a speed or size of zero")
    return Machine(
        name=name,
        ram_bytes=int(number("ram_bytes")),
        vram_bytes=vram,
        disk_bytes_per_s=number("disk_bytes_per_s"),
        disk_latency_s=number("disk_latency_s"),
        link_bytes_per_s=number("link_up_bytes_per_s") if vram else None,
        link_latency_s=_LINK_LATENCY_S,
        rates=used if device else on_host,
        host_rates=on_host if device else None,
        measured=False,
        assumptions=(
            "simulated: speeds from data sheets, derated as machines.json says",
            "attention at half the products' rate; norms and activations move 24 bytes per token and hidden element",
            "fixed costs of calls are of the order of those measured on one machine",
            *(str(a) for a in e.get("assumed", ()) if isinstance(a, str)),
        ),
    )

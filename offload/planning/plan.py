"""What a plan is: where the blocks of a model live, and what else takes memory. Values only.

`ram` is the peak of the whole process, so it is split into: what the interpreter and libraries already use, a reserve
for what they will, and slots for weights. KV for the context and the temporaries of one pass lie where compute is: in
`ram` on a CPU, in `vram` on a device with memory of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from offload.planning.keys import KVTiers
from offload.sizes import format_size


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """`count` slots of `slot_nbytes`."""

    slot_nbytes: int
    count: int


@dataclass(frozen=True)
class TierPlan:
    """What one tier's arena holds. Sizes in bytes.

    `pinned` blocks stay; the other dense blocks pass through the `stream` pool; `experts` are cache pools by slot size.
    `resident` counts the weight bytes in memory at once, streaming slots included; `lookahead` of the stream slots lie
    beyond those of the layer in use.
    """

    arena: int
    resident: int
    pinned: tuple[str, ...]
    stream: PoolPlan | None
    experts: dict[int, PoolPlan] = field(default_factory=dict)
    lookahead: int = 0

    @property
    def expert_slots(self) -> int:
        """Slots of all expert pools."""
        return sum(p.count for p in self.experts.values())


@dataclass(frozen=True)
class Plan:
    """Where everything lives. Sizes in bytes; `prefill_chunk` and `context` in tokens.

    `host` is what RAM holds for the device (on a CPU: everything there is), `device` what device memory holds.
    `smallest` is the least budget of the memory computed in, `smallest_ram` that of `--ram`. `kv` is reserved in memory
    for keys and values; `kv_tiers` tells how much of them that is, None where it is all of them. With a device `kv`
    is of its memory, and `kv_host` is reserved in RAM for what is not there.
    """

    ram: int
    vram: int
    base: int
    kv: int
    activations: int
    host: TierPlan
    device: TierPlan | None
    experts_total: int
    context: int
    prefill_chunk: int
    weight_bytes: int
    smallest: int
    smallest_ram: int = 0
    kv_tiers: KVTiers | None = None
    kv_host: int = 0

    @property
    def kv_tiered(self) -> bool:
        """Whether keys and values lie over memory and disk."""
        return self.kv_tiers is not None

    @property
    def kv_share(self) -> float:
        """Share of the context's keys and values kept in memory, in tokens."""
        return self.kv_tiers.share if self.kv_tiers is not None else 1.0

    @property
    def compute(self) -> TierPlan:
        """The tier whose blocks are computed on."""
        return self.device if self.device is not None else self.host

    @property
    def resident_bytes(self) -> int:
        """Most weight bytes in memory at once, in all tiers, streaming slots included."""
        return self.host.resident + (self.device.resident if self.device is not None else 0)

    @property
    def expert_slots(self) -> int:
        """Experts that fit where they are computed."""
        return self.compute.expert_slots

    @property
    def everything_fits(self) -> bool:
        """Whether, once loaded, no weight ever moves again."""
        return self.compute.stream is None and self.expert_slots == self.experts_total

    def summary(self) -> str:
        """One line for people."""
        share = 100 * min(1.0, self.resident_bytes / max(1, self.weight_bytes))
        parts = [
            f"{format_size(self.resident_bytes)} of {format_size(self.weight_bytes)} weights in memory ({share:.0f}%)"
        ]
        if self.device is not None:
            parts.append(f"{format_size(self.device.resident)} of them on the device")
        if self.experts_total:
            parts.append(f"{self.expert_slots} of {self.experts_total} experts cached")
        if self.compute.stream is not None:
            parts.append("the other layers streamed")
        kept = f" ({100 * self.kv_share:.0f}% of its keys and values in memory)" if self.kv_tiered else ""
        parts.append(f"context {self.context}{kept}")
        return ", ".join(parts)

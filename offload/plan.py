"""What fits: budgets in, placement out. Pure functions; nothing is allocated or read here.

`ram` is the peak of the whole process, so it is split into: what the interpreter and libraries already use, a reserve
for what they will, and slots for weights. KV for the context and the temporaries of one pass lie where compute is: in
`ram` on a CPU, in `vram` on a device with memory of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from offload.layout import ExpertGroup, LaidOut, ModelLayout
from offload.sizes import ceil_mib, format_size
from tiers import CHUNK, PAGE, Block, BudgetError, UsageError, page_up

READERS = 8  # requests in flight; 1 MiB × 8 is where this kind of disk levels off
# Thread stacks, bounce buffers' owners, lazily imported modules, allocator slack. Measured by tests/test_budget.py.
RESERVE = 72 << 20
MIN_CONTEXT = 512
MAX_DEFAULT_CONTEXT = 8192
MIN_CHUNK, MAX_CHUNK = 32, 2048


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """`count` slots of `slot_nbytes`."""

    slot_nbytes: int
    count: int


@dataclass(frozen=True)
class TierPlan:
    """What one tier's arena holds. Sizes in bytes.

    `pinned` blocks stay; the other dense blocks pass through the `stream` pool; `experts` are cache pools by slot size.
    `resident` counts the weight bytes in memory at once, streaming slots included.
    """

    arena: int
    resident: int
    pinned: tuple[str, ...]
    stream: PoolPlan | None
    experts: dict[int, PoolPlan] = field(default_factory=dict)

    @property
    def expert_slots(self) -> int:
        """Slots of all expert pools."""
        return sum(p.count for p in self.experts.values())


@dataclass(frozen=True)
class Plan:
    """Where everything lives. Sizes in bytes; `prefill_chunk` and `context` in tokens.

    `host` is what RAM holds for the device (on a CPU: everything there is), `device` what device memory holds.
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
        parts.append(f"context {self.context}")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Demand:
    """What a model asks of memory beside its weights, as functions of tokens."""

    kv: Callable[[int], int]
    activations: Callable[[int, int], int]  # (new tokens in one pass, tokens of context)
    max_context: int
    whole_prompt: bool = False  # prompts of this family must be computed in one pass


@dataclass(frozen=True, slots=True)
class Budgets:
    """What may be used. `vram` is None where compute is on the host; `device_base` is what the device takes itself."""

    ram: int
    base: int
    vram: int | None = None
    device_base: int = 0
    resident: int | None = None
    context: int | None = None


def make_plan(layout: ModelLayout, demand: Demand, budgets: Budgets) -> Plan:
    """The best placement inside the budgets. Raises `BudgetError` with the smallest that works."""
    ram, vram, context = budgets.ram, budgets.vram, budgets.context
    fixed = budgets.base + RESERVE + READERS * (CHUNK + 2 * PAGE)
    if context is not None and context > demand.max_context:
        raise UsageError(f"--context {context} is more than the model's {demand.max_context}")
    least_context = context or min(MIN_CONTEXT, demand.max_context)

    def overhead(tokens: int, chunk: int) -> tuple[int, int]:
        chunk = tokens if demand.whole_prompt else min(chunk, tokens)
        return demand.kv(tokens), demand.activations(chunk, tokens)

    # the smallest placement, and with it the smallest budgets
    model = _Weights.of(layout)
    least = sum(overhead(least_context, MIN_CHUNK))
    tight = model.place(_Room.none())
    assert tight is not None
    below = model.below(tight).place(_Room.none()) if vram is not None else None
    assert below is not None or vram is None
    if below is not None and vram is not None:
        least_ram = page_up(fixed + below.arena)
        least_vram = page_up(budgets.device_base + least + tight.arena)
        _refuse("--vram", vram, least_vram)
        compute_budget, compute_fixed, smallest = vram, budgets.device_base, least_vram
    else:
        least_ram = smallest = page_up(fixed + least + tight.arena)
        compute_budget, compute_fixed = ram, fixed
    _refuse("--ram", ram, least_ram)
    least_resident = tight.resident + (below.resident if below is not None else 0)
    if budgets.resident is not None:
        _refuse("--resident", budgets.resident, least_resident)

    # tokens: a longer context and a wider pass, as far as they do not cost much of the room for weights
    chunk, spare = MIN_CHUNK, compute_budget - smallest
    for candidate in (64, 128, 256, 512, 1024, MAX_CHUNK):
        extra = demand.activations(candidate, least_context) - demand.activations(MIN_CHUNK, least_context)
        wanted = demand.activations(candidate, least_context)
        if extra <= spare // 4 and wanted <= max(compute_budget // 20, 64 << 20):
            chunk = candidate
    if context is None:
        whole = sum(b.slot_nbytes for b in layout.blocks()) - tight.arena  # room in which every block would fit
        context = least_context
        while context < min(demand.max_context, MAX_DEFAULT_CONTEXT):
            wider = min(2 * context, demand.max_context, MAX_DEFAULT_CONTEXT)
            more = sum(overhead(wider, chunk)) - sum(overhead(least_context, chunk))
            # KV is reserved whether used or not: while weights must be streamed it gets little of their room
            if more > spare or (more > spare // 16 and spare - more < whole):
                break
            context = wider
    kv, activations = overhead(context, chunk)
    while compute_fixed + kv + activations + tight.arena > compute_budget and chunk > MIN_CHUNK:
        chunk //= 2
        kv, activations = overhead(context, chunk)

    # weights: what is left, first where they are computed on, then in the tier below
    cap = budgets.resident if budgets.resident is not None else 1 << 62
    reserved = below.resident if below is not None else 0
    placed = model.place(_Room(compute_budget - compute_fixed - kv - activations, cap - reserved))
    assert placed is not None, "the smallest plan fits, so some plan does"
    host, device = placed, None
    if vram is not None:
        device = placed
        under = model.below(device).place(_Room(ram - fixed, cap - device.resident))
        assert under is not None, "what is left for the host was kept for it"
        host = under
    return Plan(
        ram=ram,
        vram=vram or 0,
        base=budgets.base,
        kv=kv,
        activations=activations,
        host=host,
        device=device,
        experts_total=sum(len(g.blocks) for layer in layout.layers for g in layer.experts),
        context=context,
        prefill_chunk=context if demand.whole_prompt else min(chunk, context),
        weight_bytes=layout.weight_bytes,
        smallest=smallest,
    )


def _refuse(flag: str, given: int, least: int) -> None:
    if given < least:
        exact = f"{least}B" if flag == "--resident" and least < 64 << 20 else ceil_mib(least)
        raise BudgetError(f"{flag} {format_size(given)} is too small; the smallest that works is {exact}", least)


@dataclass(frozen=True, slots=True)
class _Room:
    """Slot bytes and weight bytes that may be taken; `least` asks for what cannot be done without."""

    arena: int
    resident: int
    least: bool = False

    @classmethod
    def none(cls) -> _Room:
        return cls(0, 0, True)

    def fits(self, arena: int, resident: int) -> bool:
        return arena <= self.arena and resident <= self.resident


@dataclass(frozen=True, slots=True)
class _Weights:
    """What a tier has to do with: blocks that must stay, dense blocks in order of use, experts by size class.

    `passing` blocks only ever go through on their way up: the tier needs room for one of them at a time.
    """

    always: tuple[Block, ...]
    dense: tuple[tuple[Block, ...], ...]  # a layer's blocks are needed together
    experts: Mapping[int, Sequence[LaidOut]]
    least_experts: Mapping[int, int]
    passing: tuple[Block, ...] = ()

    @classmethod
    def of(cls, layout: ModelLayout) -> _Weights:
        """The whole model."""
        dense = [tuple(part.block for part in layer.dense) for layer in layout.layers]
        if layout.head is not None:
            dense.append((layout.head.block,))
        return cls((layout.rest.block,), tuple(dense), expert_pools(layout), _least_experts(layout))

    def below(self, above: TierPlan) -> _Weights:
        """What the tier under `above` has to do with: all that does not stay there."""
        stays = set(above.pinned)
        left = {size: e for size, e in self.experts.items() if above.experts[size].count < len(e)}
        gone = [e.block for size, es in self.experts.items() if size not in left for e in es]
        dense = tuple(b for layer in self.dense for b in layer)
        passing = [b for b in (*self.always, *dense) if b.key in stays] + gone
        rest = tuple(tuple(b for b in layer if b.key not in stays) for layer in self.dense)
        return _Weights((), tuple(layer for layer in rest if layer), left, self.least_experts, tuple(passing))

    def place(self, room: _Room) -> TierPlan | None:
        """Pin as many dense blocks as fit, spread evenly, and stream the others; experts get what is left."""
        biggest = {size: max(e.block.nbytes for e in es) for size, es in self.experts.items()}
        least = {size: self.least_experts[size] for size in self.experts}
        arena0 = sum(page_up(b.slot_nbytes) for b in self.always) + sum(size * n for size, n in least.items())
        resident0 = sum(b.nbytes for b in self.always) + sum(biggest[size] * n for size, n in least.items())
        floor = max((page_up(b.slot_nbytes) for b in self.passing), default=0)

        # the largest blocks are the last to be streamed: one of them would set the size of every slot
        flat = [(layer, b) for layer, blocks in enumerate(self.dense) for b in blocks]
        typical = 2 * sorted(b.slot_nbytes for _, b in flat)[len(flat) // 2] if flat else 0
        order = [x for x in flat if x[1].slot_nbytes <= typical] + [x for x in flat if x[1].slot_nbytes > typical]
        usual = sum(b.slot_nbytes <= typical for _, b in flat)

        def pinning(ahead: int, streamed: int) -> tuple[list[str], PoolPlan | None, int, int]:
            away = _spread(usual, min(streamed, usual)) | set(range(usual, max(usual, streamed)))
            gone = [b for i, (_, b) in enumerate(order) if i in away]
            kept = [b for i, (_, b) in enumerate(order) if i not in away]
            layers = Counter(layer for i, (layer, _) in enumerate(order) if i in away)
            slots = min(max(layers.values(), default=0) + ahead, streamed)
            slot = page_up(max((b.slot_nbytes for b in gone), default=0))
            arena = arena0 + sum(page_up(b.slot_nbytes) for b in kept) + slots * slot
            weights = resident0 + sum(b.nbytes for b in kept) + slots * max((b.nbytes for b in gone), default=0)
            return [b.key for b in kept], PoolPlan(slot, slots) if slots else None, max(arena, floor), weights

        # slots beyond those of one layer keep the link busy while it is computed on; without them nothing overlaps
        most = 2 if any(len(blocks) > 1 for blocks in self.dense) else 1  # parts of layers, or whole ones
        options = (pinning(ahead, n) for ahead in range(most, -1, -1) for n in range(len(flat) + 1))
        chosen = next((o for o in options if room.fits(o[2], o[3])), None)
        if chosen is None:
            if not room.least:
                return None
            chosen = pinning(0, len(flat))
        pinned, stream, arena, weights = chosen
        experts: dict[int, PoolPlan] = {}
        for size, es in self.experts.items():
            spare = min((room.arena - arena) // size, (room.resident - weights) // biggest[size])
            more = max(0, min(len(es) - least[size], spare))
            experts[size] = PoolPlan(size, least[size] + more)
            arena += more * size
            weights += more * biggest[size]
        return TierPlan(arena, weights, (*(b.key for b in self.always), *pinned), stream, experts)


def expert_pools(layout: ModelLayout) -> dict[int, list[LaidOut]]:
    """Experts by slot size: each size class has one pool."""
    classes = _size_classes(layout)
    pools: dict[int, list[LaidOut]] = {}
    for layer in layout.layers:
        for group in layer.experts:
            pools.setdefault(classes[_slot(group)], []).extend(group.blocks)
    return pools


def _slot(group: ExpertGroup) -> int:
    return page_up(max(e.block.slot_nbytes for e in group.blocks))


def _size_classes(layout: ModelLayout) -> dict[int, int]:
    """Slot size → size of its class: sizes that differ by padding only (a sixteenth) share one."""
    classes: dict[int, int] = {}
    leader = 0
    for size in sorted({_slot(g) for layer in layout.layers for g in layer.experts}, reverse=True):
        leader = leader if size >= leader * 15 // 16 and leader else size
        classes[size] = leader
    return classes


def _least_experts(layout: ModelLayout) -> dict[int, int]:
    """Slots per pool below which decoding one token would read an expert twice: a layer's top-k."""
    classes = _size_classes(layout)
    least: dict[int, int] = {}
    for layer in layout.layers:
        for group in layer.experts:
            size = classes[_slot(group)]
            least[size] = max(least.get(size, 1), group.top_k)
    return least


def _spread(n: int, k: int) -> set[int]:
    """`k` of `n` places, evenly: streaming then has resident layers' compute to hide behind."""
    return {(2 * i + 1) * n // (2 * k) for i in range(k)} if k else set()


def dense_blocks(layout: ModelLayout) -> list[LaidOut]:
    """The layers' dense parts and the head, in order of use."""
    return [p for layer in layout.layers for p in layer.dense] + ([layout.head] if layout.head is not None else [])

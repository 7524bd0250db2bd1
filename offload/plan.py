"""What fits: budgets in, placement out. Pure functions; nothing is allocated or read here.

The budget is the peak of the whole process, so it is split into: what the interpreter and libraries already use,
a reserve for what they will, KV for the context, temporaries of one pass, and slots for weights with the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from offload.layout import ExpertGroup, LaidOut, ModelLayout
from offload.sizes import ceil_mib, format_size
from tiers import CHUNK, PAGE, BudgetError, UsageError, page_up

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
class Plan:
    """Where everything lives. Sizes in bytes.

    `pinned` blocks stay in memory; `stream` is the pool the other dense blocks pass through; `experts` are cache
    pools by slot size. `prefill_chunk` and `context` are in tokens.
    """

    ram: int
    base: int
    kv: int
    activations: int
    arena: int
    pinned: tuple[str, ...]
    stream: PoolPlan | None
    experts: dict[int, PoolPlan] = field(default_factory=dict)
    expert_slots: int = 0
    experts_total: int = 0
    context: int = MIN_CONTEXT
    prefill_chunk: int = MIN_CHUNK
    weight_bytes: int = 0
    resident_bytes: int = 0  # most weight bytes in memory at once, streaming slots included
    smallest: int = 0

    @property
    def everything_fits(self) -> bool:
        """Whether no weight is ever read twice."""
        return self.stream is None and self.expert_slots == self.experts_total

    def summary(self) -> str:
        """One line for people."""
        share = 100 * self.resident_bytes / max(1, self.weight_bytes)
        parts = [
            f"{format_size(self.resident_bytes)} of {format_size(self.weight_bytes)} weights in memory ({share:.0f}%)"
        ]
        if self.experts_total:
            parts.append(f"{self.expert_slots} of {self.experts_total} experts cached")
        if self.stream is not None:
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


def make_plan(
    layout: ModelLayout, demand: Demand, *, ram: int, base: int, resident: int | None, context: int | None
) -> Plan:
    """The best placement inside `ram`, with at most `resident` weight bytes in memory.

    Raises `BudgetError` with the smallest budget that works.
    """
    fixed = base + RESERVE + READERS * (CHUNK + 2 * PAGE)
    if context is not None and context > demand.max_context:
        raise UsageError(f"--context {context} is more than the model's {demand.max_context}")
    least_context = context or min(MIN_CONTEXT, demand.max_context)

    def overhead(tokens: int, chunk: int) -> tuple[int, int]:
        chunk = tokens if demand.whole_prompt else min(chunk, tokens)
        return demand.kv(tokens), demand.activations(chunk, tokens)

    tight = _place(layout, _Minimum())
    assert tight is not None
    smallest = fixed + sum(overhead(least_context, MIN_CHUNK)) + tight.arena
    smallest = page_up(smallest)
    if ram < smallest:
        raise BudgetError(
            f"--ram {format_size(ram)} is too small; the smallest that works is {ceil_mib(smallest)}", smallest
        )
    if resident is not None and resident < tight.resident:
        raise BudgetError(
            f"--resident {format_size(resident)} is too small; the smallest that works is {_exact(tight.resident)}",
            tight.resident,
        )
    chunk = MIN_CHUNK
    for candidate in (64, 128, 256, 512, 1024, MAX_CHUNK):
        extra = demand.activations(candidate, least_context) - demand.activations(MIN_CHUNK, least_context)
        if extra <= (ram - smallest) // 4 and demand.activations(candidate, least_context) <= max(ram // 20, 64 << 20):
            chunk = candidate
    whole = sum(b.slot_nbytes for b in layout.blocks()) - tight.arena  # room in which every block would fit
    if context is None:
        context = least_context
        while context < min(demand.max_context, MAX_DEFAULT_CONTEXT):
            wider = min(2 * context, demand.max_context, MAX_DEFAULT_CONTEXT)
            more = sum(overhead(wider, chunk)) - sum(overhead(least_context, chunk))
            # KV is reserved whether used or not: while weights must be streamed it gets little of their room
            if more > (ram - smallest) // 16 and ram - smallest - more < whole:
                break
            context = wider
    kv, activations = overhead(context, chunk)
    while fixed + kv + activations + tight.arena > ram and chunk > MIN_CHUNK:
        chunk //= 2
        kv, activations = overhead(context, chunk)
    placed = _place(layout, _Room(ram - fixed - kv - activations, resident))
    assert placed is not None, "the smallest plan fits, so some plan does"
    total = sum(len(g.blocks) for layer in layout.layers for g in layer.experts)
    return Plan(
        ram=ram,
        base=base,
        kv=kv,
        activations=activations,
        arena=placed.arena,
        pinned=placed.pinned,
        stream=placed.stream,
        experts=placed.experts,
        expert_slots=sum(p.count for p in placed.experts.values()),
        experts_total=total,
        context=context,
        prefill_chunk=context if demand.whole_prompt else min(chunk, context),
        weight_bytes=layout.weight_bytes,
        resident_bytes=placed.resident,
        smallest=smallest,
    )


def _exact(n: int) -> str:
    return ceil_mib(n) if n >= 64 << 20 else f"{n}B"


@dataclass(frozen=True, slots=True)
class _Placement:
    arena: int
    resident: int
    pinned: tuple[str, ...]
    stream: PoolPlan | None
    experts: dict[int, PoolPlan]


class _Room:
    """Slot bytes and weight bytes that may be taken."""

    def __init__(self, arena: int, resident: int | None) -> None:
        self.arena = arena
        self.resident = resident if resident is not None else 1 << 62

    def fits(self, arena: int, resident: int) -> bool:
        return arena <= self.arena and resident <= self.resident


class _Minimum(_Room):
    """No room beyond what cannot be done without."""

    def __init__(self) -> None:
        super().__init__(0, 0)


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


def _place(layout: ModelLayout, room: _Room) -> _Placement | None:
    """Pin as many dense blocks as fit, spread evenly, and stream the others; experts get what is left."""
    rest = layout.rest.block
    dense = [layer.dense.block for layer in layout.layers]
    if layout.head is not None:
        dense.append(layout.head.block)
    pools = expert_pools(layout)
    least = _least_experts(layout)
    biggest = {size: max(e.block.nbytes for e in blocks) for size, blocks in pools.items()}
    arena0 = page_up(rest.slot_nbytes) + sum(size * n for size, n in least.items())
    resident0 = rest.nbytes + sum(biggest[size] * n for size, n in least.items())

    def pinning(slots: int, streamed: int) -> tuple[list[str], PoolPlan | None, int, int]:
        away = _spread(len(dense), streamed)
        gone = [b for i, b in enumerate(dense) if i in away]
        kept = [b for i, b in enumerate(dense) if i not in away]
        slots = min(slots, streamed)
        slot = page_up(max((b.slot_nbytes for b in gone), default=0))
        arena = arena0 + sum(page_up(b.slot_nbytes) for b in kept) + slots * slot
        weights = resident0 + sum(b.nbytes for b in kept) + slots * max((b.nbytes for b in gone), default=0)
        return [b.key for b in kept], PoolPlan(slot, slots) if slots else None, arena, weights

    # two slots keep the disk busy while one is computed on; one slot works, but then nothing overlaps
    options = [pinning(slots, streamed) for slots in (2, 1) for streamed in range(len(dense) + 1)]
    chosen = next((o for o in options if room.fits(o[2], o[3])), None)
    if chosen is None:
        if not isinstance(room, _Minimum):
            return None
        chosen = pinning(1, len(dense))
    pinned, stream, arena, weights = chosen
    experts: dict[int, PoolPlan] = {}
    for size, blocks in pools.items():
        have = least[size]
        spare = min((room.arena - arena) // size, (room.resident - weights) // biggest[size])
        more = max(0, min(len(blocks) - have, spare))
        experts[size] = PoolPlan(size, have + more)
        arena += more * size
        weights += more * biggest[size]
    return _Placement(arena, weights, (rest.key, *pinned), stream, experts)


def _spread(n: int, k: int) -> set[int]:
    """`k` of `n` places, evenly: streaming then has resident layers' compute to hide behind."""
    return {(2 * i + 1) * n // (2 * k) for i in range(k)} if k else set()


def streamed(layout: ModelLayout, plan: Plan) -> Sequence[LaidOut]:
    """The dense blocks that pass through the stream pool, in order of use."""
    dense = [layer.dense for layer in layout.layers] + ([layout.head] if layout.head is not None else [])
    pinned = set(plan.pinned)
    return [b for b in dense if b.block.key not in pinned]

"""What fits: budgets in, plan out. Pure functions; nothing is allocated or read here.

Several placements fit a budget; `make_plan` takes the one that a given score finds fastest, or, without a score, the
one that keeps most in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from offload.layout import ModelLayout
from offload.planning.budgets import READERS, RESERVE, Budgets, Demand, Overrides
from offload.planning.keys import WORTH, WORTH_JOB, KVTiers, Way
from offload.planning.placement import Room, Weights
from offload.planning.plan import Plan, TierPlan
from offload.sizes import ceil_mib, format_size
from tiers import CHUNK, PAGE, BudgetError, UsageError, page_up

MIN_CONTEXT = 512
MAX_DEFAULT_CONTEXT = 8192
MIN_CHUNK, MAX_CHUNK = 32, 2048
CHUNKS = (MIN_CHUNK, 64, 128, 256, 512, 1024, MAX_CHUNK)
_LEAST_EXACT, _EXACT_LAYERS = 6, 600  # placements run on the virtual clock, and layers of them: bounds a plan's time
_SLACK = 1.05  # the bound and the virtual clock see other draws of experts


@dataclass(frozen=True, slots=True)
class Use:
    """What a placement is used with: tokens of a prompt computed in one pass, and keys and values (None: in memory)."""

    chunk: int
    kv: KVTiers | None = None


# seconds a placement is expected to take: (host, device or None, use); a cheap bound first, then the real one
Score = Callable[[TierPlan, "TierPlan | None", Use], float]


@dataclass(frozen=True, slots=True)
class Scores:
    """How the planner compares placements: `bound` is cheap and asked often, `exact` of the few best ones.

    `widest` is the most tokens a pass could have: room for more is of no use.
    """

    bound: Score
    exact: Score
    widest: int = 1 << 62


def make_plan(
    layout: ModelLayout,
    demand: Demand,
    budgets: Budgets,
    scores: Scores | None = None,
    overrides: Overrides | None = None,
) -> Plan:
    """The best placement inside the budgets: the fastest by `scores`, else the one that keeps most in memory.

    Raises `BudgetError` with the smallest budget that works, `UsageError` for overrides that cannot be honoured.
    """
    ram, vram, context = budgets.ram, budgets.vram, budgets.context
    by_hand = overrides or Overrides()
    fixed = budgets.base + RESERVE + READERS * (CHUNK + 2 * PAGE)
    if context is not None and context > demand.max_context:
        raise UsageError(f"--context {context} is more than the model's {demand.max_context}")
    least_context = context or min(MIN_CONTEXT, demand.max_context)

    ways = demand.ways(budgets)

    def overhead(tokens: int, chunk: int, way: Way) -> tuple[int, int]:
        chunk = tokens if demand.whole_prompt else min(chunk, tokens)
        rows = demand.job or 1
        return way.kv(tokens), way.activations(max(chunk, rows), tokens) + (rows - 1) * demand.row

    def host_kv(tokens: int) -> int:
        """What RAM holds, at least, of keys and values that are not all on the device."""
        tiered = vram is not None and any(way.tiers(tokens) is not None for way in ways)
        asked = budgets.kv_resident if budgets.kv_below and budgets.kv_resident is not None else 0
        return demand.tiered.resident(tokens, asked) if tiered and demand.tiered is not None else 0

    # the smallest placement, and with it the smallest budgets
    model = Weights.of(layout)
    leasts = [sum(overhead(least_context, MIN_CHUNK, way)) for way in ways]
    tight, streaming = model.smallest(), model.place(Room.none())
    assert streaming is not None
    below = model.below(streaming).place(Room.none()) if vram is not None else None  # enough under any other, too
    assert below is not None or vram is None
    least = min(leasts)
    if below is not None and vram is not None:
        if budgets.kv_resident is None and budgets.device_base + leasts[0] + tight.arena <= vram:
            ways = ways[:1]  # all of them fit the device, where attention is fastest
        least_ram = page_up(fixed + below.arena + host_kv(least_context))
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
    spare = compute_budget - smallest
    way = ways[0]
    chunks = [MIN_CHUNK]
    for candidate in CHUNKS[1:]:
        extra = way.activations(candidate, least_context) - way.activations(MIN_CHUNK, least_context)
        wanted = way.activations(candidate, least_context)
        if extra <= spare // 4 and wanted <= max(compute_budget // 20, 64 << 20):
            chunks.append(candidate)
    if context is None:
        whole = sum(b.slot_nbytes for b in layout.blocks()) - tight.arena  # room in which every block would fit
        context = least_context
        while context < min(demand.max_context, MAX_DEFAULT_CONTEXT):
            wider = min(2 * context, demand.max_context, MAX_DEFAULT_CONTEXT)
            more = sum(overhead(wider, chunks[-1], way)) - sum(overhead(least_context, chunks[-1], way))
            # KV is reserved whether used or not: while weights must be streamed it gets little of their room
            if more > spare or (more > spare // 16 and spare - more < whole):
                break
            if below is not None and fixed + below.arena + host_kv(wider) > ram:
                break
            context = wider
    if scores is not None:  # they tell what a wider pass is worth in weights
        chunks = [c for i, c in enumerate(CHUNKS) if i == 0 or CHUNKS[i - 1] < min(context, scores.widest)]
    if by_hand.prefill_chunk is not None:
        chunks = [by_hand.prefill_chunk]
    elif demand.whole_prompt:
        chunks = [context]
    rooms: dict[Use, Room] = {}
    taken: dict[Use, tuple[int, int]] = {}
    cap = budgets.resident if budgets.resident is not None else 1 << 62
    reserved = below.resident if below is not None else 0
    for way, chunk in [(w, c) for w in reversed(ways) for c in chunks]:  # the last one that fits is taken unasked
        use = Use(chunk, way.tiers(context))
        taken[use] = overhead(context, chunk, way)
        left = compute_budget - compute_fixed - sum(taken[use])
        if left >= tight.arena or not rooms:
            rooms[use] = Room(left, cap - reserved)

    # weights: what is left, first where they are computed on, then in the tier below
    def under(above: TierPlan) -> TierPlan:
        """What the host holds of what the device does not."""
        host = model.below(above).place(Room(ram - fixed - host_kv(context), cap - above.resident))
        assert host is not None, "what is left for the host was kept for it"
        return host

    def both(placed: TierPlan) -> tuple[TierPlan, TierPlan | None]:
        return (under(placed), placed) if vram is not None else (placed, None)

    candidates = _candidates(model, rooms, by_hand, scores)
    if scores is None or len(candidates) == 1:
        use, placed = candidates[-1]
    else:
        use, placed = _fastest(candidates, both, scores, len(model.dense), WORTH if demand.job is None else WORTH_JOB)
    host, device = both(placed)
    kv, activations = taken[use]
    host_room = 0
    if vram is not None and use.kv is not None and demand.tiered is not None:
        # whatever RAM has left holds more of them: what is on disk is far slower
        most = demand.tiered.whole(context) + demand.tiered.ring(context)
        host_room = max(host_kv(context), min(most, ram - fixed - host.arena))
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
        prefill_chunk=context if demand.whole_prompt else min(use.chunk, context),
        weight_bytes=layout.weight_bytes,
        smallest=smallest,
        smallest_ram=least_ram,
        kv_tiers=use.kv,
        kv_host=host_room,
    )


def _candidates(
    model: Weights, rooms: dict[Use, Room], by_hand: Overrides, scores: Scores | None
) -> list[tuple[Use, TierPlan]]:
    """Uses and placements worth comparing; the last one is the choice where nothing is compared."""
    if by_hand.any:
        found = [(u, p) for u, room in rooms.items() for p in model.options(room, by_hand)]
        if not found:
            raise UsageError(f"--set: {model.reason(next(iter(rooms.values())), by_hand)}")
        return found
    if scores is None:
        for use, room in reversed(rooms.items()):
            placed = model.place(room)
            if placed is not None:
                return [(use, placed)]
    found = [(u, p) for u, room in rooms.items() for p in model.options(room, by_hand)]
    assert found, "the smallest plan fits, so some plan does"
    return found


def _fastest(
    candidates: list[tuple[Use, TierPlan]],
    both: Callable[[TierPlan], tuple[TierPlan, TierPlan | None]],
    scores: Scores,
    layers: int,
    worth: float,
) -> tuple[Use, TierPlan]:
    """The candidate with the best exact score, as far as time allows: in order of bound, until no other can win."""

    def scored(score: Score, i: int) -> float:
        use, placed = candidates[i]
        return _rounded(score(*both(placed), use) * (1.0 if use.kv is None or use.kv.share >= 1 else worth))

    # ties go to what keeps more keys and values, then to what streams least; rounding keeps the order of sums out of it
    ranked = sorted(
        (scored(scores.bound, i), -(u.kv.kept if u.kv is not None else math.inf), -p.lookahead, i)
        for i, (u, p) in enumerate(candidates)
    )
    # the bound does not see what lookahead is good for, and little of how keys and values are waited for
    firsts = {e[2]: e for e in reversed(ranked)}
    of_ways = {e[1]: e for e in reversed(ranked)}
    order = dict.fromkeys([*sorted(firsts.values(), key=ranked.index), *of_ways.values(), *ranked])
    best: tuple[float, float, int, int] | None = None
    for bound, kept, ahead, i in list(order)[: max(_LEAST_EXACT, _EXACT_LAYERS // layers)]:
        if best is None or bound < _SLACK * best[0]:
            mine = scored(scores.exact, i), kept, ahead, i
            best = min(best, mine) if best is not None else mine
    assert best is not None
    return candidates[best[-1]]


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.6g}")


def _refuse(flag: str, given: int, least: int) -> None:
    if given < least:
        exact = f"{least}B" if flag == "--resident" and least < 64 << 20 else ceil_mib(least)
        raise BudgetError(f"{flag} {format_size(given)} is too small; the smallest that works is {exact}", least)

"""What fits: budgets in, placement out. Pure functions; nothing is allocated or read here.

Several placements fit a budget; `make_plan` takes the one that a given score finds fastest, or, without a score, the
one that keeps most in memory. `ram` is the peak of the whole process, so it is split into: what the interpreter and
libraries already use, a reserve for what they will, and slots for weights. KV for the context and the temporaries of
one pass lie where compute is: in `ram` on a CPU, in `vram` on a device with memory of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from offload.layout import ExpertGroup, LaidOut, ModelLayout
from offload.planning.keys import SHARES, WORTH, KVDemand, KVTiers, Way
from offload.sizes import ceil_mib, format_size
from tiers import CHUNK, PAGE, Block, BudgetError, UsageError, page_up

READERS = 8  # requests in flight; 1 MiB × 8 is where this kind of disk levels off
# Thread stacks, bounce buffers' owners, lazily imported modules, allocator slack. Measured by tests/test_budget.py.
RESERVE = 72 << 20
MIN_CONTEXT = 512
MAX_DEFAULT_CONTEXT = 8192
MIN_CHUNK, MAX_CHUNK = 32, 2048
CHUNKS = (MIN_CHUNK, 64, 128, 256, 512, 1024, MAX_CHUNK)
_AHEAD = 2  # most stream slots beyond those of the layer in use
_TRIED = 12  # how finely the share of memory between dense blocks and experts is searched
_LEAST_EXACT, _EXACT_LAYERS = 6, 600  # placements run on the virtual clock, and layers of them: bounds a plan's time
_SLACK = 1.05  # the bound and the virtual clock see other draws of experts


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


@dataclass(frozen=True, slots=True)
class Demand:
    """What a model asks of memory beside its weights, as functions of tokens.

    `kv` and `activations` hold where all keys and values are in memory; `tiered` where some are on disk (None: those of
    this family cannot be).
    """

    kv: Callable[[int], int]
    activations: Callable[[int, int], int]  # (new tokens in one pass, tokens of context)
    max_context: int
    whole_prompt: bool = False  # prompts of this family must be computed in one pass
    tiered: KVDemand | None = None

    def way(self, asked: int | float | None, *, below: bool = False) -> Way:
        """Keep `asked`, bytes or a share, of keys and values in memory (None: all); in that `below` a device's."""
        tiered = self.tiered
        if asked is None:
            return Way(self.kv, self.activations, lambda tokens: None)
        if tiered is None:
            raise UsageError("--kv-resident: this model keeps no keys and values that could lie anywhere else")
        return Way(
            lambda tokens: (0 if below else tiered.resident(tokens, asked)) + tiered.others(tokens),
            tiered.activations,
            lambda tokens: tiered.tiers(tokens, asked),
        )

    def ways(self, budgets: Budgets) -> list[Way]:
        """The ways to keep keys and values that a plan may choose among, most in memory first.

        Nobody asked to have them on disk who did not say how long the context is to be.
        """
        if budgets.kv_resident is not None:
            return [self.way(budgets.kv_resident, below=budgets.kv_below and budgets.vram is not None)]
        ways = [self.way(None)]
        if self.tiered is None or budgets.context is None:
            return ways
        context = min(budgets.context, self.max_context)
        whole, ring = self.tiered.whole(context), self.tiered.ring(context)
        fewer = [self.way(int(whole * share) + ring) for share in SHARES]
        return ways + [w for w in fewer if w.kv(context) < self.kv(context)]  # windows may keep less than a share is


@dataclass(frozen=True, slots=True)
class Budgets:
    """What may be used. `vram` is None where compute is on the host; `device_base` is what the device takes itself.

    `kv_resident`: keys and values kept in memory, bytes or, as a float, a share; None leaves it to the planner. With
    `kv_below` none of that is a device's memory: they are attended to in RAM.
    """

    ram: int
    base: int
    vram: int | None = None
    device_base: int = 0
    resident: int | None = None
    context: int | None = None
    kv_resident: int | float | None = None
    kv_below: bool = False


@dataclass(frozen=True, slots=True)
class Overrides:
    """Choices made by hand; None leaves one to the planner.

    `resident_layers` decoder layers stay whole and the others are streamed whole; `lookahead` stream slots lie beyond
    those of the layer in use; `expert_slots` experts are cached where they are computed; `prefill_chunk` tokens of a
    prompt are computed in one pass; `kv_chunk` tokens of keys and values come and go together.
    """

    resident_layers: int | None = None
    lookahead: int | None = None
    expert_slots: int | None = None
    prefill_chunk: int | None = None
    kv_chunk: int | None = None

    @classmethod
    def of(cls, settings: Mapping[str, int]) -> Overrides:
        """From names and values. Raises `UsageError` for an unknown name or a value below its least."""
        least = {"resident_layers": 0, "lookahead": 0, "expert_slots": 1, "prefill_chunk": 1, "kv_chunk": 1}
        for name, value in settings.items():
            if name not in least:
                raise UsageError(f"--set {name}: not a choice there is; choices are {', '.join(least)}")
            if isinstance(value, bool) or not isinstance(value, int) or not least[name] <= value < 1 << 40:
                raise UsageError(f"--set {name}={value!r}: give a whole number from {least[name]} up")
        return cls(**settings)

    @property
    def any(self) -> bool:
        """Whether anything about weights is set."""
        return any(getattr(self, f.name) is not None for f in fields(self) if f.name != "kv_chunk")


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
        return way.kv(tokens), way.activations(chunk, tokens)

    def host_kv(tokens: int) -> int:
        """What RAM holds, at least, of keys and values that are not all on the device."""
        tiered = vram is not None and any(way.tiers(tokens) is not None for way in ways)
        asked = budgets.kv_resident if budgets.kv_below and budgets.kv_resident is not None else 0
        return demand.tiered.resident(tokens, asked) if tiered and demand.tiered is not None else 0

    # the smallest placement, and with it the smallest budgets
    model = _Weights.of(layout)
    leasts = [sum(overhead(least_context, MIN_CHUNK, way)) for way in ways]
    tight, streaming = model.smallest(), model.place(_Room.none())
    assert streaming is not None
    below = model.below(streaming).place(_Room.none()) if vram is not None else None  # enough under any other, too
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
    rooms: dict[Use, _Room] = {}
    taken: dict[Use, tuple[int, int]] = {}
    cap = budgets.resident if budgets.resident is not None else 1 << 62
    reserved = below.resident if below is not None else 0
    for way, chunk in [(w, c) for w in reversed(ways) for c in chunks]:  # the last one that fits is taken unasked
        use = Use(chunk, way.tiers(context))
        taken[use] = overhead(context, chunk, way)
        left = compute_budget - compute_fixed - sum(taken[use])
        if left >= tight.arena or not rooms:
            rooms[use] = _Room(left, cap - reserved)

    # weights: what is left, first where they are computed on, then in the tier below
    def under(above: TierPlan) -> TierPlan:
        """What the host holds of what the device does not."""
        host = model.below(above).place(_Room(ram - fixed - host_kv(context), cap - above.resident))
        assert host is not None, "what is left for the host was kept for it"
        return host

    def both(placed: TierPlan) -> tuple[TierPlan, TierPlan | None]:
        return (under(placed), placed) if vram is not None else (placed, None)

    candidates = _candidates(model, rooms, by_hand, scores)
    if scores is None or len(candidates) == 1:
        use, placed = candidates[-1]
    else:
        use, placed = _fastest(candidates, both, scores, len(model.dense))
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
    model: _Weights, rooms: dict[Use, _Room], by_hand: Overrides, scores: Scores | None
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
) -> tuple[Use, TierPlan]:
    """The candidate with the best exact score, as far as time allows: in order of bound, until no other can win."""

    def scored(score: Score, i: int) -> float:
        use, placed = candidates[i]
        return _rounded(score(*both(placed), use) * (1.0 if use.kv is None else WORTH))

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
    biggest: Mapping[int, int]  # bytes of the largest expert of each size class
    passing: tuple[Block, ...] = ()
    head: bool = False  # whether the last of `dense` is the head
    cache: dict[Any, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, layout: ModelLayout) -> _Weights:
        """The whole model."""
        dense = [tuple(part.block for part in layer.dense) for layer in layout.layers]
        if layout.head is not None:
            dense.append((layout.head.block,))
        pools = expert_pools(layout)
        biggest = {size: max(e.block.nbytes for e in es) for size, es in pools.items()}
        return cls((layout.rest.block,), tuple(dense), pools, _least_experts(layout), biggest,
                   head=layout.head is not None)  # fmt: skip

    def below(self, above: TierPlan) -> _Weights:
        """What the tier under `above` has to do with: all that does not stay there."""
        stays = set(above.pinned)
        # experts are loaded beforehand only where nothing at all moves afterwards; otherwise they come from below
        whole = above.stream is None and all(above.experts[size].count == len(e) for size, e in self.experts.items())
        left = {} if whole else dict(self.experts)
        gone = [e.block for es in self.experts.values() for e in es] if whole else []
        dense = tuple(b for layer in self.dense for b in layer)
        passing = [b for b in (*self.always, *dense) if b.key in stays] + gone
        rest = tuple(tuple(b for b in layer if b.key not in stays) for layer in self.dense)
        head = self.head and bool(rest[-1])
        return _Weights((), tuple(layer for layer in rest if layer), left, self.least_experts, self.biggest,
                        tuple(passing), head)  # fmt: skip

    def place(self, room: _Room) -> TierPlan | None:
        """Pin as many dense blocks as fit, spread evenly, and stream the others; experts get what is left."""
        if room.least:
            return self._tier(self._streams(0, len(self._table.order)), room)
        return next((self._tier(s, room) for s in self._fitting(room)), None)

    def smallest(self) -> TierPlan:
        """The smallest placement. A large block that sets the size of every slot may cost more than one that stays."""
        every = (self._streams(0, count) for count in range(len(self._table.order) + 1))
        tier = self._tier(min(every, key=lambda s: (s.arena, s.weights)), _Room.none())
        assert tier is not None
        return tier

    def options(self, room: _Room, by_hand: Overrides) -> Iterator[TierPlan]:
        """Placements that differ in lookahead, in how much is pinned, and in whether layers are kept whole."""
        aheads = range(_AHEAD, -1, -1) if by_hand.lookahead is None else (by_hand.lookahead,)
        if aheads[0] > self._table.most and by_hand.lookahead is not None:
            return
        n, layers = len(self._table.order), len(self.dense) - self.head
        for ahead in aheads:
            if by_hand.resident_layers is not None:
                counts = [self._whole_layers(by_hand.resident_layers, ahead)]
                streams = [s for s in counts if s is not None and room.fits(s.arena, s.weights)]
            else:
                fitting = [self._streams(ahead, k) for k in range(n + 1)]
                fitting = [s for s in fitting if room.fits(s.arena, s.weights)]
                step = max(1, n // _TRIED)
                first = fitting[0].count if fitting else 0
                streams = [s for s in fitting if s.count == first or s.count % step == 0]
                every = range(layers, -1, -max(1, layers // _TRIED))
                there = {s.away.tobytes() for s in streams}
                whole = [s for k in every if (s := self._whole_layers(k, ahead)) is not None]
                streams += [s for s in whole if s.away.tobytes() not in there and room.fits(s.arena, s.weights)]
            for s in streams:
                tier = self._tier(s, room, by_hand.expert_slots)
                if tier is not None:
                    yield tier

    def reason(self, room: _Room, by_hand: Overrides) -> str:
        """Why no placement honours the overrides."""
        if by_hand.lookahead is not None and by_hand.lookahead > self._table.most:
            return f"lookahead={by_hand.lookahead}, but no more than {self._table.most} are ever of use"
        layers = len(self.dense) - self.head
        if by_hand.resident_layers is not None and by_hand.resident_layers > layers:
            return f"resident_layers={by_hand.resident_layers}, but the model has {layers} layers and a head"
        slots = sum(map(len, self.experts.values()))
        if by_hand.expert_slots is not None and by_hand.expert_slots > slots:
            return f"expert_slots={by_hand.expert_slots}, but the model has {slots} experts"
        least = sum(self.least_experts.values())
        if by_hand.expert_slots is not None and by_hand.expert_slots < least:
            return f"expert_slots={by_hand.expert_slots}, but one token needs {least} at once"
        left = format_size(max(0, room.arena))
        return f"these choices need more than the {left} left for weights; set less or give a larger budget"

    @property
    def _table(self) -> _Table:
        table = self.cache.get("table")
        if table is None:
            table = self.cache["table"] = _Table.of(self)
        return table

    def _streams(self, ahead: int, count: int) -> _Streams:
        """The size of things when `count` dense blocks are streamed, with `ahead` slots more than a layer needs."""
        key = ahead, count
        known = self.cache.get(key)
        if known is None:
            known = self.cache[key] = self._table.streaming(self._table.away(count), ahead, count)
        return known

    def _whole_layers(self, resident: int, ahead: int) -> _Streams | None:
        """All blocks of all but `resident` layers streamed; the head counts as one more layer and is kept first."""
        t = self._table
        if resident > len(self.dense) - self.head:
            return None
        known = self.cache.get((resident, ahead, "whole"))
        if isinstance(known, _Streams):
            return known
        layers = sorted(set(t.layer.tolist()))
        head = layers[-1:] if self.head else []
        body = layers[: len(layers) - len(head)]
        gone = {body[i] for i in _spread(len(body), max(0, len(body) - resident))}
        away = np.array([i for i, layer in enumerate(t.layer.tolist()) if layer in gone], dtype=np.int64)
        found = self.cache[resident, ahead, "whole"] = t.streaming(away, ahead, len(away))
        return found

    def _fitting(self, room: _Room) -> Iterator[_Streams]:
        """Most lookahead first, then fewest streamed."""
        for ahead in range(_AHEAD, -1, -1):
            for count in range(len(self._table.order) + 1):
                s = self._streams(ahead, count)
                if room.fits(s.arena, s.weights):
                    yield s

    def _tier(self, s: _Streams, room: _Room, expert_slots: int | None = None) -> TierPlan | None:
        """The rest of the room goes to experts."""
        gone = set(s.away.tolist())
        order = self._table.order
        pinned = tuple(b.key for i, b in enumerate(order) if i not in gone)
        arena, weights = s.arena, s.weights
        experts: dict[int, PoolPlan] = {}
        for size, es in self.experts.items():
            biggest = self.biggest[size]
            least = self.least_experts[size]
            spare = min((room.arena - arena) // size, (room.resident - weights) // biggest)
            more = max(0, min(len(es) - least, spare))
            if expert_slots is not None:
                if not 0 <= expert_slots - least <= more:
                    return None
                more = expert_slots - least
            experts[size] = PoolPlan(size, least + more)
            arena += more * size
            weights += more * biggest
        stream = PoolPlan(s.slot, s.slots) if s.slots else None
        return TierPlan(arena, weights, (*(b.key for b in self.always), *pinned), stream, experts, s.ahead)


@dataclass(frozen=True, slots=True)
class _Streams:
    """Some dense blocks streamed: which (`away`, places in the table's order), and what all else takes."""

    count: int
    ahead: int
    away: np.ndarray
    slots: int
    slot: int
    arena: int
    weights: int


@dataclass(frozen=True, slots=True)
class _Table:
    """A tier's dense blocks as arrays, so that every way to divide them can be sized quickly."""

    order: list[Block]
    layer: np.ndarray
    size: np.ndarray
    nbytes: np.ndarray
    usual: int
    most: int
    arena0: int
    weights0: int
    floor: int

    @classmethod
    def of(cls, w: _Weights) -> _Table:
        """The largest blocks come last: one of them would set the size of every stream slot."""
        least = {size: w.least_experts[size] for size in w.experts}
        flat = [(layer, b) for layer, blocks in enumerate(w.dense) for b in blocks]
        typical = 2 * sorted(b.slot_nbytes for _, b in flat)[len(flat) // 2] if flat else 0
        usual = [x for x in flat if x[1].slot_nbytes <= typical]
        order = usual + [x for x in flat if x[1].slot_nbytes > typical]
        return cls(
            order=[b for _, b in order],
            layer=np.array([n for n, _ in order], dtype=np.int64),
            size=np.array([page_up(b.slot_nbytes) for _, b in order], dtype=np.int64),
            nbytes=np.array([b.nbytes for _, b in order], dtype=np.int64),
            usual=len(usual),
            most=_AHEAD if any(len(blocks) > 1 for blocks in w.dense) else 1,  # parts of layers, or whole ones
            arena0=sum(page_up(b.slot_nbytes) for b in w.always) + sum(size * n for size, n in least.items()),
            weights0=sum(b.nbytes for b in w.always) + sum(w.biggest[size] * n for size, n in least.items()),
            floor=max((page_up(b.slot_nbytes) for b in w.passing), default=0),
        )

    def away(self, count: int) -> np.ndarray:
        """`count` blocks, spread evenly over the usual ones, then the large ones."""
        few = sorted(_spread(self.usual, min(count, self.usual)))
        return np.array([*few, *range(self.usual, max(self.usual, count))], dtype=np.int64)

    def streaming(self, away: np.ndarray, ahead: int, count: int) -> _Streams:
        """Sizes with these blocks streamed. Slots beyond those of one layer keep the link busy while it computes."""
        ahead = min(ahead, self.most)
        if not len(away):
            return _Streams(0, ahead, away, 0, 0, max(self.arena0 + int(self.size.sum()), self.floor),
                            self.weights0 + int(self.nbytes.sum()))  # fmt: skip
        in_use = int(np.bincount(self.layer[away]).max())
        slots = min(in_use + ahead, len(away))
        slot, widest = int(self.size[away].max()), int(self.nbytes[away].max())
        arena = self.arena0 + int(self.size.sum() - self.size[away].sum()) + slots * slot
        weights = self.weights0 + int(self.nbytes.sum() - self.nbytes[away].sum()) + slots * widest
        return _Streams(count, ahead, away, slots, slot, max(arena, self.floor), weights)


def device_map(layout: ModelLayout, plan: Plan) -> dict[str, int | str]:
    """The plan in accelerate's words: module → 0 (device), "cpu" or "disk".

    accelerate knows whole modules only, so a layer goes where the last of its blocks is.
    """
    top: int | str = 0 if plan.device is not None else "cpu"
    pinned = set(plan.compute.pinned)
    below = set(plan.host.pinned) if plan.device is not None else set()
    pools = expert_pools(layout)
    classes = _size_classes(layout)

    def all_experts(groups: Sequence[ExpertGroup], *tiers: TierPlan) -> bool:
        sizes = {classes[_slot(g)] for g in groups}
        return all(any(s in t.experts and t.experts[s].count >= len(pools[s]) for t in tiers) for s in sizes)

    def place(parts: Sequence[LaidOut], groups: Sequence[ExpertGroup] = ()) -> int | str:
        keys = {p.block.key for p in parts}
        if keys <= pinned and (not groups or all_experts(groups, plan.compute)):
            return top
        under = plan.device is not None and keys <= pinned | below
        if under and (not groups or all_experts(groups, plan.compute, plan.host)):
            return "cpu"
        return "disk"

    out: dict[str, int | str] = {t.module: "cpu" for t in layout.tables}
    for spec in layout.rest.specs:
        out[spec.name.rpartition(".")[0]] = top
    for layer in layout.layers:
        out[layer.module] = place(layer.dense, layer.experts)
    if layout.head is not None:
        out[layout.head.specs[0].name.rpartition(".")[0]] = place((layout.head,))
    return out


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

"""Blocks in tiers: which stay, which are streamed, and how many experts are cached, in the room there is for weights.

Pure functions; nothing is allocated or read here. What the room is, and which placement is taken, is
`offload.planning.fit`'s business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from offload.layout import ExpertGroup, LaidOut, ModelLayout
from offload.planning.budgets import Overrides
from offload.planning.plan import Plan, PoolPlan, TierPlan
from offload.sizes import format_size
from tiers import Block, page_up

_AHEAD = 2  # most stream slots beyond those of the layer in use
_TRIED = 12  # how finely the share of memory between dense blocks and experts is searched


@dataclass(frozen=True, slots=True)
class Room:
    """Slot bytes and weight bytes that may be taken; `least` asks for what cannot be done without."""

    arena: int
    resident: int
    least: bool = False

    @classmethod
    def none(cls) -> Room:
        """No more than must be: for the smallest placement."""
        return cls(0, 0, True)

    def fits(self, arena: int, resident: int) -> bool:
        """Whether so many slot bytes and weight bytes may be taken."""
        return arena <= self.arena and resident <= self.resident


@dataclass(frozen=True, slots=True)
class Weights:
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
    def of(cls, layout: ModelLayout) -> Weights:
        """The whole model."""
        dense = [tuple(part.block for part in layer.dense) for layer in layout.layers]
        if layout.head is not None:
            dense.append((layout.head.block,))
        pools = expert_pools(layout)
        biggest = {size: max(e.block.nbytes for e in es) for size, es in pools.items()}
        return cls((layout.rest.block,), tuple(dense), pools, _least_experts(layout), biggest,
                   head=layout.head is not None)  # fmt: skip

    def below(self, above: TierPlan) -> Weights:
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
        return Weights((), tuple(layer for layer in rest if layer), left, self.least_experts, self.biggest,
                        tuple(passing), head)  # fmt: skip

    def place(self, room: Room) -> TierPlan | None:
        """Pin as many dense blocks as fit, spread evenly, and stream the others; experts get what is left."""
        if room.least:
            return self._tier(self._streams(0, len(self._table.order)), room)
        return next((self._tier(s, room) for s in self._fitting(room)), None)

    def smallest(self) -> TierPlan:
        """The smallest placement. A large block that sets the size of every slot may cost more than one that stays."""
        every = (self._streams(0, count) for count in range(len(self._table.order) + 1))
        tier = self._tier(min(every, key=lambda s: (s.arena, s.weights)), Room.none())
        assert tier is not None
        return tier

    def options(self, room: Room, by_hand: Overrides) -> Iterator[TierPlan]:
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

    def reason(self, room: Room, by_hand: Overrides) -> str:
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

    def _fitting(self, room: Room) -> Iterator[_Streams]:
        """Most lookahead first, then fewest streamed."""
        for ahead in range(_AHEAD, -1, -1):
            for count in range(len(self._table.order) + 1):
                s = self._streams(ahead, count)
                if room.fits(s.arena, s.weights):
                    yield s

    def _tier(self, s: _Streams, room: Room, expert_slots: int | None = None) -> TierPlan | None:
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
    def of(cls, w: Weights) -> _Table:
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

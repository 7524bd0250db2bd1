"""The planner: of the placements that fit, the one that is predicted to serve a workload soonest.

Every placement that differs in what is pinned, in lookahead, in the share of experts, in the share of keys and values
in memory and in the prefill chunk is compared by a bound (the busiest resource's time, which a perfect schedule would
reach); the best of each lookahead and of each share of keys and values, and then the others that could still win, are
run on the virtual clock. Deterministic.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from dataclasses import dataclass, replace

from offload.describe import Description
from offload.planning import cost
from offload.planning.budgets import Budgets, Overrides
from offload.planning.cost import Pass
from offload.planning.facts import ModelFacts
from offload.planning.fit import Scores, Use, make_plan
from offload.planning.keys import KVTiers
from offload.planning.machine import Machine
from offload.planning.plan import Plan, TierPlan
from offload.planning.predict import ALL, Prediction, Workload, chunks_of, placement, predict, simulate
from offload.planning.routing import EVEN, Routing, absent, crowded, draw
from offload.planning.timeline import Placement

_PASSES = 4  # over a prompt, drawn for the bound: by then most experts have been used
_SOME = 32  # passes over a prompt whose reads of keys and values are looked at


@dataclass(frozen=True)
class Chosen:
    """A plan and what it is predicted to do."""

    plan: Plan
    prediction: Prediction
    workload: Workload


def choose(
    described: Description,
    budgets: Budgets,
    machine: Machine,
    workload: Workload,
    routing: Routing = EVEN,
    overrides: Overrides | None = None,
    widest: int | None = None,
) -> Chosen:
    """The best plan for `workload`, whose passes are of `widest` tokens at most (None: of all prompts together).

    Raises `BudgetError`, `UsageError` as `make_plan` does.
    """
    facts = described.facts
    bound = _Bound(facts, machine, workload, routing)

    known: dict[tuple[Placement, tuple[int, ...]], float] = {}  # many candidates come to the same

    def exact(host: TierPlan, device: TierPlan | None, use: Use) -> float:
        where = placement(facts, device, host, use.kv, workload.context)
        key = where, tuple(chunks_of(workload, use.chunk))
        if key not in known:
            known[key] = simulate(facts, where, use.chunk, machine, workload, routing)[0].total_s(workload)
        return known[key]

    scores = Scores(bound, exact, widest or workload.batch * workload.prompt_tokens)
    plan = make_plan(described.layout, described.demand, budgets, scores, overrides)
    return Chosen(plan, predict(facts, plan, machine, workload, routing), workload)


class _Bound:
    """Seconds no schedule can do without, for a placement: the busiest of compute, link and disk."""

    def __init__(self, facts: ModelFacts, machine: Machine, workload: Workload, routing: Routing) -> None:
        self._facts, self._machine, self._workload, self._routing = facts, machine, workload, routing
        self._sizes = {key: n for layer in facts.layers for key, n in layer.parts} | dict(facts.head)
        self._prefill: dict[int, list[tuple[float, tuple[_Work, _Work], list[int]]]] = {}
        self._reads: dict[tuple[int, KVTiers], _Reads] = {}
        self._alike = Counter(replace(y, parts=()) for y in facts.layers)
        middle = workload.past_tokens + workload.prompt_tokens + workload.new_tokens // 2
        routed = tuple((y.experts, y.top_k) for y in facts.layers if y.experts)
        self._expert_bytes = max((y.expert_bytes for y in facts.layers), default=0)
        steps = max(1, workload.new_tokens - 1)
        prompt = (workload.batch * workload.prompt_tokens,)  # has used its experts before decoding begins
        then = draw(routed, prompt, steps, workload.batch, routing.repeat, workload.warm)[1] if routed else ()
        each = [m.distances for m in (then[-max(1, len(then) // 4) :] if steps > len(then) else then)]
        self._decode = sorted(heapq.merge(*(d for distances in each for d in distances)))
        self._decode_passes = max(1, len(each))
        needed = [sum(map(len, layer)) / len(each) for layer in zip(*each, strict=True)] if each else []
        self._middle = Pass(workload.batch, 1, middle)
        self._decode_compute = self._compute(self._middle, [round(n) for n in needed])

    def __call__(self, host: TierPlan, device: TierPlan | None, use: Use) -> float:
        """Lower bound of the request's seconds."""
        compute = device if device is not None else host
        streamed = self._passing(compute, set())
        unread = streamed
        if device is not None:
            unread = min(streamed, self._passing(host, set(compute.pinned)))
            if host.stream is not None:  # all but one of RAM's slots may keep what they hold from pass to pass
                unread = max(0, unread - (host.stream.count - 1) * host.stream.slot_nbytes)
        slots = compute.expert_slots
        if slots == self._facts.experts and self._sizes.keys() <= set(compute.pinned):
            slots = ALL  # loaded beforehand, as in `predict.placement`
        below = max(slots, host.expert_slots)
        foresees = streamed == sum(n for key, n in self._facts.head if key not in compute.pinned)
        workload = self._workload
        total = 0.0
        tiered = use.kv is not None
        keys = self._keys(use.chunk, use.kv) if use.kv is not None else _Reads()
        for i, (times, work, distances) in enumerate(self._passes(use.chunk)):
            kv = keys.first if i == 0 else keys.later
            total += times * self._busiest(work[tiered], streamed, unread, distances, 1, slots, below, foresees, kv)
        step = self._busiest(
            self._decode_compute[tiered], streamed, unread, self._decode, self._decode_passes, slots, below, foresees,
            keys.decode,
        )  # fmt: skip
        return total + step * (workload.new_tokens - 1)

    def _passing(self, tier: TierPlan, above: set[str]) -> int:
        """Bytes that go through a tier in every pass: what is pinned in neither, unless there is a slot for each."""
        gone = self._sizes.keys() - above - set(tier.pinned)
        return sum(self._sizes[k] for k in gone) if tier.stream is not None and tier.stream.count < len(gone) else 0

    def _busiest(
        self, work: _Work, streamed: float, unread: float, distances: list[int], passes: int, slots: int, below: int,
        foresees: bool, kv: tuple[float, float],
    ) -> float:  # fmt: skip
        """`kv`: bytes of keys and values moved from and to disk, seconds they are waited for at least."""
        machine, n = self._machine, self._expert_bytes
        total = self._facts.experts if crowded(len(distances) / passes, self._facts.experts) else 0
        up = absent(distances, slots, total) / passes * n
        read = absent(distances, below, total) / passes * n
        rate = machine.link_bytes_per_s or math.inf
        # experts that nobody foresaw are fetched once they are chosen: that hides behind other experts at most
        late = 1 - self._routing.recall if foresees else 1.0
        waits = late * read / machine.disk_bytes_per_s
        if machine.computes_beside and below > 0 and slots != ALL:
            # experts that are not on the device are moved or computed by the CPU, both at once at best
            missed = up / n if n else 0.0
            each = 0.0 if machine.alone else 1 / (rate / n + 1 / work.beside_s) if n and work.beside_s else 0.0
            needed = len(distances) / passes
            there = work.experts_s if machine.alone else work.experts_s * (1 - missed / needed if needed else 1.0)
            chosen, up = work.dense_s + max(there, missed * each, waits), 0.0
        else:
            chosen = work.dense_s + max(work.experts_s, late * up / rate, waits)
        through, waited = kv
        return max(chosen + waited, (streamed + up) / rate, (unread + read + through) / machine.disk_bytes_per_s)

    def _keys(self, chunk: int, kv: KVTiers) -> _Reads:
        """What keys and values cost each of `_passes`, and a step of decoding."""
        known = self._reads.get((chunk, kv))
        if known is None:
            workload = self._workload
            kept = kv.kept_of(workload.context)
            chunks, past, after = chunks_of(workload, chunk), workload.past_tokens, []
            for new in chunks:
                after.append(Pass(workload.batch, new, past))
                past += new
            first, later = after[:1], after[1:]
            # evenly many of a long prompt's
            some = later[len(later) // _SOME // 2 :: -(-len(later) // _SOME)] if later else []
            each = [self._moved(p, kept, kv.ring) for p in (*first, *some, self._middle)]
            means = (sum(x[i] for x in each[1:-1]) / max(1, len(some)) for i in range(2))
            known = self._reads[chunk, kv] = _Reads(each[0], (next(means), next(means)), each[-1])
        return known

    def _moved(self, p: Pass, kept: float, ring: int) -> tuple[float, float]:
        """Bytes from and to disk, and seconds of reading that neither the layer's own attention nor the ring hides."""
        rates, disk = self._machine.rates, self._machine.disk_bytes_per_s
        through = waited = 0.0
        for layer, count in self._alike.items():
            m = cost.moved(layer, p, kept)
            through += count * (m.read + m.written)
            if m.read > ring:
                behind = cost.attention_s(layer, rates, p, self._facts.dtype) * rates.correction(p.tokens) * m.share
                waited += count * max(0.0, (m.read - ring) / disk - behind)
        return through, waited

    def _passes(self, chunk: int) -> list[tuple[float, tuple[_Work, _Work], list[int]]]:
        """(how many, compute without and with tiers of keys and values, reuse distances of the experts) of like passes
        over the prompt."""
        known = self._prefill.get(chunk)
        if known is None:
            facts, workload = self._facts, self._workload
            chunks = chunks_of(workload, chunk)
            routed = tuple((y.experts, y.top_k) for y in facts.layers if y.experts)
            some = tuple(workload.batch * n for n in chunks[:_PASSES])
            first = draw(routed, some, 1, workload.batch, self._routing.repeat, workload.warm)[0]
            known = []
            for i, new in enumerate(chunks[:2]):
                times = 1.0 if i == 0 else sum(chunks[1:]) / new  # the last one may be shorter
                context = workload.past_tokens + (0 if i == 0 else workload.prompt_tokens // 2)
                distances = first[-i].distances if first else ()  # the later ones are like the last one drawn
                work = self._compute(Pass(workload.batch, new, context), [len(d) for d in distances])
                known.append((times, work, sorted(heapq.merge(*distances))))
            self._prefill[chunk] = known
        return known

    def _compute(self, p: Pass, needed: list[int]) -> tuple[_Work, _Work]:
        """Without and with tiers of keys and values."""
        facts, rates = self._facts, self._machine.rates
        dense = rates.step_call_s + cost.head_s(facts, rates, p)
        experts = beside = 0.0
        for layer, count in self._alike.items():
            dense += count * cost.layer_s(facts, layer, rates, p)
        for layer, n in zip((y for y in facts.layers if y.experts), needed, strict=False):
            experts += n * cost.expert_s(facts, layer, rates, p, n)
            if self._machine.host_rates is not None:
                beside = max(beside, cost.expert_s(facts, layer, self._machine.host_rates, p, n))
        more = sum(count * cost.chunkwise_s(facts, layer, rates, p) for layer, count in self._alike.items())
        return _Work(dense, experts, beside), _Work(dense + more, experts, beside)


@dataclass(frozen=True, slots=True)
class _Work:
    """Seconds of compute of a pass: experts, and all else; and of one expert on the CPU beside a device."""

    dense_s: float
    experts_s: float
    beside_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Reads:
    """What keys and values cost the first pass over a prompt, one of the others, and a step of decoding: (bytes from
    and to disk, seconds waited for at least)."""

    first: tuple[float, float] = (0.0, 0.0)
    later: tuple[float, float] = (0.0, 0.0)
    decode: tuple[float, float] = (0.0, 0.0)

"""A plan told to people and to programs: what lives where, how fast that will be, what limits it, what would help."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from offload.describe import Description
from offload.planning.budgets import Budgets, Overrides
from offload.planning.facts import ModelFacts
from offload.planning.machine import Machine, Rates
from offload.planning.placement import device_map
from offload.planning.plan import Plan, TierPlan
from offload.planning.predict import Prediction, Workload, last_step, predict
from offload.planning.routing import EVEN, Routing
from offload.planning.search import Chosen, choose
from offload.sizes import ceil_mib, format_size
from tiers import BudgetError

BATCHES = (1, 4, 16, 64, 256)  # sequences at once that are tried for the best throughput
_GUESSES, _RIGHT = 4, 3  # the speculation that the what-if imagines
_ENOUGH = 1.01  # a larger batch must be this much faster to be worth its memory


@dataclass(frozen=True, slots=True)
class Row:
    """`nbytes` of `what` in `tier`; `share` of the model's weights, or of the context's keys and values."""

    tier: str
    what: str
    nbytes: int
    share: float | None = None
    of: str = "weights"


@dataclass(frozen=True, slots=True)
class WhatIf:
    """A change and the decode rate it would bring; `gain` is over the present one. Not `available`: not built yet."""

    change: str
    decode_tokens_per_s: float | None
    gain: float | None
    available: bool
    bottleneck: str | None = None


@dataclass(frozen=True)
class Report:
    """Everything there is to say about a plan."""

    facts: ModelFacts
    machine: Machine
    workload: Workload
    plan: Plan
    prediction: Prediction
    batch: Prediction | None  # at the batch with the best throughput
    batch_workload: Workload | None
    placement: tuple[Row, ...]
    what_if: tuple[WhatIf, ...]
    smallest: dict[str, int]
    device_map: dict[str, int | str]  # the placement in accelerate's words

    def as_json(self) -> dict[str, Any]:
        """Plain values, for `offload plan --json`."""
        p, f = self.prediction, self.facts
        return {
            "model": {
                "name": f.name, "type": f.model_type, "dtype": f.dtype, "params": f.params,
                "active_params": f.active_params, "weight_bytes": f.weight_bytes, "layers": len(f.layers),
                "experts": f.experts, "kv_bytes_per_token": f.kv_bytes_per_token, "flops_per_token": f.flops_per_token,
                "bytes_per_token": f.bytes_per_token, "max_context": f.max_context, "notes": list(f.notes),
            },
            "machine": {
                "name": self.machine.name, "measured": self.machine.measured, "ram_bytes": self.machine.ram_bytes,
                "vram_bytes": self.machine.vram_bytes, "disk_bytes_per_s": self.machine.disk_bytes_per_s,
                "link_bytes_per_s": self.machine.link_bytes_per_s,
            },
            "workload": asdict(self.workload),
            "budgets": {"ram": self.plan.ram, "vram": self.plan.vram},
            "placement": [asdict(r) for r in self.placement],
            "context": self.plan.context,
            "kv": {
                "tiered": self.plan.kv_tiered, "share": self.plan.kv_share, "memory_bytes": self.plan.kv,
                "disk_bytes": _spilled(f, self.plan),
            },
            "prefill_chunk": self.plan.prefill_chunk,
            "lookahead": self.plan.compute.lookahead,
            "expert_slots": self.plan.expert_slots,
            "experts_total": self.plan.experts_total,
            "predicted_decode_tokens_per_s": p.decode_tokens_per_s,
            "predicted_ttft_s": p.ttft_s,
            "bottleneck": p.bottleneck,
            "hit_rate": p.hit_rate,
            "share_of_floor": p.share_of_floor,
            "decode_step": asdict(p.decode),
            "prefill": asdict(p.prefill),
            "batch": None if self.batch is None or self.batch_workload is None else {
                "sequences": self.batch_workload.batch, "tokens_per_s": self.batch.decode_tokens_per_s,
                "bottleneck": self.batch.bottleneck,
            },
            "what_if": [asdict(w) for w in self.what_if],
            "smallest": self.smallest,
            "simulated": p.simulated,
            "assumptions": assumptions(self.machine, self.facts, self.workload, p),
        }  # fmt: skip

    def step(self) -> list[tuple[str, str, float, float]]:
        """(lane, name, start, end) of one predicted decode step, in seconds."""
        return last_step(self.facts, self.plan, self.machine, self.workload, self.prediction.routing)

    def text(self) -> str:
        """Lines for a terminal."""
        return "\n".join(_lines(self))


def report(
    described: Description, budgets: Budgets, machine: Machine, workload: Workload, routing: Routing = EVEN,
    overrides: Overrides | None = None, *, alternatives: bool = True,
) -> tuple[Report, Chosen]:  # fmt: skip
    """Plan for `workload` and tell. Without `alternatives`, batches and what-ifs are left out. Raises as `choose`."""
    chosen = choose(described, budgets, machine, workload, routing, overrides)
    batch = _best_batch(described, budgets, machine, workload, routing) if alternatives else None
    rows = tuple(_what_if(described, budgets, machine, workload, routing, chosen)) if alternatives else ()
    told = tell(described, machine, chosen, batch, rows)
    return told, chosen


def tell(
    described: Description, machine: Machine, chosen: Chosen, batch: Chosen | None = None,
    what_if: tuple[WhatIf, ...] = (),
) -> Report:  # fmt: skip
    """The report of a plan that is there already."""
    plan, facts = chosen.plan, described.facts
    smallest = {"ram": plan.smallest_ram} | ({"vram": plan.smallest} if plan.device is not None else {})
    return Report(
        facts, machine, chosen.workload, plan, chosen.prediction, batch.prediction if batch else None,
        batch.workload if batch else None, tuple(_placement(facts, plan)), what_if, smallest,
        device_map(described.layout, plan),
    )  # fmt: skip


def assumptions(machine: Machine, facts: ModelFacts, workload: Workload, prediction: Prediction) -> list[str]:
    """What the prediction stands on."""
    said = [*machine.assumptions, *facts.notes]
    said.append(
        f"{workload.batch} × {workload.prompt_tokens} prompt tokens, {workload.new_tokens} new ones each"
        + (", expert cache warm" if workload.warm else "")
    )
    if facts.experts:
        routing = prediction.routing
        said.append(
            f"{100 * routing.repeat:.0f}% of a token's experts were the token's before, the others even"
            if routing.repeat
            else "experts chosen evenly: real routers repeat themselves, which is faster"
        )
        if routing.recall:
            said.append(f"{100 * routing.recall:.0f}% of the experts foreseen a layer ahead, as in earlier runs")
        else:
            said.append("no expert foreseen: how many are is learned by running the model")
    said.append("transfers are slowed by nothing else on the machine")
    return said


def _placement(facts: ModelFacts, plan: Plan) -> Iterator[Row]:
    sizes = {key: n for layer in facts.layers for key, n in layer.parts} | dict(facts.head) | {"rest": facts.rest_bytes}
    weights = max(1, facts.weight_bytes)
    expert = max((y.expert_bytes for y in facts.layers), default=0)

    def tier(name: str, t: TierPlan) -> Iterator[Row]:
        dense = sum(sizes.get(k, 0) for k in t.pinned)
        if dense:
            yield Row(name, "dense weights that stay", dense, dense / weights)
        if t.stream is not None:
            yield Row(name, f"{t.stream.count} slots for streamed ones", t.stream.count * t.stream.slot_nbytes)
        if t.expert_slots:
            cached = t.expert_slots * expert
            yield Row(name, f"{t.expert_slots} of {facts.experts} experts", cached, cached / weights)

    compute = "device" if plan.device is not None else "host"
    if plan.device is not None:
        yield from tier("device", plan.device)
    if plan.kv_tiers is None:
        yield Row(compute, f"KV for {plan.context} tokens", plan.kv)
    else:
        yield Row(compute, f"KV of {plan.kv_tiers.kept:.0f} of {plan.context} tokens", plan.kv, plan.kv_share, "KV")
    yield Row(compute, f"temporaries of {plan.prefill_chunk} tokens at once", plan.activations)
    yield from tier("host", plan.host)
    yield Row("host", "interpreter and libraries", plan.base)
    held = set(plan.host.pinned) | set(plan.device.pinned if plan.device is not None else ())
    streamed = sum(n for k, n in sizes.items() if k not in held)
    if streamed:
        yield Row("disk", "dense weights that are streamed", streamed, streamed / weights)
    rest = facts.experts - max(plan.expert_slots, plan.host.expert_slots)  # RAM holds the device's experts too
    if rest:
        yield Row("disk", f"{rest} experts read when chosen", rest * expert, rest * expert / weights)
    if spilled := _spilled(facts, plan):
        assert plan.kv_tiers is not None
        gone = plan.context - plan.kv_tiers.kept
        yield Row("disk", f"KV of {gone:.0f} tokens, read in every pass", spilled, 1 - plan.kv_share, "KV")
    yield Row("disk", "embedding rows, read as needed", facts.embedding_bytes, facts.embedding_bytes / weights)


def _spilled(facts: ModelFacts, plan: Plan) -> int:
    """Bytes of keys and values on disk once the context is full, what windows have left behind included."""
    if plan.kv_tiers is None:
        return 0
    each = sum(y.kv_bytes for y in facts.layers if y.spills)
    return round(each * (plan.context - plan.kv_tiers.kept))


def _best_batch(
    described: Description, budgets: Budgets, machine: Machine, workload: Workload, routing: Routing
) -> Chosen | None:
    best: Chosen | None = None
    for n in BATCHES:
        many = replace(workload, batch=n)
        if many.context > described.demand.max_context * n:
            break
        try:
            found = choose(described.for_batch(n), replace(budgets, context=many.context), machine, many, routing)
        except BudgetError:
            break
        if best is not None and found.prediction.decode_tokens_per_s < _ENOUGH * best.prediction.decode_tokens_per_s:
            break
        best = found
    return best


def _what_if(
    described: Description, budgets: Budgets, machine: Machine, workload: Workload, routing: Routing, now: Chosen
) -> Iterator[WhatIf]:
    present = now.prediction.decode_tokens_per_s

    def row(change: str, b: Budgets, m: Machine, d: Description = described, available: bool = True) -> WhatIf:
        try:
            p = choose(d, b, m, workload, routing).prediction
        except BudgetError:
            return WhatIf(change, None, None, available)
        return WhatIf(change, p.decode_tokens_per_s, p.decode_tokens_per_s / present, available, p.bottleneck)

    more = _round_up(budgets.ram // 4)
    yield row(f"+{format_size(more)} RAM", replace(budgets, ram=budgets.ram + more), machine)
    yield row(f"+{format_size(budgets.ram)} RAM (twice)", replace(budgets, ram=2 * budgets.ram), machine)
    if budgets.vram is not None:
        more = _round_up(budgets.vram // 2)
        yield row(f"+{format_size(more)} VRAM", replace(budgets, vram=budgets.vram + more), machine)
    yield row("a disk twice as fast", budgets, replace(machine, disk_bytes_per_s=2 * machine.disk_bytes_per_s))
    if machine.link_bytes_per_s is not None:
        yield row("a link twice as fast", budgets, replace(machine, link_bytes_per_s=2 * machine.link_bytes_per_s))
    yield row(
        "compute twice as fast",
        budgets,
        replace(
            machine, rates=_twice(machine.rates), host_rates=_twice(machine.host_rates) if machine.host_rates else None
        ),
    )
    # products of quantised weights are taken to cost what they save in bytes and no more
    if not any("cannot be run" in n for n in described.facts.notes):
        yield row("int8 weights", budgets, machine, _shrunk(described, 2), available=False)
        yield row("int4 weights", budgets, machine, _shrunk(described, 4), available=False)
    # one pass verifies the guesses and the token before them; those that are right, and one more, are kept
    guessed = predict(described.facts, now.plan, machine, replace(workload, batch=_GUESSES + 1), routing)
    rate = (_RIGHT + 1) / guessed.decode.seconds
    change = f"speculation, {_RIGHT} of {_GUESSES} guesses right, drafting free"
    yield WhatIf(change, rate, rate / present, False, guessed.bottleneck)


def _twice(r: Rates) -> Rates:
    return replace(
        r,
        linear={d: tuple((t, s / 2, c / 2) for t, s, c in points) for d, points in r.linear.items()},
        attention_bytes_per_s=2 * r.attention_bytes_per_s,
        attention_flops_per_s=2 * r.attention_flops_per_s,
        elementwise_s=r.elementwise_s / 2,
        layer_call_s=r.layer_call_s / 2,
        expert_call_s=r.expert_call_s / 2,
        step_call_s=r.step_call_s / 2,
    )


def _shrunk(described: Description, by: int) -> Description:
    """The same model with matrices of the layers at a fraction of their bytes."""
    from offload.describe import resize
    from offload.planning.facts import facts_of

    itemsize = described.layout.dtype.itemsize
    layout = resize(described.layout, lambda name, shape: _product(shape) * itemsize // (by if len(shape) > 1 else 1))
    facts = facts_of(layout, described.config, described.facts.name, described.facts.notes)
    return replace(described, layout=layout, facts=facts)


def _product(shape: tuple[int, ...]) -> int:
    n = 1
    for s in shape:
        n *= s
    return n


def _round_up(n: int) -> int:
    unit = 1 << 30 if n >= 1 << 29 else 64 << 20
    return max(1, -(-n // unit)) * unit


def _lines(r: Report) -> Iterator[str]:
    f, p, m = r.facts, r.prediction, r.machine
    label = "simulated" if p.simulated else "predicted"
    active = f", {_count(f.active_params)} active" if f.experts else ""
    yield f"{f.name}: {_count(f.params)} parameters{active}, {format_size(f.weight_bytes)} in {f.dtype}"
    link = f", link {m.link_bytes_per_s / 1e9:.3g} GB/s" if m.link_bytes_per_s is not None else ""
    vram = f", VRAM {format_size(r.plan.vram)}" if r.plan.device is not None else ""
    yield f"on {m.name}: RAM {format_size(r.plan.ram)}{vram}, disk {m.disk_bytes_per_s / 1e9:.3g} GB/s{link}"
    yield ""
    for row in r.placement:
        share = f"{100 * row.share:5.1f}% of the {row.of}" if row.share is not None else ""
        yield f"  {row.tier:<7} {row.what:<38} {format_size(row.nbytes):>10}  {share}".rstrip()
    yield ""
    yield (
        f"  {label:<10} {p.decode_tokens_per_s:.3g} tokens/s, first token after {_seconds(p.ttft_s)} "
        f"({r.workload.batch} × {r.workload.prompt_tokens} prompt tokens)"
    )
    if r.batch is not None and r.batch_workload is not None:
        yield f"  {'in batches':<10} {r.batch.decode_tokens_per_s:.3g} tokens/s with {r.batch_workload.batch} at once"
    yield f"  {'limit':<10} {bottleneck(p, m)}"
    if r.what_if:
        yield ""
        yield "  what would help"
        for w in r.what_if:
            rate = f"{w.decode_tokens_per_s:8.3g} tokens/s" if w.decode_tokens_per_s is not None else "  too small"
            gain = f"{w.gain:5.2f}×" if w.gain is not None else ""
            yield f"  {w.change:<44}{rate} {gain}{'' if w.available else '  (not available yet)'}"
    yield ""
    least = ", ".join(f"--{k} {ceil_mib(v)}" for k, v in r.smallest.items())
    yield f"  smallest that works: {least}"
    for line in assumptions(m, f, r.workload, p):
        yield f"  · {line}"


def bottleneck(p: Prediction, m: Machine) -> str:
    """One sentence: what a decode step waits for."""
    d = p.decode
    if p.bottleneck == "disk":
        keys = f", {d.kv_read / 1e9:.3g} of them keys and values" if d.kv_read else ""
        return f"disk: {d.bytes_read / 1e9:.3g} GB read per step{keys} at {m.disk_bytes_per_s / 1e9:.3g} GB/s"
    if p.bottleneck == "link" and m.link_bytes_per_s is not None:
        return f"link: {d.bytes_up / 1e9:.3g} GB up per step at {m.link_bytes_per_s / 1e9:.3g} GB/s"
    return f"compute: {_seconds(d.compute_s)} of {_seconds(d.seconds)} per step"


def _count(n: int) -> str:
    return f"{n / 1e9:.3g}B" if n >= 1e9 else f"{n / 1e6:.3g}M"


def _seconds(s: float) -> str:
    return f"{s:.3g} s" if s >= 0.1 else f"{1000 * s:.3g} ms"

"""Facts, machine, plan and workload in; tokens per second, time to first token and what limits them out.

Prefill and decode are predicted apart, on one virtual clock: decoding begins with what the prompt left in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from offload.planning.cost import Pass
from offload.planning.facts import ModelFacts
from offload.planning.keys import KVTiers
from offload.planning.machine import Machine
from offload.planning.plan import Plan, TierPlan
from offload.planning.routing import EVEN, PassMisses, Routing, draw
from offload.planning.timeline import Placement, Streams, Timeline, Usage

ALL = 1 << 61  # slots for every expert, filled beforehand
_SAMPLED = 8  # passes simulated of a long prompt; the others are like their neighbours
_DENSE_STEPS = 3  # decode steps simulated where nothing is random; the first one is not counted


@dataclass(frozen=True, slots=True)
class Workload:
    """What is to be run: `batch` sequences of `prompt_tokens`, each continued by `new_tokens`.

    `past_tokens` of each are in the KV cache already; `warm`: an earlier request has filled the expert cache.
    """

    prompt_tokens: int = 512
    new_tokens: int = 128
    batch: int = 1
    past_tokens: int = 0
    warm: bool = False

    @property
    def context(self) -> int:
        """Tokens of KV, all sequences together."""
        return self.batch * (self.past_tokens + self.prompt_tokens + self.new_tokens)


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a plan will do. Usages are per pass: of the whole prompt, and of a mean decode step.

    `decode_tokens_per_s` counts all sequences. `share_of_floor` is the least time any schedule could need over the
    predicted one: the busiest resource's. `hit_rate` is by bytes of the blocks a decode step needs.
    """

    ttft_s: float
    decode_tokens_per_s: float
    prefill: Usage
    decode: Usage
    hit_rate: float
    bottleneck: str
    simulated: bool
    routing: Routing

    @property
    def share_of_floor(self) -> float:
        """Busiest resource over wall time of a decode step; 1 is perfect overlap."""
        busy = max(self.decode.compute_s, self.decode.disk_s, self.decode.link_s)
        return busy / self.decode.seconds if self.decode.seconds else 1.0

    def total_s(self, workload: Workload) -> float:
        """Seconds of the whole request."""
        return self.ttft_s + (workload.new_tokens - 1) * self.decode.seconds


def placement(
    facts: ModelFacts, device: TierPlan | None, host: TierPlan, kv: KVTiers | None = None, context: int = 0
) -> Placement:
    """What streams where, from the tiers of a plan; `kv` for a request that grows to `context` tokens."""
    compute = device if device is not None else host
    blocks = [b for layer in facts.layers for b in layer.parts] + list(facts.head)
    kept = set(compute.pinned)
    away = tuple(b for b in blocks if b[0] not in kept)
    below = None
    if device is not None:
        held = set(host.pinned)
        below = Streams(tuple(b for b in away if b[0] not in held), host.stream.count if host.stream else 0)
    streams = Streams(away, compute.stream.count if compute.stream else 0)
    slots = compute.expert_slots
    loaded = not away and slots == facts.experts  # nothing moves any more: experts are there before the first pass
    beside = host.expert_slots if device is not None else 0
    heads = {key for key, _ in facts.head}
    foresees = all(key in heads for key, _ in away)
    tokens, ring = (kv.kept_of(context), kv.ring) if kv is not None else (None, 0)
    return Placement(streams, below, ALL if loaded else slots, beside, foresees, tokens, ring)


def predict(facts: ModelFacts, plan: Plan, machine: Machine, workload: Workload, routing: Routing = EVEN) -> Prediction:
    """How fast `plan` runs `workload`, with what is known of the router."""
    where = placement(facts, plan.device, plan.host, plan.kv_tiers, workload.context)
    return simulate(facts, where, plan.prefill_chunk, machine, workload, routing)[0]


def simulate(
    facts: ModelFacts, where: Placement, chunk: int, machine: Machine, workload: Workload, routing: Routing = EVEN
) -> tuple[Prediction, Timeline]:
    """A request on the virtual clock, and the timeline it left."""
    chunks = chunks_of(workload, chunk)
    steps = max(1, workload.new_tokens - 1)
    first: tuple[PassMisses, ...] = ()
    then: tuple[PassMisses, ...] = ()
    routed = tuple((y.experts, y.top_k) for y in facts.layers if y.experts)
    if routed:
        tokens = tuple(workload.batch * n for n in chunks)
        first, then = draw(routed, tokens, steps, workload.batch, routing.repeat, workload.warm)
    timeline = Timeline(facts, machine, where, routing)
    prefill = Usage()
    past = workload.past_tokens
    stride = max(1, -(-len(chunks) // _SAMPLED))
    for i in range(0, len(chunks), stride):
        group = chunks[i : i + stride]
        misses = first[min(i, len(first) - 1)] if first else None
        middle = past + sum(group) // 2 - group[0] // 2
        _add(prefill, timeline.run(Pass(workload.batch, group[0], middle), misses), sum(group) / group[0])
        past += sum(group)
    decode = _decode(timeline, workload, steps, then)
    needed = facts.bytes_per_token if not routed else _needed(facts, then)
    up = decode.bytes_up if machine.link_bytes_per_s is not None else decode.bytes_read - decode.kv_read
    prediction = Prediction(
        ttft_s=prefill.seconds,
        decode_tokens_per_s=workload.batch / decode.seconds,
        prefill=prefill,
        decode=decode,
        hit_rate=1 - min(1.0, up / needed) if needed else 1.0,
        bottleneck=decode.bottleneck,
        simulated=not machine.measured,
        routing=routing,
    )
    return prediction, timeline


def last_step(
    facts: ModelFacts, plan: Plan, machine: Machine, workload: Workload, routing: Routing = EVEN
) -> list[tuple[str, str, float, float]]:
    """(lane, name, start, end) of the last decode step simulated, from its own start, in seconds."""
    where = placement(facts, plan.device, plan.host, plan.kv_tiers, workload.context)
    _, timeline = simulate(facts, where, plan.prefill_chunk, machine, workload, routing)
    began = timeline.last_began
    return [(lane, name, max(0.0, a - began), b - began) for lane, name, a, b in timeline.slices if b > began]


def chunks_of(workload: Workload, chunk: int) -> list[int]:
    """New tokens per sequence of each pass over the prompt, as the engine cuts it."""
    each = max(1, chunk // workload.batch)
    whole, left = divmod(workload.prompt_tokens, each)
    return [each] * whole + ([left] if left else [])


def _decode(timeline: Timeline, workload: Workload, steps: int, misses: tuple[PassMisses, ...]) -> Usage:
    """A mean decode step."""
    middle = workload.past_tokens + workload.prompt_tokens + steps // 2
    if not misses:
        count = _DENSE_STEPS if steps > 1 else 1
        runs = [timeline.run(Pass(workload.batch, 1, middle), None) for _ in range(count)]
        return _mean(runs[1:] or runs, [1.0] * max(1, count - 1))
    runs = [timeline.run(Pass(workload.batch, 1, middle), m) for m in misses[:steps]]
    weights = [1.0] * len(runs)
    tail = max(1, len(runs) // 4)
    for i in range(len(runs) - tail, len(runs)):
        weights[i] += (steps - len(runs)) / tail  # the steps not drawn are like the last ones
    return _mean(runs, weights)


def _needed(facts: ModelFacts, misses: tuple[PassMisses, ...]) -> float:
    """Bytes of the blocks a decode step needs, mean over the steps drawn."""
    dense = sum(y.dense_bytes for y in facts.layers) + facts.head_bytes
    sizes = [y.expert_bytes for y in facts.layers if y.experts]
    return dense + sum(n * m.needed(i) for m in misses for i, n in enumerate(sizes)) / len(misses)


def _add(total: Usage, one: Usage, times: float = 1.0) -> None:
    for f in fields(Usage):
        setattr(total, f.name, getattr(total, f.name) + times * getattr(one, f.name))


def _mean(runs: list[Usage], weights: list[float]) -> Usage:
    out = Usage()
    for run, weight in zip(runs, weights, strict=True):
        _add(out, run, weight / sum(weights))
    return out

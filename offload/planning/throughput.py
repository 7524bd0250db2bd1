"""How many sequences a batch job runs at once: as many as are predicted to give most tokens per second.

A pass over the weights serves all running sequences, each with its next token, and pieces of the prompts of those that
have just joined. More sequences share what a pass must read; their keys and values take memory from weights. Which of
the two weighs more is the planner's to say, for each number of sequences (FlexGen, https://arxiv.org/abs/2303.06865,
solves for the block of a zig-zag schedule; MoE-Lens, https://arxiv.org/abs/2504.09345, for how many fit).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from offload.config import Job
from offload.describe import Description
from offload.planning.budgets import Budgets, Overrides
from offload.planning.facts import ModelFacts
from offload.planning.fit import CHUNKS, MAX_CHUNK
from offload.planning.machine import Machine
from offload.planning.plan import Plan
from offload.planning.predict import Workload, placement, simulate
from offload.planning.routing import EVEN, Routing
from offload.planning.search import choose
from offload.planning.timeline import Usage
from tiers import BudgetError, UsageError

MOST = 256  # sequences at once, unless somebody asks for more
_WORTH = 1.02  # more sequences must be this much faster
_STEPS = 8  # of the virtual clock, for a mean one
_ENOUGH = 0.88  # of the most tokens per second that any width gives


@dataclass(frozen=True, slots=True)
class Rate:
    """What is expected of `sequences` at once, in passes of up to `width` tokens: `pass_tokens` of a usual pass, which
    takes `pass_s`; tokens per second of answers, and of prompts and answers together."""

    sequences: int
    width: int
    pass_tokens: int
    pass_s: float
    new_tokens_per_s: float
    tokens_per_s: float
    bottleneck: str


def rate(
    facts: ModelFacts, plan: Plan, machine: Machine, job: Job, sequences: int, routing: Routing = EVEN
) -> Rate:  # fmt: skip
    """How fast `plan` runs `job` once it is under way: in each pass one token of every sequence that has its prompt,
    and as much of prompts as keeps the number of sequences up."""
    width = max(sequences, width_of(facts, plan, machine, job, sequences, routing))
    tokens = max(1, min(pace(job, sequences), width))
    passes = max(job.new_tokens, sequences * job.each / tokens)  # in which `sequences` begin and end
    usage = _usage(facts, plan, machine, job, tokens, sequences, routing)
    seconds = usage.seconds * passes
    return Rate(
        sequences, width, tokens, usage.seconds, sequences * job.new_tokens / seconds, sequences * job.each / seconds,
        usage.bottleneck,
    )  # fmt: skip


def pace(job: Job, sequences: int) -> int:
    """Tokens of a pass with which as many sequences begin as end."""
    return min(MAX_CHUNK, max(sequences, round(sequences * job.each / job.new_tokens)))


def width_of(
    facts: ModelFacts, plan: Plan, machine: Machine, job: Job, sequences: int, routing: Routing = EVEN
) -> int:  # fmt: skip
    """The narrowest pass that gives about as many tokens per second as any the plan has room for.

    What a pass reads is the same whatever its width, so a narrow one waits for the disk; from some width on computing
    takes longer than reading, and wider passes gain nothing. They would lose: while there are prompts left, decoding
    rides along for free, and once there are none it has passes that are mostly reading to itself.
    """
    most = max(plan.prefill_chunk, sequences)
    tried = sorted({w for c in CHUNKS for w in (c, c * 3 // 2) if sequences <= w <= most} | {most})
    speed = {w: w / _usage(facts, plan, machine, job, w, sequences, routing).seconds for w in tried}
    best = max(speed.values())
    return next(w for w in tried if speed[w] >= _ENOUGH * best)


def compute_s(
    facts: ModelFacts, plan: Plan, machine: Machine, job: Job, tokens: int, sequences: int, routing: Routing = EVEN
) -> float:  # fmt: skip
    """Seconds of computing in a pass of `tokens` tokens of `sequences`, without waiting for any byte."""
    return _usage(facts, plan, machine, job, tokens, sequences, routing).compute_s


def _usage(
    facts: ModelFacts, plan: Plan, machine: Machine, job: Job, tokens: int, sequences: int, routing: Routing
) -> Usage:  # fmt: skip
    """A usual pass. Every token reads what its sequence holds; those of a prompt share that among them."""
    context = round(sequences / tokens * (job.prompt_tokens + job.new_tokens / 2))
    steady = Workload(1, _STEPS, tokens, max(1, context), warm=True)
    where = placement(facts, plan.device, plan.host, plan.kv_tiers, plan.context)
    return simulate(facts, where, max(tokens, plan.prefill_chunk), machine, steady, routing)[0].decode


@dataclass(frozen=True, slots=True)
class Found:
    """A plan for a job, what is expected of it, and of the other numbers of sequences that were looked at."""

    plan: Plan
    rate: Rate
    others: tuple[Rate, ...] = ()


def choose_job(
    described: Description, budgets: Callable[[int], Budgets], machine: Machine, job: Job, routing: Routing = EVEN,
    overrides: Overrides | None = None,
) -> Found:  # fmt: skip
    """The best plan for `job`, with as many sequences at once as it asks for, or as many as are fastest.

    `budgets` of a number of sequences. Raises `BudgetError` and `UsageError` where not even one fits.
    """
    rates: list[Rate] = []
    best: Found | None = None
    for n in (job.sequences,) if job.sequences is not None else _numbers(job.requests):
        workload = Workload(job.prompt_tokens, job.new_tokens, n)
        try:
            # wide enough to keep pace: prompts ride along with decoding
            plan = choose(
                described.for_job(n), budgets(n), machine, workload, routing, overrides, max(32, pace(job, n))
            ).plan
            width = width_of(described.facts, plan, machine, job, n, routing)
            if 2 * width <= plan.prefill_chunk:  # room for temporaries that are not needed is room for weights
                plan = choose(described.for_job(n), budgets(n), machine, workload, routing, overrides, width).plan
        except (BudgetError, UsageError):
            if best is None:
                raise
            break
        found = rate(described.facts, plan, machine, job, n, routing)
        rates.append(found)
        if best is None or found.new_tokens_per_s > _WORTH * best.rate.new_tokens_per_s:
            best = Found(plan, found)
        elif found.new_tokens_per_s < best.rate.new_tokens_per_s / 2:
            break  # it will not get better
    assert best is not None
    return replace(best, others=tuple(rates))


def _numbers(requests: int) -> list[int]:
    """Powers of two up to all requests, and all of them."""
    most = max(1, min(requests, MOST))
    return sorted({1 << i for i in range(most.bit_length()) if 1 << i <= most} | {most})

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
from offload.planning.fit import MAX_CHUNK
from offload.planning.machine import Machine
from offload.planning.plan import Plan
from offload.planning.predict import Workload, placement, simulate
from offload.planning.routing import EVEN, Routing
from offload.planning.search import choose
from tiers import BudgetError, UsageError

MOST = 256  # sequences at once, unless somebody asks for more
_WORTH = 1.02  # more sequences must be this much faster
_STEPS = 8  # of the virtual clock, for a mean one


@dataclass(frozen=True, slots=True)
class Rate:
    """What is expected of `sequences` at once. `pass_tokens` of a pass, which takes `pass_s`; tokens per second of
    answers, and of prompts and answers together."""

    sequences: int
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
    tokens = max(1, min(pace(job, sequences), max(plan.prefill_chunk, sequences)))
    passes = max(job.new_tokens, sequences * job.each / tokens)  # in which `sequences` begin and end
    # every token reads what its sequence holds; those of a prompt share that among them
    context = round(sequences / tokens * (job.prompt_tokens + job.new_tokens / 2))
    steady = Workload(1, _STEPS, tokens, max(1, context), warm=True)
    where = placement(facts, plan.device, plan.host, plan.kv_tiers, plan.context)
    usage = simulate(facts, where, max(tokens, plan.prefill_chunk), machine, steady, routing)[0].decode
    seconds = usage.seconds * passes
    return Rate(
        sequences, tokens, usage.seconds, sequences * job.new_tokens / seconds, sequences * job.each / seconds,
        usage.bottleneck,
    )  # fmt: skip


def pace(job: Job, sequences: int) -> int:
    """Tokens of a pass with which as many sequences begin as end."""
    return min(MAX_CHUNK, max(sequences, round(sequences * job.each / job.new_tokens)))


def compute_s(
    facts: ModelFacts, plan: Plan, machine: Machine, job: Job, tokens: int, sequences: int, routing: Routing = EVEN
) -> float:  # fmt: skip
    """Seconds of computing in a pass of `tokens` tokens of `sequences`, without waiting for any byte."""
    context = round(sequences / tokens * (job.prompt_tokens + job.new_tokens / 2))
    steady = Workload(1, _STEPS, tokens, max(1, context), warm=True)
    where = placement(facts, plan.device, plan.host, plan.kv_tiers, plan.context)
    return simulate(facts, where, max(tokens, plan.prefill_chunk), machine, steady, routing)[0].decode.compute_s


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

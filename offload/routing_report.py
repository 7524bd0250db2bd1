"""What a recorded routing trace says: how unevenly experts are used, how often they repeat, what a cache would hit."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe import RoutingTrace
from moe.belady import Belady
from moe.replay import replay
from offload.planning.facts import ModelFacts
from tiers import LRU, EvictionPolicy, UsageError

SHARES = (0.25, 0.5, 0.75)  # of all experts: the caches that are replayed
_MOST = 1 << 17  # experts needed in what is replayed; one takes some 20 us, all caches together


@dataclass(frozen=True, slots=True)
class CacheHits:
    """A cache of `slots` experts, `share` of all, filled on demand: the share of experts needed that it held."""

    share: float
    slots: int
    lru: float
    belady: float  # with the future known


@dataclass(frozen=True)
class RoutingReport:
    """Layers are those that have experts. `relative[layer][e]`: expert e's use, 1 if all were used evenly.

    `repeats` is the share of choices that were the previous token's, `chance` what it would be by chance. `effective`
    is, for each layer, how many evenly used experts would be as hard to foresee (two to the entropy in bits).
    `replayed`: of how many passes, the last ones, `caches` tells.
    """

    name: str
    experts: tuple[int, ...]
    top_k: int
    passes: int
    tokens: int
    repeats: float
    chance: float
    relative: tuple[tuple[float, ...], ...]
    effective: tuple[float, ...]
    caches: tuple[CacheHits, ...]
    replayed: int

    def check(self, facts: ModelFacts) -> None:
        """Raises `UsageError` if the trace cannot be one of this model."""
        experts = tuple(layer.experts for layer in facts.layers if layer.experts)
        top_k = max((layer.top_k for layer in facts.layers), default=0)
        if (experts, top_k) != (self.experts, self.top_k):
            own = _shape(experts, top_k) if experts else "no experts"
            raise UsageError(
                f"{self.name} was recorded from another model: it has {_shape(self.experts, self.top_k)}, {facts.name} "
                f"has {own}"
            )

    def as_json(self) -> dict[str, Any]:
        """Plain values, for `offload plan --json`. Use itself is in the picture only."""
        e = self.effective
        return {
            "name": self.name, "layers": len(self.experts), "experts": list(self.experts), "top_k": self.top_k,
            "passes": self.passes, "tokens": self.tokens, "repeats": self.repeats, "repeats_by_chance": self.chance,
            "effective_experts": {"min": min(e), "median": statistics.median(e), "max": max(e), "layers": list(e)},
            "caches": [asdict(c) for c in self.caches], "replayed_passes": self.replayed,
        }  # fmt: skip

    def facts(self) -> str:
        """One line: how large the trace is."""
        tokens, passes = _count(self.tokens, "token"), _count(self.passes, "pass", "passes")
        return f"{_shape(self.experts, self.top_k)}; {tokens} in {passes}"

    def text(self) -> str:
        """Lines for a terminal."""
        return "\n".join(_lines(self))


def routing_report(path: Path) -> RoutingReport:
    """Read a trace (`moe.RoutingTrace.save`) and tell. Raises `UsageError` (no such file, empty) or `ModelError`."""
    trace = RoutingTrace.load(path)
    if not len(trace):
        raise UsageError(f"{path} holds no passes: record it while the model generates")
    use, k = trace.use(), trace.top_k
    recent = _recent(trace)
    chosen = [u / u.sum() for u in use]
    return RoutingReport(
        name="".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in path.name),
        experts=trace.experts,
        top_k=k,
        passes=len(trace),
        tokens=trace.tokens,
        repeats=trace.repeats(),
        chance=statistics.fmean(min(1.0, k / e) for e in trace.experts),
        relative=tuple(tuple((p * len(p)).tolist()) for p in chosen),
        effective=tuple(math.exp(-sum(x * math.log(x) for x in p.tolist() if x)) for p in chosen),
        caches=tuple(_hits(recent, share) for share in SHARES),
        replayed=len(recent),
    )


def _hits(trace: RoutingTrace, share: float) -> CacheHits:
    slots = max(1, round(share * sum(trace.experts)))

    def rate(policy: EvictionPolicy) -> float:
        total = replay(trace, slots, policy).total
        return total.hits / total.needed

    return CacheHits(share, slots, rate(LRU()), rate(Belady(trace)))


def _recent(trace: RoutingTrace) -> RoutingTrace:
    """The last passes, as many as can be replayed in a few seconds, but one at least."""
    needed = count = 0
    for p in reversed(tuple(trace)):
        needed += sum(len(r.needed()) for r in p)
        if count and needed > _MOST:
            break
        count += 1
    return trace[len(trace) - count :]


def _shape(experts: tuple[int, ...], top_k: int) -> str:
    wide = f"{min(experts)}" if min(experts) == max(experts) else f"{min(experts)} to {max(experts)}"
    return f"{_count(len(experts), 'layer')} of {wide} experts, {top_k} for each token"


def _count(n: int, one: str, many: str = "") -> str:
    return f"{n} {one if n == 1 else many or one + 's'}"


def _lines(r: RoutingReport) -> Iterator[str]:
    yield f"{r.name}: {r.facts()}"
    yield ""
    low, middle, high = min(r.effective), statistics.median(r.effective), max(r.effective)
    repeats = f"{100 * r.repeats:5.1f}%  were the previous token's; {100 * r.chance:.1f}% by chance"
    for what, said in (
        ("choices that repeat", repeats),
        ("effective experts", f"{middle:6.1f}  in the median layer, {low:.1f} to {high:.1f}"),
        ("in a cache of", "".join(f"{f'{100 * c.share:.0f}% of all':>13}" for c in r.caches)),
        ("  experts", "".join(f"{c.slots:13d}" for c in r.caches)),
        ("  found there, LRU", "".join(f"{100 * c.lru:12.1f}%" for c in r.caches)),
        ("  with Belady's choice", "".join(f"{100 * c.belady:12.1f}%" for c in r.caches)),
    ):
        yield f"  {what:<24}{said}"
    if r.replayed < r.passes:
        yield f"  · caches: the last {_count(r.replayed, 'pass', 'passes')}, from an empty one"

"""Seconds of compute: a layer's dense part, its attention, its experts, the head, at a number of tokens.

Each term is work over a rate of `machine.Rates`; nothing is added that has no name:

===================  ==========================================  =======================================
term                 work                                        rate
===================  ==========================================  =======================================
products             bytes of matrices, and how many             `linear`, measured per dtype and tokens
attention, memory    KV bytes of the tokens attended to          `attention_bytes_per_s`
attention, products  4 × heads × head_dim per (query, context)   `attention_flops_per_s`
elementwise          tokens × hidden                             `elementwise_s`
calls                layers, experts, passes                     `layer_call_s`, `expert_call_s`, `step_call_s`
===================  ==========================================  =======================================

The sum is multiplied with `correction`, what earlier runs of this model on this machine took over what was predicted.
Not covered: waiting for bytes (`offload.planning.timeline`).
"""

from __future__ import annotations

from dataclasses import dataclass

from offload.planning.facts import LayerFacts, ModelFacts
from offload.planning.machine import Rates

# Time of attention chunk by chunk over the time of the plain one, on a CPU: one token's, and a prompt's by dtype.
# Measured on two cores that others used, too: 8192 tokens, 16 heads of 128 that share 8 keys, all in memory; decoding
# took 1.60 times as long (float32) and 1.52 times (bfloat16), the prompt 1.60 and 3.20 times.
TIERED_READ = 1.6
TIERED_WORK = {"float32": 1.6}
_TIERED_WORK_HALF = 3.2


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass over the weights: `sequences` × `new` tokens, with `context` tokens before them in each sequence."""

    sequences: int
    new: int
    context: int

    @property
    def tokens(self) -> int:
        """Rows of every product but the head's."""
        return self.sequences * self.new


@dataclass(frozen=True, slots=True)
class Moved:
    """Bytes of a layer's keys and values that a pass reads from disk, which is `share` of those it attends to, and
    bytes that it writes there."""

    read: float
    written: float
    share: float


def moved(layer: LayerFacts, p: Pass, kept: float) -> Moved:
    """What a layer moves where `kept` tokens, of all sequences together, stay in memory: the first ones, or, behind a
    window, as many of those it sees."""
    if not layer.spills or not layer.kv_bytes:
        return Moved(0.0, 0.0, 0.0)
    stays = kept / p.sequences
    past = min(p.context, layer.window or p.context)
    away = max(0.0, past - stays)
    held = min(stays, layer.window or stays)  # what a window leaves behind is written, too
    written = min(float(p.new), max(0.0, p.context + p.new - held))
    each = p.sequences * layer.kv_bytes
    return Moved(away * each, written * each, away / (past + (p.new + 1) / 2))


def layer_s(facts: ModelFacts, layer: LayerFacts, rates: Rates, p: Pass, *, tiered: bool = False) -> float:
    """Seconds of a layer without its experts; `tiered`: its keys and values are attended to chunk by chunk."""
    chunked = facts.dtype if tiered else None
    seconds = rates.layer_call_s + rates.linear_s(facts.dtype, layer.matrix_bytes, p.tokens, layer.matrices)
    seconds += rates.elementwise_s * p.tokens * facts.hidden
    return (seconds + attention_s(layer, rates, p, chunked)) * rates.correction(p.tokens)


def attention_s(layer: LayerFacts, rates: Rates, p: Pass, chunked: str | None = None) -> float:
    """Seconds of attention over what is cached: whichever is more, reading it or multiplying it.

    `chunked`: the dtype of keys and values that are attended to chunk by chunk.
    """
    seen = p.context + (p.new + 1) / 2  # mean over the new tokens: each sees those before it
    if layer.window is not None:
        seen = min(seen, layer.window)
    read = p.sequences * seen * layer.kv_bytes / rates.attention_bytes_per_s
    work = p.tokens * seen * layer.attention_flops / rates.attention_flops_per_s
    if chunked is not None and layer.spills:
        return max(read * TIERED_READ, work * TIERED_WORK.get(chunked, _TIERED_WORK_HALF))
    return max(read, work)


def chunkwise_s(facts: ModelFacts, layer: LayerFacts, rates: Rates, p: Pass) -> float:
    """Seconds that attention over tiers takes longer than torch's own."""
    apart = attention_s(layer, rates, p, facts.dtype) - attention_s(layer, rates, p)
    return apart * rates.correction(p.tokens)


def expert_s(facts: ModelFacts, layer: LayerFacts, rates: Rates, p: Pass, distinct: int) -> float:
    """Seconds of one of `distinct` experts that share the pass's tokens."""
    if not distinct:
        return 0.0
    each = max(1.0, p.tokens * layer.top_k / distinct)
    seconds = rates.expert_call_s + rates.linear_s(facts.dtype, layer.expert_bytes, each, layer.expert_matrices)
    return seconds * rates.correction(p.tokens)


def head_s(facts: ModelFacts, rates: Rates, p: Pass) -> float:
    """Seconds of the output matrix: only each sequence's last token is projected."""
    return rates.linear_s(facts.dtype, facts.head_bytes, p.sequences) * rates.correction(p.tokens)

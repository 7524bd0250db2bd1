"""Models and machines that exist only as numbers, for the planner's tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from offload.describe import Description
from offload.gather import Extent, Gather
from offload.layout import ExpertGroup, LaidOut, LayerLayout, ModelLayout, Table
from offload.planning.budgets import READERS, RESERVE, Budgets, Demand
from offload.planning.facts import LayerFacts, ModelFacts
from offload.planning.keys import KVDemand
from offload.planning.machine import Machine, Rates
from tiers import CHUNK, PAGE, Block

MIB, GIB = 1 << 20, 1 << 30
FIXED = RESERVE + READERS * (CHUNK + 2 * PAGE)  # of a process's memory, whatever the model
PLENTY = Budgets(ram=1 << 50, base=0)


def rates(**changes: Any) -> Rates:
    """A processor of round numbers: 10 GB/s of weights up to 10 tokens, ten times less work per byte beyond."""
    points = ((1, 1e-10, 0.0), (10, 1e-10, 0.0), (1000, 1e-8, 0.0))
    return replace(
        Rates(
            linear={"bfloat16": points, "float32": points}, attention_bytes_per_s=1e10, attention_flops_per_s=1e12,
            elementwise_s=0.0, layer_call_s=0.0, expert_call_s=0.0, step_call_s=0.0,
        ),
        **changes,
    )  # fmt: skip


def machine(**changes: Any) -> Machine:
    """1 GB/s of disk, no device, no latencies, nothing in anything's way."""
    one = Machine(
        name="numbers", ram_bytes=1 << 50, vram_bytes=0, disk_bytes_per_s=1e9, disk_latency_s=0.0,
        link_bytes_per_s=None, link_latency_s=0.0, rates=rates(),
    )  # fmt: skip
    return replace(one, **changes)


def layer(
    number: int, nbytes: int, parts: int = 1, experts: int = 0, expert_bytes: int = 0, top_k: int = 0, **changes: Any
) -> LayerFacts:
    """One layer's facts: `parts` equal dense blocks of `nbytes` in all."""
    keys = [f"layer.{number}.{i}" if i else f"layer.{number}" for i in range(parts)]
    return replace(
        LayerFacts(
            parts=tuple((k, nbytes // parts) for k in keys), matrix_bytes=nbytes // parts * parts, matrices=parts,
            experts=experts, expert_bytes=expert_bytes if experts else 0, expert_matrices=3 if experts else 0,
            top_k=top_k if experts else 0, kv_bytes=0, window=None, state_bytes=0, attention_flops=0,
        ),
        **changes,
    )  # fmt: skip


def facts(layers: list[LayerFacts], head: int = 0, **changes: Any) -> ModelFacts:
    """A model of these layers, with a head of so many bytes."""
    weights = sum(y.dense_bytes + y.experts * y.expert_bytes for y in layers) + head + PAGE
    return replace(
        ModelFacts(
            name="numbers", model_type="none", dtype="bfloat16", itemsize=2, layers=tuple(layers),
            head=(("head", head),) if head else (), rest_bytes=PAGE, embedding_bytes=0, weight_bytes=weights,
            params=weights // 2, active_params=weights // 2, hidden=1024, intermediate=4096, vocab=32_000,
            max_context=8192,
        ),
        **changes,
    )  # fmt: skip


def kv_demand(about: ModelFacts, ring: int = 8 * 64) -> Demand:
    """Of a model whose keys and values may lie on disk; `ring` tokens of one layer pass through."""
    each = max(y.kv_bytes for y in about.layers)
    tiered = KVDemand(
        per_token=about.kv_bytes_per_token, ring=lambda tokens: ring * each, others=lambda tokens: 0,
        activations=lambda new, context: new * 8 * about.hidden,
    )  # fmt: skip
    return Demand(
        kv=lambda tokens: tokens * about.kv_bytes_per_token,
        activations=lambda new, context: new * 8 * about.hidden + context * 64,
        max_context=about.max_context,
        tiered=tiered,
    )


def description(about: ModelFacts, demand: Demand | None = None) -> Description:
    """The blocks that a model of these facts consists of; there are no files and no modules."""

    def laid(key: str, nbytes: int) -> LaidOut:
        return LaidOut(Block(key, nbytes, nbytes, ()), ())

    layers = []
    for i, y in enumerate(about.layers):
        experts = tuple(laid(f"layer.{i}.expert.{e}", y.expert_bytes) for e in range(y.experts))
        groups = (ExpertGroup(f"layers.{i}.mlp", y.top_k, experts),) if experts else ()
        layers.append(LayerLayout(f"layers.{i}", tuple(laid(k, n) for k, n in y.parts), groups))
    head = laid(*about.head[0]) if about.head else None
    table = Table("embed", Gather([1, 1], torch.bfloat16, [Extent(0, 0, 2)]), torch.bfloat16)
    layout = ModelLayout(laid("rest", about.rest_bytes), tuple(layers), head, (table,), torch.bfloat16)
    if demand is None:
        demand = Demand(
            kv=lambda tokens: tokens * about.kv_bytes_per_token,
            activations=lambda new, context: new * 8 * about.hidden + context * 64,
            max_context=about.max_context,
        )
    return Description(Path("numbers"), cast("Any", None), cast("Any", None), layout, demand, about, None)

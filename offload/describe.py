"""What a model is before anything of it is read: its skeleton, its blocks, what it asks of memory, its facts.

From a checkpoint's headers, or, for a model that is not here, from its config alone: blocks are then as large as the
weights the authors ship, whatever their format, and where their bytes lie is left open.
"""

from __future__ import annotations

import fnmatch
import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from kvstore import KVShape
from kvstore.store import RING, chunk_tokens
from offload import hf, plan_cache
from offload.checkpoint import INDEX, SINGLE, Checkpoint, read_checkpoint
from offload.gather import Extent, Gather
from offload.layout import LaidOut, ModelLayout, lay_out_model
from offload.planning.budgets import Demand
from offload.planning.facts import ModelFacts, facts_of
from offload.planning.keys import KVDemand
from tiers import Block, ModelError

_FP8_BLOCK = 128 * 128  # weights that share one float32 scale
_MXFP4_BITS = 4 + 8 / 32  # an exponent of eight bits per 32 values (OCP Microscaling Formats v1.0)
_Bytes = Callable[[str, tuple[int, ...]], int]  # (name, shape) → stored bytes


@dataclass(frozen=True)
class Description:
    """A model that could be loaded, or only planned for (`checkpoint` is None)."""

    folder: Path
    config: PreTrainedConfig
    model: PreTrainedModel
    layout: ModelLayout
    demand: Demand
    facts: ModelFacts
    checkpoint: Checkpoint | None

    def for_batch(self, batch: int) -> Description:
        """KV of several sequences counts together, each as long as the model allows."""
        own = hf.Shape.of(self.config).max_context
        return replace(self, demand=replace(self.demand, max_context=own * batch))

    def for_job(self, sequences: int) -> Description:
        """Sequences of any lengths that run together, all counted as one context."""
        own, demand = self.demand.kv, self.for_batch(sequences).demand
        row = 3 * 4 * hf.Shape.of(self.config).vocab
        kv = functools.partial(_each, own, sequences)
        return replace(self, demand=replace(demand, kv=kv, job=sequences, row=row))


def _each(kv: Callable[[int], int], sequences: int, tokens: int) -> int:
    """Bytes of what `sequences` keep of so many tokens together: windows and states are each one's own."""
    return sequences * kv(-(-tokens // sequences))


def describe(folder: Path, dtype_name: str = "auto") -> Description:
    """The model in `folder`, as it would be run. Raises `ModelError`, `CheckpointError`."""
    config = hf.load_config(folder)
    checkpoint = read_checkpoint(folder)
    dtype = hf.compute_dtype(config, dtype_name)
    model = hf.build_skeleton(config, dtype)
    expected = {name: t.shape for name, t in model.state_dict().items()}
    found = plan_cache.traced(folder, checkpoint, config, expected, lambda: hf.trace(model, checkpoint.tensors))
    layout = lay_out_model(model, found, dtype)
    return _described(folder, config, model, layout, checkpoint, ())


def describe_for_plan(folder: Path, dtype_name: str = "auto") -> Description:
    """Like `describe` where there are weights that can be run; else from `config.json` alone."""
    config = hf.load_config(folder, quantised=True)
    quant = _quantisation(folder)
    if quant is None and any((folder / name).is_file() for name in (SINGLE, INDEX)):
        return describe(folder, dtype_name)
    for c in {id(c): c for c in (config, config.get_text_config(decoder=True))}.values():
        c.__dict__.pop("quantization_config", None)
    dtype = hf.compute_dtype(config, dtype_name)
    model = hf.build_skeleton(config, dtype)
    model.tie_weights()
    found: dict[str, Gather] = {}
    seen: dict[int, Gather] = {}
    at = 0
    for name, t in model.state_dict(keep_vars=True).items():
        if id(t) not in seen:  # tied parameters are stored once
            nbytes = t.numel() * t.element_size()
            seen[id(t)] = Gather(t.shape, t.dtype, [Extent(0, at, nbytes)])
            at += nbytes
        found[name] = seen[id(t)]
    layout = lay_out_model(model, found, dtype)
    notes = ["planned from its config; the weights are not here"]
    if quant is not None:
        stored, method = _stored_bytes(quant, dtype, folder)
        layout = resize(layout, stored)
        notes.append(f"weights as shipped ({method}), which cannot be run yet")
    return _described(folder, config, model, layout, None, tuple(notes))


def _described(
    folder: Path, config: PreTrainedConfig, model: PreTrainedModel, layout: ModelLayout,
    checkpoint: Checkpoint | None, notes: tuple[str, ...],
) -> Description:  # fmt: skip
    itemsize = layout.dtype.itemsize
    eager = hf.uses_eager_attention(model)
    demand = Demand(
        kv=lambda tokens: hf.kv_bytes(config, tokens, itemsize),
        activations=lambda new, context: hf.activation_bytes(config, new, context, itemsize, eager),
        max_context=hf.Shape.of(config).max_context,
        whole_prompt=config.model_type in hf.NO_CHUNKED_PREFILL,
        tiered=_tiered(config, model, layout.dtype),
    )
    facts = facts_of(layout, config, folder.resolve().name, notes)
    return Description(folder, config, model, layout, demand, facts, checkpoint)


def _tiered(config: PreTrainedConfig, model: PreTrainedModel, dtype: torch.dtype) -> KVDemand | None:
    """What keys and values over memory and disk ask of memory; None for a family that cannot have them there."""
    layers = hf.kv_layers(config, dtype.itemsize)
    spilled = [y.per_token for y in layers if y.spills]
    if not sum(spilled) or not hf.attention_is_replaceable(model):
        return None
    stays = sum(0 if y.spills else y.per_token for y in layers)
    states = sum(y.state for y in layers)
    one = KVShape(1, max(spilled) // dtype.itemsize, 0, dtype)
    shape = hf.Shape.of(config)
    width = shape.heads * shape.head_dim

    def activations(new: int, context: int) -> int:
        # scores are never made; partial results in float32, and what is gathered of the past
        return hf.activation_bytes(config, new, 0, dtype.itemsize, False) + 3 * 4 * new * width + 4 * 1024 * width * 4

    return KVDemand(
        per_token=sum(spilled),
        ring=lambda tokens: RING * one.chunk_nbytes(chunk_tokens(one, tokens)),
        others=lambda tokens: stays * tokens + states,
        activations=activations,
    )


def _quantisation(folder: Path) -> dict[str, Any] | None:
    quant = json.loads((folder / "config.json").read_bytes()).get("quantization_config")
    return quant if isinstance(quant, dict) else None


def _stored_bytes(quant: dict[str, Any], dtype: torch.dtype, folder: Path) -> tuple[_Bytes, str]:
    """How many bytes the authors' format takes. Raises `ModelError` for a format that is not known here."""
    method = str(quant.get("quant_method"))
    patterns = quant.get("modules_to_not_convert") or []
    kept = [str(p) for p in patterns] if isinstance(patterns, list) else []

    def plain(name: str) -> bool:
        module = name.rpartition(".")[0]
        return any(fnmatch.fnmatchcase(module, p) or fnmatch.fnmatchcase(module, f"{p}.*") for p in kept)

    def mxfp4(name: str, shape: tuple[int, ...]) -> int:
        n = math.prod(shape)
        small = plain(name) or ".experts" not in name or len(shape) < 2
        return n * dtype.itemsize if small else math.ceil(n * _MXFP4_BITS / 8)

    def fp8(name: str, shape: tuple[int, ...]) -> int:
        n = math.prod(shape)
        router = name.endswith((".gate.weight", "lm_head.weight"))
        return n * dtype.itemsize if plain(name) or router or len(shape) < 2 else n + 4 * math.ceil(n / _FP8_BLOCK)

    known: dict[str, _Bytes] = {"mxfp4": mxfp4, "fp8": fp8}
    if method not in known:
        raise ModelError(f"{folder / 'config.json'}: no plan can be made for {method} weights yet")
    return known[method], method


def resize(layout: ModelLayout, stored: _Bytes) -> ModelLayout:
    """The same blocks at another size."""

    def resized(laid: LaidOut, prefix: str = "") -> LaidOut:
        nbytes = sum(stored(prefix + s.name, s.shape) for s in laid.specs)
        return replace(laid, block=Block(laid.block.key, nbytes, nbytes, ()))

    layers = tuple(
        replace(
            layer,
            dense=tuple(map(resized, layer.dense)),
            experts=tuple(
                replace(g, blocks=tuple(resized(e, f"{g.module}.") for e in g.blocks)) for g in layer.experts
            ),
        )
        for layer in layout.layers
    )
    return replace(layout, layers=layers)

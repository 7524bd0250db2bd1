"""What a model asks of a machine, from its config and its layout alone: bytes and operations per block and per token.

Not covered: how long any of that takes (`offload.planning.cost`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import PreTrainedConfig

from offload import hf
from offload.layout import LaidOut, ModelLayout


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """One decoder layer. Bytes are as held in memory.

    `parts` are the bytes of its dense blocks by key, `matrix_bytes` those of its dense weights that take part in
    products, `matrices` of them; an expert has `expert_matrices`. `kv_bytes` is per token of context, at most `window`
    tokens of it if there is a window; `state_bytes` is per sequence, whatever its length. `attention_flops` is per pair
    of a query and a context token. `spills`: its keys and values may lie on disk.
    """

    parts: tuple[tuple[str, int], ...]
    matrix_bytes: int
    matrices: int
    experts: int
    expert_bytes: int
    expert_matrices: int
    top_k: int
    kv_bytes: int
    window: int | None
    state_bytes: int
    attention_flops: int
    spills: bool = True

    @property
    def dense_bytes(self) -> int:
        """Bytes of all dense blocks."""
        return sum(n for _, n in self.parts)


@dataclass(frozen=True)
class ModelFacts:
    """A whole model. `params` counts stored weights; `active_params` those one token is multiplied with."""

    name: str
    model_type: str
    dtype: str
    itemsize: int
    layers: tuple[LayerFacts, ...]
    head: tuple[tuple[str, int], ...]
    rest_bytes: int
    embedding_bytes: int
    weight_bytes: int
    params: int
    active_params: int
    hidden: int
    intermediate: int
    vocab: int
    max_context: int
    notes: tuple[str, ...] = ()

    @property
    def head_bytes(self) -> int:
        """Bytes of the output matrix."""
        return sum(n for _, n in self.head)

    @property
    def experts(self) -> int:
        """Experts in all layers."""
        return sum(layer.experts for layer in self.layers)

    @property
    def flops_per_token(self) -> int:
        """Multiplications and additions per generated token, attention apart: two per active weight."""
        return 2 * self.active_params

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values one more token of context takes, sliding windows counted as full."""
        return sum(layer.kv_bytes for layer in self.layers)

    @property
    def bytes_per_token(self) -> int:
        """Weight bytes one token of a batch of one is multiplied with."""
        return sum(y.dense_bytes + y.top_k * y.expert_bytes for y in self.layers) + self.head_bytes


def _numel(laid: LaidOut) -> int:
    return sum(math.prod(s.shape) for s in laid.specs)


def facts_of(layout: ModelLayout, config: PreTrainedConfig, name: str, notes: tuple[str, ...] = ()) -> ModelFacts:
    """The facts of a model laid out as blocks."""
    shape = hf.Shape.of(config)
    itemsize = layout.dtype.itemsize
    caches = hf.kv_layers(config, itemsize)
    layers = []
    for number, layer in enumerate(layout.layers):
        # families whose config lists fewer caches than layers keep none for the others
        cache = caches[number] if number < len(caches) else hf.LayerCache(0, None, 0)
        groups = layer.experts
        experts = [e.block.nbytes for g in groups for e in g.blocks]
        matrices = [s.nbytes for part in layer.dense for s in part.specs if len(s.shape) >= 2]
        held = sum(part.block.nbytes for part in layer.dense)
        whole = sum(s.nbytes for part in layer.dense for s in part.specs)
        layers.append(
            LayerFacts(
                parts=tuple((part.block.key, part.block.nbytes) for part in layer.dense),
                matrix_bytes=round(sum(matrices) * held / whole) if whole else 0,
                matrices=len(matrices),
                experts=len(experts),
                expert_bytes=max(experts, default=0),
                expert_matrices=sum(len(s.shape) >= 2 for g in groups[:1] for s in g.blocks[0].specs),
                top_k=sum(g.top_k for g in groups),
                kv_bytes=cache.per_token,
                window=cache.window,
                state_bytes=cache.state,
                attention_flops=4 * shape.heads * shape.head_dim if cache.per_token else 0,
                spills=cache.spills,
            )
        )
    head = ((layout.head.block.key, layout.head.block.nbytes),) if layout.head is not None else ()
    tables = sum(math.prod(t.gather.shape) * t.dtype.itemsize for t in layout.tables)
    dense = [part for layer in layout.layers for part in layer.dense] + ([layout.head] if layout.head else [])
    active = sum(map(_numel, dense)) + sum(g.top_k * _numel(g.blocks[0]) for y in layout.layers for g in y.experts)
    params = _numel(layout.rest) + sum(map(_numel, dense))
    params += sum(_numel(e) for y in layout.layers for g in y.experts for e in g.blocks)
    params += sum(math.prod(t.gather.shape) for t in layout.tables)
    if layout.tied_head and layout.head is not None:
        params -= _numel(layout.head)
    return ModelFacts(
        name=name,
        model_type=config.model_type,
        dtype=str(layout.dtype).removeprefix("torch."),
        itemsize=itemsize,
        layers=tuple(layers),
        head=head,
        rest_bytes=layout.rest.block.nbytes,
        embedding_bytes=tables,
        weight_bytes=layout.weight_bytes,
        params=params,
        active_params=active,
        hidden=shape.hidden,
        intermediate=shape.intermediate,
        vocab=shape.vocab,
        max_context=shape.max_context,
        notes=notes,
    )

"""Checkpoint → blocks: which bytes are needed together, and where each tensor sits in its slot.

A model becomes: one `rest` block (norms and whatever stands outside the layers), one block per decoder layer (its
dense part), one per expert, one for the head. Embedding tables are no blocks: their rows are read as they are needed.
Nothing is read or allocated here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from offload import hf
from offload.gather import Extent, Gather
from tiers import PAGE, Block, ModelError, Move, Segment

DIRECT_MIN = 64 << 10  # shorter runs are cheaper through the bounce buffer than padded to pages
PARTS = 4  # blocks of a layer's dense part: attention, gate, up and down are about equal in common shapes
ALIGN = 64  # of tensors whose place in the slot is ours to choose: a cache line
REST, HEAD = "rest", "head"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor in a slot: `dst` is the byte offset of its first element."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    dst: int

    @property
    def nbytes(self) -> int:
        """Bytes in compute form."""
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self, slot: torch.Tensor) -> torch.Tensor:
        """The tensor inside `slot` (flat uint8); shares its memory."""
        return slot[self.dst : self.dst + self.nbytes].view(self.dtype).view(self.shape)

    def views(self, slots: torch.Tensor) -> torch.Tensor:
        """The tensor inside each of `slots` (uint8 [n, bytes]): [n, *shape], n apart as the slots are."""
        return slots[:, self.dst : self.dst + self.nbytes].view(self.dtype).view(-1, *self.shape)


@dataclass(frozen=True, slots=True)
class CastCodec:
    """Stored in one float dtype, computed in another."""

    stored: torch.dtype
    compute: torch.dtype

    @property
    def stored_itemsize(self) -> int:
        """Bytes of one stored element."""
        return self.stored.itemsize

    @property
    def compute_itemsize(self) -> int:
        """Bytes of one element in memory."""
        return self.compute.itemsize

    def decode(self, stored: memoryview, compute: memoryview) -> None:
        """Cast element by element, as `Tensor.to` does."""
        source = torch.frombuffer(bytearray(stored), dtype=self.stored)  # the copy aligns it
        torch.frombuffer(compute, dtype=torch.uint8).view(self.compute).copy_(source)


@dataclass(frozen=True, slots=True)
class LaidOut:
    """A block and the tensors in it, by full parameter name.

    On a device they lie as `on_device` says, where that is not empty.
    """

    block: Block
    specs: tuple[TensorSpec, ...]
    on_device: tuple[TensorSpec, ...] = ()


@dataclass(frozen=True, slots=True)
class ExpertGroup:
    """The experts of one experts module: `blocks[e]` holds expert e, specs named by parameter.

    On a device each has its tensors in the same places, so that one product can reach them all.
    """

    module: str
    top_k: int
    blocks: tuple[LaidOut, ...]


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """One decoder layer: its dense part, cut into blocks of about a quarter each, and its experts, if any.

    Blocks smaller than a layer are streamed through smaller slots, which leaves more room for what stays.
    """

    module: str
    dense: tuple[LaidOut, ...]
    experts: tuple[ExpertGroup, ...] = ()


@dataclass(frozen=True, slots=True)
class Table:
    """An embedding table on disk: row r starts `r * row` bytes into `gather`."""

    module: str
    gather: Gather
    dtype: torch.dtype


@dataclass(frozen=True)
class ModelLayout:
    """The whole model as blocks."""

    rest: LaidOut
    layers: tuple[LayerLayout, ...]
    head: LaidOut | None
    tables: tuple[Table, ...]
    dtype: torch.dtype
    tied_head: bool = field(default=False)  # the head's bytes are the embedding's

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights in compute form, embedding tables included."""
        blocks = sum(b.nbytes for b in self.blocks())
        tables = sum(math.prod(t.gather.shape) * t.dtype.itemsize for t in self.tables)
        if self.tied_head and self.head is not None:
            tables -= self.head.block.nbytes
        return blocks + max(0, tables)

    def blocks(self) -> Iterable[Block]:
        """Every block."""
        yield self.rest.block
        for layer in self.layers:
            yield from (part.block for part in layer.dense)
            for group in layer.experts:
                yield from (e.block for e in group.blocks)
        if self.head is not None:
            yield self.head.block


Param = tuple[str, Gather, torch.dtype]


def lay_out(key: str, params: Sequence[Param]) -> LaidOut:
    """Place `params` (name, where stored, compute dtype) in one slot.

    Neighbours in a file stay neighbours, so that a run of tensors is one read; a long run is placed so that whole
    pages of the file land on whole pages of the slot and no copy is needed.
    """
    plain: list[tuple[Extent, str, Gather]] = []
    other: list[Param] = []
    for name, gather, dtype in params:
        if len(gather.extents) == 1 and gather.dtype == dtype and gather.extents[0].offset % dtype.itemsize == 0:
            plain.append((gather.extents[0], name, gather))
        else:
            other.append((name, gather, dtype))
    plain.sort(key=lambda p: (p[0].file, p[0].offset, p[1]))
    runs: list[list[tuple[Extent, str, Gather]]] = []
    for item in plain:
        last = runs[-1][-1][0] if runs else None
        if last is not None and last.file == item[0].file and 0 <= item[0].offset - (last.offset + last.nbytes) < PAGE:
            runs[-1].append(item)
        else:
            runs.append([item])
    specs: list[TensorSpec] = []
    segments: list[Segment] = []
    end = 0
    for run in runs:
        start = run[0][0].offset
        nbytes = run[-1][0].offset + run[-1][0].nbytes - start
        padded = nbytes >= DIRECT_MIN
        base = -(-end // PAGE) * PAGE + start % PAGE if padded else -(-end // ALIGN) * ALIGN
        if padded or all((e.offset - start) % g.dtype.itemsize == 0 for e, _, g in run):
            segments.append(Segment(run[0][0].file, start, nbytes, base, None, padded))
            specs.extend(TensorSpec(n, g.dtype, tuple(g.shape), base + e.offset - start) for e, n, g in run)
            end = -(-(base + nbytes) // PAGE) * PAGE if padded else base + nbytes
        else:
            other.extend((n, g, g.dtype) for _, n, g in run)
    for name, gather, dtype in other:
        base = -(-end // ALIGN) * ALIGN
        codec = None if gather.dtype == dtype else CastCodec(gather.dtype, dtype)
        at = base
        for e in gather.extents:
            segments.append(Segment(e.file, e.offset, e.nbytes, at, codec))
            at += e.nbytes // gather.dtype.itemsize * dtype.itemsize
        specs.append(TensorSpec(name, dtype, tuple(gather.shape), base))
        end = at
    return LaidOut(Block(key, sum(s.nbytes for s in specs), max(end, 1), tuple(segments)), tuple(specs))


def alike(laid: LaidOut, names: Sequence[str]) -> LaidOut:
    """The same block, its tensors on a device in the order of `names`, cache lines apart.

    On the host each lies as it does in its file, modulo the page, and so in another place in every expert.
    """
    by_name = {s.name: s for s in laid.specs}
    there: list[TensorSpec] = []
    end = 0
    for name in names:
        there.append(replace(by_name[name], dst=-(-end // ALIGN) * ALIGN))
        end = there[-1].dst + there[-1].nbytes
    moves = [Move(by_name[s.name].dst, by_name[s.name].dst + s.nbytes, s.dst) for s in there]
    block = replace(
        laid.block, slot_nbytes=max(laid.block.slot_nbytes, end), moves=tuple(sorted(moves, key=lambda m: m.start))
    )
    return replace(laid, block=block, on_device=tuple(there))


def lay_out_model(model: PreTrainedModel, found: dict[str, Gather], dtype: torch.dtype) -> ModelLayout:
    """Sort every parameter and persistent buffer of `model` into blocks. Raises `ModelError` if it has no layers."""
    dtype_of = hf.param_dtypes(model, dtype)
    meta = model.state_dict()
    params = {name: (name, gather, dtype_of(name, meta[name].dtype)) for name, gather in found.items() if name in meta}
    taken: set[str] = set()

    def take(prefix: str) -> list[Param]:
        mine = [n for n in params if n not in taken and (n == prefix or n.startswith(prefix + "."))]
        taken.update(mine)
        return [params[n] for n in mine]

    layers = []
    for number, (module_name, module) in enumerate(hf.decoder_layers(model)):
        groups = []
        for g, (sub, experts) in enumerate(hf.experts_modules(module)):
            full = f"{module_name}.{sub}" if sub else module_name
            groups.append(
                _expert_group(f"layer.{number}.{g}" if g else f"layer.{number}", full, experts, params, taken)
            )
        layers.append(LayerLayout(module_name, _cut(f"layer.{number}", take(module_name)), tuple(groups)))
    if not layers:
        raise ModelError(f"{model.config.model_type}: transformers gives no decoder layers to stream; not supported")
    head_name = _name_of(model, model.get_output_embeddings())
    head = lay_out(HEAD, take(head_name)) if head_name else None
    tables = []
    for name, module in model.named_modules():
        key = f"{name}.weight"
        if isinstance(module, nn.Embedding) and key in params and key not in taken and params[key][1].ndim == 2:
            taken.add(key)
            tables.append(Table(name, params[key][1], params[key][2]))
    rest = lay_out(REST, [p for n, p in params.items() if n not in taken])
    tied = head is not None and any(
        len(head.specs) == 1 and t.gather.extents == params[head.specs[0].name][1].extents for t in tables
    )
    return ModelLayout(rest, tuple(layers), head, tuple(tables), dtype, tied)


def _cut(key: str, params: Sequence[Param]) -> tuple[LaidOut, ...]:
    """Lay `params` out in up to `PARTS` blocks of similar size, in the order in which they lie on disk."""
    ordered = sorted(params, key=lambda p: [(e.file, e.offset) for e in p[1].extents[:1]])
    sizes = [math.prod(g.shape) * d.itemsize for _, g, d in ordered]
    target = -(-sum(sizes) // PARTS)
    parts: list[list[Param]] = [[]]
    held = 0
    for param, size in zip(ordered, sizes, strict=True):
        # close a part once it is nearer to its share without the next tensor than with it
        if parts[-1] and len(parts) < PARTS and held + size - target > target - held:
            parts.append([])
            held = 0
        parts[-1].append(param)
        held += size
    return tuple(lay_out(f"{key}.{i}" if i else key, part) for i, part in enumerate(parts))


def _expert_group(
    key: str, module_name: str, module: nn.Module, params: dict[str, Param], taken: set[str]
) -> ExpertGroup:
    """Cut the stacked parameters of an experts module into one block per expert."""
    names = [n for n, _ in module.named_parameters(recurse=False)]
    per_expert: list[list[Param]] = []
    for leaf in names:
        name, gather, dtype = params[f"{module_name}.{leaf}"]
        taken.add(name)
        for e, row in enumerate(gather.rows()):
            if e == len(per_expert):
                per_expert.append([])
            per_expert[e].append((leaf, row, dtype))
    if any(len(p) != len(names) for p in per_expert):
        raise ModelError(f"{module_name}: its parameters disagree on the number of experts; not supported")
    blocks = tuple(alike(lay_out(f"{key}.expert.{e}", p), names) for e, p in enumerate(per_expert))
    config = getattr(module, "config", None)
    top_k = next(
        (
            v
            for a in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k")
            if isinstance(v := getattr(config, a, None), int)
        ),
        len(blocks),
    )
    return ExpertGroup(module_name, min(top_k, len(blocks)), blocks)


def _name_of(model: nn.Module, module: nn.Module | None) -> str | None:
    return next((n for n, m in model.named_modules() if m is module), None) if module is not None else None

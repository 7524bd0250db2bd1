"""A layer's experts by one product per matrix, over a device-side table of where each expert is.

All slots of a pool are one tensor per matrix, [slots, rows, columns], slots apart; a (token, k) place finds its expert
by the table expert → slot, which stays on the device. Which experts were chosen never comes to the host for this, and
the number of launches does not depend on it.

Two forms. `GROUPED`: places sorted by slot, one grouped product over a range of slots (those nobody chose are empty
groups). `GATHER`: each place's matrices are copied side by side and multiplied as a batch, for the few rows of a
decode step where there is no grouped kernel; weights cross memory three times instead of once, so only where an
expert is small and launches are what takes the time. Where neither fits, experts are computed one by one
(`moe.experts`). Which one is chosen rests on what the kernels' sources say. NOT YET RUN ON A GPU: tested on CPU
tensors, where both forms run through the same code.

Source: grouped products over sorted places as in MegaBlocks (arXiv 2211.15841), without its padding;
`torch.nn.functional.grouped_mm`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch.nn.functional import grouped_mm

MAX_GROUPS = 1023  # of torch's CUDA kernel, which has one thread for each
GATHER_ROWS = 32  # most (token, k) places for `GATHER`: beyond, the same expert is copied again and again
GATHER_EXPERT = 16 << 20  # bytes of the largest matrix copied: some 50 µs more at 1 TB/s, about what launches cost
_ALIGN = 16  # bytes, of rows and starts of matrices, asked for by `grouped_mm`

Capability = tuple[int, int]


class Form(Enum):
    """How the products are done."""

    GROUPED = "grouped"
    GATHER = "gather"


class ExpertsModule(Protocol):
    """What is asked of an experts module (see `moe.experts.ExpertsModule`)."""

    has_gate: bool
    has_bias: bool
    is_transposed: bool
    act_fn: Callable[[torch.Tensor], torch.Tensor]

    def _apply_gate(self, gate_up_out: torch.Tensor) -> torch.Tensor: ...


def supported(device: torch.device) -> bool:
    """Whether experts on `device` are to be computed this way: where launches and synchronisations cost time."""
    return device.type == "cuda"


def capability_of(device: torch.device) -> Capability | None:
    """Compute capability of a CUDA device (without ROCm); None elsewhere."""
    cuda = device.type == "cuda" and torch.version.cuda is not None
    return torch.cuda.get_device_capability(device) if cuda else None


def has_grouped_kernel(dtype: torch.dtype, capability: Capability | None) -> bool:
    """Whether `grouped_mm` is one kernel: bfloat16 on Hopper and data-centre Blackwell.

    Elsewhere torch brings the offsets to the host and multiplies group by group.
    """
    return dtype is torch.bfloat16 and capability is not None and capability[0] in (9, 10)


def prefer_gather(rows: int, capability: Capability | None, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether `rows` (token, k) places should copy their matrices: few, and no grouped kernel for them."""
    return rows <= GATHER_ROWS and not has_grouped_kernel(dtype, capability)


class SlotTable:
    """Expert → slot of one layer, on the device; the host keeps a copy, and uploads what changed in one go."""

    def __init__(self, experts: int, nowhere: int, device: torch.device) -> None:
        """`nowhere`, a number beyond all slots, stands for experts that are not there, and for padding."""
        self._device = device
        self._nowhere = nowhere
        self._host = [nowhere] * (experts + 1)
        self._there: torch.Tensor | None = None
        self.uploads = 0

    def at(self, here: Mapping[int, int], away: Iterable[int] = ()) -> torch.Tensor:
        """[experts + 1] int64, the last for padding: right for the experts `here` (→ slot) and `away` (nowhere).

        The others are where they were said to be last. Not to be written to.
        """
        new = {e: slot for e, slot in here.items() if self._host[e] != slot}
        new.update((e, self._nowhere) for e in away if self._host[e] != self._nowhere)
        if new or self._there is None:
            for e, slot in new.items():
                self._host[e] = slot
            # from locked memory, which torch keeps until the copy is done: nobody waits. Into a new tensor: the old one
            # may still be read
            locked = torch.tensor(self._host, pin_memory=self._device.type == "cuda")
            self._there = locked.to(self._device, non_blocking=True)
            self.uploads += 1
        return self._there


@dataclass(frozen=True, slots=True)
class Standing:
    """Every expert of a layer in slots [first, stop), for good; `table` as `SlotTable` gives it."""

    table: torch.Tensor
    first: int
    stop: int


class PoolViews:
    """The slots of a pool as one tensor per parameter of a layer's experts.

    `matrices`: `gate_up_proj` or `up_proj`, `down_proj` and their `_bias`, each [slots, *shape of one expert's].
    """

    def __init__(self, matrices: Mapping[str, torch.Tensor]) -> None:
        self.matrices = matrices
        first = next(iter(matrices.values()))
        self.slots, self.device, self.dtype = first.size(0), first.device, first.dtype
        self.widest = max(m[0].nbytes for m in matrices.values() if m.dim() == 3)
        self.aligned = all(
            m.data_ptr() % _ALIGN == 0 and all(n * m.element_size() % _ALIGN == 0 for n in (*m.shape[1:], m.stride(0)))
            for m in matrices.values()
            if m.dim() == 3
        )
        self._numbers = torch.arange(self.slots, device=self.device)

    def ends(self, ordered: torch.Tensor, first: int, stop: int) -> torch.Tensor:
        """Where the places of slots [first, stop) end in `ordered` (slot numbers, ascending, none below `first`)."""
        return torch.searchsorted(ordered, self._numbers[first:stop], right=True, out_int32=True)


class Grouped:
    """Computes one layer's experts over a pool's slots."""

    def __init__(self, experts: int, pool: PoolViews, *, room: int, capability: Capability | None = None) -> None:
        """`room` bytes of temporaries are free where few tokens are computed; `capability` is the pool's device's."""
        self.pool = pool
        self.table = SlotTable(experts, pool.slots, pool.device)
        self._experts = experts
        self._room = room
        self._capability = capability

    def form(self, rows: int, dtype: torch.dtype) -> Form | None:
        """How `rows` (token, k) places of a type are to be computed; None: expert by expert."""
        pool = self.pool
        if dtype is not pool.dtype or rows == 0:
            return None
        if prefer_gather(rows, self._capability, dtype):
            copied = rows * pool.widest
            if pool.widest <= GATHER_EXPERT and copied <= self._room:
                return Form.GATHER
        kernel = has_grouped_kernel(dtype, self._capability)
        return Form.GROUPED if pool.aligned and (kernel or pool.device.type == "cpu") else None

    def windows(self, slots: Mapping[int, int], form: Form) -> Iterator[dict[int, int]]:
        """Experts → slots in as few portions as one product each can reach."""
        reach = MAX_GROUPS if form is Form.GROUPED else self.pool.slots
        portion: dict[int, int] = {}
        first = 0
        for e, slot in sorted(slots.items(), key=lambda item: item[1]):
            if portion and slot - first >= reach:
                yield portion
                portion = {}
            first = first if portion else slot
            portion[e] = slot
        if portion:
            yield portion

    def places(self, index: torch.Tensor) -> torch.Tensor:
        """[T·k] which expert each (token, k) place asks for; the number of experts for padding."""
        return index.reshape(-1).clamp(max=self._experts)

    def standing(self, slots: Mapping[int, int]) -> Standing:
        """For `all`: every expert of the layer, and the slot it never leaves."""
        assert len(slots) == self._experts
        return Standing(self.table.at(slots), min(slots.values()), max(slots.values()) + 1)

    def reaches(self, standing: Standing, form: Form) -> bool:
        """Whether one product can reach all of them."""
        return form is Form.GATHER or standing.stop - standing.first <= MAX_GROUPS

    def all(
        self, module: ExpertsModule, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor,
        standing: Standing, form: Form,
    ) -> torch.Tensor:  # fmt: skip
        """What `LayerExperts.forward` gives, where every expert of the layer stays and can be reached.

        hidden [T, H], index [T, k], weights [T, k] → [T, H]. The host waits for nothing.
        """
        chosen = standing.table.index_select(0, self.places(index))  # [T·k]
        out = hidden.new_empty(chosen.numel(), hidden.size(-1))
        self._into(out, module, hidden, chosen, weights, chosen.numel(), standing.first, standing.stop, form)
        out.masked_fill_((chosen == self.pool.slots).unsqueeze(-1), 0)  # padding: a fill, as it may hold NaN
        return self.summed(out, index, hidden)

    def some(
        self, out: torch.Tensor, module: ExpertsModule, hidden: torch.Tensor, places: torch.Tensor,
        weights: torch.Tensor, counts: Sequence[int], here: Mapping[int, int], chosen: Iterable[int], form: Form,
    ) -> None:  # fmt: skip
        """Fill out [T·k, H] where the experts `here` (→ slot) were chosen; `counts[e]` times each, `chosen` in all."""
        chosen = list(chosen)
        for portion in self.windows(here, form):
            table = self.table.at(portion, [e for e in chosen if e not in portion])
            rows = sum(counts[e] for e in portion)
            first, stop = min(portion.values()), max(portion.values()) + 1
            self._into(out, module, hidden, table.index_select(0, places), weights, rows, first, stop, form)

    @staticmethod
    def summed(out: torch.Tensor, index: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """out [T·k, H] summed in k order: [T, H]."""
        return out.view(*index.shape, -1).sum(dim=-2).to(hidden.dtype)

    def _into(
        self, out: torch.Tensor, module: ExpertsModule, hidden: torch.Tensor, chosen: torch.Tensor,
        weights: torch.Tensor, rows: int, first: int, stop: int, form: Form,
    ) -> None:  # fmt: skip
        """The `rows` places of the smallest slots in `chosen` [T·k], which lie in [first, stop) or are padding's.

        Rows of padding hold anything, in `out` too.
        """
        top_k = chosen.numel() // hidden.size(0)
        ordered, order = torch.sort(chosen, stable=True)
        if rows < chosen.numel():
            ordered, order = ordered[:rows], order[:rows]
        ends = self.pool.ends(ordered, first, stop) if form is Form.GROUPED else None
        slot = ordered.clamp(max=self.pool.slots - 1)

        def project(x: torch.Tensor, name: str) -> torch.Tensor:
            matrix = self.pool.matrices[name]
            if ends is not None:
                part = matrix[first:stop]
                y = grouped_mm(x, part if module.is_transposed else part.transpose(1, 2), offs=ends)
            else:
                own = matrix.index_select(0, slot)
                y = torch.bmm(x.unsqueeze(1), own if module.is_transposed else own.transpose(1, 2)).squeeze(1)
            if module.has_bias:
                y = y.add_(self.pool.matrices[f"{name}_bias"].index_select(0, slot))
            return y

        x = hidden.index_select(0, order // top_k)
        h = project(x, "gate_up_proj" if module.has_gate else "up_proj")
        del x  # as soon as may be: these are the largest temporaries there are
        h = module._apply_gate(h) if module.has_gate else module.act_fn(h)
        y = project(h.contiguous(), "down_proj")
        del h
        if getattr(module, "has_post_expert_norm", False):
            y = module.post_expert_norm(y)  # type: ignore[attr-defined]
        scale = weights.reshape(-1, 1).index_select(0, order)
        out.index_copy_(0, order, y.mul_(scale).to(out.dtype))  # multiplied in the wider type, and rounded once

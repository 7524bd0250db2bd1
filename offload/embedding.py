"""Embedding tables that stay on disk: the rows a step needs are read as it begins."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from offload.layout import ALIGN, CastCodec, Table
from tiers import Arena, Cause, Segment, TransferQueue, page_up


class RowReader:
    """Stands in for an embedding's weight: gathers the rows of the tokens at hand into a small table.

    The module's own forward then runs on that table with renumbered tokens, so scaling and the like stay the
    family's own. A few recent rows are kept: the ids of a chat repeat.
    """

    def __init__(
        self, table: Table, module: nn.Embedding, queue: TransferQueue, device: torch.device, rows_kept: int = 256
    ) -> None:
        self._table = table
        self._queue = queue
        self._device = device
        self._row = table.gather.nbytes // table.gather.shape[0]  # stored bytes of one row
        self._codec = None if table.gather.dtype == table.dtype else CastCodec(table.gather.dtype, table.dtype)
        self._kept: dict[int, torch.Tensor] = {}
        self._rows_kept = rows_kept
        self._forward = module.forward
        # shape, dtype and device are the table's, at no cost; a lookup that bypasses us yields NaN, not garbage
        self._home: dict[str, Any] = module.__dict__["_parameters"]
        self._stand_in = torch.full((1, 1), torch.nan, dtype=table.dtype, device=device).expand(*table.gather.shape)
        self._home["weight"] = self._stand_in
        module.padding_idx = None  # only means something to gradients, and must not index the small table
        module.forward = self.forward  # type: ignore[method-assign]

    def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The module's forward on token ids `input` of any shape."""
        ids, local = torch.unique(input, return_inverse=True)
        rows = self.rows(ids.tolist()).to(self._device)
        self._home["weight"] = rows
        try:
            out: torch.Tensor = self._forward(local.view(input.shape), *args, **kwargs)
        finally:
            self._home["weight"] = self._stand_in
        return out

    def rows(self, ids: list[int]) -> torch.Tensor:
        """[len(ids), width] in the compute dtype; `ids` ascending, distinct. Raises `IndexError` on an id outside."""
        n, width = self._table.gather.shape
        if ids and not 0 <= ids[0] <= ids[-1] < n:
            raise IndexError(f"token id {ids[0] if ids[0] < 0 else ids[-1]} is outside the vocabulary of {n}")
        wanted = [i for i in ids if i not in self._kept]
        fresh: dict[int, torch.Tensor] = {}
        if wanted:
            stride = -(-width * self._table.dtype.itemsize // ALIGN) * ALIGN
            slot = Arena(page_up(stride * len(wanted))).allocate(stride * len(wanted))
            ticket = self._queue.submit(self._table.module, self._segments(wanted, stride), slot, Cause.DEMAND)
            ticket.wait()
            for k, i in enumerate(wanted):
                row = slot.tensor[k * stride : k * stride + width * self._table.dtype.itemsize]
                fresh[i] = row.view(self._table.dtype)
        out = torch.stack([fresh[i] if i in fresh else self._kept[i] for i in ids])
        for i in wanted[-self._rows_kept :]:
            self._kept[i] = fresh[i].clone()  # a view would keep its whole arena alive
        while len(self._kept) > self._rows_kept:
            del self._kept[next(iter(self._kept))]
        return out

    def _segments(self, ids: list[int], stride: int) -> list[Segment]:
        segments: list[Segment] = []
        extents = self._table.gather.extents
        for k, i in enumerate(ids):
            start, left, dst = i * self._row, self._row, k * stride
            for e in extents:
                if start >= e.nbytes:
                    start -= e.nbytes
                    continue
                n = min(left, e.nbytes - start)
                segments.append(Segment(e.file, e.offset + start, n, dst, self._codec))
                dst += n // self._table.gather.dtype.itemsize * self._table.dtype.itemsize
                start, left = 0, left - n
                if not left:
                    break
        return segments

"""Attention of a `TieredCache`: to the new tokens, and to all that came before, wherever it lies.

Few queries and many are computed differently: one new token per sequence by a kernel that reads each chunk once, where
it lies; a prompt by blocks.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from kvstore.attention import BLOCK, Expand, Merged, Rule, blocks, gathered
from kvstore.chunks import Chunk, ChunkList
from kvstore.softmax import AttentionState
from kvstore.tiered import TieredCache, TieredLayer


class FewTokens(Protocol):
    """A kernel for one token per sequence (`moe.kernels.Kernel.attend_table`): see there."""

    def __call__(
        self, query: torch.Tensor, table: array[int], strides: tuple[int, int, int, int], kv_heads: int,
        largest: torch.Tensor, total: torch.Tensor, mixed: torch.Tensor, scale: float, softcap: float | None = None,
    ) -> bool:  # fmt: skip
        """False if it cannot; nothing has been added then."""
        ...


def attend(
    cache: TieredCache | None, layer: TieredLayer | None, query: torch.Tensor, keys: torch.Tensor,
    values: torch.Tensor, rule: Rule, pads: Sequence[int], *, sinks: torch.Tensor | None = None,
    expand: Expand | None = None, few: FewTokens | None = None,
) -> torch.Tensor:  # fmt: skip
    """Attention of query [B, heads, Q, D], whose last token is the last of keys [B, kv heads, n, D] and values
    [B, kv heads, n, Dv], to those and to the `layer`'s past: → [B, Q, heads, Dv] of the type of `query`.

    What was given to the layer last is appended to it. `pads[b]` positions at the front of sequence b are padding;
    `sinks` [heads] are scores that belong to no token; `expand` makes keys and values of what the layer keeps.
    """
    if cache is None or layer is None:
        return _by_blocks(None, None, query, keys, values, rule, pads, sinks, expand)
    if few is not None and query.shape[2] == 1 and expand is None:
        out = _token(cache, layer, query, rule, pads, sinks, few)
        if out is not None:
            return out
    out = _by_blocks(cache, layer, query, keys, values, rule, pads, sinks, expand)
    layer.append_new()
    return out


def _token(
    cache: TieredCache, layer: TieredLayer, query: torch.Tensor, rule: Rule, pads: Sequence[int],
    sinks: torch.Tensor | None, few: FewTokens,
) -> torch.Tensor | None:  # fmt: skip
    """One token per sequence: what is in memory in one call, then what arrives. None if the kernel cannot."""
    batch, heads, _, _ = query.shape
    layer.append_new()  # the new token is one of those attended to
    length = layer.past
    shape = cache.store.shape_of(layer.number)
    state = AttentionState.empty(batch, heads, shape.value_dim)
    carried = state.largest, state.total, state.mixed
    tokens = layer.rows[0].tokens
    strides = (tokens * shape.key_dim, shape.key_dim, tokens * shape.value_dim, shape.value_dim)
    step = shape.key_dim * shape.dtype.itemsize, shape.value_dim * shape.dtype.itemsize
    table = array("q")
    away: list[list[tuple[Chunk, int, int]]] = []
    for b, row in enumerate(layer.rows):
        passing = []
        for span in row.spans(_first_seen(row, pads[b], length - 1, rule), length):
            chunk, start, stop = span
            if chunk.views is None:
                passing.append(span)
                continue
            k, v = chunk.address
            table.extend((b, k + start * step[0], v + start * step[1], stop - start))
        away.append(passing)
    if not few(query, table, strides, shape.kv_heads, *carried, rule.scale, rule.softcap):
        return None
    for b, passing in enumerate(away):
        for keys, values in cache.store.reading(passing, later(cache, layer, b)):
            one = array("q", (b, keys.data_ptr(), values.data_ptr(), keys.shape[1]))
            few(query, one, strides, shape.kv_heads, *carried, rule.scale, rule.softcap)
    if sinks is not None:
        state.merge(torch.zeros(batch, heads, 1, shape.value_dim), sinks.float().expand(batch, heads))
    return state.result()[0].to(query.dtype).transpose(1, 2)


def _first_seen(row: ChunkList, pad: int, query: int, rule: Rule) -> int:
    """The first position that the query at position `query` sees; at least that of the query itself."""
    low = pad if rule.window is None else max(pad, query - rule.window + 1)
    return min(low, query)


def _by_blocks(
    cache: TieredCache | None, layer: TieredLayer | None, query: torch.Tensor, keys: torch.Tensor,
    values: torch.Tensor, rule: Rule, pads: Sequence[int], sinks: torch.Tensor | None, expand: Expand | None,
) -> torch.Tensor:  # fmt: skip
    """Any number of queries: partial results, merged."""
    batch, heads, count, _ = query.shape
    past = layer.past if layer is not None else 0
    merged = Merged(batch, heads, count, values.shape[3], query.device)
    if sinks is not None:
        merged.lse.copy_(sinks.float()[None, :, None].expand(batch, heads, count))
    first_key = past
    first_query = past + keys.shape[2] - count
    together = max(pads) <= past  # none of the new tokens is padding
    for row in [slice(None)] if together else [slice(b, b + 1) for b in range(batch)]:
        # a padding query sees nothing, and nobody asks what becomes of it
        skip = 0 if together else max(0, pads[row.start] - first_key)
        if skip >= keys.shape[2]:
            continue
        late = max(0, first_key + skip - first_query)
        parts = blocks(query[row, :, late:], keys[row, :, skip:], values[row, :, skip:],
                       first_query + late, first_key + skip, rule)  # fmt: skip
        for at, out, lse in parts:
            merged.add(out, lse, slice(at.start + late, at.stop + late), row)
    if past:
        assert layer is not None and cache is not None
        _attend_past(layer, cache, merged, query, first_query, past, rule, pads, expand)
    return merged.out.to(query.dtype).transpose(1, 2).contiguous()


def _attend_past(
    layer: TieredLayer, cache: TieredCache, merged: Merged, query: torch.Tensor, first_query: int, past: int,
    rule: Rule, pads: Sequence[int], expand: Expand | None,
) -> None:  # fmt: skip
    """What came before: sequence by sequence, chunk by chunk, those of the next layers on their way meanwhile."""
    for b, row in enumerate(layer.rows):
        late = max(0, pads[b] - first_query)
        if late >= query.shape[2]:
            continue
        low = pads[b] if rule.window is None else max(pads[b], first_query + late - rule.window + 1)
        if low >= past:
            continue
        mine = query[b : b + 1, :, late:]
        parts = cache.store.reading(list(row.spans(low, past)), later(cache, layer, b))
        for k, v in gathered(parts, BLOCK):
            here = expand(k, v) if expand is not None else (k, v)
            for at, out, lse in blocks(mine, *here, first_query + late, low, rule):
                merged.add(out, lse, slice(at.start + late, at.stop + late), slice(b, b + 1))
            low += k.shape[2]


def later(cache: TieredCache, layer: TieredLayer, row: int) -> Iterator[Chunk]:
    """What attention will read after this sequence of this layer, around to the next step's first layer."""
    for other in layer.rows[row + 1 :]:
        yield from (c for c in other.chunks if c.lease is None)
    n = len(cache.tiered)
    for i in range(1, n):
        yield from cache.tiered[(layer.number + i) % n].passing()

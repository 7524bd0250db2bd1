"""Attention of a `TieredCache`: to the new tokens, and to all that came before, wherever it lies.

Few queries and many are computed differently: one new token per sequence by a kernel that reads each chunk once, where
it lies; a prompt by blocks.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Protocol

import torch

from kvstore.attention import BLOCK, Expand, Merged, Rule, blocks, gathered, one_block, partial
from kvstore.chunks import Chunk, ChunkList
from kvstore.softmax import AttentionState
from kvstore.sparse import OBSERVED, share_out
from kvstore.store import ChunkStore, Span
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
    sparse = layer.rows[0].sparse
    if query.shape[2] == 1 and expand is None:
        measured = sparse is not None and sparse.selector.needs_mass
        out = _token(cache, layer, query, rule, pads, sinks, few) if few is not None and not measured else None
        if out is None and sparse is not None:
            out = _chosen(cache, layer, query, rule, pads, sinks)
        if out is not None:
            return out
    out = _by_blocks(cache, layer, query, keys, values, rule, pads, sinks, expand)
    layer.append_new()
    if sparse is not None and query.shape[2] > 1 and cache.prompt_ends:
        _observe(cache, layer, query, rule)
    return out


def _token(
    cache: TieredCache, layer: TieredLayer, query: torch.Tensor, rule: Rule, pads: Sequence[int],
    sinks: torch.Tensor | None, few: FewTokens,
) -> torch.Tensor | None:  # fmt: skip
    """One token per sequence: what is in memory in one call, then what arrives. None if the kernel cannot."""
    batch, heads, _, _ = query.shape
    layer.append_new()  # the new token is one of those attended to
    state = one_token(
        cache.store, layer.rows, query.cpu(), rule, pads, few, lambda b: later(cache, layer, b), ahead=layer.ahead
    )
    if state is None:
        return None
    width = state.mixed.shape[2]
    if layer.front is None:
        if sinks is not None:
            state.merge(torch.zeros(batch, heads, 1, width), sinks.float().expand(batch, heads))
        return state.result()[0].to(query.dtype).transpose(1, 2).to(query.device)
    # what crosses the link is the token's query, and its partial result
    out, lse = (t.to(query.device) for t in state.result())
    merged = Merged(batch, heads, 1, width, query.device)
    if sinks is not None:
        merged.lse.copy_(sinks.float()[None, :, None].expand(batch, heads, 1))
    merged.add(out, lse[..., None])
    _add_front(layer, merged, query, layer.past - 1, rule, pads)
    return merged.out.to(query.dtype).transpose(1, 2).contiguous()


def one_token(
    store: ChunkStore, rows: Sequence[ChunkList], query: torch.Tensor, rule: Rule, pads: Sequence[int], few: FewTokens,
    coming: Callable[[int], Iterable[Chunk]], *, ahead: int = 0,
) -> AttentionState | None:  # fmt: skip
    """Attention of the last token of each of `rows`, sequences of one layer of any lengths, to all of them; query
    [B, heads, 1, D] on the CPU. None if the kernel cannot.

    `ahead` positions lie before the first of each row, `pads[b]` of all are padding; `coming(b)` will be read after row
    b. Chunks that stay come first, of all sequences at once; what comes and goes in its own order, whenever it arrives:
    sums depend on the order and not on how it is divided.
    """
    layer = rows[0].layer
    shape = store.shape_of(layer)
    state = AttentionState.empty(query.shape[0], query.shape[1], shape.value_dim)
    carried = state.largest, state.total, state.mixed
    tokens = rows[0].tokens
    strides = (tokens * shape.key_dim, shape.key_dim, tokens * shape.value_dim, shape.value_dim)
    table = array("q")
    away: list[list[Span]] = []
    for b, row in enumerate(rows):
        low = max(_first_seen(pads[b], ahead + row.length - 1, rule) - ahead, 0)
        chosen = row.sparse.choose(row.length, query[b, :, 0], rule.scale) if row.sparse is not None else None
        spans = list(row.spans(low, row.length, chosen))
        stay = [s for s in spans if s[0].views is not None] if chosen is None else []
        for k, v, n in store.located(stay):
            table.extend((b, k, v, n))
        away.append([s for s in spans if s[0].views is None] if chosen is None else spans)
    if not few(query, table, strides, shape.kv_heads, *carried, rule.scale, rule.softcap):
        return None
    for b, passing in enumerate(away):
        if not passing and store.holds_all:
            continue
        with closing(store.addresses(passing, coming(b))) as runs:
            for run in runs:
                part = array("q", [x for k, v, n in run for x in (b, k, v, n)])
                few(query, part, strides, shape.kv_heads, *carried, rule.scale, rule.softcap)
    return state


def _add_front(
    layer: TieredLayer, merged: Merged, query: torch.Tensor, first_query: int, rule: Rule, pads: Sequence[int],
    expand: Expand | None = None,
) -> None:  # fmt: skip
    """The part of the past that is in device memory."""
    front = layer.front
    assert front is not None
    for row in [slice(None)] if not any(pads) else [slice(b, b + 1) for b in range(len(pads))]:
        low = 0 if row.start is None else min(pads[row.start], front.length)
        late = 0 if row.start is None else max(0, pads[row.start] - first_query)
        if low == front.length or late >= query.shape[2]:
            continue
        keys, values = front.keys[row, :, low:], front.values[row, :, low:]
        here = expand(keys, values) if expand is not None else (keys, values)
        for at, out, lse in blocks(query[row, :, late:], *here, first_query + late, low, rule):
            merged.add(out, lse, slice(at.start + late, at.stop + late), row)


def _chosen(
    cache: TieredCache, layer: TieredLayer, query: torch.Tensor, rule: Rule, pads: Sequence[int],
    sinks: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """One token per sequence over the chunks chosen, in plain torch; tells the selector where attention fell."""
    batch, heads, _, _ = query.shape
    layer.append_new()
    length, ahead = layer.past, layer.ahead
    state = AttentionState.empty(batch, heads, cache.store.shape_of(layer.number).value_dim, query.device)
    if sinks is not None:
        state.merge(torch.zeros_like(state.mixed)[:, :, None], sinks.float().expand(batch, heads))
    for b, row in enumerate(layer.rows):
        assert row.sparse is not None
        row.sparse.view.mass = functools.partial(_true_mass, cache, layer, b, rule)
        chosen = row.sparse.choose(row.length, query[b, :, 0], rule.scale) or range(len(row.chunks))
        row.sparse.view.mass = None  # copies of the row are not of the cache
        spans = list(row.spans(max(_first_seen(pads[b], length - 1, rule) - ahead, 0), row.length, chosen))
        mine = AttentionState(*(t[b : b + 1] for t in (state.largest, state.total, state.mixed)))
        found = []
        for k, v in cache.store.reading(spans, later(cache, layer, b)):
            out, lse = partial(query[b : b + 1], k[None].to(query.device), v[None].to(query.device), rule)
            mine.merge(out, lse[..., 0])
            found.append(lse[0, :, 0])
        mass = (torch.stack(found, 1) - mine.result()[1][0, :, None]).exp()
        first = len(chosen) - len(spans)  # chunks of padding alone are chosen, and seen by nobody
        row.sparse.selector.attended(row.sparse.view, chosen[first:], mass.cpu())
    out, lse = state.result()
    if layer.front is None:
        return out.to(query.dtype).transpose(1, 2)
    merged = Merged(batch, heads, 1, out.shape[3], query.device)
    merged.add(out, lse[..., None])
    _add_front(layer, merged, query, length - 1, rule, pads)
    return merged.out.to(query.dtype).transpose(1, 2).contiguous()


def _true_mass(
    cache: TieredCache, layer: TieredLayer, b: int, rule: Rule, query: torch.Tensor, scale: float
) -> torch.Tensor:
    """The share of each head's attention that falls on every chunk, for query [heads, D]: [heads, chunks]."""
    return _mass(cache, layer, b, query[None, :, None], rule)


def _mass(cache: TieredCache, layer: TieredLayer, b: int, query: torch.Tensor, rule: Rule) -> torch.Tensor:
    row = layer.rows[b]
    spans = list(row.spans(0, row.length))
    parts = [
        partial(query, k[None].to(query.device), v[None].to(query.device), rule)[1][0]
        for k, v in cache.store.reading(spans, ())
    ]
    return torch.stack(parts, -1).softmax(-1).mean(1).cpu()


def _observe(cache: TieredCache, layer: TieredLayer, query: torch.Tensor, rule: Rule) -> None:
    """Measure where the prompt's last queries look; when all layers have, they share their budget out by it."""
    last = query[:, :, -OBSERVED:]
    for b, row in enumerate(layer.rows):
        if row.sparse is not None:
            row.sparse.observed(_mass(cache, layer, b, last[b : b + 1], rule))
    everywhere = [y for y in cache.tiered if y.window is None]
    if all(y.rows for y in everywhere):  # not so in the first pass: the later layers are still to come
        for b in range(len(layer.rows)):
            share_out([sparse for y in everywhere if (sparse := y.rows[b].sparse) is not None])


def _first_seen(pad: int, query: int, rule: Rule) -> int:
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
    if not past and sinks is None and not any(pads) and count == keys.shape[2] and one_block(query, rule):
        out, _ = partial(query, keys, values, rule, square=True)
        return out.to(query.dtype).transpose(1, 2).contiguous()
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
        if layer.front is not None:
            _add_front(layer, merged, query, first_query, rule, pads, expand)
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
        ahead = layer.ahead
        low = max(pads[b], ahead)
        if rule.window is not None:
            low = max(low, first_query + late - rule.window + 1)
        if low >= past:
            continue
        mine = query[b : b + 1, :, late:]
        here = cache.on_host(mine.shape[2]) and expand is None  # weights that expand are on the device
        if here:
            mine = mine.cpu()
        with closing(cache.store.reading(list(row.spans(low - ahead, past - ahead)), later(cache, layer, b))) as parts:
            for keys, values in gathered(parts, BLOCK):
                n = keys.shape[2]
                if not here:
                    keys, values = cache.lift(keys), cache.lift(values)
                if expand is not None:
                    keys, values = expand(keys, values)
                for at, out, lse in blocks(mine, keys, values, first_query + late, low, rule):
                    at = slice(at.start + late, at.stop + late)
                    merged.add(out.to(query.device), lse.to(query.device), at, slice(b, b + 1))
                low += n


def later(cache: TieredCache, layer: TieredLayer, row: int) -> Iterator[Chunk]:
    """What attention will read after this sequence of this layer, around to the next step's first layer."""
    if cache.store.holds_all:  # nothing is ever fetched
        return
    yield from layer.passing(row + 1)
    n = len(cache.tiered)
    for i in range(1, n):
        yield from cache.tiered[(layer.number + i) % n].passing()

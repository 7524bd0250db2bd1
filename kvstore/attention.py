"""Attention over chunks, some of which are still on their way: partial results, merged by log-sum-exp.

A partial result over some of the keys is the attention to those alone and the logarithm of the sum of its weights;
two of them merge exactly (Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867; Dao et al. 2022,
https://arxiv.org/abs/2205.14135). Nothing of the size queries × context is ever made: long prompts are computed in
blocks of queries and keys, and only the blocks at the edge of what may be seen are masked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

BLOCK = 1024  # queries, and keys, of one partial result
MASKED = 512  # where scores are materialised, or masked
_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

Tensors = tuple[torch.Tensor, torch.Tensor]


class Expand(Protocol):
    """Multi-head latent attention: latents [1, 1, n, r] and rotary keys [1, 1, n, p] to keys and values per head."""

    def __call__(self, latents: torch.Tensor, rotary: torch.Tensor) -> Tensors:
        """Expand."""
        ...


@dataclass(frozen=True, slots=True)
class Rule:
    """How scores are made, and who sees whom: query i sees key j if 0 <= i - j < window."""

    scale: float
    window: int | None = None
    softcap: float | None = None


class Merged:
    """The result so far for queries [B, heads, Q]: `out` [B, heads, Q, Dv] and `lse` [B, heads, Q] in float32."""

    __slots__ = ("lse", "out")

    def __init__(self, batch: int, heads: int, queries: int, width: int, device: torch.device) -> None:
        self.out = torch.zeros(batch, heads, queries, width, device=device)
        self.lse = torch.full((batch, heads, queries), -torch.inf, device=device)

    def add(self, out: torch.Tensor, lse: torch.Tensor, at: slice = slice(None), row: slice = slice(None)) -> None:
        """Merge a partial result for the queries `at` of the sequences `row`."""
        mine, own = self.lse[row, :, at], self.out[row, :, at]
        both = torch.logaddexp(mine, lse)
        seen = both.masked_fill(both == -torch.inf, 0.0)  # nothing seen on either side: both weights are zero
        own.mul_((mine - seen).exp_().unsqueeze(-1)).add_((lse - seen).exp_().unsqueeze(-1) * out)
        mine.copy_(both)


def partial(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rule: Rule, mask: torch.Tensor | None = None,
    *, square: bool = False,
) -> Tensors:  # fmt: skip
    """Attention of query [B, heads, Q, D] to keys [B, kv heads, n, D], values [B, kv heads, n, Dv] and no others.

    Scores are scale·query·key, or with a softcap c: c·tanh(score / c) (Gemma 2, https://arxiv.org/abs/2408.00118).
    `mask` [Q, n] is True where a query sees a key. Returns out [B, heads, Q, Dv] and lse [B, heads, Q] (minus infinity
    for a query that sees none), in float32 or the type of the queries. `square`: queries and keys are the same tokens,
    and each sees those before it and itself; then no mask is needed.
    """
    batch, heads, count, width = query.shape
    kv_heads, out_width = keys.shape[1], values.shape[3]
    group = heads // kv_heads
    if square:
        if query.device.type == "cpu" and rule.softcap is None:
            k, v = (t.repeat_interleave(group, 1) if group > 1 else t for t in (keys, values))
            return _by_torch(query, k, v, rule.scale, None, causal=True)
        mask = torch.ones(count, count, dtype=torch.bool, device=query.device).tril()
    # heads that share keys are further queries: nothing is repeated
    folded = query.reshape(batch, kv_heads, group * count, width)
    seen = mask.repeat(group, 1) if mask is not None else None
    if query.device.type == "cpu" and rule.softcap is None and keys.shape[2]:  # of no keys torch's kernel dies
        out, lse = _by_torch(folded, keys, values, rule.scale, seen)
    else:
        scores = (folded.float() @ keys.float().transpose(2, 3)).mul_(rule.scale)
        if rule.softcap is not None:
            scores = scores.div_(rule.softcap).tanh_().mul_(rule.softcap)
        if seen is not None:
            scores.masked_fill_(~seen, -torch.inf)
        lse = torch.logsumexp(scores, -1)
        out = scores.sub_(lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp_() @ values.float()
    return out.reshape(batch, heads, count, out_width), lse.reshape(batch, heads, count)


def _by_torch(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, seen: torch.Tensor | None,
    *, causal: bool = False,
) -> Tensors:  # fmt: skip
    """torch's fused kernel, which also tells the log-sum-exp; it wants keys and values of one width."""
    wide = max(keys.shape[3], values.shape[3])
    padded = [t if t.shape[3] == wide else torch.nn.functional.pad(t, (0, wide - t.shape[3])) for t in (query, keys)]
    v = values if values.shape[3] == wide else torch.nn.functional.pad(values, (0, wide - values.shape[3]))
    bias = None
    if seen is not None:
        bias = torch.zeros(1, 1, *seen.shape, dtype=query.dtype).masked_fill_(~seen, -torch.inf)
    out, lse = _fused(*padded, v, is_causal=causal, attn_mask=bias, scale=scale)
    if seen is not None:
        lse = lse.masked_fill(~seen.any(-1), -torch.inf)  # the kernel says 0 for those
    return out[..., : values.shape[3]], lse


def one_block(query: torch.Tensor, rule: Rule) -> bool:
    """Whether queries, if they see themselves and those before them alone, are one block that no window divides."""
    count = query.shape[2]
    plain = rule.softcap is None and query.device.type == "cpu"
    return count <= (BLOCK if plain else MASKED) and (rule.window is None or count <= rule.window)


def blocks(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first_query: int, first_key: int, rule: Rule
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Partial results, by blocks: queries from position `first_query` on and keys from `first_key` on see each other
    by `rule`, never ahead. Yields (queries, out, lse)."""
    count, length = query.shape[2], keys.shape[2]
    plain = rule.softcap is None and query.device.type == "cpu"
    step = BLOCK if plain and rule.window is None else MASKED
    for q0 in range(0, count, step):
        q1 = min(q0 + step, count)
        low, high = first_query + q0, first_query + q1 - 1  # positions of the block's first and last query
        begin = 0 if rule.window is None else max(0, low - rule.window + 1 - first_key)
        for k0 in range(begin, min(length, high - first_key + 1), step):
            k1 = min(k0 + step, length, high - first_key + 1)
            mask, at = None, slice(q0, q1)
            if rule.window is None and first_key + k0 == low and k1 - k0 == q1 - q0:
                yield at, *partial(query[:, :, at], keys[:, :, k0:k1], values[:, :, k0:k1], rule, square=True)
                continue
            inside = rule.window is None or high - (first_key + k0) < rule.window
            if not inside or first_key + k1 - 1 > low:
                apart = torch.arange(low, high + 1)[:, None] - torch.arange(first_key + k0, first_key + k1)
                mask = apart >= 0
                if rule.window is not None:
                    mask &= apart < rule.window
                mask = mask.to(query.device)
            out, lse = partial(query[:, :, at], keys[:, :, k0:k1], values[:, :, k0:k1], rule, mask)
            yield at, out, lse


def gathered(parts: Iterator[Tensors], most: int) -> Iterator[Tensors]:
    """Parts [kv heads, n, D] put together to some `most` tokens [1, kv heads, n, D]: fewer, larger products.

    A part's memory may be taken back once the next is asked for, so that it is copied at once.
    """
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    held = 0
    for k, v in parts:
        if k.shape[1] >= most and not held:
            yield k[None], v[None]
            continue
        keys.append(k.clone())
        values.append(v.clone())
        held += k.shape[1]
        if held >= most:
            yield torch.cat(keys, 1)[None], torch.cat(values, 1)[None]
            keys, values, held = [], [], 0
    if held:
        yield torch.cat(keys, 1)[None], torch.cat(values, 1)[None]

"""Attention put together from parts, in plain torch: any split, any order, and parts of nothing."""

from __future__ import annotations

import itertools

import pytest
import torch

from kvstore.attention import Rule, partial
from kvstore.softmax import AttentionState

HEADS, KV_HEADS, LENGTH, WIDTH, OUT = 6, 2, 90, 16, 12
CUTS = ((0, 1), (1, 1), (1, 50), (50, 90))


def tensors(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(7)
    q = torch.randn(2, 1, HEADS, WIDTH, generator=g).to(dtype).transpose(1, 2)  # as projections leave it
    k, v = (torch.randn(2, KV_HEADS, LENGTH, width, generator=g).to(dtype) for width in (WIDTH, OUT))
    return q, k, v


def attended(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One part as `merge` takes it, in float32."""
    out, lse = partial(q.float(), k.float(), v.float(), Rule(scale, softcap=softcap))
    return out, lse[..., 0]


def exact(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = (t.double().repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
    scores = q.double() @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    return scores.softmax(-1) @ v, scores.logsumexp(-1)[..., 0]


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_parts_in_any_order(softcap: float | None) -> None:
    q, k, v = tensors()
    want, want_lse = exact(q, k, v, 0.9, softcap)
    parts = [attended(q, k[:, :, i:j], v[:, :, i:j], 0.9, softcap) for i, j in CUTS]
    assert (parts[1][1] == -torch.inf).all() and (parts[1][0] == 0).all(), "of no tokens"
    for order in itertools.permutations(parts):
        state = AttentionState.empty(2, HEADS, OUT)
        for part in order:
            state.merge(*part)
        out, lse = state.result()
        assert out.shape == (2, HEADS, 1, OUT) and out.dtype is lse.dtype is torch.float32
        assert torch.allclose(out.double(), want, atol=1e-6) and torch.allclose(lse.double(), want_lse, atol=1e-5)


def test_results_merge_like_parts() -> None:
    """Large scores too, where e^score alone would be infinite; and a state changes in place."""
    q, k, v = tensors()
    want, want_lse = exact(q, k, v, 100.0, None)
    one, other = AttentionState.empty(2, HEADS, OUT), AttentionState.empty(2, HEADS, OUT)
    where = [t.data_ptr() for t in vars(one).values()]
    for state, cuts in ((one, CUTS[:3]), (other, CUTS[3:])):
        for i, j in cuts:
            state.merge(*attended(q, k[:, :, i:j], v[:, :, i:j], 100.0))
    one.merge(*other.result())
    one.merge(*AttentionState.empty(2, HEADS, OUT).result())
    out, lse = one.result()
    assert want_lse.max() > 100
    assert torch.allclose(out.double(), want, atol=1e-4) and torch.allclose(lse.double(), want_lse, rtol=1e-6)
    assert [t.data_ptr() for t in vars(one).values()] == where
    assert all(t.is_contiguous() for t in vars(one).values())


def test_nothing() -> None:
    """Of no tokens come zeros; and it adds nothing, whatever it says its attention is."""
    q, k, v = tensors()
    nothing = torch.full((2, HEADS, 1, OUT), torch.nan), torch.full((2, HEADS), -torch.inf)
    state = AttentionState.empty(2, HEADS, OUT)
    state.merge(*nothing)
    out, lse = state.result()
    assert (out == 0).all() and (lse == -torch.inf).all()
    state.merge(*attended(q, k, v, 1.0))
    before = state.result()
    state.merge(*nothing)
    assert all(torch.equal(now, was) for now, was in zip(state.result(), before, strict=True))
    assert (before[0] != 0).all()


def test_what_is_no_number_stays_none() -> None:
    q, k, v = tensors()
    bad = k.clone()
    bad[0, 0, 3, 3] = torch.nan  # of the heads that read kv head 0
    state = AttentionState.empty(2, HEADS, OUT)
    for keys, (i, j) in ((bad, (0, 50)), (k, (50, 90))):
        state.merge(*attended(q, keys[:, :, i:j], v[:, :, i:j], 1.0))
    out, _ = state.result()
    assert out[0, : HEADS // KV_HEADS].isnan().all()
    assert not out[0, HEADS // KV_HEADS :].isnan().any() and not out[1].isnan().any()


def test_types() -> None:
    q, k, v = tensors(torch.bfloat16)
    want, want_lse = exact(q, k, v, 0.3, None)
    state = AttentionState.empty(2, HEADS, OUT)
    out, lse = partial(q, k, v, Rule(0.3))
    assert out.dtype is torch.bfloat16 and lse.dtype is torch.float32
    state.merge(out, lse[..., 0].double())
    got, got_lse = state.result()
    assert torch.allclose(got.double(), want, atol=2e-2) and torch.allclose(got_lse.double(), want_lse, atol=2e-2)
    assert not torch.allclose(out.float(), torch.zeros(()), atol=1e-2)

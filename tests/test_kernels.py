"""The experts' kernel against float64, against torch, against itself; and what happens where it cannot be built."""

from __future__ import annotations

import itertools
import os
import shutil
import stat
import subprocess
import sys
import threading
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB, build
from torch import nn
from torch.nn.functional import gelu, linear, silu
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import moe.experts
import offload
from kvstore.attention import Rule, partial
from kvstore.softmax import AttentionState
from moe import kernels
from moe.kernels import Kernel, Matrices, load_from, matrices
from offload import hf, native

ROOT = Path(__file__).resolve().parent.parent
TYPES = [torch.float32, torch.bfloat16]
SHAPES = [(64, 32), (33, 17), (70, 100), (1030, 515), (256, 7), (5, 300)]
# of the largest value: what another order of summation, and for bfloat16 a rounding at every stage, may change
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2**-6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels") / "kernels"


@pytest.fixture(scope="module")
def kernel(folder: Path) -> Kernel:
    found = load_from(folder)
    if found is None:
        pytest.skip("no C compiler here")
    return found


class Layer:
    """Random experts, tokens and a routing that leaves some experts without any."""

    def __init__(
        self,
        hidden: int,
        inner: int,
        tokens: int,
        dtype: torch.dtype,
        *,
        experts: int = 6,
        top_k: int = 2,
        seed: int = 0,
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        self.gate_up = torch.randn(experts, 2 * inner, hidden, generator=g).mul_(hidden**-0.5).to(dtype)
        self.down = torch.randn(experts, hidden, inner, generator=g).mul_(inner**-0.5).to(dtype)
        self.x = torch.randn(tokens, hidden, generator=g).mul_(2).to(dtype)
        scores = torch.rand(tokens, experts - 1, generator=g)  # nobody chooses the last one
        self.index = scores.topk(top_k, dim=-1).indices
        self.weights = torch.rand(tokens, top_k, generator=g)
        self.dtype, self.top_k = dtype, top_k

    def places(self) -> list[list[int]]:
        flat = self.index.reshape(-1).tolist()
        return [[p for p, chosen in enumerate(flat) if chosen == e] for e in range(len(self.gate_up))]

    def at(self, e: int) -> Matrices:
        found = matrices({"gate_up_proj": self.gate_up[e], "down_proj": self.down[e]}, self.dtype)
        assert found is not None
        return found

    def by_kernel(self, kernel: Kernel, order: list[int] | None = None, activation: int = 0) -> torch.Tensor:
        out = torch.full((self.index.numel(), self.x.size(1)), torch.nan, dtype=self.dtype)
        places = self.places()
        experts = [(self.at(e), places[e]) for e in order or range(len(places))]
        flat = self.weights.reshape(-1)
        kernel.run(self.x, experts, flat, out, top_k=self.top_k, activation=activation)
        return out

    def by_torch(self, act: Any = silu) -> torch.Tensor:
        out = torch.zeros(self.index.numel(), self.x.size(1), dtype=self.dtype)
        for e, at in enumerate(self.places()):
            gate, up = linear(self.x[[p // self.top_k for p in at]], self.gate_up[e]).chunk(2, dim=-1)
            y = linear(act(gate) * up, self.down[e])
            out[at] = (y * self.weights.reshape(-1, 1)[at]).to(self.dtype)
        return out

    def exact(self, act: Any = silu) -> torch.Tensor:
        """In float64, nothing rounded on the way."""
        out = torch.zeros(self.index.numel(), self.x.size(1), dtype=torch.float64)
        for e, at in enumerate(self.places()):
            x = self.x[[p // self.top_k for p in at]].double()
            gate, up = linear(x, self.gate_up[e].double()).chunk(2, dim=-1)
            y = linear(act(gate) * up, self.down[e].double())
            out[at] = y * self.weights.double().reshape(-1, 1)[at]
        return out


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


# what it computes


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("hidden", "inner"), SHAPES)
def test_against_float64_and_torch(kernel: Kernel, hidden: int, inner: int, dtype: torch.dtype) -> None:
    for tokens in range(1, 17):
        layer = Layer(hidden, inner, tokens, dtype, seed=tokens)
        exact, by_torch = layer.exact(), layer.by_torch()
        assert error(by_torch, exact) < TOLERANCE[dtype]
        for level, threads in itertools.product(kernel.levels, (1, 2)):
            got = layer.by_kernel(kernel.at(level, threads))
            assert error(got, exact) < TOLERANCE[dtype], (level, threads, tokens)
            assert error(got, by_torch) < TOLERANCE[dtype], (level, threads, tokens)


@pytest.mark.parametrize("tokens", [17, 40])
@pytest.mark.parametrize("dtype", TYPES)
def test_more_tokens_than_one_reading_of_a_block_serves(kernel: Kernel, tokens: int, dtype: torch.dtype) -> None:
    layer = Layer(96, 72, tokens, dtype, experts=2, top_k=1)  # all choose the same one
    assert len(layer.places()[0]) == tokens
    for level in kernel.levels:
        assert error(layer.by_kernel(kernel.at(level, 2)), layer.exact()) < TOLERANCE[dtype]


@pytest.mark.parametrize("level", kernels.LEVELS)
def test_rounds_where_torch_does(kernel: Kernel, level: str) -> None:
    """With sums that are exact in any order, what is left is where values are rounded: then the bits are torch's."""
    if level not in kernel.levels:
        pytest.skip("not on this processor")
    g = torch.Generator().manual_seed(5)
    layer = Layer(64, 48, 9, torch.bfloat16)
    layer.x = (torch.randint(-15, 16, layer.x.shape, generator=g) / 8).bfloat16()
    layer.gate_up = (torch.randint(-7, 8, layer.gate_up.shape, generator=g) / 16).bfloat16()
    layer.down.zero_()
    pick = torch.randint(0, 48, (6, 64, 1), generator=g)  # a row of down picks one of the values, times 3/2
    layer.down.scatter_(2, pick, 1.5)
    want = layer.by_torch()
    assert torch.equal(layer.by_kernel(kernel.at(level, 2)), want)
    assert want.unique().numel() > 300


@pytest.mark.parametrize("dtype", TYPES)
def test_tanh_gelu(kernel: Kernel, dtype: torch.dtype) -> None:
    layer = Layer(70, 100, 5, dtype)
    for level in kernel.levels:
        got = layer.by_kernel(kernel.at(level), activation=1)
        assert error(got, layer.exact(lambda x: gelu(x, approximate="tanh"))) < TOLERANCE[dtype]
        assert error(got, layer.exact()) > 3 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TYPES)
def test_activation_at_every_size(kernel: Kernel, dtype: torch.dtype) -> None:
    """One row of gate per value, from the smallest to where e^-x overflows; NaN and infinity stay what they are."""
    values = torch.cat([torch.linspace(-120, 120, 481), torch.logspace(-30, 30, 61), -torch.logspace(-30, 30, 61)])
    special = torch.tensor([torch.inf, torch.nan])
    rounding = 2**-7 if dtype is torch.bfloat16 else 0.0
    for given, number, act, relative in (
        (torch.cat([values, special]), 0, silu, 1e-6),
        # what is left of a small tail is better than torch's own float32, where 1 + tanh cancels
        (values.clamp(-1e12, 1e12), 1, lambda x: gelu(x, approximate="tanh"), 2e-5),
    ):
        gate = given.to(dtype)
        want = act(gate.double())
        for level in kernel.levels:
            got = _activated(kernel.at(level, 1), gate, number).double()
            near = torch.isclose(got, want, rtol=relative + rounding, atol=1e-13) | (got == want)
            near |= got.isnan() & want.isnan()
            assert near.all(), (level, gate[~near], got[~near], want[~near])


def _activated(kernel: Kernel, gate: torch.Tensor, number: int) -> torch.Tensor:
    """act(gate), by experts of one hidden and one inner element each."""
    n, dtype = len(gate), gate.dtype
    gate_up = torch.stack([gate, torch.ones_like(gate)], dim=1)[..., None].contiguous()  # [n, 2, 1]
    down = torch.ones(n, 1, 1, dtype=dtype)
    experts = []
    for i in range(n):
        where = matrices({"gate_up_proj": gate_up[i], "down_proj": down[i]}, dtype)
        assert where is not None
        experts.append((where, [i]))
    out = torch.empty(n, 1, dtype=dtype)
    kernel.run(torch.ones(n, 1, dtype=dtype), experts, torch.ones(n), out, top_k=1, activation=number)
    return out[:, 0]


# linear layers


def product(
    rows: int, columns: int, tokens: int, dtype: torch.dtype, *, bias: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    g = torch.Generator().manual_seed(rows + tokens)
    x = torch.randn(tokens, columns, generator=g).to(dtype)
    w = torch.randn(rows, columns, generator=g).mul_(columns**-0.5).to(dtype)
    return x, w, torch.randn(rows, generator=g).to(dtype) if bias else None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "columns"), [(64, 128), (1, 1), (3, 5), (67, 33), (130, 1031), (515, 1024)])
def test_linear(kernel: Kernel, rows: int, columns: int, dtype: torch.dtype, bias: bool) -> None:
    for tokens in (*range(1, 18), 33):
        x, w, b = product(rows, columns, tokens, dtype, bias=bias)
        exact = linear(x.double(), w.double(), None if b is None else b.double())
        # one rounding at the end: half a unit in the last of eight digits, where torch has it too
        rounding = (2**-8 if dtype is torch.bfloat16 else 2**-23) * exact.abs()
        for level, threads in itertools.product(kernel.levels, (1, 2, 5)):
            got = kernel.at(level, threads).linear(x, w, b)
            assert got is not None and got.dtype is dtype and got.shape == (tokens, rows)
            spread = (x.double().abs() @ w.double().abs().t()) * 2**-19  # of sums in float32, in any order
            assert ((got.double() - exact).abs() <= rounding + spread).all(), (level, threads, tokens)


def test_linear_large_enough_for_all_threads(kernel: Kernel) -> None:
    for dtype in TYPES:
        x, w, _ = product(1003, 515, 3, dtype)
        exact = linear(x.double(), w.double())
        for level in kernel.levels:
            want = kernel.at(level, 1).linear(x, w)
            assert want is not None
            assert error(want, exact) < TOLERANCE[dtype]
            for threads in (2, 3, 7):
                got = kernel.at(level, threads).linear(x, w)
                assert got is not None and torch.equal(got, want)


@pytest.mark.parametrize("dtype", TYPES)
def test_linear_of_a_token_does_not_depend_on_the_others(kernel: Kernel, dtype: torch.dtype) -> None:
    x, w, b = product(70, 333, 17, dtype, bias=True)
    for level in kernel.levels:
        at = kernel.at(level)
        together = at.linear(x, w, b)
        assert together is not None
        for t in range(len(x)):
            alone = at.linear(x[t], w, b)
            assert alone is not None and alone.shape == (70,)
            assert torch.equal(alone, together[t])


def test_linear_of_any_layout(kernel: Kernel) -> None:
    x, w, _ = product(40, 48, 6, torch.bfloat16)
    want = kernel.linear(x, w)
    assert want is not None
    wide = torch.full((40, 51), torch.nan, dtype=torch.bfloat16)
    wide[:, 1:49] = w
    spread = torch.full((48, 12), torch.nan, dtype=torch.bfloat16)
    spread[:, ::2] = x.t()
    for got in (
        kernel.linear(spread[:, ::2].t(), w),
        kernel.linear(x, wide[:, 1:49]),
        kernel.linear(x.view(2, 3, 48), w),
    ):
        assert got is not None and torch.equal(got.view(6, 40), want)
    assert kernel.linear(x[:0], w).shape == (0, 40)  # type: ignore[union-attr]


def test_linear_of_values_that_are_no_numbers_or_hardly_any(kernel: Kernel) -> None:
    for dtype in TYPES:
        for level in kernel.levels:
            at = kernel.at(level)
            x, w, b = product(9, 50, 4, dtype, bias=True)
            x[1, 49], x[2, 0], w[3, 7] = torch.nan, torch.inf, -torch.inf
            got, want = at.linear(x, w, b), linear(x, w, b)
            assert got is not None
            assert torch.equal(got.isnan(), want.isnan())
            assert torch.equal(got.isinf(), want.isinf())
            assert torch.equal(got[got.isinf()], want[want.isinf()])
            ones = torch.ones(5, 64, dtype=dtype)
            small = at.linear(torch.full((1, 64), 2.0**-126, dtype=dtype), ones)
            assert small is not None and torch.equal(small, torch.full((1, 5), 2.0**-120, dtype=dtype))
            smaller = at.linear(torch.full((1, 64), 2.0**-128, dtype=dtype), ones)
            # the processor's own products of bfloat16 take what is below 2^-126 for zero
            flushed = level == "avx512_bf16" and dtype is torch.bfloat16
            assert smaller is not None
            assert torch.equal(smaller, torch.full((1, 5), 0.0 if flushed else 2.0**-122, dtype=dtype))


def test_linear_leaves_the_rest_to_torch(kernel: Kernel) -> None:
    x, w = torch.zeros(2, 8), torch.zeros(3, 8)
    assert kernel.linear(x, w) is not None
    assert kernel.linear(x.half(), w.half()) is None
    assert kernel.linear(x.bfloat16(), w) is None
    assert kernel.linear(x, w.t().contiguous().t()) is None
    assert kernel.linear(x[:, :7], w) is None
    assert kernel.linear(x, w.to("meta")) is None
    assert kernel.linear(x, w, torch.zeros(3, dtype=torch.bfloat16)) is None
    assert kernel.linear(x, w, torch.zeros(2)) is None


class Quantised(nn.Linear):
    pass


def test_linear_modules(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleList([nn.Linear(32, 16), nn.Linear(32, 16, bias=False), Quantised(32, 16)])
    plain = nn.ModuleList([nn.Linear(32, 16), nn.Linear(32, 16, bias=False), Quantised(32, 16)])
    plain.load_state_dict(model.state_dict())
    assert native.attach(model, torch.device("cpu"))
    assert not native.attach(plain, torch.device("meta"))
    asked: list[int] = []
    run = Kernel.linear

    def counted(kernel: Kernel, x: torch.Tensor, *args: Any) -> torch.Tensor | None:
        asked.append(x.numel() // 32)
        return run(kernel, x, *args)

    monkeypatch.setattr(Kernel, "linear", counted)
    for tokens in (1, 16, 17):
        x = torch.randn(1, tokens, 32)
        with torch.inference_mode():
            for one, other in zip(model, plain, strict=True):
                assert error(one(x), other(x)) < 1e-6
                one.weight.data.mul_(2)  # looked up in each call
                other.weight.data.mul_(2)
                assert error(one(x), other(x)) < 1e-6
    assert asked == [1] * 4 + [16] * 4
    model[0](torch.randn(1, 32, requires_grad=True)).sum().backward()
    assert model[0].weight.grad is not None
    by = native.product(torch.device("cpu"))
    x, w, _ = product(16, 32, 3, torch.bfloat16)
    assert torch.equal(by(x, w), run(kernel, x, w))  # type: ignore[arg-type]
    asked.clear()
    for tokens in (8, 9):
        by(torch.zeros(tokens, 32, dtype=torch.bfloat16), w)
    assert asked == [8], "torch's products of bfloat16 are as fast from there on"
    assert by(x.half(), w.half()).dtype is torch.float16


# attention


def attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """In float64."""
    shared = query.size(1) // key.size(1)
    k, v = (t.double().repeat_interleave(shared, dim=1) for t in (key, value))
    weights = (query.double() @ k.transpose(-1, -2) * scale).softmax(dim=-1)
    return (weights @ v).transpose(1, 2)


def held(
    heads: int, kv_heads: int, length: int, width: int, out: int, dtype: torch.dtype, batch: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(heads + length)
    q = torch.randn(batch, 1, heads, width, generator=g).mul_(3).to(dtype).transpose(1, 2)  # as projections leave it
    room = torch.full((batch, kv_heads, length + 9, width + out), torch.nan, dtype=dtype)
    k, v = room[:, :, :length, :width], room[:, :, 3 : length + 3, width:]  # with tokens to come behind, as in a cache
    k.copy_(torch.randn(k.shape, generator=g))
    v.copy_(torch.randn(v.shape, generator=g))
    return q, k, v


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "out"),
    [(1, 1, 8, 8), (4, 2, 33, 33), (6, 1, 70, 17), (16, 16, 64, 64), (32, 2, 24, 256)],
)
def test_attention(kernel: Kernel, heads: int, kv_heads: int, width: int, out: int, dtype: torch.dtype) -> None:
    for length in (1, 2, 7, 63, 64, 65, 130, 333):
        q, k, v = held(heads, kv_heads, length, width, out, dtype, batch=2)
        want = attended(q, k, v, 0.3)
        for level, threads in itertools.product(kernel.levels, (1, 3)):
            got = kernel.at(level, threads).attention(q, k, v, 0.3)
            assert got is not None and got.shape == (2, 1, heads, out) and got.is_contiguous()
            worst = error(got, want)
            assert worst < (4e-6 if dtype is torch.float32 else 2**-8), (level, threads, length)


def test_attention_large_enough_for_all_threads(kernel: Kernel) -> None:
    q, k, v = held(8, 8, 4000, 32, 32, torch.float32)
    for level in kernel.levels:
        alone = kernel.at(level, 1).attention(q, k, v, 1.0)
        assert alone is not None
        assert error(alone, attended(q, k, v, 1.0)) < 1e-5
        for threads in (2, 5):
            assert torch.equal(kernel.at(level, threads).attention(q, k, v, 1.0), alone)  # type: ignore[arg-type]


def test_attention_to_scores_of_every_size(kernel: Kernel) -> None:
    """Scores that grow, fall, and are far apart; and values that are no numbers."""
    for dtype, level in itertools.product(TYPES, kernel.levels):
        at = kernel.at(level)
        q, k, v = held(2, 1, 200, 16, 16, dtype)
        for factor in (0.0, 1e-3, 40.0, -40.0):
            grown = (k.float() * torch.linspace(0, factor, 200)[:, None]).to(dtype)
            got = at.attention(q, grown, v, 1.0)
            assert got is not None
            assert error(got, attended(q, grown, v, 1.0)) < (2e-5 if dtype is torch.float32 else 2**-7)
        v[0, 0, 150, 3] = torch.nan
        got = at.attention(q, k, v, 1.0)
        assert got is not None
        assert got[..., 3].isnan().all() and not got[..., :3].isnan().any()
        k[0, 0, 70, 5] = torch.nan
        got = at.attention(q, k, v, 1.0)
        assert got is not None and got.isnan().all()


def test_attention_leaves_the_rest_to_torch(kernel: Kernel) -> None:
    q, k, v = held(4, 2, 5, 8, 8, torch.float32)
    assert kernel.attention(q, k, v, 1.0) is not None
    assert kernel.attention(q.expand(1, 4, 2, 8), k, v, 1.0) is None
    assert kernel.attention(q.half(), k.half(), v.half(), 1.0) is None
    assert kernel.attention(q.bfloat16(), k, v, 1.0) is None
    assert kernel.attention(q[:, :3], k, v, 1.0) is None
    assert kernel.attention(q, k[:, :, :4], v, 1.0) is None
    assert kernel.attention(q, k[..., ::2], v, 1.0) is None
    assert kernel.attention(q, k.transpose(-1, -2).contiguous().transpose(-1, -2), v, 1.0) is None
    assert kernel.attention(*held(34, 2, 5, 8, 8, torch.float32), 1.0) is None
    assert kernel.attention(*held(2, 2, 5, 8, 257, torch.float32), 1.0) is None


class Attends(nn.Module):
    num_key_value_groups = 2


def test_who_attends(kernel: Kernel) -> None:
    """Only modules of a model that asked for it, and only what the kernel computes."""
    q, k, v = held(4, 2, 70, 8, 8, torch.float32)
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    asked: list[float] = []

    def attend(*args: Any) -> torch.Tensor | None:
        asked.append(args[3])
        return kernel.attention(*args)

    own, other = Attends(), Attends()
    hf.attach_attention(own, attend)
    mask = torch.ones(1, 1, 1, 70, dtype=torch.bool)
    with torch.inference_mode():
        want = sdpa(other, q, k, v, None, scaling=0.5)[0]
        assert not asked
        got, none = sdpa(own, q, k, v, None, scaling=0.5, dropout=0.0, sliding_window=None)
        assert none is None and got.shape == want.shape and error(got, want) < 1e-6
        assert asked == [0.5]
        assert error(sdpa(own, q, k, v, None)[0], sdpa(other, q, k, v, None)[0]) < 1e-6
        assert asked == [0.5, 8**-0.5]
        sdpa(own, q, k, v, mask)
        sdpa(own, q.expand(1, 4, 3, 8), k, v, None)
        sdpa(own, q.half(), k.half(), v.half(), None, is_causal=False)
        assert asked == [0.5, 8**-0.5, 8**-0.5], "asked, and left to torch"
    sdpa(own, q, k, v, None)
    assert len(asked) == 3, "the kernel keeps nothing for a gradient"


# attention to chunks


def chunked(k: torch.Tensor, v: torch.Tensor, sizes: list[int]) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """Parts of each sequence of k [B, kv heads, L, D] and v in turn, `sizes` tokens each, each a copy of its own."""
    parts, start = [], 0
    for n in sizes:
        for b in range(k.size(0)):
            parts.append((b, *(t[b, :, start : start + n].contiguous() for t in (k, v))))
        start += n
    assert start == k.size(2)
    return parts


def added(kernel: Kernel, q: torch.Tensor, parts: Any, scale: float, softcap: float | None = None) -> AttentionState:
    state = AttentionState.empty(q.size(0), q.size(1), parts[0][2].size(2))
    assert kernel.attend_chunks(q, parts, state.largest, state.total, state.mixed, scale, softcap)
    return state


def exact(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention [B, heads, 1, Dv] and log-sum-exp [B, heads], in float64."""
    k, v = (t.double().repeat_interleave(q.size(1) // k.size(1), dim=1) for t in (k, v))
    scores = q.double() @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.softmax(dim=-1) @ v, scores.logsumexp(dim=-1)[..., 0]


def same(one: AttentionState, other: AttentionState) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("largest", "total", "mixed"))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "out"),
    [(1, 1, 8, 8), (4, 1, 33, 33), (8, 2, 64, 48), (6, 2, 70, 17), (3, 3, 128, 128), (32, 2, 24, 256)],
)
def test_chunks(kernel: Kernel, heads: int, kv_heads: int, width: int, out: int, dtype: torch.dtype) -> None:
    sizes = ([1], [5, 0, 1], [64, 64], [63, 1, 65, 7], [100, 100, 33], [256, 3, 64, 16])
    for softcap, held_in in itertools.product((None, 4.0), sizes):
        q, k, v = held(heads, kv_heads, sum(held_in), width, out, dtype, batch=2)
        want, want_lse = exact(q, k, v, 0.3, softcap)
        parts = chunked(k, v, held_in)
        for level in kernel.levels:
            state = added(kernel.at(level, 1), q, parts, 0.3, softcap)
            got, lse = state.result()
            assert got.shape == (2, heads, 1, out) and got.dtype is torch.float32
            assert error(got, want) < 4e-6, (level, held_in)  # of bfloat16 too: what comes out is not rounded
            assert (lse - want_lse).abs().max() < 1e-5 * (1 + want_lse.abs().max())
            for cut in range(len(parts)):  # as they arrive
                some = added(kernel.at(level, 2), q, parts[: cut + 1], 0.3, softcap)
                for part in parts[cut + 1 :]:
                    assert kernel.at(level).attend_chunks(q, [part], some.largest, some.total, some.mixed, 0.3, softcap)
                assert same(some, state), "nothing shows how the parts are divided among calls"


@pytest.mark.parametrize("dtype", TYPES)
def test_chunks_are_what_one_piece_is(kernel: Kernel, dtype: torch.dtype) -> None:
    """With chunks of whole blocks the order of summation is that of one piece; in a slot too, with room behind."""
    q, k, v = held(6, 2, 64 * 5 + 9, 40, 24, dtype)
    for level in kernel.levels:
        at = kernel.at(level)
        whole = at.attention(q, k, v, 0.7)
        assert whole is not None
        views = [(0, k[0, :, i : i + 64], v[0, :, i : i + 64]) for i in range(0, k.size(2), 64)]
        for parts in (views, chunked(k, v, [128, 64, 128, 9])):
            out, _ = added(at, q, parts, 0.7).result()
            assert torch.equal(out.transpose(1, 2).to(dtype), whole)


@pytest.mark.parametrize("dtype", TYPES)
def test_chunks_enough_for_all_threads(kernel: Kernel, dtype: torch.dtype) -> None:
    q, k, v = held(8, 4, 3000, 64, 64, dtype, batch=3)
    parts = chunked(k, v, [256] * 11 + [184])
    parts.reverse()
    for level in kernel.levels:
        alone = added(kernel.at(level, 1), q, parts, 0.2)
        assert error(alone.result()[0], exact(q, k, v, 0.2, None)[0]) < 1e-5
        for threads in (2, 3, 7):
            assert same(added(kernel.at(level, threads), q, parts, 0.2), alone)


def test_chunks_elsewhere(kernel: Kernel) -> None:
    """Some tokens by the kernel, some by torch, in any order, and a part of none."""
    for dtype, softcap in itertools.product(TYPES, (None, 2.0)):
        q, k, v = held(6, 2, 300, 32, 16, dtype, batch=2)
        want, want_lse = exact(q, k, v, 0.4, softcap)
        mine = chunked(k[:, :, :100], v[:, :, :100], [64, 36])
        whole = q.float(), k.float(), v.float()
        rule = Rule(0.4, softcap=softcap)
        theirs = [partial(whole[0], *(t[:, :, i:j] for t in whole[1:]), rule) for i, j in ((100, 101), (101, 300))]
        later = AttentionState.empty(2, 6, 16)
        later.merge(torch.full((2, 6, 1, 16), torch.nan), torch.full((2, 6), -torch.inf))
        assert not later.total.any() and (later.result()[0] == 0).all() and (later.result()[1] == -torch.inf).all()
        for out, lse in theirs:
            later.merge(out, lse[..., 0])
        assert kernel.attend_chunks(q, mine, later.largest, later.total, later.mixed, 0.4, softcap)
        first = added(kernel, q, mine, 0.4, softcap)
        for out, lse in theirs:
            first.merge(out, lse[..., 0])
        for state in (first, later):
            out, lse = state.result()
            assert error(out, want) < 1e-5
            assert (lse - want_lse).abs().max() < 1e-5 * (1 + want_lse.abs().max())


def test_chunks_of_scores_of_every_size(kernel: Kernel) -> None:
    """Between -cap and cap with a cap, also where tanh is 1; a part that is no number makes the rest none."""
    for dtype, level in itertools.product(TYPES, kernel.levels):
        at = kernel.at(level)
        q, k, v = held(2, 1, 200, 16, 16, dtype)
        for factor, softcap in itertools.product((0.0, 1e-3, 1.0, 40.0, -3000.0), (None, 30.0)):
            grown = (k.float() * torch.linspace(0, factor, 200)[:, None]).to(dtype)
            state = added(at, q, chunked(grown, v, [64, 60, 76]), 1.0, softcap)
            want, want_lse = exact(q, grown, v, 1.0, softcap)
            out, lse = state.result()
            near = 1e-4 if softcap is None and abs(factor) > 100 else 2e-5
            assert error(out, want) < near * max(1, abs(factor) / 100), (factor, softcap)
            assert torch.allclose(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
        k[0, 0, 70, 5] = torch.nan
        for softcap in (None, 30.0):
            assert added(at, q, chunked(k, v, [64, 60, 76]), 1.0, softcap).result()[0].isnan().all()


def test_chunks_leave_the_rest_to_torch(kernel: Kernel) -> None:
    q, k, v = held(4, 2, 10, 8, 8, torch.float32)
    state = AttentionState.empty(1, 4, 8)
    sums = state.largest, state.total, state.mixed

    def takes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
        good = (0, torch.ones(2, 3, 8), torch.ones(2, 3, 8))
        return kernel.attend_chunks(q, [good, (0, k, v)], *sums, 1.0)

    assert kernel.attend_chunks(q, [], *sums, 1.0)
    assert kernel.attend_chunks(q, [(0, k[0, :, :0], v[0, :, :0])], *sums, 1.0)
    for query, keys, values in (
        (q, k[0, :1], v[0, :1]),
        (q, k[0, :, :9], v[0]),
        (q, k[0, ..., :4], v[0]),
        (q, k[0], v[0, ..., :4]),
        (q, k[0, ..., ::2].repeat(1, 1, 2), v[0].half()),
        (q, k[0].bfloat16(), v[0].bfloat16()),
        (q, torch.zeros(2, 10, 16)[..., ::2], v[0]),
        (q, k[0].to("meta"), v[0]),
        (q.half(), k[0].half(), v[0].half()),
        (q.expand(1, 4, 2, 8), k[0], v[0]),
        (q[:, :3], k[0], v[0]),
    ):
        assert not takes(query, keys, values)
    assert (state.largest == -torch.inf).all() and not state.total.any() and not state.mixed.any(), "nothing is added"
    assert takes(q, k[0], v[0])
    wide = AttentionState.empty(1, 2, 257)
    part = (0, torch.ones(2, 3, 8), torch.ones(2, 3, 257))
    assert not kernel.attend_chunks(q[:, :2], [part], wide.largest, wide.total, wide.mixed, 1.0)
    many = AttentionState.empty(1, 34, 8)
    assert not kernel.attend_chunks(torch.ones(1, 34, 1, 8), [(0, k[0], v[0])], *vars(many).values(), 1.0)


def test_tables_with_parts_of_nothing(kernel: Kernel) -> None:
    """Sequences in any order, parts without tokens anywhere, and their addresses never looked at."""
    q, k, v = held(4, 2, 150, 8, 8, torch.float32, batch=3)
    strides = (*k.stride()[1:3], *v.stride()[1:3])
    size = k.element_size()
    table, none = array("q"), (1, 0, 0, 0)
    for row, start, stop in ((2, 0, 100), (0, 0, 70), (2, 100, 150), (1, 0, 150), (0, 70, 150)):
        at = (row, *(t[row].data_ptr() + start * t.stride(2) * size for t in (k, v)), stop - start)
        table.extend((row, *none[1:]))
        table.extend(at)
        table.extend(none)
    for level, threads in itertools.product(kernel.levels, (1, 3)):
        state = AttentionState.empty(3, 4, 8)
        sums = state.largest, state.total, state.mixed
        assert kernel.at(level, threads).attend_table(q, table, strides, 2, *sums, 0.5)
        assert error(state.result()[0], exact(q, k, v, 0.5, None)[0]) < 1e-5
        before = state.mixed.clone()
        assert kernel.at(level, threads).attend_table(q, array("q", none * 5), strides, 2, *sums, 0.5)
        assert torch.equal(state.mixed, before)


def test_tables_that_make_no_sense(kernel: Kernel) -> None:
    q, k, v = held(4, 2, 10, 8, 8, torch.float32, batch=2)
    state = AttentionState.empty(2, 4, 8)
    strides = (*k.stride()[1:3], *v.stride()[1:3])
    good = (1, k[1].data_ptr(), v[1].data_ptr(), 10)

    def add(*rows: int, softcap: float | None = None) -> bool:
        sums = state.largest, state.total, state.mixed
        return kernel.attend_table(q, array("q", rows), strides, 2, *sums, 1.0, softcap)

    for bad in ((2, *good[1:]), (-1, *good[1:]), (*good[:3], -1)):
        with pytest.raises(ValueError, match="a part"):
            add(*good, *bad)
    with pytest.raises(ValueError, match="four"):
        add(*good, 0)
    for softcap in (0.0, -1.0):
        with pytest.raises(ValueError, match="cap"):
            add(*good, softcap=softcap)
    assert (state.largest == -torch.inf).all() and not state.total.any()
    assert add(*good)
    out, _ = state.result()
    assert error(out[1:], exact(q[1:], k[1:], v[1:], 1.0, None)[0]) < 1e-5
    assert (out[0] == 0).all() and (state.largest[0] == -torch.inf).all(), "a sequence without parts stays as it was"


# what it does not depend on


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("hidden", "inner"), [(128, 96), (71, 133)])
def test_bits_do_not_depend_on_company_threads_or_order(
    kernel: Kernel, hidden: int, inner: int, dtype: torch.dtype
) -> None:
    layer = Layer(hidden, inner, 13, dtype, experts=7, top_k=3)
    for level in kernel.levels:
        want = layer.by_kernel(kernel.at(level, 1))
        for threads in (2, 3, 8):
            assert torch.equal(layer.by_kernel(kernel.at(level, threads)), want)
        assert torch.equal(layer.by_kernel(kernel.at(level, 2), order=[4, 6, 0, 5, 2, 3, 1]), want)
        alone = torch.empty_like(want)
        for e, places in enumerate(layer.places()):
            for p in places:
                kernel.at(level).run(
                    layer.x, [(layer.at(e), [p])], layer.weights.reshape(-1), alone, top_k=3, activation=0
                )
        assert torch.equal(alone, want)


def test_rows_need_not_be_next_to_each_other(kernel: Kernel) -> None:
    layer = Layer(64, 32, 5, torch.bfloat16)
    want = layer.by_kernel(kernel)
    wide = torch.full((*layer.gate_up.shape[:2], 64 + 3), torch.nan, dtype=torch.bfloat16)
    wide[..., :64] = layer.gate_up
    layer.gate_up = wide[..., :64]
    tall = torch.full((5, 71), torch.nan, dtype=torch.bfloat16)
    tall[:, 1:65] = layer.x  # an odd address too
    layer.x = tall[:, 1:65]
    assert torch.equal(layer.by_kernel(kernel), want)


def test_only_its_places_are_written_and_nothing_for_experts_without_tokens(kernel: Kernel) -> None:
    layer = Layer(64, 32, 4, torch.float32)
    out = torch.full((8, 64), 7.0)
    flat = layer.weights.reshape(-1)
    kernel.run(layer.x, [(layer.at(0), []), (layer.at(1), [3]), (layer.at(2), [])], flat, out, top_k=2, activation=0)
    assert (out[[0, 1, 2, 4, 5, 6, 7]] == 7).all()
    assert (out[3] != 7).all()
    kernel.run(layer.x, [(layer.at(0), [])], flat, out, top_k=2, activation=0)
    kernel.run(layer.x, [], flat, out, top_k=2, activation=0)


def test_calls_at_the_same_time(kernel: Kernel) -> None:
    layers = [Layer(128, 96, 3, torch.bfloat16, seed=s) for s in range(4)]
    wants = [layer.by_kernel(kernel.at(threads=1)) for layer in layers]
    wrong: list[int] = []

    def work(n: int) -> None:
        for _ in range(200):
            if not torch.equal(layers[n].by_kernel(kernel.at(threads=3)), wants[n]):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not wrong
    assert not any(t.is_alive() for t in threads)


def test_a_forked_child_computes(folder: Path, kernel: Kernel) -> None:
    """Threads do not survive a fork: the child starts its own."""
    script = (
        "import os, sys, torch; from pathlib import Path; from moe.kernels import load_from\n"
        "sys.path.insert(0, 'tests'); from test_kernels import Layer\n"
        f"kernel = load_from(Path({str(folder)!r})).at(threads=3)\n"
        "layer = Layer(128, 96, 3, torch.float32); want = layer.by_kernel(kernel)\n"
        "pid = os.fork()\n"
        "same = all(torch.equal(layer.by_kernel(kernel), want) for _ in range(50))\n"
        "if not pid: os._exit(0 if same else 1)\n"
        "sys.exit(not same or os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, env=env, cwd=ROOT)


# which modules it is for


def experts_of(family: str, **changes: Any) -> Any:
    model = build(family, **changes)
    return next((m for m in model.modules() if hf.streamable_experts(m)), None)


@pytest.mark.parametrize("family", [f for f, c in FAMILIES.items() if any("expert" in name for name in c)])
def test_families(kernel: Kernel, family: str) -> None:
    module = experts_of(family)
    for dtype in TYPES:
        assert kernel.usable(module, dtype) == (family != "gpt_oss")
    assert not kernel.usable(module, torch.float16)


class Gated(nn.Module):
    """An experts module in all that is asked of one."""

    has_gate, has_bias, is_transposed, is_concatenated, has_post_expert_norm = True, False, False, True, False

    def __init__(self, act: Any = silu, **flags: bool) -> None:
        super().__init__()
        self.act_fn = act
        for name, value in flags.items():
            setattr(self, name, value)

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up


class Clamped(Gated):
    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate.clamp(max=1000.0)) * up


class Interleaved(Gated):
    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self.act_fn(gate_up[..., ::2]) * gate_up[..., 1::2]


class Swapped(Gated):
    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        up, gate = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up


class Particular(Gated):
    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not this width")


def test_other_modules_are_left_to_torch(kernel: Kernel) -> None:
    for dtype in TYPES:
        assert kernel.activation(Gated(), dtype) == 0
        assert kernel.activation(Gated(nn.SiLU()), dtype) == 0
        assert kernel.activation(Gated(nn.GELU("tanh")), dtype) == 1
        for act in (gelu, torch.relu, torch.sigmoid, lambda x: x, lambda x: silu(x) + 1e-6):
            assert not kernel.usable(Gated(act), dtype)
        for flag in ("has_bias", "is_transposed", "has_post_expert_norm"):
            assert not kernel.usable(Gated(**{flag: True}), dtype)
        assert not kernel.usable(Gated(has_gate=False), dtype)
        assert not kernel.usable(Gated(is_concatenated=False), dtype)
        for module in (Clamped(), Interleaved(), Swapped(), Particular()):
            assert not kernel.usable(module, dtype)


def test_weights_it_cannot_read() -> None:
    gate_up, down = torch.zeros(64, 16), torch.zeros(16, 32)
    good = matrices({"gate_up_proj": gate_up, "down_proj": down}, torch.float32)
    assert good is not None
    assert good.shape == (16, 32, 16, 32)
    for views in (
        {"gate_up_proj": gate_up},
        {"gate_up_proj": gate_up, "down_proj": down.t().contiguous().t()},
        {"gate_up_proj": gate_up, "down_proj": down.bfloat16()},
        {"gate_up_proj": gate_up[:62], "down_proj": down},
        {"gate_up_proj": gate_up, "down_proj": down.to("meta")},
    ):
        assert matrices(views, torch.float32) is None


# building and loading


def library(folder: Path) -> Path:
    (path,) = folder.glob("*.so")
    return path


def test_kept_privately_and_used_again(kernel: Kernel, folder: Path) -> None:
    path = library(folder)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [p.name for p in folder.iterdir()] == [path.name], "nothing is left of the work"
    before = path.stat().st_mtime_ns
    assert load_from(folder, compilers=()) is not None, "no compiler is needed the second time"
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "grown", "writable by others"])
def test_damaged_library_is_built_again(kernel: Kernel, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "kernels"
    assert load_from(folder) is not None
    path = library(folder)
    raw = path.read_bytes()
    middle = len(raw) // 2
    flipped = raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :]
    changed = {"cut": raw[:middle], "flipped": flipped, "empty": b"", "grown": raw + b"x"}.get(damage, raw)
    if damage == "writable by others":
        path.chmod(0o666)
    else:
        replaced = folder / "new"
        replaced.write_bytes(changed)
        replaced.chmod(0o600)
        replaced.replace(path)  # not in place: the other one is mapped
    assert load_from(folder, compilers=()) is None
    again = load_from(folder)
    assert again is not None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    layer = Layer(64, 32, 3, torch.float32)
    assert error(layer.by_kernel(again), layer.exact()) < TOLERANCE[torch.float32]


def test_folder_that_others_may_write_is_not_trusted(kernel: Kernel, tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    assert load_from(folder) is not None
    folder.chmod(0o777)
    assert load_from(folder) is None


def test_no_compiler_or_a_bad_one(tmp_path: Path) -> None:
    assert load_from(tmp_path / "none", compilers=()) is None
    assert load_from(tmp_path / "unknown", compilers=("no-such-compiler",)) is None
    for name, script in {
        "fails": "exit 1",
        "nothing": "exit 0",
        "junk": 'while [ "$1" != -o ]; do shift; done; echo junk > "$2"',
        "other": 'while [ "$1" != -o ]; do shift; done; echo "int f(void){return 1;}" | cc -shared -fPIC -xc - -o "$2"',
    }.items():
        bad = tmp_path / name
        bad.write_text(f"#!/bin/sh\n{script}\n")
        bad.chmod(0o755)
        assert load_from(tmp_path / f"of-{name}", compilers=(str(bad),)) is None
        left = [p for p in (tmp_path / f"of-{name}").iterdir() if p.suffix != ".so"]
        assert not left


def test_wrong_results_are_found_at_once(kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = [shutil.copy(path, tmp_path) for path in (*kernels.SOURCES, kernels.HEADER)]
    monkeypatch.setattr(kernels, "SOURCES", tuple(map(Path, copies[:-1])))
    monkeypatch.setattr(kernels, "HEADER", Path(copies[-1]))
    for name, right, wrong in (
        ("dots.c", "g / (1.0f + exponential(-z))", "g / (1.1f + exponential(-z))"),
        ("kernels.h", "#define ABI 5 ", "#define ABI 9 "),
        ("linear.c", "+ row * j->size : NULL", ": NULL"),
        ("attention.c", "shrink = expf(before - s->largest[g])", "shrink = 1"),
        ("attention.c", "m[i] /= s.total[g]", "m[i] /= 1"),
        ("attention.c", "next == part ? 0 : next[3]);", "0), i++;"),
        ("codes.c", "codes[c - half] >> 4", "codes[c - half] >> 3"),
        ("codes.c", "* step[c] + low[c]);", "* step[c]);"),
        ("dots.c", "s[r] = cap * (", "s[r] = 2 * ("),
    ):
        source = tmp_path / name
        text = source.read_text()
        assert text.count(right) == 1
        source.write_text(text.replace(right, wrong))
        assert load_from(tmp_path / "kernels") is None
        source.write_text(text)
    assert load_from(tmp_path / "kernels") is not None


def test_unwritable_cache(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert load_from(blocked / "kernels") is None


def test_switch(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_KERNELS", "0")
    assert kernels.load() is None
    monkeypatch.delenv("OFFLOAD_KERNELS")
    assert kernels.load() is not None
    assert kernels.load() is kernels.load()


def test_levels(kernel: Kernel) -> None:
    assert kernel.levels[0] == "plain"
    assert kernel.level == len(kernel.levels) - 1
    for level in kernels.LEVELS[len(kernel.levels) :]:
        with pytest.raises(ValueError, match=level):
            kernel.at(level)


# in a model


class Counted:
    """Counts what the kernel was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[list[int]] = []  # tokens per expert
        run = Kernel.run

        def counted(kernel: Kernel, hidden: Any, experts: Any, *args: Any, **options: Any) -> None:
            self.calls.append([len(places) for _, places in experts])
            run(kernel, hidden, experts, *args, **options)

        monkeypatch.setattr(Kernel, "run", counted)


IDS = torch.randint(4, VOCAB, (1, 21), generator=torch.Generator().manual_seed(3))


def logits(folder: Path, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    with offload.load(folder, context=128, **options) as model, torch.inference_mode():
        cache = model.engine.new_cache(128)
        outs = [
            model.hf(input_ids=part, past_key_values=cache).logits for part in (ids[:, :15], *ids[:, 15:].split(1, 1))
        ]
        return torch.cat(outs, dim=1)


def smallest(folder: Path) -> int:
    with pytest.raises(offload.BudgetError) as refusal:
        offload.load(folder, resident=1, context=128)
    assert refusal.value.smallest is not None
    return refusal.value.smallest


@pytest.mark.parametrize("dtype", TYPES)
def test_model_with_and_without(
    kernel: Kernel, tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("qwen3_moe", dtype=dtype).save_pretrained(tmp_path)
    counted = Counted(monkeypatch)
    whole = logits(tmp_path)
    assert counted.calls
    assert max(map(max, counted.calls)) <= moe.experts.KERNEL_TOKENS
    least = smallest(tmp_path)
    for _ in range(3):  # whatever arrives first
        assert torch.equal(logits(tmp_path, resident=least), whole), "placement does not show"
    grouped = len(counted.calls)
    monkeypatch.setattr(moe.experts, "TOGETHER", 1)
    assert torch.equal(logits(tmp_path, resident=least), whole)
    assert len(counted.calls) - grouped > grouped / 5
    monkeypatch.setenv("OFFLOAD_KERNELS", "0")
    before = len(counted.calls)
    by_torch = logits(tmp_path)
    assert len(counted.calls) == before
    assert error(whole, by_torch) < (1e-5 if dtype is torch.float32 else 2**-5)


def test_experts_of_many_tokens_are_left_to_torch(
    kernel: Kernel, tiny_moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one layer some go to the kernel and some to torch; that depends on the counts only."""
    want = logits(tiny_moe)
    monkeypatch.setattr(moe.experts, "KERNEL_TOKENS", 3)
    counted = Counted(monkeypatch)
    mixed = logits(tiny_moe)
    assert error(mixed, want) < 1e-5
    assert max(map(max, counted.calls)) <= 3
    assert torch.equal(logits(tiny_moe, resident=smallest(tiny_moe)), mixed)


def test_device_whose_compute_is_the_cpu(kernel: Kernel, tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = logits(tiny_moe)
    counted = Counted(monkeypatch)
    assert torch.equal(logits(tiny_moe, device="emulated", vram="64MiB"), want)
    assert counted.calls

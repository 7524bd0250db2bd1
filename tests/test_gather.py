"""Gathers against real tensors: whatever is done to both, the extents read from the files are the tensor's bytes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    MergeModulelist,
    PermuteForRope,
    SplitModulelist,
    Transpose,
)

from offload.gather import Extent, Gather, NotAGather

FILES = [random.Random(seed).randbytes(1 << 15) for seed in (1, 2, 3)]
DTYPES = [torch.float32, torch.bfloat16, torch.uint8, torch.int64]
quick = settings(max_examples=150, deadline=None, database=None)


@dataclass(frozen=True)
class Pair:
    """The same tensor twice: where it lies, and itself."""

    gather: Gather
    tensor: torch.Tensor


def raw(t: torch.Tensor) -> bytes:
    flat = torch.empty(t.numel(), dtype=t.dtype)  # its stride is 1, which `contiguous` does not promise for one element
    flat.view(t.shape).copy_(t)
    return bytes(flat.view(torch.uint8).numpy()) if t.numel() else b""


def read(gather: Gather) -> bytes:
    return b"".join(FILES[e.file][e.offset : e.offset + e.nbytes] for e in gather.extents)


def check(pair: Pair) -> None:
    """The whole state of a gather."""
    g, t = pair.gather, pair.tensor
    assert isinstance(g.shape, torch.Size)
    assert (g.shape, g.dtype, g.ndim, g.dim(), g.size()) == (t.shape, t.dtype, t.ndim, t.dim(), t.size())
    assert all(g.size(d) == t.size(d) for d in range(t.dim()))
    assert g.nbytes == t.numel() * t.itemsize == sum(e.nbytes for e in g.extents)
    assert all(e.nbytes > 0 for e in g.extents)
    for a, b in zip(g.extents, g.extents[1:], strict=False):
        assert (a.file, a.offset + a.nbytes) != (b.file, b.offset), "neighbours are one read"
    assert read(g) == raw(t)


def stored(shape: Sequence[int], dtype: torch.dtype, file: int, offset: int) -> Pair:
    """A tensor as it lies in a file, at any byte."""
    n = math.prod(shape) * dtype.itemsize
    data = FILES[file][offset : offset + n]
    tensor = torch.frombuffer(bytearray(data), dtype=dtype).reshape(list(shape)) if n else torch.empty(shape).to(dtype)
    return Pair(Gather(shape, dtype, [Extent(file, offset, n)] if n else []), tensor)


@st.composite
def tensors(draw: st.DrawFn, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> Pair:
    shape = shape if shape is not None else draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    dtype = dtype or draw(st.sampled_from(DTYPES))
    n = math.prod(shape) * dtype.itemsize
    return stored(shape, dtype, draw(st.integers(0, len(FILES) - 1)), draw(st.integers(0, len(FILES[0]) - n)))


def both(f: Callable[..., Any], *pairs: Pair) -> Any:
    """`f` on the gathers and on the tensors, as pairs again."""
    g, t = f(*(p.gather for p in pairs)), f(*(p.tensor for p in pairs))
    if isinstance(t, torch.Tensor):
        return Pair(g, t)
    assert len(g) == len(t)
    return [Pair(a, b) for a, b in zip(g, t, strict=True)]


def some_dim(draw: st.DrawFn, n: int) -> int:
    return draw(st.integers(-n, n - 1))


def sizes_of(draw: st.DrawFn, n: int) -> list[int]:
    """Sizes above zero that add up to `n`."""
    cuts = sorted(draw(st.sets(st.integers(1, n - 1)))) if n > 1 else []
    return [b - a for a, b in zip([0, *cuts], [*cuts, n], strict=True)]


def like(draw: st.DrawFn, p: Pair, dim: int | None = None) -> Pair:
    """Another tensor that can be concatenated with `p` along `dim` (None: stacked)."""
    shape = list(p.tensor.shape)
    if dim is not None:
        shape[dim] = draw(st.integers(1, 3))
    return draw(tensors(shape, p.tensor.dtype))


def op_cat(draw: st.DrawFn, p: Pair) -> Pair:
    dim = some_dim(draw, p.tensor.ndim)
    others = [like(draw, p, dim) for _ in range(draw(st.integers(0, 2)))]
    return both(lambda *ts: torch.cat(ts, dim=dim), *draw(st.permutations([p, *others])))


def op_stack(draw: st.DrawFn, p: Pair) -> Pair:
    dim = some_dim(draw, p.tensor.ndim + 1)
    others = [like(draw, p) for _ in range(draw(st.integers(0, 2)))]
    return both(lambda *ts: torch.stack(ts, dim), *draw(st.permutations([p, *others])))


def op_chunk(draw: st.DrawFn, p: Pair) -> Pair:
    n, dim, method = draw(st.integers(1, 6)), some_dim(draw, p.tensor.ndim), draw(st.booleans())
    parts = both(lambda t: t.chunk(n, dim=dim) if method else torch.chunk(t, n, dim), p)
    return one_of_all(draw, parts)


def op_split(draw: st.DrawFn, p: Pair) -> Pair:
    dim, method = some_dim(draw, p.tensor.ndim), draw(st.booleans())
    n = p.tensor.shape[dim]
    sizes: Any = draw(st.integers(1, n + 1)) if draw(st.booleans()) else sizes_of(draw, n)
    parts = both(lambda t: t.split(sizes, dim=dim) if method else torch.split(t, sizes, dim), p)
    return one_of_all(draw, parts)


def op_rows(draw: st.DrawFn, p: Pair) -> Pair:
    if p.tensor.ndim < 2:
        return p
    return one_of_all(draw, [Pair(g, t) for g, t in zip(p.gather.rows(), p.tensor, strict=True)])


def op_squeeze(draw: st.DrawFn, p: Pair) -> Pair:
    dim = some_dim(draw, p.tensor.ndim)
    q = both(lambda t: torch.squeeze(t, dim), p)
    return q if q.tensor.ndim else p


def op_squeeze_all(draw: st.DrawFn, p: Pair) -> Pair:
    q = both(lambda t: t.squeeze(), p)
    check(q)
    return q if q.tensor.ndim else p


def op_unsqueeze(draw: st.DrawFn, p: Pair) -> Pair:
    dim = some_dim(draw, p.tensor.ndim + 1)
    return both(lambda t: torch.unsqueeze(t, dim), p)


def op_reshape(draw: st.DrawFn, p: Pair) -> Pair:
    left, shape = p.tensor.numel(), []
    while left > 1 and len(shape) < 4:
        shape.append(draw(st.sampled_from([d for d in range(1, left + 1) if left % d == 0])))
        left //= shape[-1]
    shape.append(left)
    if draw(st.booleans()):
        shape[draw(st.integers(0, len(shape) - 1))] = -1
    form = draw(st.integers(0, 3))
    forms: list[Callable[[Any], Any]] = [
        lambda t: t.reshape(shape), lambda t: t.reshape(*shape), lambda t: t.contiguous().view(*shape),
        lambda t: torch.reshape(t, tuple(shape)),
    ]  # fmt: skip
    return both(forms[form], p)


def op_nothing(draw: st.DrawFn, p: Pair) -> Pair:
    return both(lambda t: t[...].contiguous(), p)


def one_of_all(draw: st.DrawFn, parts: list[Pair]) -> Pair:
    for part in parts:
        check(part)
    return draw(st.sampled_from(parts))


OPS = {f.__name__.removeprefix("op_"): f for f in (
    op_cat, op_stack, op_chunk, op_split, op_rows, op_squeeze, op_squeeze_all, op_unsqueeze, op_reshape, op_nothing,
)}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
@quick
@given(data=st.data())
def test_each_operation(name: str, data: st.DataObject) -> None:
    check(OPS[name](data.draw, data.draw(tensors())))


@settings(quick, max_examples=300)
@given(data=st.data())
def test_compositions(data: st.DataObject) -> None:
    pair = data.draw(tensors())
    for _ in range(data.draw(st.integers(2, 7))):
        if pair.tensor.numel() > 2000:
            break
        pair = OPS[data.draw(st.sampled_from(list(OPS)))](data.draw, pair)
        check(pair)


@quick
@given(data=st.data())
def test_cut(data: st.DataObject) -> None:
    pair = op_cat(data.draw, data.draw(tensors()))
    sizes = sizes_of(data.draw, pair.gather.nbytes)
    sizes.insert(data.draw(st.integers(0, len(sizes))), 0)
    pieces = pair.gather.cut(sizes)
    assert [sum(e.nbytes for e in p) for p in pieces] == sizes
    assert b"".join(FILES[e.file][e.offset : e.offset + e.nbytes] for p in pieces for e in p) == raw(pair.tensor)


def test_neighbours_in_a_file_are_one_extent() -> None:
    parts = [stored([2, 3], torch.float32, 0, 100 + 24 * i) for i in range(4)]
    whole = both(lambda *ts: torch.cat(ts), *parts)
    assert whole.gather.extents == [Extent(0, 100, 96)]
    apart = both(lambda *ts: torch.cat(ts), *reversed(parts))
    assert apart.gather.extents == [Extent(0, 100 + 24 * i, 24) for i in (3, 2, 1, 0)]
    files = both(lambda *ts: torch.cat(ts), parts[0], stored([2, 3], torch.float32, 1, 124))
    assert files.gather.extents == [Extent(0, 100, 24), Extent(1, 124, 24)]
    check(whole), check(apart), check(files)


def test_experts_as_the_library_merges_them() -> None:
    """mixtral and its like: gate and up of every expert into one stacked parameter, and each expert's slice of it."""
    gate = [stored([4, 6], torch.bfloat16, 0, 97 * i) for i in range(8)]
    up = [stored([4, 6], torch.bfloat16, 1, 3 + 131 * i) for i in range(8)]

    def run(gates: list[Any], ups: list[Any]) -> Any:
        patterns = ["experts.*.w1", "experts.*.w3"]
        merged = MergeModulelist(dim=0).convert(dict(zip(patterns, [gates, ups], strict=True)), patterns, ["gate_up"])
        return Concatenate(dim=1).convert(merged, patterns, ["gate_up"])["gate_up"]

    pair = both(lambda *ts: run(list(ts[:8]), list(ts[8:])), *gate, *up)
    assert pair.tensor.shape == (8, 8, 6)
    check(pair)
    for row, tensor in zip(pair.gather.rows(), pair.tensor, strict=True):
        assert len(row.extents) == 2
        check(Pair(row, tensor))


def test_chunk_and_split_as_the_library_does() -> None:
    pair = stored([6, 5], torch.float32, 2, 11)
    for op, targets in ((Chunk(dim=0), ["q", "k", "v"]), (SplitModulelist(dim=0), ["e.*"])):
        got = op.convert({"qkv": [pair.gather]}, ["qkv"], targets)
        want = op.convert({"qkv": [pair.tensor]}, ["qkv"], targets)
        assert list(got) == list(want)
        assert len(want) == (3 if targets[0] == "q" else 6)
        for name, tensor in want.items():
            check(Pair(got[name], tensor))


# what is no gather


def matrix() -> Gather:
    return stored([4, 6], torch.float32, 0, 0).gather


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "transpose": lambda g: torch.transpose(g, 0, 1),
    "t": lambda g: torch.t(g),
    "permute": lambda g: torch.permute(g, (1, 0)),
    "add": lambda g: torch.add(g, g),
    "mul": lambda g: torch.mul(g, 2.0),
    "flip": lambda g: torch.flip(g, [0]),
    "index_select": lambda g: torch.index_select(g, 0, torch.tensor([1])),
    "row": lambda g: g[0],
    "slice": lambda g: g[1:],
    "mask": lambda g: g[:, None],
}
METHODS: dict[str, Callable[[Any], Any]] = {
    "transpose": lambda g: g.transpose(0, 1),
    "permute": lambda g: g.permute(1, 0),
    "T": lambda g: g.T,
    "mT": lambda g: g.mT,
    "t": lambda g: g.t(),
    "plus": lambda g: g + g,
    "times": lambda g: g * 2.0,
    "times from the left": lambda g: 2.0 * g,
    "minus": lambda g: -g,
    "matmul": lambda g: g @ g,
    "flip": lambda g: g.flip(0),
    "float": lambda g: g.float(),
    "to": lambda g: g.to(torch.bfloat16),
    "view as another dtype": lambda g: g.view(torch.int32),
}
CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "Interleave": lambda g: Interleave(dim=1).convert({"a": [g]}, ["a"], ["b"]),
    "Transpose": lambda g: Transpose(0, 1).convert({"a": [g]}, ["a"], ["b"]),
    "PermuteForRope": lambda g: PermuteForRope().convert(
        {"a": [g]}, ["a"], ["b"], config=LlamaConfig(hidden_size=4, num_attention_heads=1, num_key_value_heads=1)
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_that_change_bytes_are_refused(name: str) -> None:
    with pytest.raises(NotAGather) as e:
        FUNCTIONS[name](matrix())
    assert str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", METHODS)
def test_methods_that_change_bytes_are_refused(name: str) -> None:
    """As a method it is as much of a transform as it is as a function: the reason must not be lost."""
    with pytest.raises(NotAGather):
        METHODS[name](matrix())


@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversions_of_the_library_that_change_bytes_are_refused(name: str) -> None:
    with pytest.raises(NotAGather):
        CONVERSIONS[name](matrix())


def test_dtypes_are_not_mixed() -> None:
    other = stored([4, 6], torch.bfloat16, 0, 0).gather
    for f in (torch.cat, torch.stack):
        with pytest.raises(NotAGather, match="dtypes"):
            f([matrix(), other])


def scalar(t: Any) -> Any:
    return torch.squeeze(t.reshape(24).split(1)[0])


REFUSED: dict[str, Callable[[Any], Any]] = {
    "cat of other shapes": lambda t: torch.cat([t, t.reshape(6, 4)], 0),
    "cat of fewer dimensions": lambda t: torch.cat([t, t.reshape(24)], 1),
    "cat along a dimension too many": lambda t: torch.cat([t, t], 2),
    "cat of scalars": lambda t: torch.cat([scalar(t)]),
    "stack of other shapes": lambda t: torch.stack([t, t.reshape(6, 4)]),
    "stack along a dimension too many": lambda t: torch.stack([t, t], 3),
    "split into too little": lambda t: torch.split(t, [1, 2], 0),
    "split along a dimension too many": lambda t: t.reshape(24).split(24, 1),
    "split of a scalar": lambda t: torch.split(scalar(t), 1),
    "chunk along a dimension too many": lambda t: torch.chunk(t, 2, 2),
    "chunk of a scalar": lambda t: torch.chunk(scalar(t), 2),
    "squeeze of a dimension too many": lambda t: torch.squeeze(t, 2),
    "unsqueeze of a dimension too many": lambda t: torch.unsqueeze(t, 4),
    "reshape to another size": lambda t: t.reshape(5, 5),
    "reshape that does not divide": lambda t: t.reshape(5, -1),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_refuses_is_refused(name: str) -> None:
    for t in (stored([4, 6], torch.float32, 0, 0).tensor, matrix()):
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            REFUSED[name](t)

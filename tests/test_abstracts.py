"""Abstracts say of a chunk what is true of its keys, whatever happened to the chunks before."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvstore.abstracts import FAN, Abstracts

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def products(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """scale · q·k in float64: query [heads, D], keys [kv_heads, n, D] → [heads, n]; head by head."""
    group = query.shape[0] // keys.shape[0]
    return torch.stack([scale * (keys[h // group].double() @ query[h].double()) for h in range(query.shape[0])])


def filled(chunks: list[Tensor], **options: object) -> Abstracts:
    a = Abstracts(chunks[0].shape[0], chunks[0].shape[2], **options)  # type: ignore[arg-type]
    for i, keys in enumerate(chunks):
        a.set(i, keys)
    return a


def random_chunks(seed: int, lengths: list[int], kv_heads: int = 2, dim: int = 8, spread: float = 1.0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    offset = 3 * torch.randn(kv_heads, 1, dim, generator=g)
    return [offset + spread * torch.randn(kv_heads, n, dim, generator=g) for n in lengths]


@DTYPES
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=70),
    group=st.integers(1, 3),
    scale=st.sampled_from([1.0, 0.125, 0.0883883, -0.5, 300.0]),
    size=st.sampled_from([1e-4, 1.0, 1e4]),
)
def test_no_token_exceeds_its_chunks_bound_at_any_level(
    dtype: torch.dtype, seed: int, lengths: list[int], group: int, scale: float, size: float
) -> None:
    chunks = [size * c for c in random_chunks(seed, lengths)]
    query = torch.randn(2 * group, 8, generator=torch.Generator().manual_seed(seed + 1))
    a = filled(chunks, dtype=dtype)
    for level, entries in enumerate(a.levels):
        bounds = a.bounds(query, scale, level)
        assert bounds.shape == (2 * group, entries) and bounds.dtype == torch.float32
        for i, keys in enumerate(chunks):
            exact = products(query, keys, scale).amax(1)
            assert (bounds[:, i // FAN**level].double() >= exact).all()
            assert (bounds[:, i // FAN**level] >= products(query, keys, scale).amax(1).float()).all()


@settings(max_examples=60, deadline=None)
@given(x=st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=8, max_size=8))
def test_bfloat16_abstracts_are_rounded_outward(x: list[float]) -> None:
    keys = torch.tensor(x).view(1, 1, 8)
    a = filled([keys], dtype=torch.bfloat16)
    above, below = a._boxes[0][0, 0, :8].float(), -a._boxes[0][0, 0, 8:].float()
    assert (below <= keys[0, 0]).all() and (keys[0, 0] <= above).all()
    step = keys[0, 0].abs() * 2**-7 + 1e-38  # no further than one step of bfloat16
    assert (above - keys[0, 0] <= step).all() and (keys[0, 0] - below <= step).all()


def test_one_token_alone_is_bounded_tightly() -> None:
    chunks = random_chunks(0, [1] * 5)
    query = torch.randn(4, 8)
    a = filled(chunks)
    exact = torch.cat([products(query, c, 0.5) for c in chunks], dim=1).float()
    torch.testing.assert_close(a.bounds(query, 0.5), exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a.landmarks(query, 0.5), exact, rtol=1e-4, atol=1e-4)


def test_query_heads_look_at_their_own_kv_head() -> None:
    keys = torch.zeros(2, 1, 4)
    keys[0, 0, 0], keys[1, 0, 0] = 1.0, 10.0
    query = torch.zeros(6, 4)
    query[:, 0] = torch.arange(1.0, 7.0)
    a = filled([keys])
    expected = torch.tensor([1.0, 2.0, 3.0, 40.0, 50.0, 60.0])
    torch.testing.assert_close(a.landmarks(query, 1.0)[:, 0], expected)
    torch.testing.assert_close(a.bounds(query, 1.0)[:, 0], expected, rtol=1e-4, atol=0)


@DTYPES
def test_landmarks_are_scores_of_mean_keys(dtype: torch.dtype) -> None:
    chunks = random_chunks(3, [4, 4, 4, 4, 4, 2] + [3] * 40)
    a = filled(chunks, dtype=dtype)
    query = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 0.15}
    for level, entries in enumerate(a.levels):
        groups = [torch.cat(chunks[i * FAN**level : (i + 1) * FAN**level], dim=1) for i in range(entries)]
        means = torch.stack([products(query, g, 0.25).mean(1) for g in groups], dim=1).float()
        torch.testing.assert_close(a.landmarks(query, 0.25, level), means, **tolerance)  # every token counts alike


@DTYPES
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    steps=st.lists(st.tuples(st.sampled_from(["set", "grow", "truncate", "look"]), st.integers(0, 200)), max_size=40),
    start=st.integers(0, 150),
)
def test_any_history_leaves_what_a_fresh_start_would(
    dtype: torch.dtype, seed: int, steps: list[tuple[str, int]], start: int
) -> None:
    """Chunks set, grown, cut off and set again, in one go or one by one: all levels as if made from the end state."""
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 4, generator=g)
    a = Abstracts(1, 4, dtype)
    chunks = [torch.randn(1, 2, 4, generator=g) for _ in range(start)]
    if chunks:
        a.set_many(0, torch.stack(chunks, dim=1))
    for what, number in steps:
        at = number % (len(chunks) + 1)
        if what == "set":
            chunks[at : at + 1] = [torch.randn(1, 3, 4, generator=g)]
            a.set(at, chunks[at])
        elif what == "grow" and chunks:
            chunks[-1] = torch.cat((chunks[-1], torch.randn(1, 1, 4, generator=g)), dim=1)
            a.set(len(chunks) - 1, chunks[-1])
        elif what == "truncate":
            a.truncate(at)
            del chunks[at:]
        elif what == "look" and chunks:
            a.bounds(query, 1.0, level=len(a.levels) - 1)
    assert len(a) == len(chunks)
    if not chunks:
        return
    fresh = filled(chunks, dtype=dtype)
    for one in (a, a.copy()):
        one._largest = fresh._largest  # the margin remembers keys that are gone: never too small, so not compared
        assert one.levels == fresh.levels
        for level in range(len(fresh.levels)):
            assert torch.equal(one.bounds(query, 0.5, level), fresh.bounds(query, 0.5, level))
            torch.testing.assert_close(one.landmarks(query, 0.5, level), fresh.landmarks(query, 0.5, level))


@pytest.mark.parametrize("chunks", [64, 65, 67, 97])
def test_a_group_that_lost_children_forgets_them(chunks: int) -> None:
    all_chunks = random_chunks(8, [2] * 100)
    a, query = filled(all_chunks), torch.randn(2, 8)
    a.bounds(query, 1.0, level=1)
    a.truncate(chunks)
    fresh = filled(all_chunks[:chunks])
    for level in range(1, len(fresh.levels)):
        torch.testing.assert_close(a.bounds(query, 1.0, level), fresh.bounds(query, 1.0, level))
        torch.testing.assert_close(a.landmarks(query, 1.0, level), fresh.landmarks(query, 1.0, level))


def test_a_copy_goes_its_own_way() -> None:
    chunks = random_chunks(5, [4] * 30)
    a = filled(chunks)
    query = torch.randn(2, 8)
    before = a.bounds(query, 1.0)
    b = a.copy()
    b.set(0, 100 * chunks[0])
    b.set(30, chunks[1])
    b.truncate(5)
    assert (len(a), len(b)) == (30, 5)
    assert torch.equal(a.bounds(query, 1.0), before)
    assert a.copy().nbytes <= a.nbytes  # without the room to grow


def test_room_grows_seldom() -> None:
    a = Abstracts(1, 4)
    keys = torch.randn(1, 2, 4)
    sizes = []
    for i in range(1000):
        a.set(i, keys)
        sizes.append(a.nbytes)
    assert len(set(sizes)) <= 10
    assert sizes[-1] <= 4 * 1000 * 3 * 4 * 4


@pytest.mark.parametrize(
    ("chunk", "shape", "message"),
    [(2, (2, 3, 8), "cannot follow"), (-1, (2, 3, 8), "cannot follow"), (0, (3, 3, 8), "need"), (0, (2, 0, 8), "need"),
     (0, (2, 3, 4), "need")],
)  # fmt: skip
def test_chunks_that_cannot_be(chunk: int, shape: tuple[int, ...], message: str) -> None:
    a = filled(random_chunks(0, [2]))
    with pytest.raises(ValueError, match=message):
        a.set(chunk, torch.randn(*shape))


def test_what_is_not_kept_cannot_be_asked_for() -> None:
    a = filled(random_chunks(0, [2]), means=False)
    a.bounds(torch.randn(2, 8), 1.0)
    with pytest.raises(ValueError, match="without means"):
        a.landmarks(torch.randn(2, 8), 1.0)
    with pytest.raises(ValueError, match="does not fit"):
        a.bounds(torch.randn(3, 8), 1.0)
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        Abstracts(1, 4, torch.float16)

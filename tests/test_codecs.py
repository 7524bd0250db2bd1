"""Codecs of keys and values: what comes back is as near as the step says, in exactly so many bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.codecs import CODECS, GROUP, ChunkShape, KVCodec, error

TYPES = [torch.float32, torch.bfloat16, torch.float16]
CODED = {"int8": 255, "int4": 15}  # the largest code
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # half a unit in the last place


def chunk(
    heads: int, tokens: int, key_width: int, value_width: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys whose channels have sizes and offsets of their own, values whose tokens have."""
    g = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(heads, tokens, width, generator=g) for width in (key_width, value_width))
    size = torch.logspace(-2, 1.5, key_width)
    k = k * size + 4 * size * torch.randn(heads, 1, key_width, generator=g)
    v = v * torch.rand(heads, tokens, 1, generator=g).exp2() + torch.randn(heads, tokens, 1, generator=g)
    return k.to(dtype), v.to(dtype)


def encoded(codec: KVCodec, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """With bytes around it that nobody may touch."""
    nbytes = codec.nbytes(ChunkShape.of(keys, values))
    room = torch.full((nbytes + 32,), 171, dtype=torch.uint8)
    codec.encode(keys, values, room[16 : 16 + nbytes])
    assert (room[:16] == 171).all() and (room[16 + nbytes :] == 171).all()
    return room[16 : 16 + nbytes].clone()


def decoded(
    codec: KVCodec, raw: torch.Tensor, shape: ChunkShape, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    out = [
        torch.full((shape.heads, shape.tokens, width), torch.nan, dtype=dtype)
        for width in (shape.key_width, shape.value_width)
    ]
    codec.decode(raw, *out)
    return out[0], out[1]


def allowed(x: torch.Tensor, along: int, most: int, out: torch.dtype) -> torch.Tensor:
    """How far off an element may be, from nothing but what the groups hold: half a step, the step being what the
    range of the group takes once its low is rounded down and the step up to 11 digits; and what rounding adds."""
    x = x.double()
    bounds = []
    for part in x.split(GROUP, dim=along):
        low, high = part.amin(along, keepdim=True), part.amax(along, keepdim=True)
        low = low - low.abs() * 2**-10 - 2**-24
        step = (high - low) / most * (1 + 2**-10) + 2**-24
        size = torch.maximum(low.abs(), high.abs()) + step
        bounds.append((step / 2 + size * (2**-21 + ROUNDING[out] * 1.001)).expand_as(part))
    return torch.cat(bounds, dim=along)


@settings(max_examples=60, deadline=None)
@given(
    heads=st.integers(1, 3),
    tokens=st.sampled_from([1, 2, 7, 63, 64, 65, 128, 150]),
    widths=st.tuples(*[st.sampled_from([1, 2, 5, 32, 64, 65, 80, 128, 129])] * 2),
    dtype=st.sampled_from(TYPES),
    seed=st.integers(0, 1000),
)
def test_off_by_half_a_step_at_most(
    heads: int, tokens: int, widths: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    keys, values = chunk(heads, tokens, *widths, dtype, seed)
    shape = ChunkShape.of(keys, values)
    for name, most in CODED.items():
        raw = encoded(CODECS[name], keys, values)
        for out in (torch.float32, dtype):
            for x, got, along in zip((keys, values), decoded(CODECS[name], raw, shape, out), (1, 2), strict=True):
                off = (got.double() - x.double()).abs()
                assert (off <= allowed(x, along, most, out)).all()
    raw = encoded(CODECS["none"], keys, values)
    for x, got in zip((keys, values), decoded(CODECS["none"], raw, shape, dtype), strict=True):
        assert torch.equal(got, x)


def test_none_is_bit_for_bit() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        bits = torch.arange(2**16).to(torch.int16)  # every value there is: NaNs, infinities, -0 and what is hardly any
        keys, values = (x.view(dtype).view(2, 128, 256) for x in (bits, bits.flip(0)))
        raw = encoded(CODECS["none"], keys, values)
        assert torch.equal(raw, torch.cat([keys.reshape(-1), values.reshape(-1)]).view(torch.uint8))
        for x, got in zip(
            (keys, values), decoded(CODECS["none"], raw, ChunkShape.of(keys, values), dtype), strict=True
        ):
            assert torch.equal(got.view(torch.int16), x.view(torch.int16))


def test_sizes() -> None:
    shape = ChunkShape(8, 256, 128, 128)
    sizes = {name: codec.nbytes(shape) for name, codec in CODECS.items()}
    elements = 8 * 256 * 256
    assert sizes == {"none": elements * 2, "int8": elements * 17 // 16, "int4": elements * 9 // 16}
    assert CODECS["none"].nbytes(shape._replace(dtype=torch.float32)) == elements * 4
    assert CODECS["int4"].nbytes(shape._replace(dtype=torch.float32)) == sizes["int4"]
    odd = ChunkShape(3, 65, 5, 70)  # two groups of tokens, two of a value's channels, three bytes for five codes
    assert CODECS["int4"].nbytes(odd) == 3 * ((2 * 5 + 65 * 2) * 4 + 65 * (3 + 35))
    assert CODECS["int8"].nbytes(odd) == 3 * ((2 * 5 + 65 * 2) * 4 + 65 * (5 + 70))
    for codec in CODECS.values():
        assert codec.nbytes(shape._replace(tokens=0)) == 0
        assert codec.name in CODECS and CODECS[codec.name] is codec


def test_layout() -> None:
    """What has been written must be read by later versions: the bytes of a small chunk, worked out by hand."""
    keys = torch.tensor([[[0.0, 1.0, 10.0], [30.0, 1.0, 10.0], [2.0, 1.0, 25.0]]])
    values = torch.tensor([[[-1.0, 14.0], [5.0, 5.0], [0.0, 7.5]]])
    raw = encoded(CODECS["int4"], keys, values)
    shared = [0, 1, 10, 2, 0, 1, -1, 5, 0, 1, 0, 0.5]  # lows and steps of the keys' channels, of the values' tokens
    codes = [0 | 0 << 4, 0, 15 | 0 << 4, 0, 1 | 15 << 4, 0, 0 | 15 << 4, 0 | 0 << 4, 0 | 15 << 4]
    assert raw[:24].view(torch.float16).tolist() == shared
    assert sorted(raw[24:].tolist()) == sorted(codes)
    assert raw[24:30].tolist() == [0 | 0 << 4, 0, 15 | 0 << 4, 0, 1 | 15 << 4, 0]
    for x, got in zip(
        (keys, values), decoded(CODECS["int4"], raw, ChunkShape.of(keys, values), torch.float32), strict=True
    ):
        assert torch.equal(got, x)


@pytest.mark.parametrize("name", CODED)
def test_constant_channels_and_single_tokens(name: str) -> None:
    """What float16 can say comes back as it was, where all of a group are the same: zero, -0, small and large."""
    for value in (0.0, -0.0, 1.0, -3.25, 2.0**-14, -65504.0, 65504.0, 2.0**-24):
        keys, values = torch.full((2, 70, 3), value), torch.full((2, 70, 66), value)
        raw = encoded(CODECS[name], keys, values)
        for x, got in zip(
            (keys, values), decoded(CODECS[name], raw, ChunkShape.of(keys, values), torch.float32), strict=True
        ):
            assert torch.equal(got, x)
    keys, values = chunk(2, 1, 16, 1)
    got, other = decoded(CODECS[name], encoded(CODECS[name], keys, values), ChunkShape.of(keys, values), keys.dtype)
    assert torch.equal(got, keys) and torch.equal(other, values), "groups of one element: its own low"


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, -1e6, 3e8])
def test_what_cannot_be_coded_is_refused(name: str, value: float) -> None:
    for which, place in ((0, (1, 69, 4)), (1, (0, 3, 65))):
        pair = chunk(2, 70, 5, 66, torch.float32)
        into = torch.empty(CODECS[name].nbytes(ChunkShape.of(*pair)), dtype=torch.uint8)
        CODECS[name].encode(*pair, into)
        pair[which][place] = value
        with pytest.raises(ValueError, match=f"{name} cannot code"):
            CODECS[name].encode(*pair, into)


@pytest.mark.parametrize("name", CODECS)
def test_the_same_bytes_wherever_keys_and_values_lie(name: str) -> None:
    keys, values = chunk(2, 70, 24, 40)
    raw = encoded(CODECS[name], keys, values)
    slot = torch.zeros(2, 90, 100, dtype=keys.dtype)
    inside = slot[:, 3:73, 1:25], torch.zeros(40, 2, 70, dtype=keys.dtype).permute(1, 2, 0)
    inside[0].copy_(keys)
    inside[1].copy_(values)
    assert torch.equal(encoded(CODECS[name], *inside), raw)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(encoded(CODECS[name], keys, values), raw)
    finally:
        torch.set_num_threads(threads)
    want = decoded(CODECS[name], raw, ChunkShape.of(keys, values), keys.dtype)
    slot.fill_(7)
    inside[1].zero_()
    CODECS[name].decode(raw, *inside)
    assert all(torch.equal(got, x) for got, x in zip(inside, want, strict=True))
    slot[:, 3:73, 1:25] = 7
    assert (slot == 7).all(), "nothing else is written"


@pytest.mark.parametrize("name", CODECS)
def test_shapes_that_do_not_fit(name: str) -> None:
    keys, values = chunk(2, 5, 8, 8)
    codec = CODECS[name]
    nbytes = codec.nbytes(ChunkShape.of(keys, values))
    good = torch.zeros(nbytes, dtype=torch.uint8)
    for raw in (good[1:], torch.zeros(nbytes + 1, dtype=torch.uint8), good.view(torch.int8), good.view(1, -1)):
        with pytest.raises(ValueError, match="bytes of the chunk"):
            codec.encode(keys, values, raw)
        with pytest.raises(ValueError, match="bytes of the chunk"):
            codec.decode(raw, keys, values)
    for k, v in ((keys[0], values[0]), (keys, values[:, :4]), (keys[:1], values), (keys, values.float())):
        with pytest.raises(ValueError, match="keys"):
            codec.encode(k, v, good)
    none = keys[:, :0], values[:, :0]
    codec.encode(*none, good[:0])
    codec.decode(good[:0], *none)


def test_keys_by_channel_values_by_token() -> None:
    """KIVI's point: with a few large channels, a step for each channel is much better than one for each token."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(4, 256, 128, generator=g)
    outliers = x.clone()
    outliers[..., ::32] *= 30
    as_keys = error(CODECS["int4"], outliers, x)
    as_values = error(CODECS["int4"], x, outliers)  # the same elements with steps by token
    coded = decoded(CODECS["int4"], encoded(CODECS["int4"], x, outliers), ChunkShape.of(x, outliers), torch.float32)[1]
    usual = torch.ones(128, dtype=torch.bool)
    usual[::32] = False

    def off(got: torch.Tensor) -> float:
        return float((got - outliers)[..., usual].norm() / outliers[..., usual].norm())

    by_channel = decoded(
        CODECS["int4"], encoded(CODECS["int4"], outliers, x), ChunkShape.of(outliers, x), torch.float32
    )[0]
    assert off(coded) > 6 * off(by_channel)
    assert as_keys.rms_relative_keys < 0.12 < 2 * as_keys.rms_relative_keys
    assert as_values.rms_relative_keys == pytest.approx(as_keys.rms_relative_values, rel=0.1), "no outliers: much alike"


def test_error_report() -> None:
    keys, values = chunk(2, 200, 64, 64, torch.float32)
    none, eight, four = (error(CODECS[name], keys, values) for name in ("none", "int8", "int4"))
    assert none == (0.0, 0.0, 0.0, 0.0)
    for of_eight, of_four in zip(eight, four, strict=True):
        assert 8 < of_four / of_eight < 40, "a step 17 times as wide"
    assert eight == error(CODECS["int8"], keys, values)
    raw = encoded(CODECS["int4"], keys, values)
    got = decoded(CODECS["int4"], raw, ChunkShape.of(keys, values), torch.float32)
    assert four.max_abs == max(float((a - b).abs().max()) for a, b in zip(got, (keys, values), strict=True))
    assert four.rms_relative_keys == pytest.approx(float((got[0] - keys).norm() / keys.norm()))
    # with keys as they were only values are off, which attention averages
    assert four.attention_error > 0.003 and eight.attention_error < 0.05

"""How keys and values of a cold chunk are coded in bytes: as they are, or in 8 or 4 bits.

The quantisation is KIVI's (Liu et al. 2024, https://arxiv.org/abs/2402.02750): keys have channels that are large for
every token, so that a step shared by a token's channels is too wide for most of them; a key's step belongs to a channel
and a group of tokens, a value's to a token and a group of channels. Groups are of `GROUP` elements, the last one of
what is left.

A group is coded as x ≈ low + step·code with 0 ≤ code < 2^bits. `low` and `step` are float16, rounded outwards so that
the codes always reach from the smallest to the largest element: then no element is off by more than step / 2 (but for
the rounding of float32 and of the type that is put out). bfloat16 would reach further, but its lows are up to 1/128 of
a channel's offset too low, and the step wider for it; so measured, rms errors were 0.3 to 2 % larger.

What cannot be coded, infinite, no number or too large for a float16 low and step, is refused with a `ValueError`: such
a chunk is kept by the codec "none", bit for bit. Lows and steps take room: a chunk of one token (in 8 bits: of
two) is larger coded. Bytes are the machine's (little-endian); nothing here is a checksum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

import torch

from kvstore.attention import Rule, partial

GROUP = 64  # elements that share a low and a step
_SHARED = torch.float16


class ChunkShape(NamedTuple):
    """Of keys [heads, tokens, key_width] and values [heads, tokens, value_width], both of `dtype`."""

    heads: int
    tokens: int
    key_width: int
    value_width: int
    dtype: torch.dtype = torch.bfloat16

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor) -> ChunkShape:
        """Raises `ValueError` if the two are not of one chunk."""
        if keys.dim() != 3 or values.dim() != 3 or keys.shape[:2] != values.shape[:2] or keys.dtype != values.dtype:
            raise ValueError(f"keys {list(keys.shape)} {keys.dtype} and values {list(values.shape)} {values.dtype}")
        heads, tokens, width = keys.shape
        return cls(heads, tokens, width, values.size(2), keys.dtype)


class KVCodec(Protocol):
    """A chunk's keys and values to bytes and back; the same bytes for the same values, always.

    `into` and `raw` are uint8 [nbytes], contiguous, their start a multiple of the element's size. Keys and values may
    lie anyhow. Raises `ValueError` for shapes that do not fit each other.
    """

    @property
    def name(self) -> str:
        """What `CODECS` calls it."""
        ...

    def nbytes(self, shape: ChunkShape) -> int:
        """Exactly what a chunk takes."""
        ...

    def encode(self, keys: torch.Tensor, values: torch.Tensor, into: torch.Tensor) -> None:
        """Write keys [H, n, Dk] and values [H, n, Dv]. Raises `ValueError` if they cannot be coded (`into` is junk)."""
        ...

    def decode(self, raw: torch.Tensor, keys_out: torch.Tensor, values_out: torch.Tensor) -> None:
        """The reverse, into the given tensors, which also say what the shape is."""
        ...


class Raw:
    """Bytes as they are: keys, then values."""

    name = "none"

    def nbytes(self, shape: ChunkShape) -> int:
        """See `KVCodec`."""
        return shape.heads * shape.tokens * (shape.key_width + shape.value_width) * shape.dtype.itemsize

    def encode(self, keys: torch.Tensor, values: torch.Tensor, into: torch.Tensor) -> None:
        """See `KVCodec`."""
        for inside, x in self._pairs(into, keys, values):
            inside.copy_(x)

    def decode(self, raw: torch.Tensor, keys_out: torch.Tensor, values_out: torch.Tensor) -> None:
        """See `KVCodec`."""
        for inside, x in self._pairs(raw, keys_out, values_out):
            x.copy_(inside)

    def _pairs(
        self, raw: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        _check(raw, self.nbytes(ChunkShape.of(keys, values)))
        split = keys.numel() * keys.element_size()
        for inside, x in ((raw[:split], keys), (raw[split:], values)):
            yield inside.view(x.dtype).view(x.shape), x


class _Group(NamedTuple):
    """Groups of one size: x [H, groups, size, D] or [H, n, groups, size], its codes, and what its elements share."""

    x: torch.Tensor
    codes: torch.Tensor
    low: torch.Tensor  # as x, but 1 long where the group is
    step: torch.Tensor
    inside: int  # the dimension along a group


class Grouped:
    """Codes of 8 or 4 bits with a low and a step for each group.

    In the bytes: lows and steps of keys [H, groups, Dk], of values [H, n, groups], then the codes of keys and of
    values, token after token; of 4 bits, those of channels c and c + ⌈D/2⌉ in one byte, the first in its lower half.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.name = f"int{bits}"
        self._most = 2**bits - 1
        self._per_byte = 8 // bits

    def nbytes(self, shape: ChunkShape) -> int:
        """See `KVCodec`."""
        return sum(length for _, length in self._layout(shape))

    def encode(self, keys: torch.Tensor, values: torch.Tensor, into: torch.Tensor) -> None:
        """See `KVCodec`."""
        for part, along, low, step, packed in self._sections(into, keys, values):
            codes = torch.empty(part.shape, dtype=torch.float32)
            for group in _groups(part, codes, low, step, along):
                x = group.x.float()
                most = x.amax(group.inside, keepdim=True)  # aminmax is ten times slower
                group.low.copy_(_below(x.amin(group.inside, keepdim=True)))
                group.step.copy_(-_below((group.low.float() - most) / self._most))
                if not (group.low.isfinite().all() and group.step.isfinite().all()):
                    raise ValueError(f"{self.name} cannot code what is no number, infinite or too large for float16")
                width = group.step.float()
                width.masked_fill_(width == 0, 1)  # all are the low
                group.codes.copy_(x.sub(group.low.float()).div_(width).round_().clamp_(0, self._most))
            self._pack(codes, packed)

    def decode(self, raw: torch.Tensor, keys_out: torch.Tensor, values_out: torch.Tensor) -> None:
        """See `KVCodec`."""
        for x, along, low, step, packed in self._sections(raw, keys_out, values_out):
            codes = torch.empty(x.shape, dtype=torch.float32)
            self._unpack(packed, codes)
            for group in _groups(x, codes, low, step, along):
                group.x.copy_(group.codes.mul_(group.step.float()).add_(group.low.float()))

    def _layout(self, shape: ChunkShape) -> list[tuple[tuple[int, int, int], int]]:
        """Shapes and bytes of what is stored, in order: low and step of keys, of values, codes of keys, of values."""
        h, n, k, v, _ = shape
        shared = [(h, _count(n), k)] * 2 + [(h, n, _count(v))] * 2
        codes = [(h, n, -(-width // self._per_byte)) for width in (k, v)]
        return [(s, s[0] * s[1] * s[2] * _SHARED.itemsize) for s in shared] + [(s, s[0] * s[1] * s[2]) for s in codes]

    def _sections(
        self, raw: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, int, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Keys, then values: the tensor, the dimension that is grouped, and lows, steps and packed codes in `raw`."""
        shape = ChunkShape.of(keys, values)
        _check(raw, self.nbytes(shape))
        found, at = [], 0
        for i, (size, length) in enumerate(self._layout(shape)):
            piece = raw[at : at + length]
            found.append((piece.view(_SHARED) if i < 4 else piece).view(size))
            at += length
        yield keys, 1, found[0], found[1], found[4]
        yield values, 2, found[2], found[3], found[5]

    def _pack(self, codes: torch.Tensor, packed: torch.Tensor) -> None:
        if self._per_byte == 1:
            packed.copy_(codes)
        else:
            half = packed.size(2)
            packed.copy_(codes[..., :half])
            packed[..., : codes.size(2) - half].bitwise_or_(codes[..., half:].to(torch.uint8) << 4)

    def _unpack(self, packed: torch.Tensor, codes: torch.Tensor) -> None:
        if self._per_byte == 1:
            codes.copy_(packed)
        else:
            half = packed.size(2)
            codes[..., :half] = packed & 15
            codes[..., half:] = packed[..., : codes.size(2) - half] >> 4


CODECS: Mapping[str, KVCodec] = {codec.name: codec for codec in (Raw(), Grouped(8), Grouped(4))}


class CodecError(NamedTuple):
    """What a codec does to a chunk. Relative: root mean square of the error, of the root mean square of what it was."""

    max_abs: float
    rms_relative_keys: float
    rms_relative_values: float
    attention_error: float  # relative too: of the attention of random queries


def error(codec: KVCodec, keys: torch.Tensor, values: torch.Tensor, queries: int = 16) -> CodecError:
    """Code keys [H, n, Dk] and values [H, n, Dv] and look at what comes back. Raises `ValueError` as `encode`.

    The queries are normally distributed, as many for each head, always the same, their scores scaled by 1/√Dk.
    """
    raw = torch.empty(codec.nbytes(ChunkShape.of(keys, values)), dtype=torch.uint8)
    codec.encode(keys, values, raw)
    coded = torch.empty_like(keys), torch.empty_like(values)
    codec.decode(raw, *coded)
    pairs = [(was.float(), now.float()) for was, now in zip((keys, values), coded, strict=True)]
    generator = torch.Generator().manual_seed(0)
    heads, _, width = keys.shape
    query = torch.randn(1, heads * queries, 1, width, generator=generator)
    was, now = (partial(query, k[None], v[None], Rule(width**-0.5))[0] for k, v in zip(*pairs, strict=True))
    relative = [_relative(*pair) for pair in (*pairs, (was, now))]
    return CodecError(max(float((a - b).abs().max()) for a, b in pairs), *relative)


def _relative(was: torch.Tensor, now: torch.Tensor) -> float:
    off, whole = float((now - was).norm()), float(was.norm())
    return off / whole if off else 0.0


def _check(raw: torch.Tensor, nbytes: int) -> None:
    if raw.dtype is not torch.uint8 or raw.shape != (nbytes,) or not raw.is_contiguous():
        raise ValueError(f"{list(raw.shape)} {raw.dtype} is not the {nbytes} bytes of the chunk")


def _count(length: int) -> int:
    return -(-length // GROUP)


def _below(x: torch.Tensor) -> torch.Tensor:
    """The largest float16 not above x."""
    near = x.to(_SHARED)
    return torch.where(near > x, torch.nextafter(near, near.new_tensor(-torch.inf)), near)


def _groups(
    x: torch.Tensor, codes: torch.Tensor, low: torch.Tensor, step: torch.Tensor, along: int
) -> Iterator[_Group]:
    """The whole groups of x along a dimension, and what is left behind them."""
    length = x.size(along)
    whole = length // GROUP * GROUP
    for start, stop, size in ((0, whole, GROUP), (whole, length, length - whole)):
        if stop > start:
            first, count = start // GROUP, (stop - start) // size
            inside, one = (
                t.narrow(along, start, stop - start).view(*t.shape[:along], count, size, *t.shape[along + 1 :])
                for t in (x, codes)
            )
            lows, steps = (t.narrow(along, first, count).unsqueeze(along + 1) for t in (low, step))
            yield _Group(inside, one, lows, steps, along + 1)

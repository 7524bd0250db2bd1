"""Symbolic tensors: a shape and the byte ranges that hold it, row-major.

The library's own checkpoint conversions are run on these instead of on data; what comes out says where each
parameter's bytes lie in the original files. Every operation that only regroups bytes is supported, anything else
raises `NotAGather`: such a family needs a real transform.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch


class NotAGather(Exception):
    """A conversion needs to change bytes, not only regroup them."""


@dataclass(frozen=True, slots=True)
class Extent:
    """`nbytes` at `offset` of file number `file`."""

    file: int
    offset: int
    nbytes: int


def _merged(extents: Iterable[Extent]) -> list[Extent]:
    out: list[Extent] = []
    for e in extents:
        if out and out[-1].file == e.file and out[-1].offset + out[-1].nbytes == e.offset:
            out[-1] = Extent(e.file, out[-1].offset, out[-1].nbytes + e.nbytes)
        else:
            out.append(e)
    return out


class Gather:
    """A tensor of `shape` and stored `dtype` whose bytes are `extents`, one after the other."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, extents: Iterable[Extent]) -> None:
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.extents = _merged(extents)

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def cut(self, sizes: Sequence[int]) -> list[list[Extent]]:
        """The extents in consecutive pieces of `sizes` bytes (which add up to `nbytes`)."""
        pieces: list[list[Extent]] = []
        source = iter(self.extents)
        current = next(source, None)
        for size in sizes:
            piece: list[Extent] = []
            while size:
                assert current is not None
                n = min(size, current.nbytes)
                piece.append(Extent(current.file, current.offset, n))
                size -= n
                if n == current.nbytes:
                    current = next(source, None)
                else:
                    current = Extent(current.file, current.offset + n, current.nbytes - n)
            pieces.append(piece)
        return pieces

    def rows(self) -> Iterator[Gather]:
        """The slices along the first dimension (an expert each, for stacked experts)."""
        n = self.nbytes // self.shape[0]
        for extents in self.cut([n] * self.shape[0]):
            yield Gather(self.shape[1:], self.dtype, extents)

    # what the conversions call on tensors

    def size(self, dim: int | None = None) -> Any:
        """As `torch.Tensor.size`."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """As `torch.Tensor.dim`."""
        return len(self.shape)

    def contiguous(self) -> Gather:
        """A gather is contiguous by definition."""
        return self

    def __getitem__(self, index: Any) -> Gather:
        if index is Ellipsis:
            return self
        raise NotAGather("indexing")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotAGather(name)  # a tensor method that is not one of those below

    def _refuse(self, *args: Any) -> Any:
        raise NotAGather("arithmetic")

    __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __rsub__ = __matmul__ = __truediv__ = __neg__ = _refuse

    def _dim(self, dim: int, more: int = 0) -> int:
        n = self.ndim + more
        if not -n <= dim < n:
            raise IndexError(f"dimension {dim} of a tensor with {n}")
        return dim % n

    def reshape(self, *shape: Any) -> Gather:
        """Only the shape changes."""
        sizes = list(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        if -1 in sizes:
            rest = -math.prod(sizes)
            sizes[sizes.index(-1)] = math.prod(self.shape) // rest
        if math.prod(sizes) != math.prod(self.shape):
            raise ValueError(f"cannot reshape {tuple(self.shape)} to {tuple(sizes)}")
        return Gather(sizes, self.dtype, self.extents)

    def view(self, *shape: Any) -> Gather:
        """As `reshape`; a view in another dtype is a transform."""
        if isinstance(shape[0], torch.dtype):
            raise NotAGather("view in another dtype")
        return self.reshape(*shape)

    def squeeze(self, dim: int | None = None) -> Gather:
        """As `torch.squeeze`."""
        if dim is None:
            return Gather([n for n in self.shape if n != 1], self.dtype, self.extents)
        dim = self._dim(dim)
        return Gather([n for i, n in enumerate(self.shape) if i != dim or n != 1], self.dtype, self.extents)

    def unsqueeze(self, dim: int) -> Gather:
        """As `torch.unsqueeze`."""
        dim = self._dim(dim, 1)
        return Gather([*self.shape[:dim], 1, *self.shape[dim:]], self.dtype, self.extents)

    def split(self, sizes: int | Sequence[int], dim: int = 0) -> list[Gather]:
        """As `torch.split`."""
        dim = self._dim(dim)
        n = self.shape[dim]
        if isinstance(sizes, int):
            sizes = [min(sizes, n - at) for at in range(0, n, sizes)]
        if sum(sizes) != n:
            raise ValueError(f"split sizes {list(sizes)} do not add up to {n}")
        outer = math.prod(self.shape[:dim])
        inner = math.prod(self.shape[dim + 1 :]) * self.dtype.itemsize
        pieces = self.cut([s * inner for _ in range(outer) for s in sizes])
        return [
            Gather(
                [*self.shape[:dim], s, *self.shape[dim + 1 :]],
                self.dtype,
                (e for o in range(outer) for e in pieces[o * len(sizes) + i]),
            )
            for i, s in enumerate(sizes)
        ]

    def chunk(self, chunks: int, dim: int = 0) -> list[Gather]:
        """As `torch.chunk`."""
        n = self.shape[self._dim(dim)]
        return self.split(-(-n // chunks), dim)

    @classmethod
    def cat(cls, tensors: Sequence[Gather], dim: int = 0) -> Gather:
        """As `torch.cat`; all of one stored dtype."""
        first = tensors[0]
        dim = first._dim(dim)
        if any(t.dtype != first.dtype for t in tensors):
            raise NotAGather("concatenating tensors stored in different dtypes")
        shapes = {(*t.shape[:dim], *t.shape[dim + 1 :]) for t in tensors}
        if len(shapes) != 1:
            raise ValueError(f"cannot concatenate {[tuple(t.shape) for t in tensors[:3]]} along {dim}")
        outer = math.prod(first.shape[:dim])
        pieces = [t.cut([t.nbytes // outer] * outer) for t in tensors]
        shape = [*first.shape[:dim], sum(t.shape[dim] for t in tensors), *first.shape[dim + 1 :]]
        return cls(shape, first.dtype, (e for o in range(outer) for p in pieces for e in p[o]))

    @classmethod
    def stack(cls, tensors: Sequence[Gather], dim: int = 0) -> Gather:
        """As `torch.stack`."""
        return cls.cat([t.unsqueeze(dim) for t in tensors], dim)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known: dict[Any, Callable[..., Any]] = {
            torch.cat: cls.cat, torch.stack: cls.stack, torch.chunk: cls.chunk, torch.split: cls.split,
            torch.squeeze: cls.squeeze, torch.unsqueeze: cls.unsqueeze, torch.reshape: cls.reshape,
        }  # fmt: skip
        if func not in known:
            raise NotAGather(getattr(func, "__name__", str(func)))
        return known[func](*args, **(kwargs or {}))

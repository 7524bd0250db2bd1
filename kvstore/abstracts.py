"""Small stand-ins for chunks of keys: enough to tell which chunks a query cares for, a few percent of their size.

Of each chunk, per kv head: the largest and the least value of every key channel (Quest, Tang et al., ICML '24,
https://arxiv.org/abs/2406.10774), which bound what any of its tokens can score, and the mean key (the landmarks of
ShadowKV, Sun et al., https://arxiv.org/abs/2410.21465). The same of groups of `FAN` chunks, of groups of those and so
on: LeoAM (https://arxiv.org/abs/2506.20187) goes from coarse to fine so that most abstracts are never looked at.

It neither holds nor fetches keys, and decides nothing: `kvstore.selection` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

FAN = 4  # children of a group
_TOP = 16  # a level with no more groups than this has none above it
_AT_ONCE = 256  # chunks that are widened from bfloat16 at a time: they stay in the cache nearest to the core
_UNIT = 2.0**-24  # the largest relative error of one float32 operation


class Abstracts:
    """The abstracts of one layer of one sequence; chunks are numbered from 0 without gaps.

    For every level (0: the chunks themselves) one tensor [kv_heads, room, 2 D] holds the largest of each key channel
    and then the largest of its negative. With relu(q) and relu(-q) side by side, Σ_d max(q_d lo_d, q_d hi_d) is one
    product, and a group is the elementwise maximum of its children. Room doubles when it runs out.

    `dtype` is how they are stored: float32, or bfloat16 for half the memory (keys in bfloat16 lose nothing by it;
    others are rounded outward). All computing is in float32.
    """

    def __init__(
        self,
        kv_heads: int,
        key_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        means: bool = True,
    ) -> None:
        """`means`: whether mean keys are kept too; without them there are no `landmarks`."""
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"abstracts are float32 or bfloat16, not {dtype}")
        self.kv_heads, self.key_dim, self.dtype, self.device = kv_heads, key_dim, dtype, torch.device(device)
        self._n = 0
        self._boxes = [self._empty(0, 2 * key_dim)]  # per level
        self._means = [self._empty(0, key_dim)] if means else []
        self._tokens = torch.zeros(0, device=self.device)  # of each chunk
        self._largest = torch.zeros(kv_heads, device=self.device)  # |key channel| ever seen: scales the rounding error
        self._stale = 0  # groups of this chunk and of later ones are out of date

    def __len__(self) -> int:
        return self._n

    @property
    def nbytes(self) -> int:
        """Memory reserved."""
        return sum(t.nbytes for t in (*self._boxes, *self._means, self._tokens))

    @property
    def levels(self) -> list[int]:
        """Entries of each level, the chunks first, then ever coarser groups."""
        sizes = [self._n]
        while sizes[-1] > _TOP:
            sizes.append(-(-sizes[-1] // FAN))
        return sizes

    def set(self, chunk: int, keys: Tensor) -> None:
        """`keys` [kv_heads, n, D] are all tokens that `chunk` holds by now: the next chunk, or one that has grown."""
        self.set_many(chunk, keys[:, None])

    def set_many(self, first: int, keys: Tensor) -> None:
        """The same for chunks of equal length from `first` on: keys [kv_heads, chunks, n, D]. Raises `ValueError`."""
        heads, chunks, n, dim = keys.shape
        if (heads, dim) != (self.kv_heads, self.key_dim) or n == 0:
            raise ValueError(f"keys {tuple(keys.shape)}: need [{self.kv_heads}, chunks, n > 0, {self.key_dim}]")
        if not 0 <= first <= self._n:
            raise ValueError(f"chunk {first} cannot follow {self._n} chunks")
        if chunks == 0:
            return
        end = first + chunks
        self.reserve(end)
        box = torch.cat((keys.amax(2), -keys.amin(2)), dim=-1).float()
        self._largest = torch.maximum(self._largest, box.abs().amax((1, 2)))
        self._boxes[0][:, first:end] = _rounded_up(box, self.dtype)
        if self._means:
            self._means[0][:, first:end] = keys.mean(2, dtype=torch.float32).to(self.dtype)
        self._tokens[first:end] = n
        self._n = max(self._n, end)
        self._stale = min(self._stale, first)

    def truncate(self, chunks: int) -> None:
        """Only the first so many chunks remain."""
        if chunks < self._n:
            self._n = max(chunks, 0)
            self._stale = min(self._stale, max(self._n - 1, 0))  # the last group may have lost children

    def bounds(self, query: Tensor, scale: float, level: int = 0, index: Tensor | None = None) -> Tensor:
        """What no token of a chunk exceeds: ≥ scale · q·k, [heads, chunks] in float32, for query [heads, D].

        Query head h looks at kv head h // (heads / kv_heads). `level`: of groups in place of chunks; `index` [m]: only
        of these. A true bound: a margin covers the rounding of the product here and of a float32 q·k elsewhere.
        """
        q = self._grouped(query, scale)  # [kv_heads, group, D]
        split = torch.cat((q, -q), dim=-1).relu_()
        margin = (4 * self.key_dim + 8) * _UNIT * (1 + 2**-8) * q.abs().sum(-1) * self._largest[:, None]
        found = self._product(split, self._at(self._boxes, level, index))
        return (found + margin[..., None]).flatten(0, 1)

    def landmarks(self, query: Tensor, scale: float, level: int = 0, index: Tensor | None = None) -> Tensor:
        """What the mean key of a chunk scores, scale · q·mean, [heads, chunks] in float32; else as `bounds`."""
        if not self._means:
            raise ValueError("these abstracts were made without means")
        return self._product(self._grouped(query, scale), self._at(self._means, level, index)).flatten(0, 1)

    def copy(self) -> Abstracts:
        """Abstracts of their own that begin with the same chunks."""
        new = Abstracts(self.kv_heads, self.key_dim, self.dtype, self.device, bool(self._means))
        new._n, new._stale = self._n, 0
        new._boxes = [self._boxes[0][:, : self._n].clone()]
        new._means = [m[:, : self._n].clone() for m in self._means[:1]]
        new._tokens, new._largest = self._tokens[: self._n].clone(), self._largest.clone()
        return new

    def _grouped(self, query: Tensor, scale: float) -> Tensor:
        heads, dim = query.shape
        if dim != self.key_dim or heads % self.kv_heads:
            raise ValueError(f"query {tuple(query.shape)} does not fit {self.kv_heads} kv heads of {self.key_dim}")
        return (query.to(self.device, torch.float32) * scale).view(self.kv_heads, heads // self.kv_heads, dim)

    def _at(self, levels: list[Tensor], level: int, index: Tensor | None) -> Tensor:
        """[kv_heads, entries, …] of a level that is up to date."""
        if level:
            self._refresh()
        held = levels[level][:, : self.levels[level]]
        return held if index is None else held.index_select(1, index)

    def _product(self, q: Tensor, entries: Tensor) -> Tensor:
        """q [kv_heads, group, d] by entries [kv_heads, m, d]: [kv_heads, group, m]."""
        if entries.dtype == torch.float32:
            # entries first: with as few rows as a group has heads, many entries go twice as fast this way round
            return torch.matmul(entries, q.transpose(1, 2)).transpose(1, 2)
        pieces = torch.split(entries, _AT_ONCE, dim=1)
        return torch.cat([torch.matmul(q, p.float().transpose(1, 2)) for p in pieces], dim=-1)

    def _refresh(self) -> None:
        """Make the groups anew that hold a chunk set, or a gap left, since the last time."""
        if self._stale >= self._n:
            return
        first, tokens = self._stale, self._tokens[: self._n]
        for level, size in enumerate(self.levels[1:], 1):
            first //= FAN
            if level == len(self._boxes):
                self._boxes.append(self._empty(0, 2 * self.key_dim))
                if self._means:
                    self._means.append(self._empty(0, self.key_dim))
            below = self.levels[level - 1]
            self._boxes[level] = _roomy(self._boxes[level], size)
            children = _in_fours(self._boxes[level - 1][:, first * FAN : below], float("-inf"))
            self._boxes[level][:, first:size] = children.amax(2)
            fours = _in_fours(tokens[None, :, None], 0.0)  # [1, size, FAN, 1]
            if self._means:
                self._means[level] = _roomy(self._means[level], size)
                children = _in_fours(self._means[level - 1][:, first * FAN : below].float(), 0.0)
                weights = fours[:, first:]
                self._means[level][:, first:size] = ((children * weights).sum(2) / weights.sum(2)).to(self.dtype)
            tokens = fours.sum(2)[0, :, 0]
        self._stale = self._n

    def reserve(self, chunks: int) -> None:
        """Room for so many, at once."""
        self._boxes[0] = _roomy(self._boxes[0], chunks)
        if self._means:
            self._means[0] = _roomy(self._means[0], chunks)
        if chunks > len(self._tokens):
            self._tokens = torch.cat(
                (self._tokens, self._tokens.new_zeros(self._boxes[0].shape[1] - len(self._tokens)))
            )

    def _empty(self, room: int, dim: int) -> Tensor:
        return torch.empty(self.kv_heads, room, dim, dtype=self.dtype, device=self.device)


def _roomy(held: Tensor, entries: int) -> Tensor:
    """`held` [kv_heads, room, d] if it has room for so many, else a copy with twice the room or more."""
    heads, room, dim = held.shape
    if entries <= room:
        return held
    new = held.new_empty(heads, max(entries, 2 * room, 16), dim)
    new[:, :room] = held
    return new


def _in_fours(children: Tensor, pad: float) -> Tensor:
    """[h, m, d] as [h, ⌈m / FAN⌉, FAN, d], the last group filled up with `pad`."""
    missing = -children.shape[1] % FAN
    if missing:
        children = torch.nn.functional.pad(children, (0, 0, 0, missing), value=pad)
    heads, entries, dim = children.shape
    return children.reshape(heads, entries // FAN, FAN, dim)  # a view: groups lie next to each other


def _rounded_up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The least number of `dtype` that is not below x (float32)."""
    if dtype == torch.float32:
        return x
    y = x.to(dtype)
    return torch.where(y.float() < x, torch.nextafter(y, torch.full_like(y, float("inf"))), y)

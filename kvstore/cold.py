"""Chunks that are coded in fewer bytes, on disk or in memory: the same store, with slots of more than one size.

The chunk being filled is as it was computed. One that is full and leaves memory is coded in the disk's codec, into a
slot of a second, smaller size, and written from there; one that stays is coded in memory's codec, if there is one. To
be attended to it is decoded into a slot of the first size that happens to be free; some are kept free for that.

What cannot be coded (see `codecs`) stays as it is, on disk too. So does a chunk that was coded and has been opened to
be changed `MOST_CODED` times: what its tokens are off by does not add up without end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from kvstore.chunks import Chunk, KVShape
from kvstore.codecs import CODECS, GROUP, ChunkShape, Grouped
from kvstore.loss import KVLoss
from kvstore.store import LEAST_RING, POOL, RING, Chosen, ChunkStore, KVDisk, ScanPolicy
from tiers import Block, Lease, Slot, UsageError, page_up

MOST_CODED = 2  # times that a chunk's tokens are coded: once, and once more after a change
SAMPLE = 8  # of so many chunks of a layer one is looked at, the first among them
TIERS = ("ram", "disk")


@dataclass(frozen=True, slots=True)
class KVCodecs:
    """Names of `CODECS`, of what stays in memory and of what leaves it."""

    ram: str = "none"
    disk: str = "none"

    @classmethod
    def parse(cls, text: str, flag: str = "--kv-codec") -> KVCodecs:
        """From `int8` (on disk) or `ram=int8,disk=int4`. Raises `UsageError`."""
        found: dict[str, str] = {}
        for part in str(text).split(","):
            tier, _, name = part.rpartition("=")
            tier, name = tier.strip() or "disk", name.strip()
            if tier not in TIERS or ("=" in part and not part.partition("=")[0].strip()):
                raise UsageError(f"{flag}: {part.strip()!r} is for no tier; known are {' and '.join(TIERS)}")
            if name not in CODECS:
                raise UsageError(f"{flag}: {name!r} is not one of {', '.join(CODECS)}")
            if tier in found:
                raise UsageError(f"{flag}: {text!r} names {tier} twice")
            found[tier] = name
        return cls(**found)

    def __iter__(self) -> Iterator[str]:
        return iter((self.ram, self.disk))

    def __bool__(self) -> bool:
        return (self.ram, self.disk) != ("none", "none")

    def __str__(self) -> str:
        if self.ram == "none":
            return self.disk
        return f"ram={self.ram}" + (f",disk={self.disk}" if self.disk != "none" else "")


class FastDecode(Protocol):
    """A kernel for `Grouped.decode` (`moe.kernels.Kernel.decode_kv`): see there."""

    def __call__(self, bits: int, group: int, raw: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """False if it cannot; nothing has been written then."""
        ...


class CodedStore(ChunkStore):
    """A `ChunkStore` whose chunks are coded by `codecs`; `resident` bytes hold them, those that are being filled and
    those that are decoded to be attended to."""

    def __init__(
        self, disk: KVDisk, shape: KVShape, layers: int, batch: int, capacity: int, resident: int,
        *, codecs: KVCodecs, decode: FastDecode | None = None, **options: Any,
    ) -> None:  # fmt: skip
        """`decode`: a kernel that decodes where it can. `options` as for `ChunkStore`."""
        self._ram, self._down = (c if isinstance(c, Grouped) else None for c in (CODECS[n] for n in codecs))
        self._fast = decode
        self._slot_nbytes: dict[str, int] = {}  # by codec
        self._policies: dict[str, ScanPolicy | Chosen] = {}
        super().__init__(disk, shape, layers, batch, capacity, resident, **options)
        self._scratch: set[str] = set()
        self._seen = [0] * layers  # chunks coded

    @property
    def codes(self) -> bool:
        """Whether any chunk is to be coded; not where only the disk has a codec and nothing is to leave memory."""
        return self._ram is not None or self._down is not None

    def _make_pools(self, shape: KVShape, resident: int, layers: int, batch: int, capacity: int) -> int:
        raw, tails = self.slot_nbytes, layers * batch
        whole = tails * -(-capacity // self.tokens)
        if self._ram is None and whole * raw <= resident:
            self._down = None
        if not self.codes:
            return super()._make_pools(shape, resident, layers, batch, capacity)
        self.decodes = True
        ram, down = self._ram, self._down
        for codec in (ram, down):
            if codec is not None:
                self._slot_nbytes[codec.name] = page_up(codec.nbytes(_shape(shape, self.tokens)))
                self._policies[codec.name] = self._new_policy()
        staying, passing = (self._slot_nbytes[c.name] if c is not None else raw for c in (ram, down))
        apart = LEAST_RING if ram is not None and ram is not down else 0  # for what was to stay, and had to leave

        def besides(ring: int) -> int:
            """Bytes that do not stay, nor are being filled."""
            return max(LEAST_RING, ring // 2) * raw + ring * passing + apart * staying

        left = resident - tails * raw
        ring = next((r for r in range(RING, LEAST_RING, -1) if besides(r) <= left // 2), LEAST_RING)
        scratch = max(LEAST_RING, ring // 2)
        stay = min(max(0, left - besides(ring)) // staying, whole - tails)
        if self.sparse is not None and stay < whole - tails:
            # what is chosen changes: whatever was not chosen for longest makes way
            stay, ring = 0, min(whole, max(LEAST_RING, (left - scratch * raw) // passing))
        self._run, self._passes = scratch, True  # through scratch, if not through a ring
        self.slots = tails + scratch + (0 if ram is not None else stay) + (0 if down is not None else ring)
        pools = [(POOL, raw, self.slots, self._policy)]
        if ram is not None:
            pools.append((_pool(ram), staying, stay + (ring if ram is down else apart), self._policies[ram.name]))
        if down is not None and down is not ram:
            pools.append((_pool(down), passing, ring, self._policies[down.name]))
        self._add_pools(pools)
        return stay

    def _fitting(self, shape: KVShape) -> int:
        tokens = super()._fitting(shape)
        for codec in (self._ram, self._down):
            while codec is not None and tokens and codec.nbytes(_shape(shape, tokens)) > self._slot_nbytes[codec.name]:
                tokens //= 2
        return tokens

    # what lists ask for

    def open(self, chunk: Chunk) -> None:
        """See `Store`: decoded for good, if it is coded."""
        chunk.whole = False
        if chunk.codec is None:
            super().open(chunk)
            return
        self._keep_free(1)
        lease = self._decoded(chunk)
        if chunk.stays:
            chunk.stays = False
            self._may_stay[chunk.layer] += 1
        self._drop(chunk)
        chunk.key, chunk.codec = lease.key, None
        self._lease(chunk, lease)

    @contextmanager
    def looking(self, chunk: Chunk) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """See `Store`."""
        if chunk.codec is None:
            with super().looking(chunk) as views:
                yield views
            return
        self._keep_free(1)
        leases: list[Lease] = []
        try:
            slot = self._take(chunk, leases, True)
            assert slot is not None
            shape, tokens = self._shapes[chunk.layer]
            yield shape.views(slot, tokens)
        finally:
            for lease in leases:
                self._let_go(lease)

    def full(self, chunk: Chunk) -> None:
        """See `Store`."""
        chunk.whole = True
        if self._ram is None or chunk.stays:
            super().full(chunk)
        elif self._may_stay[chunk.layer] > 0 and self._code(chunk, self._ram):
            self._may_stay[chunk.layer] -= 1
            chunk.stays = True
        else:
            self.spill(chunk)

    def spill(self, chunk: Chunk) -> None:
        """Write it to disk, coded if it is full and can be, and let it go. What is coded already is written as it
        is."""
        if self._down is not None and chunk.codec is None and chunk.whole:
            self._code(chunk, self._down)
        super().spill(chunk)

    # coding

    def _code(self, chunk: Chunk, codec: Grouped) -> bool:
        """Code the chunk, which is leased, into a slot of the codec's; False if that cannot be: it is as it was."""
        if chunk.coded >= MOST_CODED:
            return False
        assert chunk.views is not None
        shape, tokens = self._shapes[chunk.layer]
        nbytes = codec.nbytes(_shape(shape, tokens))
        block = Block(self._new_key(), nbytes, self._slot_nbytes[codec.name], ())
        lease = self.residency.create(block, _pool(codec))
        try:
            codec.encode(*chunk.views, lease.slot.tensor[:nbytes])
            self._measure(chunk, codec, lease.slot.tensor[:nbytes])
        except BaseException as e:
            lease.release()
            self.residency.remove(block.key)
            if not isinstance(e, ValueError):
                raise
            chunk.coded = MOST_CODED
            return False
        self._drop(chunk)
        chunk.key, chunk.codec, chunk.lease = block.key, codec, lease
        chunk.coded += 1
        return True

    def _measure(self, chunk: Chunk, codec: Grouped, coded: torch.Tensor) -> None:
        """Note the bytes, and of one in `SAMPLE` chunks how far it is off."""
        assert chunk.views is not None
        raw, seen = sum(x.nbytes for x in chunk.views), self._seen[chunk.layer]
        self._seen[chunk.layer] += 1
        if seen % SAMPLE:
            self.books.loss += KVLoss(raw, coded.numel())
            return
        keys, values = (torch.empty_like(x) for x in chunk.views)
        codec.decode(coded, keys, values)
        self.books.loss += KVLoss.between(chunk.views, (keys, values), raw, coded.numel())

    def _decoded(self, chunk: Chunk) -> Lease:
        """A slot of its own with what the coded chunk says."""
        assert chunk.codec is not None
        shape, tokens = self._shapes[chunk.layer]
        lease = chunk.lease if chunk.lease is not None else self._acquire(chunk)
        try:
            made = self._new_slot(chunk.layer)
            try:
                raw = lease.slot.tensor[: self.residency.nbytes(chunk.key)]
                views = shape.views(made.slot, tokens)
                if self._fast is None or not self._fast(chunk.codec.bits, GROUP, raw, *views):
                    chunk.codec.decode(raw, *views)
            except BaseException:
                made.release()
                self.residency.remove(made.key)
                raise
        finally:
            if lease is not chunk.lease:
                lease.release()
                self._policies[chunk.codec.name].used(chunk.key)
        return made

    def _take(self, chunk: Chunk, leases: list[Lease], must: bool) -> Slot | None:
        if chunk.codec is None:
            return super()._take(chunk, leases, must)
        there = chunk.lease is not None or self.residency.resident(chunk.key)
        if not must and not (there and self.residency.room(POOL)):
            return None
        lease = self._decoded(chunk)
        self._scratch.add(lease.key)
        leases.append(lease)
        return lease.slot

    def _let_go(self, lease: Lease) -> None:
        if lease.key not in self._scratch:
            super()._let_go(lease)
            return
        self._scratch.remove(lease.key)
        lease.release()
        self.residency.remove(lease.key)

    def _release(self, chunk: Chunk) -> None:
        if chunk.codec is None:
            super()._release(chunk)
            return
        lease, chunk.lease = chunk.lease, None
        if lease is not None:
            lease.release()
            self._policies[chunk.codec.name].used(chunk.key)


def _shape(shape: KVShape, tokens: int) -> ChunkShape:
    return ChunkShape(shape.kv_heads, tokens, shape.key_dim, shape.value_dim, shape.dtype)


def _pool(codec: Grouped) -> str:
    return f"{POOL}.{codec.name}"

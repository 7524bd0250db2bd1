"""The store of one request's chunks: which stay in memory, which pass through, and who is fetched ahead.

Exact attention reads all of a layer's chunks in every step, layer after layer: a cyclic scan, of which a fixed share
that stays and a ring of slots for the rest is the best there is (Belady 1966). The share is spread evenly over the
layers, so that each layer's reads have the others' compute to hide behind. What will not stay is written to disk as
soon as it is full, once, and then comes and goes at the price of a read.
"""

from __future__ import annotations

import itertools
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from kvstore.chunks import LEAST_TOKENS, MOST_TOKENS, Chunk, ChunkList, KVShape
from kvstore.loss import NO_LOSS, KVLoss
from kvstore.sparse import SparseOptions, SparseRow
from tiers import (
    LRU,
    Arena,
    Block,
    DirectReader,
    Lease,
    OffloadError,
    Residency,
    Segment,
    Slot,
    SpillFile,
    SpillLink,
    Trace,
    TransferQueue,
)

WRITERS = 2  # writes in flight: the disk's queue is for reads
RING = 16  # slots that chunks pass through: as many reads in flight as a disk needs
LEAST_RING = 2  # one being attended to, one on its way
SPARSE_TOKENS = ((16, 4096), (32, 16384), (64, 1 << 62))  # of a chunk, for sequences up to
SHORTEST = 8 * LEAST_TOKENS  # tokens of sequences that run together: shorter ones are mostly chunks being filled
_RUN = 64  # most chunks attended to in one call
POOL = "kv"


Span = tuple[Chunk, int, int]  # a chunk, and which of its tokens


class KVDisk:
    """Where chunks are spilled to, for all requests of an engine: one file, read over the queue that reads weights."""

    def __init__(
        self, folder: Path, limit: int | None, reader: DirectReader, queue: TransferQueue, trace: Trace | None = None
    ) -> None:
        """Raises `UsageError` for a folder that cannot be used."""
        self.file = SpillFile(folder, limit)
        self.number = reader.add(self.file)  # which closes it
        self.read = queue
        self.write = TransferQueue(SpillLink(self.file), WRITERS, trace)
        self._abandoned: deque[tuple[Residency, dict[str, tuple[int, int]]]] = deque()

    def abandon(self, residency: Residency, extents: dict[str, tuple[int, int]]) -> None:
        """A store was collected as garbage, on whatever thread: what it held is taken back by the next `sweep`."""
        self._abandoned.append((residency, extents))

    def sweep(self) -> None:
        """Take back what was abandoned."""
        while self._abandoned:
            residency, extents = self._abandoned.popleft()
            residency.settle()
            for offset, nbytes in extents.values():
                self.file.free(offset, nbytes)
            extents.clear()

    def close(self) -> None:
        """Stop the writers."""
        self.write.close()


class ScanPolicy:
    """Of what passes through, that which has been used goes first: it is needed again only after all the rest."""

    def __init__(self) -> None:
        self._used: OrderedDict[str, None] = OrderedDict()

    def used(self, key: str) -> None:
        """The block has served this step."""
        self._used[key] = None

    def touched(self, key: str) -> None:
        """It is wanted."""
        self._used.pop(key, None)

    def removed(self, key: str) -> None:
        """Forget it."""
        self._used.pop(key, None)

    def victim(self, evictable: Callable[[str], bool], incoming: str) -> str | None:
        """The first that was used, never one that is still to be."""
        return next((k for k in self._used if evictable(k)), None)


class Chosen(LRU):
    """Chunks that are attended to if they are chosen: the one not chosen for longest goes first."""

    def used(self, key: str) -> None:
        """Being wanted is what counts, and that has been told."""


@dataclass(slots=True)
class KVBooks:
    """Bytes read from and written to disk, seconds waited for them, and what coding did."""

    bytes_read: int = 0
    bytes_written: int = 0
    stall_s: float = 0.0
    loss: KVLoss = NO_LOSS

    def copy(self) -> KVBooks:
        """As they are now."""
        return replace(self)

    def __sub__(self, then: KVBooks) -> KVBooks:
        """What came since."""
        return KVBooks(*(getattr(self, f.name) - getattr(then, f.name) for f in fields(KVBooks)))


class ChunkStore:
    """Slots for `layers` layers of `batch` sequences that grow to `capacity` tokens.

    `resident` bytes are kept in memory, raised to the least that works: for each sequence and layer the chunk that is
    being filled, and a ring. `tokens` of a chunk; layers of another shape than the first get as many as fit the slot.
    Sequences that were not foreseen (forks), or grow longer, make do with the same slots: what would else stay leaves.
    """

    decodes = False  # whether chunks are attended to elsewhere than where they lie

    def __init__(
        self, disk: KVDisk, shape: KVShape, layers: int, batch: int, capacity: int, resident: int,
        *, tokens: int | None = None, interrupted: Callable[[], bool] | None = None,
        sparse: SparseOptions | None = None,
    ) -> None:  # fmt: skip
        self._disk = disk
        self._capacity = capacity
        self.tokens = tokens or shape.chunk_tokens()
        self.slot_nbytes = shape.chunk_nbytes(self.tokens)
        self._shapes: dict[int, tuple[KVShape, int]] = {}  # by layer: and tokens of a chunk
        self.sparse = sparse
        self._policy = self._new_policy()  # of the pool `POOL`
        stay = self._make_pools(shape, resident, layers, batch, capacity)
        self.residency.interrupted = interrupted
        each, rest = divmod(stay, layers)
        self._may_stay = [each + (n < rest) for n in range(layers)]
        self._numbers = itertools.count()
        self._extents: dict[str, tuple[int, int]] = {}  # of the spill file: offset and bytes
        self._leased: dict[str, Chunk] = {}  # those being filled and those that stay, in order of their leases
        self.books = KVBooks()
        disk.sweep()
        weakref.finalize(self, disk.abandon, self.residency, self._extents).atexit = False

    def _make_pools(self, shape: KVShape, resident: int, layers: int, batch: int, capacity: int) -> int:
        """Cut the memory into slots; returns how many chunks are to stay there."""
        self.slots = slots_for(resident, self.slot_nbytes, layers, batch, capacity, self.tokens)
        self._add_pools([(POOL, self.slot_nbytes, self.slots, self._policy)])
        tails = layers * batch
        whole = tails * -(-capacity // self.tokens)
        ring = 0 if self.slots >= whole else min(RING, max(LEAST_RING, (self.slots - tails) // 2))
        self._passes = ring > 0
        self._run = max(1, ring // 2) if ring else _RUN
        stay = max(0, self.slots - tails - ring)
        if self.sparse is not None:
            # what is chosen changes: whatever was not chosen for longest makes way
            stay, self._run = (0 if ring else stay), max(1, min(_RUN, (self.slots - tails) // 2))
        return stay

    def _add_pools(self, pools: Sequence[tuple[str, int, int, ScanPolicy | Chosen]]) -> None:
        """(name, bytes of a slot, slots, policy) of each."""
        self._arena = Arena(sum(nbytes * slots for _, nbytes, slots, _ in pools))
        self.residency = Residency(self._arena, self._disk.read, down=self._disk.write)
        for pool in pools:
            self.residency.add_pool(*pool)

    def _new_policy(self) -> ScanPolicy | Chosen:
        return ScanPolicy() if self.sparse is None else Chosen()

    @property
    def nbytes(self) -> int:
        """Bytes of memory, of all slots together."""
        return self._arena.nbytes

    def new_list(self, layer: int, shape: KVShape, *, window: bool = False) -> ChunkList:
        """An empty sequence of a layer; one with a window is not attended to sparsely."""
        if layer not in self._shapes:
            tokens = self._fitting(shape)
            if not tokens:
                raise OffloadError(
                    f"--kv-resident: one token of layer {layer} takes {shape.token_nbytes} bytes, a chunk of the first "
                    f"layer only {self.slot_nbytes}; give chunks more tokens with --set kv_chunk"
                )
            self._shapes[layer] = shape, tokens
        tokens = self._shapes[layer][1]
        sparse = (
            SparseRow(self.sparse, layer, shape, tokens, -(-self._capacity // tokens))
            if self.sparse is not None and not window
            else None
        )
        return ChunkList(self, layer, tokens, sparse)

    def _fitting(self, shape: KVShape) -> int:
        """Tokens of a layer's chunks, so that one fits its slot."""
        return min(self.tokens, self.slot_nbytes // shape.token_nbytes)

    @property
    def holds_all(self) -> bool:
        """Whether nothing ever has to come from disk."""
        return not self._passes

    def shape_of(self, layer: int) -> KVShape:
        """What the layer keeps of a token. Raises `KeyError` for one that keeps nothing yet."""
        return self._shapes[layer][0]

    # what lists ask for

    def create(self, layer: int) -> Chunk:
        """See `Store`. Waits for a slot; raises `Interrupted`, and what made a spill fail (a full disk)."""
        self._keep_free(1)
        chunk = Chunk("", layer)
        lease = self._new_slot(layer)
        chunk.key = lease.key
        self._lease(chunk, lease)
        return chunk

    def _new_slot(self, layer: int) -> Lease:
        shape, tokens = self._shapes[layer]
        block = Block(self._new_key(), tokens * shape.token_nbytes, self.slot_nbytes, ())
        return self.residency.create(block, POOL)

    def _new_key(self) -> str:
        return f"kv.{next(self._numbers)}"

    def open(self, chunk: Chunk) -> None:
        """See `Store`."""
        if chunk.lease is None:
            self._keep_free(1)
            self._lease(chunk, self.residency.acquire(chunk.key))
        if chunk.offset is not None:
            self.residency.soil(chunk.key)

    @contextmanager
    def looking(self, chunk: Chunk) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """See `Store`."""
        if chunk.views is not None:
            yield chunk.views
            return
        self._keep_free(1)
        with self.residency.acquire(chunk.key) as lease:
            shape, tokens = self._shapes[chunk.layer]
            yield shape.views(lease.slot, tokens)
        self._policy.used(chunk.key)

    def full(self, chunk: Chunk) -> None:
        """See `Store`: it stays if the layer may keep one more, else it is spilled."""
        if chunk.stays:
            return
        if self._may_stay[chunk.layer] > 0:
            self._may_stay[chunk.layer] -= 1
            chunk.stays = True
            return
        self.spill(chunk)

    def spill(self, chunk: Chunk) -> None:
        """Write it to disk, and let it go."""
        if chunk.stays:
            chunk.stays = False
            self._may_stay[chunk.layer] += 1
        nbytes = self.residency.nbytes(chunk.key)
        if chunk.offset is None:
            chunk.offset = self._disk.file.allocate(nbytes)
            self._extents[chunk.key] = chunk.offset, nbytes
        if self.residency.spill(chunk.key, (Segment(self._disk.number, chunk.offset, nbytes, 0, None, True),)):
            self.books.bytes_written += nbytes
        self._release(chunk)

    def give_up(self, chunk: Chunk) -> None:
        """See `Store`."""
        if chunk.stays:
            self._may_stay[chunk.layer] += 1
        self._drop(chunk)

    def _drop(self, chunk: Chunk) -> None:
        """Give up the chunk's block, in memory and on disk."""
        self._release(chunk)
        self.residency.remove(chunk.key)
        chunk.offset = None
        extent = self._extents.pop(chunk.key, None)
        if extent is not None:
            self._disk.file.free(*extent)

    # attention

    def reading(
        self, spans: Sequence[Span], later: Iterable[Chunk]
    ) -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
        """Keys and values of tokens of each span [kv heads, n, D], in order; good until the next is asked for.

        While one is attended to, those behind it, and then the `later` chunks, are fetched.
        """
        for run in self._held(spans, later, 1):
            ((chunk, start, stop, slot),) = run
            shape, tokens = self._shapes[chunk.layer]
            k, v = shape.views(slot, tokens)
            yield k[:, start:stop], v[:, start:stop]

    def addresses(
        self, spans: Sequence[Span], later: Iterable[Chunk]
    ) -> Generator[list[tuple[int, int, int]], None, None]:
        """(address of keys, of values, tokens) of each span, in order, as many at a time as are there; good until the
        next ones are asked for."""
        for run in self._held(spans, later, self._run):
            yield self._located(run)

    def located(self, spans: Sequence[Span]) -> list[tuple[int, int, int]]:
        """The same of chunks that are leased, and good as long as they are."""
        return self._located([(c, start, stop, c.lease.slot) for c, start, stop in spans if c.lease is not None])

    def _located(self, held: Sequence[tuple[Chunk, int, int, Slot]]) -> list[tuple[int, int, int]]:
        if not held:
            return []
        shape, tokens = self._shapes[held[0][0].layer]
        k, v = (width * shape.dtype.itemsize for width in (shape.key_dim, shape.value_dim))
        values = shape.kv_heads * tokens * k
        return [
            (slot.address + start * k, slot.address + values + start * v, stop - start) for _, start, stop, slot in held
        ]

    def _held(
        self, spans: Sequence[Span], later: Iterable[Chunk], most: int
    ) -> Iterator[list[tuple[Chunk, int, int, Slot]]]:
        """Spans in order and the slots they are in: as many as are there, `most` at a time, at least one."""
        residency = self.residency
        if any(chunk.views is None for chunk, *_ in spans):
            self._keep_free(LEAST_RING)
        passing = [chunk for chunk, *_ in spans if chunk.lease is None]
        if self.sparse is not None:
            for chunk in passing:
                residency.keep(chunk.key)  # before any of them makes way for another
        coming = [*passing, *itertools.islice((c for c in later if c.lease is None), RING)]
        asked, at = self._fetch(coming, 0), 0
        while at < len(spans):
            run: list[tuple[Chunk, int, int, Slot]] = []
            leases: list[Lease] = []
            try:
                while at < len(spans) and len(run) < most:
                    chunk, start, stop = spans[at]
                    slot = self._take(chunk, leases, not run)
                    if slot is None:
                        break
                    run.append((chunk, start, stop, slot))
                    at += 1
                if self.decodes:
                    asked = self._fetch(coming, asked)  # into the slots of what has been decoded
                yield run
            finally:
                for lease in leases:
                    self._let_go(lease)
            asked = self._fetch(coming, asked)

    def _take(self, chunk: Chunk, leases: list[Lease], must: bool) -> Slot | None:
        """The slot to attend to the chunk in, with what was leased for that added to `leases`; None if it is not there
        and not waited for."""
        lease = chunk.lease
        if lease is None:
            if not must and not self.residency.resident(chunk.key):
                return None
            lease = self._acquire(chunk)
            leases.append(lease)
        return lease.slot

    def _acquire(self, chunk: Chunk) -> Lease:
        before = self.residency.counters.stall_s
        lease = self.residency.acquire(chunk.key)
        self.books.stall_s += self.residency.counters.stall_s - before
        return lease

    def _let_go(self, lease: Lease) -> None:
        lease.release()
        self._policy.used(lease.key)

    def _fetch(self, coming: Sequence[Chunk], at: int) -> int:
        """Ask for as many of those that come, from number `at` on, as there are slots; returns where it stopped."""
        while at < len(coming) and self.residency.prefetch(coming[at].key):
            at += 1
        return at

    def close(self) -> None:
        """Give all memory and disk back; the store is of no use after this."""
        self._disk.abandon(self.residency, self._extents)
        self._disk.sweep()

    @property
    def held(self) -> int:
        """Chunks that are being filled or stay."""
        return len(self._leased)

    @property
    def bytes_read(self) -> int:
        """Bytes fetched from disk so far."""
        return self.residency.counters.fetched

    def _lease(self, chunk: Chunk, lease: Lease) -> None:
        shape, tokens = self._shapes[chunk.layer]
        chunk.lease, chunk.views = lease, shape.views(lease.slot, tokens)
        self._leased[chunk.key] = chunk

    def _keep_free(self, least: int) -> None:
        """Leave at least so many slots to what passes: where more is leased than was foreseen, let the oldest go.

        What was to stay goes before what is being filled, and makes room for good.
        """
        while self._leased and len(self._leased) > self.slots - least:
            chunk = next((c for c in self._leased.values() if c.stays), next(iter(self._leased.values())))
            stayed = chunk.stays
            self.spill(chunk)
            if stayed:
                self._may_stay[chunk.layer] -= 1

    def _release(self, chunk: Chunk) -> None:
        lease, chunk.lease, chunk.views = chunk.lease, None, None
        if lease is not None:
            del self._leased[chunk.key]
            lease.release()
            self._policy.used(chunk.key)


def chunk_tokens(shape: KVShape, capacity: int, *, sparse: bool = False) -> int:
    """Tokens of a chunk for sequences of so many: what a disk reads well, and at most an eighth of a sequence, so that
    the chunks being filled are not most of what is kept. `sparse` ones are shorter: few of their tokens are wanted."""
    most = MOST_TOKENS
    if sparse:  # a few hundred chunks at most: their abstracts stay in memory, and all are looked at
        most = next((tokens for tokens, up_to in SPARSE_TOKENS if capacity <= up_to), SPARSE_TOKENS[-1][0])
    tokens = min(shape.chunk_tokens(), most)
    while tokens > LEAST_TOKENS and tokens * 8 > capacity:
        tokens //= 2
    return tokens


def slots_for(resident: int, slot_nbytes: int, layers: int, batch: int, capacity: int, tokens: int) -> int:
    """Slots that `resident` bytes make: at least a chunk to fill per layer and sequence and a ring, at most all.

    Whatever is asked for, one being filled and a ring: sequences may grow, or fork, beyond what was foreseen.
    """
    tails = layers * batch
    whole = tails * -(-capacity // tokens)
    return max(min(resident // slot_nbytes, whole), min(tails + LEAST_RING, whole), 1 + LEAST_RING)

"""Residency: the one owner of where each block is.

Invariants, held whenever the lock is free:
 - a block has a slot iff it is pinned, resident or on its way; two blocks never share a slot;
 - a slot is either free in its pool or belongs to exactly one block;
 - a leased block, and one whose ticket is not done, is never evicted and its slot never reused;
 - nor is a dirty one, before every byte of it is on disk.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

from tiers.arena import Arena, Pool, Slot
from tiers.block import Block, Segment
from tiers.device import Device
from tiers.policy import EvictionPolicy
from tiers.queue import Cause, Ticket, TransferQueue
from tiers.trace import Trace


@dataclass(slots=True)
class Counters:
    """What residency has seen, in bytes of blocks and seconds."""

    needed: int = 0  # bytes of all blocks acquired
    hit: int = 0  # of these, bytes that needed no fetch for this use
    late: int = 0  # fetched ahead, but not all there when needed
    missed: int = 0  # not even under way when needed
    stall_s: float = 0.0  # time compute waited for tickets
    fetched: int = 0  # bytes of blocks asked for over the queue, whatever for


@dataclass(slots=True)
class _Entry:
    block: Block
    pool: str | None  # None: pinned in a slot of its own
    slot: Slot | None = None
    ticket: Ticket | None = None
    leases: int = 0
    unused: bool = False  # fetched and not used since: its first use is not a hit
    dirty: bool = False  # made here, and nowhere else until `spilling` has ended well
    spilling: Ticket | None = None


class Lease:
    """The right to use a block: it cannot be evicted until `release`. A context manager.

    The bytes may still be on their way; `wait` returns when they are all there.
    """

    __slots__ = ("_owner", "_ticket", "key", "slot")

    def __init__(self, owner: Residency, key: str, slot: Slot, ticket: Ticket | None) -> None:
        self._owner: Residency | None = owner
        self._ticket = ticket
        self.key = key
        self.slot = slot

    @property
    def ready(self) -> bool:
        """Whether `wait` would return (or raise) at once."""
        return self._ticket is None or self._ticket.done

    def wait(self) -> Lease:
        """Block until every byte is in the slot. On `ReadError` or `Interrupted` the lease is released."""
        if self._owner is None:
            raise RuntimeError(f"the lease on {self.key} was given back")
        if self._ticket is not None:
            self._owner._wait(self, self._ticket)
            self._ticket = None
        return self

    def release(self) -> None:
        """Give the right back. A second call does nothing."""
        owner, self._owner = self._owner, None
        if owner is not None:
            owner._release(self.key, self.slot)

    def ready_to(self, nbytes: int | None) -> bool:
        """Whether the first `nbytes` of the slot (None: all) are there. Raises what went wrong."""
        if self._ticket is None:
            return True
        assert self._owner is not None
        return self._owner._queue.arrived(self._ticket, self.slot.nbytes if nbytes is None else nbytes)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.release()


class Residency:
    """Blocks, their pools and policies. `acquire`, `request` and `prefetch` are safe from any thread."""

    def __init__(
        self, arena: Arena, queue: TransferQueue, device: Device | None = None, trace: Trace | None = None,
        down: TransferQueue | None = None,
    ) -> None:  # fmt: skip
        """Blocks come over `queue`; those made here (`create`) are written to disk over `down`."""
        self._down = down
        self._arena = arena
        self._queue = queue
        self._device = device
        self._trace = trace
        self._lock = threading.RLock()
        self._entries: dict[str, _Entry] = {}
        self._pools: dict[str, tuple[Pool, EvictionPolicy]] = {}
        self.counters = Counters()
        self.interrupted: Callable[[], bool] | None = None  # polled while waiting

    def add_pool(self, name: str, slot_nbytes: int, count: int, policy: EvictionPolicy) -> None:
        """`count` slots of one size class for the blocks added under this name."""
        self._pools[name] = (Pool(self._arena, slot_nbytes, count), policy)

    def add(self, block: Block, pool: str) -> None:
        """Register a block that comes and goes within a pool. Raises `ValueError` if its slots are too small."""
        if block.slot_nbytes > self._pools[pool][0].slot_nbytes:
            raise ValueError(f"block {block.key} needs {block.slot_nbytes} bytes, pool {pool} has smaller slots")
        self._entries[block.key] = _Entry(block, pool)

    def pin(self, block: Block) -> Ticket:
        """Register a block that stays: it gets a slot of its own and starts to load."""
        slot = self._arena.allocate(block.slot_nbytes)
        ticket = self._queue.fetch(block, slot, Cause.PREFETCH)
        self._entries[block.key] = _Entry(block, None, slot, ticket)
        return ticket

    def create(self, block: Block, pool: str) -> Lease:
        """Register a block that is made here: it gets a slot, whose content is the caller's to write, and is dirty.

        Waits for a spill to end if every slot is leased or dirty. Raises what made a spill fail, `Interrupted`, and
        `RuntimeError` if no slot can ever come free.
        """
        with self._lock:
            self.add(block, pool)
            entry = self._entries[block.key]
            try:
                while (slot := self._take_slot(entry, Cause.DEMAND)) is None:
                    self._await_spill(pool)
            except BaseException:
                del self._entries[block.key]
                raise
            entry.slot, entry.dirty, entry.leases = slot, True, 1
            self._pools[pool][1].touched(block.key)
            return Lease(self, block.key, slot, None)

    def soil(self, key: str) -> None:
        """The block, which is leased, is about to be changed: what is on disk will not be it any more."""
        with self._lock:
            entry = self._entries[key]
            assert entry.leases > 0
            if entry.spilling is not None:
                entry.spilling.wait(self.interrupted)
            entry.dirty, entry.spilling = True, None

    def spill(self, key: str, segments: Sequence[Segment]) -> bool:
        """Start writing a dirty block to where `segments` say, and it will be read from; False if that is not needed.

        It can be evicted once every byte is there. One that failed is tried again.
        """
        with self._lock:
            entry = self._entries[key]
            failed = entry.spilling is not None and entry.spilling.done and entry.spilling.error is not None
            if not entry.dirty or (entry.spilling is not None and not failed):
                return False
            assert self._down is not None and entry.slot is not None
            entry.block = replace(entry.block, segments=tuple(segments))
            entry.spilling = self._down.fetch(entry.block, entry.slot, Cause.PREFETCH)
            return True

    def remove(self, key: str) -> None:
        """The block is no more: its slot is free again. It must not be leased."""
        with self._lock:
            entry = self._entries.pop(key)
            assert entry.leases == 0
            for ticket, queue in ((entry.ticket, self._queue), (entry.spilling, self._down)):
                if ticket is not None and not ticket.done and queue is not None:
                    queue.cancel(ticket)
            if entry.slot is not None:
                assert entry.pool is not None
                pool, policy = self._pools[entry.pool]
                pool.give(entry.slot)
                policy.removed(key)

    def _await_spill(self, pool: str) -> None:
        """Until one of the pool's dirty blocks is on disk. Under the lock, which the writers do not need."""
        # one that has ended since a slot was looked for is as good
        ticket = next((e.spilling for e in self._entries.values() if e.pool == pool and e.leases == 0 and e.dirty
                       and e.spilling is not None), None)  # fmt: skip
        if ticket is None:
            raise RuntimeError(f"every slot of pool {pool} is leased; the plan gave it too few")
        ticket.wait(self.interrupted)

    def acquire(self, key: str) -> Lease:
        """Lease the block and wait until it is in memory. Raises `ReadError`, `Interrupted`."""
        lease = self.request(key)
        assert lease is not None
        return lease.wait()

    def request(self, key: str, *, must: bool = True, cause: Cause = Cause.DEMAND) -> Lease | None:
        """Lease the block now and let its bytes arrive; `Lease.wait` is the other half.

        With `must` False the answer is None if every slot is leased; with True that is a `RuntimeError`, because a
        plan gives each pool as many slots as are ever leased at once.
        """
        with self._lock:
            entry = self._entries[key]
            if entry.ticket is not None and entry.ticket.done and entry.ticket.error is not None:
                self._forget(entry, entry.ticket)  # nobody waited for it; this request starts afresh
            under_way = entry.ticket is not None and not entry.ticket.done
            missed = entry.slot is None
            fetched = missed or entry.unused
            if missed:
                while not self._fetch(entry, cause):
                    if not must:
                        return None
                    assert entry.pool is not None
                    self._await_spill(entry.pool)
                    cause = Cause.DEMAND  # whatever it was for, it is waited for now
            elif under_way and entry.ticket is not None and cause is Cause.DEMAND:
                self._queue.promote(entry.ticket)
            entry.leases += 1  # before the lock is let go: from here on it cannot be evicted
            entry.unused = False
            if entry.pool is not None:
                self._pools[entry.pool][1].touched(key)
            n = entry.block.nbytes
            self.counters.needed += n
            self.counters.hit += 0 if fetched else n
            self.counters.late += n if fetched and under_way else 0
            self.counters.missed += n if missed else 0
            assert entry.slot is not None
            return Lease(self, key, entry.slot, entry.ticket)

    def _wait(self, lease: Lease, ticket: Ticket) -> None:
        try:
            if ticket.done:
                ticket.wait()
            else:
                began = time.perf_counter()
                try:
                    ticket.wait(self.interrupted)
                finally:
                    now = time.perf_counter()
                    self.counters.stall_s += now - began
                    if self._trace is not None:
                        self._trace.slice("stall", lease.key, began, now)
        except BaseException:
            lease.release()
            with self._lock:
                if ticket.done and ticket.error is not None:
                    self._forget(self._entries[lease.key], ticket)
            raise

    def promote(self, key: str) -> None:
        """Whatever the block was fetched for, it is now waited for."""
        with self._lock:
            ticket = self._entries[key].ticket
            if ticket is not None and not ticket.done:
                self._queue.promote(ticket)

    def prefetch(self, key: str, deadline: float = 0.0) -> bool:
        """Start fetching the block if a slot can be had without evicting something more useful.

        True if the block is in memory or on its way afterwards.
        """
        with self._lock:
            entry = self._entries[key]
            if entry.slot is not None:
                failed = entry.ticket is not None and entry.ticket.done and entry.ticket.error is not None
                return not failed  # whoever needs the block will be told by `request`
            return self._fetch(entry, Cause.PREFETCH, deadline)

    def resident(self, key: str) -> bool:
        """Whether `acquire` would return at once."""
        with self._lock:
            entry = self._entries[key]
            return entry.slot is not None and (entry.ticket is None or (entry.ticket.done and not entry.ticket.error))

    def pool_of(self, key: str) -> Pool:
        """The slots this block comes and goes in. Raises `KeyError` for a pinned one."""
        pool = self._entries[key].pool
        if pool is None:
            raise KeyError(f"{key} is pinned")
        return self._pools[pool][0]

    def slot_of(self, key: str) -> Slot | None:
        """Where the block is; None if not all of it is in memory. Good for as long as it cannot be evicted."""
        with self._lock:
            return self._entries[key].slot if self.resident(key) else None

    def coming(self, key: str) -> bool:
        """Whether the block is on its way: asked for, and not all there yet."""
        with self._lock:
            return self._entries[key].slot is not None and not self.resident(key)

    def has_room(self, key: str) -> bool:
        """Whether the block's pool has a free slot: nothing would have to go for it."""
        return self.pool_of(key).free > 0

    def room(self, pool: str) -> int:
        """Free slots of the pool: nothing would have to go for so many blocks."""
        return self._pools[pool][0].free

    def nbytes(self, key: str) -> int:
        """Bytes of the block's tensors."""
        return self._entries[key].block.nbytes

    def knows(self, key: str) -> bool:
        """Whether the block has a place in this tier: it is here, on its way, or may come."""
        with self._lock:
            return key in self._entries

    def keep(self, key: str) -> bool:
        """The block will be needed soon: it counts as just used. False if it is neither there nor on its way."""
        with self._lock:
            entry = self._entries[key]
            if entry.slot is None:
                return False
            if entry.pool is not None:
                self._pools[entry.pool][1].touched(key)
            return True

    def cancel_prefetches(self) -> None:
        """Drop every unleased transfer that is still under way and free its slot."""
        with self._lock:
            for entry in self._entries.values():
                if entry.pool is not None and entry.leases == 0 and entry.ticket is not None and not entry.ticket.done:
                    self._queue.cancel(entry.ticket)
                    self._forget(entry, entry.ticket)

    def settle(self) -> None:
        """Cancel every transfer, and return when no slot is read or written any more: the blocks are given up."""
        with self._lock:
            for entry in self._entries.values():
                for ticket, queue in ((entry.ticket, self._queue), (entry.spilling, self._down)):
                    if ticket is not None and not ticket.done and queue is not None:
                        queue.cancel(ticket)

    def blocks(self) -> Iterable[Block]:
        """All registered blocks."""
        return [e.block for e in self._entries.values()]

    def _release(self, key: str, slot: Slot) -> None:
        with self._lock:
            if self._device is not None:
                slot.fence = self._device.fence()
            entry = self._entries[key]
            assert entry.leases > 0
            entry.leases -= 1

    def _fetch(self, entry: _Entry, cause: Cause, deadline: float = 0.0) -> bool:
        """Find a slot and submit. Under the lock. False if no slot can be had."""
        assert entry.pool is not None and entry.slot is None
        slot = self._take_slot(entry, cause)
        if slot is None:
            return False
        try:
            entry.ticket = self._queue.fetch(entry.block, slot, cause, deadline)
        except BaseException:
            self._pools[entry.pool][0].give(slot)
            raise
        entry.slot, entry.unused = slot, True
        self.counters.fetched += entry.block.nbytes
        self._pools[entry.pool][1].touched(entry.block.key)
        return True

    def _take_slot(self, entry: _Entry, cause: Cause) -> Slot | None:
        assert entry.pool is not None
        pool, policy = self._pools[entry.pool]
        slot = pool.take()
        if slot is not None:
            return slot

        def idle(key: str) -> bool:
            e = self._entries[key]
            settled = e.slot is not None and (e.ticket is None or e.ticket.done)
            return e.leases == 0 and settled and not (e.dirty and not _written(e))

        victim = policy.victim(idle, entry.block.key)
        if victim is None and cause is Cause.DEMAND:
            # whatever the policy would rather keep, compute is waiting
            victim = next((k for k, e in self._entries.items() if e.pool == entry.pool and idle(k)), None)
        if victim is None and cause is Cause.DEMAND:
            victim = self._cancel_one(entry.pool)
        if victim is None:
            return None
        gone = self._entries[victim]
        slot, gone.slot, gone.ticket, gone.unused = gone.slot, None, None, False
        gone.dirty, gone.spilling = False, None
        policy.removed(victim)
        return slot

    def _cancel_one(self, pool: str) -> str | None:
        """Take back the least urgent prefetch under way."""
        under_way = [
            (k, e.ticket)
            for k, e in self._entries.items()
            if e.pool == pool and e.leases == 0 and e.ticket is not None and not e.ticket.done
        ]
        if not under_way:
            return None
        key, ticket = max(under_way, key=lambda kt: (kt[1].cause, kt[1].deadline))
        self._queue.cancel(ticket)
        return key

    def _forget(self, entry: _Entry, ticket: Ticket) -> None:
        """A failed or cancelled fetch: the slot goes back, so that the next request starts afresh."""
        if entry.ticket is not ticket or entry.leases > 0 or entry.slot is None:
            return
        if entry.pool is None:
            # a pinned slot stays its own; only the content is void
            entry.ticket = self._queue.fetch(entry.block, entry.slot, Cause.DEMAND)
            return
        pool, policy = self._pools[entry.pool]
        pool.give(entry.slot)
        policy.removed(entry.block.key)
        entry.slot, entry.ticket, entry.unused = None, None, False


def _written(entry: _Entry) -> bool:
    """Whether a dirty block is on disk by now. Raises what made the writing fail."""
    ticket = entry.spilling
    if ticket is None or not ticket.done:
        return False
    if ticket.error is not None:
        raise ticket.error
    return True

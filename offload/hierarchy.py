"""The tiers of one model put together: arenas, links, residencies and who fetches ahead of whom.

On a CPU there is one residency, over RAM, fed from disk. With a device there are two: the device's is fed over the
link from the host's, which is fed from disk. `compute` is the one whose blocks are computed on.

With a direct reader the host has no place for dense blocks that only pass through: they are read from disk straight
into device memory, and nobody fetches them ahead on the host, which would read them twice. Blocks the host keeps for
good, experts, which it caches, and what must be decoded still come through it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from offload.layout import LaidOut, ModelLayout
from offload.planning.budgets import READERS
from offload.planning.placement import dense_blocks, expert_pools
from offload.planning.plan import Plan, TierPlan
from prefetch import CyclicSchedule, Prefetcher, ThrashGuard
from tiers import (
    COPIES,
    LRU,
    Arena,
    Block,
    BlockReader,
    Cause,
    Device,
    EvictionPolicy,
    NextUse,
    Residency,
    Ticket,
    Trace,
    TransferQueue,
    UpLink,
    page_up,
    readable_directly,
)

Progress = Callable[[str, int, int], None]  # (what, bytes done, bytes in all)
STREAM, STAGING = "stream", "staging"


class Hierarchy:
    """Owns all memory and all worker threads of a model. `load` fills it; `close` gives everything back."""

    def __init__(
        self,
        layout: ModelLayout,
        plan: Plan,
        reader: BlockReader,
        device: Device,
        interrupted: Callable[[], bool],
        trace: Trace | None = None,
        direct: BlockReader | None = None,
        expert_policy: Callable[[int], EvictionPolicy] | None = None,
    ) -> None:
        """`expert_policy(slots)` is who decides which expert gives up its slot (default: least recently used)."""
        self._layout = layout
        self._expert_policy = expert_policy or (lambda slots: LRU())
        self.expert_policies: list[EvictionPolicy] = []  # of all tiers
        self._guards: dict[str, ThrashGuard] = {}  # expert → the guard of its pool where it is computed on
        self._direct = direct
        self._plan = plan
        self._device = device
        self._interrupted = interrupted
        self._trace = trace
        self.disk = TransferQueue(reader, READERS, trace)
        self.up: TransferQueue | None = None
        self.host_prefetcher: Prefetcher | None = None
        self.prefetcher: Prefetcher | None = None
        try:
            self._host_arena = Arena(plan.host.arena)
            self.compute: Residency
            if plan.device is None:
                self.compute = self.host = self._residency(self._host_arena, self.disk, plan.host, None)
            else:
                device.pin(self._host_arena)
                self.host = self._staging()
                self._uplink = UpLink(self.host, device, direct)
                self.up = TransferQueue(self._uplink, COPIES, trace, self.disk.meter)
                arena = device.arena(plan.device.arena)
                self.compute = self._residency(arena, self.up, plan.device, device)
            self.prefetcher = self._schedule(self.compute, plan.compute, dense_blocks(layout))
        except BaseException:
            self.close()
            raise

    def pinned(self) -> list[LaidOut]:
        """The blocks that stay where they are computed on."""
        keys = set(self._plan.compute.pinned)
        return [b for b in (self._layout.rest, *dense_blocks(self._layout)) if b.block.key in keys]

    def streamed(self) -> list[LaidOut]:
        """The dense blocks that come and go where they are computed on, in order of use."""
        keys = set(self._plan.compute.pinned)
        return [b for b in dense_blocks(self._layout) if b.block.key not in keys]

    def load(self, progress: Progress | None) -> None:
        """Fill what stays: first the compute tier, then, under a device, the host; then start to stream."""
        plan = self._plan
        stay = [b.block for b in self.pinned()]
        experts = [e.block for es in expert_pools(self._layout).values() for e in es] if plan.everything_fits else []
        later = [] if plan.device is None else [b.block for b in self.streamed() if b.block.key in plan.host.pinned]
        total = sum(b.stored_nbytes for b in (*stay, *experts, *later))
        done = 0

        def wait(blocks: Iterable[Block], residency: Residency) -> None:
            nonlocal done
            for block in blocks:
                residency.acquire(block.key).release()
                done += block.stored_nbytes
                if progress is not None:
                    progress("loading", done, total)

        for block in stay:
            self.compute.pin(block)
        wait(stay, self.compute)
        for block in experts:
            self.compute.prefetch(block.key)
        wait(experts, self.compute)
        if plan.device is not None:
            # everything for the device has gone up: the host's memory is now laid out for good
            self._host_arena.reset()
            self.host = self._residency(self._host_arena, self.disk, plan.host, None)
            self._uplink.below = self.host
            for block in later:
                self.host.pin(block)
            wait(later, self.host)
            self.host_prefetcher = self._schedule(self.host, plan.host, self._through_host(self.streamed()))
        for prefetcher in (self.host_prefetcher, self.prefetcher):
            if prefetcher is not None:
                prefetcher.start()

    def fetch_expert(self, key: str) -> bool:
        """Start fetching an expert ahead, to where it is computed on; False if that must not be, or cannot."""
        return self._guards[key].fetch_ahead(key, lambda: self.compute.prefetch(key))

    def entered(self, keys: Sequence[str]) -> None:
        """Streamed blocks of one layer are leased and about to be computed on: look ahead."""
        assert self.prefetcher is not None
        self.prefetcher.entered(keys)
        if self.host_prefetcher is not None:
            self.host_prefetcher.passed(keys)

    def left(self) -> None:
        """The blocks entered last have been given back."""
        assert self.prefetcher is not None
        self.prefetcher.left()

    def restart(self) -> None:
        """A step was cut short."""
        for prefetcher in (self.prefetcher, self.host_prefetcher):  # from above: what goes up holds what lies below
            if prefetcher is not None:
                prefetcher.restart()

    def books(self) -> dict[str, float]:
        """Running totals, by the names of `StepStats`' fields. What is read directly counts as read, not as up."""
        c = self.compute.counters
        return {
            "stall_s": c.stall_s, "needed": c.needed, "hit": c.hit, "late": c.late, "missed": c.missed,
            "read_busy_s": self.disk.busy_s, "bytes_read": sum(self.disk.bytes_read.values()),
            "link_busy_s": self.up.busy_s if self.up is not None else 0.0,
            "bytes_up": sum(self.up.bytes_read.values()) if self.up is not None else 0,
        }  # fmt: skip

    def close(self) -> None:
        """Stop the threads, from above: an upward transfer waits for one below."""
        if self.up is not None:
            self.up.close()
        self.disk.close()
        self._device.close()

    def fetch_rows(self, block: Block, slot: object) -> Ticket:
        """An ad-hoc gather from disk (embedding rows), on demand."""
        return self.disk.fetch(block, slot, Cause.DEMAND)  # type: ignore[arg-type]

    def _through_host(self, blocks: Iterable[LaidOut]) -> list[LaidOut]:
        """Those that cannot be read straight into device memory: all, without a direct reader."""
        return [b for b in blocks if self._direct is None or not readable_directly(b.block)]

    def _residency(self, arena: Arena, queue: TransferQueue, plan: TierPlan, device: Device | None) -> Residency:
        """A tier laid out by its plan: pools for what comes and goes; what is pinned gets its slots in `load`."""
        residency = Residency(arena, queue, device, self._trace)
        residency.interrupted = self._interrupted
        for size, blocks in expert_pools(self._layout).items():
            if size in plan.experts:
                slots = plan.experts[size].count
                policy = self._expert_policy(slots)
                self.expert_policies.append(policy)
                if plan is self._plan.compute:
                    guard = policy = ThrashGuard(policy, nbytes=size)
                    self._guards.update((e.block.key, guard) for e in blocks)
                residency.add_pool(f"experts.{size}", size, slots, policy)
                for e in blocks:
                    residency.add(e.block, f"experts.{size}")
        return residency

    def _schedule(self, residency: Residency, plan: TierPlan, dense: list[LaidOut]) -> Prefetcher | None:
        """The pool of what is streamed through a tier, and the prefetcher that keeps it filled."""
        away = [b.block for b in dense if b.block.key not in set(plan.pinned)]
        if not away or plan.stream is None:
            return None
        schedule = CyclicSchedule([b.key for b in away])
        residency.add_pool(STREAM, plan.stream.slot_nbytes, plan.stream.count, NextUse(schedule.next_use))
        for block in away:
            residency.add(block, STREAM)
        return Prefetcher(residency, schedule, window=plan.stream.count)

    def _staging(self) -> Residency:
        """The host while loading: one pool that what is bound for the device passes through, if it must."""
        residency = Residency(self._host_arena, self.disk, None, self._trace)
        residency.interrupted = self._interrupted
        staged = self.pinned()
        if self._plan.everything_fits:
            staged += [e for es in expert_pools(self._layout).values() for e in es]
        blocks = [b.block for b in self._through_host(staged)]
        if not blocks:
            return residency
        slot = page_up(max(b.slot_nbytes for b in blocks))
        residency.add_pool(STAGING, slot, max(1, min(4, self._host_arena.nbytes // slot)), LRU())
        for block in blocks:
            residency.add(block, STAGING)
        return residency

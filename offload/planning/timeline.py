"""A plan on a virtual clock: the same schedule and prefetcher that run live, over links that only take time.

What is modelled: links that serve in order, demand before prefetch, a window of slots, disk → host → device pipelined
per block, experts that are read when the router has chosen them or was foreseen to, keys and values that pass through a
ring of slots, compute that is slowed by transfers beside it. What is not: requests inside a block (a block arrives when
its last byte does), and anything random.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from moe import Need, Place, Speeds, divide
from moe.beside import FASTER
from offload.planning import cost
from offload.planning.budgets import READERS
from offload.planning.cost import Pass
from offload.planning.facts import LayerFacts, ModelFacts
from offload.planning.machine import Machine
from offload.planning.routing import BLIND, PassMisses, Routing
from prefetch import CyclicSchedule, Prefetcher
from tiers import CHUNK, NextUse

_IN_FLIGHT = READERS * CHUNK  # bytes requested from the disk at once
_FIRST_PART = 5 << 20  # bytes of a block that must be below before its copy upward begins (a chunk and a page)


@dataclass(slots=True)
class Usage:
    """What one pass took, in seconds and bytes. `seconds` is the wall time; the others may overlap."""

    seconds: float = 0.0
    compute_s: float = 0.0
    disk_s: float = 0.0
    link_s: float = 0.0
    stall_s: float = 0.0
    bytes_read: float = 0.0
    bytes_up: float = 0.0
    kv_read: float = 0.0  # of `bytes_read`
    kv_written: float = 0.0  # keys and values that went to disk

    @property
    def bottleneck(self) -> str:
        """The resource that is busy longest."""
        busy = {"compute": self.compute_s, "link": self.link_s, "disk": self.disk_s}
        return max(busy, key=lambda k: busy[k])


@dataclass(frozen=True, slots=True)
class Streams:
    """What one tier streams: dense blocks in order of use with their bytes, through `slots` of a window."""

    blocks: tuple[tuple[str, int], ...]
    slots: int


@dataclass(frozen=True, slots=True)
class Placement:
    """What the timeline needs to know of a plan.

    `device` streams what is computed on (on a CPU: what RAM lacks), `host` what RAM lacks of that. Expert slots are
    those of the tier computed on and of the host under it. `kept` tokens of keys and values, of all sequences, stay in
    memory (None: all of them, attended to by torch), the others pass through `ring` bytes.
    """

    compute: Streams
    host: Streams | None
    expert_slots: int
    host_expert_slots: int = 0
    foresees: bool = True  # no layer is streamed, so the next layer's router is there to be asked
    kept: float | None = None
    ring: int = 0


@dataclass(slots=True)
class _Link:
    """Serves transfers in order; `free_at` is when all accepted so far are through."""

    name: str
    bytes_per_s: float
    latency_s: float
    free_at: float = 0.0
    busy_s: float = 0.0
    moved: float = 0.0
    slices: list[tuple[str, str, float, float]] = field(default_factory=list)

    def send(self, key: str, nbytes: float, now: float, ready: float = 0.0) -> float:
        """When `nbytes` are through. `ready` is when the last of them is there to be sent."""
        start = max(now, self.free_at)
        took = nbytes / self.bytes_per_s
        tail = min(nbytes, _FIRST_PART) / self.bytes_per_s
        end = max(start + took + self.latency_s, ready + tail if ready > start else 0.0)
        self.free_at = end
        self.busy_s += took + self.latency_s
        self.moved += nbytes
        self.slices.append((self.name, key, start, end))
        return end


class _Tier:
    """A residency on the virtual clock: what `Prefetcher` asks of one, and nothing else."""

    def __init__(
        self, clock: Clock, streams: Streams, schedule: CyclicSchedule, fetch: Callable[[str, float], float]
    ) -> None:
        self._clock = clock
        self._slots = streams.slots
        self._fetch = fetch
        self._policy = NextUse(schedule.next_use)
        self.arrives: dict[str, float] = {}
        self.leased: set[str] = set()

    def resident(self, key: str) -> bool:
        return self.arrives.get(key, float("inf")) <= self._clock.now

    def prefetch(self, key: str, deadline: float = 0.0) -> bool:
        return key in self.arrives or self._take(key)

    def cancel_prefetches(self) -> None:
        """Nothing is ever cut short here."""

    def lease(self, key: str) -> float:
        """When the block is there."""
        if key not in self.arrives and not self._take(key):
            # every slot holds something on its way: the latest gives up, as live
            victim = max((k for k in self.arrives if k not in self.leased), key=self.arrives.__getitem__)
            del self.arrives[victim]
            self._policy.removed(victim)
            self._take(key)
        self.leased.add(key)
        self._policy.touched(key)
        return self.arrives[key]

    def delay(self, seconds: float) -> None:
        """A demand went before what is still on its way."""
        for key, at in self.arrives.items():
            if at > self._clock.now:
                self.arrives[key] = at + seconds

    def _take(self, key: str) -> bool:
        if len(self.arrives) >= self._slots:
            victim = self._policy.victim(lambda k: k not in self.leased and self.resident(k), key)
            if victim is None:
                return False
            del self.arrives[victim]
            self._policy.removed(victim)
        self.arrives[key] = self._fetch(key, self._clock.now)
        self._policy.touched(key)
        return True


@dataclass(slots=True)
class Clock:
    """Virtual seconds."""

    now: float = 0.0


class _Turns(NamedTuple):
    """A layer's experts divided: how many are moved, how long the busier of device and CPU works, when all is done."""

    moved: int
    busy_s: float
    finish_s: float


@functools.lru_cache(maxsize=4096)
def _divided(
    device: int, coming: int, coming_s: float, disk: int, first_s: float, read_s: float, still: int, still_s: float,
    host: int, each: float, host_each: float, move_s: float, alone: bool,
) -> _Turns:  # fmt: skip
    """`moe.schedule.divide` of so many experts of each kind; many layers of a pass are alike."""
    places = [(Place.DEVICE, 0.0)] * device + [(Place.COMING, coming_s)] * coming + [(Place.HOST, 0.0)] * host
    places += [(Place.DISK, first_s + i * read_s) for i in range(disk)] + [(Place.DISK, still_s)] * still
    needs = [Need(i, 1, place, arrives) for i, (place, arrives) in enumerate(places)]
    done = divide(needs, Speeds(lambda n: each, lambda n: host_each, move_s, alone))
    lanes = [sum(t.ends_s - t.begins_s for t in turns) for turns in (done.device, done.cpu)]
    return _Turns(len(done.link), sum(lanes) if alone else max(lanes), done.finish_s)


def _about(seconds: float) -> float:
    """To two digits, so that what is nearly alike is divided once."""
    return float(f"{seconds:.1e}")


class Timeline:
    """One model, one machine, one placement: pass after pass on a virtual clock."""

    def __init__(self, facts: ModelFacts, machine: Machine, placement: Placement, routing: Routing = BLIND) -> None:
        self._routing = routing
        self._foreseen: dict[int, float] = {}  # layer of experts → when those fetched ahead are there
        self._rings: dict[int, tuple[float, float]] = {}  # layer → bytes of keys and values fetched ahead, when there
        self._kv_free = 0.0  # when the disk is through with those asked for so far
        self._kv_read = self._kv_written = 0.0
        self._facts = facts
        self._machine = machine
        self._placement = placement
        self._clock = Clock()
        self.compute: list[tuple[str, str, float, float]] = []
        self.last_began = 0.0  # when the latest pass began
        self._disk = _Link("disk", machine.disk_bytes_per_s, machine.disk_latency_s)
        self._link: _Link | None = None
        self._sizes: Mapping[str, int] = dict(placement.compute.blocks)
        self._host: _Tier | None = None
        self._host_prefetcher: Prefetcher | None = None
        self._prefetcher: Prefetcher | None = None
        self._tier: _Tier | None = None
        if machine.link_bytes_per_s is not None:
            self._link = _Link("link", machine.link_bytes_per_s, machine.link_latency_s)
        if placement.host is not None and placement.host.blocks:
            self._host, self._host_prefetcher = self._stream(placement.host, self._from_disk)
        if placement.compute.blocks:
            fetch = self._from_disk if self._link is None else self._from_host
            self._tier, self._prefetcher = self._stream(placement.compute, fetch)
        for prefetcher in (self._host_prefetcher, self._prefetcher):
            if prefetcher is not None:
                prefetcher.start()
        # the first blocks are fetched as soon as a model is loaded, and a request comes later
        self._clock.now = max(self._disk.free_at, self._link.free_at if self._link is not None else 0.0)

    @property
    def slices(self) -> list[tuple[str, str, float, float]]:
        """(lane, name, start, end) of everything so far."""
        return [*self.compute, *self._disk.slices, *(self._link.slices if self._link else ())]

    def run(self, p: Pass, misses: PassMisses | None) -> Usage:
        """One pass; the streams go on from where the last one left them."""
        facts, rates = self._facts, self._machine.rates
        began, before = self._clock.now, self._books()
        self.last_began = began
        stall = compute = 0.0
        number = 0
        self._compute("call", rates.step_call_s)
        compute += rates.step_call_s
        stall += self._rows()
        kept = self._placement.kept
        moved = [cost.moved(layer, p, kept) for layer in facts.layers] if kept is not None else []
        for i, layer in enumerate(facts.layers):
            stall += self._enter([key for key, _ in layer.parts])
            work = cost.layer_s(facts, layer, rates, p, tiered=kept is not None)
            name = layer.parts[0][0] if layer.parts else "layer"
            if moved and (moved[i].read or moved[i].written):
                attention = cost.attention_s(layer, rates, p, facts.dtype) * rates.correction(p.tokens)
                stall += self._attend(name, i, moved, work - attention, attention)
            else:
                self._compute(name, work)
            if layer.experts and misses is not None:
                needed = misses.needed(number)
                each = cost.expert_s(facts, layer, rates, p, needed)
                if self._machine.computes_beside and self._placement.host_expert_slots and needed:
                    waited, worked = self._shared(layer, misses, number, each, p)
                    stall, work = stall + waited, work + worked
                else:
                    stall += self._experts(layer.expert_bytes, misses, number, each)
                    work += needed * each
                number += 1
            self._leave([key for key, _ in layer.parts])
            compute += work
        if facts.head:
            stall += self._enter([key for key, _ in facts.head])
            work = cost.head_s(facts, rates, p)
            self._compute("head", work)
            self._leave([key for key, _ in facts.head])
            compute += work
        after = self._books()
        return Usage(self._clock.now - began, compute, after[0] - before[0], after[1] - before[1], stall,
                     *(b - a for a, b in zip(before[2:], after[2:], strict=True)))  # fmt: skip

    # the parts of a pass

    def _rows(self) -> float:
        """Embedding rows are read on demand, behind the requests that are in flight already."""
        in_flight = min(_IN_FLIGHT / self._disk.bytes_per_s, max(0.0, self._disk.free_at - self._clock.now))
        wait = self._disk.latency_s + in_flight
        self._clock.now += wait
        return wait

    def _enter(self, keys: Sequence[str]) -> float:
        """Lease a layer's streamed blocks and wait for them; returns the wait."""
        if self._tier is None or self._prefetcher is None:
            return 0.0
        mine = [k for k in keys if k in self._sizes]
        if not mine:
            return 0.0
        there = [self._tier.lease(k) for k in mine]
        self._prefetcher.entered(mine)
        if self._host_prefetcher is not None:
            self._host_prefetcher.passed(mine)
        wait = max(0.0, max(there) - self._clock.now)
        self._clock.now += wait
        return wait

    def _leave(self, keys: Sequence[str]) -> None:
        if self._tier is None or self._prefetcher is None:
            return
        mine = [k for k in keys if k in self._tier.leased]
        if mine:
            self._tier.leased.difference_update(mine)
            self._prefetcher.left()

    def _compute(self, name: str, seconds: float) -> None:
        """Compute, slowed by what is being moved meanwhile."""
        now = self._clock.now
        drag = self._machine.disk_drag * min(seconds, max(0.0, self._disk.free_at - now))
        if self._link is not None:
            drag += self._machine.link_drag * min(seconds, max(0.0, self._link.free_at - now))
        self._clock.now = now + seconds + drag
        self.compute.append(("compute", name, now, self._clock.now))

    def _attend(self, name: str, number: int, moved: Sequence[cost.Moved], work: float, attention: float) -> float:
        """Compute a layer, and attend to keys and values that come from disk; returns the wait for them.

        The ring has been filled since the layer before attended. What is in memory is attended to first; then every
        slot that has served takes the next chunk, of this layer and then of the next one that reads.
        """
        mine = moved[number]
        self._compute(name, work + attention * (1 - mine.share))
        ahead, there = self._rings.pop(number, (0.0, 0.0))
        if mine.read > ahead:
            there = self._fetch_kv(mine.read - ahead)
        around = (*range(number + 1, len(moved)), *range(number + 1))
        following = next((i for i in around if moved[i].read), None)
        if following is not None and following not in self._rings:
            nbytes = min(float(self._placement.ring), moved[following].read)
            self._rings[following] = nbytes, self._fetch_kv(nbytes)
        if mine.share:
            self._compute(name, attention * mine.share)
        wait = max(0.0, there - self._clock.now)
        self._clock.now += wait
        if mine.written:  # at the rate of reads; nobody waits for it
            self._disk.send("kv", mine.written, self._clock.now)
            self._disk.moved -= mine.written
            self._kv_written += mine.written
        return wait

    def _fetch_kv(self, nbytes: float) -> float:
        """Read keys and values, before weights that are queued and behind those asked for; returns when they are
        there."""
        disk, now = self._disk, self._clock.now
        took = disk.latency_s + nbytes / disk.bytes_per_s
        begins = max(now, self._kv_free)
        self._kv_free = begins + took
        disk.busy_s += took
        disk.moved += nbytes
        self._kv_read += nbytes
        disk.slices.append((disk.name, "kv", begins, self._kv_free))
        disk.free_at = max(disk.free_at, now) + took
        below = self._tier if self._link is None else self._host
        if below is not None:
            below.delay(took)
        return self._kv_free

    def _experts(self, nbytes: int, misses: PassMisses, number: int, each: float) -> float:
        """Compute a layer's experts, those at hand first; returns the wait for the others."""
        needed = misses.needed(number)
        missed = misses.missed(number, self._placement.expert_slots)
        foreseen = self._foreseen.pop(number, None)
        asked = missed if foreseen is None else missed * (1 - self._routing.recall)
        there = self._demand(asked, nbytes, misses, number) if asked else self._clock.now
        if foreseen is not None and foreseen <= self._clock.now:
            absent = asked
        else:
            absent, there = float(missed), max(there, foreseen or 0.0)
        self._look(nbytes, misses, number + 1)
        self._compute("experts", (needed - absent) * each)
        if not absent:
            return 0.0
        # they come one after another and are computed as they do: the last one is what is waited for
        last = min(1.0, absent)
        self._compute("experts", (absent - last) * each)
        wait = max(0.0, there - self._clock.now)
        self._clock.now += wait
        self._compute("experts", last * each)
        return wait

    def _shared(self, layer: LayerFacts, misses: PassMisses, number: int, each: float, p: Pass) -> tuple[float, float]:
        """A layer's experts on the device and, those that lie in host memory, on the CPU beside it (`moe.schedule`).

        Returns the wait and the compute, of whichever of the two is busy longer.
        """
        assert self._link is not None and self._machine.host_rates is not None
        nbytes, needed = layer.expert_bytes, misses.needed(number)
        host_each = cost.expert_s(self._facts, layer, self._machine.host_rates, p, needed)
        lifts = each < FASTER * host_each
        missed = misses.missed(number, self._placement.expert_slots)
        below = max(self._placement.expert_slots, self._placement.host_expert_slots)
        absent = min(missed, misses.missed(number, below))
        foreseen = self._foreseen.pop(number, None)
        now = self._clock.now
        known = self._routing.recall if foreseen is not None else 0.0
        coming = round(missed * known) if lifts else 0
        late = absent - round(absent * known)
        # what was read ahead into host memory and is not there yet is as good as on the disk
        still = absent - late if foreseen is not None and not lifts and foreseen > now else 0
        read_s = nbytes / self._disk.bytes_per_s
        if late:
            self._urgent(self._disk, self._host, late * nbytes)
        soon = max(0.0, (foreseen or now) - now)
        disk = min(late, missed - coming)
        there = needed - missed
        turns = _divided(
            there, coming, _about(soon) if coming else 0.0, disk, _about(self._disk.latency_s + read_s), _about(read_s),
            still, _about(soon) if still else 0.0, max(0, missed - coming - disk - still), each, host_each,
            nbytes / self._link.bytes_per_s + self._link.latency_s, self._machine.alone,
        )  # fmt: skip
        self._look(nbytes, misses, number + 1, lifts=lifts)
        if turns.moved:
            self._urgent(self._link, self._tier, turns.moved * nbytes)
        self._compute("experts", turns.busy_s)
        worked, waited = turns.busy_s, max(0.0, now + turns.finish_s - self._clock.now)
        self._clock.now += waited
        return waited, worked

    def _look(self, nbytes: int, misses: PassMisses, number: int, *, lifts: bool = True) -> None:
        """Fetch what is foreseen of the next layer's experts, behind everything that is queued already.

        Without `lifts` only into host memory: they are computed there.
        """
        if number >= len(misses.distances) or not self._routing.recall or not self._placement.foresees:
            return
        missed = misses.missed(number, self._placement.expert_slots)
        fetched = missed * self._routing.recall / self._routing.precision
        if not fetched:
            return
        now = self._clock.now
        if self._link is None:
            self._foreseen[number] = self._disk.send("experts", fetched * nbytes, now)
            return
        below = max(self._placement.expert_slots, self._placement.host_expert_slots)
        absent = misses.missed(number, below) * self._routing.recall / self._routing.precision
        ready = self._disk.send("experts", absent * nbytes, now) if absent else 0.0
        if not lifts:
            self._foreseen[number] = max(ready, now)
            return
        self._foreseen[number] = self._link.send("experts", fetched * nbytes, now, ready)

    def _demand(self, asked: float, nbytes: int, misses: PassMisses, number: int) -> float:
        """Fetch experts before anything else that is queued; returns when the last one is there."""
        now = self._clock.now
        if self._link is None:
            return self._urgent(self._disk, self._tier, asked * nbytes)
        missed = misses.missed(number, self._placement.expert_slots)
        below = max(self._placement.expert_slots, self._placement.host_expert_slots)
        absent = asked * min(missed, misses.missed(number, below)) / missed
        ready = self._urgent(self._disk, self._host, absent * nbytes) if absent else now
        sent = self._urgent(self._link, self._tier, asked * nbytes)
        return max(sent, ready + min(nbytes, _FIRST_PART) / self._link.bytes_per_s if absent else 0.0)

    def _urgent(self, link: _Link, tier: _Tier | None, nbytes: float) -> float:
        now = self._clock.now
        took = link.latency_s + nbytes / link.bytes_per_s
        link.busy_s += took
        link.moved += nbytes
        link.slices.append((link.name, "experts", now, now + took))
        link.free_at = max(link.free_at, now) + took
        if tier is not None:
            tier.delay(took)
        if link is self._disk and self._kv_free > now:  # keys and values that were asked for ahead
            self._kv_free += took
            self._rings = {i: (n, at + took if at > now else at) for i, (n, at) in self._rings.items()}
        return now + took

    # where blocks come from

    def _stream(self, streams: Streams, fetch: Callable[[str, float], float]) -> tuple[_Tier, Prefetcher]:
        schedule = CyclicSchedule([key for key, _ in streams.blocks])
        tier = _Tier(self._clock, streams, schedule, fetch)
        return tier, Prefetcher(tier, schedule, window=streams.slots)

    def _from_disk(self, key: str, now: float) -> float:
        return self._disk.send(key, self._sizes[key], now)

    def _from_host(self, key: str, now: float) -> float:
        assert self._link is not None
        ready = 0.0
        host = self._placement.host
        if self._host is not None and host is not None and any(key == k for k, _ in host.blocks):
            ready = self._host.lease(key)  # read into one of the host's slots now, if it is not there or on its way
            self._host.leased.discard(key)
        return self._link.send(key, self._sizes[key], now, ready)

    def _books(self) -> tuple[float, ...]:
        """Running totals of what `Usage` has from `disk_s` on, the stall apart."""
        link, disk = self._link, self._disk
        return (disk.busy_s, link.busy_s if link else 0.0, disk.moved, link.moved if link else 0.0,
                self._kv_read, self._kv_written)  # fmt: skip

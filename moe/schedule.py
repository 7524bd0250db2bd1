"""Who computes which of a layer's experts: the device those that are there or can be brought in time, the CPU the rest.

HybriMoE (Zhong et al., DAC '25) decides by simulated finish time: the link takes the experts of most tokens first and
the CPU those of fewest, until the two meet. Here every meeting point is tried by formula; experts still on the disk
then go, as they come, where they are done first; at last a bounded number of changes of single experts, and of pairs,
is simulated. Pure functions of what is where and how fast things are: nothing waits, nothing is kept.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from math import inf
from typing import NamedTuple

TRIES = 6  # most changes that are simulated
NEAR = 6  # exchanges are looked for among so many on each side of where they meet
_NO_TIME = 1e-12  # seconds


class Place(Enum):
    """Where an expert's weights are when the router has chosen."""

    DEVICE = "device"  # in device memory
    COMING = "coming"  # on its way already, in device memory after `arrives_s`
    HOST = "host"  # in host memory
    DISK = "disk"  # in host memory after `arrives_s`


class Choice(Enum):
    """What is done with an expert."""

    ON_DEVICE = "on device"  # computed where it is, or as soon as it has come
    MOVE_THEN_DEVICE = "move, then on device"
    ON_CPU = "on CPU"


class Need(NamedTuple):
    """`tokens` ≥ 1 chose this expert. `arrives_s` ≥ 0 counts from now, for `COMING` and `DISK` only."""

    expert: int
    tokens: int
    place: Place
    arrives_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Speeds:
    """Seconds for one expert. None: there is no such thing, no device or no way to compute on the CPU.

    `device_s(tokens)` and `cpu_s(tokens)`: to compute it. `move_s`: its bytes over the link, which serves one expert
    after another. `alone`: device and CPU are the same cores and never compute at once (an emulated device).
    """

    device_s: Callable[[int], float] | None
    cpu_s: Callable[[int], float] | None
    move_s: float | None
    alone: bool = False


class Turn(NamedTuple):
    """An expert's time on a resource, in seconds from now."""

    expert: int
    begins_s: float
    ends_s: float


@dataclass(frozen=True, slots=True)
class Schedule:
    """Each resource's turns in order, as simulated. What was `COMING` holds the link too, but is not listed there."""

    choices: dict[int, Choice]
    link: tuple[Turn, ...]
    device: tuple[Turn, ...]
    cpu: tuple[Turn, ...]
    finish_s: float  # of the layer


# (ready_s, tokens, expert, seconds, on the CPU): what is ready first goes first, which is best for a single resource;
# among those the one of fewest tokens
_Job = tuple[float, int, int, float, bool]


def divide(needs: Sequence[Need], speeds: Speeds) -> Schedule:
    """The schedule of one layer.

    Never later than all on the CPU, or all moved; the best there is for experts of equal tokens that are all here, and
    within 1 % of it in 95 of 100 random layers (`tests/test_schedule.py`). Deterministic, whatever the order of
    `needs`. Raises `ValueError` if an expert is named twice, or cannot be computed anywhere.
    """
    layer = _Layer(needs, speeds)
    tried = [layer.meet(layer.here)]
    if layer.late or layer.busy or layer.mixed:  # else it was exact, and these were among what it tried
        tried += [[True] * layer.free, [False] * layer.free]
    if layer.late:
        tried.append(layer.meet(list(range(layer.free))))
    finish, moved = min([(layer.finish(moved), moved) for moved in tried])
    moved, finish = layer.improved(moved, finish)
    if finish == inf:
        raise ValueError("an expert cannot be computed anywhere: its place or the speeds are wrong")
    return layer.schedule(moved)


class _Layer:
    """The simulation. `moved[i]`: whether the i-th of those that have a choice is moved. The first gain most by it."""

    def __init__(self, needs: Sequence[Need], speeds: Speeds) -> None:
        self.alone = speeds.alone
        self.move_s = inf if speeds.move_s is None else speeds.move_s
        device_s, cpu_s = speeds.device_s, speeds.cpu_s
        costs: dict[int, tuple[float, float, float]] = {}
        self.fixed: list[_Job] = []
        free, busy = [], []
        for expert, tokens, place, arrives in needs:
            if tokens not in costs:
                # inf is what cannot be: it is never chosen, or raises
                there = inf if device_s is None else device_s(tokens)
                here = inf if cpu_s is None else cpu_s(tokens)
                # what the CPU is spared: in all, or for each second that the slower of link and device spends on it
                gain = here - there if self.alone else here / max(there, self.move_s, _NO_TIME)
                costs[tokens] = (-gain, there, here)
            gain, there, here = costs[tokens]
            if place is Place.HOST:
                free.append((gain, -tokens, expert, 0.0, there, here))
            elif place is Place.DISK:
                free.append((gain, -tokens, expert, arrives, there, here))
            elif place is Place.DEVICE:
                self.fixed.append((0.0, tokens, expert, there, False))
            else:
                self.fixed.append((arrives, tokens, expert, there, False))
                busy.append(arrives)
        if len({n[0] for n in needs}) != len(needs):
            raise ValueError("an expert is named twice")
        self.fixed.sort()
        free.sort()
        self.fixed_s = sum([job[3] for job in self.fixed])
        self.least_s = _last(self.fixed)  # nothing that is decided makes it faster
        # what is on its way holds the link for the last part of it, and is not made to wait
        self.busy = [(end - self.move_s, end) for end in sorted(busy)]
        self.free = len(free)
        self.experts = [job[2] for job in free]
        self.kinds = [(-tokens, arrives) for _, tokens, _, arrives, _, _ in free]
        self.device_s = [job[4] for job in free]
        self.cpu_s = [job[5] for job in free]
        self.on_cpu: list[_Job] = [(arrives, -tokens, e, s, True) for _, tokens, e, arrives, _, s in free]
        # two machines in a row, the first equally slow for all: the longest first (Johnson 1954)
        self.order = sorted(range(len(free)), key=lambda i: -self.device_s[i])
        self.mixed = self.order != list(range(len(free)))
        self.here = [i for i, (_, arrives) in enumerate(self.kinds) if arrives <= 0]
        self.late = sorted([(arrives, i) for i, (_, arrives) in enumerate(self.kinds) if arrives > 0])
        self.slots: list[float] = []  # when the link is done with the first, second, … if nothing is late
        at = 0.0
        for _ in free:
            at = self._over(at) if busy else at + self.move_s
            self.slots.append(at)

    def meet(self, here: list[int]) -> list[bool]:
        """HybriMoE's greedy: of those `here` the first are moved, up to where both sides meet best.

        The others then go, as they come, where they are done first; late ones among `here` are taken for punctual.
        """
        ends, device_s, cpu_s = self.slots, self.device_s, self.cpu_s
        rest = [0.0]  # CPU seconds of the last 0, 1, … of them
        for i in reversed(here):
            rest.append(rest[-1] + cpu_s[i])
        device, chain = self.fixed_s, 0.0  # when the device has done those moved, if it has nothing else
        best, split, clocks, at = inf, 0, [device, rest[-1]], 0.0
        for k in range(len(here) + 1):
            if k:
                seconds = device_s[here[k - 1]]
                chain = max(chain, ends[k - 1]) + seconds
                device += seconds
            cpu = rest[len(here) - k]
            now = [max(chain, device + cpu)] if self.alone else [max(chain, device), cpu]
            if max(now) < best:
                best, split, clocks, at = max(now), k, now, ends[k - 1] if k else 0.0
        moved = [False] * len(device_s)
        for i in here[:split]:
            moved[i] = True
        for ready, i in self.late if len(here) < len(moved) else ():
            there = self._over(max(at, ready))
            on_device = max(clocks[0], there) + device_s[i]
            on_cpu = max(clocks[-1], ready) + cpu_s[i]
            moved[i] = on_device < on_cpu
            if moved[i]:
                at, clocks[0] = there, on_device
            else:
                clocks[-1] = on_cpu
        return moved

    def improved(self, moved: list[bool], finish: float) -> tuple[list[bool], float]:
        """Single experts change from the side that is done last to the other, or with one there, while that helps."""
        tries, device_s, cpu_s = TRIES, self.device_s, self.cpu_s
        while tries > 0 and finish > self.least_s:
            ends = self.ends(moved)
            on_device = self.fixed_s + sum([x for x, m in zip(device_s, moved, strict=True) if m])
            on_cpu = sum([x for x, m in zip(cpu_s, moved, strict=True) if not m])
            if self.alone:
                on_device = on_cpu = on_device + on_cpu
            kinds = {kind: i for i, kind in enumerate(zip(self.kinds, moved, strict=True))}  # equals once
            there = [i for i in kinds.values() if moved[i]]
            here = [i for i in kinds.values() if not moved[i]]
            changes: list[tuple[int, ...]] = [
                (i,) for i in (there + here if self.alone else there if ends[0] >= ends[-1] else here)
            ]
            changes += [(i, j) for i in there[-NEAR:] for j in here[:NEAR]]
            best: tuple[int, ...] = ()
            for change in changes:
                device = cpu = 0.0
                for i in change:
                    sign = -1 if moved[i] else 1
                    device, cpu = device + sign * device_s[i], cpu - sign * cpu_s[i]
                if self.alone:
                    device = cpu = device + cpu
                if on_device + device >= finish or on_cpu + cpu >= finish:
                    continue  # even without any waiting
                tries -= 1
                then = self.finish([m != (i in change) for i, m in enumerate(moved)])
                if then < finish:
                    best, finish = change, then
                if not tries:
                    break
            if not best:
                break
            moved = [m != (i in best) for i, m in enumerate(moved)]
        return moved, finish

    def finish(self, moved: list[bool]) -> float:
        """When the layer is done, in seconds from now."""
        return max(self.ends(moved))

    def ends(self, moved: list[bool]) -> list[float]:
        """When device and CPU are done; where they are the same cores, when those are."""
        if not self.late and not self.busy:  # only what is moved makes anything wait: the same without a timetable
            device, cpu, chain, n = self.fixed_s, 0.0, 0.0, 0
            for i in self.order:
                if moved[i]:
                    at, seconds = self.slots[n], self.device_s[i]
                    chain = (at if at > chain else chain) + seconds
                    device += seconds
                    n += 1
                else:
                    cpu += self.cpu_s[i]
            return [max(chain, device + cpu)] if self.alone else [max(chain, device), cpu]
        return [_last(jobs) for jobs in self.jobs(moved, self.moves(moved))]

    def jobs(self, moved: list[bool], moves: list[tuple[int, float]]) -> list[list[_Job]]:
        """What each computes, in order."""
        device = self.fixed.copy()
        for i, end in moves:
            device.append((end, self.kinds[i][0], self.experts[i], self.device_s[i], False))
        cpu = [job for job, m in zip(self.on_cpu, moved, strict=True) if not m]
        both = [device + cpu] if self.alone else [device, cpu]
        for jobs in both:
            jobs.sort()
        return both

    def moves(self, moved: list[bool]) -> list[tuple[int, float]]:
        """(which, when it is there): of what is in host memory that which takes the device longest first."""
        if not self.late:
            return list(zip([i for i in self.order if moved[i]], self.slots, strict=False))
        asked = [(self.kinds[i][1], n) for n, i in enumerate(self.order) if moved[i]]
        waiting = [n for arrives, n in asked if arrives <= 0]
        late = sorted([at for at in asked if at[0] > 0])
        done = []
        at, n = 0.0, 0
        while waiting or n < len(late):
            while n < len(late) and (late[n][0] <= at or not waiting):
                at = max(at, late[n][0])
                heapq.heappush(waiting, late[n][1])
                n += 1
            at = self._over(at)
            done.append((self.order[heapq.heappop(waiting)], at))
        return done

    def _over(self, at: float) -> float:
        """When the link has moved the next expert, if it can begin at `at`."""
        for begins, ends in self.busy:
            if at + self.move_s <= begins:
                break
            if ends > at:
                at = ends
        return at + self.move_s

    def schedule(self, moved: list[bool]) -> Schedule:
        """The turns."""
        choices = {expert: Choice.ON_DEVICE for _, _, expert, _, _ in self.fixed}
        for expert, m in zip(self.experts, moved, strict=True):
            choices[expert] = Choice.MOVE_THEN_DEVICE if m else Choice.ON_CPU
        moves = self.moves(moved)
        link = tuple(Turn(self.experts[i], end - self.move_s, end) for i, end in moves)
        device: list[Turn] = []
        cpu: list[Turn] = []
        finish = 0.0
        for jobs in self.jobs(moved, moves):
            t = 0.0
            for ready, _, expert, seconds, on_cpu in jobs:
                begins = ready if ready > t else t
                t = begins + seconds
                (cpu if on_cpu else device).append(Turn(expert, begins, t))
            finish = max(finish, t)
        return Schedule(choices, link, tuple(device), tuple(cpu), finish)


def _last(jobs: list[_Job]) -> float:
    """When a resource that takes them in this order is done, in seconds from now."""
    t = 0.0
    for ready, _, _, seconds, _ in jobs:
        t = (ready if ready > t else t) + seconds
    return t

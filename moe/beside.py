"""The CPU beside a device: experts that lie in host memory are computed there, where that lets the layer finish sooner.

Who computes what is decided by `moe.schedule` for every layer of every pass, from what is where, how many tokens chose
it, and how fast things are. What the CPU turns out to take is measured as it goes and believed more than the profile.

Not covered: fetching to the device (`moe.experts`), what is foreseen (`moe.lookahead`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moe.measured import Ratio
from moe.schedule import Choice, Need, Place, Speeds, divide
from tiers import Residency

FASTER = 0.9  # a device that takes more of the CPU's time than this gets no experts that lie in host memory


@dataclass(frozen=True, slots=True)
class Costs:
    """What a machine's profile says, in seconds for one expert of these bytes at so many tokens (see `Speeds`).

    `read_s` is its time from disk into host memory. `alone`: device and CPU are the same cores.
    """

    device_s: Callable[[int], float]
    cpu_s: Callable[[int], float]
    move_s: float
    read_s: float
    alone: bool


class Beside:
    """One layer's: decides, and learns how long the CPU takes. `keys[e]` are blocks of both residencies."""

    def __init__(self, device: Residency, host: Residency, keys: Sequence[str], costs: Costs, pace: Pace) -> None:
        self._device = device
        self._host = host
        self._keys = keys
        self._costs = costs
        self._pace = pace

    def for_cpu(self, counts: dict[int, int]) -> list[int]:
        """Of the experts that so many tokens chose, those to be computed on the CPU, in order of their turns."""
        costs = self._costs
        needs = []
        reads = moves = 0
        for e, tokens in counts.items():
            key = self._keys[e]
            if self._device.resident(key):
                needs.append(Need(e, tokens, Place.DEVICE))
            elif self._device.coming(key):
                moves += 1
                needs.append(Need(e, tokens, Place.COMING, moves * costs.move_s))
            elif self._host.resident(key):
                needs.append(Need(e, tokens, Place.HOST))
            else:
                reads += 1
                needs.append(Need(e, tokens, Place.DISK, reads * costs.read_s))
        if all(n.place in (Place.DEVICE, Place.COMING) for n in needs):
            return []
        pace = self._pace
        device_s = costs.device_s if not costs.alone else lambda n: pace.factor * costs.cpu_s(n)
        speeds = Speeds(device_s, lambda n: pace.factor * costs.cpu_s(n), costs.move_s, costs.alone)
        schedule = divide(needs, speeds)
        mine = [turn.expert for turn in schedule.cpu if schedule.choices[turn.expert] is Choice.ON_CPU]
        where = {n.expert: n.place for n in needs}
        counters = self._device.counters
        for e in mine:
            nbytes = self._host.nbytes(self._keys[e])
            counters.needed += nbytes
            counters.hit += nbytes if where[e] is Place.HOST else 0
            counters.missed += nbytes if where[e] is Place.DISK else 0
        return mine

    def worked(self, counts: Sequence[int], seconds: float) -> None:
        """The CPU has computed experts of so many tokens each."""
        self._pace.note(sum(map(self._costs.cpu_s, counts)), seconds)

    def spare(self, experts: Sequence[int]) -> None:
        """These were computed on the CPU. Where the device has room left, it gets them: they are worth more there."""
        for e in experts:
            if not self._device.has_room(self._keys[e]):
                return
            self._device.prefetch(self._keys[e])


class Pace:
    """What the CPU takes over what the profile says, lately. One for all layers."""

    def __init__(self) -> None:
        self._ratio = Ratio(most=1.0)

    @property
    def factor(self) -> float:
        """1 where nothing is known yet."""
        return self._ratio.given(1.0, 0.01)

    def note(self, expected_s: float, took_s: float) -> None:
        """Work that was expected to take so long took so long."""
        if expected_s > 0:
            self._ratio.note(took_s, expected_s)

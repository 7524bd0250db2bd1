"""The prefetcher: keeps the link busy with the blocks the schedule will need, as far ahead as slots allow."""

from __future__ import annotations

import itertools

from prefetch.schedule import CyclicSchedule
from tiers import Residency


class Prefetcher:
    """Asks residency for upcoming blocks in order and stops at the first refusal.

    The byte budget is the pool itself: residency refuses once every slot holds something needed sooner.
    """

    def __init__(self, residency: Residency, schedule: CyclicSchedule) -> None:
        self._residency = residency
        self._schedule = schedule
        self._clock = itertools.count()

    def advance(self, key: str | None = None) -> None:
        """The step has reached `key` (already leased); look ahead from there."""
        if key is not None:
            self._schedule.used(key)
        for upcoming in self._schedule.upcoming():
            if not self._residency.prefetch(upcoming, deadline=float(next(self._clock))):
                break

    def restart(self) -> None:
        """A step was cut short or a request ended: forget transfers under way and start from the first block."""
        self._residency.cancel_prefetches()
        self._schedule.restart()

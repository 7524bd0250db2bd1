"""The prefetcher: keeps the link busy with the blocks the schedule will need next."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

from prefetch.schedule import CyclicSchedule


class Tier(Protocol):
    """What is asked of a tier: `tiers.Residency` live, a tier on a virtual clock when a plan is simulated."""

    def resident(self, key: str) -> bool:
        """Whether the block could be used at once."""
        ...

    def prefetch(self, key: str, deadline: float = 0.0) -> bool:
        """Start fetching the block if a slot can be had; True if it is there or on its way."""
        ...

    def cancel_prefetches(self) -> None:
        """Drop what is under way and not leased."""
        ...


class Prefetcher:
    """Asks residency for upcoming blocks in order, within a window.

    `window` bounds the blocks in use or fetched and not yet used. A wider pool then keeps the others from cycle to
    cycle; looking farther ahead would evict those for blocks that can still come in time.
    """

    def __init__(self, residency: Tier, schedule: CyclicSchedule, window: int = 2) -> None:
        self._residency = residency
        self._schedule = schedule
        self._window = window
        self._current = 0  # blocks leased by the layer being computed
        self._ahead: set[str] = set()
        self._clock = itertools.count()

    def entered(self, keys: Sequence[str]) -> None:
        """The step has reached these blocks, which are leased together."""
        self._use(keys)
        self._current = len(keys)
        self._advance()

    def left(self) -> None:
        """The blocks entered last have been given back: their slots may take others."""
        self._current = 0
        self._advance()

    def passed(self, keys: Sequence[str]) -> None:
        """Those of `keys` that this tier holds have gone on to the tier above: their slots may take others."""
        self._use([k for k in keys if self._schedule.knows(k)])
        self._advance()

    def _use(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._schedule.used(key)
            self._ahead.discard(key)

    def start(self) -> None:
        """Begin before the first step."""
        self._advance()

    def restart(self) -> None:
        """A step was cut short: forget transfers under way and start from the first block."""
        self._residency.cancel_prefetches()
        self._schedule.restart()
        self._current = 0
        self._ahead.clear()

    def _advance(self) -> None:
        for key in self._schedule.upcoming():
            if len(self._ahead) + self._current >= self._window:
                break
            if key in self._ahead or self._residency.resident(key):
                continue
            if not self._residency.prefetch(key, deadline=float(next(self._clock))):
                break
            self._ahead.add(key)

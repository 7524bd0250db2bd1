"""Which predictions are worth a fetch, and a guard for when predictions turn out worthless."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum

from tiers import EvictionPolicy


def pays(probability: float, *, gain_s: float, link_s: float, busy: float, evict_probability: float = 0.0) -> bool:
    """Whether fetching a block ahead saves more than it costs.

    `gain_s` seconds are saved if the block is needed and there; it crosses the link then in any case. If it is not
    needed, its time on the link, `link_s`, is lost, as far as something else would have used it (`busy`, 0 … 1). What
    it pushes out is needed, and has to come back, with `evict_probability` (0 if a slot is free).
    """
    return probability * gain_s > (1 - probability) * link_s * busy + evict_probability * gain_s


def worthwhile(
    predictions: Iterable[tuple[int, float]],
    *,
    gain_s: float,
    link_s: float,
    busy: float,
    evict_probability: float = 0.0,
) -> list[tuple[int, float]]:
    """The predictions that `pays` says yes to, in their order; `evict_probability` is that of the best victim."""
    return [
        (item, p)
        for item, p in predictions
        if pays(p, gain_s=gain_s, link_s=link_s, busy=busy, evict_probability=evict_probability)
    ]


class _Moved(Enum):
    """Why a block crossed the link, as it turned out."""

    DEMAND = "it would have without prefetching, too"
    CAUSED = "it was here until a prefetch in vain pushed it out, directly or through others"
    USEFUL = "fetched ahead and used"
    WASTED = "fetched ahead and pushed out, or cancelled, unused"


class ThrashGuard:
    """Wraps an eviction policy, sees from its events what prefetching did, and ends what does not pay.

    It keeps an account in blocks. Each block fetched on demand pays in `limit`, each one fetched ahead and used
    `refund`. One fetched ahead in vain costs 1, and 1 more for every block that had to be fetched again because of it,
    or may have to be. For a fetch ahead there must be 2, and 2 for each other that is not judged yet. So a useless
    predictor is let through for `limit` / 2 of the demand, which is how it is probed again later, and costs no more
    than `limit` of it; a good one earns its way within a few layers. The default leaves a hundredth to what the account
    cannot see: a policy whose state has become another one. `refund` is the time that a useful fetch saves over
    the time that a wasted one costs: with 1, as on a busy link, two of three have to be right.

    The account never holds more than there are blocks here, so that past merits are spent within one turn of the cache:
    that much can be lost when predictions go bad and, where LRU just fits what is used in turn, one more turn.
    All blocks have `nbytes`.
    """

    def __init__(self, policy: EvictionPolicy, *, nbytes: int = 1, limit: float = 0.04, refund: float = 1.0) -> None:
        self.policy = policy
        self._nbytes = nbytes
        self._worth = {_Moved.DEMAND: limit, _Moved.CAUSED: -1.0, _Moved.USEFUL: refund, _Moved.WASTED: -1.0}
        self._account = 0.0
        self._total = dict.fromkeys(_Moved, 0)
        self._here: set[str] = set()
        self._starting: str | None = None
        # Fetched ahead and not used yet → the block that would be in its place; and the same the other way round.
        # The demand for that one pushes out another, which then is the one; until the first is used, or goes itself.
        self._ahead: dict[str, str | None] = {}
        self._instead: dict[str, str] = {}
        self._pair: tuple[str, str] | None = None  # the last victim and what it was to go for
        self._pushed: dict[str, str] = {}  # the block on its way in → the one that has gone for it

    @property
    def useful_bytes(self) -> int:
        """Fetched ahead and used, since the beginning."""
        return self._total[_Moved.USEFUL] * self._nbytes

    @property
    def wasted_bytes(self) -> int:
        """Fetched ahead and dropped unused, since the beginning."""
        return self._total[_Moved.WASTED] * self._nbytes

    @property
    def caused_bytes(self) -> int:
        """Fetched again because of prefetches in vain, since the beginning; some of it may still be to come."""
        return self._total[_Moved.CAUSED] * self._nbytes

    def allows(self) -> bool:
        """Whether one more block may be fetched ahead now."""
        return self._account >= 2 * (len(self._ahead) + 1)

    def fetch_ahead(self, key: str, start: Callable[[], bool]) -> bool:
        """Fetch the block ahead by `start` (that is `residency.prefetch(key)`) if that is allowed; False if not."""
        if not self.allows():
            return False
        self._starting = key
        try:
            return start()
        finally:
            self._starting = None

    def touched(self, key: str) -> None:
        """A fetch if the block was not here, else a use."""
        if key in self._here:
            if key in self._ahead:
                self._settle(key, _Moved.USEFUL)  # the demand for it would have pushed something out, too
        else:
            self._here.add(key)
            blame = self._instead.pop(key, None)
            pushed = self._pushed.pop(key, None)
            if key == self._starting:
                if blame is not None:
                    self._ahead[blame] = None
                self._ahead[key] = None
                self._displace(key, pushed)
            elif blame is None:
                self._note(_Moved.DEMAND)
            else:
                self._note(_Moved.CAUSED)
                self._displace(blame, pushed)
        self.policy.touched(key)

    def removed(self, key: str) -> None:
        """Judged, if it was fetched ahead and not used."""
        self._here.discard(key)
        if key in self._ahead:
            self._settle(key, _Moved.WASTED)
        elif self._pair is not None and self._pair[0] == key:
            self._pushed = {self._pair[1]: key}
        self._pair = None
        self.policy.removed(key)

    def _displace(self, ahead: str, pushed: str | None) -> None:
        """`pushed` would be here but for the block fetched ahead (unless that has just gone itself)."""
        if ahead in self._ahead:
            self._ahead[ahead] = pushed
            if pushed is not None:
                self._instead[pushed] = ahead

    def _settle(self, key: str, how: _Moved) -> None:
        instead = self._ahead.pop(key)
        if instead is not None:
            self._instead.pop(instead, None)
            if how is _Moved.WASTED:
                self._note(_Moved.CAUSED)
        self._note(how)

    def victim(self, evictable: Callable[[str], bool], incoming: str) -> str | None:
        """The wrapped policy's choice."""
        key = self.policy.victim(evictable, incoming)
        self._pair = None if key is None else (key, incoming)
        return key

    def _note(self, moved: _Moved) -> None:
        self._total[moved] += 1
        self._account = min(self._account + self._worth[moved], float(len(self._here)))

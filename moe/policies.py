"""Which expert gives up its slot: eviction policies that know of layers and of the router.

All stand behind `tiers.EvictionPolicy` next to `LRU` and `LFU`, under the residency's lock. They name a victim
whenever one is evictable, because they cannot tell a demand from a prefetch; whether a prefetch is worth what it pushes
out is decided by `prefetch.worth`.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from tiers import LRU, EvictionPolicy


@runtime_checkable
class HearsRouter(Protocol):
    """A policy that wants to know what the router made of all experts, chosen or not."""

    def routed(self, keys: Sequence[str], probabilities: NDArray[np.floating]) -> None:
        """A layer has been routed: `keys[e]` is its expert e, probabilities [experts] the mean over the tokens.

        Where only the chosen experts' weights are known, the others are 0. Any thread may call.
        """
        ...


class _Layer:
    """The blocks of one layer: their scores, and those that are here from the least score to the greatest."""

    def __init__(self, keys: Sequence[str]) -> None:
        self.number = {key: e for e, key in enumerate(keys)}
        self.scores = [0.0] * len(keys)  # replaced whole, never written to: the router speaks outside the lock
        self.ran = -1  # the routing at which it ran last
        self.here: OrderedDict[str, None] = OrderedDict()  # the longest unused first
        self._order: tuple[object, list[str]] | None = None

    def ascending(self) -> list[str]:
        """What is here by score; among equals the longest unused first."""
        scores = self.scores
        if self._order is None or self._order[0] is not scores:
            order = list(self.here)
            if scores:
                order.sort(key=lambda key: scores[self.number[key]])
            self._order = (scores, order)
        return self._order[1]

    def changed(self) -> None:
        """Something came, went or was used."""
        self._order = None


class RouterScore:
    """The block with the least recent router probability goes, whether it was chosen or not.

    "Minus recent score" of HybriMoE (Zhong et al., DAC '25): S ← α·p + (1 - α)·S at every routing of the layer, with p
    counted for the `top` most probable experts only (None: for all). An expert just below the cut is often next; LRU
    and LFU never hear of it. Blocks whose layer has not been routed yet count as 0, the longest unused first.
    A small α suits routers with favourites, a large one those that repeat themselves: `moe.replay.table` tells which.
    """

    def __init__(self, alpha: float = 0.3, top: int | None = None) -> None:
        self._alpha = alpha
        self._top = top
        self._layers: dict[str, _Layer] = {}  # by the key of the layer's first expert
        self._of: dict[str, _Layer] = {}
        self._strange = _Layer(())  # blocks of layers not routed yet
        self._now = 0  # routings so far
        self._known = 0  # layers whose blocks are sorted in

    def routed(self, keys: Sequence[str], probabilities: NDArray[np.floating]) -> None:
        """See `HearsRouter`."""
        p = np.asarray(probabilities, np.float64)
        if self._top is not None and self._top < len(p):
            p = np.where(p >= np.partition(p, -self._top)[-self._top], p, 0.0)
        layer = self._layers.get(keys[0])
        if layer is None:
            layer = self._layers[keys[0]] = _Layer(keys)
            for key in keys:
                self._of[key] = layer
        keep = 1 - self._alpha
        layer.scores = [keep * s + self._alpha * x for s, x in zip(layer.scores, p.tolist(), strict=True)]
        self._now += 1
        layer.ran = self._now

    def score(self, key: str) -> float:
        """The block's decayed average probability."""
        layer = self._of.get(key)
        return layer.scores[layer.number[key]] if layer is not None else 0.0

    def touched(self, key: str) -> None:
        """Remember that it is here."""
        self._sort_in()
        layer = self._of.get(key, self._strange)
        layer.here[key] = None
        layer.here.move_to_end(key)
        layer.changed()

    def removed(self, key: str) -> None:
        """It is gone; its score stays."""
        self._sort_in()
        layer = self._of.get(key, self._strange)
        layer.here.pop(key, None)
        layer.changed()

    def victim(self, evictable: Callable[[str], bool], incoming: str) -> str | None:
        """The evictable block worth least."""
        self._sort_in()
        best: str | None = None
        least = float("inf")
        for layer in (self._strange, *self._layers.values()):
            key = next((k for k in layer.ascending() if evictable(k)), None)
            if key is not None and (worth := self._worth(key, layer)) < least:
                best, least = key, worth
        return best

    def _sort_in(self) -> None:
        """Blocks that came before their layer was first routed join it."""
        known, self._known = self._known, len(self._layers)
        if known == self._known:
            return  # no layer was routed for the first time: nothing to look through
        for key in [k for k in self._strange.here if k in self._of]:
            del self._strange.here[key]
            self._strange.changed()
            self._of[key].here[key] = None
            self._of[key].changed()

    def _worth(self, key: str, layer: _Layer) -> float:
        return self.score(key)


class ExpectedUse(RouterScore):
    """The block whose next use is expected farthest goes: Belady's rule with estimates in place of the future.

    An expert that is chosen with probability q is needed after 1/q passes on the average, and layers take turns: of two
    equally probable experts the one whose layer has just run is needed later. LRU keeps exactly that one (SpecMD,
    Hoang et al. 2026, finds the same). q is estimated as top_k x score, at most 1.
    """

    def __init__(self, top_k: int, alpha: float = 0.3, top: int | None = None) -> None:
        super().__init__(alpha, top)
        self._top_k = top_k

    def _worth(self, key: str, layer: _Layer) -> float:
        if layer is self._strange:
            return float("-inf")
        turn = max(len(self._layers) - (self._now - layer.ran), 0)  # layers that come before this one
        q = min(max(self._top_k * self.score(key), 1e-4), 1.0)
        return -(turn + len(self._layers) * (1 / q - 1))


class PerLayer:
    """Each layer has a share of the slots and a policy of its own within it, so that layers do not push each other out.

    A layer at its share gives up one of its own; below it, the layer most over its share does. `layer_of(key)` is the
    layer of a block, `shares[layer]` what it is due (see `moe.shares`; one that is absent is due nothing).
    """

    def __init__(
        self,
        layer_of: Callable[[str], int],
        shares: Mapping[int, int],
        inner: Callable[[], EvictionPolicy] = LRU,
    ) -> None:
        self._layer_of = layer_of
        self._shares = shares
        self._inner = inner
        self._layers: dict[int, EvictionPolicy] = {}
        self._here: dict[int, set[str]] = {}

    def touched(self, key: str) -> None:
        """The layer's own policy hears of it."""
        n = self._layer_of(key)
        if n not in self._layers:
            self._layers[n], self._here[n] = self._inner(), set()
        self._layers[n].touched(key)
        self._here[n].add(key)

    def removed(self, key: str) -> None:
        """The layer has one less."""
        n = self._layer_of(key)
        if n in self._layers:
            self._layers[n].removed(key)
            self._here[n].discard(key)

    def _over(self, layer: int) -> int:
        return len(self._here.get(layer, ())) - self._shares.get(layer, 0)

    def victim(self, evictable: Callable[[str], bool], incoming: str) -> str | None:
        """From the incoming block's layer if that is at its share, else from whichever is most over its own."""
        own = self._layer_of(incoming)
        order: Iterable[int] = sorted(self._layers, key=self._over, reverse=True)
        if own in self._layers and self._over(own) >= 0:
            order = itertools.chain((own,), order)
        for n in order:
            key = self._layers[n].victim(evictable, incoming)
            if key is not None:
                return key
        return None


class Adaptive:
    """Between least recent and least frequent, whichever has lately been right.

    ARC (Megiddo and Modha, FAST '03, "ARC: a self-tuning, low overhead replacement cache"): blocks used once since they
    came, and blocks used more often, form two LRU lists. Each leaves the keys of its victims behind; one that comes
    back says that its list was too short. Differences to the paper, which the seam brings: the first touch of a stay is
    the fetch and the second its use; the number of slots is the most blocks ever seen; a block dropped before it
    was used (a prefetch in vain) leaves nothing behind.
    """

    def __init__(self) -> None:
        self._once: OrderedDict[str, bool] = OrderedDict()  # → whether it has been used at all
        self._often: OrderedDict[str, None] = OrderedDict()
        self._ghosts: tuple[OrderedDict[str, None], OrderedDict[str, None]] = (OrderedDict(), OrderedDict())
        self._back: set[str] = set()  # came from a ghost list and is not used yet
        self._slots = 0
        self._target = 0.0  # slots due to blocks used once

    def touched(self, key: str) -> None:
        """A fetch, a first use, or one more."""
        if key in self._often:
            self._often.move_to_end(key)
        elif key not in self._once:
            self._target = self._aim(key)
            for ghosts in self._ghosts:
                if ghosts.pop(key, self) is None:
                    self._back.add(key)
            self._once[key] = False
        elif self._once[key] or key in self._back:
            del self._once[key]
            self._back.discard(key)
            self._often[key] = None
        else:
            self._once[key] = True
            self._once.move_to_end(key)
        self._slots = max(self._slots, len(self._once) + len(self._often))

    def removed(self, key: str) -> None:
        """If it was used, its key stays behind, for as long as a cache of twice the slots would have kept it."""
        once, often = self._ghosts
        self._back.discard(key)
        if key in self._often:
            del self._often[key]
            often[key] = None
        elif self._once.pop(key, False):
            once[key] = None
        while once and len(once) + len(self._once) > self._slots:
            once.popitem(last=False)
        while often and len(once) + len(often) > self._slots:
            often.popitem(last=False)

    def victim(self, evictable: Callable[[str], bool], incoming: str) -> str | None:
        """The oldest of the list that is longer than its due."""
        due, have = self._aim(incoming), len(self._once)
        lists: list[Iterable[str]] = [self._once, self._often]
        if have < due or (have == due and incoming not in self._ghosts[1]):
            lists.reverse()
        return next((k for keys in lists for k in keys if evictable(k)), None)

    def _aim(self, incoming: str) -> float:
        """The target once `incoming` has come."""
        once, often = self._ghosts
        if incoming in once:
            return min(self._target + max(1.0, len(often) / len(once)), self._slots)
        if incoming in often:
            return max(self._target - max(1.0, len(once) / len(often)), 0.0)
        return self._target

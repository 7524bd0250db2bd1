"""Eviction policies: one contract for all, and what each prefers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from moe import Adaptive, ExpectedUse, PerLayer, RouterScore
from prefetch import ThrashGuard
from tiers import LFU, LRU, EvictionPolicy, NextUse


def routed(policy: RouterScore) -> RouterScore:
    """Two layers: a and c, b and d."""
    policy.routed("ac", np.array([0.3, 0.7]))
    policy.routed("bd", np.array([0.6, 0.4]))
    return policy


def halves(key: str) -> int:
    return "acbd".index(key) // 2 if key in "acbd" else 2


POLICIES: dict[str, Callable[[], EvictionPolicy]] = {
    "lru": LRU,
    "lfu": LFU,
    "next use": lambda: NextUse(lambda key: ord(key)),
    "router score": lambda: routed(RouterScore()),
    "router score, nothing routed yet": RouterScore,
    "expected use": lambda: routed(ExpectedUse(2)),
    "expected use, nothing routed yet": lambda: ExpectedUse(2),
    "per layer": lambda: PerLayer(halves, {0: 1, 1: 1}),
    "per layer, router score": lambda: PerLayer(halves, {0: 1, 1: 2}, RouterScore),
    "per layer, no shares": lambda: PerLayer(halves, {}, LFU),
    "adaptive": Adaptive,
    "guarded": lambda: ThrashGuard(LRU()),
}


@pytest.mark.parametrize("name", POLICIES)
class TestContract:
    def test_a_victim_is_known_and_evictable(self, name: str) -> None:
        policy = POLICIES[name]()
        for key in "abcd":
            policy.touched(key)
        assert policy.victim(lambda k: k in "bc", "a") in ("b", "c")

    def test_nothing_evictable_no_victim(self, name: str) -> None:
        policy = POLICIES[name]()
        policy.touched("b")
        assert policy.victim(lambda k: False, "a") is None
        policy.removed("b")
        assert policy.victim(lambda k: True, "a") is None

    def test_asking_changes_nothing(self, name: str) -> None:
        policy = POLICIES[name]()
        for key in "bcd":
            policy.touched(key)
        assert len({policy.victim(lambda k: True, "a") for _ in range(5)}) == 1

    def test_what_is_gone_is_never_named(self, name: str) -> None:
        policy = POLICIES[name]()
        for key in "bcd":
            policy.touched(key)
        gone = policy.victim(lambda k: True, "a")
        assert gone is not None
        policy.removed(gone)
        policy.removed(gone)
        assert policy.victim(lambda k: True, "a") not in (gone, None)

    def test_all_can_be_emptied_and_filled_again(self, name: str) -> None:
        policy = POLICIES[name]()
        for _ in range(3):
            left = set("bcd")
            for key in "bcd":
                policy.touched(key)
                policy.touched(key)
            while left:
                gone = policy.victim(left.__contains__, "a")
                assert gone in left
                policy.removed(gone)
                left.discard(gone)
            assert policy.victim(lambda k: True, "a") is None


def test_lru_drops_the_oldest_use() -> None:
    policy = LRU()
    for key in "abcab":
        policy.touched(key)
    assert policy.victim(lambda k: True, "x") == "c"


def test_lfu_drops_the_rarest_and_among_equals_the_oldest() -> None:
    policy = LFU()
    for key in "aabbcd":
        policy.touched(key)
    assert policy.victim(lambda k: True, "x") == "c"
    policy.touched("c")
    assert policy.victim(lambda k: True, "x") == "d"
    policy.removed("a")
    policy.touched("a")
    policy.touched("d")
    assert policy.victim(lambda k: True, "x") == "a", "a block that comes back starts counting anew"


def test_next_use_keeps_what_is_needed_sooner_than_the_newcomer() -> None:
    policy = NextUse({"a": 1, "b": 5, "c": 9, "x": 4}.__getitem__)
    for key in "abc":
        policy.touched(key)
    assert policy.victim(lambda k: True, "x") == "c"
    assert policy.victim(lambda k: k != "c", "x") == "b"
    assert policy.victim(lambda k: k == "a", "x") is None, "the newcomer is needed later than all that is here"


def test_router_score_keeps_what_the_router_nearly_chose() -> None:
    policy = RouterScore(alpha=0.5)
    for key in "abc":
        policy.touched(key)
    policy.routed("abc", np.array([0.1, 0.5, 0.4]))
    assert policy.victim(lambda k: True, "x") == "a"
    assert policy.victim(lambda k: k != "a", "x") == "c"
    for _ in range(3):
        policy.routed("abc", np.array([0.6, 0.0, 0.4]))
    assert policy.victim(lambda k: True, "x") == "b", "what was probable once fades"
    assert policy.score("c") == pytest.approx(0.4 * (1 - 0.5**4))


def test_router_score_counts_the_most_probable_only() -> None:
    policy = RouterScore(alpha=1.0, top=2)
    policy.routed("abc", np.array([0.5, 0.3, 0.2]))
    assert [policy.score(k) for k in "abc"] == pytest.approx([0.5, 0.3, 0.0])


def test_router_score_remembers_a_block_that_left() -> None:
    policy = RouterScore(alpha=1.0)
    policy.routed("ab", np.array([0.9, 0.1]))
    policy.touched("a")
    policy.removed("a")
    policy.touched("b")
    policy.touched("a")
    assert policy.victim(lambda k: True, "x") == "b"


def test_blocks_that_came_before_their_layer_was_routed_get_its_scores() -> None:
    policy = RouterScore()
    for key in "ab":
        policy.touched(key)
    assert policy.victim(lambda k: True, "x") == "a", "nothing is known: the oldest"
    policy.routed("ab", np.array([0.9, 0.1]))
    for key in "ab":
        policy.touched(key)
    assert policy.victim(lambda k: True, "x") == "b"
    policy.removed("b")
    assert policy.victim(lambda k: True, "x") == "a"


def test_expected_use_drops_the_layer_that_has_just_run() -> None:
    policy = ExpectedUse(top_k=1, alpha=1.0)
    for key in "abc":
        policy.routed(key, np.array([0.5]))
        policy.touched(key)
    assert policy.victim(lambda k: True, "x") == "c"
    assert policy.victim(lambda k: k != "c", "x") == "b"
    policy.routed("a", np.array([0.5]))
    assert policy.victim(lambda k: True, "x") == "a"
    policy.routed("b", np.array([0.01]))
    policy.routed("c", np.array([0.5]))
    assert policy.victim(lambda k: True, "x") == "b", "what is hardly ever chosen is farther than any turn"


def test_a_layer_at_its_share_gives_up_one_of_its_own() -> None:
    policy = PerLayer(halves, {0: 1, 1: 1})
    for key in "abd":
        policy.touched(key)
    assert policy.victim(lambda k: True, "c") == "a", "the oldest of its own layer"
    assert policy.victim(lambda k: k != "a", "c") == "b", "nothing of its own can go: whoever is most over its share"
    policy.removed("a")
    assert policy.victim(lambda k: True, "a") == "b", "below its share, another layer gives"


def test_adaptive_keeps_what_was_used_twice_from_a_scan() -> None:
    policy = Adaptive()
    here: list[str] = []

    def use(key: str) -> bool:
        hit = key in here
        if not hit:
            if len(here) == 4:
                gone = policy.victim(lambda k: True, key)
                assert gone is not None
                here.remove(gone)
                policy.removed(gone)
            here.append(key)
            policy.touched(key)
        policy.touched(key)
        return hit

    for key in "abab":
        use(key)
    for key in "cdefghijkl":
        use(key)
    assert use("a") and use("b"), "LRU would have lost them"


def test_adaptive_follows_the_list_that_was_too_short() -> None:
    policy = Adaptive()
    for key in "ab":  # used twice
        for _ in range(3):
            policy.touched(key)
    for key in "cd":  # used once
        for _ in range(2):
            policy.touched(key)
    assert policy.victim(lambda k: True, "x") == "c"
    policy.removed("c")
    assert policy.victim(lambda k: True, "x") == "d"
    assert policy.victim(lambda k: True, "c") == "a", "it comes back: the list it fell off was too short"
    for _ in range(2):
        policy.touched("c")
    assert policy.victim(lambda k: True, "x") == "a", "that is remembered"
    policy.removed("a")
    assert policy.victim(lambda k: True, "a") == "d", "and taken back when the other list proves too short"


def test_adaptive_forgets_what_was_fetched_in_vain() -> None:
    policy = Adaptive()
    policy.touched("p")
    policy.removed("p")
    for key in "ppaabb":
        policy.touched(key)
    assert policy.victim(lambda k: True, "x") == "p", "as new as any other that was used once"
    policy.removed("p")
    for key in "pp":
        policy.touched(key)
    assert policy.victim(lambda k: True, "x") == "a", "now it did come back after a use"

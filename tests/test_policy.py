"""Eviction policies: one contract for all, and what each prefers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tiers import LFU, LRU, EvictionPolicy, NextUse

POLICIES: dict[str, Callable[[], EvictionPolicy]] = {
    "lru": LRU,
    "lfu": LFU,
    "next use": lambda: NextUse(lambda key: ord(key)),
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

"""Replays: what must hold for every policy and predictor, and what each of them is for."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe import Combination, GateAhead, PerLayer, Repetition, Routed, RoutingTrace, Transitions, shares
from moe.belady import Belady, layer_of
from moe.replay import Counts, Replayed, policies, replay, router_mean, table
from moe.synthetic import adversarial, affine, even, skewed, sticky, with_gate_ahead
from prefetch import Predictor, ThrashGuard, worthwhile
from tiers import LRU, EvictionPolicy

NAMES = [n for n in policies(even(1, 4, 2, 1)) if n != "belady"]


def choices(layers: int, experts: int, top_k: int, *, tokens: int = 1) -> st.SearchStrategy[RoutingTrace]:
    token = st.lists(st.integers(0, experts - 1), min_size=top_k, max_size=top_k, unique=True)
    routing = st.lists(token, min_size=1, max_size=tokens)

    def build(drawn: list[list[list[list[int]]]]) -> RoutingTrace:
        def routed(layer: int, index: list[list[int]], like: int) -> Routed:
            rows = np.array((index * like)[:like], np.int16)
            return Routed(layer, rows, np.full(rows.shape, 1 / top_k, np.float16))

        return RoutingTrace(
            [experts] * layers, [[routed(n, index, len(p[0])) for n, index in enumerate(p)] for p in drawn]
        )

    one = st.lists(routing, min_size=layers, max_size=layers)
    return st.lists(one, min_size=1, max_size=12).map(build)


def missed(trace: RoutingTrace, slots: int, name: str) -> int:
    return replay(trace, slots, policies(trace)[name](slots)).total.missed


def least(trace: RoutingTrace, slots: int) -> int:
    """The fewest misses there can be, by trying everything."""
    states: dict[frozenset[str], int] = {frozenset(): 0}
    for p in trace:
        for r in p:
            need = frozenset(f"{r.layer}.{e}" for e in r.needed())
            after: dict[frozenset[str], int] = {}
            for here, cost in states.items():
                new = cost + len(need - here)
                reachable = {here | need}
                while any(len(s) > slots for s in reachable):
                    reachable = {s - {k} if len(s) > slots else s for s in reachable for k in s - need or s}
                for s in reachable:
                    after[s] = min(after.get(s, new), new)
            states = after
    return min(states.values())


@settings(max_examples=60, deadline=None)
@given(trace=choices(3, 6, 2, tokens=2), slots=st.integers(4, 18), name=st.sampled_from(NAMES))
def test_belady_never_misses_more(trace: RoutingTrace, slots: int, name: str) -> None:
    assert missed(trace, slots, "belady") <= missed(trace, slots, name)


@settings(max_examples=25, deadline=None)
@given(trace=choices(2, 4, 2), slots=st.integers(2, 7))
def test_belady_misses_the_least_possible(trace: RoutingTrace, slots: int) -> None:
    assert missed(trace[:6], slots, "belady") == least(trace[:6], slots)


@settings(max_examples=60, deadline=None)
@given(trace=choices(3, 6, 2, tokens=2), slots=st.integers(4, 17))
def test_more_slots_never_miss_more(trace: RoutingTrace, slots: int) -> None:
    for name in ("lru", "belady"):
        assert missed(trace, slots + 1, name) <= missed(trace, slots, name)


class Spy:
    """A policy that sees to it that what its cache does can be defended."""

    def __init__(self, inner: EvictionPolicy, slots: int, refuses: bool = False) -> None:
        self.inner, self.slots, self.refuses = inner, slots, refuses
        self.here: set[str] = set()
        self.gone: list[str] = []

    def touched(self, key: str) -> None:
        self.here.add(key)
        assert len(self.here) <= self.slots
        self.inner.touched(key)

    def removed(self, key: str) -> None:
        self.here.remove(key)
        self.gone.append(key)
        self.inner.removed(key)

    def victim(self, evictable: Callable[[str], bool], incoming: str) -> str | None:
        assert incoming not in self.here and len(self.here) == self.slots
        if self.refuses:
            return None
        key = self.inner.victim(evictable, incoming)
        assert key is None or (key in self.here and evictable(key))
        return key


class Watch:
    """Sees, between two layers, whether what the last one needed was all there while it ran."""

    def __init__(self, spy: Spy, inner: Predictor) -> None:
        self.spy, self.inner = spy, inner

    def observe(self, layer: int, index: np.ndarray) -> None:
        self.current = {f"{layer}.{e}" for e in index.ravel()}
        assert len(self.current) > self.spy.slots or self.current <= self.spy.here
        self.inner.observe(layer, index)

    def predict(self, layer: int) -> list[tuple[int, float]]:
        return self.inner.predict(layer)


@pytest.mark.parametrize("name", [*NAMES, "refusing"])
def test_what_a_layer_needs_stays_while_it_runs(name: str) -> None:
    for trace in (sticky(3, 8, 2, 60), even(3, 8, 2, 60, tokens=2), skewed(3, 8, 2, 60)):
        wide = max(len(r.needed()) for p in trace for r in p)
        for slots in (wide, wide + 1, 8, 23, 24, 40):
            inner = policies(trace)[name](slots) if name != "refusing" else LRU()
            spy = Spy(inner, slots, name == "refusing")
            watch = Watch(spy, Repetition(trace.experts))
            t = replay(trace, slots, spy, watch).total
            assert t.needed == t.hits + t.late + t.missed == sum(len(r.needed()) for p in trace for r in p)
            assert t.useful == t.late and t.useful + t.wasted + t.missed == len(spy.here) + len(spy.gone)
            if slots >= 24:
                assert t.missed + t.late <= 24 and not spy.gone


@pytest.mark.parametrize("name", [*NAMES, "belady"])
def test_slots_of_one_layer_are_enough_and_even_one_will_do(name: str) -> None:
    trace = sticky(2, 16, 4, 20)
    for slots in (4, 1):
        t = replay(trace, slots, policies(trace)[name](slots)).total
        assert (t.needed, t.missed) == (160, 160), "each layer pushes out the other"
    one = sticky(1, 16, 4, 20)
    assert replay(one, 4, policies(one)[name](4)).total.hits > 20
    prompt = even(2, 16, 4, 3, tokens=30)  # needs more than there is
    t = replay(prompt, 8, policies(prompt)[name](8)).total
    assert t.missed + t.hits == t.needed > 90 and t.missed >= t.needed - 6 * 8
    with pytest.raises(ValueError, match="slot"):
        replay(one, 0, LRU())


def test_counts_of_a_replay_by_hand() -> None:
    def routed(layer: int, *experts: int, ahead: tuple[int, int] | None = None) -> Routed:
        said = None if ahead is None else np.array([ahead], np.int16)
        return Routed(layer, np.array([experts], np.int16), np.ones((1, 2), np.float16), said)

    trace = RoutingTrace(
        [4, 4],
        [
            [routed(0, 0, 1, ahead=(0, 3)), routed(1, 0, 2)],  # 1.0 comes ahead, 1.3 in vain, 1.2 is missed
            [routed(0, 0, 1), routed(1, 3, 2)],  # by now 1.3 is useful after all, if it is still there
        ],
    )
    result = replay(trace, 5, LRU(), GateAhead([4, 4]), nbytes=10)
    assert result.layers[0] == Counts(needed=4, hits=2, late=0, missed=2)
    assert result.layers[1] == Counts(needed=4, hits=1, late=2, missed=1, useful=2)
    assert (result.useful_bytes, result.wasted_bytes, result.link_bytes) == (20, 0, 50)
    result = replay(trace, 4, LRU(), GateAhead([4, 4]), nbytes=10)  # 1.2 pushes out 0.0, which pushes out 1.3
    assert result.layers[1] == Counts(needed=4, hits=1, late=1, missed=2, useful=1, wasted=1)
    assert result.layers[0].missed == 3 and result.link_bytes == 70


def test_a_perfect_gate_leaves_nothing_to_miss_but_the_first_layer() -> None:
    trace = with_gate_ahead(even(4, 32, 4, 100), 1.0)
    t = replay(trace, 64, LRU(), GateAhead(trace.experts)).total
    assert t.missed == 4 and t.wasted == 0 and t.late > 700
    t = replay(trace, 64, LRU(), GateAhead(trace.experts), width=0).total
    assert t.late == 0 < t.missed


def test_only_what_pays_is_fetched() -> None:
    trace = with_gate_ahead(even(4, 32, 4, 200), 0.5)

    def result(least: float) -> Counts:
        def choose(said: list[tuple[int, float]]) -> list[tuple[int, float]]:
            return worthwhile(said, gain_s=1.0, link_s=least, busy=1.0)

        return replay(trace, 64, LRU(), GateAhead(trace.experts), choose=choose).total

    all_of_it, none, some = result(0.0), result(3.0), result(0.7)
    assert none.late < 50 < some.late <= all_of_it.late and all_of_it.wasted > 300


def test_shares_hand_out_all_there_is() -> None:
    for slots in (1, 7, 24, 30, 40, 64, 100):
        for experts in ((16, 16, 16, 16), (16, 8, 4, 36)):
            for due in (shares.equal(slots, experts, 4), shares.shallow(slots, experts, 4)):
                assert sum(due.values()) == min(slots, 64)
                assert all(0 <= due[i] <= n for i, n in enumerate(experts))
                assert slots < 16 or all(due[i] >= min(4, n) for i, n in enumerate(experts))
    trace = skewed(4, 16, 4, 50)
    for slots in (1, 7, 24, 64, 100):
        assert sum(shares.optimised(slots, trace).values()) == min(slots, 64)
    assert list(shares.shallow(32, [16] * 4, 2).values()) == sorted(shares.shallow(32, [16] * 4, 2).values())[::-1]
    assert shares.shallow(32, [16] * 4, 2)[0] > shares.shallow(32, [16] * 4, 2)[3]


def halves() -> RoutingTrace:
    """Two layers that want few experts each, over and over, and two that want all of theirs in turn."""
    rng = np.random.default_rng(0)

    def routed(p: int, layer: int) -> Routed:
        index = rng.choice(12, 4, replace=False) if layer < 2 else (np.arange(4) + 4 * p) % 32
        return Routed(layer, index[None].astype(np.int16), np.full((1, 4), 0.25, np.float16))

    return RoutingTrace([32] * 4, [[routed(p, n) for n in range(4)] for p in range(100)])


def test_optimised_shares_go_where_they_gain() -> None:
    trace = halves()
    due = shares.optimised(32, trace)
    assert due[0] >= 12 and due[1] >= 12
    names = ("optimised shares", "equal shares", "lru")
    best, same, lru = (replay(trace, 32, policies(trace)[n](32)).total.hits for n in names)
    assert best > 1.05 * same and best > 1.3 * lru


def test_slots_go_to_those_who_gain_most_of_each() -> None:
    """One layer gains much from three slots more, two others half of that from one: the slots are theirs."""
    weight = np.ones((1, 1), np.float16)
    passes = []
    for p in range(40):
        chosen = (p % 4, p % 2 if p < 20 else 0, p % 2 if p < 20 else 0)
        passes.append([Routed(n, np.array([[e]], np.int16), weight) for n, e in enumerate(chosen)])
    trace = RoutingTrace([4] * 3, passes)
    assert shares.optimised(6, trace) == {0: 2, 1: 2, 2: 2}
    assert shares.optimised(8, trace) == {0: 4, 1: 2, 2: 2}


def test_hits_of_a_share_are_foretold() -> None:
    trace = sticky(3, 16, 2, 200)
    curves = shares.hit_curves(trace)
    for n in (2, 4, 7):
        got = replay(trace, 3 * n, PerLayer(layer_of, dict.fromkeys(range(3), n)))
        for layer, count in enumerate(got.layers):  # until all is full, a layer may hold more than its share
            assert curves[layer][n] <= count.hits <= curves[layer][n] + 3 * n
    assert all(c == sorted(c) for c in curves)


def test_each_policy_is_good_for_something() -> None:
    """Per cent of hits, with slots for a quarter of all experts."""
    rates: dict[str, dict[str, float]] = {}
    for name, trace in {"skewed": skewed(6, 32, 4, 300), "sticky": sticky(6, 32, 4, 300, repeat=0.8)}.items():
        for row in table(trace, [48], policies(trace), {"none": lambda: None}):
            t = row.result.total
            rates.setdefault(row.policy, {})[name] = 100 * t.hits / t.needed
    best = rates.pop("belady")
    for policy, by_trace in rates.items():
        assert all(by_trace[t] <= best[t] for t in best), policy
    lru = rates["lru"]
    for policy in ("router score", "expected use", "lfu", "adaptive"):
        assert rates[policy]["skewed"] > lru["skewed"] + 5, (policy, rates)
    for policy in ("equal shares", "adaptive", "expected use"):
        assert rates[policy]["sticky"] > lru["sticky"] - 3, (policy, rates)
    assert rates["lfu"]["sticky"] < lru["sticky"] - 20, "which is why there are others"


def test_the_router_is_heard_through_the_guard_and_without_probabilities() -> None:
    trace = skewed(4, 16, 2, 100)
    bare = RoutingTrace(trace.experts, [[Routed(r.layer, r.index, r.weights) for r in p] for p in trace])
    make = policies(trace)["router score"]
    plain = replay(trace, 16, make(16)).total
    assert replay(trace, 16, ThrashGuard(make(16))).total == plain
    assert replay(bare, 16, make(16)).total != plain
    r = next(iter(bare))[0]
    assert router_mean(r, 16)[r.index[0]] == pytest.approx(r.weights[0].astype(float))
    assert router_mean(r, 16).sum() == pytest.approx(r.weights.sum(), rel=1e-2)


def cost(guarded: Replayed, plain: Replayed) -> float:
    """What is waited for or moved in vain beyond what is waited for without prefetching, as a share of that."""
    return (guarded.total.missed + guarded.total.wasted) / plain.total.missed - 1


class Strangers:
    """Says anything."""

    def __init__(self, experts: int, top_k: int) -> None:
        self.rng, self.experts, self.top_k = np.random.default_rng(0), experts, top_k

    def observe(self, layer: int, index: np.ndarray) -> None:
        pass

    def predict(self, layer: int) -> list[tuple[int, float]]:
        return [(e, 0.9) for e in self.rng.choice(self.experts, self.top_k, replace=False).tolist()]


USELESS: dict[str, Callable[[RoutingTrace], Predictor]] = {
    "gate ahead": lambda t: GateAhead(t.experts),
    "strangers": lambda t: Strangers(t.experts[0], t.top_k),
}


@pytest.mark.parametrize("name", ["lru", "lfu", "adaptive", "router score", "equal shares"])
@pytest.mark.parametrize("predictor", USELESS)
def test_a_useless_predictor_costs_little(name: str, predictor: str) -> None:
    trace = adversarial(3, 32, 4, 250, period=7)
    worst = 0.0
    for slots in (15, 75):  # 84 hold all that is used
        make = policies(trace)[name]
        plain = replay(trace, slots, make(slots))
        wild = replay(trace, slots, make(slots), USELESS[predictor](trace))
        guarded = replay(trace, slots, ThrashGuard(make(slots)), USELESS[predictor](trace))
        worst = max(worst, cost(wild, plain))
        assert cost(guarded, plain) <= 0.05
        assert guarded.total.missed <= 1.05 * plain.total.missed
        probed = guarded.total.wasted > 0
        assert probed
    assert worst > 0.2, "without the guard it would have cost a lot, or this test shows nothing"


@pytest.mark.parametrize("predictor", USELESS)
def test_a_cache_that_just_fits_is_lost_once_at_most(predictor: str) -> None:
    trace = adversarial(4, 32, 4, 600, period=7)
    wild = replay(trace, 112, LRU(), USELESS["gate ahead"](trace))
    assert wild.total.missed == wild.total.needed, "every block fetched in vain costs a turn of misses"
    guarded = replay(trace, 112, ThrashGuard(LRU()), USELESS[predictor](trace))
    t = guarded.total
    assert t.missed + t.wasted <= 2 * 112 + 0.05 * t.needed
    assert t.missed < 0.05 * t.needed


def test_the_guard_does_not_stand_in_the_way_of_good_predictions() -> None:
    trace = with_gate_ahead(even(4, 32, 4, 600), 0.95)
    free = replay(trace, 64, LRU(), GateAhead(trace.experts)).total
    guarded = replay(trace, 64, ThrashGuard(LRU()), GateAhead(trace.experts)).total
    assert free.late > 3000 and guarded.late > 0.95 * free.late


def test_the_guard_opens_again_when_predictions_become_good() -> None:
    bad, good = with_gate_ahead(even(4, 32, 4, 400), 0.0), with_gate_ahead(even(4, 32, 4, 400, seed=1), 0.95)
    trace = RoutingTrace(bad.experts, [*bad, *good, *bad])
    policy = ThrashGuard(LRU())
    result = replay(trace, 64, policy, GateAhead(trace.experts))
    only_good = replay(good, 64, LRU(), GateAhead(trace.experts)).total
    assert result.total.late > 0.8 * only_good.late
    for part in (bad, good):
        assert cost(replay(part, 64, ThrashGuard(LRU()), GateAhead(trace.experts)), replay(part, 64, LRU())) < 0.05
    free = replay(good, 64, LRU(), GateAhead(trace.experts)).total
    plain = replay(trace, 64, LRU()).link_bytes
    assert result.link_bytes <= 1.05 * plain + 64 + 2 * free.wasted
    assert policy.wasted_bytes <= result.wasted_bytes <= policy.wasted_bytes + trace.top_k
    assert policy.useful_bytes == result.useful_bytes


def test_a_combination_finds_out_whom_to_believe() -> None:
    for trace in (with_gate_ahead(even(4, 32, 4, 250), 0.9), affine(4, 32, 4, 250), sticky(4, 32, 4, 250, repeat=0.8)):
        singles: list[Predictor] = [
            GateAhead(trace.experts), Transitions(trace.experts), Repetition(trace.experts),
        ]  # fmt: skip
        best = min(replay(trace, 64, LRU(), p).total.missed for p in singles)
        assert best < replay(trace, 64, LRU()).total.missed
        assert replay(trace, 64, LRU(), Combination(trace.experts)).total.missed < 1.05 * best + 20


def test_a_table_has_every_line() -> None:
    trace = sticky(2, 8, 2, 20)
    rows = table(
        trace, [4, 8], policies(trace), {"none": lambda: None, "repetition": lambda: Repetition(trace.experts)}
    )
    assert len(rows) == 2 * (2 * len(NAMES) + 1)
    assert len({(r.policy, r.predictor, r.slots) for r in rows}) == len(rows)
    assert all(r.predictor == "none" for r in rows if r.policy == "belady")
    with pytest.raises(AssertionError, match="demand"):
        replay(trace, 4, Belady(trace), Repetition(trace.experts))


def test_a_long_trace_replays_in_seconds() -> None:
    trace = sticky(12, 64, 8, 2000)
    began = time.process_time()
    assert replay(trace, 192, LRU()).total.needed == 12 * 8 * 2000
    assert time.process_time() - began < 5

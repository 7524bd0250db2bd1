"""One layer's experts over device, link, disk and CPU: against every other schedule there is, and as a timetable."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from math import inf

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe import Choice, Need, Place, Schedule, Speeds, divide
from moe import schedule as module

DEVICE, COMING, HOST, DISK = Place.DEVICE, Place.COMING, Place.HOST, Place.DISK
WORST = 2.0  # times the best; a search for bad cases found none beyond 1.7
NEAR = 1 + 1e-9


def speeds(device: tuple[float, float], cpu: tuple[float, float], move: float, alone: bool = False) -> Speeds:
    """Each expert costs something fixed and something for each token."""
    return Speeds(lambda t: device[0] + device[1] * t, lambda t: cpu[0] + cpu[1] * t, move, alone)


LIKE_A_GPU = speeds((0.05, 0.002), (0.4, 0.1), 1.0)

costs = st.tuples(st.floats(0.01, 2), st.floats(0.001, 1))
any_speeds = st.builds(speeds, costs, costs, st.floats(0.05, 5), st.booleans())


def layers(most: int = 5, places: Sequence[Place] = tuple(Place)) -> st.SearchStrategy[list[Need]]:
    one = st.tuples(st.integers(1, 32), st.sampled_from(places), st.floats(0, 10))
    return st.lists(one, min_size=1, max_size=most).map(
        lambda drawn: [Need(7 * e + 3, t, p, a if p in (COMING, DISK) else 0.0) for e, (t, p, a) in enumerate(drawn)]
    )


def drawn(rng: random.Random) -> tuple[list[Need], Speeds]:
    """Speeds over three orders of magnitude, a link and a disk that matter."""
    move = 10 ** rng.uniform(-1, 1)
    device = 10 ** rng.uniform(-2, 0.3), 10 ** rng.uniform(-2, -0.5)
    cpu = 10 ** rng.uniform(-1, 1), 10 ** rng.uniform(-2, 0.5)
    s = speeds(device, cpu, move, rng.random() < 0.3)
    among = rng.choice([[HOST], [DEVICE, HOST], [HOST, DISK], [DEVICE, COMING, HOST], list(Place)])
    most = rng.choice([1, 4, 32])
    needs = []
    for e in range(rng.randint(1, 6)):
        place = rng.choice(among)
        arrives = rng.uniform(0, 4 * move) if place in (COMING, DISK) else 0.0
        needs.append(Need(e, rng.randint(1, most), place, arrives))
    return needs, s


def least(needs: Sequence[Need], s: Speeds) -> float:
    """The earliest finish there is: every assignment, with the link in every order."""
    assert s.device_s is not None and s.cpu_s is not None and s.move_s is not None
    move, device_s, cpu_s = s.move_s, s.device_s, s.cpu_s
    taken = sorted((n.arrives_s - move, n.arrives_s) for n in needs if n.place is COMING)
    best = inf

    def done(jobs: Sequence[tuple[float, float]]) -> float:
        t = 0.0
        for ready, seconds in sorted(jobs):  # the order in which they come is best for one machine
            t = max(t, ready) + seconds
        return t

    def go(left: list[Need], t: float, device: list[tuple[float, float]]) -> None:
        nonlocal best
        cpu = [(n.arrives_s, cpu_s(n.tokens)) for n in left]
        best = min(best, done(device + cpu) if s.alone else max(done(device), done(cpu)))
        for i, n in enumerate(left):
            begins = max(t, n.arrives_s)
            for a, b in taken:
                if begins + move > a:
                    begins = max(begins, b)
            if begins + move < best:
                go(left[:i] + left[i + 1 :], begins + move, [*device, (begins + move, device_s(n.tokens))])

    there = [(n.arrives_s, device_s(n.tokens)) for n in needs if n.place in (DEVICE, COMING)]
    go([n for n in needs if n.place in (HOST, DISK)], 0.0, there)
    return best


# how good it is


@settings(max_examples=200, deadline=None)
@given(needs=layers(), s=any_speeds)
def test_no_schedule_is_much_better(needs: list[Need], s: Speeds) -> None:
    assert least(needs, s) / NEAR <= divide(needs, s).finish_s <= WORST * least(needs, s)


def test_nearly_always_the_best_there_is() -> None:
    rng = random.Random(5)
    ratios = sorted(divide(*case).finish_s / least(*case) for case in [drawn(rng) for _ in range(1500)])
    assert ratios[int(0.95 * len(ratios))] <= 1.01
    assert ratios[int(0.99 * len(ratios))] <= 1.10


@settings(max_examples=100, deadline=None)
@given(here=st.integers(0, 3), there=st.integers(1, 5), tokens=st.integers(1, 32), s=any_speeds)
def test_equal_experts_are_divided_as_well_as_can_be(here: int, there: int, tokens: int, s: Speeds) -> None:
    needs = [Need(e, tokens, HOST if e < there else DEVICE) for e in range(here + there)]
    assert divide(needs, s).finish_s == pytest.approx(least(needs, s))


@settings(max_examples=200, deadline=None)
@given(needs=layers(12), s=any_speeds)
@example(
    [Need(e, t, DISK, a) for e, (t, a) in enumerate(((16, 3.4), (1, 0.5), (64, 5.6), (1, 0.7), (64, 5.3), (1, 5.0)))],
    speeds((0.02, 0.14), (0.57, 1.84), 5.13),
)  # nothing else finds that all should be moved
def test_never_worse_than_all_on_one_side(needs: list[Need], s: Speeds) -> None:
    finish = divide(needs, s).finish_s
    assert finish <= divide(needs, Speeds(s.device_s, s.cpu_s, 1e9, s.alone)).finish_s * NEAR, "all on the CPU"
    assert finish <= divide(needs, Speeds(s.device_s, None, s.move_s, s.alone)).finish_s * NEAR, "all moved"


@settings(max_examples=200, deadline=None)
@given(needs=layers(12, (DEVICE, HOST, DISK)), s=any_speeds, faster=st.floats(1, 20))
def test_a_faster_link_costs_nothing(needs: list[Need], s: Speeds, faster: float) -> None:
    """Within what being no optimum may cost."""
    assert s.move_s is not None
    quick = Speeds(s.device_s, s.cpu_s, s.move_s / faster, s.alone)
    assert divide(needs, quick).finish_s <= 1.1 * divide(needs, s).finish_s
    alike = [n._replace(tokens=4, arrives_s=0.0) for n in needs]
    assert divide(alike, quick).finish_s <= divide(alike, s).finish_s * NEAR


@pytest.mark.parametrize(
    ("needs", "s", "finish"),
    [
        # the CPU has time for one expert, and it should be the large one: an exchange of the two
        ([Need(0, 1, HOST), Need(1, 4, HOST)], speeds((0.0, 0.5), (2.0, 0.1), 2.0), 2.5),
        # those from disk come early enough to be weighed like those that are here
        ([Need(0, 4, DISK, 2.0), Need(1, 16, DISK, 0.5), Need(2, 8, HOST)], speeds((0.5, 0.5), (4.0, 0.2), 2.0), 9.0),
    ],
)
def test_what_simpler_rules_miss(needs: list[Need], s: Speeds, finish: float) -> None:
    assert divide(needs, s).finish_s == pytest.approx(finish) == least(needs, s)


# what it says


def holds_together(needs: Sequence[Need], s: Speeds, got: Schedule) -> None:
    """The turns are a timetable that can be kept."""
    by = {n.expert: n for n in needs}
    moved = {t.expert for t in got.link}
    there = {n.expert for n in needs if n.place in (DEVICE, COMING)}
    assert sorted(t.expert for t in (*got.device, *got.cpu)) == sorted(by), "each is computed once"
    assert len(moved) == len(got.link) and not moved & there, "what is there is not moved"
    assert {t.expert for t in got.device} == moved | there
    named = {Choice.MOVE_THEN_DEVICE: moved, Choice.ON_DEVICE: there}
    assert all({e for e, c in got.choices.items() if c is choice} == those for choice, those in named.items())
    assert set(got.choices) == set(by)
    arrived = {t.expert: t.ends_s for t in got.link}
    for turns, cost in ((got.device, s.device_s), (got.cpu, s.cpu_s), (got.link, lambda tokens: s.move_s)):
        assert [t.begins_s for t in turns] == sorted(t.begins_s for t in turns)
        for t in turns:
            assert t.ends_s - t.begins_s == pytest.approx(cost(by[t.expert].tokens))
            assert t.begins_s >= by[t.expert].arrives_s - 1e-9
    assert all(t.begins_s >= arrived.get(t.expert, 0.0) for t in got.device)
    coming = [(n.arrives_s, n.arrives_s) for n in needs if n.place is COMING]
    alone = [(*got.device, *got.cpu)] if s.alone else [got.device, got.cpu]
    for turns in (*alone, got.link):
        spans = sorted((t.begins_s, t.ends_s) for t in turns)
        assert all(b <= c + 1e-9 for (_, b), (c, _) in itertools.pairwise(spans)), "two at once"
    for t in got.link:
        assert all(end <= t.begins_s + 1e-9 or t.ends_s + s.move_s <= end + 1e-9 for end, _ in coming), "in their way"
    assert got.finish_s == max((t.ends_s for t in (*got.device, *got.cpu)), default=0.0)


@settings(max_examples=300, deadline=None)
@given(needs=layers(12), s=any_speeds)
@example([Need(0, 1, HOST), Need(1, 1, COMING, 9.0), Need(2, 1, COMING, 9.5)], speeds((0.1, 0.1), (9, 1), 2.0))
def test_every_turn_can_be_kept(needs: list[Need], s: Speeds) -> None:
    holds_together(needs, s, divide(needs, s))


@settings(max_examples=100, deadline=None)
@given(needs=layers(12), s=any_speeds, seed=st.randoms(use_true_random=False))
def test_the_order_of_the_needs_is_nothing(needs: list[Need], s: Speeds, seed: random.Random) -> None:
    other = needs.copy()
    seed.shuffle(other)
    assert divide(other, s) == divide(needs, s)


def test_the_link_takes_most_tokens_first_and_the_cpu_keeps_the_fewest() -> None:
    needs = [Need(e, t, HOST) for e, t in enumerate((3, 40, 1, 25, 2))]
    got = divide(needs, LIKE_A_GPU)
    assert [t.expert for t in got.link] == [t.expert for t in got.device] == [1, 3]
    assert [t.expert for t in got.cpu] == [2, 4, 0]


def test_nothing_is_decided_where_there_is_nothing_to_decide() -> None:
    got = divide([Need(e, 1, DEVICE) for e in (5, 2)], LIKE_A_GPU)
    assert got.choices == {5: Choice.ON_DEVICE, 2: Choice.ON_DEVICE} and not got.link and not got.cpu
    assert divide([], LIKE_A_GPU) == Schedule({}, (), (), (), 0.0)


def test_what_comes_soon_anyway_leaves_time_to_move_more() -> None:
    """Nobody waits for the CPU or the link while the device waits for what is coming."""
    s = speeds((0.1, 0.0), (2.0, 0.0), 1.0)
    got = divide([Need(0, 1, COMING, 5.0), Need(1, 1, HOST), Need(2, 1, HOST), Need(3, 1, HOST)], s)
    assert got.finish_s == pytest.approx(5.1)


def test_what_is_on_its_way_is_not_made_to_wait() -> None:
    s = speeds((0.1, 0.0), (50.0, 0.0), 1.0)
    got = divide([Need(0, 1, COMING, 1.5), Need(1, 1, HOST)], s)
    assert got.link[0].begins_s == 1.5, "half a second is no room for a second's move"
    got = divide([Need(0, 1, COMING, 2.0), Need(1, 1, HOST)], s)
    assert got.link[0].begins_s == 0.0


# machines


def test_a_machine_without_a_device() -> None:
    s = Speeds(None, LIKE_A_GPU.cpu_s, None)
    got = divide([Need(0, 1, DISK, 3.0), Need(1, 4, HOST), Need(2, 1, HOST), Need(3, 1, DISK, 0.1)], s)
    assert set(got.choices.values()) == {Choice.ON_CPU} and not got.link and not got.device
    assert [t.expert for t in got.cpu] == [2, 1, 3, 0], "as they come"
    assert got.finish_s == pytest.approx(3.5)
    for place in (DEVICE, COMING):
        with pytest.raises(ValueError, match="cannot be computed anywhere"):
            divide([Need(0, 1, place), Need(1, 1, HOST)], s)


def test_a_machine_that_cannot_compute_on_the_cpu() -> None:
    s = Speeds(LIKE_A_GPU.device_s, None, 1.0)
    got = divide([Need(0, 1, HOST), Need(1, 4, DISK, 0.5), Need(2, 1, DEVICE), Need(3, 8, HOST)], s)
    assert [t.expert for t in got.link] == [3, 1, 0] and not got.cpu
    with pytest.raises(ValueError, match="cannot be computed anywhere"):
        divide([Need(0, 1, HOST)], Speeds(None, None, None))


def test_cores_that_are_both_gain_nothing_by_moving_what_they_compute_alike() -> None:
    needs = [Need(e, 1, HOST) for e in range(6)]
    same = speeds((1.0, 0.0), (1.0, 0.0), 0.5, alone=True)
    assert divide(needs, same).finish_s == pytest.approx(6.0)
    apart = divide(needs, speeds((1.0, 0.0), (1.0, 0.0), 0.5))
    assert apart.finish_s == pytest.approx(3.5), "one more second of each side, half a second of link"


def test_an_expert_is_named_once() -> None:
    with pytest.raises(ValueError, match="twice"):
        divide([Need(1, 1, HOST), Need(1, 2, DEVICE)], LIKE_A_GPU)


# what it takes


def test_the_work_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs in every layer of every step: few simulations, and each cost is asked for once."""
    rng = random.Random(1)
    asked: list[int] = []
    runs: list[int] = []
    finish = module._Layer.finish
    monkeypatch.setattr(module._Layer, "finish", lambda self, moved: runs.append(1) or finish(self, moved))
    s = Speeds(lambda t: asked.append(t) or 0.05 + 0.002 * t, lambda t: asked.append(t) or 0.4 + 0.1 * t, 1.0)
    for places in ((HOST,), tuple(Place)):
        needs = [Need(e, rng.randint(1, 40), rng.choice(places), rng.uniform(0, 5)) for e in range(64)]
        asked.clear(), runs.clear()
        divide(needs, s)
        assert sorted(asked) == sorted(2 * list({n.tokens for n in needs}))
        assert len(runs) <= 4 + module.TRIES

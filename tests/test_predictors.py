"""Predictors: one contract for all, what each learns, and whether probabilities are what they say."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moe import Combination, GateAhead, LongRun, Repetition, RequestFrequency, RoutingTrace, Transitions
from moe.measured import Measured
from moe.predictors import HearsGate
from moe.store import save_arrays
from moe.synthetic import affine, even, skewed, sticky, with_gate_ahead
from prefetch import pays, worthwhile
from tiers import ModelError, UsageError

MAKE: dict[str, Callable[[tuple[int, ...]], Measured]] = {
    "gate ahead": GateAhead,
    "transitions": Transitions,
    "repetition": Repetition,
    "request": RequestFrequency,
    "long run": LongRun,
    "combination": Combination,
}


def run(predictor: Measured, trace: RoutingTrace) -> list[tuple[int, list[tuple[int, float]], set[int]]]:
    """Live through the trace: (layer, what was said of it, what it needed)."""
    said: dict[int, list[tuple[int, float]]] = {}
    out = []
    for p in trace:
        for r in p:
            if r.layer in said:
                out.append((r.layer, said.pop(r.layer), set(r.needed())))
            predictor.observe(r.layer, r.index)
            following = (r.layer + 1) % trace.layers
            if r.ahead is not None and isinstance(predictor, HearsGate):
                predictor.ahead(following, r.ahead)
            said[following] = predictor.predict(following)
    return out


def top(lived: list[tuple[int, list[tuple[int, float]], set[int]]]) -> float:
    """The share of needed experts among as many first guesses."""
    return sum(len(n & {e for e, _ in s[: len(n)]}) for _, s, n in lived) / sum(len(n) for _, _, n in lived)


def recall(lived: list[tuple[int, list[tuple[int, float]], set[int]]]) -> float:
    """The share of needed experts among twice as many guesses."""
    return sum(len(n & {e for e, _ in s[: 2 * len(n)]}) for _, s, n in lived) / sum(len(n) for _, _, n in lived)


@pytest.mark.parametrize("name", MAKE)
class TestContract:
    def test_guesses_are_experts_with_probabilities_in_order(self, name: str) -> None:
        trace = with_gate_ahead(skewed(3, 16, 4, 60, tokens=2), 0.7)
        lived = run(MAKE[name](trace.experts), trace)
        for _, said, _ in lived:
            experts = [e for e, _ in said]
            assert len(set(experts)) == len(experts) <= 16 and all(type(e) is int and 0 <= e < 16 for e in experts)
            ps = [p for _, p in said]
            assert ps == sorted(ps, reverse=True) and all(0 < p < 1 for p in ps)
        assert sum(bool(said) for _, said, _ in lived) > 100

    def test_nothing_is_said_of_what_is_not_known(self, name: str) -> None:
        assert MAKE[name]((8, 8)).predict(1) == []

    def test_probabilities_are_measured_ones(self, name: str) -> None:
        """Of all guesses around a probability, that share comes true; also under the same trace made hard."""
        for trace in (
            with_gate_ahead(sticky(3, 32, 4, 500, repeat=0.6), 0.8),
            with_gate_ahead(even(3, 32, 4, 500), 0.3),
        ):
            lived = run(MAKE[name](trace.experts), trace)[600:]
            bins: dict[int, list[tuple[float, bool]]] = {}
            for _, said, needed in lived:
                for e, p in said:
                    bins.setdefault(int(p * 5), []).append((p, e in needed))
            assert bins
            for cases in bins.values():
                if len(cases) > 150:
                    promised, kept = np.mean([p for p, _ in cases]), np.mean([t for _, t in cases])
                    assert promised == pytest.approx(kept, abs=0.08)

    def test_precision_and_recall_are_what_happened(self, name: str) -> None:
        trace = with_gate_ahead(skewed(3, 32, 4, 300), 0.7)
        predictor = MAKE[name](trace.experts)
        lived = [x for x in run(predictor, trace) if x[1]]
        right = sum(len(n & {e for e, _ in s[: len(n)]}) for _, s, n in lived)
        assert predictor.precision == pytest.approx(right / sum(len(s[: len(n)]) for _, s, n in lived), abs=0.04)
        assert predictor.recall == pytest.approx(right / sum(len(n) for _, _, n in lived), abs=0.04)

    def test_padding_is_no_expert(self, name: str) -> None:
        predictor = MAKE[name]((4, 4))
        for _ in range(3):
            for layer in (0, 1):
                if isinstance(predictor, HearsGate):
                    predictor.ahead(layer, np.array([[-1, 9]]))
                predictor.observe(layer, np.array([[1, 4], [-1, 7]]))
                assert all(0 <= e < 4 for e, _ in predictor.predict(1 - layer))

    def test_passes_may_have_any_number_of_tokens(self, name: str) -> None:
        predictor = MAKE[name]((16, 16))
        rng = np.random.default_rng(0)
        for tokens in (100, 1, 3, 2, 40, 1):
            for layer in (0, 1):
                predictor.observe(layer, rng.integers(0, 16, (tokens, 2)))
                predictor.predict(1 - layer)
        predictor.begin()
        predictor.observe(0, np.array([[1, 2]]))


def test_transitions_learn_what_follows_what() -> None:
    trace = affine(4, 32, 4, 600)
    lived = run(Transitions(trace.experts), trace)
    late = [x for x in lived[len(lived) // 2 :] if x[0] != 0]
    chance = 4 / 32
    assert top(late) > 0.5 > 3.5 * chance
    assert top([x for x in lived[len(lived) // 2 :] if x[0] == 0]) < 2 * chance, "the first layer follows nothing"
    assert top(run(Repetition(trace.experts), trace)) < 0.5 * top(late)
    assert Transitions([8, 16]).nbytes == 2 * (8 * 16 + 16 * 8)


def test_transitions_go_on_when_affinities_change() -> None:
    old, new = affine(2, 16, 2, 1500, world=1), affine(2, 16, 2, 1500, world=2)
    predictor = Transitions(old.experts)
    run(predictor, old)
    lived = run(predictor, new)
    assert top([x for x in lived[-600:] if x[0] == 1]) > 3 * 2 / 16


def test_counts_of_transitions_stay_small_and_comparable() -> None:
    predictor = Transitions([6, 6])
    for then, passes in (([[2, 3]], 80), ([[4, 5]], 50)):
        for _ in range(passes):
            predictor.observe(0, np.array([[0, 1]] * 64))
            predictor.observe(1, np.array(then * 64))
            assert predictor._times[1].max() < 4096 + 64
            assert (predictor._pairs[1] <= predictor._times[1][:, None]).all()
        predictor.observe(0, np.array([[0, 1]]))
        assert {e for e, _ in predictor.predict(1)[:2]} == set(then[0]), "the old fades when there is much of it"


def test_repetition_says_what_was() -> None:
    predictor = Repetition([8])
    predictor.observe(0, np.array([[3, 5]]))
    assert {e for e, _ in predictor.predict(0)} == {3, 5}
    trace = sticky(2, 32, 4, 300, repeat=0.8)
    assert top(run(Repetition(trace.experts), trace)) == pytest.approx(0.8 + 0.2 * 4 / 32, abs=0.05)


def test_a_request_has_frequencies_of_its_own() -> None:
    predictor = RequestFrequency([8])
    for _ in range(5):
        predictor.observe(0, np.array([[1, 2]]))
    assert {e for e, _ in predictor.predict(0)[:2]} == {1, 2}
    predictor.begin()
    assert predictor.predict(0) == []
    predictor.observe(0, np.array([[6, 7]]))
    assert {e for e, _ in predictor.predict(0)[:2]} == {6, 7}


def test_what_was_learned_serves_prompts_never_seen(tmp_path: Path) -> None:
    """Learned on one half of a trace, kept in a file, judged on the first passes of the other half."""
    trace = skewed(4, 32, 4, 400)
    learned = LongRun(trace.experts)
    run(learned, trace[:200])
    learned.save(tmp_path / "f")
    held_out = trace[200:215]
    again = LongRun(trace.experts)
    again.load(tmp_path / "f")
    fresh, strange = LongRun(trace.experts), LongRun(trace.experts)
    run(strange, skewed(4, 32, 4, 200, seed=5))
    knows = top(run(again, held_out))
    assert knows > top(run(fresh, held_out)) + 0.05
    assert knows > top(run(strange, held_out)) + 0.2
    assert knows == pytest.approx(top(run(learned, held_out)), abs=0.03), "the file keeps what was learned"


def test_learned_frequencies_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.npz"
    learned = LongRun([4, 4])
    learned.observe(0, np.array([[1, 2]]))
    learned.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(ModelError, match="another model"):
        LongRun([4, 5]).load(path)
    with pytest.raises(UsageError):
        LongRun([4, 4]).load(tmp_path / "none")
    about = {"frequency_of": np.array([4, 4], np.int32), "tokens": np.array([1, 1], np.uint32)}
    for counts in (np.full(8, 2, np.uint32), np.zeros(7, np.uint32), np.zeros((2, 4), np.uint32)):
        save_arrays(path, about | {"counts": counts})
        with pytest.raises(ModelError):
            LongRun([4, 4]).load(path)


def test_counts_of_very_long_runs_fit_the_file(tmp_path: Path) -> None:
    predictor = LongRun([4])
    predictor.observe(0, np.array([[1, 2]]))
    predictor._counts[0] *= 1e12
    predictor._tokens *= 1e12
    predictor.save(tmp_path / "f")
    again = LongRun([4])
    again.load(tmp_path / "f")
    assert {e for e, _ in again.predict(0)[:2]} == {1, 2}


def test_a_gates_first_rank_is_surer_than_its_last() -> None:
    rng = np.random.default_rng(0)
    predictor = GateAhead([64])
    for _ in range(400):
        right = rng.choice(64, 4, replace=False)
        wrong = rng.random(4) < [0.05, 0.2, 0.5, 0.9]
        predictor.ahead(0, np.where(wrong, rng.integers(0, 64, 4), right)[None])
        said = predictor.predict(0)
        predictor.observe(0, right[None])
    by_rank = [p for _, p in said]
    assert by_rank == pytest.approx([0.95, 0.8, 0.53, 0.15], abs=0.08)
    assert predictor.predict(0) == [], "said of one pass, not of the next"


def test_layers_are_measured_apart() -> None:
    rng = np.random.default_rng(0)
    predictor = GateAhead([32, 32])
    for _ in range(200):
        for layer in (0, 1):
            right = rng.choice(32, 2, replace=False)
            predictor.ahead(layer, (right if layer else rng.choice(32, 2, replace=False))[None])
            predictor.predict(layer)
            predictor.observe(layer, right[None])
    for layer in (0, 1):
        predictor.ahead(layer, np.array([[1, 2]]))
    assert predictor.predict(0)[0][1] < 0.2 < 0.9 < predictor.predict(1)[0][1]


def test_a_combination_is_as_good_as_its_best_member() -> None:
    traces = {
        "gate": with_gate_ahead(even(4, 32, 4, 200), 0.9),
        "affine": affine(4, 32, 4, 200),
        "sticky": sticky(4, 32, 4, 200, repeat=0.8),
        "skewed": skewed(4, 32, 4, 200),
        "sticky, and a poor gate": with_gate_ahead(sticky(4, 32, 4, 200, repeat=0.8), 0.3),
    }
    for name, trace in traces.items():
        alone = {m: top(run(make(trace.experts), trace)[200:]) for m, make in MAKE.items() if m != "combination"}
        both = top(run(Combination(trace.experts), trace)[200:])
        assert both > max(alone.values()) - 0.04, (name, both, alone)
    two = with_gate_ahead(sticky(4, 32, 4, 200, repeat=0.6), 0.6)
    alone, both = {}, run(Combination(two.experts), two)[200:]
    for m, make in MAKE.items():
        alone[m] = recall(run(make(two.experts), two)[200:])
    assert alone.pop("combination") == recall(both) > max(alone.values()) + 0.1, "two that know half know more"


def test_a_block_is_fetched_when_that_saves_more_than_it_costs() -> None:
    said = [(1, 0.9), (2, 0.5), (3, 0.1)]
    assert worthwhile(said, gain_s=1.0, link_s=1.0, busy=0.0) == said
    assert worthwhile(said, gain_s=1.0, link_s=1.0, busy=0.4) == said[:2]
    assert worthwhile(said, gain_s=1.0, link_s=1.0, busy=1.0) == said[:1], "on a busy link half right is not enough"
    assert worthwhile(said, gain_s=1.0, link_s=1.0, busy=0.4, evict_probability=0.4) == said[:1]
    assert worthwhile(said, gain_s=1.0, link_s=1.0, busy=0.0, evict_probability=0.95) == []
    assert worthwhile(said, gain_s=0.0, link_s=1.0, busy=0.0) == []
    assert not pays(0.5, gain_s=0.5, link_s=0.5, busy=1.0), "what saves nothing is left"

"""Sparse attention chooses what its policies promise, within the budget, and the same from coarse to fine."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvstore.abstracts import Abstracts
from kvstore.search import Search, groups, top
from kvstore.selection import DEFAULT_SELECTOR, SELECTORS, Bounds, HeavyHitters, LayerView, PromptWindow, make_selector
from kvstore.shares import LEAST_GROUPS, Ahead, grain, layer_budgets
from tiers import UsageError

KV, HEADS, DIM, CHUNK = 2, 4, 32, 16
SCALE = DIM**-0.5


def keys_of(chunks: int, seed: int = 0, topics: bool = False) -> Tensor:
    """Keys [KV, chunks · CHUNK, DIM]; with topics, those of 16 chunks in a row are alike."""
    g = torch.Generator().manual_seed(seed)
    keys = torch.randn(KV, chunks * CHUNK, DIM, generator=g)
    if topics:
        subject = 3 * torch.randn(KV, -(-chunks // 16), DIM, generator=g)
        keys = 0.3 * keys + subject.repeat_interleave(16 * CHUNK, dim=1)[:, : keys.shape[1]]
    return keys


def view(keys: Tensor, number: int = 0, summarised: int | None = None) -> LayerView:
    """A layer of these keys; only the first `summarised` chunks have abstracts (None: all)."""
    chunks = keys.unflatten(1, (-1, CHUNK))
    a = Abstracts(KV, DIM)
    a.set_many(0, chunks[:, : chunks.shape[1] if summarised is None else summarised])

    def mass(query: Tensor, scale: float) -> Tensor:
        logits = torch.einsum("hgd,hnd->hgn", query.view(KV, -1, DIM), keys).flatten(0, 1) * scale
        return logits.softmax(-1).unflatten(1, (-1, CHUNK)).sum(-1)

    return LayerView(number, chunks.shape[1], a, mass)


def query_of(seed: int = 0) -> Tensor:
    return torch.randn(HEADS, DIM, generator=torch.Generator().manual_seed(seed + 1000))


EVERY = pytest.mark.parametrize("name", sorted(SELECTORS))


# what holds for all of them


@EVERY
@settings(max_examples=40, deadline=None)
@given(
    chunks=st.integers(1, 40),
    budget=st.integers(0, 45),
    sinks=st.integers(0, 3),
    recent=st.integers(1, 4),
    told=st.booleans(),
    missing=st.integers(0, 6),
)
def test_within_the_budget_and_with_what_is_always_chosen(
    name: str, chunks: int, budget: int, sinks: int, recent: int, told: bool, missing: int
) -> None:
    selector = make_selector(name, sinks, recent)
    layer = view(keys_of(chunks), summarised=max(chunks - missing, 0))
    if told:
        selector.prompt_ended(layer, torch.rand(HEADS, max(chunks - 3, 1)))
        selector.attended(layer, [0, chunks - 1], torch.rand(HEADS, 2))
    chosen = selector.choose(layer, query_of(), SCALE, budget)
    always = {*range(min(sinks, chunks)), *range(max(chunks - recent, 0), chunks)}
    assert chosen == sorted(set(chosen)) and set(chosen) <= set(range(chunks))
    assert always <= set(chosen)
    assert len(chosen) == min(max(budget, len(always)), chunks)


@EVERY
def test_the_same_question_has_the_same_answer(name: str) -> None:
    layer = view(keys_of(60, topics=True))
    answers = []
    for _ in range(2):
        selector = make_selector(name)
        selector.prompt_ended(layer, layer.mass(query_of(9), SCALE))  # type: ignore[misc]
        answers.append([selector.choose(layer, query_of(i), SCALE, 12) for i in range(4)])
    assert answers[0] == answers[1]


def test_a_name_that_is_no_policy() -> None:
    assert DEFAULT_SELECTOR in SELECTORS
    with pytest.raises(UsageError, match=r"'best' .* bounds, .*recent"):
        make_selector("best")
    with pytest.raises(ValueError, match="at least 0 and 1"):
        make_selector("recent", recent=0)


def test_what_a_policy_needs_is_asked_for() -> None:
    for name in SELECTORS:
        selector = make_selector(name)
        if selector.needs_abstracts:
            with pytest.raises(ValueError, match="layer 7 has no abstracts"):
                selector.choose(LayerView(7, 30), query_of(), SCALE, 10)
        elif name != "oracle":
            assert len(selector.choose(LayerView(7, 30), query_of(), SCALE, 10)) == 10
    with pytest.raises(ValueError, match="true attention"):
        make_selector("oracle").choose(LayerView(7, 30), query_of(), SCALE, 10)


# needles


@pytest.mark.parametrize("name", ["bounds", "landmarks", "blend", "oracle"])
@pytest.mark.parametrize("depth", [3, 20, 50, 90, 115])
def test_a_key_that_matches_is_found_at_every_depth(name: str, depth: int) -> None:
    """One key among 1920 is what one head asks for; the window of the last chunks never sees it."""
    keys, query = keys_of(120), query_of()
    keys[1, depth * CHUNK + 5] = 6 * query[2] / query[2].norm() * DIM**0.5
    layer = view(keys)
    assert depth in make_selector(name).choose(layer, query, SCALE, 8)
    assert depth not in make_selector("recent").choose(layer, query, SCALE, 4)


def test_a_key_among_others_that_differ_is_seen_by_bounds_alone() -> None:
    """Its neighbours cancel it in the mean."""
    keys, query = keys_of(120), query_of()
    needle = 4 * query[2] / query[2].norm() * DIM**0.5
    keys[1, 40 * CHUNK + 5], keys[1, 40 * CHUNK + 6] = needle, -1.5 * needle
    layer = view(keys)
    assert 40 in make_selector("bounds").choose(layer, query, SCALE, 6)
    assert 40 not in make_selector("landmarks").choose(layer, query, SCALE, 6)


def test_one_head_that_knows_outweighs_those_that_do_not_care() -> None:
    """Heads are normalised before they are added up: indifferent ones with large scores do not drown one needle."""
    keys = keys_of(120)
    keys[0] += 40.0  # every chunk scores high for the heads of kv head 0, none more than another
    query = query_of()
    query[:2] = 1.0 + 0.01 * query[:2]
    keys[1, 60 * CHUNK] = 6 * query[3] / query[3].norm() * DIM**0.5
    assert 60 in make_selector("bounds").choose(view(keys), query, SCALE, 5)


def test_an_older_chunk_without_abstract_is_wanted() -> None:
    layer = view(keys_of(40), summarised=30)
    for name in ("bounds", "landmarks", "blend"):
        assert set(range(30, 40)) <= set(make_selector(name).choose(layer, query_of(), SCALE, 16))


def test_knowing_more_keeps_more_of_the_attention() -> None:
    """On skewed attention: the oracle keeps most, bounds and the others far more than the window alone."""
    kept: dict[str, float] = dict.fromkeys(SELECTORS, 0.0)
    for seed in range(8):
        keys = keys_of(128, seed, topics=True)
        query = query_of(seed) + keys[:, 700 + 97 * seed].repeat_interleave(HEADS // KV, dim=0)
        layer = view(keys)
        assert layer.mass is not None
        mass = layer.mass(query, SCALE)
        for name in SELECTORS:
            selector = make_selector(name)
            selector.prompt_ended(layer, layer.mass(query + 0.3 * query_of(seed + 50), SCALE))
            kept[name] += float(mass[:, selector.choose(layer, query, SCALE, 24)].sum()) / HEADS / 8
    assert all(kept["oracle"] >= kept[name] - 1e-5 for name in SELECTORS)
    assert min(kept[name] for name in ("bounds", "landmarks", "blend")) > 0.9 * kept["oracle"]
    assert kept["recent"] < 0.5 * kept["oracle"]


# coarse to fine


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    chunks=st.integers(1, 1500),
    count=st.integers(0, 200),
    first=st.integers(0, 3),
    recent=st.integers(1, 300),
    topics=st.booleans(),
)
def test_coarse_to_fine_finds_what_scoring_all_finds(
    seed: int, chunks: int, count: int, first: int, recent: int, topics: bool
) -> None:
    g = torch.Generator().manual_seed(seed)
    # (what there is to be found does not hang on how many tokens a chunk has)
    keys = torch.randn(KV, chunks, 2, DIM, generator=g)
    if topics:
        subjects = 3 * torch.randn(KV, chunks // 16 + 1, 1, DIM, generator=g)
        keys = 0.2 * keys + subjects.repeat_interleave(16, dim=1)[:, :chunks]
    query = torch.randn(HEADS, DIM, generator=g) + (
        keys[:, chunks // 2, 0].repeat_interleave(2, dim=0) if topics else 0
    )
    a = Abstracts(KV, DIM)
    a.set_many(0, keys)
    last = chunks - recent
    fine = Search(a, query, SCALE).best(count, first, last, plain=False).tolist()
    plain = Search(a, query, SCALE).best(count, first, last, plain=True).tolist()
    assert len(fine) == len(plain) == min(count, max(last - first, 0))
    if set(fine) != set(plain):  # only where rounding decides between equals
        scores = Search(a, query, SCALE).all()
        torch.testing.assert_close(scores[fine], scores[plain], rtol=1e-5, atol=1e-5)
        assert len(set(fine) ^ set(plain)) == 2


def test_coarse_to_fine_passes_over_no_group_that_holds_one_of_the_best() -> None:
    """Many searches that do pass over most groups, the best chunks being spread over several of these."""
    passed_over = 0
    for seed in range(40):
        g = torch.Generator().manual_seed(seed)
        subjects = torch.randn(KV, 64, 1, DIM, generator=g)
        keys = 0.1 * torch.randn(KV, 1024, 2, DIM, generator=g) + subjects.repeat_interleave(16, dim=1)
        query = 2 * torch.randn(HEADS, DIM, generator=g)
        a = Abstracts(KV, DIM)
        a.set_many(0, keys)
        fine, plain = Search(a, query, SCALE), Search(a, query, SCALE)
        for count in (5, 40, 100):
            found = fine.best(count, 1, 1022, plain=False).tolist()
            assert set(found) == set(plain.best(count, 1, 1022, plain=True).tolist())
        passed_over += not fine.told_little
    assert passed_over >= 20


def test_coarse_to_fine_looks_at_few_where_neighbours_are_alike() -> None:
    keys = keys_of(2048, topics=True)
    query = 2 * keys[:, 700 * CHUNK].repeat_interleave(HEADS // KV, dim=0)
    a = view(keys).abstracts
    assert a is not None
    search = Search(a, query, SCALE)
    found = search.best(12, 1, 2046, plain=False)
    assert set(found.tolist()) <= set(range(688, 704))
    assert search.looked_at < 2048 / 4 and not search.told_little
    everything = Search(a, query, SCALE)
    everything.best(12, 1, 2046, plain=True)
    assert everything.looked_at > 2048


def test_a_layer_whose_groups_tell_little_is_seldom_searched_in_vain() -> None:
    keys = keys_of(1024)
    layer = view(keys)
    selector = Bounds()
    taken = []
    for i in range(70):
        before = selector.looked_at
        selector.choose(layer, query_of(i), SCALE, 100)
        taken.append(selector.looked_at - before)
    plain = min(taken)
    assert sum(t > plain for t in taken) <= 8  # after 1, 2, 4, … searches


def test_bounds_are_the_same_whether_or_not_it_searched_in_vain_before() -> None:
    keys = keys_of(1024, topics=True)
    layer, selector = view(keys), Bounds()
    for i in range(12):
        query = query_of(i) + (keys[:, 90 * i].repeat_interleave(HEADS // KV, dim=0) if i % 3 else 0)
        assert selector.choose(layer, query, SCALE, 40) == Bounds().choose(layer, query, SCALE, 40)


def test_of_equals_the_newest() -> None:
    assert top(torch.tensor([1.0, 3.0, 1.0, 3.0, 1.0]), 4).tolist() == [3, 1, 4, 2]


# the papers' own small cases


def test_h2o_keeps_what_had_most_attention_so_far() -> None:
    selector, layer = HeavyHitters(sinks=0, recent=1), LayerView(0, 6)
    selector.prompt_ended(layer, torch.tensor([[0.0, 0.5, 0.0, 0.3, 0.2, 0.0], [0.0, 0.1, 0.6, 0.3, 0.0, 0.0]]))
    assert selector.choose(layer, query_of(), SCALE, 3) == [2, 3, 5]  # sums 0.6, 0.6, 0.6 … of equals the newest
    selector.attended(layer, [2, 3, 5], torch.tensor([[0.1, 0.0, 0.9], [0.0, 0.0, 1.0]]))
    assert selector.choose(layer, query_of(), SCALE, 2) == [2, 5]
    # a new chunk: the one that was recent keeps what it had; what was passed over is not lost
    grown = LayerView(0, 7)
    assert selector.choose(grown, query_of(), SCALE, 3) == [2, 5, 6]
    selector.attended(grown, [1, 6], torch.tensor([[5.0, 0.0], [0.0, 0.0]]))
    assert selector.choose(grown, query_of(), SCALE, 2) == [1, 6]
    # other layers have sums of their own, and cut-off chunks none
    assert selector.choose(LayerView(1, 7), query_of(), SCALE, 2) == [5, 6]
    selector.truncated(grown, 2)
    assert selector.choose(grown, query_of(), SCALE, 3) == [1, 5, 6]
    selector.forget()
    assert selector.choose(grown, query_of(), SCALE, 2) == [5, 6]


def test_snapkv_keeps_what_the_prompts_end_looked_at() -> None:
    selector, layer = PromptWindow(sinks=1, recent=1), LayerView(0, 10)
    votes = torch.zeros(2, 10)
    votes[0, 3], votes[1, 6], votes[0, 7] = 0.6, 0.3, 0.2
    selector.prompt_ended(layer, votes)
    # just after the prompt all of the budget is the prompt's
    assert selector.choose(layer, query_of(), SCALE, 4) == [0, 3, 6, 9]
    # what is attended to later changes nothing
    selector.attended(layer, [8], torch.full((2, 1), 9.0))
    assert selector.choose(layer, query_of(), SCALE, 4) == [0, 3, 6, 9]
    # chunks come: the newest of them get up to half
    assert selector.choose(LayerView(0, 12), query_of(), SCALE, 4) == [0, 3, 10, 11]
    assert selector.choose(LayerView(0, 20), query_of(), SCALE, 6) == [0, 3, 6, 17, 18, 19]
    # a prompt smaller than its half leaves the rest to what is new
    short = PromptWindow(sinks=1, recent=1)
    short.prompt_ended(LayerView(0, 2), torch.ones(2, 2))
    assert short.choose(LayerView(0, 20), query_of(), SCALE, 8) == [0, 1, 14, 15, 16, 17, 18, 19]
    # the next prompt's end replaces the votes
    selector.prompt_ended(LayerView(0, 20), torch.eye(20)[[12, 14]])
    assert selector.choose(LayerView(0, 20), query_of(), SCALE, 4) == [0, 12, 14, 19]
    selector.truncated(LayerView(0, 13), 13)
    assert selector.choose(LayerView(0, 13), query_of(), SCALE, 3) == [0, 11, 12]


def test_recent_is_sinks_and_window() -> None:
    assert make_selector("recent", 2, 1).choose(LayerView(0, 50), query_of(), SCALE, 6) == [0, 1, 46, 47, 48, 49]


# chunk sizes and budgets from skew


def attention(chunks: int, on: Sequence[int], heads: int = 1) -> Tensor:
    """[heads, chunks]: nearly all attention on these chunks, the rest even."""
    mass = torch.full((heads, chunks), 1e-6)
    mass[:, list(on)] = 1.0
    return mass / mass.sum(1, keepdim=True)


def test_peaked_attention_gets_single_chunks_and_spread_attention_groups() -> None:
    apart = range(3, 250, 5)  # 50 places: a budget of 64 chunks holds them one by one only
    assert grain(attention(256, apart), 64, 1, 254) == 1
    assert grain(torch.ones(2, 256), 64, 1, 254) == 8
    # runs of 4 chunks, wherever they begin
    runs = [c for begin in range(8, 248, 16) for c in range(begin, begin + 4)]
    assert grain(attention(256, runs), 64, 1, 254) == 4
    assert grain(attention(256, range(64, 96)), 64, 1, 254) == 8
    # one head among others that looks at single places is enough
    mixed = torch.cat((attention(256, runs, heads=7), attention(256, apart)))
    assert grain(mixed, 128, 1, 254) == 1 < grain(mixed[:7], 128, 1, 254)
    # less is asked for
    assert grain(attention(256, apart), 64, 1, 254, keep=0.2) == 8
    assert grain(attention(256, range(64, 96)), 64, 1, 254, grains=(1, 2)) == 2


def test_what_is_always_chosen_proves_nothing() -> None:
    """The first and the last chunks may have nearly all of the attention: it matters which others come all the same."""
    mass = attention(256, range(3, 250, 5)) * 0.005
    mass[0, 0], mass[0, 255] = 0.5, 0.495
    assert grain(mass, 64, 1, 254) == 1
    runs = attention(256, range(64, 96)) * 0.005
    runs[0, 0], runs[0, 255] = 0.5, 0.495
    assert grain(runs, 64, 1, 254) == 8


def test_no_grain_of_which_the_budget_buys_few_groups() -> None:
    together = attention(256, [100, 101])
    assert grain(together, 3 + 2 * LEAST_GROUPS, 1, 254) == 2
    assert grain(together, 3 + 2 * LEAST_GROUPS - 1, 1, 254) == 1
    assert grain(together, 4, 1, 254) == grain(together, 2, 1, 254) == grain(together, 0, 1, 254) == 1
    assert grain(torch.ones(1, 2), 2, 1, 0) == 1
    with pytest.raises(ValueError, match=r"need \[heads, chunks\]"):
        grain(torch.ones(2, 0), 8, 1, 0)


@pytest.mark.parametrize("name", ["bounds", "landmarks", "blend"])
@settings(max_examples=60, deadline=None)
@given(
    chunks=st.integers(1, 60),
    budget=st.integers(0, 60),
    size=st.sampled_from([2, 4, 8]),
    sinks=st.integers(0, 3),
    recent=st.integers(1, 3),
)
def test_groups_are_chosen_whole_and_within_the_budget(
    name: str, chunks: int, budget: int, size: int, sinks: int, recent: int
) -> None:
    layer = view(keys_of(chunks), summarised=max(chunks - 1, 0))  # the chunk being filled has no abstract yet
    layer.grain = size
    chosen = make_selector(name, sinks, recent).choose(layer, query_of(), SCALE, budget)
    always = {*range(min(sinks, chunks)), *range(max(chunks - recent, 0), chunks)}
    assert chosen == sorted(set(chosen)) and always <= set(chosen) <= set(range(chunks))
    assert len(chosen) == min(max(budget, len(always)), chunks)
    # whole groups, and what is left of the budget in less than as many smaller ones
    free, picked = set(range(chunks)) - always, set(chosen) - always
    parts = [{c for c in free if c // size == g} for g in range(chunks)]
    broken = [p & picked for p in parts if p & picked and p - picked]
    assert len(broken) <= max(size.bit_length() - 1, 0) + 2
    assert sum(map(len, broken)) < 3 * size


@pytest.mark.parametrize("name", ["bounds", "landmarks", "blend"])
def test_groups_are_those_with_the_best_chunks(name: str) -> None:
    keys, query = keys_of(120), query_of()
    for depth in (21, 22, 90):
        keys[1, depth * CHUNK : (depth + 1) * CHUNK] = 3 * query[2] / query[2].norm() * DIM**0.5
    layer = view(keys)
    layer.grain = 4
    assert make_selector(name).choose(layer, query, SCALE, 11) == [0, 20, 21, 22, 23, 88, 89, 90, 91, 118, 119]
    layer.grain = 2
    assert {20, 21, 22, 23, 90, 91} <= set(make_selector(name).choose(layer, query, SCALE, 10))


def test_groups_hold_the_most_that_whole_groups_can() -> None:
    scores = torch.rand(23, generator=torch.Generator().manual_seed(5))
    got = groups(scores, 4, 9, 2, 20).tolist()  # of 2-3, 4-7, 8-11, 12-15, 16-19
    parts = [range(2, 4), *(range(a, a + 4) for a in (4, 8, 12, 16))]
    best = max(itertools.combinations(parts, 2), key=lambda two: sum(float(scores[c]) for p in two for c in p))
    whole = sorted(c for p in best for c in p)
    assert sorted(got[: len(whole)]) == whole
    assert len(got) == len(set(got)) == 9
    assert got[8] == max(set(range(2, 20)) - set(whole), key=lambda c: float(scores[c]))
    # one more makes a pair
    pair = groups(scores, 4, 10, 2, 20).tolist()[8:]
    assert pair[0] % 2 == 0 and pair[1] == pair[0] + 1 and not set(pair) & set(whole)
    assert groups(scores, 4, 9, 5, 5).tolist() == []
    assert sorted(groups(scores, 8, 99, 3, 7).tolist()) == [3, 4, 5, 6]


@settings(max_examples=80, deadline=None)
@given(
    masses=st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=5), min_size=1, max_size=4),
    total=st.integers(0, 16),
    least=st.integers(0, 2),
)
def test_layer_budgets_lose_least(masses: list[list[int]], total: int, least: int) -> None:
    given_ = layer_budgets(masses, total, least)
    floor = [min(least, len(m)) for m in masses]
    assert all(f <= g <= len(m) for f, g, m in zip(floor, given_, masses, strict=True))
    assert sum(given_) == min(max(total, sum(floor)), sum(map(len, masses)))

    def held(budgets: tuple[int, ...]) -> int:
        return sum(sum(sorted(m, reverse=True)[:b]) for m, b in zip(masses, budgets, strict=True))

    choices = itertools.product(*(range(f, len(m) + 1) for f, m in zip(floor, masses, strict=True)))
    assert held(tuple(given_)) == max(held(c) for c in choices if sum(c) == sum(given_))


def test_layer_budgets_take_tensors() -> None:
    assert layer_budgets([torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.05, 0.05])], 3) == [2, 1]


# ahead


def test_ahead_foresees_what_was_chosen_last_and_knows_how_often_that_is_right() -> None:
    ahead = Ahead(fade=1.0)
    assert ahead.foresee(0) == [] and ahead.recall is None
    ahead.noted(0, [0, 4, 5, 9], always=2)
    assert ahead.recall is None and sorted(ahead.foresee(0)) == [0, 4, 5, 9]
    ahead.noted(0, [0, 4, 7, 9], always=2)  # of 4 and 7 it knew 4
    assert ahead.recall == ahead.recall_of(0) == 0.5
    assert ahead.foresee(0)[:3] == [9, 4, 0] and 5 not in ahead.foresee(0)
    assert ahead.foresee(0, most=2) == [9, 4]
    ahead.noted(1, [1, 2])
    ahead.noted(1, [1, 2])
    assert ahead.recall_of(1) == 1.0 and ahead.recall == 0.75
    ahead.truncated(0, 5)
    assert sorted(ahead.foresee(0)) == [0, 4]
    ahead.forget()
    assert ahead.foresee(0) == [] and ahead.recall == 0.75


def test_aheads_recall_follows_what_happens_lately() -> None:
    ahead = Ahead()
    for i in range(100):
        ahead.noted(0, [i])
    assert ahead.recall == 0.0
    for _ in range(100):
        ahead.noted(0, [3, 4])
    assert ahead.recall is not None and ahead.recall > 0.95

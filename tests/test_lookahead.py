"""Experts fetched ahead: what is foreseen, what is counted, and that being wrong costs little and changes nothing."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, build, save
from numpy.typing import NDArray

import offload
from moe import ExpertLookahead, GateAhead, LayerUse, Router
from offload import hf
from tiers import LRU, PAGE, Arena, Block, DirectReader, Residency, Segment, TransferQueue

LAYERS, EXPERTS, K = 3, 8, 2
MOE = [f for f in FAMILIES if any("expert" in name for name in FAMILIES[f])]


class Cache:
    """One page per expert in a file; `slots` of them in memory."""

    def __init__(self, path: Path, slots: int) -> None:
        path.write_bytes(bytes(LAYERS * EXPERTS * PAGE))
        self.keys = [[f"{n}.{e}" for e in range(EXPERTS)] for n in range(LAYERS)]
        self.queue = TransferQueue(DirectReader([path]), 2)
        self.residency = Residency(Arena(slots * PAGE), self.queue)
        self.residency.add_pool("experts", PAGE, slots, LRU())
        for n, layer in enumerate(self.keys):
            for e, key in enumerate(layer):
                segment = Segment(0, (n * EXPERTS + e) * PAGE, PAGE, 0, None, True)
                self.residency.add(Block(key, PAGE, PAGE, (segment,)), "experts")

    def use(self, layer: int, experts: list[int]) -> None:
        for e in experts:
            self.residency.acquire(self.keys[layer][e]).release()

    def arrive(self) -> None:
        """What is under way comes in."""
        for layer in self.keys:
            for key in layer:
                if self.residency.keep(key):
                    self.residency.acquire(key).release()


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    c = Cache(tmp_path / "data.bin", 12)
    yield c
    c.queue.close()


def router_of(choice: list[int]) -> Router:
    """Always says the same, the first the surest."""

    def ask(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = torch.full((len(hidden), EXPERTS), -9.0)
        for rank, e in enumerate(choice):
            logits[:, e] = -float(rank)
        return logits, torch.tensor([choice] * len(hidden))

    return ask


def lookahead(cache: Cache, foreseen: list[int], most: int = 8, **options: Any) -> ExpertLookahead:
    """Layer 1 is foreseen; the others have no router that can be asked."""
    options.setdefault("predictor", GateAhead([EXPERTS] * LAYERS))
    options.setdefault("busy", lambda: 0.0)
    return ExpertLookahead(cache.residency, cache.keys, [None, router_of(foreseen), None], most, **options)


def through(ahead: ExpertLookahead, cache: Cache, layer: int, experts: list[int]) -> None:
    """One layer, as `LayerExperts` goes through it, for one token."""
    index = torch.tensor([experts])
    assert torch.equal(ahead.routed(layer, torch.ones(1, 4), index, torch.full((1, len(experts)), 0.5)), index)
    ahead.needs(layer, experts)
    cache.use(layer, experts)
    ahead.look(layer)


def test_what_the_next_router_says_is_fetched_and_counted(cache: Cache) -> None:
    ahead = lookahead(cache, [1, 2])
    through(ahead, cache, 0, [0, 3])
    cache.arrive()
    assert cache.residency.resident("1.1")
    assert cache.residency.resident("1.2")
    ahead.needs(1, [2, 5])
    assert ahead.use[0] == LayerUse(needed=2, missed=2)
    assert ahead.use[1] == LayerUse(
        needed=2, ahead=1, missed=1, asked=2, predicted=2, right=1, named=1, fetched=2, wasted=1
    )
    assert ahead.use[1].recall == ahead.use[1].precision == 0.5
    through(ahead, cache, 1, [2, 5])  # the last layer has nobody to look to: its successor has no router
    assert ahead.use[2] == LayerUse()


def test_what_is_foreseen_and_there_is_not_given_up(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "data.bin", 3)
    cache.use(1, [4])
    cache.use(0, [0, 1])
    ahead = lookahead(cache, [4, 5])
    through(ahead, cache, 0, [0, 1])
    cache.arrive()
    assert cache.residency.resident("1.4"), "it was the oldest, and is needed next"
    assert cache.residency.resident("1.5")
    assert not cache.residency.resident("0.0")
    cache.queue.close()


def test_no_more_is_fetched_ahead_than_allowed(cache: Cache) -> None:
    ahead = lookahead(cache, [0, 1, 2, 3], most=2)
    through(ahead, cache, 0, [0])
    assert ahead.use[1].fetched == 2


def test_without_a_predictor_nothing_is_fetched(cache: Cache) -> None:
    ahead = lookahead(cache, [0, 1], predictor=None)
    for _ in range(3):
        through(ahead, cache, 0, [0])
        through(ahead, cache, 1, [0, 1])
    assert ahead.use[1] == LayerUse(needed=6, hit=4, missed=2)


def test_a_link_that_is_busy_is_not_used_for_guesses(tmp_path: Path) -> None:
    """Right in half of the cases: worth it on an idle link, not on a busy one."""

    def fetched(busy: float) -> int:
        cache = Cache(tmp_path / f"{busy}.bin", 6)
        rng = random.Random(2)
        said: list[int] = []
        ahead = ExpertLookahead(
            cache.residency, cache.keys, [None, lambda h: router_of(said)(h), None], 4,
            predictor=GateAhead([EXPERTS] * LAYERS), busy=lambda: busy,
        )  # fmt: skip
        for _ in range(200):
            first, second, third, fourth = rng.sample(range(EXPERTS), 4)
            said[:] = [first, second]
            through(ahead, cache, 0, rng.sample(range(EXPERTS), K))
            through(ahead, cache, 1, [first, third] if rng.random() < 0.5 else [fourth, second])
        cache.queue.close()
        return ahead.use[1].fetched

    assert 4 * fetched(1.0) < fetched(0.0)


def test_useless_predictions_come_to_nothing(tmp_path: Path) -> None:
    """The adversary: always foresees what is not needed. It is believed for as long as it takes to find out."""
    cache = Cache(tmp_path / "data.bin", 6)
    rng = random.Random(1)
    wrong: list[int] = []
    ahead = ExpertLookahead(
        cache.residency, cache.keys, [None, lambda h: router_of(wrong)(h), None], 4,
        predictor=GateAhead([EXPERTS] * LAYERS), busy=lambda: 0.0,
    )  # fmt: skip
    rounds = 1000
    for _ in range(rounds):
        right = rng.sample(range(EXPERTS), K)
        wrong[:] = rng.sample([e for e in range(EXPERTS) if e not in right], K)
        through(ahead, cache, 0, [0, 1])
        through(ahead, cache, 1, right)
    use = ahead.use[1]
    assert use.right == 0
    assert 0 < use.fetched < 0.05 * rounds * K
    cache.queue.close()


def test_what_comes_to_nothing_is_asked_seldom(cache: Cache) -> None:
    """Everything that is foreseen is there: nothing to fetch, and asking takes time."""
    asked = 0

    def router(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal asked
        asked += 1
        return router_of([0, 1])(hidden)

    ahead = ExpertLookahead(
        cache.residency, cache.keys, [None, router, None], 4, predictor=GateAhead([EXPERTS] * LAYERS)
    )
    for _ in range(200):
        through(ahead, cache, 0, [0, 1])
        through(ahead, cache, 1, [0, 1])
    assert 60 < asked < 90
    assert ahead.use[1].missed == 2


def test_useful_predictions_go_on(cache: Cache) -> None:
    rng = random.Random(1)
    coming: list[int] = []
    ahead = ExpertLookahead(
        cache.residency, cache.keys, [None, lambda h: router_of(coming)(h), None], 4,
        predictor=GateAhead([EXPERTS] * LAYERS),
    )  # fmt: skip
    for _ in range(300):
        coming[:] = rng.sample(range(EXPERTS), K)
        through(ahead, cache, 0, [0, 1])
        through(ahead, cache, 1, list(coming))
    assert ahead.use[1].missed <= 2 * K, "at first it is not trusted on a busy link"
    assert ahead.use[1].recall == 1.0
    assert ahead.use[1].needed == ahead.use[1].hit + ahead.use[1].ahead + ahead.use[1].late + ahead.use[1].missed


def test_policies_hear_the_whole_router(cache: Cache) -> None:
    heard: list[tuple[str, list[float]]] = []

    class Policy(LRU):
        def routed(self, keys: Sequence[str], probabilities: NDArray[np.floating]) -> None:
            heard.append((keys[0], probabilities.tolist()))

    ahead = lookahead(cache, [0], policies=[Policy()])
    ahead.heard(0, torch.tensor([[2.0, 1.0, *[0.0] * (EXPERTS - 2)]]))
    through(ahead, cache, 0, [0])
    through(ahead, cache, 2, [3, 4])
    (first, p), (third, q) = heard
    assert (first, third) == ("0.0", "2.0")
    assert sum(p) == pytest.approx(1.0) and p[0] > p[1] > p[2] == p[3] > 0
    assert q == [0, 0, 0, 0.5, 0.5, 0, 0, 0], "of a router that was not heard, the weights of its choice"


@pytest.mark.parametrize("family", MOE)
def test_a_router_asked_apart_says_what_it_says_in_its_block(family: str) -> None:
    model = build(family)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    heard: dict[str, torch.Tensor] = {}
    asked = 0
    for name, layer in hf.decoder_layers(model):
        for sub, experts in hf.experts_modules(layer):
            hf.hear_router(layer, sub, functools.partial(heard.__setitem__, name))
            router = hf.router_of(layer, sub)
            if router is None:
                continue
            asked += 1

            class Noted:
                def forward(
                    self, m: object, hidden: torch.Tensor, index: torch.Tensor, w: torch.Tensor, key: str = name
                ) -> torch.Tensor:
                    seen[key] = hidden, index
                    return torch.zeros_like(hidden)

            hf.attach_experts(experts, Noted())
            experts.config._experts_implementation = hf.EXPERTS
    assert asked or family == "minimax_m2", "this one's router needs more than the hidden states"
    with torch.inference_mode():
        model(torch.arange(5, 12)[None])
        for name, layer in hf.decoder_layers(model):
            if name in seen:
                ((sub, _),) = hf.experts_modules(layer)
                router = hf.router_of(layer, sub)
                assert router is not None
                hidden, index = seen[name]
                logits, choice = router(hidden)
                assert torch.equal(choice.sort(-1).values, index.sort(-1).values)
                assert torch.equal(logits, heard[name])
    assert len(seen) == asked
    assert heard, "every family's router can be heard"


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_tokens_do_not_change_and_fewer_are_waited_for(tmp_path: Path, device: str) -> None:
    oracle = save(build("qwen3_moe", num_hidden_layers=6), tmp_path)
    prompt = torch.randint(4, 160, (1, 9), generator=torch.Generator().manual_seed(3))
    want = oracle.generate(prompt, max_new_tokens=16, do_sample=False)[0, 9:].tolist()
    # whole layers stay, whatever this machine's speeds: a router that comes and goes with its layer is not asked
    options = {"device": device, "resident": "85%", "context": 64, "overrides": {"resident_layers": 6}}
    if device == "emulated":
        options["vram"] = "8MiB"
    with offload.load(tmp_path, **options) as model:
        assert model.engine.experts.lookahead is not None
        result = model.run([prompt[0].tolist()], max_new_tokens=16, ignore_eos=True)
        assert result.token_ids[0] == want[: len(result.token_ids[0])]
        use = result.stats.experts_use
        assert use is not None
        assert use.needed == use.hit + use.ahead + use.late + use.missed + use.cpu
        assert use.predicted > 0
    first = result.stats.experts_by_layer[0]
    assert first.ahead == first.late == 0, "nobody looks ahead to the first layer"

"""Experts fetched ahead: what is foreseen, what is counted, and that being wrong costs little and changes nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import FAMILIES, build, save

import offload
from moe import ExpertLookahead, LayerUse
from moe import lookahead as module
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


def gate_of(choice: list[int]) -> module.Gate:
    return lambda hidden: torch.tensor([choice])


def test_what_the_next_router_says_is_fetched_and_counted(cache: Cache) -> None:
    ahead = ExpertLookahead(cache.residency, cache.keys, [None, gate_of([1, 2]), None], most=8)
    ahead.needs(0, [0, 3])
    cache.use(0, [0, 3])
    ahead.look(0, torch.zeros(1, 4))
    cache.arrive()
    assert cache.residency.resident("1.1")
    assert cache.residency.resident("1.2")
    ahead.needs(1, [2, 5])
    assert ahead.use[0] == LayerUse(needed=2, missed=2)
    assert ahead.use[1] == LayerUse(needed=2, ahead=1, missed=1, predicted=2, right=1, fetched=2, wasted=1)
    assert ahead.use[1].recall == ahead.use[1].precision == 0.5
    ahead.look(1, torch.zeros(1, 4))  # the last layer has nobody to look to: its successor has no gate
    assert ahead.use[2] == LayerUse()


def test_what_is_foreseen_and_there_is_not_given_up(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "data.bin", 3)
    cache.use(1, [4])
    cache.use(0, [0, 1])
    ahead = ExpertLookahead(cache.residency, cache.keys, [None, gate_of([4, 5]), None], most=8)
    ahead.look(0, torch.zeros(1, 4))
    cache.arrive()
    assert cache.residency.resident("1.4"), "it was the oldest, and is needed next"
    assert cache.residency.resident("1.5")
    assert not cache.residency.resident("0.0")
    cache.queue.close()


def test_no_more_is_fetched_ahead_than_allowed(cache: Cache) -> None:
    ahead = ExpertLookahead(cache.residency, cache.keys, [None, gate_of([0, 1, 2, 3]), None], most=2)
    ahead.look(0, torch.zeros(1, 4))
    assert ahead.use[1].fetched == 2


def test_useless_predictions_are_given_up_for_a_while(tmp_path: Path) -> None:
    """The adversary: always foresees what is not needed."""
    cache = Cache(tmp_path / "data.bin", 6)
    rng = random.Random(1)
    wrong: list[int] = []
    ahead = ExpertLookahead(cache.residency, cache.keys, [None, lambda h: torch.tensor([wrong]), None], most=4)
    rounds = 3000
    for _ in range(rounds):
        right = rng.sample(range(EXPERTS), K)
        wrong[:] = rng.sample([e for e in range(EXPERTS) if e not in right], K)
        ahead.needs(0, [0, 1])
        cache.use(0, [0, 1])
        ahead.look(0, torch.zeros(1, 4))
        ahead.needs(1, right)
        cache.use(1, right)
    use = ahead.use[1]
    assert use.right == 0
    assert use.fetched <= rounds * K * (module._JUDGED / (module._JUDGED + module._PAUSE))
    assert use.fetched > module._JUDGED, "after a pause it is tried again"
    cache.queue.close()


def test_useful_predictions_go_on(cache: Cache) -> None:
    rng = random.Random(1)
    coming: list[int] = []
    ahead = ExpertLookahead(cache.residency, cache.keys, [None, lambda h: torch.tensor([coming]), None], most=4)
    for _ in range(300):
        coming[:] = rng.sample(range(EXPERTS), K)
        ahead.needs(0, [0, 1])
        cache.use(0, [0, 1])
        ahead.look(0, torch.zeros(1, 4))
        ahead.needs(1, coming)
        cache.use(1, coming)
    assert ahead.use[1].missed == 0
    assert ahead.use[1].recall == 1.0
    assert ahead.use[1].needed == ahead.use[1].hit + ahead.use[1].ahead + ahead.use[1].late


@pytest.mark.parametrize("family", MOE)
def test_a_router_asked_apart_says_what_it_says_in_its_block(family: str) -> None:
    model = build(family)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    asked = 0
    for name, layer in hf.decoder_layers(model):
        for sub, experts in hf.experts_modules(layer):
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
                assert torch.equal(router(hidden).sort(-1).values, index.sort(-1).values)
    assert len(seen) == asked


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_tokens_do_not_change_and_fewer_are_waited_for(tmp_path: Path, device: str) -> None:
    oracle = save(build("qwen3_moe", num_hidden_layers=6), tmp_path)
    prompt = torch.randint(4, 160, (1, 9), generator=torch.Generator().manual_seed(3))
    want = oracle.generate(prompt, max_new_tokens=16, do_sample=False)[0, 9:].tolist()
    options = {"device": device, "resident": "85%", "context": 64}
    if device == "emulated":
        options["vram"] = "8MiB"
    with offload.load(tmp_path, **options) as model:
        assert model.engine.experts is not None
        result = model.run([prompt[0].tolist()], max_new_tokens=16, ignore_eos=True)
        assert result.token_ids[0] == want[: len(result.token_ids[0])]
        use = result.stats.experts_use
        assert use is not None
        assert use.needed == use.hit + use.ahead + use.late + use.missed
        assert use.predicted > 0
    first = result.stats.experts_by_layer[0]
    assert first.ahead == first.late == 0, "nobody looks ahead to the first layer"

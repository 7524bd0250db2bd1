"""Ragged passes: whatever shares a row with a sequence, and wherever its keys and values lie, it says the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from families import FAMILIES, VOCAB, build, save
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kv_parity import RECURRENT, close
from transformers import PreTrainedModel

import offload
from kvstore import RaggedCache, TieredCache
from offload import Interrupted, Model
from offload.engine import Engine

NEW = 6
LENGTHS = (70, 21, 5, 33)
FEW = ["mistral", "gpt_oss", "deepseek_v3"]  # windows, sinks, latents


@dataclass
class Case:
    family: str
    folder: Path
    oracle: PreTrainedModel
    model: Model
    prompts: list[list[int]]
    alone: list[list[int]]  # what the oracle says to each prompt


@pytest.fixture(scope="module", params=[f for f in FAMILIES if f not in RECURRENT])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp(request.param)
    oracle = save(build(request.param), folder)
    g = torch.Generator().manual_seed(3)
    prompts = [torch.randint(4, VOCAB, (n,), generator=g).tolist() for n in LENGTHS]
    with offload.load(folder, context=240) as model:
        yield Case(request.param, folder, oracle, model, prompts, [alone(oracle, p) for p in prompts])


def alone(oracle: PreTrainedModel, prompt: Sequence[int], new: int = NEW) -> list[int]:
    """Greedy tokens of one sequence; no token ends it."""
    ids = torch.tensor([list(prompt)])
    out: list[int] = oracle.generate(
        ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, attention_mask=torch.ones_like(ids),
        eos_token_id=None,
    )[0, len(prompt) :].tolist()  # fmt: skip
    return out


class Lane:
    """A sequence fed in pieces of `piece` tokens, from pass number `start` on."""

    def __init__(self, cache: TieredCache, prompt: Sequence[int], piece: int, start: int = 0) -> None:
        self.cache, self.left, self.piece, self.start = cache, list(prompt), piece, start
        self.out: list[int] = []


def run(engine: Engine, cache: RaggedCache, lanes: Sequence[Lane], new: int = NEW) -> None:
    """All lanes to their end, whoever has something to say in one pass."""
    number = 0
    while any(len(lane.out) < new for lane in lanes):
        parts, wanted, who = [], [], []
        for lane in lanes:
            if number < lane.start or len(lane.out) >= new:
                continue
            part, lane.left = lane.left[: lane.piece], lane.left[lane.piece :]
            parts.append((lane.cache, part))
            if not lane.left:
                wanted.append(len(parts) - 1)
                who.append(lane)
        logits = engine.advance(cache, parts, wanted or [0])
        for lane, row in zip(who, logits, strict=False):
            lane.out.append(int(row.argmax()))
            lane.left = [lane.out[-1]]
        number += 1


def test_each_says_what_it_says_alone(case: Case) -> None:
    """Prompts in pieces of any length, beside others that decode; sequences join later and leave earlier."""
    engine = case.model.engine
    with engine.kv.ragged(4, 64) as cache:
        lanes = [
            Lane(cache.new_sequence(), p, piece, i)
            for i, (p, piece) in enumerate(zip(case.prompts, (20, 7, 5, 16), strict=True))
        ]
        run(engine, cache, lanes)
        assert [lane.out for lane in lanes] == case.alone
    # the model is as it was
    assert case.model.run(case.prompts[:1], max_new_tokens=NEW, ignore_eos=True).token_ids == case.alone[:1]


@pytest.mark.parametrize("case", FEW, indirect=True)
def test_in_the_least_memory(case: Case) -> None:
    """All but a chunk for each sequence and layer, and a ring, lies on disk."""
    with offload.load(case.folder, context=240, kv_resident=1, overrides={"kv_chunk": 16}) as model:
        with model.engine.kv.ragged(4, 64) as cache:
            lanes = [Lane(cache.new_sequence(), p, 24) for p in case.prompts]
            run(model.engine, cache, lanes)
            assert cache.store is not None
            assert not cache.store.holds_all
        assert [lane.out for lane in lanes] == case.alone
        assert sum(s.kv_bytes_read for s in model.engine.steps) > 0
        assert model.engine.kv._disk is not None
        assert model.engine.kv._disk.file.used == 0, "whatever was on disk has been given back"


@pytest.mark.parametrize("case", FEW, indirect=True)
def test_forks_share_until_they_differ(case: Case) -> None:
    """A shared front of any length, within a chunk or at its end, is computed once."""
    engine = case.model.engine
    shared = case.prompts[0]
    tails = [[5, 6, 7], [9], [11, 12]]
    with engine.kv.ragged(4, 96) as cache:
        trunk = cache.new_sequence()
        engine.advance(cache, [(trunk, shared)], [0])
        for length in (70, 64, 33):
            lanes = [Lane(cache.fork(trunk, length), tail, 2) for tail in tails]
            before = len(engine.steps)
            run(engine, cache, lanes, 3)
            assert sum(s.tokens for s in engine.steps[before:]) < length, "the front was not computed again"
            assert [lane.out for lane in lanes] == [alone(case.oracle, shared[:length] + t, 3) for t in tails]
            for lane in lanes:
                lane.cache.close()
        assert trunk.get_seq_length() == 70
        trunk.close()
        assert cache.store is not None
        assert cache.store.held == 0


@pytest.mark.parametrize("case", ["mistral"], indirect=True)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_mixture(case: Case, data: st.DataObject) -> None:
    """Logits of any mixture of pieces and decodes are those of the whole sequence."""
    engine = case.model.engine
    texts = [p + a for p, a in zip(case.prompts, case.alone, strict=True)]
    with torch.inference_mode():
        want = [case.oracle(torch.tensor([t])).logits[0] for t in texts]
    with engine.kv.ragged(4, 80) as cache:
        sequences = [cache.new_sequence() for _ in texts]
        done = [0] * len(texts)
        while any(d < len(t) for d, t in zip(done, texts, strict=True)):
            left = [i for i, t in enumerate(texts) if done[i] < len(t)]
            chosen = data.draw(st.lists(st.sampled_from(left), min_size=1, unique=True))
            parts = []
            for i in chosen:
                n = data.draw(st.sampled_from([1, 1, 2, 15, 16, 40]))
                parts.append((sequences[i], texts[i][done[i] : done[i] + n]))
                done[i] = min(done[i] + n, len(texts[i]))
            logits = engine.advance(cache, parts, list(range(len(parts))))
            for i, row in zip(chosen, logits, strict=True):
                close(row, want[i][done[i] - 1])


@pytest.mark.parametrize("case", ["mistral"], indirect=True)
def test_an_interrupted_pass_leaves_the_others_usable(case: Case) -> None:
    engine = case.model.engine
    with engine.kv.ragged(4, 64) as cache:
        broken = cache.new_sequence()
        engine.interrupt.set()
        try:
            with pytest.raises(Interrupted):
                engine.advance(cache, [(broken, case.prompts[0])], [0])
        finally:
            engine.interrupt.clear()
        broken.close()
        lane = Lane(cache.new_sequence(), case.prompts[1], 8)
        run(engine, cache, [lane])
        assert lane.out == case.alone[1]


@pytest.mark.parametrize("family", sorted(RECURRENT))
def test_who_keeps_states_is_told_apart(family: str, tmp_path: Path) -> None:
    save(build(family), tmp_path)
    with offload.load(tmp_path, context=64) as model:
        assert not model.engine.kv.takes_ragged

"""Where keys and values lie never changes what the model says: every family, in as little KV memory as there may be."""

from __future__ import annotations

import copy
import errno
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, TEMPLATE, VOCAB, build, save, tokenizer
from test_parity import BF16_ULPS
from transformers import DynamicCache, PreTrainedModel

import offload
from kvstore import TieredCache, rollback
from offload import Interrupted, Model, ModelError, OffloadError, hf
from offload.engine import Engine
from offload.model import Conversation

NEW = 6
PROMPT = 70  # tokens: several chunks of 16, windows of 12 far behind
# keep a state that is no list of tokens: nothing can be taken back, or be shared
RECURRENT = {"qwen3_next", "lfm2", "jamba"}
CROPPABLE = [f for f in FAMILIES if f not in RECURRENT]
CHUNKABLE = [f for f in FAMILIES if f not in hf.NO_CHUNKED_PREFILL]  # the others' states come out wrong in pieces
ATTENTIONS = ["mistral", "gpt_oss", "deepseek_v3"]  # some of each kind
MISTRAL = ["mistral"]  # where it is the same for all


def of(families: list[str]) -> pytest.MarkDecorator:
    """These families only."""
    return pytest.mark.parametrize("case", families, indirect=True)


@dataclass
class Case:
    family: str
    folder: Path
    oracle: PreTrainedModel
    prompts: list[list[int]]
    model: Model
    greedy: list[int]  # what the oracle says to the first prompt

    @property
    def ids(self) -> torch.Tensor:
        return torch.tensor(self.prompts[:1])


def load(folder: Path, **options: Any) -> Model:
    overrides = {"kv_chunk": 16, **options.pop("overrides", {})}
    return offload.load(folder, kv_resident=1, overrides=overrides, context=240, **options)


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """One load for all checks of a family."""
    folder = tmp_path_factory.mktemp(request.param)
    oracle = save(build(request.param), folder)
    tokenizer().save_pretrained(folder)
    with load(folder) as model:
        case = Case(request.param, folder, oracle, [], model, [])
        seed = 3
        while len(case.greedy) < NEW or 2 in case.greedy:  # one that ends at once tells little
            g = torch.Generator().manual_seed(seed)
            case.prompts = [torch.randint(4, VOCAB, (n,), generator=g).tolist() for n in (PROMPT, 21)]
            case.greedy = oracle_new(case, case.ids)[0]
            seed += 1
        yield case
        assert spilled(model.engine) == 0, "whoever was given a cache by `run` gave it back"


def spilled(engine: Engine) -> int:
    assert engine.kv._disk is not None
    return engine.kv._disk.file.used


def oracle_new(case: Case, ids: torch.Tensor, **options: Any) -> list[list[int]]:
    options = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids), **options}
    return case.oracle.generate(ids, **options)[:, ids.shape[1] :].tolist()


def oracle_logits(case: Case, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = case.oracle(ids).logits
    return logits


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_greedy_tokens(case: Case) -> None:
    result = case.model.run(case.prompts[:1], max_new_tokens=NEW)
    assert result.token_ids == [case.greedy]
    total = result.stats.total
    assert total.kv_bytes_written > 0
    assert total.kv_bytes_read > 0
    assert total.bytes_read >= total.kv_bytes_read
    assert any("--kv-resident 1 is raised" in note for note in result.notes)


def test_left_padded_batch(case: Case) -> None:
    width = max(map(len, case.prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in case.prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in case.prompts])
    want = oracle_new(case, ids, attention_mask=mask)
    got = case.model.run(case.prompts, max_new_tokens=NEW).token_ids
    assert [w[: len(g)] for w, g in zip(want, got, strict=True)] == got
    assert all(len(g) == NEW or g[-1] == 2 for g in got)


def test_beam_search(case: Case) -> None:
    want = oracle_new(case, case.ids, num_beams=3)
    got = case.model.run(case.prompts[:1], max_new_tokens=NEW, num_beams=3).token_ids
    assert [want[0][: len(got[0])]] == got


@of(CHUNKABLE)
def test_a_prompt_in_pieces(case: Case) -> None:
    """Pieces as long as a chunk, longer and shorter; and a padded batch whose second prompt begins in a later piece."""
    width = max(map(len, case.prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in case.prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in case.prompts])
    plan = case.model.engine.plan
    want = oracle_logits(case, case.ids)
    with load(case.folder, overrides={"prefill_chunk": 16}) as model:
        assert model.plan.prefill_chunk == 16 != plan.prefill_chunk
        cache = model.engine.new_cache(PROMPT)
        close(model.hf(input_ids=case.ids, past_key_values=cache).logits, want)
        assert len(model.engine.steps) == -(-PROMPT // 16)
        cache.close()
        assert model.run(case.prompts[:1], max_new_tokens=NEW).token_ids == [case.greedy]
        got = model.run(case.prompts, max_new_tokens=NEW).token_ids
        want_ids = oracle_new(case, ids, attention_mask=mask)
        assert [w[: len(g)] for w, g in zip(want_ids, got, strict=True)] == got
        assert spilled(model.engine) == 0


@of(CROPPABLE)
def test_taking_tokens_back(case: Case) -> None:
    """Cropped, within a chunk and far beyond, and continued otherwise: as if it had never been there."""
    g = torch.Generator().manual_seed(9)
    cache = case.model.engine.new_cache(200)
    case.model.hf(input_ids=case.ids, past_key_values=cache)
    held = case.prompts[0]
    for back, n in ((3, 5), (40, 30), (33, 1)):
        cache.crop(-back)
        more = torch.randint(4, VOCAB, (1, n), generator=g)
        held = held[: len(held) - back] + more[0].tolist()
        got = case.model.hf(input_ids=more, past_key_values=cache).logits
        close(got, oracle_logits(case, torch.tensor([held]))[:, -n:])
        assert cache.get_seq_length() == len(held)
    cache.close()


@of(CROPPABLE)
def test_forks(case: Case) -> None:
    """One prompt, three ways on; then two of them, the other way round."""
    g = torch.Generator().manual_seed(10)
    cache = case.model.engine.new_cache(120)
    case.model.hf(input_ids=case.ids, past_key_values=cache)
    cache.batch_repeat_interleave(3)
    more = torch.randint(4, VOCAB, (3, 7), generator=g)
    got = case.model.hf(input_ids=more, past_key_values=cache).logits
    held = torch.cat([case.ids.expand(3, -1), more], 1)
    close(got, oracle_logits(case, held)[:, -7:])
    cache.batch_select_indices(torch.tensor([2, 0]))
    more = torch.randint(4, VOCAB, (2, 20), generator=g)
    got = case.model.hf(input_ids=more, past_key_values=cache).logits
    close(got, oracle_logits(case, torch.cat([held[[2, 0]], more], 1))[:, -20:])
    cache.close()


def test_without_a_cache_and_with_the_users_own(case: Case) -> None:
    want = oracle_logits(case, case.ids)
    close(case.model.hf(input_ids=case.ids).logits, want)
    close(case.model.hf(input_ids=case.ids, use_cache=False).logits, want)
    own, parts = DynamicCache(config=case.oracle.config), case.ids.split([50, 19, 1], dim=1)
    if case.family in hf.NO_CHUNKED_PREFILL:
        parts = case.ids.split([69, 1], dim=1)
    got = [case.model.hf(input_ids=part, past_key_values=own).logits for part in parts]
    close(torch.cat(got, 1), want)
    out = case.model.hf.generate(case.ids, max_new_tokens=NEW, do_sample=False)
    assert out[0, PROMPT:].tolist() == case.greedy


def test_a_padded_batch_with_the_users_own_cache(case: Case) -> None:
    """Windows drop what is behind them, padding too; some of it is still within."""
    ids = torch.tensor([case.prompts[0], [0] * (PROMPT - 5) + case.prompts[1][:5]])
    mask = torch.tensor([[1] * PROMPT, [0] * (PROMPT - 5) + [1] * 5])
    want = oracle_new(case, ids, attention_mask=mask)
    got = case.model.hf.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    assert got[:, PROMPT:].tolist() == want


@of(CROPPABLE)
def test_prompt_lookup(case: Case) -> None:
    """Guesses are taken back when they are wrong."""
    ids = torch.cat([case.ids[:, :30], case.ids[:, :30]], 1)
    want = oracle_new(case, ids, max_new_tokens=12)
    cache = case.model.engine.new_cache(90)
    before = len(case.model.engine.steps)
    out = case.model.hf.generate(
        ids, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3, past_key_values=cache
    )
    assert out[:, 60:].tolist() == want
    assert any(s.tokens > 1 for s in case.model.engine.steps[before + 1 :]), "something was guessed"
    assert isinstance(cache, TieredCache)
    cache.close()


def test_on_an_emulated_device(case: Case) -> None:
    weights = sum(p.numel() * 4 for p in case.oracle.parameters())
    with load(case.folder, device="emulated", vram=(64 << 20) + 4 * weights) as model:
        result = model.run(case.prompts[:1], max_new_tokens=NEW)
        assert result.token_ids == [case.greedy]
        assert result.stats.total.kv_bytes_read > 0


def chosen_experts(model: PreTrainedModel) -> list[torch.Tensor]:
    """From here on filled with what every router chooses."""
    chosen: list[torch.Tensor] = []

    def hear(module: Any, args: Any, output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        chosen.extend(t.sort(-1).values for t in outputs if not t.is_floating_point())

    for module in model.modules():
        if type(module).__name__.lower().endswith("router"):
            module.register_forward_hook(hear)
    return chosen


def test_bfloat16_within_ulps(case: Case, tmp_path: Path) -> None:
    """Teacher-forced, in one pass and then one token at a time: where choices differ, they are a rounding apart.

    Other kernels may decide a tie between two experts otherwise, which is more than a rounding to all that follows:
    of some prompts one in which that does not happen is looked at.
    """
    oracle = save(copy.deepcopy(case.oracle).to(torch.bfloat16), tmp_path)
    with load(tmp_path) as model, torch.inference_mode():
        theirs, ours = chosen_experts(oracle), chosen_experts(model.hf)
        for seed in range(8):
            ids = torch.randint(4, VOCAB, (1, PROMPT), generator=torch.Generator().manual_seed(seed))
            parts = (ids[:, :-4], *ids[:, -4:].split(1, dim=1))
            caches = DynamicCache(config=oracle.config), model.engine.new_cache(128)
            want, got = (
                torch.cat([m(input_ids=p, past_key_values=c, use_cache=True).logits.float() for p in parts], dim=1)
                for m, c in zip((oracle, model.hf), caches, strict=True)
            )
            caches[1].close()
            alike = all(torch.equal(*pair) for pair in zip(theirs, ours, strict=True))
            theirs.clear()
            ours.clear()
            if alike:
                break
        assert alike
    top = want.max(-1).values
    chosen = want.gather(-1, got.argmax(-1, keepdim=True)).squeeze(-1)
    assert ((top - chosen) <= BF16_ULPS * top.abs() * 2**-8).all()


@of(MISTRAL)
def test_masks_that_are_no_rule_are_refused(case: Case) -> None:
    with pytest.raises(ModelError, match="--kv-resident: attention is masked"):
        case.model.hf(input_ids=case.ids, attention_mask=torch.ones(1, 1, PROMPT, PROMPT).tril())
    holes = torch.ones(1, PROMPT)
    holes[0, 30] = 0
    with pytest.raises(ModelError, match="padding at the front"):
        case.model.hf(input_ids=case.ids, attention_mask=holes)


@of(CROPPABLE)
def test_a_conversation_gives_everything_back(case: Case) -> None:
    """A history kept over turns, taken back to what the turns share, and dropped."""
    history = case.model.history()
    first = case.model.run(case.prompts[:1], max_new_tokens=NEW, history=history).token_ids[0]
    assert first == case.greedy
    ids = [*case.prompts[0][:50], *case.prompts[1]]
    got = case.model.run([ids], max_new_tokens=NEW, history=history).token_ids[0]
    assert got == oracle_new(case, torch.tensor([ids]))[0][: len(got)]
    assert history.reused == 50
    assert spilled(case.model.engine) > 0
    history.forget()


@of(ATTENTIONS)
@pytest.mark.parametrize("layer", [0, 2])
def test_interrupted_and_taken_back(case: Case, layer: int) -> None:
    """In the middle of a pass, with some layers ahead of others; then as if it had not been."""
    engine = case.model.engine
    cache = engine.new_cache(120)
    case.model.hf(input_ids=case.ids[:, :40], past_key_values=cache)
    module = case.model.hf.model.layers[layer]
    handle = module.register_forward_hook(lambda *_: engine.interrupt.set())
    try:
        with pytest.raises(Interrupted):
            case.model.hf(input_ids=case.ids[:, 40:], past_key_values=cache)
        assert rollback(cache, 40), "even while the interruption lasts"
    finally:
        handle.remove()
        engine.interrupt.clear()
    got = case.model.hf(input_ids=case.ids[:, 40:], past_key_values=cache).logits
    close(got, oracle_logits(case, case.ids)[:, 40:])
    cache.close()


@of(MISTRAL)
def test_a_full_disk_ends_a_request_and_not_the_model(case: Case) -> None:
    with load(case.folder, disk="64KiB") as model:
        for _ in range(2):
            with pytest.raises(OffloadError, match="--disk: 65536 bytes are too few"):
                model.run([case.prompts[0] * 2], max_new_tokens=NEW)
            assert spilled(model.engine) == 0
        assert model.run(case.prompts[:1], max_new_tokens=NEW).token_ids == [case.greedy]


@of(MISTRAL)
@pytest.mark.parametrize("when", ["writing", "reading"])
def test_a_disk_that_fails(case: Case, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One clear error, whose request is lost; once the disk is well again the next one is right."""
    with load(case.folder) as model:
        file, real = model.engine.kv._disk.file, {"pwritev": os.pwritev, "preadv": os.preadv}  # type: ignore[union-attr]
        name = "pwritev" if when == "writing" else "preadv"
        left = [5]

        def failing(fd: int, *args: Any) -> int:
            left[0] -= fd == file.fd
            if fd == file.fd and left[0] <= 0:
                raise OSError(errno.EIO, "Input/output error")
            return real[name](fd, *args)

        monkeypatch.setattr(os, name, failing)
        with pytest.raises(OffloadError, match="Input/output error") as told:
            model.run(case.prompts[:1], max_new_tokens=NEW)
        assert str(file.path) in str(told.value)
        assert spilled(model.engine) == 0
        left[0] = 1 << 30
        assert model.run(case.prompts[:1], max_new_tokens=NEW).token_ids == [case.greedy]


@of(MISTRAL)
def test_a_refused_folder_leaves_no_threads(case: Case) -> None:
    before = threading.active_count()
    with pytest.raises(offload.UsageError, match="--spill-dir"):
        load(case.folder, spill_dir="/proc/x")
    assert threading.active_count() == before


@of(MISTRAL)
def test_a_conversation(case: Case) -> None:
    """Each turn computes only what is new, in a cache over tiers too, and gives it back at the end."""
    tok = tokenizer()
    tok.chat_template = TEMPLATE
    said: list[list[str]] = []
    for tiered in (True, False):
        tok.save_pretrained(case.folder)
        with load(case.folder) if tiered else offload.load(case.folder, context=240) as model:
            talk = Conversation(model)
            answers = [talk.say(f"w{10 + n} w{20 + n} " * 20, lambda _: None, max_new_tokens=5) for n in range(3)]
            said.append([str(a.text[0]) for a in answers if a is not None])
            assert talk.reused_tokens > 0
            if tiered:
                assert spilled(model.engine) > 0
                talk.clear()
                assert spilled(model.engine) == 0
    assert len(said[0]) == 3
    assert said[0] == said[1]

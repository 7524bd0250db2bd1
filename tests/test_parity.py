"""Placement never changes what the model says: every family against transformers with the same checkpoint resident."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB, build, save, tokenizer
from transformers import DynamicCache, PreTrainedModel

import offload
from offload import Model
from offload.sampling import Sampling

NEW = 12
# beyond one ulp of bfloat16 (2^-8 of the value): what another order of summation in the experts may move a logit by
BF16_ULPS = 4


@dataclass
class Case:
    folder: Path
    oracle: PreTrainedModel
    prompts: list[list[int]]
    smallest: int


def load(case: Case, resident: int | str, **options: Any) -> Model:
    return offload.load(case.folder, resident=resident, context=128, **options)


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp(request.param)
    oracle = save(build(request.param), folder)
    tokenizer().save_pretrained(folder)
    g = torch.Generator().manual_seed(3)
    prompts = [torch.randint(4, VOCAB, (n,), generator=g).tolist() for n in (21, 9)]
    with pytest.raises(offload.BudgetError) as refusal:
        offload.load(folder, resident=1, context=128)
    assert refusal.value.smallest is not None
    return Case(folder, oracle, prompts, refusal.value.smallest)


def batch(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, case.prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in case.prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in case.prompts])
    return ids, mask


def oracle_new(case: Case, ids: torch.Tensor, **options: Any) -> list[list[int]]:
    options = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids), **options}
    return case.oracle.generate(ids, **options)[:, ids.shape[1] :].tolist()


def smallest_vram(case: Case) -> int:
    with pytest.raises(offload.BudgetError, match="--vram") as refusal:
        offload.load(case.folder, device="emulated", vram=1, context=128)
    assert refusal.value.smallest is not None
    return refusal.value.smallest


@pytest.mark.parametrize("vram", ["smallest", "half", "everything"])
def test_on_an_emulated_device(case: Case, vram: str) -> None:
    """The same on a device with memory of its own, from the smallest that works to one that holds all."""
    ids = torch.tensor([case.prompts[0]])
    least = smallest_vram(case)
    weights = sum(p.numel() * 4 for p in case.oracle.parameters())
    size = {"smallest": least, "half": least + weights // 2, "everything": least + 4 * weights}[vram]
    options: dict[str, Any] = {"device": "emulated", "vram": size, "context": 128}
    if vram == "smallest":
        # and as little as possible in RAM: every block goes from disk through RAM to the device
        with pytest.raises(offload.BudgetError, match="--resident") as refusal:
            offload.load(case.folder, resident=1, **options)
        options["resident"] = refusal.value.smallest
    with offload.load(case.folder, **options) as model:
        assert model.plan.device is not None
        with torch.inference_mode():
            want = case.oracle(ids).logits
        got = model.hf(input_ids=ids).logits
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
        result = model.run([case.prompts[0]], max_new_tokens=NEW)
        assert result.token_ids == [t[: len(result.token_ids[0])] for t in oracle_new(case, ids)]
        total = result.stats.total
        if vram == "everything":
            assert total.bytes_up == 0
        else:
            use = result.stats.experts_use
            assert total.bytes_up > 0 or (use is not None and use.cpu > 0), "something was not on the device"
        if vram == "smallest":
            assert total.bytes_read >= total.bytes_up // 2


@pytest.mark.parametrize("resident", ["smallest", "60%", "100%"])
def test_greedy_tokens_and_logits(case: Case, resident: str) -> None:
    ids = torch.tensor([case.prompts[0]])
    with load(case, case.smallest if resident == "smallest" else resident) as model:
        with torch.inference_mode():
            want = case.oracle(ids).logits
        got = model.hf(input_ids=ids).logits
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
        result = model.run([case.prompts[0]], max_new_tokens=NEW)
        assert result.token_ids == [t[: len(result.token_ids[0])] for t in oracle_new(case, ids)]
        assert len(result.token_ids[0]) == NEW or result.token_ids[0][-1] == 2
        if resident == "smallest":
            assert result.stats.total.bytes_read > model.plan.resident_bytes, "the weights were not streamed"
            assert result.stats.hit_rate is not None
            assert result.stats.hit_rate < 1
        assert model.plan.resident_bytes <= (case.smallest if resident == "smallest" else model.plan.weight_bytes)


def test_left_padded_batch(case: Case) -> None:
    ids, mask = batch(case)
    want = oracle_new(case, ids, attention_mask=mask)
    with load(case, case.smallest) as model:
        got = model.run(case.prompts, max_new_tokens=NEW).token_ids
    assert [w[: len(g)] for w, g in zip(want, got, strict=True)] == got
    assert all(len(g) == NEW or g[-1] == 2 for g in got)


def test_sampling_with_a_seed(case: Case) -> None:
    ids = torch.tensor([case.prompts[0]])
    sampling = Sampling(temperature=0.9, top_k=40, seed=11)
    want = oracle_new(case, ids, logits_processor=sampling.processors(ids.shape[1]))
    with load(case, case.smallest) as model:
        got = model.run([case.prompts[0]], max_new_tokens=NEW, temperature=0.9, top_k=40, seed=11).token_ids
        torch.manual_seed(5)
        stock = model.hf.generate(ids, max_new_tokens=NEW, do_sample=True, top_k=40)
    assert [want[0][: len(got[0])]] == got
    torch.manual_seed(5)
    assert stock.tolist() == case.oracle.generate(ids, max_new_tokens=NEW, do_sample=True, top_k=40).tolist()


def test_beam_search(case: Case) -> None:
    ids = torch.tensor([case.prompts[0]])
    want = oracle_new(case, ids, num_beams=3)
    with load(case, case.smallest) as model:
        got = model.run([case.prompts[0]], max_new_tokens=NEW, num_beams=3).token_ids
    assert [want[0][: len(got[0])]] == got


def test_stop_strings(case: Case) -> None:
    ids = torch.tensor([case.prompts[0]])
    greedy = oracle_new(case, ids)[0]
    stop = f"w{greedy[min(4, len(greedy) - 2)]}"
    want = oracle_new(case, ids, stop_strings=[stop], tokenizer=tokenizer())
    with load(case, case.smallest) as model:
        result = model.run([case.prompts[0]], max_new_tokens=NEW, stop=stop)
    assert result.token_ids == want
    assert result.finish == ["stop"]
    assert len(want[0]) <= 5


def test_bfloat16_choices_within_ulps(case: Case, tmp_path: Path) -> None:
    """Teacher-forced: where ours and the oracle's choice differ, they are a rounding apart."""
    ids = torch.tensor([case.prompts[0]])
    oracle = save(case.oracle.to(torch.bfloat16), tmp_path)
    case.oracle.to(torch.float32)
    with offload.load(tmp_path, resident="60%", context=128) as model, torch.inference_mode():
        want = oracle(ids).logits.float()
        got = model.hf(input_ids=ids).logits.float()
        if not model.plan.experts_total:
            assert torch.equal(got, want), "same kernels, same shapes: the same bits"
    top = want.max(-1).values
    chosen = want.gather(-1, got.argmax(-1, keepdim=True)).squeeze(-1)
    assert ((top - chosen) <= BF16_ULPS * top.abs() * 2**-8).all()


def test_bfloat16_decoding_within_ulps(case: Case, tmp_path: Path) -> None:
    """The same one token at a time, which is what the kernels compute on a CPU."""
    ids = torch.tensor([case.prompts[0]])
    oracle = save(case.oracle.to(torch.bfloat16), tmp_path)
    case.oracle.to(torch.float32)
    parts = (ids[:, :-6], *ids[:, -6:].split(1, dim=1))
    with offload.load(tmp_path, resident="60%", context=128) as model, torch.inference_mode():
        wants, gots = [], []
        theirs, ours = DynamicCache(config=oracle.config), model.engine.new_cache(128)
        for part in parts:
            wants.append(oracle(part, past_key_values=theirs, use_cache=True).logits.float())
            gots.append(model.hf(input_ids=part, past_key_values=ours, use_cache=True).logits.float())
    want, got = torch.cat(wants, dim=1), torch.cat(gots, dim=1)
    top = want.max(-1).values
    chosen = want.gather(-1, got.argmax(-1, keepdim=True)).squeeze(-1)
    assert ((top - chosen) <= BF16_ULPS * top.abs() * 2**-8).all()

"""Whatever shares its batch, a request gets what it gets alone: every family against transformers with one sequence."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB, build, save, tokenizer
from test_kv_parity import RECURRENT, of, spilled
from test_parity import BF16_ULPS
from test_ragged import alone
from transformers import PreTrainedModel

import offload
from offload import Interrupted, Model
from offload.batch.calls import Calls, Result
from offload.batch.runner import Task
from offload.sampling import Sampling

NEW = (7, 3, 6, 1, 5, 7, 4, 2)  # new tokens of each request
MIXED = ["mistral", "gpt_oss", "deepseek_v3", "qwen3_next"]  # windows, sinks, latents, states


@dataclass
class Case:
    family: str
    folder: Path
    oracle: PreTrainedModel
    model: Model
    requests: list[dict[str, Any]]
    wanted: list[list[int]]  # what the oracle says to each

    @property
    def ragged(self) -> bool:
        return self.family not in RECURRENT


def prompts_of(oracle: PreTrainedModel) -> list[list[int]]:
    """Mixed lengths; some begin alike, one is another and what that was answered, one is there twice."""
    g = torch.Generator().manual_seed(3)

    def some(n: int) -> list[int]:
        return torch.randint(4, VOCAB, (n,), generator=g).tolist()

    front, first = some(37), some(21)
    turn = [*first, *alone(oracle, first, NEW[0]), *some(3)]
    return [first, front + some(9), front + some(1), some(5), turn, front[:30] + some(6), some(70), list(first)]


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp(request.param)
    oracle = save(build(request.param, max_position_embeddings=512), folder)
    tokenizer().save_pretrained(folder)
    prompts = prompts_of(oracle)
    requests = [{"prompt": p, "max_tokens": n} for p, n in zip(prompts, NEW, strict=True)]
    with offload.load(folder, context=480) as model:
        wanted = [alone(oracle, p, n) for p, n in zip(prompts, NEW, strict=True)]
        yield Case(request.param, folder, oracle, model, requests, wanted)


def ask(model: Model, requests: Sequence[Any], *, as_they_come: bool = False, **options: Any) -> list[Result]:
    """Results in the order of the requests."""
    given = iter(requests) if as_they_come else requests
    results = list(model.batch(given, ignore_eos=True, **options))
    assert sorted(r.index for r in results) == list(range(len(requests))), "each once"
    assert [r.error for r in results] == [None] * len(results)
    return sorted(results, key=lambda r: r.index)


def tokens(results: Sequence[Result]) -> list[list[int]]:
    return [list(r.token_ids) for r in results]


def test_few_at_once(case: Case) -> None:
    """Three at a time: they join and leave at any pass."""
    results = ask(case.model, case.requests, as_they_come=True, sequences=3)
    assert tokens(results) == case.wanted
    progress = case.model.batch_progress
    assert progress.most == 3
    assert progress.generated == sum(NEW)
    prompt_tokens = sum(len(r["prompt"]) for r in case.requests)
    assert progress.computed + progress.reused == prompt_tokens
    # neighbours share: front and front; the rest are not beside one another
    assert progress.reused == (37 if case.ragged else 0)
    assert all(r.body is not None and r.body["usage"]["completion_tokens"] == n
               for r, n in zip(results, NEW, strict=True))  # fmt: skip


def test_all_at_once_and_in_another_order(case: Case) -> None:
    order = sorted(range(len(NEW)), key=lambda i: case.requests[i]["prompt"])  # common fronts are neighbours
    results = ask(case.model, [case.requests[i] for i in order], sequences=len(NEW))
    assert tokens(results) == [case.wanted[i] for i in order]
    progress = case.model.batch_progress
    if case.ragged:
        assert progress.most == len(NEW)
        assert progress.reused >= 37 + 30 + 20 + 20, "a front of three, and all but the last token of one asked twice"
    # the model is as it was
    (prompt, *_), (want, *_) = [r["prompt"] for r in case.requests], case.wanted
    assert case.model.run([prompt], max_new_tokens=NEW[0], ignore_eos=True).token_ids == [want]


def test_without_sharing_one_after_another_and_choices(case: Case) -> None:
    assert tokens(ask(case.model, case.requests[:4], sequences=4, share=False)) == case.wanted[:4]
    assert case.model.batch_progress.reused == 0
    # choices that are drawn: the first as its seed says, every one as if it were alone
    drawn = {"prompt": case.requests[1]["prompt"], "max_tokens": 5, "n": 2, "temperature": 0.9, "seed": 11}
    (lonely,) = ask(case.model, [drawn], sequences=1)
    beside = ask(case.model, [case.requests[0], drawn, case.requests[2]], sequences=4)
    assert beside[1].choices == lonely.choices
    assert len(lonely.choices) == 2
    ids = torch.tensor([drawn["prompt"]])
    want = case.oracle.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, eos_token_id=None,
        logits_processor=Sampling(temperature=0.9, seed=11).processors(ids.shape[1]),
    )  # fmt: skip
    assert list(lonely.token_ids) == want[0, ids.shape[1] :].tolist()
    assert tokens([beside[0], beside[2]]) == [case.wanted[0], case.wanted[2]]


@of(MIXED)
def test_in_the_least_memory_for_keys_and_values(case: Case) -> None:
    """All but a chunk for each sequence and layer lies on disk, and all of it is given back."""
    with offload.load(case.folder, context=480, kv_resident=1, overrides={"kv_chunk": 16}) as model:
        assert tokens(ask(model, case.requests, sequences=4)) == case.wanted
        assert model.batch_progress.step.kv_bytes_written > 0
        if "sliding_window" not in FAMILIES[case.family]:  # windows of 12 need little of what was written
            assert model.batch_progress.step.kv_bytes_read > 0
        assert spilled(model.engine) == 0
        with contextlib.closing(model.batch(case.requests, ignore_eos=True, sequences=4)) as results:
            next(results)  # somebody who has heard enough
        assert spilled(model.engine) == 0


@of(MIXED)
def test_on_an_emulated_device(case: Case) -> None:
    with pytest.raises(offload.BudgetError, match="--vram") as refusal:
        offload.load(case.folder, device="emulated", vram=1, context=480, batch=4)
    assert refusal.value.smallest is not None
    with offload.load(case.folder, device="emulated", vram=refusal.value.smallest, context=480, batch=4) as model:
        assert tokens(ask(model, case.requests)) == case.wanted
        assert model.batch_progress.step.bytes_up > 0 or model.plan.experts_total


@of(["mistral", "mixtral", "jamba"])
def test_a_request_longer_than_the_context_that_was_planned_for(case: Case) -> None:
    """It runs alone: memory for keys and values is what was set aside, the rest is on disk."""
    with offload.load(case.folder, context=64) as model:
        assert tokens(ask(model, case.requests, sequences=2)) == case.wanted


@of(["llama", "mixtral"])
def test_bfloat16_choices_within_ulps(case: Case, tmp_path: Path) -> None:
    """Every choice is within a rounding of the oracle's best for the same tokens."""
    oracle = save(case.oracle.to(torch.bfloat16), tmp_path)
    case.oracle.to(torch.float32)
    with offload.load(tmp_path, context=480) as model, torch.inference_mode():
        for result, request in zip(ask(model, case.requests, sequences=3), case.requests, strict=True):
            said, prompt = list(result.token_ids), request["prompt"]
            assert len(said) == request["max_tokens"]
            logits = oracle(torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1].float()
            top, chosen = logits.max(-1).values, logits.gather(-1, torch.tensor(said)[:, None])[:, 0]
            assert ((top - chosen) <= BF16_ULPS * top.abs() * 2**-8).all()


@of(["mistral", "jamba"])
def test_interrupted_between_layers_it_may_be_run_again(case: Case) -> None:
    engine, passes = case.model.engine, 0

    def stop(*what: object) -> None:
        nonlocal passes
        passes += 1
        if passes == 3:
            engine.interrupt.set()

    engine.on_pass = stop
    try:
        with pytest.raises(Interrupted):
            ask(case.model, case.requests, sequences=3)
    finally:
        engine.on_pass = None
        engine.interrupt.clear()
    assert passes == 3
    assert tokens(ask(case.model, case.requests[:3], sequences=3)) == case.wanted[:3]


@of(["llama", "lfm2"])
def test_other_requests_while_results_are_taken(case: Case) -> None:
    """Who takes results one by one may use the model in between."""
    (prompt, *_), (want, *_) = [r["prompt"] for r in case.requests], case.wanted
    got = {}
    for result in case.model.batch(case.requests, ignore_eos=True, sequences=3):
        got[result.index] = list(result.token_ids)
        assert case.model.run([prompt], max_new_tokens=NEW[0], ignore_eos=True).token_ids == [want]
    assert [got[i] for i in range(len(got))] == case.wanted


@of(["llama", "jamba"])
def test_what_has_been_said_before_is_gone_on_from(case: Case) -> None:
    """Answers resumed from some of their tokens end as they would have."""
    from offload.batch.job import make_runner

    calls = Calls(case.model.engine, ignore_eos=True)
    prepared = [calls._prepared(i, r) for i, r in enumerate(case.requests)]
    tasks = []
    for found, want in zip(prepared, case.wanted, strict=True):
        (task,) = calls._preparer.tasks(found, {}, None)  # type: ignore[arg-type]
        for token in want[: len(want) // 2]:
            task.chooser.take(token)
        (again,) = calls._preparer.tasks(found, {0: task.chooser.state()}, None)  # type: ignore[arg-type]
        assert again.chooser.tokens == want[: len(want) // 2]
        tasks.append(again)
    ended: list[Task] = []
    with contextlib.closing(make_runner(case.model.engine, 3, True, lambda runner: None)) as runner:
        ended += runner.run(tasks)
    assert {id(t) for t in ended} == {id(t) for t in tasks}
    assert [t.chooser.tokens for t in tasks] == case.wanted


def test_stop_and_response_format_and_errors_in_one_batch(chatty_llama: Path) -> None:
    with offload.load(chatty_llama, context=480) as model:
        plain = {"prompt": "w10 w11 w12", "max_tokens": 6}
        (alone_,) = list(model.batch([plain]))
        assert alone_.text is not None
        words = alone_.text.split()
        results = sorted(
            model.batch([plain, {**plain, "stop": words[2]}, {**plain, "tools": [{}]}, "w10 w11 w12",
                         {"messages": [{"role": "user", "content": "w7"}], "max_tokens": 3}, {"prompt": [999]}]),
            key=lambda r: r.index,
        )  # fmt: skip
    assert results[0].text == alone_.text
    assert results[1].choices[0].finish == "stop"
    assert (results[1].text or "").split() == words[: words.index(words[2])]
    assert results[2].error is not None
    assert results[2].error.param == "tools"
    assert (results[3].text or "").startswith(alone_.text)
    assert results[4].body is not None
    assert results[4].body["choices"][0]["message"]["role"] == "assistant"
    assert results[5].error is not None
    assert "999" in results[5].error.message


@pytest.fixture(scope="module")
def chatty_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import families

    return families.chatty(build("llama", max_position_embeddings=512), tmp_path_factory.mktemp("chatty"))

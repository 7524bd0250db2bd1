"""The Python surface: generate, stream, chat, lists, interruption, files that change, and what is left behind."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCAB, build, chatty, save, tokenizer
from transformers import PreTrainedModel

import offload
from offload.model import Conversation
from tiers import EmulatedDevice


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chatty(build("qwen3_moe"), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def oracle(folder: Path) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def words(oracle: PreTrainedModel, prompt: str, new: int) -> str:
    tok = tokenizer()
    ids = torch.tensor([tok(prompt)["input_ids"]])
    out = oracle.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return tok.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_generate_takes_a_string_or_a_list(folder: Path, oracle: PreTrainedModel) -> None:
    with offload.load(folder, resident="50%") as model:
        one = model.generate("w10 w11 w12", max_new_tokens=8)
        assert one == words(oracle, "w10 w11 w12", 8)
        assert model.generate(["w10 w11 w12", "w20"], max_new_tokens=8) == [one, words(oracle, "w20", 8)]
        assert model.stats.new_tokens == 16
        assert model.stats.prompt_tokens == 4


def test_a_list_too_long_for_the_context_runs_in_groups(folder: Path, oracle: PreTrainedModel) -> None:
    prompts = [f"w{i} w{i + 1} w{i + 2}" for i in range(10, 20)]
    with offload.load(folder, context=24) as model:
        assert model.generate(prompts, max_new_tokens=8) == [words(oracle, p, 8) for p in prompts]


def test_stream_gives_the_same_text_in_pieces(folder: Path, oracle: PreTrainedModel) -> None:
    with offload.load(folder, resident="50%") as model:
        pieces = list(model.stream("w10 w11 w12", max_new_tokens=8))
        assert len(pieces) > 1
        assert "".join(pieces).split() == words(oracle, "w10 w11 w12", 8).split()


def test_a_stream_left_early_stops_and_the_model_goes_on(folder: Path, oracle: PreTrainedModel) -> None:
    with offload.load(folder, resident="50%") as model:
        stream = model.stream("w10 w11 w12", max_new_tokens=200)
        next(stream)
        stream.close()
        assert not any(t.name == "offload-generate" for t in threading.enumerate())
        assert model.generate("w10 w11 w12", max_new_tokens=8) == words(oracle, "w10 w11 w12", 8)


def test_errors_in_a_stream_reach_the_caller(folder: Path) -> None:
    with offload.load(folder) as model, pytest.raises(offload.UsageError):
        list(model.stream("", max_new_tokens=8))


def test_interruption_ends_at_the_next_layer_and_leaves_the_model_usable(folder: Path, oracle: PreTrainedModel) -> None:
    with offload.load(folder, resident="30%") as model:
        threading.Timer(0.3, model.engine.interrupt.set).start()
        began = time.perf_counter()
        with pytest.raises(offload.Interrupted):
            model.generate(["w10 w11 w12"] * 200, max_new_tokens=200)
        assert time.perf_counter() - began < 2.3
        model.engine.interrupt.clear()
        assert model.generate("w10 w11 w12", max_new_tokens=8) == words(oracle, "w10 w11 w12", 8)


def tight(model: str, device: str, **more: Any) -> dict[str, Any]:
    """Options with as little as works: nearly every block comes from disk for each token."""
    options: dict[str, Any] = {"model": model, "context": 128, "device": device, **more}
    for flag in ("vram", "resident") if device == "emulated" else ("resident",):
        with pytest.raises(offload.BudgetError, match=f"--{flag}") as refusal:
            offload.load(**options, **{flag: 1})
        options[flag] = refusal.value.smallest
    return options


@pytest.mark.parametrize("name", ["demo-dense", "demo-moe"])
@pytest.mark.parametrize(("device", "broken"), [("cpu", "disk"), ("emulated", "disk"), ("emulated", "link")])
def test_a_fault_in_the_middle_of_an_answer(
    monkeypatch: pytest.MonkeyPatch, name: str, device: str, broken: str
) -> None:
    """The answer ends with an error that says what happened; the next one is as if nothing had."""
    preadv = os.preadv
    heard: list[str] = []
    with offload.load(**tight(name, device)) as model:
        copy = model.engine.device.copy

        def failing_read(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            if len(heard) >= 3:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return preadv(fd, buffers, offset)

        def failing_copy(*args: Any) -> None:
            if len(heard) >= 3:
                raise RuntimeError("injected: the device is lost")
            copy(*args)

        want = model.generate("Mara is", max_new_tokens=12)
        with monkeypatch.context() as m:
            if broken == "disk":
                m.setattr(os, "preadv", failing_read)
                says = r"model\.safetensors at byte \d+ failed: Input/output error"
            else:
                m.setattr(model.engine.device, "copy", failing_copy)
                says = "injected: the device is lost"
            for _ in range(2):  # at once the second time: what was on its way has failed as well
                with pytest.raises(offload.OffloadError, match=says):
                    model.run(["Mara is"], max_new_tokens=12, on_text=heard.append)
        assert len(heard) >= 3
        assert str(want).startswith("".join(heard[:3])), "the answer had begun"
        assert model.generate("Mara is", max_new_tokens=12) == want


def test_interruption_while_a_slow_link_carries_the_weights() -> None:
    with offload.load(**tight("demo-dense", "emulated", link="4MB")) as model:
        link = model.engine.device
        assert isinstance(link, EmulatedDevice)
        asked: list[float] = []

        def interrupt() -> None:
            asked.append(time.perf_counter())
            model.engine.interrupt.set()

        timer = threading.Timer(0.5, interrupt)
        timer.start()
        with pytest.raises(offload.Interrupted):
            model.generate("Mara is", max_new_tokens=100)
        assert time.perf_counter() - asked[0] < 2
        timer.join()
        for tier in (model.engine._memory.compute, model.engine._memory.host):
            assert not any(e.leases for e in tier._entries.values())
            assert all(e.ticket is None or e.ticket.done for e in tier._entries.values()), "nothing goes on in vain"
        model.engine.interrupt.clear()
        link.bytes_per_s = 1e9
        with offload.load("demo-dense", context=128) as fresh:
            assert model.generate("Mara is", max_new_tokens=12) == fresh.generate("Mara is", max_new_tokens=12)


def test_nothing_is_left_behind(folder: Path) -> None:
    def state() -> tuple[set[str], set[str]]:
        fds = {os.readlink(f) for f in Path("/proc/self/fd").iterdir() if f.exists()}
        return {t.name for t in threading.enumerate()}, {f for f in fds if str(folder) in f}

    before = state()
    model = offload.load(folder, resident="30%")
    assert state() != before
    model.close()
    assert state() == before


@pytest.mark.parametrize("resident", ["30%", "100%"])
def test_a_conversation_computes_only_what_is_new(folder: Path, resident: str) -> None:
    with offload.load(folder, resident=resident) as model, offload.load(folder) as fresh:
        talk = Conversation(model)
        for text in ("w10 w11", "w20 w21 w22", "w30"):
            said: list[str] = []
            result = talk.say(text, said.append, max_new_tokens=6)
            assert result is not None
            want = fresh.chat([*talk.messages[:-1]], max_new_tokens=6)
            assert talk.messages[-1]["content"] == want, "kept KV must not change an answer"
            assert "".join(said).split() == want.split()
            if len(talk.messages) > 2:
                assert talk.reused_tokens > 0
                assert model.engine.steps[0].tokens < result.stats.prompt_tokens
        talk.clear()
        assert talk.messages == []


def test_an_interrupted_answer_stays_and_the_next_is_right(folder: Path) -> None:
    with offload.load(folder, resident="30%") as model, offload.load(folder) as fresh:
        talk = Conversation(model)
        talk.say("w10 w11", lambda piece: None, max_new_tokens=6)
        heard: list[str] = []

        def stop_soon(piece: str) -> None:
            heard.append(piece)
            if len(heard) == 3:
                model.engine.interrupt.set()

        assert talk.say("w20", stop_soon, max_new_tokens=100) is None
        model.engine.interrupt.clear()
        assert talk.messages[-1]["content"] == "".join(heard)
        talk.say("w30", lambda piece: None, max_new_tokens=6)
        assert talk.messages[-1]["content"] == fresh.chat(talk.messages[:-1], max_new_tokens=6)


def test_a_long_prompt_in_chunks_equals_one_pass(folder: Path, oracle: PreTrainedModel) -> None:
    ids = torch.randint(4, VOCAB, (1, 120), generator=torch.Generator().manual_seed(1))
    with offload.load(folder, resident="50%") as model:
        object.__setattr__(model.plan, "prefill_chunk", 32)
        got = model.hf(input_ids=ids, past_key_values=model.engine.new_cache(128), use_cache=True).logits
        assert len(model.engine.steps) == 4
        with torch.inference_mode():
            want = oracle(ids).logits
        assert got.shape == want.shape
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
        last = model.hf(input_ids=ids, past_key_values=model.engine.new_cache(128), use_cache=True, logits_to_keep=1)
        assert last.logits.shape == (1, 1, VOCAB)
        assert (last.logits - want[:, -1:]).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("how", ["truncate", "overwrite", "replace"])
def test_a_file_that_changes_while_running_is_an_error(folder: Path, tmp_path: Path, how: str) -> None:
    mine = tmp_path / "model"
    shutil.copytree(folder, mine)
    weights = mine / "model.safetensors"
    with offload.load(mine, resident="30%") as model:
        good = model.generate("w10 w11", max_new_tokens=4)
        if how == "truncate":
            os.truncate(weights, weights.stat().st_size // 2)
        elif how == "overwrite":
            with weights.open("r+b") as f:
                f.seek(weights.stat().st_size // 2)
                f.write(b"\0" * 4096)
        else:
            shutil.copy(weights, mine / "new")
            os.replace(mine / "new", weights)
        with pytest.raises(offload.ReadError, match=r"model\.safetensors"):
            model.generate("w50 w51 w52 w53", max_new_tokens=4)
        assert good


def test_options_are_checked_before_anything_is_loaded(folder: Path) -> None:
    with pytest.raises(offload.UsageError, match="unknown option 'rma'"):
        offload.load(folder, rma="1GiB")
    with pytest.raises(offload.UsageError, match="max_memory"):
        offload.load(folder, max_memory={"tpu": "1GiB"})
    with offload.load(folder, max_memory={"cpu": "4GiB"}) as model:
        assert model.plan.ram == 4 << 30


def test_an_embedding_used_behind_our_back_is_not_silent_garbage(folder: Path) -> None:
    with offload.load(folder) as model:
        table = model.hf.get_input_embeddings().weight
        assert table.shape == (VOCAB, 64)
        assert table.isnan().all()


def test_token_outside_the_vocabulary(folder: Path) -> None:
    with offload.load(folder) as model:
        with pytest.raises(offload.UsageError, match="outside the vocabulary"):
            model.run([[5, VOCAB]])
        with pytest.raises(IndexError, match="outside the vocabulary"):
            model.hf(input_ids=torch.tensor([[VOCAB]]))


def test_hf_generate_without_our_cache_and_with_assistance(folder: Path, oracle: PreTrainedModel) -> None:
    ids = torch.tensor([[10, 11, 12, 10, 11, 12, 10]])
    want = oracle.generate(ids, max_new_tokens=8, do_sample=False)
    with offload.load(folder, resident="50%") as model:
        assert torch.equal(model.hf.generate(ids, max_new_tokens=8, do_sample=False), want)
        lookup = model.hf.generate(ids, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=2,
                                   past_key_values=model.engine.new_cache(64))  # fmt: skip
        assert torch.equal(lookup, want)


def test_experts_behind_no_interface_stream_with_their_layer(tmp_path: Path) -> None:
    """jetmoe's experts ignore a registered experts function: they are part of the layer's blocks instead."""
    from families import FAMILIES

    jetmoe = {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 16}
    with pytest.MonkeyPatch.context() as m:
        m.setitem(FAMILIES, "jetmoe", jetmoe)
        oracle = save(build("jetmoe"), tmp_path)
    ids = torch.randint(4, VOCAB, (1, 12), generator=torch.Generator().manual_seed(2))
    want = oracle.generate(ids, max_new_tokens=8, do_sample=False)[0, 12:].tolist()
    with pytest.raises(offload.BudgetError) as refusal:
        offload.load(tmp_path, resident=1, context=64)
    with offload.load(tmp_path, resident=refusal.value.smallest, context=64) as model:
        assert model.plan.experts_total == 0
        assert model.run([ids[0].tolist()], max_new_tokens=8).token_ids == [want]
        assert model.stats.total.bytes_read > 0

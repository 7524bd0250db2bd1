"""Sequences that go on: from memory, from snapshots, from disk; never a wrong token, and nothing computed twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from families import FAMILIES, VOCAB, build, save
from transformers import PreTrainedModel

import offload
from kvstore import Sessions
from offload import Model, UsageError
from offload.conversation import Conversation
from tiers import StoreError

NEW = 6
G = torch.Generator().manual_seed(5)
PROMPT = torch.randint(4, VOCAB, (40,), generator=G).tolist()
OTHER = torch.randint(4, VOCAB, (9,), generator=G).tolist()
RECURRENT = ("qwen3_next", "lfm2", "jamba")
CHAT = "{% for m in messages %}{{ m['content'] }} w9 {% endfor %}"


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OFFLOAD_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Model]]:
    folder = tmp_path_factory.mktemp(request.param)
    oracle = save(build(request.param), folder)
    with offload.load(folder, context=128) as model:
        yield (request.param, oracle), model


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.chatty(build("llama"), tmp_path_factory.mktemp("chatty"), CHAT)


def greedy(oracle: PreTrainedModel, ids: list[int], n: int = NEW) -> list[int]:
    given = torch.tensor([ids])
    out = oracle.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=n, do_sample=False)
    return [int(t) for t in out[0, len(ids) :]]


def test_a_stored_prefix_gives_the_oracles_tokens(case: tuple[Any, Model]) -> None:
    """Stored by one request, read by others: the whole prompt, a longer one, a shorter one, one that forks off."""
    (family, oracle), model = case
    first = model.run([PROMPT], max_new_tokens=NEW, session="a")
    assert first.token_ids[0] == greedy(oracle, PROMPT)[: len(first.token_ids[0])]
    assert model.stats.reused_tokens == 0
    kept = Sessions().load("a")
    assert kept is not None and kept.tokens[: len(PROMPT)] == PROMPT
    grown = kept.tokens + OTHER
    for ids, reused in (
        (grown, len(kept.tokens)),
        (PROMPT, len(PROMPT) - 1),
        (PROMPT[:25], 24),
        (PROMPT[:30] + OTHER, 30),
    ):
        got = model.run([ids], max_new_tokens=NEW, prefix_cache=True).token_ids[0]
        assert got == greedy(oracle, ids)[: len(got)], (len(ids), reused)
        if family in RECURRENT:
            # a state is good only where it was taken: after a prompt (of 25 tokens, too), and at the end of a turn
            assert model.stats.reused_tokens in (0, 25, len(PROMPT), reused)
        else:
            assert model.stats.reused_tokens == reused
    assert model.stats.prompt_tokens == 39


def test_a_history_in_memory_goes_back(case: tuple[Any, Model]) -> None:
    (_, oracle), model = case
    history = model.history()
    turns = [PROMPT]
    for more in (OTHER, OTHER[::-1]):
        got = model.run([turns[-1]], max_new_tokens=NEW, history=history, ignore_eos=True).token_ids[0]
        assert got[: NEW - 1] == greedy(oracle, turns[-1])[: NEW - 1] or 2 in got
        turns.append(turns[-1] + got + more)
    for ids in (turns[1], turns[0] + OTHER, turns[2]):
        got = model.run([ids], max_new_tokens=NEW, history=history).token_ids[0]
        assert got == greedy(oracle, ids)[: len(got)]
    history.forget()


def test_windows_are_stored_before_they_forget(tmp_path: Path) -> None:
    """Far beyond the window, over several nodes and passes, and back into the middle of it."""
    oracle = save(build("mistral", max_position_embeddings=2048), tmp_path / "m")
    ids = torch.randint(4, VOCAB, (700,), generator=torch.Generator().manual_seed(8)).tolist()
    for n, options in enumerate(({}, {"kv_resident": 1})):
        with offload.load(tmp_path / "m", context=1024, overrides={"prefill_chunk": 100}, **options) as model:
            model.run([ids], max_new_tokens=NEW, session="w")
            for cut in (690, 515, 300):
                prompt = [*ids[:cut], 140 + n, *OTHER]
                got = model.run([prompt], max_new_tokens=NEW, prefix_cache=True).token_ids[0]
                assert got == greedy(oracle, prompt)[: len(got)]
                assert model.stats.reused_tokens == cut


def test_damage_costs_time_and_not_truth(tmp_path: Path, own_home: Path) -> None:
    oracle = save(build("llama", max_position_embeddings=1024), tmp_path / "m")
    ids = torch.randint(4, VOCAB, (600,), generator=torch.Generator().manual_seed(8)).tolist()
    want = greedy(oracle, ids)
    with offload.load(tmp_path / "m", context=1024) as model:
        model.run([ids], max_new_tokens=NEW, session="a")
        files = sorted((own_home / "sessions").glob("*.kv"), key=lambda p: p.stat().st_size)
        raw = bytearray(files[-1].read_bytes())
        raw[len(raw) // 2] ^= 4
        files[-1].write_bytes(raw)
        result = model.run([ids], max_new_tokens=NEW, prefix_cache=True)
        assert result.token_ids[0] == want[: len(result.token_ids[0])]
        assert model.stats.reused_tokens in (0, 256, 512)
        assert any("computed again" in note for note in result.notes)
        again = model.run([ids], max_new_tokens=NEW, prefix_cache=True)
        assert model.stats.reused_tokens == 599, "it was written anew"
        assert again.token_ids == result.token_ids


def test_another_models_sessions_are_not_read(tmp_path: Path) -> None:
    for seed in (0, 1):
        save(build("llama", seed=seed), tmp_path / f"m{seed}")
    with offload.load(tmp_path / "m0", context=128) as model:
        model.run([PROMPT], max_new_tokens=NEW, session="a")
    with offload.load(tmp_path / "m1", context=128) as model:
        model.run([PROMPT], max_new_tokens=NEW, prefix_cache=True)
        assert model.stats.reused_tokens == 0
    with offload.load(tmp_path / "m0", context=128, dtype="bfloat16") as model:
        model.run([PROMPT], max_new_tokens=NEW, prefix_cache=True)
        assert model.stats.reused_tokens == 0, "computed otherwise"


def test_nothing_is_written_unasked(chatty: Path, own_home: Path) -> None:
    with offload.load(chatty, context=128) as model:
        model.run([PROMPT], max_new_tokens=NEW)
        Conversation(model).say("w5 w6", lambda piece: None, max_new_tokens=3)
    assert not own_home.exists()


def test_the_store_has_a_limit(chatty: Path, own_home: Path) -> None:
    """What no session needs makes way; when nothing can, storing ends with a note and the answer is the same."""
    with offload.load(chatty, context=128, disk="200KB") as model:
        for n in range(12):
            model.run([[n + 20, *PROMPT]], max_new_tokens=2, prefix_cache=True)
        size = sum(p.stat().st_size for p in (own_home / "sessions").glob("*.kv"))
        assert 100_000 < size <= 200_000
        model.run([[31, *PROMPT]], max_new_tokens=2, prefix_cache=True)
        assert model.stats.reused_tokens == 40, "the last one is there"
        model.run([[20, *PROMPT]], max_new_tokens=2, prefix_cache=True)
        assert model.stats.reused_tokens == 0, "the first one is not"
    with offload.load(chatty, context=128, disk="4KB") as model:
        result = model.run([PROMPT], max_new_tokens=2, prefix_cache=True)
        assert any("--disk" in note for note in result.notes)
        assert len(result.token_ids[0]) == 2


def say(conversation: Conversation, text: str) -> str:
    result = conversation.say(text, lambda piece: None, max_new_tokens=5)
    assert result is not None
    return result.text[0] or ""


def test_a_conversation_outlives_the_process(chatty: Path) -> None:
    with offload.load(chatty, context=256) as model:
        plain = Conversation(model)
        want = [say(plain, t) for t in ("w5 w6 w7", "w10 w11", "w12")]
        first = Conversation(model, session="c")
        assert say(first, "w5 w6 w7") == want[0]
        first.close()
    with offload.load(chatty, context=256) as model:
        second = Conversation(model, session="c")
        assert [m["role"] for m in second.messages] == ["user", "assistant"]
        assert say(second, "w10 w11") == want[1]
        assert second.reused_tokens >= 8, "what was said is read, not computed"
        with pytest.raises(StoreError, match="in use"):
            Conversation(model, session="c")
        second.branch("d")
        assert say(second, "w12") == want[2]
        second.close()
        kept = Sessions().load("c")
        assert kept is not None and len(kept.messages) == 4, "the branch left it as it was"
        with pytest.raises(UsageError):
            Conversation(model).branch("x")


def test_undo_and_retry_compute_only_what_is_new(chatty: Path) -> None:
    with offload.load(chatty, context=256) as model:
        talk = Conversation(model)
        one = say(talk, "w5 w6 w7")
        two = say(talk, "w10 w11")
        assert talk.undo() == "w10 w11"
        assert say(talk, "w10 w11") == two
        prompt = model.stats.prompt_tokens
        assert prompt - talk.reused_tokens <= 4, "the words that were taken back, and the template's"
        again = talk.retry(lambda piece: None, max_new_tokens=5)
        assert again is not None and again.text[0] == two
        assert model.stats.prompt_tokens - talk.reused_tokens == 1
        assert talk.messages[1]["content"] == one
        talk.undo(), talk.undo()
        assert talk.messages == []
        for way in (talk.undo, lambda: talk.retry(lambda piece: None)):
            with pytest.raises(UsageError, match="nothing has been said"):
                way()


def test_an_unanswered_message_is_answered_later(chatty: Path) -> None:
    with offload.load(chatty, context=256) as model:
        talk = Conversation(model, session="c")
        say(talk, "w5")
        talk._save([*talk.messages, {"role": "user", "content": "w6 w7"}])  # as if killed while answering
        talk.close()
        later = Conversation(model, session="c")
        assert any("/retry" in note for note in later.notes)
        result = later.retry(lambda piece: None, max_new_tokens=3)
        assert result is not None and later.messages[-2]["content"] == "w6 w7"
        later.close()


def test_a_damaged_session_is_set_aside(chatty: Path, own_home: Path) -> None:
    with offload.load(chatty, context=256) as model:
        talk = Conversation(model, session="c")
        say(talk, "w5")
        talk.close()
        path = own_home / "sessions" / "c.session"
        path.write_bytes(path.read_bytes()[:-7])
        path.chmod(0o600)
        later = Conversation(model, session="c")
        assert later.messages == [] and any("a new conversation begins" in note for note in later.notes)
        assert list((own_home / "sessions").glob("c.damaged-*"))
        say(later, "w6")
        later.close()


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"fingerprint": "other", "model": "demo-dense"}, "with demo-dense"), ({"arithmetic": "int4"}, "as int4")],
)
def test_a_session_of_another_model_is_told_in_one_line(chatty: Path, changes: dict[str, str], told: str) -> None:
    with offload.load(chatty, context=256) as model:
        talk = Conversation(model, session="c")
        say(talk, "w5")
        talk.close()
        same = Conversation(model, session="c")
        assert same.notes == []
        same.close()
        Sessions().save(replace(Sessions().get("c"), **changes))
        later = Conversation(model, session="c")
        (note,) = later.notes
        assert "session c" in note and told in note and "computed again" in note and "\n" not in note
        assert later.messages == talk.messages
        say(later, "w6")
        later.close()
        known = Sessions().get("c")
        assert (known.model, known.fingerprint, known.arithmetic) == (model.name, model.fingerprint, model.arithmetic)


def test_generate_json_tells_what_was_reused(chatty: Path, capsys: pytest.CaptureFixture[str], own_home: Path) -> None:
    from cli.main import main

    ids = ",".join(map(str, PROMPT))
    found = []
    for more in (["--session", "s"], ["--session", "s"], ["--prefix-cache"], []):
        assert main(["generate", str(chatty), "--prompt-ids", ids, "--max-new-tokens", "4", "--json", *more]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert [d["reused_tokens"] for d in found] == [0, 39, 39, 0]
    assert all(d["prefill_tokens"] + d["reused_tokens"] == 40 for d in found)
    assert len({tuple(d["token_ids"]) for d in found}) == 1
    assert (own_home / "sessions" / "s.session").stat().st_mode & 0o777 == 0o600
    assert main(["generate", str(chatty), "--prompt-ids", ids, "--session", "../x"]) == 2
    assert "--session" in capsys.readouterr().err

"""A batch job with `prefix_cache`: what any run has stored is read, and whatever is computed is there for the next."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from families import build, chatty

import offload
from kvstore import NODE_TOKENS
from offload.batch import runner as runners
from offload.batch.job import JobStats

FRONT = "one two three four five six seven eight nine ten " * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    chatty(build("llama", max_position_embeddings=2048), folder)
    return folder


def job(folder: Path, tmp_path: Path, name: str, **options: object) -> tuple[JobStats, dict[str, str]]:
    lines = [{"custom_id": str(i), "prompt": f"{FRONT}{'abcdef'[i]}", "max_tokens": 5} for i in range(4)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / name
    stats = offload.run_batch(folder, tmp_path / "in.jsonl", out, ignore_eos=True, **options)  # type: ignore[arg-type]
    bodies = [json.loads(line) for line in out.read_text().splitlines()]
    return stats, {b["custom_id"]: b["response"]["body"]["choices"][0]["text"] for b in bodies}


def test_what_was_stored_is_not_computed_again(folder: Path, tmp_path: Path) -> None:
    plain, want = job(folder, tmp_path, "plain", share=False)
    first, got = job(folder, tmp_path, "first", prefix_cache=True)
    again, got_again = job(folder, tmp_path, "again", prefix_cache=True)
    assert want == got == got_again and len(want) == 4
    assert plain.reused_tokens == 0 and plain.computed_tokens == plain.prompt_tokens
    assert first.computed_tokens < plain.computed_tokens / 2, "the front is computed once"
    assert again.computed_tokens <= first.computed_tokens - NODE_TOKENS, "and then read, as far as nodes go"
    assert again.computed_tokens + again.reused_tokens == again.prompt_tokens


def test_a_job_that_broke_off_reads_what_it_had_computed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, want = job(folder, tmp_path, "plain")

    def fail(*args: object) -> None:
        raise RuntimeError("the machine went down")

    with monkeypatch.context() as patch:
        patch.setattr(runners, "choose_all", fail)
        with pytest.raises(RuntimeError):
            job(folder, tmp_path, "out", prefix_cache=True, overrides={"prefill_chunk": 256})
    stats, got = job(folder, tmp_path, "out", prefix_cache=True)
    assert got == want
    assert stats.reused_tokens >= 256


def test_nothing_is_stored_unasked(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_HOME", str(tmp_path / "home"))
    job(folder, tmp_path, "out")
    assert not list((tmp_path / "home").glob("**/*.kv"))

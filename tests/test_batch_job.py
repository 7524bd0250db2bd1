"""Batch jobs from file to file, and the command: what goes in, what comes out, and what is left when it is stopped."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import families
import pytest

import offload
from cli.main import main
from offload import Interrupted, OffloadError, UsageError
from offload.batch import job as batch_job
from offload.batch.job import JobStats

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import batch_crash  # noqa: E402

OPTIONS: dict[str, Any] = {"dtype": "float32", "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a vocabulary of words and a chat template."""
    return families.chatty(families.build("llama", max_position_embeddings=4096), tmp_path_factory.mktemp("tiny"))


def asked(count: int, **body: Any) -> list[dict[str, Any]]:
    """Requests of many kinds; some begin alike."""
    front = " ".join(f"w{4 + i}" for i in range(30))
    lines: list[dict[str, Any]] = []
    for i in range(count):
        own = {"max_tokens": 3 + i % 7, **body}
        if i % 3 == 0:
            own["prompt"] = f"{front} w{20 + i % 9} w{4 + i % 100}"
            lines.append({"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": own})
        elif i % 3 == 1:
            own["messages"] = [{"role": "user", "content": f"w{4 + i % 100} w9"}]
            lines.append({"custom_id": f"r{i}", "method": "POST", "url": "/v1/chat/completions", "body": own})
        else:
            lines.append({"custom_id": f"r{i}", "prompt": [5 + i % 90] * (1 + i % 11), **own})
    return lines


def write(path: Path, lines: Sequence[Any]) -> Path:
    path.write_bytes(b"".join((one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n" for one in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def same(line: dict[str, Any]) -> dict[str, Any]:
    """What of a result does not depend on when, and beside whom, it was computed."""
    body = json.loads(json.dumps((line["response"] or {"body": {}})["body"]))
    body.pop("created", None)
    if "usage" in body:
        body["usage"].pop("prompt_tokens_details")
    return {"id": line["id"], "custom_id": line["custom_id"], "error": line["error"], "body": body}


def results(path: Path) -> dict[str, dict[str, Any]]:
    """By custom_id; each must be there once."""
    lines = read(path)
    found = {line["custom_id"]: same(line) for line in lines}
    assert len(found) == len(lines), "an answer is there twice"
    return found


def text_of(line: dict[str, Any], choice: int = 0) -> str:
    found = line["body"]["choices"][choice]
    return str(found["message"]["content"] if "message" in found else found["text"])


def run(model: Path | str, given: Path | str, out: Path | str, **options: Any) -> JobStats:
    return offload.run_batch(model, given, out, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Forty requests, and their results without any interruption."""
    folder = tmp_path_factory.mktemp("whole")
    given = write(folder / "in.jsonl", asked(40))
    stats = run(model, given, folder / "out.jsonl")
    assert (stats.total, stats.done, stats.failed, stats.before) == (40, 40, 0, 0)
    return given, results(folder / "out.jsonl")


# what comes out


def test_every_request_is_answered_once_in_openais_form(model: Path, tmp_path: Path) -> None:
    given = write(tmp_path / "in.jsonl", asked(12))
    told: list[str] = []
    stats = run(model, given, tmp_path / "out.jsonl", note=told.append)
    assert (stats.done, told) == (12, [])
    found = {line["custom_id"]: line for line in read(tmp_path / "out.jsonl")}
    assert sorted(found) == sorted(f"r{i}" for i in range(12))
    for i, line in enumerate(asked(12)):
        answer = found[line["custom_id"]]
        body = answer["response"]["body"]
        assert (answer["error"], answer["response"]["status_code"]) == (None, 200)
        assert body["object"] == ("chat.completion" if i % 3 == 1 else "text_completion")
        assert body["usage"]["completion_tokens"] == 3 + i % 7
        assert body["choices"][0]["finish_reason"] == "length"
        assert text_of(same(answer))
    assert stats.new_tokens == sum(3 + i % 7 for i in range(12))
    assert stats.reused_tokens > 0, "four prompts begin alike"
    told_json = stats.as_json()
    assert json.loads(json.dumps(told_json)) == told_json
    assert told_json["predicted_new_tokens_per_s"] > 0


def test_placement_and_number_at_once_change_nothing(
    model: Path, whole: tuple[Path, dict[str, dict[str, Any]]], tmp_path: Path
) -> None:
    given, wanted = whole
    for i, options in enumerate(({"sequences": 1, "share": False}, {"sequences": 40},
                                 {"resident": "60%", "kv_resident": 1, "sequences": 7})):  # fmt: skip
        out = tmp_path / f"{i}.jsonl"
        run(model, given, out, **options)
        assert {k: v["body"]["choices"] for k, v in results(out).items()} == {
            k: v["body"]["choices"] for k, v in wanted.items()
        }


def test_what_a_body_asks_for(model: Path, tmp_path: Path) -> None:
    prompt = {"prompt": "w10 w11 w12", "max_tokens": 8}
    lines = [
        {"custom_id": "greedy", **prompt},
        {"custom_id": "logprobs", **prompt, "logprobs": 3},
        {"custom_id": "chat-logprobs", "max_tokens": 4, "logprobs": True, "top_logprobs": 2,
         "messages": [{"role": "user", "content": "w7"}]},
        {"custom_id": "completion-tokens", "max_completion_tokens": 2,
         "messages": [{"role": "user", "content": "w7"}]},
        {"custom_id": "seed", **prompt, "temperature": 1.5, "seed": 4},
        {"custom_id": "same seed", **prompt, "temperature": 1.5, "seed": 4},
        {"custom_id": "choices", **prompt, "temperature": 1.5, "seed": 4, "n": 3},
        {"custom_id": "no seed", **prompt, "temperature": 1.5, "top_p": 0.9},
        {"custom_id": "named", **prompt, "model": str(model)},
    ]  # fmt: skip
    for out in ("a", "b"):
        run(model, write(tmp_path / f"{out}.in", lines), tmp_path / out)
    first, again = results(tmp_path / "a"), results(tmp_path / "b")
    assert {k: v["body"]["choices"] for k, v in first.items()} == {k: v["body"]["choices"] for k, v in again.items()}
    assert all(line["error"] is None for line in first.values())
    greedy = text_of(first["greedy"])
    assert greedy == text_of(first["logprobs"]) == text_of(first["named"])
    logprobs = first["logprobs"]["body"]["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == 8
    assert all(p == max(top.values()) for p, top in zip(logprobs["token_logprobs"], logprobs["top_logprobs"],
                                                        strict=True))  # fmt: skip
    chat = first["chat-logprobs"]["body"]["choices"][0]["logprobs"]["content"]
    assert [len(entry["top_logprobs"]) for entry in chat] == [2] * 4
    assert first["completion-tokens"]["body"]["usage"]["completion_tokens"] == 2
    drawn = [text_of(first["choices"], i) for i in range(3)]
    assert drawn[0] == text_of(first["seed"]) == text_of(first["same seed"])
    assert len({*drawn, greedy}) == 4
    assert first["choices"]["body"]["usage"]["completion_tokens"] == 24


def test_stop_strings(model: Path, tmp_path: Path) -> None:
    plain = {"prompt": "w10 w11 w12", "max_tokens": 8}
    run(model, write(tmp_path / "in", [{"custom_id": "a", **plain}]), tmp_path / "out")
    words = text_of(results(tmp_path / "out")["a"]).split()
    stopped = [{"custom_id": "b", **plain, "stop": words[3]}, {"custom_id": "c", **plain, "stop": ["zzz", words[2]]}]
    run(model, write(tmp_path / "in2", stopped), tmp_path / "out2")
    found = results(tmp_path / "out2")
    for name, word in (("b", words[3]), ("c", words[2])):
        assert text_of(found[name]).split() == words[: words.index(word)]
        assert found[name]["body"]["choices"][0]["finish_reason"] == "stop"


def test_structured_output_is_valid(tmp_path: Path) -> None:
    """On the demo model, whose vocabulary can say anything."""
    schema = {
        "type": "object", "additionalProperties": False, "required": ["age", "tags"],
        "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 120},
                       "tags": {"type": "array", "maxItems": 2, "items": {"enum": ["red", "blue"]}}},
    }  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": schema}}
    lines = [
        {"custom_id": f"q{i}", "messages": [{"role": "user", "content": f"Tell me about person {i}."}],
         "max_tokens": 600, "response_format": form}
        for i in range(3)
    ] + [
        {"custom_id": "free", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 6},
        {"custom_id": "bad", "prompt": "x", "response_format": {"type": "json_schema", "json_schema": {
            "name": "x", "schema": {"type": "nonsense"}}}},
    ]  # fmt: skip
    stats = offload.run_batch("demo-dense", write(tmp_path / "in", lines), tmp_path / "out", dtype="float32")
    assert (stats.done, stats.failed) == (4, 1)
    found = results(tmp_path / "out")
    for i in range(3):
        choice = found[f"q{i}"]["body"]["choices"][0]
        assert choice["finish_reason"] == "stop"
        value = json.loads(choice["message"]["content"])
        assert sorted(value) == ["age", "tags"]
        assert isinstance(value["age"], int)
        assert 0 <= value["age"] <= 120
        assert set(value["tags"]) <= {"red", "blue"}
    assert found["bad"]["error"]["param"] == "response_format"


# what cannot be run


def test_hostile_input_harms_only_itself(model: Path, tmp_path: Path) -> None:
    good = asked(9)
    body = {"custom_id": "x", "prompt": "w5"}
    deep = b'{"custom_id": "deep", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    bad: dict[str, Any] = {
        "invalid_json": [b"\xff\xfe{}", deep, b"{", b"nonsense", b'{"custom_id": "nan", "prompt": [NaN]}'],
        "invalid_type": [b"[]", b"3", {**body, "custom_id": "t", "temperature": "hot"}],
        "missing_required_parameter": [{"prompt": "w5"}, {"custom_id": "nothing"}],
        "unsupported_parameter": [{**body, "custom_id": "u1", "logit_bias": {"5": 1}}, {**body, "custom_id": "u2",
                                  "tools": [{"type": "function"}]}, {**body, "custom_id": "u3", "frobnicate": 1}],
        "model_not_found": [{**body, "custom_id": "m", "model": "gpt-4o"}],
        "duplicate_custom_id": [good[0], good[4]],
        "context_length_exceeded": [{**body, "custom_id": "c1", "max_tokens": 5000},
                                    {"custom_id": "c2", "prompt": [5] * 5000}],
        "invalid_value": [{"custom_id": "v", "prompt": [99999]}, {"custom_id": "", "prompt": "w5"},
                          {"custom_id": "empty", "prompt": ""}],
    }  # fmt: skip
    lines = [*good]
    for i, one in enumerate(one for group in bad.values() for one in group):
        lines.insert(5 + i * 2 % len(lines), one)
    given = write(tmp_path / "in.jsonl", lines)
    with given.open("ab") as f:  # and a line of a gigabyte, most of it holes
        f.write(b'{"custom_id": "long", "prompt": "')
        f.truncate(f.tell() + (1 << 30))
        f.seek(0, os.SEEK_END)
        f.write(b'"}\n' + json.dumps({"custom_id": "last", "prompt": "w9", "max_tokens": 2}).encode())
    stats = run(model, given, tmp_path / "out.jsonl", errors=tmp_path / "errors.jsonl")
    found = results(tmp_path / "out.jsonl")
    assert sorted(found) == sorted([line["custom_id"] for line in good] + ["last"])
    write(tmp_path / "good.jsonl", good)
    run(model, tmp_path / "good.jsonl", tmp_path / "alone.jsonl")
    alone = results(tmp_path / "alone.jsonl")
    assert all(found[k]["body"]["choices"] == alone[k]["body"]["choices"] for k in alone)
    errors = [line["error"] for line in read(tmp_path / "errors.jsonl")]
    expected = {code: len(group) for code, group in bad.items()} | {"line_too_long": 1}
    counted = {code: sum(e["code"] == code for e in errors) for code in expected}
    assert counted == expected
    assert len(errors) == sum(expected.values()) == stats.failed
    assert len({e["line"] for e in errors}) == len(errors)
    assert stats.peak_rss_bytes < 4 << 30
    assert run(model, given, tmp_path / "out.jsonl", errors=tmp_path / "errors.jsonl").before == stats.total


def test_another_job_another_model_and_another_runner_are_refused(
    model: Path, whole: tuple[Path, dict[str, dict[str, Any]]], tmp_path: Path
) -> None:
    given, wanted = whole
    out = tmp_path / "out.jsonl"
    lines = given.read_bytes()
    own = tmp_path / "in.jsonl"
    own.write_bytes(lines)
    run(model, own, out)
    before = out.read_bytes()
    own.write_bytes(lines + b'{"custom_id": "more", "prompt": "w5"}\n')
    with pytest.raises(UsageError, match="the input is not the one"):
        run(model, own, out)
    own.write_bytes(lines)
    with pytest.raises(UsageError, match="max_tokens was 256 and is 7"):
        run(model, own, out, max_tokens=7)
    with pytest.raises(UsageError, match="begun without -e"):
        run(model, own, out, errors=tmp_path / "errors.jsonl")
    with pytest.raises(UsageError, match="model was"):
        run("demo-dense", own, out)
    with out.open("rb+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OffloadError, match="another run is writing it"):
            run(model, own, out)
    assert out.read_bytes() == before
    assert run(model, own, out).before == 40
    assert out.read_bytes() == before, "a job that is done is left as it is"
    assert results(out) == wanted


def test_two_runners_at_once_are_one_and_a_refusal(model: Path, tmp_path: Path) -> None:
    """The second comes while the first runs."""
    given, out = write(tmp_path / "in", asked(20)), tmp_path / "out"
    refusals: list[str] = []

    def beside(stats: JobStats) -> None:
        if stats.passes == 3:
            with pytest.raises(OffloadError, match="another run is writing it") as refusal:
                run(model, given, out)
            refusals.append(str(refusal.value))

    stats = run(model, given, out, progress=beside)
    assert refusals
    assert stats.done == len(results(out)) == 20


# stopping and going on


def stop_after(stop: threading.Event, *, done: int = 1 << 30, total: int = 1 << 30) -> Callable[[JobStats], None]:
    def seen(stats: JobStats) -> None:
        if stats.done >= done or stats.total >= total:
            stop.set()

    return seen


def test_stopped_and_started_again_until_it_is_done(
    model: Path, whole: tuple[Path, dict[str, dict[str, Any]]], tmp_path: Path
) -> None:
    given, wanted = whole
    out, runs, before = tmp_path / "out.jsonl", 0, 0
    while True:
        stop, runs = threading.Event(), runs + 1
        try:
            stats = run(model, given, out, sequences=6, stop=stop, progress=stop_after(stop, done=before + 9))
            break
        except Interrupted:
            kept = results(out)
            assert before + 9 <= len(kept) < 40
            assert {k: wanted[k] for k in kept} == kept
            before = len(kept)
    assert 2 <= runs <= 5
    assert stats.before == before
    assert results(out) == wanted


def test_stopped_while_lines_are_read_nothing_is_left(model: Path, tmp_path: Path) -> None:
    given, stop = write(tmp_path / "in", asked(600)), threading.Event()
    with pytest.raises(Interrupted):
        run(model, given, tmp_path / "out", stop=stop, progress=stop_after(stop, total=256))
    assert (tmp_path / "out").read_bytes() == b""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


class Killed(Exception):
    """As if the power had gone: what was not on disk is not there."""


def test_a_long_answer_goes_on_from_its_checkpoint(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_job, "CHECKPOINT_S", 0.0)
    monkeypatch.setattr(batch_job, "_UNSEEN", 8)
    long = [{"custom_id": "long", "prompt": "w8 w9", "max_tokens": 300, "logprobs": 2},
            {"custom_id": "drawn", "prompt": "w8 w9", "max_tokens": 290, "temperature": 1.0, "n": 2},
            {"custom_id": "short", "prompt": "w4", "max_tokens": 5}]  # fmt: skip
    given = write(tmp_path / "in", long)
    whole = run(model, given, tmp_path / "whole")
    assert whole.new_tokens == 300 + 2 * 290 + 5
    out, left, runs = tmp_path / "out", whole.new_tokens, 0
    while True:

        def seen(stats: JobStats) -> None:
            if stats.new_tokens >= 250:
                raise Killed

        try:
            runs += 1
            stats = run(model, given, out, progress=seen)
            break
        except Killed:
            left -= 250
        assert runs < 20
    assert runs > 2, "it was stopped more than once"
    # a run begins at most so many tokens behind: those of each since its last checkpoint
    assert stats.new_tokens <= left + 3 * runs * 20
    wanted, found = results(tmp_path / "whole"), results(out)
    for name in ("drawn", "short"):
        assert found[name] == wanted[name]
    (a,), (b,) = wanted["long"]["body"]["choices"], found["long"]["body"]["choices"]
    assert a["text"] == b["text"]
    assert a["logprobs"]["tokens"] == b["logprobs"]["tokens"]
    assert a["logprobs"]["token_logprobs"] == pytest.approx(b["logprobs"]["token_logprobs"], abs=1e-4)


def test_whatever_kills_it_every_request_is_answered_once(model: Path, tmp_path: Path) -> None:
    """Ten kills of the campaign in bench/: at any time, in any call, on a full disk, and what they leave harmed."""
    figures = batch_crash.campaign(tmp_path / "c", kills=10, seed=2, model=str(model), count=60, longest=60)
    assert figures["kills"] == 10
    assert sum(figures["by"].values()) == 10
    assert all(figures["by"].values())
    assert figures["jobs"] >= 1
    assert figures["answers_verified"] > 60


def test_the_campaign_notices_what_is_wrong(model: Path, tmp_path: Path) -> None:
    given = tmp_path / "in"
    given.write_text("\n".join(batch_crash.requests(20, 6)))
    job = batch_crash.Job(str(model), given, tmp_path / "out", tmp_path / "errors")
    run(model, given, job.out, errors=job.errors)
    job.wanted = job.answers()
    assert len(job.wanted) == 20
    job.complete()
    good = job.out.read_bytes()
    first, second, *_ = good.splitlines(keepends=True)
    job.out.write_bytes(good + first)
    with pytest.raises(batch_crash.BenchError, match="twice"):
        job.answers()
    job.out.write_bytes(good.replace(first, b""))
    with pytest.raises(batch_crash.BenchError, match="1 requests have no answer"):
        job.complete()
    job.out.write_bytes(good[:-1])
    with pytest.raises(batch_crash.BenchError, match="no answer"):
        job.complete()
    job.out.write_bytes(good + second[:40])
    assert job.answers() == job.wanted, "half a line at the end is no answer"
    with pytest.raises(batch_crash.BenchError, match="half a line"):
        job.complete()
    job.out.write_bytes(good.replace(b'"finish_reason": "length"', b'"finish_reason": "stop"', 1))
    with pytest.raises(batch_crash.BenchError, match="otherwise"):
        job.answers()
    job.out.write_bytes(first[:50] + b"\n" + good)
    with pytest.raises(batch_crash.BenchError, match="line 1 is no result"):
        job.answers()


# the command


def command(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    try:
        code = main(["batch", *map(str, args)])
    except SystemExit as e:
        code = int(e.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


FLAGS = ("--dtype", "float32", "--ignore-eos")


def test_summary_and_json(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, out = write(tmp_path / "in", [*asked(6), b"nonsense"]), tmp_path / "out"
    args = (
        model,
        "-i",
        given,
        "-o",
        out,
        "-e",
        tmp_path / "errors",
        "--summary",
        tmp_path / "s.json",
        "--json",
        *FLAGS,
    )
    code, told, err = command(capsys, *args)
    assert code == 0
    summary = json.loads(told)
    assert json.loads((tmp_path / "s.json").read_text()) == summary
    assert (summary["total"], summary["done"], summary["failed"]) == (7, 6, 1)
    assert summary["new_tokens"] == sum(3 + i for i in range(6))
    assert "6 of 7 answered · 1 with an error" in err
    assert "predicted" in err
    assert len(read(tmp_path / "errors")) == 1
    code, told, err = command(capsys, *args)
    assert (code, json.loads(told)["before"]) == (0, 7)
    assert "7 before" in err


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        ((), 2, "-i"),
        (("-i", "{in}"), 2, "-o"),
        (("-i", "{in}", "-o", "-", "--json"), 2, "--summary FILE"),
        (("-i", "/nowhere/in", "-o", "{out}"), 2, "/nowhere/in"),
        (("-i", "{in}", "-o", "/nowhere/out"), 2, "/nowhere"),
        (("-i", "{in}", "-o", "{in}"), 2, "is the input"),
        (("-i", "{in}", "-o", "{out}", "-e", "{out}"), 2, "-e"),
        (("-i", "{in}", "-o", "{out}", "--sequences", "0"), 2, "--sequences"),
        (("-i", "{in}", "-o", "{out}", "--max-tokens", "x"), 2, "--max-tokens"),
        (("-i", "{in}", "-o", "{out}", "--summary", "/nowhere/s.json"), 2, "--summary"),
        (("-i", "{in}", "-o", "{out}", "--ram", "64MiB"), 1, "the smallest that works is"),
        (("-i", "{foreign}", "-o", "{foreign}.out"), 2, "move the file away"),
    ],
)
def test_mistakes_get_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], code: int, says: str
) -> None:
    given = write(tmp_path / "in", asked(2))
    write(tmp_path / "foreign", asked(2))
    (tmp_path / "foreign.out").write_text("my diary\n")
    named = {"in": given, "out": tmp_path / "out", "foreign": tmp_path / "foreign"}
    got, out, err = command(capsys, model, *(a.format(**named) for a in args))
    assert (got, out) == (code, "")
    assert says in err
    assert len(err.strip().splitlines()) == 1, err
    assert (tmp_path / "foreign.out").read_text() == "my diary\n"


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = command(capsys, "no-such-model", "-i", write(tmp_path / "in", asked(1)), "-o", tmp_path / "out")
    assert code == 1
    assert "no-such-model" in err
    assert not (tmp_path / "out").exists()


@contextlib.contextmanager
def stdin_of(data: bytes) -> Iterator[None]:
    """Bytes on descriptor 0."""
    kept = os.dup(0)
    end, begin = os.pipe()
    feeder = threading.Thread(target=lambda: (os.write(begin, data), os.close(begin)))
    os.dup2(end, 0)
    feeder.start()
    try:
        yield
    finally:
        os.dup2(kept, 0)
        for fd in (kept, end):
            os.close(fd)
        feeder.join()


def test_from_stdin_to_stdout(
    model: Path, whole: tuple[Path, dict[str, dict[str, Any]]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given, wanted = whole
    with stdin_of(given.read_bytes()):
        code, out, err = command(capfd, model, "-i", "-", "-o", "-", "--summary", tmp_path / "s.json", *FLAGS)
    assert code == 0, err
    (tmp_path / "out").write_text(out)
    assert results(tmp_path / "out") == wanted
    assert json.loads((tmp_path / "s.json").read_text())["done"] == 40
    # a file's results can be gone on with from stdin, too
    with stdin_of(given.read_bytes()):
        assert command(capfd, model, "-i", "-", "-o", tmp_path / "kept", *FLAGS)[0] == 0
    with stdin_of(given.read_bytes()):
        assert "40 before" in command(capfd, model, "-i", "-", "-o", tmp_path / "kept", *FLAGS)[2]
    assert results(tmp_path / "kept") == wanted


def test_a_reader_that_is_gone(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = write(tmp_path / "in", asked(6))
    end, begin = os.pipe()
    os.close(end)
    code, _, err = command(capsys, model, "-i", given, "-o", f"/dev/fd/{begin}", *FLAGS)
    os.close(begin)
    assert code == 1
    assert err.endswith("offload batch: who reads the results is gone; name a file with -o to be able to continue\n")
    assert "Traceback" not in err


def spawn(*args: object, **options: Any) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "cli.main", "batch", *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=env, cwd="/",
        # a shell that runs the suite in the background has its children ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options,
    )  # fmt: skip


def await_lines(path: Path, count: int, p: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert p.poll() is None, p.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_and_sigterm_end_a_job_that_goes_on_later(model: Path, tmp_path: Path) -> None:
    """Within two seconds: a busy machine gets three attempts."""
    lines = [{**line, "max_tokens": 3 if i < 12 else 350} if "body" not in line else line
             for i, line in enumerate(asked(60))]  # fmt: skip
    given, out, took, kept = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", [], 0
    for attempt in range(4):
        p = spawn(model, "-i", given, "-o", out, "--sequences", 4, *FLAGS)
        await_lines(out, kept + 3, p)
        number = signal.SIGINT if attempt % 2 == 0 else signal.SIGTERM
        began = time.monotonic()
        p.send_signal(number)
        _, err = p.communicate(timeout=60)
        took.append(time.monotonic() - began)
        assert p.returncode == 130, err
        last = err.strip().splitlines()[-1]
        assert "interrupted; what is answered is kept" in last
        assert f"offload batch {model} -i {given} -o {out} --sequences 4" in last
        assert "Traceback" not in err
        now = results(out)
        assert kept + 3 <= len(now) < 60
        kept = len(now)
        if attempt and min(took[0::2]) < 2 and min(took[1::2]) < 2:
            break
    assert min(took[0::2]) < 2, took
    assert min(took[1::2]) < 2, took
    stats = run(model, given, out)
    assert (stats.before, stats.done) == (kept, 60)
    run(model, given, tmp_path / "whole.jsonl")
    assert results(out) == results(tmp_path / "whole.jsonl")


def test_ctrl_c_while_it_waits_for_stdin(model: Path, tmp_path: Path) -> None:
    p = spawn(model, "-i", "-", "-o", tmp_path / "out", stdin=subprocess.PIPE)
    spill = Path(os.environ["OFFLOAD_CACHE"]).resolve()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:  # it has begun to keep what comes
        with contextlib.suppress(OSError):
            if any(os.readlink(f).startswith(str(spill)) for f in Path(f"/proc/{p.pid}/fd").iterdir()):
                break
        assert p.poll() is None
        time.sleep(0.05)
    p.send_signal(signal.SIGINT)
    assert p.wait(timeout=30) == 130
    assert p.stdin is not None
    p.stdin.close()
    assert p.stderr is not None
    assert "Traceback" not in p.stderr.read()
    assert p.stdout is not None
    p.stdout.close()
    p.stderr.close()


# from Python


def test_leaving_a_batch_early_leaves_the_model_usable(model: Path) -> None:
    prompts = [[5 + i] * (1 + i) for i in range(8)]
    with offload.load(model, context=512, dtype="float32") as loaded:
        wanted = {r.index: r.token_ids for r in loaded.batch(prompts, max_tokens=6, ignore_eos=True)}
        assert sorted(wanted) == list(range(8))
        for result in loaded.batch(prompts, max_tokens=6, ignore_eos=True, sequences=2):
            assert result.token_ids == wanted[result.index]
            break
        assert loaded.run(prompts[:1], max_new_tokens=6, ignore_eos=True).token_ids == [list(wanted[0])]
        endless = ([5 + i % 90] for i in range(1 << 40))
        some = loaded.batch(endless, max_tokens=6, ignore_eos=True, sequences=3)
        assert len([next(some) for _ in range(20)]) == 20
        some.close()  # type: ignore[attr-defined]
        again = {r.index: r.token_ids for r in loaded.batch(prompts, max_tokens=6, ignore_eos=True)}
        assert again == wanted


def test_asynchronous_batches(model: Path) -> None:
    prompts = [[5 + i] * (1 + i) for i in range(8)]

    async def all_of(loaded: offload.Model) -> dict[int, tuple[int, ...]]:
        return {r.index: r.token_ids async for r in loaded.abatch(prompts, max_tokens=6, ignore_eos=True)}

    async def use(loaded: offload.Model) -> None:
        wanted = await all_of(loaded)
        assert sorted(wanted) == list(range(8))
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        endless = ([5 + i % 90] for i in range(1 << 40))
        async with contextlib.aclosing(loaded.abatch(endless, max_tokens=200, ignore_eos=True, sequences=3)) as found:  # type: ignore[type-var]
            async for result in found:
                assert len(result.token_ids) == 200
                break
        assert ticks > 10, "the loop went on meanwhile"
        ticking.cancel()
        assert await all_of(loaded) == wanted
        # just left: it ends when the loop comes to it
        async for _ in loaded.abatch(([5] for _ in range(1 << 40)), max_tokens=200, ignore_eos=True, sequences=2):
            break
        deadline = time.monotonic() + 60
        while any(t.name == "batch" for t in threading.enumerate()) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert await all_of(loaded) == wanted
        # cancelled while it computes
        task = asyncio.create_task(all_of(loaded))
        await asyncio.sleep(0.01)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert await all_of(loaded) == wanted
        with pytest.raises(UsageError, match="sequences"):
            async for _ in loaded.abatch(prompts, sequences=0):
                pass

    with offload.load(model, context=1024, dtype="float32") as loaded:
        asyncio.run(use(loaded))
        assert not loaded.engine.interrupt.is_set()
        assert loaded.run(prompts[:1], max_new_tokens=3, ignore_eos=True).token_ids

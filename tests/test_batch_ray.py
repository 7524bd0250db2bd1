"""`offload batch --on ray`: the files, the answers and the exactly-once of a local run, whoever dies meanwhile.

What needs a cluster is skipped where ray, an optional extra, is not installed; a worker is tested without.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

import offload
from cli.main import main
from offload.batch import worker
from offload.batch.job import JobStats
from offload.batch.results import known
from offload.batch.worker import Order, Row, Worker
from offload.checkpoint import read_checkpoint
from offload.config import Job, RunConfig
from offload.errors import Interrupted, ModelError, OffloadError, UsageError
from offload.fingerprint import fingerprint
from offload.hf import load_config
from offload.resolve import everywhere, resolve

ROOT = Path(__file__).parent.parent
OPTIONS: dict[str, Any] = {"ram": "2GiB", "dtype": "float32", "threads": 1}

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # ray has some
    pytest.mark.timeout(400),
]
needs_ray = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("ray", "pyarrow")), reason="ray is an optional extra"
)


def lines(count: int, tokens: int) -> list[dict[str, Any]]:
    """Requests of every kind: fronts in common, sampled, two choices, a stop."""
    out = []
    for i in range(count):
        front = ("The old harbour town " if i % 2 else "A short history of rivers ") * 12 if i % 3 == 0 else ""
        body: dict[str, Any] = {"prompt": f"{front}Number {i} is", "max_tokens": tokens + i % 7, "seed": i}
        body["temperature"] = 0.8 if i % 5 == 0 else 0
        if i % 10 == 3:
            body["n"] = 2
        out.append({"custom_id": f"request {i} é", "method": "POST", "url": "/v1/completions", "body": body})
    return out


def write(path: Path, requests: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in requests) + "no request\n", encoding="utf-8")
    return path


def bodies(path: Path) -> dict[str | None, Any]:
    """What was answered, each once; without what no two runs have in common."""
    out: dict[str | None, Any] = {}
    for line in path.read_bytes().splitlines():
        told = json.loads(line)
        assert told["custom_id"] not in out
        if told["response"] is not None:
            del told["response"]["request_id"], told["response"]["body"]["created"]
            told["response"]["body"]["usage"].pop("prompt_tokens_details", None)  # depends on who ran beside whom
        out[told["custom_id"]] = told
    return out


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A local cluster's address."""
    environment = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal", "PYTHONPATH": str(ROOT),
                   "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        import ray

        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="CRITICAL")
        yield str(ray.get_runtime_context().gcs_address)
        ray.shutdown()


def local(tmp_path: Path, source: Path, **options: Any) -> dict[str | None, Any]:
    """What a run in this process answers."""
    offload.run_batch("demo-moe", source, tmp_path / "local.jsonl", **{**OPTIONS, **options})
    return bodies(tmp_path / "local.jsonl")


def on_ray(source: Path, out: Path, **options: Any) -> JobStats:
    return offload.run_batch("demo-moe", source, out, on="ray", workers=2, **{**OPTIONS, **options})


def workers_of(pid: int) -> list[psutil.Process]:
    """The processes of workers among those that `pid` has begun."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if process.name().startswith("ray::Map") or "".join(process.cmdline()).startswith("ray::Map"):
                found.append(process)
        except psutil.Error:
            continue
    return found


@needs_ray
def test_the_answers_are_those_of_a_local_run(tmp_path: Path, cluster: str) -> None:
    source = write(tmp_path / "in.jsonl", lines(40, 12))
    seen: list[int] = []
    stats = on_ray(source, tmp_path / "out.jsonl", progress=lambda s: seen.append(len(workers_of(os.getpid()))))
    assert (stats.total, stats.done, stats.failed) == (41, 40, 1)
    assert max(seen) == 2
    assert stats.new_tokens > 400 and stats.passes > 24 and stats.predicted and stats.peak_rss_bytes > 1 << 20
    assert bodies(tmp_path / "out.jsonl") == local(tmp_path, source)
    again = on_ray(source, tmp_path / "out.jsonl")
    assert (again.before, again.new_tokens) == (41, 0)


@needs_ray
def test_one_worker_is_killed(tmp_path: Path, cluster: str) -> None:
    source = write(tmp_path / "in.jsonl", lines(40, 250))
    killed: list[int] = []

    def progress(stats: JobStats) -> None:
        if stats.done >= 3 and not killed:
            victim = workers_of(os.getpid())[0]
            killed.append(victim.pid)
            victim.kill()

    stats = on_ray(source, tmp_path / "out.jsonl", progress=progress)
    assert killed and (stats.done, stats.failed) == (40, 1)
    assert bodies(tmp_path / "out.jsonl") == local(tmp_path, source)


@needs_ray
def test_workers_that_die_again_and_again_end_the_job(
    tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from offload.batch import cluster as on

    monkeypatch.setattr(on, "RESTARTS", 1)
    source = write(tmp_path / "in.jsonl", lines(8, 250))
    ended = threading.Event()

    def kill() -> None:
        while not ended.wait(0.5):
            for process in workers_of(os.getpid()):
                process.kill()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(kill)
        try:
            with pytest.raises(OffloadError, match="run the same command again"):
                on_ray(source, tmp_path / "out.jsonl")
        finally:
            ended.set()
    offload.run_batch("demo-moe", source, tmp_path / "out.jsonl", **OPTIONS)
    assert bodies(tmp_path / "out.jsonl") == local(tmp_path, source)


@needs_ray
def test_a_killed_driver_is_resumed_without_a_cluster(tmp_path: Path, cluster: str) -> None:
    source, out = write(tmp_path / "in.jsonl", lines(40, 250)), tmp_path / "out.jsonl"
    driver = spawn(source, out, cluster)
    try:
        wait_for(lambda: out.exists() and len(out.read_bytes().splitlines()) > 4, driver)
        driver.kill()
        driver.communicate()
    finally:
        driver.kill()
    stats = offload.run_batch("demo-moe", source, out, **OPTIONS)
    assert 4 < stats.before < 41
    assert bodies(out) == local(tmp_path, source)


@needs_ray
def test_ctrl_c_keeps_what_is_answered_and_says_how_to_go_on(tmp_path: Path, cluster: str) -> None:
    source, out = write(tmp_path / "in.jsonl", lines(40, 250)), tmp_path / "out.jsonl"
    driver = spawn(source, out, cluster)
    try:
        wait_for(lambda: out.exists() and len(out.read_bytes().splitlines()) > 4, driver)
        driver.send_signal(signal.SIGINT)
        told, said = driver.communicate(timeout=30)
    finally:
        driver.kill()
    assert driver.returncode == 130 and told == ""
    assert "interrupted; what is answered is kept" in said and "Traceback" not in said
    for line in said.splitlines():  # nobody else's
        assert line.startswith(("offload batch:", "41 requests")) or "/41 requests" in line
    stop = threading.Event()

    def progress(stats: JobStats) -> None:
        if stats.running:
            stop.set()

    with pytest.raises(Interrupted):
        on_ray(source, out, progress=progress, stop=stop)
    offload.run_batch("demo-moe", source, out, **OPTIONS)
    assert bodies(out) == local(tmp_path, source)


def spawn(source: Path, out: Path, address: str) -> subprocess.Popen[str]:
    command = ["batch", "demo-moe", "-i", str(source), "-o", str(out), "--on", "ray", "--workers", "2", "--ram", "2GiB",
               "--dtype", "float32", "--threads", "1"]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "cli.main", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": address}, cwd="/",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def wait_for(what: Callable[[], bool], driver: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 200
    while not what():
        if driver.poll() is not None:
            raise AssertionError(f"it ended with {driver.returncode}: {driver.communicate()[1]}")
        assert time.monotonic() < until
        time.sleep(0.05)


@needs_ray
def test_what_makes_a_worker_stop_is_one_line(tmp_path: Path, cluster: str) -> None:
    source = write(tmp_path / "in.jsonl", lines(4, 8))
    with pytest.raises(UsageError, match="--ram"):
        on_ray(source, tmp_path / "out.jsonl", ram=None)
    with pytest.raises(OffloadError, match="the smallest that works is"):
        on_ray(source, tmp_path / "out.jsonl", ram="64MiB")


def test_one_line_for_each_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["-i", str(write(tmp_path / "in.jsonl", lines(1, 1))), "-o", str(tmp_path / "out.jsonl")]
    monkeypatch.setitem(sys.modules, "ray", None)
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "ray" else there(name, *a))
    for flags, says in (
        (["--on", "spark"], "--on: 'spark' is not ray"),
        (["--workers", "2"], "--workers: there are workers with --on ray only"),
        (["--on", "ray", "--workers", "0"], "--workers: 0 is not a whole number above zero"),
        (["--on", "ray"], "pip install 'offload[ray]'"),
    ):
        assert main(["batch", "demo-moe", *files, *flags]) == 2
        out, err = capsys.readouterr()
        assert says in err and len(err.splitlines()) == 1 and not out
    assert not (tmp_path / "out.jsonl").exists()


# a worker, without a cluster


def order(model: str = "demo-moe", **changed: Any) -> Order:
    folder = resolve(model)
    given: dict[str, Any] = {
        "job": "0123456789abcdef", "model": model, "name": "demo", "names": frozenset({"demo"}),
        "weights": fingerprint(list(read_checkpoint(folder).files), load_config(folder)), "max_tokens": 16,
        "config": RunConfig(**OPTIONS, batch=Job(12, 12, 12, 64, 4)), "ignore_eos": True, "share": True, **changed,
    }  # fmt: skip
    return Order(**given)


def rows(numbers: range, tokens: int = 8) -> list[Row]:
    return [
        Row(i, json.dumps({"custom_id": f"c{i}", "prompt": f"Number {i}", "max_tokens": tokens}).encode(), {})
        for i in numbers
    ]


def test_calls_that_overlap_run_together_and_the_last_message_has_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "EVERY_S", 0.02)
    one = Worker(order())
    with ThreadPoolExecutor(3) as pool:
        calls = list(pool.map(lambda at: list(one.answer(rows(range(at, at + 4), 24))), (1, 5, 9)))
    for at, messages in zip((1, 5, 9), calls, strict=True):
        assert sorted(a.number for a in messages[-1].answers) == list(range(at, at + 4))
        for answer in messages[-1].answers:
            found = known("0123456789abcdef", answer.line)
            assert found is not None and (found.number, found.custom_id) == (answer.number, f"c{answer.number}")
    last = max((m.told for messages in calls for m in messages), key=lambda told: told.passes)
    assert last.generated == 12 * 24 and last.sequences == 4
    assert last.passes < 12 * 24 / 4 * 2  # far from one by one
    assert not list(one.answer([]))[-1].answers
    again = list(one.answer(rows(range(1, 2), 24)))  # the same line a second time is answered a second time
    assert [a.number for a in again[-1].answers] == [1]
    one.close()


def test_checkpoints_of_long_answers_are_sent_and_taken_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "EVERY_S", 0.01)
    monkeypatch.setattr(worker, "CHECKPOINT_S", 0.0)
    asked = rows(range(1, 2), 400)
    first = Worker(order())
    messages = list(first.answer(asked))
    first.close()
    points = [c for m in messages for c in m.checkpoints]
    assert points and {(c.number, c.choice) for c in points} == {(1, 0)}
    resumed = Worker(order())
    more = list(resumed.answer([Row(1, asked[0].line, {0: points[-1].state})]))
    resumed.close()
    assert more[-1].told.generated < messages[-1].told.generated
    bodies = [json.loads(m[-1].answers[0].line)["response"]["body"]["choices"] for m in (messages, more)]
    assert bodies[0] == bodies[1]


def test_a_worker_that_cannot_run_says_so_to_every_call(tiny_moe: Path) -> None:
    one = Worker(order(weights="others"), where="node 7")
    for _ in range(2):
        with pytest.raises(ModelError, match="on node 7 has other weights"):
            list(one.answer(rows(range(1, 3))))
    lost = Worker(order(model=str(tiny_moe)))  # it has no tokenizer, so that what was good elsewhere is refused
    with pytest.raises(ModelError, match="refuses line 1"):
        list(lost.answer(rows(range(1, 3))))


def test_a_model_is_called_what_it_is_called_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert everywhere("model") == str(tmp_path / "model")
    assert everywhere(None) == "demo-moe"
    assert everywhere("some/model") == "some/model"

"""The batch benchmarks count and show what they say, on models of a few MB.

Workers run in this process: starting one takes longer than what it does here.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import batch  # noqa: E402
import batch_growth  # noqa: E402
import batch_job as job  # noqa: E402
import batch_prefix  # noqa: E402
import batch_runs  # noqa: E402
import batch_worker  # noqa: E402
import checkpoints  # noqa: E402
import disk  # noqa: E402
import predict  # noqa: E402
import tables  # noqa: E402
from batch_job import Request  # noqa: E402
from common import BenchError, machine  # noqa: E402

SMALL = "llama-3b-small"


def request(prompt: int, new: int) -> Request:
    return Request(tuple(range(3, 3 + prompt)), new)


# the job


def test_the_mix_has_the_lengths_it_promises_and_is_the_same_again() -> None:
    mix = job.mixed(64, 4096)
    prompts, new = [len(r.prompt) for r in mix], [r.new for r in mix]
    assert min(prompts) >= 32 and max(prompts) <= 512 and min(new) >= 16 and max(new) <= 64
    assert sum(prompts) / 64 == pytest.approx(152, abs=2) and sum(new) / 64 == pytest.approx(32, abs=1)
    assert all(3 <= t < 4096 for r in mix for t in r.prompt)
    assert job.mixed(64, 4096) == mix != job.mixed(64, 4096, seed=8)
    other, same = job.totals(job.mixed(64, 4096, seed=8)), job.totals(mix)
    assert all(other[k] == same[k] for k in ("prompt_tokens", "new_tokens", "longest_prompt", "passes"))
    assert prompts != sorted(prompts)


def test_requests_over_documents_share_their_fronts() -> None:
    asked = job.over_documents(12, 3, 50, 5, 4, 512)
    fronts = [r.prompt[:50] for r in asked]
    assert len(set(fronts)) == 3 and all(fronts.count(f) == 4 for f in set(fronts))
    assert len({r.prompt for r in asked}) == 12 and {(len(r.prompt), r.new) for r in asked} == {(55, 4)}
    assert fronts != sorted(fronts)  # nobody has put them in order for the runner


def test_a_part_stands_for_all() -> None:
    mix = job.mixed(64, 512)
    part = job.spread(mix, 8)
    assert len(set(part)) == 8 and part == sorted(part)
    mean = sum(len(mix[i].prompt) for i in part) / 8
    assert mean == pytest.approx(152, rel=0.1)
    assert job.spread(mix, 100) == list(range(64))


def test_a_job_survives_its_file(tmp_path: Path) -> None:
    mix = job.mixed(5, 512)
    assert job.load(job.save(mix, tmp_path / "r.json")) == mix


# passes


def test_continuous_batching_by_hand() -> None:
    requests = [request(5, 2), request(4, 3), request(2, 1)]
    # chunk 6: 5+1 · decode and 3 · the first has left, the third joins: decode and 2 · decode
    assert job.continuous(requests, 2, 6) == [(6, 0), (3, 1), (2, 1), (0, 1)]


@pytest.mark.parametrize(("parallel", "chunk"), [(1, 1000), (3, 16), (16, 64), (64, 512)])
def test_every_token_is_computed_once(parallel: int, chunk: int) -> None:
    mix = job.mixed(32, 512)
    passes = job.continuous(mix, parallel, chunk)
    assert sum(p for p, _ in passes) == sum(len(r.prompt) for r in mix)
    assert sum(d for _, d in passes) == sum(r.new - 1 for r in mix)
    assert all(0 < p + d <= chunk and d <= parallel for p, d in passes)
    assert job.context(mix, parallel, chunk, "each") == 768 * parallel  # the longest has 518 cells
    unified = job.context(mix, parallel, chunk, "unified")
    assert max(r.cells for r in mix) <= unified <= sum(r.cells for r in mix) + 256
    if parallel == 64:
        assert unified == -(-sum(r.cells for r in mix) // 256) * 256


def test_padded_batches_go_on_until_their_longest_answer() -> None:
    requests = [request(9, 2), request(3, 5), request(4, 3), request(8, 1)]
    assert job.groups(requests, 2, "prompt") == [[1, 2], [3, 0]]
    assert job.groups(requests, 3, "new") == [[3, 0, 2], [1]]
    assert job.padded(requests, [[1, 2], [3, 0]]) == [(8, 0), *[(0, 2)] * 4, (18, 0), (0, 2)]


# seconds


def test_passes_are_fitted_by_what_a_pass_and_a_token_cost() -> None:
    done = [(2 + 0.5 * t, (t, 0)) for t in (1, 4, 10)]
    assert job.fit(done) == (pytest.approx(2), pytest.approx(0.5))
    assert job.fit([(3.0, (6, 0)), (5.0, (6, 0))]) == (0, pytest.approx(4 / 6))  # nothing to tell them apart
    a, b = job.fit([(1.0, (1, 0)), (30.0, (10, 0))])  # a pass cannot cost less than nothing
    assert a == 0 and b == pytest.approx(301 / 101)
    assert job.fit([(5.0, (1, 0)), (3.0, (9, 0))]) == (4.0, 0.0)


def test_a_job_that_was_cut_is_estimated_from_its_passes() -> None:
    plan = [(10, 0), (0, 2), (0, 2), (20, 0), (0, 2)]
    done = [(1 + 0.1 * sum(p), p) for p in plan[:3]]
    spent = sum(s for s, _ in done)
    assert job.estimate(spent, done, plan) == pytest.approx(spent + 1 + 2 + 1 + 0.2)
    assert job.estimate(2 * spent, done, plan) == pytest.approx(2 * (spent + 4.2))  # what passes do not count
    assert job.estimate(1.0, [], plan) == float("inf")


def test_runs_are_judged_over_the_whole_job() -> None:
    requests = [request(6, 2), request(2, 2)]
    answers = {"0": [1, 2], "1": [3, 4]}
    whole = job.judge(requests, {"job_s": 4.0, "answers": answers}, None)
    assert whole["whole"] and whole["answered"] == 2 and whole["job_s"] == 4
    assert (whole["new_tokens_per_s"], whole["tokens_per_s"], whole["measured_share"]) == (1, 3, 1)
    run = {"job_s": 4.0, "answers": {"0": [1, 2], "1": []}, "steps": [[3.0, 6, 0], [1.0, 0, 1]]}
    cut = job.judge(requests, run, None)
    assert (cut["whole"], cut["answered"], cut["job_s"]) == (False, 1, pytest.approx(4 * 12 / 8))
    planned = job.judge(requests, run, [(6, 0), (0, 1), (2, 0), (0, 1)])
    assert planned["job_s"] == pytest.approx(4 + 1.4 + 1) and planned["measured_share"] == pytest.approx(4 / 6.4)


def test_answers_are_compared_up_to_the_first_difference() -> None:
    one = {"0": [1, 2, 3], "1": [4, 5, 6, 7], "2": [8], "4": [1, 1]}
    other = {"0": [1, 2, 3], "1": [4, 9, 6, 7], "3": [8], "4": [1]}  # the last was cut
    assert job.agreement(one, other) == {
        "requests": 2, "identical": 1, "positions": 7, "before_first_difference": 4,
    }  # fmt: skip


# the floor


def test_a_dense_floor_by_hand() -> None:
    spec = checkpoints.SPECS[SMALL]
    requests = [request(10, 4), request(6, 2)]
    rates = [{"tokens": 1, "layer_s": 1.0, "head_s": 0.5}, {"tokens": 5, "layer_s": 2.0, "head_s": 1.0}]
    found = job.floor(spec, requests, room=spec.dense_bytes - 1000, bandwidth=100.0, rates=rates)
    assert (found["passes"], found["bytes_read"], found["read_s"]) == (4, 4000, 40.0)
    # 13 + 7 tokens through 4 layers, 6 choices; the best rate is that of five at once, and near the mean pass
    assert found["compute_s"] == found["at_batch_s"] == pytest.approx((20 * 4 * 2.0 + 6 * 1.0) / 5)
    assert (found["bound"], found["floor_s"]) == ("disk", 40.0)
    assert found["kv_bytes"] == 20 * 4 * 4 * 2 * 32
    fits = job.floor(spec, requests, room=spec.dense_bytes, bandwidth=100.0, rates=rates)
    assert (fits["bytes_read"], fits["bound"]) == (0, "compute")


def test_few_tokens_need_few_experts() -> None:
    spec = checkpoints.SPECS["olmoe-small"]  # 3 layers, 4 of 16 experts
    found = job.floor(spec, [request(1, 2)], room=spec.dense_bytes, bandwidth=1.0, rates=[])
    assert found["bytes_read"] == pytest.approx(2 * 3 * 4 * spec.expert_bytes)
    many = job.floor(spec, [request(400, 1)], room=spec.dense_bytes, bandwidth=1.0, rates=[])
    assert many["bytes_read"] == pytest.approx(3 * 16 * spec.expert_bytes)
    rate = {"tokens": 1, "layer_s": 0.1, "head_s": 0.2}
    one = job.ceiling(spec, 1, room=spec.dense_bytes, bandwidth=1.0, rate=rate)
    assert one == {"disk": pytest.approx(1 / (3 * 4 * spec.expert_bytes)), "compute": pytest.approx(2.0)}
    assert job.ceiling(spec, 8, room=spec.weight_bytes, bandwidth=1.0, rate=None) == {"disk": 0.0, "compute": 0.0}


def test_what_padded_batches_leave_for_weights() -> None:
    spec, mix = checkpoints.SPECS["llama-3b"], job.mixed(64, 32000)
    rooms = [job.padded_room(spec, mix, n, 4 << 30) for n in (1, 8, 16, 64, 100)]
    assert rooms == sorted(rooms, reverse=True) and rooms[0] > 3 << 30 and rooms[3] == rooms[4] < 0


def test_settings_of_llama_cpp() -> None:
    assert batch.llama_setting("16:each:512") == (16, "each", 512)
    for wrong in ("16", "16:all:512", "0:each:4", "8:each:4", "a:each:4"):
        with pytest.raises(BenchError, match="unified"):
            batch.llama_setting(wrong)


# whole runs


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of checkpoints for all tests."""
    folder = tmp_path_factory.mktemp("batch-bench")
    checkpoints.make(checkpoints.SPECS[SMALL], folder)
    return folder


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, fresh_cache: Path) -> list[list[str]]:
    """Workers run in this process, unlimited; what they were asked is noted."""
    asked: list[list[str]] = []

    def measured(self: batch_runs.Bench, group: Any, engine: str, command: Any, **options: Any) -> dict[str, Any]:
        words = command(None, self.work / "partial.json")[2:]
        asked.append(words)
        out: list[str] = []
        with monkeypatch.context() as patch:
            patch.setattr("builtins.print", lambda text, **options: out.append(text))
            code = batch_worker.main(words)
        limit = {"limited": False, "wall_s": 0.1}
        return {**json.loads(out[-1]), "limit": limit} if not code else {"engine": engine, "error": "?", "limit": limit}

    monkeypatch.setattr(batch_runs.Bench, "measured", measured)
    monkeypatch.setattr(batch_worker, "RATE_S", 0.01)
    monkeypatch.setattr(batch_runs, "drop_caches", lambda files: "all")
    monkeypatch.setattr(predict, "profile", lambda *a: {})
    monkeypatch.setattr(disk, "measure", lambda files, **options: disk.Disk(1e9, 1e9, 1 << 20, 8, True, 0))
    return asked


def test_a_comparison_end_to_end(scratch: Path, tmp_path: Path, here: list[list[str]]) -> None:
    out = tmp_path / "batch.json"
    words = [SMALL, "--scratch", str(scratch), "--out", str(out), "--requests", "6", "--one", "3", "--limit", "2GiB"]
    assert batch.main([*words, "--engines", "batch", "one"]) == 0
    result = json.loads(out.read_text())
    assert result["finished"] and result["job"] == job.totals(job.mixed(6, 512))
    mine, alone = result["summary"]["batch"], result["summary"]["one"]
    assert mine["whole"] and mine["answered"] == 6 and mine["measured_share"] == 1
    assert not alone["whole"] and alone["answered"] == 3 and 0.2 < alone["measured_share"] < 0.9
    # in bfloat16 a pass of another shape rounds otherwise: what is equal is `tests/test_batch_runner.py`'s, in float32
    agreed = result["agreement"]["batch"]
    assert agreed["requests"] == 3 and 0 < agreed["before_first_difference"] <= agreed["positions"]
    assert result["ratios"] == {"one": mine["new_tokens_per_s"] / alone["new_tokens_per_s"]}
    assert result["floor"]["share"]["batch"] == result["floor"]["floor_s"] / mine["job_s"]
    assert not (scratch / "batch-work").exists()

    # another engine joins; what was measured stays
    assert batch.main([*words, "--keep", "--engines", "accelerate", "--sizes", "3", "--probe-seconds", "60"]) == 0
    both = json.loads(out.read_text())
    assert set(both["summary"]) == {"batch", "one", "accelerate"} and both["summary"]["batch"] == mine
    assert both["summary"]["accelerate"]["whole"] and both["agreement"]["accelerate"]["requests"] == 3
    assert [w[2] for w in here] == ["rates", "batch", "one", "accelerate"]
    text = tables.render(both)
    assert "padded batches (3 by prompt)" in text and "3 of 3" in text and "Floor (compute-bound)" in text
    # but not to a result of other requests
    assert batch.main([*words[:-4], "--requests", "7", "--keep", "--engines", "one"]) == 1


def test_a_failed_engine_stays_in_the_table(scratch: Path, tmp_path: Path, here: list[list[str]]) -> None:
    out = tmp_path / "batch.json"
    words = [SMALL, "--scratch", str(scratch), "--out", str(out), "--requests", "4", "--limit", "1KiB"]
    assert batch.main([*words, "--engines", "accelerate", "--sizes", "2"]) == 0
    assert "batches of 2 leave no room for weights" in tables.render(json.loads(out.read_text()))


def test_no_time_no_runs(scratch: Path, tmp_path: Path, here: list[list[str]]) -> None:
    out = tmp_path / "batch.json"
    assert batch.main([SMALL, "--scratch", str(scratch), "--out", str(out), "--engines", "one", "--seconds", "1"]) == 0
    assert here == [] and "no time was left" in tables.render(json.loads(out.read_text()))


@pytest.mark.parametrize("model", [SMALL, "olmoe-small"])
def test_rates_of_a_layer(model: str, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_worker, "RATE_S", 0.01)
    found = list(batch_worker.layer_seconds(checkpoints.SPECS[model].config, [2, 1024]))
    assert [t for t, *_ in found] == [2, 1024] and found[0][1] < found[1][1] and found[0][2] < found[1][2]


def test_growth_end_to_end(scratch: Path, tmp_path: Path, here: list[list[str]]) -> None:
    out, svg = tmp_path / "growth.json", tmp_path / "growth.svg"
    words = [SMALL, "--scratch", str(scratch), "--out", str(out), "--svg", str(svg), "--limit", "2GiB"]
    assert batch_growth.main([*words, "--batches", "1", "4", "--new-tokens", "4"]) == 0
    result = json.loads(out.read_text())
    assert [r["batch"] for r in result["rows"]] == [1, 4] and result["finished"]
    for row in result["rows"]:
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / row["step_s"])
        assert row["predicted_tokens_per_s"] > 0 and row["ceiling"]["compute"] > 0 == row["ceiling"]["disk"]
    assert "| 4 |" in tables.render(result)
    drawn = ElementTree.fromstring(svg.read_text())
    lines = drawn.findall("{*}polyline")
    assert [len(line.attrib["points"].split()) for line in lines] == [2, 2, 2]  # no disk: everything fits
    assert len(drawn.findall("{*}circle")) == 4
    with pytest.raises(BenchError, match="nothing to draw"):
        batch_growth.draw({**result, "rows": [{"batch": 1, "error": "killed"}]}, svg)


def test_equal_requests_share_nothing() -> None:
    found = batch_growth.equal(6, 8, 3, 4096)
    assert {(len(r.prompt), r.new) for r in found} == {(8, 3)} and len({r.prompt[0] for r in found}) > 1


def test_prefixes_end_to_end(scratch: Path, tmp_path: Path, here: list[list[str]]) -> None:
    out = tmp_path / "prefix.json"
    sizes = Namespace(requests=6, documents=2, document_tokens=40, question_tokens=5, new=3)
    options = [w for k, v in vars(sizes).items() for w in (f"--{k.replace('_', '-')}", str(v))]
    words = ["--model", SMALL, "--scratch", str(scratch), "--out", str(out), "--limit", "2GiB", *options]
    assert batch_prefix.main(words) == 0
    result = json.loads(out.read_text())
    assert [("--no-sharing" in w) for w in here] == [False, True]
    assert result["least_prompt_tokens"] == 2 * 40 + 6 * 5
    assert result["agreement"]["identical"] == 6
    assert result["ratio"] == result["alone"]["judged"]["job_s"] / result["shared"]["judged"]["job_s"]
    assert result["shared"]["prompt_tokens_computed"] == result["least_prompt_tokens"]
    assert result["alone"]["prompt_tokens_computed"] == 6 * 45
    assert "6 of 6" in tables.render(result)


def test_a_result_that_is_cut_off_can_be_shown(scratch: Path) -> None:
    facts = {
        "kind": "batch-prefix", "name": "batch-prefix", "date": "2026-01-02 03:04 UTC", "machine": machine(),
        "load_average_before": 0.1, "limit_bytes": 1 << 30, "model": {"name": "m", "weight_bytes": 1 << 20},
        "job": {"requests": 2}, "documents": 1, "document_tokens": 5, "question_tokens": 2, "new": 1,
        "least_prompt_tokens": 9, "ratio": None, "agreement": job.agreement({}, {}),
        "shared": {"error": "killed"}, "alone": {"error": "not run yet"},
    }  # fmt: skip
    text = tables.render(facts)
    assert "killed" in text and "not run yet" in text and "faster" not in text

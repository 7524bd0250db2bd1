"""The benchmark scripts do what they say, on models of a few MB."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from offload import engine, graphs, launches
from offload.stats import StepStats
from tiers import EmulatedDevice

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import checkpoints  # noqa: E402
import common  # noqa: E402
import compare  # noqa: E402
import decode  # noqa: E402
import disk  # noqa: E402
import gpu_check  # noqa: E402
import limit  # noqa: E402
import predict  # noqa: E402
import regret  # noqa: E402
import startup  # noqa: E402
import tables  # noqa: E402

SMALL = ["llama-3b-small", "olmoe-small"]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of checkpoints for all tests."""
    return tmp_path_factory.mktemp("bench")


# checkpoints


@pytest.mark.parametrize("name", SMALL)
def test_our_engine_chooses_what_the_resident_model_does(
    name: str, scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path))
    folder = checkpoints.make(checkpoints.SPECS[name], scratch)
    tokens = decode.stream(512, 12, seed=3)
    ours = decode.Ours(folder, 2 << 30, 16)
    mine, a = decode.decode(ours, tokens, 6, None)
    steps = ours.report()["steps"]
    oracle = decode.Transformers(folder, routing=True)
    theirs, b = decode.decode(oracle, tokens, 6, None)
    if name == "llama-3b-small":
        assert mine["argmax"] == theirs["argmax"]
    # the library groups a prompt's experts otherwise than we do, and bf16 may round otherwise then
    assert all(
        compare.ulps_below(float(row.max()), float(row[m])) <= 2 for m, row in zip(mine["argmax"], b, strict=True)
    )
    assert len(set(mine["argmax"])) > 3  # the choice depends on the input
    assert a.shape == b.shape == (7, 512)
    assert len(steps) == 7
    routes = oracle.report().get("routes", [])
    assert len(routes) == (7 * 3 if name == "olmoe-small" else 0)
    assert all(len(r) == 4 for r in routes[3:])


def test_checkpoint_is_reused_when_complete_and_rewritten_when_not(scratch: Path) -> None:
    spec = checkpoints.SPECS["llama-3b-small"]
    folder = checkpoints.make(spec, scratch)
    shards = checkpoints.shard_files(folder)
    assert len(shards) > 2
    before = {f.name: (f.stat().st_mtime_ns, f.read_bytes()) for f in shards}
    checkpoints.make(spec, scratch)
    assert {f.name: f.stat().st_mtime_ns for f in shards} == {n: t for n, (t, _) in before.items()}
    os.truncate(shards[1], 100)
    assert not checkpoints.complete(spec, folder)
    checkpoints.make(spec, scratch)
    assert {f.name: f.read_bytes() for f in shards} == {n: b for n, (_, b) in before.items()}


def test_checkpoint_says_what_it_needs_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda p: type("Usage", (), {"free": 1 << 20}))
    with pytest.raises(common.BenchError, match=r"needs 0.00 GiB of disk.*--scratch"):
        checkpoints.make(checkpoints.SPECS["olmoe-small"], tmp_path)


def test_sizes_of_the_big_models() -> None:
    llama, olmoe = checkpoints.SPECS["llama-3b"], checkpoints.SPECS["olmoe"]
    assert llama.weight_bytes == llama.dense_bytes + 2 * 32000 * 3072
    assert llama.expert_bytes == 0
    assert olmoe.expert_bytes == 3 * 1024 * 1024 * 2
    assert olmoe.weight_bytes == olmoe.dense_bytes + 12 * 64 * olmoe.expert_bytes + 2 * 4096 * 1024
    for spec in (llama, olmoe):
        assert common.parse_size(spec.limit) < spec.weight_bytes


# limit


def test_where_a_group_may_be_made(tmp_path: Path) -> None:
    proc = tmp_path / "proc"
    own = tmp_path / "memory" / "user" / "me"
    own.mkdir(parents=True)
    for folder in (own, own.parent, tmp_path / "memory"):
        (folder / "memory.limit_in_bytes").write_text("1")
    proc.write_text("4:memory:/user/me\n3:cpu:/x\n0::/\n")
    assert limit.candidates(tmp_path, proc) == [(1, own), (1, own.parent), (1, tmp_path / "memory")]
    proc.write_text("4:memory:/not/mounted/here\n")
    assert limit.candidates(tmp_path, proc) == [(1, tmp_path / "memory")]


def test_where_a_group_may_be_made_v2(tmp_path: Path) -> None:
    proc = tmp_path / "proc"
    own = tmp_path / "cg" / "slice" / "session"
    own.mkdir(parents=True)
    (own / "cgroup.subtree_control").write_text("\n")
    (own.parent / "cgroup.subtree_control").write_text("cpu memory\n")
    proc.write_text("0::/slice/session\n")
    assert limit.candidates(tmp_path / "cg", proc) == [(2, own.parent)]


def test_oom_kills_are_read_from_either_version(tmp_path: Path) -> None:
    assert limit.oom_kills(tmp_path) == 0
    (tmp_path / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    assert limit.oom_kills(tmp_path) == 2
    (tmp_path / "memory.events").write_text("low 0\noom 4\noom_kill 3\n")
    assert limit.oom_kills(tmp_path) == 3


def test_without_rights_it_runs_unlimited_and_says_so(tmp_path: Path) -> None:
    with limit.Group(1 << 30, root=tmp_path, proc=tmp_path / "none") as group:
        ran = group.run([sys.executable, "-c", "print(6 * 7)"])
    assert (ran.limited, ran.mechanism, ran.limit_bytes, group.why) == (
        False, "none", None, "no memory cgroup is mounted",
    )  # fmt: skip
    assert (ran.stdout, ran.failure()) == ("42\n", None)


def test_failures_in_one_line() -> None:
    with limit.Group(None) as group:
        bad = group.run([sys.executable, "-c", "import sys; sys.exit('no such thing')"])
        slow = group.run([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.5)
    assert bad.failure() == "exit code 1: no such thing"
    assert slow.timed_out
    assert (slow.failure() or "").startswith("gave up after")


def test_limit_is_in_force_and_the_group_goes_away() -> None:
    with limit.Group(96 << 20) as group:
        if not group.limited:
            pytest.skip(group.why)
        folder = group.folder
        small = group.run([sys.executable, "-c", "bytearray(1 << 20)"])
        large = group.run([sys.executable, "-c", "len(b'x' * (256 << 20))"])
    assert small.failure() is None
    assert 0 < (small.peak_bytes or 0) < 96 << 20
    assert large.oom_killed
    assert "out of memory in 0.09 GiB" in (large.failure() or "")
    assert folder is not None
    assert not folder.exists()


def test_held_memory_is_given_back() -> None:
    with limit.Held(8 << 20) as held:
        assert held.pid is not None
        assert common.vm_kb("VmRSS", Path(f"/proc/{held.pid}/status")) > 8 << 20
        limit.release_held(held.pid)
        assert common.vm_kb("VmRSS", Path(f"/proc/{held.pid}/status")) == 0
    with limit.Held(1 << 60) as held:
        assert held.pid is None


# disk, sizes


def test_disk_is_measured(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(os.urandom(3 << 20))
    found = disk.measure([file], seconds=0.2)
    assert found.sequential > 0
    assert found.random > 0
    assert found.bytes_read >= 3 << 20
    (tmp_path / "empty").touch()
    with pytest.raises(common.BenchError):
        disk.measure([tmp_path / "empty"])


def test_sizes() -> None:
    assert common.parse_size("4.5GiB") == 9 << 29
    assert common.parse_size("500MB") == 500_000_000
    with pytest.raises(common.BenchError):
        common.parse_size("four")


# what compare derives


def test_belady_is_never_worse_than_lru_and_right_on_a_cycle() -> None:
    cycle = list("abcd") * 5
    assert lru(cycle, 3) == 20
    # bypassing what is needed latest, each further round of the cycle misses once or twice, never all
    assert compare.belady_misses(cycle, 3) == 4 + 4
    assert compare.belady_misses(cycle, 4) == 4
    rng = random.Random(0)
    for _ in range(50):
        accesses = [rng.randrange(9) for _ in range(60)]
        best = [compare.belady_misses(accesses, n) for n in range(1, 10)]
        assert all(b <= lru(accesses, n) for n, b in enumerate(best, 1))
        assert best == sorted(best, reverse=True)
        assert best[-1] == len(set(accesses))


def lru(accesses: list[Any], slots: int) -> int:
    return compare.lru_misses(accesses, slots)


def test_lru_starts_warm() -> None:
    assert compare.lru_misses([1, 2, 3], 2, warm=[3, 2, 1]) == 1


def test_ulps_are_counted_at_the_maximum() -> None:
    one = torch.tensor(4.0, dtype=torch.bfloat16)
    below = torch.nextafter(one * 1.5, torch.tensor(0.0, dtype=torch.bfloat16))
    assert compare.ulps_below(float(one * 1.5), float(below)) == 1.0
    assert compare.ulps_below(4.0, 4.0) == 0.0


def test_equality_of_logits(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    a = torch.tensor([[1.0, 4.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 5.0]], dtype=torch.bfloat16)
    b = a.clone()
    b[1] = torch.tensor([1.0, 1.5, 0.0])
    save_file({"logits": a}, tmp_path / "a")
    save_file({"logits": b[:2]}, tmp_path / "b")
    found = compare.equality(tmp_path / "a", tmp_path / "b")
    assert (found["positions"], found["equal"], found["bit_identical"]) == (2, 1, 1)
    assert found["worst_ulps"] == 1.0 / 2**-6  # bf16 numbers from 2 to 4 are 2⁻⁶ apart


def test_summary_and_ratios_keep_a_failed_peer_as_a_message() -> None:
    runs = [run("ours", "cold", r) for r in (1.0, 3.0, 2.0)]
    runs += [run("accelerate", "cold", 0.5), {"engine": "transformers-auto", "cache": "cold", "error": "killed"}]
    summary = compare.summarise(runs)
    assert summary["ours"]["cold"]["decode_tokens_per_s"] == 2.0
    assert summary["transformers-auto"] == {"error": "killed"}
    assert compare.ratios(runs) == {"accelerate": {"cold_decode": 4.0, "cold_start": 1.0}}


def run(engine: str, cache: str, rate: float) -> dict[str, Any]:
    return {
        "engine": engine, "cache": cache, "decode_tokens_per_s": rate, "load_s": 1.0, "ttft_s": 2.0,
        "start_to_first_token_s": 4.0, "peak_rss_bytes": 1 << 30, "new_tokens": 8, "limit": {"limited": True},
    }  # fmt: skip


# startup and tables


def test_startup_reports_a_command_that_fails() -> None:
    found = startup.row("bad", [sys.executable, "-c", "import sys; sys.exit('no model')"], 2)
    assert found == {"what": "bad", "error": "exit code 1: no model"}


def test_startup_takes_the_median() -> None:
    found = startup.row("pass", [sys.executable, "-c", "pass"], 3)
    assert found["median_s"] == sorted(found["readings_s"])[1]


def fixture_result() -> dict[str, Any]:
    runs = [run("ours", "cold", 1.5), run("ours", "warm", 1.6), run("accelerate", "cold", 0.3)]
    runs.append({"engine": "transformers-auto", "cache": "cold", "error": "killed by the kernel"})
    same = {"positions": 8, "equal": 7, "worst_ulps": 1.0, "bit_identical": 7, "largest_difference": 0.1}
    return {
        "kind": "compare", "name": "llama-3b", "date": "2026-11-21 10:00 UTC",
        "machine": {**common.machine(), "cpu": "A CPU", "cores": 2},
        "model": {"weight_bytes": 6 << 30}, "limit_bytes": 9 << 29, "prompt_tokens": 16, "new_tokens": 8,
        "disk": {"bandwidth": 1.2e9}, "summary": compare.summarise(runs), "ratios": compare.ratios(runs),
        "equality": {"runs": [{"engine": "ours", "cache": "cold", **same}]},
        "floor": {"bytes_per_token": 1.2e9, "read_s": 1.0, "compute_s": 0.5, "floor_s": 0.5, "bound": "disk",
                  "share": {"cold": 0.75}},
    }  # fmt: skip


def test_tables_fill_the_readme_and_check_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, readme = tmp_path / "results", tmp_path / "README.md"
    common.write_json(results / "llama-3b.json", fixture_result())
    rows = [{"what": "offload --help", "cache": "warm", "median_s": 0.03}, {"what": "demo, first", "error": "no model"}]
    common.write_json(
        results / "startup.json",
        {"kind": "startup", "date": "2026-11-21 x", "machine": common.machine(), "rows": rows},
    )
    readme.write_text(
        "# T\n<!-- bench:llama-3b -->\nold\n<!-- /bench -->\n\n<!-- bench:startup -->\n<!-- /bench -->\nend\n"
    )
    arguments = ["--readme", str(readme), "--results", str(results)]
    assert tables.main([*arguments, "--check"]) == 1
    assert "out of date" in capsys.readouterr().err
    assert tables.main(arguments) == 0
    text = readme.read_text()
    assert "| **offload** | 1.50 | 1.60 |  | 4.0 s / 4.0 s | 1.00 GiB | 7 of 8 (≤ 1 ulp) |" in text
    assert "| 0.30 | – | 5.0× |" in text
    assert "killed by the kernel" in text
    assert "a memory cgroup of 4.5 GiB" in text
    assert "offload reaches 75 % (cold)" in text
    assert "| `offload --help` | 0.03 s |" in text
    assert text.startswith("# T\n")
    assert text.endswith("end\n")
    assert "\nold\n" not in text
    assert tables.main([*arguments, "--check"]) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- bench:none -->\n<!-- /bench -->\n", "none.json is not there"),
        ("<!-- bench:none -->\n", "has no <!-- /bench -->"),
        ("<!-- bench:odd -->\n<!-- /bench -->\n", "cannot be shown"),
        ("<!-- bench:bad -->\n<!-- /bench -->\n", "not valid JSON"),
    ],
)
def test_tables_name_what_is_wrong(tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "odd.json").write_text(json.dumps({"kind": "odd"}))
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "README.md").write_text(text)
    assert tables.main(["--readme", str(tmp_path / "README.md"), "--results", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


def test_results_name_no_folder_of_this_machine() -> None:
    for path in (ROOT / "bench" / "results").glob("*.json"):
        assert str(Path.home()) + "/" not in path.read_text()


# on a GPU: what can be tried without one


class Device(EmulatedDevice):
    kind = "cuda"


class Replayed:
    """A graph that does the work again."""

    def capture(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        self._work, self._out = work, work().clone()
        return self._out

    def replay(self) -> None:
        self._out.copy_(self._work())


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Stands for a CUDA device; five launches are counted in every pass."""

    @contextmanager
    def counting(stats: StepStats) -> Iterator[None]:
        yield
        stats.launches, stats.syncs, stats.counted = 5, 1, 1

    monkeypatch.setattr(engine, "make_device", lambda config: Device(8e9))
    monkeypatch.setattr(graphs, "cuda_graphs", lambda: Replayed)
    monkeypatch.setattr(launches, "counted", counting)
    return Device(8e9)


def test_a_row_of_gpu_check_has_what_it_should(device: Device, scratch: Path) -> None:
    folder = checkpoints.make(checkpoints.SPECS["llama-3b-small"], scratch)
    off, on = (gpu_check.decode(folder, "512MiB", 6, graphs) for graphs in (False, True))
    assert off["token_ids"] == on["token_ids"]
    assert len(off["token_ids"]) == 6
    assert (off["graphs"], on["graphs"]) == (False, True)
    for row in (off, on):
        assert (row["launches_per_token"], row["syncs_per_token"], row["notes"]) == (5, 1, [])
        assert row["decode_tokens_per_s"] > 0
    assert on["captured_modules"] == on["replays_per_token"] > 0
    json.dumps([off, on])


def test_gpu_check_says_why_nothing_is_read_directly(device: Device, scratch: Path) -> None:
    folder = checkpoints.make(checkpoints.SPECS["llama-3b-small"], scratch)
    row = gpu_check.direct(folder, device)
    assert row["bytes_per_s"] is None
    assert "CUDA" in row["why"] or "kvikio" in row["why"]


# predictions


def test_a_cell_of_the_grid_is_judged_by_the_requests_after_the_first_two(
    scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path))
    folder = checkpoints.make(checkpoints.SPECS["olmoe-small"], scratch)
    cell = {"model": "olmoe-2b", "percent": 60, "batch": 2, "prompt": 8, "new": 4, "device": "cpu"}
    row = predict.worker(folder, cell)
    assert len(row["requests"]) == predict.REQUESTS
    first, *later = row["requests"]
    assert first["model_decode_s"] is None
    assert all(r["model_decode_s"] > 0 and r["told_ttft_s"] > 0 and r["decode_s"] > 0 for r in later)
    row["errors"] = predict.judge(row)
    want = sorted(r["told_decode_s"] / r["decode_s"] - 1 for r in row["requests"][2:])
    assert row["errors"]["told_decode"] == pytest.approx(sum(want) / 2)
    assert row["errors"]["drift"] is None, "nothing much was read"
    total = predict.summary([row, row])
    assert total["told_decode"]["p90"] == pytest.approx(abs(row["errors"]["told_decode"]))
    predict.draw([row], tmp_path / "scatter.svg")
    assert (tmp_path / "scatter.svg").read_text().count("<circle") == 4 + 4


def test_the_grid_is_as_large_as_it_should_be() -> None:
    cells = predict.cells()
    assert len(cells) >= 24
    for key, values in (("batch", {1, 4, 16}), ("device", {"cpu", "emulated"}), ("prompt", {32, 512})):
        assert {c[key] for c in cells} == values
    assert {min(c["percent"] for c in cells), max(c["percent"] for c in cells)} == {30, 100}


def test_a_plan_by_hand_is_measured_or_refused(scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path))
    folder = checkpoints.make(checkpoints.SPECS["llama-3b-small"], scratch)
    cell = {"percent": 50, "batch": 1, "prompt": 8, "new": 3, "device": "cpu"}
    run = regret.worker(folder, cell, {"lookahead": 1, "resident_layers": 2})
    assert run["lookahead"] == 1
    assert run["seconds"] > run["ttft_s"] > 0
    assert "resident_layers=9" in regret.worker(folder, cell, {"resident_layers": 9})["refused"]


def test_tables_of_predictions_and_regret() -> None:
    errors = dict.fromkeys(("told_decode", "told_ttft", "model_decode", "model_ttft"), 0.031)
    cell = {"model": "m", "device": "cpu", "percent": 50, "batch": 4, "prompt": 32,
            "errors": {**errors, "drift": None}, "requests": [{"decode_s": 0.5, "ttft_s": 1.25}]}  # fmt: skip
    result = {"kind": "predict", "machine": common.machine(), "date": "2026-01-01 00:00 UTC", "link": "2GB",
              "summary": {k: {"median": 0.012, "p90": 0.15} for k in (*errors, "first_decode")},
              "cells": [cell]}  # fmt: skip
    text = tables.render(result)
    assert "1.2 % / 15.0 %" in text
    assert "| m, cpu, 50%, batch 4, prompt 32 | 8.00 tokens/s | +3% | +3% | 1.25 s | +3% | +3% | – |" in text
    rows = [{"set": {}, "runs": [1], "seconds": 2.0}, {"set": {"lookahead": 0}, "runs": [1], "seconds": 2.5},
            {"set": {"lookahead": 9}, "runs": []}]  # fmt: skip
    result = {"kind": "regret", "machine": common.machine(), "date": "2026-01-01 00:00 UTC", "rounds": 3,
              "target": 0.05, "cells": {"a cell": {"rows": rows, "regret": -0.2, "spread": 0.01}}}  # fmt: skip
    assert "| a cell | 2.00 s | 2.50 s | lookahead=0 | -20.0% | 1.0% |" in tables.render(result)

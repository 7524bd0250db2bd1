"""The benchmarks of keys and values measure what they say, on models of a few MB; parts of other ones are taken again.

Workers run in this process: starting one takes longer than what it does here.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tiers.memory import rss

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import checkpoints  # noqa: E402
import long_context as lc  # noqa: E402
import resume  # noqa: E402
import routing  # noqa: E402
import tables  # noqa: E402
from common import BenchError, machine  # noqa: E402

SMALL = "llama-3b-small"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of checkpoints for all tests."""
    folder = tmp_path_factory.mktemp("kv-bench")
    checkpoints.make(checkpoints.SPECS[SMALL], folder)
    return folder


def here(module: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Have the script's workers run in this process, with their environment; what they were asked is noted."""
    asked = []

    def in_process(script: Path, env: dict[str, str], *words: object) -> dict[str, Any]:
        asked.append(tuple(map(str, words)))
        out: list[str] = []
        with monkeypatch.context() as patch:
            for name in ("OFFLOAD_HOME",):
                if name in env:
                    patch.setenv(name, env[name])
            patch.setattr("builtins.print", lambda text, **options: out.append(text))
            assert module.main(["--worker", *map(str, words)]) == 0
        result: dict[str, Any] = json.loads(out[-1])
        return result

    monkeypatch.setattr(module, "in_process", in_process)
    if hasattr(module, "OVERHEAD"):  # a worker has a process of its own; this one holds the suite
        monkeypatch.setattr(module, "OVERHEAD", module.OVERHEAD + rss())
    return asked


# long contexts


def test_synthetic_kv_are_the_same_again_and_nowhere_twice() -> None:
    shape, context = (3, 2, 16), 2 * lc.PIECE + 40
    first, again = (list(lc.pieces(shape, context)) for _ in range(2))
    assert [p[0][0].shape for p in first] == [(2, lc.PIECE, 16)] * 2 + [(2, 40, 16)]
    for layer in range(3):
        for part, scale in enumerate((lc.KEY_SCALE, 1.0)):
            whole = torch.cat([p[layer][part] for p in first], 1)
            assert torch.equal(whole, torch.cat([p[layer][part] for p in again], 1))
            assert whole.shape == (2, context, 16) and whole.dtype == torch.bfloat16
            assert float(whole.float().std()) == pytest.approx(scale, rel=0.1)
            assert len(whole.flatten(0, 1).unique(dim=0)) == 2 * context
    assert not torch.equal(first[0][0][1], first[0][1][1])
    other = next(lc.pieces(shape, context, seed=1))
    assert not torch.equal(other[0][0], first[0][0][0])


def test_logits_are_compared_place_by_place() -> None:
    reference = torch.tensor([[1.0, 2.0, -1.0], [3.0, 1.0, 2.9]]).numpy()
    same = lc.likeness(reference, reference)
    assert same == {"least_cosine": pytest.approx(1.0), "equal": 2, "positions": 2, "worst_ulps": 0.0}
    got = lc.likeness(torch.tensor([[1.0, 2.0, -1.0], [2.8, 1.0, 2.9]]).numpy(), reference)
    assert (got["equal"], got["positions"]) == (1, 2)
    assert got["worst_ulps"] == pytest.approx((3.0 - 2.9) / 2**-6, rel=0.01)
    assert 0.9 < got["least_cosine"] < 1.0


def test_a_floor_is_the_larger_of_reading_and_computing() -> None:
    cells = {
        "resident": {"ms": 50.0},
        "exact": {"ms": 200.0, "kept_bytes": 100e6, "bandwidth": 1e9, "kv_read_per_token": 1e9},
        "sparse-resident": {"ms": 30.0},
        "sparse": {"ms": 40.0, "kept_bytes": 100e6, "bandwidth": 1e9, "kv_read_per_token": 10e6},
    }
    found = lc.floors(cells, 200_000_000)
    # what does not fit, whatever was read
    assert found["exact"] == {
        "bytes_per_token": 100e6, "read_ms": 100.0, "compute_ms": 50.0, "floor_ms": 100.0, "bound": "disk", "share": 0.5
    }  # fmt: skip
    assert found["sparse"]["bound"] == "compute" and found["sparse"]["share"] == 0.75
    assert lc.floors({"exact": cells["exact"]}, 1) == {}


def small(scratch: Path, out: Path, **given: Any) -> list[str]:
    words = {"scratch": scratch, "model": SMALL, "contexts": 700, "rounds": 1, "steps": 3, "out": out, **given}
    return [str(w) for k, v in words.items() for w in (f"--{k}", *(v if isinstance(v, tuple) else (v,)))]


def test_long_contexts_end_to_end(scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = here(lc, monkeypatch)
    monkeypatch.setattr(lc, "DISK_SECONDS", 0.05)
    out = tmp_path / "long-context.json"
    assert lc.main(small(scratch, out, budget="12%")) == 0
    result = json.loads(out.read_text())
    assert len(asked) == 5 + 4 + 1  # transformers knows no emulated device; and is asked for its offloaded cache
    assert result["kv_bytes_per_token"] == 4 * 2 * 2 * 32 * 2
    assert "CPU" in result["transformers_offloaded_cache"]
    for row, device in zip(result["rows"], lc.DEVICES, strict=True):
        assert (row["context"], row["device"]) == (700, device)
        cells = row["cells"]
        assert set(cells) == {*lc.CELLS} - ({"transformers"} if device == "emulated" else set())
        for name in cells:
            assert cells[name]["ms"] > 0 and len(cells[name]["runs_ms"]) == 1
            assert cells[name]["likeness"]["positions"] == lc.WARM + 3
            if name in ("resident", "exact", "transformers"):
                # another order of sums, nothing else: bf16
                assert cells[name]["likeness"]["least_cosine"] > 0.999 and cells[name]["likeness"]["worst_ulps"] <= 4
        # sums over other tokens show: the comparison means something
        assert cells["sparse"]["likeness"]["least_cosine"] < 0.999
        assert cells["sparse"]["attended_share"] == pytest.approx(0.12, abs=0.03)
        exact = cells["exact"]
        assert exact["kept_bytes"] < 0.3 * row["kv_bytes"]
        assert exact["kv_read_per_token"] > 0.6 * row["kv_bytes"] and exact["stall_share"] > 0
        assert exact["kv_read_per_token"] > cells["sparse"]["kv_read_per_token"]
        for name in ("resident", "sparse-resident"):
            assert cells[name]["kv_read_per_token"] == 0
        assert row["floors"]["exact"]["floor_ms"] > 0
        assert row["sparse_over_exact"] == pytest.approx(exact["ms"] / cells["sparse"]["ms"])
    assert [p.name for p in scratch.iterdir()] == [SMALL], "what was spilled is gone"
    table = tables.render(result)
    assert table.startswith("| tokens held | device |") and "| 700 | emulated | – |" in table
    assert "of 10 places" in table and "*emulated*" in table and "12%" in table


def test_wrong_keys_and_values_are_no_result(scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here(lc, monkeypatch)
    make: Callable[..., Any] = lc.pieces
    made: list[int] = []

    def other(shape: tuple[int, int, int], context: int) -> Any:
        made.append(context)
        return make(shape, context, seed=len(made))

    monkeypatch.setattr(lc, "pieces", other)
    with pytest.raises(BenchError, match="exact attention over tiers differs"):
        lc.main(small(scratch, tmp_path / "x.json", cells="exact", devices="cpu", contexts=300))
    assert not (tmp_path / "x.json").exists()


# resuming


def test_resuming_end_to_end(scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = here(resume, monkeypatch)
    dropped: list[int] = []
    monkeypatch.setattr(resume, "drop_caches", lambda files: dropped.append(len(files)) or "files")
    out = tmp_path / "resume.json"
    words = ["--scratch", str(scratch), "--model", SMALL, "--tokens", "600", "--reps", "2", "--out", str(out)]
    assert resume.main(words) == 0
    result = json.loads(out.read_text())
    assert [w[0] for w in asked if w[0] != "bandwidth"] == ["session", "session", "prefill", "prefill", "session"]
    assert len(dropped) == 4, "before each of them"
    assert result["stored"]["reused"] == 0 and [r["reused"] for r in result["prefilled"]] == [0, 0]
    assert [r["reused"] for r in result["resumed"]] == [599, 599]
    assert result["files"] == 3  # 256 tokens each
    assert result["file_bytes"] >= 600 * 4 * 2 * 2 * 32 * 2
    s = result["summary"]
    assert s["same_token"] and s["ratio"] == pytest.approx(s["prefill_ttft_s"] / s["resume_ttft_s"])
    assert s["share_of_reading"] > 0 and s["read_s"] > 0
    assert [p.name for p in scratch.iterdir()] == [SMALL], "the session is gone"
    table = tables.render(result)
    assert "600 tokens" in table and "the same first token" in table and "dropped: files" in table


def test_a_session_that_is_not_there_is_no_result(
    scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(resume, monkeypatch)
    folder = scratch / SMALL
    monkeypatch.setattr(resume, "bandwidth", lambda files: [os.truncate(f, 5000) for f in files[:1]] and {
        "bandwidth": 1e9, "direct": True
    })  # fmt: skip
    with pytest.raises(BenchError, match="of 300 tokens were resumed"):
        resume.run(folder, 300, 1, tmp_path, keep_caches=True)


def test_medians_of_resumes() -> None:
    def one(ttft: float, token: int = 1) -> dict[str, Any]:
        return {"ttft_s": ttft, "passes_s": 0.1, "token": token, "read_s": ttft - 0.1, "floor_s": 0.2,
                "share_of_reading": 0.2 / ttft, "bandwidth": 1e9, "direct": True}  # fmt: skip

    s = resume.summary(one(9), [one(0.4), one(0.5), one(2)], [one(5), one(6), one(90)])
    assert (s["ratio"], s["storing_ttft_s"], s["same_token"]) == (12, 9, True)
    assert not resume.summary(one(9), [one(1, token=2)], [one(5)])["same_token"]


# a part of the routing benchmark, again


def test_only_the_guard_cases_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "routing.json"
    before = json.loads((ROOT / "bench" / "results" / "routing.json").read_text())
    out.write_text(json.dumps(before))
    speed = {"none": 10.0, "gate": 8.0}
    asked = []

    def in_process(script: Path, env: Any, what: str, folder: Path, path: Path, options: str) -> dict[str, Any]:
        given = json.loads(options)
        asked.append((what, Path(path).name, given["expert_policy"], given["slots"]))
        assert Path(path).is_file()
        return {"tokens_per_s": speed[given["expert_predictor"]]}

    monkeypatch.setattr(routing, "in_process", in_process)
    monkeypatch.setattr(checkpoints, "make", lambda spec, scratch: tmp_path)
    words = ["--guard-only", "--out", str(out), "--new-tokens", str(before["new_tokens"]), "--rounds", "1"]
    words += ["--slots", str(before["slots"])]
    assert routing.main(words) == 0
    after = json.loads(out.read_text())
    assert {w for w, *_ in asked} == {"decode"} and len(asked) == 2 * 2 * 3 * 2
    assert {k: v for k, v in after.items() if k != "guard"} == {k: v for k, v in before.items() if k != "guard"}
    assert set(after["guard"]["cases"]) == set(before["guard"]["cases"])
    assert all(c["slower"] == pytest.approx(0.25) for c in after["guard"]["cases"].values())
    assert after["guard"]["date"] != before["date"] and after["guard"]["machine"] == machine()
    assert f"+25.0 % (taken on {after['guard']['date'].split()[0]}" in tables.render(after)
    with pytest.raises(BenchError, match="slots"):
        routing.guard_again(Namespace(out=out, slots=before["slots"] + 1, new_tokens=before["new_tokens"]))
    out.write_text("{}")
    with pytest.raises(BenchError, match="no result of this script"):
        routing.guard_again(Namespace(out=out))
    with pytest.raises(BenchError, match="cannot be read"):
        routing.guard_again(Namespace(out=tmp_path / "none.json"))

"""What runs teach: kept, checksummed, forgotten if damaged; after a wrong prediction the next one is nearer."""

from __future__ import annotations

import json
import math
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from planned import MIB, PLENTY, description, facts, layer, machine, rates
from test_cli import run

import offload
from moe import LayerUse
from offload import hardware
from offload.plan_cache import cache_folder
from offload.planning import calibration
from offload.planning.budgets import Overrides
from offload.planning.calibration import Calibration, learn
from offload.planning.machine import Machine
from offload.planning.plan import Plan
from offload.planning.predict import Prediction, Workload, predict
from offload.planning.routing import EVEN, Routing
from offload.planning.search import choose
from offload.stats import RequestStats, StepStats

FACTS = facts([layer(i, 32 * MIB, 4) for i in range(6)], 32 * MIB)
SOME = Calibration(((1, 1.25), (512, 0.5)), 2.5e9, 0.3, 4, "the disk gave 2.50 GB/s")


@pytest.fixture(autouse=True)
def own_cache(fresh_cache: Path) -> None:
    pass


def kept() -> Path:
    (path,) = (cache_folder() / "calibrations").iterdir()
    return path


# the file


def test_what_was_learned_is_kept_privately_and_read_back() -> None:
    assert calibration.load("here", FACTS) == Calibration()
    calibration.save("here", FACTS, SOME)
    assert calibration.load("here", FACTS) == SOME
    assert stat.S_IMODE(kept().stat().st_mode) == 0o600
    calibration.save("here", FACTS, replace(SOME, runs=5))
    assert calibration.load("here", FACTS).runs == 5
    assert kept(), "one file, no leftovers"


def test_every_machine_and_every_model_has_its_own() -> None:
    calibration.save("here", FACTS, SOME)
    assert calibration.load("there", FACTS) == Calibration()
    for other in (
        replace(FACTS, dtype="float32"),
        replace(FACTS, weight_bytes=FACTS.weight_bytes + 1),
        replace(FACTS, layers=FACTS.layers[1:]),
        replace(FACTS, model_type="other"),
    ):
        assert calibration.load("here", other) == Calibration()
    assert calibration.load("here", replace(FACTS, name="moved elsewhere")) == SOME


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "not json", "nested", "a list", "huge", "a folder"])
def test_a_damaged_file_is_as_good_as_none(damage: str) -> None:
    calibration.save("here", FACTS, SOME)
    path = kept()
    text = path.read_text()
    assert "0.3" in text
    if damage == "a folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_text(
            {"flipped": text.replace("0.3", "0.9"), "cut": text[:50], "empty": "", "not json": "nonsense",
             "nested": "[" * 60_000, "a list": "[1, 2]", "huge": text + " " * (1 << 17)}[damage]
        )  # fmt: skip
    assert calibration.load("here", FACTS) == Calibration()


def test_a_folder_that_cannot_be_written_is_no_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path / "file"))
    calibration.save("here", FACTS, SOME)
    assert calibration.load("here", FACTS) == Calibration()


# what a run teaches

WORK = Workload(512, 33)
ASSUMED = machine(rates=rates(layer_call_s=1e-4, step_call_s=1e-3))
BUDGETS = replace(PLENTY, ram=200 * MIB, context=WORK.context)  # the smaller part of the weights fits
PLAN: Plan = choose(description(FACTS), BUDGETS, ASSUMED, WORK).plan


def expected(known: Calibration, about: Any = FACTS, plan: Plan = PLAN, work: Workload = WORK) -> Prediction:
    return predict(about, plan, known.apply(ASSUMED), work, known.routing)


def measured(real: Machine, about: Any = FACTS, plan: Plan = PLAN, routing: Routing = EVEN) -> RequestStats:
    """A run on a machine that is in truth like `real`."""
    p = predict(about, plan, real, WORK, routing)
    foreseen = LayerUse(needed=1000, asked=1000, right=round(1000 * routing.recall),
                        predicted=round(1000 * routing.recall / routing.precision))  # fmt: skip
    steps = WORK.new_tokens - 1

    def stats(u: Any, times: int, tokens: int) -> StepStats:
        return StepStats(
            tokens=tokens, sequences=1, seconds=times * u.seconds, stall_s=times * u.stall_s,
            read_busy_s=times * u.disk_s, bytes_read=round(times * u.bytes_read),
        )  # fmt: skip

    return RequestStats(
        prompt_tokens=WORK.prompt_tokens, new_tokens=WORK.new_tokens, ttft_s=p.ttft_s,
        decode_s=steps * p.decode.seconds, prefill=stats(p.prefill, 1, 512), decode=stats(p.decode, steps, steps),
        experts_by_layer=(LayerUse(needed=1000), *([foreseen] * 5)) if about.experts else (),
        prefill_pass_tokens=min(512, plan.prefill_chunk), prediction=p,
    )  # fmt: skip


def taught(known: Calibration, stats: RequestStats, about: Any = FACTS, plan: Plan = PLAN) -> Calibration | None:
    return learn(
        known, known.apply(ASSUMED).rates, expected(known, about, plan), stats, lambda k: expected(k, about, plan)
    )


def slower(factor: float, disk: float = 1.0) -> Machine:
    r = ASSUMED.rates
    return replace(
        ASSUMED,
        disk_bytes_per_s=ASSUMED.disk_bytes_per_s / disk,
        rates=replace(
            r, linear={d: tuple((t, s * factor, c) for t, s, c in points) for d, points in r.linear.items()},
            layer_call_s=r.layer_call_s * factor, step_call_s=r.step_call_s * factor,
            attention_bytes_per_s=r.attention_bytes_per_s / factor,
            attention_flops_per_s=r.attention_flops_per_s / factor,
        ),
    )  # fmt: skip


def test_the_workload_streams() -> None:
    p = expected(Calibration())
    assert 0.2 < p.hit_rate < 0.8
    assert p.decode.bytes_read > calibration._LEAST_READ
    assert PLAN.compute.stream is not None


def test_a_run_as_predicted_teaches_nothing() -> None:
    assert taught(Calibration(), measured(ASSUMED)) is None
    assert taught(Calibration(), measured(slower(1.05, 1.05))) is None


def test_a_slower_disk_is_found_out() -> None:
    known = taught(Calibration(), measured(slower(1.0, 2.0)))
    assert known is not None
    assert known.disk_bytes_per_s == pytest.approx(ASSUMED.disk_bytes_per_s / 2)
    assert "the disk gave 0.50 GB/s" in known.reason
    assert known.runs == 1


def test_slower_compute_is_found_out() -> None:
    known = taught(Calibration(), measured(slower(20.0)))
    assert known is not None
    points = dict(known.corrections)
    assert set(points) == {1, min(512, PLAN.prefill_chunk)}
    assert all(1.5 < f <= 20.0 for f in points.values())
    assert "computing 1 tokens took" in known.reason


def test_a_mishap_is_no_knowledge() -> None:
    """A suspended machine: a run a thousand times slower."""
    stats = measured(ASSUMED)
    stats.decode.seconds *= 1000
    known = taught(Calibration(), stats)
    assert known is not None
    assert dict(known.corrections)[1] == 20.0


def test_few_bytes_say_nothing_about_a_disk() -> None:
    stats = measured(slower(1.0, 3.0))
    stats.prefill.bytes_read = stats.decode.bytes_read = 1 << 20
    known = taught(Calibration(), stats)
    assert known is not None
    assert known.disk_bytes_per_s is None


def errors(known: Calibration, stats: RequestStats, about: Any = FACTS, plan: Plan = PLAN) -> tuple[float, float]:
    """By how much the prediction misses (time to first token, decode step), as shares of what was measured."""
    p = expected(known, about, plan)
    steps = stats.new_tokens - 1
    return abs(p.ttft_s / stats.ttft_s - 1), abs(p.decode.seconds * steps / stats.decode.seconds - 1)


@settings(max_examples=60, deadline=None, database=None)
@given(compute=st.floats(0.2, 8.0), disk=st.floats(0.3, 5.0))
@example(compute=1.0, disk=1.109375)  # within the tolerance of what was measured, not of what was predicted
def test_the_next_prediction_is_nearer(compute: float, disk: float) -> None:
    stats = measured(slower(compute, disk))
    before = errors(Calibration(), stats)
    known = taught(Calibration(), stats)
    if max(before) <= calibration.TOLERANCE:
        assert known is None
        return
    assert known is not None
    assert known.reason
    assert sum(errors(known, stats)) < sum(before)
    for _ in range(6):
        known = taught(known, stats) or known
    assert max(errors(known, stats)) <= calibration.TOLERANCE, known


def test_repeated_experts_are_found_out() -> None:
    about = facts([layer(i, MIB, experts=32, expert_bytes=4 * MIB, top_k=4) for i in range(6)])
    budgets = replace(PLENTY, ram=480 * MIB, context=WORK.context)
    plan = choose(description(about), budgets, ASSUMED, WORK).plan
    assert 24 < plan.expert_slots < 150
    stats = measured(ASSUMED, about, plan, replace(EVEN, repeat=0.8))
    before = errors(Calibration(), stats, about, plan)
    known = taught(Calibration(), stats, about, plan)
    assert known is not None
    assert known.repeat == pytest.approx(0.8, abs=0.1)
    assert "experts were the token's before" in known.reason
    assert errors(known, stats, about, plan)[1] < before[1] / 2


def test_a_correction_is_used_for_passes_of_that_width_only() -> None:
    known = Calibration(corrections=((1, 2.0),))
    assert known.apply(ASSUMED).rates.correction(1) == 2.0
    assert known.apply(ASSUMED).rates.correction(512) == 1.0
    assert known.apply(ASSUMED).disk_bytes_per_s == ASSUMED.disk_bytes_per_s
    assert expected(known).decode.compute_s == pytest.approx(2 * expected(Calibration()).decode.compute_s, rel=0.1)
    assert expected(known).prefill.compute_s == pytest.approx(expected(Calibration()).prefill.compute_s)


# on runs


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine is taken to be far slower than it is."""
    true = hardware.machine_of

    def slow(*args: Any, **kwargs: Any) -> Machine:
        m = true(*args, **kwargs)
        return replace(m, rates=replace(m.rates, layer_call_s=0.05))

    monkeypatch.setattr(hardware, "machine_of", slow)


def test_a_wrong_prediction_is_told_corrected_and_remembered(wrong: None, tiny_moe: Path) -> None:
    prompt = [[5 + i for i in range(20)]]
    with offload.load(tiny_moe, resident="60%") as model:
        stats = model.run(prompt, max_new_tokens=24, ignore_eos=True).stats
        assert stats.prediction is not None
        assert stats.predicted_decode_tokens_per_s == stats.prediction.decode_tokens_per_s
        first = abs(1 / (1 + (stats.prediction_error or 0)) - 1)  # of the step's time
        assert first > 2, "a layer was taken to need 50 ms at least"
        assert "computing 1 tokens took" in stats.learned
        again = model.run(prompt, max_new_tokens=24, ignore_eos=True).stats
        assert abs(1 / (1 + (again.prediction_error or 0)) - 1) < first / 2
        told = model.explain()
        assert "measured" in told and "predicted" in told
        assert "corrected by earlier runs: " in told
        known = model.engine.calibration
    with offload.load(tiny_moe, resident="60%") as model:
        assert model.engine.calibration == known
    kept().write_text("damaged")
    with offload.load(tiny_moe, resident="60%") as model:
        assert model.engine.calibration == Calibration()


def test_generate_tells_predicted_beside_measured(
    wrong: None, capsys: pytest.CaptureFixture[str], tiny_moe: Path
) -> None:
    args = ("generate", str(tiny_moe), "--prompt-ids", ",".join(["5"] * 20), "--max-new-tokens", "16", "--json")
    code, out, err = run(capsys, *args)
    assert (code, err) == (0, "")
    first = json.loads(out)
    assert first["predicted_decode_tokens_per_s"] > 0
    assert first["predicted_ttft_s"] > 0
    assert first["prediction_error"] == pytest.approx(
        first["predicted_decode_tokens_per_s"] / first["decode_tokens_per_s"] - 1
    )
    assert first["prediction_error"] < -0.5
    assert "computing 1 tokens took" in first["learned"]
    second = json.loads(run(capsys, *args)[1])
    # a process of its own in real life: what was learned is read from the file
    assert abs(second["prediction_error"]) < abs(first["prediction_error"])
    assert second["predicted_decode_tokens_per_s"] > 2 * first["predicted_decode_tokens_per_s"]


def test_beam_search_is_not_predicted(capsys: pytest.CaptureFixture[str], tiny_moe: Path) -> None:
    args = ("generate", str(tiny_moe), "--prompt-ids", "5,6", "--max-new-tokens", "4", "--num-beams", "2", "--json")
    d = json.loads(run(capsys, *args)[1])
    assert (d["predicted_decode_tokens_per_s"], d["prediction_error"], d["learned"]) == (None, None, None)


def test_the_status_line_tells_what_was_predicted(capsys: pytest.CaptureFixture[str], tiny_moe: Path) -> None:
    code, _, err = run(capsys, "generate", str(tiny_moe), "--prompt-ids", "5,6,7", "--max-new-tokens", "8")
    assert code == 0
    assert " tokens/s (predicted " in err


def test_how_often_the_next_layer_is_foreseen_is_learned() -> None:
    about = facts([layer(i, MIB, experts=32, expert_bytes=4 * MIB, top_k=4) for i in range(6)])
    budgets = replace(PLENTY, ram=480 * MIB, context=WORK.context)
    overrides = Overrides(resident_layers=6)
    plan = choose(description(about), budgets, ASSUMED, WORK, overrides=overrides).plan
    stats = measured(ASSUMED, about, plan, Routing(0.0, 0.1, 0.5))
    known = calibration.observe(
        Calibration(), ASSUMED.rates, expected(Calibration(), about, plan), stats,
        lambda k: expected(k, about, plan),
    )  # fmt: skip
    assert (known.recall, known.precision) == (0.1, 0.5)
    assert "10% of experts were foreseen" in known.reason
    assert known.routing == Routing(known.repeat, 0.1, 0.5)


# batch jobs


def test_the_passes_of_a_job_teach_by_their_width() -> None:
    rates_now = ASSUMED.rates
    fine = calibration.learn_widths(Calibration(), rates_now, [(64, 1.0, 0.95), (256, 2.0, 2.1)], (0, 0.0))
    assert fine is None
    known = calibration.learn_widths(Calibration(), rates_now, [(64, 1.0, 1.0), (256, 3.0, 2.0)], (1 << 30, 1.0))
    assert known is not None
    assert dict(known.corrections) == {256: pytest.approx(1.5)}
    assert known.disk_bytes_per_s == 1 << 30
    assert "computing 256 tokens took 1.50" in known.reason
    assert known.apply(ASSUMED).rates.correction(256) == pytest.approx(1.5)


def test_a_job_that_was_wrongly_predicted_corrects_the_next(
    wrong: None, tiny_moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload.engine._LEAST_LEARNT_S", 0.0)
    lines = [{"custom_id": str(i), "prompt": [5 + i] * 20, "max_tokens": 12} for i in range(8)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = [
        offload.run_batch(tiny_moe, tmp_path / "in.jsonl", tmp_path / f"out{i}", ignore_eos=True, sequences=8)
        for i in range(2)
    ]
    assert "computing" in told[0].learned
    assert told[0].predicted is not None and told[0].rate is not None and told[1].predicted is not None
    off = [abs(math.log(t.predicted / told[0].rate)) for t in told if t.predicted is not None]
    assert off[1] < off[0]

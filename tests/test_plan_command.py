"""`offload plan` and `offload bench` as a user meets them: rows, JSON, pictures, machines of one's own, mistakes."""

from __future__ import annotations

import csv
import io
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from families import build
from test_cli import run

import offload
from offload.planning import report
from offload.planning.machine import names
from offload.sizes import parse_size

NOGPU, GPU = "desktop-32g-no-gpu", "rtx4090-24g"
OWN: dict[str, Any] = {
    "name": "my <own> & only", "ram_bytes": 64 << 30, "vram_bytes": 0, "disk_bytes_per_s": 3e9,
    "disk_latency_s": 1e-4, "memory_bytes_per_s": 40e9, "cpu_float32_flops_per_s": 5e11,
    "cpu_bfloat16_flops_per_s": 5e11, "layer_call_s": 2e-4,
}  # fmt: skip
WITH_GPU = {**OWN, "vram_bytes": 16 << 30, "link_up_bytes_per_s": 20e9, "device_memory_bytes_per_s": 5e11,
            "device_flops_per_s": 1e14}  # fmt: skip


def plan(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    """What `--json` prints, without batches and what-ifs, which take most of the time."""
    with pytest.MonkeyPatch.context() as quicker:
        quicker.setattr(report, "_best_batch", lambda *args: None)
        quicker.setattr(report, "_what_if", lambda *args: ())
        code, out, err = run(capsys, "plan", *args, "--json")
    assert (code, err) == (0, "")
    told: dict[str, Any] = json.loads(out)
    return told


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be looked up or fetched."""
    import socket

    import huggingface_hub

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"asked for the network: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


# what is told


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    return offload.plan("allenai/OLMoE-1B-7B", hardware=GPU, vram="6GiB").as_json()


def test_json_has_every_field(told: dict[str, Any]) -> None:
    assert json.loads(json.dumps(told)) == told
    rows = told["placement"]
    assert {r["tier"] for r in rows} == {"device", "host", "disk"}
    assert all(set(r) == {"tier", "what", "nbytes", "share", "of"} and r["nbytes"] >= 0 for r in rows)
    assert told["predicted_decode_tokens_per_s"] > 0
    assert told["predicted_ttft_s"] > 0
    assert told["bottleneck"] in ("compute", "link", "disk")
    assert set(told["smallest"]) == {"ram", "vram"}
    assert 0 <= told["hit_rate"] <= 1
    assert 0 < told["share_of_floor"] <= 1
    assert told["model"]["name"] == "OLMoE-1B-7B"
    assert told["model"]["kv_bytes_per_token"] == 16 * 2 * 16 * 128 * 2
    assert told["workload"] == {
        "prompt_tokens": 512, "new_tokens": 128, "batch": 1, "past_tokens": 0, "warm": False,
    }  # fmt: skip


def test_what_lies_in_a_memory_fits_into_it(told: dict[str, Any]) -> None:
    used = {t: sum(r["nbytes"] for r in told["placement"] if r["tier"] == t) for t in ("device", "host")}
    assert used["device"] <= told["budgets"]["vram"] == 6 << 30
    assert used["host"] <= told["budgets"]["ram"] < told["machine"]["ram_bytes"]


def test_experts_that_are_read_are_those_that_ram_lacks() -> None:
    """RAM keeps copies of what the device caches too; both together do not hold their sum."""
    told = offload.plan("Qwen3-30B-A3B", hardware=GPU, alternatives=False)
    held = max(told.plan.expert_slots, told.plan.host.expert_slots)
    assert 0 < held < told.facts.experts
    assert told.prediction.decode.bytes_read > 0
    (row,) = [r for r in told.placement if "read when chosen" in r.what]
    assert row.what.startswith(f"{told.facts.experts - held} experts")


def test_a_prediction_names_what_it_stands_on(told: dict[str, Any]) -> None:
    assert told["simulated"] is True
    said = "\n".join(told["assumptions"])
    for words in ("simulated", "1 × 512 prompt tokens", "experts chosen evenly", "weights are not here"):
        assert words in said
    mine = offload.plan("demo-moe", alternatives=False).as_json()
    assert mine["simulated"] is False
    assert any(a.startswith("measured 20") for a in mine["assumptions"])
    dense = offload.plan("Qwen3-8B", hardware=NOGPU, alternatives=False).as_json()
    assert not any("experts" in a for a in dense["assumptions"])


def test_what_would_help(told: dict[str, Any]) -> None:
    rows = {w["change"]: w for w in told["what_if"]}
    assert {"a disk twice as fast", "a link twice as fast", "compute twice as fast", "int8 weights"} <= set(rows)
    now = told["predicted_decode_tokens_per_s"]
    for change, w in rows.items():
        assert w["gain"] == pytest.approx(w["decode_tokens_per_s"] / now), change
        if w["available"]:
            assert w["gain"] > 0.98, change
    moved = offload.plan("allenai/OLMoE-1B-7B", hardware=GPU, vram="6GiB", expert_compute="device").as_json()
    rows_moved = {w["change"]: w for w in moved["what_if"]}
    assert moved["bottleneck"] == "link"
    assert rows_moved["a link twice as fast"]["gain"] == max(w["gain"] for w in rows_moved.values() if w["available"])
    assert moved["predicted_decode_tokens_per_s"] < now
    assert [c for c, w in rows.items() if not w["available"]] == ["int8 weights", "int4 weights", next(reversed(rows))]
    assert told["batch"]["tokens_per_s"] >= now


def test_the_text_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "plan", "Llama-3.1-8B", "--hardware", NOGPU)
    assert (code, err) == (0, "")
    d = plan(capsys, "Llama-3.1-8B", "--hardware", NOGPU)
    assert f"simulated  {d['predicted_decode_tokens_per_s']:.3g} tokens/s" in out
    assert "8.03B parameters" in out
    assert f"{d['bottleneck']}: " in out
    assert "what would help" in out
    assert "smallest that works: --ram " in out
    assert "VRAM" not in out
    for line in d["assumptions"]:
        assert f"· {line}" in out


@pytest.mark.parametrize("hardware", [NOGPU, GPU])
def test_the_picture_is_well_formed(capsys: pytest.CaptureFixture[str], tmp_path: Path, hardware: str) -> None:
    own = tmp_path / "own.json"
    own.write_text(json.dumps(OWN if hardware == NOGPU else WITH_GPU))
    svg = tmp_path / "plan.svg"
    d = plan(capsys, "gpt-oss-20b", "--hardware", str(own), "--ram", "8GiB", "--svg", str(svg),
             *(("--vram", "8GiB") if hardware == GPU else ()))  # fmt: skip
    root = ET.fromstring(svg.read_text(encoding="utf-8"))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    ns = "{http://www.w3.org/2000/svg}"
    texts = [t.text or "" for t in root.iter(f"{ns}text")]
    assert "gpt-oss-20b on my <own> & only" in texts
    assert any(t.startswith(f"simulated: {d['predicted_decode_tokens_per_s']:.3g} tokens/s") for t in texts)
    lanes = {t for t in texts if t in ("compute", "link", "disk")}
    assert lanes == ({"compute", "disk"} if hardware == NOGPU else {"compute", "link", "disk"})
    wide, high = float(root.attrib["width"]), float(root.attrib["height"])
    for r in root.iter(f"{ns}rect"):
        x, y, w, h = (float(r.attrib[k]) for k in ("x", "y", "width", "height"))
        assert x >= 0 and y >= 0 and w > 0 and h > 0
        assert x + w <= wide + 1 and y + h <= high + 1


# models and machines


@pytest.mark.parametrize("name", ["Qwen/Qwen3-30B-A3B", "openai/gpt-oss-20b", "mistral-7b"])
def test_known_models_need_no_network(name: str) -> None:
    told = offload.plan(name, hardware=NOGPU, alternatives=False)
    assert told.facts.name.lower() == name.rpartition("/")[2].lower()


@pytest.mark.parametrize("hardware", names())
def test_every_machine_runs_something(hardware: str) -> None:
    told = offload.plan("OLMoE-1B-7B", hardware=hardware, alternatives=False)
    assert told.prediction.decode_tokens_per_s > 0.1
    assert told.machine.name == hardware


def test_a_machine_of_ones_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(OWN))
    d = plan(capsys, "Qwen3-8B", "--hardware", str(file))
    assert d["machine"]["name"] == OWN["name"]
    assert d["machine"]["ram_bytes"] == 64 << 30
    # it all fits: one token reads every active weight once, in layers that cost 0.2 ms to call
    weights = d["model"]["bytes_per_token"] / 40e9
    assert 1 / d["predicted_decode_tokens_per_s"] == pytest.approx(weights + 36 * 2e-4, rel=0.05)
    file.write_text(json.dumps({"machines": [WITH_GPU]}))
    d = plan(capsys, "Qwen3-8B", "--hardware", str(file))
    assert d["machine"]["link_bytes_per_s"] == 20e9
    faster = {**OWN, "memory_bytes_per_s": 80e9}
    file.write_text(json.dumps(faster))
    assert (
        plan(capsys, "Qwen3-8B", "--hardware", str(file))["predicted_decode_tokens_per_s"]
        > 1.5 / (weights + 36 * 2e-4) * 0.95
    )


def test_budgets_may_be_smaller_and_larger_than_the_machine() -> None:
    def quick(hardware: str, **budgets: str) -> dict[str, Any]:
        return offload.plan("OLMoE-1B-7B", hardware=hardware, alternatives=False, **budgets).as_json()

    at = [quick(NOGPU, ram=ram)["predicted_decode_tokens_per_s"] for ram in ("3GiB", "6GiB", "512GiB")]
    assert at[0] < at[1] < at[2]
    d = quick(GPU, vram="80GiB")
    assert (d["budgets"]["vram"], d["bottleneck"]) == (80 << 30, "compute")
    assert quick(GPU, ram="50%")["budgets"]["ram"] == 32 << 30


def test_batches_share_the_weights(capsys: pytest.CaptureFixture[str]) -> None:
    one = plan(capsys, "Llama-3.2-3B", "--hardware", GPU)
    many = plan(capsys, "Llama-3.2-3B", "--hardware", GPU, "--batch", "8")
    assert many["workload"]["batch"] == 8
    assert many["context"] == 8 * one["context"] == 8 * 640
    assert 4 < many["predicted_decode_tokens_per_s"] / one["predicted_decode_tokens_per_s"] <= 8
    kv = [next(r["nbytes"] for r in d["placement"] if r["what"].startswith("KV")) for d in (one, many)]
    assert kv[1] == 8 * kv[0]


def test_choices_by_hand_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    d = plan(capsys, "OLMoE-1B-7B", "--hardware", GPU, "--set", "expert_slots=200", "--set", "prefill_chunk=64",
             "--set", "lookahead=0")  # fmt: skip
    assert (d["expert_slots"], d["prefill_chunk"], d["lookahead"]) == (200, 64, 0)


def test_a_device_map_names_every_module(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "plan", "Llama-3.1-8B", "--hardware", GPU, "--device-map")
    assert (code, err) == (0, "")
    places = json.loads(out)
    assert set(places.values()) == {0, "cpu"}
    assert [k for k, v in places.items() if v == "cpu"] == ["model.embed_tokens"]
    assert {f"model.layers.{i}" for i in range(32)} <= set(places)


# mistakes


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["--batch", "0"], 2, "--batch: 0 is not a whole number above zero"),
        (["--batch", "-3"], 2, "--batch"),
        (["--batch", "many"], 2, "'many' is not a whole number"),
        (["--prompt-tokens", "-1"], 2, "--prompt-tokens: -1"),
        (["--prompt-tokens", "0"], 2, "--prompt-tokens: 0"),
        (["--new-tokens", "0"], 2, "--new-tokens: 0"),
        (["--prompt-tokens", "40900", "--new-tokens", "100"], 2, "ask for 41000 tokens, the model's context is 40960"),
        (["--prompt-tokens", "9" * 30], 2, "--prompt-tokens"),
        (["--ram", "-8GiB"], 2, "--ram"),
        (["--ram", "nan"], 2, "--ram"),
        (["--vram", "0"], 2, "--vram"),
        (["--vram", "8GiB"], 2, "has no device with memory of its own"),
        (["--device", "tpu"], 2, "--device"),
        (["--device", "emulated", "--vram", "1GiB"], 2, "leave out --hardware"),
        (["--dtype", "int3"], 2, "--dtype"),
        (["--set", "layers=3"], 2, "--set layers: not a choice there is"),
        (["--set", "lookahead"], 2, "'lookahead' is not a choice"),
        (["--set", "lookahead=-1"], 2, "--set lookahead=-1"),
        (["--set", "expert_slots=0"], 2, "--set expert_slots=0"),
        (["--set", "resident_layers=1000"], 2, "the model has 36 layers"),
        (["--resident", "0%"], 2, "--resident"),
        (["--resident", "1B"], 1, "--resident 1 B is too small; the smallest that works is"),
        (["--ram", "1GiB"], 1, "--ram 1 GiB is too small; the smallest that works is"),
        (["--svg", "/nowhere/at/all.svg"], 2, "--svg /nowhere/at/all.svg"),
        (["--foo"], 2, "--foo"),
    ],
)
def test_mistakes_get_one_line(capsys: pytest.CaptureFixture[str], args: list[str], code: int, says: str) -> None:
    got, out, err = run(capsys, "plan", "Qwen3-8B", "--hardware", NOGPU, *args)
    assert (got, out) == (code, "")
    assert says in err
    assert len(err.strip().splitlines()) == 1, err


@pytest.mark.parametrize(
    ("model", "code", "says"),
    [
        ("/nowhere/at/all", 1, "/nowhere/at/all"),
        ("no-such-model", 1, "no-such-model"),
        ("", 2, "the model's name is empty"),
        ("{encoder}", 1, "is not a causal language model"),
        ("{awq}", 1, "no plan can be made for awq weights yet"),
        ("{broken}", 1, "not valid JSON"),
        ("{empty}", 1, "no config.json"),
        ("{negative}", 1, "transformers cannot build llama"),
    ],
)
def test_models_no_plan_can_be_made_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: str, code: int, says: str
) -> None:
    for name, text in {
        "encoder": '{"model_type": "bert", "architectures": ["BertForMaskedLM"]}',
        "awq": '{"model_type": "llama", "quantization_config": {"quant_method": "awq"}}',
        "broken": '{"model_type": ',
        "negative": '{"model_type": "llama", "hidden_size": -64, "num_attention_heads": 4}',
        "empty": None,
    }.items():
        (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / "config.json").write_text(text)
    if model.startswith("{"):
        model = str(tmp_path / model.strip("{}"))
    got, out, err = run(capsys, "plan", model, "--hardware", NOGPU)
    assert (got, out) == (code, "")
    assert says in err
    assert len(err.strip().splitlines()) == 1, err


def test_a_model_of_the_hub_that_is_not_known_cannot_be_asked_for_offline(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def away(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        raise LocalEntryNotFoundError("no")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", away)
    code, out, err = run(capsys, "plan", "some-org/some-model", "--hardware", NOGPU)
    assert (code, out) == (1, "")
    assert "some-org/some-model" in err and len(err.strip().splitlines()) == 1
    assert asked == [["config.json"]], "a plan needs no weights"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "is not known; known are desktop-32g-no-gpu"),
        ("{", "--hardware"),
        ("[]", "not a machine"),
        ("{}", "not a machine"),
        ('{"machines": []}', "give one machine; it has none"),
        (json.dumps({"machines": [OWN, {**OWN, "name": "other"}]}), "give one machine; it has my"),
        (json.dumps({k: v for k, v in OWN.items() if k != "disk_latency_s"}), "lacks or misstates 'disk_latency_s'"),
        (json.dumps({**OWN, "disk_bytes_per_s": -1}), "disk_bytes_per_s"),
        (json.dumps({**OWN, "disk_bytes_per_s": 0}), "a speed or size of zero"),
        (json.dumps({**OWN, "memory_bytes_per_s": "fast"}), "memory_bytes_per_s"),
        (json.dumps({**OWN, "ram_bytes": float("nan")}), "ram_bytes"),
        (json.dumps({**OWN, "ram_bytes": True}), "ram_bytes"),
        (json.dumps({**WITH_GPU, "link_up_bytes_per_s": 0}), "zero"),
        (json.dumps({**WITH_GPU, "link_up_bytes_per_s": None}), "link_up_bytes_per_s"),
        ("[" * 200_000, "--hardware"),
        (" " * (2 << 20), "larger than"),
    ],
)
def test_machines_that_make_no_sense(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str | None, says: str
) -> None:
    file = tmp_path / "mine.json"
    if content is not None:
        file.write_text(content)
    name = str(file) if content is not None else "cray-1"
    code, out, err = run(capsys, "plan", "Qwen3-8B", "--hardware", name)
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.strip().splitlines()) == 1, err


@pytest.mark.parametrize(("hardware", "flag"), [(NOGPU, "--ram"), (GPU, "--ram"), (GPU, "--vram")])
def test_a_refused_budget_names_the_smallest(capsys: pytest.CaptureFixture[str], hardware: str, flag: str) -> None:
    args = ("OLMoE-1B-7B", "--hardware", hardware)
    code, _, err = run(capsys, "plan", *args, flag, "300MiB")
    assert code == 1
    least = err.strip().rsplit(" ", 1)[1]
    d = plan(capsys, *args, flag, least)
    assert d["predicted_decode_tokens_per_s"] > 0
    assert -(-d["smallest"][flag.strip("-")] // (1 << 20)) == parse_size(least) >> 20
    code, _, err = run(capsys, "plan", *args, flag, f"{(parse_size(least) >> 20) - 1}MiB")
    assert (code, err.strip().rsplit(" ", 1)[1]) == (1, least)


def test_this_machine_is_taken_where_none_is_named(capsys: pytest.CaptureFixture[str], tiny_moe: Path) -> None:
    d = plan(capsys, str(tiny_moe), "--prompt-tokens", "32", "--new-tokens", "16", "--ram", "2GiB")
    assert d["machine"]["measured"] is True
    assert d["budgets"] == {"ram": 2 << 30, "vram": 0}
    emulated = plan(capsys, str(tiny_moe), "--prompt-tokens", "32", "--new-tokens", "16", "--device", "emulated",
                    "--vram", "64MiB", "--link", "1GB")  # fmt: skip
    assert emulated["machine"]["link_bytes_per_s"] == 1e9
    assert any("emulated" in a for a in emulated["assumptions"])


def test_a_folder_with_a_config_only_is_enough(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    build("qwen3_moe").config.save_pretrained(tmp_path)
    d = plan(capsys, str(tmp_path), "--hardware", NOGPU, "--prompt-tokens", "100", "--new-tokens", "20")
    assert d["model"]["experts"] == 4 * 8
    assert any("the weights are not here" in a for a in d["assumptions"])


# bench


@pytest.mark.parametrize("form", ["md", "json", "csv"])
def test_bench_rows(capsys: pytest.CaptureFixture[str], form: str) -> None:
    code, out, err = run(capsys, "bench", "demo-moe", "-p", "16", "-n", "4", "-r", "2", "-o", form, "--resident", "60%")
    assert code == 0, err
    keys = {"model", "size", "params", "device", "test", "state", "tokens_per_s", "deviation", "predicted",
            "share_of_floor", "bytes_read", "error"}  # fmt: skip
    if form == "md":
        head, _, *lines = out.strip().splitlines()
        assert head.startswith("| model | size | params | device | test |")
        cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
        assert all(len(c) == head.count("|") - 1 for c in cells)
        found = [(c[4], c[5]) for c in cells]
        assert all(float(c[6].split(" ± ")[0]) > 0 and c[8].endswith("%") and c[9].endswith("%") for c in cells)
    else:
        rows: list[dict[str, Any]] = json.loads(out) if form == "json" else list(csv.DictReader(io.StringIO(out)))
        assert all(set(r) == keys for r in rows)
        found = [(r["test"], r["state"]) for r in rows]
        for r in rows:
            n = {k: float(r[k]) for k in ("tokens_per_s", "deviation", "predicted", "share_of_floor", "error")}
            assert n["tokens_per_s"] > 0 and n["predicted"] > 0
            assert n["error"] == pytest.approx(n["predicted"] / n["tokens_per_s"] - 1)
            assert 0 < n["share_of_floor"] <= 1
            assert n["deviation"] == 0 or r["state"] == "warm"
            assert r["device"] == "cpu"
        assert float(rows[0]["bytes_read"]) > 0
    assert found == [("pp16", "cold"), ("pp16", "warm"), ("tg4", "warm")]


def test_bench_of_batches_without_a_prompt_test(capsys: pytest.CaptureFixture[str]) -> None:
    args = ("-p", "0", "-n", "3", "-r", "1", "-b", "2", "-o", "json")
    rows = json.loads(run(capsys, "bench", "demo-dense", *args)[1])
    assert [(r["test"], r["state"]) for r in rows] == [("tg3×2", "cold"), ("tg3×2", "warm")]
    assert rows[0]["bytes_read"] == pytest.approx(rows[1]["bytes_read"], abs=1 << 20), "everything is in memory"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["-p", "0", "-n", "0"], "-p and -n"),
        (["-p", "-4"], "-p and -n"),
        (["-r", "0"], "-b and -r"),
        (["-b", "0"], "-b and -r"),
        (["-o", "xml"], "'xml'"),
    ],
)
def test_bench_mistakes_get_one_line(
    capsys: pytest.CaptureFixture[str], tiny_moe: Path, args: list[str], says: str
) -> None:
    code, out, err = run(capsys, "bench", str(tiny_moe), *args)
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.strip().splitlines()) == 1, err

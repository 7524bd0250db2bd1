"""`offload plan --routing`: what a recorded trace says, as lines, JSON and a picture; and every file that is none."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from test_cli import run

import offload
from cli import heatmap
from moe import Routed, RoutingTrace
from moe.belady import Belady
from moe.replay import replay
from moe.synthetic import even, skewed, sticky
from offload import ModelError, UsageError, routing_report
from offload.planning import report
from tiers import LRU

NOGPU = "desktop-32g-no-gpu"
NS = "{http://www.w3.org/2000/svg}"


def trace_of(*layers: tuple[int, list[list[int]]]) -> RoutingTrace:
    """(experts, the choices of each token) for each layer; a token is a pass."""

    def routed(layer: int, row: list[int]) -> Routed:
        return Routed(layer, np.array([row], np.int16), np.full((1, len(row)), 1 / len(row), np.float16))

    passes = zip(*[[routed(n, row) for row in rows] for n, (_, rows) in enumerate(layers)], strict=True)
    return RoutingTrace([wide for wide, _ in layers], passes)


def saved(trace: RoutingTrace, folder: Path, name: str = "trace.npz") -> str:
    trace.save(folder / name)
    return str(folder / name)


# the numbers


def test_what_is_told_can_be_counted(tmp_path: Path) -> None:
    rows = [[n % 2] for n in range(20)]
    path = saved(trace_of((4, rows), (4, [[0]] * 10 + [[3]] * 10)), tmp_path)
    told = offload.routing(path)
    assert (told.name, told.experts, told.top_k, told.passes, told.tokens) == ("trace.npz", (4, 4), 1, 20, 20)
    assert told.repeats == (0 + 18) / (19 + 19) and told.chance == 0.25
    assert told.relative == ((2, 2, 0, 0), (2, 0, 0, 2))
    assert told.effective == (pytest.approx(2), pytest.approx(2))
    assert [(c.share, c.slots) for c in told.caches] == [(0.25, 2), (0.5, 4), (0.75, 6)]
    # two slots: the second layer's expert and one of the first's; LRU keeps the wrong one of those
    assert told.caches[0].lru == 18 / 40 and told.caches[0].belady > told.caches[0].lru
    assert told.caches[1].lru == told.caches[2].lru == told.caches[2].belady == 36 / 40


def test_effective_experts_are_all_if_use_is_even_and_one_if_it_is_not(tmp_path: Path) -> None:
    told = offload.routing(saved(trace_of((6, [[n % 6] for n in range(60)]), (3, [[1]] * 60)), tmp_path))
    assert told.effective == (pytest.approx(6), pytest.approx(1))
    assert told.experts == (6, 3) and [len(u) for u in told.relative] == [6, 3]
    assert told.chance == pytest.approx((1 / 6 + 1 / 3) / 2)


def test_caches_are_those_of_the_replay(tmp_path: Path) -> None:
    trace = skewed(4, 16, 2, 60)
    for c in offload.routing(saved(trace, tmp_path)).caches:
        lru, best = (replay(trace, c.slots, policy).total for policy in (LRU(), Belady(trace)))
        assert (c.slots, c.lru, c.belady) == (int(c.share * 64), lru.hits / lru.needed, best.hits / best.needed)
        assert c.lru < c.belady


def test_only_the_end_of_a_long_trace_is_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing_report, "_MOST", 20)
    trace = trace_of((4, [[n % 4] for n in range(30)] + [[0]] * 30))
    told = offload.routing(saved(trace, tmp_path))
    assert told.passes == 60 and told.replayed == 20 and told.caches[0].lru == 19 / 20
    assert "the last 20 passes" in told.text()
    monkeypatch.setattr(routing_report, "_MOST", 1)
    assert offload.routing(saved(trace, tmp_path)).replayed == 1


# the command


def test_lines_and_json_say_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = saved(sticky(4, 16, 2, 50), tmp_path)
    code, out, err = run(capsys, "plan", "--routing", path)
    assert (code, err) == (0, "")
    assert "demo" not in out, "no model was asked for"
    code, told, err = run(capsys, "plan", "--routing", path, "--json")
    assert (code, err) == (0, "")
    (d,) = json.loads(told).values()
    assert json.loads(told)["routing"] == d == offload.routing(path).as_json()
    assert "trace.npz: 4 layers of 16 experts, 2 for each token; 50 tokens in 50 passes" in out
    assert f"{100 * d['repeats']:.1f}%  were the previous token's; 12.5% by chance" in out
    e = d["effective_experts"]
    assert f"{e['median']:.1f}  in the median layer, {e['min']:.1f} to {e['max']:.1f}" in out
    assert (min(e["layers"]), max(e["layers"]), len(e["layers"])) == (e["min"], e["max"], 4)
    for key, form in (("slots", "{:d}"), ("lru", "{:.1%}"), ("belady", "{:.1%}")):
        assert any(line.split()[-3:] == [form.format(c[key]) for c in d["caches"]] for line in out.splitlines()), key


def test_beside_a_plan_of_the_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_best_batch", lambda *args: None)  # these take most of the time
    monkeypatch.setattr(report, "_what_if", lambda *args: ())
    path = saved(skewed(16, 64, 8, 12), tmp_path)
    asked = ("plan", "OLMoE-1B-7B", "--hardware", NOGPU)
    code, out, err = run(capsys, *asked, "--routing", path)
    assert (code, err) == (0, "")
    plan, table = out.split("\n\ntrace.npz: ")
    assert plan + "\n" == run(capsys, *asked)[1] and "choices that repeat" in table
    d = json.loads(run(capsys, *asked, "--routing", path, "--json")[1])
    routing = d.pop("routing")
    assert routing["layers"] == 16 and d == json.loads(run(capsys, *asked, "--json")[1])


@pytest.mark.parametrize(
    ("trace", "model", "says"),
    [
        (skewed(15, 64, 8, 3), "OLMoE-1B-7B", "it has 15 layers of 64 experts, 8 for each token, OLMoE-1B-7B has 16"),
        (skewed(16, 64, 4, 3), "OLMoE-1B-7B", "another model"),
        (skewed(16, 32, 8, 3), "OLMoE-1B-7B", "another model"),
        (skewed(16, 64, 8, 3), "Qwen3-8B", "Qwen3-8B has no experts"),
    ],
)
def test_a_trace_of_another_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, trace: RoutingTrace, model: str, says: str
) -> None:
    code, out, err = run(capsys, "plan", model, "--hardware", NOGPU, "--routing", saved(trace, tmp_path))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "trace.npz was recorded from another model" in err and says in err


def test_files_that_are_no_trace(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    whole = Path(saved(even(2, 8, 2, 20), tmp_path)).read_bytes()
    plan = tmp_path / "plan.json"
    plan.write_text('{"model": 1}')
    other = tmp_path / "other.npz"
    np.savez(other, a=np.zeros(3))
    flipped = tmp_path / "flipped.npz"
    flipped.write_bytes(whole[:300] + bytes([whole[300] ^ 1]) + whole[301:])
    cut = tmp_path / "cut.npz"
    cut.write_bytes(whole[: len(whole) // 2])
    empty = saved(RoutingTrace([4, 4], []), tmp_path, "empty.npz")
    for path, code, says in (
        (tmp_path / "absent.npz", UsageError.exit_code, "No such file"),
        (tmp_path, UsageError.exit_code, "Is a directory"),
        (empty, UsageError.exit_code, "holds no passes"),
        (plan, ModelError.exit_code, "damaged or of another kind"),
        (other, ModelError.exit_code, "damaged or of another kind"),
        (flipped, ModelError.exit_code, "damaged or of another kind"),
        (cut, ModelError.exit_code, "damaged or of another kind"),
    ):
        svg = tmp_path / "out.svg"
        got, out, err = run(capsys, "plan", "--routing", str(path), "--svg", str(svg))
        assert (got, out, err.count("\n")) == (code, "", 1), path
        assert err.startswith("offload plan: ") and str(path) in err and says in err
        assert not svg.exists()


def test_what_does_not_go_together(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = saved(even(2, 8, 2, 5), tmp_path)
    code, out, err = run(capsys, "plan", "--routing", path, "--device-map")
    assert (code, out, err.count("\n")) == (2, "", 1) and "--device-map" in err and "--routing" in err
    code, out, err = run(capsys, "plan", "--routing", path, "--svg", str(tmp_path / "no" / "where.svg"))
    assert (code, out, err.count("\n")) == (2, "", 1) and "--svg" in err


# the picture


def picture(trace: RoutingTrace, folder: Path, name: str = "trace.npz") -> tuple[ET.Element, list[str]]:
    """Parsed, and its texts. Nothing in it may lie outside, or be fetched from elsewhere."""
    text = heatmap.draw(offload.routing(saved(trace, folder, name)))
    assert not any(word in text for word in ("href", "url(", "<script", "@import", "<image"))
    root = ET.fromstring(text)
    wide, high = float(root.attrib["width"]), float(root.attrib["height"])
    for r in root.iter(f"{NS}rect"):
        x, y, w, h = (float(r.attrib[k]) for k in ("x", "y", "width", "height"))
        assert x >= 0 and y >= 0 and w > 0 and h > 0 and x + w <= wide and y + h <= high
    for t in root.iter(f"{NS}text"):
        assert float(t.attrib["x"]) + 6 * len(t.text or "") < wide and float(t.attrib["y"]) < high
    style = root.findtext(f"{NS}style") or ""
    assert "prefers-color-scheme:dark" in style
    assert all(f".{c}{{" in style for r in root.iter(f"{NS}rect") for c in r.attrib["class"].split())
    return root, [t.text or "" for t in root.iter(f"{NS}text")]


def test_the_picture_shows_each_expert_of_each_layer(tmp_path: Path) -> None:
    counts = {0: 64, 1: 24, 2: 12, 3: 6, 4: 2, 5: 0}
    rows = [[e] for e, n in counts.items() for _ in range(n)]
    root, texts = picture(trace_of((6, rows), (2, [[0]] * len(rows))), tmp_path)
    named = {r.findtext(f"{NS}title"): r for r in root.iter(f"{NS}rect") if r.find(f"{NS}title") is not None}
    assert len(named) == 6 + 2
    for e, n in counts.items():
        relative = 6 * n / len(rows)
        cell = named[f"layer 0, expert {e}: {relative:.2f} times even use"]
        level = 6 if n == 0 else min(6, abs(round(2 * np.log2(relative))))
        assert cell.attrib["class"] == f"{'m' if relative > 1 else 'l'}{level}"
    assert named["layer 1, expert 0: 2.00 times even use"].attrib["class"] == "m2"
    assert named["layer 1, expert 1: 0.00 times even use"].attrib["class"] == "l6"
    x = {title: float(r.attrib["x"]) for title, r in named.items()}
    assert len(set(x.values())) == 6, "expert 0 below expert 0"
    assert "use of experts: trace.npz" in texts and offload.routing(tmp_path / "trace.npz").facts() in texts
    assert "1.0 of 2" in texts and any(t.endswith(" of 6") for t in texts)


def test_even_use_has_no_colour(tmp_path: Path) -> None:
    root, _ = picture(trace_of((4, [[n % 4] for n in range(40)])), tmp_path)
    assert {r.attrib["class"] for r in root.iter(f"{NS}rect") if r.find(f"{NS}title") is not None} == {"n"}


def test_names_are_text_and_nothing_else(tmp_path: Path) -> None:
    _, texts = picture(even(2, 8, 2, 5), tmp_path, 'a <b> & "c" \x07\udcff.npz')
    assert 'use of experts: a <b> & "c" \N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}.npz' in texts


def test_large_models_are_drawn_in_bounds(tmp_path: Path) -> None:
    root, texts = picture(even(200, 600, 2, 1), tmp_path)
    assert sum(1 for _ in root.iter()) < 120_000
    assert root.find(f".//{NS}title") is None, "too many to name"
    assert sum(t.endswith(" of 600") for t in texts) < 100, "no words upon words"


def test_the_command_writes_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path, svg = saved(even(2, 8, 2, 5), tmp_path), tmp_path / "out.svg"
    assert run(capsys, "plan", "--routing", path, "--svg", str(svg))[0] == 0
    assert svg.read_text(encoding="utf-8") == heatmap.draw(offload.routing(path))

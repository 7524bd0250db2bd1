"""`bench/sparse_quality.py` asks questions that have answers, scores them right, and shows what came of it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import sparse_quality as sq  # noqa: E402
import tables  # noqa: E402
from common import machine  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(sq.MODEL)


@pytest.fixture(scope="module")
def asked(tokenizer: Any) -> list[sq.Question]:
    return sq.questions(tokenizer, [320], each=1)


@pytest.fixture(scope="module")
def reference() -> sq.Reference:
    return sq.Reference(sq.MODEL, chunk=16)


def test_questions_are_of_their_length_and_tell_the_code_where_they_say(
    asked: list[sq.Question], tokenizer: Any
) -> None:
    recall = [q for q in asked if q.kind == "recall"]
    assert len(recall) == len(sq.DEPTHS) and len(asked) == len(recall) + 1
    for depth, q in zip(sq.DEPTHS, recall, strict=True):
        told = re.fullmatch(r"The code of (.+) is (\d\d \d\d)\.<\|.*\|>", tokenizer.decode(q.after))
        assert told is not None
        text = tokenizer.decode(q.prompt)
        statement = f"The code of {told[1]} is {told[2]}."
        assert text.count(statement) == 1 and text.rstrip().count(f"What is the code of {told[1]}?") == 1
        at = len(tokenizer(text[: text.index(statement)], add_special_tokens=False)["input_ids"])
        assert abs(at / len(q.prompt) - depth) < 0.25
        assert 0.7 * 320 <= len(q.prompt) <= 1.25 * 320
    text = next(q for q in asked if q.kind == "text")
    assert (len(text.prompt), len(text.after)) == (320, sq.CONTINUED)
    again = sq.questions(tokenizer, [320], each=1)
    assert again == asked


def test_scores() -> None:
    q = [sq.Question(512, [1], [5, 6], "recall"), sq.Question(512, [2], [7, 8], "recall"),
         sq.Question(512, [3], [1, 2, 3, 4], "text"), sq.Question(1024, [4], [1, 2], "text")]  # fmt: skip
    full = [[5, 6], [7, 8], [1, 2, 9, 9], [1, 1]]
    got = [[5, 6], [7, 9], [1, 2, 9, 4], [1, 1]]
    assert sq.score(q, full, got) == [
        {"context": 512, "questions": 2, "recall": 0.5, "tokens": 4, "agreement": 0.75},
        {"context": 1024, "questions": 0, "recall": None, "tokens": 2, "agreement": 1.0},
    ]
    rows = [{"policy": "bounds", "budget": 25.0, **r} for r in sq.score(q, full, got)]
    assert sq.curves(rows, "recall") == {"bounds": {25.0: 0.5}}
    assert sq.curves(rows, "agreement") == {"bounds": {25.0: 0.875}}


def test_the_reference_says_what_transformers_says(reference: sq.Reference, asked: list[sq.Question]) -> None:
    """Full attention, and every policy whose budget is all of it; also after other budgets on the same prompt."""
    plain = AutoModelForCausalLM.from_pretrained(sq.MODEL).eval()
    for q in (asked[0], asked[-1]):
        with torch.inference_mode():
            logits = plain(input_ids=torch.tensor([q.prompt + q.after])).logits[0]
        at = range(len(q.prompt) - 1, len(q.prompt) + len(q.after) - 1)
        # (bfloat16 and one token at a time: near ties may fall either way)
        full = reference.use(None, 100).predictions(q.prompt, q.after)
        assert all(float(logits[i].max() - logits[i, t]) < 0.2 for i, t in zip(at, full, strict=True))
        for policy in ("recent", "bounds", "oracle"):
            reference.use(policy, 5).predictions(q.prompt, q.after)
            got = reference.use(policy, 100).predictions(q.prompt, q.after)
            assert all(float(logits[i].max() - logits[i, t]) < 0.2 for i, t in zip(at, got, strict=True))
            assert reference.attended[0] == reference.attended[1] > 0
        assert reference.use(None, 100).predictions(q.prompt, q.after) == full


def test_looking_things_up_answers_what_the_window_cannot(reference: sq.Reference, asked: list[sq.Question]) -> None:
    recall = [q for q in asked if q.kind == "recall"]

    def answered(policy: str, budget: float) -> int:
        model = reference.use(policy, budget)
        return sum(model.predictions(q.prompt, q.after) == q.after for q in recall)

    assert answered("bounds", 40) >= 3
    assert answered("recent", 40) <= 2  # those told within the window, at most
    assert reference.attended[0] < 0.5 * reference.attended[1]


def test_a_result_is_shown_and_drawn(tmp_path: Path) -> None:
    rows = [
        {"policy": p, "budget": b, "attended": b / 100, "context": c, "questions": 20, "recall": r * b / 100,
         "tokens": 48, "agreement": 0.5 + r * b / 200}
        for p, r in (("bounds", 1.0), ("recent", 0.5)) for b in (100.0, 12.5) for c in (512, 1024)
    ]  # fmt: skip
    full = [{"context": c, "questions": 20, "recall": 1.0, "tokens": 48, "agreement": 1.0} for c in (512, 1024)]
    result = {
        "kind": "sparse", "name": "sparse", "date": "2026-01-01 00:00 UTC", "machine": machine(), "model": "demo-moe",
        "runner": "reference", "chunk_tokens": 16, "depths": [0.1, 0.9], "full": full, "rows": rows,
    }  # fmt: skip
    table = tables.render(result)
    assert "| policy | 100 % | 12.5 % |" in table
    assert "| bounds | 100 / 100 | 12 / 56 |" in table and "| recent | 50 / 75 | 6 / 53 |" in table
    assert "40 recall questions" in table and "100 % at 512, 100 % at 1024" in table and "10, 90 %" in table
    out = tmp_path / "docs" / "sparse.svg"
    sq.draw(result, out)
    drawn = out.read_text()
    assert drawn.startswith("<svg") and drawn.rstrip().endswith("</svg>")
    assert drawn.count("<polyline") == 4 and "oracle" not in drawn
    x = [float(p.split(",")[0]) for p in re.findall(r'points="([^"]+)"', drawn)[0].split()]
    y = [float(p.split(",")[1]) for p in re.findall(r'points="([^"]+)"', drawn)[0].split()]
    assert x[0] - x[1] == pytest.approx(380) and y[0] < y[1]  # all of the context: right and up


def test_the_script_writes_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sq, "DEPTHS", (0.5,))
    monkeypatch.setattr(sq, "CONTINUED", 4)
    out, svg = tmp_path / "sparse.json", tmp_path / "sparse.svg"
    words = ["--runner", "reference", "--contexts", "128", "--budgets", "100,50", "--each", "1", "--policies", "bounds"]
    assert sq.main([*words, "--out", str(out), "--svg", str(svg)]) == 0
    assert svg.exists()
    assert "128 tokens" in tables.fill("<!-- bench:sparse -->\n<!-- /bench -->", tmp_path)
    with pytest.raises(sq.BenchError, match="best"):
        sq.main([*words[:-1], "best"])

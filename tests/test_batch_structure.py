"""Structured output: whatever the model says, what comes out follows the schema; what cannot be enforced is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from offload.batch import structure
from offload.batch.choosing import Chooser, choose_all
from offload.batch.requests import Options, Request
from offload.batch.structure import Constraint, Grammars, StructureError, schema_of
from offload.batch.vocabulary import Vocabulary

END = 1265
WIDTH = 1272
DEMO = Path(__file__).parents[1] / "offload" / "models" / "demo-dense"


@cache
def demo() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


@cache
def grammars() -> Grammars:
    return Grammars(demo(), WIDTH, [END])


@cache
def closers() -> torch.Tensor:
    """Tokens that bring a document nearer to its end: else random ones may write numbers for ever."""
    texts = [demo().decode([i]) for i in range(WIDTH)]
    return torch.tensor([i for i, t in enumerate(texts) if (t and t[0] in '",]}') or i == END])


def form(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "t", "schema": schema}}


def constraint(schema: Any) -> Constraint:
    made = grammars().constraint(form(schema))
    assert made is not None
    return made


def answer(response_format: dict[str, Any], seed: int, limit: int = 3000, **options: Any) -> Chooser:
    request = Request(f"r{seed}", True, "", Options(response_format=response_format, **options))
    it = Chooser(request, limit=limit, ends=(END,), vocabulary=Vocabulary(demo()),
                 constraint=grammars().constraint(response_format))  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    while it.finish is None:
        row = torch.randn(WIDTH, generator=generator) * 2
        row[closers()] += 2
        choose_all([it], row[None])
    return it


def valid(value: Any, schema: dict[str, Any]) -> bool:
    """Whether the JSON `value` follows the schema, of the kinds drawn here."""
    if "anyOf" in schema:
        return any(valid(value, s) for s in schema["anyOf"])
    if "enum" in schema:
        return any(type(value) is type(e) and value == e for e in schema["enum"])
    kind = schema["type"]
    if kind == "object":
        if not isinstance(value, dict) or not value.keys() <= schema["properties"].keys():
            return False
        needed = set(schema["required"]) <= value.keys()
        return needed and all(valid(v, schema["properties"][k]) for k, v in value.items())
    if kind == "array":
        inside = isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"]
        return inside and all(valid(v, schema["items"]) for v in value)
    if kind == "string":
        return isinstance(value, str) and schema["minLength"] <= len(value) <= schema["maxLength"]
    if kind == "integer":
        return isinstance(value, int) and not isinstance(value, bool) and schema["minimum"] <= value <= 99
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return value is None if kind == "null" else isinstance(value, bool)


LEAVES = st.one_of(
    st.builds(
        lambda a, b: {"type": "string", "minLength": a, "maxLength": a + b}, st.integers(0, 3), st.integers(0, 5)
    ),
    st.builds(lambda a: {"type": "integer", "minimum": a, "maximum": 99}, st.integers(-50, 99)),
    st.sampled_from([{"type": "number"}, {"type": "boolean"}, {"type": "null"}]),
    st.builds(
        lambda e: {"enum": e},
        st.lists(st.sampled_from(["x", "é\n", "你", "😀", 1, None, True]), min_size=1, max_size=3, unique=True),
    ),
)


def _object(properties: dict[str, Any], optional: bool) -> dict[str, Any]:
    required = [] if optional else list(properties)
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(_object, st.dictionaries(st.sampled_from(["a", "b c", "é", '"']), inner, max_size=3), st.booleans()),
        st.builds(
            lambda i, a, b: {"type": "array", "items": i, "minItems": a, "maxItems": a + b},
            inner,
            st.integers(0, 2),
            st.integers(0, 2),
        ),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=2)),
    ),
    max_leaves=5,
)


@settings(max_examples=80, deadline=None)
@given(schema=SCHEMAS, seed=st.integers(0, 10**6), temperature=st.sampled_from([0.0, 1.0]))
def test_random_logits_give_a_document_that_follows_the_schema(
    schema: dict[str, Any], seed: int, temperature: float
) -> None:
    it = answer(form(schema), seed, temperature=temperature)
    text = it.choice().text
    assert it.finish == "stop", text
    assert text is not None and valid(json.loads(text), schema), text


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_json_object_gives_an_object(seed: int) -> None:
    it = answer({"type": "json_object"}, seed)
    if it.finish == "stop":
        assert isinstance(json.loads(it.choice().text or ""), dict)
    else:
        assert (it.choice().text or "").lstrip().startswith("{")


def test_it_stops_where_nothing_may_follow_and_ends_with_an_end_token_where_something_may() -> None:
    closed = answer(form(_object({}, False)), 0)
    assert (closed.finish, "".join((closed.choice().text or "").split())) == ("stop", "{}")
    assert closed.tokens[-1] != END
    number = answer(form({"type": "number"}), 0)
    assert number.tokens[-1] == END
    assert number.choice().text == demo().decode(number.tokens[:-1])


def test_blanks_between_tokens_have_an_end() -> None:
    it = constraint({"type": "object"})
    it.advance(*demo()("{")["input_ids"])
    space = demo()(" ")["input_ids"][0]
    for _ in range(100):
        if not it.allowed()[space]:
            break
        it.advance(space)
    assert not it.allowed()[space]


def test_the_mask_is_over_the_logits_and_leaves_them_alone() -> None:
    it = constraint({"type": "boolean"})
    for width in (WIDTH, WIDTH + 100, WIDTH - 1):
        row = torch.randn(width)
        kept = row.clone()
        masked = it.apply(row)
        assert torch.equal(row, kept)
        assert masked.shape == row.shape
        starts = [i for i in range(width) if masked[i] > -torch.inf]
        assert starts and all("true".startswith(t) or "false".startswith(t) for t in map(demo().decode, starts))
        assert torch.equal(masked[starts], row[starts])


def test_a_sequence_that_leaves_the_schema_is_refused() -> None:
    it = constraint({"type": "boolean"})
    with pytest.raises(StructureError, match="follow"):
        it.advance(*demo()("[")["input_ids"])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("json", "must be an object"),
        ({}, "type must be one of"),
        ({"type": ["json_object"]}, "type must be one of"),
        ({"type": "grammar"}, "type must be one of text, json_object, json_schema"),
        ({"type": "json_object", "schema": {}}, "unknown field 'schema'"),
        ({"type": "json_schema"}, "json_schema must be an object"),
        ({"type": "json_schema", "json_schema": {"name": "t"}}, "schema must be an object"),
        ({"type": "json_schema", "json_schema": {"name": "t", "schema": {}, "mode": 1}}, "unknown field 'mode'"),
        (form({"type": "frob"}), "Invalid type"),
        (form({"not": {"type": "string"}}), "not"),
        (form({"x-guidance": {"lenient": True}, "not": {}}), "not"),
        (form({"$ref": "http://localhost:1/schema"}), "fetch"),
        (form({"$ref": "file:///etc/passwd"}), "fetch"),
        (form({"$ref": "#/$defs/none"}), "none"),
        (form({"type": "integer", "minimum": 5, "maximum": 2}), "minimum"),
        (form({"type": "string", "pattern": "("}), "unclosed"),
        (form({"type": "integer", "multipleOf": 1000003}), "multipleOf"),
        (form({"allOf": [{"type": "integer", "multipleOf": 997}, {"multipleOf": 1009}]}), "multipleOf"),
        (form({"type": "integer", "multipleOf": int("9" * 400)}), "multipleOf"),
        (form({"const": float("nan")}), "schema cannot be used"),
        (form({"const": "\ud800"}), "schema"),
        (form({"const": {1}}), "not JSON"),
        (form({"type": "string", "pattern": "a" * 300_000}), "256 KiB"),
    ],
)
def test_what_cannot_be_enforced_is_refused(given: Any, says: str) -> None:
    with pytest.raises(StructureError, match=says.replace("$", r"\$")) as e:
        grammars().constraint(given)
    assert isinstance(e.value, ValueError)
    assert (e.value.code, e.value.param) == ("invalid_response_format", "response_format")
    assert "\n" not in str(e.value) and len(str(e.value)) <= 610


def test_text_is_no_constraint() -> None:
    assert schema_of(None) is None
    assert grammars().constraint({"type": "text"}) is None


def chain(length: int) -> dict[str, Any]:
    """A schema in which definitions refer to each other, each inside an array."""
    defs: dict[str, Any] = {f"a{i}": {"type": "array", "items": {"$ref": f"#/$defs/a{i + 1}"}} for i in range(length)}
    return {"$ref": "#/$defs/a0", "$defs": defs | {f"a{length}": {"type": "null"}}}


def nested(depth: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for _ in range(depth):
        out = {"items": out}
    return out


def test_a_schema_that_would_overflow_the_stack_is_refused() -> None:
    for schema in (chain(700), chain(20_000), nested(300), nested(50_000)):
        with pytest.raises(StructureError):
            grammars().constraint(form(schema))


def test_the_deepest_schema_that_is_let_through_compiles() -> None:
    # in a process of its own: too deep is a crash in native code. Threads get little room, as under some limits
    run = f"""
import sys, threading
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
import test_batch_structure as t
from offload.batch import structure
deepest = next(n for n in range(1000, 1, -1) if structure._levels(t.chain(n)) <= structure.LEVELS)
threading.stack_size(512 << 10)
def work():
    it = t.constraint(t.chain(deepest))
    it.advance(*t.demo()("[[[")["input_ids"])
    it.allowed()
    print(deepest)
worker = threading.Thread(target=work)
worker.start()
worker.join()
"""
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 300


def test_a_schema_is_compiled_once_and_constraints_are_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Grammars(demo(), WIDTH, [END])
    compiled = []
    real = Grammars._compile_here
    monkeypatch.setattr(Grammars, "_compile_here", lambda self, text: compiled.append(text) or real(self, text))
    monkeypatch.setattr(structure, "COMPILED", 2)
    first, second = (own.constraint(form({"type": "boolean"})) for _ in range(2))
    assert first is not None and second is not None and len(compiled) == 1
    before = second.allowed()
    first.advance(*demo()("true")["input_ids"])
    assert first.finished and not second.finished
    assert torch.equal(second.allowed(), before)
    for kind in ("null", "string", "boolean"):  # the one left out is compiled again
        own.constraint(form({"type": kind}))
    assert len(compiled) == 4
    # properties come in the schema's order, so that is part of what a schema is
    ab, ba = _object({"a": {"type": "null"}, "b": {"type": "null"}}, False), {}
    ba = ab | {"properties": dict(reversed(ab["properties"].items()))}
    texts = [answer(form(s), 0).choice().text or "" for s in (ab, ba)]
    assert [t.index('"a"') < t.index('"b"') for t in texts] == [True, False]


def test_several_threads_may_ask_at_once() -> None:
    own = Grammars(demo(), WIDTH, [END])
    made: list[Constraint | None] = []
    ask = [threading.Thread(target=lambda i=i: made.append(own.constraint(form({"const": i % 3})))) for i in range(8)]
    for thread in ask:
        thread.start()
    for thread in ask:
        thread.join()
    assert len(made) == 8 and all(c is not None and c.allowed().any() for c in made)


def test_a_grammar_that_turns_out_too_complex_ends_its_own_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structure, "LEXER_STATES", 300)
    own = Grammars(demo(), WIDTH, [END])
    response_format = form({"type": "string", "pattern": "(.*a.{9}b.*){2}"})
    beside = [
        Chooser(Request("a", True, "", Options(response_format=response_format)), limit=400, ends=(END,),
                vocabulary=Vocabulary(demo()), constraint=own.constraint(response_format)),
        Chooser(Request("b", True, "", Options()), limit=400, vocabulary=Vocabulary(demo())),
    ]  # fmt: skip
    a = demo()("a")["input_ids"][0]
    chosen: list[int | None] = []
    for _ in range(400):
        row = torch.zeros(2, WIDTH)
        row[:, a] = 1
        chosen = choose_all(beside, row)
        if beside[0].finish is not None:
            break
    assert (beside[0].finish, chosen[0]) == ("error", None)
    assert "cannot be followed further" in str(beside[0].error)
    assert beside[1].finish is None and beside[1].tokens[-1] == a


def test_a_vocabulary_with_bytes_for_all_else() -> None:
    words = ["<unk>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁{", "tr", "ue"]
    model = models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], unk_token="<unk>", byte_fallback=True)
    raw = Tokenizer(model)
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>")
    response_format = form({"type": "array", "items": {"enum": [True, "é"]}, "minItems": 4, "maxItems": 4})
    made = Grammars(tokenizer, 300, [1]).constraint(response_format)
    it = Chooser(Request("a", True, "", Options(response_format=response_format)), limit=300, ends=(1,),
                 vocabulary=Vocabulary(tokenizer), constraint=made)  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    while it.finish is None:
        it.choose(torch.randn(300, generator=generator))
    assert it.finish == "stop"
    assert set(json.loads(it.choice().text or "")) <= {True, "é"}


def test_a_tokenizer_that_cannot_be_used_is_named() -> None:
    with pytest.raises(StructureError, match="fast tokenizer"):
        Grammars(None, WIDTH, [END]).constraint({"type": "json_object"})


def test_the_library_is_imported_on_first_use_only() -> None:
    run = "import sys, offload.batch.choosing, offload.batch.responses; print('llguidance' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"

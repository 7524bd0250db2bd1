"""Every line is a request or an error that names what is wrong; none raises, and no field is ignored silently."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from offload.batch import requests
from offload.batch.requests import LineError, Options, Request, glimpse, parse, too_long

MODELS = ("tiny", "org/tiny")
ASK = [{"role": "user", "content": "Hello"}]


def chat(**body: Any) -> dict[str, Any]:
    return {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"messages": ASK, **body},
    }


def text(**body: Any) -> dict[str, Any]:
    return {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Hello", **body}}


def read(value: Any) -> Request | LineError:
    return parse(value if isinstance(value, bytes) else json.dumps(value).encode(), MODELS)


def good(value: Any) -> Request:
    found = read(value)
    assert isinstance(found, Request), found
    return found


def bad(value: Any) -> LineError:
    found = read(value)
    assert isinstance(found, LineError), found
    return found


def test_a_chat() -> None:
    assert good(chat()) == Request("a", True, tuple(ASK), Options())


def test_a_completion() -> None:
    assert good(text(model="tiny")) == Request("a", False, "Hello", Options())


def test_bare_lines() -> None:
    assert good({"custom_id": "a", "prompt": "Hello", "max_tokens": 3, "model": "org/tiny"}) == Request(
        "a", False, "Hello", Options(max_tokens=3)
    )
    assert good({"custom_id": "a", "messages": ASK}).chat


def test_every_option() -> None:
    schema = {"name": "n", "schema": {"type": "object"}, "strict": True}
    found = good(
        chat(
            max_tokens=5, max_completion_tokens=7, temperature=2, top_p=0.5, seed=-(1 << 63), stop=["x", "y"], n=128,
            logprobs=True, top_logprobs=20, response_format={"type": "json_schema", "json_schema": schema},
        )
    )  # fmt: skip
    assert found.options == Options(
        7, 2.0, 0.5, -(1 << 63), ("x", "y"), 128, 20, {"type": "json_schema", "json_schema": schema}
    )


def test_logprobs_of_each_endpoint() -> None:
    assert good(chat(logprobs=True)).options.logprobs == 0
    assert good(chat(logprobs=False)).options.logprobs is None
    assert good(text(logprobs=0)).options.logprobs == 0
    assert good(text(logprobs=5)).options.logprobs == 5


def test_parts_of_text_are_joined_and_developers_are_the_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "x"}, {"role": "user", "content": parts}]
    assert good(chat(messages=messages)).prompt == (
        {"role": "system", "content": "x"},
        {"role": "user", "content": "ab"},
    )


def test_an_answer_that_is_sent_back() -> None:
    answer = {"role": "assistant", "content": "b", "refusal": None, "annotations": [], "tool_calls": None}
    assert good(chat(messages=[*ASK, answer])).prompt[1] == {"role": "assistant", "content": "b"}


def test_null_is_the_default() -> None:
    names = ["max_tokens", "temperature", "top_p", "seed", "stop", "n", "logprobs", "response_format", "model"]
    assert good(chat(**dict.fromkeys(names))) == good(chat())
    assert good(chat(response_format={"type": "text"}, stop=[])) == good(chat())


@pytest.mark.parametrize("name", sorted(requests._NO_EFFECT))
def test_what_changes_nothing_may_be_said(name: str) -> None:
    assert good(chat(**{name: None})) == good(chat())
    for harmless in requests._NO_EFFECT[name]:
        value = harmless() if isinstance(harmless, type) else harmless
        assert good(chat(**{name: value})) == good(chat())
    error = bad(chat(**{name: {"no": "default"} if name != "metadata" else 5}))
    assert (error.code, error.param) == ("unsupported_parameter", name)


def test_best_of_is_the_number_of_choices() -> None:
    assert good(text(n=3, best_of=3)).options.n == 3
    assert bad(text(n=3, best_of=4)).param == "best_of"


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"messages": None}, "missing_required_parameter", "messages"),
        ({"messages": "x"}, "invalid_type", "messages"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": ["x"]}, "invalid_type", "messages[0]"),
        ({"messages": [{"content": "x"}]}, "missing_required_parameter", "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "invalid_value", "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "invalid_value", "messages[0].role"),
        ({"messages": [*ASK, {"role": "user"}]}, "missing_required_parameter", "messages[1].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "invalid_type", "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "invalid_value", "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "unsupported_parameter", "messages[0].name"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "unsupported_parameter",
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "invalid_type",
            "messages[0].content[0].text",
        ),
        ({"prompt": "x"}, "unsupported_parameter", "prompt"),
        ({"top_k": 5}, "unsupported_parameter", "top_k"),
        ({"stream": True}, "unsupported_parameter", "stream"),
        ({"presence_penalty": False}, "unsupported_parameter", "presence_penalty"),
        ({"store": 0}, "unsupported_parameter", "store"),
        ({"tools": [{}]}, "unsupported_parameter", "tools"),
        ({"model": 5}, "invalid_type", "model"),
        ({"model": "gpt-4"}, "model_not_found", "model"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"max_tokens": True}, "invalid_type", "max_tokens"),
        ({"max_tokens": 5.0}, "invalid_type", "max_tokens"),
        ({"max_completion_tokens": -1, "max_tokens": 5}, "invalid_value", "max_completion_tokens"),
        ({"max_completion_tokens": 5, "max_tokens": "5"}, "invalid_type", "max_tokens"),
        ({"temperature": 2.1}, "invalid_value", "temperature"),
        ({"temperature": -1}, "invalid_value", "temperature"),
        ({"temperature": "1"}, "invalid_type", "temperature"),
        ({"temperature": 10**4000}, "invalid_value", "temperature"),
        ({"top_p": 0}, "invalid_value", "top_p"),
        ({"top_p": 1.01}, "invalid_value", "top_p"),
        ({"seed": 1 << 63}, "invalid_value", "seed"),
        ({"seed": 1.5}, "invalid_type", "seed"),
        ({"stop": ["x"] * 17}, "invalid_value", "stop"),
        ({"stop": ""}, "invalid_value", "stop"),
        ({"stop": [5]}, "invalid_type", "stop"),
        ({"n": 129}, "invalid_value", "n"),
        ({"n": 0}, "invalid_value", "n"),
        ({"logprobs": 1}, "invalid_type", "logprobs"),
        ({"top_logprobs": 1}, "invalid_value", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
        ({"response_format": "json"}, "invalid_type", "response_format"),
        ({"response_format": {}}, "missing_required_parameter", "response_format.type"),
        ({"response_format": {"type": "xml"}}, "invalid_value", "response_format.type"),
        ({"response_format": {"type": ["text"]}}, "invalid_value", "response_format.type"),
        ({"response_format": {"type": "text", "x": 1}}, "unsupported_parameter", "response_format.x"),
        ({"response_format": {"type": "json_schema"}}, "missing_required_parameter", "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
            "invalid_type",
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": "yes"}}},
            "invalid_type",
            "response_format.json_schema.strict",
        ),
    ],
)  # fmt: skip
def test_a_wrong_field_of_a_chat(body: dict[str, Any], code: str, param: str) -> None:
    error = bad(chat(**body))
    assert (error.custom_id, error.code, error.param) == ("a", code, param)
    assert param.split(".")[-1].split("[")[0] in error.message
    assert len(error.message) < 300


@pytest.mark.parametrize(
    ("prompt", "code", "param", "says"),
    [
        (None, "missing_required_parameter", "prompt", "missing"),
        (5, "invalid_type", "prompt", "a number"),
        ([], "invalid_value", "prompt", "empty"),
        (["a", "b"], "invalid_type", "prompt", "its own line"),
        ([[1], [2]], "invalid_type", "prompt", "its own line"),
        ([1, True], "invalid_type", "prompt[1]", "true"),
        ([1, "a"], "invalid_type", "prompt[1]", '"a"'),
        ([1, 2.0], "invalid_type", "prompt[1]", "2.0"),
        ([-1], "invalid_value", "prompt[0]", "-1"),
        ([1 << 31], "invalid_value", "prompt[0]", "2147483648"),
    ],
)
def test_a_wrong_prompt(prompt: Any, code: str, param: str, says: str) -> None:
    error = bad(text(prompt=prompt))
    assert (error.code, error.param) == (code, param)
    assert says in error.message


def test_token_ids() -> None:
    assert good(text(prompt=[0, 5, (1 << 31) - 1])).prompt == (0, 5, (1 << 31) - 1)


def line(**changes: Any) -> dict[str, Any]:
    return {name: value for name, value in {**chat(), **changes}.items() if value != "absent"}


@pytest.mark.parametrize(
    ("value", "code", "param"),
    [
        ([], "invalid_type", None),
        ("x", "invalid_type", None),
        (None, "invalid_type", None),
        ({}, "missing_required_parameter", "custom_id"),
        (line(custom_id=5), "invalid_type", "custom_id"),
        (line(custom_id=""), "invalid_value", "custom_id"),
        (line(custom_id="x" * 513), "invalid_value", "custom_id"),
        (line(method="GET"), "invalid_value", "method"),
        (line(method="absent"), "missing_required_parameter", "method"),
        (line(url="/v1/embeddings"), "invalid_value", "url"),
        (line(url=["/v1/completions"]), "invalid_value", "url"),
        (line(url="absent"), "missing_required_parameter", "url"),
        (line(body="absent"), "missing_required_parameter", "body"),
        (line(body=[]), "invalid_type", "body"),
        (line(prompt="x"), "unsupported_parameter", "prompt"),
        ({"custom_id": "a"}, "missing_required_parameter", "prompt"),
        ({"custom_id": "a", "prompt": "x", "messages": ASK}, "invalid_value", "messages"),
        ({"custom_id": "a", "prompt": "x", "temprature": 1}, "unsupported_parameter", "temprature"),
    ],
)
def test_a_wrong_line(value: Any, code: str, param: str | None) -> None:
    error = bad(value)
    assert (error.code, error.param) == (code, param)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b'{"custom_id": "a", "prompt": "\xff"}', "UTF-8"),
        (b'{"custom_id": "a", "prompt": "x"', "character"),
        (b'{"custom_id": "a", "prompt": "x"} {}', "character"),
        (b'{"custom_id": "a", "prompt": "x", "prompt": "y"}', "twice"),
        (b'{"custom_id": "a", "prompt": "x", "temperature": NaN}', "NaN"),
        (b'{"custom_id": "a", "prompt": "x", "temperature": -Infinity}', "-Infinity"),
        (b'{"custom_id": "a", "prompt": "\\ud800"}', "surrogate"),
        (b'{"custom_id": "a", "prompt": "x", "seed": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"custom_id": "a", "prompt": ' + b"[" * 99_999, "deep"),
        (b'{"custom_id": "a", "prompt": ' + b"[" * 65 + b"]" * 65 + b"}", "deep"),
        (b'{"custom_id": "a", "x": ' + b'{"a":' * 99_000, "deep"),
        (b'{"custom_id": "a", "prompt": [' + b"[]," * 100_001 + b"1]}", "100000"),
    ],
)
def test_what_is_not_json(data: bytes, says: str) -> None:
    error = bad(data)
    assert error.code == "invalid_json"
    assert says in error.message
    # a line with a broken character early on is better not quoted
    assert error.custom_id in ("a", None)


def test_numbers_beyond_floats() -> None:
    assert bad(b'{"custom_id": "a", "prompt": "x", "temperature": 1e999}').code == "invalid_value"


def test_the_depth_that_is_taken_does_not_depend_on_the_stack() -> None:
    schema = json.loads('{"a":' * 58 + "1" + "}" * 58)
    value = chat(response_format={"type": "json_schema", "json_schema": {"schema": schema}})
    assert good(value)

    def deeper(levels: int) -> Request | LineError:
        return read(value) if not levels else deeper(levels - 1)

    assert deeper(sys.getrecursionlimit() // 2) == good(value)


def test_a_text_full_of_brackets_is_one() -> None:
    assert good(text(prompt="[{" * 200_000)).prompt == "[{" * 200_000


def test_hostile_quotes_take_no_time() -> None:
    begin = time.perf_counter()
    assert bad(b"[" * 100_001 + b'\\"' * 4_000_000).code == "invalid_json"
    assert time.perf_counter() - begin < 10


def test_the_custom_id_of_a_line_that_cannot_be_read() -> None:
    assert bad(b'{"custom_id": "a-1", "prompt": ').custom_id == "a-1"
    assert bad(b'{"method": "POST", "url": "/v1", "custom_id": "a\\n1", "body": {').custom_id == "a\n1"
    # an id that is not the line's own is not taken for it
    assert bad(b'{"body": {"custom_id": "other"').custom_id is None
    assert glimpse(b'{"custom_id": "\\ud800"') is None
    assert glimpse(b'{"custom_id": "' + b"x" * 513 + b'"') is None


def test_a_line_that_is_too_long() -> None:
    error = too_long(b'{"custom_id": "a", "prompt": "xxxx', 1 << 30, 1 << 24)
    assert (error.custom_id, error.code) == ("a", "line_too_long")
    assert str(1 << 30) in error.message and str(1 << 24) in error.message


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from(
    [*sorted(requests._CHAT | requests._TEXT), *sorted(requests._NO_EFFECT), "custom_id", "role", "content", "type",
     "text", "json_schema", "schema", "method", "url", "body"]
)  # fmt: skip
LIKELY = st.sampled_from(["user", "text", "json_schema", "json_object", "POST", "/v1/completions", "a", 0, 1, True])
NESTED = st.recursive(
    VALUES | LIKELY,
    lambda inner: st.dictionaries(NAMES, inner, max_size=4) | st.lists(inner, max_size=3),
    max_leaves=20,
)


def check(data: bytes) -> None:
    found = parse(data, MODELS)
    if isinstance(found, LineError):
        json.dumps([found.custom_id, found.message, found.param], ensure_ascii=False).encode()  # can be written
        assert len(found.message) < 600
    else:
        json.dumps([found.custom_id, found.prompt, found.options.response_format], ensure_ascii=False).encode()
        assert 1 <= found.options.n <= 128
        assert 0 < len(found.custom_id) <= 512


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=80))
@example(b"\xef\xbb\xbf{}")
@example(b"")
def test_no_bytes_raise(data: bytes) -> None:
    check(data)


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(NAMES, NESTED, max_size=6), st.dictionaries(NAMES, NESTED, max_size=6))
def test_no_value_raises(outer: dict[str, Any], body: dict[str, Any]) -> None:
    check(json.dumps({"custom_id": "a", **outer}).encode())
    check(json.dumps(chat(**body)).encode())
    check(json.dumps(text(**body)).encode())


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 200), st.binary(min_size=1, max_size=3))
def test_no_damage_raises(at: int, damage: bytes) -> None:
    data = json.dumps(chat(temperature=1.5, stop=["a"], response_format={"type": "json_object"})).encode()
    check(data[:at] + damage + data[at + len(damage) :])
    check(data[:at])

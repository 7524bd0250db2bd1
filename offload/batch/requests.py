"""What one input line asks for: checked to the last field, or told why it cannot be run.

The lines are those of OpenAI's Batch API (platform.openai.com/docs/api-reference/batch/request-input), or bare: the
fields of the body beside `custom_id`. Nothing is ignored silently: a field that is not honoured is an error unless its
value changes nothing (`_NO_EFFECT`). Nothing a line holds raises. Not covered: whether token ids are in the model's
vocabulary, and whether a prompt fits the context; both are for who knows the model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

MAX_CUSTOM_ID = 512
MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP = 4096  # characters
MAX_LOGPROBS = 20
MAX_DEPTH = 64  # of nesting: what comes after may recurse
MAX_VALUES = 100_000  # objects and lists in a line: each takes some twenty times its brackets in memory

_ENDPOINTS = {"/v1/chat/completions": True, "/v1/completions": False}
_ENVELOPE = {"custom_id", "method", "url", "body"}
_COMMON = {"model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "n", "logprobs",
           "response_format"}  # fmt: skip
_CHAT = _COMMON | {"messages", "top_logprobs"}
_TEXT = _COMMON | {"prompt"}
# Values of fields that are not honoured which change nothing, a type meaning any value of it; null is always one.
_NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "metadata": (dict,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "prompt_cache_key": (str,),
    "reasoning_effort": (),
    "safety_identifier": (str,),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "stream": (False,),
    "stream_options": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "user": (str,),
    "verbosity": (),
    "web_search_options": (),
}
# The same of a message: answers are sent back as they came.
_MESSAGE_NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "refusal": (),
    "tool_calls": ([],),
}
# `developer` is what OpenAI's newer models call the system's message; the chat templates know it as `system`.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_STRING = r'"(?:[^"\\]|\\.)*"'
_GLIMPSE = re.compile(rf'\ufeff?\s*{{\s*(?:"(?:method|url)"\s*:\s*{_STRING}\s*,\s*)*"custom_id"\s*:\s*({_STRING})')


@dataclass(frozen=True, slots=True)
class Options:
    """What the body asked for. None: the endpoint's default.

    `max_tokens` is max_completion_tokens where that is given. `logprobs`: of the chosen token and of that many likely
    ones. `response_format`: {"type": "json_object"}, or {"type": "json_schema", "json_schema": {"schema": ..., ...}}.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    logprobs: int | None = None
    response_format: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """A request. `prompt`: text, token ids, or messages ({role, content}, all strings) if it is a `chat`."""

    custom_id: str
    chat: bool
    prompt: str | tuple[int, ...] | tuple[dict[str, Any], ...]
    options: Options


@dataclass(frozen=True, slots=True)
class LineError:
    """Why an input line cannot be run. `code` and `status` are as in OpenAI's API; `param` is the field's name."""

    custom_id: str | None
    code: str
    message: str
    param: str | None = None
    status: int = 400


def parse(line: bytes, models: Collection[str]) -> Request | LineError:
    """The request on a line, or what is wrong with it. `models`: the names that `body.model` may have."""
    custom_id: str | None = None
    try:
        value = _decoded(line)
        if not isinstance(value, dict):
            _wrong("invalid_type", f"the line is {_kind(value)}, not an object")
        custom_id = _custom_id(value)
        chat, body = _body(value)
        return _request(custom_id, chat, body, models)
    except _Wrong as e:
        if custom_id is None:
            custom_id = glimpse(line[:1024])
        return LineError(custom_id, e.code, e.message, e.param, e.status)


def too_long(head: bytes, length: int, limit: int) -> LineError:
    """The error for a line of `length` bytes that begins with `head`."""
    return LineError(glimpse(head), "line_too_long", f"the line has {length} bytes; at most {limit} are taken")


def glimpse(head: bytes) -> str | None:
    """The custom_id of a line that cannot be read as a whole, if it is at its beginning."""
    found = _GLIMPSE.match(head.decode("utf-8", "replace"))
    if found is None or "\ufffd" in found[1]:
        return None
    try:
        custom_id = json.loads(found[1])
        custom_id.encode()
    except ValueError:
        return None
    return custom_id if 0 < len(custom_id) <= MAX_CUSTOM_ID else None


class _Wrong(Exception):
    def __init__(self, code: str, message: str, param: str | None, status: int) -> None:
        super().__init__(message)
        self.code, self.message, self.param, self.status = code, message, param, status


def _wrong(code: str, message: str, param: str | None = None, status: int = 400) -> NoReturn:
    raise _Wrong(code, message, param, status)


# JSON


def _decoded(line: bytes) -> Any:
    brackets = line.count(b"[") + line.count(b"{")
    if brackets > MAX_VALUES and _values(line) > MAX_VALUES:
        _wrong("invalid_json", f"the line has more than {MAX_VALUES} objects and lists")
    try:
        value = json.loads(line.decode(), object_pairs_hook=_object, parse_constant=_constant)
    except UnicodeDecodeError as e:
        _wrong("invalid_json", f"the line is not UTF-8 (byte {e.start + 1})")
    except json.JSONDecodeError as e:
        _wrong("invalid_json", f"the line is not JSON: {e.msg} at character {e.pos + 1}")
    except RecursionError:
        _wrong("invalid_json", f"the line is nested more than {MAX_DEPTH} deep")
    except ValueError:
        _wrong("invalid_json", "the line has a number with thousands of digits")
    # both are rare, and looked for only where they can be
    if brackets > MAX_DEPTH or b"\\u" in line:
        for text, depth in _walk(value):
            if depth > MAX_DEPTH:
                _wrong("invalid_json", f"the line is nested more than {MAX_DEPTH} deep")
            try:
                text.encode()
            except UnicodeEncodeError:
                _wrong("invalid_json", "a string of the line has half of a surrogate pair, which is no character")
    return value


def _values(line: bytes) -> int:
    """Brackets that are not in strings; those of a text do not count."""
    # possessive, and content without a closing quote: else a line of quotes takes time with its square
    tokens = re.finditer(rb'"(?:[^"\\]++|\\.)*+"?|[\[{]', line, re.DOTALL)
    return sum(1 for found in tokens if found[0] in (b"[", b"{"))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        known: set[str] = set()
        for name, _ in pairs:
            if name in known:
                _wrong("invalid_json", f"an object has the key {_shown(name)} twice")
            known.add(name)
    return made


def _constant(name: str) -> NoReturn:
    _wrong("invalid_json", f"the line has {name}, which is no number in JSON")


def _walk(value: Any) -> Iterator[tuple[str, int]]:
    """All strings (and an empty one for each other value) and how deep they are."""
    todo = [(value, 0)]
    while todo:
        found, depth = todo.pop()
        if isinstance(found, dict):
            todo += [(part, depth + 1) for pair in found.items() for part in pair]
        elif isinstance(found, list):
            todo += [(part, depth + 1) for part in found]
        yield (found if isinstance(found, str) else ""), depth


def _others(given: dict[str, Any], known: set[str]) -> list[str]:
    """The fields that are not known, in the order given."""
    return [name for name in given if name not in known]


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names = {int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names[type(value)]


def _shown(value: Any) -> str:
    """The value, for a message of bounded length."""
    if isinstance(value, str):
        text = json.dumps(value[:60].encode(errors="replace").decode(), ensure_ascii=False)
        return text if len(value) <= 60 else f'{text[:-1]}…"'
    text = _kind(value) if isinstance(value, list | dict) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


# the line


def _custom_id(line: dict[str, Any]) -> str:
    custom_id = line.get("custom_id")
    if custom_id is None:
        _wrong("missing_required_parameter", "custom_id is missing", "custom_id")
    if not isinstance(custom_id, str):
        _wrong("invalid_type", f"custom_id is {_kind(custom_id)}, not a string", "custom_id")
    if not custom_id:
        _wrong("invalid_value", "custom_id is empty", "custom_id")
    if len(custom_id) > MAX_CUSTOM_ID:
        _wrong("invalid_value", f"custom_id has {len(custom_id)} characters; at most {MAX_CUSTOM_ID}", "custom_id")
    return custom_id


def _body(line: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
    """Whether it is a chat, and its body."""
    if not line.keys() & {"method", "url", "body"}:
        bare = {name: value for name, value in line.items() if name != "custom_id"}
        if "prompt" not in bare and "messages" not in bare:
            _wrong(
                "missing_required_parameter",
                "the line has neither method, url and body nor a prompt",
                "prompt",
            )
        if "prompt" in bare and "messages" in bare:
            _wrong("invalid_value", "the line has both a prompt and messages", "messages")
        return "messages" in bare, bare
    for name in ("method", "url", "body"):
        if line.get(name) is None:
            _wrong("missing_required_parameter", f"{name} is missing", name)
    for name in _others(line, _ENVELOPE):
        _wrong("unsupported_parameter", f"{_shown(name)} is no field of a line; did you mean one of body?", name[:64])
    if line["method"] != "POST":
        _wrong("invalid_value", f'method is {_shown(line["method"])}; only "POST" is supported', "method")
    url = line["url"]
    if not isinstance(url, str) or url not in _ENDPOINTS:
        _wrong("invalid_value", f"url is {_shown(url)}; supported are {' and '.join(_ENDPOINTS)}", "url")
    if not isinstance(line["body"], dict):
        _wrong("invalid_type", f"body is {_kind(line['body'])}, not an object", "body")
    return _ENDPOINTS[url], line["body"]


def _request(custom_id: str, chat: bool, body: dict[str, Any], models: Collection[str]) -> Request:
    fields = _CHAT if chat else _TEXT
    for name, value in body.items():
        if name in fields or (name == "best_of" and not chat and value == body.get("n") and _whole(value)):
            continue
        if name not in _NO_EFFECT:
            _wrong("unsupported_parameter", f"{_shown(name)} is not supported", name[:64])
        if not _changes_nothing(value, _NO_EFFECT[name]):
            _wrong("unsupported_parameter", f"{name} is not supported (it is {_shown(value)}); leave it out", name)
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        _wrong("invalid_type", f"model is {_kind(model)}, not a string", "model")
    if model is not None and model not in models:
        known = ", ".join(sorted(models)[:4])
        _wrong("model_not_found", f"model is {_shown(model)}; loaded is {known}, or leave it out", "model", 404)
    prompt = _messages(body.get("messages")) if chat else _prompt(body.get("prompt"))
    return Request(custom_id, chat, prompt, _options(chat, body))


def _changes_nothing(value: Any, harmless: tuple[Any, ...]) -> bool:
    for one in harmless:
        if isinstance(one, type):
            if type(value) is one:
                return True
        elif value == one and isinstance(value, bool) == isinstance(one, bool):  # False is no 0
            return True
    return value is None


# the prompt


def _prompt(prompt: Any) -> str | tuple[int, ...]:
    if prompt is None:
        _wrong("missing_required_parameter", "prompt is missing", "prompt")
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list):
        _wrong("invalid_type", f"prompt is {_kind(prompt)}, not a string or a list of token ids", "prompt")
    if not prompt:
        _wrong("invalid_value", "prompt is an empty list", "prompt")
    if isinstance(prompt[0], str | list):
        _wrong("invalid_type", "prompt is a list of prompts; give each its own line", "prompt")
    for at, token in enumerate(prompt):
        if not _whole(token):
            _wrong("invalid_type", f"prompt[{at}] is {_shown(token)}, not a token id", f"prompt[{at}]")
        if not 0 <= token < 1 << 31:
            _wrong("invalid_value", f"prompt[{at}] is {_shown(token)}, which is no token id", f"prompt[{at}]")
    return tuple(prompt)


def _messages(messages: Any) -> tuple[dict[str, Any], ...]:
    if messages is None:
        _wrong("missing_required_parameter", "messages is missing", "messages")
    if not isinstance(messages, list):
        _wrong("invalid_type", f"messages is {_kind(messages)}, not a list", "messages")
    if not messages:
        _wrong("invalid_value", "messages is empty", "messages")
    return tuple(_message(message, f"messages[{at}]") for at, message in enumerate(messages))


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        _wrong("invalid_type", f"{where} is {_kind(message)}, not an object", where)
    role = message.get("role")
    if role is None:
        _wrong("missing_required_parameter", f"{where}.role is missing", f"{where}.role")
    if not isinstance(role, str) or role not in _ROLES:
        _wrong("invalid_value", f"{where}.role is {_shown(role)}; supported are {', '.join(_ROLES)}", f"{where}.role")
    for name, value in message.items():
        if name not in ("role", "content") and not (
            name in _MESSAGE_NO_EFFECT and _changes_nothing(value, _MESSAGE_NO_EFFECT[name])
        ):
            _wrong("unsupported_parameter", f"{_shown(name)} of {where} is not supported", f"{where}.{name[:64]}")
    return {"role": _ROLES[role], "content": _content(message.get("content"), f"{where}.content")}


def _content(content: Any, where: str) -> str:
    if content is None:
        _wrong("missing_required_parameter", f"{where} is missing", where)
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        _wrong("invalid_type", f"{where} is {_kind(content)}, not a string or a list of parts", where)
    if not content:
        _wrong("invalid_value", f"{where} is an empty list", where)
    texts: list[str] = []
    for at, part in enumerate(content):
        here = f"{where}[{at}]"
        if not isinstance(part, dict):
            _wrong("invalid_type", f"{here} is {_kind(part)}, not an object", here)
        if part.get("type") != "text":
            _wrong("unsupported_parameter", f"{here}.type is {_shown(part.get('type'))}; only text is supported",
                   f"{here}.type")  # fmt: skip
        for name in _others(part, {"type", "text"}):
            _wrong("unsupported_parameter", f"{_shown(name)} of {here} is not supported", f"{here}.{name[:64]}")
        if not isinstance(part.get("text"), str):
            _wrong("invalid_type", f"{here}.text is {_kind(part.get('text'))}, not a string", f"{here}.text")
        texts.append(part["text"])
    return "".join(texts)


# the options


def _options(chat: bool, body: dict[str, Any]) -> Options:
    most = _integer(body, "max_tokens", 1, (1 << 31) - 1)
    completion = _integer(body, "max_completion_tokens", 1, (1 << 31) - 1)
    top_p = _number(body, "top_p", 0, 1)
    if top_p == 0:
        _wrong("invalid_value", "top_p is 0; it must be above", "top_p")
    return Options(
        max_tokens=completion if completion is not None else most,
        temperature=_number(body, "temperature", 0, 2),
        top_p=top_p,
        seed=_integer(body, "seed", -(1 << 63), (1 << 63) - 1),
        stop=_stop(body.get("stop")),
        n=_integer(body, "n", 1, MAX_CHOICES) or 1,
        logprobs=_logprobs(body) if chat else _integer(body, "logprobs", 0, MAX_LOGPROBS),
        response_format=_response_format(body.get("response_format")),
    )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integer(body: dict[str, Any], name: str, low: int, high: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if not _whole(value):
        _wrong("invalid_type", f"{name} is {_shown(value)}, not a whole number", name)
    if not low <= value <= high:
        _wrong("invalid_value", f"{name} is {_shown(value)}; it must be from {low} to {high}", name)
    return int(value)


def _number(body: dict[str, Any], name: str, low: int, high: int) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if not _whole(value) and not isinstance(value, float):
        _wrong("invalid_type", f"{name} is {_shown(value)}, not a number", name)
    if not low <= value <= high:
        _wrong("invalid_value", f"{name} is {_shown(value)}; it must be from {low} to {high}", name)
    return float(value)


def _stop(stop: Any) -> tuple[str, ...]:
    if stop is None:
        return ()
    several = stop if isinstance(stop, list) else [stop]
    if len(several) > MAX_STOPS:
        _wrong("invalid_value", f"stop has {len(several)} strings; at most {MAX_STOPS}", "stop")
    for one in several:
        if not isinstance(one, str):
            _wrong("invalid_type", f"stop is {_shown(one)}, not a string or a list of strings", "stop")
        if not 0 < len(one) <= MAX_STOP:
            _wrong("invalid_value", f"a string of stop has {len(one)} characters; from 1 to {MAX_STOP}", "stop")
    return tuple(several)


def _logprobs(body: dict[str, Any]) -> int | None:
    wanted = body.get("logprobs")
    if wanted is not None and not isinstance(wanted, bool):
        _wrong("invalid_type", f"logprobs is {_shown(wanted)}, not true or false", "logprobs")
    top = _integer(body, "top_logprobs", 0, MAX_LOGPROBS)
    if top is not None and not wanted:
        _wrong("invalid_value", "top_logprobs is given, but logprobs is not true", "top_logprobs")
    return (top or 0) if wanted else None


def _response_format(wanted: Any) -> dict[str, Any] | None:
    if wanted is None:
        return None
    name = "response_format"
    if not isinstance(wanted, dict):
        _wrong("invalid_type", f"{name} is {_kind(wanted)}, not an object", name)
    kind = wanted.get("type")
    if kind is None:
        _wrong("missing_required_parameter", f"{name}.type is missing", f"{name}.type")
    if kind not in ("text", "json_object", "json_schema"):
        _wrong("invalid_value", f"{name}.type is {_shown(kind)}; supported are text, json_object and json_schema",
               f"{name}.type")  # fmt: skip
    for other in _others(wanted, {"type", "json_schema"} if kind == "json_schema" else {"type"}):
        _wrong("unsupported_parameter", f"{_shown(other)} of {name} is not supported", f"{name}.{other[:64]}")
    if kind != "json_schema":
        return None if kind == "text" else {"type": kind}
    inner, name = wanted.get("json_schema"), f"{name}.json_schema"
    if not isinstance(inner, dict):
        code = "missing_required_parameter" if inner is None else "invalid_type"
        _wrong(code, f"{name} is {'missing' if inner is None else _kind(inner) + ', not an object'}", name)
    if not isinstance(inner.get("schema"), dict):
        code = "missing_required_parameter" if inner.get("schema") is None else "invalid_type"
        _wrong(code, f"{name}.schema is not an object", f"{name}.schema")
    for other, accepted in (("name", str), ("description", str), ("strict", bool)):
        if not isinstance(inner.get(other), accepted | None):
            _wrong("invalid_type", f"{name}.{other} is {_kind(inner[other])}", f"{name}.{other}")
    for other in _others(inner, {"name", "description", "strict", "schema"}):
        _wrong("unsupported_parameter", f"{_shown(other)} of {name} is not supported", f"{name}.{other[:64]}")
    return {"type": kind, "json_schema": inner}

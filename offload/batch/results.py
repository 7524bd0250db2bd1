"""The lines of results: made, and known again as made for this job and whole.

They are those of OpenAI's Batch API (platform.openai.com/docs/api-reference/batch/request-output). `id` says which job
and which input line, so a line of the output can be matched with its request whatever else it holds; `request_id` is
a checksum over the line, so one that was torn or changed is told from one that is as it was written.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, NamedTuple

from offload.batch.requests import LineError

_PLACE = '"request_id": "req_'
_SUM = 24  # hex digits
_BREAKS = {ord(c): f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"}  # where Python's splitlines() would end a line


@dataclass(frozen=True, slots=True)
class Answer:
    """The output line (with its newline) of input line `number`; `failed` if it is an error."""

    number: int
    custom_id: str | None
    failed: bool
    line: bytes


class Known(NamedTuple):
    """Which input line a line of results is for; `failed` if it is an error."""

    number: int
    custom_id: str | None
    failed: bool


def answered(job: str, number: int, custom_id: str, body: dict[str, Any], status: int = 200) -> Answer:
    """The line of a request that was answered. Raises ValueError for a body that JSON cannot say (NaN)."""
    begin = f'{_begin(job, number)}, "custom_id": {_json(custom_id)}, "response": {{"status_code": {status}, {_PLACE}'
    end = f'", "body": {_json(body)}}}, "error": null}}'
    parts = _bytes(begin), _bytes(end)
    line = b"".join((parts[0], _sum(*parts), parts[1], b"\n"))
    return Answer(number, custom_id, False, line)


def refused(job: str, number: int, error: LineError) -> Answer:
    """The line of a request that was not."""
    what = {"code": error.code, "message": error.message, "param": error.param, "line": number}
    line = f'{_begin(job, number)}, "custom_id": {_json(error.custom_id)}, "response": null, "error": {_json(what)}}}\n'
    return Answer(number, error.custom_id, True, _bytes(line))


def known(job: str, line: bytes) -> Known | None:
    """What a line of results is for; None if it is not whole, was changed, or is not of this job."""
    if not line.startswith(front(job)):
        return None
    try:
        value = json.loads(line)
        number = int(value["id"].rpartition("_")[2])
        custom_id, response, error = value["custom_id"], value["response"], value["error"]
        if value["id"] != _id(job, number) or not isinstance(custom_id, str | None):
            return None
        if response is None:
            return Known(number, custom_id, True) if isinstance(error["code"], str) else None
        at = line.index(_PLACE.encode()) + len(_PLACE)
        if error is not None or line[at : at + _SUM] != _sum(line[:at], line[at + _SUM :].rstrip(b"\r\n")):
            return None
        return Known(number, custom_id, False)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def front(job: str) -> bytes:
    """What every line of the job begins with."""
    return f'{{"id": "batch_req_{job}_'.encode()


def is_torn(job: str, data: bytes) -> bool:
    """Whether data that is no line can be the rest of one of the job's: as far as it goes, or what a crash leaves."""
    ours = front(job)
    return all(byte in (0, ours[at]) for at, byte in enumerate(data[: len(ours)]))


def _id(job: str, number: int) -> str:
    return f"batch_req_{job}_{number}"


def _begin(job: str, number: int) -> str:
    return f'{{"id": "{_id(job, number)}"'


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).translate(_BREAKS)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")  # half a surrogate pair becomes the escape that JSON has for it


def _sum(begin: bytes, end: bytes) -> bytes:
    hashed = hashlib.blake2b(begin, digest_size=_SUM // 2)
    hashed.update(end)
    return hashed.hexdigest().encode()

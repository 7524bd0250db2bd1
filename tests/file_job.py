"""A batch job without a model: every line of the input gets an answer that depends on it. Run as a script, the same."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offload.batch.edge import AsyncOutput, ReadAhead
from offload.batch.journal import Journal
from offload.batch.lines import Source
from offload.batch.order import key_of
from offload.batch.output import Output, Recovered
from offload.batch.requests import LineError, Request, parse, too_long
from offload.batch.results import Answer, answered, refused

SETTINGS = {"model": "tiny", "dtype": "float32"}
FAILS = "cannot"  # a prompt that has its error only when it is run


def write_input(path: Path, count: int, *, bad_every: int = 0, fail_every: int = 0) -> None:
    """`count` requests over a few common prefixes; some lines are no requests, some fail when they are run."""
    with path.open("w") as file:
        for i in range(count):
            prompt = FAILS if fail_every and i % fail_every == 1 else [i % 3] * 64 + [i]
            body: Any = {"custom_id": f"r{i}", "prompt": prompt, "max_tokens": i % 7 + 1}
            file.write("no JSON\n" if bad_every and i % bad_every == 0 else json.dumps(body) + "\n")


def scan(journal: Journal, source: Source) -> None:
    """Take all lines."""
    with journal.scan() as found:
        for line in source.lines():
            request = parse(line.data, ()) if line.data is not None else too_long(line.head, line.length, source.limit)
            if isinstance(request, LineError):
                found.reject(line, request)
            else:
                tokens = request.prompt if isinstance(request.prompt, tuple) else ()
                most = request.options.max_tokens or 16
                found.add(line, request.custom_id, max(1, len(tokens)), most, key_of([int(t) for t in tokens]))  # type: ignore[call-overload]


def answer(job: str, number: int, line: bytes, by: str = "") -> Answer:
    """What the line gets; `by` says which run gave it."""
    request = parse(line, ())
    assert isinstance(request, Request)
    if request.prompt == FAILS:
        return refused(job, number, LineError(request.custom_id, "context_length_exceeded", "too long", "prompt"))
    return answered(job, number, request.custom_id, {"said": [*request.prompt], "é": "ü\u2028", "by": by})


def opened(folder: Path, *, errors: bool = False) -> tuple[Source, Output]:
    """The job of `folder`."""
    source = Source.open(folder / "in.jsonl")
    try:
        return source, Output.open(
            folder / "out.jsonl", source, SETTINGS, errors=folder / "errors.jsonl" if errors else None
        )
    except BaseException:
        source.close()
        raise


def run(folder: Path, *, errors: bool = False, group: int = 3, by: str = "", threads: bool = False) -> Recovered:
    """Run the job of `folder` to its end."""
    source, output = opened(folder, errors=errors)
    with source, output:
        journal = output.journal
        if not journal.scanned:
            scan(journal, source)
        recovered = output.recover()
        if threads:
            with ReadAhead(source, journal.pending()) as ahead, AsyncOutput(output) as writer:
                for row, line in ahead:
                    writer.put(answer(journal.job, row.number, line, by))
            return recovered
        rows = list(journal.pending())
        for at in range(0, len(rows), group):
            output.write(
                [
                    answer(journal.job, row.number, source.read(row.offset, row.length, row.digest), by)
                    for row in rows[at : at + group]
                ]
            )
        return recovered


def check(folder: Path, *, errors: bool = False) -> list[dict[str, Any]]:
    """All results, after making sure that every line of the input has exactly one, and the right one."""
    names = ["out.jsonl", "errors.jsonl"] if errors else ["out.jsonl"]
    results: list[dict[str, Any]] = []
    for name in names:
        data = (folder / name).read_bytes()
        assert not data or data.endswith(b"\n")
        found = [json.loads(line) for line in data.split(b"\n")[:-1]]
        if errors:
            assert all((result["error"] is not None) == (name == "errors.jsonl") for result in found)
        results += found
    numbers = [int(result["id"].rpartition("_")[2]) for result in results]
    lines = (folder / "in.jsonl").read_bytes().splitlines()
    assert sorted(numbers) == list(range(1, len(lines) + 1))
    for number, result in zip(numbers, results, strict=True):
        request = parse(lines[number - 1], ())
        assert result["custom_id"] == request.custom_id
        if isinstance(request, LineError):
            assert result["error"]["code"] == request.code and result["error"]["line"] == number
        elif request.prompt == FAILS:
            assert result["error"]["code"] == "context_length_exceeded"
        else:
            assert result["response"]["status_code"] == 200
            assert result["response"]["body"]["said"] == list(request.prompt)
    return results


def main(argv: Sequence[str]) -> None:
    """Run the job of the folder that is named, in threads."""
    run(Path(argv[0]), errors=True, by=argv[1], threads=True)


if __name__ == "__main__":
    main(sys.argv[1:])

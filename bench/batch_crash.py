"""Kills a batch job again and again, and looks at what it has answered each time.

A job of several hundred requests is run once without any trouble. Then the same command is run as often as it takes,
and each time something happens to it: it is killed (SIGKILL) after a random time; killed at a random system call that
writes, with half of that written; or its disk is full (no file may grow beyond a random size). After every third kill
something happens to what it left, as a power failure or a bad disk would have it: the end of the results is cut off,
becomes zeros, or is followed by half a line; the journal's log is removed or cut, or the journal is. The next run goes
on from there. Whatever is whole in the files must be as it was without trouble at any time; when the job is done, each
request must have been answered exactly once. Then the next job begins, until there were enough kills.

Does not cut the power: what fsync is worth is the file system's and the disk's business.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import ROOT, BenchError, flags, head, load_average, run_script, say, worker_env, write_json
from killing import die_at

CALLS = ("write", "fsync", "ftruncate", "rename", "unlink")
HOW = ("time", "call", "time", "full")  # in turn
WORDS = ("the", "of", "town", "river", "who", "lives", "in", "a", "house", "and", "why", "does", "rain", "on", "every",
         "market", "day", "near", "old", "mill")  # fmt: skip
OPTIONS: dict[str, Any] = {"dtype": "float32", "sequences": 16}


def requests(count: int, longest: int) -> list[str]:
    """Lines of a job: chats and completions, some that begin alike, some with several choices; one in 20 is wrong."""
    rng = random.Random(0)
    fronts = [" ".join(rng.choices(WORDS, k=60)) for _ in range(3)]
    lines = []
    for i in range(count):
        words = " ".join(rng.choices(WORDS, k=rng.randint(3, 25)))
        text = f"{rng.choice(fronts)} {words}" if i % 3 else words
        body: dict[str, Any] = {"max_tokens": rng.randint(4, longest)}
        if i % 2:
            body["messages"] = [{"role": "user", "content": text}]
        else:
            body["prompt"] = text
        if i % 5 == 0:
            body |= {"temperature": 0.8, "seed": i, "n": 1 + i % 3}
        if i % 20 == 7:
            body["tools"] = [{"type": "function"}]
        url = "/v1/chat/completions" if i % 2 else "/v1/completions"
        lines.append(json.dumps({"custom_id": f"r{i}", "method": "POST", "url": url, "body": body}))
    return lines


# the job, in a process that is killed


def nursery() -> None:
    """Import once, then fork a runner for every line on stdin (JSON) and tell how it ends."""
    import torch

    import offload
    from offload import OffloadError
    from offload.batch import job

    torch.set_num_threads(1)
    job.CHECKPOINT_S, job._UNSEEN = 0.1, 2
    write = os.write

    def report(what: str, value: Any) -> None:
        write(1, f"{json.dumps([what, value])}\n".encode())

    report("ready", None)
    for line in sys.stdin:
        task = json.loads(line)
        child = os.fork()
        if child == 0:
            told = os.dup(1)
            os.dup2(2, 1)  # nobody else speaks there
            try:
                if task["largest"] is not None:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (task["largest"], resource.RLIM_INFINITY))
                if task["call"]:
                    die_at(task["call"], CALLS)
                stats = offload.run_batch(task["model"], *task["files"], errors=task["errors"], **OPTIONS)
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                found = ["done", [stats.load_s, stats.seconds]]
            except OffloadError as e:
                found = ["refused", [type(e).__name__, str(e)]]
            except BaseException as e:
                found = ["failed", f"{type(e).__name__}: {e}"]
            write(told, f"{json.dumps(found)}\n".encode())
            os._exit(0)
        ended = False
        deadline = time.monotonic() + (task["kill_after"] or 0)
        while task["kill_after"] is not None and not ended and time.monotonic() < deadline:
            time.sleep(min(0.005, max(0.0, deadline - time.monotonic())))
            ended = os.waitpid(child, os.WNOHANG) != (0, 0)
        if not ended:
            if task["kill_after"] is not None:
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        report("ended", None)


@dataclass
class Nursery:
    """The process that forks runners, as seen from here."""

    process: subprocess.Popen[bytes]

    def read(self) -> tuple[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise BenchError("the nursery is gone")
        what, value = json.loads(line)
        return what, value

    def run(
        self, job: Job, *, call: int = 0, largest: int | None = None, kill_after: float | None = None
    ) -> tuple[str, Any]:
        """One run: what it said at its end, or that it was killed."""
        assert self.process.stdin is not None
        task = {"model": job.model, "files": [str(job.given), str(job.out)], "errors": str(job.errors),
                "call": call, "largest": largest, "kill_after": kill_after}  # fmt: skip
        self.process.stdin.write(json.dumps(task).encode() + b"\n")
        self.process.stdin.flush()
        found: tuple[str, Any] = ("killed", None)
        while (said := self.read())[0] != "ended":
            found = said
        return found


# what it leaves


@dataclass
class Job:
    """One command: `model` answers what is `given`."""

    model: str
    given: Path
    out: Path
    errors: Path
    wanted: dict[str, str] = field(default_factory=dict)

    @property
    def journal(self) -> Path:
        return self.out.with_name(self.out.name + ".journal")

    def answers(self) -> dict[str, str]:
        """What there is, by custom_id. Raises `BenchError` for one that is there twice, or not as it should be."""
        found: dict[str, str] = {}
        for file in (self.out, self.errors):
            if not file.exists():
                continue
            *whole, _ = file.read_bytes().split(b"\n")  # what is behind the last newline is half a line, or nothing
            for at, line in enumerate(whole):
                try:
                    name, said = self.said(line)
                except (ValueError, KeyError, TypeError):
                    # zeros may come before a newline only where somebody has put them, at the end
                    if line.strip(b"\0") == b"" or at == len(whole) - 1:
                        continue
                    raise BenchError(f"{file.name}, line {at + 1} is no result: {line[:80]!r}") from None
                if name in found:
                    raise BenchError(f"{name} is answered twice")
                if self.wanted and self.wanted.get(name) != said:
                    raise BenchError(f"{name} is answered otherwise: {said[:300]} is not {self.wanted.get(name)}")
                found[name] = said
        return found

    @staticmethod
    def said(line: bytes) -> tuple[str, str]:
        """custom_id, and what of a result must be the same however often the job was stopped."""
        value = json.loads(line)
        if value["error"] is None:
            body = value["response"]["body"]
            del body["created"], body["usage"]["prompt_tokens_details"]  # when, and beside whom
            del value["response"]["request_id"]  # a checksum over these as well
        return value["custom_id"], json.dumps(value)

    def complete(self) -> None:
        """Raises `BenchError` unless each request has its answer."""
        found = self.answers()
        lost = sorted(self.wanted.keys() - found.keys())
        if lost:
            raise BenchError(f"{len(lost)} requests have no answer: {lost[:5]}")
        for file in (self.out, self.errors):
            if file.read_bytes()[-1:] not in (b"", b"\n"):
                raise BenchError(f"{file.name} ends with half a line")


def harm(job: Job, rng: random.Random) -> str:
    """What a power failure or a bad disk may do to what is there; returns what was done."""
    file = rng.choice([job.out, job.out, job.errors])
    size = file.stat().st_size if file.exists() else 0
    log = job.journal.with_name(job.journal.name + "-wal")
    what = rng.choice(["cut", "zeros", "half a line", "log removed", "log cut", "journal removed"])
    if what == "cut" and size:
        os.truncate(file, rng.randrange(max(0, size - 600), size))
    elif what == "zeros" and size:
        with file.open("rb+") as f:
            # within the last line: more than one that is not there is a different file
            f.seek(-rng.randint(1, max(1, min(200, size - file.read_bytes().rstrip(b"\n").rfind(b"\n") - 80))), 2)
            at = f.tell()
            f.write(bytes(size - at))
    elif what == "half a line" and size:
        line = file.read_bytes().split(b"\n", 1)[0]
        with file.open("ab") as f:
            f.write(line[: rng.randrange(1, len(line))])
    elif what == "log removed" and log.exists():
        log.unlink()
    elif what == "log cut" and log.exists() and log.stat().st_size:
        os.truncate(log, rng.randrange(log.stat().st_size))
    elif what == "journal removed":
        remove_journal(job)
    else:
        return "nothing"
    return what


def remove_journal(job: Job) -> None:
    for suffix in ("", "-wal", "-shm"):
        job.journal.with_name(job.journal.name + suffix).unlink(missing_ok=True)


# the campaign


def campaign(folder: Path, kills: int, seed: int, model: str, count: int, longest: int = 40) -> dict[str, Any]:
    """Kill `kills` times; the figures. Raises `BenchError` at the first thing that is wrong."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    given = folder / "in.jsonl"
    given.write_text("\n".join(requests(count, longest)) + "\n")
    figures: dict[str, Any] = {"requests": count, "kills": 0, "jobs": 0, "runs": 0, "by": dict.fromkeys(HOW, 0),
                               "harm": {}, "journals_damaged": 0, "answers_verified": 0}  # fmt: skip
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), "--worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=worker_env(), cwd=ROOT,
    ) as process:  # fmt: skip
        try:
            found = Nursery(process)
            if found.read()[0] != "ready":
                raise BenchError("the nursery does not start")
            wanted: dict[str, str] = {}
            for name in ("first", "second"):  # the first may have to measure the machine
                untroubled = Job(model, given, folder / f"{name}.jsonl", folder / f"{name}-errors.jsonl", wanted)
                what, value = found.run(untroubled)
                if what != "done":
                    raise BenchError(f"without any trouble: {what} {value}")
                wanted = untroubled.answers()
                if len(wanted) != count:
                    raise BenchError(f"without any trouble {len(wanted)} of {count} are answered")
            load_s, seconds = value
            figures["untroubled_s"] = round(load_s + seconds, 2)
            while figures["kills"] < kills:
                _kill_one(found, Job(model, given, folder / "out.jsonl", folder / "errors.jsonl", wanted), kills,
                          load_s + 0.3 + seconds / 8, rng, figures)  # fmt: skip
        finally:
            assert process.stdin is not None
            process.stdin.close()
    return figures


def _kill_one(
    nursery: Nursery, job: Job, kills: int, longest_s: float, rng: random.Random, figures: dict[str, Any]
) -> None:
    """One job, killed until it is done, or until that was enough."""
    for file in (job.out, job.errors):
        file.unlink(missing_ok=True)
    remove_journal(job)
    harmed = ""
    while True:
        enough = figures["kills"] >= kills
        how = HOW[figures["kills"] % len(HOW)] if not enough else ""
        options: dict[str, Any] = {}
        if how == "time":
            options["kill_after"] = rng.uniform(0, longest_s)
        elif how == "call":
            options["call"] = rng.randint(1, 40)
        elif how == "full":
            sizes = [f.stat().st_size for f in job.out.parent.glob(f"{job.out.name}*")]
            options["largest"] = rng.choice([*sizes, 0]) + rng.randint(0, 30_000)
        figures["runs"] += 1
        what, value = nursery.run(job, **options)
        if what == "refused" and "journal is damaged" in value[1] and harmed.startswith("log"):
            figures["journals_damaged"] += 1
            remove_journal(job)
            harmed = ""
            continue
        if what == "failed" or (what == "refused" and (how != "full" or value[0] not in ("StoreFull", "StoreError"))):
            raise BenchError(f"after {figures['kills']} kills, {how or 'left alone'}, {harmed or 'nothing harmed'}: "
                             f"{value}")  # fmt: skip
        figures["answers_verified"] += len(job.answers())
        if what == "done":
            job.complete()
            figures["jobs"] += 1
            return
        assert not enough
        figures["kills"] += 1
        figures["by"][how] += 1
        harmed = harm(job, rng) if figures["kills"] % 3 == 0 else ""
        if harmed:
            figures["harm"][harmed] = figures["harm"].get(harmed, 0) + 1


def main() -> int:
    if sys.argv[1:] == ["--worker"]:
        nursery()
        return 0
    parser = flags(__doc__, "batch-crash")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="demo-moe")
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--folder", type=Path, help="where to keep the files (default: a temporary folder)")
    args = parser.parse_args()
    load = load_average()
    with tempfile.TemporaryDirectory(prefix="offload-crash-", dir=args.folder) as folder:
        result = campaign(Path(folder), args.kills, args.seed, args.model, args.requests)
    write_json(args.out, {**head("batch-crash", load), "seed": args.seed, "model": args.model, **result, "lost": 0,
                          "duplicated": 0, "altered": 0})  # fmt: skip
    say(f"{result['kills']} kills, {result['jobs']} jobs done, nothing lost, doubled or altered; {args.out}")
    return 0


if __name__ == "__main__":
    run_script(main)

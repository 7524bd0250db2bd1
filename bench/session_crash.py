"""Kills a process that keeps conversations, again and again, and looks at what is left on disk each time.

A writer holds several conversations that begin alike, stores their keys and values, saves, prunes and removes. It is
killed (SIGKILL) after a random time, or, every other time, just before or in the middle of a random system call that
changes files. Then everything is opened as after a restart: each conversation that was reported as saved must be there
with at least what was said by then, every one must be a front of what was to be said, and the keys and values that it
names must be there in full and right to the bit. Nothing may be damaged, and no temporary file may stay.

Does not cut the power: what fsync is worth is the file system's and the disk's business.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, BenchError, head, load_average, say, worker_env, write_json
from killing import die_at

FINGERPRINT, ARITHMETIC = "crash test", "float32"
LAYERS, HEADS, WIDTH = 3, 2, 16
COMMON, LONGEST, TURN = 300, 2500, 400  # tokens that all conversations begin with, that one has, and of one turn
CALLS = ("open", "write", "fsync", "rename", "unlink", "utime")


def words(name: str) -> list[int]:
    """All that conversation `name` will ever say."""
    return random.Random(0).choices(range(1000), k=COMMON) + random.Random(name).choices(range(1000), k=LONGEST)


def segment(tokens: list[int], begin: int, end: int) -> Any:
    """The KV that a model would have there: every value follows from token, position, layer, head and channel."""
    import torch

    from kvstore import Segment

    ids = torch.tensor(tokens[begin:end], dtype=torch.float32)
    base = (ids * 31 + torch.arange(begin, end))[None, :, None] + torch.arange(WIDTH) / WIDTH
    layers = tuple(
        (base + 7 * layer + torch.arange(HEADS)[:, None, None], -base.expand(HEADS, -1, -1)) for layer in range(LAYERS)
    )
    return Segment(tuple(tokens[begin:end]), layers, {"sum": torch.tensor([sum(tokens[:end])], dtype=torch.float32)})


def converse(folder: Path, seed: int, report: Callable[[str], None]) -> None:
    """Go on with the conversations for ever."""
    from kvstore import Session, Sessions
    from tiers import StoreFull

    def give_up(name: str) -> None:
        report(f"removing {name} 0")
        sessions.remove(name)

    rng = random.Random(seed)
    sessions = Sessions(folder)
    store = sessions.prefixes(FINGERPRINT, ARITHMETIC, limit=4 << 20 if rng.random() < 0.5 else None)
    while True:
        name = f"talk-{rng.randrange(4)}"
        session = sessions.load(name) or Session(name, "none", FINGERPRINT, ARITHMETIC)
        tokens = words(name)
        if len(session.tokens) == len(tokens):
            give_up(name)
            continue
        session.tokens = tokens[: len(session.tokens) + rng.randint(1, TURN)]
        said = session.tokens
        session.messages.append({"role": "user", "content": f"{len(said)} tokens"})
        try:
            session.head = store.extend(said, lambda begin, end, said=said: segment(said, begin, end))  # type: ignore[misc]
        except StoreFull:
            if session.created:
                give_up(name)
            continue
        sessions.save(session)
        report(f"said {name} {len(said)}")
        if rng.random() < 0.2:
            sessions.prune(rng.choice([0, 2 << 20]))


def nursery(folder: Path) -> None:
    """Import once, then fork a writer for every line on stdin (seed, call to die at or 0) and tell how it goes."""
    import torch

    import kvstore  # noqa: F401

    torch.set_num_threads(1)
    write = os.write
    write(1, b"ready\n")
    for line in sys.stdin:
        seed, call = map(int, line.split())
        child = os.fork()
        if child == 0:
            try:
                if call:
                    die_at(call, CALLS)
                converse(folder, seed, lambda text: (write(1, f"{text}\n".encode()), None)[1])
            except BaseException as e:
                write(1, f"failed {type(e).__name__} {e}\n".encode())
            os._exit(1)
        write(1, f"pid {child}\n".encode())
        os.waitpid(child, 0)
        write(1, b"ended\n")


def check(folder: Path, saved: dict[str, int]) -> dict[str, int]:
    """Open everything as after a restart; `saved`: tokens that each conversation must have. BenchError: it is wrong."""
    import torch

    from kvstore import Sessions

    sessions = Sessions(folder)
    store = sessions.prefixes(FINGERPRINT, ARITHMETIC)
    stale = [p.name for p in folder.iterdir() if p.name.endswith(".tmp")]
    if stale:
        raise BenchError(f"temporary files stay: {stale}")
    there = {s.name: s for s in sessions.list()}
    missing = saved.keys() - there.keys()
    if missing:
        raise BenchError(f"saved, and not there: {sorted(missing)}")
    tokens_read = 0
    for name in there:
        session = sessions.get(name)  # a DamagedError is a failure of the campaign
        n = len(session.tokens)
        if session.tokens != words(name)[:n] or n < saved.get(name, 0):
            raise BenchError(f"{name}: {n} tokens of which {saved.get(name, 0)} were saved, or not what was said")
        if not session.messages or session.messages[-1]["content"] != f"{n} tokens":
            raise BenchError(f"{name}: messages and tokens are not of the same time")
        match = store.chain(session.head) if session.head is not None else None
        if match is None or match.length != n or store.tokens(match) != session.tokens:
            raise BenchError(f"{name}: its keys and values are not those of its tokens")
        at = 0
        for found in store.read_chain(match):
            wanted = segment(session.tokens, at, at + len(found.tokens))
            at += len(found.tokens)
            same = all(
                torch.equal(a, b)
                for x, y in zip(found.layers, wanted.layers, strict=True)
                for a, b in zip(x, y, strict=True)
            )
            if found.tokens != wanted.tokens or not same or not torch.equal(found.states["sum"], wanted.states["sum"]):
                raise BenchError(f"{name}: wrong bytes before token {at}")
        if at != n:
            raise BenchError(f"{name}: of {n} tokens {at} can be read")
        tokens_read += at
    return {"conversations": len(there), "tokens": tokens_read}


def campaign(folder: Path, kills: int, seed: int, longest_s: float = 0.4) -> dict[str, Any]:
    """Kill `kills` times; the figures. Raises `BenchError` at the first thing that is wrong."""
    rng = random.Random(seed)
    saved: dict[str, int] = {}
    turns = in_calls = tokens = 0
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), "--worker", str(folder)], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, env=worker_env(), cwd=ROOT,
    ) as p:  # fmt: skip
        assert p.stdin is not None
        assert p.stdout is not None
        if p.stdout.readline() != "ready\n":
            raise BenchError("the writer does not start")
        for kill in range(kills):
            call = rng.randint(1, 150) if kill % 2 else 0
            p.stdin.write(f"{rng.randrange(1 << 30)} {call}\n")
            p.stdin.flush()
            lines: list[str] = []
            while not (line := p.stdout.readline()).startswith("pid "):  # the writer itself may be faster
                if not line or line.startswith("failed"):
                    raise BenchError(f"kill {kill}: the writer {line.strip() or 'is gone'}")
                lines.append(line)
            child = int(line.split()[1])
            if not call:
                time.sleep(rng.uniform(0, longest_s))
                with contextlib.suppress(ProcessLookupError):  # it failed; what it said comes next
                    os.kill(child, signal.SIGKILL)
            while (line := p.stdout.readline()) != "ended\n":
                if not line or line.startswith("failed"):
                    raise BenchError(f"kill {kill}: the writer {line.strip() or 'is gone'}")
                lines.append(line)
            for what, name, n in (line.split() for line in lines):
                if what == "said":
                    saved[name] = int(n)
                    turns += 1
                else:
                    saved.pop(name, None)
            in_calls += call > 0
            tokens += check(folder, saved)["tokens"]
        p.stdin.close()
    return {"kills": kills, "in_calls": in_calls, "turns": turns, "tokens_verified": tokens,
            "conversations_left": len(saved)}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to keep the conversations (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=RESULTS / "session-crash.json")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        nursery(args.worker)
        return 0
    sys.path.insert(0, str(ROOT))
    load = load_average()
    try:
        with tempfile.TemporaryDirectory(prefix="offload-crash-", dir=args.folder) as folder:
            result = campaign(Path(folder), args.kills, args.seed)
    except BenchError as e:
        say(f"error: {e}")
        return 1
    write_json(args.out, {**head("session-crash", load), "seed": args.seed, **result, "wrong": 0})  # fmt: skip
    say(f"{result['kills']} kills, {result['turns']} turns saved, nothing lost; {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

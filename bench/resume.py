"""Time to the first token of a stored session, against computing the same prompt again.

One process computes a prompt of `--tokens` tokens, then stores it as a session; others, one after another and each with
the page cache dropped (root; else the result says what was), load the model and ask for the same prompt under the
session's name: all but its last token is read from disk. In turn with them, others compute it all. Both times run from
the request, loading the model apart, in a process's first request.

The floor of a resume is reading the session's files: their bytes over the bandwidth of reading the same files past the
page cache, measured just before. What is left is the pass over the last token, and checking and copying what is read.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import checkpoints
import disk
from common import BenchError, flags, head, in_process, load_average, run_script, say, vm_kb, worker_env, write_json
from limit import drop_caches

MODEL = "llama-1b"
SCRIPT = Path(__file__)
TOKENS = 8192
SESSION = "resumed"
ROOM = 256  # of the context, behind the prompt
TARGET = 10.0
SEED = 7


def prompt(vocab: int, tokens: int) -> list[int]:
    """The prompt's token ids, always the same."""
    return random.Random(SEED).choices(range(3, vocab), k=tokens)


def worker(folder: Path, tokens: int, session: str | None) -> dict[str, Any]:
    """One request, in this process; kept, or gone on with, under a name if there is one."""
    import offload

    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    with offload.load(folder, context=tokens + ROOM) as model:
        result = model.run([prompt(vocab, tokens)], max_new_tokens=1, ignore_eos=True, session=session)
        stats = result.stats
        return {
            "ttft_s": stats.ttft_s,
            "passes_s": stats.prefill.seconds,
            "reused": stats.reused_tokens,
            "token": result.token_ids[0][0],
            "load_s": stats.load_s,
            "predicted_ttft_s": stats.predicted_ttft_s,
            "notes": result.notes,
            "peak_rss_bytes": vm_kb("VmHWM"),
        }


def longer(folder: Path, positions: int, out: Path) -> Path:
    """The checkpoint again (hard links) with at least so many positions: weights do not depend on them."""
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = max(positions, config["max_position_embeddings"])
    out.mkdir()
    for file in folder.iterdir():
        if file.name == "config.json":
            (out / file.name).write_text(json.dumps(config))
        else:
            os.link(file, out / file.name)
    return out


def session_files(home: Path) -> list[Path]:
    """What the session's keys and values are in."""
    return sorted(home.rglob("*.kv"))


def bandwidth(files: list[Path]) -> dict[str, Any]:
    """Bytes per second of reading the files once, past the page cache."""
    measured = disk.measure(files, seconds=2.0)
    return {"bandwidth": measured.sequential, "direct": measured.direct}


def run(folder: Path, tokens: int, reps: int, tmp: Path, *, keep_caches: bool = False) -> dict[str, Any]:
    """Store once, then resume and compute in turn."""
    env = {**worker_env(), "OFFLOAD_HOME": str(tmp / "home"), "OFFLOAD_CACHE": str(tmp / "cache")}
    weights = checkpoints.shard_files(folder)
    # the first process also measures the machine and compiles the kernels: not one that counts
    stored = in_process(SCRIPT, env, "session", folder, tokens)
    files = session_files(tmp / "home")
    if not files:
        raise BenchError(f"nothing was stored: {stored['notes']}")
    say(f"stored: first token after {stored['ttft_s']:.2f} s")
    nbytes = sum(f.stat().st_size for f in files)
    resumed: list[dict[str, Any]] = []
    prefilled: list[dict[str, Any]] = []
    dropped = "nothing (asked to keep them)"
    for n in range(reps):
        for what in ("resume", "prefill") if n % 2 == 0 else ("prefill", "resume"):
            if not keep_caches:
                dropped = drop_caches([*files, *weights])
            if what == "prefill":
                prefilled.append(in_process(SCRIPT, env, "prefill", folder, tokens))
                say(f"prefill: first token after {prefilled[-1]['ttft_s']:.2f} s")
                continue
            rate = in_process(SCRIPT, env, "bandwidth", *files)  # direct: leaves nothing in the page cache
            one = {**in_process(SCRIPT, env, "session", folder, tokens), **rate}
            if one["reused"] != tokens - 1:
                raise BenchError(f"{one['reused']} of {tokens} tokens were resumed: {one['notes']}")
            one["read_s"] = one["ttft_s"] - one["passes_s"]
            one["floor_s"] = nbytes / rate["bandwidth"]
            one["share_of_reading"] = one["floor_s"] / one["ttft_s"]
            resumed.append(one)
            say(f"resume: first token after {one['ttft_s']:.2f} s, {one['floor_s']:.2f} s of them reading at least")
    return {
        "stored": stored, "resumed": resumed, "prefilled": prefilled, "files": len(files), "file_bytes": nbytes,
        "caches_dropped": dropped, "summary": summary(stored, resumed, prefilled),
    }  # fmt: skip


def summary(stored: dict[str, Any], resumed: list[dict[str, Any]], prefilled: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians, and how many times sooner the first token comes."""

    def median(runs: list[dict[str, Any]], key: str) -> float:
        return statistics.median(r[key] for r in runs)

    resume, prefill = median(resumed, "ttft_s"), median(prefilled, "ttft_s")
    return {
        "prefill_ttft_s": prefill,
        "resume_ttft_s": resume,
        "ratio": prefill / resume,
        "read_s": median(resumed, "read_s"),
        "last_pass_s": median(resumed, "passes_s"),
        "floor_s": median(resumed, "floor_s"),
        "share_of_reading": median(resumed, "share_of_reading"),
        "bandwidth": median(resumed, "bandwidth"),
        "direct": all(r["direct"] for r in resumed),
        "storing_ttft_s": stored["ttft_s"],
        "same_token": all(r["token"] == prefilled[0]["token"] for r in [stored, *resumed, *prefilled]),
    }


def main(argv: list[str] | None = None) -> int:
    parser = flags(__doc__, "resume", scratch="checkpoints; the session is there too", worker="+")
    parser.add_argument("--model", default=MODEL, choices=sorted(checkpoints.SPECS))
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--keep-caches", action="store_true", help="leave the page cache alone")
    args = parser.parse_args(argv)
    if args.worker is not None:
        what, *rest = args.worker
        if what == "bandwidth":
            print(json.dumps(bandwidth([Path(f) for f in rest])))
        else:
            print(json.dumps(worker(Path(rest[0]), int(rest[1]), SESSION if what == "session" else None)))
        return 0
    load = load_average()
    spec = checkpoints.SPECS[args.model]
    folder = checkpoints.make(spec, args.scratch)
    # beside the checkpoint: the disk that is meant, and never memory
    with tempfile.TemporaryDirectory(prefix="resume-", dir=args.scratch) as tmp:
        model = longer(folder, args.tokens + ROOM, Path(tmp) / spec.name)
        found = run(model, args.tokens, args.reps, Path(tmp), keep_caches=args.keep_caches)
    write_json(args.out, {
        **head("resume", load), "load_average_after": load_average(), "model": args.model,
        "weight_bytes": spec.weight_bytes, "tokens": args.tokens, "reps": args.reps, "target": TARGET, **found,
    })  # fmt: skip
    say(f"{found['summary']['ratio']:.1f} times sooner (target {TARGET:g})")
    return 0


if __name__ == "__main__":
    run_script(main)

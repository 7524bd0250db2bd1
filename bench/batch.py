"""A job of many requests on one model larger than memory: ours against its peers, the same requests, the same limit.

64 requests with mixed lengths (prompts of 32 to 512 tokens, 16 to 64 new ones, all from a fixed seed, greedy, no end
token) are answered by each engine in turn, in a fresh memory cgroup with dropped caches:
 - `batch`: ours, all at once; `one`: ours, request by request, over a part of them that stands for all;
 - `llama.cpp`: the same weights as a bf16 GGUF file, memory-mapped, continuous batching (`llama_batch.c`), with each
   of `--llama`'s settings; its best counts;
 - `accelerate`: transformers with a disk offload folder and left-padded batches sorted by length. Each of `--sizes`
   is tried for `--probe-seconds`; from what its passes and tokens cost follows what the job takes, sorted by prompts
   or by new tokens, and the best goes on for `--engine-seconds`.

Reports new tokens and all tokens per second from the first request to the last answer (loading apart), peak memory,
bytes read, where the tokens agree, and ours as a share of the floor (see `batch_job.floor`). A run that is out of time
is not thrown away: the job's seconds are then estimated from its passes (`batch_job.estimate`), and the table says of
how much. Every run is in the result as soon as it is done; `--keep` keeps those of engines not named, so that a job
can be measured in parts of a few minutes.

It does not measure text quality (weights are random), sampling, or the reading and writing of job files.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import batch_job
import llama_peer
import tables
from batch_job import Pass
from batch_runs import BASE, GRACE_S, LEAST_S, Bench, Run, common_options
from checkpoints import SPECS, Spec
from common import (
    RESULTS,
    BenchError,
    gib,
    say,
    write_json,
)

LLAMA_CPP = "llama.cpp"
ENGINES = ("batch", "one", LLAMA_CPP, "accelerate")
LLAMA = ("64:unified:512", "16:unified:512")  # sequences, KV for all or for each, tokens of a pass at most
SIZES = (8, 16, 32, 64)


class Comparison:
    """One model, one limit, one job, all engines."""

    def __init__(self, spec: Spec, args: argparse.Namespace) -> None:
        self.bench = Bench(spec, args)
        self.spec, self.args = spec, args
        self.requests = batch_job.mixed(args.requests, spec.config["vocab_size"])
        self.file = batch_job.save(self.requests, self.bench.work / "requests.json")
        self.plans: dict[str, Callable[[Run], Sequence[Pass] | None]] = {
            "batch": lambda run: None,
            "one": self.plan_one,
            LLAMA_CPP: lambda run: batch_job.continuous(
                self.requests, run["settings"]["parallel"], run["settings"]["chunk"]
            ),
            "accelerate": lambda run: self.plan_padded(run["settings"]["batch"], run["settings"]["by"]),
        }
        self.llama: llama_peer.Built | None = None
        self.gguf: Path | None = None
        if LLAMA_CPP in args.engines:
            self.llama = llama_peer.build(args.llama_cpp, self.bench.work / "llama_batch", "llama_batch.c")
            self.gguf = llama_peer.gguf(self.bench.folder, self.llama.checkout, spec.weight_bytes)
        self.runs: list[Run] = []
        self.rates: list[dict[str, Any]] = []
        self.earlier: dict[str, Any] = self.kept() if args.keep else {}

    def kept(self) -> dict[str, Any]:
        """The result there is, if it is of this job and limit; runs of engines not measured now are taken over."""
        try:
            found: dict[str, Any] = json.loads(self.args.out.read_text())
        except (OSError, ValueError):
            return {}
        if found.get("job") != batch_job.totals(self.requests) or found.get("limit_bytes") != self.bench.limit:
            raise BenchError(f"{self.args.out} is of another job or limit: --keep cannot go on with it")
        self.runs = [r for r in found["runs"] if r["engine"] not in self.args.engines]
        self.rates = found.get("rates", [])
        return found

    def run(self) -> dict[str, Any]:
        """Everything, in order; the result is written after each run."""
        every = batch_job.totals(self.requests)
        if not self.rates:
            mean = sum(r.cells for r in self.requests) // every["passes"]
            self.rates = self.bench.rates([len(self.requests), mean, 512, 1024])
        ways = {"batch": self.batch, "one": self.one, LLAMA_CPP: self.llama_cpp, "accelerate": self.accelerate}
        for engine in [e for e in ENGINES if e in self.args.engines]:
            self.bench.measure_disk()
            ways[engine]()
        self.bench.measure_disk()
        return self.write(finished=True)

    # the engines

    def batch(self) -> None:
        """Ours, all requests at once."""
        words = ["--requests", self.file, "--ram", self.bench.limit]
        self.ours("batch", words)

    def one(self) -> None:
        """Ours, request by request: some that stand for all."""
        only = batch_job.spread(self.requests, self.args.one)
        self.ours("one", ["--requests", self.file, "--ram", self.bench.limit, "--only", *only])

    def ours(self, engine: str, words: Sequence[object]) -> None:
        seconds = self.seconds()
        if seconds is None:
            return self.note({"engine": engine, "error": "no time was left"})
        with self.bench.group() as group:
            command = self.bench.worker(engine, *words, "--max-seconds", seconds)
            self.note(self.bench.measured(group, engine, command, timeout=seconds + GRACE_S))

    def llama_cpp(self) -> None:
        """llama.cpp, once with each setting."""
        assert self.llama is not None and self.gguf is not None
        lines = [" ".join(map(str, (r.new, len(r.prompt), *r.prompt))) for r in self.requests]
        file = self.bench.work / "requests.txt"
        file.write_text("\n".join(lines) + "\n")
        for parallel, kv, chunk in map(llama_setting, self.args.llama):
            settings = {"parallel": parallel, "kv": kv, "chunk": chunk}
            cells = batch_job.context(self.requests, parallel, chunk, kv)
            if cells * batch_job.kv_bytes(self.spec.config) > self.bench.limit:
                self.note({"engine": LLAMA_CPP, "settings": settings, "error": f"its KV alone is more than the limit: "
                           f"{gib(cells * batch_job.kv_bytes(self.spec.config))}"})  # fmt: skip
                continue
            seconds = self.seconds()
            if seconds is None:
                self.note({"engine": LLAMA_CPP, "settings": settings, "error": "no time was left"})
                continue

            def command(
                holder: int | None, partial: Path, words: Sequence[object] = (parallel, cells, chunk, kv),
                seconds: float = seconds,
            ) -> list[str]:  # fmt: skip
                assert self.llama is not None
                threads = len(os.sched_getaffinity(0))
                rest = (self.llama.program, self.gguf, file, *words, threads, seconds, holder or 0)
                return list(map(str, rest))

            with self.bench.group(self.gguf) as group:
                run = self.bench.measured(group, LLAMA_CPP, command, timeout=seconds + GRACE_S)
            self.note({"settings": settings, **run})

    def accelerate(self) -> None:
        """transformers: a look at each size, then the best one for longer."""
        base = next((r["base_rss_bytes"] for r in self.runs if r.get("base_rss_bytes", 0) > BASE // 2), BASE)
        best: tuple[float, int, str, int] | None = None
        for size in self.args.sizes:
            room = batch_job.padded_room(self.spec, self.requests, size, self.bench.limit - base)
            room = min(room, self.spec.weight_bytes)
            settings = {"batch": size, "by": "prompt", "max_memory": room}
            if room < 0:
                self.note({"engine": "accelerate", "settings": settings, "error": "batches of "
                           f"{size} leave no room for weights"})  # fmt: skip
                continue
            run = self.padded(size, "prompt", room, self.args.probe_seconds, hard=True)
            if "out of memory" in run.get("error", ""):
                room = int(room * 0.6)
                run = self.padded(size, "prompt", room, self.args.probe_seconds, hard=True)
            if run.get("steps") and "error" not in run:
                done = [(s, (p, d)) for s, p, d in run["steps"]]
                for by in ("prompt", "new"):
                    told = batch_job.estimate(run["job_s"], done, self.plan_padded(size, by))
                    if best is None or told < best[0]:
                        best = (told, size, by, room)
                if all(len(run["answers"].get(str(i), ())) == r.new for i, r in enumerate(self.requests)):
                    continue  # the whole job is done
        whole = any(r["engine"] == "accelerate" and r.get("judged", {}).get("whole") for r in self.runs)
        if best is not None and not whole:
            say(f"accelerate is at its best with batches of {best[1]} sorted by {best[2]}: about {best[0]:.0f} s")
            self.padded(best[1], best[2], best[3], self.args.engine_seconds, hard=False)

    def padded(self, size: int, by: str, room: int, most: float, *, hard: bool) -> Run:
        """One run of accelerate of `most` seconds; unless `hard`, a batch that was begun may take as long again."""
        seconds = self.seconds(most)
        if seconds is None:
            run: Run = {"engine": "accelerate", "settings": {"batch": size, "by": by, "max_memory": room},
                        "error": "no time was left"}  # fmt: skip
            self.note(run)
            return run
        longest = seconds if hard else min(2 * seconds, max(seconds, self.bench.left))
        offloaded = self.bench.work / "accelerate"
        with self.bench.group() as group:
            command = self.bench.worker(
                "accelerate", "--requests", self.file, "--batch", size, "--by", by, "--max-memory", room,
                "--offload-folder", offloaded, "--max-seconds", seconds, "--hard-seconds", longest,
            )  # fmt: skip
            run = self.bench.measured(group, "accelerate", command, timeout=longest + GRACE_S)
        shutil.rmtree(offloaded, ignore_errors=True)
        run.setdefault("settings", {"batch": size, "by": by, "max_memory": room})
        self.note(run)
        return run

    # what comes out

    def seconds(self, most: float | None = None) -> float | None:
        """Seconds for the next run; None: too few are left to begin it."""
        if self.bench.left < LEAST_S:
            return None
        return float(min(most or self.args.engine_seconds, self.bench.left))

    def plan_one(self, run: Run) -> list[Pass]:
        return [p for r in self.requests for p in batch_job.continuous([r], 1, 1 << 20)]

    def plan_padded(self, size: int, by: str) -> list[Pass]:
        return batch_job.padded(self.requests, batch_job.groups(self.requests, size, by))

    def note(self, run: Run) -> None:
        """Keep a run and say what it came to."""
        if run.get("answers") or run.get("steps"):
            run["judged"] = batch_job.judge(self.requests, run, self.plans[run["engine"]](run))
        self.runs.append(run)
        settings = {k: v for k, v in (run.get("settings") or {}).items() if k != "system"}
        label = ", ".join([run["engine"], *(f"{k} {v}" for k, v in settings.items())])
        if "judged" in run:
            j = run["judged"]
            how = "" if j["whole"] else f", estimated from {100 * j['measured_share']:.0f} % of it"
            say(f"{label}: {j['job_s']:.0f} s, {j['new_tokens_per_s']:.2f} new tokens/s, {j['tokens_per_s']:.1f} "
                f"in all{how}")  # fmt: skip
        if "error" in run:
            say(f"{label}: {run['error']}")
        self.write(finished=False)

    def write(self, *, finished: bool) -> dict[str, Any]:
        """The result so far."""
        summary = summarise(self.runs)
        reference = next((r["answers"] for r in self.runs if r["engine"] == "one" and "judged" in r), {})
        room = self.bench.limit - next(
            (s["base_rss_bytes"] for s in summary.values() if s["engine"] != LLAMA_CPP), BASE
        )
        result = {
            **self.bench.facts("batch", f"batch-{self.spec.name}"),
            "finished": finished,
            "llama_cpp": self.llama.version if self.llama is not None else self.earlier.get("llama_cpp"),
            "job": batch_job.totals(self.requests),
            "rates": self.rates,
            "summary": summary,
            "ratios": ratios(summary),
            "agreement": {
                e: batch_job.agreement(reference, self.runs[s["run"]]["answers"])
                for e, s in summary.items() if e != "one" and reference
            },
            "floor": None,
            "runs": self.runs,
        }  # fmt: skip
        readings = [d["sequential"] for d in (*result["disk"]["readings"], *self.earlier_readings())]
        if readings and self.rates:
            floor = batch_job.floor(
                self.spec, self.requests, room=room, bandwidth=statistics.median(readings), rates=self.rates
            )
            floor["share"] = {e: floor["floor_s"] / s["job_s"] for e, s in summary.items()}
            result["floor"] = floor
        write_json(self.args.out, result)
        return result

    def earlier_readings(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.earlier.get("disk", {}).get("readings", [])
        return found


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """By engine: its best run (a whole one, or of the longest look), or why there is none."""
    found: dict[str, Any] = {}
    for engine in dict.fromkeys(r["engine"] for r in runs):
        good = [i for i, r in enumerate(runs) if r["engine"] == engine and "judged" in r and "error" not in r]
        if not good:
            continue
        best = max(good, key=lambda i: runs[i]["judged"]["new_tokens_per_s"])
        run = runs[best]
        if engine == "accelerate":  # a longer look at the same settings is worth more than a short one
            same = [i for i in good if runs[i]["settings"]["batch"] == run["settings"]["batch"]]
            best = max(same, key=lambda i: (runs[i]["judged"]["whole"], runs[i]["job_s"]))
            run = runs[best]
        found[engine] = {
            "engine": engine, "run": best, "settings": run.get("settings"), **run["judged"],
            **{k: run[k] for k in ("load_s", "peak_rss_bytes", "base_rss_bytes", "bytes_read", "load_bytes_read")},
            "limited": run["limit"]["limited"],
        }  # fmt: skip
    return found


def ratios(summary: dict[str, Any]) -> dict[str, float]:
    """Ours batched over each other engine, whole job."""
    if "batch" not in summary:
        return {}
    mine = summary["batch"]["new_tokens_per_s"]
    return {e: mine / s["new_tokens_per_s"] for e, s in summary.items() if e != "batch"}


def llama_setting(text: str) -> tuple[int, str, int]:
    """`64:unified:512` as sequences, KV, tokens of a pass."""
    try:
        parallel, kv, chunk = text.split(":")
        found = int(parallel), kv, int(chunk)
    except ValueError:
        raise BenchError(f"--llama {text}: write for example 64:unified:512") from None
    if kv not in ("unified", "each") or not 0 < found[0] <= found[2]:
        raise BenchError(f"--llama {text}: write SEQUENCES:unified|each:TOKENS, not more sequences than tokens")
    return found


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", choices=sorted(SPECS))
    common_options(p, 720)
    p.add_argument("--engines", nargs="+", choices=ENGINES, help="default: all that can be run")
    p.add_argument("--llama-cpp", type=Path, metavar="DIR", help="llama.cpp's checkout, built under DIR/build")
    p.add_argument("--llama", nargs="+", default=LLAMA, metavar="N:KV:TOKENS", help="settings of llama.cpp to try")
    p.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="batch sizes accelerate is tried with")
    p.add_argument("--requests", type=int, default=64)
    p.add_argument("--one", type=int, default=8, help="requests answered one by one")
    p.add_argument("--engine-seconds", type=float, default=300, help="a run begins nothing new after so long")
    p.add_argument("--probe-seconds", type=float, default=60, help="of each look at a size of accelerate's")
    p.add_argument("--keep", action="store_true", help="keep what --out has of the engines not measured now")
    p.add_argument("--out", type=Path, help="result file (default: bench/results/batch-MODEL.json)")
    return p


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with `engines` and `out` filled in; what cannot go together ends the process."""
    p = parser()
    args = p.parse_args(argv)
    if args.engines is None:
        args.engines = [e for e in ENGINES if e != LLAMA_CPP or args.llama_cpp is not None]
    if LLAMA_CPP in args.engines and args.llama_cpp is None:
        p.error("llama.cpp needs --llama-cpp DIR, its built checkout")
    args.out = args.out or RESULTS / f"batch-{args.model}.json"
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        for setting in args.llama:
            llama_setting(setting)
        comparison = Comparison(SPECS[args.model], args)
        result = comparison.run()
        comparison.bench.close()
    except BenchError as e:
        say(f"error: {e}")
        return 1
    print(tables.render(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

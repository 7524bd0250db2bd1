"""Ours against its peers on one model larger than memory: the same tokens, the same memory limit, in one go.

With `--llama-cpp` llama.cpp is one more engine: the same weights as a bf16 GGUF file, memory-mapped, fed the same
tokens by `llama_stream.c`. With `--resident` there is no limit and every engine has all weights in memory.

Makes the checkpoint, measures the disk, runs the oracle (all weights in memory, no limit), finds accelerate's best
`max_memory`, then runs every engine in turn in a fresh memory cgroup: once cold (caches dropped) and once directly
after in the same group (warm). Decode is teacher-forced, batch 1, by `decode.py`.

Reports tokens per second (median of the rounds) and ratios; at how many positions the chosen token equals the
oracle's and how far the others lie from its maximum, in units of the checkpoint's precision; and the share of the
floor: the time that reading or computing must take at least, over the time it took. The floor is the larger of
 - the bytes that must be read per token, over the disk's measured bandwidth: what a token needs less what the limit
   holds beside the interpreter. For experts, the misses of a cache that knows the future (Belady 1966), on the
   experts the oracle chose;
 - the fastest measured time per token with all weights in memory.

A resident comparison has no floor and no cold runs: each engine runs once per round, with whatever the page cache
holds, and its speed is that of the median step of the second half, when a mapped file has long been read.

It does not measure long prompts, sampling, batches or text quality (weights are random).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import checkpoints
import decode
import disk
import llama_peer
import tables
from checkpoints import SPECS, Spec
from common import (
    BENCH,
    GIB,
    RESULTS,
    BenchError,
    default_scratch,
    gib,
    load_average,
    machine,
    mem_available,
    parse_size,
    say,
    today,
    worker_env,
    write_json,
)
from equality import equality
from limit import Group, Held, drop_caches
from misses import belady_misses, lru_misses, routes_by_step

PEERS = ("accelerate", "transformers-auto")
LLAMA_CPP = "llama.cpp"
SHARES = (1.0, 0.9, 0.8, 0.65)  # of the limit less the interpreter: what accelerate is tried with
NO_FLOOR = {"floor_s": None}
RESIDENT_TOKENS = 96  # a step takes little, and a mapped file is read during the first ones
Run = dict[str, Any]


class Comparison:
    """One model, one limit (or none: all weights in memory), all engines."""

    def __init__(self, spec: Spec, args: argparse.Namespace) -> None:
        self.spec = spec
        self.args = args
        self.resident: bool = args.resident
        self.limit = None if args.resident else parse_size(args.limit or spec.limit)
        # what ours is given, and what is held ready for each run
        self.ram: int = self.limit or spec.weight_bytes + 2 * GIB
        self.new_tokens: int = args.new_tokens or (RESIDENT_TOKENS if self.resident else spec.new_tokens)
        self.folder = checkpoints.make(spec, args.scratch)
        self.work: Path = args.scratch / "work"
        self.work.mkdir(parents=True, exist_ok=True)
        self.files = checkpoints.shard_files(self.folder)
        self.mapped: list[Path] = []  # read by a peer in place of the checkpoint
        self.llama: llama_peer.Built | None = None
        if LLAMA_CPP in args.engines:
            self.llama = llama_peer.build(args.llama_cpp, self.work / "llama_stream")
            self.mapped = [llama_peer.gguf(self.folder, self.llama.checkout, spec.weight_bytes)]
        self.disks: list[disk.Disk] = []
        self._logits = itertools.count()

    def run(self) -> dict[str, Any]:
        """Everything, in order."""
        quiet = load_average()
        if quiet > 0.5:
            say(f"the machine is not quiet (load average {quiet:.1f}): these figures are smoke checks only")
        date = today()
        self.measure_disk()
        references = self.references()
        base = next((r["base_rss_bytes"] for r in references if "error" not in r), 300 << 20)
        tuning = self.tune(self.limit, base) if "accelerate" in self.args.engines and self.limit else []
        runs = self.rounds(best_max_memory(tuning))
        self.measure_disk()
        bandwidth = statistics.median(d.sequential for d in self.disks)
        oracle = next((r for r in references if r["engine"] == "resident" and "error" not in r), None)
        compared = self.compare(oracle, references + runs)
        for r in references + runs:
            r.pop("logits", None)
        facts = {
            "kind": "compare",
            "name": self.spec.name,
            "date": date,
            "machine": machine(),
            "llama_cpp": self.llama.version if self.llama is not None else None,
            "resident": self.resident,
            "load_average_before": quiet,
            "model": {
                "config": self.spec.config,
                "weight_bytes": self.spec.weight_bytes,
                "dense_bytes": self.spec.dense_bytes,
                "expert_bytes": self.spec.expert_bytes,
                "weights": "random",
            },
            "limit_bytes": self.limit,
            "prompt_tokens": self.args.prompt_tokens,
            "new_tokens": self.new_tokens,
            "disk": {"bandwidth": bandwidth, "readings": [asdict(d) for d in self.disks]},
            "summary": summarise(runs),
            "ratios": ratios(runs),
            "equality": compared,
            "floor": self.floor(self.limit, bandwidth, base, references, oracle, runs) if self.limit else NO_FLOOR,
            "tuning": tuning,
            "references": [{k: v for k, v in r.items() if k != "routes"} for r in references],
            "runs": runs,
        }
        shutil.rmtree(self.work, ignore_errors=True)
        return facts

    def measure_disk(self) -> None:
        """Shared and virtual disks change from minute to minute, so this is done again before every round."""
        self.disks.append(disk.measure(self.files))
        last = self.disks[-1]
        say(f"disk: {last.sequential / 1e9:.2f} GB/s sequential, {last.random / 1e9:.2f} GB/s random")

    def references(self) -> list[Run]:
        """Without a limit: the oracle, and ours with everything in memory (where that is not compared anyway)."""
        need = int(self.spec.weight_bytes * 1.15) + 2 * GIB
        if mem_available() < need:
            error = f"needs {gib(need)} of free memory, {gib(mem_available())} are there"
            say(f"no oracle: it {error}")
            return [{"engine": "resident", "error": error}]
        found = []
        wanted = [("resident", ["--routing"])]
        if not self.resident:
            wanted.append(("ours", ["--ram", str(self.spec.weight_bytes + 2 * GIB)]))
        with Group(None) as group:
            for engine, options in wanted:
                r = self.worker(group, engine, options, label=f"{engine}, all in memory, no limit")
                found.append({**r, "cache": "warm", "all_in_memory": True})
        return found

    def tune(self, limit: int, base: int) -> list[Run]:
        """accelerate with several `max_memory`, few tokens each."""
        found = []
        for share in SHARES:
            most = int((limit - base) * share)
            with self.fresh_group() as group:
                options = ["--max-memory", str(most)]
                r = self.worker(group, "accelerate", options, new_tokens=4, label=f"accelerate, max_memory {gib(most)}")
            kept = ("decode_tokens_per_s", "peak_rss_bytes", "step_s", "load_s", "device_map", "error", "limit")
            r.pop("logits", None)
            found.append({"max_memory_bytes": most} | {k: r[k] for k in kept if k in r})
        return found

    def rounds(self, max_memory: int | None) -> list[Run]:
        """Ours and the peers alternately; in each round another one goes first."""
        engines: list[str] = self.args.engines
        options = {
            "ours": ["--ram", str(self.ram)],
            "accelerate": ["--max-memory", str(max_memory or int(self.ram * 0.5))],
            "transformers-auto": [],
            LLAMA_CPP: [],
        }
        runs: list[Run] = []
        dead: set[str] = set()
        for number in range(max(self.args.reps, self.args.peer_reps)):
            if number:
                self.measure_disk()
            turn = number % len(engines)
            for engine in engines[turn:] + engines[:turn]:
                if number >= (self.args.reps if engine == "ours" else self.args.peer_reps) or engine in dead:
                    continue
                with Group(None) if self.resident else self.fresh_group() as group:
                    for cache in ("warm",) if self.resident else ("cold", "warm"):
                        label = f"round {number + 1}: {engine}, {cache}"
                        r = self.worker(group, engine, options[engine], label=label)
                        if self.resident and "error" not in r:
                            r["decode_tokens_per_s"] = 1 / settled(r["step_s"])
                        runs.append({**r, "round": number + 1, "cache": cache})
                        if "error" in r:
                            dead.add(engine)  # it would fail again, after minutes
                            break
        return runs

    @contextmanager
    def fresh_group(self) -> Iterator[Group]:
        """A new group with nothing in the page cache."""
        dropped = drop_caches([*self.files, *self.mapped])
        if dropped != "all":
            say(f"not root: only {dropped} dropped from the page cache")
        with Group(self.limit) as group:
            if self.limit is not None and not group.limited:
                say(f"running WITHOUT a memory limit: {group.why}")
            yield group

    def worker(
        self, group: Group, engine: str, options: Sequence[str], *, label: str, new_tokens: int | None = None
    ) -> Run:
        """One measured process in the group; its figures, or what went wrong under `error`."""
        logits = self.work / f"logits-{next(self._logits)}.safetensors"
        offload_folder = self.work / "accelerate"
        with Held(self.ram) as held:
            command = self.command(
                engine, options, new_tokens or self.new_tokens, logits, offload_folder=offload_folder, holder=held.pid
            )
            ran = group.run(command, timeout=self.args.timeout, env=worker_env())
        shutil.rmtree(offload_folder, ignore_errors=True)
        facts: Run = {"engine": engine}
        error = ran.failure()
        if error is None:
            try:
                facts = json.loads(ran.stdout.strip().splitlines()[-1])
                facts["logits"] = logits
            except (IndexError, ValueError):
                error = "printed no result"
        if error is not None:
            facts["error"] = error
        facts["limit"] = {
            "limited": ran.limited, "mechanism": ran.mechanism, "why_not": group.why if not ran.limited else None,
            "group_peak_bytes": ran.peak_bytes, "wall_s": ran.wall_s, "memory_held_ready": bool(held.pid),
        }  # fmt: skip
        if error is None:
            say(f"{label}: {facts['decode_tokens_per_s']:.3f} tokens/s, first token after {facts['ttft_s']:.1f} s")
        else:
            say(f"{label}: {error}")
        return facts

    def command(
        self, engine: str, options: Sequence[str], new_tokens: int, logits: Path, *, offload_folder: Path,
        holder: int | None,
    ) -> list[str]:  # fmt: skip
        """What measures one engine: `decode.py`, or `llama_stream` with the tokens that `decode.py` would feed."""
        prompt: int = self.args.prompt_tokens
        if engine == LLAMA_CPP:
            assert self.llama is not None
            tokens = decode.stream(self.spec.config["vocab_size"], prompt + new_tokens - 1, decode.SEED)
            return self.llama.command(
                self.mapped[0], llama_peer.write_tokens(tokens, self.work / "tokens.txt"), prompt=prompt,
                threads=len(os.sched_getaffinity(0)), max_seconds=self.args.peer_seconds, logits=logits, holder=holder,
            )  # fmt: skip
        return [
            sys.executable, str(BENCH / "decode.py"), str(self.folder), "--engine", engine, *options,
            "--prompt-tokens", str(prompt), "--new-tokens", str(new_tokens),
            "--logits", str(logits), "--offload-folder", str(offload_folder),
            *(["--max-seconds", str(self.args.peer_seconds)] if engine != "ours" else []),
            *(["--release", str(holder)] if holder else []),
        ]  # fmt: skip

    def compare(self, oracle: Run | None, runs: Sequence[Run]) -> dict[str, Any]:
        """Each run's choices against the oracle's (or, without one, against the first run's)."""
        done = [r for r in runs if "logits" in r]
        basis = oracle if oracle is not None else next(iter(done), None)
        if basis is None:
            return {"reference": None, "runs": []}
        found = []
        for r in done:
            if r is basis:
                continue
            where: Run = {k: r[k] for k in ("engine", "cache", "round", "all_in_memory") if k in r}
            found.append({**where, **equality(basis["logits"], r["logits"])})
        name = basis["engine"] + (", all in memory" if basis.get("all_in_memory") else "")
        return {"reference": name, "unit": "ulps of bfloat16 at the reference's maximum", "runs": found}

    def floor(
        self, limit: int, bandwidth: float, base: int, references: Sequence[Run], oracle: Run | None,
        runs: Sequence[Run],
    ) -> dict[str, Any]:  # fmt: skip
        """The least time per token, and ours as a share of it."""
        room = limit - base
        computed = [statistics.median(r["step_s"][1:]) for r in references if len(r.get("step_s", ())) > 1]
        bytes_read: float | None
        lru: float | None = None
        if not self.spec.expert_bytes:
            bytes_read = float(max(0, self.spec.dense_bytes - room))
        elif oracle is None:
            bytes_read = None
        else:
            slots = max(1, (room - self.spec.dense_bytes) // self.spec.expert_bytes)
            layers = self.spec.config["num_hidden_layers"]
            # the prompt's pass comes first in the trace and is not decode
            steps = routes_by_step(oracle["routes"], layers)[1:]
            flat = [key for step in steps for key in step]
            per_step = self.spec.expert_bytes / max(1, len(steps))
            bytes_read = max(0, belady_misses(flat, slots) - slots) * per_step
            lru = lru_misses(flat, slots, warm=routes_by_step(oracle["routes"], layers)[0]) * per_step
        read_s = bytes_read / bandwidth if bytes_read is not None else None
        compute_s = min(computed, default=None)
        floor_s = max((t for t in (read_s, compute_s) if t is not None), default=None)
        shares = {}
        for cache in ("cold", "warm"):
            ours = [r for r in runs if (r["engine"], r["cache"]) == ("ours", cache) and "error" not in r]
            rates = [r["decode_tokens_per_s"] for r in ours]
            if rates and floor_s is not None:
                shares[cache] = floor_s * statistics.median(rates)
        return {
            "bytes_per_token": bytes_read,
            "lru_bytes_per_token": lru,
            "bandwidth": bandwidth,
            "read_s": read_s,
            "compute_s": compute_s,
            "floor_s": floor_s,
            "bound": None if floor_s is None else "disk" if floor_s == read_s else "compute",
            "share": shares,
        }


def settled(steps: Sequence[float]) -> float:
    """Seconds of the median decode step of the second half; the first of `steps` is the prompt's."""
    decode = steps[1:] or steps
    return statistics.median(decode[len(decode) // 2 :])


def best_max_memory(tuning: Sequence[Run]) -> int | None:
    """The setting accelerate was fastest with."""
    good = [t for t in tuning if t.get("decode_tokens_per_s")]
    return max(good, key=lambda t: t["decode_tokens_per_s"])["max_memory_bytes"] if good else None


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """Medians by engine and cache state; an engine that failed has its message."""
    found: dict[str, Any] = {}
    for r in runs:
        if "error" in r:
            found.setdefault(r["engine"], {})["error"] = r["error"]
    for engine, cache in dict.fromkeys((r["engine"], r["cache"]) for r in runs):
        good = [r for r in runs if r["engine"] == engine and r["cache"] == cache and "error" not in r]
        if not good:
            continue
        rates = [r["decode_tokens_per_s"] for r in good]
        entry = found.setdefault(engine, {})[cache] = {
            "runs": len(good),
            "decode_tokens_per_s": statistics.median(rates),
            "decode_tokens_per_s_range": [min(rates), max(rates)],
            **{k: statistics.median(r[k] for r in good) for k in ("load_s", "ttft_s", "start_to_first_token_s")},
            "peak_rss_bytes": max(r["peak_rss_bytes"] for r in good),
            "new_tokens": min(r["new_tokens"] for r in good),
            "limited": all(r["limit"]["limited"] for r in good),
        }
        steps = [s for r in good for s in r.get("steps", [])[1:]]
        if steps:
            seconds, needed, busy = (sum(s[k] for s in steps) for k in ("seconds", "needed", "read_busy_s"))
            entry |= {
                "bytes_read_per_token": sum(s["bytes_read"] for s in steps) / len(steps),
                "hit_rate": sum(s["hit"] for s in steps) / needed if needed else None,
                "stall_share": sum(s["stall_s"] for s in steps) / seconds if seconds else None,
                "read_bandwidth": sum(s["bytes_read"] for s in steps) / busy if busy else None,
            }
    return found


def ratios(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Ours over each peer, by cache state: decode speed, and the start of the process to the first token."""
    summary = summarise(runs)
    found: dict[str, dict[str, float]] = {}
    ours = summary.get("ours", {})
    for engine, states in summary.items():
        for cache in ("cold", "warm"):
            if engine == "ours" or cache not in ours or cache not in states:
                continue
            a, b = ours[cache], states[cache]
            found.setdefault(engine, {})[f"{cache}_decode"] = a["decode_tokens_per_s"] / b["decode_tokens_per_s"]
            found[engine][f"{cache}_start"] = b["start_to_first_token_s"] / a["start_to_first_token_s"]
    return found


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", choices=sorted(SPECS))
    p.add_argument("--limit", help="memory of each run (default: the model's, half to two thirds of its weights)")
    p.add_argument("--resident", action="store_true", help="all weights in memory, no limit, no cold runs")
    p.add_argument("--engines", nargs="+", choices=("ours", *PEERS, LLAMA_CPP), help="default: all that can be run")
    p.add_argument("--llama-cpp", type=Path, metavar="DIR", help="add llama.cpp: its checkout, built under DIR/build")
    p.add_argument("--reps", type=int, default=3, help="rounds of ours, each cold and warm")
    p.add_argument("--peer-reps", type=int, default=2, help="rounds of the peers")
    p.add_argument("--prompt-tokens", type=int, default=16)
    p.add_argument("--new-tokens", type=int, help="positions to choose at (default: the model's)")
    p.add_argument("--peer-seconds", type=float, default=180, help="a peer stops decoding after so long")
    p.add_argument("--timeout", type=float, default=1200, help="seconds after which a process is killed")
    p.add_argument("--scratch", type=Path, default=default_scratch(), help="folder for checkpoints and offload files")
    p.add_argument("--out", type=Path, help="result file (default: bench/results/MODEL.json, or MODEL-resident.json)")
    return p


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with `engines` and `out` filled in; what cannot go together ends the process."""
    p = parser()
    args = p.parse_args(argv)
    if args.resident and args.limit:
        p.error("--resident is without a limit: give one of --resident and --limit")
    if args.resident and "accelerate" in (args.engines or ()):
        p.error("with --resident nothing is offloaded to disk: compare with transformers-auto instead of accelerate")
    if args.engines is None:
        args.engines = ["ours", *(peer for peer in PEERS if not (args.resident and peer == "accelerate"))]
    if args.llama_cpp is not None and LLAMA_CPP not in args.engines:
        args.engines.append(LLAMA_CPP)
    if args.llama_cpp is None and LLAMA_CPP in args.engines:
        p.error("llama.cpp needs --llama-cpp DIR, its built checkout")
    args.out = args.out or RESULTS / f"{args.model}{'-resident' if args.resident else ''}.json"
    return args


def main() -> int:
    args = parse()
    try:
        result = Comparison(SPECS[args.model], args).run()
    except BenchError as e:
        say(f"error: {e}")
        return 1
    write_json(args.out, result)
    print(tables.render(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

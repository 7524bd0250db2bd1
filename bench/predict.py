"""How well speeds are predicted: a grid of models, budgets, batches, prompts and devices, predicted and measured.

The machine is profiled first, into a cache of its own. Each cell is a process: it loads the model under its budget and
runs the same request four times. Reported are, for decode and for the first token:

* `told`: the error of what a user was told with the third and fourth request (by then, earlier runs have corrected the
  profile wherever it was off by more than a tenth);
* `model`: the error of the model alone. The speeds of compute and disk are those that one request had, the prediction
  is compared with the next one, so that what is left is what the model says of bytes, overlap and hits;
* `drift`: how far the disk's speed in the run was from the profile's.

Errors are predicted over measured time, less 1. It compares with no other engine; figures of an emulated device are
*emulated*.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import checkpoints
from common import BenchError, flags, head, load_average, run_script, say, today, worker_env, write_json

DENSE, MOE = "llama-1b", "olmoe-2b"
OVERHEAD = 640 << 20  # beside the weights: interpreter, libraries, KV and temporaries of these small runs
LINK = "2GB"  # of the emulated device: two cores share copies and compute
REQUESTS = 4
MEDIAN_TARGET, P90_TARGET = 0.05, 0.15


def cells() -> list[dict[str, Any]]:
    """What is run: model, memory for weights (percent of the model), batch, prompt and new tokens, device."""
    out: list[dict[str, Any]] = []

    def add(model: str, percent: int, batch: int, prompt: int, new: int, device: str = "cpu") -> None:
        out.append({"model": model, "percent": percent, "batch": batch, "prompt": prompt, "new": new,
                    "device": device})  # fmt: skip

    for percent in (30, 50, 75, 100):
        for batch in (1, 4, 16):
            add(DENSE, percent, batch, 32, 12)
            add(MOE, percent, batch, 32, 24)
    for percent in (50, 100):
        add(DENSE, percent, 1, 512, 12)
        add(MOE, percent, 1, 512, 24)
    for percent in (40, 75):
        for model, new in ((DENSE, 12), (MOE, 24)):
            add(model, percent, 1, 32, new, "emulated")
            add(model, percent, 4, 32, new, "emulated")
    return out


def worker(folder: Path, cell: dict[str, Any]) -> dict[str, Any]:
    """One cell, in this process."""
    import random

    import offload
    from offload.planning import calibration
    from offload.planning.predict import Workload

    size = sum(f.stat().st_size for f in checkpoints.shard_files(folder))
    room = size * cell["percent"] // 100
    context = cell["batch"] * (cell["prompt"] + cell["new"]) + 16
    options: dict[str, Any] = {"ram": room + OVERHEAD, "device": "cpu"}
    if cell["device"] == "emulated":  # all weights in RAM: the link is what is looked at
        options = {"ram": int(size * 1.1) + OVERHEAD, "device": "emulated", "link": LINK, "vram": room + (300 << 20)}
    rows = []
    with offload.load(folder, context=context, **options) as model:
        engine = model.engine
        profiled = engine.machine.disk_bytes_per_s
        seen = None
        for number in range(REQUESTS):
            rng = random.Random(number)
            vocab = engine.description.facts.vocab
            prompts = [[rng.randrange(vocab) for _ in range(cell["prompt"])] for _ in range(cell["batch"])]
            before = engine.calibration
            stats = model.run(prompts, max_new_tokens=cell["new"], ignore_eos=True).stats
            workload = Workload(cell["prompt"], cell["new"], cell["batch"], warm=number > 0)
            told = stats.prediction
            assert told is not None
            known = engine.predict(workload, seen) if seen is not None else None
            steps = cell["new"] - 1
            total = stats.total
            rows.append({
                "decode_s": stats.decode_s / steps, "ttft_s": stats.ttft_s,
                "step_s": stats.decode.seconds / steps, "stall_s": stats.decode.stall_s / steps,
                "bytes_read": stats.decode.bytes_read / steps, "bytes_up": stats.decode.bytes_up / steps,
                "disk_bytes_per_s": total.bytes_read / total.read_busy_s if total.bytes_read > 32 << 20 else None,
                "told_decode_s": told.decode.seconds, "told_ttft_s": told.ttft_s,
                "told_bytes_read": told.decode.bytes_read, "bottleneck": told.bottleneck,
                "model_decode_s": known.decode.seconds if known is not None else None,
                "model_ttft_s": known.ttft_s if known is not None else None,
                "model_bytes_read": known.decode.bytes_read if known is not None else None,
            })  # fmt: skip
            told_again = engine.predict(workload, before)
            seen = calibration.observe(
                before, before.apply(engine.machine).rates, told_again, stats,
                lambda c, w=workload: engine.predict(w, c), damped=False,
            )  # fmt: skip
        return {**cell, "plan": model.plan.summary(), "profiled_disk_bytes_per_s": profiled, "requests": rows}


def profile(folder: Path, device: str, env: dict[str, str]) -> dict[str, Any]:
    """Profile this machine into the cache that `env` names."""
    command = [sys.executable, "-m", "cli.main", "profile", str(folder), "--device", device, "--link", LINK, "--json"]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if run.returncode:
        raise BenchError(run.stderr.strip())
    result: dict[str, Any] = json.loads(run.stdout)
    return result


def judge(cell: dict[str, Any]) -> dict[str, Any]:
    """The errors of a cell: medians over its later requests."""
    later = cell["requests"][2:]
    out: dict[str, Any] = {}
    for kind in ("told", "model"):
        for what in ("decode", "ttft"):
            out[f"{kind}_{what}"] = statistics.median(r[f"{kind}_{what}_s"] / r[f"{what}_s"] - 1 for r in later)
    out["first_decode"] = cell["requests"][0]["told_decode_s"] / cell["requests"][0]["decode_s"] - 1
    rates = [r["disk_bytes_per_s"] for r in later if r["disk_bytes_per_s"]]
    out["drift"] = statistics.median(rates) / cell["profiled_disk_bytes_per_s"] - 1 if rates else None
    return out


def cell_key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells a cell from another."""
    return tuple(row[k] for k in ("model", "percent", "batch", "prompt", "device"))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and 90th percentile of the absolute errors over all cells."""
    out = {}
    for what in ("told_decode", "told_ttft", "model_decode", "model_ttft", "first_decode"):
        errors = sorted(abs(r["errors"][what]) for r in rows)
        out[what] = {"median": statistics.median(errors), "p90": errors[min(len(errors) - 1, int(0.9 * len(errors)))]}
    return out


def main() -> int:
    parser = flags(__doc__, "predict", worker=2)
    parser.add_argument("--svg", type=Path, help="draw predicted against measured")
    parser.add_argument("--only", type=int, help="run the first so many cells")
    parser.add_argument(
        "--retake", metavar="MODEL:DEVICE", help="only these cells; the others stay as they are in --out"
    )
    args = parser.parse_args()
    if args.worker is not None:
        print(json.dumps(worker(Path(args.worker[0]), json.loads(args.worker[1]))))
        return 0
    load = load_average()
    folders = {n: checkpoints.make(checkpoints.SPECS[n], args.scratch) for n in (DENSE, MOE)}
    rows = []
    with tempfile.TemporaryDirectory(prefix="offload-bench-") as cache:
        env = {**worker_env(), "OFFLOAD_CACHE": cache}
        for name in ("cpu", "emulated"):
            say(f"profiling ({name})")
            profiled = profile(folders[DENSE], name, env)
        todo = cells()[: args.only]
        if args.retake is not None:
            todo = [c for c in todo if f"{c['model']}:{c['device']}" == args.retake and c["percent"] < 100]
        for i, cell in enumerate(todo, 1):
            command = [sys.executable, str(Path(__file__)), "--worker", str(folders[cell["model"]]), json.dumps(cell)]
            run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            if run.returncode:
                raise BenchError(f"{cell}: {run.stderr.strip()[-400:]}")
            row = json.loads(run.stdout)
            row["errors"] = judge(row)
            rows.append(row)
            e = row["errors"]
            say(f"{i}/{len(todo)} {cell['model']} {cell['device']} {cell['percent']}% batch {cell['batch']} prompt "
                f"{cell['prompt']}: told {100 * e['told_decode']:+.0f}% / {100 * e['told_ttft']:+.0f}%, model "
                f"{100 * e['model_decode']:+.0f}% / {100 * e['model_ttft']:+.0f}%"
                + (f", disk drift {100 * e['drift']:+.0f}%" if e["drift"] is not None else ""))  # fmt: skip
    if args.retake is not None:
        taken = {cell_key(r): {**r, "retaken": today()} for r in rows}
        rows = [taken.get(cell_key(r), r) for r in json.loads(args.out.read_text())["cells"]]
    total = summary(rows)
    write_json(args.out, {
        **head("predict", load),
        "targets": {"median": MEDIAN_TARGET, "p90": P90_TARGET}, "link": LINK, "profile": profiled,
        "summary": total, "cells": rows,
    })  # fmt: skip
    for what, value in total.items():
        say(f"{what}: median {100 * value['median']:.1f}%, 90th percentile {100 * value['p90']:.1f}%")
    if args.svg is not None:
        draw(rows, args.svg)
    return 0


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """Predicted against measured decode rates, log-log: hollow as told, filled by the model at the run's speeds."""
    import math

    size, left = 460, 60
    points = []
    for row in rows:
        for r in row["requests"][2:]:
            measured = row["batch"] / r["decode_s"]
            points.append((measured, row["batch"] / r["told_decode_s"], row, False))
            points.append((measured, row["batch"] / r["model_decode_s"], row, True))
    low = math.floor(math.log10(min(min(p[0], p[1]) for p in points)) * 2) / 2
    high = math.ceil(math.log10(max(max(p[0], p[1]) for p in points)) * 2) / 2

    def at(value: float) -> float:
        return (math.log10(value) - low) / (high - low) * size

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + size + 190} {size + 70}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="20" font-size="15">decode tokens/s: predicted against measured</text>',
        f'<rect x="{left}" y="30" width="{size}" height="{size}" fill="none" stroke="#999"/>',
    ]
    for share, colour in ((0.0, "#333"), (0.1, "#bbb"), (-0.1, "#bbb")):
        shift = math.log10(1 + share) / (high - low) * size
        parts.append(f'<line x1="{left}" y1="{30 + size - shift:.1f}" x2="{left + size}" y2="{30 - shift:.1f}" '
                     f'stroke="{colour}" stroke-dasharray="{"" if share == 0 else "4 3"}"/>')  # fmt: skip
    tick = low
    while tick <= high:
        x = left + at(10**tick)
        parts.append(f'<text x="{x:.0f}" y="{size + 46}" text-anchor="middle">{10**tick:.3g}</text>')
        parts.append(f'<text x="{left - 6}" y="{34 + size - at(10**tick):.0f}" text-anchor="end">{10**tick:.3g}</text>')
        tick += 0.5
    kinds = {(DENSE, "cpu"): "#3b7dd8", (MOE, "cpu"): "#2a9d6f", (DENSE, "emulated"): "#d98a2b",
             (MOE, "emulated"): "#c04f8f"}  # fmt: skip
    for measured, predicted, row, filled in points:
        colour = kinds[row["model"], row["device"]]
        fill = colour if filled else "none"
        parts.append(f'<circle cx="{left + at(measured):.1f}" cy="{30 + size - at(predicted):.1f}" r="3.5" '
                     f'fill="{fill}" stroke="{colour}" fill-opacity="0.7"/>')  # fmt: skip
    for i, ((name, device), colour) in enumerate(kinds.items()):
        y = 60 + 20 * i
        parts.append(f'<circle cx="{left + size + 16}" cy="{y - 4}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{left + size + 26}" y="{y}">{name}, {device}</text>')
    parts.append(f'<text x="{left + size + 10}" y="150">hollow: as told</text>')
    parts.append(f'<text x="{left + size + 10}" y="166">filled: at the run\'s speeds</text>')
    parts.append(f'<text x="{left + size + 10}" y="182">dashed: ±10%</text>')
    parts.append(f'<text x="{left + size / 2}" y="{size + 64}" text-anchor="middle">measured</text></svg>')
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(parts) + "\n")


if __name__ == "__main__":
    run_script(main)

"""Does the planner choose well? Its plan against the best of a grid of hand-set ones, all measured.

Cells are few and telling: dense and mixture of experts in half of their size, and a dense model on an emulated device.
In each, every combination of the choices there are (`--set`) that fits is run in turn, round after round, on the same
request; what counts is the time of the whole request, median over the rounds. Regret is the planner's time over the
best one's, less 1; a cell's own spread is the interquartile range of the planner's rounds over their median.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import checkpoints
from common import flags, head, in_process, load_average, run_script, say, worker_env, write_json
from predict import DENSE, LINK, MOE, OVERHEAD, profile

TARGET = 0.05
CELLS: dict[str, dict[str, Any]] = {
    "dense, half in RAM": {"model": DENSE, "percent": 50, "batch": 1, "prompt": 32, "new": 12, "device": "cpu",
                           "choices": {"lookahead": (0, 1, 2), "resident_layers": (1, 3), "prefill_chunk": (32,)}},
    "experts, half in RAM": {"model": MOE, "percent": 50, "batch": 1, "prompt": 32, "new": 24, "device": "cpu",
                             "choices": {"expert_slots": (96, 128, 150), "resident_layers": (3, 5),
                                         "prefill_chunk": (32,)}},
    "dense, long prompt": {"model": DENSE, "percent": 75, "batch": 1, "prompt": 512, "new": 8, "device": "cpu",
                           "choices": {"prefill_chunk": (64, 128, 256, 512), "lookahead": (2,)}},
    "dense, emulated device": {"model": DENSE, "percent": 50, "batch": 1, "prompt": 32, "new": 12,
                               "device": "emulated",
                               "choices": {"lookahead": (0, 1, 2), "resident_layers": (1, 3),
                                           "prefill_chunk": (32,)}},
}  # fmt: skip


def worker(folder: Path, cell: dict[str, Any], choice: dict[str, int]) -> dict[str, Any]:
    """One plan, in this process: seconds of the request after a first one."""
    import offload

    size = sum(f.stat().st_size for f in checkpoints.shard_files(folder))
    room = size * cell["percent"] // 100
    options: dict[str, Any] = {"ram": room + OVERHEAD, "device": "cpu"}
    if cell["device"] == "emulated":
        options = {"ram": int(size * 1.1) + OVERHEAD, "device": "emulated", "link": LINK, "vram": room + (300 << 20)}
    context = cell["batch"] * (cell["prompt"] + cell["new"]) + 16
    try:
        with offload.load(folder, context=context, overrides=choice, **options) as model:
            prompts = [[(7 * j + 31 * b) % 4000 for j in range(cell["prompt"])] for b in range(cell["batch"])]
            for _ in range(2):
                stats = model.run(prompts, max_new_tokens=cell["new"], ignore_eos=True).stats
            plan = model.plan
            return {
                "seconds": stats.total_s, "decode_tokens_per_s": stats.decode_tokens_per_s, "ttft_s": stats.ttft_s,
                "plan": plan.summary(), "lookahead": plan.compute.lookahead, "chunk": plan.prefill_chunk,
                "expert_slots": plan.expert_slots, "pinned": len(plan.compute.pinned),
            }  # fmt: skip
    except offload.UsageError as e:
        return {"refused": str(e)}


def main() -> int:
    parser = flags(__doc__, "regret", rounds=3, worker=3)
    args = parser.parse_args()
    if args.worker is not None:
        folder, cell, choice = args.worker
        print(json.dumps(worker(Path(folder), json.loads(cell), json.loads(choice))))
        return 0
    load = load_average()
    folders = {n: checkpoints.make(checkpoints.SPECS[n], args.scratch) for n in (DENSE, MOE)}
    with tempfile.TemporaryDirectory(prefix="offload-bench-") as cache:
        env = {**worker_env(), "OFFLOAD_CACHE": cache}
        for device in ("cpu", "emulated"):
            say(f"profiling ({device})")
            profile(folders[DENSE], device, env)
        out = {name: one(name, cell, folders[cell["model"]], args.rounds, env) for name, cell in CELLS.items()}
    write_json(args.out, {
        **head("regret", load),
        "rounds": args.rounds, "target": TARGET, "cells": out,
    })  # fmt: skip
    return 0


def one(name: str, cell: dict[str, Any], folder: Path, rounds: int, env: dict[str, str]) -> dict[str, Any]:
    """One cell: every plan in turn, round after round."""
    choices = cell["choices"]
    plans = [{}] + [dict(zip(choices, v, strict=True)) for v in itertools.product(*choices.values())]
    rows: list[dict[str, Any]] = [{"set": p, "runs": []} for p in plans]
    for _ in range(rounds):
        for row in rows:
            if "refused" in row:
                continue
            run = _run(folder, cell, row["set"], env)
            if "refused" in run:
                row["refused"] = run["refused"]
            else:
                row["runs"].append(run)
    ran = [r for r in rows if r["runs"]]
    for row in ran:
        row["seconds"] = statistics.median(x["seconds"] for x in row["runs"])
    own, best = rows[0], min(ran[1:], key=lambda r: r["seconds"])
    times = sorted(x["seconds"] for x in own["runs"])
    spread = (times[-1 - len(times) // 4] - times[len(times) // 4]) / own["seconds"]
    regret = own["seconds"] / best["seconds"] - 1
    say(f"{name}: planner {own['seconds']:.2f} s, best of {len(ran) - 1} by hand {best['seconds']:.2f} s "
        f"({best['set']}): regret {100 * regret:+.1f}%, spread {100 * spread:.1f}%")  # fmt: skip
    return {"cell": cell, "rows": rows, "regret": regret, "spread": spread, "best": best["set"],
            "within": regret <= max(TARGET, spread)}  # fmt: skip


def _run(folder: Path, cell: dict[str, Any], choice: dict[str, int], env: dict[str, str]) -> dict[str, Any]:
    plain = {k: v for k, v in cell.items() if k != "choices"}
    return in_process(Path(__file__), env, folder, json.dumps(plain), json.dumps(choice))


if __name__ == "__main__":
    run_script(main)

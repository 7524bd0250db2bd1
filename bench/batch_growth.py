"""How tokens per second grow with the batch, until computing is what limits: measured, predicted, and the ceiling.

For each batch size one process in a fresh memory cgroup loads the model under the limit, with room for just that batch,
asks the planner what it predicts, and answers as many requests of equal length at once. What counts is the median step
in which all of them decode. Without `--batched` they are one batch of `generate`; with it they go through the batch
runner, which then is told how many sequences run at once.

The ceiling is what the disk allows (reading in every step what the limit cannot hold) and what the products of a step
take with everything in memory. The machine is profiled first, into a cache of its own, and what one size's run teaches
the planner it knows for the next. `--svg` draws all of it. Sizes that would not be done in time are left out, and the
result says so.

It compares with no other engine and does not measure prompts.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import batch_job
import predict
import tables
from batch_job import Request
from batch_runs import BASE, GRACE_S, LEAST_S, Bench, common_options
from checkpoints import SPECS
from common import RESULTS, BenchError, say, worker_env, write_json

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
WIDTH, HEIGHT, LEFT, TOP = 460, 320, 60, 36
COLOURS = {"measured": "#3b7dd8", "predicted": "#d98a2b", "disk": "#999", "compute": "#2a9d6f"}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All sizes; the result is written after each."""
    spec = SPECS[args.model]
    bench = Bench(spec, args)
    bench.measure_disk()
    rates = {r["tokens"]: r for r in bench.rates(args.batches)}
    rows: list[dict[str, Any]] = []
    left_out: list[int] = []

    def result(finished: bool) -> dict[str, Any]:
        out = {
            **bench.facts("batch-growth", f"batch-growth-{spec.name}"), "finished": finished, "rows": rows,
            "left_out": left_out, "prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens,
            "batched": args.batched, "rates": list(rates.values()),
        }  # fmt: skip
        write_json(args.out, out)
        return out

    with tempfile.TemporaryDirectory(prefix="offload-bench-") as cache:
        env = {**worker_env(), "OFFLOAD_CACHE": cache}
        say("profiling")
        predict.profile(bench.folder, "cpu", env)
        last = 0.0
        for size in args.batches:
            if bench.left < max(LEAST_S, 2.2 * last):  # twice the sequences take at most twice as long
                left_out.append(size)
                say(f"batch {size}: no time was left")
                continue
            requests = equal(size, args.prompt_tokens, args.new_tokens, spec.config["vocab_size"])
            file = batch_job.save(requests, bench.work / "requests.json")
            words = ["--requests", file, "--ram", bench.limit, *(["--batched"] if args.batched else [])]
            with bench.group() as group:
                command = bench.worker("forced", *words)
                run = bench.measured(group, "forced", command, timeout=bench.left + GRACE_S, env=env)
            last = run["limit"]["wall_s"]
            if "error" in run or not run.get("tokens_per_s"):
                rows.append({"batch": size, "error": run.get("error", "no step with the whole batch")})
                say(f"batch {size}: {rows[-1]['error']}")
                continue
            room = bench.limit - max(run["base_rss_bytes"], BASE // 2)
            most = batch_job.ceiling(spec, size, room=room, bandwidth=bench.bandwidth, rate=rates.get(size))
            run.pop("answers")
            rows.append({**run, "ceiling": most})
            say(f"batch {size}: {run['tokens_per_s']:.2f} tokens/s, predicted {run['predicted_tokens_per_s']:.2f}; "
                f"disk allows {most['disk']:.1f}, compute {most['compute']:.1f}")  # fmt: skip
            result(False)
    bench.measure_disk()
    bench.close()
    return result(True)


def equal(count: int, prompt: int, new: int, vocab: int) -> list[Request]:
    """`count` requests of one length, with other tokens each."""
    return batch_job.over_documents(count, count, 1, prompt - 1, new, vocab) if prompt > 1 else []


def draw(result: dict[str, Any], out: Path) -> None:
    """Tokens per second over the batch, both by powers of two: measured, predicted, and what disk and compute allow."""
    rows = [r for r in result["rows"] if "error" not in r]
    if not rows:
        raise BenchError("no batch size was measured: there is nothing to draw")
    curves = {
        "measured": [(r["batch"], r["tokens_per_s"]) for r in rows],
        "predicted": [(r["batch"], r["predicted_tokens_per_s"]) for r in rows],
        "disk": [(r["batch"], r["ceiling"]["disk"]) for r in rows if r["ceiling"]["disk"]],
        "compute": [(r["batch"], r["ceiling"]["compute"]) for r in rows if r["ceiling"]["compute"]],
    }
    xs = [math.log2(r["batch"]) for r in rows]
    ys = [math.log2(y) for name in ("measured", "predicted") for _, y in curves[name]]
    low, high = math.floor(min(ys)), math.ceil(max(ys)) + 1
    first, last = min(xs), max(max(xs), min(xs) + 1)

    def at(size: float, rate: float) -> tuple[float, float]:
        x = LEFT + (math.log2(size) - first) / (last - first) * WIDTH
        return x, TOP + HEIGHT - (math.log2(rate) - low) / (high - low) * HEIGHT

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 170} {TOP + HEIGHT + 50}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="15">decode tokens/s over the batch: {result["model"]["name"]} in '
        f"{result['limit_bytes'] / (1 << 30):.3g} GiB</text>",
        f'<clipPath id="plot"><rect x="{LEFT}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}"/></clipPath>',
        f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#999"/>',
    ]
    for r in rows:
        x, _ = at(r["batch"], 1)
        parts.append(f'<text x="{x:.0f}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{r["batch"]}</text>')
    for power in range(low, high + 1, max(1, (high - low) // 8)):
        _, y = at(1, 2.0**power)
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.0f}" text-anchor="end">{2.0**power:g}</text>')
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{LEFT + WIDTH}" y2="{y:.1f}" stroke="#eee"/>')
    dashes = {"predicted": "5 4", "disk": "2 3", "compute": "2 3"}
    for i, (name, points) in enumerate((n, p) for n, p in curves.items() if p):
        colour = COLOURS[name]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*p) for p in points))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2" '
                     f'stroke-dasharray="{dashes.get(name, "")}" clip-path="url(#plot)"/>')  # fmt: skip
        if name in ("measured", "predicted"):
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour if name == "measured" else "white"}" '
                f'stroke="{colour}"/>'
                for x, y in (at(*p) for p in points)
            ]
        y, x = TOP + 18 + 20 * i, LEFT + WIDTH + 12
        parts.append(f'<line x1="{x}" y1="{y - 4}" x2="{x + 22}" y2="{y - 4}" stroke="{colour}" stroke-width="2" '
                     f'stroke-dasharray="{dashes.get(name, "")}"/>')  # fmt: skip
        label = f"{name} allows" if name in ("disk", "compute") else name
        parts.append(f'<text x="{x + 28}" y="{y}">{label}</text>')
    parts.append(f'<text x="{LEFT + WIDTH / 2}" y="{TOP + HEIGHT + 36}" text-anchor="middle">batch</text></svg>')
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(parts) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", choices=sorted(SPECS))
    common_options(p, 600)
    p.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    p.add_argument("--prompt-tokens", type=int, default=8, help="of each request, 2 or more")
    p.add_argument("--new-tokens", type=int, default=8)
    p.add_argument("--batched", action="store_true", help="through the batch runner instead of one padded batch")
    p.add_argument("--svg", type=Path, help="draw the result")
    p.add_argument("--out", type=Path, help="result file (default: bench/results/batch-growth-MODEL.json)")
    args = p.parse_args(argv)
    if args.prompt_tokens < 2 or args.new_tokens < 2 or min(args.batches) < 1:
        p.error("--prompt-tokens and --new-tokens must be 2 or more, --batches 1 or more")
    args.out = args.out or RESULTS / f"batch-growth-{args.model}.json"
    try:
        result = measure(args)
        if args.svg is not None:
            draw(result, args.svg)
    except BenchError as e:
        say(f"error: {e}")
        return 1
    print(tables.render(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

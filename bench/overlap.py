"""How well transfers hide behind compute: wall time of a decode step against the busiest resource of its timeline.

Two cases on the 3B-shaped bf16 checkpoint (`checkpoints.py`), each with as many blocks streamed as make transfers
about as long as compute: over an emulated link (figures are *emulated*), and from disk on the CPU. The floor of a
step is the longest of the busy times of compute, link and disk; their sum is what a run without overlap would take.

It does not measure other engines (`compare.py`), nor how fast a link or a disk is (`disk_fio.py`).
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import checkpoints
from common import flags, head, load_average, say, write_json

LANES = ("compute", "link", "disk")


def one(folder: Path, tokens: int, trace: Path | None, **options: Any) -> dict[str, Any]:
    """Decode `tokens` and read the step times off the timeline."""
    import torch

    import offload

    keep = str(trace) if trace is not None else str(folder.parent / "work-trace.json")
    with offload.load(folder, context=256, trace=keep, **options) as model:
        cache = model.engine.new_cache(256)
        g = torch.Generator().manual_seed(7)
        vocab = model.hf.config.vocab_size

        def step(n: int) -> tuple[float, float]:
            import time

            began = time.perf_counter()
            model.hf(input_ids=torch.randint(0, vocab, (1, n), generator=g), past_key_values=cache, use_cache=True,
                     logits_to_keep=1)  # fmt: skip
            return began, time.perf_counter()

        step(8)
        for _ in range(2):
            step(1)  # the pipeline fills
        spans = [step(1) for _ in range(tokens)]
        recorded = model.engine.trace
        assert recorded is not None
        rows = []
        for began, ended in spans:
            busy = {lane: recorded.busy(lane, began, ended) for lane in LANES}
            wall = ended - began
            rows.append({"wall_s": wall, "busy_s": busy, "ratio": wall / max(busy.values())})
        # a slice of the timeline short enough to look at
        first, last = spans[0][0], spans[min(1, len(spans) - 1)][1]
        recorded.slices = [s for s in recorded.slices if s[3] > first and s[2] < last]
        return {
            "plan": model.plan.summary(),
            "streamed_blocks": len(model.engine._memory.streamed()),
            "wall_s": statistics.median(r["wall_s"] for r in rows),
            "busy_s": {lane: statistics.median(r["busy_s"][lane] for r in rows) for lane in LANES},
            "serial_s": statistics.median(sum(r["busy_s"].values()) for r in rows),
            "ratio": statistics.median(r["ratio"] for r in rows),
            "steps": rows,
        }


def main() -> int:
    """Run both cases and write `bench/results/overlap.json`."""
    parser = flags(__doc__, "overlap")
    parser.add_argument("--model", default="llama-3b", choices=sorted(checkpoints.SPECS))
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--link", default="2GB", help="rate of the emulated link; two cores share copies and compute")
    parser.add_argument("--vram", default="5400MB", help="emulated device memory")
    parser.add_argument("--resident", default="84%", help="weights kept in memory for the CPU and disk case")
    parser.add_argument("--svg", type=Path, help="draw two steps of the emulated case")
    args = parser.parse_args()
    spec = checkpoints.SPECS[args.model]
    folder = checkpoints.make(spec, args.scratch)
    load = load_average()
    trace = args.scratch / "overlap-trace.json"
    emulated = one(folder, args.tokens, trace, device="emulated", vram=args.vram, link=args.link)
    say(f"emulated link {args.link}/s: wall {emulated['wall_s']:.3f} s, ratio {emulated['ratio']:.2f}")
    disk = one(folder, args.tokens, None, resident=args.resident)
    say(f"CPU and disk: wall {disk['wall_s']:.3f} s, ratio {disk['ratio']:.2f}")
    write_json(args.out, {
        **head("overlap", load),
        "model": args.model, "target_ratio": 1.10,
        "cases": {
            "emulated": {**emulated, "link": args.link, "vram": args.vram, "label": "emulated"},
            "cpu+disk": {**disk, "resident": args.resident},
        },
    })  # fmt: skip
    if args.svg is not None:
        draw(json.loads(trace.read_text()), args.svg, f"two decode steps, emulated link of {args.link}/s")
    return 0


def draw(trace: dict[str, Any], out: Path, title: str) -> None:
    """A Chrome trace as a picture: a lane per resource."""
    events = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    if not events:
        return
    lanes = [lane for lane in ("compute", "stall", "link", "disk") if any(e["cat"] == lane for e in events)]
    begin = min(e["ts"] for e in events)
    span = max(e["ts"] + e["dur"] for e in events) - begin
    width, left, row, gap = 1000, 80, 26, 8
    colours = {"compute": "#4c78a8", "stall": "#e45756", "link": "#72b7b2", "disk": "#f2a541"}
    height = 40 + len(lanes) * (row + gap) + 26
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 20} {height}" font-family="sans-serif">',
        f'<rect width="100%" height="100%" fill="white"/><text x="10" y="22" font-size="15">{title}</text>',
    ]
    for i, lane in enumerate(lanes):
        y = 36 + i * (row + gap)
        parts.append(f'<text x="10" y="{y + 17}" font-size="13">{lane}</text>')
        parts.append(f'<rect x="{left}" y="{y}" width="{width}" height="{row}" fill="#f4f4f4"/>')
        for e in events:
            if e["cat"] == lane:
                x = left + (e["ts"] - begin) / span * width
                w = max(0.4, e["dur"] / span * width)
                label = f"{e['name']}: {e['dur'] / 1000:.1f} ms"
                parts.append(
                    f'<rect x="{x:.1f}" y="{y}" width="{w:.1f}" height="{row}" fill="{colours[lane]}" '
                    f'stroke="white" stroke-width="0.4"><title>{label}</title></rect>'
                )
    y = 36 + len(lanes) * (row + gap) + 12
    for k in range(6):
        x = left + k / 5 * width
        parts.append(
            f'<text x="{x:.0f}" y="{y}" font-size="11" text-anchor="middle">{k / 5 * span / 1000:.0f} ms</text>'
        )
    parts.append("</svg>")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(parts) + "\n")


if __name__ == "__main__":
    sys.exit(main())

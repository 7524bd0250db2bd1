"""Rows of `offload bench` as Markdown, JSON or CSV."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from offload.sizes import format_size

if TYPE_CHECKING:
    from offload.benchmark import BenchRow


def table(rows: list[BenchRow], form: str) -> str:
    """`rows` as text ending in a newline; `form` is `md`, `json` or `csv`."""
    plain = [{**asdict(r), "error": r.error} for r in rows]
    if form == "json":
        return json.dumps(plain, indent=1) + "\n"
    if form == "csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, list(plain[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(plain)
        return out.getvalue()
    lines = [
        "| model | size | params | device | test | | t/s | predicted | error | of floor |",
        "|---|---:|---:|---|---|---|---:|---:|---:|---:|",
    ]
    for r in rows:
        params = f"{r.params / 1e9:.2f} B" if r.params >= 1e8 else f"{r.params / 1e6:.2f} M"
        predicted = f"{r.predicted:.2f}" if r.predicted is not None else "-"
        error = f"{100 * r.error:+.0f}%" if r.error is not None else "-"
        lines.append(
            f"| {r.model} | {format_size(r.size)} | {params} | {r.device} | {r.test} | {r.state} "
            f"| {r.tokens_per_s:.2f} ± {r.deviation:.2f} | {predicted} | {error} | {100 * r.share_of_floor:.0f}% |"
        )
    return "\n".join(lines) + "\n"

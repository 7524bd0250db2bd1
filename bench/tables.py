"""Makes the README's tables from `bench/results/*.json`. Measures nothing.

Between `<!-- bench:NAME -->` and `<!-- /bench -->` the README gets the table of `results/NAME.json`; everything else
stays as it is. With `--check` nothing is written and a README that is out of date is an error.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import batch_tables
import tables_kv
import tables_moe
from common import GIB, RESULTS, ROOT, BenchError, on_machine, say, shown_rate, shown_times

_MARKED = re.compile(r"(<!-- bench:([\w.-]+) -->\n)(.*?)(<!-- /bench -->)", re.DOTALL)
_OPEN = re.compile(r"<!-- bench:[\w.-]+ -->")
NAMES = {
    "ours": "**offload**",
    "llama.cpp": "llama.cpp, bf16, memory-mapped",
    "accelerate": "accelerate, disk offload (best `max_memory` found)",
    "transformers-auto": 'transformers, `device_map="auto"`',
}
Result = dict[str, Any]


def render(result: Result) -> str:
    """A result as Markdown, with the facts a reader needs to place it."""
    try:
        return _RENDERERS[result["kind"]](result)
    except KeyError as e:
        raise BenchError(f"result {result.get('name')!r} cannot be shown: it lacks {e}") from e


def _compare(result: Result) -> str:
    if result.get("resident"):
        return _resident(result)
    lines = [
        "| engine | tokens/s cold | tokens/s warm | ratio | start to first token | peak memory | same tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    summary = result["summary"]
    for engine in sorted(summary, key=list(NAMES).index):
        entry = summary[engine]
        states = [entry[c] for c in ("cold", "warm") if c in entry]
        if not states:
            lines.append(f"| {NAMES[engine]} | {entry['error']} | | | | | |")
            continue
        speeds = [shown_rate(entry[c]["decode_tokens_per_s"]) if c in entry else "–" for c in ("cold", "warm")]
        ratio = result["ratios"].get(engine, {})
        times = " / ".join(shown_times(ratio[k]) for k in ("cold_decode", "warm_decode") if k in ratio)
        start = " / ".join(f"{s['start_to_first_token_s']:.1f} s" for s in states)
        peak = max(s["peak_rss_bytes"] for s in states) / GIB
        lines.append(
            f"| {NAMES[engine]} | {' | '.join(speeds)} | {times} | {start} | {peak:.2f} GiB | {_same(result, engine)} |"
        )
    return "\n".join([*lines, "", _setting(result), "", _floor(result)]).rstrip()


def _resident(result: Result) -> str:
    lines = [
        "| engine | tokens/s | ms a token | ratio | start to first token | peak memory | same tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    summary = result["summary"]
    for engine in sorted(summary, key=list(NAMES).index):
        if "warm" not in summary[engine]:
            lines.append(f"| {NAMES[engine]} | {summary[engine]['error']} | | | | | |")
            continue
        warm = summary[engine]["warm"]
        rate, ratio = warm["decode_tokens_per_s"], result["ratios"].get(engine, {}).get("warm_decode")
        lines.append(
            f"| {NAMES[engine]} | {shown_rate(rate)} | {1000 / rate:.1f} | {shown_times(ratio) if ratio else ''} | "
            f"{warm['start_to_first_token_s']:.1f} s | {warm['peak_rss_bytes'] / GIB:.2f} GiB | "
            f"{_same(result, engine)} |"
        )
    return "\n".join([*lines, "", _setting(result)])


def _setting(result: Result) -> str:
    model, m = result["model"], result["machine"]
    ours = result["summary"].get("ours", {})
    rounds = max((s["runs"] for s in ours.values() if isinstance(s, dict)), default=0)
    limited = all(s["limited"] for e in result["summary"].values() for s in e.values() if isinstance(s, dict))
    if result.get("resident"):
        where, how = "all in memory", "the median step of the second half"
    else:
        where = f"in a memory cgroup of {result['limit_bytes'] / GIB:.3g} GiB" if limited else "WITHOUT a memory limit"
        how = "cold / warm"
    machine = on_machine(m) + (f", llama.cpp {result['llama_cpp']}" if result.get("llama_cpp") else "")
    return (
        f"{result['name']}: {model['weight_bytes'] / GIB:.2f} GiB of random bf16 weights {where}; "
        f"{result['new_tokens']} tokens, fed one at a time, after a prompt of {result['prompt_tokens']}; {how}; "
        f"median of {rounds} rounds; ratio: offload's tokens/s over the engine's. "
        f"{machine}, disk {result['disk']['bandwidth'] / 1e9:.2f} GB/s, "
        f"{result['date'].split()[0]}."
    )


def _floor(result: Result) -> str:
    floor = result["floor"]
    if floor["floor_s"] is None:
        return ""
    parts = []
    if floor["read_s"] is not None:
        parts.append(f"{floor['bytes_per_token'] / 1e9:.2f} GB must be read per token: {floor['read_s']:.3f} s")
    if floor["compute_s"] is not None:
        parts.append(f"computing one takes {floor['compute_s']:.3f} s with all weights in memory")
    shares = ", ".join(f"{100 * s:.0f} % ({cache})" for cache, s in floor["share"].items())
    return f"Floor ({floor['bound']}-bound): {'; '.join(parts)}. offload reaches {shares} of it."


def _same(result: Result, engine: str) -> str:
    runs = [r for r in result["equality"]["runs"] if r["engine"] == engine and not r.get("all_in_memory")]
    if not runs:
        return "–"
    worst = min(runs, key=lambda r: r["equal"] / max(1, r["positions"]))
    text = f"{worst['equal']} of {worst['positions']}"
    ulps = max(r["worst_ulps"] for r in runs)
    return f"{text} (≤ {ulps:.0f} ulp)" if ulps else text


def _startup(result: Result) -> str:
    lines = ["| command | median |", "|---|---|"]
    for r in result["rows"]:
        what = r["what"] if "," in r["what"] else f"`{r['what']}`"
        cold = ", caches dropped" if r.get("cache") == "cold" else ""
        lines.append(f"| {what}{cold} | {r['error'] if 'error' in r else format(r['median_s'], '.2f') + ' s'} |")
    return "\n".join([*lines, "", f"{on_machine(result['machine'])}, {result['date'].split()[0]}."])


def _overlap(result: Result) -> str:
    lines = [
        "| case | step | compute busy | link busy | disk busy | sum | step ÷ busiest |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, case in result["cases"].items():
        busy = " | ".join(f"{case['busy_s'][lane]:.3f} s" for lane in ("compute", "link", "disk"))
        what = f"emulated device, link {case['link']}/s" if name == "emulated" else "CPU and disk"
        lines.append(f"| {what} | {case['wall_s']:.3f} s | {busy} | {case['serial_s']:.3f} s | {case['ratio']:.2f} |")
    where = f"{result['model']}, decode, batch 1; target {result['target_ratio']:.2f}. {on_machine(result['machine'])}"
    return "\n".join([*lines, "", f"{where}, {result['date'].split()[0]}."])


def _disk(result: Result) -> str:
    return (
        f"Disk, direct, 1 MiB × 8, same file in turn: fio {result['fio'] / 1e9:.2f} GB/s, our reader "
        f"{result['ours'] / 1e9:.2f} GB/s; median of {len(result['pairs'])} pairs' ratios {result['ratio']:.2f} "
        f"(target {result['target_ratio']:.2f}), {result['date'].split()[0]}."
    )


def _predict(result: Result) -> str:
    lines = [
        "| cell | decode measured | as told | at the run's speeds | first token measured | as told "
        "| at the run's speeds | disk drift |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for c in result["cells"]:
        e, last = c["errors"], c["requests"][-1]
        what = f"{c['model']}, {c['device']}, {c['percent']}%, batch {c['batch']}, prompt {c['prompt']}"
        drift = f"{100 * e['drift']:+.0f}%" if e["drift"] is not None else "–"
        lines.append(
            f"| {what} | {shown_rate(c['batch'] / last['decode_s'])} tokens/s | {100 * e['told_decode']:+.0f}% | "
            f"{100 * e['model_decode']:+.0f}% | {last['ttft_s']:.2f} s | {100 * e['told_ttft']:+.0f}% | "
            f"{100 * e['model_ttft']:+.0f}% | {drift} |"
        )
    s = result["summary"]

    def both(name: str) -> str:
        return f"{100 * s[name]['median']:.1f} % / {100 * s[name]['p90']:.1f} %"

    cells = "\n".join(lines)
    again = sum("retaken" in c for c in result["cells"])
    retaken = f"{again} cells were taken again after a change to what is predicted of them. " if again else ""
    return (
        f"Error of {len(result['cells'])} cells, median / 90th percentile (targets 5 % / 15 %): at the speeds measured "
        f"in the same run, decode {both('model_decode')}, first token {both('model_ttft')}; as a user is told, "
        f"decode {both('told_decode')}, first token {both('told_ttft')}; at the very first request of a cell, decode "
        f"{both('first_decode')}.\n\n<details><summary>all cells</summary>\n\n{cells}\n\n</details>\n\n"
        f"{retaken}Errors are predicted over measured time, less 1; percent of the model that fits in memory; the "
        f"emulated device's link is {result['link']}/s. {on_machine(result['machine'])}, {result['date'].split()[0]}."
    )


def _regret(result: Result) -> str:
    lines = ["| cell | planner | best by hand | its choices | regret | own spread |", "|---|---|---|---|---|---|"]
    for name, c in result["cells"].items():
        best = min((r for r in c["rows"][1:] if r["runs"]), key=lambda r: r["seconds"])
        choices = ", ".join(f"{k}={v}" for k, v in best["set"].items())
        lines.append(
            f"| {name} | {c['rows'][0]['seconds']:.2f} s | {best['seconds']:.2f} s | {choices} "
            f"| {100 * c['regret']:+.1f}% | {100 * c['spread']:.1f}% |"
        )
    return "\n".join([*lines, "", f"Seconds of a whole request, median of {result['rounds']} rounds; target: "
                      f"{100 * result['target']:.0f} % or the cell's own spread. {on_machine(result['machine'])}, "
                      f"{result['date'].split()[0]}."])  # fmt: skip


_RENDERERS: dict[str, Callable[[Result], str]] = {
    "compare": _compare,
    "startup": _startup,
    "overlap": _overlap,
    "disk": _disk,
    "experts": tables_moe.experts,
    "linears": tables_moe.linears,
    "predict": _predict,
    "regret": _regret,
    "routing": tables_moe.routing,
    "hybrid": tables_moe.hybrid,
    "sparse": tables_kv.sparse,
    "long-context": tables_kv.long_context,
    "resume": tables_kv.resume,
    **{kind: lambda r, f=f: f(r, on_machine(r["machine"])) for kind, f in batch_tables.RENDERERS.items()},
}


def fill(text: str, results: Path) -> str:
    """`text` with every marked place filled from `results`. Raises `BenchError` for a place that cannot be."""

    def table(match: re.Match[str]) -> str:
        path = results / f"{match[2]}.json"
        try:
            result = json.loads(path.read_text())
        except FileNotFoundError:
            raise BenchError(f"the README asks for bench:{match[2]}, but {path.name} is not there") from None
        except ValueError as e:
            raise BenchError(f"{path.name} is not valid JSON") from e
        return f"{match[1]}{render(result)}\n{match[4]}"

    if len(_OPEN.findall(text)) != len(_MARKED.findall(text)):
        raise BenchError("a bench mark in the README has no <!-- /bench -->")
    return _MARKED.sub(table, text)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", action="store_true", help="fail if the README is out of date, write nothing")
    p.add_argument("--readme", type=Path, default=ROOT / "README.md")
    p.add_argument("--results", type=Path, default=RESULTS)
    args = p.parse_args(argv)
    try:
        before = args.readme.read_text(encoding="utf-8")
        after = fill(before, args.results)
    except (BenchError, OSError) as e:
        say(f"error: {e}")
        return 1
    if before == after:
        return 0
    if args.check:
        say(f"error: {args.readme.name} is out of date; run: python bench/tables.py")
        return 1
    args.readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

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
from common import GIB, RESULTS, ROOT, BenchError, say

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
        speeds = [_rate(entry[c]["decode_tokens_per_s"]) if c in entry else "–" for c in ("cold", "warm")]
        ratio = result["ratios"].get(engine, {})
        times = " / ".join(_times(ratio[k]) for k in ("cold_decode", "warm_decode") if k in ratio)
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
            f"| {NAMES[engine]} | {_rate(rate)} | {1000 / rate:.1f} | {_times(ratio) if ratio else ''} | "
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
    machine = _machine(m) + (f", llama.cpp {result['llama_cpp']}" if result.get("llama_cpp") else "")
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
    return "\n".join([*lines, "", f"{_machine(result['machine'])}, {result['date'].split()[0]}."])


def _overlap(result: Result) -> str:
    lines = [
        "| case | step | compute busy | link busy | disk busy | sum | step ÷ busiest |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, case in result["cases"].items():
        busy = " | ".join(f"{case['busy_s'][lane]:.3f} s" for lane in ("compute", "link", "disk"))
        what = f"emulated device, link {case['link']}/s" if name == "emulated" else "CPU and disk"
        lines.append(f"| {what} | {case['wall_s']:.3f} s | {busy} | {case['serial_s']:.3f} s | {case['ratio']:.2f} |")
    where = f"{result['model']}, decode, batch 1; target {result['target_ratio']:.2f}. {_machine(result['machine'])}"
    return "\n".join([*lines, "", f"{where}, {result['date'].split()[0]}."])


def _experts(result: Result) -> str:
    kt = {(c["shape"], c["dtype"], c["tokens"]): c for c in result["kt_cells"]}
    head = ["shape", "type", "tokens", "torch", "kernel", "memory", "kernel ÷ memory", "kernel ÷ torch"]
    head += ["kt-kernel"] if kt else []
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for c in result["cells"]:
        rates, peer = c["weight_bytes_per_s"], kt.get((c["shape"], c["dtype"], c["tokens"]))
        row = [
            c["shape"], c["dtype"], str(c["tokens"]), *(f"{rates[name] / 1e9:.1f}" for name in ("torch", "kernel")),
            f"{c['bandwidth'] / 1e9:.1f}", f"{100 * c['of_bandwidth']['kernel']:.0f} %",
            f"{c['kernel_over_torch']:.2f}×",
        ]  # fmt: skip
        if kt:
            row.append(f"{peer['weight_bytes_per_s']['kt-kernel'] / 1e9:.1f}" if peer else "–")
        lines.append(f"| {' | '.join(row)} |")
    whole = result["whole_model"]
    more = ""
    if whole is not None:
        speed = whole["tokens_per_s"]
        more = (
            f" {whole['model']} with all weights in memory decodes {speed['kernel']:.1f} tokens/s with the kernel and "
            f"{speed['torch']:.1f} with torch ({whole['ratio']:.2f}×), steps of each in turn."
        )
    peer_note = " kt-kernel: KTransformers' own, repacked, with as many threads as suited it best." if kt else ""
    return "\n".join([
        *lines, "",
        f"GB/s of the weights of the experts that the tokens chose, a layer's whole call ({result['threads']} threads, "
        f"{result['level']}); memory: torch reading, between calls; medians of {result['cells'][0]['rounds']} "
        f"rounds.{more}{peer_note} Load average {result['load_average_before']:.2f}. {_machine(result['machine'])}, "
        f"{result['date'].split()[0]}.",
    ])  # fmt: skip


def _routing(result: Result) -> str:
    rows = sorted(result["rows"], key=lambda r: r["tokens_per_s"])
    base = next(r for r in rows if r.get("name"))
    lru = next(r for r in rows if r["expert_policy"] == "lru" and r["expert_predictor"] == "none" and "name" not in r)
    best = max(r["tokens_per_s"] for r in rows)
    lines = [
        "| policy | prediction | found | fetched ahead in time | late | missed | MB read per token | tokens/s "
        "| over load on demand | over LRU |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        what = f"{r.get('name') or r['expert_policy']} | {r['expert_predictor']}"
        if (r["expert_policy"], r["expert_predictor"]) == ("router", "gate"):
            what = "**router** | **gate** (default)"
        shares = " | ".join(f"{100 * r[k]:.0f} %" for k in ("hit", "ahead", "late", "missed"))
        speed = r["tokens_per_s"]
        over = " | ".join(_times(speed / other["tokens_per_s"]) for other in (base, lru))
        lines.append(f"| {what} | {shares} | {r['read_per_token'] / 1e6:.0f} | {_rate(speed)} | {over} |")
    counted, size = result["counted"]["policies"], rows[0]["expert_bytes"]
    belady = counted["belady"]
    least = belady["missed_per_token"] * size
    rate = max(r["disk_rate"] for r in rows if r["disk_rate"])
    default = next(r for r in rows if (r["expert_policy"], r["expert_predictor"]) == ("router", "gate"))
    foreseen = "; ".join(
        f"{name} {100 * _mean([x['recall'] for x in f['layers'][1:]]):.0f} % with as many guesses as experts, "
        f"{100 * _mean([x['named'] for x in f['layers'][1:]]):.0f} % with up to twice as many"
        for name, f in result["foreseen"].items()
    )
    deep = ", ".join(
        f"{n} ahead {100 * a['router']:.0f} and {100 * a['corrected']:.0f} %" for n, a in enumerate(result["ahead"], 1)
    )
    guard = "; ".join(f"{name}: {100 * c['slower']:+.1f} %" for name, c in result["guard"]["cases"].items())
    again = ""
    if "date" in result["guard"]:
        taken = result["guard"]
        again = f" (taken on {taken['date'].split()[0]}, load average {taken['load_average_before']:.2f})"
    config = result["checkpoint"]
    return "\n".join([
        *lines, "",
        f"Belady's optimum on the same tokens: {100 * belady['hit']:.0f} % found, {least / 1e6:.0f} MB per token; at "
        f"the highest rate the disk gave any of these ({rate / 1e9:.2f} GB/s) no more than {rate / least:.1f} tokens/s "
        f"if nothing else took time. Without a clock: "
        + ", ".join(f"{n} {100 * c['hit']:.0f} %" for n, c in counted.items()) + ".",
        "",
        f"The default reaches {100 * default['tokens_per_s'] / best:.0f} % of the best (target 90 %).",
        "",
        f"Foreseen one layer ahead (bundled model, all layers but the first): {foreseen}. Over the last passes, with "
        f"as many guesses as experts, router alone and corrected: {deep}.",
        "",
        f"Useless predictions (limit {100 * result['guard']['limit']:.0f} %), slower than without: {guard}{again}.",
        "",
        f"{config['num_hidden_layers']} layers × {config['num_experts']} experts of {size / 1e6:.1f} MB, top "
        f"{config['num_experts_per_tok']}, {result['slots']} of {result['experts']} in memory; routing of the bundled "
        f"mixture of experts replayed, {result['new_tokens']} tokens after a prompt, "
        f"{100 * result['counted']['repeated']:.0f} % of a token's experts were its predecessor's; medians of "
        f"{result['rounds']} rounds. Load average {result['load_average_before']:.2f}. {_machine(result['machine'])}, "
        f"{result['date'].split()[0]}.",
    ])  # fmt: skip


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _hybrid(result: Result) -> str:
    lines = [
        "| link | prefill: CPU only | device only | both | decode: CPU only | device only | both | both ÷ device: "
        "prefill | decode | experts on the CPU |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        m = row["modes"]
        cells = [f"{m[k]['prefill_tokens_per_s']:.0f}" for k in ("cpu", "device", "both")]
        cells += [_rate(m[k]["decode_tokens_per_s"]) for k in ("cpu", "device", "both")]
        gains = [m["both"][k] / m["device"][k] for k in ("prefill_tokens_per_s", "decode_tokens_per_s")]
        on_cpu = m["both"]["on_cpu"]
        lines.append(
            f"| {row['link']} | {' | '.join(cells)} | {' | '.join(_times(g) for g in gains)} "
            f"| {f'{100 * on_cpu:.0f} %' if on_cpu is not None else '–'} |"
        )
    emulated = "The device is *emulated*: it computes on the same cores as the CPU. " * (result["device"] == "emulated")
    return "\n".join([
        *lines, "",
        f"tokens/s, {result['model']}, {100 * result['share']:.0f} % of it fit on the device, all in RAM; prompts of "
        f"{result['prompt']}, {result['new']} new tokens; medians of {result['rounds']} rounds. {emulated}"
        f"{_machine(result['machine'])}, {result['date'].split()[0]}.",
    ])  # fmt: skip


def _linears(result: Result) -> str:
    lines = ["| what | type | tokens | torch | kernel | kernel ÷ torch |", "|---" * 6 + "|"]
    for c in [*result["products"], *result["attention"]]:
        rates = " | ".join(f"{c['bytes_per_s'][name] / 1e9:.1f}" for name in ("torch", "kernel"))
        lines.append(f"| {c['what']} | {c['dtype']} | {c['size']} | {rates} | {c['kernel_over_torch']:.2f}× |")
    return "\n".join([
        *lines, "",
        f"GB/s of the weights, or of the keys and values ({result['threads']} threads, {result['level']}); tokens: of "
        f"the call, in attention those held; medians of {result['rounds']} rounds. Load average "
        f"{result['load_average_before']:.2f}. {_machine(result['machine'])}, {result['date'].split()[0]}.",
    ])  # fmt: skip


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
            f"| {what} | {_rate(c['batch'] / last['decode_s'])} tokens/s | {100 * e['told_decode']:+.0f}% | "
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
        f"emulated device's link is {result['link']}/s. {_machine(result['machine'])}, {result['date'].split()[0]}."
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
                      f"{100 * result['target']:.0f} % or the cell's own spread. {_machine(result['machine'])}, "
                      f"{result['date'].split()[0]}."])  # fmt: skip


def _sparse(result: Result) -> str:
    budgets = sorted({r["budget"] for r in result["rows"]}, reverse=True)
    policies = list(dict.fromkeys(r["policy"] for r in result["rows"]))
    contexts = [r["context"] for r in result["full"]]

    def shown(what: str, policy: str, budget: float) -> str:
        found = [r[what] for r in result["rows"] if (r["policy"], r["budget"]) == (policy, budget)]
        values = [v for v in found if v is not None]
        return f"{100 * sum(values) / len(values):.0f}" if values else "–"

    lines = [f"| policy | {' | '.join(f'{b:g} %' for b in budgets)} |", "|---" * (len(budgets) + 1) + "|"]
    for policy in policies:
        cells = [f"{shown('recall', policy, b)} / {shown('agreement', policy, b)}" for b in budgets]
        lines.append(f"| {policy} | {' | '.join(cells)} |")
    full = ", ".join(f"{100 * r['recall']:.0f} % at {r['context']}" for r in result["full"] if r["recall"] is not None)
    asked, tokens = (sum(r[k] for r in result["full"]) for k in ("questions", "tokens"))
    how = f"chunks of {result['chunk_tokens']} tokens" if result["chunk_tokens"] else "the engine's own chunks"
    return "\n".join([
        *lines, "",
        f"Percent of {asked} recall questions answered / of {tokens} next tokens that are the full cache's, over the "
        f"share of the context attended to: {result['model']}, contexts of {', '.join(map(str, contexts))} tokens, a "
        f"code told at {', '.join(f'{100 * d:.0f}' for d in result['depths'])} % of them; {how}"
        f"{', policies put into transformers' if result['runner'] == 'reference' else ''}. With all of the cache: "
        f"{full}. "
        f"{_machine(result['machine'])}, {result['date'].split()[0]}.",
    ])  # fmt: skip


def _long_context(result: Result) -> str:
    lines = [
        "| tokens held | device | transformers, all in memory | all in memory | exact | of its floor | KV read "
        "| sparse | of its floor | KV read | sparse over exact | peak memory: all / exact / sparse |",
        "|---" * 12 + "|",
    ]
    for row in result["rows"]:
        cells, floors = row["cells"], row["floors"]

        def read(name: str, cells: Result = cells, floors: Result = floors) -> list[str]:
            if name not in cells:
                return ["–"] * 3
            share = f"{100 * floors[name]['share']:.0f} % ({floors[name]['bound']})" if name in floors else "–"
            return [f"{cells[name]['ms']:.0f} ms", share, f"{cells[name]['kv_read_per_token'] / 1e6:.0f} MB"]

        held = [f"{cells[c]['ms']:.0f} ms" if c in cells else "–" for c in ("transformers", "resident")]
        peaks = [
            f"{cells[c]['peak_rss_bytes'] / GIB:.2f}" if c in cells else "–" for c in ("resident", "exact", "sparse")
        ]
        faster = _times(row["sparse_over_exact"]) if "sparse_over_exact" in row else "–"
        cols = [str(row["context"]), row["device"], *held, *read("exact"), *read("sparse"), faster]
        lines.append(f"| {' | '.join(cols)} | {' / '.join(peaks)} GiB |")
    exact = [r["cells"]["exact"] for r in result["rows"] if "exact" in r["cells"]]
    same = ""
    if exact:
        equal, of = (sum(c["likeness"][k] for c in exact) for k in ("equal", "positions"))
        same = (
            f" Exact over tiers chose the token that it chooses with all in memory at {equal} of {of} places (where "
            f"not, one at most {max(c['likeness']['worst_ulps'] for c in exact):.0f} ulp less likely). Disk "
            f"{sum(c['bandwidth'] for c in exact) / len(exact) / 1e9:.2f} GB/s."
        )
    told = result["transformers_offloaded_cache"]
    peer = f" transformers' own offloaded cache (`DynamicCache(offloading=True)`) {told}." if told else ""
    emulated = "The device is *emulated*: it computes on the same cores as the CPU. " * any(
        r["device"] == "emulated" for r in result["rows"]
    )
    return "\n".join([
        *lines, "",
        f"Per token; exact and sparse: {100 * result['share']:g} % of keys and values in memory; sparse: each token "
        f"attends to {result['budget']} of those before it, chosen by `{result['policy']}`. "
        f"{result['weight_bytes'] / GIB:.2f} GiB of random weights, all in memory, "
        f"{result['kv_bytes_per_token'] >> 10} KiB of KV per token; KV: {result['kv']}. "
        f"Floor: the larger of reading what must be read at the disk's "
        f"bandwidth and the same with all in memory. Medians of {result['steps']} tokens and {result['rounds']} rounds."
        f"{same}{peer} {emulated}Load average {result['load_average_before']:.2f}. {_machine(result['machine'])}, "
        f"{result['date'].split()[0]}.",
    ])  # fmt: skip


def _resume(result: Result) -> str:
    s = result["summary"]
    same = "the same first token" if s["same_token"] else "NOT the same first token"
    cold = (
        "with the page cache dropped" if result["caches_dropped"] == "all" else f"dropped: {result['caches_dropped']}"
    )
    return "\n".join([
        "| first token of a prompt | seconds |",
        "|---|---|",
        f"| computed | {s['prefill_ttft_s']:.2f} |",
        f"| computed, and stored as a session | {s['storing_ttft_s']:.2f} |",
        f"| **resumed from disk in a new process** | **{s['resume_ttft_s']:.2f}** |",
        "",
        f"{_times(s['ratio'])} sooner (target {result['target']:g}×), {same}. {result['tokens']} tokens, "
        f"{result['model']}; {result['file_bytes'] / GIB:.2f} GiB in {result['files']} files, {cold}; medians of "
        f"{result['reps']} each. Of a resume {s['read_s']:.2f} s are reading, checking and copying, "
        f"{s['last_pass_s']:.2f} s the pass over the last token; "
        f"reading the same bytes at the disk's {s['bandwidth'] / 1e9:.2f} GB/s takes "
        f"{s['floor_s']:.2f} s, {100 * s['share_of_reading']:.0f} % of it. Load average "
        f"{result['load_average_before']:.2f}. {_machine(result['machine'])}, {result['date'].split()[0]}.",
    ])  # fmt: skip


def _machine(m: Result) -> str:
    return (
        f"{m['cpu']}, {m['cores']} cores, {m['ram_bytes'] / GIB:.0f} GiB RAM, Linux {m['kernel'].split('-')[0]}, "
        f"torch {m['torch']}, transformers {m['transformers']}, accelerate {m['accelerate']}"
    )


def _rate(tokens_per_s: float) -> str:
    return f"{tokens_per_s:.2f}" if tokens_per_s < 10 else f"{tokens_per_s:.1f}"


def _times(ratio: float) -> str:
    return f"{ratio:.1f}×" if ratio >= 2 else f"{ratio:.2f}×"


_RENDERERS: dict[str, Callable[[Result], str]] = {
    "compare": _compare,
    "startup": _startup,
    "overlap": _overlap,
    "disk": _disk,
    "experts": _experts,
    "linears": _linears,
    "predict": _predict,
    "regret": _regret,
    "routing": _routing,
    "hybrid": _hybrid,
    "sparse": _sparse,
    "long-context": _long_context,
    "resume": _resume,
    **{kind: lambda r, f=f: f(r, _machine(r["machine"])) for kind, f in batch_tables.RENDERERS.items()},
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

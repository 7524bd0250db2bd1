"""The README's tables of keys and values."""

from __future__ import annotations

from typing import Any

from common import GIB, on_machine, shown_times

Result = dict[str, Any]


def sparse(result: Result) -> str:
    """Accuracy over the share of the context attended to."""
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
        f"{on_machine(result['machine'])}, {result['date'].split()[0]}.",
    ])  # fmt: skip


def long_context(result: Result) -> str:
    """Time per token of long contexts."""
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
        faster = shown_times(row["sparse_over_exact"]) if "sparse_over_exact" in row else "–"
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
        f"{same}{peer} {emulated}Load average {result['load_average_before']:.2f}. {on_machine(result['machine'])}, "
        f"{result['date'].split()[0]}.",
    ])  # fmt: skip


def resume(result: Result) -> str:
    """A stored session against computing its prompt."""
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
        f"{shown_times(s['ratio'])} sooner (target {result['target']:g}×), {same}. {result['tokens']} tokens, "
        f"{result['model']}; {result['file_bytes'] / GIB:.2f} GiB in {result['files']} files, {cold}; medians of "
        f"{result['reps']} each. Of a resume {s['read_s']:.2f} s are reading, checking and copying, "
        f"{s['last_pass_s']:.2f} s the pass over the last token; "
        f"reading the same bytes at the disk's {s['bandwidth'] / 1e9:.2f} GB/s takes "
        f"{s['floor_s']:.2f} s, {100 * s['share_of_reading']:.0f} % of it. Load average "
        f"{result['load_average_before']:.2f}. {on_machine(result['machine'])}, {result['date'].split()[0]}.",
    ])  # fmt: skip

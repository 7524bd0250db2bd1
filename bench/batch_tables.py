"""The tables of the batch benchmarks, for `tables.py`. Measures nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from common import GIB

Result = dict[str, Any]
NAMES = {
    "batch": "**offload, all requests at once**",
    "one": "offload, one by one",
    "llama.cpp": "llama.cpp, bf16, memory-mapped, continuous batching",
    "accelerate": "accelerate, disk offload, padded batches",
}


def batch(result: Result, machine: str) -> str:
    """Engines over one job."""
    lines = [
        "| engine | new tokens/s | all tokens/s | ratio | the job | read | peak memory | same answers |",
        "|---" * 8 + "|",
    ]
    summary, floor = result["summary"], result["floor"]
    for engine in sorted({r["engine"] for r in result["runs"]}, key=list(NAMES).index):
        s = summary.get(engine)
        if s is None:
            errors = [r["error"] for r in result["runs"] if r["engine"] == engine and "error" in r]
            lines.append(f"| {NAMES[engine]} | {errors[-1] if errors else 'no result'} | | | | | | |")
            continue
        name = NAMES[engine] + _settings(engine, s["settings"] or {})
        ratio = result["ratios"].get(engine)
        took = f"{s['job_s']:.0f} s" if s["whole"] else f"about {s['job_s']:.0f} s ({100 * s['measured_share']:.0f} %)"
        lines.append(
            f"| {name} | {_rate(s['new_tokens_per_s'])} | {_rate(s['tokens_per_s'])} | "
            f"{_times(ratio) if ratio else ''} | {took} | {s['bytes_read'] / 1e9:.0f} GB | "
            f"{s['peak_rss_bytes'] / GIB:.2f} GiB | {_same(result['agreement'].get(engine))} |"
        )
    job, model = result["job"], result["model"]
    limited = all(s["limited"] for s in summary.values())
    where = f"a memory cgroup of {result['limit_bytes'] / GIB:.3g} GiB" if limited else "NO memory limit"
    llama = f", llama.cpp {result['llama_cpp']}" if result["llama_cpp"] else ""
    text = [
        *lines, "",
        f"{model['name']}: {model['weight_bytes'] / GIB:.2f} GiB of random bf16 weights in {where}; "
        f"{job['requests']} requests, {job['prompt_tokens']} prompt tokens (longest {job['longest_prompt']}) and "
        f"{job['new_tokens']} new ones (longest {job['passes']}); from the first request to the last answer, loading "
        "apart; ratio: offload's batched tokens/s over the engine's. A job with a share in brackets was cut, and its "
        "time estimated from so much of it. Same answers: with offload one by one, in bf16; of their tokens those "
        f"before the first difference. {machine}{llama}, disk "
        f"{(floor or {}).get('bandwidth', result['disk']['bandwidth'] or 0) / 1e9:.2f} GB/s, load average "
        f"{result['load_average_before']:.2f}, {result['date'].split()[0]}.",
    ]  # fmt: skip
    if floor is not None:
        share = floor["share"].get("batch")
        reached = f" offload reaches {100 * share:.0f} % of it." if share is not None else ""
        text += ["", (
            f"Floor ({floor['bound']}-bound): {floor['passes']} passes must read {floor['bytes_read'] / 1e9:.0f} GB: "
            f"{floor['read_s']:.0f} s; the products take {floor['compute_s']:.0f} s with everything in memory at their "
            f"best rate, {floor['at_batch_s']:.0f} s at {floor['tokens_per_pass']:.0f} tokens a pass.{reached}"
        )]  # fmt: skip
    return "\n".join(text)


def growth(result: Result, machine: str) -> str:
    """Tokens per second over the batch."""
    lines = ["| batch | tokens/s | predicted | off by | disk allows | compute allows | bound by |", "|---" * 7 + "|"]
    for row in result["rows"]:
        if "error" in row:
            lines.append(f"| {row['batch']} | {row['error']} | | | | | |")
            continue
        measured, told, most = row["tokens_per_s"], row["predicted_tokens_per_s"], row["ceiling"]
        known = {k: v for k, v in most.items() if v}
        bound = min(known, key=known.__getitem__) if known else "–"
        lines.append(
            f"| {row['batch']} | {_rate(measured)} | {_rate(told)} | {100 * (told / measured - 1):+.0f} % | "
            f"{_rate(most['disk']) if most['disk'] else '–'} | {_rate(most['compute']) if most['compute'] else '–'} | "
            f"{bound} |"
        )
    model = result["model"]
    return "\n".join([
        *lines, "",
        f"{model['name']}: {model['weight_bytes'] / GIB:.2f} GiB of random bf16 weights in "
        f"{result['limit_bytes'] / GIB:.3g} GiB; the median step of {result['new_tokens']} after prompts of "
        f"{result['prompt_tokens']} tokens{'' if result['batched'] else ', equal lengths in one padded batch'}. What "
        "disk and compute allow: reading what memory cannot hold, and the products with everything in memory. "
        f"{machine}, disk {result['disk']['bandwidth'] / 1e9:.2f} GB/s, load average "
        f"{result['load_average_before']:.2f}, {result['date'].split()[0]}.",
    ])  # fmt: skip


def prefix(result: Result, machine: str) -> str:
    """The same requests with common fronts computed once, and every time."""
    lines = ["| prompts | the job | requests/s | prompt tokens computed | peak memory |", "|---" * 5 + "|"]
    for name, what in (("shared", "**common fronts computed once**"), ("alone", "each by itself")):
        run = result[name]
        if "judged" not in run:
            lines.append(f"| {what} | {run.get('error', 'no result')} | | | |")
            continue
        s = run["judged"]
        took = f"{s['job_s']:.0f} s" if s["whole"] else f"about {s['job_s']:.0f} s ({100 * s['measured_share']:.0f} %)"
        lines.append(
            f"| {what} | {took} | {result['job']['requests'] / s['job_s']:.2f} | {run['prompt_tokens_computed']} | "
            f"{run['peak_rss_bytes'] / GIB:.2f} GiB |"
        )
    ratio = f"{_times(result['ratio'])} faster; " if result["ratio"] else ""
    model, agreed = result["model"], result["agreement"]
    return "\n".join([
        *lines, "",
        f"{ratio}{_same(agreed)} the same. {result['job']['requests']} requests of {result['question_tokens']} tokens "
        f"and {result['new']} new ones over {result['documents']} documents of {result['document_tokens']} tokens; at "
        f"least {result['least_prompt_tokens']} prompt tokens must be computed. {model['name']}, "
        f"{model['weight_bytes'] / GIB:.2f} GiB of random bf16 weights, in {result['limit_bytes'] / GIB:.3g} GiB. "
        f"{machine}, load average {result['load_average_before']:.2f}, {result['date'].split()[0]}.",
    ])  # fmt: skip


def _settings(engine: str, s: Mapping[str, Any]) -> str:
    if engine == "llama.cpp":
        return f" ({s['parallel']} sequences)"
    if engine == "accelerate":
        return f" ({s['batch']} by {'prompt' if s['by'] == 'prompt' else 'new tokens'})"
    return ""


def _same(a: Mapping[str, int] | None) -> str:
    if not a or not a["requests"]:
        return "–"
    return f"{a['identical']} of {a['requests']} ({a['before_first_difference']} of {a['positions']} tokens)"


def _rate(tokens_per_s: float) -> str:
    return f"{tokens_per_s:.2f}" if tokens_per_s < 10 else f"{tokens_per_s:.1f}"


def _times(ratio: float) -> str:
    return f"{ratio:.1f}×" if ratio >= 2 else f"{ratio:.2f}×"


RENDERERS: dict[str, Callable[[Result, str], str]] = {
    "batch": batch,
    "batch-growth": growth,
    "batch-prefix": prefix,
}

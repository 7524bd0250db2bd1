"""The README's tables of experts and kernels."""

from __future__ import annotations

from typing import Any

from common import on_machine, shown_rate, shown_times

Result = dict[str, Any]


def experts(result: Result) -> str:
    """Kernels for experts against torch, and against KTransformers'."""
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
        f"rounds.{more}{peer_note} Load average {result['load_average_before']:.2f}. {on_machine(result['machine'])}, "
        f"{result['date'].split()[0]}.",
    ])  # fmt: skip


def routing(result: Result) -> str:
    """Policies and predictors, and the bounds."""
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
        over = " | ".join(shown_times(speed / other["tokens_per_s"]) for other in (base, lru))
        lines.append(f"| {what} | {shares} | {r['read_per_token'] / 1e6:.0f} | {shown_rate(speed)} | {over} |")
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
        f"{result['rounds']} rounds. Load average {result['load_average_before']:.2f}. "
        f"{on_machine(result['machine'])}, {result['date'].split()[0]}.",
    ])  # fmt: skip


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def hybrid(result: Result) -> str:
    """The CPU beside a device."""
    lines = [
        "| link | prefill: CPU only | device only | both | decode: CPU only | device only | both | both ÷ device: "
        "prefill | decode | experts on the CPU |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        m = row["modes"]
        cells = [f"{m[k]['prefill_tokens_per_s']:.0f}" for k in ("cpu", "device", "both")]
        cells += [shown_rate(m[k]["decode_tokens_per_s"]) for k in ("cpu", "device", "both")]
        gains = [m["both"][k] / m["device"][k] for k in ("prefill_tokens_per_s", "decode_tokens_per_s")]
        on_cpu = m["both"]["on_cpu"]
        lines.append(
            f"| {row['link']} | {' | '.join(cells)} | {' | '.join(shown_times(g) for g in gains)} "
            f"| {f'{100 * on_cpu:.0f} %' if on_cpu is not None else '–'} |"
        )
    emulated = "The device is *emulated*: it computes on the same cores as the CPU. " * (result["device"] == "emulated")
    return "\n".join([
        *lines, "",
        f"tokens/s, {result['model']}, {100 * result['share']:.0f} % of it fit on the device, all in RAM; prompts of "
        f"{result['prompt']}, {result['new']} new tokens; medians of {result['rounds']} rounds. {emulated}"
        f"{on_machine(result['machine'])}, {result['date'].split()[0]}.",
    ])  # fmt: skip


def linears(result: Result) -> str:
    """Kernels for linear layers and attention against torch."""
    lines = ["| what | type | tokens | torch | kernel | kernel ÷ torch |", "|---" * 6 + "|"]
    for c in [*result["products"], *result["attention"]]:
        rates = " | ".join(f"{c['bytes_per_s'][name] / 1e9:.1f}" for name in ("torch", "kernel"))
        lines.append(f"| {c['what']} | {c['dtype']} | {c['size']} | {rates} | {c['kernel_over_torch']:.2f}× |")
    return "\n".join([
        *lines, "",
        f"GB/s of the weights, or of the keys and values ({result['threads']} threads, {result['level']}); tokens: of "
        f"the call, in attention those held; medians of {result['rounds']} rounds. Load average "
        f"{result['load_average_before']:.2f}. {on_machine(result['machine'])}, {result['date'].split()[0]}.",
    ])  # fmt: skip

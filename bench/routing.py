"""Policies and predictors on learned routing: hit rate, bytes and tokens per second, against the best there could be.

1. The bundled mixture of experts answers questions, half of its experts in memory, and its routing is recorded: first
   some questions to learn from, then others. How many experts are foreseen one layer ahead is taken from the others,
   with the router alone and with what was learned.
2. A large checkpoint of random weights with as many layers, experts and experts per token (`checkpoints.py`, `routed`)
   is given that routing in place of its own and decodes with half of its experts in memory, once for every policy
   without and with prediction, and for every predictor with the default policy: in turn, round after round, each run in
   a process of its own. Load on demand is a cache of one layer's experts. Belady's optimum is counted on the same
   tokens; its speed is a bound: what it would have to read at the rate the disk gave, or the computing if that is more.
3. Adversaries: a routing for which the cache just suffices while all that is foreseen is wrong, and one without any
   pattern. Decoding with useless prediction over decoding without, in turn.

What the checkpoint says means nothing, and is not looked at.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import checkpoints
from common import (
    ROOT,
    BenchError,
    flags,
    head,
    in_process,
    load_average,
    machine,
    medians,
    run_script,
    say,
    today,
    worker_env,
    write_json,
)

MODEL = "routed"
SCRIPT = Path(__file__)
PROMPT = 32
POLICIES = ("lru", "lfu", "adaptive", "equal", "shallow", "expected", "router")
PREDICTORS = ("none", "router", "gate", "transitions", "repetition", "request", "history", "combination")
ON_DEMAND = {"expert_policy": "lru", "expert_predictor": "none", "slots": 4}
LIMIT = 0.05  # most that useless predictions may cost


def questions(part: int) -> list[str]:
    """Things to ask the bundled model; the two parts share no person and no town."""
    sys.path.insert(0, str(ROOT / "tools" / "demo_models"))
    from world import build_world

    world = build_world()
    people, towns = sorted(world.people), sorted(world.towns)
    out = []
    for person in people[part::2][:10]:
        out += [f"Tell me a story about {person}.", f"Who is {person}?"]
    out += [f"What is {town} known for?" for town in towns[part::2][:6]]
    return [*out, *(("What is 7 plus 5?", "Hello!") if part else ("What is 3 plus 4?", "Who are you?"))]


def record(part: int, predictor: str, out: Path, depth: int = 1) -> dict[str, Any]:
    """Answers of the bundled model, routing written to `out`: what was foreseen, by layer."""
    import offload
    from moe import LayerUse

    with offload.load(
        "demo-moe", resident="60%", context=512, record_routing=str(out), expert_predictor=predictor,
        expert_depth=depth,
    ) as model:  # fmt: skip
        total = [LayerUse() for _ in range(6)]
        prompt = new = 0
        for q in questions(part):
            text = model.render([{"role": "user", "content": q}])
            stats = model.run([text], max_new_tokens=96).stats
            total = [a + b for a, b in zip(total, stats.experts_by_layer, strict=True)]
            prompt, new = prompt + stats.prompt_tokens, new + stats.new_tokens
        known = [[r for r in model.engine.experts.foreseen(d) if r is not None] for d in range(1, depth + 1)]
    return {
        "prompt_tokens": prompt, "new_tokens": new,
        "ahead": [
            {"router": statistics.mean(a for a, _ in pairs), "corrected": statistics.mean(b for _, b in pairs)}
            for pairs in known if pairs
        ],
        "layers": [
            {"recall": u.recall, "precision": u.precision, "named": u.named / u.asked if u.asked else None}
            for u in total
        ],
        "sha256": hashlib.sha256(out.read_bytes()).hexdigest()[:16],
    }  # fmt: skip


def decode(folder: Path, trace: Path, options: dict[str, Any]) -> dict[str, Any]:
    """One run of the large checkpoint along a trace."""
    import offload

    options = dict(options)
    slots, new = options.pop("slots"), options.pop("new")
    with offload.load(
        folder, context=PROMPT + new + 8, replay_routing=str(trace), overrides={"expert_slots": slots}, **options
    ) as model:
        prompt = [[(7 * j) % 4000 for j in range(PROMPT)]]
        stats = model.run(prompt, max_new_tokens=new, ignore_eos=True).stats
        size = model.engine.experts.sizes[0]
        use, d = stats.experts_use, stats.decode
        assert use is not None
        return {
            "tokens_per_s": stats.decode_tokens_per_s,
            "ttft_s": stats.ttft_s,
            "read_per_token": d.bytes_read / (stats.new_tokens - 1),
            "disk_rate": d.bytes_read / d.read_busy_s if d.read_busy_s else None,
            "stall_share": d.stall_s / d.seconds,
            "hit": use.hit / use.needed,
            "ahead": use.ahead / use.needed,
            "late": use.late / use.needed,
            "missed": use.missed / use.needed,
            "in_vain": use.wasted / max(1, use.fetched),
            "expert_bytes": size,
            "slots": model.plan.expert_slots,
        }


def counted(trace: Path, slots: int, new: int) -> dict[str, Any]:
    """Hit rates on the same tokens without a clock: Belady's optimum beside the policies."""
    import numpy as np

    from moe import Replay, RoutingTrace
    from moe.replay import policies, replay

    whole = RoutingTrace.load(trace)
    rows = Replay(whole, whole.experts, whole.top_k)
    passes = [[rows.next(layer, n) for layer in range(whole.layers)] for n in [PROMPT] + [1] * (new - 1)]
    same = RoutingTrace(whole.experts, passes)
    out = {}
    for name, make in policies(same, whole).items():
        total = replay(same, slots, make(slots)).total
        out[name] = {"hit": total.hits / total.needed}
    first = replay(same[:1], slots, policies(same, whole)["belady"](slots)).total
    belady = replay(same, slots, policies(same, whole)["belady"](slots)).total
    out["belady"]["missed_per_token"] = (belady.missed - first.missed) / (new - 1)
    one = [r for p in same for r in p if len(r.index) == 1]
    again = [
        len(np.intersect1d(a.index, b.index)) / whole.top_k for a, b in zip(one, one[whole.layers :], strict=False)
    ]
    return {"policies": out, "repeated": float(np.mean(again)), "tokens": len(same)}


def adversaries(folder: Path, new: int) -> dict[str, Path]:
    """Traces on which prediction is useless."""
    from moe import synthetic

    wrong = synthetic.with_gate_ahead(synthetic.even(6, 32, 4, PROMPT + new, seed=3), 0.0, seed=4)
    paths = {"cache just suffices": folder / "adversarial.npz", "no pattern": folder / "even.npz"}
    synthetic.adversarial(6, 32, 4, PROMPT + new, period=4).save(paths["cache just suffices"])
    wrong.save(paths["no pattern"])
    return paths


def main(argv: list[str] | None = None) -> int:
    parser = flags(__doc__, "routing", rounds=3, worker="+")
    parser.add_argument("--new-tokens", type=int, default=160)
    parser.add_argument("--slots", type=int, default=96, help="expert slots (of 192)")
    parser.add_argument("--guard-only", action="store_true", help="take only the guard cases again, into --out")
    args = parser.parse_args(argv)
    if args.worker is not None:
        print(json.dumps(_work(args.worker)))
        return 0
    if args.guard_only:
        guard_again(args)
        return 0
    load = load_average()
    folder = checkpoints.make(checkpoints.SPECS[MODEL], args.scratch)
    with tempfile.TemporaryDirectory(prefix="offload-bench-") as scratch:
        tmp = Path(scratch)
        env = {**worker_env(), "OFFLOAD_CACHE": str(tmp / "cache")}
        say("recording")
        foreseen = {
            "learned from": in_process(SCRIPT, env, "record", 0, "gate", tmp / "learn.npz"),
            "others, with what was learned": in_process(SCRIPT, env, "record", 1, "gate", tmp / "judge.npz"),
            "others, by the router alone": in_process(SCRIPT, env, "record", 1, "router", tmp / "plain.npz"),
        }
        deep = in_process(SCRIPT, env, "record", 1, "gate", tmp / "deep.npz", 3)["ahead"]
        for name, r in foreseen.items():
            say(f"  {name}: recall " + " ".join(f"{x['recall']:.2f}" for x in r["layers"][1:]))
        base = {"slots": args.slots, "new": args.new_tokens}
        rows = [{**ON_DEMAND, "new": args.new_tokens, "name": "load on demand"}]
        rows += [{**base, "expert_policy": p, "expert_predictor": q} for p in POLICIES for q in ("none", "gate")]
        rows += [
            {**base, "expert_policy": "router", "expert_predictor": q} for q in PREDICTORS if q not in ("none", "gate")
        ]
        trace = {q: tmp / ("plain.npz" if q == "router" else "judge.npz") for q in PREDICTORS}
        runs: list[list[dict[str, Any]]] = [[] for _ in rows]
        for n in range(args.rounds):
            for row, done in zip(rows, runs, strict=True):
                options = {k: v for k, v in row.items() if k != "name"}
                done.append(
                    in_process(SCRIPT, env, "decode", folder, trace[row["expert_predictor"]], json.dumps(options))
                )
                say(f"round {n + 1}: {row['expert_policy']} {row['expert_predictor']}: "
                    f"{done[-1]['tokens_per_s']:.2f} tokens/s, hit {100 * done[-1]['hit']:.0f} %")  # fmt: skip
        table = [{**row, **medians(done)} for row, done in zip(rows, runs, strict=True)]
        bound = in_process(SCRIPT, env, "counted", tmp / "judge.npz", args.slots, args.new_tokens)
        guard = guard_cases(folder, tmp, env, args)
    write_json(args.out, {
        **head("routing", load),
        "rounds": args.rounds, "slots": args.slots, "experts": 192, "new_tokens": args.new_tokens,
        "checkpoint": checkpoints.SPECS[MODEL].config, "foreseen": foreseen, "ahead": deep, "rows": table,
        "counted": bound,
        "guard": guard,
    })  # fmt: skip
    return 0


def guard_cases(folder: Path, tmp: Path, env: dict[str, str], args: argparse.Namespace) -> dict[str, Any]:
    """How much slower useless predictions make decoding, case by case."""
    cases = {}
    for name, path in adversaries(tmp, args.new_tokens).items():
        for policy in ("lru", "router"):
            ratios = []
            for n in range(args.rounds + 2):
                pair = {}
                for q in ("none", "gate") if n % 2 else ("gate", "none"):
                    options = {
                        "slots": args.slots, "new": args.new_tokens, "expert_policy": policy, "expert_predictor": q
                    }  # fmt: skip
                    pair[q] = in_process(SCRIPT, env, "decode", folder, path, json.dumps(options))["tokens_per_s"]
                ratios.append(pair["none"] / pair["gate"] - 1)
            cases[f"{name}, {policy}"] = {"slower": statistics.median(ratios), "pairs": sorted(ratios)}
            say(f"{name}, {policy}: {100 * cases[f'{name}, {policy}']['slower']:+.1f} % slower with prediction")
    return {"limit": LIMIT, "cases": cases}


def guard_again(args: argparse.Namespace) -> None:
    """Take only the guard cases, and put them into the result there is, with their own date and load average."""
    load = load_average()
    try:
        result = json.loads(args.out.read_text())
    except (OSError, ValueError) as e:
        raise BenchError(f"--guard-only replaces a part of {args.out}, which cannot be read: {e}") from None
    if result.get("kind") != "routing":
        raise BenchError(f"--guard-only: {args.out} is no result of this script")
    for name, now in (("slots", args.slots), ("new_tokens", args.new_tokens)):
        if result[name] != now:
            raise BenchError(f"--guard-only: {args.out} was measured with {name} {result[name]}, not {now}")
    folder = checkpoints.make(checkpoints.SPECS[MODEL], args.scratch)
    with tempfile.TemporaryDirectory(prefix="offload-bench-") as scratch:
        env = {**worker_env(), "OFFLOAD_CACHE": str(Path(scratch) / "cache")}
        guard = guard_cases(folder, Path(scratch), env, args)
    result["guard"] = {
        **guard, "date": today(), "load_average_before": load, "machine": machine(), "rounds": args.rounds
    }  # fmt: skip
    write_json(args.out, result)


def _work(words: list[str]) -> dict[str, Any]:
    what, *rest = words
    if what == "record":
        return record(int(rest[0]), rest[1], Path(rest[2]), int(rest[3]) if len(rest) > 3 else 1)
    if what == "decode":
        return decode(Path(rest[0]), Path(rest[1]), json.loads(rest[2]))
    return counted(Path(rest[0]), int(rest[1]), int(rest[2]))


if __name__ == "__main__":
    run_script(main)

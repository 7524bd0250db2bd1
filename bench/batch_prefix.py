"""What computing common fronts once saves: 200 questions over 4 long documents, with sharing and without.

All weights fit into the limit, so that what is saved is computing. The same requests go through the batch runner twice,
each time in a fresh memory cgroup: as it is, and told to compute each prompt by itself. The answers are compared. A run
that is out of time is cut; its seconds are then estimated in proportion to the tokens done.

It compares with no other engine; the documents are random tokens.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import batch_job
import tables
from batch_runs import GRACE_S, LEAST_S, Bench, common_options
from checkpoints import SPECS
from common import RESULTS, BenchError, say, write_json


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Both ways; the result is written after each."""
    spec = SPECS[args.model]
    bench = Bench(spec, args)
    requests = batch_job.over_documents(
        args.requests, args.documents, args.document_tokens, args.question_tokens, args.new, spec.config["vocab_size"]
    )
    file = batch_job.save(requests, bench.work / "requests.json")
    runs: dict[str, Any] = {"shared": {"error": "not run yet"}, "alone": {"error": "not run yet"}}
    bench.measure_disk()

    def result(finished: bool) -> dict[str, Any]:
        seconds = [runs[w]["judged"]["job_s"] if "judged" in runs[w] else None for w in ("alone", "shared")]
        out = {
            **bench.facts("batch-prefix", "batch-prefix"), "finished": finished, "job": batch_job.totals(requests),
            "documents": args.documents, "document_tokens": args.document_tokens,
            "question_tokens": args.question_tokens, "new": args.new,
            "least_prompt_tokens": args.documents * args.document_tokens + args.requests * args.question_tokens,
            "ratio": seconds[0] / seconds[1] if seconds[0] and seconds[1] else None,
            "agreement": batch_job.agreement(*(runs[w].get("answers", {}) for w in ("alone", "shared"))), **runs,
        }  # fmt: skip
        write_json(args.out, out)
        return out

    for way, options in (("shared", []), ("alone", ["--no-sharing"])):
        seconds = bench.left
        if seconds < LEAST_S:
            runs[way] = {"error": "no time was left"}
            continue
        with bench.group() as group:
            words = ["--requests", file, "--ram", bench.limit, *options, "--max-seconds", seconds]
            run = bench.measured(group, "batch", bench.worker("batch", *words), timeout=seconds + GRACE_S)
        if run.get("answers"):
            run["judged"] = batch_job.judge(requests, run, None)
            # whatever was computed and is no new token that was fed again
            fed = sum(len(a) - 1 for a in run["answers"].values())
            run["prompt_tokens_computed"] = sum(p + d for _, p, d in run["steps"]) - fed
            say(f"{way}: {run['judged']['job_s']:.1f} s, {run['prompt_tokens_computed']} prompt tokens computed")
        if "error" in run:
            say(f"{way}: {run['error']}")
        runs[way] = run
        result(False)
    bench.close()
    return result(True)


def failed(result: Mapping[str, Any]) -> bool:
    """Whether either way gave nothing."""
    return any("judged" not in result[way] for way in ("shared", "alone"))


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=sorted(SPECS), default="llama-documents")
    common_options(p, 600)
    p.add_argument("--requests", type=int, default=200)
    p.add_argument("--documents", type=int, default=4)
    p.add_argument("--document-tokens", type=int, default=1500)
    p.add_argument("--question-tokens", type=int, default=30)
    p.add_argument("--new", type=int, default=8)
    p.add_argument("--out", type=Path, default=RESULTS / "batch-prefix.json")
    args = p.parse_args(argv)
    try:
        result = measure(args)
    except BenchError as e:
        say(f"error: {e}")
        return 1
    print(tables.render(result))
    return int(failed(result))


if __name__ == "__main__":
    sys.exit(main())

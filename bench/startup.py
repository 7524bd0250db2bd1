"""Measures what a user waits for before anything happens: `offload --help`, importing, and the first token.

Wall time of whole processes, caches warm unless said otherwise. The first token is that of the bundled demo model: the
time from the command to the first byte of its answer. Does not measure large models; `compare.py` does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, load_average, machine, say, today, worker_env, write_json
from limit import drop_caches

GENERATE = ["generate", "-p", "Hello", "--max-new-tokens", "1", "--json"]


def offload_command() -> list[str]:
    """The console script beside this interpreter, or the module it calls."""
    script = Path(sys.executable).with_name("offload")
    return [str(script)] if script.is_file() else [sys.executable, "-m", "cli.main"]


def once(command: Sequence[str]) -> dict[str, Any]:
    """Run to the end: seconds to the first byte on stdout and to the exit; the output, or an error."""
    began = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, env=worker_env(), cwd=ROOT
    ) as p:
        assert p.stdout is not None
        assert p.stderr is not None
        head = p.stdout.read(1)
        first = time.perf_counter() - began
        out = head + p.stdout.read()
        err = p.stderr.read().decode(errors="replace").strip()
        code = p.wait()
    run: dict[str, Any] = {"first_output_s": first, "wall_s": time.perf_counter() - began, "stdout": out.decode()}
    if code:
        run["error"] = f"exit code {code}: {err.splitlines()[-1] if err else 'no message'}"
    return run


def row(what: str, command: Sequence[str], reps: int, key: str = "wall_s", cold: bool = False) -> dict[str, Any]:
    """Median of `reps` runs of `command`, each with dropped caches if `cold`."""
    runs = []
    if not cold:
        once(command)  # unmeasured: fills the caches
    for _ in range(reps):
        if cold and drop_caches() != "all":
            return {"what": what, "error": "needs root to drop the page cache"}
        runs.append(once(command))
        if "error" in runs[-1]:
            say(f"{what}: {runs[-1]['error']}")
            return {"what": what, "error": runs[-1]["error"]}
    readings = [r[key] for r in runs]
    cache = "cold" if cold else "warm"
    found: dict[str, Any] = {
        "what": what, "cache": cache, "median_s": statistics.median(readings), "readings_s": readings,
    }  # fmt: skip
    if key == "first_output_s":
        facts = [json.loads(r["stdout"]) for r in runs]
        for name in ("load_s", "ttft_s", "peak_rss_bytes"):
            values = [f[name] for f in facts if f.get(name) is not None]
            if values:
                found[name] = statistics.median(values)
    say(f"{what}, {cache}: {found['median_s']:.2f} s")
    return found


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--reps", type=int, default=7)
    p.add_argument("--out", type=Path, default=RESULTS / "startup.json")
    args = p.parse_args()
    if load_average() > 0.5:
        say("the machine is not quiet: these figures are smoke checks only")
    quiet, date = load_average(), today()
    python, offload = sys.executable, offload_command()
    first_token = "demo model, command to first token"
    rows = [
        row("python -c pass", [python, "-c", "pass"], args.reps),
        row("offload --help", [*offload, "--help"], args.reps),
        row("python -c 'import offload'", [python, "-c", "import offload"], args.reps),
        row("python -c 'import torch, transformers'", [python, "-c", "import torch, transformers"], args.reps),
        row(first_token, [*offload, *GENERATE], args.reps, "first_output_s"),
        row(first_token, [*offload, *GENERATE], min(3, args.reps), "first_output_s", cold=True),
    ]
    result = {"kind": "startup", "name": "startup", "date": date, "machine": machine(), "load_average_before": quiet}
    write_json(args.out, {**result, "rows": rows})
    print(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the benchmark scripts share: flags, sizes, the machine's description, result files. Measures nothing itself.

Imports nothing heavy, so that scripts which only start others stay small beside what they measure.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
RESULTS = BENCH / "results"
GIB = 1 << 30
_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": GIB, "KB": 10**3, "MB": 10**6, "GB": 10**9}


class BenchError(Exception):
    """Something the user can put right; printed as one line."""


def parse_size(text: str) -> int:
    """Bytes meant by `4.5GiB`, `500MB` or a plain number."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise BenchError(f"{text!r} is not a size; write for example 4.5GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def gib(n: float) -> str:
    """Bytes for people."""
    return f"{n / GIB:.2f} GiB"


def default_scratch() -> Path:
    """Where checkpoints of several GB go unless told otherwise: never the repository."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "offload-bench"


def mem_available() -> int:
    """Bytes the kernel could give a new process (MemAvailable)."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(match[1]) << 10 if match else 0


def vm_kb(field: str, status: Path = Path("/proc/self/status")) -> int:
    """A field of a process's status (`VmHWM`, `VmRSS`) in bytes. Not `ru_maxrss`: that one survives exec."""
    match = re.search(rf"^{field}:\s+(\d+) kB", status.read_text(), re.MULTILINE)
    return int(match[1]) << 10 if match else 0


def machine() -> dict[str, Any]:
    """What a reader needs to know of this machine to place the figures."""
    info = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    flags = set((re.search(r"^flags\s*:\s*(.+)$", info, re.MULTILINE) or ["", ""])[1].split())
    total = re.search(r"^MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return {
        "cpu": model[1].strip() if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "bf16_instructions": sorted(flags & {"avx512_bf16", "amx_bf16"}),
        "ram_bytes": int(total[1]) << 10 if total else 0,
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "accelerate", "safetensors")},
    }


def version(distribution: str) -> str | None:
    """Installed version, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def load_average() -> float:
    """Runnable processes over the last minute: above 1 when nothing of ours runs, the machine is not quiet."""
    return os.getloadavg()[0]


def today() -> str:
    """The date of a measurement, UTC."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def worker_env() -> dict[str, str]:
    """Environment of measured processes: this checkout's packages, no network, no progress bars."""
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return {**os.environ, **quiet, "PYTHONPATH": path}


def in_process(script: Path, env: Mapping[str, str], *words: object) -> dict[str, Any]:
    """What `script --worker WORDS` prints, run in a process of its own. Raises `BenchError` with its last words."""
    command = [sys.executable, str(script), "--worker", *map(str, words)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if run.returncode:
        raise BenchError(f"{' '.join(map(str, words))}: {run.stderr.strip()[-600:]}")
    result: dict[str, Any] = json.loads(run.stdout)
    return result


def medians(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each figure's median over the runs; None where none has it."""
    out = {}
    for key in runs[0]:
        values = [r[key] for r in runs if r[key] is not None]
        out[key] = statistics.median(values) if values else None
    return out


def write_json(path: Path, data: Any) -> None:
    """Write through a temporary file, so that a reader never sees half a result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as f:
        f.write(json.dumps(data, indent=1) + "\n")
    os.chmod(f.name, 0o644)
    os.replace(f.name, path)


def flags(
    doc: str | None, result: str | None, *, scratch: str | None = None, rounds: int | None = None,
    worker: int | str | None = None,
) -> argparse.ArgumentParser:  # fmt: skip
    """A parser with the flags that the scripts have in common, the script's docstring its description.

    `--scratch`, explained by `scratch`; `--rounds` with its default, if there is one; `--out`, by default
    bench/results/RESULT.json; the hidden `--worker` of so many words, if the script starts itself again.
    """
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--scratch", type=Path, default=default_scratch(), help=scratch)
    if rounds is not None:
        p.add_argument("--rounds", type=int, default=rounds)
    p.add_argument("--out", type=Path, default=RESULTS / f"{result}.json" if result is not None else None)
    if worker is not None:
        p.add_argument("--worker", nargs=worker, help=argparse.SUPPRESS)
    return p


def head(kind: str, load: float, name: str | None = None) -> dict[str, Any]:
    """What a result begins with: what it is (`name` where it is not the kind's), when and where it was measured.

    `load` is the load average before anything was started.
    """
    return {"kind": kind, "name": name or kind, "date": today(), "machine": machine(), "load_average_before": load}


def run_script(main: Callable[[], int]) -> NoReturn:
    """Run a script and end the process; what the user can put right is printed as one line."""
    try:
        sys.exit(main())
    except BenchError as e:
        say(f"error: {e}")
        sys.exit(1)


def on_machine(m: Mapping[str, Any]) -> str:
    """A result's machine for people."""
    return (
        f"{m['cpu']}, {m['cores']} cores, {m['ram_bytes'] / GIB:.0f} GiB RAM, Linux {m['kernel'].split('-')[0]}, "
        f"torch {m['torch']}, transformers {m['transformers']}, accelerate {m['accelerate']}"
    )


def shown_rate(tokens_per_s: float) -> str:
    """Tokens per second for people."""
    return f"{tokens_per_s:.2f}" if tokens_per_s < 10 else f"{tokens_per_s:.1f}"


def shown_times(ratio: float) -> str:
    """A ratio of two speeds for people."""
    return f"{ratio:.1f}×" if ratio >= 2 else f"{ratio:.2f}×"


def say(*what: object) -> None:
    """Progress, on stderr: stdout belongs to results."""
    print(*what, file=sys.stderr, flush=True)

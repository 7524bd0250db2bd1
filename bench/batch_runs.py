"""What the batch benchmarks share: one model under one limit, its disk, and processes measured in a memory cgroup.

Measures nothing by itself.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import checkpoints
import disk
from checkpoints import Spec
from common import BENCH, default_scratch, load_average, machine, parse_size, say, today, worker_env
from limit import Group, Held, drop_caches

BASE = 300 << 20  # of an interpreter with everything imported, until one was measured
LEAST_S = 15  # what a run needs to be begun
GRACE_S = 150  # a pass is not cut: so much longer may a process take before it is killed
Run = dict[str, Any]


class Bench:
    """One model and one limit: its checkpoint, its disk, and processes measured in a group."""

    def __init__(self, spec: Spec, args: argparse.Namespace) -> None:
        self.spec, self.args = spec, args
        self.limit = parse_size(args.limit or spec.limit)
        self.deadline = time.monotonic() + args.seconds
        self.folder = checkpoints.make(spec, args.scratch)
        self.files = checkpoints.shard_files(self.folder)
        self.work: Path = args.scratch / "batch-work"
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        self.endless = endless(self.folder, self.work / spec.name)
        self.disks: list[disk.Disk] = []
        self.quiet = load_average()
        if self.quiet > 0.5:
            say(f"the machine is not quiet (load average {self.quiet:.1f}): these figures are smoke checks only")

    @property
    def left(self) -> float:
        """Seconds until everything is to be over."""
        return self.deadline - time.monotonic()

    def measure_disk(self) -> None:
        """Shared and virtual disks change from minute to minute, so this is done before every engine."""
        self.disks.append(disk.measure(self.files, seconds=self.args.disk_seconds))
        last = self.disks[-1]
        say(f"disk: {last.sequential / 1e9:.2f} GB/s sequential, {last.random / 1e9:.2f} GB/s random")

    @property
    def bandwidth(self) -> float:
        """Bytes per second, median of the readings."""
        return statistics.median(d.sequential for d in self.disks)

    @contextmanager
    def group(self, *others: Path) -> Iterator[Group]:
        """A fresh group with nothing in the page cache; `others`: files dropped beside the checkpoint's."""
        dropped = drop_caches([*self.files, *others])
        if dropped != "all":
            say(f"not root: only {dropped} dropped from the page cache")
        with Group(self.limit) as group:
            if not group.limited:
                say(f"running WITHOUT a memory limit: {group.why}")
            yield group

    def measured(
        self,
        group: Group,
        engine: str,
        command: Callable[[int | None, Path], Sequence[str]],
        *,
        timeout: float,
        env: Mapping[str, str] | None = None,
    ) -> Run:
        """One process in the group. `command` is given the holder of memory and where partial results are kept.

        What a process that failed has left counts as far as it goes; the run then has its `error`.
        """
        partial = self.work / "partial.json"
        partial.unlink(missing_ok=True)
        with Held(self.limit) as held:
            ran = group.run(command(held.pid, partial), timeout=timeout, env=env or worker_env())
            ready = bool(held.pid)
        facts: Run = {}
        error = ran.failure()
        try:
            facts = json.loads(ran.stdout.strip().splitlines()[-1] if error is None else partial.read_text())
        except (IndexError, ValueError, OSError):
            error = error or "printed no result"
        if isinstance(facts.get("answers"), list):
            facts["answers"] = {str(i): a for i, a in enumerate(facts["answers"]) if a}
        facts |= {"engine": engine, "limit": {
            "limited": ran.limited, "mechanism": ran.mechanism, "group_peak_bytes": ran.peak_bytes,
            "wall_s": ran.wall_s, "memory_held_ready": ready,
        }}  # fmt: skip
        if error is not None:
            facts["error"] = error
        return facts

    def worker(
        self, engine: str, *words: object, folder: Path | None = None
    ) -> Callable[[int | None, Path], list[str]]:
        """The command of `batch_worker.py` for `measured`."""

        def command(holder: int | None, partial: Path) -> list[str]:
            return [
                sys.executable, str(BENCH / "batch_worker.py"), str(folder or self.endless), "--engine", engine,
                *map(str, words), "--partial", str(partial), *(["--release", str(holder)] if holder else []),
            ]  # fmt: skip

        return command

    def rates(self, counts: Sequence[int]) -> list[dict[str, Any]]:
        """What products of one layer take, without a limit: for the floor."""
        if self.left < LEAST_S:
            return []
        with Group(None) as group:
            words = ("--tokens", *sorted(set(counts)))
            run = self.measured(group, "rates", self.worker("rates", *words), timeout=max(60, self.left))
        if "error" in run:
            say(f"no compute rates: {run['error']}")
        rates: list[dict[str, Any]] = run.get("rates", [])
        for r in rates:
            ms = 1e3 * self.spec.config["num_hidden_layers"] * r["layer_s"]
            say(f"{r['tokens']} tokens at once: {ms:.0f} ms for all layers, {1e3 * r['head_s']:.1f} ms for the output")
        return rates

    def facts(self, kind: str, name: str) -> dict[str, Any]:
        """What every result begins with."""
        return {
            "kind": kind, "name": name, "date": today(), "machine": machine(),
            "load_average_before": self.quiet,
            "model": {
                "name": self.spec.name, "config": self.spec.config, "weight_bytes": self.spec.weight_bytes,
                "dense_bytes": self.spec.dense_bytes, "expert_bytes": self.spec.expert_bytes, "weights": "random",
            },
            "limit_bytes": self.limit,
            "disk": {"bandwidth": self.bandwidth if self.disks else None, "readings": [asdict(d) for d in self.disks]},
        }  # fmt: skip

    def close(self) -> None:
        """Remove what was written for the runs."""
        shutil.rmtree(self.work, ignore_errors=True)


def endless(folder: Path, out: Path) -> Path:
    """The checkpoint in `folder` without an end token, so that every answer is as long as was asked: links to its
    files, and its configuration changed.
    """
    out.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if not file.name.startswith(("config", "generation_config")):
            (out / file.name).unlink(missing_ok=True)
            (out / file.name).symlink_to(file.resolve())
    config = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    (out / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "do_sample": False}))
    return out


def common_options(p: argparse.ArgumentParser, seconds: float) -> None:
    """What all batch benchmarks have."""
    p.add_argument("--limit", help="memory of each run (default: the model's, half to two thirds of its weights)")
    p.add_argument("--seconds", type=float, default=seconds, help="begin no run after so long (default: %(default)s)")
    p.add_argument("--disk-seconds", type=float, default=4.0, help="how long each reading of the disk takes")
    p.add_argument("--scratch", type=Path, default=default_scratch(), help="folder for checkpoints and offload files")

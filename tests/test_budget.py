"""Budgets are promises: the peak of the whole process, read by itself and enforced from outside."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from offload.sizes import parse_size
from tiers.memory import cgroup_limit

ROOT = Path(__file__).parent.parent
CGROUP = Path("/sys/fs/cgroup/memory")


def generate(folder: Path, *args: str, group: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}

    def enter() -> None:
        if group is not None:
            (group / "tasks").write_text("0")

    return subprocess.run(
        [sys.executable, "-m", "cli.main", "generate", str(folder), "--json", *args], capture_output=True, text=True,
        env=env, preexec_fn=enter if group is not None else None, check=False,
    )  # fmt: skip


def smallest(folder: Path, *args: str) -> str:
    refused = generate(folder, "--prompt-ids", "5", "--ram", "32MiB", *args)
    assert refused.returncode == 1
    assert "too small; the smallest that works is" in refused.stderr
    return refused.stderr.strip().rsplit(" ", 1)[1]


@pytest.mark.parametrize("extra", ["0MiB", "100MiB"])
def test_peak_stays_under_the_budget(wide_dense: Path, extra: str) -> None:
    prompt = ",".join(str(4 + i % 150) for i in range(400))
    least = parse_size(smallest(wide_dense, "--context", "512"))
    ram = least + (parse_size(extra) if extra != "0MiB" else 0)
    run = generate(wide_dense, "--prompt-ids", prompt, "--max-new-tokens", "24", "--ram", str(ram), "--context", "512")
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["peak_rss_bytes"] <= ram
    assert result["bytes_read"] > 0, "the model fits this budget, so the test shows nothing"
    assert result["new_tokens"] == 24


def test_a_large_head_is_never_copied(wide_head: Path) -> None:
    """torch copies a weight that is multiplied with a sliced row: for a head that would be the whole reserve."""
    ram = parse_size(smallest(wide_head, "--context", "256"))
    run = generate(wide_head, "--prompt-ids", ",".join(["5"] * 40), "--max-new-tokens", "4", "--ram", str(ram),
                   "--context", "256")  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["peak_rss_bytes"] <= ram


def test_a_batch_job_stays_under_the_budget(wide_dense: Path, tmp_path: Path) -> None:
    """Many sequences' keys and values, logits and pieces of prompts, beside weights that are streamed."""
    lines = [
        {"custom_id": str(i), "prompt": [4 + (i * 7 + j) % 150 for j in range(30 + 17 * i % 200)], "max_tokens": 6}
        for i in range(16)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def batch(ram: str) -> subprocess.CompletedProcess[str]:
        files = ["-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
        return subprocess.run(
            [sys.executable, "-m", "cli.main", "batch", str(wide_dense), *files, "--json", "--sequences", "12",
             "--ignore-eos", "--ram", ram],
            capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
        )  # fmt: skip

    refused = batch("32MiB")
    assert refused.returncode == 1
    ram = parse_size(refused.stderr.strip().rsplit(" ", 1)[1])
    run = batch(str(ram))
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["done"] == len(lines)
    assert result["peak_rss_bytes"] <= ram
    assert result["bytes_read"] > 0, "the model fits this budget, so the test shows nothing"


def test_an_emulated_device_stays_inside_ram_and_vram(wide_dense: Path) -> None:
    """Everything goes from disk through RAM to the device; the process may take both budgets together."""
    prompt = ",".join(str(4 + i % 150) for i in range(200))
    common = ("--prompt-ids", prompt, "--max-new-tokens", "8", "--context", "512", "--device", "emulated")
    least = {}
    for flag, other in (("--vram", "--ram=4GiB"), ("--ram", "--vram=1GiB")):
        refused = generate(wide_dense, *common, flag, "1MiB", other)
        assert refused.returncode == 1
        assert f"{flag} 1 MiB is too small" in refused.stderr
        least[flag] = parse_size(refused.stderr.strip().rsplit(" ", 1)[1])
    ram, vram = least["--ram"] + (16 << 20), least["--vram"] + (16 << 20)
    run = generate(wide_dense, *common, "--ram", str(ram), "--vram", str(vram))
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["bytes_up"] > 0
    assert result["bytes_read"] > 0
    assert result["peak_rss_bytes"] <= ram + vram


@contextlib.contextmanager
def limited(nbytes: int) -> Iterator[Path]:
    group = CGROUP / f"offload-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(nbytes))
        yield group
    finally:
        group.rmdir()


@pytest.mark.skipif(not os.access(CGROUP / "tasks", os.W_OK), reason="needs a writable cgroup v1 memory controller")
def test_a_container_of_exactly_the_budget_does_not_kill_it(wide_dense: Path) -> None:
    ram = parse_size(smallest(wide_dense))
    with limited(ram) as group:
        run = generate(wide_dense, "--prompt-ids", "5,6,7,8", "--max-new-tokens", "8", "--ram", str(ram), group=group)
        assert run.returncode == 0, (run.returncode, run.stderr)
        assert json.loads(run.stdout)["new_tokens"] == 8
        # left to itself it sees the container's limit, not the machine's memory
        run = generate(wide_dense, "--prompt-ids", "5,6,7,8", "--max-new-tokens", "8", group=group)
        if run.returncode == 0:
            assert json.loads(run.stdout)["ram_budget_bytes"] <= ram
        else:
            assert "too small" in run.stderr


def test_cgroup_limits_are_read(tmp_path: Path) -> None:
    proc, root = tmp_path / "cgroup", tmp_path / "fs"
    (root / "memory" / "a" / "b").mkdir(parents=True)
    (root / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712")
    (root / "memory" / "a" / "memory.limit_in_bytes").write_text("1000")
    (root / "memory" / "a" / "b" / "memory.limit_in_bytes").write_text("5000")
    proc.write_text("3:cpu,cpuacct:/\n2:memory:/a/b\n")
    assert cgroup_limit(proc, root) == 1000, "an ancestor's limit binds too"
    (root / "c").mkdir()
    (root / "c" / "memory.max").write_text("777")
    proc.write_text("0::/c\n")
    assert cgroup_limit(proc, root) == 777
    (root / "c" / "memory.max").write_text("max")
    assert cgroup_limit(proc, root) is None
    proc.write_text("0::/not/mounted/here\n")
    (root / "memory.max").write_text("123")
    assert cgroup_limit(proc, root) == 123, "inside a container the mount's root is our group"

"""Runs a command in a memory cgroup (v1 or v2) and says what it used at most and whether the kernel killed it.

The limit counts everything the group touches: the process, its page cache and buffers the kernel keeps for it. So a
program that maps its files may fill the limit with cache that would be given back; the peak reported here is
therefore no measure of need. Ask the process for its VmHWM for that.

Several commands can run in one group one after the other: what the first left in the page cache is then still charged
to the limit, as on a machine with that much memory. A fresh group instead would find it cached for nothing.

Without the rights to make a group the command runs unlimited and the result says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from common import GIB, BenchError, gib, mem_available, parse_size, say

CGROUP = Path("/sys/fs/cgroup")
STDERR_KEPT = 2000  # characters from the end


@dataclass(frozen=True)
class Ran:
    """One command: `peak_bytes` is the group's, page cache included (None where the kernel does not tell)."""

    returncode: int
    wall_s: float
    limited: bool
    mechanism: str
    limit_bytes: int | None
    peak_bytes: int | None
    oom_killed: bool
    timed_out: bool
    stdout: str
    stderr: str

    def failure(self) -> str | None:
        """What went wrong, in a line, or None."""
        if self.oom_killed:
            return f"killed by the kernel: out of memory in {gib(self.limit_bytes or 0)}"
        if self.timed_out:
            return f"gave up after {self.wall_s:.0f} s"
        if self.returncode:
            last = self.stderr.strip().splitlines()[-1:] or ["no message"]
            return f"exit code {self.returncode}: {last[0]}"
        return None


class Held:
    """Memory that is really there, held by a child process outside any group until `release_held` frees it.

    Virtual machines often give free memory back to their host, and getting it again costs seconds per GiB, far more
    than the disk: whoever touches memory first would be charged for that. Held until a measured process starts to
    load, it is free and warm right then. On real hardware this changes nothing.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes if nbytes + GIB < mem_available() else 0
        self._process: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int | None:
        """Of the process that holds it; None if there was not enough memory to spare."""
        return self._process.pid if self._process is not None else None

    def __enter__(self) -> Held:
        if self.nbytes:
            command = [sys.executable, "-c", _HOLD, str(self.nbytes)]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert self._process.stdout is not None
            self._process.stdout.readline()
        return self

    def __exit__(self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


_HOLD = """
import mmap, sys
m = mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
m.madvise(mmap.MADV_HUGEPAGE)
for at in range(0, len(m), 4096):
    m[at] = 1
print("held", flush=True)
sys.stdin.read()
"""


def release_held(pid: int) -> None:
    """End the process of a `Held` and return when its memory is free."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    for _ in range(1000):
        # a zombie, which its parent has yet to wait for, has given its memory back
        if _text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()[:1] in ([], ["Z"]):
            return
        time.sleep(0.01)


class Group:
    """A memory cgroup that is removed on exit, with whatever still runs in it. Use as a context manager.

    `limit` None, or no right to make one: commands run unlimited (`limited` is False, `why` says which).
    """

    def __init__(self, limit: int | None, *, root: Path = CGROUP, proc: Path = Path("/proc/self/cgroup")) -> None:
        self.limit = limit
        self.folder: Path | None = None
        self.mechanism = "none"
        self.why = "no limit asked for"
        if limit is None:
            return
        for version, parent in candidates(root, proc):
            folder = parent / f"offload-bench-{os.getpid()}-{secrets.token_hex(3)}"
            try:
                folder.mkdir()
            except OSError as e:
                self.why = f"cannot make a group in cgroup v{version}: {e.strerror}"
                continue
            try:
                _set_limit(folder, version, limit)
            except OSError as e:
                self.why = f"cannot limit memory with cgroup v{version}: {e.strerror}"
                folder.rmdir()
                continue
            self.folder, self.mechanism, self.why = folder, f"cgroup v{version}", ""
            return
        if self.why == "no limit asked for":
            self.why = "no memory cgroup is mounted"

    @property
    def limited(self) -> bool:
        """Whether the limit is in force."""
        return self.folder is not None

    def run(
        self, command: Sequence[str], *, timeout: float | None = None, env: Mapping[str, str] | None = None,
        capture: bool = True,
    ) -> Ran:  # fmt: skip
        """Run `command` in the group to its end. Without `capture` its output goes where ours goes."""
        if self.folder is not None:
            # the shell puts itself into the group and becomes the command: every byte is charged from the start
            procs = str(self.folder / "cgroup.procs")
            command = ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', procs, *command]
            _reset_peak(self.folder)
        kills = self._oom_kills()
        pipe = subprocess.PIPE if capture else None
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, env=env, text=True, start_new_session=True)
        timed_out = False
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        wall = time.perf_counter() - began
        return Ran(
            returncode=process.returncode,
            wall_s=wall,
            limited=self.limited,
            mechanism=self.mechanism,
            limit_bytes=self.limit if self.limited else None,
            peak_bytes=_peak(self.folder) if self.folder is not None else None,
            oom_killed=self._oom_kills() > kills,
            timed_out=timed_out,
            stdout=out or "",
            stderr=(err or "")[-STDERR_KEPT:],
        )

    def _oom_kills(self) -> int:
        return oom_kills(self.folder) if self.folder is not None else 0

    def __enter__(self) -> Group:
        return self

    def __exit__(self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        folder, self.folder = self.folder, None
        if folder is None:
            return
        for _ in range(50):
            for pid in _pids(folder):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)  # only what was started in our own group
            with contextlib.suppress(OSError):
                (folder / "memory.force_empty").write_text("0")  # v1: else its cache outlives the group
            with contextlib.suppress(OSError):
                folder.rmdir()
                return
            time.sleep(0.1)
        say(f"could not remove {folder}")


def candidates(root: Path, proc: Path) -> list[tuple[int, Path]]:
    """(cgroup version, folder) where a memory group may be made, nearest to this process first."""
    found: list[tuple[int, Path]] = []
    for line in proc.read_text().splitlines() if proc.is_file() else []:
        hierarchy, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            base, version = root / "memory", 1
        elif hierarchy == "0":
            base, version = (root / "unified" if (root / "unified").is_dir() else root), 2
        else:
            continue
        own = base / path.lstrip("/")
        # in a container the path may be the host's, which is not mounted here: the mount's root is then our group
        for folder in [own, *own.parents] if own.is_dir() else [base]:
            if folder != base and base not in folder.parents:
                break
            if version == 1 and (folder / "memory.limit_in_bytes").is_file():
                found.append((1, folder))
            # v2 gives a child the memory controller only where its parent says so
            if version == 2 and "memory" in _text(folder / "cgroup.subtree_control").split():
                found.append((2, folder))
    return sorted(found, key=lambda f: f[0])  # v1 first: both mounted means that memory is in v1


def oom_kills(folder: Path) -> int:
    """How often the kernel has killed in the group so far."""
    for file in ("memory.events", "memory.oom_control"):  # v2, v1
        for line in _text(folder / file).splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    return 0


def drop_caches(files: Sequence[Path] = ()) -> str:
    """Make the next reads cold. Returns what could be dropped: `all` (needs root), else `files` or `nothing`."""
    os.sync()  # dirty pages would stay
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return "all"
    except OSError:
        pass
    for f in files:
        fd = os.open(f, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    return "files" if files else "nothing"


def _set_limit(folder: Path, version: int, limit: int) -> None:
    (folder / ("memory.limit_in_bytes" if version == 1 else "memory.max")).write_text(str(limit))
    swap, value = ("memory.memsw.limit_in_bytes", str(limit)) if version == 1 else ("memory.swap.max", "0")
    with contextlib.suppress(OSError):  # absent where the kernel does not account swap
        (folder / swap).write_text(value)


def _reset_peak(folder: Path) -> None:
    with contextlib.suppress(OSError):
        (folder / "memory.max_usage_in_bytes").write_text("0")


def _peak(folder: Path) -> int | None:
    text = _text(folder / "memory.max_usage_in_bytes") or _text(folder / "memory.peak")
    return int(text) if text.strip() else None


def _pids(folder: Path) -> list[int]:
    return [int(line) for line in _text(folder / "cgroup.procs").split()]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("limit", help="for example 4.5GiB")
    parser.add_argument("--timeout", type=float, help="seconds, then the command is killed")
    parser.add_argument("--json", type=Path, help="write the result here instead of to stderr")
    parser.add_argument("--keep-caches", action="store_true", help="do not drop the page cache first")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after --")
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error("no command given")
    try:
        limit = parse_size(args.limit)
    except BenchError as e:
        parser.error(str(e))
    dropped = "kept" if args.keep_caches else drop_caches()
    with Group(limit) as group:
        if not group.limited:
            say(f"running WITHOUT a limit: {group.why}")
        ran = group.run(command, timeout=args.timeout, capture=False)
    result = {k: v for k, v in asdict(ran).items() if k not in ("stdout", "stderr")} | {"caches_dropped": dropped}
    if args.json:
        args.json.write_text(json.dumps(result) + "\n")
    else:
        say(json.dumps(result))
    return 137 if ran.oom_killed else ran.returncode if ran.returncode >= 0 else 128 - ran.returncode


if __name__ == "__main__":
    sys.exit(main())

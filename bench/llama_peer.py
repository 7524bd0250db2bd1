"""llama.cpp as a peer: builds `llama_stream.c` against a built checkout, has the GGUF file written, makes the command.

Measures nothing itself. The checkout must be built with shared libraries, which is its default:
`cmake -B build && cmake --build build -j --target llama`. llama.cpp's own `gguf-py` writes the GGUF file
(`gguf_write.py`), in a process of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from checkpoints import INDEX
from common import BENCH, BenchError, gib, say, worker_env

BUILD_IT = "build it there: cmake -B build && cmake --build build -j --target llama"
HEADERS = ("include/llama.h", "ggml/include/ggml-backend.h")
LIBRARIES = ("llama", "ggml", "ggml-base")


@dataclass(frozen=True)
class Built:
    """A compiled program and the checkout it runs with."""

    checkout: Path
    program: Path
    version: str

    def command(
        self, model: Path, tokens: Path, *, prompt: int, threads: int, max_seconds: float, logits: Path,
        holder: int | None,
    ) -> list[str]:  # fmt: skip
        """What to run of `llama_stream`; `holder` is the process of a `limit.Held`, which it ends before it loads."""
        return [
            str(self.program), str(model), str(tokens), str(prompt), str(threads), str(max_seconds), str(logits),
            str(holder or 0),
        ]  # fmt: skip


def build(checkout: Path, out: Path, source: str = "llama_stream.c") -> Built:
    """Compile `source` of this folder to `out`. Raises `BenchError` that says what is missing."""
    checkout = checkout.resolve()
    libraries = libraries_folder(checkout)
    for header in HEADERS:
        if not (checkout / header).is_file():
            raise BenchError(f"{checkout} has no {header}: it is no llama.cpp checkout")
    compiler = shutil.which("cc")
    if compiler is None:
        raise BenchError("a C compiler (cc) is needed to measure llama.cpp")
    command = [
        compiler, "-O2", "-o", str(out), str(BENCH / source),
        *(f"-I{(checkout / header).parent}" for header in HEADERS),
        f"-L{libraries}", f"-Wl,-rpath,{libraries}", *(f"-l{name}" for name in LIBRARIES),
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        errors = [line for line in ran.stderr.splitlines() if "error" in line or "undefined" in line]
        raise BenchError(f"{source} does not compile against this llama.cpp: {(errors or [ran.stderr])[0]}")
    return Built(checkout, out, version(checkout))


def libraries_folder(checkout: Path) -> Path:
    """Where the shared libraries of a built checkout are."""
    for folder in (checkout / "build" / "bin", checkout / "build" / "src"):
        if (folder / "libllama.so").exists():
            return folder
    raise BenchError(f"no libllama.so under {checkout / 'build'}; {BUILD_IT}")


def version(checkout: Path) -> str:
    """Version and commit as the build recorded them, and the llama-cpp-python release it came with, where known."""
    found = []
    for name, pattern in (
        ("build/llama.pc", r"^Version: *(\S+)"),
        ("build/common/build-info.cpp", r'COMMIT = "(\w+)"'),
        ("../../PKG-INFO", r"^Name: *llama_cpp_python\nVersion: *(\S+)"),
    ):
        path = checkout / name
        match = re.search(pattern, path.read_text(), re.MULTILINE) if path.is_file() else None
        if match:
            found.append({"llama.pc": "", "build-info.cpp": "commit "}.get(path.name, "llama-cpp-python ") + match[1])
    return ", ".join(found) or "unknown version"


def gguf(folder: Path, checkout: Path, nbytes: int) -> Path:
    """`folder`.gguf beside the checkpoint `folder`; written if it is not there or older. `nbytes`: about its size."""
    out = folder.with_name(f"{folder.name}.gguf")
    if out.is_file() and out.stat().st_mtime >= (folder / INDEX).stat().st_mtime:
        return out
    free = shutil.disk_usage(folder).free
    if free < nbytes * 1.1:
        raise BenchError(f"{out.name} needs {gib(nbytes)} of disk, {gib(free)} are free; give --scratch")
    say(f"writing {out.name}")
    env = worker_env()
    env["PYTHONPATH"] = os.pathsep.join((str(checkout / "gguf-py"), env["PYTHONPATH"]))
    command = [sys.executable, str(BENCH / "gguf_write.py"), str(folder), str(out)]
    ran = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True)
    if ran.returncode:
        last = ran.stderr.strip().splitlines()[-1:] or ["no message"]
        raise BenchError(f"{out.name} was not written: {last[0].removeprefix('error: ')}")
    return out


def write_tokens(tokens: Sequence[int], out: Path) -> Path:
    """The stream as `llama_stream` reads it."""
    out.write_text(" ".join(map(str, tokens)) + "\n")
    return out

"""`offload batch`: progress on stderr, a summary at the end."""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cli.progress import dim
from cli.run import loading
from offload.errors import Interrupted, OffloadError, UsageError

if TYPE_CHECKING:
    from offload.batch.job import JobStats

_EVERY_S, _EVERY_LINES_S = 0.2, 30.0  # between two lines: on a terminal, which one replaces; in a file


def command(args: argparse.Namespace) -> int:
    """Run the job, and say how it went."""
    import offload

    if args.json and args.output == "-":
        raise UsageError("--json and -o - both print on standard output; use --summary FILE")
    if args.summary is not None and not Path(args.summary).absolute().parent.is_dir():
        raise UsageError(f"--summary {args.summary}: there is no such folder")
    stop = threading.Event()
    shown = _Shown()
    try:
        with _stoppable(stop) as ready:

            def begun(stats: JobStats) -> None:
                ready.set()  # imports take seconds, in which there is nothing to be finished
                shown(stats)

            stats = offload.run_batch(
                args.model, args.input, args.output, errors=args.errors, max_tokens=args.max_tokens,
                sequences=args.sequences, ignore_eos=args.ignore_eos, share=not args.no_sharing, stop=stop,
                prefix_cache=args.prefix_cache, on=args.on, workers=args.workers, progress=begun, note=shown.note,
                **loading(args),
            )  # fmt: skip
    except Interrupted:
        shown.clear()
        kept = "" if args.output == "-" else "; what is answered is kept, and the same command goes on from there"
        print(f"offload batch: interrupted{kept}: {_again(args)}" if kept else "offload batch: interrupted",
              file=sys.stderr)  # fmt: skip
        gc.freeze()  # else the interpreter goes through all that was imported at its end, for a second or more
        return Interrupted.exit_code
    finally:
        shown.clear()
    print(dim(summary(stats), sys.stderr), file=sys.stderr)
    text = json.dumps(stats.as_json())
    if args.summary is not None:
        _write(Path(args.summary), text)
    if args.json:
        print(text, flush=True)
    return 0


def summary(stats: JobStats) -> str:
    """One line for people."""
    parts = [f"{stats.done} of {stats.total} answered"]
    if stats.failed:
        parts.append(f"{stats.failed} with an error")
    if stats.before:
        parts.append(f"{stats.before} before")
    if stats.rate is not None:
        told = f" (predicted {stats.predicted:.3g})" if stats.predicted is not None else ""
        parts.append(f"{stats.new_tokens} tokens in {_time(stats.seconds)}: {stats.rate:.3g} a second{told}")
        parts.append(f"{stats.computed_tokens / stats.seconds:.3g} prompt tokens a second")
        if stats.reused_tokens:
            parts.append(f"{stats.reused_tokens} prompt tokens shared")
        parts.append(f"{stats.bottleneck}-bound")
    return " · ".join(parts)


def line(stats: JobStats) -> str:
    """The state of things, in one line."""
    if stats.what == "reading":
        return f"reading requests: {stats.total}"
    if stats.what == "loading":
        return f"{stats.total} requests, {stats.done + stats.failed} answered before; loading the model"
    parts = [f"{stats.done + stats.failed}/{stats.total} requests"]
    if stats.failed:
        parts.append(f"{stats.failed} errors")
    if stats.seconds and stats.passes:
        told = f" (predicted {stats.predicted:.3g})" if stats.predicted is not None else ""
        parts.append(f"{stats.new_tokens / stats.seconds:.3g} tokens/s out{told}")
        parts.append(f"{stats.computed_tokens / stats.seconds:.3g} in")
        if stats.reused_tokens:
            parts.append(f"{100 * stats.reused_tokens / (stats.reused_tokens + stats.computed_tokens):.0f}% shared")
        parts.append(f"{stats.running} running")
        parts.append(f"{stats.bottleneck}-bound")
    if stats.eta_s is not None:
        parts.append(f"{_time(stats.eta_s)} left")
    return " · ".join(parts)


class _Shown:
    """The last line on stderr."""

    def __init__(self) -> None:
        self._tty = sys.stderr.isatty()
        self._at = 0.0
        self._width = 0

    def __call__(self, stats: JobStats) -> None:
        now = time.monotonic()
        if stats.what == "reading" and not stats.total:
            return
        if now - self._at < (_EVERY_S if self._tty else _EVERY_LINES_S):
            return
        self._at = now
        text = line(stats)
        if not self._tty:
            print(text, file=sys.stderr, flush=True)
            return
        text = text[: max(20, os.get_terminal_size(sys.stderr.fileno()).columns - 1)]
        print(f"\r{text:<{self._width}}", end="", file=sys.stderr, flush=True)
        self._width = len(text)

    def clear(self) -> None:
        """Take it away."""
        if self._width:
            print("\r" + " " * self._width + "\r", end="", file=sys.stderr, flush=True)
            self._width = 0

    def note(self, text: str) -> None:
        """Something that a user should know."""
        self.clear()
        print(f"offload batch: {text}", file=sys.stderr)


@contextmanager
def _stoppable(stop: threading.Event) -> Iterator[threading.Event]:
    """While this lasts, Ctrl-C and SIGTERM end the job at the next layer; a second one ends it wherever it is, and so
    does the first before the event that is yielded is set."""
    ready = threading.Event()

    def stopped(signum: int, frame: object) -> None:
        if stop.is_set() or not ready.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {s: signal.signal(s, stopped) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield ready
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def _again(args: argparse.Namespace) -> str:
    """The command, as it was given."""
    return shlex.join(["offload", *sys.argv[1:]])


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as e:
        raise OffloadError(f"--summary {path}: {e.strerror}") from e


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, left = divmod(round(seconds), 60)
    return f"{minutes} min {left} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"

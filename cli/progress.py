"""Progress on stderr: a line that rewrites itself on a terminal, nothing where there is none and it is quick."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

_EVERY_S = 0.1
_EVERY_S_LOG = 10.0  # without a terminal: a line now and then


def dim(text: str, stream: TextIO) -> str:
    """Grey on a terminal."""
    return f"\033[2m{text}\033[0m" if stream.isatty() else text


class Progress:
    """Call it with (what, bytes done, bytes in all); shows share, rate and the time left."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._out = stream or sys.stderr
        self._tty = self._out.isatty()
        self._began = self._shown = time.monotonic()
        self._open = False
        self._done = 0

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show where things stand, if it is time to."""
        now = time.monotonic()
        if done >= total:
            self._clear()
            return
        if now - self._shown < (_EVERY_S if self._tty else _EVERY_S_LOG):
            return
        self._shown = now
        if done < self._done:  # another pass has begun
            self._began = now
        self._done = done
        rate = done / max(1e-9, now - self._began)
        left = (total - done) / rate if rate else 0.0
        text = f"{what} {done / 1e9:.2f} of {total / 1e9:.2f} GB · {rate / 1e9:.2f} GB/s · {left:.0f} s left"
        if self._tty:
            print(f"\r\033[K{text}", end="", file=self._out, flush=True)
            self._open = True
        else:
            print(text, file=self._out, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._clear()

    def _clear(self) -> None:
        if self._open:
            print("\r\033[K", end="", file=self._out, flush=True)
            self._open = False

"""A process that kills itself in the middle of writing."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from typing import Any


def die_at(call: int, calls: Sequence[str]) -> None:
    """From now on, be killed at the `call`-th of these functions of `os`, which change files: before it, or with half
    of it written."""
    left = call

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                if name == "write":
                    real(args[0], memoryview(args[1])[: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return instead

    for name in calls:
        setattr(os, name, counted(name, getattr(os, name)))

"""A timeline of transfers, stalls and compute in the Chrome trace format (opens in Perfetto).

Events are kept as tuples and written once at the end, so that recording costs next to nothing.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tiers.queue import Ticket

_LANES = ("compute", "stall", "link", "disk")
_COLOURS = {"stall": "terrible", "demand": "bad", "prefetch": "good"}  # Chrome's reserved names


class Trace:
    """Slices in lanes. Times are `time.perf_counter()` seconds."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.slices: list[tuple[str, str, float, float, dict[str, Any]]] = []

    def slice(self, lane: str, name: str, start: float, stop: float, **args: Any) -> None:
        """Something that took from `start` to `stop`. Appending is atomic, so any thread may call."""
        self.slices.append((lane, name, start, stop, args))

    def transfer(self, lane: str, ticket: Ticket) -> None:
        """A finished transfer: its block, bytes and cause."""
        cause = ticket.cause.name.lower()
        if ticket.cancelled:
            cause += ", cancelled"
        self.slice(lane, ticket.key, ticket.started, ticket.finished, bytes=ticket.nbytes, cause=cause)

    def busy(self, lane: str, start: float, stop: float) -> float:
        """Seconds between `start` and `stop` in which the lane had at least one slice."""
        inside = (x for x in list(self.slices) if x[0] == lane and x[2] < stop and x[3] > start)
        spans = sorted((max(a, start), min(b, stop)) for _, _, a, b, _ in inside)
        total, reached = 0.0, start
        for a, b in spans:
            if b > reached:
                total += b - max(a, reached)
                reached = b
        return total

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        events: list[dict[str, Any]] = []
        rows: dict[str, list[float]] = {}  # lane → when each of its rows is free: overlapping slices need several
        ids: dict[tuple[str, int], int] = {}
        for lane, name, start, stop, args in sorted(self.slices, key=lambda s: s[2]):
            free = rows.setdefault(lane, [])
            row = next((i for i, t in enumerate(free) if t <= start), len(free))
            if row == len(free):
                free.append(0.0)
            free[row] = stop
            order = _LANES.index(lane) if lane in _LANES else len(_LANES)
            tid = ids.setdefault((lane, row), 100 * order + row)
            event = {"ph": "X", "pid": 1, "tid": tid, "name": name, "cat": lane, "args": args,
                     "ts": (start - self.began) * 1e6, "dur": max(0.0, stop - start) * 1e6}  # fmt: skip
            colour = _COLOURS.get(lane) or _COLOURS.get(str(args.get("cause", "")))
            if colour:
                event["cname"] = colour
            events.append(event)
        for (lane, row), tid in ids.items():
            label = lane if row == 0 else f"{lane} {row + 1}"
            events.append({"ph": "M", "pid": 1, "tid": tid, "name": "thread_name", "args": {"name": label}})
            events.append({"ph": "M", "pid": 1, "tid": tid, "name": "thread_sort_index", "args": {"sort_index": tid}})
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(fd, "w") as f:
            json.dump({"traceEvents": events, "displayTimeUnit": "ms"}, f)
        os.replace(temporary, path)

"""How often a pass tells the device what to do, and how often it waits for it: counted by torch's profiler.

Launches and host synchronisations per token are what a GPU that waits for its host is judged by. Profiling slows a
pass down and keeps a record of everything in it, so this is done only when asked for. NOT YET RUN ON A GPU: the
counting is tested on lists of events such as the profiler gives.

Names are those of the CUDA runtime and driver APIs, as CUPTI reports them.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from torch.profiler import ProfilerActivity, profile

from offload.stats import StepStats

_LAUNCH = re.compile(r"(cuda|cu)(LaunchKernel|LaunchCooperativeKernel|GraphLaunch)")
# an asynchronous copy that must be waited for shows as such a wait
_SYNC = re.compile(r"cuda(Stream|Device|Event)Synchronize|cu(Stream|Ctx|Event)Synchronize|cudaMemcpy(?!\w*Async)")


class Event(Protocol):
    """What is looked at of a profiler's event. `device_resource_id` of a call is its thread, as the kernel knows it."""

    @property
    def name(self) -> str:
        """The function called."""
        ...

    @property
    def device_resource_id(self) -> int:
        """Of a call, `threading.get_native_id()` of the thread that made it."""
        ...


def count(events: Iterable[Event], thread: int) -> tuple[int, int]:
    """(launches, host synchronisations) among the calls of `thread`.

    Other threads are transfers: that these wait for their copies keeps no kernel from being launched.
    """
    names = [e.name for e in events if e.device_resource_id == thread]
    return sum(bool(_LAUNCH.match(n)) for n in names), sum(bool(_SYNC.match(n)) for n in names)


@contextmanager
def counted(stats: StepStats) -> Iterator[None]:
    """Count what this thread does until the end of the block, and enter it in `stats`."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        yield
    events = profiler.events()
    if events is not None:
        stats.launches, stats.syncs = count(events, threading.get_native_id())
        stats.counted = 1

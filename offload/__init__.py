"""Run language models larger than memory, from their original files, inside a budget.

::

    import offload
    model = offload.load("Qwen/Qwen3-30B-A3B", ram="24GiB")
    model.generate("Once upon a time", max_new_tokens=64)
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if "torch" not in sys.modules:
    # OpenMP reads this when torch is loaded. A compute thread that spins while it waits takes the core away from the
    # one it waits for as soon as anything else runs: 25 times slower on two busy cores, no faster on idle ones.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from tiers.errors import (
    BudgetError,
    CheckpointError,
    Interrupted,
    ModelError,
    OffloadError,
    ReadError,
    UsageError,
)

if TYPE_CHECKING:
    from offload.batch.job import JobStats
    from offload.hardware import Profile
    from offload.model import Conversation, Generation, Model
    from offload.planning.report import Report
    from offload.routing_report import RoutingReport

__version__ = "0.1.0"


def load(
    model: str | Path | None = None,
    *,
    max_memory: Mapping[Any, str | int] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> Model:
    """Load a model: a folder, a bundled name, or a hub id; the bundled demo model if left out.

    Options: `ram`, `resident`, `device`, `dtype`, `context`, `threads` and more (see `offload.config.RunConfig`), or
    accelerate's `max_memory={"cpu": "24GiB"}`. `progress(what, bytes_done, bytes_in_all)` is called while loading.
    Raises an `OffloadError` whose message is one line that names the remedy.
    """
    from offload.config import RunConfig

    config = RunConfig.of(options, max_memory)  # a wrong option is told before seconds of imports
    from tiers.memory import tame_malloc

    tame_malloc()
    from offload.resolve import resolve

    folder = resolve(model)
    import torch

    from offload.engine import Engine
    from offload.model import Model

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return Model(Engine(folder, config, progress))


def run_batch(
    model: str | Path | None, input: str | Path, output: str | Path, *, errors: str | Path | None = None,
    max_tokens: int | None = None, sequences: int | None = None, ignore_eos: bool = False, share: bool = True,
    prefix_cache: bool = False, stop: threading.Event | None = None, on: str | None = None, workers: int | None = None,
    progress: Callable[[JobStats], None] = lambda stats: None, note: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> JobStats:  # fmt: skip
    """Answer a file of requests (OpenAI's batch lines) in another, every one exactly once; say how it went.

    `input` and `output` are files, or `-` for stdin and stdout; `errors` is a file for the lines that cannot be
    answered, which else go to the output. After a crash, or if `stop` is set, the same call goes on where it stopped.
    `max_tokens` of an answer whose request does not say; `sequences` run at once (None: as many as are predicted to be
    fastest); `share`: fronts that requests have in common are computed once; `prefix_cache`: keys and values are
    read from disk where any run has stored them, and stored; `ignore_eos`: no token ends an answer.
    `on="ray"`: the answers come from a Ray cluster, `workers` of them (None: one per node); see
    `offload.batch.cluster`. Options as for `load`, of each worker where there are several. Raises an `OffloadError`
    whose message is one line that names the remedy.
    """
    from offload.config import RunConfig

    config = RunConfig.of(options)
    if on not in (None, "ray"):
        raise UsageError(f"--on: {on!r} is not ray; leave it out to run here")
    if workers is not None and on is None:
        raise UsageError("--workers: there are workers with --on ray only")
    for flag, value in (("--max-tokens", max_tokens), ("--sequences", sequences), ("--workers", workers)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 30):
            raise UsageError(f"{flag}: {value!r} is not a whole number above zero")
    from tiers.memory import tame_malloc

    tame_malloc()
    from offload.resolve import everywhere, resolve

    make = None
    if on is not None:
        from offload.batch import cluster

        cluster.require()
    folder = resolve(model)
    import torch

    from offload.batch.job import How, run_job

    if on is not None:
        make = functools.partial(cluster.RayJob, model=everywhere(model), workers=workers)

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return run_job(
        folder, config, str(input), str(output), errors=None if errors is None else str(errors), max_tokens=max_tokens,
        how=How(sequences, share, prefix_cache), ignore_eos=ignore_eos, names=() if model is None else (str(model),),
        stop=stop, on_progress=progress, on_notes=note, make=make,
    )  # fmt: skip


def plan(
    model: str | Path | None = None,
    *,
    hardware: str | None = None,
    prompt_tokens: int = 512,
    new_tokens: int = 128,
    batch: int = 1,
    alternatives: bool = True,
    **options: Any,
) -> Report:
    """What would live where, how fast that would be, what limits it and what would help. Reads no weights.

    `model` may also be the name of a known model that is not here, or a folder that has only a `config.json`.
    `hardware` is the name of a described machine or a file that describes one; left out, this machine. Options: `ram`,
    `vram`, `resident`, `device`, `dtype`, `context`, `kv_resident`, `link`, `overrides` as for `load`; the workload is
    `batch` sequences of `prompt_tokens`, continued by `new_tokens` each. Without `alternatives`, batches and what-ifs
    are left out. Raises `UsageError`, `ModelError`, `BudgetError`.
    """
    from offload.config import RunConfig

    config = RunConfig.of(options)
    for flag, value in (("prompt-tokens", prompt_tokens), ("new-tokens", new_tokens), ("batch", batch)):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 30:
            raise UsageError(f"--{flag}: {value!r} is not a whole number above zero")
    from offload.planning.ask import ask
    from offload.planning.predict import Workload

    return ask(model, hardware, config, Workload(prompt_tokens, new_tokens, batch), alternatives=alternatives)


def profile(model: str | Path | None = None, *, fresh: bool = False, **options: Any) -> Profile:
    """Measured speeds of this machine, on the disk that holds `model`; kept for a month unless `fresh`.

    Options: `device`, `link` as for `load`.
    """
    from offload.config import RunConfig

    config = RunConfig.of(options)
    from offload.hardware import profile as measured
    from offload.means import make_device
    from offload.resolve import resolve

    return measured(resolve(model), make_device(config), fresh=fresh)


def routing(path: str | Path) -> RoutingReport:
    """What a recorded routing trace says: use of experts, repetition, what caches would hit. No model is needed.

    Raises `UsageError` if there is no such file or nothing was recorded, `ModelError` if it is damaged or no trace.
    """
    from offload.routing_report import routing_report

    return routing_report(Path(path))


def __getattr__(name: str) -> Any:
    # the model module imports torch and transformers; `import offload` alone should not
    if name in ("Model", "Generation", "Conversation"):
        from offload import model as module

        return getattr(module, name)
    raise AttributeError(f"module 'offload' has no attribute {name!r}")


__all__ = [
    "BudgetError", "CheckpointError", "Conversation", "Generation", "Interrupted", "Model", "ModelError",
    "OffloadError", "ReadError", "UsageError", "load", "plan", "profile", "routing", "run_batch",
]  # fmt: skip

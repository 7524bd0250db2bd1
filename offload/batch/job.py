"""A batch job from file to file: what `offload batch` does.

Lines are read, checked and put in order first, without weights; how they are is what the plan is made for. Then they
run, and every answer is on disk, and known to be, before it counts. The same command goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from kvstore import PrefixStore, Sessions
from offload.batch.compose import Composer
from offload.batch.edge import AsyncOutput, ReadAhead
from offload.batch.journal import Checkpoint, Workload
from offload.batch.lines import MAX_LINE, Source
from offload.batch.order import key_of
from offload.batch.output import Output
from offload.batch.padded import PaddedRunner
from offload.batch.prepare import Prepared, Preparer
from offload.batch.requests import LineError, too_long
from offload.batch.runner import OnPass, RaggedRunner, Runner, Task
from offload.batch.runner import Progress as Passes
from offload.checkpoint import read_checkpoint
from offload.config import Job, RunConfig
from offload.engine import Engine
from offload.fingerprint import fingerprint
from offload.hf import load_config
from offload.stats import StepStats
from tiers import Interrupted, UsageError
from tiers import memory as mem
from tiers.folders import cache_folder

CHECKPOINT_S = 20.0  # between two checkpoints of what is running
_UNSEEN = 32  # tokens that a checkpoint must have more than the one before


@dataclass(slots=True)
class JobStats:
    """How a job stands. `before` requests had their answer when it began; `failed` are error lines, of all `total`.

    Tokens and seconds are of this run: `prompt_tokens` of the requests that have ended, `reused_tokens` of prompts that
    were not computed because another had the same front. `predicted` and `rate` are answers' tokens per second.
    """

    total: int = 0
    done: int = 0
    failed: int = 0
    before: int = 0
    prompt_tokens: int = 0
    computed_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    wanted_tokens: int = 0  # new ones that the requests left at the beginning may have, at most
    ended_tokens: int = 0  # of these, those of requests that have ended
    running: int = 0
    sequences: int = 0
    passes: int = 0
    seconds: float = 0.0
    load_s: float = 0.0
    predicted: float | None = None
    step: StepStats = field(default_factory=StepStats)
    peak_rss_bytes: int = 0
    budget_bytes: int = 0
    learned: str = ""  # what this run corrected for the next plan
    what: str = "requests"  # reading, loading, requests

    @property
    def rate(self) -> float | None:
        """Answers' tokens per second."""
        return self.new_tokens / self.seconds if self.seconds and self.new_tokens else None

    @property
    def eta_s(self) -> float | None:
        """Seconds it will take if it goes on as it did."""
        if not self.ended_tokens or not self.seconds:
            return None
        return self.seconds * max(0, self.wanted_tokens - self.ended_tokens) / self.ended_tokens

    @property
    def bottleneck(self) -> str:
        """`disk` if compute waited for reads for more than half of the time spent in passes, else `compute`."""
        return "disk" if self.step.seconds and self.step.stall_s > 0.5 * self.step.seconds else "compute"

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        own = {k: v for k, v in asdict(self).items() if k not in ("step", "what", "ended_tokens", "wanted_tokens")}
        rate = self.rate
        return {
            **own,
            "new_tokens_per_s": rate,
            "tokens_per_s": (self.computed_tokens + self.reused_tokens + self.new_tokens) / self.seconds
            if self.seconds
            else None,
            "predicted_new_tokens_per_s": self.predicted,
            "prediction_error": self.predicted / rate - 1 if self.predicted and rate else None,
            "bottleneck": self.bottleneck,
            "stall_s": self.step.stall_s,
            "bytes_read": self.step.bytes_read,
            "kv_bytes_read": self.step.kv_bytes_read,
            "kv_bytes_written": self.step.kv_bytes_written,
        }


@dataclass(frozen=True, slots=True)
class How:
    """How a job is run, which changes no answer (in float32). `sequences` at once (None: as many as are predicted to be
    fastest); `share` fronts that requests have in common; with `prefix_cache`, keys and values that any run has stored
    are read instead of computed, and what is computed is stored, so that after a crash little is computed again."""

    sequences: int | None = None
    share: bool = True
    prefix_cache: bool = False


OnProgress = Callable[[JobStats], None]


def run_job(
    folder: Path, config: RunConfig, source: str, out: str, *, errors: str | None = None, max_tokens: int | None = None,
    how: How | None = None, ignore_eos: bool = False, max_line: int = MAX_LINE, names: Collection[str] = (),
    stop: threading.Event | None = None, on_progress: OnProgress = lambda stats: None,
    on_notes: Callable[[str], None] = lambda note: None, make: Callable[..., BatchJob] | None = None,
) -> JobStats:  # fmt: skip
    """Answer the requests of the file `source` in the file `out`, either of them `-` for stdin or stdout.

    `errors`: a file for the lines that cannot be answered, which else go to `out`. `max_tokens` of an answer whose
    request does not say. `make`: the kind of job, where it is not this process that answers. `stop`, once set, ends the
    run at the next layer. Raises `Interrupted`, `UsageError`, `ModelError`, `BudgetError`, `StoreError`, `ReadError`;
    what had been answered by then is kept in any case.
    """
    stop = stop or threading.Event()
    stats = JobStats(what="reading")
    on_progress(stats)
    job = (make or BatchJob)(folder, config, stats, stop, on_progress, on_notes)
    job.preparer = Preparer(folder, load_config(folder), names=names, max_tokens=max_tokens, ignore_eos=ignore_eos)
    room = cache_folder()
    with contextlib.ExitStack() as held:
        given = held.enter_context(Source.open(source, folder=room, limit=max_line, seen=job.check))
        settings = {
            "model": fingerprint(list(read_checkpoint(folder).files), load_config(folder)),
            "dtype": config.dtype,
            "kv": [config.kv_budget, config.kv_policy, config.kv_by_layer, config.kv_codec],
            **job.preparer.settings,
        }
        output = held.enter_context(Output.open(out, given, settings, errors=errors, folder=room))
        job.prepare(given, output)
        job.run(given, output, how or How())
    return stats


class BatchJob:
    """One run of a job."""

    preparer: Preparer

    def __init__(
        self, folder: Path, config: RunConfig, stats: JobStats, stop: threading.Event, on_progress: OnProgress,
        on_notes: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.folder, self.config, self.stats, self.stop = folder, config, stats, stop
        self._told, self._notes = on_progress, on_notes
        self._writer: AsyncOutput | None = None
        self._saved: dict[Task, int] = {}
        self._began = self._saved_at = time.perf_counter()

    def check(self, data: bytes = b"") -> None:
        """Raises `Interrupted` if the run is to stop."""
        if self.stop.is_set():
            raise Interrupted("interrupted")

    def prepare(self, given: Source, output: Output) -> None:
        """Read all lines, unless an earlier run has, and take up what it left."""
        journal, stats = output.journal, self.stats
        if not journal.scanned:
            with journal.scan() as scan:
                for line in given.lines():
                    self.check()
                    if line.data is None:
                        scan.reject(line, too_long(line.head, line.length, given.limit))
                        continue
                    found = self.preparer.parse(line.data)
                    if isinstance(found, LineError):
                        scan.reject(line, found)
                    else:
                        custom_id = found.request.custom_id
                        scan.add(line, custom_id, len(found.prompt), found.new_tokens, key_of(found.prompt))
                    stats.total += 1
                    if not stats.total % 256:
                        self._told(stats)
        recovered = output.recover()
        for note in recovered.notes:
            self._notes(note)
        counts = journal.counts
        stats.total, stats.done, stats.failed = counts
        stats.before = counts.done + counts.failed

    def run(self, given: Source, output: Output, how: How) -> None:
        """Answer what has no answer yet."""
        journal, stats = output.journal, self.stats
        with AsyncOutput(output) as writer:
            self._writer = writer
            work = journal.workload()
            if work.requests:
                self._run(given, output, work, how)
        stats.peak_rss_bytes = max(stats.peak_rss_bytes, mem.peak_rss())
        stats.what = "requests"
        self._told(stats)

    def _run(self, given: Source, output: Output, work: Workload, how: How) -> None:
        stats, journal = self.stats, output.journal
        stats.wanted_tokens = work.new_tokens
        mean = Job(
            work.requests, max(1, work.prompt_tokens // work.requests), max(1, work.new_tokens // work.requests),
            work.longest_prompt + work.longest_new, how.sequences,
        )  # fmt: skip
        stats.what = "loading"
        engine = Engine(self.folder, replace(self.config, batch=mean), self._loading, interrupt=self.stop)
        with contextlib.ExitStack() as held:
            held.callback(engine.close)
            stats.load_s, stats.budget_bytes, stats.what = engine.load_s, engine.plan.ram, "requests"
            assert engine.rate is not None
            stats.predicted = engine.rate.new_tokens_per_s
            store = engine.prefixes(Sessions()) if how.prefix_cache else None
            runner = make_runner(engine, engine.rate.sequences, how.share, self._passed, store)
            stats.sequences = engine.rate.sequences
            held.callback(runner.close)
            rows = held.enter_context(ReadAhead(given, journal.pending()))
            self._began = time.perf_counter()
            composer = Composer(journal.job, self.preparer.name)

            def tasks() -> Iterator[Task]:
                for row, line in rows:
                    found = self.preparer.parse(line)
                    assert isinstance(found, Prepared), "a line that was checked has changed"
                    composer.begin(row.number, row.number, found)
                    states = journal.checkpoints(row.number)
                    for task in self.preparer.tasks(found, states, row.number):
                        self._saved[task] = len(task.chooser.tokens)
                        if task.chooser.finish is None:
                            yield task
                        else:  # an earlier run has come to its end, and not to that of the other choices
                            self._ended(task, composer)

            try:
                for task in runner.run(tasks()):
                    self._ended(task, composer)
                    self._tell(runner.progress)
                stats.learned = engine.learn_job(mean, runner.progress)
            except Interrupted:
                self._save(runner.running, 0)
                raise
            finally:
                self._tell(runner.progress)
                for note in engine.notes:
                    self._notes(note)

    def _ended(self, task: Task, composer: Composer) -> None:
        """An answer has ended: with the last one of its request, the line is written."""
        assert self._writer is not None
        self._saved.pop(task, None)
        composed = composer.ended(task)
        if composed is None:
            return
        answer, found = composed
        self._writer.put(answer)
        if answer.failed:
            self.stats.failed += 1
        else:
            self.stats.done += 1
            self.stats.prompt_tokens += len(found.prompt)
        self.stats.ended_tokens += found.new_tokens

    def _passed(self, runner: Runner) -> None:
        """After each pass."""
        self._tell(runner.progress)
        if time.perf_counter() - self._saved_at >= CHECKPOINT_S:
            self._save(runner.running, _UNSEEN)

    def _save(self, running: Iterable[Task], least: int) -> None:
        """Write down how far those have come that have `least` more tokens than when they were written down last."""
        assert self._writer is not None
        self._saved_at = time.perf_counter()
        for task in running:
            chooser = task.chooser
            if len(chooser.tokens) > self._saved.get(task, 0) + least:
                assert isinstance(task.owner, int)
                self._writer.checkpoint(Checkpoint(task.owner, chooser.index, chooser.state()))
                self._saved[task] = len(chooser.tokens)

    def _tell(self, passes: Passes) -> None:
        stats = self.stats
        stats.seconds = time.perf_counter() - self._began
        stats.computed_tokens, stats.reused_tokens = passes.computed, passes.reused
        stats.new_tokens, stats.running, stats.passes, stats.step = (
            passes.generated, passes.running, passes.passes, passes.step,
        )  # fmt: skip
        self._told(stats)

    def _loading(self, what: str, done: int, total: int) -> None:
        self._told(self.stats)


def make_runner(
    engine: Engine, sequences: int, share: bool, on_pass: OnPass, store: PrefixStore | None = None
) -> Runner:  # fmt: skip
    """The runner for the engine's model. Raises `UsageError` for a store of what cannot be stored in pieces."""
    if engine.kv.takes_ragged:
        return RaggedRunner(engine, sequences, share=share, store=store, on_pass=on_pass)
    if store is not None:
        raise UsageError("--prefix-cache: this model keeps states, which run in padded groups and are not stored")
    return PaddedRunner(engine, sequences, on_pass=on_pass)

"""Answers requests for a job that another process keeps: what runs on each node of a cluster.

A worker has the model once, in a thread of its own. Calls bring requests, several at a time; what they bring runs
together, and the next call's requests join while those of the last one leave, so that the batch never drains between
calls. Each call says now and then what has become of its requests. Nothing is kept here: who calls has the journal.
Not covered: how calls get here (`offload.batch.cluster`).
"""

from __future__ import annotations

import os
import queue
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from offload.batch.compose import Composer
from offload.batch.journal import Checkpoint
from offload.batch.prepare import Prepared, Preparer
from offload.batch.results import Answer
from offload.batch.runner import Runner, Task
from offload.config import RunConfig
from tiers import ModelError
from tiers import memory as mem

EVERY_S = 0.5  # between two messages of a call
TELL_S = 2.0  # between two messages of a worker that has nothing to say but that it lives
CHECKPOINT_S = 20.0  # between two checkpoints of what is running
_UNSEEN = 32  # tokens that a checkpoint must have more than the one before


@dataclass(frozen=True, slots=True)
class Order:
    """What every worker of a job is to know. `model` is what `offload.load` takes, on any node.

    `weights` is the model's fingerprint where the job was begun; `name` and `names` are what it is called by in answers
    and requests.
    """

    job: str
    model: str
    weights: str
    name: str
    names: frozenset[str]
    config: RunConfig
    max_tokens: int
    ignore_eos: bool
    share: bool


@dataclass(frozen=True, slots=True)
class Row:
    """A request: the number of its line, the line, and the checkpoints of its choices."""

    number: int
    line: bytes
    states: Mapping[int, bytes]


@dataclass(frozen=True, slots=True)
class Told:
    """How a worker stands, since it began. Tokens, bytes, seconds."""

    worker: str
    loading: bool = True
    running: int = 0
    computed: int = 0
    reused: int = 0
    generated: int = 0
    passes: int = 0
    seconds: float = 0.0  # in passes
    stall_s: float = 0.0
    bytes_read: int = 0
    kv_bytes_read: int = 0
    kv_bytes_written: int = 0
    sequences: int = 0
    predicted: float = 0.0
    load_s: float = 0.0
    peak_rss_bytes: int = 0
    budget_bytes: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Message:
    """What has come since the last one."""

    told: Told
    answers: Sequence[Answer] = ()
    checkpoints: Sequence[Checkpoint] = ()


@dataclass(eq=False, slots=True)
class _Call:
    """Requests that came together. `waiting`: those without an answer; `answers` that nobody was told, and `all`."""

    rows: Sequence[Row]
    waiting: set[int]
    all: list[Answer] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    checkpoints: dict[tuple[int, int], Checkpoint] = field(default_factory=dict)
    ended: threading.Event = field(default_factory=threading.Event)


@dataclass(eq=False, frozen=True, slots=True)
class _Owner:
    """A request of a call. The same line may be in two calls, if an answer was lost on its way."""

    call: _Call
    number: int


class Worker:
    """Does what an `Order` says. `answer` may be called from several threads. `where` names the node in errors."""

    _preparer: Preparer
    _composer: Composer
    _about: dict[str, Any]
    _notes: Sequence[str]

    def __init__(self, order: Order, threads: int | None = None, where: str = "this node") -> None:
        """`threads` to compute with where the order does not say."""
        self._order, self._threads, self._where = order, threads, where
        self._lock = threading.Lock()  # of what follows
        self._open: list[_Call] = []
        self._told = Told(f"{os.getpid()}-{secrets.token_hex(4)}")
        self._told_at = 0.0
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        # of the thread alone
        self._given: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._saved: dict[Task, int] = {}
        self._saved_at = time.perf_counter()

    def answer(self, rows: Sequence[Row]) -> Iterator[Message]:
        """Answer the requests; the last message has all answers, as the others may have been lost. The model is loaded
        by the first call.

        Raises `ModelError`, `BudgetError`, `ReadError` and what else made the worker stop.
        """
        call = _Call(rows, {row.number for row in rows})
        with self._lock:
            self._open.append(call)
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="batch-worker", daemon=True)
                self._thread.start()
        self._given.put(call)
        while True:
            ended = call.ended.wait(EVERY_S) or not call.waiting
            with self._lock:
                if self._error is not None and call.waiting and not call.answers:
                    raise self._error
                answers = call.answers if call.waiting else call.all
                message = Message(self._told, answers, list(call.checkpoints.values()))
                call.answers, call.checkpoints = [], {}
                silent = not message.answers and not message.checkpoints
                if silent and not ended and time.monotonic() - self._told_at < TELL_S:
                    continue
                self._told_at = time.monotonic()
            yield message
            if not call.waiting:
                return

    def close(self) -> None:
        """Give memory back, when what was asked is answered."""
        self._given.put(None)
        if self._thread is not None:
            self._thread.join()

    def _serve(self) -> None:
        try:
            with ExitStack() as held:
                self._run(held)
        except BaseException as e:
            with self._lock:
                self._error = e
                for call in self._open:
                    call.ended.set()

    def _run(self, held: ExitStack) -> None:
        import torch

        from offload.batch.job import make_runner
        from offload.checkpoint import read_checkpoint
        from offload.engine import Engine
        from offload.fingerprint import fingerprint
        from offload.hf import load_config
        from offload.resolve import resolve

        order = self._order
        if (threads := order.config.threads or self._threads) is not None:
            torch.set_num_threads(threads)
        folder = resolve(order.model)
        if fingerprint(list(read_checkpoint(folder).files), load_config(folder)) != order.weights:
            raise ModelError(
                f"{folder} on {self._where} has other weights than where the job was begun; copy the model there"
            )
        self._preparer = Preparer(
            folder, load_config(folder), names=order.names, max_tokens=order.max_tokens, ignore_eos=order.ignore_eos
        )
        self._composer = Composer(order.job, order.name)
        engine = Engine(folder, order.config)
        held.callback(engine.close)
        assert engine.rate is not None
        runner = make_runner(engine, engine.rate.sequences, order.share, self._passed)
        held.callback(runner.close)
        self._about = {
            "loading": False, "sequences": engine.rate.sequences, "predicted": engine.rate.new_tokens_per_s or 0.0,
            "load_s": engine.load_s, "budget_bytes": engine.plan.ram,
        }  # fmt: skip
        self._notes = engine.notes
        while (call := self._given.get()) is not None:
            incoming = _Incoming(self)
            incoming.add(call)
            for task in runner.run(incoming):
                self.ended(task)
                self._tell(runner)
            self._tell(runner)

    def tasks(self, call: _Call) -> Iterator[Task]:
        """What the requests of a call ask for."""
        for row in call.rows:
            found = self._preparer.parse(row.line)
            if not isinstance(found, Prepared):
                raise ModelError(
                    f"{self._where} refuses line {row.number}, which was good where the job was begun "
                    f"({found.message}); it must have the same model and the same version of offload"
                )
            owner = _Owner(call, row.number)
            self._composer.begin(owner, row.number, found)
            for task in self._preparer.tasks(found, row.states, owner):
                self._saved[task] = len(task.chooser.tokens)
                if task.chooser.finish is None:
                    yield task
                else:  # an earlier run has come to its end, and not to that of the other choices
                    self.ended(task)

    def next_call(self) -> _Call | None:
        """One whose requests may join; None if there is none at present."""
        try:
            call = self._given.get_nowait()
        except queue.Empty:
            return None
        if call is None:
            self._given.put(None)  # for when what runs has ended
        return call

    def ended(self, task: Task) -> None:
        """An answer has ended."""
        self._saved.pop(task, None)
        composed = self._composer.ended(task)
        if composed is None:
            return
        assert isinstance(task.owner, _Owner)
        call, number = task.owner.call, task.owner.number
        with self._lock:
            call.answers.append(composed.answer)
            call.all.append(composed.answer)
            for key in [key for key in call.checkpoints if key[0] == number]:
                del call.checkpoints[key]
            call.waiting.remove(number)
            if not call.waiting:
                self._open.remove(call)
                call.ended.set()

    def _passed(self, runner: Runner) -> None:
        """After each pass."""
        if time.perf_counter() - self._saved_at >= CHECKPOINT_S:
            self._saved_at = time.perf_counter()
            for task in runner.running:
                chooser = task.chooser
                if len(chooser.tokens) > self._saved.get(task, 0) + _UNSEEN:
                    assert isinstance(task.owner, _Owner)
                    point = Checkpoint(task.owner.number, chooser.index, chooser.state())
                    with self._lock:
                        if point.number in task.owner.call.waiting:
                            task.owner.call.checkpoints[point[:2]] = point
                    self._saved[task] = len(chooser.tokens)
        self._tell(runner)

    def _tell(self, runner: Runner) -> None:
        done, step = runner.progress, runner.progress.step
        told = Told(
            self._told.worker, running=done.running, computed=done.computed, reused=done.reused,
            generated=done.generated, passes=done.passes, seconds=step.seconds, stall_s=step.stall_s,
            bytes_read=step.bytes_read, kv_bytes_read=step.kv_bytes_read, kv_bytes_written=step.kv_bytes_written,
            peak_rss_bytes=mem.peak_rss(), notes=tuple(self._notes), **self._about,
        )  # fmt: skip
        with self._lock:
            self._told = told


class _Incoming(Iterator[Task]):
    """The tasks of calls as they come. One that has none at present may have some later, so it may be asked again."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._tasks: Iterator[Task] = iter(())

    def add(self, call: _Call) -> None:
        """Have its tasks next."""
        self._tasks = self._worker.tasks(call)

    def __next__(self) -> Task:
        while (task := next(self._tasks, None)) is None:
            call = self._worker.next_call()
            if call is None:
                raise StopIteration
            self.add(call)
        return task

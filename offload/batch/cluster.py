"""The same job on a cluster: Ray Data carries requests to one worker per node and answers back. The only import of ray.

Here is the job as ever: input, journal and output with its lock, so what ran here goes on there and the other way. The
requests that wait go out in running order, as shards whose requests have their fronts in common; each worker
(`offload.batch.worker`) has some of them at a time, and sends what is finished as it is. Ray begins a worker that died
anew, and its shards with it: answers may come a second time, and the first one counts; or may be lost (a call begun
anew skips as many messages as had come, whatever is in them), and then another round asks again.
Not covered: clusters that grow while they run, and how the model gets to the nodes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import os
import queue
import signal
import threading
import time
import warnings
from collections.abc import Generator, Iterator
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from offload.batch.edge import ReadAhead
from offload.batch.job import BatchJob, How
from offload.batch.journal import Checkpoint, Journal, Pending, Workload
from offload.batch.lines import Source
from offload.batch.order import UNIT
from offload.batch.output import Output
from offload.batch.results import Answer, known
from offload.batch.worker import TELL_S, Message, Order, Row, Told, Worker
from offload.checkpoint import read_checkpoint
from offload.config import Job, RunConfig
from offload.fingerprint import fingerprint
from offload.hf import load_config
from offload.stats import StepStats
from tiers import (
    BudgetError,
    CheckpointError,
    ModelError,
    OffloadError,
    ReadError,
    StoreError,
    StoreFull,
    UsageError,
)
from tiers import memory as mem

IN_FLIGHT = 4  # shards that a worker has at a time
USUAL_ROWS = 64  # of a shard
RESTARTS = 3  # of a worker that dies
ROUND_BYTES, ROUND_ROWS = 1 << 30, 1 << 17  # of requests that are in Ray's hands at a time
_SHARD_BYTES = 64 << 20
_SILENT_S = 5 * TELL_S
_STOP_S = TELL_S + 1.0  # for Ray to stop what runs
_ERRORS = {e.__name__: e for e in (
    BudgetError, CheckpointError, ModelError, ReadError, StoreError, StoreFull, UsageError)}  # fmt: skip


def require() -> None:
    """Raises `UsageError` if ray is not installed."""
    if any(importlib.util.find_spec(name) is None for name in ("ray", "pyarrow")):
        raise UsageError("--on ray: ray is not installed; pip install 'offload[ray]', here and on every node")


class Pool(NamedTuple):
    """So many workers, each of which takes so much of its node."""

    workers: int
    cpus: float
    gpus: int


class Connection(NamedTuple):
    """To Ray: whether it is our `own`, to be ended by us; the `threads` that use it."""

    own: bool
    threads: list[threading.Thread]


class RayJob(BatchJob):
    """A job whose answers come from the workers of a Ray cluster. `model` is what it is called on every node."""

    def __init__(self, *given: Any, model: str, workers: int | None) -> None:
        super().__init__(*given)
        self._model, self._workers = model, workers
        self._heard: dict[str, tuple[float, Told]] = {}  # from each worker, and when
        self._noted: set[str] = set()
        self._began = 0.0
        self._connection = Connection(False, [])

    def _run(self, given: Source, output: Output, work: Workload, how: How) -> None:
        if how.prefix_cache:
            raise UsageError("--prefix-cache: workers of a cluster have no store in common; leave it out with --on ray")
        stats, journal = self.stats, output.journal
        stats.wanted_tokens = work.new_tokens
        stats.what = "loading"
        self._told(stats)
        with _connected() as self._connection:
            self.check()
            pool = _pool(self._workers, self.config)
            each = math.ceil(work.requests / pool.workers)
            mean = Job(
                each, max(1, work.prompt_tokens // work.requests), max(1, work.new_tokens // work.requests),
                work.longest_prompt + work.longest_new, how.sequences,
            )  # fmt: skip
            weights = fingerprint(list(read_checkpoint(self.folder).files), load_config(self.folder))
            order = Order(
                journal.job, self._model, weights, self.preparer.name, self.preparer.names,
                replace(self.config, batch=mean), self.preparer.max_tokens, self.preparer.ignore_eos, how.share,
            )  # fmt: skip
            rows = USUAL_ROWS if how.sequences is None else math.ceil(2 * how.sequences / IN_FLIGHT)
            least = (work.prompt_tokens + work.new_tokens) / (pool.workers * IN_FLIGHT)
            while True:
                before = stats.done + stats.failed
                with contextlib.closing(_shards(given, journal, rows, least, how.share)) as shards:
                    if not self._round(shards, order, pool):
                        return
                assert self._writer is not None
                self._writer.flush()  # what has its answer waits no more
                if stats.done + stats.failed == before:
                    raise OffloadError(
                        "the cluster has answered nothing of what was left; look into Ray's logs, then run the same "
                        "command again"
                    )

    def _round(self, shards: Iterator[list[tuple[Pending, Row]]], order: Order, pool: Pool) -> bool:
        """Have some of what waits answered; returns False if nothing waited."""
        import ray

        stats = self.stats
        waiting: dict[int, Pending] = {}
        blocks, size = [], 0
        for shard in shards:
            self.check()
            blocks.append(ray.put(_table([row for _, row in shard])))
            waiting.update((row.number, at) for at, row in shard)
            size += sum(len(row.line) for _, row in shard)
            if size >= ROUND_BYTES or len(waiting) >= ROUND_ROWS:
                break
        if not blocks:
            return False
        with contextlib.closing(_Stream(blocks, order, pool, self._connection)) as stream:
            while True:
                self.check()
                message = stream.next(0.2)
                if message is not None:
                    self._take(message, waiting)
                elif stream.ended:
                    stats.running = 0
                    return True
                self._show(pool.workers)

    def _take(self, message: Message, waiting: dict[int, Pending]) -> None:
        assert self._writer is not None
        stats = self.stats
        for answer in message.answers:
            row = waiting.pop(answer.number, None)
            if row is None:
                continue  # its worker was begun anew
            self._writer.put(answer)
            if answer.failed:
                stats.failed += 1
            else:
                stats.done += 1
                stats.prompt_tokens += row.tokens
            stats.ended_tokens += row.max_new
        for checkpoint in message.checkpoints:
            if checkpoint.number in waiting:
                self._writer.checkpoint(checkpoint)
        before = self._heard.get(message.told.worker)
        if before is None or before[1].passes <= message.told.passes:  # calls' messages overtake each other
            self._heard[message.told.worker] = time.monotonic(), message.told
        for note in message.told.notes:
            if note not in self._noted:
                self._noted.add(note)
                self._notes(note)

    def _show(self, workers: int) -> None:
        """What the workers say, together. One that died has done what it did."""
        stats, now = self.stats, time.monotonic()
        told = [t for _, t in self._heard.values() if not t.loading]
        if told:
            self._began = self._began or time.perf_counter()  # starting Ray and loading are apart
            stats.seconds = time.perf_counter() - self._began
            stats.what = "requests"
            stats.peak_rss_bytes = max(t.peak_rss_bytes for t in told)
            stats.load_s = max(t.load_s for t in told)
            stats.budget_bytes = max(t.budget_bytes for t in told)
            stats.predicted = sum(t.predicted for t in told) / len(told) * workers or None
            stats.sequences = round(sum(t.sequences for t in told) / len(told) * workers)
            stats.computed_tokens = sum(t.computed for t in told)
            stats.reused_tokens = sum(t.reused for t in told)
            stats.new_tokens = sum(t.generated for t in told)
            stats.passes = sum(t.passes for t in told)
            stats.running = sum(t.running for at, t in self._heard.values() if now - at < _SILENT_S)
            stats.step = StepStats(
                **{name: sum(getattr(t, name) for t in told) for name in
                   ("seconds", "stall_s", "bytes_read", "kv_bytes_read", "kv_bytes_written")}
            )  # fmt: skip
        self._told(stats)


def _shards(
    given: Source, journal: Journal, most: int, least: float, sharing: bool
) -> Generator[list[tuple[Pending, Row]]]:
    """The requests that wait, in running order: `least` tokens or `most` requests together, and up to `IN_FLIGHT` times
    as many where they have a front in common."""
    shard: list[tuple[Pending, Row]] = []
    tokens = size = 0
    with ReadAhead(given, journal.pending()) as rows:
        for at, line in rows:
            if shard:
                share = sharing and len(at.key) >= UNIT and at.key[:UNIT] == shard[-1][0].key[:UNIT]
                times = IN_FLIGHT if share else 1
                if tokens >= least * times or len(shard) >= most * times or size + len(line) > _SHARD_BYTES:
                    yield shard
                    shard, tokens, size = [], 0, 0
            shard.append((at, Row(at.number, line, journal.checkpoints(at.number))))
            tokens, size = tokens + at.tokens + at.max_new, size + len(line)
    if shard:
        yield shard


class _Stream:
    """What the workers send, as it comes. A thread waits for it, so that who asks can be told to stop meanwhile."""

    def __init__(self, blocks: list[Any], order: Order, pool: Pool, connection: Connection) -> None:
        self._patience = 0.0 if connection.own else _STOP_S  # who ends Ray itself need not wait
        self._come: queue.SimpleQueue[Message | BaseException | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self.ended = False
        self._thread = threading.Thread(
            target=self._serve, args=(blocks, order, pool), name="batch-cluster", daemon=True
        )
        connection.threads.append(self._thread)
        self._thread.start()

    def next(self, seconds: float) -> Message | None:
        """The next message; None if there is none, as yet or any more. Raises what stopped a worker."""
        try:
            item = self._come.get(timeout=seconds)
        except queue.Empty:
            return None
        self.ended = item is None
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Have the workers stop, which they do when one has something to say: every two seconds at least."""
        self._closing.set()
        self._thread.join(self._patience)

    def _serve(self, blocks: list[Any], order: Order, pool: Pool) -> None:
        try:
            with contextlib.closing(_batches(blocks, order, pool)) as batches:
                for batch in batches:
                    for row in batch.to_pylist():
                        self._come.put(_message(order.job, row))
                    if self._closing.is_set():
                        return
            self._come.put(None)
        except OffloadError as e:
            self._come.put(e)
        except BaseException as e:
            cause = getattr(e, "cause", None) or e.__cause__ or e
            what = " ".join(str(cause).split())[:300]
            self._come.put(
                OffloadError(
                    f"the cluster failed ({type(cause).__name__}: {what}); what is answered is kept: when that is put "
                    "right, run the same command again"
                )
            )


def _batches(blocks: list[Any], order: Order, pool: Pool) -> Generator[Any]:
    """Arrow tables of messages."""
    import ray

    compute = ray.data.ActorPoolStrategy(
        size=pool.workers, max_tasks_in_flight_per_actor=IN_FLIGHT, max_concurrent_calls_per_actor=IN_FLIGHT,
        enable_true_multi_threading=True,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # how restarts are limited is to change in 2.64
        answers = ray.data.from_arrow_refs(blocks).map_batches(
            _Actor, fn_constructor_args=(order,), batch_size=None, batch_format="pyarrow", compute=compute,
            num_cpus=pool.cpus, num_gpus=pool.gpus or None, max_restarts=RESTARTS, max_task_retries=RESTARTS,
        )  # fmt: skip
    answers.context.target_max_block_size = 1  # a message is a block, and goes out when it is there
    batches = iter(answers.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
    try:
        yield from batches
    finally:
        batches.close()


class _Actor:
    """What Ray has on each node: a `Worker`, called with tables of requests."""

    def __init__(self, order: Order) -> None:
        import ray

        mem.tame_malloc()
        context = ray.get_runtime_context()
        cpus = context.get_assigned_resources().get("CPU", 1)
        self._worker = Worker(order, max(1, int(cpus)), f"node {ray.util.get_node_ip_address()}")

    def __call__(self, table: Any) -> Iterator[Any]:
        """Answer them; yields tables of one message each."""
        rows = [
            Row(row["number"], row["line"], {s["choice"]: s["state"] for s in row["states"]})
            for row in table.to_pylist()
        ]
        try:
            for message in self._worker.answer(rows):
                yield _packed(
                    answers=[{"number": a.number, "line": a.line} for a in message.answers],
                    checkpoints=[c._asdict() for c in message.checkpoints], told=json.dumps(asdict(message.told)),
                )  # fmt: skip
        except OffloadError as e:
            yield _packed(error=json.dumps([type(e).__name__, str(e)]))


def _table(rows: list[Row]) -> Any:
    """Requests as Ray carries them."""
    import pyarrow as pa

    state = pa.struct([("choice", pa.int64()), ("state", pa.large_binary())])
    schema = pa.schema([("number", pa.int64()), ("line", pa.large_binary()), ("states", pa.large_list(state))])
    told = [
        {"number": r.number, "line": r.line, "states": [{"choice": c, "state": s} for c, s in r.states.items()]}
        for r in rows
    ]
    return pa.Table.from_pylist(told, schema=schema)


def _packed(**message: Any) -> Any:
    """A message as Ray carries it: one row, so that it is not split."""
    import pyarrow as pa

    answer = pa.struct([("number", pa.int64()), ("line", pa.large_binary())])
    checkpoint = pa.struct([("number", pa.int64()), ("choice", pa.int64()), ("state", pa.large_binary())])
    schema = pa.schema([
        ("answers", pa.large_list(answer)), ("checkpoints", pa.large_list(checkpoint)), ("told", pa.string()),
        ("error", pa.string()),
    ])  # fmt: skip
    return pa.Table.from_pylist([message], schema=schema)


def _message(job: str, row: dict[str, Any]) -> Message:
    """Raises what stopped the worker, `OffloadError` if an answer is not whole."""
    if row["error"] is not None:
        kind, text = json.loads(row["error"])
        raise _ERRORS.get(kind, OffloadError)(text)
    answers = []
    for found in row["answers"]:
        what = known(job, found["line"])
        if what is None or what.number != found["number"]:
            raise OffloadError(f"the answer to line {found['number']} came damaged; run the same command again")
        answers.append(Answer(what.number, what.custom_id, what.failed, found["line"]))
    told = json.loads(row["told"])
    return Message(
        Told(**{**told, "notes": tuple(told["notes"])}), answers, [Checkpoint(**c) for c in row["checkpoints"]]
    )


@contextlib.contextmanager
def _connected() -> Iterator[Connection]:
    """While this lasts, Ray is there: as it was, or the cluster that is found, or one of this machine alone."""
    for name, value in (
        ("RAY_USAGE_STATS_ENABLED", "0"), ("RAY_BACKEND_LOG_LEVEL", "fatal"), ("RAY_DATA_DISABLE_PROGRESS_BARS", "1"),
        ("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"),
    ):  # fmt: skip
        os.environ.setdefault(name, value)
    import ray

    connection = Connection(not ray.is_initialized(), [])
    try:
        if connection.own:
            with _handlers(), _hushed():
                try:
                    ray.init(include_dashboard=False, logging_level=logging.CRITICAL, log_to_driver=False)
                except Exception as e:
                    what = " ".join(str(e).split())[:300]
                    raise OffloadError(f"--on ray: {what}; is RAY_ADDRESS right, and the cluster up?") from e
            # else what becomes of workers is told on stdout, where results may go
            ray._private.worker._worker_logs_enabled = False
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.enable_operator_progress_bars = False
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        yield connection
    finally:
        if connection.own:
            # else a thread that asks Ray for something once it has ended would begin a cluster anew
            hook = ray._private.auto_init_hook
            before, hook.enable_auto_connect = hook.enable_auto_connect, False
            with _handlers():
                ray.shutdown()
            for thread in connection.threads:
                thread.join(_STOP_S)
            hook.enable_auto_connect = before


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """While this lasts, nothing is said on stderr: Ray's core says how loud it is to be, to which nobody can object."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def _handlers() -> Iterator[None]:
    """What signals do stays as it was: Ray has ideas of its own about SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for s, handler in kept.items():
            if handler is not None:
                signal.signal(s, handler)


def _pool(workers: int | None, config: RunConfig) -> Pool:
    """One worker for each node, or `workers` that are spread over them. Raises `UsageError`, `OffloadError`."""
    import ray

    gpu = config.device in ("auto", "cuda")
    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) > 0]
    if config.device == "cuda":
        nodes = [has for has in nodes if has.get("GPU", 0) >= 1]
    if not nodes:
        what = "GPU" if config.device == "cuda" else "CPU"
        raise OffloadError(f"--on ray: no node of the cluster has a {what}; `ray status` says what it has")
    count = workers or len(nodes)
    share = math.ceil(count / len(nodes))  # of a node
    if share > 1 and config.ram is None:
        raise UsageError(
            f"--workers {count} puts {share} on a node ({len(nodes)} there): say with --ram what each of them may take"
        )
    cpus = config.threads or min(has["CPU"] for has in nodes) / share
    gpus = int(gpu and all(has.get("GPU", 0) >= share for has in nodes))
    return Pool(count, float(int(cpus) if cpus >= 1 else cpus), gpus)

"""Batches from Python: requests in, results out as they come, with nothing on disk."""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offload.batch.choosing import Choice
from offload.batch.job import make_runner
from offload.batch.order import arranged, exact_key, work_of
from offload.batch.prepare import Prepared, Preparer
from offload.batch.requests import LineError, Options, Request
from offload.batch.responses import response_body
from offload.batch.runner import Progress, Task
from offload.engine import Engine
from tiers import UsageError

USUAL_SEQUENCES = 32
USUAL_TOKENS = 512

Asked = str | Sequence[int] | Mapping[str, Any] | Request


@dataclass(frozen=True, slots=True)
class Result:
    """What became of request number `index`: its `choices` and OpenAI's `body`, or `error`."""

    index: int
    custom_id: str
    choices: tuple[Choice, ...] = ()
    body: dict[str, Any] | None = None
    error: LineError | None = None

    @property
    def text(self) -> str | None:
        """Of the first choice."""
        return self.choices[0].text if self.choices else None

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The new ones of the first choice."""
        return self.choices[0].token_ids if self.choices else ()


class Calls:
    """One batch of one engine. `progress` is what has been done, while and after `run` is under way."""

    def __init__(
        self, engine: Engine, *, sequences: int | None = None, max_tokens: int | None = None, ignore_eos: bool = False,
        share: bool = True,
    ) -> None:  # fmt: skip
        """As for `offload.batch.job.run_job`."""
        for name, value in (("sequences", sequences), ("max_tokens", max_tokens)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise UsageError(f"{name}: {value!r} is not a whole number above zero")
        self._engine = engine
        self._preparer = Preparer(
            engine.folder, engine.hf_config, max_tokens=max_tokens, ignore_eos=ignore_eos
        )  # fmt: skip
        if sequences is None:
            planned = engine.rate.sequences if engine.rate is not None else None
            sequences = planned or max(1, min(USUAL_SEQUENCES, engine.plan.context // USUAL_TOKENS))
        self._sequences, self._share = sequences, share
        self.progress = Progress()

    def run(self, requests: Iterable[Asked]) -> Iterator[Result]:
        """Results in the order in which they come. A request is a prompt (text or token ids), or what a line of a batch
        file holds. A list is put in order first, so that fronts in common are found; of another iterable requests are
        taken as they are needed, in their order. Raises `Interrupted`, `ReadError`."""
        results: queue.SimpleQueue[Result] = queue.SimpleQueue()
        asked: dict[int, tuple[Prepared, dict[int, Choice]]] = {}

        def prepared() -> Iterator[tuple[int, Prepared]]:
            for index, given in enumerate(requests):
                found = self._prepared(index, given)
                if isinstance(found, LineError):
                    results.put(Result(index, found.custom_id or str(index), error=found))
                else:
                    yield index, found

        def tasks() -> Iterator[Task]:
            todo: Iterable[tuple[int, Prepared]] = prepared()
            if isinstance(requests, Sequence):  # all are known: those with a common front become neighbours
                known = list(todo)
                rows = [(exact_key(p.prompt), work_of(len(p.prompt), p.limit)) for _, p in known]
                todo = [known[i] for i in arranged(rows)]
            for index, found in todo:
                asked[index] = found, {}
                yield from self._preparer.tasks(found, {}, index)

        with contextlib.closing(
            make_runner(self._engine, self._sequences, self._share, lambda runner: None)
        ) as runner:  # fmt: skip
            self.progress = runner.progress
            for task in runner.run(tasks()):
                assert isinstance(task.owner, int)
                if task.owner in asked:
                    result = _ended(task, *asked[task.owner], self._preparer.name)
                    if result is not None:
                        del asked[task.owner]
                        yield result
                while not results.empty():
                    yield results.get()
        while not results.empty():
            yield results.get()

    def _prepared(self, index: int, given: Asked) -> Prepared | LineError:
        if isinstance(given, Request):
            return self._preparer.prepare(given)
        if isinstance(given, Mapping):
            line = {"custom_id": str(index), **given}
            try:
                return self._preparer.parse(json.dumps(line).encode("utf-8", "surrogatepass"))
            except (TypeError, ValueError) as e:
                return LineError(str(index), "invalid_json", f"the request is no JSON: {e}")
        prompt = given if isinstance(given, str) else tuple(given)
        return self._preparer.prepare(Request(str(index), False, prompt, Options()))


def _ended(task: Task, found: Prepared, choices: dict[int, Choice], name: str) -> Result | None:
    """The result, once all choices of the request have ended."""
    request, chooser, index = found.request, task.chooser, task.owner
    assert isinstance(index, int)
    if chooser.error is not None:
        error = LineError(request.custom_id, chooser.error.code, str(chooser.error), chooser.error.param)
        return Result(index, request.custom_id, error=error)
    choices[chooser.index] = chooser.choice()
    if len(choices) < request.options.n:
        return None
    ordered = tuple(choices[i] for i in sorted(choices))
    body = response_body(
        request, ordered, prompt_tokens=len(found.prompt), cached_tokens=task.reused, model=name,
        created=int(time.time()), id=f"cmpl-{index}",
    )  # fmt: skip
    return Result(index, request.custom_id, ordered, body)


async def in_thread(make: Callable[[], Iterator[Result]], stop: Callable[[], None]) -> AsyncGenerator[Result, None]:
    """The results of an iterator that computes, without holding up the event loop; `stop` is called if nobody asks for
    more of them."""
    loop = asyncio.get_running_loop()
    given: asyncio.Queue[Result | BaseException | None] = asyncio.Queue()

    def put(item: Result | BaseException | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(given.put_nowait, item)

    def work() -> None:
        try:
            for result in make():
                put(result)
            put(None)
        except BaseException as e:
            put(e)

    thread = threading.Thread(target=work, name="batch", daemon=True)
    thread.start()
    ended = False
    try:
        while True:
            item = await given.get()
            if item is None or isinstance(item, BaseException):
                ended = True
                if item is not None:
                    raise item
                return
            yield item
    finally:
        if not ended:
            stop()
        await asyncio.to_thread(thread.join)

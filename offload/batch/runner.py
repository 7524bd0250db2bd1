"""Runs answers, pass after pass, until there are none left: what `schedule` decides, the engine computes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol

import torch
from transformers.cache_utils import Cache

from kvstore import PrefixStore, RaggedCache, TieredCache
from offload.batch.choosing import Chooser, choose_all
from offload.batch.schedule import Member, Schedule
from offload.engine import Engine
from offload.history import History
from offload.stats import StepStats


@dataclass(eq=False, slots=True)
class Task:
    """One choice of one request: `prompt` continued by what `chooser` chooses, which may have chosen some already.

    `owner` is the asker's; `reused` tokens of the prompt were not computed for it.
    """

    prompt: Sequence[int]
    chooser: Chooser
    limit: int
    owner: object = None
    reused: int = 0

    @property
    def front(self) -> Sequence[int]:
        """The prompt, and what had been chosen before."""
        return [*self.prompt, *self.chooser.tokens] if self.chooser.tokens else self.prompt

    @property
    def left(self) -> int:
        """New tokens there may still be."""
        return self.limit - len(self.chooser.tokens)


@dataclass(slots=True)
class Progress:
    """What has been done so far. Tokens, bytes and seconds; `computed` are those of prompts that were, `reused` those
    that were not because another had the same front."""

    passes: int = 0
    computed: int = 0
    reused: int = 0
    generated: int = 0
    running: int = 0
    most: int = 0  # that ran at once
    began: float = field(default_factory=time.perf_counter)
    step: StepStats = field(default_factory=StepStats)


class Runner(Protocol):
    """Runs answers to their end."""

    progress: Progress

    def run(self, tasks: Iterable[Task]) -> Iterator[Task]:
        """Each answer, as soon as it has ended. Raises `Interrupted`, `ReadError`; what had not ended is lost then."""
        ...

    @property
    def running(self) -> list[Task]:
        """Those that have begun and not ended."""
        ...

    def close(self) -> None:
        """Give memory back."""
        ...


OnPass = Callable[[Runner], None]


class RaggedRunner:
    """Sequences of any length in one pass, joining and leaving at any: for models that keep keys and values alone."""

    def __init__(
        self, engine: Engine, sequences: int, *, share: bool = True, store: PrefixStore | None = None,
        on_pass: OnPass = lambda runner: None,
    ) -> None:  # fmt: skip
        """`sequences` at once, in the context that the engine has planned for; `share`: fronts in common are computed
        once. With a `store`, what it has of a front is read instead of computed, and what is computed is kept there.
        `on_pass` is called after each."""
        self._engine = engine
        self._held = ExitStack()
        each = engine.plan.context // sequences
        self._cache: RaggedCache = self._held.enter_context(engine.kv.ragged(sequences, each))
        width = max(sequences, engine.plan.prefill_chunk)
        chunk = engine.kv.chunk_of(each)
        self._schedule = Schedule(engine.plan.context, sequences, width, chunk, sharing=share)
        self._on_pass = on_pass
        self._store = store
        self._histories: dict[Member, History] = {}
        self._sequences: dict[Member, TieredCache] = {}
        self.progress = Progress()

    @property
    def running(self) -> list[Task]:
        """See `Runner`."""
        return [_task(m) for m in self._schedule.members if not m.gone]

    def run(self, tasks: Iterable[Task]) -> Iterator[Task]:
        """See `Runner`."""
        source = iter(tasks)
        upcoming = next(source, None)
        while True:
            if upcoming is None:
                upcoming = next(source, None)  # one that had none may have some by now
            while upcoming is not None and self._schedule.takes(upcoming):
                _, dropped = self._schedule.join(upcoming)
                self._forget(dropped)
                upcoming = next(source, None)
            if not any(not m.gone for m in self._schedule.members):
                self._forget(self._schedule.drop_trunk())
                return
            for member in self._pass():
                if self._schedule.leave(member, upcoming.front if upcoming is not None else None):
                    self._forget(member)
                yield _task(member)

    def close(self) -> None:
        """See `Runner`."""
        self._sequences.clear()
        self._held.close()

    def _pass(self) -> list[Member]:
        """One pass; returns those whose answer has ended."""
        schedule, progress = self._schedule, self.progress
        self._begin()
        parts = schedule.parts()
        given = [(self._sequences[m], m.todo[:n]) for m, n in parts]
        wanted = [i for i, (m, n) in enumerate(parts) if n == len(m.todo)]
        logits = self._engine.advance(self._cache, given, wanted or [0])
        stats = self._engine.steps.pop()
        due = schedule.passed(parts)
        for member, count in parts:
            if not _task(member).chooser.tokens:
                progress.computed += count
        choosers = [_task(m).chooser for m in due]
        chosen = choose_all(choosers, logits[: len(due)]) if due else []
        ended = []
        for member, token in zip(due, chosen, strict=True):
            if token is not None:
                progress.generated += 1
                member.todo.append(token)
            if _task(member).chooser.finish is not None:
                ended.append(member)
        for (sequence, tokens), (member, _) in zip(given, parts, strict=True):
            if member in self._histories:
                self._histories[member].passed(sequence, torch.tensor([tokens]))
        progress.passes += 1
        progress.step += stats
        progress.running = sum(not m.gone for m in schedule.members)
        progress.most = max(progress.most, progress.running)
        self._begin()  # before any of those that ended is given up
        self._on_pass(self)
        return ended

    def _begin(self) -> None:
        """Memory for those who can begin."""
        while ready := self._schedule.beginning():
            for member in ready:
                if member.donor is not None and member.shared:
                    self._sequences[member] = self._cache.fork(self._sequences[member.donor], member.shared)
                    task = _task(member)
                    task.reused = min(member.shared, len(task.prompt))
                    self.progress.reused += task.reused
                else:
                    self._sequences[member] = self._new_sequence(member)
                self._forget(self._schedule.began(member))

    def _new_sequence(self, member: Member) -> TieredCache:
        """Of one that shares with nobody here; what is on disk of its front is read."""
        if self._store is None:
            return self._cache.new_sequence()
        history = History(_Sequences(self._cache), 0, self._engine.device.torch_device, self._store)
        sequence = history.begin(member.todo)
        assert isinstance(sequence, TieredCache)
        self._schedule.known(member, history.reused)
        task = _task(member)
        task.reused = min(history.reused, len(task.prompt))
        self.progress.reused += task.reused
        self._engine.notes += history.notes
        history.notes.clear()
        self._histories[member] = history
        return sequence

    def _forget(self, member: Member | None) -> None:
        if member is None:
            return
        self._histories.pop(member, None)
        sequence = self._sequences.pop(member, None)
        if sequence is not None:
            sequence.close()


class _Sequences:
    """Makes sequences of a ragged cache, for a `History`."""

    def __init__(self, cache: RaggedCache) -> None:
        self._cache = cache

    def new_cache(self, capacity: int) -> Cache:
        """An empty one; it grows as it must."""
        return self._cache.new_sequence()


def _task(member: Member) -> Task:
    assert isinstance(member.answer, Task)
    return member.answer

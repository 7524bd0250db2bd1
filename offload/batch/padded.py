"""Answers in padded groups: for models whose layers keep states, which belong to a position and cannot be shared out.

A group begins together, padded on the left to its longest prompt, and the next one begins when all of it have ended.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch
from transformers.cache_utils import Cache

from kvstore import TieredCache
from offload.batch.choosing import choose_all
from offload.batch.runner import OnPass, Progress, Task
from offload.engine import Engine, Sequences


class PaddedRunner:
    """Groups of up to `sequences`. See `offload.batch.runner.Runner`."""

    def __init__(self, engine: Engine, sequences: int, *, on_pass: OnPass = lambda runner: None) -> None:
        self._engine = engine
        self._most = sequences
        self._on_pass = on_pass
        self._group: list[Task] = []
        self.progress = Progress()

    @property
    def running(self) -> list[Task]:
        """See `Runner`."""
        return list(self._group)

    def run(self, tasks: Iterable[Task]) -> Iterator[Task]:
        """See `Runner`."""
        source = iter(tasks)
        upcoming = next(source, None)
        while upcoming is not None:
            group = [upcoming]
            upcoming = None
            for answer in itertools.islice(source, self._most):
                if len(group) == self._most or not self._fits([*group, answer]):
                    upcoming = answer
                    break
                group.append(answer)
            yield from self._run(group)
            upcoming = upcoming or next(source, None)

    def close(self) -> None:
        """See `Runner`."""
        self._group = []

    def _fits(self, group: list[Task]) -> bool:
        width = max(len(a.front) for a in group) + max(a.left for a in group)
        return len(group) * width <= self._engine.plan.context

    def _run(self, group: list[Task]) -> Iterator[Task]:
        """One group to its end."""
        self._group = list(group)
        fronts = [list(a.front) for a in group]
        width = max(map(len, fronts))
        tokens = torch.tensor([[0] * (width - len(f)) + f for f in fronts])
        mask = torch.tensor([[0] * (width - len(f)) + [1] * len(f) for f in fronts])
        cache = self._engine.new_cache(width + max(a.left for a in group))
        try:
            yield from self._steps(group, cache, tokens, mask)
        finally:
            if isinstance(cache, TieredCache):
                cache.close()

    def _steps(self, group: list[Task], cache: Cache, tokens: torch.Tensor, mask: torch.Tensor) -> Iterator[Task]:
        """Pass after pass of a group: tokens [B, width], with the mask [B, width] of what is no padding."""
        droppable = all(hasattr(layer, "batch_select_indices") for layer in cache.layers)
        self.progress.computed += int(mask.sum())
        rows: list[Task | None] = list(group)  # None: ended, and still fed where rows cannot be dropped
        while True:
            logits = self._pass(cache, tokens, mask, rows)
            alive = [i for i, a in enumerate(rows) if a is not None]
            answers = [rows[i] for i in alive]
            chosen = choose_all([a.chooser for a in answers if a is not None], logits[alive])
            tokens = torch.zeros(len(rows), 1, dtype=torch.long)
            for i, answer, token in zip(alive, answers, chosen, strict=True):
                assert answer is not None
                self.progress.generated += token is not None
                tokens[i, 0] = token or 0
                if answer.chooser.finish is not None:
                    rows[i] = None
                    self._group.remove(answer)
            self._on_pass(self)
            yield from (a for a in answers if a is not None and a.chooser.finish is not None)
            alive = [i for i, a in enumerate(rows) if a is not None]
            if not alive:
                return
            if droppable and len(alive) < len(rows):
                kept = torch.tensor(alive)
                cache.batch_select_indices(kept)
                tokens, mask, rows = tokens[kept], mask[kept], [rows[i] for i in alive]
            mask = torch.cat([mask, torch.ones(len(rows), 1, dtype=mask.dtype)], 1)

    def _pass(self, cache: Cache, tokens: torch.Tensor, mask: torch.Tensor, rows: list[Task | None]) -> torch.Tensor:
        """Logits [rows, vocab] after one pass over the prompts, or one more token each."""
        engine, progress = self._engine, self.progress
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        device = engine.device.torch_device
        inputs = {"attention_mask": mask.to(device), "position_ids": positions.to(device), "logits_to_keep": 1,
                  "use_cache": True}  # fmt: skip
        with torch.inference_mode():
            logits: torch.Tensor = engine.step(Sequences(cache, inputs), tokens).logits[:, -1].cpu()
        for stats in engine.steps:
            progress.passed(stats)
        engine.steps.clear()
        progress.running = sum(a is not None for a in rows)
        progress.most = max(progress.most, progress.running)
        return logits

"""From answers that have ended to output lines: a request's line, once the last of its choices has come."""

from __future__ import annotations

import time
from typing import NamedTuple

from offload.batch.choosing import Choice
from offload.batch.prepare import Prepared
from offload.batch.requests import LineError
from offload.batch.responses import response_body
from offload.batch.results import Answer, answered, refused
from offload.batch.runner import Task


class Composed(NamedTuple):
    """The output line of a request."""

    answer: Answer
    prepared: Prepared


class Composer:
    """The requests of one job that run. `name` is the model's in the bodies."""

    def __init__(self, job: str, name: str) -> None:
        self._job, self._name = job, name
        self._prepared: dict[object, tuple[int, Prepared]] = {}  # by the tasks' owner, as all of these
        self._choices: dict[object, dict[int, Choice]] = {}
        self._reused: dict[object, int] = {}

    def begin(self, owner: object, number: int, found: Prepared) -> None:
        """The request of input line `number`, before any of the tasks ends that `owner` has for it."""
        self._prepared[owner] = number, found

    def ended(self, task: Task) -> Composed | None:
        """The line, if this was what it waited for."""
        owner, chooser = task.owner, task.chooser
        if owner not in self._prepared:
            return None  # another choice of it was refused
        number, found = self._prepared[owner]
        request = found.request
        if chooser.error is not None:
            error = LineError(request.custom_id, chooser.error.code, str(chooser.error), chooser.error.param)
            answer = refused(self._job, number, error)
        else:
            choices = self._choices.setdefault(owner, {})
            choices[chooser.index] = chooser.choice()
            self._reused[owner] = max(self._reused.get(owner, 0), task.reused if chooser.index == 0 else 0)
            if len(choices) < request.options.n:
                return None
            body = response_body(
                request, list(choices.values()), prompt_tokens=len(found.prompt), cached_tokens=self._reused[owner],
                model=self._name, created=int(time.time()), id=f"cmpl-{self._job}-{number}",
            )  # fmt: skip
            answer = answered(self._job, number, request.custom_id, body)
        del self._prepared[owner]
        self._choices.pop(owner, None)
        self._reused.pop(owner, None)
        return Composed(answer, found)

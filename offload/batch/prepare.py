"""From a request to what the runner runs: prompt tokens, how many may follow, who chooses them. No weights needed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from offload import hf
from offload.batch.choosing import Chooser
from offload.batch.requests import LineError, Request, parse
from offload.batch.runner import Task
from offload.batch.structure import Grammars, StructureError
from offload.batch.vocabulary import Vocabulary
from offload.sampling import Sampling
from offload.texts import chat_defaults, ends_of, generation_config, load_tokenizer, rendered
from tiers import DamagedError, ModelError, OffloadError

MAX_TOKENS = 256  # of an answer whose request does not say


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request, its prompt as token ids, and the most tokens each of its answers may have."""

    request: Request
    prompt: list[int]
    limit: int

    @property
    def new_tokens(self) -> int:
        """Of all its answers, at most."""
        return self.limit * self.request.options.n


class Preparer:
    """For one model. `names` are those that a request may call it by; `max_tokens` where a request does not say.

    With `ignore_eos` no token ends an answer.
    """

    def __init__(
        self, folder: Path, config: PreTrainedConfig, *, names: Collection[str] = (), max_tokens: int | None = None,
        ignore_eos: bool = False,
    ) -> None:  # fmt: skip
        self.folder = folder
        self.name = folder.resolve().name
        self.names = frozenset({self.name, str(folder), *names})
        self.ignore_eos = ignore_eos
        generation = generation_config(folder, config)
        self.ends = set() if ignore_eos else ends_of(generation)
        self.tokenizer = load_tokenizer(folder)
        self.context = hf.Shape.of(config).max_context
        self.max_tokens = max_tokens or MAX_TOKENS
        self._vocab = config.get_text_config(decoder=True).vocab_size
        self._chat = Sampling(**chat_defaults(generation))
        self._vocabulary = Vocabulary(self.tokenizer) if self.tokenizer is not None else None
        self._grammars = Grammars(self.tokenizer, self._vocab, ends_of(generation))

    @property
    def settings(self) -> dict[str, Any]:
        """What answers depend on beside the request and the weights."""
        return {"max_tokens": self.max_tokens, "ends": sorted(self.ends), "chat": str(self._chat)}

    def parse(self, line: bytes) -> Prepared | LineError:
        """A line of a file, whole."""
        request = parse(line, self.names)
        return request if isinstance(request, LineError) else self.prepare(request)

    def prepare(self, request: Request) -> Prepared | LineError:
        """A request, or why this model cannot run it."""
        custom_id, options = request.custom_id, request.options
        try:
            prompt = self._prompt(request)
        except OffloadError as e:
            return LineError(custom_id, "invalid_value", str(e), "messages" if request.chat else "prompt")
        if not prompt:
            return LineError(custom_id, "invalid_value", "the prompt is empty", "prompt")
        bad = next((i for i in prompt if not 0 <= i < self._vocab), None)
        if bad is not None:
            text = f"token id {bad} is outside the vocabulary of {self._vocab}"
            return LineError(custom_id, "invalid_value", text, "prompt")
        room = self.context - len(prompt)
        if room < 1 or (options.max_tokens or 0) > room:
            text = f"the prompt has {len(prompt)} tokens"
            text += f", and {options.max_tokens} are asked for" if options.max_tokens else ""
            text += f"; the model's context is {self.context}"
            return LineError(custom_id, "context_length_exceeded", text, "max_tokens" if room > 0 else "prompt")
        if self._vocabulary is None and (options.stop or options.response_format is not None):
            text = "the model has no tokenizer: stop and response_format cannot be honoured"
            return LineError(custom_id, "unsupported_parameter", text, "stop" if options.stop else "response_format")
        try:
            self._grammars.constraint(options.response_format)
        except StructureError as e:
            return LineError(custom_id, e.code, str(e), e.param)
        return Prepared(request, prompt, min(options.max_tokens or self.max_tokens, room))

    def tasks(self, prepared: Prepared, states: Mapping[int, bytes], owner: object) -> list[Task]:
        """One for each choice; `states` of some are from an earlier run, and are left out where they are of no use."""
        request, out = prepared.request, []
        for index in range(request.options.n):
            chooser = self._chooser(prepared, index)
            if index in states:
                try:
                    chooser.restore(states[index])
                except DamagedError:
                    chooser = self._chooser(prepared, index)
            out.append(Task(prepared.prompt, chooser, prepared.limit, owner))
        return out

    def _chooser(self, prepared: Prepared, index: int) -> Chooser:
        request = prepared.request
        return Chooser(
            request, index, limit=prepared.limit, ends=self.ends, vocabulary=self._vocabulary,
            defaults=self._chat if request.chat else Sampling(),
            constraint=self._grammars.constraint(request.options.response_format),
        )  # fmt: skip

    def _prompt(self, request: Request) -> list[int]:
        """Raises `ModelError`, `UsageError`."""
        if isinstance(request.prompt, tuple) and not request.chat:
            return [int(i) for i in request.prompt if isinstance(i, int)]
        if self.tokenizer is None:
            raise ModelError("the model has no tokenizer; give the prompt as token ids")
        if request.chat:
            return rendered(self.tokenizer, [dict(m) for m in request.prompt if isinstance(m, dict)])
        return [int(i) for i in self.tokenizer(request.prompt)["input_ids"]]

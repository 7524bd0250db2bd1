"""The public model: text in, text out, over the engine. What `offload.load` returns."""

from __future__ import annotations

import contextlib
import copy
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, StoppingCriteria, TextStreamer
from transformers.cache_utils import Cache

from kvstore import Session, Sessions, TieredCache
from kvstore.store import SHORTEST
from moe import LayerUse
from offload.batch.calls import Asked, Calls, Result, in_thread
from offload.batch.runner import Progress
from offload.conversation import Conversation, Message
from offload.engine import Engine
from offload.history import History
from offload.planning.explain import explain
from offload.planning.plan import Plan
from offload.planning.predict import Workload
from offload.sampling import Sampling
from offload.stats import RequestStats
from offload.texts import chat_defaults, ends_of, generation_config, load_tokenizer, rendered
from tiers import DamagedError, Interrupted, ModelError, UsageError
from tiers import memory as mem

DEFAULT_NEW_TOKENS = 256
_NO_TOKEN = -1  # for None, transformers would take the model's own
__all__ = ["Conversation", "Generation", "Message", "Model"]


@dataclass(slots=True)
class Generation:
    """The answer to one request. Lists have one entry per prompt.

    `finish` is `stop` (end token or stop string), `length`, or `interrupted`.
    """

    token_ids: list[list[int]]
    text: list[str | None]
    finish: list[str]
    stats: RequestStats
    notes: list[str] = field(default_factory=list)


class Model:
    """A loaded model. Close it, or use it as a context manager, to give its memory and threads back."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tokenizer = load_tokenizer(engine.folder)
        self.stats = RequestStats()
        self.batch_progress = Progress()
        self._warm = False  # whether an earlier request has filled the expert cache
        self._generation_config = generation_config(engine.folder, engine.hf_config)

    @property
    def name(self) -> str:
        """The model's folder."""
        return self.engine.folder.resolve().name

    @property
    def fingerprint(self) -> str:
        """Which weights these are, for what is stored of them."""
        return self.engine.fingerprint

    @property
    def arithmetic(self) -> str:
        """How keys and values are computed: stored ones are good for the same only."""
        return self.engine.arithmetic

    def history(self, sessions: Sessions | None = None) -> History:
        """A sequence that goes on, to be given to `run`; with `sessions` what is computed is kept there."""
        store = self.engine.prefixes(sessions) if sessions is not None else None
        return History(self.engine, self.plan.context, self.engine.device.torch_device, store)

    @property
    def hf(self) -> PreTrainedModel:
        """The transformers model itself. Its weights are there only while it computes."""
        return self.engine.hf

    @property
    def plan(self) -> Plan:
        """What lives where."""
        return self.engine.plan

    def explain(self) -> str:
        """What lives where, what that is predicted to do, what limits it, and how the last request compared."""
        e = self.engine
        workload = Workload()
        return explain(e.description, e.plan, e.machine, e.calibration, e.predict(workload), workload, self.stats)

    def generate(self, prompt: str | Sequence[str], **options: Any) -> str | list[str]:
        """Continue `prompt`; a list gives a list. Options as for `run`."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        texts = [t or "" for t in self.run(prompts, **options).text]
        return texts[0] if isinstance(prompt, str) else texts

    def stream(self, prompt: str, **options: Any) -> Iterator[str]:
        """Continue `prompt`, piece by piece. Closing the iterator stops the generation at the next layer."""
        pieces: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()

        def work() -> None:
            try:
                self.run([prompt], on_text=pieces.put, **options)
                pieces.put(None)
            except BaseException as e:
                pieces.put(e)

        worker = threading.Thread(target=work, name="offload-generate", daemon=True)
        worker.start()
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            if worker.is_alive():
                self.engine.interrupt.set()
            worker.join()
            self.engine.interrupt.clear()

    def chat(self, messages: Sequence[Message], **options: Any) -> str:
        """The assistant's answer to `messages` ({"role", "content"} each), through the model's chat template."""
        result = self.run([self.render(messages)], **self.chat_defaults(), **options)
        return result.text[0] or ""

    def render(self, messages: Sequence[Message]) -> list[int]:
        """`messages` as token ids, ready for the assistant's answer. Raises `ModelError` without a template."""
        return rendered(self._need_tokenizer(), messages)

    def chat_defaults(self) -> dict[str, Any]:
        """How the model's authors want it sampled in conversation (generation_config.json)."""
        return chat_defaults(self._generation_config)

    def batch(self, requests: Iterable[Asked], **options: Any) -> Iterator[Result]:
        """Answer many requests at once, each as soon as it has its answer, in any order.

        A request is a prompt (text or token ids) or a mapping as in a line of OpenAI's batch files: `messages` or
        `prompt`, `max_tokens`, `temperature`, `stop` and so on, and a `custom_id` if wanted. A list is put in order so
        that fronts in common are computed once; of an iterator, which may be endless, requests are taken as needed.
        Options: `sequences` at once, `max_tokens` and `ignore_eos` for all, `share` (fronts in common are computed
        once; default True). For the most speed load the model with `batch=` the number of sequences. A request that
        cannot be run has a result with an `error`.
        """
        calls = Calls(self.engine, **options)
        self.batch_progress = calls.progress
        for result in calls.run(requests):
            self.batch_progress = calls.progress
            yield result

    async def abatch(self, requests: Iterable[Asked], **options: Any) -> AsyncIterator[Result]:
        """The same without holding up an event loop; leaving the loop over it ends the batch at the next layer."""
        found = in_thread(lambda: self.batch(requests, **options), self.engine.interrupt.set)
        try:
            async with contextlib.aclosing(found):  # it has stopped before the interrupt is taken back
                async for result in found:
                    yield result
        finally:
            self.engine.interrupt.clear()

    def run(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] | None = None,
        num_beams: int = 1,
        ignore_eos: bool = False,
        on_text: Callable[[str], object] | None = None,
        history: History | None = None,
        session: str | None = None,
        prefix_cache: bool = False,
    ) -> Generation:
        """Continue each prompt (text or token ids) and say how it went.

        Prompts of one call run as one left-padded batch where the context has room for it, else one after another.
        `history` knows the front of a single prompt from an earlier call. `session` is a name to keep the sequence's
        keys and values under; with it, or with `prefix_cache`, the longest front of a single prompt that any earlier
        run has stored is read instead of computed. Raises `UsageError`, `Interrupted`, `ReadError`.
        """
        began = time.perf_counter()
        if max_new_tokens is not None and max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens: {max_new_tokens} is not above zero")
        if num_beams < 1 or (num_beams > 1 and temperature):
            raise UsageError("beam search needs num_beams above zero and temperature 0")
        if num_beams > 1 and on_text is not None:
            raise UsageError("beam search cannot be streamed: its text may still change")
        sampling = Sampling(temperature, top_k, top_p, seed)
        ids = [self._encode(p) for p in prompts]
        if not ids:
            raise UsageError("there is no prompt")
        stops = [stop] if isinstance(stop, str) else list(stop or ())
        if any(not s for s in stops):
            raise UsageError("--stop: a stop string is empty")
        if stops:
            self._need_tokenizer()
        context = self.plan.context // num_beams
        longest = max(map(len, ids))
        kept = history is not None or session is not None or prefix_cache
        if kept and (len(ids) > 1 or num_beams > 1):
            raise UsageError("--session and --prefix-cache go with one prompt, and without beams")
        if longest >= context:
            raise UsageError(
                f"the prompt has {longest} tokens, the context holds {context}; shorten it or give a larger --context"
            )
        want = max_new_tokens or DEFAULT_NEW_TOKENS
        room = min(want, context - longest)
        notes = []
        if room < want and max_new_tokens is not None:
            notes.append(f"the context of {context} tokens leaves room for {room} new ones, not {want}")
        if self.engine.interrupt.is_set():
            raise Interrupted("interrupted")
        self.stats = RequestStats(load_s=self.engine.load_s, budget_bytes=self.plan.ram)
        with contextlib.ExitStack() as held:
            if history is None and kept:
                history = held.enter_context(self._stored(session))
            return self._run(ids, room, sampling, stops, num_beams, ignore_eos, on_text, history, began, notes)

    def _run(
        self, ids: list[list[int]], room: int, sampling: Sampling, stops: list[str], num_beams: int, ignore_eos: bool,
        on_text: Callable[[str], object] | None, history: History | None, began: float, notes: list[str],
    ) -> Generation:  # fmt: skip
        stats = self.stats
        longest = max(map(len, ids))
        each = longest + room
        if self.plan.kv_tiered:  # what is being filled of each was set aside for so many only
            each = max(each, SHORTEST)
        at_once = max(1, self.plan.context // num_beams // each)
        result = Generation([], [], [], stats, notes)
        clock = _Clock(began)
        self.engine.steps.clear()
        cache = history.begin(ids[0]) if history is not None else None
        past = history.reused if history is not None else 0
        ahead = self.engine.experts.lookahead
        if ahead is not None and not past:
            ahead.begin()
        used = copy.deepcopy(ahead.use) if ahead is not None else []
        self.engine.on_pass = history.passed if history is not None else None
        try:
            for at in range(0, len(ids), at_once):
                self._run_batch(ids[at : at + at_once], room, sampling, stops, num_beams, ignore_eos, on_text, cache,
                                clock, result)  # fmt: skip
        finally:
            self.engine.on_pass = None
            if history is not None:
                history.mark()
                notes += history.notes
                history.notes.clear()
            stats.reused_tokens = past
            self._count(stats, clock, sum(map(len, ids)), began, used)
            notes += self.engine.notes
            self.engine.notes.clear()
            stats.sequences = len(ids)
            stats.new_tokens = sum(map(len, result.token_ids)) or clock.generated
        if num_beams == 1 and len(ids) <= at_once:
            new = max(map(len, result.token_ids))
            warm, self._warm = self._warm, True
            self.engine.learn(Workload(longest - past, new, len(ids), past, warm), stats)
        return result

    @contextlib.contextmanager
    def _stored(self, session: str | None) -> Iterator[History]:
        """A history over what is stored; with a name, it is kept under that."""
        sessions = Sessions()
        with contextlib.ExitStack() as held:
            if session is not None:
                held.enter_context(sessions.hold(session))
            history = self.history(sessions)
            yield history
            if session is not None and history.head is not None:
                kept = Session(session, self.name, self.fingerprint, self.arithmetic, history.head, history.stored)
                with contextlib.suppress(DamagedError):
                    known = sessions.load(session)
                    kept.created, kept.messages = (known.created, []) if known is not None else ("", [])
                sessions.save(kept)

    def close(self) -> None:
        """Stop the readers and close the files."""
        self.engine.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _run_batch(
        self, ids: list[list[int]], room: int, sampling: Sampling, stops: list[str], num_beams: int,
        ignore_eos: bool, on_text: Callable[[str], object] | None, cache: Cache | None, clock: _Clock,
        result: Generation,
    ) -> None:  # fmt: skip
        width = max(map(len, ids))
        config = copy.deepcopy(self._generation_config)
        ends = set() if ignore_eos else ends_of(config)
        pad = config.pad_token_id if config.pad_token_id is not None else min(ends, default=0)
        config.update(
            max_new_tokens=room, do_sample=False, temperature=None, top_k=None, top_p=None, num_beams=num_beams,
            pad_token_id=pad, eos_token_id=sorted(ends) or [_NO_TOKEN], return_dict_in_generate=False,
            max_length=None, cache_implementation=None,
        )  # fmt: skip
        tokens = torch.tensor([[pad] * (width - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
        clock.prompt_width = width
        streamer = _Pieces(self._need_tokenizer(), on_text) if on_text is not None and len(ids) == 1 else None
        past = cache if cache is not None else self.engine.new_cache(width + room)
        try:
            with torch.inference_mode():
                out = self.hf.generate(
                    tokens,
                    attention_mask=mask,
                    generation_config=config,
                    past_key_values=past,
                    logits_processor=sampling.processors(width),
                    stopping_criteria=[clock],
                    streamer=streamer,
                    **({"stop_strings": stops, "tokenizer": self.tokenizer} if stops else {}),
                )
        finally:
            if isinstance(past, TieredCache):
                result.stats.kv_grains = past.grains
                if cache is None:
                    past.close()
        for row in out[:, width:].tolist():
            # a row that ended early is padded to the longest; its end token is its last
            cut = next((i + 1 for i, t in enumerate(row) if t in ends), len(row))
            if stops and cut == len(row):
                while cut > 1 and row[cut - 1] == pad and pad not in ends:
                    cut -= 1
            done = row[:cut]
            stopped = (done and done[-1] in ends) or len(done) < room
            result.token_ids.append(done)
            result.text.append(self._decode(done))
            result.finish.append("stop" if stopped else "length")

    def _count(
        self, stats: RequestStats, clock: _Clock, prompt_tokens: int, began: float, before: list[LayerUse]
    ) -> None:
        stats.prompt_tokens = prompt_tokens
        stats.kv_codec = str(self.engine.kv.codecs) if self.engine.kv.codecs else None
        if self.engine.kv.sparse is not None:
            stats.inexact += ("sparse attention",)
        if stats.kv_codec is not None:
            stats.inexact += (f"{stats.kv_codec} keys and values",)
        stats.total_s = time.perf_counter() - began
        stats.ttft_s = (clock.first or time.perf_counter()) - began
        stats.decode_s = clock.last - clock.first if clock.first else 0.0
        for i, step in enumerate(self.engine.steps):
            if i == 0 or step.tokens > step.sequences:
                stats.prefill += step
            else:
                stats.decode += step
        stats.peak_rss_bytes = mem.peak_rss()
        ahead = self.engine.experts.lookahead
        if ahead is not None:
            stats.expert_bytes = self.engine.experts.sizes
            stats.experts_by_layer = tuple(now - then for now, then in zip(ahead.use, before, strict=True))
        stats.prefill_pass_tokens = self.engine.steps[0].tokens if self.engine.steps else 0

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            if not prompt:
                raise UsageError("the prompt is empty")
            ids = [int(i) for i in self._need_tokenizer()(prompt)["input_ids"]]
        else:
            ids = list(prompt)
        if not ids:
            raise UsageError("the prompt is empty")
        vocab = self.hf.config.get_text_config(decoder=True).vocab_size
        bad = next((i for i in ids if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < vocab), None)
        if bad is not None:
            raise UsageError(f"token id {bad!r} is outside the vocabulary of {vocab}")
        return ids

    def _decode(self, ids: list[int]) -> str | None:
        return self.tokenizer.decode(ids, skip_special_tokens=True) if self.tokenizer is not None else None

    def _need_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ModelError(f"{self.engine.folder} has no tokenizer; give the prompt as --prompt-ids")
        return self.tokenizer


class _Clock(StoppingCriteria):  # type: ignore[misc]
    """Called after each token: notes when."""

    def __init__(self, began: float) -> None:
        self.began = began
        self.first = self.last = 0.0
        self.prompt_width = 0
        self.generated = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Never stops anything."""
        self.last = time.perf_counter()
        if not self.first:
            self.first = self.last
        self.generated = input_ids.shape[1] - self.prompt_width
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class _Pieces(TextStreamer):  # type: ignore[misc]
    """Hands finished pieces of text to a function."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Whole words, and whatever is left at the end."""
        if text:
            self._on_text(text)

"""The tokens of one answer, one after the other: sampling, stop conditions, log probabilities; what can be resumed.

What a sequence gets depends on its own logits and request alone, never on what runs beside it. Which tokens a schema
allows is `structure`'s business, the answer's JSON that of `responses`.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import struct
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from offload.batch.requests import Options, Request
from offload.batch.structure import Constraint, StructureError
from offload.batch.vocabulary import Vocabulary
from offload.sampling import Sampling, greedy
from tiers import DamagedError

GREEDY_BELOW = 1e-5  # a temperature that divides float32 logits out of their range
_HEADER = struct.Struct("<4sBBHII8s")  # magic, version, 1 if there are log probabilities, 0, tokens, most likely, key
_MAGIC, _VERSION = b"OFCH", 1
_UINT, _FLOAT = np.dtype("<u4"), np.dtype("<f4")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's natural log probability, from the model's own logits: before temperature, top-p or a schema.

    `offset` is where it begins in the text, in characters; `top` are the most likely ones in its place.
    """

    token: str
    data: bytes | None
    logprob: float
    top: tuple[TokenLogprob, ...] = ()
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Choice:
    """A finished answer. `token_ids` has all that were generated, an end token or stop string included; the text
    and the log probabilities end before it. `text` is None without a tokenizer. `finish` is `stop` or `length`."""

    index: int
    text: str | None
    token_ids: tuple[int, ...]
    finish: str
    logprobs: tuple[TokenLogprob, ...] | None = None


class Chooser:
    """Chooses the tokens of choice `index` of a request.

    `limit`: tokens it may have at most. `ends`: the tokens that end an answer. `defaults`: how tokens are sampled
    where the request does not say. Without a `vocabulary` there are no stop strings and no text.
    `finish` is None while it goes on, then `stop`, `length`, or `error` with the reason in `error`.
    """

    def __init__(
        self, request: Request, index: int = 0, *, limit: int, ends: Collection[int] = (),
        vocabulary: Vocabulary | None = None, defaults: Sampling | None = None, constraint: Constraint | None = None,
    ) -> None:  # fmt: skip
        options = request.options
        if limit < 1:
            raise ValueError("limit: an answer has one token at least")
        if vocabulary is None and (options.stop or constraint is not None):
            raise ValueError("stop strings and response_format need a model with a tokenizer")
        self.index = index
        self.tokens: list[int] = []
        self.finish: str | None = None
        self.error: StructureError | None = None
        self.sampling = sampling_of(request, index, defaults or Sampling())
        self._limit = limit
        self._vocabulary = vocabulary
        self._constraint = constraint
        self._top = options.logprobs
        self._logprobs: list[float] = []
        self._likely: list[list[tuple[int, float]]] = []
        self._cut: int | None = None
        # a stop string that is a special token never shows in the text
        named = {s: vocabulary.special(s) for s in options.stop} if vocabulary is not None else {}
        self._stops = [s for s in options.stop if named.get(s) is None]
        self._ends = frozenset(ends) | {i for i in named.values() if i is not None}
        self.plain = self.sampling.temperature == 0 and self._top is None and constraint is None
        self._key = _key(request, index, self.sampling, self._ends)

    def choose(self, row: torch.Tensor) -> int:
        """The next token, given the model's logits row [vocab]. Raises `StructureError`."""
        row = row.to("cpu")
        scores = self._constraint.apply(row) if self._constraint is not None else row
        token = self.sampling.choose(scores, len(self.tokens))
        if self._top is not None:
            self._note(row, token, self._top)
        self.take(token)
        return token

    def take(self, token: int) -> None:
        """Go on with a token that was chosen elsewhere: a `plain` one's argmax. Raises `StructureError`."""
        assert self.finish is None, "an answer that has ended does not go on"
        self.tokens.append(token)
        if self._constraint is not None and token not in self._ends:
            self._constraint.advance(token)
        self._judge()

    def fail(self, error: StructureError) -> None:
        """End with an error: this request cannot be answered."""
        self.finish, self.error = "error", error

    def choice(self) -> Choice:
        """The answer, once it has ended."""
        assert self.finish in ("stop", "length"), "the answer has not ended"
        shown = self.tokens[:-1] if self.tokens[-1] in self._ends else self.tokens
        text = self._vocabulary.text(shown) if self._vocabulary is not None else None
        offsets = self._offsets(shown, text or "")
        if text is not None and self._cut is not None:
            text = text[: self._cut]
            offsets = [o for o in offsets if o < len(text)]
        logprobs = None
        if self._top is not None:
            logprobs = tuple(self._logprob(i, offset) for i, offset in enumerate(offsets))
        return Choice(self.index, text, tuple(self.tokens), self.finish, logprobs)

    def state(self) -> bytes:
        """Where it is, for `restore`: tokens, and log probabilities if asked for."""
        top = len(self._likely[0]) if self._likely else 0
        head = _HEADER.pack(_MAGIC, _VERSION, self._top is not None, 0, len(self.tokens), top, self._key)
        parts = [head, np.array(self.tokens, _UINT).tobytes(), np.array(self._logprobs, _FLOAT).tobytes()]
        if top:
            flat = [entry for entries in self._likely for entry in entries]
            parts += [np.array([t for t, _ in flat], _UINT).tobytes(), np.array([p for _, p in flat], _FLOAT).tobytes()]
        body = b"".join(parts)
        return body + struct.pack("<I", zlib.crc32(body))

    def restore(self, state: bytes) -> None:
        """Go on from an earlier `state` of the same request. Only before the first token.

        Raises `DamagedError` if it is damaged or another's; this one is then as it was.
        """
        assert not self.tokens, "restoring comes before the first token"
        tokens, logprobs, likely = self._unpack(state)
        done = tokens[:-1] if tokens and tokens[-1] in self._ends else tokens
        if self._constraint is not None:
            constraint = self._constraint.copy()
            try:
                constraint.advance(*done)
            except (StructureError, OverflowError) as e:
                raise DamagedError(f"a stored answer does not follow its response_format: {e}") from e
            self._constraint = constraint
        self.tokens, self._logprobs, self._likely = tokens, logprobs, likely
        if tokens:  # none before the last has ended it, or there would be none after
            self._judge()

    def _judge(self) -> None:
        """Whether the last token ends the answer."""
        if self.tokens[-1] in self._ends or (self._constraint is not None and self._constraint.finished):
            self.finish = "stop"
        if self._stops and self._vocabulary is not None and self.tokens[-1] not in self._ends:
            self._cut = self._vocabulary.find(self.tokens, self._stops)
            if self._cut is not None:
                self.finish = "stop"
        if self.finish is None and len(self.tokens) >= self._limit:
            self.finish = "length"

    def _note(self, row: torch.Tensor, token: int, top: int) -> None:
        logprobs = torch.log_softmax(row.to(torch.float32), dim=-1)
        self._logprobs.append(float(logprobs[token]))
        values, ids = logprobs.topk(min(top, len(logprobs)))
        found = zip(ids.tolist(), values.tolist(), strict=True)
        self._likely.append(sorted(found, key=lambda entry: (-entry[1], entry[0])))

    def _logprob(self, at: int, offset: int) -> TokenLogprob:
        top = tuple(self._named(t, p) for t, p in self._likely[at])
        return self._named(self.tokens[at], self._logprobs[at], top, offset)

    def _named(self, token: int, logprob: float, top: tuple[TokenLogprob, ...] = (), offset: int = 0) -> TokenLogprob:
        name, data = (f"token_id:{token}", None) if self._vocabulary is None else self._vocabulary.piece(token)
        return TokenLogprob(name, data, logprob, top, offset)

    def _offsets(self, tokens: Sequence[int], text: str) -> list[int]:
        """Where each token begins in the text; one that begins within a character, where that does."""
        if self._vocabulary is None or self._top is None:
            return [0] * len(tokens)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        out, length = [], 0
        for token in tokens:
            out.append(length)
            if self._vocabulary.visible(token):
                length += len(decoder.decode(self._vocabulary.piece(token)[1] or b""))
        length += len(decoder.decode(b"", final=True))
        lost = max(0, length - len(text))  # some tokenizers drop the first word's space
        return [max(0, o - lost) for o in out]

    def _unpack(self, state: bytes) -> tuple[list[int], list[float], list[list[tuple[int, float]]]]:
        if len(state) < _HEADER.size + 4 or zlib.crc32(state[:-4]) != struct.unpack("<I", state[-4:])[0]:
            raise DamagedError("a stored answer is damaged: its checksum is wrong")
        magic, version, has, _, count, top, key = _HEADER.unpack_from(state)
        if (magic, version) != (_MAGIC, _VERSION):
            raise DamagedError(f"a stored answer is of another kind: {magic!r} version {version}")
        if key != self._key or bool(has) != (self._top is not None):
            raise DamagedError("a stored answer is of another request")
        if len(state) != _HEADER.size + 4 * (count + (count if has else 0) + 2 * count * top) + 4:
            raise DamagedError("a stored answer is damaged: its length is wrong")
        words = np.frombuffer(state, _UINT, offset=_HEADER.size, count=(len(state) - _HEADER.size) // 4 - 1)
        floats = words.view(_FLOAT)
        lists = words[2 * count : 2 * count + count * top].reshape(count, top).tolist()
        values = floats[2 * count + count * top :].reshape(count, top).tolist()
        likely = [list(zip(ids, row, strict=True)) for ids, row in zip(lists, values, strict=True)]
        return words[:count].tolist(), floats[count : 2 * count].tolist() if has else [], likely if has else []


def choose_all(choosers: Sequence[Chooser], logits: torch.Tensor) -> list[int | None]:
    """The next token of each of S sequences, given logits [S, vocab].

    Plain greedy ones share one argmax (the first of equal maxima, as for a row alone); a request whose schema turns
    out too complex ends with an error, and None here, without harm to the others.
    """
    assert len(choosers) == logits.shape[0], "one row of logits for each sequence"
    best = greedy(logits) if any(c.plain for c in choosers) else []
    out: list[int | None] = []
    for i, chooser in enumerate(choosers):
        if chooser.plain:
            chooser.take(best[i])
            out.append(best[i])
            continue
        try:
            out.append(chooser.choose(logits[i]))
        except StructureError as e:
            chooser.fail(e)
            out.append(None)
    return out


def sampling_of(request: Request, index: int, defaults: Sampling) -> Sampling:
    """How choice `index` of the request is sampled: as it says, and by `defaults` where it does not.

    A request that gives top_p or asks for several choices, but no temperature, means to sample: it has OpenAI's
    temperature of 1 where the default is greedy. The seed is the request's own for the first choice, derived from
    it for the others, and derived from custom_id where there is none: a resumed job gives the same answer.
    """
    options = request.options
    temperature = options.temperature
    if temperature is None:
        meant = options.top_p is not None or options.n > 1
        temperature = 1.0 if meant and defaults.temperature == 0 else defaults.temperature
    top_p = defaults.top_p if options.top_p is None else options.top_p
    if temperature < GREEDY_BELOW or top_p == 0:
        return Sampling()
    return replace(defaults, temperature=temperature, top_p=top_p, seed=_seed(options, request.custom_id, index))


def _seed(options: Options, custom_id: str, index: int) -> int:
    if options.seed is not None and index == 0:
        return options.seed
    named = f"seed {options.seed}" if options.seed is not None else f"id {custom_id}"
    digest = hashlib.blake2b(f"{index} {named}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _key(request: Request, index: int, sampling: Sampling, ends: frozenset[int]) -> bytes:
    """What must be the same for a state to go on from."""
    o = request.options
    how = [sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed, sorted(ends)]
    parts = [request.custom_id, request.chat, index, *how, list(o.stop), o.logprobs, o.response_format]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()

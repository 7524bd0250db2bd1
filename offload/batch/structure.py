"""Structured output: which tokens a JSON schema allows next.

The grammar, and the mask over the vocabulary, are llguidance's (Earley parser over a trie of the tokens); this module
guards what goes in and is the only one that imports it, on first use. It does not choose: see `choosing`.
"""

from __future__ import annotations

import json
import math
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tiers import OffloadError

if TYPE_CHECKING:
    from llguidance import LLMatcher

PARAM = "response_format"
COMPILED = 64  # grammars kept of one model
SCHEMA_BYTES = 256 << 10
# llguidance recurses in native code, where too deep is a crash: it bore 2,700 levels in 8 MiB, and has 64 MiB here
LEVELS = 2000
STACK = 64 << 20
# a multipleOf is an automaton of that many states: a million take 8 s to build
MULTIPLES = 100_000
# one to two kB each, of every sequence
LEXER_STATES = 50_000
SYMBOLS = 50_000  # in a grammar; it cannot have more than 65,525 in the end
# what the first schema takes beside the model, per token of the vocabulary, and stays: a trie and a tokenizer
BYTES_PER_TOKEN = 900
# what may stand between two tokens of JSON. Without a bound, a model that likes spaces never ends
BLANK = r"[\x20\x0A\x0D\x09]{1,32}"


class StructureError(OffloadError, ValueError):
    """A `response_format` that cannot be honoured. The rest of a batch is not concerned."""

    code = "invalid_response_format"
    param = PARAM


class Constraint:
    """What one sequence may go on with. Raises `StructureError` when the grammar turns out too complex."""

    def __init__(self, matcher: LLMatcher, vocab: int) -> None:
        self._matcher = matcher
        self._vocab = vocab

    @property
    def finished(self) -> bool:
        """Whether the document is complete, and nothing but an end token may follow."""
        return self._matcher.is_stopped()

    @property
    def complete(self) -> bool:
        """Whether the document would be valid if it ended here."""
        return self._matcher.is_accepting()

    def allowed(self) -> torch.Tensor:
        """The tokens that may come next, bool [vocab]. Never empty."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        mask = torch.from_numpy(np.unpackbits(bits, count=self._vocab, bitorder="little").view(np.bool_))
        if not mask.any():
            raise StructureError(f"{PARAM}: no token of this model's vocabulary can go on with it")
        return mask

    def apply(self, row: torch.Tensor) -> torch.Tensor:
        """row [vocab] → the same with -inf where a token is not allowed. What follows the vocabulary is not."""
        out = torch.full_like(row, -torch.inf)
        allowed = self.allowed()[: row.shape[-1]]
        out[: len(allowed)] = row[: len(allowed)].masked_fill(~allowed, -torch.inf)
        return out

    def advance(self, *tokens: int) -> None:
        """Go on with `tokens`. Raises `StructureError` if they are not allowed."""
        if self._matcher.try_consume_tokens(list(tokens)) < len(tokens):
            self._check()
            raise StructureError(f"{PARAM}: the tokens do not follow the schema")

    def copy(self) -> Constraint:
        """Another one at the same place, that goes its own way."""
        return Constraint(self._matcher.deep_copy(), self._vocab)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise StructureError(f"{PARAM}: the schema cannot be followed further: {_reason(self._matcher)}")


class Grammars:
    """The constraints of one model. Compiled schemas are kept, the latest used `COMPILED` of them.

    `tokenizer` is a fast one of transformers, `vocab` the width of the logits, `ends` the tokens that end an answer.
    May be used from several threads; a constraint may not.
    """

    def __init__(self, tokenizer: Any, vocab: int, ends: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab = vocab
        self._ends = sorted(ends)
        self._native: Any = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def constraint(self, response_format: Mapping[str, Any] | None) -> Constraint | None:
        """The constraint that `response_format` (OpenAI's, json_object or json_schema) asks for; None for plain text.

        Raises `StructureError` for one that is invalid or that cannot be enforced.
        """
        schema = schema_of(response_format)
        if schema is None:
            return None
        try:
            key = json.dumps(schema, ensure_ascii=False)  # in its order: properties come in it
        except (RecursionError, TypeError, ValueError) as e:
            raise StructureError(f"{PARAM}: the schema is not JSON: {e}") from e
        with self._lock:
            matcher = self._compiled.get(key)
            if matcher is None:
                matcher = self._compiled[key] = self._compile(schema, key)
                while len(self._compiled) > COMPILED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(key)
            return Constraint(matcher.deep_copy(), self._vocab)

    def _compile(self, schema: dict[str, Any], text: str) -> LLMatcher:
        _guard(schema, text)
        done: list[LLMatcher | BaseException] = []

        def work() -> None:
            try:
                done.append(self._compile_here(text))
            except BaseException as e:
                done.append(e)

        before = threading.stack_size(STACK)
        try:
            worker = threading.Thread(target=work, name="offload-grammar")
            worker.start()
        finally:
            threading.stack_size(before)
        worker.join()
        if isinstance(done[0], BaseException):
            raise done[0]
        return done[0]

    def _compile_here(self, text: str) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        # the schema's own "x-guidance" cannot switch checks off: overrides go last
        options = {"whitespace_flexible": True, "whitespace_pattern": BLANK, "lenient": False, "coerce_one_of": False}
        try:
            grammar = LLMatcher.grammar_from_json_schema(text, overrides=options)  # type: ignore[arg-type]
        except ValueError as e:
            raise StructureError(f"{PARAM}: the schema cannot be used: {e}") from e
        limits = LLParserLimits(max_lexer_states=LEXER_STATES, max_grammar_size=SYMBOLS, verbose_errors=False)
        matcher = LLMatcher(self._tokens(), grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise StructureError(f"{PARAM}: the schema cannot be enforced: {_reason(matcher)}")
        Constraint(matcher.deep_copy(), self._vocab).allowed()  # some are found too complex only now
        return matcher

    def _tokens(self) -> Any:
        """The tokenizer as llguidance has it; about a second for a large vocabulary."""
        if self._native is None:
            import llguidance.hf

            if self._tokenizer is None or not getattr(self._tokenizer, "is_fast", False):
                raise StructureError(f"{PARAM} needs a model with a fast tokenizer (tokenizer.json)")
            try:
                self._native = llguidance.hf.from_tokenizer(
                    self._tokenizer, n_vocab=self._vocab, eos_token=self._ends or None,
                    slices=llguidance.LLTokenizer.json_slices(),
                )  # fmt: skip
            except Exception as e:  # each kind of tokenizer that it does not know raises its own
                raise StructureError(f"{PARAM}: this model's tokenizer cannot be used with it: {e}") from e
        return self._native


def schema_of(response_format: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The JSON schema that a `response_format` stands for; None for text. Raises `StructureError`."""
    if response_format is None:
        return None
    if not isinstance(response_format, Mapping):
        raise StructureError(f"{PARAM} must be an object")
    kind = response_format.get("type")
    known = {"text": {"type"}, "json_object": {"type"}, "json_schema": {"type", "json_schema"}}
    if not isinstance(kind, str) or kind not in known:
        raise StructureError(f"{PARAM}.type must be one of {', '.join(known)}")
    _known_only(response_format, known[kind], PARAM)
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    body = response_format.get("json_schema")
    if not isinstance(body, Mapping):
        raise StructureError(f"{PARAM}.json_schema must be an object")
    _known_only(body, {"name", "description", "schema", "strict"}, f"{PARAM}.json_schema")
    schema = body.get("schema")
    if not isinstance(schema, dict):
        raise StructureError(f"{PARAM}.json_schema.schema must be an object")
    return schema


def _reason(matcher: LLMatcher) -> str:
    """What is wrong, without the native code's inner state."""
    said = matcher.get_error()
    return "it is too complex" if "panic" in said else said.replace("<non-verbose/>", "").strip()


def _known_only(given: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(map(str, given.keys() - known))
    if unknown:
        raise StructureError(f"{where} has an unknown field {unknown[0]!r}; known are {', '.join(sorted(known))}")


def _guard(schema: dict[str, Any], text: str) -> None:
    """Refuses what would take the process down, or hold it up for long."""
    if len(text.encode("utf-8", "replace")) > SCHEMA_BYTES:
        raise StructureError(f"{PARAM}: the schema is larger than {SCHEMA_BYTES >> 10} KiB")
    levels = _levels(schema)
    if levels > LEVELS:
        raise StructureError(f"{PARAM}: the schema and what it refers to are {levels} levels deep; {LEVELS} can be")
    # a float's shortest decimal is what was written
    given = [v for v in _values(schema, "multipleOf") if _is_number(v)]
    multiples = [Fraction(v) if isinstance(v, int) else Fraction(repr(v)) for v in given]
    if multiples:
        unit = math.lcm(*(m.denominator for m in multiples))
        if math.lcm(*(int(m * unit) for m in multiples)) > MULTIPLES:
            raise StructureError(f"{PARAM}: multipleOf is too large; it, or several together, can be {MULTIPLES}")


def _levels(schema: dict[str, Any]) -> int:
    """At most how deep compiling goes: into the schema, and once into everything that is referred to."""
    targets = {r for r in _values(schema, "$ref") if isinstance(r, str)}
    return _depth(schema) + sum(_depth(_resolve(schema, r)) for r in targets)


def _resolve(schema: Any, reference: str) -> Any:
    """What a local reference ("#/$defs/a") points to; all of the schema where that is not to be seen from here."""
    if not reference.startswith("#/"):
        return schema
    at = schema
    for part in reference[2:].split("/"):
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(at, dict) and name in at:
            at = at[name]
        elif isinstance(at, list) and name.isdecimal() and int(name) < len(at):
            at = at[int(name)]
        else:
            return schema
    return at


def _walk(value: Any) -> Iterator[tuple[Any, int]]:
    """Every value inside `value` with its depth, without recursion."""
    todo = [(value, 1)]
    while todo:
        at, depth = todo.pop()
        yield at, depth
        inner: Sequence[Any] = list(at.values()) if isinstance(at, dict) else at if isinstance(at, list) else ()
        todo += [(v, depth + 1) for v in inner]


def _depth(value: Any) -> int:
    return max(depth for _, depth in _walk(value))


def _values(schema: Any, key: str) -> list[Any]:
    return [at[key] for at, _ in _walk(schema) if isinstance(at, dict) and key in at]


def _is_number(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value) and value > 0
    return isinstance(value, int) and not isinstance(value, bool) and value > 0

"""The tokens of one answer: the same whatever runs beside it, wherever it was resumed, however text is cut up."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from offload.batch.choosing import Choice, Chooser, choose_all, sampling_of
from offload.batch.requests import Options, Request
from offload.batch.responses import response_body
from offload.batch.structure import Grammars
from offload.batch.vocabulary import Vocabulary, byte_alphabet
from offload.sampling import Sampling, _nucleus
from tiers import DamagedError

END = 1265
WIDTH = 1272  # of the logits: a few more than the tokenizer has
DEMO = Path(__file__).parents[1] / "offload" / "models" / "demo-dense"
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "é"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "t", "schema": SCHEMA}}


@cache
def demo() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


@cache
def fallback() -> Any:
    """A SentencePiece-like tokenizer: words with ▁, and bytes for all else."""
    words = ["<unk>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁the", "the", "st", "op", "a", "b", "▁é"]
    model = models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


@cache
def vocabulary() -> Vocabulary:
    return Vocabulary(demo())


@cache
def grammars() -> Grammars:
    return Grammars(demo(), WIDTH, [END])


@cache
def tokens_of_bytes() -> dict[bytes, int]:
    pieces = ((vocabulary().piece(i)[1], i) for i in range(1260))
    return {data: i for data, i in pieces if data}


def cut_up(data: bytes, rng: random.Random) -> list[int]:
    """`data` as tokens, cut at random places: not as the tokenizer would."""
    out, at = [], 0
    while at < len(data):
        fits = [n for n in range(1, 12) if data[at : at + n] in tokens_of_bytes() and at + n <= len(data)]
        size = rng.choice(fits)
        out.append(tokens_of_bytes()[data[at : at + size]])
        at += size
    return out


def request(custom_id: str = "r", chat: bool = True, **options: Any) -> Request:
    return Request(custom_id, chat, "", Options(**options))


def chooser(of: Request, index: int = 0, limit: int = 40, **more: Any) -> Chooser:
    how: dict[str, Any] = {"ends": (END,), "vocabulary": vocabulary()} | more
    return Chooser(of, index, limit=limit, constraint=grammars().constraint(of.options.response_format), **how)


def rows(seed: int, count: int, dtype: torch.dtype = torch.float32, sharp: float = 3.0) -> torch.Tensor:
    return (torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)) * sharp).to(dtype)


def run(it: Chooser, logits: torch.Tensor) -> Chooser:
    """Goes on with `logits` [position, vocab] until the answer ends."""
    for row in logits[len(it.tokens) :]:
        if it.finish is not None:
            break
        it.choose(row)
    return it


def feed(it: Chooser, tokens: Sequence[int]) -> Chooser:
    for token in tokens:
        if it.finish is not None:
            break
        it.take(token)
    return it


def until(text: str, stops: Sequence[str]) -> str:
    """`text` up to the stop string that ends first, then the longest."""
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    return text[: min(ends)[1]] if ends else text


TEXT = st.text(st.sampled_from("abst op\n.é€你好😀👍🏽\u200d"), min_size=1, max_size=30)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.5, 1.0, 1.9]),
        "top_p": st.sampled_from([0.1, 0.9, 1.0]),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "stop": st.lists(st.sampled_from(["a", "th", " e", "é", "<|user|>"]), max_size=3).map(tuple),
        "n": st.integers(1, 3),
        "logprobs": st.integers(0, 5),
        "response_format": st.sampled_from([None, {"type": "json_object"}, FORMAT]),
    },
)


# stop strings and text


@settings(max_examples=150, deadline=None)
@given(text=TEXT, data=st.data(), seed=st.integers(0, 2**32))
def test_stop_strings_are_found_whatever_the_token_boundaries(text: str, data: st.DataObject, seed: int) -> None:
    rng = random.Random(seed)
    at = data.draw(st.integers(0, len(text) - 1))
    inside = text[at : at + data.draw(st.integers(1, 6))]
    stops = [*data.draw(st.lists(TEXT.map(lambda t: t[:4]), max_size=2)), inside]
    tokens = cut_up(text.encode(), rng)
    for _ in range(rng.randrange(3)):
        tokens.insert(rng.randrange(len(tokens) + 1), rng.choice([1260, 1263, 1270]))  # neither has any text
    it = feed(chooser(request(stop=tuple(stops)), limit=1000), tokens)

    def stopped(front: Sequence[int]) -> bool:
        return any(s in demo().decode(front, skip_special_tokens=True) for s in stops)

    used = next(n for n in range(1, len(tokens) + 1) if stopped(tokens[:n]))
    assert it.finish == "stop"
    assert it.tokens == tokens[:used]
    assert it.choice().text == until(text, stops)


@settings(max_examples=100, deadline=None)
@given(text=TEXT, seed=st.integers(0, 2**32))
def test_characters_split_over_tokens_come_out_whole(text: str, seed: int) -> None:
    tokens = cut_up(text.encode(), random.Random(seed))
    ended = feed(chooser(request(), limit=1000), [*tokens, END])
    assert (ended.finish, ended.choice().text) == ("stop", text)
    full = feed(chooser(request(stop=("never there",)), limit=len(tokens)), tokens)
    assert (full.finish, full.choice().text) == ("length", text)


@settings(max_examples=100, deadline=None)
@given(words=st.lists(st.sampled_from(["▁the", "the", "st", "op", "a", "▁é", "é", "€", "你"]), min_size=1, max_size=40))
def test_stop_strings_in_a_vocabulary_with_bytes_for_all_else(words: list[str]) -> None:
    tokenizer = fallback()
    tokens = []
    for word in words:
        known = tokenizer.get_vocab().get(word)
        tokens += [known] if known is not None else [2 + b for b in word.encode()]
    stops = ("stop", "你€", "thea", "é")
    it = feed(chooser(request(stop=stops), limit=1000, vocabulary=Vocabulary(tokenizer), ends=(1,)), [*tokens, 1])
    text = tokenizer.decode(tokens)
    assert it.choice().text == until(text, stops)


def test_a_stop_string_at_the_end_of_a_long_run_of_byte_tokens() -> None:
    for front in range(1, 30):  # however the tokens looked at begin within a character
        tokens = [2 + b for b in ("你" * front + "é€").encode()]
        for stop in ("€", "é€", "你é€"):
            it = chooser(request(stop=(stop,)), limit=1000, vocabulary=Vocabulary(fallback()), ends=(1,))
            assert feed(it, tokens).choice().text == ("你" * front + "é€").removesuffix(stop)


def test_invalid_bytes_do_not_hide_a_stop_string() -> None:
    tokens = [tokens_of_bytes()[b] for b in (b"\xe2", b"\xff", b"\x80", b"a", b"b")]
    it = feed(chooser(request(stop=("b",))), tokens)
    assert it.finish == "stop"
    assert it.choice().text == demo().decode(tokens)[:-1]


def test_a_stop_string_may_be_a_special_token() -> None:
    it = feed(chooser(request(stop=("<|user|>",))), [*cut_up(b"ab", random.Random(0)), 1263])
    assert (it.finish, it.choice().text) == ("stop", "ab")


def test_the_byte_alphabet_is_the_usual_one() -> None:
    assert byte_alphabet() == {char: byte for byte, char in bytes_to_unicode().items()}


def test_the_limit_and_the_end() -> None:
    assert feed(chooser(request(), limit=2), [1, 2, 3]).choice() == Choice(0, demo().decode([1, 2]), (1, 2), "length")
    assert feed(chooser(request(), limit=2), [1, END]).finish == "stop"
    assert feed(chooser(request(), limit=1), [END]).choice() == Choice(0, "", (END,), "stop")
    assert feed(chooser(request(), limit=3, ends=()), [1, END, 2]).finish == "length"


# sampling


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(-(2**63), 2**63 - 1), position=st.integers(0, 5000), vocab=st.sampled_from([7, WIDTH, 5000]),
    temperature=st.sampled_from([0.1, 1.0, 2.0]), top_k=st.sampled_from([0, 20]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]), sharp=st.sampled_from([0.0, 0.5, 6.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_a_row_gives_the_token_that_generate_gives(
    seed: int, position: int, vocab: int, temperature: float, top_k: int, top_p: float, sharp: float,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    row = (torch.randn(vocab, generator=torch.Generator().manual_seed(position)) * sharp).to(dtype)
    sampling = Sampling(temperature, top_k, top_p, seed)
    before = torch.zeros(1, 3 + position, dtype=torch.long)
    assert sampling.choose(row, position) == int(sampling.processors(3)(before, row.float()[None])[0].argmax())


@settings(max_examples=200, deadline=None)
@given(weights=st.lists(st.integers(1, 50), min_size=2, max_size=8, unique=True), at=st.integers(1, 7),
       seed=st.integers(0, 99))  # fmt: skip
def test_a_nucleus_that_ends_on_a_token_s_edge_is_transformers_own(weights: list[int], at: int, seed: int) -> None:
    weights.sort(reverse=True)
    top_p = sum(weights[: min(at, len(weights) - 1)]) / sum(weights)
    row = torch.tensor(weights, dtype=torch.float32).log()
    sampling = Sampling(1.0, 0, top_p, seed)
    (warper,) = sampling.warpers()
    left = (warper(None, row[None])[0] > -torch.inf).nonzero().flatten().tolist()
    mine = _nucleus(row, top_p)
    assert mine is None or sorted(mine.tolist()) == left
    want = int(sampling.processors(0)(torch.zeros(1, 0), row[None])[0].argmax())
    assert sampling.choose(row, 0) == want


@pytest.mark.parametrize(
    "how", [{}, {"temperature": 1.5, "seed": 11}, {"temperature": 1.2, "top_p": 0.9, "seed": 3}, {"stop": ("e",)}]
)
def test_an_answer_is_what_generate_gives(how: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    ids = demo()("Once upon a time", return_tensors="pt")["input_ids"]
    it = chooser(request(**how), limit=24)
    stops = {"stop_strings": list(it._stops), "tokenizer": demo()} if it._stops else {}
    with torch.inference_mode():
        want = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=END, pad_token_id=0,
                              logits_processor=it.sampling.processors(ids.shape[1]), **stops)  # fmt: skip
        while it.finish is None:
            it.choose(model(torch.cat([ids, torch.tensor([it.tokens], dtype=torch.long)], dim=1)).logits[0, -1])
    assert it.tokens == want[0, ids.shape[1] :].tolist()
    assert len(it.tokens) > 1


def test_samples_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    sampling = Sampling(temperature=0.8, seed=5)
    counts = torch.bincount(torch.tensor([sampling.choose(logits, i) for i in range(4000)]), minlength=4)
    assert torch.allclose(counts / 4000, (logits / 0.8).softmax(0), atol=0.03)


def test_what_the_request_does_not_say() -> None:
    chat = Sampling(temperature=0.7, top_k=20, top_p=0.8)
    assert sampling_of(request(), 0, Sampling()).temperature == 0
    said = sampling_of(request(seed=3), 0, chat)
    assert said == Sampling(0.7, 20, 0.8, 3)
    assert sampling_of(request(temperature=0.0), 0, chat).temperature == 0
    assert sampling_of(request(top_p=0.5), 0, Sampling()).temperature == 1
    assert sampling_of(request(top_p=0), 0, chat).temperature == 0
    assert sampling_of(request(n=2), 1, Sampling()).temperature == 1
    seeds = {sampling_of(request(c, n=2, temperature=1.0, seed=s), i, chat).seed
             for c in "ab" for s in (None, 1, 2) for i in (0, 1)}  # fmt: skip
    assert len(seeds) == 4 + 4  # two names, each with two choices; two seeds, each with two choices
    assert sampling_of(request("a", temperature=1.0), 0, chat) == sampling_of(request("a", temperature=1.0), 0, chat)


@settings(max_examples=60, deadline=None)
@given(
    options=st.lists(OPTIONS, min_size=1, max_size=5), seed=st.integers(0, 999), order=st.randoms(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), sharp=st.sampled_from([0.02, 3.0]),
)  # fmt: skip
def test_a_request_gets_the_same_whatever_runs_beside_it(
    options: list[dict[str, Any]], seed: int, order: random.Random, dtype: torch.dtype, sharp: float
) -> None:
    steps = 12
    logits = [rows(seed + i, steps, dtype, sharp) for i in range(len(options))]
    requests = [request(f"r{i}", **o) for i, o in enumerate(options)]
    alone = [run(chooser(r, limit=steps), logits[i]) for i, r in enumerate(requests)]
    beside = [chooser(r, limit=steps) for r in requests]
    while running := [i for i, c in enumerate(beside) if c.finish is None]:
        order.shuffle(running)
        now = running[: order.randrange(1, len(running) + 1)]
        batch = torch.stack([logits[i][len(beside[i].tokens)] for i in now])
        assert choose_all([beside[i] for i in now], batch) == [beside[i].tokens[-1] for i in now]
    assert [c.state() for c in beside] == [c.state() for c in alone]
    assert [c.choice() for c in beside] == [c.choice() for c in alone]


def test_equal_maxima_give_the_first_alone_and_in_a_batch() -> None:
    row = torch.zeros(3, WIDTH, dtype=torch.bfloat16)
    row[0, [7, 900]] = 1
    row[1, [31, 32, 1271]] = 2
    assert choose_all([chooser(request()) for _ in range(3)], row) == [7, 31, 0]
    assert [chooser(request()).choose(r) for r in row] == [7, 31, 0]


# resuming


@settings(max_examples=100, deadline=None)
@given(options=OPTIONS, seed=st.integers(0, 999), at=st.integers(0, 24), index=st.integers(0, 2))
def test_it_goes_on_identically_from_any_point(options: dict[str, Any], seed: int, at: int, index: int) -> None:
    logits = rows(seed, 24)
    of = request(**options)
    whole = run(chooser(of, index, limit=24), logits)
    first = run(chooser(of, index, limit=24), logits[:at])
    again = chooser(of, index, limit=24)
    again.restore(first.state())
    assert (again.tokens, again.finish, again.state()) == (first.tokens, first.finish, first.state())
    run(again, logits)
    assert (again.state(), again.choice()) == (whole.state(), whole.choice())


@settings(max_examples=60, deadline=None)
@given(flip=st.integers(0, 10**6), bit=st.integers(0, 7), cut=st.integers(0, 10**6))
def test_a_damaged_state_is_refused(flip: int, bit: int, cut: int) -> None:
    of = request(logprobs=2, temperature=1.0, response_format=FORMAT)
    state = run(chooser(of), rows(1, 9)).state()
    damaged = bytearray(state)
    damaged[flip % len(state)] ^= 1 << bit
    for bad in (bytes(damaged), state[: cut % len(state)], state + b"\0"):
        it = chooser(of)
        with pytest.raises(DamagedError):
            it.restore(bad)
        it.restore(state)  # it is as it was


def test_the_state_of_another_request_is_refused() -> None:
    state = run(chooser(request(temperature=1.0)), rows(1, 9)).state()
    others = [request("s", temperature=1.0), request(temperature=1.0, seed=1), request(temperature=0.5),
              request(temperature=1.0, logprobs=1), request(temperature=1.0, response_format=FORMAT)]  # fmt: skip
    for of, index in [*((o, 0) for o in others), (request(temperature=1.0), 1)]:
        with pytest.raises(DamagedError, match="another request"):
            chooser(of, index).restore(state)


# log probabilities


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), top=st.sampled_from([0, 1, 5, WIDTH]), temperature=st.sampled_from([0.0, 0.3, 1.5]),
       dtype=st.sampled_from([torch.float32, torch.bfloat16]), form=st.sampled_from([None, FORMAT]))  # fmt: skip
def test_log_probabilities_are_those_of_the_raw_logits(
    seed: int, top: int, temperature: float, dtype: torch.dtype, form: dict[str, Any] | None
) -> None:
    logits = rows(seed, 6, dtype)
    it = run(chooser(request(logprobs=top, temperature=temperature, response_format=form), limit=6), logits)
    restored = chooser(request(logprobs=top, temperature=temperature, response_format=form), limit=6)
    restored.restore(it.state())
    answer = restored.choice()
    assert answer.logprobs is not None
    shown = len(answer.token_ids) - (answer.token_ids[-1] == END)
    assert len(answer.logprobs) == shown
    for token, row, entry in zip(answer.token_ids, logits, answer.logprobs, strict=False):
        want = torch.log_softmax(row.float(), dim=-1)
        assert entry.logprob == float(want[token])
        assert (entry.token, entry.data) == vocabulary().piece(token)
        given = [t.logprob for t in entry.top]
        assert given == want.sort(descending=True).values[:top].tolist()
        if top == WIDTH:
            assert torch.tensor(given).exp().sum() == pytest.approx(1, abs=1e-5)
            assert sum(t.token == entry.token and t.logprob == entry.logprob for t in entry.top) >= 1


@settings(max_examples=60, deadline=None)
@given(text=TEXT, seed=st.integers(0, 999))
def test_the_tokens_of_the_log_probabilities_make_up_the_text(text: str, seed: int) -> None:
    tokens = cut_up(text.encode(), random.Random(seed))
    row = torch.zeros(WIDTH)
    it = chooser(request(logprobs=1, stop=("好",)), limit=len(tokens))
    for token in tokens:
        if it.finish is None:
            it.choose(row.index_fill(0, torch.tensor(token), 9.0))
    answer = it.choice()
    assert answer.logprobs is not None and answer.text == text.split("好")[0]
    joined = b"".join(t.data or b"" for t in answer.logprobs)
    assert joined.startswith(answer.text.encode())
    done = b""
    for entry in answer.logprobs:
        assert entry.offset == len(done.decode(errors="ignore"))
        done += entry.data or b""
    names = {entry.token for entry in answer.logprobs}
    assert all("�" not in name for name in names)


# the answer's body


def test_the_body_of_a_chat_completion() -> None:
    of = request(logprobs=1, n=2)
    e, rest = tokens_of_bytes()[b"\xc3"], tokens_of_bytes()[b"\xa9"]
    row = torch.full((WIDTH,), -torch.inf)
    answers = []
    for index in (1, 0):
        it = chooser(of, index)
        for token in (e, rest, END):
            it.choose(row.index_fill(0, torch.tensor(token), 0.0))
        answers.append(it.choice())
    made = response_body(
        of, answers, prompt_tokens=7, cached_tokens=4, model="demo", created=12, id="chatcmpl-1"
    )  # fmt: skip
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    first, second = made.pop("choices")
    assert made == {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 12, "model": "demo",
        "usage": {"prompt_tokens": 7, "completion_tokens": 6, "total_tokens": 13,
                  "prompt_tokens_details": {"cached_tokens": 4}},
    }  # fmt: skip
    assert (first["index"], second["index"]) == (0, 1)
    assert first["message"] == {"role": "assistant", "content": "é", "refusal": None}
    assert first["finish_reason"] == "stop"
    assert first["logprobs"]["refusal"] is None
    one = {"token": "bytes:\\xc3", "logprob": 0.0, "bytes": [0xC3]}
    assert first["logprobs"]["content"][0] == {**one, "top_logprobs": [one]}
    assert len(first["logprobs"]["content"]) == 2


def test_the_body_of_a_completion() -> None:
    of = request(chat=False, logprobs=2)
    a, b = tokens_of_bytes()[b"a"], tokens_of_bytes()[b"b"]
    row = torch.full((WIDTH,), -torch.inf)
    it = chooser(of, limit=2)
    it.choose(row.index_fill(0, torch.tensor([a, b]), 0.0))
    it.choose(row.index_fill(0, torch.tensor(b), 0.0))
    made = response_body(of, [it.choice()], prompt_tokens=1, cached_tokens=0, model="m", created=0, id="cmpl-1")
    assert made["object"] == "text_completion"
    half = float(torch.log(torch.tensor(0.5)))
    (choice,) = made["choices"]
    logprobs = choice.pop("logprobs")
    assert choice == {"text": "ab", "index": 0, "finish_reason": "length"}
    assert logprobs["tokens"] == ["a", "b"]
    assert logprobs["text_offset"] == [0, 1]
    assert logprobs["token_logprobs"] == [pytest.approx(half), 0.0]
    assert logprobs["top_logprobs"][0] == {"a": pytest.approx(half), "b": pytest.approx(half)}
    assert min(logprobs["top_logprobs"][1].values()) == -9999.0  # nothing has no logarithm in JSON
    bare = response_body(request(chat=False), [Choice(0, "x", (1,), "length")],
                         prompt_tokens=1, cached_tokens=0, model="m", created=0, id="i")  # fmt: skip
    assert bare["choices"] == [{"text": "x", "index": 0, "logprobs": None, "finish_reason": "length"}]


def test_a_model_without_a_tokenizer_answers_with_token_ids() -> None:
    of = request(chat=False, logprobs=1)
    it = run(chooser(of, limit=3, vocabulary=None), rows(0, 3))
    made = response_body(of, [it.choice()], prompt_tokens=1, cached_tokens=0, model="m", created=0, id="i")
    (choice,) = made["choices"]
    assert (choice["text"], choice["token_ids"]) == ("", it.tokens)
    assert choice["logprobs"]["tokens"] == [f"token_id:{t}" for t in it.tokens]
    with pytest.raises(ValueError, match="tokenizer"):
        chooser(request(stop=("a",)), vocabulary=None)

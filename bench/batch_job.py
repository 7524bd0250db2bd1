"""What the batch benchmarks are about, as numbers: the requests, who computes what in which pass, and the least time.

Measures nothing itself.

A job is a list of requests, each a prompt of given token ids and the number of new tokens asked for; there is no end
token, so every engine does the same work. What an engine did is a list of passes over the weights, each with its
seconds, prompt tokens and decoded tokens.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from checkpoints import Spec

SEED = 7
PROMPTS, NEW = (32, 512), (16, 64)  # tokens, shortest and longest
_SKEW = {PROMPTS: 3, NEW: 2}  # low + (high - low) · u^skew: a quarter, and a third, of the way from low to high
Pass = tuple[int, int]  # prompt tokens (padding included), decoded tokens


@dataclass(frozen=True)
class Request:
    """One request: `new` tokens after `prompt`."""

    prompt: tuple[int, ...]
    new: int

    @property
    def cells(self) -> int:
        """Tokens whose keys and values are computed: the last new one is never fed."""
        return len(self.prompt) + self.new - 1


def mixed(count: int, vocab: int, seed: int = SEED) -> list[Request]:
    """`count` requests with mixed lengths: prompts of 32 to 512 tokens, mean 152; 16 to 64 new ones, mean 32.

    Lengths are strata of their distribution in random order, so that any seed has the same total.
    """
    rng = random.Random(seed)
    lengths = []
    for low, high in (PROMPTS, NEW):
        drawn = [round(low + (high - low) * ((i + 0.5) / count) ** _SKEW[low, high]) for i in range(count)]
        rng.shuffle(drawn)
        lengths.append(drawn)
    return [Request(_tokens(rng, prompt, vocab), new) for prompt, new in zip(*lengths, strict=True)]


def over_documents(
    count: int, documents: int, document_tokens: int, question_tokens: int, new: int, vocab: int, seed: int = SEED
) -> list[Request]:
    """`count` requests that each ask something else of one of `documents` long documents, in random order."""
    rng = random.Random(seed)
    texts = [_tokens(rng, document_tokens, vocab) for _ in range(documents)]
    asked = [texts[i % documents] for i in range(count)]
    rng.shuffle(asked)
    return [Request(text + _tokens(rng, question_tokens, vocab), new) for text in asked]


def spread(requests: Sequence[Request], count: int) -> list[int]:
    """Indices of `count` requests that stand for all: the middle one of each stratum by length, in their order."""
    ranked = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt), requests[i].new))
    count = min(count, len(ranked))
    return sorted(ranked[(2 * k + 1) * len(ranked) // (2 * count)] for k in range(count))


def save(requests: Sequence[Request], path: Path) -> Path:
    """For the measured processes."""
    path.write_text(json.dumps([asdict(r) for r in requests]))
    return path


def load(path: Path) -> list[Request]:
    """What `save` wrote."""
    return [Request(tuple(r["prompt"]), r["new"]) for r in json.loads(path.read_text())]


def totals(requests: Sequence[Request]) -> dict[str, int]:
    """Tokens of the job; `passes` is the least number of passes that can answer all: each new token needs one."""
    return {
        "requests": len(requests),
        "prompt_tokens": sum(len(r.prompt) for r in requests),
        "new_tokens": sum(r.new for r in requests),
        "longest_prompt": max(len(r.prompt) for r in requests),
        "longest": max(r.cells for r in requests),
        "passes": max(r.new for r in requests),
    }


# who is computed when


def continuous(requests: Sequence[Request], parallel: int, chunk: int) -> list[Pass]:
    """The passes of `llama_batch.c`: decodes first, then prompts in order of arrival until the chunk is full."""
    return [(fed, decoded) for fed, decoded, _ in _continuous(requests, parallel, chunk)]


def context(requests: Sequence[Request], parallel: int, chunk: int, kv: str) -> int:
    """Cells of KV for `parallel` sequences: `unified`, as many as are needed at once; `each`, for every sequence as
    many as for the longest.
    """
    longest = _up(max(r.cells for r in requests))
    if kv == "each":
        return longest * parallel
    return max(longest, _up(max(held for _, _, held in _continuous(requests, parallel, chunk))))


def _up(cells: int, to: int = 256) -> int:
    """As llama.cpp allocates them."""
    return -(-cells // to) * to


def _continuous(requests: Sequence[Request], parallel: int, chunk: int) -> Iterator[tuple[int, int, int]]:
    """Per pass: prompt tokens, decoded tokens, cells set aside for the sequences that run."""
    waiting = list(requests)
    running: list[list[int]] = []  # cells, prompt tokens left, new tokens left
    while waiting or running:
        while waiting and len(running) < parallel:
            r = waiting.pop(0)
            running.append([r.cells, len(r.prompt), r.new])
        decoded, fed = sum(not left for _, left, _ in running), 0
        held = sum(cells for cells, _, _ in running)
        for one in running:
            if not one[1]:
                one[2] -= 1
            elif take := min(one[1], chunk - decoded - fed):
                fed += take
                one[1] -= take
                one[2] -= not one[1]
        running = [one for one in running if one[2]]
        yield fed, decoded, held


def groups(requests: Sequence[Request], size: int, by: str) -> list[list[int]]:
    """Indices in batches of `size` with like lengths, shortest first: by the `prompt`, or by the `new` tokens."""

    def key(i: int) -> tuple[int, int]:
        prompt, new = len(requests[i].prompt), requests[i].new
        return (prompt, new) if by == "prompt" else (new, prompt)

    ranked = sorted(range(len(requests)), key=key)
    return [ranked[at : at + size] for at in range(0, len(ranked), size)]


def padded(requests: Sequence[Request], batches: Sequence[Sequence[int]]) -> list[Pass]:
    """The passes of left-padded batches: each goes on until its longest answer is there."""
    passes = []
    for batch in batches:
        width, new = (max(f(requests[i]) for i in batch) for f in (lambda r: len(r.prompt), lambda r: r.new))
        passes += [(width * len(batch), 0), *[(0, len(batch))] * (new - 1)]
    return passes


# how long


def fit(passes: Sequence[tuple[float, Pass]]) -> tuple[float, float]:
    """Seconds of a pass as a + b · tokens, least squares, neither below zero. `passes`: (seconds, pass)."""
    if not passes:
        return 0.0, 1.0
    x, y = [float(sum(p)) for _, p in passes], [s for s, _ in passes]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    spread_x = sum((v - mx) ** 2 for v in x)
    b = sum((v - mx) * (w - my) for v, w in zip(x, y, strict=True)) / spread_x if spread_x else my / mx
    if b < 0:
        return my, 0.0
    a = my - b * mx
    return (a, b) if a >= 0 else (0.0, sum(v * w for v, w in zip(x, y, strict=True)) / sum(v * v for v in x))


def estimate(job_s: float, done: Sequence[tuple[float, Pass]], plan: Sequence[Pass]) -> float:
    """Seconds the whole `plan` would have taken, of a run that was cut after `done` and took `job_s`.

    The passes done say what a pass and a token cost. Where all of them had as many tokens, passes that only decode
    come out too cheap: an estimate in the engine's favour.
    """
    a, b = fit(done)
    spent = sum(a + b * sum(p) for _, p in done)
    return job_s * sum(a + b * sum(p) for p in plan) / spent if spent else float("inf")


def judge(requests: Sequence[Request], run: Mapping[str, Any], plan: Sequence[Pass] | None) -> dict[str, Any]:
    """What a run amounts to: tokens per second over the whole job, from the first request to the last answer.

    `run["answers"]` has the new tokens by request. Of a run that was cut, or had only some of the requests, the job's
    seconds are estimated: by `plan`, all its passes in order or, without one, in proportion to the tokens done.
    """
    answers = {int(i): a for i, a in run["answers"].items() if a}
    complete = [i for i, r in enumerate(requests) if len(answers.get(i, ())) == r.new]
    every = totals(requests)
    whole = len(complete) == len(requests)
    tokens = every["prompt_tokens"] + every["new_tokens"]
    new = sum(map(len, answers.values()))
    done = [(s, (p, d)) for s, p, d in run.get("steps", ())]
    if whole:
        seconds = run["job_s"]
    elif plan is not None and done:
        seconds = estimate(run["job_s"], done, plan)
    else:
        processed = new + sum(len(requests[i].prompt) for i in answers)
        seconds = run["job_s"] * tokens / processed if processed else float("inf")
    return {
        "whole": whole,
        "answered": len(complete),
        "measured_s": run["job_s"],
        "measured_new_tokens": new,
        "job_s": seconds,
        "measured_share": run["job_s"] / seconds if seconds else 0.0,
        "new_tokens_per_s": every["new_tokens"] / seconds,
        "tokens_per_s": tokens / seconds,
    }


def agreement(reference: Mapping[str, Sequence[int]], other: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Answers both have whole: how many are the same, and of their tokens how many come before the first difference.

    After one other choice the text is another, so tokens after it are not compared.
    """
    both = [(reference[i], other[i]) for i in reference if reference[i] and len(other.get(i, ())) == len(reference[i])]
    fronts = [next((k for k, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a)) for a, b in both]
    return {
        "requests": len(both),
        "identical": sum(front == len(a) for front, (a, _) in zip(fronts, both, strict=True)),
        "positions": sum(len(a) for a, _ in both),
        "before_first_difference": sum(fronts),
    }


# memory and the floor


def kv_bytes(config: Mapping[str, Any]) -> int:
    """Bytes of keys and values of one token, in 16 bits."""
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * int(head)


def layer_bytes(spec: Spec) -> int:
    """Bytes of one decoder layer, experts included."""
    return spec.nbytes(lambda name: name.startswith("model.layers.0."))


def padded_room(spec: Spec, requests: Sequence[Request], size: int, memory: int) -> int:
    """Bytes that padded batches of `size` leave of `memory` for weights (below zero: they do not fit).

    Beside the weights are keys and values of the batch with the longest prompts, what a layer computes over its
    prompt (a layer's intermediates, of every chosen expert) and two layers on their way from disk.
    """
    c = spec.config
    width, new = max(len(r.prompt) for r in requests), max(r.new for r in requests)
    size = min(size, len(requests))
    chosen = c.get("num_experts_per_tok", 1)
    activations = 2 * size * width * (3 * chosen * c["intermediate_size"] + (4 + 2 * chosen) * c["hidden_size"])
    return memory - size * (width + new) * kv_bytes(c) - activations - 2 * layer_bytes(spec)


def floor(
    spec: Spec, requests: Sequence[Request], *, room: int, bandwidth: float, rates: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The least time for the job: reading or computing, whichever is longer.

    Reading. Every new token of a sequence needs a pass over the weights, and sequences share passes, so there are at
    least as many passes as the longest answer has tokens, all sequences together in each of them. A pass needs all
    weights but the embedding table, and of the experts those that its tokens choose: of T tokens that choose evenly,
    E · (1 - (1 - k/E)^T). `room` (the limit less the interpreter) can hold that much of it from pass to pass; the
    rest crosses the disk at its measured `bandwidth`, in every pass. Keys and values are left out: they too need room
    (`kv_bytes`), so this is a floor for any schedule.

    Computing. `rates` says what the products of one layer take with everything in memory, for several numbers of
    tokens at once (`batch_worker.py --engine rates`), and the output layer's. Every token of a prompt and every new
    one but the last is computed once, at the best of these rates; norms, attention and sampling are left out.
    `at_batch_s` is the same at the rate of the mean pass of the schedule above: what the time is when passes are that
    even.
    """
    c, every = spec.config, totals(requests)
    layers = c["num_hidden_layers"]
    experts, chosen = c.get("num_experts", 0), c.get("num_experts_per_tok", 0)
    computed = sum(r.cells for r in requests)
    read = 0.0
    for at in range(every["passes"]):
        tokens = every["prompt_tokens"] if at == 0 else sum(r.new > at for r in requests)
        needed = float(spec.dense_bytes)
        if experts:
            needed += layers * experts * spec.expert_bytes * (1 - (1 - chosen / experts) ** tokens)
        read += max(0.0, needed - room)

    def seconds(rate: Mapping[str, Any]) -> float:
        return float((computed * layers * rate["layer_s"] + every["new_tokens"] * rate["head_s"]) / rate["tokens"])

    mean = computed / every["passes"]
    read_s, compute_s = read / bandwidth, min((seconds(r) for r in rates), default=0.0)
    near = min(rates, key=lambda r: abs(r["tokens"] - mean), default=None)
    floor_s = max(read_s, compute_s)
    return {
        "passes": every["passes"], "tokens_per_pass": mean, "bytes_read": read, "bandwidth": bandwidth,
        "read_s": read_s, "compute_s": compute_s, "at_batch_s": seconds(near) if near is not None else None,
        "floor_s": floor_s, "bound": "disk" if read_s >= compute_s else "compute", "room_bytes": room,
        "kv_bytes": computed * kv_bytes(c),
    }  # fmt: skip


def ceiling(spec: Spec, batch: int, *, room: int, bandwidth: float, rate: Mapping[str, Any] | None) -> dict[str, float]:
    """Most tokens per second that one step of `batch` sequences can give: by the `disk`, by `compute` (0: no limit
    known), as in `floor`.
    """
    c = spec.config
    experts, chosen = c.get("num_experts", 0), c.get("num_experts_per_tok", 0)
    needed = float(spec.dense_bytes)
    if experts:
        needed += c["num_hidden_layers"] * experts * spec.expert_bytes * (1 - (1 - chosen / experts) ** batch)
    read_s = max(0.0, needed - room) / bandwidth
    compute_s = c["num_hidden_layers"] * rate["layer_s"] + rate["head_s"] if rate is not None else 0.0
    return {"disk": batch / read_s if read_s else 0.0, "compute": batch / compute_s if compute_s else 0.0}


def _tokens(rng: random.Random, count: int, vocab: int) -> tuple[int, ...]:
    return tuple(rng.randrange(3, vocab) for _ in range(count))

"""`offload bench`: prompt processing and generation, measured like llama-bench does, beside what was predicted.

Prompts are random tokens (their content does not matter to speed; a router's choices are then those of random text).
Nothing is compared with other engines here.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from offload.model import Model
from offload.stats import RequestStats
from tiers import UsageError

_SEED = 1


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One test. Rates in tokens per second, all sequences together; sizes in bytes.

    `test` is `pp512` (a prompt of 512) or `tg128` (128 generated after one token), with `×N` for a batch.
    `share_of_floor` is the busiest resource's time over the wall time. `state` is `cold` for the first request after
    loading.
    """

    model: str
    size: int
    params: int
    device: str
    test: str
    state: str
    tokens_per_s: float
    deviation: float
    predicted: float | None
    share_of_floor: float
    bytes_read: float

    @property
    def error(self) -> float | None:
        """Predicted over measured, less 1."""
        return self.predicted / self.tokens_per_s - 1 if self.predicted is not None else None


def measure(
    model: Model,
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 128,
    batch: int = 1,
    repetitions: int = 5,
    progress: Callable[[str], object] = lambda what: None,
) -> list[BenchRow]:
    """Each test once cold (the first request after loading) and `repetitions` times after. Raises `UsageError`."""
    if min(prompt_tokens, new_tokens) < 0 or prompt_tokens + new_tokens == 0:
        raise UsageError("-p and -n: give at least one of them above zero")
    if batch < 1 or repetitions < 1:
        raise UsageError("-b and -r: give whole numbers above zero")
    rows = []
    cold = True
    for name, prompt, new in (("pp", prompt_tokens, 1), ("tg", 1, new_tokens + 1)):
        if (prompt_tokens if name == "pp" else new_tokens) == 0:
            continue
        test = f"{name}{prompt_tokens if name == 'pp' else new_tokens}" + (f"×{batch}" if batch > 1 else "")
        runs = []
        for i in range(repetitions + cold):
            progress(f"{test}: {i + 1} of {repetitions + cold}")
            runs.append(_run(model, prompt, new, batch, i))
        if cold:
            rows.append(_row(model, test, "cold", name, runs[:1]))
            runs, cold = runs[1:], False
        rows.append(_row(model, test, "warm", name, runs))
    return rows


def _run(model: Model, prompt: int, new: int, batch: int, number: int) -> RequestStats:
    rng = random.Random(_SEED + number)
    vocab = model.engine.description.facts.vocab
    ids = [[rng.randrange(vocab) for _ in range(prompt)] for _ in range(batch)]
    return model.run(ids, max_new_tokens=new, ignore_eos=True).stats


def _row(model: Model, test: str, state: str, kind: str, runs: list[RequestStats]) -> BenchRow:
    facts = model.engine.description.facts
    rates, predicted, shares, read = [], [], [], []
    for stats in runs:
        steps = stats.prefill if kind == "pp" else stats.decode
        tokens = stats.prompt_tokens if kind == "pp" else stats.new_tokens - stats.sequences
        seconds = stats.ttft_s if kind == "pp" else stats.decode_s
        rates.append(tokens / seconds)
        busy = max(steps.seconds - steps.stall_s, steps.read_busy_s, steps.link_busy_s)
        shares.append(min(1.0, busy / steps.seconds) if steps.seconds else 1.0)
        read.append(steps.bytes_read)
        p = stats.prediction
        if p is not None:
            predicted.append(tokens / p.ttft_s if kind == "pp" else p.decode_tokens_per_s)
    return BenchRow(
        model=f"{facts.name} {facts.dtype}",
        size=facts.weight_bytes,
        params=facts.params,
        device=model.engine.device.kind,
        test=test,
        state=state,
        tokens_per_s=statistics.mean(rates),
        deviation=statistics.stdev(rates) if len(rates) > 1 else 0.0,
        predicted=statistics.mean(predicted) if predicted else None,
        share_of_floor=statistics.mean(shares),
        bytes_read=statistics.mean(read),
    )

"""Sampling keyed by (seed, position): the same request gives the same tokens whatever else runs beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tiers import UsageError

NUCLEUS = 1024  # tokens that are sorted before all are
ROWS = 8  # converted at once: what that takes stays in the caches
ROUNDING = 1e-4  # more than a float32 sum over the vocabulary is off by


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. `temperature` 0 is greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < 1e6:  # also refuses NaN
            raise UsageError(f"--temperature: {self.temperature} is not a number from 0 up")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p: {self.top_p} is not above 0 and up to 1")
        if self.top_k < 0:
            raise UsageError(f"--top-k: {self.top_k} is negative")
        if not -(1 << 63) <= self.seed < 1 << 63:
            raise UsageError(f"--seed: {self.seed} does not fit 64 bits")

    def processors(self, prompt_tokens: int) -> LogitsProcessorList:
        """For `generate(do_sample=False)`: transformers' own warpers, then the keyed choice."""
        if self.temperature == 0:
            return LogitsProcessorList()
        return LogitsProcessorList([*self.warpers(), KeyedGumbel(self.seed, prompt_tokens)])

    def warpers(self) -> list[Any]:
        """transformers' warpers for a temperature above 0, in the order that `generate` has them."""
        out: list[Any] = []
        if self.temperature != 1:
            out.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            out.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            out.append(TopPLogitsWarper(self.top_p))
        return out

    def choose(self, row: torch.Tensor, position: int) -> int:
        """row [vocab] → the token after it, the same that `processors` lead `generate` to.

        `position` counts the tokens generated before. Nothing outside the arguments takes part.
        """
        if self.temperature == 0:
            return greedy(row[None])[0]
        scores = row.to(torch.float32)[None]  # as `generate` has it
        warpers = self.warpers()
        if self.top_p < 1:
            for warper in warpers[:-1]:
                scores = warper(None, scores)
            ids = _nucleus(scores[0], self.top_p)
            if ids is not None:
                noise = gumbel(self.seed, position, row.shape[-1], ids)
                return int(ids[(scores[0, ids] + noise).argmax()])
            warpers = warpers[-1:]
        for warper in warpers:
            scores = warper(None, scores)
        return int((scores[0] + gumbel(self.seed, position, row.shape[-1])).argmax())


def greedy(logits: torch.Tensor) -> list[int]:
    """logits [S, vocab] → the first of each row's maxima.

    In float32, a few rows at a time: the CPU's argmax of bfloat16 takes several times as long.
    """
    out: list[int] = []
    for at in range(0, logits.shape[0], ROWS):
        out += logits[at : at + ROWS].to(torch.float32).argmax(dim=-1).tolist()
    return out


def gumbel(seed: int, position: int, vocab: int, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Standard Gumbel noise [vocab], float32, that depends on (seed, position) alone; with `ids` [n] that of those."""
    generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + position) & (1 << 63) - 1)
    uniform = torch.rand(vocab, generator=generator, dtype=torch.float64)
    if ids is not None:
        uniform = uniform[ids]
    tiny = torch.finfo(torch.float64).tiny
    return (-torch.log(-torch.log(uniform.clamp_min(tiny)))).to(torch.float32)


def _nucleus(scores: torch.Tensor, top_p: float) -> torch.Tensor | None:
    """The tokens that `TopPLogitsWarper` leaves of scores [vocab], without sorting the whole vocabulary (7 times as
    fast at 150,000 tokens). None where rounding or equal scores leave it open which they are."""
    values, ids = scores.topk(min(NUCLEUS, scores.shape[-1]))
    mass = (values.double() - scores.logsumexp(0)).exp().cumsum(0)
    kept = int((mass < top_p).sum()) + 1
    if kept >= len(ids) or bool((mass[max(0, kept - 2) : kept] - top_p).abs().min() < ROUNDING):
        return None
    return None if values[kept - 1] == values[kept] else ids[:kept]


class KeyedGumbel(LogitsProcessor):  # type: ignore[misc]
    """Adds Gumbel noise that depends on (seed, position) alone; the argmax is then an exact sample.

    Gumbel-max trick (Gumbel 1954; Maddison et al. 2014, "A* sampling"). Position counts generated tokens.
    """

    def __init__(self, seed: int, prompt_tokens: int) -> None:
        self._seed = seed
        self._prompt_tokens = prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        """scores [B, vocab] → scores plus noise, the same for every row."""
        position = input_ids.shape[1] - self._prompt_tokens
        return scores + gumbel(self._seed, position, scores.shape[-1]).to(scores.dtype)

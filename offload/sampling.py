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
        out = LogitsProcessorList()
        if self.temperature == 0:
            return out
        if self.temperature != 1:
            out.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            out.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            out.append(TopPLogitsWarper(self.top_p))
        out.append(KeyedGumbel(self.seed, prompt_tokens))
        return out


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
        generator = torch.Generator().manual_seed((self._seed * 0x9E3779B97F4A7C15 + position) & (1 << 63) - 1)
        uniform = torch.rand(scores.shape[-1], generator=generator, dtype=torch.float64)
        tiny = torch.finfo(torch.float64).tiny
        noise = -torch.log(-torch.log(uniform.clamp_min(tiny)))
        return scores + noise.to(scores.dtype)

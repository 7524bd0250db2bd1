"""What one line of a batch asks for, validated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Options:
    """What `body` asked for, validated."""

    max_tokens: int | None = None  # max_completion_tokens wins over max_tokens
    temperature: float | None = None  # None: the endpoint's default (see choosing)
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    logprobs: int | None = None  # None: none; k: the chosen token's and the k most likely
    response_format: dict[str, Any] | None = None  # json_object or json_schema; {"type": "text"} is None


@dataclass(frozen=True, slots=True)
class Request:
    """One request: what to continue, and how."""

    custom_id: str
    chat: bool  # /v1/chat/completions, else completions
    prompt: str | tuple[int, ...] | tuple[dict[str, Any], ...]  # text, token ids, or messages (chat)
    options: Options

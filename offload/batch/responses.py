"""The body of an answer, as OpenAI's API has it: `chat.completion` and `text_completion` objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from offload.batch.choosing import Choice, TokenLogprob
from offload.batch.requests import Request

LOWEST = -9999.0  # what OpenAI's API writes for a probability of nothing: JSON has no infinity, and no NaN


def response_body(
    request: Request, choices: Sequence[Choice], *, prompt_tokens: int, cached_tokens: int, model: str, created: int,
    id: str,
) -> dict[str, Any]:  # fmt: skip
    """The answer to `request`: the same arguments give the same body, keys in the same order.

    `cached_tokens` of the `prompt_tokens` were not computed for it; `created` is in seconds since 1970. A model
    without a tokenizer has no text: its choices also have `token_ids`.
    """
    render = _chat if request.chat else _completion
    generated = sum(len(c.token_ids) for c in choices)
    return {
        "id": id,
        "object": "chat.completion" if request.chat else "text_completion",
        "created": created,
        "model": model,
        "choices": [render(c) for c in sorted(choices, key=lambda c: c.index)],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": prompt_tokens + generated,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        },
    }


def _chat(choice: Choice) -> dict[str, Any]:
    logprobs = None
    if choice.logprobs is not None:
        content = [{**_token(t), "top_logprobs": [_token(o) for o in t.top]} for t in choice.logprobs]
        logprobs = {"content": content, "refusal": None}
    return {
        "index": choice.index,
        "message": {"role": "assistant", "content": choice.text or "", "refusal": None},
        "logprobs": logprobs,
        "finish_reason": choice.finish,
        **_ids(choice),
    }


def _completion(choice: Choice) -> dict[str, Any]:
    logprobs = None
    if choice.logprobs is not None:
        logprobs = {
            "tokens": [t.token for t in choice.logprobs],
            "token_logprobs": [_finite(t.logprob) for t in choice.logprobs],
            # the chosen token is always there, whether or not it is among the most likely
            "top_logprobs": [{o.token: _finite(o.logprob) for o in (*t.top, t)} for t in choice.logprobs],
            "text_offset": [t.offset for t in choice.logprobs],
        }
    return {
        "text": choice.text or "",
        "index": choice.index,
        "logprobs": logprobs,
        "finish_reason": choice.finish,
        **_ids(choice),
    }


def _ids(choice: Choice) -> dict[str, Any]:
    return {} if choice.text is not None else {"token_ids": list(choice.token_ids)}


def _token(t: TokenLogprob) -> dict[str, Any]:
    return {"token": t.token, "logprob": _finite(t.logprob), "bytes": None if t.data is None else list(t.data)}


def _finite(logprob: float) -> float:
    return logprob if logprob > LOWEST else LOWEST

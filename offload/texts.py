"""Between text and tokens: a model's tokenizer, its chat template, and how its authors want it to be sampled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig

from tiers import ModelError, UsageError


def load_tokenizer(folder: Path) -> Any | None:
    """The tokenizer in a model's folder; None if there is none. Raises `ModelError` if it cannot be used."""
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")
    if not any((folder / n).is_file() for n in names):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as e:  # the library raises many kinds for a damaged tokenizer
        raise ModelError(f"the tokenizer in {folder} cannot be used: {' '.join(str(e).split())[:200]}") from e


def generation_config(folder: Path, config: PreTrainedConfig) -> GenerationConfig:
    """How the authors want text to be generated. Raises `ModelError` for a file that cannot be used."""
    if not (folder / "generation_config.json").is_file():
        return GenerationConfig.from_model_config(config)
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as e:
        raise ModelError(f"{folder / 'generation_config.json'} cannot be used: {e}") from e


def ends_of(config: GenerationConfig) -> set[int]:
    """The tokens that end an answer."""
    eos = config.eos_token_id
    return {eos} if isinstance(eos, int) else set(eos or ())


def chat_defaults(config: GenerationConfig) -> dict[str, Any]:
    """How the authors want it sampled in conversation."""
    if not config.do_sample:
        return {}
    return {"temperature": config.temperature or 1.0, "top_k": config.top_k or 0, "top_p": config.top_p or 1.0}


def rendered(tokenizer: Any, messages: Sequence[Any]) -> list[int]:
    """`messages` ({"role", "content"} each) as token ids, ready for the assistant's answer.

    Raises `ModelError` without a template, `UsageError` for messages that it refuses.
    """
    if not tokenizer.chat_template:
        raise ModelError("the model has no chat template; use `generate` instead of `chat`")
    try:
        out = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True)
    except Exception as e:  # templates raise their own errors, for example about alternating roles
        raise UsageError(f"the chat template refuses these messages: {' '.join(str(e).split())[:200]}") from e
    ids = out["input_ids"] if hasattr(out, "keys") else out
    return [int(i) for i in ids]

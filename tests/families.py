"""The families the parity suite runs: a tiny random model each, and words for them.

A new family costs a line in `FAMILIES`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCAB = 160
TEMPLATE = "{% for m in messages %}{{ 'w4 ' if m.role == 'user' else 'w5 ' }}{{ m.content }} {% endfor %}w5"
_BASE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MLA = {
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 12},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 12, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 12, "query_pre_attn_scalar": 16},
    "phi3": {},
    "granite": {"embedding_multiplier": 2.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "olmo2": {},
    "smollm3": {},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {**_MOE, "num_experts": 8, "shared_expert_intermediate_size": 48},
    "qwen3_moe": {**_MOE, "num_experts": 8, "head_dim": 16, "norm_topk_prob": True},
    "deepseek_v2": {**_MOE, **_MLA, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**_MOE, **_MLA},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 12},
    "glm4_moe": {
        **_MOE, "n_routed_experts": 8, "head_dim": 16, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    },
    "granitemoe": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "minimax_m2": {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 16, "rotary_dim": 8},
    "qwen3_next": {
        **_MOE, "num_experts": 8, "head_dim": 16, "shared_expert_intermediate_size": 48, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "jamba": {
        "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
    },
}  # fmt: skip


def build(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny random model, fully resident: the oracle. Weights are spread so that greedy choices are not ties."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**{**_BASE, **FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2:
                p.normal_(0.0, 0.08 if "embed" not in name else 0.5)
        for name, b in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                b.normal_(0.0, 0.05)
    return model.to(dtype).eval()


def save(model: PreTrainedModel, folder: Path, **kwargs: Any) -> PreTrainedModel:
    """Write the checkpoint and return what transformers itself loads from it, fully resident."""
    model.save_pretrained(folder, **kwargs)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """One word per token: w0, w1, …"""
    # transformers' stop strings feel out a tokenizer with the word "abcdef", so there must be one
    special = {0: "<pad>", 2: "</s>", 3: "abcdef"}
    words = {special.get(i, f"w{i}"): i for i in range(VOCAB)}
    raw = Tokenizer(models.WordLevel(words, unk_token="abcdef"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="abcdef")


def chatty(model: PreTrainedModel, folder: Path, template: str = TEMPLATE) -> Path:
    """Write the checkpoint with a tokenizer and a chat template; returns its folder."""
    model.save_pretrained(folder)
    words = tokenizer()
    words.chat_template = template
    words.save_pretrained(folder)
    return folder

"""The bundled configs describe the models they are named after: sizes and shapes the authors publish."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

KNOWN = Path(__file__).resolve().parent.parent / "offload" / "known"


class Published(NamedTuple):
    total: float  # parameters, as the authors or their model card state them
    layers: int
    experts: int = 0
    top_k: int = 0
    quantized: str | None = None


PUBLISHED = {
    "DeepSeek-V3": Published(671e9, 61, 256, 8, "fp8"),
    "Llama-3.1-70B": Published(70.6e9, 80),
    "Llama-3.1-8B": Published(8.03e9, 32),
    "Llama-3.2-3B": Published(3.21e9, 28),
    "Mistral-7B": Published(7.24e9, 32),
    "Mixtral-8x7B": Published(46.7e9, 32, 8, 2),
    "OLMoE-1B-7B": Published(6.92e9, 16, 64, 8),
    "Qwen3-235B-A22B": Published(235e9, 94, 128, 8),
    "Qwen3-30B-A3B": Published(30.5e9, 48, 128, 8),
    "Qwen3-32B": Published(32.8e9, 64),
    "Qwen3-8B": Published(8.19e9, 36),
    "Qwen3-Next-80B-A3B": Published(80e9, 48, 512, 10),
    "gpt-oss-120b": Published(116.8e9, 36, 128, 4, "mxfp4"),
    "gpt-oss-20b": Published(20.9e9, 24, 32, 4, "mxfp4"),
}
NAMES = [pytest.param(name, id=name) for name in PUBLISHED]


def _raw(name: str) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((KNOWN / name / "config.json").read_text())
    return raw


def test_every_folder_is_in_the_table_and_has_its_source_named():
    assert sorted(p.name for p in KNOWN.iterdir() if p.is_dir()) == sorted(PUBLISHED)
    readme = (KNOWN / "README.md").read_text()
    for name in PUBLISHED:
        assert f"| {name} |" in readme
        assert [p.name for p in (KNOWN / name).iterdir()] == ["config.json"]


@pytest.mark.parametrize("name", NAMES)
def test_the_model_has_as_many_parameters_as_published(name: str):
    config = AutoConfig.from_pretrained(KNOWN / name, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    model.tie_weights()  # left undone where initialising is skipped
    total = sum(p.numel() for p in model.parameters())
    assert total == pytest.approx(PUBLISHED[name].total, rel=0.01)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_the_config_states_the_published_shape(name: str):
    published, raw = PUBLISHED[name], _raw(name)
    config = AutoConfig.from_pretrained(KNOWN / name, trust_remote_code=False, local_files_only=True)
    assert config.num_hidden_layers == published.layers
    assert config.dtype == torch.bfloat16
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert len(getattr(config, "layer_types", None) or [0] * published.layers) == published.layers
    experts = [raw[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in raw]
    assert experts == ([published.experts] if published.experts else [])
    assert raw.get("num_experts_per_tok", 0) == published.top_k
    assert raw.get("quantization_config", {}).get("quant_method") == published.quantized


@pytest.mark.parametrize("name", NAMES)
def test_the_config_needs_no_code_of_its_own(name: str):
    raw = _raw(name)
    assert "auto_map" not in raw
    assert raw["architectures"][0].endswith("ForCausalLM")

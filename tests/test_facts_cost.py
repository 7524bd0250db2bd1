"""What the planner believes of models and speeds, against figures worked out by hand and sizes that are published."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from families import FAMILIES, build
from hypothesis import given, settings
from hypothesis import strategies as st
from planned import GIB, facts, layer, rates

from offload.describe import Description, describe, describe_for_plan
from offload.planning import cost
from offload.planning.cost import Pass
from offload.planning.facts import ModelFacts
from offload.planning.machine import described, names
from offload.resolve import resolve_for_plan
from tiers import ModelError

_KNOWN: dict[str, Description] = {}


def known(name: str) -> Description:
    if name not in _KNOWN:
        _KNOWN[name] = describe_for_plan(resolve_for_plan(name))
    return _KNOWN[name]


# keys and values


@pytest.mark.parametrize(
    ("name", "per_token"),
    [
        ("Llama-3.1-8B", 32 * 2 * 8 * 128 * 2),  # layers × (K and V) × KV heads × head dim × bfloat16
        ("Llama-3.1-70B", 80 * 2 * 8 * 128 * 2),
        ("Qwen3-30B-A3B", 48 * 2 * 4 * 128 * 2),
        ("Mistral-7B", 32 * 2 * 8 * 128 * 2),
        ("gpt-oss-20b", 24 * 2 * 8 * 64 * 2),
        ("DeepSeek-V3", 61 * (512 + 64) * 2),  # latents and the shared rotary key, not 128 heads
        ("Qwen3-Next-80B-A3B", 12 * 2 * 2 * 256 * 2),  # every fourth of 48 layers attends
    ],
)
def test_kv_bytes_of_a_token(name: str, per_token: int) -> None:
    assert known(name).facts.kv_bytes_per_token == per_token
    if name == "Llama-3.1-8B":
        assert per_token == 131072


@pytest.mark.parametrize(
    ("name", "windows"),
    [("gpt-oss-20b", [128, None] * 12), ("gpt-oss-120b", [128, None] * 18), ("Mistral-7B", [4096] * 32),
     ("Llama-3.1-8B", [None] * 32)],
)  # fmt: skip
def test_sliding_windows(name: str, windows: list[int | None]) -> None:
    assert [y.window for y in known(name).facts.layers] == windows


def test_a_hybrid_keeps_a_state_where_it_does_not_attend() -> None:
    layers = known("Qwen3-Next-80B-A3B").facts.layers
    assert [bool(y.kv_bytes) for y in layers] == [False, False, False, True] * 12
    assert [y.attention_flops > 0 for y in layers] == [False, False, False, True] * 12
    # 32 value heads of a 128 × 128 state in float32, at least; and a short convolution's inputs beside it
    assert all((y.state_bytes >= 32 * 128 * 128 * 4) == (not y.kv_bytes) for y in layers)
    assert all(y.state_bytes < 2 * 32 * 128 * 128 * 4 for y in layers)


def test_memory_for_kv_counts_windows_and_states() -> None:
    demand, about = known("gpt-oss-20b").demand, known("gpt-oss-20b").facts
    far = demand.kv(100_001) - demand.kv(100_000)
    assert far == about.kv_bytes_per_token // 2, "sliding layers keep no more of a longer text"
    assert demand.kv(100) == 100 * about.kv_bytes_per_token


# weights


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen3-30B-A3B", 3.3), ("Qwen3-235B-A22B", 22), ("DeepSeek-V3", 37), ("gpt-oss-120b", 5.1),
        ("gpt-oss-20b", 3.6), ("Mixtral-8x7B", 12.9), ("OLMoE-1B-7B", 1.3), ("Qwen3-Next-80B-A3B", 3.9),
    ],
)  # fmt: skip
def test_active_parameters_are_those_published(name: str, billions: float) -> None:
    """Authors count a token's embedding row or the whole table, as they like: the table is the tolerance."""
    about = known(name).facts
    table = about.embedding_bytes / about.itemsize
    assert billions * 1e9 * 0.97 - table <= about.active_params <= billions * 1e9 * 1.03
    assert about.flops_per_token == 2 * about.active_params


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Qwen3-8B"])
def test_all_but_the_embedding_and_norms_of_a_dense_model_is_active(name: str) -> None:
    about = known(name).facts
    assert about.params - about.vocab * about.hidden - about.active_params == about.hidden


@pytest.mark.parametrize(
    ("name", "gib"),
    [
        ("gpt-oss-120b", 60.8), ("gpt-oss-20b", 12.8),  # the authors' model card
        ("DeepSeek-V3", 627.0),  # 671 GB of fp8 parameters and a float32 scale for each 128 × 128 of them
        ("Llama-3.1-8B", 8_030_261_248 * 2 / GIB),  # bfloat16, parameters as in the checkpoint's index
        ("Llama-3.2-3B", 3_212_749_824 * 2 / GIB),  # the head is the embedding: stored once
    ],
)  # fmt: skip
def test_weights_take_what_the_authors_ship(name: str, gib: float) -> None:
    tolerance = 0.01 if name in ("gpt-oss-120b", "gpt-oss-20b", "DeepSeek-V3") else 1e-6
    assert known(name).facts.weight_bytes / GIB == pytest.approx(gib, rel=tolerance)


def test_what_cannot_be_run_says_so() -> None:
    assert any("mxfp4" in n and "cannot be run" in n for n in known("gpt-oss-20b").facts.notes)
    assert any("fp8" in n and "cannot be run" in n for n in known("DeepSeek-V3").facts.notes)
    assert not any("cannot be run" in n for n in known("Qwen3-8B").facts.notes)


@pytest.mark.parametrize("name", ["Qwen3-30B-A3B", "gpt-oss-20b", "Llama-3.1-8B"])
def test_the_parts_of_a_model_add_up(name: str) -> None:
    about, layout = known(name).facts, known(name).layout
    parts = sum(y.dense_bytes + y.experts * y.expert_bytes for y in about.layers)
    assert parts + about.rest_bytes + about.head_bytes + about.embedding_bytes == about.weight_bytes
    assert about.bytes_per_token == about.head_bytes + sum(
        y.dense_bytes + y.top_k * y.expert_bytes for y in about.layers
    )
    assert [dict(y.parts) for y in about.layers] == [
        {p.block.key: p.block.nbytes for p in y.dense} for y in layout.layers
    ]
    assert all(0.9 * y.dense_bytes < y.matrix_bytes <= y.dense_bytes for y in about.layers)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next"])
def test_a_config_alone_gives_the_facts_of_the_checkpoint(family: str, tmp_path: Path) -> None:
    assert family in FAMILIES
    build(family).save_pretrained(tmp_path)
    there = describe(tmp_path)
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    gone = describe_for_plan(tmp_path)
    assert gone.checkpoint is None

    def told(d: Description) -> ModelFacts:
        """How a layer is cut follows the order on disk, which a config does not tell."""
        whole = tuple(replace(y, parts=(("all", y.dense_bytes),), matrix_bytes=0) for y in d.facts.layers)
        return replace(d.facts, layers=whole, notes=())

    assert told(gone) == told(there)
    assert gone.facts.notes
    assert not there.facts.notes
    for a, b in zip(gone.facts.layers, there.facts.layers, strict=True):
        assert a.matrix_bytes == pytest.approx(b.matrix_bytes, rel=0.02)
    for tokens in (1, 17, 256):
        assert gone.demand.kv(tokens) == there.demand.kv(tokens)
        assert gone.demand.activations(tokens, 256) == there.demand.activations(tokens, 256)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ('{"model_type": "bert", "architectures": ["BertModel"]}', "BertModel is not a causal language model"),
        ('{"model_type": "t5"}', "encoder-decoder"),
        ('{"model_type": "nothing-of-the-kind"}', "not known to transformers"),
        ("[]", "not a JSON object"),
        ("{", "not valid JSON"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "awq"}}', "no plan can be made for awq"),
    ],
)
def test_configs_no_plan_can_be_made_for(config: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError, match=says) as e:
        describe_for_plan(tmp_path)
    assert "\n" not in str(e.value)


# cost: each term by itself

SECONDS = Pass(sequences=3, new=7, context=100)


def test_products_are_bytes_over_the_rate_at_that_many_tokens() -> None:
    y = layer(0, 5000, parts=2)
    about = facts([y])
    r = rates(linear={"bfloat16": ((1, 2e-9, 1e-6), (21, 2e-9, 3e-6))})
    assert cost.layer_s(about, y, r, Pass(1, 1, 0)) == pytest.approx(5000 * 2e-9 + 2 * 1e-6)
    assert cost.layer_s(about, y, r, Pass(3, 7, 0)) == pytest.approx(5000 * 2e-9 + 2 * 3e-6)
    # beyond the last reading, work grows with the tokens
    assert cost.layer_s(about, y, r, Pass(1, 210, 0)) == pytest.approx(10 * 5000 * 2e-9 + 2 * 3e-6)


def test_fixed_and_elementwise_costs() -> None:
    y = layer(0, 0)
    about = facts([y], hidden=64)
    r = rates(linear={"bfloat16": ((1, 1e-30, 0.0), (4096, 1e-30, 0.0))}, layer_call_s=3e-4, elementwise_s=1e-8)
    assert cost.layer_s(about, y, r, SECONDS) == pytest.approx(3e-4 + 21 * 64 * 1e-8)


def test_attention_is_read_or_multiplied_whichever_takes_longer() -> None:
    y = layer(0, 0, kv_bytes=1000, attention_flops=400)
    seen = 100 + 4  # the seven new tokens see one to seven of themselves: four on average
    slow = rates(attention_bytes_per_s=1e6, attention_flops_per_s=1e30)
    assert cost.attention_s(y, slow, SECONDS) == pytest.approx(3 * seen * 1000 / 1e6)
    busy = rates(attention_bytes_per_s=1e30, attention_flops_per_s=1e6)
    assert cost.attention_s(y, busy, SECONDS) == pytest.approx(21 * seen * 400 / 1e6)


def test_a_window_caps_attention() -> None:
    y = layer(0, 0, kv_bytes=1000, attention_flops=400)
    sliding = replace(y, window=64)
    r = rates()
    assert cost.attention_s(sliding, r, Pass(1, 1, 10)) == cost.attention_s(y, r, Pass(1, 1, 10))
    at_64 = cost.attention_s(y, r, Pass(1, 1, 63))
    assert [cost.attention_s(sliding, r, Pass(1, 1, n)) for n in (63, 64, 10_000)] == [at_64] * 3


def test_experts_share_the_tokens_of_a_pass() -> None:
    y = layer(0, 0, experts=16, expert_bytes=9000, top_k=4)
    about = facts([y])
    r = rates(linear={"bfloat16": ((1, 1e-9, 1e-6), (100, 1e-9, 1e-6), (200, 2e-9, 1e-6))}, expert_call_s=5e-5)
    each = 5e-5 + 9000 * 1e-9 + 3 * 1e-6
    assert cost.expert_s(about, y, r, Pass(1, 1, 0), 4) == pytest.approx(each)
    assert cost.expert_s(about, y, r, Pass(1, 400, 0), 16) == pytest.approx(each), "400 × 4 / 16 tokens each"
    assert cost.expert_s(about, y, r, Pass(1, 400, 0), 8) == pytest.approx(each + 9000 * 1e-9), "200 tokens each"
    assert cost.expert_s(about, y, r, Pass(1, 1, 0), 0) == 0


def test_only_the_last_token_of_a_sequence_is_projected() -> None:
    about = facts([layer(0, 100)], head=10_000)
    r = rates(linear={"bfloat16": ((1, 1e-9, 0.0), (2, 3e-9, 0.0), (4, 9e-9, 0.0))})
    assert cost.head_s(about, r, Pass(1, 500, 0)) == pytest.approx(10_000 * 1e-9)
    assert cost.head_s(about, r, Pass(2, 500, 0)) == pytest.approx(10_000 * 3e-9)


def test_what_runs_taught_multiplies_passes_of_about_as_many_tokens() -> None:
    y = layer(0, 5000, experts=2, expert_bytes=100, top_k=1, kv_bytes=10)
    about = facts([y], head=300)
    plain = rates(layer_call_s=1e-3, expert_call_s=1e-3)
    taught = replace(plain, corrections=((1, 1.5), (512, 0.5)))
    for tokens, factor in ((1, 1.5), (4, 1.5), (5, 1.0), (100, 1.0), (127, 1.0), (128, 0.5), (2048, 0.5), (2049, 1.0)):
        p = Pass(1, tokens, 50)
        for term in (
            lambda r, p=p: cost.layer_s(about, y, r, p),
            lambda r, p=p: cost.expert_s(about, y, r, p, 1),
            lambda r, p=p: cost.head_s(about, r, p),
        ):
            assert term(taught) == pytest.approx(factor * term(plain)), tokens


@settings(max_examples=100, deadline=None, database=None)
@given(
    start=st.floats(1e-12, 1e-8), growth=st.lists(st.floats(1.0, 2.0), min_size=1, max_size=6),
    tokens=st.lists(st.floats(1, 4000), min_size=2, max_size=10),
)  # fmt: skip
def test_more_tokens_never_take_less_time(start: float, growth: list[float], tokens: list[float]) -> None:
    """Where no reading at more tokens is faster than one at fewer."""
    points = [(1, start, 1e-6)]
    for i, g in enumerate(growth):
        points.append((2 << (2 * i), points[-1][1] * g, 1e-6))
    r = rates(linear={"bfloat16": tuple(points)})
    times = [r.linear_s("bfloat16", 1e6, t, 4) for t in sorted(tokens)]
    assert all(b >= a * (1 - 1e-12) for a, b in pairwise(times))
    assert all(r.linear_s("bfloat16", 2e6, t) >= r.linear_s("bfloat16", 1e6, t) for t in tokens)


def test_a_product_between_two_readings_lies_between_them() -> None:
    r = rates(linear={"bfloat16": ((4, 1e-9, 0.0), (16, 4e-9, 0.0))})
    assert r.linear_s("bfloat16", 1, 4) == pytest.approx(1e-9)
    assert r.linear_s("bfloat16", 1, 8) == pytest.approx(2e-9), "halfway on a logarithmic scale"
    assert r.linear_s("bfloat16", 1, 16) == pytest.approx(4e-9)
    assert r.linear_s("float16", 1, 8) == r.linear_s("bfloat16", 1, 8), "a type never measured is taken for bfloat16"


@pytest.mark.parametrize("name", names())
def test_a_described_machine_computes_as_its_data_sheet_says(name: str) -> None:
    m = described(name)
    assert not m.measured
    assert any("simulated" in a for a in m.assumptions)
    assert (m.link_bytes_per_s is None) == (m.vram_bytes == 0)
    for dtype in ("bfloat16", "float16", "float32"):
        per_byte = [s for _, s, _ in m.rates.linear[dtype]]
        assert all(b >= a > 0 for a, b in pairwise(per_byte))
        assert m.rates.linear_s(dtype, 1e9, 1) == pytest.approx(1e9 / m.rates.attention_bytes_per_s)
    alone = m.without_device()
    assert alone.link_bytes_per_s is None and alone.vram_bytes == 0 and alone.host_rates is None
    assert alone.rates.linear_s("bfloat16", 1e9, 1024) >= m.rates.linear_s("bfloat16", 1e9, 1024)

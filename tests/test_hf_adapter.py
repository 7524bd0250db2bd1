"""What `offload.hf` takes for granted about transformers, each assumption by name, on tiny models.

A new release that breaks one fails here first, and says which.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB, build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from kvstore import ReservedLayer, WindowLayer, make_cache
from offload import hf
from offload.checkpoint import SINGLE, read_checkpoint
from offload.layout import lay_out_model

MOE = [f for f in FAMILIES if any("experts" in k for k in FAMILIES[f])]
MLA = ["deepseek_v2", "deepseek_v3"]
SLIDING = ["mistral", "gemma2", "gemma3_text", "gpt_oss"]
# beyond the parity suite: caches of other kinds
_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}
OTHERS: dict[str, dict[str, Any]] = {
    "cohere2": {**_SMALL, "sliding_window": 12, "head_dim": 16},
    "bamba": {**_SMALL, **_MAMBA, "attn_layer_indices": [1, 3]},
    "falcon_h1": {**_SMALL, **_MAMBA, "mamba_d_ssm": 128, "mamba_n_groups": 1, "head_dim": 16},
    "granitemoehybrid": {
        **_SMALL, **_MAMBA, "layer_types": ["mamba", "attention", "mamba", "attention"], "num_local_experts": 4,
        "num_experts_per_tok": 2, "shared_intermediate_size": 32,
    },
    "nemotron_h": {
        **_SMALL, "layers_block_type": ["mamba", "attention", "mamba", "mlp"], "mamba_num_heads": 8, "head_dim": 16,
        "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2,
    },
    "qwen3_5_text": {
        **_SMALL, "head_dim": 16, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 16,
        "linear_num_value_heads": 16,
    },
    "gemma4_text": {
        **_SMALL, "head_dim": 16, "global_head_dim": 32, "num_global_key_value_heads": 2, "sliding_window": 12,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB,
    },
    "recurrent_gemma": _SMALL,
    "gpt2": {"vocab_size": VOCAB, "n_embd": 64, "n_head": 4, "n_layer": 4, "bos_token_id": 1, "eos_token_id": 2},
    "falcon": {"vocab_size": VOCAB, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4},
}  # fmt: skip


def model_of(family: str) -> PreTrainedModel:
    if family in FAMILIES:
        return build(family)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**OTHERS[family])).eval()


def config_of(family: str) -> PreTrainedConfig:
    return build(family).config


# the skeleton


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_skeleton_has_no_weights_and_the_right_buffers(family: str, dtype: torch.dtype) -> None:
    config = config_of(family)
    before = copy.deepcopy(config.to_dict())
    skeleton = hf.build_skeleton(config, dtype)
    real = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    assert config.to_dict() == before, "the caller's config is not touched"
    assert all(p.is_meta and not p.requires_grad for p in skeleton.parameters())
    assert all(t.is_meta for t in skeleton.state_dict(keep_vars=True).values()), "persistent buffers are weights too"
    assert not skeleton.training
    shapes = {k: (v.shape, v.dtype) for k, v in real.state_dict().items()}
    assert {k: (v.shape, v.dtype) for k, v in skeleton.state_dict().items()} == shapes
    mine, theirs = (dict(m.named_non_persistent_buffers()) for m in (skeleton, real))
    assert mine.keys() == theirs.keys()
    for name, want in theirs.items():
        assert mine[name].dtype is want.dtype, name
        assert torch.equal(mine[name], want), name
    assert mine or family == "jamba", "there are rope tables at least"


def test_the_skeleton_of_a_huge_model_costs_nothing() -> None:
    config = CONFIG_MAPPING["llama"](hidden_size=16384, intermediate_size=53248, num_hidden_layers=126)
    skeleton = hf.build_skeleton(config, torch.bfloat16)
    assert sum(p.numel() for p in skeleton.parameters()) > 4e11
    held = [b for _, b in skeleton.named_buffers() if not b.is_meta]
    assert sum(b.numel() * b.itemsize for b in held) < 1 << 20


# layers


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_found_in_the_order_of_their_use(family: str) -> None:
    model = build(family)
    layers = hf.decoder_layers(model)
    assert len(layers) == model.config.num_hidden_layers
    assert all(isinstance(m, GradientCheckpointingLayer) and model.get_submodule(n) is m for n, m in layers)
    used: list[str] = []
    for name, layer in layers:
        layer.register_forward_pre_hook(lambda *_, name=name: used.append(name))
    with torch.inference_mode():
        model(torch.arange(4, 9).view(1, -1))
    assert used == [name for name, _ in layers]
    # little is left outside of layers, embeddings and head
    inside = {id(p) for _, m in layers for p in m.parameters()}
    inside |= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    inside |= {id(p) for p in model.get_output_embeddings().parameters()}
    assert sum(p.numel() for p in model.parameters() if id(p) not in inside) <= 4 * model.config.hidden_size


# experts


class Recorder:
    """Stands in for the experts of a layer and remembers what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def forward(self, *args: Any) -> torch.Tensor:
        self.calls.append(args)
        return torch.zeros_like(args[1])


@pytest.mark.parametrize("family", MOE)
def test_experts_are_dispatched_to_us(family: str) -> None:
    model = build(family, experts_implementation=hf.EXPERTS)
    config = model.config.get_text_config()
    found = [m for _, layer in hf.decoder_layers(model) for _, m in hf.experts_modules(layer)]
    assert found
    recorders = []
    for module in found:
        recorders.append(Recorder())
        hf.attach_experts(module, recorders[-1])
    names = {n for n, _ in model.named_modules()}
    with torch.inference_mode():
        model(torch.arange(4, 18).view(2, 7))
    assert {n for n, _ in model.named_modules()} == names, "what is attached is no submodule"
    top_k = hf.Shape.of(config).top_k
    for module, recorder in zip(found, recorders, strict=True):
        assert len(recorder.calls) == 1, "the experts function is not ignored"
        got, hidden, index, weights = recorder.calls[0]
        assert got is module
        assert hidden.shape == (14, config.hidden_size)
        assert index.shape == weights.shape == (14, top_k)
        assert index.dtype is torch.int64
        assert weights.is_floating_point()
        assert 0 <= int(index.min()) <= int(index.max()) < module.num_experts
        for flag in ("has_gate", "has_bias", "is_transposed"):
            assert isinstance(getattr(module, flag), bool), flag
        assert callable(module._apply_gate)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in MOE])
def test_dense_models_have_no_experts(family: str) -> None:
    assert [n for _, layer in hf.decoder_layers(build(family)) for n, _ in hf.experts_modules(layer)] == []


def test_experts_that_would_ignore_us_are_not_taken() -> None:
    """llama4's module computes all experts at once by itself: its tensors stay with their layer."""
    changes = {"num_local_experts": 4, "intermediate_size_mlp": 96, "head_dim": 16, "attention_chunk_size": 32}
    config = CONFIG_MAPPING["llama4_text"](**_SMALL, **changes)
    skeleton = hf.build_skeleton(config, torch.float32)
    assert any("experts.gate_up_proj" in n for n, _ in skeleton.named_parameters())
    assert [n for _, layer in hf.decoder_layers(skeleton) for n, _ in hf.experts_modules(layer)] == []


# the checkpoint


@pytest.mark.parametrize("family", FAMILIES)
def test_traced_bytes_are_the_parameters(family: str, tmp_path: Path) -> None:
    """Every parameter, read from where it was traced to, is what `from_pretrained` makes of the same files."""
    build(family).save_pretrained(tmp_path, max_shard_size="150KB")
    config = hf.load_config(tmp_path)
    assert hf.compute_dtype(config, "auto") is torch.float32
    checkpoint = read_checkpoint(tmp_path)
    assert len(checkpoint.files) > 1
    skeleton = hf.build_skeleton(config, torch.float32)
    found = hf.trace(skeleton, checkpoint.tensors)
    want = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert found.keys() == want.keys()
    files = [f.read_bytes() for f in checkpoint.files]
    for name, gather in found.items():
        raw = b"".join(files[e.file][e.offset : e.offset + e.nbytes] for e in gather.extents)
        assert gather.shape == want[name].shape, name
        assert torch.equal(torch.frombuffer(bytearray(raw), dtype=gather.dtype).view(gather.shape), want[name]), name
    # and the layout has a place for each of them, once
    layout = lay_out_model(skeleton, found, torch.float32)
    parts = [layout.rest, *(part for layer in layout.layers for part in layer.dense)]
    parts += [layout.head] if layout.head is not None else []
    placed = [s.name for part in parts for s in part.specs] + [f"{t.module}.weight" for t in layout.tables]
    for layer in layout.layers:
        for group in layer.experts:
            placed += [f"{group.module}.{s.name}" for s in group.blocks[0].specs]
            assert all([s.name for s in b.specs] == [s.name for s in group.blocks[0].specs] for b in group.blocks)
    assert sorted(placed) == sorted(found)


@pytest.mark.parametrize("family", MOE)
def test_experts_are_cut_where_the_library_stacks_them(family: str, tmp_path: Path) -> None:
    build(family).save_pretrained(tmp_path)
    skeleton = hf.build_skeleton(hf.load_config(tmp_path), torch.float32)
    layout = lay_out_model(skeleton, hf.trace(skeleton, read_checkpoint(tmp_path).tensors), torch.float32)
    want = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    data = (tmp_path / SINGLE).read_bytes()
    groups = [g for layer in layout.layers for g in layer.experts]
    assert groups
    for group in groups:
        for e, laid_out in enumerate(group.blocks):
            slot = bytearray(laid_out.block.slot_nbytes)
            for s in laid_out.block.segments:
                slot[s.dst : s.dst + s.nbytes] = data[s.offset : s.offset + s.nbytes]
            for spec in laid_out.specs:
                got = spec.view(torch.frombuffer(slot, dtype=torch.uint8))
                assert torch.equal(got, want[f"{group.module}.{spec.name}"][e])


def test_tied_weights_are_named_by_the_library() -> None:
    skeleton = hf.build_skeleton(config_of("qwen2"), torch.float32)
    assert skeleton.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}
    assert hf.build_skeleton(config_of("llama"), torch.float32).all_tied_weights_keys == {}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "qwen3_next"])
def test_eager_attention_is_recognised(family: str) -> None:
    """The skeleton computes attention in the same way as the library would, and we know which way that is."""
    model = AutoModelForCausalLM.from_config(config_of(family))
    skeleton = hf.build_skeleton(config_of(family), torch.float32)
    assert skeleton.config._attn_implementation == model.config._attn_implementation
    assert hf.uses_eager_attention(skeleton) == (model.config._attn_implementation == "eager")
    assert hf.uses_eager_attention(skeleton) == (family in ("gemma2", "gpt_oss"))


# keys and values

PROMPT, NEW = 40, 6


def tensors_of(cache: Cache) -> Iterator[torch.Tensor]:
    """Everything a cache keeps of the tokens: keys and values, and recurrent states."""

    def walk(value: Any) -> Iterator[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            for v in value:
                yield from walk(v)
        elif isinstance(value, dict):
            yield from walk(list(value.values()))

    for layer in cache.layers:
        for name, value in vars(layer).items():
            if name not in ("_room", "_sliding_window_tensor"):
                yield from walk(value)


def after(model: PreTrainedModel, new: int) -> Cache:
    """A cache after a prompt, in one pass, and `new` tokens one by one."""
    cache = make_cache(model.config, PROMPT + NEW)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        model(torch.randint(4, VOCAB, (1, PROMPT), generator=generator), past_key_values=cache)
        for _ in range(new):
            model(torch.randint(4, VOCAB, (1, 1), generator=generator), past_key_values=cache)
    return cache


def held(cache: Cache) -> int:
    return sum(t.numel() * t.itemsize for t in tensors_of(cache))


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
@pytest.mark.parametrize("new", [0, NEW])
def test_kv_bytes_is_an_upper_bound(family: str, new: int) -> None:
    model = model_of(family)
    bound = hf.kv_bytes(model.config, PROMPT + new, 4)
    got = held(after(model, new))
    assert 0 < got <= bound
    assert bound <= 6 * got, "nor is it absurd"


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "glm4_moe", *MLA])
def test_kv_bytes_is_tight(family: str) -> None:
    model = model_of(family)
    got, bound = held(after(model, NEW)), hf.kv_bytes(model.config, PROMPT + NEW, 4)
    assert got <= bound <= 1.1 * got
    assert hf.kv_bytes(model.config, PROMPT + NEW, 2) * 2 == bound
    assert hf.kv_bytes(model.config, 2 * (PROMPT + NEW), 4) == 2 * bound


@pytest.mark.parametrize("family", SLIDING)
def test_kv_bytes_grows_no_further_than_window_and_chunk(family: str) -> None:
    config = config_of(family)
    growth = hf.kv_bytes(config, 200, 4, max_chunk=50) - hf.kv_bytes(config, 100, 4, max_chunk=50)
    full = sum(kind == "full_attention" for kind in getattr(config, "layer_types", None) or [])
    assert growth == full * 100 * 2 * config.num_key_value_heads * 16 * 4


@pytest.mark.parametrize("family", [*SLIDING, "llama", "deepseek_v3", "qwen3_next"])
@pytest.mark.parametrize("new", [0, 1, NEW])
def test_the_memory_behind_a_cache_is_bounded_too(family: str, new: int) -> None:
    """A window that is a view keeps the whole prompt alive behind it, in every layer at once."""
    model = build(family)
    behind = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(after(model, new))}
    slack = 64 * len(behind)
    assert sum(behind.values()) <= hf.kv_bytes(model.config, PROMPT + NEW, 4) + slack


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_has_a_layer_for_each(family: str) -> None:
    config = config_of(family)
    mine, stock = make_cache(config, 100), DynamicCache(config=config)
    assert len(mine.layers) == len(stock.layers) == config.num_hidden_layers
    for a, b in zip(mine.layers, stock.layers, strict=True):
        assert type(a) is {DynamicLayer: ReservedLayer, DynamicSlidingWindowLayer: WindowLayer}.get(type(b), type(b))


# reserved layers


@st.composite
def operations(draw: st.DrawFn) -> list[tuple[str, Any]]:
    """What transformers does to a layer while generating."""
    kinds = ["update", "update", "update", "crop", "reorder", "repeat", "select", "reset"]
    return [
        (kind, {"update": st.integers(1, 9), "crop": st.integers(-6, -1), "repeat": st.integers(1, 2)}.get(
            kind, st.integers(0, 99)))
        for kind in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=14))
    ]  # fmt: skip


@settings(max_examples=150, deadline=None, database=None)
@given(capacity=st.integers(1, 24), script=operations(), data=st.data())
def test_a_reserved_layer_is_a_dynamic_layer(capacity: int, script: list[tuple[str, Any]], data: st.DataObject) -> None:
    """Within its room and past it, whatever is cropped, reordered or repeated in between."""
    mine, stock = ReservedLayer(capacity), DynamicLayer()
    generator = torch.Generator().manual_seed(7)
    batch = 2
    for kind, strategy in script:
        number = data.draw(strategy)
        empty = stock.keys is None or stock.keys.numel() == 0
        if kind == "update":
            k, v = (torch.randn(batch, 2, number, d, generator=generator) for d in (4, 3))
            for got, want in zip(mine.update(k, v), stock.update(k, v), strict=True):
                assert torch.equal(got, want)
        elif empty:
            continue
        elif kind == "crop":
            if -number > stock.get_seq_length():
                continue
            mine.crop(number), stock.crop(number)
        elif kind == "reorder":
            order = torch.tensor([number % batch, (number // 2) % batch] * (batch // 2) or [0])
            order = order if len(order) == batch else order[:1].repeat(batch)
            mine.reorder_cache(order), stock.reorder_cache(order)
        elif kind == "repeat":
            mine.batch_repeat_interleave(number), stock.batch_repeat_interleave(number)
            batch *= number
        elif kind == "select":
            rows = torch.tensor([number % batch])
            mine.batch_select_indices(rows), stock.batch_select_indices(rows)
            batch = 1
        else:
            mine.reset(), stock.reset()
        assert mine.get_seq_length() == stock.get_seq_length()
        assert mine.get_mask_sizes(3) == stock.get_mask_sizes(3)
        if stock.keys is not None and kind != "reset":
            assert torch.equal(mine.keys, stock.keys)
            assert torch.equal(mine.values, stock.values)


def test_a_reserved_layer_takes_its_room_once() -> None:
    layer = ReservedLayer(100)
    token = torch.randn(1, 2, 1, 4)
    layer.update(token, token)
    place = layer.keys.data_ptr()
    for n in range(2, 101):
        keys, _ = layer.update(token, token)
        assert keys.shape == (1, 2, n, 4)
        assert keys.data_ptr() == place, "no token held is copied again"
    assert layer.keys.untyped_storage().nbytes() == 100 * 2 * 4 * 4
    layer.update(token, token)
    assert layer.keys.data_ptr() != place
    assert layer.keys.untyped_storage().nbytes() == 200 * 2 * 4 * 4
    layer.reset()
    assert layer._room is None


# names that are not plainly public


def test_recurrent_families_need_their_prompt_in_one_pass() -> None:
    """Should the library mend this, the list can shrink."""
    assert {"jamba", "mamba", "mamba2"} <= hf.NO_CHUNKED_PREFILL
    model = build("jamba")
    ids = torch.arange(4, 28).view(1, -1)
    with torch.inference_mode():
        whole = model(ids, past_key_values=make_cache(model.config, 32)).logits
        cache = make_cache(model.config, 32)
        model(ids[:, :12], past_key_values=cache)
        rest = model(ids[:, 12:], past_key_values=cache).logits
    assert not torch.allclose(whole[:, 12:], rest, atol=1e-4)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in hf.NO_CHUNKED_PREFILL])
def test_all_others_can_be_cut(family: str) -> None:
    model = build(family)
    ids = torch.arange(4, 44).view(1, -1)
    with torch.inference_mode():
        whole = model(ids, past_key_values=make_cache(model.config, 64)).logits
        cache = make_cache(model.config, 64)
        parts = [model(ids[:, at : at + 16], past_key_values=cache).logits for at in range(0, 40, 16)]
    assert (torch.cat(parts, 1) - whole).abs().max() <= 1e-4 * whole.abs().max()


SIZES: dict[str, Callable[[PreTrainedConfig], int]] = {
    "hidden": lambda c: c.hidden_size, "vocab": lambda c: c.vocab_size, "heads": lambda c: c.num_attention_heads,
    "max_context": lambda c: c.max_position_embeddings,
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_are_read_from_every_config(family: str) -> None:
    config = config_of(family)
    shape = hf.Shape.of(config)
    assert {name: getattr(shape, name) for name in SIZES} == {name: of(config) for name, of in SIZES.items()}
    assert (shape.top_k > 0) == (family in MOE)
    assert shape.head_dim >= config.hidden_size // config.num_attention_heads

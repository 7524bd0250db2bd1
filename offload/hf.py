"""The adapter to transformers: every name of the library that is not plainly public is used here and nowhere else.

`tests/test_hf_adapter.py` checks each assumption on a tiny model, so that a new release that breaks one is noticed
by name. Tried with transformers 5.23.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.initialization import no_init_weights
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from offload.gather import Gather, NotAGather
from tiers import CheckpointError, ModelError

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor | None]

EXPERTS = "offload"  # the name our experts function is registered under
_QUANT_SUFFIX = re.compile(
    r"(weight_scale(_inv)?|scales?|zeros?|qweight|qzeros|g_idx|weight_packed|absmax|quant_map|blocks|input_scale)$"
)
SPILLED = ("full_attention", "sliding_attention")  # layer types whose keys and values may lie on disk
# families whose recurrent state transformers itself computes wrongly when a prompt comes in several chunks
NO_CHUNKED_PREFILL = frozenset({"jamba", "mamba", "mamba2", "bamba", "falcon_mamba", "zamba", "zamba2", "nemotron_h"})


def load_config(folder: Path, *, quantised: bool = False) -> PreTrainedConfig:
    """The model's config. Raises `ModelError` for what cannot be a causal language model, in one line.

    With `quantised`, weights in a format that cannot be run are no reason to refuse: a plan can be made for them.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no config.json; is it a model folder?")
    try:
        raw = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise ModelError(f"{path} is not valid JSON") from e
    if not isinstance(raw, dict):
        raise ModelError(f"{path} is not a JSON object")
    kind = raw.get("model_type")
    if not isinstance(kind, str):
        raise ModelError(f"{path}: model type {kind!r} is not known to transformers {transformers.__version__}")
    if not isinstance(raw.get("architectures") or [], list):
        raise ModelError(f"{path}: architectures is not a list")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as e:  # the library raises many kinds for a config it cannot use
        if raw.get("auto_map"):
            raise ModelError(f"{path}: model type {kind!r} needs code from the model's folder, which is not run") from e
        if kind not in transformers.CONFIG_MAPPING:
            raise ModelError(
                f"{path}: model type {kind!r} is not known to transformers {transformers.__version__}"
            ) from e
        raise ModelError(f"{path} cannot be used: {_one_line(e)}") from e
    causal: set[str] = set()
    for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        causal.update([names] if isinstance(names, str) else names)
    architectures = [a for a in (config.architectures or []) if isinstance(a, str)]
    named = bool(architectures) and any(a in causal for a in architectures)
    if config.is_encoder_decoder:
        raise ModelError(f"{path}: {kind} is an encoder-decoder; only causal language models can be run")
    if type(config) not in AutoModelForCausalLM._model_mapping or (architectures and not named):
        what = architectures[0] if architectures else kind
        raise ModelError(f"{path}: {what} is not a causal language model")
    quant = raw.get("quantization_config")
    if quant is not None and not quantised:
        method = quant.get("quant_method", "unknown") if isinstance(quant, dict) else "unknown"
        raise ModelError(
            f"{path}: the weights are quantised ({method}), which cannot be run yet; use the original ones"
        )
    return config


def compute_dtype(config: PreTrainedConfig, name: str) -> torch.dtype:
    """The dtype to compute in: `name`, or with `auto` the checkpoint's own."""
    if name != "auto":
        dtype = getattr(torch, name)
    else:
        dtype = config.dtype or getattr(config.get_text_config(decoder=True), "dtype", None) or torch.float32
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ModelError(f"config.json: dtype {dtype} cannot be computed in; give --dtype float32 or bfloat16")
    assert isinstance(dtype, torch.dtype)
    return dtype


def build_skeleton(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its parameters on meta and its non-persistent buffers (rope tables and the like) real.

    transformers recomputes those buffers itself in `initialize_weights`, which is kept from touching parameters.
    """
    config = copy.deepcopy(config)
    try:
        with torch.device("meta"), no_init_weights():
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=False, experts_implementation=EXPERTS
            )
    except Exception as e:
        raise ModelError(f"transformers cannot build {config.model_type}: {_one_line(e)}") from e
    for t in model.state_dict(keep_vars=True).values():
        t._is_hf_initialized = True
    for name, buffer in list(model.named_non_persistent_buffers()):
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._buffers[leaf] = torch.empty_like(buffer, device="cpu")
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    model.initialize_weights()
    model.eval()
    model.requires_grad_(False)
    return model


def trace(model: PreTrainedModel, tensors: dict[str, Gather]) -> dict[str, Gather]:
    """Where each parameter and persistent buffer of `model` lies: the library's own conversions, run on gathers.

    Follows the loop of `convert_and_load_state_dict_in_model`. Raises `ModelError` where a conversion is not a pure
    gather, `CheckpointError` where names or shapes do not fit.
    """
    expected = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    collected: dict[str, WeightRenaming | WeightConverter] = {}
    unexpected: list[str] = []
    try:
        ordered = sorted(tensors, key=dot_natural_key)
    except ValueError as e:  # digits that are no number
        raise CheckpointError(
            f"a tensor name in model.safetensors or its index is not one a model has: {_one_line(e)}"
        ) from e
    for key in ordered:
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, expected)
        if name not in expected and key in expected:
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, expected)
        if name not in expected:
            unexpected.append(key)
            continue
        if pattern is not None:
            transform = collected.setdefault(name, copy.deepcopy(by_pattern[pattern]))
        else:
            transform = collected.setdefault(name, WeightRenaming(key, name))
            pattern = key
        transform.add_tensor(name, key, pattern, tensors[key])
    _refuse_unexpected(model, unexpected)
    found: dict[str, Gather] = {}
    for name, transform in collected.items():
        try:
            result = transform.convert(name, model=model, config=model.config)
        except NotAGather as e:
            raise ModelError(
                f"{model.config.model_type}: {name} must be transformed while loading ({e}), not only gathered; "
                "this family cannot be streamed from its original files"
            ) from e
        except (ValueError, RuntimeError, AttributeError, KeyError, TypeError) as e:
            raise CheckpointError(f"the checkpoint does not fit the model at {name}: {_one_line(e)}") from e
        for target, value in result.items():
            gather = value[0] if isinstance(value, list) else value
            if target in expected:
                found[target] = gather
    _resolve_ties(model, found, set(expected))
    for name, meta in expected.items():
        gather = found[name]
        if gather.shape != meta.shape:
            raise CheckpointError(
                f"{name} has shape {list(gather.shape)} in the checkpoint, the config asks for {list(meta.shape)}"
            )
        if gather.dtype.is_floating_point != meta.dtype.is_floating_point or (
            gather.dtype.is_floating_point and gather.dtype.itemsize == 1
        ):
            raise CheckpointError(f"{name} is stored as {gather.dtype}, which cannot be computed in as {meta.dtype}")
    return found


def _refuse_unexpected(model: PreTrainedModel, unexpected: list[str]) -> None:
    harmless = {r"rotary_emb\.inv_freq", r"(^|\.)position_ids$", r"(^|\.)masked_bias$", r"\.attn\.bias$"}
    harmless |= set(model._keys_to_ignore_on_load_unexpected or ())
    ignore = re.compile("|".join(f"({p})" for p in harmless))
    left = [k for k in unexpected if not ignore.search(k)]
    if not left:
        return
    scales = [k for k in left if _QUANT_SUFFIX.search(k)]
    if scales:
        raise ModelError(f"the weights look quantised ({scales[0]}), which cannot be run yet; use the original ones")
    raise CheckpointError(
        f"the checkpoint has {len(left)} tensors the model does not know, {left[0]} for one; it is another model's"
    )


def _resolve_ties(model: PreTrainedModel, found: dict[str, Gather], expected: set[str]) -> None:
    """Give tied parameters one another's bytes: whichever side is stored (transformers ties symmetrically)."""
    for target, source in model.all_tied_weights_keys.items():
        if target not in found and source in found:
            found[target] = found[source]
        elif source not in found and target in found:
            found[source] = found[target]
    ignorable = model._keys_to_ignore_on_load_missing or ()
    missing = sorted(k for k in expected - set(found))
    if missing:
        note = " (transformers would make it up)" if any(re.search(p, missing[0]) for p in ignorable) else ""
        raise CheckpointError(f"the checkpoint lacks {missing[0]}{note}; {len(missing)} tensors are missing in all")


def param_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str, torch.dtype], torch.dtype]:
    """Which dtype each parameter is computed in (some families keep a few in float32)."""
    plan = model._get_dtype_plan(dtype)
    patterns = [(re.compile(k.replace("*", ".*")), v) for k, v in plan.items()]

    def of(name: str, own: torch.dtype) -> torch.dtype:
        return next((v for p, v in patterns if p.search(name)), own)

    return of


def decoder_layers(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The decoder layers in order of use, by module name."""
    layers: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and not any(name.startswith(n + ".") for n, _ in layers):
            layers.append((name, module))
    return layers


def streamable_experts(module: nn.Module) -> bool:
    """Whether the module's forward goes through the experts interface (others ignore our function silently)."""
    return "_apply_gate" in dir(type(module)) and hasattr(module, "is_transposed")


def experts_modules(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The experts modules inside a layer that can be computed expert by expert."""
    for name, module in layer.named_modules():
        if streamable_experts(module):
            yield name, module


def router_of(layer: nn.Module, experts: str) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None:
    """The router beside the experts module `experts` (its name inside `layer`), to be asked apart from its block.

    hidden [T, H] → logits [T, experts], indices [T, k]. None where the family has none, or one that needs more than the
    hidden states.
    """
    router = _router(layer, experts)
    if router is None:
        return None
    needed = [p for p in inspect.signature(router.forward).parameters.values() if p.default is p.empty]
    return functools.partial(_route, router) if len(needed) == 1 else None


def hear_router(layer: nn.Module, experts: str, tell: Callable[[torch.Tensor], None]) -> None:
    """Whenever the layer's own router runs in its block, `tell` is given its logits [T, experts]."""
    router = _router(layer, experts)
    if router is not None:
        router.register_forward_hook(lambda module, args, output: tell(output[0]))


def _router(layer: nn.Module, experts: str) -> nn.Module | None:
    parent = layer.get_submodule(experts.rpartition(".")[0]) if "." in experts else layer
    return next((c for c in parent.children() if type(c).__name__.lower().endswith("router")), None)


def _route(router: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # not through __call__: whoever hears the router (`hear_router`) is not to hear this
    logits, _, index = router.forward(hidden)
    assert isinstance(logits, torch.Tensor) and isinstance(index, torch.Tensor)
    return logits, index


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Put the recomputed buffers (rope tables and the like) where compute is."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                module._buffers[name] = buffer.to(device)


def attach_experts(module: nn.Module, experts: Any) -> None:
    """From now on the module's forward is `experts.forward(module, hidden, index, weights)`."""
    module.__dict__["offload_experts"] = experts


def _dispatch_experts(module: Any, *args: Any) -> Any:
    return module.__dict__["offload_experts"].forward(module, *args)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, _dispatch_experts)


def attach_attention(model: nn.Module, attend: Attend) -> None:
    """Ask `attend` first wherever a module of `model` attends, by fused attention, with one new token per sequence."""
    for module in model.modules():
        module.__dict__["offload_attention"] = attend


_by_torch = ALL_ATTENTION_FUNCTIONS["sdpa"]


def _dispatch_attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
    attend = module.__dict__.get("offload_attention")
    # whatever is asked for besides, and this function does not ignore, is torch's
    plain = attention_mask is None and not any(kwargs.get(k) is not None for k in ("position_bias", "cache", "softcap"))
    if attend is not None and plain and query.shape[2] == 1 and not torch.is_grad_enabled():
        scale = kwargs.get("scaling")
        out = attend(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)
        if out is not None:
            return out, None
    return _by_torch(module, query, key, value, attention_mask, **kwargs)


# other models, which nothing is attached to, are computed as ever
ALL_ATTENTION_FUNCTIONS.register("sdpa", _dispatch_attention)


@dataclass(frozen=True, slots=True)
class Shape:
    """What memory planning needs to know of a model's config; bounds where families differ."""

    hidden: int
    intermediate: int
    heads: int
    head_dim: int
    vocab: int
    top_k: int
    max_context: int
    state: int  # floats of recurrent state per token computed in parallel (0: none)

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Shape:
        """Read from the text config."""
        c = config.get_text_config(decoder=True)

        def first(*names: str, default: int = 0) -> int:
            return next((v for n in names if (v := _largest(c, n)) > 0), default)

        hidden = first("hidden_size", "n_embd", "d_model", default=1)
        heads = first("num_attention_heads", "n_head", default=1)
        intermediate = first(
            "intermediate_size", "n_inner", "ffn_dim", "shared_expert_intermediate_size", default=4 * hidden
        )
        head_dim = max(first("head_dim", default=-(-hidden // heads)), first("qk_head_dim"), first("v_head_dim"))
        state = first("mamba_expand") * hidden * first("mamba_d_state")
        return cls(
            hidden, intermediate, heads, head_dim, first("vocab_size", default=1),
            first("num_experts_per_tok", "moe_topk", "num_experts_per_token"),
            first("max_position_embeddings", "n_positions", default=2048), state,
        )  # fmt: skip


def _largest(config: Any, name: str) -> int:
    """The largest value an integer field has over the layers (some families vary it); 0 if there is none."""
    try:
        value = getattr(config, name, None)
    except Exception:  # transformers refuses to name one value for what varies per layer
        value = [getattr(layer, name, None) for layer in config.per_layer_config]
    values = value if isinstance(value, (list, tuple)) else [value]
    return max((v for v in values if isinstance(v, int) and not isinstance(v, bool)), default=0)


@dataclass(frozen=True, slots=True)
class LayerCache:
    """What one layer keeps of a sequence: bytes per token (of the last `window` tokens), and bytes of state.

    `spills`: what it keeps of tokens can be written to disk and attended to from there.
    """

    per_token: int
    window: int | None
    state: int
    spills: bool = False


def kv_layers(config: PreTrainedConfig, itemsize: int) -> list[LayerCache]:
    """What each layer keeps, at most: full, sliding and recurrent ones."""
    c = config.get_text_config(decoder=True)
    shape = Shape.of(config)
    heads = _largest(c, "num_key_value_heads") or shape.heads
    per_token = heads * 2 * shape.head_dim * itemsize
    if latent := _largest(c, "kv_lora_rank"):
        per_token = (latent + _largest(c, "qk_rope_head_dim")) * itemsize  # MLA caches the compressed latents
    # recurrent layers: a state in float32 and the inputs of a short convolution
    keys, values = _largest(c, "linear_key_head_dim"), _largest(c, "linear_value_head_dim")
    key_heads, value_heads = _largest(c, "linear_num_key_heads"), _largest(c, "linear_num_value_heads")
    width = max(_largest(c, "ssm_state_size"), _largest(c, "mamba_d_state"), _largest(c, "state_size"))
    mamba_heads = max(_largest(c, "mamba_num_heads"), _largest(c, "mamba_n_heads"))
    inner = mamba_heads * max(_largest(c, "mamba_head_dim"), _largest(c, "mamba_d_head"))
    groups = max(1, _largest(c, "n_groups"), _largest(c, "mamba_n_groups"))
    state = max(shape.state, value_heads * keys * values, inner * width, 16 * shape.hidden)
    channels = max(4 * shape.hidden, 2 * key_heads * keys + value_heads * values, inner + 2 * groups * width)
    kernel = max(4, _largest(c, "conv_kernel"), _largest(c, "mamba_d_conv"), _largest(c, "linear_conv_kernel_dim"))
    recurrent = 4 * state + kernel * channels * itemsize
    layers = []
    for kind, kwargs in zip(*get_layer_types_and_kwargs(c), strict=True):
        attends = kind not in ("conv", "linear_attention", "dummy")
        recurs = kind not in ("full_attention", "sliding_attention", "chunked_attention", "dummy")
        window = kwargs.get("sliding_window") or None
        layers.append(LayerCache(per_token if attends else 0, window, recurrent if recurs else 0, kind in SPILLED))
    return layers


def kv_bytes(config: PreTrainedConfig, tokens: int, itemsize: int, max_chunk: int = 2048) -> int:
    """Bytes the cache of one sequence of `tokens` takes at most, over all layers: full, sliding and recurrent.

    `max_chunk` bounds the new tokens of one pass.
    """
    # what a sliding layer holds is a view of the last concatenation: its window and the newest chunk
    return sum(
        y.per_token * (min(tokens, y.window + max_chunk) if y.window else tokens) + y.state
        for y in kv_layers(config, itemsize)
    )


def activation_bytes(config: PreTrainedConfig, tokens: int, context: int, itemsize: int, eager: bool) -> int:
    """Bytes of temporaries one pass over `tokens` new tokens needs at most, with `context` tokens before them.

    The widest moments of a decoder layer, added up with room to spare: norms in float32, the MLP's intermediate, the
    places of the chosen experts, attention scores (eager only; fused kernels keep none), masks, and the logits.
    """
    shape = Shape.of(config)
    c = config.get_text_config(decoder=True)
    per_token = 4 * (12 * shape.hidden + 4 * shape.heads * shape.head_dim) + itemsize * 5 * shape.intermediate
    per_token += shape.top_k * shape.hidden * itemsize * 4
    per_token += 4 * 4 * shape.state
    per_token += context * (16 * shape.heads if eager else 5)
    sliding = getattr(c, "sliding_window", None) or 0
    kv_copies = 2 * shape.heads * shape.head_dim * itemsize
    # grouped heads repeated for attention, latents expanded, a sliding layer's window concatenated: one layer's worth
    per_context = 2 * kv_copies if eager or getattr(c, "kv_lora_rank", None) or sliding else kv_copies
    return tokens * per_token + context * per_context + 3 * 4 * shape.vocab


def uses_eager_attention(model: PreTrainedModel) -> bool:
    """Whether attention materialises its scores."""
    return bool(model.config.get_text_config(decoder=True)._attn_implementation == "eager")


def attention_is_replaceable(model: PreTrainedModel) -> bool:
    """Whether attention goes through the attention interface; others compute their own, whatever is asked for."""
    forwards = {inspect.unwrap(type(m).forward) for m in model.modules()}
    return any("ALL_ATTENTION_FUNCTIONS" in getattr(getattr(f, "__code__", None), "co_names", ()) for f in forwards)


def _one_line(e: BaseException) -> str:
    text = " ".join(str(e).split())
    return (text[:200] + "…") if len(text) > 200 else text or type(e).__name__

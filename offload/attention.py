"""The adapter to transformers' attention: who computes it, and masks that are a rule instead of a tensor.

A model that is switched over (`switch`) asks `Attention` for every attention; the mask that transformers would make,
queries × context, is never made. `tests/test_hf_adapter.py` checks what is assumed of the library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache, get_layer_types_and_kwargs
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvstore import FewTokens, RaggedCache, Rule, TieredCache, TieredLayer, attend, attend_ragged
from tiers import ModelError

NAME = "offload_tiers"  # the attention implementation that a switched model names
_TIERED = {"full_attention": False, "sliding_attention": True}  # layer type: whether there is a window


class SeenBy:
    """A mask as a rule: causal, within the layer's window, and without each sequence's padding at the front."""

    def __init__(self, pads: list[int], window: int | None) -> None:
        self.pads = pads
        self.window = window


def _parts(mask_function: Any) -> list[str]:
    """What transformers put a mask function together of, by name."""
    cells = [c.cell_contents for c in getattr(mask_function, "__closure__", None) or ()]
    return [f.__qualname__ for cell in cells if isinstance(cell, tuple) for f in cell]


_WINDOW = _parts(sliding_window_causal_mask_function(1))


def _unknown_mask() -> ModelError:
    return ModelError("--kv-resident: attention is masked here in a way that cannot be computed over tiers yet")


def _seen_by(
    batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0,
    mask_function: Any = causal_mask_function, attention_mask: torch.Tensor | None = None,
    local_size: int | None = None, **kwargs: Any,
) -> SeenBy:  # fmt: skip
    """What transformers calls to make a mask. Raises `ModelError` for one that is no causal mask with padding."""
    if mask_function is not causal_mask_function and (local_size is None or _parts(mask_function) != _WINDOW):
        raise _unknown_mask()
    pads = [0] * batch_size
    if attention_mask is not None:
        held = attention_mask[:, : kv_offset + kv_length].bool()
        pads = (held.cumsum(1) == 0).sum(1).tolist()  # a sequence may be all padding so far
        if not all(bool(row[pad:].all()) for row, pad in zip(held, pads, strict=True)):
            raise ModelError("attention over tiers knows padding at the front of a prompt only, and here it is inside")
    return SeenBy(pads, local_size)


class Attention:
    """Attention of one model, over the cache of the pass under way (`cache`)."""

    def __init__(self, few: FewTokens | None = None) -> None:
        """`few`: a kernel for one token per sequence."""
        self.cache: Cache | None = None
        self._few = few

    def __call__(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
    ) -> torch.Tensor:
        """query [B, heads, Q, D], key [B, kv heads, n, D], value [B, kv heads, n, Dv] → [B, Q, heads, Dv]."""
        scale = kwargs.get("scaling")
        if not isinstance(mask, SeenBy):  # one that the caller made
            raise _unknown_mask()
        seen = mask
        rule = Rule(query.shape[-1] ** -0.5 if scale is None else scale, seen.window, kwargs.get("softcap"))
        expand = getattr(module, "expand_kv", None)
        sinks = kwargs.get("s_aux")
        layer = None
        if isinstance(self.cache, RaggedCache):
            number = int(module.layer_idx)  # type: ignore[arg-type]
            return attend_ragged(self.cache, number, query, key, value, rule, sinks=sinks, expand=expand, few=self._few)
        if isinstance(self.cache, TieredCache):
            found = self.cache.layers[module.layer_idx]
            layer = found if isinstance(found, TieredLayer) else None
        if layer is None:  # the keys are all there are
            pads = [max(0, p) for p in _shifted(seen.pads, self.cache, module, key)]
            return attend(None, None, query, key, value, rule, pads, sinks=sinks)
        assert isinstance(self.cache, TieredCache)
        return attend(self.cache, layer, query, key, value, rule, seen.pads, sinks=sinks, expand=expand, few=self._few)


def _shifted(pads: list[int], cache: Cache | None, module: nn.Module, key: torch.Tensor) -> list[int]:
    """Padding counted from the first key given: another cache may have dropped what is out of a window."""
    held = cache.get_seq_length(module.layer_idx) if cache is not None else key.shape[2]
    return [p - max(0, held - key.shape[2]) for p in pads]


def switch(model: PreTrainedModel, few: FewTokens | None = None) -> tuple[Attention, Callable[[], None]]:
    """Make every attention of `model` ask the `Attention` returned; the function returned makes it as it was."""
    attention = Attention(few)
    for module in model.modules():
        module.__dict__["offload_tiers"] = attention
    configs = list({id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values())
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = NAME

    def back() -> None:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name

    return attention, back


def _dispatch(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
    return module.__dict__["offload_tiers"](module, query, key, value, attention_mask, **kwargs), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _dispatch)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _seen_by)


def cache_layers(config: PreTrainedConfig) -> list[Any]:
    """For each layer what `TieredCache` wants: its window or None, or transformers' own cache layer."""
    types, options = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    layers: list[Any] = []
    for kind, given in zip(types, options, strict=True):
        if kind in _TIERED:
            layers.append(given.get("sliding_window") if _TIERED[kind] else None)
        else:
            layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**given))
    return layers

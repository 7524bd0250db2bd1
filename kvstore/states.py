"""Reading a sequence out of a cache, putting it back, and remembering what cannot be cut: for one sequence.

Layers with a bounded state (recurrent ones, sliding windows) forget: they go back to a snapshot or not at all.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

from kvstore.reserved import ReservedLayer
from kvstore.tiered import TieredLayer
from kvstore.windows import WindowLayer

Layers = tuple[tuple[torch.Tensor, torch.Tensor] | None, ...]
_KINDS = ("conv", "recurrent")


def has_states(cache: Cache) -> bool:
    """Whether some layer keeps a recurrent state."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)


def storable(cache: Cache) -> bool:
    """Whether all that the cache keeps can be read out, token by token or as a state."""
    kinds = (ReservedLayer, TieredLayer, WindowLayer)
    return all(
        isinstance(layer, kinds) or (isinstance(layer, LinearAttentionCacheLayerMixin) and not _attends(layer))
        for layer in cache.layers
    )


def read(cache: Cache, start: int, stop: int) -> Layers:
    """Tokens [start, stop): for each layer keys [heads, n, Dk] and values [heads, n, Dv] on the CPU, or None.

    Raises `IndexError` where a window has forgotten them.
    """
    return tuple(_read(layer, start, stop) for layer in cache.layers)


def _read(layer: Any, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    if isinstance(layer, ReservedLayer):
        found = layer.keys[0, :, start:stop], layer.values[0, :, start:stop]
    elif isinstance(layer, (TieredLayer, WindowLayer)):
        found = layer.read(start, stop)
    else:
        return None
    return found[0].cpu(), found[1].cpu()


def write(cache: Cache, layers: Layers, device: torch.device) -> None:
    """Append tokens that were read out of another cache."""
    for layer, given in zip(cache.layers, layers, strict=True):
        if given is None:
            continue
        keys, values = (t[None].to(device) for t in given)
        layer.update(keys, values)
        if isinstance(layer, TieredLayer):
            layer.append_new()


def states(cache: Cache) -> dict[str, torch.Tensor]:
    """The recurrent states as they are now, copied, by name."""
    out = {}
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            for kind, found in zip(_KINDS, (layer.conv_states, layer.recurrent_states), strict=True):
                for i, state in found.items():
                    if state is not None and layer.has_previous_state[i]:
                        out[f"{number}.{kind}.{i}"] = state.detach().cpu().clone()
    return out


def put_states(cache: Cache, given: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Set recurrent states to what `states` said."""
    for name, state in given.items():
        number, kind, i = name.split(".")
        layer = cache.layers[int(number)]
        held = state.to(device)
        if kind == "conv":
            layer.lazy_initialization(conv_states=held, state_idx=int(i))
            layer.conv_states[int(i)].copy_(held)
        else:
            layer.lazy_initialization(recurrent_states=held, state_idx=int(i))
            layer.recurrent_states[int(i)].copy_(held)
        layer.has_previous_state[int(i)] = True


def spoil(cache: Cache) -> None:
    """A pass was cut short: recurrent states may be a pass ahead of the tokens, and nobody can tell."""
    cache.offload_spoiled = True


def rollback(cache: Cache, length: int) -> bool:
    """Take `cache` back to its first `length` tokens, layer by layer (an interrupted pass leaves them uneven).

    False if a layer cannot go back: recurrent states and sliding windows forget; the cache is then of no use.
    """
    keeps = [layer for layer in cache.layers if hasattr(layer, "get_seq_length")]
    if has_states(cache) and getattr(cache, "offload_spoiled", False):
        return False
    uneven = [layer for layer in keeps if layer.get_seq_length() != length]
    if not uneven:
        return True
    croppable = all(type(layer) in (ReservedLayer, TieredLayer) for layer in cache.layers)
    if not croppable or any(layer.get_seq_length() < length for layer in keeps):
        return False
    for layer in uneven:
        layer.crop(length - layer.get_seq_length())
    return True


class Snapshot:
    """What the bounded layers of a cache are after `length` tokens, all it holds; others are cut back to that."""

    def __init__(self, cache: Cache, length: int) -> None:
        self.length = length
        self._bounded = {n: copy.deepcopy(y) for n, y in enumerate(cache.layers) if _bounded(y)}

    @staticmethod
    def needed(cache: Cache) -> bool:
        """Whether there is anything to remember: a cache without bounded layers can be cut anywhere."""
        return any(map(_bounded, cache.layers))

    def restore(self, cache: Cache) -> bool:
        """Take `cache`, which has gone on from here, back; False if it cannot."""
        others = [layer for n, layer in enumerate(cache.layers) if n not in self._bounded]
        if any(layer.get_seq_length() < self.length for layer in others):
            return False
        for layer in others:
            layer.crop(self.length - layer.get_seq_length())
        for number, layer in self._bounded.items():
            cache.layers[number] = copy.deepcopy(layer)
        return True


def _bounded(layer: Any) -> bool:
    return isinstance(layer, (DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin))


def _attends(layer: Any) -> bool:
    """Whether a layer keeps keys and values beside its state."""
    return hasattr(layer, "keys")

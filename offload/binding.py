"""Binding: putting views of a slot in the place of a module's parameters, and taking them out again.

A plain tensor in `_parameters` is what `forward` reads through attribute access, and is the cheapest way in and out
(a `Parameter` made per step costs fifty times as much).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from offload.layout import LaidOut
from tiers import Slot


class Binder:
    """One block's tensors and the places in the model where they belong. Views are made once per slot."""

    def __init__(self, model: nn.Module, laid_out: LaidOut) -> None:
        self._places: list[tuple[dict[str, Any], str, Any]] = []
        self._specs = laid_out.specs
        self._views: dict[int, list[torch.Tensor]] = {}
        for spec in laid_out.specs:
            parent, _, leaf = spec.name.rpartition(".")
            module = model.get_submodule(parent)
            home: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
            self._places.append((home, leaf, home[leaf]))

    def bind(self, slot: Slot) -> None:
        """From here on the model computes with the slot's bytes. The caller holds the lease."""
        views = self._views.get(slot.address)
        if views is None:
            views = self._views[slot.address] = [s.view(slot.tensor) for s in self._specs]
        for (home, leaf, _), view in zip(self._places, views, strict=True):
            home[leaf] = view

    def unbind(self) -> None:
        """Back to meta: a use without a lease is then an error, not garbage."""
        for home, leaf, meta in self._places:
            home[leaf] = meta

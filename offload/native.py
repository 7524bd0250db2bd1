"""Linear layers of few tokens, and the attention of one, on the CPU, by the kernel (`moe.kernels`) instead of torch.

Decoding reads every weight once for a token or a few: what counts is how fast memory is read, and torch reads it at
half to two thirds of the speed that is there, and starts its threads anew for each product. Prompts are torch's.
Which of the two computes is decided by the number of tokens and the type, never by where a weight comes from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from moe import kernels
from moe.kernels import Kernel
from offload import hf

# by the kernel, which is bound by arithmetic from there on, and torch's tiled products of bfloat16 draw level
MOST_TOKENS = {torch.bfloat16: 8, torch.float32: 16}

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def attach(model: nn.Module, device: torch.device) -> bool:
    """Let the kernel compute linear layers and attention of `model` where it can; False where torch does everything.

    A layer's weights are looked up in each call: they are views that come and go.
    """
    kernel = kernels.load() if device.type == "cpu" else None
    if kernel is not None:
        for module in model.modules():
            if type(module) is nn.Linear:  # what else a subclass does is not known
                module.__dict__["forward"] = _forward(module, module.forward, kernel)
        hf.attach_attention(model, kernel.attention)
    return kernel is not None


def product(device: torch.device) -> Product:
    """What computes x [..., K] times weight [N, K] transposed in this process, for measurements."""
    kernel = kernels.load() if device.type == "cpu" else None

    def by_kernel(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        assert kernel is not None
        out = kernel.linear(x, weight) if x.numel() <= MOST_TOKENS.get(x.dtype, 0) * weight.size(1) else None
        return linear(x, weight) if out is None else out

    return linear if kernel is None else by_kernel


def _forward(module: nn.Linear, by_torch: Callable[..., Any], kernel: Kernel) -> Callable[[torch.Tensor], torch.Tensor]:
    parameters = module._parameters
    most = {dtype: tokens * module.in_features for dtype, tokens in MOST_TOKENS.items()}  # elements

    def forward(input: torch.Tensor) -> torch.Tensor:  # as torch names it
        if input.numel() <= most.get(input.dtype, 0) and not torch.is_grad_enabled():
            weight = parameters["weight"]
            assert weight is not None
            out = kernel.linear(input, weight, parameters["bias"])
            if out is not None:
                return out
        result: torch.Tensor = by_torch(input)
        return result

    return forward

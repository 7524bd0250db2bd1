"""Whether two engines say the same: the tokens they choose, and how far the logits of others lie apart."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

BF16_DIGITS = 8  # significant binary digits


def equality(reference: Path, other: Path) -> dict[str, Any]:
    """Positions with the same choice; the worst other choice in ulps below the reference's maximum; equal bits; how
    near the logits of a position are at worst.
    """
    from safetensors.torch import load_file

    a, b = load_file(reference)["logits"], load_file(other)["logits"]
    n = min(len(a), len(b))
    a, b = a[:n].float(), b[:n].float()
    mine, theirs = b.argmax(-1).tolist(), a.argmax(-1).tolist()
    worst = max((ulps_below(a[i].max().item(), a[i, m].item()) for i, m in enumerate(mine)), default=0.0)
    return {
        "positions": n,
        "equal": sum(x == y for x, y in zip(mine, theirs, strict=True)),
        "worst_ulps": worst,
        "bit_identical": sum(bool((a[i] == b[i]).all()) for i in range(n)),
        "largest_difference": (a - b).abs().max().item() if n else 0.0,
        "least_cosine": (a * b).sum(-1).div(a.norm(dim=-1) * b.norm(dim=-1)).min().item() if n else None,
    }


def ulps_below(maximum: float, value: float, digits: int = BF16_DIGITS) -> float:
    """How far `value` lies below `maximum`, in units of the last of `digits` binary digits of `maximum`."""
    if maximum == value:
        return 0.0
    exponent = math.frexp(maximum or value)[1]
    return (maximum - value) / math.ldexp(1.0, exponent - digits)

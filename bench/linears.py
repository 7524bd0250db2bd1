"""How near linear layers, and the attention of one new token, come to the speed of memory, on the CPU.

The kernel as the engine calls it (`moe.kernels`) and torch in turn, on the shapes of a few models. Each call takes
other weights, or another sequence's keys and values, out of several times the cache's size, so they come from memory.
Figures are medians. Measures no disk, and nothing but the CPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import RESULTS, ROOT, BenchError, head, load_average, say, write_json

if TYPE_CHECKING:
    import torch

    from moe.kernels import Kernel

TOKENS = (1, 2, 4, 8, 16)
LENGTHS = (128, 2048, 8192)
SHAPES = {"OLMoE, q": (1024, 1024), "Llama 3B, q": (3072, 3072), "Llama 3B, up": (8192, 3072)}  # rows, columns
HEADS = {"OLMoE": (16, 16, 64), "Llama 3B": (24, 8, 128)}  # heads, of keys and values, their width
WORKING_SET = 512 << 20  # bytes used in turn


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def in_turn(ways: dict[str, Callable[[int], object]], count: int, rounds: int) -> dict[str, float]:
    """Median seconds of each way, called with another of `count` operands every time."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    at = 0
    for n in range(rounds + 2):  # the first two pay for pages and threads
        for name in list(ways)[:: 1 if n % 2 else -1]:
            at += 1
            took = timed(lambda way=ways[name], i=at % count: way(i))  # type: ignore[misc]
            if n >= 2:
                seconds[name].append(took)
    return {name: statistics.median(s) for name, s in seconds.items()}


def cell(what: str, dtype: str, size: int, nbytes: int, seconds: dict[str, float]) -> dict[str, Any]:
    rates = {name: nbytes / s for name, s in seconds.items()}
    told = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in rates.items())
    say(f"{what} {dtype} {size}: GB/s {told}")
    return {
        "what": what, "dtype": dtype, "size": size, "bytes": nbytes, "seconds": seconds, "bytes_per_s": rates,
        "kernel_over_torch": seconds["torch"] / seconds["kernel"],
    }  # fmt: skip


def product_ways(kernel: Kernel, weights: torch.Tensor, x: torch.Tensor) -> dict[str, Callable[[int], object]]:
    from torch.nn.functional import linear

    return {"torch": lambda i: linear(x, weights[i]), "kernel": lambda i: kernel.linear(x, weights[i])}


def attention_ways(kernel: Kernel, held: torch.Tensor, q: torch.Tensor) -> dict[str, Callable[[int], object]]:
    from torch.nn.functional import scaled_dot_product_attention

    shared, scale = q.size(1) != held.size(3), q.size(-1) ** -0.5
    return {
        "torch": lambda i: scaled_dot_product_attention(q, *held[i], enable_gqa=shared),
        "kernel": lambda i: kernel.attention(q, *held[i], scale),
    }


def measure(rounds: int, dtypes: list[str]) -> dict[str, Any]:
    """All cells: products by tokens, attention by tokens held."""
    import torch

    from moe import kernels
    from tiers import Arena

    kernel = kernels.load()
    if kernel is None:
        raise BenchError("there is no kernel here: no C compiler, or OFFLOAD_KERNELS=0")
    memory = Arena(WORKING_SET).tensor
    products, attention = [], []
    for name in dtypes:
        dtype = getattr(torch, name)
        flat = memory.view(dtype)
        flat.copy_(torch.randn(1 << 20).to(dtype).repeat(flat.numel() >> 20))
        for what, (rows, columns) in SHAPES.items():
            weights = flat[: flat.numel() // (rows * columns) * rows * columns].view(-1, rows, columns)
            for tokens in TOKENS:
                ways = product_ways(kernel, weights, torch.randn(tokens, columns).to(dtype))
                found = in_turn(ways, len(weights), rounds)
                products.append(cell(what, name, tokens, rows * columns * dtype.itemsize, found))
        for what, (heads, kv_heads, width) in HEADS.items():
            for length in LENGTHS:
                one = 2 * kv_heads * length * width
                held = flat[: flat.numel() // one * one].view(-1, 2, 1, kv_heads, length, width)
                ways = attention_ways(kernel, held, torch.randn(1, heads, 1, width).to(dtype))
                found = in_turn(ways, len(held), rounds)
                attention.append(cell(f"{what}, attention", name, length, one * dtype.itemsize, found))
    return {
        "threads": torch.get_num_threads(), "level": kernels.LEVELS[kernel.level], "rounds": rounds,
        "products": products, "attention": attention,
    }  # fmt: skip


def main() -> int:
    """Measure and write `bench/results/linears.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"])
    parser.add_argument("--out", type=Path, default=RESULTS / "linears.json")
    args = parser.parse_args()
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))  # this checkout's packages, installed or not
    import offload

    version = offload.__version__  # before torch is loaded, offload says how its threads wait
    load = load_average()
    try:
        found = measure(args.rounds, args.dtypes)
    except BenchError as e:
        say(f"error: {e}")
        return 1
    write_json(args.out, {
        **head("linears", load), "offload": version, **found,
    })  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())

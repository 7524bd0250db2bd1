"""How near the experts of a Mixture-of-Experts layer come to the speed of memory, on the CPU, for a few tokens.

One layer's experts as the engine computes them (`moe.LayerExperts` over blocks in memory: leases, routing, sums and
all), by the kernel and by torch, on two models' shapes. Each call takes another layer and another routing of several
times the cache's size, so weights come from memory. The floor is their bytes over the bandwidth at which torch reads
memory with all threads, measured between the calls. Every path is run in turn within each round; figures are medians.

Then whole decode steps of the OLMoE-shaped checkpoint (`checkpoints.py`) with all weights in memory, tokens with and
without the kernel in turn.

`--kt FILE` adds KTransformers' bfloat16 kernel: an extension module out of kt-kernel's wheel (it repacks weights into
a copy of its own when it loads them, and is given them once). It comes last and by itself: its threads spin while they
wait, which would slow the others down. Measures no disk, and nothing but the CPU.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import checkpoints
from common import ROOT, BenchError, flags, head, load_average, say, write_json

if TYPE_CHECKING:
    import torch

TOKENS = (1, 2, 4, 8, 16)
WORKING_SET = 1 << 30  # bytes of weights used in turn, at least
READ = 256 << 20  # bytes read for one measurement of the bandwidth


@dataclass(frozen=True)
class Shape:
    """A layer of experts."""

    name: str
    hidden: int
    inner: int
    experts: int
    top_k: int

    def expert_bytes(self, itemsize: int) -> int:
        return 3 * self.hidden * self.inner * itemsize


SHAPES = (Shape("OLMoE", 1024, 1024, 64, 8), Shape("Qwen3-30B-A3B", 2048, 768, 128, 8))


class Gated:
    """What `LayerExperts` asks of an experts module."""

    has_gate, has_bias, is_transposed = True, False, False

    def __init__(self, experts: int) -> None:
        import torch

        self.num_experts = experts
        self.act_fn = torch.nn.functional.silu

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up


class Layers:
    """Layers of random experts in an arena, resident as in the engine."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        import torch

        from moe import LayerExperts, kernels
        from tiers import Arena, Block, Residency, TransferQueue
        from tiers.block import page_up

        self.shape, self.dtype = shape, dtype
        size = page_up(shape.expert_bytes(dtype.itemsize))
        self.count = -(-WORKING_SET // (size * shape.experts))
        self.arena = Arena(size * shape.experts * self.count)
        self.queue = TransferQueue(_Nothing(), 1)
        residency = Residency(self.arena, self.queue)
        rows = shape.hidden * 2 * shape.inner

        def views(lease: Any) -> dict[str, torch.Tensor]:
            flat = lease.slot.tensor[: shape.expert_bytes(dtype.itemsize)].view(dtype)
            return {
                "gate_up_proj": flat[:rows].view(2 * shape.inner, shape.hidden),
                "down_proj": flat[rows:].view(shape.hidden, shape.inner),
            }

        self.views, self.residency = views, residency
        kernel = kernels.load()
        if kernel is None:
            raise BenchError("the kernel cannot be built here: is there a C compiler?")
        self.layers = []
        pattern = torch.randn(1 << 20, generator=torch.Generator().manual_seed(1)).mul_(0.02).to(dtype)
        for n in range(self.count):
            keys = [f"{n}.{e}" for e in range(shape.experts)]
            for key in keys:
                residency.pin(Block(key, size, size, ())).wait()
            self.layers.append(LayerExperts(residency, keys, views, lookahead=8, kernel=kernel))
        whole = self.arena.tensor.view(dtype)
        for at in range(0, whole.numel(), pattern.numel()):
            part = whole[at : at + pattern.numel()]
            part.copy_(pattern[: part.numel()])
        self.kernel = kernel

    def close(self) -> None:
        self.queue.close()


class _Nothing:
    """A reader of blocks that have no bytes on disk."""

    def split(self, segment: Any, slot: Any) -> list[Any]:
        return []

    def read(self, piece: Any, slot: Any) -> int:
        return 0

    def verify(self, file: int) -> None:
        return None

    def close(self) -> None:
        return None


class KTransformers:
    """One layer in kt-kernel's bfloat16 mixture of experts; `call` computes it. The weights are a copy."""

    def __init__(self, module: Any, pool: Any, layers: Layers, n: int, most: int) -> None:
        import torch

        shape = layers.shape
        self._pool = pool
        none = torch.zeros(shape.experts, dtype=torch.bool)
        config = module.moe.MOEConfig(shape.experts, shape.top_k, shape.hidden, shape.inner, none.data_ptr())
        config.layer_idx, config.pool, config.max_len = n, pool.backend_, max(most, 64)
        pointers: list[list[int]] = [[], [], []]
        for e in range(shape.experts):
            with layers.residency.acquire(f"{n}.{e}") as lease:
                v = layers.views(lease)
                gate_up = v["gate_up_proj"]
                for at, t in enumerate((gate_up[: shape.inner], gate_up[shape.inner :], v["down_proj"])):
                    pointers[at].append(t.data_ptr())
        config.gate_projs, config.up_projs, config.down_projs = ([p] for p in pointers)
        config.gate_scales, config.up_scales, config.down_scales = ([[0] * shape.experts] for _ in range(3))
        self._moe = module.moe.AMXBF16_MOE(config)
        same = torch.arange(shape.experts, dtype=torch.int64)
        pool.submit(self._moe.load_weights_task(same.data_ptr()))
        pool.sync()
        self._kept = (none, same)

    def call(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        import torch

        out = torch.empty_like(x)
        size = torch.tensor([x.size(0)], dtype=torch.int32)
        task = self._moe.forward_task(
            size.data_ptr(), index.size(1), index.data_ptr(), weights.data_ptr(), x.data_ptr(), out.data_ptr(), False
        )
        self._pool.submit(task)
        self._pool.sync()
        return out


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def one(
    layers: Layers, tokens: int, rounds: int, source: torch.Tensor, others: Sequence[KTransformers] = ()
) -> dict[str, Any]:
    """Torch and the kernel on `tokens` tokens, in turn; or, if given, KTransformers alone."""
    import torch

    shape, dtype, module = layers.shape, layers.dtype, Gated(layers.shape.experts)
    g = torch.Generator().manual_seed(tokens)
    seconds: dict[str, list[float]] = {}
    shares: dict[str, list[float]] = {}
    bandwidth, moved = [], []
    inside = [0.0]
    run = layers.kernel.run

    def clocked(*args: Any, **options: Any) -> None:
        inside[0] += timed(lambda: run(*args, **options))

    layers.kernel.run = clocked  # type: ignore[method-assign]
    worst = 0.0
    for n in range(rounds + 2):  # the first two pay for pages and threads
        layer = layers.layers[n % layers.count]
        x = torch.randn(tokens, shape.hidden, generator=g).to(dtype)
        scores = torch.rand(tokens, shape.experts, generator=g)
        weights, index = scores.topk(shape.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        nbytes = index.unique().numel() * shape.expert_bytes(dtype.itemsize)
        took: dict[str, float] = {}
        outs: dict[str, torch.Tensor] = {}

        def path(name: str, layer: Any = layer, x: torch.Tensor = x, index: torch.Tensor = index,
                 weights: torch.Tensor = weights, n: int = n) -> torch.Tensor:  # fmt: skip
            if name == "kt-kernel":
                return others[n % len(others)].call(x, index, weights)
            layer.kernel = layers.kernel if name == "kernel" else None
            out: torch.Tensor = layer.forward(module, x, index, weights)
            return out

        names = ["kt-kernel"] if others else ["torch", "kernel"]
        for name in names[:: 1 if n % 4 < 2 else -1]:  # each of them first as often, on every layer
            # the same weights a moment later would come from the cache
            speed = READ / timed(source.sum)
            inside[0] = 0.0
            began = time.perf_counter()
            outs[name] = path(name)
            took[name] = time.perf_counter() - began
            if name == "kernel":
                took["call"] = inside[0]
            if n >= 2:
                bandwidth.append(speed)
        layer.kernel = layers.kernel
        if n < 2:
            continue
        moved.append(nbytes)
        for name, s in took.items():
            seconds.setdefault(name, []).append(s)
            shares.setdefault(name, []).append(nbytes / s)
        want = outs["torch"] if "torch" in outs else path("torch")
        worst = max(worst, *(float((o - want).abs().max() / want.abs().max()) for o in outs.values()))
    layers.kernel.run = run  # type: ignore[method-assign]
    speed = statistics.median(bandwidth)
    ratio = None
    if "kernel" in seconds:
        ratio = statistics.median(t / k for t, k in zip(seconds["torch"], seconds["kernel"], strict=True))
    rates = {name: statistics.median(s) for name, s in shares.items()}
    return {
        "shape": shape.name, "dtype": str(dtype).removeprefix("torch."), "tokens": tokens, "rounds": rounds,
        "bytes": statistics.median(moved), "bandwidth": speed,
        "seconds": {name: statistics.median(s) for name, s in seconds.items()},
        "weight_bytes_per_s": rates,
        "of_bandwidth": {name: rate / speed for name, rate in rates.items()},
        "kernel_over_torch": ratio,
        "largest_difference": worst,
    }  # fmt: skip


def shown(cell: dict[str, Any]) -> dict[str, Any]:
    """The cell, told on stderr."""
    rates = ", ".join(f"{k} {v / 1e9:.1f}" for k, v in cell["weight_bytes_per_s"].items())
    ratio = f"; kernel {cell['kernel_over_torch']:.2f} times torch" if cell["kernel_over_torch"] else ""
    what = f"{cell['shape']} {cell['dtype']} {cell['tokens']}"
    say(f"{what}: GB/s {rates}, memory {cell['bandwidth'] / 1e9:.1f}{ratio}; differ {cell['largest_difference']:.1e}")
    return cell


def whole_model(folder: Path, tokens: int) -> dict[str, Any]:
    """Decode steps with and without the kernel, in turn, everything in memory."""
    import torch

    import offload
    from offload import hf

    with offload.load(folder, context=512) as model:
        layers = [
            m.__dict__["offload_experts"] for m in model.hf.modules() if hf.streamable_experts(m)
        ]  # what the engine attached
        kernel = layers[0].kernel
        cache = model.engine.new_cache(512)
        g = torch.Generator().manual_seed(7)
        vocab = model.hf.config.vocab_size

        def step(n: int) -> float:
            ids = torch.randint(3, vocab, (1, n), generator=g)
            return timed(
                lambda: model.hf(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            )

        step(16)
        seconds: dict[str, list[float]] = {"kernel": [], "torch": []}
        for n in range(2 * tokens + 4):
            name = ("kernel", "torch")[n % 2]
            for layer in layers:
                layer.kernel = kernel if name == "kernel" else None
            took = step(1)
            if n >= 4:
                seconds[name].append(took)
        medians = {name: statistics.median(s) for name, s in seconds.items()}
        return {
            "model": folder.name, "plan": model.plan.summary(), "tokens": tokens, "step_s": medians,
            "tokens_per_s": {name: 1 / s for name, s in medians.items()},
            "ratio": statistics.median(t / k for t, k in zip(seconds["torch"], seconds["kernel"], strict=True)),
        }  # fmt: skip


def load_kt(path: Path) -> Any:
    """The extension module."""
    spec = importlib.util.spec_from_file_location("kt_kernel_ext", path)
    if spec is None or spec.loader is None:
        raise BenchError(f"--kt {path}: not an extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kt_pool(module: Any, threads: int) -> Any:
    """Threads of KTransformers."""
    config = module.WorkerPoolConfig()
    config.subpool_count, config.subpool_numa_map, config.subpool_thread_count = 1, [0], [threads]
    return module.CPUInfer(config)


def main() -> int:
    """Measure and write `bench/results/experts.json`."""
    parser = flags(__doc__, "experts", rounds=25)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), help="tokens per call")
    parser.add_argument("--shapes", nargs="+", choices=[s.name for s in SHAPES], default=[s.name for s in SHAPES])
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--kt", type=Path, help="an extension module of kt-kernel (_kt_kernel_ext_….so)")
    parser.add_argument("--model", default="olmoe", choices=[*sorted(checkpoints.SPECS), "none"])
    parser.add_argument("--steps", type=int, default=40, help="decode steps of the whole model, with and without each")
    args = parser.parse_args()
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))  # this checkout's packages, installed or not
    import offload

    version = offload.__version__  # before torch is loaded, offload says how its threads wait
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    load = load_average()
    cells = []
    try:
        source = torch.zeros(READ // 8, dtype=torch.int64)
        shapes = [s for s in SHAPES if s.name in args.shapes]
        for shape in shapes:
            for name in args.dtypes:
                layers = Layers(shape, getattr(torch, name))
                cells.extend(shown(one(layers, tokens, args.rounds, source)) for tokens in args.tokens)
                layers.close()
                del layers
        level = None
        from moe import kernels

        if (kernel := kernels.load()) is not None:
            level = kernels.LEVELS[kernel.level]
        whole = None
        if args.model != "none":
            whole = whole_model(checkpoints.make(checkpoints.SPECS[args.model], args.scratch), args.steps)
            say(json.dumps(whole))
        kt_cells = []
        if args.kt:
            module = load_kt(args.kt)
            for shape in shapes:
                layers = Layers(shape, torch.bfloat16)
                tried = []
                for threads in sorted({1, torch.get_num_threads()}):  # its threads cannot share a core
                    pool = kt_pool(module, threads)
                    others = [KTransformers(module, pool, layers, n, max(args.tokens)) for n in range(layers.count)]
                    tried.append([shown(one(layers, tokens, args.rounds, source, others)) for tokens in args.tokens])
                    for cell in tried[-1]:
                        cell["threads"] = threads
                    del others, pool
                best = [max(same, key=lambda c: c["of_bandwidth"]["kt-kernel"]) for same in zip(*tried, strict=True)]
                kt_cells.extend(best)
                layers.close()
                del layers
    except BenchError as e:
        say(f"error: {e}")
        return 1
    write_json(args.out, {
        **head("experts", load),
        "load_average_after": load_average(), "threads": torch.get_num_threads(), "level": level, "offload": version,
        "kt_kernel": str(args.kt.name) if args.kt else None, "cells": cells, "kt_cells": kt_cells, "whole_model": whole,
    })  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())

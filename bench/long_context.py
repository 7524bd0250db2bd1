"""What a long context costs: milliseconds per token at 4K, 16K and 32K tokens, an eighth of keys and values in memory.

Cells, for every context and device, each in a process of its own, in turn, round after round:

- exact: an eighth of the KV stays in memory, the rest is read from disk for every token;
- sparse: the same, and each token attends to the part of the context that `--budget` allows;
- resident: all of the KV in memory;
- sparse-resident: all in memory, attended to sparsely: what sparse attention would take if reading took no time;
- transformers: its own model and `DynamicCache`, all in memory (CPU only).

KV are not computed but written into the cache: seeded random numbers, keys scaled so that attention is peaked (the
result says so). Then every cell is fed the same tokens, one at a time; their logits are compared with `resident`'s. As
keys are random, each token attends to other places than the one before: for sparse attention, which keeps in memory
what was attended to last, that is the worst case.

The floor of `exact` is what does not fit the eighth over the disk's bandwidth (read past the page cache from the very
file that KV was spilled to, in the same process, just before and just after), or the time of `resident`, whichever is
larger; that of `sparse` is what it did read, or `sparse-resident`. `--device emulated` computes on the same cores; its
weights lie in a RAM arena that stands for device memory. Prefill is not measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import checkpoints
import disk
from common import (
    BenchError,
    flags,
    head,
    in_process,
    load_average,
    medians,
    run_script,
    say,
    vm_kb,
    worker_env,
    write_json,
)
from decode import SEED, stream
from equality import ulps_below

if TYPE_CHECKING:
    import torch

MODEL = "llama-long"
SCRIPT = Path(__file__)
CONTEXTS = (4096, 16384, 32768)
DEVICES = ("cpu", "emulated")
CELLS = ("resident", "exact", "sparse-resident", "sparse", "transformers")
SHARE = 0.125  # of the KV that stays in memory
BUDGET = "6.25%"
POLICY = "bounds"
WARM, STEPS = 2, 8
PIECE = 256  # tokens written at a time
KEY_SCALE = 4.0  # scores then have a deviation of about 3: a few dozen tokens of 32K get most of the attention
LEAST_COSINE = 0.998  # of logits over tiers and resident: bf16 sums in another order, nothing else
DISK_SECONDS = 0.8  # of each measurement of the disk
OVERHEAD = 900 << 20  # the process itself and temporaries


def pieces(shape: tuple[int, int, int], context: int, seed: int = SEED) -> Iterator[list[Any]]:
    """Keys and values of shape (layers, kv heads, D): for each piece of the context a pair [kv heads, n, D] per layer.

    One random piece per layer, of which every further one is a copy with other channels' signs turned: as good as new
    for a product with a query, at the speed of memory. The same for the same seed.
    """
    import torch

    layers, heads, width = shape
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(layers, 2, heads, PIECE, width, generator=g)
    base[:, 0] *= KEY_SCALE
    base = base.bfloat16()
    for at in range(0, context, PIECE):
        signs = torch.randint(0, 2, (layers, 2, 1, 1, width), generator=g).mul_(2).sub_(1).bfloat16()
        piece = base * signs
        n = min(PIECE, context - at)
        yield [(piece[i, 0, :, :n], piece[i, 1, :, :n]) for i in range(layers)]


def fed(step: Any, tokens: Sequence[int]) -> tuple[list[float], list[Any]]:
    """(seconds of each step, logits [vocab] of each)."""
    import torch

    seconds, rows = [], []
    for token in tokens:
        began = time.perf_counter()
        with torch.inference_mode():
            row = step(torch.tensor([[token]]))
            int(row.argmax())
        seconds.append(time.perf_counter() - began)
        rows.append(row.float().clone())
    return seconds, rows


def kv_shape(config: dict[str, Any]) -> tuple[int, int, int]:
    """(layers, kv heads, D)."""
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return config["num_hidden_layers"], config["num_key_value_heads"], head


def token_nbytes(config: dict[str, Any]) -> int:
    """Bytes of KV of one token, bf16."""
    layers, heads, width = kv_shape(config)
    return layers * heads * width * 2 * 2


def worker(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """One cell, in this process."""
    import numpy as np
    import torch

    config = json.loads((folder / "config.json").read_text())
    tokens = stream(config["vocab_size"], WARM + given["steps"], SEED)
    run = _transformers if given["cell"] == "transformers" else _ours
    with torch.inference_mode():
        figures, seconds, rows = run(folder, config, given, tokens)
    if given["logits"]:
        np.save(given["logits"], torch.stack(rows).numpy())
    measured = seconds[WARM:]
    return {
        "ms": 1e3 * statistics.median(measured),
        "worst_ms": 1e3 * max(measured),
        **figures,
        "peak_rss_bytes": vm_kb("VmHWM"),
    }


Ran = tuple[dict[str, Any], list[float], list[Any]]


def _ours(folder: Path, config: dict[str, Any], given: dict[str, Any], tokens: list[int]) -> Ran:
    import offload
    from kvstore import TieredCache, states

    context, cell, steps = given["context"], given["cell"], given["steps"]
    capacity = context + len(tokens)
    size = sum(f.stat().st_size for f in checkpoints.shard_files(folder))
    kept = token_nbytes(config) * capacity
    options: dict[str, Any] = {"context": capacity, "device": given["device"], "spill_dir": given["spill"]}
    if cell in ("exact", "sparse"):
        options["kv_resident"] = f"{100 * SHARE:g}%"
        kept = int(SHARE * kept) + (64 << 20)
    if cell.startswith("sparse"):
        options |= {"kv_budget": given["budget"], "kv_policy": given["policy"]}
    ram = int(1.15 * size) + kept + OVERHEAD
    if given["device"] == "emulated":
        options["vram"] = int(1.15 * size) + kept + (300 << 20)
    with offload.load(folder, ram=ram, **options) as model:
        engine = model.engine
        cache = engine.new_cache(capacity)
        began = time.perf_counter()
        for piece in pieces(kv_shape(config), context):
            states.write(cache, tuple(piece), engine.device.torch_device)
        fill_s = time.perf_counter() - began
        spilled = _spill_file(engine) if cell in ("exact", "sparse") else None
        bandwidth = [_bandwidth(spilled)] if spilled is not None else []

        def step(ids: torch.Tensor) -> torch.Tensor:
            out = model.hf(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            row: torch.Tensor = out.logits[0, -1]
            return row

        seconds, rows = fed(step, tokens)
        if spilled is not None:
            bandwidth.append(_bandwidth(spilled))
        done = engine.steps[-steps:]
        read, busy = sum(s.kv_bytes_read for s in done), sum(s.read_busy_s for s in done)
        tiered = cache if isinstance(cache, TieredCache) else None
        sparse = [r.sparse for y in tiered.tiered for r in y.rows if r.sparse is not None] if tiered is not None else []
        if tiered is not None:
            store = tiered.store
            kept, chunk = store.slots * store.slot_nbytes, store.tokens
            tiered.close()
        figures = {
            "kv_read_per_token": read / steps,
            "weights_read_per_token": sum(s.bytes_read for s in done) / steps - read / steps,
            "disk_rate": read / busy if busy else None,
            "stall_share": sum(s.stall_s for s in done) / sum(s.seconds for s in done),
            "kept_bytes": kept,
            "chunk_tokens": chunk if tiered is not None else None,
            "attended_share": sum(s.attended for s in sparse) / sum(s.held for s in sparse) if sparse else None,
            "abstracts_bytes": sum(s.view.abstracts.nbytes for s in sparse if s.view.abstracts is not None),
            "bandwidth": statistics.mean(bandwidth) if bandwidth else None,
            "bandwidth_after": bandwidth[-1] if bandwidth else None,
            "fill_s": fill_s,
            "ram": ram,
        }
    return figures, seconds, rows


def _spill_file(engine: Any) -> Path:
    """The unnamed file that chunks are in."""
    return Path(f"/proc/self/fd/{engine.kv._disk.file.fd}")


def _bandwidth(file: Path) -> float:
    return disk.measure([file], seconds=DISK_SECONDS).sequential


def _transformers(folder: Path, config: dict[str, Any], given: dict[str, Any], tokens: list[int]) -> Ran:
    import torch
    from decode import Transformers

    engine = Transformers(folder)
    began = time.perf_counter()
    held = list(pieces(kv_shape(config), given["context"]))
    for i in range(len(held[0])):  # its cache copies all it holds whenever it is given more
        engine.cache.update(*(torch.cat([p[i][j] for p in held], 1)[None] for j in (0, 1)), i)
        for p in held:
            p[i] = None
    fill_s = time.perf_counter() - began
    del held
    seconds, rows = fed(engine.step, tokens)
    unknown = ("disk_rate", "abstracts_bytes", "chunk_tokens", "attended_share", "bandwidth", "bandwidth_after", "ram")
    kept = token_nbytes(config) * (given["context"] + len(tokens))
    return (
        {"kv_read_per_token": 0, "weights_read_per_token": 0, "stall_share": 0.0, "kept_bytes": kept, "fill_s": fill_s,
         **dict.fromkeys(unknown)},
        seconds, rows,
    )  # fmt: skip


def transformers_offloaded(folder: Path) -> str:
    """Why transformers' own offloaded cache is not among the cells, or that it works here."""
    import torch
    from decode import Transformers
    from transformers.cache_utils import DynamicCache

    try:
        engine = Transformers(folder)
        engine.cache = DynamicCache(config=engine.model.config, offloading=True)
        for token in (3, 4, 5):
            with torch.inference_mode():
                engine.step(torch.tensor([[token]]))
    except Exception as e:
        return f"does not run on a CPU: {type(e).__name__}: {' '.join(str(e).split())[:160]}"
    return "runs on a CPU, but keeps all in the same memory there: nothing to measure"


def likeness(rows: Any, reference: Any) -> dict[str, Any]:
    """Logits [steps, vocab] against others: least cosine, choices that are equal, and how far the others' maximum is
    above where they are not (in bf16's last place)."""
    import numpy as np

    a, b = (x.astype(np.float64) for x in (rows, reference))
    cosine = (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
    mine, theirs = a.argmax(1), b.argmax(1)
    ulps = [ulps_below(float(row.max()), float(row[m])) for row, m in zip(b, mine, strict=True)]
    return {
        "least_cosine": float(cosine.min()),
        "equal": int((mine == theirs).sum()),
        "positions": len(mine),
        "worst_ulps": max(ulps),
    }


def floors(cells: dict[str, dict[str, Any]], kv_bytes: int) -> dict[str, dict[str, Any]]:
    """The least a token can take in the cells that read, and the share of it that was reached."""
    out = {}
    for name, still in (("exact", "resident"), ("sparse", "sparse-resident")):
        cell = cells.get(name)
        if cell is None or still not in cells:
            continue
        must = max(0, kv_bytes - cell["kept_bytes"]) if name == "exact" else cell["kv_read_per_token"]
        read_ms = 1e3 * must / cell["bandwidth"]
        compute_ms = cells[still]["ms"]
        floor = max(read_ms, compute_ms)
        out[name] = {
            "bytes_per_token": must, "read_ms": read_ms, "compute_ms": compute_ms, "floor_ms": floor,
            "bound": "disk" if read_ms > compute_ms else "compute", "share": floor / cell["ms"],
        }  # fmt: skip
    return out


def run(args: argparse.Namespace, folder: Path, tmp: Path) -> list[dict[str, Any]]:
    """All cells of all contexts and devices."""
    import numpy as np

    # threads that spin while they wait cost factors on a busy machine; offload has them sleep, so may all cells
    env = {**worker_env(), "OFFLOAD_CACHE": str(tmp / "cache"), "OMP_WAIT_POLICY": "passive"}
    config = json.loads((folder / "config.json").read_text())
    rows = []
    for context in args.contexts:
        todo = [(d, c) for d in args.devices for c in args.cells if c != "transformers" or d == args.devices[0]]
        runs: dict[tuple[str, str], list[dict[str, Any]]] = {key: [] for key in todo}
        alike: dict[tuple[str, str], dict[str, Any]] = {}
        for n in range(args.rounds):
            for device, cell in todo if n % 2 == 0 else reversed(todo):
                logits = tmp / f"{device}-{cell}.npy"
                given = {
                    "context": context, "cell": cell, "device": device, "steps": args.steps, "budget": args.budget,
                    "policy": args.policy, "spill": str(tmp / "spill"), "logits": str(logits) if n == 0 else None,
                }  # fmt: skip
                runs[device, cell].append(in_process(SCRIPT, env, folder, json.dumps(given)))
                say(f"{context} {device} {cell}, round {n + 1}: {runs[device, cell][-1]['ms']:.0f} ms")
            if n == 0:
                reference = np.load(tmp / f"{args.devices[0]}-resident.npy")
                alike = {key: likeness(np.load(tmp / f"{key[0]}-{key[1]}.npy"), reference) for key in todo}
        for device in args.devices:
            found = {
                c: {**medians(r), "runs_ms": [x["ms"] for x in r], "likeness": alike[d, c]}
                for (d, c), r in runs.items() if d == device
            }  # fmt: skip
            wrong = found.get("exact", {"likeness": {"least_cosine": 1.0}})["likeness"]["least_cosine"]
            if wrong < LEAST_COSINE:
                raise BenchError(f"{context} tokens, {device}: exact attention over tiers differs (cosine {wrong:.4f})")
            kv_bytes = token_nbytes(config) * (context + WARM + args.steps // 2)
            speed = {
                f"sparse_over_{c}": found[c]["ms"] / found["sparse"]["ms"]
                for c in ("exact", "resident") if "sparse" in found and c in found
            }  # fmt: skip
            rows.append({
                "context": context, "device": device, "kv_bytes": kv_bytes, "cells": found,
                "floors": floors(found, kv_bytes), **speed,
            })  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = flags(__doc__, "long-context", scratch="checkpoints; KV is spilled there too", rounds=2, worker="+")
    parser.add_argument("--model", default=MODEL, choices=sorted(checkpoints.SPECS))
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--devices", nargs="+", default=list(DEVICES), choices=DEVICES)
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=CELLS, help="resident is always among them")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"tokens measured, after {WARM} that are not")
    parser.add_argument("--budget", default=BUDGET)
    parser.add_argument("--policy", default=POLICY)
    args = parser.parse_args(argv)
    if args.worker is not None:
        if args.worker[0] == "offloaded":
            print(json.dumps({"told": transformers_offloaded(Path(args.worker[1]))}))
        else:
            print(json.dumps(worker(Path(args.worker[0]), json.loads(args.worker[1]))))
        return 0
    args.cells = [c for c in CELLS if c in {*args.cells, "resident"}]
    load = load_average()
    spec = checkpoints.SPECS[args.model]
    folder = checkpoints.make(spec, args.scratch)
    # beside the checkpoint: the disk that is meant, and never memory
    with tempfile.TemporaryDirectory(prefix="long-context-", dir=args.scratch) as tmp:
        rows = run(args, folder, Path(tmp))
    told = in_process(SCRIPT, worker_env(), "offloaded", folder)["told"] if "transformers" in args.cells else None
    write_json(args.out, {
        **head("long-context", load), "load_average_after": load_average(), "model": args.model,
        "config": spec.config, "weight_bytes": spec.weight_bytes, "kv_bytes_per_token": token_nbytes(spec.config),
        "kv": f"random, written into the cache and not computed; keys scaled by {KEY_SCALE:g}", "share": SHARE,
        "budget": args.budget, "policy": args.policy, "rounds": args.rounds, "warm": WARM, "steps": args.steps,
        "transformers_offloaded_cache": told, "rows": rows,
    })  # fmt: skip
    return 0


if __name__ == "__main__":
    run_script(main)

"""One measured process: loads a model with one engine and decodes a fixed stream of random tokens, batch 1.

The tokens fed are given (seeded), not the engine's own choices: every engine does exactly the same work, and its
choice at each position can be compared with another's. Prints one JSON object: seconds to load and to the first
token, decode tokens per second (without the first), every step's seconds, the chosen tokens, peak memory (VmHWM), and
for `ours` what each step read and waited for.

Meant to be run by `compare.py` under `limit.py`. It measures neither sampling, tokenizing nor `generate()`.

Engines: `ours`; `accelerate` (transformers with max_memory and a disk offload folder); `transformers-auto`
(device_map="auto", nothing set by hand); `resident` (transformers, all weights in memory: the oracle).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import warnings
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from common import ROOT, BenchError, parse_size, say, vm_kb
from limit import release_held

if TYPE_CHECKING:
    import torch

SEED = 7  # of the stream of tokens
ENGINES = ("ours", "accelerate", "transformers-auto", "resident")


class Engine(Protocol):
    """A loaded model and its cache."""

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Extend the sequence by `tokens` [1, q]; the logits [vocab] of the last."""
        ...

    def report(self) -> dict[str, Any]:
        """What only this engine can tell, once all steps are done."""
        ...


class Ours:
    """offload, through its public API and the transformers model it hands out."""

    def __init__(self, folder: Path, ram: int | None, capacity: int) -> None:
        import offload

        self.model = offload.load(folder, ram=ram, context=capacity)
        self.cache = self.model.engine.new_cache(capacity)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        out = self.model.hf(input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        logits: torch.Tensor = out.logits[0, -1]
        return logits

    def report(self) -> dict[str, Any]:
        engine = self.model.engine
        plan = {k: v for k, v in asdict(engine.plan).items() if isinstance(v, (int, float)) or k == "stream"}
        steps = [asdict(s) for s in engine.steps]
        done = {"steps": steps, "plan": plan, "summary": engine.plan.summary()}
        self.model.close()
        return done


class Transformers:
    """transformers' own loading, with whatever `device_map` options it is given."""

    def __init__(self, folder: Path, routing: bool = False, **options: Any) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.cache_utils import DynamicCache

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options).eval()
        self.cache = DynamicCache(config=self.model.config)
        self.routes: list[list[int]] = []  # experts chosen, one list per layer and pass
        if routing:
            for module in self.model.modules():
                if type(module).__name__.endswith("Router"):
                    module.register_forward_hook(self._note)

    def _note(self, module: Any, args: Any, output: Any) -> None:
        index = output[-1]
        assert not index.is_floating_point()
        self.routes.append(sorted(set(index.flatten().tolist())))

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        out = self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        logits: torch.Tensor = out.logits[0, -1]
        return logits

    def report(self) -> dict[str, Any]:
        places = getattr(self.model, "hf_device_map", None)
        # modules, not bytes: "model.layers.5" counts once
        done: dict[str, Any] = {"device_map": dict(Counter(map(str, places.values())))} if places else {}
        if self.routes:
            done["routes"] = self.routes
        return done


def stream(vocab: int, count: int, seed: int) -> list[int]:
    """The tokens fed: the same for every engine; a shorter stream is the front of a longer one."""
    rng = random.Random(seed)
    return [rng.randrange(3, vocab) for _ in range(count)]


def largest_layer(folder: Path) -> int:
    """Bytes of the largest decoder layer in the checkpoint (weights named `….layers.N.…`)."""
    layers: Counter[str] = Counter()
    for shard in folder.glob("*.safetensors"):
        with shard.open("rb") as f:
            header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        for name, entry in header.items():
            head, layer, rest = name.partition(".layers.")
            if layer:
                layers[head + rest.split(".")[0]] += entry["data_offsets"][1] - entry["data_offsets"][0]
    return max(layers.values(), default=0)


def make(args: argparse.Namespace, capacity: int, base_rss: int) -> tuple[Engine, dict[str, Any]]:
    """The engine asked for, and the settings it was given."""
    if args.engine == "ours":
        return Ours(args.folder, args.ram, capacity), {"ram": args.ram, "context": capacity}
    if args.engine == "resident":
        return Transformers(args.folder, routing=args.routing), {}
    args.offload_folder.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"device_map": "auto", "offload_folder": str(args.offload_folder)}
    settings: dict[str, Any] = {"device_map": "auto"}
    if args.engine == "accelerate":
        most = args.max_memory
        if most is None:
            if args.ram is None:
                raise BenchError("accelerate needs --max-memory, or --ram to derive it from")
            # accelerate counts the weights only; a layer more is what it holds while it computes one from disk
            most = args.ram - base_rss - largest_layer(args.folder)
        options["max_memory"] = {"cpu": most}
        settings["max_memory"] = {"cpu": most}
    return Transformers(args.folder, **options), settings


def decode(engine: Engine, tokens: list[int], prompt: int, max_seconds: float | None) -> tuple[dict[str, Any], Any]:
    """Feed `prompt` tokens at once, then one at a time; (timings and choices, logits [n, vocab])."""
    import torch

    times: list[float] = []
    argmax: list[int] = []
    rows: list[torch.Tensor] = []
    began = time.perf_counter()
    first = 0.0
    for at in (0, *range(prompt, len(tokens))):
        fed = tokens[:prompt] if at == 0 else tokens[at : at + 1]
        start = time.perf_counter()
        with torch.inference_mode():
            row = engine.step(torch.tensor([fed]))
            choice = int(row.argmax())
        times.append(time.perf_counter() - start)
        argmax.append(choice)
        rows.append(row.clone())
        if at == 0:
            first = time.time()
        if max_seconds is not None and len(times) > 2 and time.perf_counter() - began > max_seconds:
            break
    decode_s = sum(times[1:])
    figures = {
        "ttft_s": times[0],
        "decode_tokens_per_s": (len(times) - 1) / decode_s if decode_s else None,
        "step_s": [round(t, 5) for t in times],
        "new_tokens": len(times),
        "argmax": argmax,
        "first_token_at": first,
    }
    return figures, torch.stack(rows)


def run(args: argparse.Namespace) -> dict[str, Any]:
    import psutil

    born = psutil.Process().create_time()
    import torch
    import transformers

    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    imported, base_rss = time.time(), vm_kb("VmRSS")
    vocab = json.loads((args.folder / "config.json").read_text())["vocab_size"]
    tokens = stream(vocab, args.prompt_tokens + args.new_tokens - 1, args.seed)
    capacity = args.context or args.prompt_tokens + args.new_tokens
    if args.release:
        release_held(args.release)
    began = time.perf_counter()
    engine, settings = make(args, capacity, base_rss)
    load_s = time.perf_counter() - began
    figures, logits = decode(engine, tokens, args.prompt_tokens, args.max_seconds)
    if args.logits is not None:
        from safetensors.torch import save_file

        save_file({"logits": logits}, args.logits)
    first = figures.pop("first_token_at")
    return {
        "engine": args.engine,
        "settings": settings,
        "prompt_tokens": args.prompt_tokens,
        "import_s": imported - born,
        "load_s": load_s,
        "start_to_first_token_s": first - born,
        **figures,
        "base_rss_bytes": base_rss,
        "peak_rss_bytes": vm_kb("VmHWM"),
        "threads": torch.get_num_threads(),
        **engine.report(),
    }


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path, help="model folder")
    p.add_argument("--engine", choices=ENGINES, required=True)
    p.add_argument("--ram", type=parse_size, help="ours: the budget; accelerate: what max_memory is derived from")
    p.add_argument("--max-memory", type=parse_size, help="accelerate: weights kept in memory, most")
    p.add_argument("--offload-folder", type=Path, default=Path("offload-folder"), help="where accelerate may write")
    p.add_argument("--prompt-tokens", type=int, default=16)
    p.add_argument("--new-tokens", type=int, default=16, help="positions to choose at; the first is the prompt's")
    p.add_argument("--context", type=int, help="ours: tokens to reserve KV for (default: as many as are used)")
    p.add_argument("--seed", type=int, default=SEED)
    p.add_argument("--threads", type=int)
    p.add_argument("--max-seconds", type=float, help="stop decoding after so long (two steps are always done)")
    p.add_argument("--release", type=int, metavar="PID", help="end this process, which holds memory, before loading")
    p.add_argument("--logits", type=Path, help="save every position's logits to this .safetensors")
    p.add_argument("--routing", action="store_true", help="resident: record the experts each layer chose")
    return p


def main() -> int:
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))  # this checkout's packages, installed or not
    try:
        args = parser().parse_args()
        print(json.dumps(run(args)), flush=True)
    except BenchError as e:
        say(f"error: {e}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

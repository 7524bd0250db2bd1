"""Run the tests marked `gpu` and a short benchmark with `--vram` far below the model's size.

Needs torch, transformers, accelerate, safetensors, numpy, psutil and pytest only, and no installation: from a plain
checkout, `PYTHONPATH=. python bench/gpu_check.py`. Writes `bench/results/gpu-<device>.json`. Under nine minutes.

It does not compare with other engines, and its model is random.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
CAPS = ("8GiB", "12GiB", "24GiB")  # what commodity cards have


def tests() -> dict[str, Any]:
    """The `gpu` tests, in a process of their own; plugins of the full suite are not needed."""
    began = time.perf_counter()
    with tempfile.NamedTemporaryFile("w", suffix=".ini") as ini:
        ini.write(f"[pytest]\npythonpath = {ROOT} {ROOT / 'tests'}\nmarkers = gpu\n")
        ini.flush()
        command = [sys.executable, "-m", "pytest", "-q", "-c", ini.name, "-p", "no:cacheprovider", "-m", "gpu",
                   str(ROOT / "tests" / "test_gpu.py"), str(ROOT / "tests" / "test_device.py")]  # fmt: skip
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    tail = run.stdout.strip().splitlines()[-30:]
    print("\n".join(tail))
    return {"exit_code": run.returncode, "seconds": time.perf_counter() - began, "tail": tail}


def model(folder: Path, layers: int) -> int:
    """A bf16 Llama of 8B shape with fewer layers; returns its bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
                         num_key_value_heads=8, vocab_size=32000, max_position_embeddings=8192,
                         tie_word_embeddings=False)  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        m = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    m.save_pretrained(folder)
    n = sum(p.numel() * 2 for p in m.parameters())
    del m
    torch.cuda.empty_cache()
    return n


def decode(folder: Path, vram: str, tokens: int, trace: Path | None = None) -> dict[str, Any]:
    """One load and one generation."""
    import offload

    with offload.load(folder, device="cuda", vram=vram, context=512, trace=str(trace) if trace else None) as m:
        m.run([list(range(5, 37))], max_new_tokens=4, ignore_eos=True)
        r = m.run([list(range(5, 37))], max_new_tokens=tokens, ignore_eos=True)
        steps = m.engine.steps[1:]
        return {
            "vram": vram,
            "plan": m.plan.summary(),
            "load_s": m.engine.load_s,
            "ttft_s": r.stats.ttft_s,
            "decode_tokens_per_s": r.stats.decode_tokens_per_s,
            "bytes_up_per_token": statistics.mean(s.bytes_up for s in steps),
            "bytes_read_per_token": statistics.mean(s.bytes_read for s in steps),
            "link_busy_s_per_token": statistics.mean(s.link_busy_s for s in steps),
            "stall_s_per_token": statistics.mean(s.stall_s for s in steps),
            "seconds_per_token": statistics.median(s.seconds for s in steps),
        }


def main() -> int:
    """Run everything there is time for; returns 0 if the tests passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=40, help="decoder layers of the benchmark model (436 MB each)")
    parser.add_argument("--tokens", type=int, default=16)
    args = parser.parse_args()
    import torch
    import transformers

    if not torch.cuda.is_available():
        print("gpu-check: torch sees no CUDA device here; nothing was run", file=sys.stderr)
        return 1
    sys.path.insert(0, str(ROOT))
    import dataclasses

    from tiers import CudaDevice, probe

    name = torch.cuda.get_device_name(0)
    result: dict[str, Any] = {
        "kind": "gpu", "gpu": name, "machine": probe.machine(), "transformers": transformers.__version__,
        "cuda": torch.version.cuda, "date": time.strftime("%Y-%m-%d"), "tests": tests(),
    }  # fmt: skip
    device = CudaDevice()
    link = probe.link(device)
    result["link"] = dataclasses.asdict(link) if link is not None else None
    device.close()
    with tempfile.TemporaryDirectory() as folder:
        result["model_bytes"] = model(Path(folder), args.layers)
        result["decode"] = []
        for cap in CAPS:
            if torch.cuda.mem_get_info()[1] > int(cap.removesuffix("GiB")) << 30:
                row = decode(Path(folder), cap, args.tokens)
                if link is not None:
                    row["floor_s_per_token"] = row["bytes_up_per_token"] / link.up_bytes_per_s
                print(json.dumps(row))
                result["decode"].append(row)
    RESULTS.mkdir(parents=True, exist_ok=True)
    out = RESULTS / f"gpu-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {out.relative_to(ROOT)}")
    return 0 if result["tests"]["exit_code"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())

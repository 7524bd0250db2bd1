"""Run the tests marked `gpu` and a short benchmark with `--vram` far below the model's size.

Each row has the launches and host synchronisations of a decoded token, counted in steps of their own, because counting
slows them down; the largest cap is taken with CUDA graphs and without. Where kvikio can read files straight into device
memory its rate is measured too.

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
ENOUGH_S = 400  # no further load is begun after so long: one takes a minute or two on a slow disk


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


def decode(folder: Path, vram: str, tokens: int, graphs: bool = False) -> dict[str, Any]:
    """One load, a generation that is timed, and a short one whose launches are counted."""
    import offload

    prompt = [list(range(5, 37))]
    with offload.load(folder, device="cuda", vram=vram, context=512, graphs=graphs) as m:
        notes = m.run(prompt, max_new_tokens=4, ignore_eos=True).notes
        r = m.run(prompt, max_new_tokens=tokens, ignore_eos=True)
        steps = m.engine.steps[1:]
        row = {
            "vram": vram,
            "graphs": graphs,
            "plan": m.plan.summary(),
            "notes": notes,
            "load_s": m.engine.load_s,
            "ttft_s": r.stats.ttft_s,
            "decode_tokens_per_s": r.stats.decode_tokens_per_s,
            "bytes_up_per_token": statistics.mean(s.bytes_up for s in steps),
            "bytes_read_per_token": statistics.mean(s.bytes_read for s in steps),
            "link_busy_s_per_token": statistics.mean(s.link_busy_s for s in steps),
            "stall_s_per_token": statistics.mean(s.stall_s for s in steps),
            "seconds_per_token": statistics.median(s.seconds for s in steps),
            "token_ids": r.token_ids[0],
        }
        captures = m.engine.captures
        before = captures.replays if captures is not None else 0
        m.engine.count_launches = True
        m.run(prompt, max_new_tokens=5, ignore_eos=True)
        counted = [s for s in m.engine.steps[1:] if s.counted]
        if counted:
            row["launches_per_token"] = statistics.median(s.launches for s in counted)
            row["syncs_per_token"] = statistics.median(s.syncs for s in counted)
        if captures is not None:
            row["captured_modules"] = len(captures.modules)
            row["replays_per_token"] = (captures.replays - before) / max(1, len(counted))
        return row


def direct(folder: Path, device: Any) -> dict[str, Any]:
    """The rate of reading straight into device memory, or why that cannot be done."""
    from tiers import OffloadError, gds, probe

    largest = max(folder.glob("*.safetensors"), key=lambda p: p.stat().st_size)
    why = gds.unusable()
    if why is not None:
        return {"bytes_per_s": None, "why": why}
    try:
        disk = max(r.bytes_per_s for r in probe.disk(largest) if r.sequential)
        return {"bytes_per_s": probe.direct(largest, device), "disk_bytes_per_s": disk}
    except OffloadError as e:
        return {"bytes_per_s": None, "why": str(e)}


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

    began = time.monotonic()
    from tiers import CudaDevice, probe

    name = torch.cuda.get_device_name(0)
    result: dict[str, Any] = {
        "kind": "gpu", "gpu": name, "machine": probe.machine(), "transformers": transformers.__version__,
        "cuda": torch.version.cuda, "date": time.strftime("%Y-%m-%d"), "tests": tests(),
    }  # fmt: skip
    device = CudaDevice()
    link = probe.link(device)
    result["link"] = dataclasses.asdict(link) if link is not None else None
    with tempfile.TemporaryDirectory() as folder:
        result["model_bytes"] = model(Path(folder), args.layers)
        result["direct"] = direct(Path(folder), device)
        device.close()
        total = torch.cuda.mem_get_info()[1]
        caps = [cap for cap in CAPS if total > int(cap.removesuffix("GiB")) << 30]
        result["decode"] = []
        largest = [(cap, graphs) for cap in caps[-1:] for graphs in (False, True)]
        for cap, graphs in [*largest, *((cap, False) for cap in reversed(caps[:-1]))]:
            if time.monotonic() - began > ENOUGH_S:
                row: dict[str, Any] = {"vram": cap, "graphs": graphs, "skipped": "no time was left"}
            else:
                row = decode(Path(folder), cap, args.tokens, graphs)
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

"""Experts on a device and on the CPU beside it, against all on the device and all on the CPU: prefill and decode.

The checkpoint's experts all lie in RAM, a part of them on the device as well. `device`: what the device lacks is moved
to it, always (`expert_compute="device"`). `both`: `moe.schedule` decides for every layer who computes what. `cpu`:
there is no device. Every mode in a process of its own, in turn, round after round; each one's second request counts.

With `--device emulated` the device is a RAM arena behind a link of a set rate and computes on the same cores: what it
shows is what moving costs, not what a faster device would gain. `--device cuda` is the real thing.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import checkpoints
from common import RESULTS, flags, head, in_process, load_average, medians, run_script, say, worker_env, write_json

MODEL = "olmoe-2b"
MODES = ("cpu", "device", "both")
SCRIPT = Path(__file__)
PROMPT, NEW = 256, 48
OVERHEAD = 900 << 20  # the process itself, KV and temporaries


def worker(folder: Path, mode: str, device: str, link: str, share: float) -> dict[str, Any]:
    """One mode, in this process."""
    import offload

    size = sum(f.stat().st_size for f in checkpoints.shard_files(folder))
    options: dict[str, Any] = {"ram": int(1.15 * size) + OVERHEAD, "device": "cpu"}
    if mode != "cpu":
        options |= {"device": device, "vram": int(share * size) + (300 << 20), "expert_compute": mode}
        if device == "emulated":
            options["link"] = link
    with offload.load(folder, context=PROMPT + NEW + 8, **options) as model:
        prompt = [[(7 * j + 5) % 4000 for j in range(PROMPT)]]
        for _ in range(2):
            stats = model.run(prompt, max_new_tokens=NEW, ignore_eos=True).stats
        use = stats.experts_use
        return {
            "prefill_tokens_per_s": PROMPT / stats.ttft_s,
            "decode_tokens_per_s": stats.decode_tokens_per_s,
            "prediction_error": stats.prediction_error,
            "bytes_up_per_token": stats.decode.bytes_up / (NEW - 1),
            "on_cpu": use.cpu / use.needed if use is not None else None,
            "slots": model.plan.expert_slots,
        }


def main() -> int:
    parser = flags(__doc__, None, rounds=3, worker=5)
    parser.add_argument("--device", choices=("emulated", "cuda"), default="emulated")
    parser.add_argument("--links", nargs="+", default=["2GB", "8GB", "16GB"], help="rates of the emulated link")
    parser.add_argument("--share", type=float, default=0.4, help="of the model that fits on the device")
    args = parser.parse_args()
    if args.worker is not None:
        folder, mode, device, link, share = args.worker
        print(json.dumps(worker(Path(folder), mode, device, link, float(share))))
        return 0
    load = load_average()
    folder = checkpoints.make(checkpoints.SPECS[MODEL], args.scratch)
    rows = []
    with tempfile.TemporaryDirectory(prefix="offload-bench-") as cache:
        env = {**worker_env(), "OFFLOAD_CACHE": cache}
        for link in args.links if args.device == "emulated" else ["its own"]:
            runs: dict[str, list[dict[str, Any]]] = {m: [] for m in MODES}
            for n in range(args.rounds):
                for mode in MODES if n % 2 == 0 else reversed(MODES):
                    runs[mode].append(in_process(SCRIPT, env, folder, mode, args.device, link, str(args.share)))
            found = {m: medians(r) for m, r in runs.items()}
            rows.append({"link": link, "modes": found})
            for m, r in found.items():
                say(f"link {link}, {m}: prefill {r['prefill_tokens_per_s']:.0f}, decode "
                    f"{r['decode_tokens_per_s']:.1f} tokens/s")  # fmt: skip
    name = "hybrid" if args.device == "emulated" else "gpu-hybrid"
    write_json(args.out or RESULTS / f"{name}.json", {
        **head("hybrid", load, name), "device": args.device, "model": MODEL, "share": args.share,
        "rounds": args.rounds, "prompt": PROMPT, "new": NEW, "rows": rows,
    })  # fmt: skip
    return 0


if __name__ == "__main__":
    run_script(main)

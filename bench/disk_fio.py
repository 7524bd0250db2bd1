"""Our disk reader against fio on the same file in the same run: sequential direct reads, 1 MiB × 8.

fio is the yardstick for what the device gives (`--ioengine=libaio --direct=1`). Both read the same region for about
as long, in turn, several times; virtual disks drift, so the figure that counts is the median of the pairs' ratios.
Ours is measured as it is used: blocks fetched through the transfer queue into slots.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import checkpoints
from common import flags, head, load_average, say, write_json

BLOCK = 64 << 20


def fio(path: Path, offset: int, nbytes: int) -> float:
    """Bytes per second."""
    run = subprocess.run(
        ["fio", "--name=read", f"--filename={path}", "--readonly", "--direct=1", "--ioengine=libaio", "--rw=read",
         "--bs=1M", "--iodepth=8", f"--offset={offset}", f"--size={nbytes}", "--output-format=json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(json.loads(run.stdout)["jobs"][0]["read"]["bw_bytes"])


def ours(path: Path, offset: int, nbytes: int) -> float:
    """Bytes per second through reader and queue, two blocks under way."""
    from tiers import Arena, Block, Cause, DirectReader, Segment, TransferQueue

    arena = Arena(2 * BLOCK)
    slots = [arena.allocate(BLOCK) for _ in range(2)]
    for s in slots:
        s.tensor.zero_()  # touched: in use they always are
    reader = DirectReader([path])
    queue = TransferQueue(reader, 8)
    began = time.perf_counter()
    tickets = []
    for i, at in enumerate(range(offset, offset + nbytes, BLOCK)):
        if len(tickets) >= 2:
            tickets.pop(0).wait()
        block = Block(f"b{i}", BLOCK, BLOCK, (Segment(0, at, BLOCK, 0, None, True),))
        tickets.append(queue.fetch(block, slots[i % 2], Cause.PREFETCH))
    for t in tickets:
        t.wait()
    took = time.perf_counter() - began
    queue.close()
    reader.close()
    return nbytes / took


def main() -> int:
    """Run the pairs and write `bench/results/disk.json`."""
    parser = flags(__doc__, "disk")
    parser.add_argument("--model", default="llama-3b", choices=sorted(checkpoints.SPECS))
    parser.add_argument("--pairs", type=int, default=7)
    args = parser.parse_args()
    if shutil.which("fio") is None:
        print("fio is not installed; nothing was measured (Debian: apt-get install fio)", file=sys.stderr)
        return 1
    folder = checkpoints.make(checkpoints.SPECS[args.model], args.scratch)
    path = max(folder.glob("*.safetensors"), key=lambda p: p.stat().st_size)
    size = path.stat().st_size // BLOCK * BLOCK
    nbytes = min(size, 16 * BLOCK)
    load = load_average()
    pairs = []
    for i in range(args.pairs):
        first_ours = i % 2 == 0  # whoever comes second may find the device's cache warm
        a = ours(path, 0, nbytes) if first_ours else 0.0
        b = fio(path, 0, nbytes)
        a = a or ours(path, 0, nbytes)
        pairs.append({"ours": a, "fio": b, "ratio": a / b})
        say(f"ours {a / 1e9:.2f} GB/s, fio {b / 1e9:.2f} GB/s: {a / b:.2f}")
    write_json(args.out, {
        **head("disk", load),
        "bytes": nbytes, "target_ratio": 0.9, "pairs": pairs,
        "ours": statistics.median(p["ours"] for p in pairs), "fio": statistics.median(p["fio"] for p in pairs),
        "ratio": statistics.median(p["ratio"] for p in pairs),
    })  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())

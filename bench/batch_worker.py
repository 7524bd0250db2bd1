"""One measured process of the batch benchmarks: a job of many requests, answered in one of several ways.

Meant to be run by `batch.py`, `batch_growth.py` and `batch_prefix.py`, mostly under `limit.py`. Prints one JSON object
when it is done, and keeps what there is so far in `--partial`, for the case that it is killed. The job's seconds count
from the first request to the last answer; loading is apart. Greedy, without an end token. It measures no tokenizing.

Engines: `batch` (ours, all requests at once), `one` (ours, one request after the other), `forced` (ours, one padded
batch of equal lengths), `accelerate` (transformers, left-padded batches, weights offloaded to disk), `rates` (no
engine: what the products of one layer take with everything in memory).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import batch_job
from common import ROOT, BenchError, parse_size, say, vm_kb, write_json
from limit import release_held

if TYPE_CHECKING:
    import torch

ENGINES = ("batch", "one", "forced", "accelerate", "rates")
RATE_S = 0.5  # seconds each product is measured for, and three times at least


class Job:
    """What one process does and has to tell."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.base_rss = vm_kb("VmRSS")
        self.requests = batch_job.load(args.requests) if args.requests is not None else []
        self.answers: dict[str, list[int]] = {}
        self.done_s: dict[str, float] = {}
        self.steps: list[list[float]] = []  # of each pass: seconds, prompt tokens, decoded tokens
        self.facts: dict[str, Any] = {}
        self.load_s = self.began = self.last_s = 0.0
        self.read_before = self.read_loaded = read_bytes()

    def loading(self, load: Callable[[], Any]) -> Any:
        """What `load` gives; the job begins when it returns."""
        if self.args.release:
            release_held(self.args.release)
        start = time.perf_counter()
        loaded = load()
        self.load_s = time.perf_counter() - start
        self.read_loaded = read_bytes()
        self.began = time.perf_counter()
        return loaded

    @property
    def elapsed(self) -> float:
        """Seconds since the first request."""
        return time.perf_counter() - self.began

    @property
    def over(self) -> bool:
        """Whether no other request is to be begun."""
        return self.args.max_seconds is not None and self.elapsed > self.args.max_seconds

    def answered(self, index: int, tokens: Sequence[int]) -> None:
        """Note a request's new tokens."""
        self.last_s = self.elapsed
        self.answers[str(index)] = [int(t) for t in tokens]
        self.done_s[str(index)] = self.last_s

    def report(self) -> dict[str, Any]:
        """Everything so far."""
        now = read_bytes()
        return {
            "engine": self.args.engine, "load_s": self.load_s, "job_s": self.last_s, "steps": self.steps,
            "answers": self.answers, "done_s": self.done_s, "base_rss_bytes": self.base_rss,
            "peak_rss_bytes": vm_kb("VmHWM"), "load_bytes_read": self.read_loaded - self.read_before,
            "bytes_read": now - self.read_loaded, **self.facts,
        }  # fmt: skip

    def keep(self) -> None:
        """Leave what there is where the parent finds it."""
        if self.args.partial is not None:
            write_json(self.args.partial, self.report())


def read_bytes(path: Path = Path("/proc/self/io")) -> int:
    """Bytes that storage gave this process, page faults of mapped files included; 0 where the kernel does not tell."""
    try:
        lines = dict(line.split(": ") for line in path.read_text().splitlines())
        return int(lines["read_bytes"])
    except (OSError, KeyError, ValueError):
        return 0


# ours


def load_ours(job: Job, context: int | None = None, *, sequences: int | None = None, batch: bool = False) -> Any:
    """`offload.load` within the limit; with room for `context` tokens, or as much as it finds right. For a `batch` the
    plan is made for the job, of which `sequences` run at once (None: the planner's choice)."""
    import offload
    import offload.model
    from offload.config import Job as Planned

    job.base_rss = vm_kb("VmRSS")
    options: dict[str, Any] = {"context": context} if context is not None else {}
    if batch:
        n, prompts = len(job.requests), [len(r.prompt) for r in job.requests]
        new = [r.new for r in job.requests]
        options = {"batch": Planned(n, sum(prompts) // n, sum(new) // n, max(prompts) + max(new), sequences)}
    model = job.loading(lambda: offload.load(job.args.folder, ram=job.args.ram, **options))
    job.facts["settings"] = {"ram": job.args.ram, "context": context, "sequences": sequences}
    job.facts["plan"] = model.plan.summary()
    if model.engine.rate is not None:
        job.facts["rate"] = asdict(model.engine.rate)
        job.facts["rates_of"] = [asdict(rate) for rate in model.engine.rates]
    return model


def one_by_one(job: Job) -> None:
    """The requests in `--only` (or all), each with `model.run`, until the time is over."""
    only = job.args.only if job.args.only is not None else range(len(job.requests))
    with load_ours(job, max(r.cells for r in job.requests) + 1) as model:
        for i in only:
            if job.over and job.answers:
                break
            r = job.requests[i]
            tokens = model.run([list(r.prompt)], max_new_tokens=r.new, ignore_eos=True).token_ids[0]
            job.steps += passes(model.engine.steps)
            job.answered(i, tokens)
            job.keep()
        job.facts["asked"] = list(only)


def batched(job: Job) -> None:
    """All requests through the batch runner."""
    with load_ours(job, batch=True, sequences=job.args.batch) as model:
        for i, tokens in run_batch(job, model, sharing=not job.args.no_sharing):
            job.answered(i, tokens)
            if not len(job.answers) % 8:
                job.keep()
            if job.over:
                break
        job.facts["reused_tokens"] = model.batch_progress.reused


def run_batch(job: Job, model: Any, *, sharing: bool) -> Iterator[tuple[int, list[int]]]:
    """(index, new tokens) of each request, in the order in which `model.batch` answers them; notes every pass."""
    from offload.batch.requests import Options
    from offload.batch.requests import Request as Line

    engine, advance = model.engine, model.engine.advance

    def noted(cache: Any, parts: Any, wanted: Any) -> Any:
        out = advance(cache, parts, wanted)
        decoded = sum(len(tokens) == 1 for _, tokens in parts)
        total = sum(len(tokens) for _, tokens in parts)
        job.steps.append([round(engine.steps[-1].seconds, 5), total - decoded, decoded])
        return out

    engine.advance = noted
    lines = [
        Line(str(i), False, tuple(r.prompt), Options(max_tokens=r.new, temperature=0.0))
        for i, r in enumerate(job.requests)
    ]
    for result in model.batch(lines, ignore_eos=True, share=sharing):
        if result.error is not None:
            raise BenchError(f"request {result.custom_id}: {result.error.message}")
        yield int(result.custom_id), list(result.token_ids)


def forced(job: Job) -> None:
    """One batch of `--batch` prompts with equal lengths, and what the planner predicts for it."""
    from offload.planning.predict import Workload

    size = len(job.requests)
    prompt, new = len(job.requests[0].prompt), job.requests[0].new
    context = None if job.args.batched else size * (prompt + new) + 16
    with load_ours(job, context, batch=job.args.batched, sequences=size if job.args.batched else None) as model:
        workload = Workload(prompt, new, size)
        rate = model.engine.rate
        if rate is not None:  # prompts as fast as there is room for: what is measured is all of them decoding
            model.engine.rate = replace(rate, width=model.plan.prefill_chunk)
        told = model.engine.predict(workload)
        if job.args.batched:
            for i, tokens in run_batch(job, model, sharing=False):
                job.answered(i, tokens)
        else:
            result = model.run([list(r.prompt) for r in job.requests], max_new_tokens=new, ignore_eos=True)
            for i, tokens in enumerate(result.token_ids):
                job.answered(i, tokens)
            job.steps = passes(model.engine.steps)
        decode = [s for s, p, d in job.steps if d == size and not p]
        job.facts |= {
            "batch": size,
            "step_s": statistics.median(decode) if decode else None,
            "tokens_per_s": size / statistics.median(decode) if decode else None,
            "predicted_tokens_per_s": told.decode_tokens_per_s,
            "predicted_job_s": told.total_s(workload),
            "bottleneck": told.bottleneck,
            "simulated": told.simulated,
        }


def passes(steps: Sequence[Any]) -> list[list[float]]:
    """The engine's passes as [seconds, prompt tokens, decoded tokens]; one over more tokens than sequences has a
    prompt's.
    """
    return [[round(s.seconds, 5), *((s.tokens, 0) if s.tokens > s.sequences else (0, s.tokens))] for s in steps]


# transformers


def padded(job: Job) -> None:
    """Left-padded batches of `--batch` requests with like lengths through `generate`, weights offloaded to disk."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, GenerationConfig

    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    job.base_rss = vm_kb("VmRSS")
    args = job.args
    args.offload_folder.mkdir(parents=True, exist_ok=True)
    options = {"device_map": "auto", "max_memory": {"cpu": args.max_memory}, "offload_folder": str(args.offload_folder)}
    model = job.loading(lambda: AutoModelForCausalLM.from_pretrained(args.folder, dtype="auto", **options).eval())
    job.facts["settings"] = {"batch": args.batch, "by": args.by, "max_memory": args.max_memory}
    for batch in batch_job.groups(job.requests, args.batch, args.by):
        if job.over and job.answers:
            break
        asked = [job.requests[i] for i in batch]
        width, new = max(len(r.prompt) for r in asked), max(r.new for r in asked)
        tokens = torch.tensor([[0] * (width - len(r.prompt)) + list(r.prompt) for r in asked])
        mask = torch.tensor([[0] * (width - len(r.prompt)) + [1] * len(r.prompt) for r in asked])
        clock = _clock(job, width * len(batch), len(batch))
        config = GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=0)
        with torch.inference_mode():
            out = model.generate(tokens, attention_mask=mask, generation_config=config, stopping_criteria=[clock])
        for i, row in zip(batch, out[:, width:].tolist(), strict=True):
            job.answered(i, row[: job.requests[i].new])
        job.keep()
        if out.shape[1] - width < new:
            break  # the time was over
    job.facts["threads"] = torch.get_num_threads()


def _clock(job: Job, prompt_tokens: int, size: int) -> Any:
    """Called by `generate` after each pass: notes it, and ends the batch when the time to the very end is over."""
    from transformers import StoppingCriteria

    class Clock(StoppingCriteria):  # type: ignore[misc]
        def __init__(self) -> None:
            self.last = time.perf_counter()
            self.first = True

        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            import torch

            now, job.last_s = time.perf_counter(), job.elapsed
            job.steps.append([round(now - self.last, 5), *((prompt_tokens, 0) if self.first else (0, size))])
            self.last, self.first = now, False
            late = job.args.hard_seconds is not None and job.elapsed > job.args.hard_seconds
            if len(job.steps) % 4 == 0:
                job.keep()
            return torch.full((input_ids.shape[0],), late, dtype=torch.bool)

    return Clock()


# the floor's rates


def rates(job: Job) -> None:
    """Seconds of one layer's products, and of the output layer's, for each number of tokens in `--tokens`.

    By torch or by the engine's kernel, whichever is faster. Of experts, every token's go to the least used ones: the
    even spread of random routing, without its chance.
    """
    config = json.loads((job.args.folder / "config.json").read_text())
    job.began = time.perf_counter()
    job.facts["rates"] = []
    import torch

    job.facts["threads"] = torch.get_num_threads()
    for tokens, layer_s, head_s in layer_seconds(config, job.args.tokens):
        job.facts["rates"].append({"tokens": tokens, "layer_s": layer_s, "head_s": head_s})
        job.keep()


def layer_seconds(config: dict[str, Any], counts: Sequence[int]) -> Iterator[tuple[int, float, float]]:
    """(tokens, seconds of a layer, seconds of the output layer), in bfloat16."""
    import torch

    from moe import kernels

    kernel = kernels.load()
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    experts = config.get("num_experts", 0)
    shapes = [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q)]
    shapes += [(experts, hidden)] if experts else [(inner, hidden), (inner, hidden), (hidden, inner)]
    dense = [_weights(*shape) for shape in shapes]
    out = _weights(vocab, hidden)
    with torch.inference_mode():
        mixture = _Mixture(kernel, experts, config["num_experts_per_tok"], hidden, inner) if experts else None
        for tokens in counts:
            inputs = {k: torch.randn(tokens, k).bfloat16() for k in {hidden, inner, q}}
            # one after the other, as in a layer: a product measured alone would find its weights in the cache
            layer_s = fastest(*_ways(kernel, dense, inputs))
            if mixture is not None:
                layer_s += fastest(*mixture.ways(inputs[hidden]))
            yield tokens, layer_s, fastest(*_ways(kernel, [out], inputs))


def _weights(rows: int, columns: int) -> torch.Tensor:
    import torch

    return torch.randn(rows, columns).mul_(0.02).bfloat16()


def _ways(kernel: Any, weights: Sequence[torch.Tensor], inputs: dict[int, torch.Tensor]) -> list[Callable[[], object]]:
    from torch.nn.functional import linear

    ways: list[Callable[[], object]] = [lambda: [linear(inputs[w.shape[1]], w) for w in weights]]
    if kernel is not None:
        ways.append(lambda: [kernel.linear(inputs[w.shape[1]], w) for w in weights])
    return ways


class _Mixture:
    """A layer's experts, all in memory."""

    def __init__(self, kernel: Any, experts: int, chosen: int, hidden: int, inner: int) -> None:
        self.kernel, self.chosen = kernel, chosen
        self.gate_up = [_weights(2 * inner, hidden) for _ in range(experts)]
        self.down = [_weights(hidden, inner) for _ in range(experts)]

    def ways(self, x: torch.Tensor) -> list[Callable[[], object]]:
        """Torch, expert by expert, and the kernel."""
        import torch

        from moe import kernels

        experts, pairs = len(self.down), len(x) * self.chosen
        # pair p is token p // chosen; the experts take turns
        places = [list(range(e, pairs, experts)) for e in range(experts)]
        index = [torch.tensor(p) // self.chosen for p in places]
        out = torch.empty(pairs, x.shape[1], dtype=x.dtype)
        weights = torch.full((pairs,), 1 / self.chosen)

        def by_torch() -> None:
            from torch.nn.functional import linear, silu

            for e, tokens in enumerate(index):
                if len(tokens):
                    gate, up = linear(x[tokens], self.gate_up[e]).chunk(2, dim=-1)
                    out[places[e]] = linear(silu(gate) * up, self.down[e])

        found: list[Callable[[], object]] = [by_torch]
        if self.kernel is not None:
            table = []
            for gate_up, down, p in zip(self.gate_up, self.down, places, strict=True):
                m = kernels.matrices({"gate_up_proj": gate_up, "down_proj": down}, x.dtype)
                assert m is not None
                table.append((m, p))
            found.append(lambda: self.kernel.run(x, table, weights, out, top_k=self.chosen, activation=0))
        return found


def fastest(*ways: Callable[[], object], seconds: float = RATE_S) -> float:
    """Median seconds of the fastest way, each called three times at least after a first call."""
    found = []
    for way in ways:
        way()
        times: list[float] = []
        began = time.perf_counter()
        while len(times) < 3 or time.perf_counter() - began < seconds:
            start = time.perf_counter()
            way()
            times.append(time.perf_counter() - start)
        found.append(statistics.median(times))
    return min(found)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path, help="model folder")
    p.add_argument("--engine", choices=ENGINES, required=True)
    p.add_argument("--requests", type=Path, help="the job, as batch_job.save writes it")
    p.add_argument("--only", type=int, nargs="+", help="one: these requests")
    p.add_argument("--ram", type=parse_size, help="ours: the budget")
    p.add_argument("--batch", type=int, help="accelerate: sequences in a batch; batch: that run at once, most")
    p.add_argument("--by", choices=("prompt", "new"), default="prompt", help="accelerate: what batches are sorted by")
    p.add_argument("--no-sharing", action="store_true", help="batch: compute common fronts for every request")
    p.add_argument("--batched", action="store_true", help="forced: through the batch runner, not padded")
    p.add_argument("--max-memory", type=parse_size, help="accelerate: weights kept in memory, most")
    p.add_argument("--offload-folder", type=Path, default=Path("offload-folder"), help="where accelerate may write")
    p.add_argument("--max-seconds", type=float, help="begin no other request or batch after so long")
    p.add_argument("--hard-seconds", type=float, help="accelerate: end in the middle of a batch after so long")
    p.add_argument("--tokens", type=int, nargs="+", default=[64, 512], help="rates: tokens at once")
    p.add_argument("--release", type=int, metavar="PID", help="end this process, which holds memory, before loading")
    p.add_argument("--partial", type=Path, help="keep what there is in this file")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))  # this checkout's packages, installed or not
    args = parser().parse_args(argv)
    ways = {"batch": batched, "one": one_by_one, "forced": forced, "accelerate": padded, "rates": rates}
    try:
        job = Job(args)
        ways[args.engine](job)
        job.keep()
        print(json.dumps(job.report()), flush=True)
    except BenchError as e:
        say(f"error: {e}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the commands do, once the arguments are parsed."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.progress import Progress, dim
from offload.errors import Interrupted, OffloadError, UsageError

if TYPE_CHECKING:
    from offload.model import Model


def command(args: argparse.Namespace) -> int:
    """Dispatch, and turn errors into one line and an exit code."""
    _quiet_libraries()
    try:
        commands = {"chat": _chat, "generate": _generate, "plan": _plan, "bench": _bench, "profile": _profile,
                    "sessions": _sessions, "batch": _batch}  # fmt: skip
        return commands[args.command](args)
    except Interrupted:
        print("offload: interrupted", file=sys.stderr)
        return Interrupted.exit_code
    except OffloadError as e:
        print(f"offload {args.command}: {e}", file=sys.stderr)
        return e.exit_code
    except MemoryError:
        print(f"offload {args.command}: out of memory; give a smaller --ram or --context", file=sys.stderr)
        return 1


def _quiet_libraries() -> None:
    """Our lines are the only ones: libraries' progress bars and hints would break `--json` readers' terminals."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")


def _load(args: argparse.Namespace) -> Model:
    import offload

    with Progress() as progress:
        return offload.load(args.model, progress=progress, **loading(args))


def loading(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `offload.load` that were given."""
    names = (
        "ram", "vram", "resident", "device", "dtype", "context", "threads", "link", "trace", "graphs", "expert_policy",
        "expert_depth", "expert_predictor", "expert_compute", "kv_resident", "kv_budget", "kv_policy", "kv_by_layer",
        "kv_codec", "spill_dir", "disk", "record_routing",
    )  # fmt: skip
    given = {name: getattr(args, name) for name in names}
    return {**given, "overrides": dict(args.settings), "replay_routing": getattr(args, "replay_routing", None)}


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    given = {k: getattr(args, k) for k in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}
    return {k: v for k, v in given.items() if v is not None}


@contextmanager
def _interruptible(model: Model) -> Iterator[None]:
    """While this lasts, Ctrl-C ends the run at the next layer; a second one ends it wherever it is."""

    def stop(signum: int, frame: object) -> None:
        if model.engine.interrupt.is_set():
            raise KeyboardInterrupt
        model.engine.interrupt.set()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        model.engine.interrupt.clear()


def _generate(args: argparse.Namespace) -> int:
    prompt: str | list[int]
    if args.prompt_ids is not None:
        prompt = args.prompt_ids
    elif args.prompt_file is not None:
        prompt = _read_prompt(args.prompt_file)
    else:
        prompt = args.prompt
    if not prompt:
        raise UsageError("the prompt is empty")
    if args.chat and not isinstance(prompt, str):
        raise UsageError("--chat needs a prompt in words, not --prompt-ids")
    with _load(args) as model, _interruptible(model), Progress() as progress:
        model.engine.on_prefill = progress
        if args.chat:
            assert isinstance(prompt, str)
            prompt = model.render([{"role": "user", "content": prompt}])
        stream = not args.json and args.num_beams == 1 and model.tokenizer is not None
        result = model.run(
            [prompt],
            stop=args.stop,
            num_beams=args.num_beams,
            on_text=(lambda piece: print(piece, end="", flush=True)) if stream else None,
            session=args.session,
            prefix_cache=args.prefix_cache,
            **_sampling(args),
        )
        if stream:
            print(flush=True)  # the text's last line ends before anything is said about it
        for note in result.notes:
            print(f"offload generate: {note}", file=sys.stderr)
        if args.json:
            print(json.dumps(_as_json(result)), flush=True)
        else:
            text = result.text[0] if result.text[0] is not None else ",".join(map(str, result.token_ids[0]))
            if not stream:
                print(text, flush=True)
            print(dim(result.stats.one_line(), sys.stderr), file=sys.stderr)
    return 0


def _as_json(result: Any) -> dict[str, Any]:
    stats = result.stats
    loss = stats.total.kv_loss
    return {
        "token_ids": result.token_ids[0],
        "text": result.text[0],
        "finish_reason": result.finish[0],
        "prompt_tokens": stats.prompt_tokens,
        "prefill_tokens": stats.prompt_tokens - stats.reused_tokens,
        "reused_tokens": stats.reused_tokens,
        "new_tokens": stats.new_tokens,
        "load_s": stats.load_s,
        "ttft_s": stats.ttft_s,
        "decode_tokens_per_s": stats.decode_tokens_per_s,
        "predicted_decode_tokens_per_s": stats.predicted_decode_tokens_per_s,
        "predicted_ttft_s": stats.predicted_ttft_s,
        "prediction_error": stats.prediction_error,
        "learned": stats.learned or None,
        "bottleneck": stats.bottleneck,
        "stall_s": stats.total.stall_s,
        "bytes_read": stats.total.bytes_read,
        "bytes_up": stats.total.bytes_up,
        "bytes_written": stats.total.kv_bytes_written,
        "kv_bytes_read": stats.total.kv_bytes_read,
        "kv_bytes_written": stats.total.kv_bytes_written,
        "kv_codec": stats.kv_codec,
        "kv_error": {"keys": loss.keys, "values": loss.values} if loss.keys is not None else None,
        "kv_grains": list(stats.kv_grains),
        "kv_bytes_before_coding": loss.raw_bytes,
        "kv_bytes_after_coding": loss.coded_bytes,
        "hit_rate": stats.hit_rate,
        "peak_rss_bytes": stats.peak_rss_bytes,
        "ram_budget_bytes": stats.budget_bytes,
        "experts": [
            {
                "layer": i,
                **{f: getattr(u, f) for f in ("needed", "hit", "ahead", "late", "missed", "cpu", "fetched", "wasted")},
                "recall": u.recall,
                "precision": u.precision,
                "expert_bytes": size,
                "bytes_on_demand": size * u.missed,
                "bytes_ahead": size * u.fetched,
                "bytes_in_vain": size * u.wasted,
            }
            for i, (u, size) in enumerate(zip(stats.experts_by_layer, stats.expert_bytes, strict=True))
        ],
        "exact": stats.exact,
    }


def _read_prompt(name: str) -> str:
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except OSError as e:
        raise UsageError(f"--prompt-file {name}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise UsageError(f"--prompt-file {name}: not UTF-8 text") from e


def _chat(args: argparse.Namespace) -> int:
    from cli.chat import talk

    with _load(args) as model:
        return talk(model, args.system, args.session, _sampling(args), _interruptible)


def _plan(args: argparse.Namespace) -> int:
    import offload
    from cli import heatmap, picture

    if args.routing is not None and args.device_map:
        raise UsageError("--device-map prints a placement and nothing else: leave out --routing")
    routing = offload.routing(args.routing) if args.routing is not None else None
    report = None
    if routing is None or args.model is not None:
        report = offload.plan(
            args.model, hardware=args.hardware, ram=args.ram, vram=args.vram, resident=args.resident,
            device=args.device, link=args.link, dtype=args.dtype, batch=args.batch, prompt_tokens=args.prompt_tokens,
            new_tokens=args.new_tokens, context=args.context, kv_resident=args.kv_resident,
            overrides=dict(args.settings), alternatives=not args.device_map,
        )  # fmt: skip
        if routing is not None:
            routing.check(report.facts)
    told = [t for t in (report, routing) if t is not None]
    if args.svg is not None:
        drawn = heatmap.draw(routing) if routing is not None else picture.draw(report) if report is not None else ""
        try:
            Path(args.svg).write_text(drawn, encoding="utf-8")
        except OSError as e:
            raise UsageError(f"--svg {args.svg}: {e.strerror}") from e
    if args.device_map and report is not None:
        print(json.dumps(report.device_map))
    elif args.json:
        plan = report.as_json() if report is not None else {}
        print(json.dumps(plan if routing is None else {**plan, "routing": routing.as_json()}))
    else:
        print("\n\n".join(t.text() for t in told))
    return 0


def _bench(args: argparse.Namespace) -> int:
    from cli.bench import table
    from offload.benchmark import measure

    with _load(args) as model, _interruptible(model):
        rows = measure(
            model, prompt_tokens=args.prompt_tokens, new_tokens=args.new_tokens, batch=args.batch,
            repetitions=args.repetitions, progress=lambda what: print(dim(what, sys.stderr), file=sys.stderr),
        )  # fmt: skip
    print(table(rows, args.output), end="")
    return 0


def _profile(args: argparse.Namespace) -> int:
    import offload
    from offload.sizes import format_size

    p = offload.profile(args.model, device=args.device, link=args.link, fresh=args.fresh)
    if args.json:
        print(json.dumps(p.as_json()))
        return 0
    print(f"{p.machine['cpu']}, {p.machine['cores']} cores, {format_size(p.machine['ram_bytes'])}; device {p.device}")
    print(f"memory read      {p.memory_bytes_per_s / 1e9:7.2f} GB/s")
    for d in p.disk:
        kind = "sequential" if d.sequential else "random"
        print(
            f"disk {kind:11s} {d.bytes_per_s / 1e9:7.2f} GB/s   {format_size(d.request)} x {d.depth}, "
            f"{d.latency_s * 1e6:.0f} us each"
        )
    if p.link is not None:
        up, down, slow = p.link.up_bytes_per_s, p.link.down_bytes_per_s, p.link.pageable_up_bytes_per_s
        print(f"link             {up / 1e9:7.2f} GB/s up, {down / 1e9:.2f} down, {slow / 1e9:.2f} from pageable memory")
    if p.direct_bytes_per_s is not None:
        print(f"disk to device   {p.direct_bytes_per_s / 1e9:7.2f} GB/s   past the host")
    for c in p.compute:
        print(
            f"{c.dtype:9s} x {c.tokens:<4d} {c.weight_bytes_per_s / 1e9:7.2f} GB/s of weights, "
            f"{c.flops_per_s / 1e9:.0f} GFLOP/s"
        )
    print(
        f"fixed costs      {p.layer_call_s * 1e6:7.0f} us a layer, {p.expert_call_s * 1e6:.0f} an expert, "
        f"{p.step_call_s * 1e6:.0f} a pass"
    )
    print(
        f"attention        {p.attention_bytes_per_s / 1e9:7.2f} GB/s of KV, {p.attention_flops_per_s / 1e9:.0f} GFLOP/s"
    )
    print(
        f"beside reads     {100 * p.disk_drag:7.0f}% longer"
        + (f", beside copies {100 * p.link_drag:.0f}%" if p.link else "")
    )
    for note in p.notes:
        print(f"({note})")
    return 0


def _sessions(args: argparse.Namespace) -> int:
    from cli.sessions import command

    return command(args)


def _batch(args: argparse.Namespace) -> int:
    from cli.batch import command

    return command(args)

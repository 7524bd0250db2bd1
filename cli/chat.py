"""The chat loop."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from cli.progress import Progress, dim
from offload.errors import Interrupted, UsageError
from offload.model import Conversation, Model
from offload.stats import RequestStats

_HELP = "/clear starts anew · /stats tells about the last answer · /quit, Ctrl-D or Ctrl-C leaves"


def talk(
    model: Model,
    system: str | None,
    options: dict[str, Any],
    interruptible: Callable[[Model], AbstractContextManager[None]],
) -> int:
    """Read a line, stream the answer, tell how it went; until the user leaves. Returns the exit code."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input())
    conversation = Conversation(model, system)
    model.render([{"role": "user", "content": "?"}])  # a model that cannot chat says so before the first prompt
    name = model.engine.folder.name
    print(dim(f"{name}: {model.plan.summary()}", sys.stderr), file=sys.stderr)
    print(dim(_HELP, sys.stderr), file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            if sys.stdin.isatty():
                print()
            return 0
        except KeyboardInterrupt:
            print()
            return Interrupted.exit_code
        if not line:
            continue
        if line.startswith("/"):
            if line in ("/quit", "/exit"):
                return 0
            _slash(line, conversation, model)
            continue
        with interruptible(model), Progress() as progress:
            model.engine.on_prefill = progress
            try:
                result = conversation.say(line, lambda piece: print(piece, end="", flush=True), **options)
            except UsageError as e:
                print(f"{e}; /clear starts anew" if "context" in str(e) else str(e), file=sys.stderr)
                continue
        print()
        if result is None:
            print(dim("(stopped)", sys.stderr), file=sys.stderr)
            continue
        for note in result.notes:
            print(dim(note, sys.stderr), file=sys.stderr)
        if result.finish[0] == "length":
            print(dim("(cut short: --max-new-tokens or the context is reached)", sys.stderr), file=sys.stderr)
        print(dim(result.stats.one_line(), sys.stderr), file=sys.stderr)


def _slash(line: str, conversation: Conversation, model: Model) -> None:
    if line == "/clear":
        conversation.clear()
        print(dim("(a new conversation)", sys.stderr), file=sys.stderr)
    elif line == "/stats":
        s, t = model.stats, model.stats.total
        rows = {
            "plan": model.plan.summary(),
            "prompt tokens": f"{s.prompt_tokens} ({conversation.reused_tokens} kept from before)",
            "new tokens": str(s.new_tokens),
            "first token": f"{s.ttft_s:.3f} s",
            "decode": f"{s.decode_tokens_per_s:.2f} tokens/s" if s.decode_tokens_per_s else "-",
            "predicted": _predicted(s),
            "read from disk": f"{t.bytes_read / 1e6:.1f} MB",
            "found in memory": f"{100 * s.hit_rate:.1f} %" if s.hit_rate is not None else "-",
            "waited for disk": f"{t.stall_s:.3f} s of {t.seconds:.3f} s",
            "peak memory": f"{s.peak_rss_bytes / 2**20:.0f} MiB of {s.budget_bytes / 2**20:.0f} MiB",
            "bottleneck": s.bottleneck,
        }
        use = s.experts_use
        if use is not None and use.needed:
            rows["experts"] = (
                f"{100 * use.hit / use.needed:.0f}% found, {100 * use.ahead / use.needed:.0f}% fetched ahead in time, "
                f"{100 * use.late / use.needed:.0f}% late, {100 * use.missed / use.needed:.0f}% not foreseen"
                f"{f', {100 * use.cpu / use.needed:.0f}% computed on the CPU' if use.cpu else ''}; "
                f"{use.wasted} of {use.fetched} fetched in vain"
            )
            for i, u in enumerate(s.experts_by_layer):
                if u.needed:
                    rows[f"layer {i}"] = (
                        f"{u.needed} needed: {u.hit} found, {u.ahead} ahead, {u.late} late, {u.missed} missed"
                        f"{f', {u.cpu} on the CPU' if u.cpu else ''}"
                    )
        if s.learned:
            rows["learned"] = s.learned
        for k, v in rows.items():
            print(f"{k:>16}  {v}", file=sys.stderr)
    else:
        print(_HELP, file=sys.stderr)


def _predicted(s: RequestStats) -> str:
    if s.predicted_decode_tokens_per_s is None:
        return "-"
    off = f" ({100 * s.prediction_error:+.0f}%)" if s.prediction_error is not None else ""
    return f"{s.predicted_decode_tokens_per_s:.2f} tokens/s{off}, first token {s.predicted_ttft_s:.3f} s"

"""The chat loop."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from cli.progress import Progress, dim
from offload.conversation import Conversation
from offload.errors import Interrupted, StoreError, UsageError
from offload.model import Model
from offload.stats import RequestStats

_HELP = (
    "/undo takes the last turn back · /retry answers it anew · /branch NAME goes on under another name · "
    "/clear starts anew · /stats tells about the last answer · /quit, Ctrl-D or Ctrl-C leaves"
)
Interruptible = Callable[[Model], AbstractContextManager[None]]


def talk(
    model: Model,
    system: str | None,
    session: str | None,
    options: dict[str, Any],
    interruptible: Interruptible,
) -> int:
    """Read a line, stream the answer, tell how it went; until the user leaves. Returns the exit code."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input())
    model.render([{"role": "user", "content": "?"}])  # a model that cannot chat says so before the first prompt
    with contextlib.closing(Conversation(model, system, session)) as conversation:
        _tell(f"{model.name}: {model.plan.summary()}")
        if session is not None and conversation.messages:
            _tell(f"session {session}, {len(conversation.messages)} messages so far; the last ones:")
            for message in conversation.messages[-2:]:
                _tell(f"  {message['role']}: {_short(message['content'])}")
        _notes(conversation)
        _tell(_HELP)
        return _loop(conversation, model, options, interruptible)


def _loop(conversation: Conversation, model: Model, options: dict[str, Any], interruptible: Interruptible) -> int:
    retries = 0
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
        if line in ("/quit", "/exit"):
            return 0
        if line.startswith("/") and line != "/retry":
            _slash(line, conversation, model)
            _notes(conversation)
            continue
        retries = retries + 1 if line == "/retry" else 0
        # the same seed would say the same again
        now = {**options, "seed": options.get("seed", 0) + retries} if retries else options
        with interruptible(model), Progress() as progress:
            model.engine.on_prefill = progress

            def show(piece: str) -> None:
                print(piece, end="", flush=True)

            try:
                result = conversation.retry(show, **now) if retries else conversation.say(line, show, **now)
            except UsageError as e:
                print(f"{e}; /clear starts anew" if "context" in str(e) else str(e), file=sys.stderr)
                continue
        print()
        _notes(conversation)
        if result is None:
            _tell("(stopped)")
            continue
        for note in result.notes:
            _tell(note)
        if result.finish[0] == "length":
            _tell("(cut short: --max-new-tokens or the context is reached)")
        _tell(result.stats.one_line())


def _tell(line: str) -> None:
    print(dim(line, sys.stderr), file=sys.stderr)


def _notes(conversation: Conversation) -> None:
    for note in conversation.notes:
        _tell(note)
    conversation.notes.clear()


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 100 else line[:97] + "..."


def _slash(line: str, conversation: Conversation, model: Model) -> None:
    if line == "/clear":
        conversation.clear()
        _tell("(a new conversation)")
    elif line == "/undo" or line.startswith("/branch "):
        try:
            if line == "/undo":
                _tell(f"(taken back: {_short(conversation.undo())})")
            else:
                conversation.branch(line.removeprefix("/branch ").strip())
                _tell(f"(this is {conversation.session} from here on)")
        except (UsageError, StoreError) as e:
            print(e, file=sys.stderr)
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

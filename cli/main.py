"""`offload`: commands and rendering only. Everything heavy is imported once the arguments are known to be right."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

VERSION = "0.1.0"


class _Parser(argparse.ArgumentParser):
    """One clear line for a wrong argument, exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text.strip() else []
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids such as 5,6,7") from None


def _setting(text: str) -> tuple[str, int]:
    name, _, value = text.partition("=")
    try:
        return name.strip(), int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a choice such as resident_layers=12") from None


def _settings(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--set", action="append", type=_setting, default=[], metavar="NAME=N", dest="settings",
                        help="by hand: resident_layers, lookahead, expert_slots, prefill_chunk, kv_chunk")  # fmt: skip


def _loading() -> _Parser:
    """What every command that runs a model takes."""
    common = _Parser(add_help=False, allow_abbrev=False)
    common.add_argument("model", nargs="?", metavar="MODEL", help="folder, bundled name or hub id (default: demo-moe)")
    run = common.add_argument_group("running")
    run.add_argument(
        "--ram", metavar="SIZE", help="peak memory of the whole process, e.g. 8GiB (default: what is free)"
    )
    run.add_argument("--vram", metavar="SIZE", help="peak memory of the device (default: what is free)")
    run.add_argument("--resident", metavar="SIZE|PERCENT", help="most weight bytes kept in memory, e.g. 50%%")
    run.add_argument("--device", default="auto", metavar="auto|cuda|cpu|emulated", help="where to compute")
    run.add_argument("--dtype", default="auto", metavar="auto|float32|bfloat16|float16",
                     help="compute in this type (default: the checkpoint's)")  # fmt: skip
    run.add_argument("--context", type=_whole, metavar="N", help="tokens to reserve KV for (default: what fits)")
    run.add_argument("--kv-resident", metavar="SIZE|PERCENT",
                     help="keys and values kept in memory, the others on disk (percent: of a request)")  # fmt: skip
    run.add_argument("--kv-budget", metavar="N|PERCENT",
                     help="sparse attention, not exact: a new token attends to so many tokens")  # fmt: skip
    run.add_argument("--kv-policy", default="bounds", metavar="NAME", help="who chooses them (default: bounds)")
    run.add_argument("--kv-by-layer", action="store_true", help="layers share that budget by how skewed they are")
    run.add_argument(
        "--kv-codec",
        metavar="int8|int4",
        help="code keys and values that leave memory, not exact; those that stay, too: ram=int8,disk=int4",
    )
    run.add_argument("--spill-dir", metavar="DIR", help="where they are written (default: the cache folder)")
    run.add_argument("--disk", metavar="SIZE", help="most bytes written there, and kept of sessions")
    run.add_argument("--threads", type=_whole, metavar="N", help="compute threads (default: all cores)")
    run.add_argument("--link", default="8GB", metavar="RATE", help="rate of an emulated device's link (default: 8GB/s)")
    run.add_argument("--graphs", action="store_true", help="decode with CUDA graphs where weights stay on the device")
    run.add_argument("--expert-policy", default="router", metavar="NAME", help="which expert gives up its slot")
    run.add_argument("--expert-predictor", default="gate", metavar="NAME", help="who foresees experts; none: nobody")
    run.add_argument("--expert-depth", type=_whole, default=1, metavar="N", help="layers ahead to look (default: 1)")
    run.add_argument(
        "--expert-compute", default="both", metavar="both|device", help="may the CPU compute beside a device"
    )
    run.add_argument("--record-routing", metavar="FILE", help="write what the routers chose (.npz)")
    run.add_argument("--trace", metavar="FILE", help="write a timeline that opens in Perfetto")
    _settings(run)
    return common


def _common() -> _Parser:
    """What every command that generates text takes."""
    common = _Parser(add_help=False, allow_abbrev=False, parents=[_loading()])
    sample = common.add_argument_group("choosing tokens")
    sample.add_argument("--max-new-tokens", type=_whole, metavar="N", help="most tokens to generate")
    sample.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (generate's default)")
    sample.add_argument("--top-k", type=_whole, metavar="K", help="sample among the K likeliest")
    sample.add_argument("--top-p", type=float, metavar="P", help="sample among the likeliest that sum to P")
    sample.add_argument("--seed", type=_whole, metavar="S", help="same seed, same answer (default: 0)")
    return common


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="offload", allow_abbrev=False,
        description="Run language models larger than memory, from their original safetensors files.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"offload {VERSION}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    common = _common()
    chat = commands.add_parser(
        "chat", parents=[common], allow_abbrev=False, help="talk to a model",
        description="Talk to a model. Ctrl-C stops an answer; at the prompt it leaves.",
    )  # fmt: skip
    chat.add_argument("--system", metavar="TEXT", help="a system message")
    chat.add_argument("--session", metavar="NAME", help="keep the conversation under this name, and go on with it")
    generate = commands.add_parser(
        "generate", parents=[common], allow_abbrev=False, help="continue one prompt", description="Continue one prompt."
    )
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt")
    prompt.add_argument("--prompt-file", metavar="F", help="read the prompt from a file; - is standard input")
    prompt.add_argument("--prompt-ids", type=_ids, metavar="5,6,7", help="the prompt as token ids")
    generate.add_argument("--chat", action="store_true", help="put the prompt through the model's chat template")
    generate.add_argument("--stop", action="append", metavar="TEXT", help="stop after this text; may be repeated")
    generate.add_argument("--num-beams", type=_whole, default=1, metavar="N", help="beam search")
    generate.add_argument("--session", metavar="NAME", help="keep what is computed, and read what any session has")
    generate.add_argument("--prefix-cache", action="store_true",
                          help="read the front of the prompt that is stored, and store what is computed")  # fmt: skip
    generate.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    plan = commands.add_parser(
        "plan", allow_abbrev=False, help="what would live where, and how fast it would be",
        description="Say what would live where, how fast that would be and what would help; reads no weights. Knows "
        "the shapes of some models that are not here, and machines that one does not have.",
    )  # fmt: skip
    plan.add_argument("model", nargs="?", metavar="MODEL",
                      help="folder, bundled or known name, hub id (default: demo-moe)")  # fmt: skip
    plan.add_argument("--hardware", metavar="NAME|FILE", help="a described machine, e.g. rtx4090-24g (default: this)")
    plan.add_argument("--ram", metavar="SIZE", help="peak memory of the process (default: what the machine has)")
    plan.add_argument("--vram", metavar="SIZE", help="peak memory of the device (default: what the machine has)")
    plan.add_argument("--resident", metavar="SIZE|PERCENT", help="most weight bytes kept in memory, e.g. 50%%")
    plan.add_argument("--device", default="auto", metavar="auto|cuda|cpu|emulated", help="where to compute")
    plan.add_argument("--link", default="8GB", metavar="RATE", help="rate of an emulated device's link")
    plan.add_argument("--dtype", default="auto", metavar="auto|float32|bfloat16|float16", help="compute in this type")
    plan.add_argument("--batch", type=_whole, default=1, metavar="N", help="sequences at once (default: 1)")
    plan.add_argument("--prompt-tokens", type=_whole, default=512, metavar="N", help="of each (default: 512)")
    plan.add_argument("--new-tokens", type=_whole, default=128, metavar="N", help="of each (default: 128)")
    plan.add_argument("--context", type=_whole, metavar="N", help="tokens to reserve KV for (default: those asked for)")
    plan.add_argument("--kv-resident", metavar="SIZE|PERCENT",
                      help="keys and values kept in memory, the others on disk")  # fmt: skip
    for ignored in ("--spill-dir", "--disk"):  # where they are written changes no plan
        plan.add_argument(ignored, help=argparse.SUPPRESS)
    _settings(plan)
    plan.add_argument("--routing", metavar="FILE",
                      help="tell what a recorded routing trace (.npz) says; without MODEL, that only")  # fmt: skip
    plan.add_argument("--svg", metavar="FILE",
                      help="draw the tiers and one step's timeline; with --routing, the use of experts")  # fmt: skip
    plan.add_argument("--device-map", action="store_true", help="print the placement as accelerate's device_map (JSON)")
    plan.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    bench = commands.add_parser(
        "bench", parents=[_loading()], allow_abbrev=False, help="measure speed, in rows like llama-bench's",
        description="Measure prompt processing (pp) and generation (tg), beside what was predicted.",
    )  # fmt: skip
    bench.add_argument(
        "-p", "--prompt-tokens", type=_whole, default=512, metavar="N", help="of pp (default: 512; 0: no pp)"
    )
    bench.add_argument(
        "-n", "--new-tokens", type=_whole, default=128, metavar="N", help="of tg (default: 128; 0: no tg)"
    )
    bench.add_argument("-b", "--batch", type=_whole, default=1, metavar="N", help="sequences at once (default: 1)")
    bench.add_argument("-r", "--repetitions", type=_whole, default=5, metavar="N", help="(default: 5)")
    bench.add_argument("--replay-routing", metavar="FILE", help="follow a recorded routing in place of the model's own")
    bench.add_argument("-o", "--output", default="md", choices=("md", "json", "csv"), help="(default: md)")
    _batch(commands)
    profile = commands.add_parser(
        "profile", allow_abbrev=False, help="measure this machine",
        description="Measure disk, memory, link and compute. Kept for a month; --fresh measures anew.",
    )  # fmt: skip
    profile.add_argument("model", nargs="?", metavar="MODEL", help="its folder's disk is measured (default: demo-moe)")
    profile.add_argument("--device", default="auto", metavar="auto|cuda|cpu|emulated", help="what to measure")
    profile.add_argument("--link", default="8GB", metavar="RATE", help="rate of an emulated device's link")
    profile.add_argument("--fresh", action="store_true", help="measure again")
    profile.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    _sessions(commands)
    return parser


def _batch(commands: argparse._SubParsersAction[_Parser]) -> None:
    batch = commands.add_parser(
        "batch", parents=[_loading()], allow_abbrev=False, help="answer a file of requests, each exactly once",
        description="Answer a file of requests (OpenAI's batch lines, or {\"custom_id\", \"prompt\"}) in another, each "
        "exactly once. After Ctrl-C, a crash or a full disk the same command goes on where it stopped.",
    )  # fmt: skip
    batch.add_argument("-i", "--input", required=True, metavar="IN.jsonl", help="requests; - is standard input")
    batch.add_argument("-o", "--output", required=True, metavar="OUT.jsonl", help="answers; - is standard output")
    batch.add_argument(
        "-e", "--errors", metavar="FILE", help="lines that cannot be answered (default: among the answers)"
    )
    batch.add_argument("--max-tokens", type=_whole, metavar="N",
                       help="of an answer whose request does not say (default: 256)")  # fmt: skip
    batch.add_argument(
        "--sequences", type=_whole, metavar="N", help="at once (default: what is predicted to be fastest)"
    )
    batch.add_argument("--no-sharing", action="store_true", help="compute fronts that prompts have in common each time")
    batch.add_argument("--prefix-cache", action="store_true",
                       help="read the fronts of prompts that are stored, and store what is computed")  # fmt: skip
    batch.add_argument("--ignore-eos", action="store_true", help="answers of full length, for measurements")
    batch.add_argument("--on", metavar="ray", help="run on a Ray cluster: RAY_ADDRESS, the one found, or this machine")
    batch.add_argument("--workers", type=_whole, metavar="N", help="with --on ray (default: one per node)")
    batch.add_argument("--summary", metavar="FILE", help="write the summary (JSON) there")
    batch.add_argument("--json", action="store_true", help="print the summary as one JSON object on standard output")


def _sessions(commands: argparse._SubParsersAction[_Parser]) -> None:
    sessions = commands.add_parser(
        "sessions", allow_abbrev=False, help="list, show and remove conversations",
        description="Conversations are kept with the keys and values of what was said, so that they go on at once.",
    )  # fmt: skip
    actions = sessions.add_subparsers(dest="action", metavar="list|show|rm|prune", parser_class=_Parser, required=True)
    for action, says in (
        ("list", "all of them, those used last first"),
        ("show", "what was said in one"),
        ("rm", "forget one; the next prune frees what only it needed"),
        ("prune", "free keys and values that no conversation needs, or with --limit the least recently used of them"),
    ):
        parser = actions.add_parser(action, allow_abbrev=False, help=says, description=says[0].upper() + says[1:] + ".")
        if action in ("show", "rm"):
            parser.add_argument("name", metavar="NAME")
        if action == "prune":
            parser.add_argument(
                "--limit", metavar="SIZE", help="stop when no more than this is left (default: free all)"
            )
        parser.add_argument("--json", action="store_true", help="print JSON on standard output")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 ok, 1 failure, 2 usage, 130 interrupted."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    if not sys.platform.startswith("linux"):
        print("offload: runs on Linux and WSL2 only", file=sys.stderr)
        return 1
    try:
        from cli import run

        return run.command(args)
    except KeyboardInterrupt:
        print("\noffload: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output is gone; nobody is left to tell
        sys.stderr.close()
        return 1


if __name__ == "__main__":
    sys.exit(main())

"""The command line as a user meets it: one clear line and the right exit code for every mistake, JSON, interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cli.main import main
from offload.planning.budgets import READERS

ROOT = Path(__file__).parent.parent


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    try:
        code = main(list(args))
    except SystemExit as e:
        code = int(e.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def spawn(*args: str, **options: Any) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "cli.main", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
        # a shell that runs the suite in the background has its children ignore Ctrl-C
        cwd="/", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options,
    )  # fmt: skip


def test_help_needs_no_heavy_import() -> None:
    code = "import sys; from cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\n" \
           "print('torch' in sys.modules or 'transformers' in sys.modules)"  # fmt: skip
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert out.rstrip().endswith("False")


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["--foo"], 2, "--foo"),
        (["generate", "{m}", "-p", "x", "--foo"], 2, "--foo"),
        (["generate", "{m}"], 2, "--prompt"),
        (["generate", "{m}", "-p", "x", "--prompt-ids", "5"], 2, "not allowed with"),
        (["generate", "{m}", "--prompt-ids", "5,x"], 2, "not a list of token ids"),
        (["generate", "{m}", "--prompt-ids", ""], 2, "prompt is empty"),
        (["generate", "{m}", "-p", ""], 2, "prompt is empty"),
        (["generate", "{m}", "--prompt-ids", "5", "--ram", "nan"], 2, "--ram"),
        (["generate", "{m}", "--prompt-ids", "5", "--ram", "NaN GiB"], 2, "--ram"),
        (["generate", "{m}", "--prompt-ids", "5", "--ram", "0"], 2, "--ram"),
        (["generate", "{m}", "--prompt-ids", "5", "--ram", "-5GiB"], 2, "--ram"),
        (["generate", "{m}", "--prompt-ids", "5", "--ram", "inf"], 2, "--ram"),
        (["generate", "{m}", "--prompt-ids", "5", "--resident", "0%"], 2, "--resident"),
        (["generate", "{m}", "--prompt-ids", "5", "--resident", "nan%"], 2, "--resident"),
        (["generate", "{m}", "--prompt-ids", "5", "--resident", "101%"], 2, "--resident"),
        (["generate", "{m}", "--prompt-ids", "5", "--device", "tpu"], 2, "--device"),
        (["generate", "{m}", "--prompt-ids", "5", "--dtype", "int3"], 2, "--dtype"),
        (["generate", "{m}", "--prompt-ids", "5", "--context", "0"], 2, "--context"),
        (["generate", "{m}", "--prompt-ids", "5", "--context", "100000"], 2, "--context 100000"),
        (["generate", "{m}", "--prompt-ids", "5", "--threads", "0"], 2, "--threads"),
        (["generate", "{m}", "--prompt-ids", "5", "--max-new-tokens", "0"], 2, "--max-new-tokens"),
        (["generate", "{m}", "--prompt-ids", "5", "--temperature", "-1"], 2, "--temperature"),
        (["generate", "{m}", "--prompt-ids", "5", "--temperature", "nan"], 2, "--temperature"),
        (["generate", "{m}", "--prompt-ids", "5", "--temperature", "1", "--top-p", "0"], 2, "--top-p"),
        (["generate", "{m}", "--prompt-ids", "99999"], 2, "outside the vocabulary"),
        (["generate", "{m}", "--prompt-ids", ",".join(["5"] * 40), "--context", "32"], 2, "context holds 32"),
        (["generate", "{m}", "-p", "hello"], 1, "no tokenizer"),
        (["generate", "{m}", "--prompt-file", "/nowhere/at/all"], 2, "/nowhere/at/all"),
        (["generate", "{m}", "--prompt-ids", "5", "--ram", "64MiB"], 1, "the smallest that works is"),
        (["generate", "{m}", "--prompt-ids", "5", "--resident", "100B"], 1, "the smallest that works is"),
        (["generate", "/nowhere/at/all", "-p", "x"], 1, "/nowhere/at/all"),
        (["generate", "no-such-model", "-p", "x"], 1, "no-such-model"),
        (["generate", "some-org/no-such-model", "-p", "x"], 1, "some-org/no-such-model"),
        (["chat", "{m}"], 1, "no tokenizer"),
        (["generate", "{m}", "--prompt-ids", "5", "--trace", "/nowhere/at/all/t.json"], 2, "--trace"),
        (["generate", "{m}", "--prompt-ids", "5", "--device", "emulated"], 2, "--vram"),
        (["generate", "{m}", "--prompt-ids", "5", "--vram", "1GiB", "--device", "cpu"], 2, "--vram"),
        (["generate", "{m}", "--prompt-ids", "5", "--device", "emulated", "--vram", "10KiB"], 1, "smallest that works"),
        (["generate", "{m}", "--prompt-ids", "5", "--link", "fast"], 2, "--link"),
        (["generate", "{m}", "--prompt-ids", "5", "--device", "cpu", "--graphs"], 2, "--graphs"),
        (["generate", "{m}", "--prompt-ids", "5", "--device", "emulated", "--vram", "1GiB", "--graphs"], 2, "--graphs"),
        (["generate", "{m}", "--prompt-ids", "5", "--kv-resident", "0"], 2, "--kv-resident"),
        (["generate", "{m}", "--prompt-ids", "5", "--kv-resident", "200%"], 2, "--kv-resident"),
        (["generate", "{m}", "--prompt-ids", "5", "--kv-resident", "abc"], 2, "--kv-resident"),
        (["generate", "{m}", "--prompt-ids", "5", "--kv-resident", "1MB", "--spill-dir", "/proc/x"], 2, "--spill-dir"),
        (["generate", "{m}", "--prompt-ids", "5", "--kv-resident", "1MB", "--disk", "50%"], 2, "--disk"),
        (["generate", "{m}", "--prompt-ids", "5", "--kv-resident", "1MB", "--disk", "0"], 2, "--disk"),
        (["generate", "{m}", "--prompt-ids", ",".join(["5"] * 200), "--kv-resident", "1", "--disk", "1KB"], 1,
         "--disk: 1000 bytes are too few"),
        (["profile", "/nowhere/at/all"], 1, "/nowhere/at/all"),
    ],
)  # fmt: skip
def test_mistakes_get_one_line(
    capsys: pytest.CaptureFixture[str], tiny_moe: Path, args: list[str], code: int, says: str
) -> None:
    got, out, err = run(capsys, *(a.replace("{m}", str(tiny_moe)) for a in args))
    assert got == code
    assert out == ""
    assert says in err
    assert len(err.strip().splitlines()) == 1, err
    assert "Traceback" not in err


def test_a_refused_budget_names_one_that_works(capsys: pytest.CaptureFixture[str], tiny_moe: Path) -> None:
    _, _, err = run(capsys, "generate", str(tiny_moe), "--prompt-ids", "5,6", "--resident", "100B")
    smallest = err.strip().rsplit(" ", 1)[1]
    code, out, err = run(
        capsys,
        "generate",
        str(tiny_moe),
        "--prompt-ids",
        "5,6",
        "--resident",
        smallest,
        "--json",
        "--max-new-tokens",
        "4",
    )
    assert (code, err) == (0, "")
    assert len(json.loads(out)["token_ids"]) == 4


def test_json_has_every_field(capsys: pytest.CaptureFixture[str], tiny_moe: Path) -> None:
    code, out, err = run(capsys, "generate", str(tiny_moe), "--prompt-ids", "5,6,7", "--json", "--max-new-tokens", "6",
                         "--resident", "50%")  # fmt: skip
    assert (code, err) == (0, "")
    d = json.loads(out)
    assert d["prompt_tokens"] == 3
    assert d["new_tokens"] == len(d["token_ids"]) == 6
    assert d["text"] is None
    assert d["ttft_s"] > 0
    assert d["decode_tokens_per_s"] > 0
    assert d["predicted_decode_tokens_per_s"] > 0
    assert d["predicted_ttft_s"] > 0
    measured, predicted = d["decode_tokens_per_s"], d["predicted_decode_tokens_per_s"]
    assert d["prediction_error"] == pytest.approx(predicted / measured - 1)
    assert d["bottleneck"] in ("disk", "compute")
    assert d["stall_s"] >= 0
    assert d["bytes_read"] > 0
    assert 0 <= d["hit_rate"] < 1
    assert d["peak_rss_bytes"] > 0
    assert d["exact"] is True


def test_keys_and_values_over_memory_and_disk(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    args = ["generate", "demo-moe", "--prompt-ids", ",".join(str(5 + i % 200) for i in range(150)), "--json",
            "--max-new-tokens", "40"]  # fmt: skip
    code, out, err = run(capsys, *args)
    assert (code, err) == (0, "")
    plain = json.loads(out)
    assert (plain["kv_bytes_read"], plain["kv_bytes_written"], plain["bytes_written"]) == (0, 0, 0)
    code, out, err = run(capsys, *args, "--kv-resident", "10%", "--spill-dir", str(tmp_path / "spill"))
    assert code == 0
    tiered = json.loads(out)
    assert tiered["token_ids"] == plain["token_ids"]
    assert tiered["exact"] is True
    assert tiered["kv_bytes_read"] > tiered["kv_bytes_written"] > 0
    assert tiered["bytes_written"] == tiered["kv_bytes_written"]
    assert tiered["bytes_read"] >= tiered["kv_bytes_read"]
    assert list((tmp_path / "spill").iterdir()) == [], "nothing is left, nor was to be seen"


def test_kv_memory_that_is_too_small_is_raised_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["generate", "demo-moe", "--prompt-ids", "5,6,7", "--max-new-tokens", "100", "--json"]
    code, out, err = run(capsys, *args, "--kv-resident", "1B")
    assert code == 0
    assert len(json.loads(out)["token_ids"]) > 0
    (line,) = err.strip().splitlines()
    assert "--kv-resident 1B is raised to" in line
    assert "the smallest that works for this request" in line
    code, _, err = run(capsys, *args, "--kv-resident", "100%")
    assert (code, err) == (0, "")


def test_same_seed_same_answer(capsys: pytest.CaptureFixture[str], tiny_moe: Path) -> None:
    def tokens(seed: str, resident: str) -> list[int]:
        args = ["generate", str(tiny_moe), "--prompt-ids", "5,6,7", "--json", "--temperature", "1.5", "--seed", seed,
                "--max-new-tokens", "12", "--resident", resident]  # fmt: skip
        ids: list[int] = json.loads(run(capsys, *args)[1])["token_ids"]
        return ids

    assert tokens("1", "100%") == tokens("1", "40%")
    assert tokens("1", "100%") != tokens("2", "100%")


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_ctrl_c_ends_a_run_with_130(wide_dense: Path, device: str) -> None:
    more = ["--device", "emulated", "--vram", "120MiB", "--link", "1GB"] if device == "emulated" else []
    p = spawn("generate", str(wide_dense), "--prompt-ids", ",".join(["5"] * 64), "--max-new-tokens", "4000",
              "--resident", "30%", *more)  # fmt: skip
    deadline = time.monotonic() + 60
    while len(list(Path(f"/proc/{p.pid}/task").iterdir())) <= READERS and time.monotonic() < deadline:
        time.sleep(0.05)  # the readers start once the model is being loaded
    time.sleep(1.0)  # well into decoding
    assert p.poll() is None
    began = time.monotonic()
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=10)
    assert time.monotonic() - began < 2
    assert p.returncode == 130
    assert err.strip() == "offload: interrupted"


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a chat template, whose answers run on until the context ends."""
    import families

    model = families.build("llama", max_position_embeddings=2048)
    model.generation_config.eos_token_id = 0
    return families.chatty(model, tmp_path_factory.mktemp("chatty"))


def test_ctrl_c_in_chat_stops_the_answer_and_at_the_prompt_it_leaves(chatty: Path) -> None:
    p = spawn("chat", str(chatty), "--resident", "60%", stdin=subprocess.PIPE, bufsize=0)
    assert p.stdin is not None
    assert p.stdout is not None
    p.stdin.write("w10 w11\n")
    assert p.stdout.read(20)
    p.send_signal(signal.SIGINT)
    p.stdin.write("/stats\n")
    time.sleep(2)
    assert p.poll() is None, "the first Ctrl-C must only stop the answer"
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=10)
    assert p.returncode == 130
    assert "(stopped)" in err
    assert "peak memory" in err
    assert "Traceback" not in err


def test_chat_answers_and_leaves_at_the_end_of_input(chatty: Path) -> None:
    p = spawn("chat", str(chatty), "--max-new-tokens", "5", stdin=subprocess.PIPE)
    out, err = p.communicate("w10\n/help\n/clear\nw10\n", timeout=60)
    assert p.returncode == 0, err
    first, second = out.strip().splitlines()
    assert len(first.split()) == 5
    assert first == second, "after /clear the same words get the same answer"


def test_a_hub_id_is_found_in_the_cache(
    capsys: pytest.CaptureFixture[str], tiny_moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's cache holds symbolic links into a blob folder beside the snapshot."""
    import huggingface_hub.constants

    repo = tmp_path / "models--some-org--some-model"
    snapshot = repo / "snapshots" / "abc"
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    snapshot.mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    for file in tiny_moe.iterdir():
        (repo / "blobs" / f"{file.name}-blob").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}-blob")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    args = ("--prompt-ids", "5,6", "--max-new-tokens", "3", "--json")
    code, out, err = run(capsys, "generate", "some-org/some-model", *args)
    assert (code, err) == (0, "")
    assert json.loads(out)["token_ids"] == json.loads(run(capsys, "generate", str(tiny_moe), *args)[1])["token_ids"]

"""The benchmark scripts do what they say, on models of a few MB."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from moe import kernels
from offload import engine, graphs, launches
from offload.stats import StepStats
from tiers import EmulatedDevice
from tiers import memory as mem

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import checkpoints  # noqa: E402
import common  # noqa: E402
import compare  # noqa: E402
import decode  # noqa: E402
import disk  # noqa: E402
import equality  # noqa: E402
import gguf_write  # noqa: E402
import gpu_check  # noqa: E402
import limit  # noqa: E402
import linears  # noqa: E402
import llama_peer  # noqa: E402
import misses  # noqa: E402
import predict  # noqa: E402
import regret  # noqa: E402
import startup  # noqa: E402
import tables  # noqa: E402

SMALL = ["llama-3b-small", "olmoe-small"]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of checkpoints for all tests."""
    return tmp_path_factory.mktemp("bench")


# checkpoints


@pytest.mark.parametrize("name", SMALL)
def test_our_engine_chooses_what_the_resident_model_does(name: str, scratch: Path, fresh_cache: Path) -> None:
    folder = checkpoints.make(checkpoints.SPECS[name], scratch)
    tokens = decode.stream(512, 12, seed=3)
    ours = decode.Ours(folder, 2 << 30, 16)
    mine, a = decode.decode(ours, tokens, 6, None)
    steps = ours.report()["steps"]
    oracle = decode.Transformers(folder, routing=True)
    theirs, b = decode.decode(oracle, tokens, 6, None)
    if name == "llama-3b-small":
        assert mine["argmax"] == theirs["argmax"]
    # the library groups a prompt's experts otherwise than we do, and bf16 may round otherwise then
    assert all(
        equality.ulps_below(float(row.max()), float(row[m])) <= 2 for m, row in zip(mine["argmax"], b, strict=True)
    )
    assert len(set(mine["argmax"])) > 3  # the choice depends on the input
    assert a.shape == b.shape == (7, 512)
    assert len(steps) == 7
    routes = oracle.report().get("routes", [])
    assert len(routes) == (7 * 3 if name == "olmoe-small" else 0)
    assert all(len(r) == 4 for r in routes[3:])


def test_checkpoint_is_reused_when_complete_and_rewritten_when_not(scratch: Path) -> None:
    spec = checkpoints.SPECS["llama-3b-small"]
    folder = checkpoints.make(spec, scratch)
    shards = checkpoints.shard_files(folder)
    assert len(shards) > 2
    before = {f.name: (f.stat().st_mtime_ns, f.read_bytes()) for f in shards}
    checkpoints.make(spec, scratch)
    assert {f.name: f.stat().st_mtime_ns for f in shards} == {n: t for n, (t, _) in before.items()}
    os.truncate(shards[1], 100)
    assert not checkpoints.complete(spec, folder)
    checkpoints.make(spec, scratch)
    assert {f.name: f.read_bytes() for f in shards} == {n: b for n, (_, b) in before.items()}


def test_checkpoint_says_what_it_needs_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda p: type("Usage", (), {"free": 1 << 20}))
    with pytest.raises(common.BenchError, match=r"needs 0.00 GiB of disk.*--scratch"):
        checkpoints.make(checkpoints.SPECS["olmoe-small"], tmp_path)


def test_sizes_of_the_big_models() -> None:
    llama, olmoe = checkpoints.SPECS["llama-3b"], checkpoints.SPECS["olmoe"]
    assert llama.weight_bytes == llama.dense_bytes + 2 * 32000 * 3072
    assert llama.expert_bytes == 0
    assert olmoe.expert_bytes == 3 * 1024 * 1024 * 2
    assert olmoe.weight_bytes == olmoe.dense_bytes + 12 * 64 * olmoe.expert_bytes + 2 * 4096 * 1024
    for spec in (llama, olmoe):
        assert common.parse_size(spec.limit) < spec.weight_bytes


# limit


def test_where_a_group_may_be_made(tmp_path: Path) -> None:
    proc = tmp_path / "proc"
    own = tmp_path / "memory" / "user" / "me"
    own.mkdir(parents=True)
    for folder in (own, own.parent, tmp_path / "memory"):
        (folder / "memory.limit_in_bytes").write_text("1")
    proc.write_text("4:memory:/user/me\n3:cpu:/x\n0::/\n")
    assert limit.candidates(tmp_path, proc) == [(1, own), (1, own.parent), (1, tmp_path / "memory")]
    proc.write_text("4:memory:/not/mounted/here\n")
    assert limit.candidates(tmp_path, proc) == [(1, tmp_path / "memory")]


def test_where_a_group_may_be_made_v2(tmp_path: Path) -> None:
    proc = tmp_path / "proc"
    own = tmp_path / "cg" / "slice" / "session"
    own.mkdir(parents=True)
    (own / "cgroup.subtree_control").write_text("\n")
    (own.parent / "cgroup.subtree_control").write_text("cpu memory\n")
    proc.write_text("0::/slice/session\n")
    assert limit.candidates(tmp_path / "cg", proc) == [(2, own.parent)]


def test_oom_kills_are_read_from_either_version(tmp_path: Path) -> None:
    assert limit.oom_kills(tmp_path) == 0
    (tmp_path / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    assert limit.oom_kills(tmp_path) == 2
    (tmp_path / "memory.events").write_text("low 0\noom 4\noom_kill 3\n")
    assert limit.oom_kills(tmp_path) == 3


def test_without_rights_it_runs_unlimited_and_says_so(tmp_path: Path) -> None:
    with limit.Group(1 << 30, root=tmp_path, proc=tmp_path / "none") as group:
        ran = group.run([sys.executable, "-c", "print(6 * 7)"])
    assert (ran.limited, ran.mechanism, ran.limit_bytes, group.why) == (
        False, "none", None, "no memory cgroup is mounted",
    )  # fmt: skip
    assert (ran.stdout, ran.failure()) == ("42\n", None)


def test_failures_in_one_line() -> None:
    with limit.Group(None) as group:
        bad = group.run([sys.executable, "-c", "import sys; sys.exit('no such thing')"])
        slow = group.run([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.5)
    assert bad.failure() == "exit code 1: no such thing"
    assert slow.timed_out
    assert (slow.failure() or "").startswith("gave up after")


def test_limit_is_in_force_and_the_group_goes_away() -> None:
    with limit.Group(96 << 20) as group:
        if not group.limited:
            pytest.skip(group.why)
        folder = group.folder
        small = group.run([sys.executable, "-c", "bytearray(1 << 20)"])
        large = group.run([sys.executable, "-c", "len(b'x' * (256 << 20))"])
    assert small.failure() is None
    assert 0 < (small.peak_bytes or 0) < 96 << 20
    assert large.oom_killed
    assert "out of memory in 0.09 GiB" in (large.failure() or "")
    assert folder is not None
    assert not folder.exists()


def test_held_memory_is_given_back() -> None:
    with limit.Held(8 << 20) as held:
        assert held.pid is not None
        assert common.vm_kb("VmRSS", Path(f"/proc/{held.pid}/status")) > 8 << 20
        limit.release_held(held.pid)
        assert common.vm_kb("VmRSS", Path(f"/proc/{held.pid}/status")) == 0
    with limit.Held(1 << 60) as held:
        assert held.pid is None


# disk, sizes


def test_disk_is_measured(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(os.urandom(3 << 20))
    found = disk.measure([file], seconds=0.2)
    assert found.sequential > 0
    assert found.random > 0
    assert found.bytes_read >= 3 << 20
    (tmp_path / "empty").touch()
    with pytest.raises(common.BenchError):
        disk.measure([tmp_path / "empty"])


def test_sizes() -> None:
    assert common.parse_size("4.5GiB") == 9 << 29
    assert common.parse_size("500MB") == 500_000_000
    with pytest.raises(common.BenchError):
        common.parse_size("four")


# what compare derives


def test_belady_is_never_worse_than_lru_and_right_on_a_cycle() -> None:
    cycle = list("abcd") * 5
    assert lru(cycle, 3) == 20
    # bypassing what is needed latest, each further round of the cycle misses once or twice, never all
    assert misses.belady_misses(cycle, 3) == 4 + 4
    assert misses.belady_misses(cycle, 4) == 4
    rng = random.Random(0)
    for _ in range(50):
        accesses = [rng.randrange(9) for _ in range(60)]
        best = [misses.belady_misses(accesses, n) for n in range(1, 10)]
        assert all(b <= lru(accesses, n) for n, b in enumerate(best, 1))
        assert best == sorted(best, reverse=True)
        assert best[-1] == len(set(accesses))


def lru(accesses: list[Any], slots: int) -> int:
    return misses.lru_misses(accesses, slots)


def test_lru_starts_warm() -> None:
    assert misses.lru_misses([1, 2, 3], 2, warm=[3, 2, 1]) == 1


def test_ulps_are_counted_at_the_maximum() -> None:
    one = torch.tensor(4.0, dtype=torch.bfloat16)
    below = torch.nextafter(one * 1.5, torch.tensor(0.0, dtype=torch.bfloat16))
    assert equality.ulps_below(float(one * 1.5), float(below)) == 1.0
    assert equality.ulps_below(4.0, 4.0) == 0.0


def test_equality_of_logits(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    a = torch.tensor([[1.0, 4.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 5.0]], dtype=torch.bfloat16)
    b = a.clone()
    b[1] = torch.tensor([1.0, 1.5, 0.0])
    save_file({"logits": a}, tmp_path / "a")
    save_file({"logits": b[:2]}, tmp_path / "b")
    found = equality.equality(tmp_path / "a", tmp_path / "b")
    assert (found["positions"], found["equal"], found["bit_identical"]) == (2, 1, 1)
    assert found["least_cosine"] == pytest.approx(3.5 / (5 * 3.25) ** 0.5)
    assert found["worst_ulps"] == 1.0 / 2**-6  # bf16 numbers from 2 to 4 are 2⁻⁶ apart


def test_summary_and_ratios_keep_a_failed_peer_as_a_message() -> None:
    runs = [run("ours", "cold", r) for r in (1.0, 3.0, 2.0)]
    runs += [run("accelerate", "cold", 0.5), {"engine": "transformers-auto", "cache": "cold", "error": "killed"}]
    summary = compare.summarise(runs)
    assert summary["ours"]["cold"]["decode_tokens_per_s"] == 2.0
    assert summary["transformers-auto"] == {"error": "killed"}
    assert compare.ratios(runs) == {"accelerate": {"cold_decode": 4.0, "cold_start": 1.0}}


def run(engine: str, cache: str, rate: float) -> dict[str, Any]:
    return {
        "engine": engine, "cache": cache, "decode_tokens_per_s": rate, "load_s": 1.0, "ttft_s": 2.0,
        "start_to_first_token_s": 4.0, "peak_rss_bytes": 1 << 30, "new_tokens": 8, "limit": {"limited": True},
    }  # fmt: skip


# llama.cpp


def stored(name: str, scratch: Path) -> tuple[dict[str, Any], gguf_write.Stored]:
    return checkpoints.SPECS[name].config, gguf_write.Stored(checkpoints.make(checkpoints.SPECS[name], scratch))


def as_float(bits: Any) -> torch.Tensor:
    return torch.from_numpy(bits.astype("int32") << 16).view(torch.float32)


@pytest.mark.parametrize("name", SMALL)
def test_every_tensor_has_its_place_in_the_gguf_file(name: str, scratch: Path) -> None:
    config, source = stored(name, scratch)
    planned = {t.name: t for t in gguf_write.tensors(config, source)}
    assert sorted(s for t in planned.values() for s in t.sources) == sorted(source.entries)
    wide = {n for n, t in planned.items() if t.wide}
    assert wide == {n for n in planned if "norm" in n or "ffn_gate_inp" in n}
    permuted = {n.split(".", 2)[-1]: t.heads for n, t in planned.items() if t.heads}
    if name == "llama-3b-small":
        assert permuted == {"attn_q.weight": 6, "attn_k.weight": 2}
        assert planned["blk.3.ffn_down.weight"].shape == (192, 512)
    else:
        assert permuted == {}
        experts = planned["blk.2.ffn_down_exps.weight"]
        assert experts.shape == (16, 128, 64)
        got = gguf_write.values(experts, source).view("uint16").reshape(experts.shape)
        assert (got[5] == source.bits("model.layers.2.mlp.experts.5.down_proj.weight")).all()
        assert {"blk.0.attn_q_norm.weight", "blk.0.attn_k_norm.weight"} <= wide
        router = gguf_write.values(planned["blk.1.ffn_gate_inp.weight"], source)
        assert router.dtype == "float32"
        assert torch.equal(torch.from_numpy(router), as_float(source.bits("model.layers.1.mlp.gate.weight")))


def test_permuted_rows_turn_as_neighbours_as_they_did_as_halves() -> None:
    heads, dim = 3, 8
    turned = torch.polar(torch.ones(dim // 2), torch.linspace(0.1, 2.0, dim // 2))
    x = torch.randn(heads, dim, generator=torch.Generator().manual_seed(0))
    halves = torch.complex(x[:, : dim // 2], x[:, dim // 2 :]) * turned  # transformers: i with i + d/2
    want = torch.cat([halves.real, halves.imag], 1)
    rows = torch.from_numpy(gguf_write.permute(x.reshape(-1, 1).numpy(), heads)).reshape(heads, dim)
    neighbours = torch.view_as_real(torch.view_as_complex(rows.reshape(heads, -1, 2).contiguous()) * turned)
    got = gguf_write.permute(want.reshape(-1, 1).numpy(), heads).reshape(heads, dim)
    assert torch.allclose(neighbours.reshape(heads, dim), torch.from_numpy(got), atol=1e-6)
    assert not torch.equal(rows, x)


def test_facts_of_the_model_as_llama_cpp_names_them() -> None:
    facts = gguf_write.facts(checkpoints.SPECS["olmoe"].config)
    assert facts["expert_count"] == 64
    assert facts["expert_used_count"] == 8
    assert facts["rope.dimension_count"] == 64
    assert facts["rope.freq_base"] == 500000.0
    newer = {**checkpoints.SPECS["llama-3b"].config, "rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}
    del newer["rope_theta"]
    facts = gguf_write.facts(newer)
    assert (facts["attention.head_count"], facts["attention.head_count_kv"], facts["rope.freq_base"]) == (24, 8, 7.0)
    assert "expert_count" not in facts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "'mamba' cannot be written; llama and olmoe can"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "scaled rotary"),
        ({"attention_bias": True}, "biases"),
        ({"norm_topk_prob": True}, "norm_topk_prob"),
        ({"clip_qkv": 8.0}, "clip_qkv"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(change: dict[str, Any], message: str) -> None:
    config = checkpoints.SPECS["olmoe"].config
    assert gguf_write.check(config) == "olmoe"
    with pytest.raises(common.BenchError, match=message):
        gguf_write.check({**config, **change})


def test_a_tensor_without_a_place_or_of_another_type_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    names = ["model.embed_tokens.weight", "model.norm.weight", "model.extra.weight"]
    save_file({n: torch.zeros(4, 4, dtype=torch.bfloat16) for n in names}, tmp_path / "model.safetensors")
    config = {"model_type": "llama", "num_attention_heads": 1, "num_hidden_layers": 0}
    with pytest.raises(common.BenchError, match=r"holds model\.extra\.weight"):
        list(gguf_write.tensors(config, gguf_write.Stored(tmp_path)))
    save_file({n: torch.zeros(4) for n in names[:2]}, tmp_path / "model.safetensors")
    with pytest.raises(common.BenchError, match=r"embed_tokens\.weight is F32"):
        list(gguf_write.tensors(config, gguf_write.Stored(tmp_path)))


def test_tied_embeddings_are_written_once_where_llama_cpp_knows_them(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tied = {"model.embed_tokens.weight": torch.ones(4, 4, dtype=torch.bfloat16),
            "model.norm.weight": torch.ones(4, dtype=torch.bfloat16)}  # fmt: skip
    save_file(tied, tmp_path / "model.safetensors")
    for family, heads in (("llama", set()), ("olmoe", {"output.weight"})):
        config = {"model_type": family, "num_attention_heads": 1, "num_hidden_layers": 0}
        names = {t.name for t in gguf_write.tensors(config, gguf_write.Stored(tmp_path))}
        assert names == {"token_embd.weight", "output_norm.weight"} | heads


def test_gguf_file_is_read_back_as_it_should_be(scratch: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    config, source = stored("olmoe-small", scratch)
    assert gguf_write.main([str(scratch / "olmoe-small"), str(tmp_path / "m.gguf")]) == 0
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert reader.get_field("olmoe.expert_used_count").contents() == 4
    assert reader.get_field("tokenizer.ggml.model").contents() == "no_vocab"
    planned = {t.name: t for t in gguf_write.tensors(config, source)}
    assert {t.name for t in reader.tensors} == set(planned)
    for t in reader.tensors:
        assert t.tensor_type.name == ("F32" if planned[t.name].wide else "BF16")
        assert tuple(reversed(t.shape.tolist())) == planned[t.name].shape
        assert t.data.tobytes() == gguf_write.values(planned[t.name], source).tobytes()


def test_without_gguf_it_says_how_to_get_it(
    scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    folder = checkpoints.make(checkpoints.SPECS["olmoe-small"], scratch)
    assert gguf_write.main([str(folder), str(tmp_path / "out.gguf")]) == 1
    assert "pip install gguf" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


VOCAB = 512
# the part of llama.h that is used; a step's logits tell every token fed so far and its position
LLAMA_H = """
#include <stdbool.h>
#include <stdint.h>
enum ggml_log_level { GGML_LOG_LEVEL_INFO = 2, GGML_LOG_LEVEL_WARN = 3, GGML_LOG_LEVEL_ERROR = 4 };
typedef int32_t llama_token;
struct llama_model_params { int n_gpu_layers; };
struct llama_context_params { uint32_t n_ctx, n_batch; int n_threads, n_threads_batch; };
struct llama_batch { int n_tokens; llama_token * token; };
struct llama_model; struct llama_context; struct llama_vocab;
void llama_log_set(void (*f)(enum ggml_log_level, const char *, void *), void * data);
void llama_backend_init(void);
struct llama_model_params llama_model_default_params(void);
struct llama_context_params llama_context_default_params(void);
struct llama_model * llama_model_load_from_file(const char * path, struct llama_model_params p);
struct llama_context * llama_init_from_model(struct llama_model * m, struct llama_context_params p);
const struct llama_vocab * llama_model_get_vocab(const struct llama_model * m);
int32_t llama_vocab_n_tokens(const struct llama_vocab * v);
struct llama_batch llama_batch_get_one(llama_token * t, int32_t n);
int32_t llama_decode(struct llama_context * c, struct llama_batch b);
float * llama_get_logits_ith(struct llama_context * c, int32_t i);
uint32_t llama_n_ctx(const struct llama_context * c);
const char * llama_print_system_info(void);
void llama_free(struct llama_context * c);
void llama_model_free(struct llama_model * m);
"""
LLAMA_C = """
#include <stdio.h>
#include "llama.h"
static char object; static float logits[512]; static unsigned state, fed, room;
static void (*logger)(enum ggml_log_level, const char *, void *);
void ggml_backend_load_all(void) {}
void llama_log_set(void (*f)(enum ggml_log_level, const char *, void *), void * data) { (void) data; logger = f; }
void llama_backend_init(void) {}
struct llama_model_params llama_model_default_params(void) { return (struct llama_model_params){99}; }
struct llama_context_params llama_context_default_params(void) { return (struct llama_context_params){0, 4, 4, 4}; }
struct llama_model * llama_model_load_from_file(const char * path, struct llama_model_params p) {
    FILE * f = fopen(path, "r");
    logger(GGML_LOG_LEVEL_INFO, "loading\\n", 0);
    return f && p.n_gpu_layers == 0 ? (struct llama_model *) &object : 0;
}
struct llama_context * llama_init_from_model(struct llama_model * m, struct llama_context_params p) {
    (void) m; room = p.n_ctx;
    return p.n_batch >= 16 && p.n_threads == p.n_threads_batch ? (struct llama_context *) &object : 0;
}
const struct llama_vocab * llama_model_get_vocab(const struct llama_model * m) { return (void *) m; }
int32_t llama_vocab_n_tokens(const struct llama_vocab * v) { (void) v; return 512; }
struct llama_batch llama_batch_get_one(llama_token * t, int32_t n) { return (struct llama_batch){n, t}; }
int32_t llama_decode(struct llama_context * c, struct llama_batch b) {
    (void) c;
    for (int i = 0; i < b.n_tokens; i++) state = (state * 31 + b.token[i] + fed++) % 512;
    for (int i = 0; i < 512; i++) logits[i] = i == (int) state ? 3.5f : 0.25f;
    return fed > room;
}
float * llama_get_logits_ith(struct llama_context * c, int32_t i) { (void) c; return i == -1 ? logits : 0; }
uint32_t llama_n_ctx(const struct llama_context * c) { (void) c; return room; }
const char * llama_print_system_info(void) { return "CPU : \\"X\\" = 1"; }
void llama_free(struct llama_context * c) { (void) c; }
void llama_model_free(struct llama_model * m) { (void) m; }
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a built llama.cpp looks like from here, with a stub for the libraries and without gguf."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler here")
    root = tmp_path_factory.mktemp("llama.cpp")
    for folder in ("include", "ggml/include", "build/bin", "build/common", "gguf-py/gguf"):
        (root / folder).mkdir(parents=True)
    (root / "include" / "llama.h").write_text(LLAMA_H)
    (root / "ggml" / "include" / "ggml-backend.h").write_text("void ggml_backend_load_all(void);\n")
    (root / "gguf-py" / "gguf" / "__init__.py").write_text("raise RuntimeError('its own')\n")
    (root / "build" / "llama.pc").write_text("Name: llama\nVersion: 0.5.0-dev\n")
    (root / "build" / "common" / "build-info.cpp").write_text('char const * LLAMA_COMMIT = "0c1e570";\n')
    (root / "stub.c").write_text(LLAMA_C)
    for name in llama_peer.LIBRARIES:
        source = ["stub.c"] if name == "llama" else ["-xc", os.devnull]
        out = f"build/bin/lib{name}.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-Iinclude", "-o", out, *source], cwd=root, check=True)
    return root


def arguments(*argv: str) -> Any:
    return compare.parse(["olmoe-small", *argv])


def test_llama_cpp_is_measured_like_the_others(checkout: Path, scratch: Path) -> None:
    folder = checkpoints.make(checkpoints.SPECS["olmoe-small"], scratch)
    folder.with_name("olmoe-small.gguf").write_text("the stub only opens it")
    args = arguments("--llama-cpp", str(checkout), "--scratch", str(scratch), "--limit", "32MiB", "--new-tokens", "6")
    one = compare.Comparison(checkpoints.SPECS["olmoe-small"], args)
    with limit.Group(None) as group:
        ran = one.worker(group, "llama.cpp", [], label="llama.cpp")
    assert "error" not in ran
    assert ran["limit"]["memory_held_ready"]
    state, want = 0, []
    for at, token in enumerate(decode.stream(VOCAB, 21, decode.SEED)):
        state = (state * 31 + token + at) % VOCAB
        want.append(state)
    assert ran["argmax"] == want[15:]
    assert (ran["new_tokens"], ran["prompt_tokens"], len(ran["step_s"])) == (6, 16, 6)
    assert ran["settings"] == {"n_ctx": 22, "system": "CPU : X = 1"}
    assert 0 < ran["base_rss_bytes"] <= ran["peak_rss_bytes"] < 1 << 30
    assert 0 < ran["load_s"] + ran["ttft_s"] < ran["start_to_first_token_s"] < 60
    assert ran["decode_tokens_per_s"] > 5 / 60
    same = equality.equality(ran["logits"], ran["logits"])
    assert (same["positions"], same["bit_identical"]) == (6, 6)
    # what tables and ratios read is there
    rows = compare.summarise([{**ran, "cache": "cold"}])
    assert rows["llama.cpp"]["cold"]["runs"] == 1


def test_what_every_engine_prints_llama_stream_prints_too(
    checkout: Path, scratch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoints.make(checkpoints.SPECS["llama-3b-small"], scratch)
    monkeypatch.setattr(sys, "argv", ["decode.py", str(folder), "--engine", "resident", "--new-tokens", "3"])
    assert decode.main() == 0
    theirs = json.loads(capsys.readouterr().out)
    built = llama_peer.build(checkout, tmp_path / "stream")
    tokens = llama_peer.write_tokens(range(18), tmp_path / "tokens")
    command = built.command(
        folder / "config.json", tokens, prompt=16, threads=2, max_seconds=1e-9, logits=tmp_path / "l", holder=None
    )
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout).keys() == theirs.keys()
    assert done.stderr == "", "only problems are logged"
    missing = subprocess.run([command[0], "no such file", *command[2:]], capture_output=True, text=True)
    assert (missing.returncode, missing.stderr) == (1, "llama.cpp cannot load the model\n")
    short = subprocess.run([*command[:3], "19", *command[4:]], capture_output=True, text=True)
    assert short.returncode == 1
    assert "PROMPT must be" in short.stderr


def test_llama_stream_frees_the_memory_held_and_stops_when_the_time_is_up(checkout: Path, tmp_path: Path) -> None:
    built = llama_peer.build(checkout, tmp_path / "stream")
    tokens = llama_peer.write_tokens(range(40), tmp_path / "tokens")
    with subprocess.Popen(["sleep", "60"]) as holder:
        command = built.command(
            tokens, tokens, prompt=16, threads=2, max_seconds=1e-9, logits=tmp_path / "l", holder=holder.pid
        )
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        ended = holder.poll()
        holder.kill()
    assert ended == -signal.SIGKILL, "what held the memory is ended first"
    assert json.loads(done.stdout)["new_tokens"] == 3
    assert equality.equality(tmp_path / "l", tmp_path / "l")["positions"] == 3


def test_llama_cpp_version_and_what_a_checkout_lacks(checkout: Path, tmp_path: Path) -> None:
    assert llama_peer.version(checkout) == "0.5.0-dev, commit 0c1e570"
    nested = tmp_path / "sdist" / "vendor" / "llama.cpp"
    nested.mkdir(parents=True)
    (tmp_path / "sdist" / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: 0.3.36\n")
    assert llama_peer.version(nested) == "llama-cpp-python 0.3.36"
    assert llama_peer.version(tmp_path) == "unknown version"
    with pytest.raises(common.BenchError, match=r"no libllama\.so under .*cmake --build"):
        llama_peer.build(nested, tmp_path / "out")
    (nested / "build" / "bin").mkdir(parents=True)
    (nested / "build" / "bin" / "libllama.so").touch()
    with pytest.raises(common.BenchError, match=r"has no include/llama\.h"):
        llama_peer.build(nested, tmp_path / "out")


def test_gguf_file_is_kept_until_the_checkpoint_is_newer(checkout: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / checkpoints.INDEX).write_text("{}")
    with pytest.raises(common.BenchError, match=r"model\.gguf was not written: RuntimeError: its own"):
        llama_peer.gguf(folder, checkout, 1)
    out = tmp_path / "model.gguf"
    out.touch()
    assert llama_peer.gguf(folder, checkout, 1) == out
    os.utime(out, (1, 1))
    with pytest.raises(common.BenchError, match=r"needs .* of disk"):
        llama_peer.gguf(folder, checkout, 1 << 60)


def test_engines_and_result_file_of_a_comparison() -> None:
    assert arguments().engines == ["ours", "accelerate", "transformers-auto"]
    assert arguments("--llama-cpp", "x").engines == ["ours", "accelerate", "transformers-auto", "llama.cpp"]
    assert arguments("--llama-cpp", "x", "--engines", "ours").engines == ["ours", "llama.cpp"]
    assert arguments("--llama-cpp", "x", "--engines", "llama.cpp", "ours").engines == ["llama.cpp", "ours"]
    assert arguments("--resident").engines == ["ours", "transformers-auto"]
    assert arguments().out == common.RESULTS / "olmoe-small.json"
    assert arguments("--resident").out == common.RESULTS / "olmoe-small-resident.json"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--engines", "ours", "llama.cpp"], "needs --llama-cpp DIR"),
        (["--resident", "--limit", "3GiB"], "give one of"),
        (["--resident", "--engines", "accelerate"], "transformers-auto instead"),
    ],
)
def test_options_that_do_not_go_together(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        arguments(*argv)
    assert message in capsys.readouterr().err


def test_resident_runs_get_what_they_need_and_no_limit(scratch: Path) -> None:
    spec = checkpoints.SPECS["olmoe-small"]
    one = compare.Comparison(spec, arguments("--resident", "--scratch", str(scratch)))
    assert (one.limit, one.ram) == (None, spec.weight_bytes + (2 << 30))
    command = one.command("ours", ["--ram", "1"], 6, Path("l"), offload_folder=Path("o"), holder=7)
    assert command[-2:] == ["--release", "7"]
    assert "--max-seconds" not in command
    command = one.command("resident", [], 6, Path("l"), offload_folder=Path("o"), holder=None)
    assert "--release" not in command
    assert command[command.index("--new-tokens") + 1] == "6"
    assert "--max-seconds" in command


def test_table_of_a_resident_comparison() -> None:
    unlimited = {"limit": {"limited": False}}
    runs = [{**run("ours", "warm", 1.9), **unlimited}, {**run("llama.cpp", "warm", 2.0), **unlimited}]
    text = tables.render({
        **fixture_result(), "name": "olmoe", "resident": True, "limit_bytes": None, "llama_cpp": "0.5.0-dev",
        "summary": compare.summarise(runs), "ratios": compare.ratios(runs), "floor": compare.NO_FLOOR,
    })  # fmt: skip
    assert "| llama.cpp, bf16, memory-mapped | 2.00 | 500.0 | 0.95× | 4.0 s |" in text
    assert "| **offload** | 1.90 | 526.3 |  | 4.0 s |" in text
    assert "cold" not in text
    assert "random bf16 weights all in memory; 8 tokens" in text
    assert "the median step of the second half" in text
    assert ", llama.cpp 0.5.0-dev, disk" in text
    assert "Floor" not in text
    assert "WITHOUT" not in text


def test_speed_in_memory_is_that_of_the_later_steps() -> None:
    assert compare.settled([9.0, 5.0, 5.0, 1.0, 3.0, 2.0]) == 2.0
    assert compare.settled([9.0, 4.0]) == 4.0
    assert compare.settled([9.0]) == 9.0


def test_resident_rounds_are_warm_and_without_a_limit(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ("--resident", "--engines", "ours", "--reps", "2", "--scratch", str(scratch))
    one = compare.Comparison(checkpoints.SPECS["olmoe-small"], arguments(*argv))
    assert one.new_tokens == compare.RESIDENT_TOKENS
    monkeypatch.setattr(one, "measure_disk", lambda: None)
    monkeypatch.setattr(compare, "drop_caches", lambda files: pytest.fail("nothing is dropped"))
    monkeypatch.setattr(one, "worker", lambda group, *a, **k: {**run("ours", "", 1.0), "step_s": [9.0, 8.0, 0.5, 0.5]})
    found = one.rounds(None)
    assert [(r["round"], r["cache"], r["decode_tokens_per_s"]) for r in found] == [(1, "warm", 2.0), (2, "warm", 2.0)]


def test_linear_layers_and_attention_are_measured_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []
    ways = {"torch": lambda i: asked.append(("torch", i)), "kernel": lambda i: asked.append(("kernel", i))}
    assert set(linears.in_turn(ways, 3, 2)) == {"torch", "kernel"}
    assert [name for name, _ in asked] == ["kernel", "torch", "torch", "kernel"] * 2
    assert all(a[1] != b[1] for a, b in itertools.pairwise(asked)), "never the same operand twice in a row"
    monkeypatch.setattr(linears, "WORKING_SET", 4 << 20)
    monkeypatch.setattr(linears, "SHAPES", {"small": (8, 16)})
    monkeypatch.setattr(linears, "LENGTHS", (5,))
    if kernels.load() is None:
        pytest.skip("no C compiler here")
    found = linears.measure(1, ["bfloat16"])
    assert [c["size"] for c in found["products"]] == list(linears.TOKENS)
    assert found["attention"][1]["bytes"] == 2 * 8 * 5 * 128 * 2
    text = tables.render({
        "kind": "linears", "machine": common.machine(), "date": "2026-11-21", "load_average_before": 0.5, **found,
    })  # fmt: skip
    assert "| small | bfloat16 | 16 | " in text
    assert "| Llama 3B, attention | bfloat16 | 5 | " in text
    assert "medians of 1 rounds" in text


# startup and tables


def test_startup_reports_a_command_that_fails() -> None:
    found = startup.row("bad", [sys.executable, "-c", "import sys; sys.exit('no model')"], 2)
    assert found == {"what": "bad", "error": "exit code 1: no model"}


def test_startup_takes_the_median() -> None:
    found = startup.row("pass", [sys.executable, "-c", "pass"], 3)
    assert found["median_s"] == sorted(found["readings_s"])[1]


def fixture_result() -> dict[str, Any]:
    runs = [run("ours", "cold", 1.5), run("ours", "warm", 1.6), run("accelerate", "cold", 0.3)]
    runs.append({"engine": "transformers-auto", "cache": "cold", "error": "killed by the kernel"})
    same = {"positions": 8, "equal": 7, "worst_ulps": 1.0, "bit_identical": 7, "largest_difference": 0.1}
    return {
        "kind": "compare", "name": "llama-3b", "date": "2026-11-21 10:00 UTC",
        "machine": {**common.machine(), "cpu": "A CPU", "cores": 2},
        "model": {"weight_bytes": 6 << 30}, "limit_bytes": 9 << 29, "prompt_tokens": 16, "new_tokens": 8,
        "disk": {"bandwidth": 1.2e9}, "summary": compare.summarise(runs), "ratios": compare.ratios(runs),
        "equality": {"runs": [{"engine": "ours", "cache": "cold", **same}]},
        "floor": {"bytes_per_token": 1.2e9, "read_s": 1.0, "compute_s": 0.5, "floor_s": 0.5, "bound": "disk",
                  "share": {"cold": 0.75}},
    }  # fmt: skip


def test_tables_fill_the_readme_and_check_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, readme = tmp_path / "results", tmp_path / "README.md"
    common.write_json(results / "llama-3b.json", fixture_result())
    rows = [{"what": "offload --help", "cache": "warm", "median_s": 0.03}, {"what": "demo, first", "error": "no model"}]
    common.write_json(
        results / "startup.json",
        {"kind": "startup", "date": "2026-11-21 x", "machine": common.machine(), "rows": rows},
    )
    readme.write_text(
        "# T\n<!-- bench:llama-3b -->\nold\n<!-- /bench -->\n\n<!-- bench:startup -->\n<!-- /bench -->\nend\n"
    )
    arguments = ["--readme", str(readme), "--results", str(results)]
    assert tables.main([*arguments, "--check"]) == 1
    assert "out of date" in capsys.readouterr().err
    assert tables.main(arguments) == 0
    text = readme.read_text()
    assert "| **offload** | 1.50 | 1.60 |  | 4.0 s / 4.0 s | 1.00 GiB | 7 of 8 (≤ 1 ulp) |" in text
    assert "| 0.30 | – | 5.0× |" in text
    assert "killed by the kernel" in text
    assert "a memory cgroup of 4.5 GiB" in text
    assert "offload reaches 75 % (cold)" in text
    assert "| `offload --help` | 0.03 s |" in text
    assert text.startswith("# T\n")
    assert text.endswith("end\n")
    assert "\nold\n" not in text
    assert tables.main([*arguments, "--check"]) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- bench:none -->\n<!-- /bench -->\n", "none.json is not there"),
        ("<!-- bench:none -->\n", "has no <!-- /bench -->"),
        ("<!-- bench:odd -->\n<!-- /bench -->\n", "cannot be shown"),
        ("<!-- bench:bad -->\n<!-- /bench -->\n", "not valid JSON"),
    ],
)
def test_tables_name_what_is_wrong(tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "odd.json").write_text(json.dumps({"kind": "odd"}))
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "README.md").write_text(text)
    assert tables.main(["--readme", str(tmp_path / "README.md"), "--results", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


def test_results_name_no_folder_of_this_machine() -> None:
    for path in (ROOT / "bench" / "results").glob("*.json"):
        assert str(Path.home()) + "/" not in path.read_text()


# on a GPU: what can be tried without one


class Device(EmulatedDevice):
    kind = "cuda"


class Replayed:
    """A graph that does the work again."""

    def capture(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        self._work, self._out = work, work().clone()
        return self._out

    def replay(self) -> None:
        self._out.copy_(self._work())


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Stands for a CUDA device; five launches are counted in every pass."""

    @contextmanager
    def counting(stats: StepStats) -> Iterator[None]:
        yield
        stats.launches, stats.syncs, stats.counted = 5, 1, 1

    monkeypatch.setattr(engine, "make_device", lambda config: Device(8e9))
    monkeypatch.setattr(graphs, "cuda_graphs", lambda: Replayed)
    monkeypatch.setattr(launches, "counted", counting)
    return Device(8e9)


def test_a_row_of_gpu_check_has_what_it_should(device: Device, scratch: Path) -> None:
    folder = checkpoints.make(checkpoints.SPECS["llama-3b-small"], scratch)
    off, on = (gpu_check.decode(folder, "512MiB", 6, graphs) for graphs in (False, True))
    assert off["token_ids"] == on["token_ids"]
    assert len(off["token_ids"]) == 6
    assert (off["graphs"], on["graphs"]) == (False, True)
    for row in (off, on):
        assert (row["launches_per_token"], row["syncs_per_token"], row["notes"]) == (5, 1, [])
        assert row["decode_tokens_per_s"] > 0
    assert on["captured_modules"] == on["replays_per_token"] > 0
    json.dumps([off, on])


def test_gpu_check_says_why_nothing_is_read_directly(device: Device, scratch: Path) -> None:
    folder = checkpoints.make(checkpoints.SPECS["llama-3b-small"], scratch)
    row = gpu_check.direct(folder, device)
    assert row["bytes_per_s"] is None
    assert "CUDA" in row["why"] or "kvikio" in row["why"]


# predictions


def test_a_cell_of_the_grid_is_judged_by_the_requests_after_the_first_two(
    scratch: Path, tmp_path: Path, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a worker has a process of its own; this one holds the suite
    monkeypatch.setattr(predict, "OVERHEAD", predict.OVERHEAD + mem.rss())
    folder = checkpoints.make(checkpoints.SPECS["olmoe-small"], scratch)
    cell = {"model": "olmoe-2b", "percent": 60, "batch": 2, "prompt": 8, "new": 4, "device": "cpu"}
    row = predict.worker(folder, cell)
    assert len(row["requests"]) == predict.REQUESTS
    first, *later = row["requests"]
    assert first["model_decode_s"] is None
    assert all(r["model_decode_s"] > 0 and r["told_ttft_s"] > 0 and r["decode_s"] > 0 for r in later)
    row["errors"] = predict.judge(row)
    want = sorted(r["told_decode_s"] / r["decode_s"] - 1 for r in row["requests"][2:])
    assert row["errors"]["told_decode"] == pytest.approx(sum(want) / 2)
    assert row["errors"]["drift"] is None, "nothing much was read"
    total = predict.summary([row, row])
    assert total["told_decode"]["p90"] == pytest.approx(abs(row["errors"]["told_decode"]))
    predict.draw([row], tmp_path / "scatter.svg")
    assert (tmp_path / "scatter.svg").read_text().count("<circle") == 4 + 4


def test_the_grid_is_as_large_as_it_should_be() -> None:
    cells = predict.cells()
    assert len(cells) >= 24
    for key, values in (("batch", {1, 4, 16}), ("device", {"cpu", "emulated"}), ("prompt", {32, 512})):
        assert {c[key] for c in cells} == values
    assert {min(c["percent"] for c in cells), max(c["percent"] for c in cells)} == {30, 100}


def test_a_plan_by_hand_is_measured_or_refused(
    scratch: Path, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a worker has a process of its own; this one holds the suite
    monkeypatch.setattr(regret, "OVERHEAD", regret.OVERHEAD + mem.rss())
    folder = checkpoints.make(checkpoints.SPECS["llama-3b-small"], scratch)
    cell = {"percent": 50, "batch": 1, "prompt": 8, "new": 3, "device": "cpu"}
    run = regret.worker(folder, cell, {"lookahead": 1, "resident_layers": 2})
    assert run["lookahead"] == 1
    assert run["seconds"] > run["ttft_s"] > 0
    assert "resident_layers=9" in regret.worker(folder, cell, {"resident_layers": 9})["refused"]


def test_tables_of_predictions_and_regret() -> None:
    errors = dict.fromkeys(("told_decode", "told_ttft", "model_decode", "model_ttft"), 0.031)
    cell = {"model": "m", "device": "cpu", "percent": 50, "batch": 4, "prompt": 32,
            "errors": {**errors, "drift": None}, "requests": [{"decode_s": 0.5, "ttft_s": 1.25}]}  # fmt: skip
    result = {"kind": "predict", "machine": common.machine(), "date": "2026-01-01 00:00 UTC", "link": "2GB",
              "summary": {k: {"median": 0.012, "p90": 0.15} for k in (*errors, "first_decode")},
              "cells": [cell]}  # fmt: skip
    text = tables.render(result)
    assert "1.2 % / 15.0 %" in text
    assert "| m, cpu, 50%, batch 4, prompt 32 | 8.00 tokens/s | +3% | +3% | 1.25 s | +3% | +3% | – |" in text
    rows = [{"set": {}, "runs": [1], "seconds": 2.0}, {"set": {"lookahead": 0}, "runs": [1], "seconds": 2.5},
            {"set": {"lookahead": 9}, "runs": []}]  # fmt: skip
    result = {"kind": "regret", "machine": common.machine(), "date": "2026-01-01 00:00 UTC", "rounds": 3,
              "target": 0.05, "cells": {"a cell": {"rows": rows, "regret": -0.2, "spread": 0.01}}}  # fmt: skip
    assert "| a cell | 2.00 s | 2.50 s | lookahead=0 | -20.0% | 1.0% |" in tables.render(result)

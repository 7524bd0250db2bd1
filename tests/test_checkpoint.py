"""Model folders: whatever is in them is either run right or refused in one clear line. Never trust a file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, save
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from offload import hf, native
from offload.checkpoint import INDEX, MAX_HEADER, SINGLE, read_checkpoint
from offload.config import RunConfig
from offload.embedding import RowReader
from offload.engine import Engine, Sequences
from offload.gather import Extent, Gather
from offload.layout import Table, alike, lay_out
from tiers import (
    PAGE,
    Arena,
    CheckpointError,
    DirectReader,
    ModelError,
    OffloadError,
    TransferQueue,
    page_up,
)

Header = dict[str, Any]
IDS = torch.arange(4, 17).view(1, -1)
Q0 = "model.layers.0.self_attn.q_proj.weight"
K0, V0 = Q0.replace("q_proj", "k_proj"), Q0.replace("q_proj", "v_proj")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense checkpoint that nobody writes to."""
    folder = tmp_path_factory.mktemp("pristine")
    build("llama").save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(fresh_cache: Path) -> Path:
    return fresh_cache


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(pristine, tmp_path / "model")
    return tmp_path / "model"


@contextlib.contextmanager
def running(folder: Path, **options: Any) -> Iterator[Engine]:
    engine = Engine(folder, RunConfig(ram="8GiB", device="cpu", context=32, **options))
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture(autouse=True)
def _the_oracles_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read is compared bit by bit, so torch computes here as it does there."""
    monkeypatch.setattr(native, "attach", lambda model, device: False)


def logits(folder: Path, **options: Any) -> torch.Tensor:
    with running(folder, **options) as engine:
        out: torch.Tensor = engine.step(Sequences(engine.new_cache(32)), IDS).logits
        return out


def oracle(folder: Path, **options: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.inference_mode():
        out: torch.Tensor = model(IDS).logits
        return out


def refusal(folder: Path) -> OffloadError:
    """The one line with which the folder is refused."""
    with pytest.raises(OffloadError) as e:
        Engine(folder, RunConfig(ram="8GiB", device="cpu", context=32)).close()
    check_line(e.value)
    return e.value


def check_line(error: OffloadError) -> None:
    text = str(error)
    assert text
    assert "\n" not in text
    assert "\r" not in text
    assert "\x1b" not in text, "a file's contents never reach the terminal unescaped"
    assert len(text) < 700, text
    assert "Traceback" not in text


def read(path: Path) -> tuple[Header, bytes]:
    raw = path.read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + n]), raw[8 + n :]


def write(path: Path, header: Any, data: bytes, pad: int = 0) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw += b" " * (max(pad, len(raw)) - len(raw))
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def edit(folder: Path, change: Callable[[Header], Any]) -> None:
    """Change the header of the only shard."""
    header, data = read(folder / SINGLE)
    result = change(header)
    write(folder / SINGLE, result if isinstance(result, dict) else header, data)


def configure(folder: Path, *gone: str, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = {k: v for k, v in (config | changes).items() if k not in gone}
    (folder / "config.json").write_text(json.dumps(config))


def shard(folder: Path) -> dict[str, Any]:
    """Make it a checkpoint of several files; returns its index."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / SINGLE).unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    index = json.loads((folder / INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 3
    return dict(index)


def reindex(folder: Path, **changes: str | Any) -> None:
    """The file in which the index says the tensors lie."""
    index = shard(folder)
    index["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(index))


def drop(*names: str) -> Callable[[Header], Header]:
    return lambda h: {k: v for k, v in h.items() if k not in names}


def renamed(**names: str) -> Callable[[Header], Header]:
    return lambda h: {names.get(k.replace(".", "__"), k): v for k, v in h.items()}


def set_(name: str, **entry: Any) -> Callable[[Header], None]:
    return lambda h: h[name].update(entry)


# what is wrong with the config


def config_text(text: str | bytes) -> Callable[[Path], None]:
    raw = text.encode() if isinstance(text, str) else text
    return lambda folder: [(folder / "config.json").write_bytes(raw), None][1]


CONFIGS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "none": (lambda f: (f / "config.json").unlink(), r"no config\.json"),
    "empty": (config_text(""), r"config\.json is not valid JSON"),
    "not JSON": (config_text("{'model_type': 'llama'}"), r"config\.json is not valid JSON"),
    "not UTF-8": (config_text(b'{"model_type": "\xff"}'), r"config\.json is not valid JSON"),
    "nested without end": (config_text("[" * 200_000), r"config\.json is not valid JSON"),
    "a list": (config_text("[]"), r"config\.json is not a JSON object"),
    "nothing in it": (config_text("{}"), r"config\.json: model type None is not known"),
    "unknown model type": (lambda f: configure(f, model_type="llama17"), r"'llama17' is not known to transformers"),
    "model type is a list": (lambda f: configure(f, model_type=["llama"]), r"config\.json"),
    "model type is a number": (lambda f: configure(f, model_type=7), r"config\.json.*7"),
    "model type with a newline": (lambda f: configure(f, model_type="a\nb\x1b[31m"), r"config\.json"),
    "an encoder": (
        lambda f: config_text(json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}))(f),
        "BertForMaskedLM is not a causal language model",
    ),
    "a classifier": (
        lambda f: configure(f, architectures=["LlamaForSequenceClassification"]), "is not a causal language model",
    ),
    "an encoder-decoder": (
        lambda f: config_text(json.dumps({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}))(f),
        "t5 is an encoder-decoder",
    ),
    "no language model": (lambda f: config_text('{"model_type": "vit"}')(f), "vit is not a causal language model"),
    "remote code": (
        lambda f: configure(f, model_type="own", auto_map={"AutoModelForCausalLM": "modeling_own.Own"}),
        "needs code from the model's folder, which is not run",
    ),
    "quantised with gptq": (
        lambda f: configure(f, quantization_config={"quant_method": "gptq", "bits": 4}), r"quantised \(gptq\)",
    ),
    "quantised with fp8": (
        lambda f: configure(f, quantization_config={"quant_method": "fp8"}), r"quantised \(fp8\)",
    ),
    "quantised somehow": (lambda f: configure(f, quantization_config={}), "quantised"),
    "quantised by a word": (lambda f: configure(f, quantization_config="int4"), "."),
    "a dtype that is none": (lambda f: configure(f, dtype="float31"), r"config\.json"),
    "a dtype that cannot be computed in": (lambda f: configure(f, dtype="int8"), r"dtype torch\.int8"),
    "an activation that is none": (lambda f: configure(f, hidden_act="snake\noil"), "."),
    "hidden size is a word": (lambda f: configure(f, hidden_size="big"), "."),
    "hidden size below zero": (lambda f: configure(f, hidden_size=-64), "."),
    "hidden size zero": (lambda f: configure(f, hidden_size=0), "."),
    "no layers": (lambda f: configure(f, num_hidden_layers=0), "."),
    "layers below zero": (lambda f: configure(f, num_hidden_layers=-1), "."),
    "no heads": (lambda f: configure(f, num_attention_heads=0), "."),
    "heads that do not divide": (lambda f: configure(f, "head_dim", num_attention_heads=7), "."),
    "vocabulary below zero": (lambda f: configure(f, vocab_size=-5), "."),
    "architectures is a number": (lambda f: configure(f, architectures=5), "."),
    "rope of no kind": (lambda f: configure(f, rope_parameters={"rope_type": "rhumb"}), "."),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_cannot_be_run(folder: Path, case: str) -> None:
    damage, words = CONFIGS[case]
    damage(folder)
    error = refusal(folder)
    assert isinstance(error, ModelError)
    with pytest.raises(type(error), match=words):
        raise error


def test_a_config_with_remote_code_that_the_library_knows_runs_without_it(folder: Path) -> None:
    want = oracle(folder)
    configure(folder, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    (folder / "evil.py").write_text("raise SystemExit('the code of a model was run')")
    assert torch.equal(logits(folder), want)


# what is wrong with the weights


def cut(nbytes: int) -> Callable[[Path], None]:
    return lambda f: os.truncate(f / SINGLE, nbytes)


def only(name: str) -> Callable[[Path], None]:
    return lambda f: [(f / SINGLE).unlink(), (f / name).write_bytes(b"x"), None][2]


def stored_as(dtype: torch.dtype, name: str = Q0) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        tensors[name] = tensors[name].to(dtype)
        save_file(tensors, folder / SINGLE)

    return change


def with_tensors(**extra: torch.Tensor) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        more = {k.replace("__", "."): v for k, v in extra.items()}
        save_file(load_file(folder / SINGLE) | more, folder / SINGLE)

    return change


def rewrite(header: Any) -> Callable[[Path], None]:
    return lambda f: write(f / SINGLE, header, read(f / SINGLE)[1])


def edited(change: Callable[[Header], Any]) -> Callable[[Path], None]:
    return lambda f: edit(f, change)


def raw_length(n: int) -> Callable[[Path], None]:
    return lambda f: [(f / SINGLE).write_bytes(struct.pack("<Q", n) + (f / SINGLE).read_bytes()[8:]), None][1]


def overlap(header: Header) -> None:
    header[K0]["data_offsets"] = header[V0]["data_offsets"]


def shifted(by: int) -> Callable[[Header], None]:
    def change(h: Header) -> None:
        last = max((k for k in h if k != "__metadata__"), key=lambda k: h[k]["data_offsets"][1])
        h[last]["data_offsets"] = [x + by for x in h[last]["data_offsets"]]

    return change


FP8_SCALE = "model.layers.0.self_attn.q_proj.weight_scale_inv"
WEIGHTS: dict[str, tuple[Callable[[Path], Any], type[ModelError], str]] = {
    "none": (lambda f: (f / SINGLE).unlink(), ModelError, f"no {SINGLE} and no {INDEX}"),
    "pickles only": (only("pytorch_model.bin"), ModelError, r"only pickle weights \(pytorch_model\.bin\)"),
    "a .pt pickle only": (only("consolidated.00.pth"), ModelError, "pickle"),
    "shards without an index": (only("model-00001-of-00002.safetensors"), CheckpointError, "neither"),
    "an empty file": (cut(0), CheckpointError, f"{SINGLE} is 0 bytes long"),
    "seven bytes": (cut(7), CheckpointError, f"{SINGLE} is 7 bytes long"),
    "cut inside the header": (cut(500), CheckpointError, f"{SINGLE}: the header says .* truncated"),
    "cut inside the data": (cut(100_000), CheckpointError, f"{SINGLE}: tensor .* truncated"),
    "a header longer than the file": (raw_length(50_000_000), CheckpointError, "truncated"),
    "a header of absurd length": (raw_length(MAX_HEADER + 1), CheckpointError, "absurd"),
    "a header of 2^64 - 1 bytes": (raw_length((1 << 64) - 1), CheckpointError, "absurd"),
    "an empty header": (rewrite(b""), CheckpointError, "not valid JSON"),
    "a header that is no JSON": (rewrite(b"{'a': 1}"), CheckpointError, "header is not valid JSON"),
    "a header that is not UTF-8": (rewrite(b'{"\xff": 1}'), CheckpointError, "header is not valid JSON"),
    "a header nested without end": (rewrite(b"[" * 200_000), CheckpointError, "header is not valid JSON"),
    "a header that is a list": (rewrite([1, 2]), CheckpointError, "header is not a JSON object"),
    "a number of 10,000 digits": (
        rewrite(b'{"a":{"dtype":"F32","shape":[' + b"9" * 10_000 + b"]}}"), CheckpointError, SINGLE,
    ),
    "overlapping tensors": (edited(overlap), CheckpointError, "overlap"),
    "a tensor beyond the end": (edited(shifted(1 << 20)), CheckpointError, "truncated"),
    "a tensor far beyond the end": (edited(shifted(1 << 59)), CheckpointError, SINGLE),
    "a tensor before the beginning": (edited(shifted(-(1 << 40))), CheckpointError, "offsets"),
    "offsets that are fractions": (edited(set_(Q0, data_offsets=[0.0, 16384.0])), CheckpointError, "offsets"),
    "offsets that are true": (edited(set_(Q0, data_offsets=[True, 16385])), CheckpointError, "offsets"),
    "offsets backwards": (edited(set_(Q0, data_offsets=[16384, 0])), CheckpointError, Q0),
    "one offset": (edited(set_(Q0, data_offsets=[0])), CheckpointError, "offsets"),
    "no offsets": (edited(lambda h: h[Q0].pop("data_offsets")), CheckpointError, "offsets"),
    "offsets of a megabyte": (edited(set_(Q0, data_offsets=["x" * 1_000_000])), CheckpointError, "offsets"),
    "an unknown dtype": (edited(set_(Q0, dtype="F33")), CheckpointError, "'F33', which is not known"),
    "a dtype that is a list": (edited(set_(Q0, dtype=["F32"])), CheckpointError, "dtype"),
    "a dtype with a newline": (edited(set_(Q0, dtype="F\n33")), CheckpointError, "dtype"),
    "a dtype of a megabyte": (edited(set_(Q0, dtype="F" * 1_000_000)), CheckpointError, "dtype"),
    "shape and offsets disagree": (edited(set_(Q0, shape=[64, 65])), CheckpointError, "spans"),
    "a shape below zero": (edited(set_(Q0, shape=[-64, -64])), CheckpointError, "shape"),
    "a shape that is a number": (edited(set_(Q0, shape=4096)), CheckpointError, "shape"),
    "a shape of fractions": (edited(set_(Q0, shape=[64.0, 64.0])), CheckpointError, "shape"),
    "a shape of true": (edited(set_(Q0, shape=[True, 4096])), CheckpointError, "shape"),
    "a shape of many dimensions": (edited(set_(Q0, shape=[1 << 59] * 300)), CheckpointError, Q0),
    "a shape of a million dimensions": (edited(set_(Q0, shape=[1] * 1_000_000)), CheckpointError, Q0),
    "a shape of words": (edited(set_(Q0, shape=["x" * 1000] * 1000)), CheckpointError, "shape"),
    "an entry that is a word": (edited(lambda h: h.update({Q0: "F32"})), CheckpointError, "no description"),
    "another shape than the config's": (edited(set_(Q0, shape=[32, 128])), CheckpointError, r"\[32, 128\].*\[64, 64\]"),
    "a vector for a matrix": (edited(set_(Q0, shape=[4096])), CheckpointError, r"\[4096\].*\[64, 64\]"),
    "another config": (lambda f: configure(f, intermediate_size=100), CheckpointError, r"\[96, 64\].*\[100, 64\]"),
    "more layers in the config": (lambda f: configure(f, num_hidden_layers=5), CheckpointError, r"lacks .*layers\.4"),
    "fewer layers in the config": (lambda f: configure(f, num_hidden_layers=3), CheckpointError, r"layers\.3.*another"),
    "a missing tensor": (edited(drop(Q0)), CheckpointError, f"lacks {Q0}"),
    "no tensors": (edited(lambda h: {}), CheckpointError, "lacks"),
    "an unexpected tensor": (with_tensors(model__extra=torch.ones(3)), CheckpointError, r"model\.extra"),
    "an unexpected tensor with a newline": (
        with_tensors(**{"model.ex\n\x1b[31mtra": torch.ones(3)}), CheckpointError, "another model",
    ),
    "a broken tensor with a newline": (
        edited(lambda h: h.update({"a\nb\x1b[2J": {"dtype": "F33"}})), CheckpointError, "dtype",
    ),
    "an unexpected tensor with a long name": (with_tensors(**{"x" * 5000: torch.ones(3)}), CheckpointError, "another"),
    "a layer of 10,000 digits": (
        with_tensors(**{f"model.layers.{'9' * 10_000}.w": torch.ones(3)}), CheckpointError, SINGLE,
    ),
    "a layer of strange digits": (with_tensors(**{"model.layers.²._": torch.ones(3)}), CheckpointError, "."),
    "an unexpected tensor without a name": (with_tensors(**{"": torch.ones(3)}), CheckpointError, "."),
    "FP8 with scales": (
        lambda f: [stored_as(torch.float8_e4m3fn)(f), with_tensors(**{FP8_SCALE: torch.ones(1, 1)})(f)],
        ModelError, "look quantised",
    ),
    "GPTQ without saying so": (
        with_tensors(model__layers__0__mlp__up_proj__qweight=torch.ones(3, dtype=torch.int32)), ModelError, "quantised",
    ),
    "FP8 without scales": (stored_as(torch.float8_e4m3fn), CheckpointError, f"{Q0} is stored as torch.float8"),
    "int8 without scales": (stored_as(torch.int8), CheckpointError, f"{Q0} is stored as torch.int8"),
    "int32 for a norm": (stored_as(torch.int32, "model.norm.weight"), CheckpointError, r"model\.norm\.weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_cannot_be_run(folder: Path, case: str) -> None:
    damage, kind, words = WEIGHTS[case]
    damage(folder)
    error = refusal(folder)
    assert type(error) is kind, error
    with pytest.raises(kind, match=words):
        raise error


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_fp8_is_refused_in_every_dtype(folder: Path, dtype: str) -> None:
    """Without their scales the bytes mean nothing, whatever they are widened to."""
    stored_as(torch.float8_e4m3fn)(folder)
    configure(folder, dtype=dtype)
    assert isinstance(refusal(folder), CheckpointError)


INDICES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "not JSON": (lambda f: [shard(f), (f / INDEX).write_text("{")], f"{INDEX} is not valid JSON"),
    "nested without end": (lambda f: [shard(f), (f / INDEX).write_text("[" * 200_000)], "not valid JSON"),
    "a list": (lambda f: [shard(f), (f / INDEX).write_text("[]")], "no weight_map"),
    "no weight_map": (lambda f: [shard(f), (f / INDEX).write_text("{}")], "no weight_map"),
    "an empty weight_map": (lambda f: [shard(f), (f / INDEX).write_text('{"weight_map": {}}')], "no weight_map"),
    "a weight_map that is a list": (lambda f: [shard(f), (f / INDEX).write_text('{"weight_map": [1]}')], "weight_map"),
    "a file that is a number": (lambda f: reindex(f, **{Q0: 7}), "not a name"),
    "a file without a name": (lambda f: reindex(f, **{Q0: ""}), "not a name"),
    "outside the folder": (lambda f: reindex(f, **{Q0: "../model.safetensors"}), "outside the model's folder"),
    "outside by a detour": (lambda f: reindex(f, **{Q0: "a/../../model.safetensors"}), "outside the model's folder"),
    "an absolute path": (lambda f: reindex(f, **{Q0: "/etc/model.safetensors"}), "outside the model's folder"),
    "a path with backslashes": (lambda f: reindex(f, **{Q0: "..\\model.safetensors"}), "outside the model's folder"),
    "a path with a null byte": (lambda f: reindex(f, **{Q0: "a\0.safetensors"}), "outside the model's folder"),
    "another kind of file": (lambda f: reindex(f, **{Q0: "pytorch_model.bin"}), "not a .safetensors file"),
    "a file that is not there": (lambda f: reindex(f, **{Q0: "other.safetensors"}), r"other\.safetensors is missing"),
    "a file with a newline": (lambda f: reindex(f, **{Q0: "a\nb\x1b[2J.safetensors"}), "missing"),
    "a file with a long name": (lambda f: reindex(f, **{Q0: "x" * 5000 + ".safetensors"}), "."),
    "a file with a surrogate": (lambda f: reindex(f, **{Q0: "\ud800.safetensors"}), "."),
    "a folder": (lambda f: [(f / "sub.safetensors").mkdir(), reindex(f, **{Q0: "sub.safetensors"})], "missing"),
    "a tensor that is in no file": (lambda f: reindex(f, extra="model-00001-of-00015.safetensors"), "."),
    "a shard that is gone": (lambda f: first_shard(f).unlink(), r"model-00001-of-\d+\.safetensors is missing"),
    "a shard that is cut short": (lambda f: cut_in_half(first_shard(f)), r"model-00001-of-\d+\.safetensors.*truncated"),
    "a shard that lacks a tensor": (lambda f: shard_without(f), r"lacks tensor .*model\.safetensors\.index\.json says"),
}  # fmt: skip


def first_shard(folder: Path) -> Path:
    shard(folder)
    return min(folder.glob("model-*.safetensors"))


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def shard_without(folder: Path) -> None:
    path = first_shard(folder)
    header, data = read(path)
    name = next(k for k in header if k != "__metadata__")
    write(path, drop(name)(header), data)


@pytest.mark.parametrize("case", INDICES)
def test_indices_that_cannot_be_followed(folder: Path, case: str) -> None:
    damage, words = INDICES[case]
    damage(folder)
    error = refusal(folder)
    assert type(error) is CheckpointError, error
    with pytest.raises(CheckpointError, match=words):
        raise error


@pytest.mark.parametrize("shape", [[], [0], [0, 64], [6144], [96, 64, 1], [1, 96, 64], [1, 1, 1, 1, 6144], [64, 96]])
@pytest.mark.parametrize("expert", [0, 1, 5])
def test_an_expert_of_another_shape_is_refused(
    tiny_mixtral: Path, tmp_path: Path, shape: list[int], expert: int
) -> None:
    """Experts go through the library's conversions, which must not trip over it either."""
    copy = shutil.copytree(tiny_mixtral, tmp_path / "model")
    name = f"model.layers.1.block_sparse_moe.experts.{expert}.w1.weight"

    def change(h: Header) -> None:
        begin = h[name]["data_offsets"][0]
        n = 4
        for size in shape:
            n *= size
        h[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, begin + n]}

    edit(copy, change)
    assert isinstance(refusal(copy), CheckpointError)


def test_a_missing_expert_is_refused(tiny_mixtral: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_mixtral, tmp_path / "model")
    edit(copy, lambda h: {k: v for k, v in h.items() if ".1.block_sparse_moe.experts.3." not in k})
    assert isinstance(refusal(copy), CheckpointError)


@pytest.fixture(scope="module")
def tiny_mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    build("mixtral", num_hidden_layers=2).save_pretrained(folder)
    return folder


# anything at all


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 200) | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
    | st.sampled_from(["F32", "BF16", "F8_E4M3", "BOOL", 1 << 59, 1 << 63, -1]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def skeleton(pristine: Path) -> PreTrainedModel:
    return hf.build_skeleton(hf.load_config(pristine), torch.float32)


@settings(max_examples=250, deadline=None, database=None)
@given(data=st.data())
def test_no_header_brings_anything_but_one_clear_line(
    data: st.DataObject, pristine: Path, skeleton: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory
) -> None:
    header, body = read(pristine / SINGLE)
    names = st.sampled_from(sorted(header))
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(names)
        kind = data.draw(st.sampled_from(["field", "entry", "rename", "drop", "copy"]))
        if kind == "field" and isinstance(header.get(name), dict):
            header[name][data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "x"]))] = data.draw(json_values)
        elif kind == "entry":
            header[name] = data.draw(json_values)
        elif kind == "rename":
            header[data.draw(st.text(max_size=20))] = header.pop(name, None)
        elif kind == "copy":
            header[name] = header.get(data.draw(names))
        else:
            header.pop(name, None)
    folder = tmp_path_factory.mktemp("fuzz")
    if data.draw(st.booleans()):
        write(folder / SINGLE, header, body)
    else:
        raw = bytearray(json.dumps(header).encode())
        for _ in range(data.draw(st.integers(1, 5))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        write(folder / SINGLE, bytes(raw), body)
    try:
        found = hf.trace(skeleton, read_checkpoint(folder).tensors)
    except OffloadError as e:
        check_line(e)
    else:
        size = (folder / SINGLE).stat().st_size
        assert set(found) == set(skeleton.state_dict())
        for gather in found.values():
            assert sum(e.nbytes for e in gather.extents) == gather.nbytes
            assert all(e.file == 0 and 8 < e.offset <= e.offset + e.nbytes <= size for e in gather.extents)
    finally:
        shutil.rmtree(folder)


@settings(max_examples=120, deadline=None, database=None)
@given(data=st.data())
def test_no_config_brings_anything_but_one_clear_line(
    data: st.DataObject, pristine: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = json.loads((pristine / "config.json").read_text())
    values = st.one_of(
        st.none(), st.booleans(), st.integers(-3, 200), st.floats(-10, 10), st.text(max_size=8),
        st.lists(st.integers(0, 9)), st.dictionaries(st.text(max_size=3), st.integers(0, 9), max_size=2),
    )  # fmt: skip
    for _ in range(data.draw(st.integers(1, 2))):
        config[data.draw(st.sampled_from(sorted(config)))] = data.draw(values)
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "config.json").write_text(json.dumps(config))
    try:
        read_ = hf.load_config(folder)
        if hf.decoder_layers(hf.build_skeleton(read_, hf.compute_dtype(read_, "auto"))):
            assert hf.kv_bytes(read_, 10, 4) >= 0
            assert hf.activation_bytes(read_, 4, 10, 4, True) >= 0
    except ModelError as e:
        check_line(e)
    finally:
        shutil.rmtree(folder)


# what must work


def test_a_hub_cache_of_symlinks(pristine: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abcd"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for file in pristine.iterdir():
        blob = blobs / hashlib.sha256(file.name.encode()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", blob.name))
    assert (snapshot / SINGLE).is_symlink()
    assert torch.equal(logits(snapshot), oracle(pristine))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_sharded_checkpoint(family: str, tmp_path: Path) -> None:
    model = save(build(family), tmp_path, max_shard_size="50KB")
    assert (tmp_path / INDEX).is_file()
    with torch.inference_mode():
        want = model(IDS).logits
    got = logits(tmp_path)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_a_sharded_checkpoint_in_subfolders(folder: Path) -> None:
    """A tensor lies where the index says, even if another shard of the same name has one of the same name."""
    want = oracle(folder)
    index = shard(folder)
    (folder / "sub").mkdir()
    file = index["weight_map"][Q0]
    tensors = load_file(folder / file)
    save_file({k: torch.zeros_like(v) if k == Q0 else v for k, v in tensors.items()}, folder / "sub" / file)
    index["weight_map"][next(k for k in tensors if k != Q0)] = f"sub/{file}"
    (folder / INDEX).write_text(json.dumps(index))
    assert torch.equal(logits(folder), want)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize(
    ("stored", "compute"),
    [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16"), ("float16", "bfloat16")],
)
def test_casts_are_transformers_own(family: str, stored: str, compute: str, tmp_path: Path) -> None:
    build(family, dtype=getattr(torch, stored)).save_pretrained(tmp_path)
    want = oracle(tmp_path, dtype=getattr(torch, compute))
    assert want.dtype is getattr(torch, compute)
    for resident in ("100%", "70%"):
        got = logits(tmp_path, dtype=compute, resident=resident)
        assert got.dtype is want.dtype
        assert torch.equal(got, want)


def test_doubles_are_cast(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    save_file({k: v.double() for k, v in tensors.items()}, folder / SINGLE, metadata={"format": "pt"})
    assert torch.equal(logits(folder), oracle(folder, dtype=torch.float32))


def test_what_a_family_keeps_in_float32_stays_there(tmp_path: Path) -> None:
    """deepseek_v3's correction bias decides which experts are chosen: bfloat16 would choose others."""
    model = build("deepseek_v3")
    model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    with running(tmp_path, dtype="bfloat16") as engine, torch.inference_mode():
        engine.step(Sequences(engine.new_cache(32)), IDS)
        mine = {s.name: s.dtype for layer in engine.layout.layers for part in layer.dense for s in part.specs}
    bias = [n for n in mine if n.endswith("e_score_correction_bias")]
    assert bias
    theirs = stock.state_dict()
    assert mine == {n: theirs[n].dtype for n in mine}
    assert {mine[n] for n in bias} == {torch.float32}


@pytest.mark.parametrize("stored", ["embedding", "head", "both"])
def test_tied_weights_stored_under_either_name(tmp_path: Path, stored: str) -> None:
    folder = tmp_path / "model"
    model = build("qwen2")
    assert model.config.tie_word_embeddings
    model.save_pretrained(folder)
    want = oracle(folder)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    header, data = read(folder / SINGLE)
    assert embedding in header
    assert head not in header
    if stored == "both":
        tensors = load_file(folder / SINGLE)
        save_file(tensors | {head: tensors[embedding].clone()}, folder / SINGLE, metadata={"format": "pt"})
    elif stored == "head":
        write(folder / SINGLE, {head if k == embedding else k: v for k, v in header.items()}, data)
    assert torch.equal(logits(folder), want)
    assert torch.equal(logits(folder, resident="60%"), want)
    edit(folder, drop(embedding, head))
    assert isinstance(refusal(folder), CheckpointError)


def test_a_checkpoint_of_the_base_model(folder: Path) -> None:
    """Names without the `model.` prefix, and leftovers that are known to mean nothing."""
    want = oracle(folder)
    edit(folder, lambda h: {k.removeprefix("model."): v for k, v in h.items()})
    with_tensors(layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8))(folder)
    assert torch.equal(logits(folder), want)


def test_tensors_of_no_size_are_read_over(folder: Path) -> None:
    want = oracle(folder)
    with_tensors(layers__0__self_attn__rotary_emb__inv_freq=torch.ones(0))(folder)
    assert torch.equal(logits(folder), want)


# the layout

BYTES = random.Random(5).randbytes(700_000)


@pytest.fixture(scope="module")
def two_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("bytes")
    paths = [folder / "a.bin", folder / "b.bin"]
    paths[0].write_bytes(BYTES)
    paths[1].write_bytes(BYTES[::-1])
    return paths


@st.composite
def stored_params(draw: st.DrawFn) -> list[tuple[str, Gather, torch.dtype]]:
    """Parameters as they lie in files: in runs or apart, aligned or not, whole or in pieces, to be cast or not."""
    params = []
    end = [8 * draw(st.integers(1, 600)) + draw(st.sampled_from([0, 0, 0, 3])) for _ in range(2)]
    for i in range(draw(st.integers(1, 12))):
        dtype, compute = draw(st.sampled_from([
            (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.int64, torch.int64),
            (torch.float32, torch.float32), (torch.uint8, torch.uint8), (torch.float32, torch.bfloat16),
            (torch.bfloat16, torch.float32),
        ]))  # fmt: skip
        items = draw(st.one_of(st.integers(1, 300), st.integers(8_000, 30_000)))
        pieces = draw(st.sampled_from([1, 1, 1, 1, 1, 1, 2, 3]))
        extents = []
        for _ in range(pieces):
            file = draw(st.integers(0, 1))
            gap = draw(st.sampled_from([0, 0, 0, 1, 8, 3000, 5000, 12_000]))
            n = items * dtype.itemsize
            if end[file] + gap + n > len(BYTES):
                return params or [("p", Gather([8], torch.uint8, [Extent(0, 16, 8)]), torch.uint8)]
            extents.append(Extent(file, end[file] + gap, n))
            end[file] += gap + n
        params.append((f"p{i}", Gather([pieces, items], dtype, extents), compute))
    return draw(st.permutations(params))


@settings(max_examples=150, deadline=None, database=None)
@given(params=stored_params(), data=st.data())
def test_a_block_holds_its_tensors_whatever_order_they_arrive_in(
    params: list[tuple[str, Gather, torch.dtype]], data: st.DataObject, two_files: list[Path]
) -> None:
    laid_out = lay_out("block", params)
    block, specs = laid_out.block, laid_out.specs
    assert sorted(s.name for s in specs) == sorted(n for n, _, _ in params)
    # no tensor lies in another's bytes, nor in the pages that a direct read fills beside its own
    spans = sorted((s.dst, s.dst + s.nbytes, s.name) for s in specs)
    assert all(a[1] <= b[0] for a, b in pairwise(spans))
    assert max((s[1] for s in spans), default=0) <= block.slot_nbytes
    assert block.nbytes == sum(s.nbytes for s in specs)
    assert block.stored_nbytes < sum(g.nbytes for _, g, _ in params) + PAGE * len(params), "gaps are not worth reading"
    slot = Arena(page_up(block.slot_nbytes)).allocate(block.slot_nbytes)
    reader = DirectReader(two_files)
    try:
        pieces = [p for s in block.segments for p in reader.split(s, slot)]
        assert [p.dst for p in pieces] == sorted(p.dst for p in pieces), "what comes first lies first (`arrived`)"
        for piece in data.draw(st.permutations(pieces)):
            reader.read(piece, slot)
    finally:
        reader.close()
    contents = [BYTES, BYTES[::-1]]
    by_name = {n: (g, d) for n, g, d in params}
    for spec in specs:
        gather, dtype = by_name[spec.name]
        assert (spec.dtype, spec.shape) == (dtype, tuple(gather.shape))
        raw = b"".join(contents[e.file][e.offset : e.offset + e.nbytes] for e in gather.extents)
        want = torch.frombuffer(bytearray(raw), dtype=gather.dtype).to(dtype)
        got = spec.view(slot.tensor)
        assert got.data_ptr() % dtype.itemsize == 0
        assert torch.equal(got.reshape(-1).view(torch.uint8), want.view(torch.uint8)), spec.name
    # on a device: where its like has it, whatever the files' offsets are
    names = [n for n, _, _ in params]
    there = alike(laid_out, names)
    device = Arena(page_up(there.block.slot_nbytes)).allocate(there.block.slot_nbytes)
    for m in there.block.moves:
        device.tensor[m.dst : m.dst + m.stop - m.start] = slot.tensor[m.start : m.stop]
    assert [m.start for m in there.block.moves] == sorted(m.start for m in there.block.moves)
    assert (there.specs, there.block.segments, there.block.nbytes) == (specs, block.segments, block.nbytes)
    assert [s.name for s in there.on_device] == names
    end = 0
    for s in there.on_device:
        assert end <= s.dst < end + 64 and s.dst % 64 == 0
        end = s.dst + s.nbytes
        host = next(h for h in specs if h.name == s.name)
        a, b = s.view(device.tensor), host.view(slot.tensor)
        assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)), s.name
        pool = device.tensor.view(1, -1)
        assert s.views(pool).data_ptr() == a.data_ptr() and s.views(pool).shape == (1, *s.shape)
    assert end <= there.block.slot_nbytes


# embedding tables


@settings(max_examples=60, deadline=None, database=None)
@given(data=st.data())
def test_rows_are_the_tables(data: st.DataObject, two_files: list[Path]) -> None:
    """Whatever the table's place, pieces and dtype, however few rows are kept from call to call."""
    stored, compute = data.draw(st.sampled_from([(torch.float32,) * 2, (torch.bfloat16, torch.float32)]))
    vocabulary, width, kept = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 90), st.integers(0, 12)))
    row, at = width * stored.itemsize, data.draw(st.integers(0, 5000))
    first = data.draw(st.integers(0, vocabulary * width)) * stored.itemsize  # in two files, cut anywhere
    extents = [Extent(0, at, first), Extent(1, at, vocabulary * row - first)]
    table = Table("embed", Gather([vocabulary, width], stored, [e for e in extents if e.nbytes]), compute)
    raw = BYTES[at : at + first] + BYTES[::-1][at : at + vocabulary * row - first]
    weight = torch.frombuffer(bytearray(raw), dtype=stored).view(vocabulary, width).to(compute)
    module = torch.nn.Embedding(vocabulary, width, padding_idx=0, device="meta", dtype=compute)
    reader = DirectReader(two_files)
    queue = TransferQueue(reader, 2)
    try:
        rows = RowReader(table, module, queue, torch.device("cpu"), rows_kept=kept)
        for _ in range(data.draw(st.integers(1, 5))):
            shape = data.draw(st.sampled_from([(1, 1), (1, 7), (3, 4), (5,)]))
            ids = torch.tensor(
                data.draw(
                    st.lists(st.integers(0, vocabulary - 1), min_size=math.prod(shape), max_size=math.prod(shape))
                )
            ).view(shape)
            before = sum(queue.bytes_read.values())
            held = set(rows._kept)
            with torch.inference_mode():
                got = module(ids)
            assert torch.equal(got.view(torch.uint8), weight[ids].view(torch.uint8))
            assert len(rows._kept) <= kept
            new = set(ids.flatten().tolist()) - held
            assert (sum(queue.bytes_read.values()) > before) == bool(new), "only what is not kept is read"
            assert all(torch.equal(r.view(torch.uint8), weight[i].view(torch.uint8)) for i, r in rows._kept.items())
            assert all(r.untyped_storage().nbytes() == width * compute.itemsize for r in rows._kept.values())
            assert module.weight.shape == weight.shape
            assert module.weight.isnan().all(), "a lookup that bypasses us is never plausible"
            assert module.weight.untyped_storage().nbytes() == compute.itemsize
        for bad in (-1, vocabulary):
            with pytest.raises(IndexError, match=f"token id {bad} is outside the vocabulary of {vocabulary}"):
                module(torch.tensor([[0, bad]]))
    finally:
        queue.close()
        reader.close()


# the plan cache


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every time a checkpoint is traced."""
    calls: list[int] = []
    real = hf.trace

    def counting(*args: Any) -> Any:
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(hf, "trace", counting)
    return calls


def cache_file(cache: Path) -> Path:
    files = [p for p in (cache / "plans").rglob("*") if p.is_file()]
    assert len(files) == 1, "one file per checkpoint, nothing temporary left"
    return files[0]


def test_a_checkpoint_is_traced_once(folder: Path, cache: Path, traces: list[int]) -> None:
    want = oracle(folder)
    for _ in range(3):
        assert torch.equal(logits(folder), want)
        assert len(traces) == 1
    file = cache_file(cache)
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700


def sealed(body: bytes) -> bytes:
    """As the cache writes it: a checksum that is right."""
    return hashlib.sha256(body).digest() + body


def unsealed(raw: bytes) -> Any:
    return json.loads(zlib.decompress(raw[32:]))


def resealed(change: Callable[[Any], Any]) -> Callable[[bytes], bytes]:
    """The file with other contents and a right checksum."""

    def damage(raw: bytes) -> bytes:
        data = unsealed(raw)
        result = change(data)
        return sealed(zlib.compress(json.dumps(data if result is None else result).encode()))

    return damage


def flipped(at: int) -> Callable[[bytes], bytes]:
    return lambda raw: raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


CACHES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "cut short": lambda raw: raw[: len(raw) // 2],
    "a bit flipped in the checksum": flipped(3),
    "a bit flipped in the body": flipped(100),
    "zeros": lambda raw: bytes(len(raw)),
    "longer": lambda raw: raw + b"x",
    "no zlib": lambda raw: sealed(b"hello"),
    "no JSON": lambda raw: sealed(zlib.compress(b"{")),
    "a bomb": lambda raw: sealed(zlib.compress(b"[" * (1 << 20))),
    "a list": resealed(lambda data: []),
    "nothing": resealed(lambda data: {}),
    "an entry that is a number": resealed(lambda data: dict.fromkeys(data, 5)),
    "a tensor missing": resealed(lambda data: data.pop(Q0) and None),
    "a tensor too many": resealed(lambda data: data.update({"more": data[Q0]})),
    "another dtype": resealed(lambda data: data[Q0].__setitem__(0, "bfloat16")),
    "a dtype that is none": resealed(lambda data: data[Q0].__setitem__(0, "nn")),
    "another shape": resealed(lambda data: data[Q0].__setitem__(1, [32, 128])),
    "a file that is not there": resealed(lambda data: data[Q0][2][0].__setitem__(0, 1)),
    "a file before the first": resealed(lambda data: data[Q0][2][0].__setitem__(0, -1)),
    "an extent beyond the end": resealed(lambda data: data[Q0][2][0].__setitem__(1, 1 << 40)),
    "an extent before the beginning": resealed(lambda data: data[Q0][2][0].__setitem__(1, -4096)),
    "an extent that is shorter": resealed(lambda data: data[Q0][2][0].__setitem__(2, 8)),
}  # fmt: skip


@pytest.mark.parametrize("case", CACHES)
def test_a_damaged_cache_is_ignored_and_rewritten(folder: Path, cache: Path, traces: list[int], case: str) -> None:
    want = logits(folder)
    file = cache_file(cache)
    good = unsealed(file.read_bytes())
    file.write_bytes(CACHES[case](file.read_bytes()))
    assert torch.equal(logits(folder), want)
    assert len(traces) == 2
    assert unsealed(cache_file(cache).read_bytes()) == good
    assert torch.equal(logits(folder), want)
    assert len(traces) == 2


def swapped(folder: Path) -> None:
    """The same file with two tensors of one shape in exchanged places; size and header length stay."""
    header, data = read(folder / SINGLE)
    (a, b), (c, d) = header[K0]["data_offsets"], header[V0]["data_offsets"]
    first, second = sorted([(a, b), (c, d)])
    swapped_ = data[: first[0]] + data[slice(*second)] + data[first[1] : second[0]] + data[slice(*first)]
    header[K0]["data_offsets"], header[V0]["data_offsets"] = [c, d], [a, b]
    length = (folder / SINGLE).stat().st_size - len(data) - 8
    write(folder / SINGLE, json.dumps(header, separators=(",", ":")).encode(), swapped_ + data[second[1] :], length)


@pytest.mark.parametrize("change", ["rewritten", "rewritten at the same moment", "config", "resharded"])
def test_a_changed_checkpoint_is_traced_anew(folder: Path, cache: Path, traces: list[int], change: str) -> None:
    want = logits(folder)
    before = (folder / SINGLE).stat()
    if change == "config":
        configure(folder, rms_norm_eps=1e-3)
        want = oracle(folder)
    elif change == "resharded":
        shard(folder)
    else:
        swapped(folder)
        assert (folder / SINGLE).stat().st_size == before.st_size
        if change == "rewritten at the same moment":  # as rsync and cp -p leave it
            os.utime(folder / SINGLE, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert torch.equal(oracle(folder), want)
    assert torch.equal(logits(folder), want)
    assert len(traces) == 2


def test_changed_values_need_no_new_trace_but_are_read(folder: Path, traces: list[int]) -> None:
    logits(folder)
    tensors = load_file(folder / SINGLE)
    save_file({k: v * 1.25 if k == Q0 else v for k, v in tensors.items()}, folder / SINGLE, metadata={"format": "pt"})
    assert torch.equal(logits(folder), oracle(folder))


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(
    folder: Path, tmp_path: Path, traces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("OFFLOAD_CACHE", str(tmp_path / "file"))
    want = oracle(folder)
    for n in (1, 2):
        assert torch.equal(logits(folder), want)
        assert len(traces) == n

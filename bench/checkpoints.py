"""Writes random checkpoints in the layout of the original families, to have models of a known size anywhere.

Measures nothing. The weights mean nothing either: embeddings are scaled up so that routing and the next token depend
on the input token, everything else is N(0, 0.02). What such a model cannot show is how a trained router behaves:
its choices are spread evenly, which is the worst case for an expert cache.

Tensors are written one at a time, so little memory is needed. A complete checkpoint is found again and reused.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import GIB, BenchError, default_scratch, gib, say

EMBED_SCALE = 50
STD = 0.02
SEED = 1
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Spec:
    """A checkpoint to write. `limit` is the memory it is meant to be run in; all weights are bf16."""

    name: str
    limit: str
    new_tokens: int
    shard_bytes: int
    config: dict[str, Any] = field(hash=False)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every stored tensor, layer by layer, as the original families name them."""
        c = self.config
        hidden, inner, vocab = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
        head = c.get("head_dim") or hidden // c["num_attention_heads"]
        q, kv = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
        experts = c.get("num_experts", 0)
        yield "model.embed_tokens.weight", (vocab, hidden)
        for n in range(c["num_hidden_layers"]):
            at = f"model.layers.{n}"
            yield f"{at}.input_layernorm.weight", (hidden,)
            yield f"{at}.self_attn.q_proj.weight", (q, hidden)
            yield f"{at}.self_attn.k_proj.weight", (kv, hidden)
            yield f"{at}.self_attn.v_proj.weight", (kv, hidden)
            yield f"{at}.self_attn.o_proj.weight", (hidden, q)
            if experts:
                yield f"{at}.self_attn.q_norm.weight", (q,)
                yield f"{at}.self_attn.k_norm.weight", (kv,)
            yield f"{at}.post_attention_layernorm.weight", (hidden,)
            if experts:
                yield f"{at}.mlp.gate.weight", (experts, hidden)
            for mlp in [f"{at}.mlp.experts.{e}" for e in range(experts)] or [f"{at}.mlp"]:
                yield f"{mlp}.gate_proj.weight", (inner, hidden)
                yield f"{mlp}.up_proj.weight", (inner, hidden)
                yield f"{mlp}.down_proj.weight", (hidden, inner)
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (vocab, hidden)

    def nbytes(self, wanted: Callable[[str], bool] = lambda name: True) -> int:
        """Bytes of the tensors whose name is wanted."""
        return sum(2 * math.prod(shape) for name, shape in self.tensors() if wanted(name))

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return self.nbytes()

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert (0: a dense model)."""
        return self.nbytes(lambda name: name.startswith("model.layers.0.mlp.experts.0."))

    @property
    def dense_bytes(self) -> int:
        """Bytes every token needs whatever it is: all but the experts and the embedding table."""
        return self.nbytes(lambda name: ".experts." not in name and "embed_tokens" not in name)


_COMMON: dict[str, Any] = {
    "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "initializer_range": STD,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True,
}  # fmt: skip
_LLAMA = {**_COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
_OLMOE = {**_COMMON, "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "norm_topk_prob": False}

SPECS = {
    s.name: s
    for s in (
        Spec("llama-3b", "4.5GiB", 16, 3 * GIB // 2, {
            **_LLAMA, "hidden_size": 3072, "num_hidden_layers": 28, "intermediate_size": 8192,
            "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000,
        }),
        Spec("olmoe", "3GiB", 48, 3 * GIB // 2, {
            **_OLMOE, "hidden_size": 1024, "num_hidden_layers": 12, "intermediate_size": 1024,
            "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
            "vocab_size": 4096,
        }),
        # the same shapes with fewer layers, for grids of many runs
        Spec("llama-1b", "1.5GiB", 16, 3 * GIB // 2, {
            **_LLAMA, "hidden_size": 3072, "num_hidden_layers": 8, "intermediate_size": 8192,
            "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000,
        }),
        Spec("olmoe-2b", "1.5GiB", 48, 3 * GIB // 2, {
            **_OLMOE, "hidden_size": 1024, "num_hidden_layers": 5, "intermediate_size": 1024,
            "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
            "vocab_size": 4096,
        }),
        # as many layers, experts and experts per token as the bundled demo-moe, whose routing it can be given
        Spec("routed", "2GiB", 200, 3 * GIB // 2, {
            **_OLMOE, "hidden_size": 2048, "num_hidden_layers": 6, "intermediate_size": 1024,
            "num_attention_heads": 16, "num_key_value_heads": 4, "num_experts": 32, "num_experts_per_tok": 4,
            "vocab_size": 4096,
        }),
        # little weight and much KV: 64 KiB a token, 2 GiB at 32K
        Spec("llama-long", "1.5GiB", 16, 3 * GIB // 2, {
            **_LLAMA, "hidden_size": 1536, "num_hidden_layers": 16, "intermediate_size": 2048,
            "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 4096,
            "max_position_embeddings": 40960,
        }),
        # half as deep, for hundreds of prompts
        Spec("llama-documents", "1.5GiB", 16, 3 * GIB // 2, {
            **_LLAMA, "hidden_size": 1536, "num_hidden_layers": 8, "intermediate_size": 2048,
            "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 4096,
        }),
        Spec("llama-3b-small", "1GiB", 6, 1 << 20, {
            **_LLAMA, "hidden_size": 192, "num_hidden_layers": 4, "intermediate_size": 512,
            "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512,
        }),
        Spec("olmoe-small", "1GiB", 6, 1 << 20, {
            **_OLMOE, "hidden_size": 128, "num_hidden_layers": 3, "intermediate_size": 64,
            "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 16, "num_experts_per_tok": 4,
            "vocab_size": 512,
        }),
    )
}  # fmt: skip


def make(spec: Spec, scratch: Path) -> Path:
    """The checkpoint's folder under `scratch`, written if it is not there yet or not complete."""
    folder = scratch / spec.name
    if complete(spec, folder):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.safetensors"):
        old.unlink()
    free = shutil.disk_usage(folder).free
    if free < spec.weight_bytes + GIB // 4:
        raise BenchError(f"{spec.name} needs {gib(spec.weight_bytes)} of disk, {gib(free)} are free; give --scratch")
    shards = _shards(spec)
    weight_map: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        say(f"writing {spec.name}: {file}")
        sizes[file] = _write_shard(folder / file, tensors)
        weight_map.update((name, file) for name in tensors)
    (folder / "config.json").write_text(json.dumps(spec.config, indent=2))
    generation = {"bos_token_id": 1, "eos_token_id": 2, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    metadata = {"total_size": spec.weight_bytes, "bench": _fingerprint(spec), "file_sizes": sizes}
    temporary = folder / f"{INDEX}.tmp"
    temporary.write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=1))
    os.replace(temporary, folder / INDEX)  # last: an index means that everything else is there
    return folder


def complete(spec: Spec, folder: Path) -> bool:
    """Whether `folder` holds this very checkpoint, all of it."""
    try:
        metadata = json.loads((folder / INDEX).read_text())["metadata"]
        sizes = {file: (folder / file).stat().st_size for file in metadata["file_sizes"]}
    except (OSError, ValueError, KeyError):
        return False
    return bool(metadata.get("bench") == _fingerprint(spec) and sizes == metadata["file_sizes"])


def shard_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint."""
    return sorted(folder.glob("*.safetensors"))


def _fingerprint(spec: Spec) -> str:
    facts = json.dumps([spec.config, spec.shard_bytes, EMBED_SCALE, STD, SEED], sort_keys=True)
    return f"{zlib.crc32(facts.encode()):08x}"


def _shards(spec: Spec) -> list[dict[str, tuple[int, ...]]]:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = spec.shard_bytes
    for name, shape in spec.tensors():
        size = 2 * math.prod(shape)
        if size > room and shards[-1]:
            shards.append({})
            room = spec.shard_bytes
        shards[-1][name] = shape
        room -= size
    return shards


def _write_shard(path: Path, tensors: dict[str, tuple[int, ...]]) -> int:
    """Header, then the data in the order of names, as the safetensors library writes them. Returns the file's size."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in sorted(tensors):
        size = 2 * math.prod(tensors[name])
        header[name] = {"dtype": "BF16", "shape": list(tensors[name]), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name in sorted(tensors):
            f.write(_values(name, tensors[name]))
        f.flush()
        os.fsync(f.fileno())
        # dirty pages cannot be dropped before a cold run, and clean ones would make it warm
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return os.fstat(f.fileno()).st_size


def _values(name: str, shape: tuple[int, ...]) -> memoryview:
    """Seeded by the tensor's name: the values do not depend on how tensors are spread over shards."""
    import torch

    t = torch.empty(shape, dtype=torch.bfloat16)
    if len(shape) == 1:
        t.fill_(1.0)
    else:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + (SEED << 32))
        t.normal_(0.0, STD * EMBED_SCALE if "embed_tokens" in name else STD, generator=generator)
    return t.view(torch.uint8).numpy().reshape(-1).data


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(SPECS), nargs="+")
    parser.add_argument("--scratch", type=Path, default=default_scratch(), help="folder for the checkpoints")
    args = parser.parse_args()
    try:
        for name in args.model:
            print(make(SPECS[name], args.scratch))
    except BenchError as e:
        say(f"error: {e}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

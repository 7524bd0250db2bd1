"""Writes a GGUF file from a bf16 safetensors folder of the `llama` or `olmoe` family, for llama.cpp to run.

Needs the `gguf` package: `pip install gguf`, or put llama.cpp's own `gguf-py` folder on PYTHONPATH.

The result is what llama.cpp's converter would write, without a tokenizer: matrices stay bf16, norms and the router
are float32, a layer's experts are one tensor, and Llama's Q and K rows are permuted to llama.cpp's order of the rotary
pairs (OLMoE's are not). One tensor is in memory at a time. What the file could not express is an error.
Source: llama.cpp's conversion/base.py, conversion/llama.py, conversion/olmo.py.
"""

from __future__ import annotations

import argparse
import json
import math
import mmap
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import BenchError, say

if TYPE_CHECKING:
    import numpy as np

GET_GGUF = "gguf is not installed: pip install gguf, or put llama.cpp's gguf-py folder on PYTHONPATH"
FAMILIES = ("llama", "olmoe")
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of the GGUF file and where it comes from: several sources are stacked along a new first axis.

    `heads`: rows are permuted within so many heads. `wide`: stored as float32.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    heads: int = 0
    wide: bool = False


class Stored:
    """The tensors of a safetensors folder, mapped, not read."""

    def __init__(self, folder: Path) -> None:
        self.entries: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as f:
                size = int.from_bytes(f.read(8), "little")
                header = json.loads(f.read(size))
                self._maps[path] = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)
            header.pop("__metadata__", None)
            self.entries.update((name, (path, 8 + size, entry)) for name, entry in header.items())
        if not self.entries:
            raise BenchError(f"no .safetensors in {folder}")

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, which must be bf16."""
        if name not in self.entries:
            raise BenchError(f"the checkpoint lacks {name}")
        entry = self.entries[name][2]
        if entry["dtype"] != "BF16":
            raise BenchError(f"{name} is {entry['dtype']}; only BF16 checkpoints can be written as GGUF here")
        return tuple(entry["shape"])

    def bits(self, name: str) -> np.ndarray[Any, np.dtype[np.uint16]]:
        """A tensor's bf16 values as 16-bit integers, in its shape."""
        import numpy as np

        path, base, entry = self.entries[name]
        begin, end = entry["data_offsets"]
        flat = np.frombuffer(self._maps[path], np.uint16, (end - begin) // 2, base + begin)
        return flat.reshape(entry["shape"])

    def forget(self) -> None:
        """Let go of the pages read so far."""
        for m in self._maps.values():
            m.madvise(mmap.MADV_DONTNEED)


def check(config: dict[str, Any]) -> str:
    """The family, or what about it llama.cpp would compute otherwise."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise BenchError(f"model_type {family!r} cannot be written; {' and '.join(FAMILIES)} can")
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise BenchError("scaled rotary embeddings cannot be written")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise BenchError("biases cannot be written")
    # llama.cpp's OLMoE graph knows neither
    if config.get("norm_topk_prob") or config.get("clip_qkv") is not None:
        raise BenchError("llama.cpp's olmoe has neither norm_topk_prob nor clip_qkv")
    return str(family)


def facts(config: dict[str, Any]) -> dict[str, int | float]:
    """The model's keys, without the family's prefix."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    theta = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta") or 10000.0
    found: dict[str, int | float] = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "vocab_size": config["vocab_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(theta),
    }
    if config.get("num_experts"):
        found |= {"expert_count": config["num_experts"], "expert_used_count": config["num_experts_per_tok"]}
    return found


def tensors(config: dict[str, Any], stored: Stored) -> Iterator[Tensor]:
    """Every tensor of the GGUF file, in the order of layers. Raises if the checkpoint has others."""
    used: set[str] = set()

    def made(name: str, *sources: str, heads: int = 0, wide: bool = False) -> Tensor:
        used.update(sources)
        shape = stored.shape(sources[0])
        if len(sources) > 1:
            shape = (len(sources), *shape)
        return Tensor(f"{name}.weight", sources, shape, heads, wide or len(shape) == 1)

    yield made("token_embd", "model.embed_tokens.weight")
    permuted = {}
    if config["model_type"] == "llama":
        heads = config["num_attention_heads"]
        permuted = {"attn_q": heads, "attn_k": config.get("num_key_value_heads") or heads}
    for n in range(config["num_hidden_layers"]):
        at = f"model.layers.{n}"
        for theirs, name in _LAYER.items():
            source = f"{at}.{theirs}.weight"
            if source in stored.entries:
                wide = name == "ffn_gate_inp"
                yield made(f"blk.{n}.{name}", source, heads=permuted.get(name, 0), wide=wide)
        for part in ("gate", "up", "down") if config.get("num_experts") else ():
            experts = [f"{at}.mlp.experts.{e}.{part}_proj.weight" for e in range(config["num_experts"])]
            yield made(f"blk.{n}.ffn_{part}_exps", *experts)
    yield made("output_norm", "model.norm.weight")
    if "lm_head.weight" in stored.entries:
        yield made("output", "lm_head.weight")
    elif config["model_type"] == "olmoe":  # llama.cpp's llama falls back to the embedding table, its olmoe does not
        yield made("output", "model.embed_tokens.weight")
    left = sorted(stored.entries.keys() - used)
    if left:
        raise BenchError(f"the checkpoint holds {left[0]}, which has no place in the GGUF file")


def values(tensor: Tensor, stored: Stored) -> np.ndarray[Any, Any]:
    """float32, or the bytes of bf16."""
    import numpy as np

    parts = [stored.bits(s) for s in tensor.sources]
    bits = parts[0] if len(parts) == 1 else np.stack(parts)
    if tensor.heads:
        bits = permute(bits, tensor.heads)
    if tensor.wide:
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(bits).view(np.uint8)


def permute(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of each head from halves (0, d/2, 1, d/2 + 1, …) to neighbours, as llama.cpp's `llama` rotates them."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write(folder: Path, out: Path) -> None:
    """The checkpoint in `folder` as the GGUF file `out`, which appears when it is complete."""
    try:
        import gguf
    except ImportError:
        raise BenchError(GET_GGUF) from None
    import numpy as np

    config = json.loads((folder / "config.json").read_text())
    family = check(config)
    stored = Stored(folder)
    planned = list(tensors(config, stored))
    temporary = out.with_name(f"{out.name}.tmp")
    writer = gguf.GGUFWriter(temporary, family)
    writer.add_name(folder.name)
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_BF16))
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    for key, value in facts(config).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{family}.{key}", value)
    for t in planned:
        kind = gguf.GGMLQuantizationType.F32 if t.wide else gguf.GGMLQuantizationType.BF16
        nbytes = (4 if t.wide else 2) * math.prod(t.shape)
        writer.add_tensor_info(t.name, t.shape, np.dtype(np.uint16), nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for t in planned:
        writer.write_tensor_data(values(t, stored))
        stored.forget()
    writer.close()
    with temporary.open("rb+") as f:
        os.fsync(f.fileno())
        # dirty pages cannot be dropped before a cold run, and clean ones would make it warm
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    os.replace(temporary, out)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path, help="model folder: config.json and *.safetensors")
    p.add_argument("out", type=Path, help="GGUF file to write")
    args = p.parse_args(argv)
    try:
        write(args.folder, args.out)
    except (BenchError, OSError) as e:
        say(f"error: {e}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

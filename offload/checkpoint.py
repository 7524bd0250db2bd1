"""Safetensors headers: which tensor lies where. The only place that knows the file format.

Every number in a header is checked before it is used (format: huggingface.co/docs/safetensors). Tensor data are
never read here.
"""

from __future__ import annotations

import itertools
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from offload.gather import Extent, Gather
from tiers import CheckpointError, ModelError

MAX_HEADER = 100 << 20  # the format's own limit; keeps a hostile length from asking for all memory
MAX_INDEX = 256 << 20
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """The files of a checkpoint and every tensor in them, by its stored name."""

    files: tuple[Path, ...]
    tensors: dict[str, Gather]


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers of all shards in `folder`. Raises `CheckpointError` or `ModelError`, naming the file."""
    index = folder / INDEX
    if index.is_file():
        wanted = _weight_map(index)
        names = sorted(set(wanted.values()))
    elif (folder / SINGLE).is_file():
        wanted, names = None, [SINGLE]
    else:
        shards = sorted(p.name for p in folder.glob("*.safetensors"))
        if shards:
            raise CheckpointError(f"{folder} has {shards[0]} but neither {SINGLE} nor {INDEX}")
        pickles = sorted(p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")))
        if pickles:
            raise ModelError(
                f"{folder} has only pickle weights ({pickles[0]}), which can run code when opened; "
                "convert them to safetensors first"
            )
        raise ModelError(f"{folder} has no {SINGLE} and no {INDEX}")
    files = tuple(folder / name for name in names)
    tensors: dict[str, Gather] = {}
    for number, (file, path) in enumerate(zip(names, files, strict=True)):
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, though {INDEX} names it; download the model again")
        for name, tensor in _read_header(path, number).items():
            if wanted is None or wanted.get(name) == file:
                tensors[name] = tensor
    if wanted is not None:
        absent = sorted(set(wanted) - set(tensors))
        if absent:
            raise CheckpointError(f"{folder / wanted[absent[0]]} lacks tensor {absent[0]}, which {INDEX} says it has")
    return Checkpoint(files, tensors)


def _weight_map(index: Path) -> dict[str, str]:
    if index.stat().st_size > MAX_INDEX:
        raise CheckpointError(f"{index} is {index.stat().st_size} bytes long; no real index is")
    try:
        data = json.loads(index.read_bytes())
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{index} is not valid JSON") from e
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or any("\ud800" <= c <= "\udfff" for c in file):
            raise CheckpointError(f"{index}: the file of {name} is not a name")
        pure = PurePosixPath(file)
        if pure.is_absolute() or ".." in pure.parts or "\\" in file or "\0" in file:
            raise CheckpointError(f"{index}: {file!r} points outside the model's folder")
        if any(len(os.fsencode(part)) > 255 for part in pure.parts) or len(file) > 1000:
            raise CheckpointError(f"{index}: {file!r} is no file's name")
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {file!r} is not a .safetensors file")
    return weight_map


def _read_header(path: Path, number: int) -> dict[str, Gather]:
    try:
        with path.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            prefix = f.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path} is {size} bytes long: not a safetensors file")
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER:
                raise CheckpointError(f"{path}: a header of {length} bytes is absurd; the file is damaged")
            if 8 + length > size:
                raise CheckpointError(f"{path}: the header says {length} bytes, the file has {size}: truncated")
            raw = f.read(length)
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror}") from e
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: the header is not valid JSON; the file is damaged") from e
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object; the file is damaged")
    header.pop("__metadata__", None)
    start, tensors = 8 + length, {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(path, name, entry)
        if start + end > size:
            raise CheckpointError(f"{path}: tensor {name} ends at byte {start + end}, the file at {size}: truncated")
        spans.append((begin, end, name))
        tensors[name] = Gather(shape, dtype, [Extent(number, start + begin, end - begin)] if end > begin else [])
    spans.sort()
    for (_, end, name), (begin, _, other) in itertools.pairwise(spans):
        if begin < end:
            raise CheckpointError(f"{path}: tensors {name} and {other} overlap; the file is damaged")
    return tensors


def _entry(path: Path, name: str, entry: Any) -> tuple[torch.dtype, list[int], int, int]:
    def whole(x: Any) -> bool:
        return isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 1 << 60

    if not isinstance(entry, dict):
        raise CheckpointError(f"{path}: tensor {name} has no description; the file is damaged")
    code, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(code, str) or code not in _DTYPES:
        raise CheckpointError(f"{path}: tensor {name} has dtype {code!r}, which is not known")
    if not isinstance(shape, list) or not all(whole(n) for n in shape):
        raise CheckpointError(f"{path}: tensor {name} has shape {shape!r}; the file is damaged")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(whole(n) for n in offsets):
        raise CheckpointError(f"{path}: tensor {name} has offsets {offsets!r}; the file is damaged")
    begin, end = offsets
    dtype = _DTYPES[code]
    items = 1
    for n in shape:
        items *= n
        if items >= 1 << 60:
            raise CheckpointError(
                f"{path}: tensor {name} claims more elements than any file holds; the file is damaged"
            )
    if begin > end or end - begin != items * dtype.itemsize:
        raise CheckpointError(
            f"{path}: tensor {name} spans {end - begin} bytes, its shape {shape} of {code} needs "
            f"{items * dtype.itemsize}; the file is damaged"
        )
    return dtype, shape, begin, end

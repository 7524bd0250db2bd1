"""Remembers where each parameter lies, so that a checkpoint of tens of thousands of tensors is traced once.

One file per checkpoint under the user's cache folder, keyed by everything the answer depends on. A file that is
damaged, foreign or does not fit the headers just read is ignored and rewritten.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedConfig

from offload.checkpoint import Checkpoint
from offload.gather import Extent, Gather
from tiers.folders import cache_folder

_VERSION = 1
_MAX_BYTES = 64 << 20


def traced(
    folder: Path,
    checkpoint: Checkpoint,
    config: PreTrainedConfig,
    expected: Mapping[str, torch.Size],
    trace: Callable[[], dict[str, Gather]],
) -> dict[str, Gather]:
    """The result of `trace()`, from the cache if it is there and fits the model's `expected` names and shapes."""
    path = cache_folder() / "plans" / f"{_key(folder, checkpoint, config)}.z"
    known = _load(path, checkpoint)
    if known is None or {name: g.shape for name, g in known.items()} != dict(expected):
        known = trace()
        with contextlib.suppress(OSError):  # a read-only home is no reason to fail
            _save(path, known)
    return known


def _key(folder: Path, checkpoint: Checkpoint, config: PreTrainedConfig) -> str:
    h = hashlib.sha256()
    h.update(json.dumps([_VERSION, transformers.__version__, str(folder.resolve())]).encode())
    h.update(json.dumps(config.to_dict(), sort_keys=True, default=str).encode())
    for file in checkpoint.files:
        s = file.stat()
        h.update(json.dumps([file.name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns]).encode())
    return h.hexdigest()[:32]


def _save(path: Path, found: dict[str, Gather]) -> None:
    data = {
        name: [str(g.dtype).removeprefix("torch."), list(g.shape), [[e.file, e.offset, e.nbytes] for e in g.extents]]
        for name, g in found.items()
    }
    body = zlib.compress(json.dumps(data).encode(), 1)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fd, temporary = tempfile.mkstemp(dir=path.parent)  # 0600
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(hashlib.sha256(body).digest() + body)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _load(path: Path, checkpoint: Checkpoint) -> dict[str, Gather] | None:
    try:
        if path.stat().st_size > _MAX_BYTES:
            return None
        raw = path.read_bytes()
        if hashlib.sha256(raw[32:]).digest() != raw[:32]:
            return None
        plain = zlib.decompressobj()
        data = json.loads(plain.decompress(raw[32:], 16 * _MAX_BYTES))
        sizes = [f.stat().st_size for f in checkpoint.files]
        found: dict[str, Gather] = {}
        for name, (dtype, shape, extents) in data.items():
            gather = Gather(shape, getattr(torch, dtype), [Extent(*map(int, e)) for e in extents])
            inside = all(
                min(e.file, e.offset, e.nbytes) >= 0 and e.offset + e.nbytes <= sizes[e.file] for e in gather.extents
            )
            if not inside or sum(e.nbytes for e in gather.extents) != math.prod(shape) * gather.dtype.itemsize:
                return None
            found[name] = gather
        return found
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, zlib.error):
        return None

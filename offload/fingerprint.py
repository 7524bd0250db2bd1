"""Which weights a model has, in few bytes: stored keys and values are of use to these and no others."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from transformers import PreTrainedConfig

_SAMPLES, _SAMPLE = 64, 4096  # places of a file that are looked at, and bytes there


def fingerprint(files: list[Path], config: PreTrainedConfig) -> str:
    """A hash over the config and, of each weight file, its size, its first bytes and samples spread over it.

    Reading all of it would take as long as loading the model. Training changes every matrix, so that another version
    differs in some sample; a file that was edited between samples by hand is taken for the old one.
    """
    told = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    h = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode())
    for path in files:
        with open(path, "rb", buffering=0) as f:
            size = os.fstat(f.fileno()).st_size
            h.update(size.to_bytes(8, "little"))
            for i in range(_SAMPLES):
                f.seek(max(0, size - _SAMPLE) * i // (_SAMPLES - 1))
                h.update(f.read(_SAMPLE))
    return h.hexdigest()

"""Small files of numpy arrays that nobody vouches for: how routing traces and learned frequencies are kept.

A file is an ordinary `.npz` (numpy can open it) with one more member, `sha256`, over the names, types, shapes and bytes
of all others. It is written whole or not at all, readable by its owner only. Nothing in it is believed: sizes are
bounded before memory is taken for them, and nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiers import ModelError, UsageError

MAX_BYTES = 1 << 30  # of a file, and of all its arrays together
_MAX_MEMBERS = 16
_MAX_HEADER = 512  # numpy's own headers here take 128
_CHECKSUM = "sha256"

Array = NDArray[Any]


def save_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write the file (mode 0600, atomic rename). Raises `UsageError` if it cannot be written."""
    whole: dict[str, Any] = {name: np.ascontiguousarray(a) for name, a in arrays.items()}
    whole[_CHECKSUM] = np.frombuffer(_digest(whole), np.uint8)
    try:
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # 0600
        try:
            with os.fdopen(fd, "wb") as f:
                np.savez_compressed(f, **whole)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as e:
        raise UsageError(f"{path} cannot be written: {e.strerror or e}") from None


def load_arrays(path: Path, types: Mapping[str, str], *, max_bytes: int = MAX_BYTES) -> dict[str, Array]:
    """The arrays, read-only. `types` gives the type that each name must have (`"int16"`); other names are refused.

    Raises `UsageError` if there is no such file, `ModelError` if it is damaged, foreign or too large.
    """
    try:
        with path.open("rb") as f:
            raw = f.read(max_bytes + 1)
    except OSError as e:
        raise UsageError(f"{path} cannot be read: {e.strerror or e}") from None
    if len(raw) > max_bytes:
        raise ModelError(f"{path} is larger than {max_bytes} bytes, and no file of this kind is: give another one")
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as z:
            members = z.infolist()
            if len(members) > _MAX_MEMBERS or sum(m.file_size for m in members) > max_bytes:
                raise ValueError("its arrays are too many or too large")
            arrays = {m.filename.removesuffix(".npy"): _array(z.read(m), m.file_size) for m in members}
        if len(arrays) != len(members):
            raise ValueError("a name appears twice")
        stored = arrays.pop(_CHECKSUM, None)
        if stored is None or stored.tobytes() != _digest(arrays):
            raise ValueError("its checksum does not match")
        for name, a in arrays.items():
            if types.get(name) != a.dtype.name:
                raise ValueError(f"it holds an array {name} of {a.dtype.name}")
        return arrays
    except Exception as e:  # zipfile, zlib and numpy raise all sorts on damaged input
        raise ModelError(f"{path} is damaged or of another kind ({e}): delete it and have it written again") from None


def _array(data: bytes, size: int) -> Array:
    """One `.npy` member. The shape is checked against the bytes that are there before anything is made of it."""
    if len(data) != size:
        raise ValueError("a member is cut short")
    f = io.BytesIO(data)
    if np.lib.format.read_magic(f) != (1, 0):
        raise ValueError("an array is stored in another version")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(f, max_header_size=_MAX_HEADER)
    if fortran or dtype.hasobject or dtype.kind not in "iuf" or not dtype.isnative:
        raise ValueError("an array is of an unknown type")
    at = f.tell()
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data) - at:
        raise ValueError("an array's shape does not fit its bytes")
    return np.frombuffer(data, dtype, offset=at).reshape(shape)


def _digest(arrays: Mapping[str, Array]) -> bytes:
    h = hashlib.sha256()
    for name in sorted(arrays):
        a = arrays[name]
        h.update(f"{name} {a.dtype.str} {a.shape}\n".encode())
        h.update(a.tobytes())
    return h.digest()

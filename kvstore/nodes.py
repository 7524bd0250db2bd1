"""The file of one node: the keys and values of a run of tokens, and how it is known that they are what was written.

::

    magic 8 | version 4 | bytes of header 4 | bytes of file 8 | SHA-256 of all else before the data 32
    header, JSON: root, parent, tokens; each layer's and each state's CRC-32, types and shapes
    zeros up to a multiple of 4096 (under the SHA-256 as well)
    layer 0: keys, values | layer 1 ... | states; every tensor begins at a multiple of 64, under its layer's CRC-32

Nothing else is in the file, so every byte of it is under one of the two sums or compared with a constant. Data are
under CRC-32, which notices every flip of up to three bits and every burst up to 32 in less than 11 KB, of one or two
bits and the same bursts in any size up to 512 MB, and misses one in 2^32 of what is left. It was chosen by speed: on
one core (EPYC), zlib.crc32 takes 6.9 GB/s where SHA-256 takes 2.0, BLAKE2b 1.4 and MD5 0.9, and disks read at 1 to 7.
The sums tell of damage, not of forgery: against that there are the permissions.

Where tensors lie follows from their shapes and is not written down: nothing can disagree with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tiers import PAGE, DamagedError, page_up

NODE_TOKENS = 256
SUFFIX = ".kv"
MAX_HEADER = 1 << 20
MAX_NODE = 8 << 30
MAX_TOKEN = 1 << 31
_MAGIC, _VERSION = b"offlodKV", 1
_PREFIX = struct.Struct("<8sIIQ")
_DIGEST = hashlib.sha256().digest_size
_GUESS = 4 * PAGE  # read at once in search of the header
_ALIGN = 64
_AT_ONCE = 1 << 20  # bytes read, then summed while they are still in the processor's cache
_NAME = re.compile(r"[0-9a-f]{56}")
_ROOT_IN_NAME = 16
_TYPES = {str(t).removeprefix("torch."): t for t in (torch.bfloat16, torch.float16, torch.float32, torch.int8,
                                                     torch.uint8)}  # fmt: skip

Layer = tuple[torch.Tensor, torch.Tensor] | None


@dataclass(frozen=True)
class Segment:
    """KV of a run of tokens of one sequence.

    layers[i]: (keys [heads, n, Dk], values [heads, n, Dv]) on the CPU, or None for a layer that keeps none per token.
    states: recurrent states by name as they are after the last token; empty if none were kept.
    """

    tokens: tuple[int, ...]
    layers: tuple[Layer, ...]
    states: Mapping[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        pairs = (t for layer in self.layers if layer is not None for t in layer)
        return sum(t.nbytes for t in (*pairs, *self.states.values()))


@dataclass(frozen=True)
class Spec:
    """Type and shape of a tensor, as the header has them."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor, without what aligns the next."""
        return math.prod(self.shape) * _TYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Section:
    """A layer's keys and values, or one state: consecutive tensors under one sum. `nbytes` counts their alignment."""

    crc: int
    tensors: tuple[Spec, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return sum(_aligned(t.nbytes) for t in self.tensors)


@dataclass(frozen=True)
class Header:
    """What a node's file says of itself; `nbytes` is the file's size, `data_at` where its tensors begin."""

    root: str
    parent: str | None
    tokens: tuple[int, ...]
    layers: tuple[Section | None, ...]
    states: Mapping[str, Section]
    data_at: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return self.data_at + sum(s.nbytes for s in (*self.layers, *self.states.values()) if s is not None)


def root_of(fingerprint: str, arithmetic: str) -> str:
    """What the names of a model's nodes begin with (64 hexadecimal digits): its weights, and how it computes."""
    return hashlib.sha256(json.dumps(["offload kv", _VERSION, fingerprint, arithmetic]).encode()).hexdigest()


def name_of(root: str, parent: str | None, tokens: Sequence[int]) -> str:
    """A node's name, 56 hexadecimal digits: the first 16 are the root's."""
    h = hashlib.sha256(f"{root} {parent or '-'} ".encode())
    h.update(np.asarray(tokens, "<i8").tobytes())
    return root[:_ROOT_IN_NAME] + h.hexdigest()[:40]


def is_name(text: str) -> bool:
    """Whether it can be a node's name."""
    return _NAME.fullmatch(text) is not None


def of_root(name: str, root: str) -> bool:
    """Whether a node can be of the model with this root; its header says for sure."""
    return name.startswith(root[:_ROOT_IN_NAME])


def encode(root: str, parent: str | None, segment: Segment) -> list[bytes | memoryview]:
    """The file of a node, in pieces; tensors are not copied if they are contiguous. ValueError: it is none."""
    n = len(segment.tokens)
    if not 0 < n <= NODE_TOKENS or not all(0 <= t < MAX_TOKEN for t in segment.tokens):
        raise ValueError(f"a node has 1 to {NODE_TOKENS} token ids, not {n}, each below 2^31")
    for layer in segment.layers:
        if layer is not None and not all(t.dim() == 3 and t.shape[1] == n for t in layer):
            raise ValueError(f"keys and values of {n} tokens have shape [heads, {n}, D]")
    data: list[bytes | memoryview] = []
    layers = [None if layer is None else _section(layer, data) for layer in segment.layers]
    states = [[name, *_section((state,), data)] for name, state in segment.states.items()]
    text = json.dumps({"root": root, "parent": parent, "tokens": segment.tokens, "layers": layers, "states": states},
                      separators=(",", ":")).encode()  # fmt: skip
    data_at = page_up(_PREFIX.size + _DIGEST + len(text))
    size = data_at + sum(len(piece) for piece in data)
    if len(text) > MAX_HEADER or size > MAX_NODE:
        raise ValueError(f"a node's file would have {size} bytes, {len(text)} of them header")
    prefix = _PREFIX.pack(_MAGIC, _VERSION, len(text), size)
    body = text + bytes(data_at - _PREFIX.size - _DIGEST - len(text))
    return [prefix + hashlib.sha256(prefix + body).digest() + body, *data]


def _section(tensors: Sequence[torch.Tensor], data: list[bytes | memoryview]) -> list[Any]:
    crc, specs = 0, []
    for t in tensors:
        kind = str(t.dtype).removeprefix("torch.")
        if kind not in _TYPES or t.device.type != "cpu":
            raise ValueError(f"{kind} on {t.device}: stored are {', '.join(_TYPES)} on the CPU")
        specs.append([kind, list(t.shape)])
        for piece in (_bytes_of(t), bytes(-t.nbytes % _ALIGN)):
            crc = zlib.crc32(piece, crc)
            data.append(piece)
    return [crc, *specs]


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return _memory(tensor.detach().contiguous().reshape(-1).view(torch.uint8))


def _memory(flat: torch.Tensor) -> memoryview:
    """The bytes of a tensor of bytes, where they are."""
    array: Any = flat.numpy()
    return memoryview(array)


def read_header(fd: int, name: str) -> Header:
    """The header of the open file of node `name`, verified. Raises `DamagedError`."""
    try:
        raw = os.pread(fd, _GUESS, 0)
        magic, version, length, size = _PREFIX.unpack_from(raw)
        if magic != _MAGIC or version != _VERSION:
            raise DamagedError(f"{name}.kv: not a file of keys and values that this version wrote")
        if length > MAX_HEADER or not length < size <= MAX_NODE or size != os.fstat(fd).st_size:
            raise DamagedError(f"{name}.kv: damaged, it has not the size that it says")
        data_at = page_up(_PREFIX.size + _DIGEST + length)
        while len(raw) < data_at:
            more = os.pread(fd, data_at - len(raw), len(raw))
            if not more:
                raise DamagedError(f"{name}.kv: damaged, it ends in its header")
            raw += more
        digest_at = _PREFIX.size
        body = raw[digest_at + _DIGEST : data_at]
        if hashlib.sha256(raw[:digest_at] + body).digest() != raw[digest_at : digest_at + _DIGEST]:
            raise DamagedError(f"{name}.kv: damaged, its header has another checksum")
        header = _parse(json.loads(body[:length]), data_at)
        if name_of(header.root, header.parent, header.tokens) != name or header.nbytes != size:
            raise DamagedError(f"{name}.kv: damaged, it is another node's file")
        return header
    except (struct.error, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        raise DamagedError(f"{name}.kv: damaged, its header cannot be understood") from None
    except OSError as e:
        raise DamagedError(f"{name}.kv: {e.strerror}") from None


def _parse(data: dict[str, Any], data_at: int) -> Header:
    """Raises ValueError, TypeError or KeyError for what no writer wrote."""
    tokens = tuple(data["tokens"])
    root, parent = data["root"], data["parent"]
    if not 0 < len(tokens) <= NODE_TOKENS or not all(type(t) is int and 0 <= t < MAX_TOKEN for t in tokens):
        raise ValueError
    if not re.fullmatch("[0-9a-f]{64}", root) or not (parent is None or is_name(parent)):
        raise ValueError
    layers = tuple(None if layer is None else _parse_section(layer, 2) for layer in data["layers"])
    if any(len(t.shape) != 3 or t.shape[1] != len(tokens) for s in layers if s is not None for t in s.tensors):
        raise ValueError
    states = {str(name): _parse_section(rest, 1) for name, *rest in data["states"]}
    return Header(root, parent, tokens, layers, states, data_at)


def _parse_section(data: list[Any], tensors: int) -> Section:
    crc, *specs = data
    found = tuple(Spec(dtype, tuple(shape)) for dtype, shape in specs)
    known = all(t.dtype in _TYPES and all(type(n) is int and 0 <= n < MAX_NODE for n in t.shape) for t in found)
    if type(crc) is not int or len(found) != tensors or not known or any(t.nbytes > MAX_NODE for t in found):
        raise ValueError
    return Section(crc, found)


def read_segment(fd: int, name: str, header: Header, upto: int | None = None) -> Segment:
    """The tensors, verified, or those of the first `upto` tokens (without states). Raises `DamagedError`.

    All lie in one new buffer that lives as long as any of them; with `upto` they are views that are not contiguous.
    """
    n = len(header.tokens)
    whole = upto is None or upto >= n
    sections = [s for s in header.layers if s is not None] + (list(header.states.values()) if whole else [])
    nbytes = sum(s.nbytes for s in sections)
    room = torch.empty(nbytes + PAGE, dtype=torch.uint8)
    room = room[-room.data_ptr() % PAGE :][:nbytes]
    with contextlib.suppress(OSError):  # the disk begins with what comes after while the first piece is summed
        os.posix_fadvise(fd, header.data_at, nbytes, os.POSIX_FADV_WILLNEED)
    _fill(fd, name, header.data_at, sections, _memory(room))
    at = 0

    def take(spec: Spec) -> torch.Tensor:
        nonlocal at
        flat = room[at : at + spec.nbytes].view(_TYPES[spec.dtype])
        at += _aligned(spec.nbytes)
        return flat.view(spec.shape)

    def pair(section: Section) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (take(spec)[:, :upto] for spec in section.tensors)
        return keys, values

    layers = tuple(None if s is None else pair(s) for s in header.layers)
    states = {key: take(s.tensors[0]) for key, s in header.states.items()} if whole else {}
    return Segment(header.tokens[:upto], layers, states)


def _fill(fd: int, name: str, at: int, sections: Sequence[Section], room: memoryview) -> None:
    """Read all sections, each summed while it is in the processor's cache if it is small enough for that."""
    begin = 0
    waiting: list[Section] = []
    for i, section in enumerate(sections):
        waiting.append(section)
        size = sum(s.nbytes for s in waiting)
        if size < _AT_ONCE and i + 1 < len(sections):
            continue
        _read(fd, name, at + begin, room[begin : begin + size])
        for s in waiting:
            if zlib.crc32(room[begin : begin + s.nbytes]) != s.crc:
                raise DamagedError(f"{name}.kv: damaged, the data have another checksum")
            begin += s.nbytes
        waiting = []


def _read(fd: int, name: str, at: int, room: memoryview) -> None:
    while room:
        try:
            got = os.preadv(fd, [room], at)
        except OSError as e:
            raise DamagedError(f"{name}.kv: {e.strerror}") from None
        if not got:
            raise DamagedError(f"{name}.kv: damaged, it ends too early")
        room, at = room[got:], at + got


def _aligned(nbytes: int) -> int:
    return nbytes + -nbytes % _ALIGN

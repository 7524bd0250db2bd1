"""What decoding on the CPU spends its time with, in C, near the speed at which memory can be read, for a few tokens.

`experts.c`, `linear.c`, `attention.c` and `codes.c` are the calls, `dots.c` the products, `threads.c` their threads.

The library is compiled once, with the C compiler at hand, into the user's cache folder, and checked before each use.
Where that cannot be done (no compiler, a cache that cannot be written or run from, another processor family's
surprises) everything is computed by torch; `OFFLOAD_KERNELS=0` in the environment asks for that.

What comes out is what torch gives up to the order in which products are summed; one order, whatever else is computed
in the same call.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from tiers.folders import cache_folder

SOURCES = tuple(
    Path(__file__).with_name(f"{name}.c") for name in ("experts", "linear", "attention", "codes", "dots", "threads")
)
HEADER = Path(__file__).with_name("kernels.h")
LEVELS = ("plain", "avx2", "avx512", "avx512_bf16")  # of instructions, as numbered in the C files
FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-pthread")
COMPILERS = ("cc", "gcc", "clang")
_ABI = 5
_COMPILE_S = 120
_MAX_BYTES = 16 << 20
_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_ACTIVATIONS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    torch.nn.functional.silu,
    lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
)


class GatedExperts(Protocol):
    """What is asked of an experts module (see `moe.experts.ExpertsModule`)."""

    has_gate: bool
    has_bias: bool
    is_transposed: bool
    act_fn: Callable[[torch.Tensor], torch.Tensor]

    def _apply_gate(self, gate_up_out: torch.Tensor) -> torch.Tensor: ...


class Matrices(NamedTuple):
    """Where one expert's weights are: addresses, and shape (H, I, elements from row to row of gate_up and of down)."""

    gate_up: int
    down: int
    shape: tuple[int, int, int, int]


def matrices(views: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Matrices | None:
    """The weights in `views` (gate_up_proj [2I, H], down_proj [H, I]), or None if the kernel cannot read them.

    The addresses are good for as long as the views' memory is.
    """
    gate_up, down = views.get("gate_up_proj"), views.get("down_proj")
    if gate_up is None or down is None or gate_up.dim() != 2 or down.dim() != 2:
        return None
    (double, hidden), inner = gate_up.shape, down.size(1)
    fits = double == 2 * inner and down.size(0) == hidden
    rows = all(t.dtype is dtype and t.device.type == "cpu" and t.stride(1) == 1 for t in (gate_up, down))
    if not (fits and rows):
        return None
    return Matrices(gate_up.data_ptr(), down.data_ptr(), (hidden, inner, gate_up.stride(0), down.stride(0)))


class Kernel:
    """The loaded library. `level` (of `LEVELS`) and `threads` are the best there is and torch's, unless given."""

    def __init__(self, library: ctypes.CDLL, level: str | None = None, threads: int | None = None) -> None:
        self._library = library
        self._run = library.offload_experts
        self._run.argtypes = [ctypes.c_int, ctypes.c_int, *[ctypes.c_void_p] * 7]
        self._linear = library.offload_linear
        self._linear.argtypes = [ctypes.c_int, ctypes.c_int, *[ctypes.c_void_p] * 5]
        self._attention = library.offload_attention
        self._attention.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_float, *[ctypes.c_void_p] * 4]
        self._attend = library.offload_attend
        self._attend.argtypes = [*[ctypes.c_int] * 2, ctypes.c_void_p, *[ctypes.c_float] * 2, *[ctypes.c_void_p] * 5]
        self._decode = library.offload_decode
        self._decode.argtypes = [*[ctypes.c_int] * 2, *[ctypes.c_void_p] * 4]
        best = library.offload_level()
        self.level = LEVELS.index(level) if level is not None else best
        if self.level > best:
            raise ValueError(f"this processor has no {level}")
        self.threads = threads

    def at(self, level: str | None = None, threads: int | None = None) -> Kernel:
        """The same library, used otherwise."""
        return Kernel(self._library, level, threads)

    @property
    def levels(self) -> tuple[str, ...]:
        """What this processor can do."""
        return LEVELS[: self._library.offload_level() + 1]

    def activation(self, module: GatedExperts, dtype: torch.dtype) -> int | None:
        """Which activation the module gates with, as the kernel numbers them; None if it is not for the kernel.

        The module is asked, not read: what its `_apply_gate` makes of values of every size must be, bit for bit, what
        an activation the kernel knows makes of them. A clamp, a bias, another order of gate and up show.
        """
        plain = module.has_gate and not module.has_bias and not module.is_transposed
        plain = (
            plain and not getattr(module, "has_post_expert_norm", False) and getattr(module, "is_concatenated", True)
        )
        if not plain or dtype not in _TYPES:
            return None
        near = torch.linspace(-12, 12, 97)
        far = torch.logspace(-20, 18, 77)
        gate = torch.cat([near, far, -far])
        gate, up = gate.to(dtype), gate.flip(0).roll(5).to(dtype)
        try:
            with torch.inference_mode():
                got = module._apply_gate(torch.cat([gate, up])[None])
                for number, activation in enumerate(_ACTIVATIONS):
                    if torch.equal(got, (activation(gate) * up)[None]):
                        return number
        except Exception:  # whatever a module does when asked something it did not expect: not for us
            return None
        return None

    def usable(self, module: GatedExperts, dtype: torch.dtype) -> bool:
        """Whether the kernel computes what this module means, in this type."""
        return self.activation(module, dtype) is not None

    def run(
        self,
        hidden: torch.Tensor,
        experts: Sequence[tuple[Matrices, Sequence[int]]],
        weights: torch.Tensor,
        out: torch.Tensor,
        *,
        top_k: int,
        activation: int,
    ) -> None:
        """out[p] = expert(hidden[p // top_k]) * weights[p] for each expert's places p.

        hidden [T, H] and out [T·k, H] of one type, rows contiguous; weights [T·k] float32; experts of one shape.
        Releases the GIL. Raises `MemoryError`.
        """
        used = [e for e in experts if e[1]]
        if not used:
            return
        shape = used[0][0].shape
        assert all(m.shape == shape for m, _ in used) and hidden.size(1) == out.size(1) == shape[0]
        assert hidden.stride(1) == out.stride(1) == weights.stride(0) == 1 and weights.dtype is torch.float32
        assert hidden.dtype is out.dtype
        table, places = array("q"), array("q")
        for m, at in used:
            table.extend((m.gate_up, m.down, len(places), len(at)))
            places.extend(at)
        tokens = array("q", [p // top_k for p in places])
        sizes = array("q", (_TYPES[hidden.dtype], activation, *shape, hidden.stride(0), out.stride(0)))
        sizes.extend((len(used), len(places)))
        threads = self.threads or torch.get_num_threads()
        failed = self._run(
            self.level,
            threads,
            sizes.buffer_info()[0],
            table.buffer_info()[0],
            tokens.buffer_info()[0],
            places.buffer_info()[0],
            hidden.data_ptr(),
            weights.data_ptr(),
            out.data_ptr(),
        )
        if failed:
            raise MemoryError("no memory for the activations of a layer's experts")

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor | None:
        """x [..., K] times weight [N, K] transposed, plus bias [N] → [..., N]; None if the kernel cannot read them.

        All of one type, on the CPU, a weight's row in one piece; x may lie anyhow. Nothing is kept for a gradient.
        Releases the GIL. Raises `MemoryError`.
        """
        kind = _TYPES.get(weight.dtype)
        if kind is None or x.dtype is not weight.dtype or not weight.is_cpu or not x.is_cpu or weight.dim() != 2:
            return None
        n, k = weight.shape
        stride = weight.stride()
        if x.dim() == 0 or x.size(-1) != k or stride[1] != 1 or k == 0:
            return None
        if bias is not None and not (
            bias.dtype is x.dtype and bias.is_cpu and bias.shape == (n,) and bias.stride(0) == 1
        ):
            return None
        if not x.is_contiguous():
            x = x.contiguous()
        out = x.new_empty((*x.shape[:-1], n))
        sizes = array("q", (kind, x.numel() // k, k, n, k, stride[0], n))
        failed = self._linear(
            self.level,
            self.threads or torch.get_num_threads(),
            sizes.buffer_info()[0],
            x.data_ptr(),
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
        )
        if failed:
            raise MemoryError("no memory for the inputs of a linear layer")
        return out

    def attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor | None:
        """Attention of one token per sequence to all held: query [B, heads, 1, D], key [B, kv heads, L, D], value
        [B, kv heads, L, Dv] → [B, 1, heads, Dv]; None if the kernel cannot do it.

        All of one type, on the CPU, the elements of a head in one piece. Releases the GIL. Raises `MemoryError`.
        """
        kind = _TYPES.get(query.dtype)
        if kind is None or not (key.dtype is value.dtype is query.dtype) or not (query.is_cpu and key.is_cpu):
            return None
        if not (query.dim() == key.dim() == value.dim() == 4) or query.size(2) != 1:
            return None
        batch, heads, _, width = query.shape
        kv_heads, length, out_width = value.shape[1:]
        shapes = key.shape == (batch, kv_heads, length, width) and value.size(0) == batch
        if not shapes or not length or not kv_heads or heads % kv_heads or heads // kv_heads > 16 or out_width > 256:
            return None
        q, k, v = query.stride(), key.stride(), value.stride()
        if not q[3] == k[3] == v[3] == 1:
            return None
        out = query.new_empty((batch, 1, heads, out_width))
        sizes = array("q", (kind, batch, heads, kv_heads, length, width, out_width, *q[:2], *k[:3], *v[:3]))
        failed = self._attention(
            self.level,
            self.threads or torch.get_num_threads(),
            sizes.buffer_info()[0],
            scale,
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            out.data_ptr(),
        )
        if failed:
            raise MemoryError("no memory for the queries of a layer")
        return out

    def attend_table(
        self,
        query: torch.Tensor,
        table: array[int],
        strides: tuple[int, int, int, int],
        kv_heads: int,
        largest: torch.Tensor,
        total: torch.Tensor,
        mixed: torch.Tensor,
        scale: float,
        softcap: float | None = None,
    ) -> bool:
        """Attention of one token per sequence to parts of what is held, added to what is carried along in place.

        query [B, heads, 1, D]. table ("q"): for each part four numbers, its sequence, the addresses of its keys
        [kv heads, n, D] and values [kv heads, n, Dv], both of the query's type, and n; strides: elements from head to
        head and token to token of keys, then of values, the elements of a token in one piece. A score is
        `scale`·query·key, or with `softcap` c: c·tanh(score / c).

        largest [B, heads], total [B, heads], mixed [B, heads, Dv], all contiguous float32: the largest score so far
        (-inf before the first part), Σ e^(score - largest), Σ e^(score - largest)·value. Attention is mixed / total.
        What they come to depends on the parts of a sequence and their order, not on how the parts are divided among
        calls, nor on the number of threads.

        False if the kernel cannot do it (type, shape): nothing has been added then. Releases the GIL. Raises
        `ValueError` for a table that makes no sense, as far as can be seen without reading memory; `MemoryError`.
        """
        kind = _TYPES.get(query.dtype)
        if kind is None or not query.is_cpu or query.dim() != 4 or query.size(2) != 1 or query.stride(3) != 1:
            return False
        batch, heads, _, width = query.shape
        out_width = mixed.size(-1)
        if not kv_heads or heads % kv_heads or heads // kv_heads > 16 or out_width > 256:
            return False
        sums = (largest, total, mixed)
        assert largest.shape == total.shape == (batch, heads) and mixed.shape == (batch, heads, out_width)
        assert all(t.dtype is torch.float32 and t.is_cpu and t.is_contiguous() for t in sums)
        if table.typecode != "q" or len(table) % 4 or not (softcap is None or softcap > 0):
            raise ValueError("a table of parts has four 64-bit numbers for each, and a soft cap is above zero")
        if not table or not query.numel():
            return True
        sizes = array("q", (kind, batch, heads, kv_heads, len(table) // 4, width, out_width))
        sizes.extend((*query.stride()[:2], *strides))
        failed = self._attend(
            self.level,
            self.threads or torch.get_num_threads(),
            sizes.buffer_info()[0],
            scale,
            softcap or 0.0,
            query.data_ptr(),
            table.buffer_info()[0],
            largest.data_ptr(),
            total.data_ptr(),
            mixed.data_ptr(),
        )
        if failed > 0:
            raise ValueError(f"a part has less than no tokens, or is of a sequence that is not one of {batch}")
        if failed:
            raise MemoryError("no memory for the queries of a layer")
        return True

    def decode_kv(self, bits: int, group: int, raw: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """What `kvstore.codecs.Grouped.decode` does, bit for bit, for codes of so many bits in groups of `group`.

        raw: uint8, all of a chunk's bytes and on the CPU. False if the kernel cannot do it (type, shape): nothing has
        been written then. Releases the GIL.
        """
        kind = _TYPES.get(keys.dtype)
        tensors = (raw, keys, values)
        if kind is None or values.dtype is not keys.dtype or not all(t.is_cpu and t.is_contiguous() for t in tensors):
            return False
        if not keys.dim() == values.dim() == 3 or keys.shape[:2] != values.shape[:2] or raw.data_ptr() % 2:
            return False
        heads, tokens, width = keys.shape
        out = values.size(2)
        shared = 4 * heads * (-(-tokens // group) * width + tokens * -(-out // group))
        if raw.numel() != shared + heads * tokens * sum(-(-n * bits // 8) for n in (width, out)):
            return False
        sizes = array("q", (kind, bits, group, heads, tokens, width, out))
        threads = self.threads or torch.get_num_threads()
        addresses = [t.data_ptr() for t in tensors]
        return not self._decode(self.level, threads, sizes.buffer_info()[0], *addresses)

    def attend_chunks(
        self,
        query: torch.Tensor,
        parts: Sequence[tuple[int, torch.Tensor, torch.Tensor]],
        largest: torch.Tensor,
        total: torch.Tensor,
        mixed: torch.Tensor,
        scale: float,
        softcap: float | None = None,
    ) -> bool:
        """`attend_table` for parts given as (sequence, keys [kv heads, n, D], values [kv heads, n, Dv]).

        Parts without tokens add nothing. Neighbours that lie alike (the same strides) are one call.
        """
        parts = [part for part in parts if part[1].numel()]
        if not parts:
            return True
        kv_heads, width, out_width = parts[0][1].size(0), query.size(-1), mixed.size(-1)
        for _, k, v in parts:
            n = k.size(1)
            alike = k.dtype is v.dtype is query.dtype and k.is_cpu and v.is_cpu
            shapes = k.shape == (kv_heads, n, width) and v.shape == (kv_heads, n, out_width)
            if not (alike and shapes and k.stride(2) == v.stride(2) == 1):
                return False
        for strides, run in itertools.groupby(parts, lambda part: (*part[1].stride()[:2], *part[2].stride()[:2])):
            table = array("q")
            for row, k, v in run:
                table.extend((row, k.data_ptr(), v.data_ptr(), k.size(1)))
            if not self.attend_table(query, table, strides, kv_heads, largest, total, mixed, scale, softcap):
                return False  # the first already: what is left to check does not depend on the parts
        return True


_loaded: dict[Path, Kernel | None] = {}  # by cache folder: each is tried once


def load() -> Kernel | None:
    """The kernel, compiled first if it must be (a second or two, once); None where torch has to do."""
    if os.environ.get("OFFLOAD_KERNELS") == "0":
        return None
    folder = cache_folder() / "kernels"
    if folder not in _loaded:
        _loaded[folder] = load_from(folder)
    return _loaded[folder]


def load_from(folder: Path, compilers: Sequence[str] = COMPILERS) -> Kernel | None:
    """The kernel from its file in `folder`, which is written, or written again if it is damaged or another's."""
    try:
        sources = [path.read_bytes() for path in (HEADER, *SOURCES)]
        key = hashlib.sha256(b"\0".join([*sources, " ".join(FLAGS).encode(), platform.machine().encode()])).hexdigest()
        path = folder / f"kernels-{key[:32]}.so"
        if not _sound(path):
            _compile(path, compilers)
        if not _sound(path):
            return None
        library = ctypes.CDLL(str(path))
        kernel = Kernel(library) if library.offload_abi() == _ABI else None
        return kernel if kernel is not None and _correct(kernel) else None
    except (OSError, ValueError, AttributeError, MemoryError, subprocess.SubprocessError):
        return None


def _sound(path: Path) -> bool:
    """Whether the file is ours alone to write, and what was written: its last 32 bytes are the hash of the rest."""
    with contextlib.suppress(OSError):
        ours = all(
            s.st_uid == os.geteuid() and not s.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            for s in (path.stat(), path.parent.stat())
        )
        if ours and path.stat().st_size <= _MAX_BYTES:
            raw = path.read_bytes()
            return hashlib.sha256(raw[:-32]).digest() == raw[-32:]
    return False


def _compile(path: Path, compilers: Sequence[str]) -> None:
    """Write the library and its hash to `path`. Raises `OSError` or `SubprocessError` if no compiler can."""
    compiler = next((c for name in compilers if (c := shutil.which(name))), None)
    if compiler is None:
        raise FileNotFoundError("no C compiler")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=path.parent) as work:  # 0700, and on the file system that the file is to be on
        made, ready = Path(work, "made.so"), Path(work, "ready.so")
        subprocess.run(
            [compiler, *FLAGS, *map(str, SOURCES), "-o", str(made), "-lm"],
            check=True, timeout=_COMPILE_S, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, env={**os.environ, "TMPDIR": work},
        )  # fmt: skip
        raw = made.read_bytes()
        fd = os.open(ready, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "wb") as f:
            f.write(raw + hashlib.sha256(raw).digest())
        os.replace(ready, path)


def _correct(kernel: Kernel) -> bool:
    """Whether a compiler new to us made something that computes: each call once, small, in both types."""
    hidden, inner = 40, 24
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        values = ((torch.arange(3 * inner * hidden) * 7919 % 1000) / 1000 - 0.3).to(dtype)
        gate_up = values[: 2 * inner * hidden].view(2 * inner, hidden)
        down = values[2 * inner * hidden :].view(hidden, inner)
        x = values[None, :hidden]
        out = torch.full((1, hidden), torch.nan, dtype=dtype)
        where = matrices({"gate_up_proj": gate_up, "down_proj": down}, dtype)
        assert where is not None
        kernel.run(x, [(where, [0])], torch.ones(1), out, top_k=1, activation=0)
        gate, up = (x.double() @ gate_up.double().t()).chunk(2, dim=-1)
        want = (torch.nn.functional.silu(gate) * up) @ down.double().t()
        product = kernel.linear(x, down.t().contiguous(), down[:inner, 0].contiguous())
        wanted = x.double() @ down.double() + down[:inner, 0].double()
        attended, wanted_too = _attended(kernel, values)
        for a, b in ((out, want), (product, wanted), (attended, wanted_too)):
            if a is None or not (a.double() - b).abs().max() <= tolerance * b.abs().max():
                return False
        if not all(_decodes(kernel, bits, dtype) for bits in (8, 4)):
            return False
    return True


def _decodes(kernel: Kernel, bits: int, dtype: torch.dtype) -> bool:
    """Whether 5 tokens of 2 heads, in groups of 2, come out of their codes to the bit."""
    heads, tokens, group, widths = 2, 5, 2, (7, 3)
    shared, codes, wanted = [], [], []
    for along, width in enumerate(widths):
        shape = (heads, 3, width) if along == 0 else (heads, tokens, 2)
        low, step = ((torch.arange(torch.Size(shape).numel()).view(shape) * n % 13 / 7 - m).half()
                     for n, m in ((5, 1.0), (3, 0.0)))  # fmt: skip
        code = (torch.arange(heads * tokens * width).view(heads, tokens, width) * 29 % 2**bits).byte()
        half = (width + 1) // 2
        packed = code
        if bits == 4:
            packed = code[..., :half].clone()
            packed[..., : width - half] |= code[..., half:] << 4
        lows, steps = (t.float().repeat_interleave(group, along + 1) for t in (low, step))
        wanted.append((code.float() * steps[:, :tokens, :width] + lows[:, :tokens, :width]).to(dtype))
        shared += [low.view(torch.uint8).flatten(), step.view(torch.uint8).flatten()]
        codes.append(packed.flatten())
    got = [torch.zeros_like(x) for x in wanted]
    done = kernel.decode_kv(bits, group, torch.cat([*shared, *codes]), *got)
    return done and all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def _attended(kernel: Kernel, values: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Attention by both calls, of 4 heads to 70 tokens, in two parts and capped by the second; and what it is to be."""
    query, key, value = values[:80].view(1, 4, 1, 20), values.view(1, 2, 72, 20)[:, :, :70], values.flip(0)
    value = value.view(1, 2, 72, 20)[:, :, 2:]
    whole = kernel.attention(query, key, value, 2.0)
    largest, total, mixed = torch.full((1, 4), -torch.inf), torch.zeros(1, 4), torch.zeros(1, 4, 20)
    parts = [(0, key[0, :, i:j], value[0, :, i:j]) for i, j in ((66, 70), (0, 66))]
    in_parts = kernel.attend_chunks(query, parts, largest, total, mixed, 2.0, softcap=3.0)
    scores = (query.double().view(1, 2, 2, 20) @ key.double().transpose(-1, -2)).view(1, 4, 70) * 2
    wanted = [s.softmax(-1).view(1, 2, 2, 70) @ value.double() for s in (scores, 3 * (scores / 3).tanh())]
    got = torch.cat([whole.view(-1), (mixed / total[..., None]).view(-1)]) if whole is not None and in_parts else None
    return got, torch.cat([w.view(-1) for w in wanted])

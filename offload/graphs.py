"""Piecewise CUDA graphs: norms and MLPs of decode steps, replayed with one launch instead of one for each kernel.

Captured is a direct child of a decoder layer that computes one tensor from one tensor with weights whose place never
changes: all pinned on the device. Attention (its cache grows), experts (they come and go) and whatever has streamed
weights run as ever. The fixed buffers a graph reads and writes are ours alone: the input is copied in, and a copy of
the output is handed out, because the next replay writes over the buffer while a caller may still hold what it was
given (hidden states, the residual stream). So a replay costs three launches, and a module that is a single kernel
gains nothing and is left alone.

Off unless asked for. NOT YET RUN ON A GPU: everything but `CudaGraph` is tested with a stand-in for it.

Source: torch's notes on CUDA graphs, https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

RESERVE = 128 << 20  # device memory for graphs, their buffers and the side stream's workspaces; not measured yet
MAX_SHAPES = 4  # batch sizes captured per module; further ones run eagerly
_WARM_UP = 2  # runs on the side stream before a capture: libraries set themselves up on first use
_ONE_KERNEL = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


class Graph(Protocol):
    """Work recorded once and done again at will."""

    def capture(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Record `work`; returns the tensor every `replay` fills. Its content is undefined until the first one."""
        ...

    def replay(self) -> None:
        """Do the work again, on the current stream, with what its inputs hold now."""
        ...


class CudaGraph:
    """`Graph` over torch's, captured on `stream` into the memory of `pool`."""

    def __init__(self, stream: torch.cuda.Stream, pool: Any) -> None:
        self._stream = stream
        self._pool = pool
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Warm up and capture on a side stream, while transfer threads go on with theirs (`thread_local`)."""
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # brings the old stream back even where a capture fails half-way
            for _ in range(_WARM_UP):
                work()
            with torch.cuda.graph(self._graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                out = work()
        torch.cuda.current_stream().wait_stream(stream)
        return out

    def replay(self) -> None:
        """One launch."""
        self._graph.replay()


def cuda_graphs() -> Callable[[], Graph]:
    """Makes graphs that share one stream and one memory pool: they are replayed in turn, never at the same time."""
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    return lambda: CudaGraph(stream, pool)


class Captures:
    """The captured modules of one model. `notes` is told of those that could not be, once for each class."""

    def __init__(self, make: Callable[[], Graph], notes: list[str]) -> None:
        self.modules: dict[str, Captured] = {}
        self._make = make
        self._notes = notes
        self._told: set[str] = set()

    def wrap(self, layer: nn.Module, name: str, stay: set[str]) -> None:
        """Capture what can be of a decoder layer called `name`; `stay` are the parameters that never move."""
        for child_name, child in layer.named_children():
            full = f"{name}.{child_name}"
            mine = [f"{full}.{n}" for n in child.state_dict(keep_vars=True)]
            if capturable(child) and stay.issuperset(mine):
                self.modules[full] = Captured(child.forward, self._make, self._failed(type(child).__name__))
                child.forward = self.modules[full]

    @property
    def replays(self) -> int:
        """How often a graph was replayed so far, all modules together."""
        return sum(m.replays for m in self.modules.values())

    def _failed(self, kind: str) -> Callable[[Exception], None]:
        def tell(e: Exception) -> None:
            if kind not in self._told:
                self._told.add(kind)
                reason = " ".join(str(e).split())[:200]
                self._notes.append(f"--graphs: {kind} runs without, because capturing it failed: {reason}")

        return tell


class Captured:
    """In the place of a module's forward. The second call with one token per sequence and a new shape captures it."""

    def __init__(
        self,
        forward: Callable[..., Any],
        make: Callable[[], Graph],
        failed: Callable[[Exception], None],
    ) -> None:
        self._forward = forward
        self._make = make
        self._failed = failed
        self._seen: set[tuple[Any, ...]] = set()
        self._captured: dict[tuple[Any, ...], tuple[Graph, torch.Tensor, torch.Tensor]] = {}
        self._eager = False
        self.replays = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's forward returns for these arguments."""
        x = args[0] if len(args) == 1 and not kwargs else None
        if self._eager or not isinstance(x, torch.Tensor) or x.dim() != 3 or x.shape[1] != 1:
            return self._forward(*args, **kwargs)
        key = (x.shape, x.dtype, x.device)
        if key not in self._captured:
            if key not in self._seen:  # once is no pattern
                self._seen.add(key)
                return self._forward(x)
            if len(self._captured) == MAX_SHAPES:
                return self._forward(x)
            try:
                self._captured[key] = self._capture(x)
            except Exception as e:  # whatever a kernel or a library cannot do while it is recorded
                self._eager = True
                self._failed(e)
                return self._forward(x)
        graph, source, out = self._captured[key]
        source.copy_(x)
        graph.replay()
        self.replays += 1
        return out.clone()

    def _capture(self, x: torch.Tensor) -> tuple[Graph, torch.Tensor, torch.Tensor]:
        with torch.inference_mode(False):  # a buffer that may be written to whatever mode a caller is in
            source = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        source.copy_(x)
        graph = self._make()
        out = graph.capture(lambda: self._forward(source))
        if not isinstance(out, torch.Tensor):
            raise TypeError("its result is not one tensor")
        return graph, source, out


def capturable(module: nn.Module) -> bool:
    """Whether `module` is a norm of several kernels, or an MLP, that takes one tensor and nothing else."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    if len(parameters) != 1 or parameters[0].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD or module.training:
        return False
    own = dict(module.named_parameters(recurse=False))
    if not list(module.children()):
        return bool(own) and all(p.dim() == 1 for p in own.values()) and not isinstance(module, _ONE_KERNEL)
    if own or any(isinstance(m, (nn.ModuleList, nn.ModuleDict)) for m in module.modules()):
        return False  # the weights of experts, or a choice among submodules that is made anew for every token
    weighty = [m for m in module.modules() if m.state_dict(keep_vars=True) and not list(m.children())]
    return bool(weighty) and all(isinstance(m, nn.Linear) for m in weighty)

"""The experts of one layer, computed from blocks that come and go.

Each expert that any token chose is computed once, ready ones first, the others as they arrive. An expert's output
goes to its (token, k) place and the places are summed in k order when all have arrived, so that neither the arrival
order nor the placement ever shows in the result.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch.nn.functional import linear

from moe.lookahead import ExpertLookahead
from tiers import Lease, Residency


class ExpertsModule(Protocol):
    """What transformers' experts modules offer (flags set by `use_experts_implementation`)."""

    num_experts: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    act_fn: Callable[[torch.Tensor], torch.Tensor]

    def _apply_gate(self, gate_up_out: torch.Tensor) -> torch.Tensor: ...


Views = Mapping[str, torch.Tensor]


class LayerExperts:
    """One layer's experts: `keys[e]` is the block of expert e, `views(lease)` its matrices.

    `views` returns tensors by parameter name (`gate_up_proj` or `up_proj`, `down_proj`, and their `_bias`), each
    with the leading expert dimension removed.
    """

    def __init__(
        self,
        residency: Residency,
        keys: Sequence[str],
        views: Callable[[Lease], Views],
        *,
        lookahead: int,
        ahead: ExpertLookahead | None = None,
        number: int = 0,
    ) -> None:
        """`lookahead` transfers are asked for at once; `ahead` is told what layer `number` needs."""
        self._residency = residency
        self._keys = keys
        self._views = views
        self._lookahead = max(1, lookahead)
        self._ahead = ahead
        self._number = number

    def forward(
        self, module: ExpertsModule, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden [T, H], index [T, k] int64, weights [T, k] → [T, H]; indices ≥ num_experts contribute nothing."""
        top_k = index.size(-1)
        flat = index.reshape(-1)  # [T·k]
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=len(self._keys)).tolist()
        places: dict[int, torch.Tensor] = {}  # expert → its (token, k) places, flattened
        start = 0
        for e, n in enumerate(counts):
            if n and e < len(self._keys):
                places[e] = order[start : start + n]
            start += n
        out = hidden.new_zeros(flat.numel(), hidden.size(-1))  # [T·k, H]
        scale = weights.reshape(-1, 1)
        for e, lease in self._arriving(list(places), hidden):
            with lease:
                at = places[e]
                y = self._expert(module, self._views(lease), hidden[at // top_k])
                out[at] = (y * scale[at]).to(out.dtype)
        return out.view(*index.shape, -1).sum(dim=-2).to(hidden.dtype)

    def _arriving(self, experts: Sequence[int], hidden: torch.Tensor) -> Iterator[tuple[int, Lease]]:
        """(expert, lease) for each: resident ones first, then the others in the order in which they arrive."""
        r = self._residency
        if self._ahead is not None:
            self._ahead.needs(self._number, experts)
        missing = deque(e for e in experts if not r.resident(self._keys[e]))
        late = set(missing)
        # leasing what is here keeps the fetches below from evicting it
        held = deque((e, r.acquire(self._keys[e])) for e in experts if e not in late)
        pending: list[tuple[int, Lease]] = []

        def request() -> None:
            while missing and len(pending) < self._lookahead:
                # with nothing else in hand there must be a slot; otherwise one comes free later
                lease = r.request(self._keys[missing[0]], must=not pending and not held)
                if lease is None:
                    break
                pending.append((missing.popleft(), lease))

        try:
            request()
            if self._ahead is not None:
                self._ahead.look(self._number, hidden)
            while held or pending:
                if held:
                    yield held.popleft()
                else:
                    i = next((i for i, (_, lease) in enumerate(pending) if lease.ready), 0)
                    e, lease = pending.pop(i)
                    yield e, lease.wait()
                request()
        finally:
            for _, lease in (*held, *pending):
                lease.release()

    @staticmethod
    def _expert(module: ExpertsModule, w: Views, x: torch.Tensor) -> torch.Tensor:
        """One expert on its tokens, x [n, H] → [n, H], in the module's own arithmetic."""

        def project(x: torch.Tensor, name: str) -> torch.Tensor:
            bias = w[f"{name}_bias"] if module.has_bias else None
            return linear(x, w[name].t() if module.is_transposed else w[name], bias)

        h = module._apply_gate(project(x, "gate_up_proj")) if module.has_gate else module.act_fn(project(x, "up_proj"))
        y = project(h, "down_proj")
        if getattr(module, "has_post_expert_norm", False):
            y = module.post_expert_norm(y)  # type: ignore[attr-defined]
        return y

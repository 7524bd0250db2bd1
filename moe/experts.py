"""The experts of one layer, computed from blocks that come and go.

Each expert that any token chose is computed once, ready ones first, the others as they arrive. An expert's output
goes to its (token, k) place and the places are summed in k order when all have arrived, so that neither the arrival
order nor the placement ever shows in the result.

On a device they are computed by one product per matrix (`moe.grouped`): all that are resident, then those that arrive.
Where every expert of the layer stays, the host does not even ask which were chosen.

On the CPU, experts of few tokens go to the kernel (`moe.kernels`), all that are at hand in one call. Which ones do is
decided by how many tokens chose them, never by what is here first.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch.nn.functional import linear

from moe.beside import Beside
from moe.grouped import Form, Grouped, Standing
from moe.kernels import Kernel, Matrices, matrices
from moe.lookahead import ExpertLookahead
from tiers import Counters, Interrupted, Lease, Residency

KERNEL_TOKENS = 32  # most tokens of an expert for the kernel: torch's tiled products draw level at 64 to 128
_PAUSE_S = 0.0002
TOGETHER = 16  # most experts in a call: their slots, and their activations, are held until it returns


class ExpertsModule(Protocol):
    """What transformers' experts modules offer (flags set by `use_experts_implementation`)."""

    num_experts: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    act_fn: Callable[[torch.Tensor], torch.Tensor]

    def _apply_gate(self, gate_up_out: torch.Tensor) -> torch.Tensor: ...


Views = Mapping[str, torch.Tensor]


class CpuSide(NamedTuple):
    """The same layer's experts in host memory, and who decides which of them are computed there."""

    decider: Beside
    layer: LayerExperts


class LayerExperts:
    """One layer's experts: `keys[e]` is the block of expert e, `views(lease)` its matrices.

    `views` returns tensors by parameter name (`gate_up_proj` or `up_proj`, `down_proj`, and their `_bias`), each
    with the leading expert dimension removed. With a `kernel` or `grouped`, these compute what they can; without, torch
    does, expert by expert.
    """

    def __init__(
        self,
        residency: Residency,
        keys: Sequence[str],
        views: Callable[[Lease], Views],
        *,
        lookahead: int,
        kernel: Kernel | None = None,
        ahead: ExpertLookahead | None = None,
        number: int = 0,
        grouped: Grouped | None = None,
        stays: bool = False,
        beside: CpuSide | None = None,
        stalls: Counters | None = None,
    ) -> None:
        """`lookahead` transfers are asked for at once; `ahead` is told what layer `number` needs.

        `stays`: all of the layer's experts are loaded before the first call, and none is ever evicted. `beside`: the
        CPU may compute some of them where they lie in host memory. `stalls`: where waiting is counted as well, for
        experts in a memory that others lease from too, on their way to the device.
        """
        self._residency = residency
        self._keys = keys
        self._views = views
        self._lookahead = max(1, lookahead)
        self.kernel = kernel
        self._activations: dict[torch.dtype, int | None] = {}  # of the layer's module, as the kernel numbers them
        self._at: dict[int, tuple[int, torch.dtype, Matrices | None]] = {}  # expert → (slot, dtype, weights there)
        self._ahead = ahead
        self._number = number
        self.grouped = grouped
        self._stays = stays
        self.beside = beside
        self._stalls = stalls
        self._shared = stalls is not None
        self._stand: Standing | None = None  # where they stay, once looked up
        self._tables: dict[torch.dtype, list[Matrices] | None] = {}  # the same for the kernel

    def forward(
        self, module: ExpertsModule, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden [T, H], index [T, k] int64, weights [T, k] → [T, H]; indices ≥ num_experts contribute nothing."""
        if self._ahead is not None:
            index = self._ahead.routed(self._number, hidden, index, weights)
        form = self.grouped.form(index.numel(), hidden.dtype) if self.grouped is not None else None
        if form is not None and self._ahead is None and (standing := self._standing(form)) is not None:
            return self._all(module, hidden, index, weights, standing, form)
        if self._stays and self._ahead is None and len(hidden) <= KERNEL_TOKENS:
            activation = self._activation(module, hidden)
            if activation is not None and (table := self._table(hidden.dtype)) is not None:
                return self._by_kernel(hidden, index, weights, table, activation)
        flat = index.reshape(-1)  # [T·k]
        on_host = flat.cpu()  # the one time the host waits
        counts = torch.bincount(on_host, minlength=len(self._keys)).tolist()
        chosen = [e for e in range(len(self._keys)) if counts[e]]
        cpu = self.beside.decider.for_cpu({e: counts[e] for e in chosen}) if self.beside is not None else []
        if self._ahead is not None:
            self._ahead.needs(self._number, chosen, cpu)
        here = [e for e in chosen if e not in set(cpu)] if cpu else chosen
        out = hidden.new_zeros(flat.numel(), hidden.size(-1))  # [T·k, H]
        meanwhile = self._meanwhile(module, hidden, on_host, weights, counts, cpu, out) if cpu else None
        if form is not None:
            assert self.grouped is not None
            places = self.grouped.places(index)
            for group in self._arriving(here, len(self._keys), meanwhile):
                try:
                    slots = {e: self._residency.pool_of(lease.key).number(lease.slot) for e, lease in group}
                    self.grouped.some(out, module, hidden, places, weights, counts, slots, here, form)
                finally:
                    for _, lease in group:
                        lease.release()
            return self.grouped.summed(out, index, hidden)
        self._into(out, module, hidden, flat, weights, counts, here, meanwhile)
        return out.view(*index.shape, -1).sum(dim=-2).to(hidden.dtype)

    def _into(
        self, out: torch.Tensor, module: ExpertsModule, hidden: torch.Tensor, flat: torch.Tensor,
        weights: torch.Tensor, counts: Sequence[int], experts: Sequence[int],
        meanwhile: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        """Compute these experts; out [T·k, H] gets their (token, k) places. flat [T·k] are the tokens' choices."""
        top_k = weights.size(-1)
        order = torch.argsort(flat, stable=True)
        starts = list(itertools.accumulate(counts, initial=0))
        places = {e: slice(starts[e], starts[e + 1]) for e in experts}  # where in `order` an expert's places are
        scale = weights.reshape(-1, 1)
        activation = self._activation(module, hidden)
        small = {e for e in experts if activation is not None and counts[e] <= KERNEL_TOKENS}
        if small:
            rows, factors, listed = hidden.contiguous(), scale.view(-1).float().contiguous(), order.tolist()
        for group in self._arriving(experts, TOGETHER if small else 1, meanwhile):
            try:
                there = {e: m for e, lease in group if e in small and (m := self._matrices(e, lease, hidden.dtype))}
                if there:
                    assert self.kernel is not None and activation is not None
                    self.kernel.run(
                        rows, [(m, listed[places[e]]) for e, m in there.items()], factors, out,
                        top_k=top_k, activation=activation,
                    )  # fmt: skip
                for e, lease in group:
                    if e not in there:
                        at = order[places[e]]
                        y = self._expert(module, self._views(lease), hidden[at // top_k])
                        out[at] = (y * scale[at]).to(out.dtype)
            finally:
                for _, lease in group:
                    lease.release()

    def _meanwhile(
        self, module: ExpertsModule, hidden: torch.Tensor, flat: torch.Tensor, weights: torch.Tensor,
        counts: Sequence[int], experts: Sequence[int], out: torch.Tensor,
    ) -> Callable[[], None]:  # fmt: skip
        """What the CPU does beside the device: these experts, where they lie. Their inputs come over now."""
        assert self.beside is not None
        beside, same = self.beside, hidden.device.type == "cpu"
        rows, factors = hidden.cpu(), weights.cpu()
        mine = out if same else torch.zeros(out.shape, dtype=out.dtype)

        def compute() -> None:
            began, waited = time.perf_counter(), self._residency.counters.stall_s
            beside.layer._into(mine, module, rows, flat, factors, counts, experts)
            took = time.perf_counter() - began - (self._residency.counters.stall_s - waited)
            beside.decider.worked([counts[e] for e in experts], took)
            if not same:
                at = torch.isin(flat, torch.tensor(experts)).nonzero().view(-1)
                out[at.to(out.device)] = mine[at].to(out.device)
            beside.decider.spare(experts)

        return compute

    def _standing(self, form: Form) -> Standing | None:
        """Where all experts stay, if they do and one product can reach them."""
        assert self.grouped is not None
        if self._stays and self._stand is None:
            slots = {e: s for e, k in enumerate(self._keys) if (s := self._residency.slot_of(k)) is not None}
            assert len(slots) == len(self._keys), "experts that stay are loaded first"
            pools = (self._residency.pool_of(k) for k in self._keys)
            self._stand = self.grouped.standing({e: p.number(slots[e]) for e, p in enumerate(pools)})
        return self._stand if self._stand is not None and self.grouped.reaches(self._stand, form) else None

    def _all(
        self, module: ExpertsModule, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor,
        standing: Standing, form: Form,
    ) -> torch.Tensor:  # fmt: skip
        """Where every expert stays. Nothing is leased: nothing is evicted. How many were chosen is not known here."""
        assert self.grouped is not None
        used = min(index.numel(), len(self._keys)) * self._residency.nbytes(self._keys[0])
        self._residency.counters.needed += used
        self._residency.counters.hit += used
        return self.grouped.all(module, hidden, index, weights, standing, form)

    def _by_kernel(
        self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, table: Sequence[Matrices],
        activation: int,
    ) -> torch.Tensor:  # fmt: skip
        """Few tokens where every expert stays: all in one call. Nothing is leased: nothing is evicted."""
        assert self.kernel is not None
        places: dict[int, list[int]] = {}  # expert → its (token, k) places
        chosen = index.flatten().tolist()
        for p, e in enumerate(chosen):
            places.setdefault(e, []).append(p)
        used = [(table[e], at) for e, at in sorted(places.items()) if e < len(table)]
        nbytes = len(used) * self._residency.nbytes(self._keys[0])
        self._residency.counters.needed += nbytes
        self._residency.counters.hit += nbytes
        out = hidden.new_zeros(len(chosen), hidden.size(-1))  # [T·k, H]
        factors = weights.reshape(-1).float()
        self.kernel.run(hidden.contiguous(), used, factors, out, top_k=index.size(-1), activation=activation)
        return out.view(*index.shape, -1).sum(dim=-2).to(hidden.dtype)

    def _table(self, dtype: torch.dtype) -> list[Matrices] | None:
        """The addresses of all experts' weights where they stay; None if the kernel cannot read them."""
        if dtype not in self._tables:
            found: list[Matrices] = []
            for e, key in enumerate(self._keys):
                with self._residency.acquire(key) as lease:
                    if (m := self._matrices(e, lease, dtype)) is not None:
                        found.append(m)
            alike = len(found) == len(self._keys) and len({m.shape for m in found}) == 1
            self._tables[dtype] = found if alike else None
        return self._tables[dtype]

    def _activation(self, module: ExpertsModule, hidden: torch.Tensor) -> int | None:
        """How the kernel is to compute this module; None if it cannot."""
        if self.kernel is None or hidden.device.type != "cpu":
            return None
        if hidden.dtype not in self._activations:
            self._activations[hidden.dtype] = self.kernel.activation(module, hidden.dtype)
        return self._activations[hidden.dtype]

    def _matrices(self, expert: int, lease: Lease, dtype: torch.dtype) -> Matrices | None:
        """The addresses of an expert's weights in its slot; looked up once as long as it stays where it is."""
        known = self._at.get(expert)
        if known is None or known[:2] != (lease.slot.address, dtype):
            known = self._at[expert] = (lease.slot.address, dtype, matrices(self._views(lease), dtype))
        return known[2]

    def _arriving(
        self, experts: Sequence[int], most: int, meanwhile: Callable[[], None] | None = None
    ) -> Iterator[list[tuple[int, Lease]]]:
        """(expert, lease) for each, in groups of up to `most`: resident ones first, then the others as they arrive.

        A group that was given out is the caller's to release before the next one is asked for. `meanwhile` is done once
        all transfers that can be are under way, before the first is waited for.
        """
        r = self._residency
        missing = deque(e for e in experts if not r.resident(self._keys[e]))
        late = set(missing)
        # leasing what is here keeps the fetches below from evicting it
        held = deque((e, r.acquire(self._keys[e])) for e in experts if e not in late)
        pending: list[tuple[int, Lease]] = []
        todo = [meanwhile] if meanwhile is not None else []

        def request() -> None:
            while missing and len(pending) < self._lookahead:
                # with nothing else in hand there must be a slot; otherwise one comes free later
                alone = not pending and not held
                lease = r.request(self._keys[missing[0]], must=alone and not self._shared)
                if lease is None and alone:
                    self._pause()  # every slot is on its way to the device
                    continue
                if lease is None:
                    break
                pending.append((missing.popleft(), lease))

        try:
            request()
            if self._ahead is not None:
                self._ahead.look(self._number)
            while held or pending:
                if held:
                    yield [held.popleft() for _ in range(min(most, len(held)))]
                elif todo:
                    todo.pop()()
                else:
                    ready = [i for i, (_, lease) in enumerate(pending) if lease.ready][:most] or [0]
                    arrived = [pending[i] for i in ready]
                    pending[:] = [p for i, p in enumerate(pending) if i not in ready]
                    yield self._waited(arrived)
                request()
            if todo:
                todo.pop()()
        finally:
            for _, lease in (*held, *pending):
                lease.release()

    def _pause(self) -> None:
        """For as long as a part of a transfer takes. Raises `Interrupted`."""
        if self._residency.interrupted is not None and self._residency.interrupted():
            raise Interrupted("interrupted")
        began = time.perf_counter()
        time.sleep(_PAUSE_S)
        if self._stalls is not None:
            self._stalls.stall_s += time.perf_counter() - began

    def _waited(self, group: list[tuple[int, Lease]]) -> list[tuple[int, Lease]]:
        """The group when all of it is there; if one fails, none is held any longer."""
        began = time.perf_counter()
        try:
            return [(e, lease.wait()) for e, lease in group]
        except BaseException:
            for _, lease in group:
                lease.release()
            raise
        finally:
            if self._stalls is not None:
                self._stalls.stall_s += time.perf_counter() - began

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

"""A model's experts put together: who gives up a slot, who is fetched ahead, what is written down and what is kept.

The parts are in `moe`; this is which of them a run uses, and where they meet the model's modules.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from moe import (
    ExpertLookahead,
    GateCorrection,
    HearsRouter,
    LayerExperts,
    Recorder,
    Replay,
    Router,
    RoutingTrace,
    choices,
    kernels,
)
from moe.beside import FASTER, Beside, Costs, Pace
from moe.experts import CpuSide
from offload import hf
from offload.config import RunConfig
from offload.hierarchy import Hierarchy
from offload.layout import ExpertGroup, LayerLayout, ModelLayout
from offload.planning import calibration
from offload.planning.budgets import READERS
from offload.planning.facts import ModelFacts
from offload.planning.machine import Machine, Rates
from offload.planning.plan import Plan
from tiers import EvictionPolicy, Lease, ModelError, UsageError

MAX_CORRECTION = 64 << 20  # bytes for what is learned of routers (`moe.gates`); models that need more go without
LEAST_LEARNED = 64  # tokens; what was learned from fewer is not kept


class Experts:
    """Made before the plan (`nbytes` belongs to its budget), connected after, closed with the engine."""

    def __init__(self, layout: ModelLayout, facts: ModelFacts, config: RunConfig, machine_id: str) -> None:
        """Raises `UsageError`, `ModelError`: a trace to be replayed is not there, damaged, or of another shape; or
        there is nothing to record or replay.
        """
        self.groups: list[tuple[LayerLayout, ExpertGroup]] = [
            (layer, group) for layer in layout.layers for group in layer.experts
        ]
        self._keys = [[e.block.key for e in group.blocks] for _, group in self.groups]
        self._counts = [len(k) for k in self._keys]
        self.sizes = tuple(group.blocks[0].block.nbytes for _, group in self.groups)  # bytes of one expert
        self._top_k = max((group.top_k for _, group in self.groups), default=0)
        self._config = config
        self._kept = calibration.kept_at(machine_id, facts, "routers", "npz")
        self._correction: GateCorrection | None = None
        self._recorder: Recorder | None = None
        self._replay: Replay | None = None
        self.lookahead: ExpertLookahead | None = None
        self._lifts = True
        for flag, file in (("--record-routing", config.record_routing), ("--replay-routing", config.replay_routing)):
            if file is not None and not self.groups:
                raise UsageError(f"{flag} {file}: this model has no experts that are routed to one by one")
        if config.replay_routing is not None:
            trace = RoutingTrace.load(Path(config.replay_routing))
            self._replay = Replay(trace, self._counts, self._top_k)
        if config.record_routing is not None:
            self._recorder = Recorder(self._counts)
        depth = config.expert_depth
        size = GateCorrection.nbytes(facts.hidden, self._counts, depth)
        if choices.corrects(config.expert_predictor) and 0 < size <= MAX_CORRECTION:
            self._correction = GateCorrection(facts.hidden, self._counts, depth=depth)
        self.nbytes = size if self._correction is not None else 0

    def policy(self, slots: int) -> EvictionPolicy:
        """Who gives up one of so many slots."""
        return choices.policy(self._config.expert_policy, self._keys, self._top_k, slots)

    def connect(self, model: nn.Module, memory: Hierarchy, plan: Plan) -> None:
        """Make `lookahead`, told by the model's routers; None where there is nothing to fetch, record or replay."""
        watched = self._recorder is not None or self._replay is not None
        if not self.groups or (plan.everything_fits and not watched):
            return
        gone = {b.block.key for b in memory.streamed()}
        routers: list[Router | None] = []
        for layer, group in self.groups:
            # a router that comes and goes with its layer cannot be asked early
            stays = all(part.block.key not in gone for part in layer.dense)
            routers.append(hf.router_of(*_place(model, layer, group)) if stays else None)
        predictor = None if plan.everything_fits else choices.predictor(self._config.expert_predictor, self._counts)
        if predictor is None and self._recorder is None:
            self._correction = None
        if self._correction is not None:
            with contextlib.suppress(UsageError, ModelError):  # nothing kept yet, or nothing that can be used
                self._correction.load(self._kept)
        self.lookahead = ExpertLookahead(
            memory.compute,
            self._keys,
            routers,
            self._top_k + plan.expert_slots // 4,  # most of the slots stay for experts that were chosen
            predictor=predictor,
            correction=self._correction,
            fetch=self._fetch(memory),
            policies=[p for p in memory.expert_policies if isinstance(p, HearsRouter)],
            depth=self._config.expert_depth,
            recorder=self._recorder,
            replay=self._replay,
        )
        for number, (layer, group) in enumerate(self.groups):
            hf.hear_router(*_place(model, layer, group), functools.partial(self.lookahead.heard, number))

    def _fetch(self, memory: Hierarchy) -> Callable[[str], bool | None]:
        """Who fetches ahead: to the device where an expert is computed faster there, else only into host memory."""

        def fetch(key: str) -> bool | None:
            if self._lifts:
                return memory.fetch_expert(key)
            return None if memory.host.resident(key) else memory.host.prefetch(key)

        return fetch

    def beside(self, layers: Sequence[LayerExperts], memory: Hierarchy, plan: Plan, machine: Machine) -> None:
        """Let the CPU compute what lies in host memory, where there is a device; once the host's memory is laid out."""
        rates, link = machine.host_rates, machine.link_bytes_per_s
        if self._config.expert_compute == "device" or rates is None or link is None or not plan.host.experts:
            return
        pace = Pace()
        for number, (layer, (_, group)) in enumerate(zip(layers, self.groups, strict=True)):
            size, specs = self.sizes[number], group.blocks[0].specs
            seconds = functools.partial(_seconds, str(specs[0].dtype).removeprefix("torch."), size, len(specs))
            costs = Costs(
                device_s=functools.lru_cache(maxsize=64)(functools.partial(seconds, machine.rates)),
                cpu_s=functools.lru_cache(maxsize=64)(functools.partial(seconds, rates)),
                move_s=machine.link_latency_s + size / link,
                read_s=machine.disk_latency_s + size / machine.disk_bytes_per_s,
                alone=machine.alone,
            )
            self._lifts = costs.device_s(1) < FASTER * costs.cpu_s(1)
            keys = self._keys[number]
            host = LayerExperts(
                memory.host, keys, views_of(group, on_device=False), lookahead=READERS, kernel=kernels.load(),
                stalls=memory.compute.counters,
            )  # fmt: skip
            layer.beside = CpuSide(Beside(memory.compute, memory.host, keys, costs, pace), host)

    def foreseen(self, ahead: int) -> list[tuple[float, float] | None]:
        """For each layer, the recall of what was said of it so many layers before: by the router alone, corrected."""
        layers = range(len(self._keys))
        known = self._correction
        return [known.recall(n - ahead, n) if known is not None and n >= ahead else None for n in layers]

    def close(self) -> None:
        """Write the routing that was asked for, and keep what was learned for the next run. Raises `UsageError`."""
        correction, self._correction = self._correction, None
        if correction is not None and self._replay is None and correction.learned >= LEAST_LEARNED:
            with contextlib.suppress(OSError, UsageError):  # a cache that cannot be written is no reason to fail
                self._kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                correction.save(self._kept)
        recorder, self._recorder = self._recorder, None
        if recorder is not None and self._config.record_routing is not None:
            recorder.trace().save(Path(self._config.record_routing).absolute())


def views_of(group: ExpertGroup, *, on_device: bool) -> Callable[[Lease], dict[str, torch.Tensor]]:
    """The matrices of a leased expert, by name: they lie otherwise in device slots than in the host's."""
    specs = {e.block.key: e.on_device if on_device else e.specs for e in group.blocks}
    return lambda lease: {s.name: s.view(lease.slot.tensor) for s in specs[lease.key]}


def _seconds(dtype: str, nbytes: int, matrices: int, rates: Rates, tokens: int) -> float:
    """To compute one expert for so many tokens."""
    return rates.expert_call_s + rates.linear_s(dtype, nbytes, tokens, matrices)


def _place(model: nn.Module, layer: LayerLayout, group: ExpertGroup) -> tuple[nn.Module, str]:
    """The layer's module, and the name of the experts module inside it."""
    return model.get_submodule(layer.module), group.module.removeprefix(f"{layer.module}.")

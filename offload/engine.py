"""The engine: one model, its blocks in their tiers, and the verb `step`.

transformers' own modules are the compute graph. What happens here is that, when a decoder layer (or the head, or an
expert) is about to compute, its weights are in memory, and that meanwhile the next ones are on their way.
"""

from __future__ import annotations

import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers.cache_utils import Cache

from kvstore import PrefixStore, RaggedCache, Sessions, TieredCache, spoil
from kvstore.sparse import OBSERVED
from moe import LayerExperts, grouped, kernels
from offload import graphs, hardware, hf, launches, native
from offload.binding import Binder
from offload.config import Job, RunConfig
from offload.describe import describe
from offload.embedding import RowReader
from offload.experts import Experts, views_of
from offload.fingerprint import fingerprint
from offload.hierarchy import Hierarchy, Progress
from offload.kv import KV
from offload.layout import ExpertGroup
from offload.means import (
    device_budget,
    job_budgets,
    kv_resident,
    make_device,
    ram_budget,
    reads_directly,
    stored_at_most,
)
from offload.planning import calibration
from offload.planning.budgets import READERS, Budgets, Overrides
from offload.planning.calibration import Calibration
from offload.planning.plan import Plan
from offload.planning.predict import Prediction, Workload, predict
from offload.planning.search import choose
from offload.planning.throughput import Rate, choose_job, compute_s
from offload.sizes import parse_size
from offload.stats import RequestStats, StepStats
from tiers import (
    DirectReader,
    Interrupted,
    KvikioReader,
    OffloadError,
    ReadError,
    Trace,
    UsageError,
    gds,
)
from tiers import memory as mem

_LEAST_PASSES, _LEAST_LEARNT_S = 4, 0.5  # of one width, in a batch job, from which something can be learnt


class Progressed(Protocol):
    """The passes of a batch job, by the power of two that holds their tokens."""

    step: StepStats
    widths: dict[int, StepStats]
    counts: dict[int, int]


@dataclass(slots=True)
class Sequences:
    """A batch of sequences of one width (left-padded) and what the model keeps of them.

    `cache` is a transformers cache (None: nothing is kept); `inputs` are the further model inputs, of which
    `attention_mask` [B, past + new] and `position_ids` [B, new] are cut along with the tokens.
    """

    cache: Cache | None
    inputs: dict[str, Any] = field(default_factory=dict)


class Engine:
    """Loads a checkpoint folder under a budget. Use `step`, or `hf` with transformers' own tools. Close it."""

    def __init__(
        self, folder: Path, config: RunConfig, progress: Progress | None = None, *,
        interrupt: threading.Event | None = None,
    ) -> None:  # fmt: skip
        """`interrupt`: an event that, once set, ends a pass at its next layer (default: the engine's own)."""
        began = time.perf_counter()
        for flag, file in (("--trace", config.trace), ("--record-routing", config.record_routing)):
            if file is not None and not Path(file).absolute().parent.is_dir():
                raise UsageError(f"{flag} {file}: there is no such folder")
        self.folder = folder
        self.config = config
        self.interrupt = interrupt or threading.Event()
        self.on_prefill: Progress | None = None  # told of layers done while a prompt is computed
        self.on_pass: Callable[[Cache | None, torch.Tensor], None] | None = None  # told of each that ended well
        self._prefilled = self._prefill_total = 0
        self._lock = threading.RLock()
        self.description = description = describe(folder, config.dtype)
        self.hf_config, self.hf, self.layout = description.config, description.model, description.layout
        assert description.checkpoint is not None
        self.device = make_device(config)
        directly = reads_directly(folder, self.device)
        device_base, vram = device_budget(config, self.device)
        device_base += (gds.DEVICE_CACHE if directly else 0) + (graphs.RESERVE if config.graphs else 0)
        ram = ram_budget(config)
        self.machine = hardware.machine_of(folder, self.device, ram=ram, vram=vram)
        if config.expert_compute == "device":
            self.machine = replace(self.machine, host_rates=None)
        self.machine_id = hardware.identity(folder, self.device)
        self.calibration = calibration.load(self.machine_id, description.facts)
        self.experts = Experts(self.layout, description.facts, config, self.machine_id)
        budgets = Budgets(
            ram=ram,
            base=mem.rss() + self.experts.nbytes,
            vram=vram,
            device_base=device_base,
            resident=(
                parse_size(config.resident, of=self.layout.weight_bytes, flag="--resident")
                if config.resident is not None
                else None
            ),
            context=config.context,
            kv_resident=kv_resident(config),
            kv_below=config.kv_budget is not None,
        )
        machine = self.calibration.apply(self.machine)
        overrides = Overrides.of(config.overrides or {})
        workload = Workload()
        if config.context is not None:  # who asks for so many tokens will have them
            workload = replace(workload, past_tokens=max(0, config.context - workload.context))
        self.rates: tuple[Rate, ...] = ()  # of a batch job: what is expected of one number of sequences and another
        self.rate: Rate | None = None  # and of that which the plan is made for
        job = config.job
        if job is None:
            self.plan: Plan = choose(description, budgets, machine, workload, self.calibration.routing, overrides).plan
        else:
            found = choose_job(
                description, functools.partial(job_budgets, budgets, job), machine, job, self.calibration.routing,
                overrides,
            )  # fmt: skip
            self.plan, self.rate, self.rates = found.plan, found.rate, found.others
        mem.keep_temporaries(self.plan.activations)
        self.kv = KV(description, config, self.plan)
        self.steps: list[StepStats] = []
        self.trace = Trace() if config.trace is not None else None
        self.notes: list[str] = []  # what a user should know and has not been told
        self.count_launches = config.count_launches
        self.captures = graphs.Captures(graphs.cuda_graphs(), self.notes) if config.graphs else None
        with ExitStack() as opened:
            reader = DirectReader(description.checkpoint.files)
            opened.callback(reader.close)
            direct: KvikioReader | None = None
            if directly:
                try:
                    direct = KvikioReader(description.checkpoint.files)
                    opened.callback(direct.close)
                except ReadError as e:
                    self.notes.append(f"weights go through host memory: {e}")
            self._memory = Hierarchy(
                self.layout, self.plan, reader, self.device, self.interrupt.is_set, self.trace, direct,
                self.experts.policy,
            )  # fmt: skip
            opened.callback(self.kv.close)
            try:
                self.kv.connect(
                    description, reader, self._memory.disk, self.trace, self.interrupt.is_set, self.notes,
                    self.device, self.machine,
                )  # fmt: skip
            except BaseException:
                self._memory.close()
                raise
            self._close_files = opened.pop_all().close
        try:
            self._connect()
            self._memory.load(progress)
            self.experts.beside(self._expert_layers, self._memory, self.plan, self.machine)
            for binder, key in self._pins:
                with self._memory.compute.acquire(key) as lease:
                    binder.bind(lease.slot)
        except BaseException:
            self.close()
            raise
        self.load_s = time.perf_counter() - began

    def step(self, sequences: Sequences, tokens: torch.Tensor) -> Any:
        """Extend `sequences` by `tokens` [B, q] and return the model's output (logits [B, q or fewer, vocab]).

        One pass over the weights, or several if q is more than the plan's `prefill_chunk` and the family allows a
        prompt to be cut. Raises `Interrupted` at the next layer once `interrupt` is set, `ReadError`.
        """
        with self._lock:
            chunk = max(1, self.plan.prefill_chunk // max(1, tokens.shape[0]))
            whole = self.hf_config.model_type in hf.NO_CHUNKED_PREFILL
            if whole and sequences.cache is not None and sequences.cache.get_seq_length():
                chunk, whole = 1, False  # several tokens would be computed as if nothing had been before them
            self._prefilled = self._prefill_total = 0
            keep = sequences.inputs.get("logits_to_keep", 0)
            cut = sequences.cache is not None and tokens.shape[1] > chunk and isinstance(keep, int)
            cut = cut and not whole
            if tokens.shape[1] > 1:
                self._prefill_total = self._layer_bytes * (-(-tokens.shape[1] // chunk) if cut else 1)
            if not cut:
                return self._pass(tokens, sequences.cache, sequences.inputs)
            assert sequences.cache is not None
            outs = []
            past = sequences.cache.get_seq_length()
            at = 0
            for n in pieces(tokens.shape[1], chunk, OBSERVED if self.kv.sparse is not None else 1):
                if isinstance(sequences.cache, TieredCache):
                    sequences.cache.prompt_ends = at + n == tokens.shape[1]
                part = tokens[:, at : at + n]
                inputs = _slice(sequences.inputs, past, at, part.shape[1])
                out = self._pass(part, sequences.cache, inputs)
                outs.append(out.logits if keep == 0 else out.logits[:, -keep:])
                at += n
            out.logits = torch.cat(outs, dim=1) if keep == 0 or keep > outs[-1].shape[1] else outs[-1]
            if keep:
                out.logits = out.logits[:, -keep:]
            return out

    def advance(
        self, cache: RaggedCache, parts: Sequence[tuple[TieredCache, Sequence[int]]], wanted: Sequence[int]
    ) -> torch.Tensor:
        """One pass over the new tokens of ragged sequences: (sequence, its tokens) of each part. Returns the logits
        [len(wanted), vocab] on the CPU that follow the last token of the parts numbered `wanted`, at least one.

        `cache` comes from `kv.ragged`, the sequences from it. Raises as `step` does; sequences may be uneven then, and
        are good for nothing but `reset`.
        """
        with self._lock:
            cache.parts = [(sequence, len(tokens)) for sequence, tokens in parts]
            for number, (sequence, _) in enumerate(parts):
                sequence.prompt_ends = number in wanted
            positions = [sequence.get_seq_length() + i for sequence, tokens in parts for i in range(len(tokens))]
            ends = list(itertools.accumulate(len(tokens) for _, tokens in parts))
            device = self.device.torch_device
            self._prefilled = self._prefill_total = 0
            inputs = {
                "position_ids": torch.tensor([positions], device=device),
                "logits_to_keep": torch.tensor([ends[i] - 1 for i in wanted], device=device),
                "use_cache": True,
            }
            row = torch.tensor([[t for _, tokens in parts for t in tokens]])
            out = self._pass(row, cache, inputs)
            self.steps[-1].sequences = len(parts)
            logits: torch.Tensor = out.logits[0].cpu()
            return logits

    def predict(self, workload: Workload, known: Calibration | None = None) -> Prediction:
        """What this plan is expected to do with `workload`, by all that is `known` now (or as given)."""
        known = known or self.calibration
        return predict(self.description.facts, self.plan, known.apply(self.machine), workload, known.routing)

    def learn(self, workload: Workload, stats: RequestStats) -> None:
        """Compare a request with its prediction, and keep what it teaches for the next plan."""
        stats.prediction = self.predict(workload)
        if self.plan.kv_tiered:  # see `calibration`
            return
        learned = calibration.learn(
            self.calibration,
            self.calibration.apply(self.machine).rates,
            stats.prediction,
            stats,
            lambda known: self.predict(workload, known),
        )
        if learned is not None:
            self.calibration = learned
            stats.learned = learned.reason
            calibration.save(self.machine_id, self.description.facts, learned)

    def learn_job(self, job: Job, passes: Progressed) -> str:
        """What a batch job teaches for the next plan; the reason, or nothing. Keys and values on disk teach nothing."""
        if self.plan.kv_tiers is not None and self.plan.kv_share < 1:
            return ""
        known, widths = self.calibration, []
        machine = known.apply(self.machine)
        for width, count in sorted(passes.counts.items()):
            stats = passes.widths[width]
            if count < _LEAST_PASSES or stats.seconds < _LEAST_LEARNT_S:
                continue
            tokens = round(stats.tokens / count)
            told = compute_s(
                self.description.facts, self.plan, machine, job, tokens, round(stats.sequences / count),
                known.routing,
            )  # fmt: skip
            widths.append((tokens, (stats.seconds - stats.stall_s) / count, told))
        learned = calibration.learn_widths(
            known, machine.rates, widths, (passes.step.bytes_read, passes.step.read_busy_s)
        )
        if learned is None:
            return ""
        self.calibration = learned
        calibration.save(self.machine_id, self.description.facts, learned)
        return learned.reason

    @functools.cached_property
    def fingerprint(self) -> str:
        """Which weights these are, for what is stored of them."""
        assert self.description.checkpoint is not None
        return fingerprint(list(self.description.checkpoint.files), self.hf_config)

    @property
    def arithmetic(self) -> str:
        """How keys and values are computed: stored ones are good for the same only."""
        c = self.config
        sparse = f" sparse {c.kv_policy} {c.kv_budget}" if c.kv_budget is not None else ""
        codecs = f" keys and values {self.kv.codecs}" if self.kv.codecs else ""
        return str(self.layout.dtype).removeprefix("torch.") + sparse + codecs

    def prefixes(self, sessions: Sessions) -> PrefixStore:
        """What is stored of this model's keys and values, and may be: as much as `--disk` says."""
        disk = self.config.disk
        limit = parse_size(disk, flag="--disk") if disk is not None else stored_at_most(sessions.folder)
        return sessions.prefixes(self.fingerprint, self.arithmetic, limit=limit)

    def new_cache(self, capacity: int) -> Cache:
        """An empty cache with room for `capacity` tokens per sequence."""
        return self.kv.new_cache(capacity)

    def close(self) -> None:
        """Stop the workers, close the files, write the trace and the routing. Steps after this raise."""
        self._memory.close()
        self._close_files()
        self.experts.close()
        if self.trace is not None and self.config.trace is not None:
            try:
                self.trace.write(Path(self.config.trace).absolute())
            except OSError as e:
                raise OffloadError(f"--trace {self.config.trace}: {e.strerror}") from e

    # one pass, layer by layer

    def _pass(self, tokens: torch.Tensor, cache: Cache | None, inputs: Mapping[str, Any]) -> Any:
        stats = StepStats(tokens=tokens.numel(), sequences=tokens.shape[0])
        counting = self.count_launches and self.device.kind == "cuda"
        with launches.counted(stats) if counting else nullcontext():
            before = self._memory.books()
            began = time.perf_counter()
            finished = False
            if self.kv.attention is not None:
                self.kv.attention.cache = cache
            try:
                with torch.inference_mode():
                    out = self._forward(input_ids=tokens, past_key_values=cache, **inputs)
                finished = True
            finally:
                if self.kv.attention is not None:
                    self.kv.attention.cache = None  # whose memory is its owner's to give back
                if not finished:
                    self._memory.restart()
                    if cache is not None:
                        spoil(cache)
                stats.seconds = time.perf_counter() - began
                for name, value in self._memory.books().items():
                    setattr(stats, name, value - before[name])
                if isinstance(cache, (TieredCache, RaggedCache)):
                    kv = cache.unseen()
                    stats.stall_s += kv.stall_s
                    stats.kv_bytes_read, stats.kv_bytes_written = kv.bytes_read, kv.bytes_written
                    stats.kv_loss = kv.loss
                self.steps.append(stats)
        if self.on_pass is not None:
            self.on_pass(cache, tokens)
        return out

    @contextmanager
    def _computing(self, name: str, stays: int, streamed: Mapping[str, Binder]) -> Iterator[None]:
        """Around a layer's (or the head's) forward: its streamed blocks are leased, waited for and bound.

        All are asked for before the first is waited for, and what comes next is asked for before that: the link
        never waits for compute.
        """
        self._check()
        memory = self._memory
        counters = memory.compute.counters
        counters.needed += stays
        counters.hit += stays
        with ExitStack() as held:
            leases = []
            for key in streamed:
                lease = memory.compute.request(key)
                assert lease is not None
                leases.append(held.enter_context(lease))
            if streamed:
                memory.entered(list(streamed))
            for lease, binder in zip(leases, streamed.values(), strict=True):
                binder.bind(lease.wait().slot)
                held.callback(binder.unbind)
            with self._traced(name):
                yield
        if streamed:
            memory.left()  # the slots just given back take the next blocks
        self._computed(name)

    @contextmanager
    def _traced(self, key: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if self.trace is not None:
            self.trace.slice("compute", key, began, time.perf_counter())

    def _computed(self, key: str) -> None:
        if self._prefill_total and self.on_prefill is not None:
            self._prefilled += self._bytes_of[key]
            self.on_prefill("prompt", self._prefilled, self._prefill_total)

    def _check(self) -> None:
        if self.interrupt.is_set():
            raise Interrupted("interrupted")

    # building

    def _connect(self) -> None:
        """Give every module its way to its blocks."""
        layout, memory = self.layout, self._memory
        self._forward = self.hf.forward
        native.attach(self.hf, self.device.torch_device)
        gone = {b.block.key for b in memory.streamed()}
        self._pins = [(Binder(self.hf, layout.rest), layout.rest.block.key)]
        modules = [(layer.module, layer.dense) for layer in layout.layers]
        if layout.head is not None:
            modules.append((layout.head.specs[0].name.rpartition(".")[0], (layout.head,)))
        for name, parts in modules:
            binders = [(Binder(self.hf, part), part.block) for part in parts]
            streamed = {block.key: binder for binder, block in binders if block.key in gone}
            kept = [(binder, block) for binder, block in binders if block.key not in gone]
            self._pins.extend((binder, block.key) for binder, block in kept)
            stays = sum(block.nbytes for _, block in kept)
            around = functools.partial(self._computing, parts[0].block.key, stays, streamed)
            self._wrap(self.hf.get_submodule(name), around, is_head=parts[0] is layout.head)
        self._bytes_of = {
            layer.dense[0].block.key: sum(part.block.nbytes for part in layer.dense)
            + sum(e.block.nbytes for g in layer.experts for e in g.blocks)
            for layer in layout.layers
        }
        if layout.head is not None:
            self._bytes_of[layout.head.block.key] = layout.head.block.nbytes
        self._layer_bytes = sum(self._bytes_of.values())
        if self.captures is not None:
            for layer in layout.layers:
                stay = {spec.name for part in layer.dense if part.block.key not in gone for spec in part.specs}
                self.captures.wrap(self.hf.get_submodule(layer.module), layer.module, stay)
        self.experts.connect(self.hf, memory, self.plan)
        self._expert_layers = [self._layer_experts(group, n) for n, (_, group) in enumerate(self.experts.groups)]
        for experts, (_, group) in zip(self._expert_layers, self.experts.groups, strict=True):
            hf.attach_experts(self.hf.get_submodule(group.module), experts)
        self._tables = [
            RowReader(t, module, memory.disk, self.device.torch_device)
            for t in layout.tables
            if isinstance(module := self.hf.get_submodule(t.module), nn.Embedding)
        ]
        hf.move_buffers(self.hf, self.device.torch_device)
        self.hf.forward = self._hf_forward

    def _layer_experts(self, group: ExpertGroup, number: int) -> LayerExperts:
        keys = [e.block.key for e in group.blocks]
        return LayerExperts(
            self._memory.compute,
            keys,
            views_of(group, on_device=self.device.own_memory),
            lookahead=READERS,
            kernel=kernels.load() if self.device.torch_device.type == "cpu" else None,
            ahead=self.experts.lookahead,
            number=number,
            grouped=self._grouped(group) if grouped.supported(self.device.torch_device) else None,
            stays=self.plan.everything_fits,
        )

    def _grouped(self, group: ExpertGroup) -> grouped.Grouped:
        """One product per matrix for these experts, which lie alike in the slots of their pool."""
        first = group.blocks[0]
        memory = self._memory.compute.pool_of(first.block.key).memory
        views = grouped.PoolViews({s.name: s.views(memory) for s in first.on_device})
        room = self.plan.activations // 2  # set aside for the temporaries of a prompt: few tokens leave most of it
        capability = grouped.capability_of(memory.device)
        return grouped.Grouped(len(group.blocks), views, room=room, capability=capability)

    def _wrap(self, module: nn.Module, around: Callable[[], Any], *, is_head: bool) -> None:
        forward = module.forward

        @functools.wraps(forward)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if is_head and args:
                # the last row, sliced out of a prompt's, has strides that make torch copy the whole weight first
                args = (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
            with around():
                return forward(*args, **kwargs)

        module.forward = wrapped

    def _hf_forward(self, input_ids: torch.Tensor | None = None, **inputs: Any) -> Any:
        """What `model.hf(...)` and transformers' `generate()` call: they are callers of `step` like any other."""
        if input_ids is None:
            raise OffloadError("give input_ids: embeddings are read from disk by token")
        cache = inputs.pop("past_key_values", None)
        return self.step(Sequences(cache, inputs), input_ids)


def pieces(tokens: int, chunk: int, least: int = 1) -> list[int]:
    """Tokens of each pass over a prompt: `chunk`, and what is left. Where that is fewer than `least` (the last queries
    are looked at together, see `kvstore.sparse`), the pass before leaves it some."""
    sizes = [min(chunk, tokens - at) for at in range(0, tokens, chunk)]
    short = least - sizes[-1] if len(sizes) > 1 else 0
    if 0 < short <= chunk - least:
        sizes[-2:] = [chunk - short, least]
    return sizes


def _slice(inputs: Mapping[str, Any], past: int, at: int, n: int) -> dict[str, Any]:
    """The further inputs that belong to `n` tokens from position `at` of a longer prompt."""
    out = dict(inputs)
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        out["attention_mask"] = mask[:, : past + at + n]
    if isinstance(positions, torch.Tensor):
        out["position_ids"] = positions[..., at : at + n]
    for name in ("cache_position", "token_type_ids"):
        if isinstance(inputs.get(name), torch.Tensor):
            out[name] = inputs[name][..., at : at + n]
    return out

"""A model's keys and values put together: what is reserved for them, where they spill to, who attends.

All in memory, in transformers' own attention, as long as that is what the plan says; else over memory and disk, by
`kvstore`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvstore import (
    ChunkStore,
    CodedStore,
    FewTokens,
    KVCodecs,
    KVDisk,
    KVShape,
    RaggedCache,
    SparseOptions,
    TieredCache,
    chunk_tokens,
    make_cache,
    slots_for,
)
from kvstore.store import LEAST_RING, RING
from moe import kernels
from offload import attention
from offload.attention import Attention
from offload.config import RunConfig
from offload.describe import Description
from offload.planning.facts import ModelFacts
from offload.planning.machine import Machine
from offload.planning.plan import Plan
from offload.sizes import format_size, parse_budget, parse_size
from tiers import CpuDevice, Device, DirectReader, Trace, TransferQueue, UsageError
from tiers.folders import cache_folder


def sparse_options(config: RunConfig) -> SparseOptions | None:
    """What was asked for of sparse attention; None: nothing."""
    budget = parse_budget(config.kv_budget)
    return SparseOptions(budget, config.kv_policy, config.kv_by_layer) if budget is not None else None


def _on_host(facts: ModelFacts, machine: Machine, queries: int) -> bool:
    """Whether so many queries attend to what is in RAM there, and only partial results cross the link: where that is
    sooner than bringing keys and values up (InstInfer, https://arxiv.org/abs/2409.04992; MoE-Lens)."""
    layer = max(facts.layers, key=lambda y: y.kv_bytes)
    rates, link = machine.host_rates or machine.rates, machine.link_bytes_per_s
    if link is None or not layer.kv_bytes:
        return True
    there = max(
        layer.kv_bytes / rates.attention_bytes_per_s, queries * layer.attention_flops / rates.attention_flops_per_s
    )
    return there < layer.kv_bytes / link


def _open_disk(config: RunConfig, reader: DirectReader, queue: TransferQueue, trace: Trace | None) -> KVDisk:
    """What chunks are spilled to. Raises `UsageError`."""
    folder = Path(config.spill_dir).absolute() if config.spill_dir is not None else cache_folder() / "spill"
    limit = parse_size(config.disk, flag="--disk") if config.disk is not None else None
    return KVDisk(folder, limit, reader, queue, trace)


class KV:
    """Acts on a plan, once it is connected; closed with the engine."""

    def __init__(self, description: Description, config: RunConfig, plan: Plan) -> None:
        self._config = config
        self._hf_config = description.config
        self.sparse = sparse_options(config)
        self.codecs = KVCodecs.parse(config.kv_codec) if config.kv_codec is not None else KVCodecs()
        if self.sparse is not None and self.codecs.ram not in ("none", self.codecs.disk):
            raise UsageError(
                "--kv-codec: with --kv-budget what is in memory comes and goes as it is on disk; "
                f"code both alike (ram={self.codecs.ram},disk={self.codecs.ram}), or the disk only"
            )
        if self.sparse is not None and getattr(self._hf_config.get_text_config(decoder=True), "kv_lora_rank", None):
            raise UsageError("--kv-budget: this model keeps compressed latents, of which no bound is known")
        self.tiered = plan.kv_tiered
        tiered = description.demand.tiered
        self._can_tier = tiered is not None
        self._widest = max((y.kv_bytes for y in description.facts.layers if y.spills), default=1)  # of a token
        # what the plan reserves, less what other layers keep
        self._reserved = plan.kv - (tiered.others(plan.context) if tiered is not None else 0)
        self._below = plan.kv_host if plan.device is not None else None
        self._device: Device = CpuDevice()
        self._on_host: Callable[[int], bool] = lambda queries: True
        self.attention: Attention | None = None
        self._disk: KVDisk | None = None
        self._interrupted: Callable[[], bool] | None = None
        self._notes: list[str] = []
        self._decode: Callable[..., bool] | None = None  # a chunk's codes
        self._chunk = (config.overrides or {}).get("kv_chunk")
        self._model: PreTrainedModel | None = None
        self._few: FewTokens | None = None
        self._open: Callable[[], KVDisk] | None = None

    def connect(
        self, description: Description, reader: DirectReader, queue: TransferQueue, trace: Trace | None,
        interrupted: Callable[[], bool], notes: list[str], device: Device, machine: Machine,
    ) -> None:  # fmt: skip
        """Open what chunks are spilled to, and have the model attend over it. Raises `UsageError`."""
        self._device, self._interrupted, self._notes = device, interrupted, notes
        if device.own_memory:
            self._on_host = functools.partial(_on_host, description.facts, machine)
        kernel = kernels.load()  # what is in RAM is attended to there, a token at a time
        self._few = kernel.attend_table if kernel is not None else None
        self._decode = kernel.decode_kv if kernel is not None else None
        self._model = description.model
        self._open = functools.partial(_open_disk, self._config, reader, queue, trace)
        if self.tiered:
            self._disk = self._open()
            self.attention, _ = attention.switch(description.model, self._few)

    def new_cache(self, capacity: int) -> Cache:
        """An empty cache with room for `capacity` tokens per sequence."""
        if not self.tiered:
            return make_cache(self._hf_config, capacity)
        layers = attention.cache_layers(self._hf_config)
        count = sum(layer is None or isinstance(layer, int) for layer in layers)
        asked = self._config.kv_resident

        def sizes(shape: KVShape, batch: int) -> tuple[int, int, int]:
            """Tokens of a chunk; bytes of all chunks; of the fewest that work."""
            tokens = self._chunk or chunk_tokens(shape, capacity, sparse=self.sparse is not None)
            nbytes = shape.chunk_nbytes(tokens)
            whole = count * batch * -(-capacity // tokens) * nbytes
            return tokens, whole, nbytes * slots_for(0, nbytes, count, batch, capacity, tokens)

        def passing(shape: KVShape, batch: int) -> int:
            """Bytes of RAM that what is not on the device passes through: a whole ring, if that is not most of all."""
            tokens, whole, least = sizes(shape, batch)
            ring = (RING - LEAST_RING) * shape.chunk_nbytes(tokens)
            return min(whole, max(least, min(least + ring, self._wanted(whole) // 2)))

        def make(shape: KVShape, batch: int) -> ChunkStore:
            assert self._disk is not None
            tokens, whole, _ = sizes(shape, batch)
            wanted = room = self._wanted(whole)
            if self._below is not None and self.sparse is None:
                # the device keeps what was asked for; without a word RAM holds what it can
                wanted = room = min(self._below, whole) if asked is None else passing(shape, batch)
            if self.sparse is not None:
                room -= count * batch * self.sparse.abstract_nbytes(shape, capacity, tokens)
            store = self._store_kind(
                self._disk, shape, count, batch, capacity, room, tokens=tokens, interrupted=self._interrupted,
                sparse=self.sparse,
            )  # fmt: skip
            if asked is not None and self._below is None and store.nbytes > wanted:
                self._notes.append(
                    f"--kv-resident {asked} is raised to {format_size(store.nbytes)}, the smallest that works for this "
                    "request"
                )
            if isinstance(store, CodedStore) and not store.codes:
                self._notes.append(
                    f"--kv-codec {self.codecs}: nothing is coded, for all keys and values stay in memory; give a "
                    "smaller --kv-resident, or a codec for memory (ram=int8)"
                )
            return store

        def front(shape: KVShape, batch: int) -> int:
            """Tokens of each sequence that the device holds: none of what is attended to sparsely, which is in RAM."""
            if self._below is None or self.sparse is not None:
                return 0
            _, whole, _ = sizes(shape, batch)
            each = sum(layer is None for layer in layers) * batch * shape.token_nbytes
            room = self._wanted(whole) - (passing(shape, batch) if asked is not None else 0)
            return max(0, min(capacity, room // each)) if each else 0

        return TieredCache(layers, make, front_tokens=front, on_host=self._on_host, lift=self._device.lift)

    def _wanted(self, whole: int) -> int:
        """Bytes to be kept where compute is, of a request that takes `whole`."""
        asked = self._config.kv_resident
        if asked is None and self.sparse is not None and self._below is not None:
            return min(whole, self._below)
        return parse_size(asked, of=whole, flag="--kv-resident") if asked is not None else self._reserved

    @property
    def takes_ragged(self) -> bool:
        """Whether sequences of any lengths can share a pass: all that layers keep of them are keys and values."""
        layers = attention.cache_layers(self._hf_config)
        return self._can_tier and all(layer is None or isinstance(layer, int) for layer in layers)

    def chunk_of(self, each: int) -> int:
        """Tokens of a chunk of sequences that grow to `each`."""
        shape = KVShape(1, self._widest, 0, torch.uint8)
        return self._chunk or chunk_tokens(shape, each, sparse=self.sparse is not None)

    @contextmanager
    def ragged(self, sequences: int, each: int) -> Iterator[RaggedCache]:
        """A cache for `sequences` at once that grow to `each` tokens on average, in what the plan sets aside for keys
        and values; what does not fit there lies on disk. While the context lasts the model attends over it."""
        assert self._open is not None and self._model is not None
        layers = attention.cache_layers(self._hf_config)
        room = self._reserved if self._below is None else self._below
        if self._disk is None:
            self._disk = self._open()
        disk = self._disk

        def make(shape: KVShape, batch: int) -> ChunkStore:
            tokens, left = self.chunk_of(each), room
            if self.sparse is not None:
                left -= len(layers) * sequences * self.sparse.abstract_nbytes(shape, each, tokens)
            return self._store_kind(
                disk, shape, len(layers), sequences, each, left, tokens=tokens, interrupted=self._interrupted,
                sparse=self.sparse,
            )  # fmt: skip

        cache = RaggedCache(layers, make, on_host=self._on_host, lift=self._device.lift)
        switched = self.attention is None
        if switched:
            self.attention, back = attention.switch(self._model, self._few)
        try:
            yield cache
        finally:
            cache.close()
            if switched:
                self.attention = None
                back()

    @property
    def _store_kind(self) -> Callable[..., ChunkStore]:
        if not self.codecs:
            return ChunkStore
        return functools.partial(CodedStore, codecs=self.codecs, decode=self._decode)

    def close(self) -> None:
        """Stop the writers."""
        if self._disk is not None:
            self._disk.close()

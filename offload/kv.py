"""A model's keys and values put together: what is reserved for them, where they spill to, who attends.

All in memory, in transformers' own attention, as long as that is what the plan says; else over memory and disk, by
`kvstore`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers.cache_utils import Cache

from kvstore import (
    ChunkStore,
    CodedStore,
    KVCodecs,
    KVDisk,
    KVShape,
    SparseOptions,
    TieredCache,
    chunk_tokens,
    make_cache,
)
from moe import kernels
from offload import attention, hf
from offload.attention import Attention
from offload.config import RunConfig
from offload.describe import Description
from offload.planning.placement import Demand
from offload.sizes import format_size, parse_budget, parse_size
from tiers import DirectReader, Trace, TransferQueue, UsageError
from tiers.folders import cache_folder


class KV:
    """Made before the plan, which reserves by its `demand`; connected after; closed with the engine."""

    def __init__(self, description: Description, config: RunConfig) -> None:
        self._config = config
        self._hf_config = description.config
        self._itemsize = description.layout.dtype.itemsize
        budget = parse_budget(config.kv_budget)
        self.sparse = SparseOptions(budget, config.kv_policy, config.kv_by_layer) if budget is not None else None
        self._resident = config.kv_resident or "100%"
        self.codecs = KVCodecs.parse(config.kv_codec) if config.kv_codec is not None else KVCodecs()
        self.tiered = config.kv_resident is not None or budget is not None or bool(self.codecs)
        self.demand = self._tiered_demand(description.demand) if self.tiered else description.demand
        self.attention: Attention | None = None
        self._disk: KVDisk | None = None
        self._interrupted: Callable[[], bool] | None = None
        self._notes: list[str] = []
        self._decode: Callable[..., bool] | None = None  # a chunk's codes
        self._chunk = (config.overrides or {}).get("kv_chunk")

    def connect(
        self, description: Description, reader: DirectReader, queue: TransferQueue, trace: Trace | None,
        interrupted: Callable[[], bool], notes: list[str], device: torch.device,
    ) -> None:  # fmt: skip
        """Open what chunks are spilled to, and have the model attend over it. Raises `UsageError`."""
        if not self.tiered:
            return
        config = self._config
        folder = Path(config.spill_dir).absolute() if config.spill_dir is not None else cache_folder() / "spill"
        limit = parse_size(config.disk, flag="--disk") if config.disk is not None else None
        self._disk = KVDisk(folder, limit, reader, queue, trace)
        self._interrupted, self._notes = interrupted, notes
        found = kernels.load()
        self._decode = found.decode_kv if found is not None else None
        kernel = found if device.type == "cpu" else None
        self.attention = attention.switch(description.model, kernel.attend_table if kernel is not None else None)

    def new_cache(self, capacity: int) -> Cache:
        """An empty cache with room for `capacity` tokens per sequence."""
        if not self.tiered:
            return make_cache(self._hf_config, capacity)
        layers = attention.cache_layers(self._hf_config)
        count = sum(layer is None or isinstance(layer, int) for layer in layers)

        def make(shape: KVShape, batch: int) -> ChunkStore:
            assert self._disk is not None
            tokens = self._chunk or chunk_tokens(shape, capacity, sparse=self.sparse is not None)
            whole = count * batch * -(-capacity // tokens) * shape.chunk_nbytes(tokens)
            wanted = parse_size(self._resident, of=whole, flag="--kv-resident")
            kind = functools.partial(CodedStore, codecs=self.codecs, decode=self._decode) if self.codecs else ChunkStore
            store = kind(
                self._disk,
                shape,
                count,
                batch,
                capacity,
                wanted,
                tokens=tokens,
                interrupted=self._interrupted,
                sparse=self.sparse,
            )
            if store.nbytes > wanted:
                self._notes.append(
                    f"--kv-resident {self._resident} is raised to "
                    f"{format_size(store.nbytes)}, the smallest that works for this request"
                )
            if isinstance(store, CodedStore) and not store.codes:
                self._notes.append(
                    f"--kv-codec {self.codecs}: nothing is coded, for all keys and values stay in memory; give a "
                    "smaller --kv-resident, or a codec for memory (ram=int8)"
                )
            return store

        return TieredCache(layers, make)

    def close(self) -> None:
        """Stop the writers."""
        if self._disk is not None:
            self._disk.close()

    def _tiered_demand(self, demand: Demand) -> Demand:
        """What a cache over tiers reserves: what is to stay, and at least the chunks being filled and a ring.

        The chunks of a request are at most an eighth of it long, so that those being filled are an eighth of all.
        """
        layers = hf.kv_layers(self._hf_config, self._itemsize)
        kinds = [layer is None or isinstance(layer, int) for layer in attention.cache_layers(self._hf_config)]
        tiered = [y for y, mine in zip(layers, kinds, strict=False) if mine]
        per_token = sum(y.per_token for y in tiered)
        states = sum(y.state for y in layers)
        others = sum(y.per_token for y, mine in zip(layers, kinds, strict=False) if not mine)
        if not per_token:
            raise UsageError("--kv-resident: this model keeps no keys and values that could lie anywhere else")
        asked = self._resident
        if self.sparse is not None and self.codecs.ram not in ("none", self.codecs.disk):
            raise UsageError(
                "--kv-codec: with --kv-budget what is in memory comes and goes as it is on disk; "
                f"code both alike (ram={self.codecs.ram},disk={self.codecs.ram}), or the disk only"
            )
        if self.sparse is not None and getattr(self._hf_config.get_text_config(decoder=True), "kv_lora_rank", None):
            raise UsageError("--kv-budget: this model keeps compressed latents, of which no bound is known")

        def kv(tokens: int) -> int:
            whole = per_token * tokens
            wanted = parse_size(asked, of=whole, flag="--kv-resident")
            ring = 8 << 20 if self.codecs else 4 << 20
            return min(max(wanted, whole // 8 + 16 * per_token + ring), whole + ring) + others * tokens + states

        eager = False  # scores are never made

        def activations(new: int, context: int) -> int:
            return hf.activation_bytes(self._hf_config, new, 0, self._itemsize, eager) + self._blocks(new)

        return replace(demand, kv=kv, activations=activations)

    def _blocks(self, new: int) -> int:
        """Temporaries of attention over chunks: partial results, and what is gathered of the past."""
        shape = hf.Shape.of(self._hf_config)
        return 3 * 4 * new * shape.heads * shape.head_dim + 4 * 1024 * shape.heads * shape.head_dim * 4

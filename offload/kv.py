"""A model's keys and values put together: what is reserved for them, where they spill to, who attends.

All in memory, in transformers' own attention, as long as that is what the plan says; else over memory and disk, by
`kvstore`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers.cache_utils import Cache

from kvstore import ChunkStore, KVDisk, KVShape, SparseOptions, TieredCache, chunk_tokens, make_cache, slots_for
from moe import kernels
from offload import attention
from offload.attention import Attention
from offload.config import RunConfig
from offload.describe import Description
from offload.planning.placement import Plan
from offload.sizes import format_size, parse_budget, parse_size
from tiers import DirectReader, Trace, TransferQueue, UsageError
from tiers.folders import cache_folder


def sparse_options(config: RunConfig) -> SparseOptions | None:
    """What was asked for of sparse attention; None: nothing."""
    budget = parse_budget(config.kv_budget)
    return SparseOptions(budget, config.kv_policy, config.kv_by_layer) if budget is not None else None


class KV:
    """Acts on a plan, once it is connected; closed with the engine."""

    def __init__(self, description: Description, config: RunConfig, plan: Plan) -> None:
        self._config = config
        self._hf_config = description.config
        self.sparse = sparse_options(config)
        if self.sparse is not None and getattr(self._hf_config.get_text_config(decoder=True), "kv_lora_rank", None):
            raise UsageError("--kv-budget: this model keeps compressed latents, of which no bound is known")
        self.tiered = plan.kv_tiered
        tiered = description.demand.tiered
        # what the plan reserves, less what other layers keep
        self._reserved = plan.kv - (tiered.others(plan.context) if tiered is not None else 0)
        self.attention: Attention | None = None
        self._disk: KVDisk | None = None
        self._interrupted: Callable[[], bool] | None = None
        self._notes: list[str] = []
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
        kernel = kernels.load() if device.type == "cpu" else None
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
            asked = self._config.kv_resident
            wanted = parse_size(asked, of=whole, flag="--kv-resident") if asked is not None else self._reserved
            if self.sparse is not None:
                wanted -= count * batch * self.sparse.abstract_nbytes(shape, capacity, tokens)
            store = ChunkStore(
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
            least = slots_for(0, store.slot_nbytes, count, batch, capacity, tokens)
            if asked is not None and store.slots == least and store.slots * store.slot_nbytes > wanted:
                self._notes.append(
                    f"--kv-resident {asked} is raised to "
                    f"{format_size(store.slots * store.slot_nbytes)}, the smallest that works for this request"
                )
            return store

        return TieredCache(layers, make)

    def close(self) -> None:
        """Stop the writers."""
        if self._disk is not None:
            self._disk.close()

"""Bytes and where they live: blocks, arenas, disk readers, the transfer queue, residency, memory limits.

Knows nothing of models, tokens or the policies of experts and KV.
"""

from tiers.arena import Arena, Pool, Slot
from tiers.block import PAGE, Block, Codec, Move, Segment, page_down, page_up
from tiers.device import CpuDevice, CudaDevice, Device, EmulatedDevice
from tiers.errors import (
    BudgetError,
    CheckpointError,
    DamagedError,
    GoneError,
    Interrupted,
    ModelError,
    OffloadError,
    ReadError,
    StoreError,
    StoreFull,
    UsageError,
)
from tiers.gds import KvikioReader
from tiers.policy import LFU, LRU, EvictionPolicy, NextUse
from tiers.queue import Cause, Meter, Ticket, TransferQueue
from tiers.reader import CHUNK, BlockReader, DirectReader, Piece
from tiers.residency import Counters, Lease, Residency
from tiers.spill import SpillFile, SpillLink
from tiers.trace import Trace
from tiers.uplink import COPIES, UpLink, readable_directly

__all__ = [
    "CHUNK", "COPIES", "LFU", "LRU", "PAGE", "Arena", "Block", "BlockReader", "BudgetError", "Cause",
    "CheckpointError", "Codec", "Counters", "CpuDevice", "CudaDevice", "DamagedError", "Device", "DirectReader",
    "EmulatedDevice", "EvictionPolicy", "GoneError", "Interrupted", "KvikioReader", "Lease", "Meter", "ModelError",
    "Move", "NextUse", "OffloadError", "Piece", "Pool", "ReadError", "Residency", "Segment", "Slot", "SpillFile",
    "SpillLink", "StoreError", "StoreFull", "Ticket", "Trace", "TransferQueue", "UpLink", "UsageError", "page_down",
    "page_up", "readable_directly",
]  # fmt: skip

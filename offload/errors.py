"""The error tree, under the name users import it by (it lives in `tiers.errors`, below everything)."""

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

__all__ = [
    "BudgetError", "CheckpointError", "DamagedError", "GoneError", "Interrupted", "ModelError", "OffloadError",
    "ReadError", "StoreError", "StoreFull", "UsageError",
]  # fmt: skip

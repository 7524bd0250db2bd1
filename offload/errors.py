"""The error tree, under the name users import it by (it lives in `tiers.errors`, below everything)."""

from tiers.errors import (
    BudgetError,
    CheckpointError,
    Interrupted,
    ModelError,
    OffloadError,
    ReadError,
    UsageError,
)

__all__ = [
    "BudgetError", "CheckpointError", "Interrupted", "ModelError", "OffloadError", "ReadError", "UsageError",
]  # fmt: skip

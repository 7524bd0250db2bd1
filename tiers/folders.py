"""Where this user's caches are."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$OFFLOAD_CACHE`, else `offload` in the XDG cache folder."""
    own = os.environ.get("OFFLOAD_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "offload"

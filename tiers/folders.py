"""Where this user's caches and conversations are."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$OFFLOAD_CACHE`, else `offload` in the XDG cache folder."""
    own = os.environ.get("OFFLOAD_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "offload"


def sessions_folder() -> Path:
    """`sessions` in `$OFFLOAD_HOME`, else in `offload` of the XDG data folder: conversations are data, not cache."""
    own = os.environ.get("OFFLOAD_HOME")
    if own:
        return Path(own) / "sessions"
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "offload" / "sessions"

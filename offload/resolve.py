"""MODEL → folder: a folder, then a bundled name, then a hub id."""

from __future__ import annotations

import re
from pathlib import Path

from tiers import ModelError, UsageError

_BUNDLED = Path(__file__).parent / "models"
_KNOWN = Path(__file__).parent / "known"  # configs only
DEFAULT = "demo-moe"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*")
# weights as safetensors only, and what config and tokenizer need; never code, never pickles
_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def bundled() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(p.name for p in _BUNDLED.iterdir() if (p / "config.json").is_file()) if _BUNDLED.is_dir() else []


def resolve(model: str | Path | None) -> Path:
    """The folder that holds the model, downloaded if it must be. Raises `ModelError` in one line."""
    name = str(model) if model is not None else DEFAULT
    if not name.strip() or "\0" in name:
        raise UsageError("the model's name is empty")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        hint = (
            "GGUF files cannot be run; give the folder of the original safetensors"
            if folder.suffix == ".gguf"
            else ("give the folder that holds it")
        )
        raise ModelError(f"{name} is a file; {hint}")
    if name in bundled():
        return _BUNDLED / name
    if isinstance(model, Path) or name.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(name):
        raise ModelError(f"there is no folder {name} and no bundled model of that name ({', '.join(bundled())})")
    return _from_hub(name)


def everywhere(model: str | Path | None) -> str:
    """What `resolve` takes for the model on another machine, in another folder: the same path there, or its name."""
    name = str(model) if model is not None else DEFAULT
    folder = Path(name).expanduser()
    return str(folder.absolute()) if folder.is_dir() else name


def known() -> list[str]:
    """Names of models whose shape is known though they are not here."""
    return sorted(p.name for p in _KNOWN.iterdir() if (p / "config.json").is_file()) if _KNOWN.is_dir() else []


def resolve_for_plan(model: str | Path | None) -> Path:
    """A folder with at least the model's config; never downloads weights. Raises `ModelError` in one line."""
    name = str(model) if model is not None else DEFAULT
    by_name = {k.lower(): k for k in known()}
    short = name.rpartition("/")[2].lower()
    if name in bundled() or isinstance(model, Path) or Path(name).expanduser().exists():
        return resolve(model)
    if short in by_name and (short == name.lower() or _HUB_ID.fullmatch(name)):
        return _KNOWN / by_name[short]
    if not _HUB_ID.fullmatch(name):
        raise ModelError(f"there is no folder {name} and no model of that name is known ({', '.join(known())})")
    return _from_hub(name, ["config.json"])


def _from_hub(name: str, wanted: list[str] = _WANTED) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except GatedRepoError as e:
        raise ModelError(f"{name} is gated: accept its licence on the hub and log in with `hf auth login`") from e
    except LocalEntryNotFoundError as e:
        raise ModelError(f"{name} is neither a folder nor in the hub cache, and the hub cannot be reached") from e
    except RepositoryNotFoundError as e:
        raise ModelError(f"{name} is neither a folder nor a public model on the hub") from e
    except Exception as e:  # network stacks raise many kinds
        raise ModelError(f"downloading {name} failed: {' '.join(str(e).split())[:200] or type(e).__name__}") from e

"""Named conversations on disk: what was said, and which stored keys and values hold it.

`NAME.session` is one line with the format and a SHA-256, then JSON under that sum. It is written whole or not at all;
nodes are durable before a conversation names them, so whatever is there can be continued. If its nodes are gone or
damaged the tokens are still there, and only time is lost. Removing a conversation frees its nodes for the next prune.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kvstore.files import Temporary, explained, locked, open_private, private_folder, sweep, sync_folder
from kvstore.nodes import MAX_TOKEN, is_name
from kvstore.prefixes import PrefixStore
from kvstore.pruning import Pruned, prune
from tiers import DamagedError, GoneError, StoreError, UsageError
from tiers.folders import sessions_folder

MAX_SESSION = 64 << 20
_SUFFIX = ".session"
_FORMAT = b"offload session 1 "
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
_MESSAGE = {"role", "content"}


@dataclass
class Session:
    """A conversation. `tokens` are all ids said so far, `messages` the same in words ({role, content}).

    `head` is the last stored node of its KV (None: nothing is stored), which may end before the last token. `model` is
    for people; `fingerprint` and `arithmetic` say what the KV are good for. `created` and `updated` are ISO times in
    UTC, set by `Sessions.save`.
    """

    name: str
    model: str
    fingerprint: str
    arithmetic: str
    head: str | None = None
    tokens: list[int] = field(default_factory=list)
    messages: list[dict[str, str]] = field(default_factory=list)
    created: str = ""
    updated: str = ""


@dataclass(frozen=True)
class Summary:
    """A line of the list of conversations. `damaged` says what is wrong (None: nothing); the rest is then empty."""

    name: str
    model: str = ""
    tokens: int = 0
    messages: int = 0
    created: str = ""
    updated: str = ""
    damaged: str | None = None


class Sessions:
    """The conversations in `folder` (default: the user's own). Raises `StoreError` if it is not private."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = private_folder(folder if folder is not None else sessions_folder())
        sweep(self.folder)

    def load(self, name: str) -> Session | None:
        """The conversation, or None if there is none of that name. Raises `DamagedError`, `UsageError`."""
        path = self._path(name)
        try:
            fd = open_private(path)
        except GoneError:
            return None
        try:
            with open(fd, "rb") as f:
                raw = f.read(MAX_SESSION + 1)
        except OSError as e:
            raise DamagedError(f"{path}: {e.strerror or e}") from None
        return _decode(raw, name, path)

    def get(self, name: str) -> Session:
        """The conversation. Raises `GoneError` if there is none of that name, `DamagedError`, `UsageError`."""
        session = self.load(name)
        if session is None:
            raise _absent(name)
        return session

    def save(self, session: Session) -> None:
        """Write it, durably and whole; sets its times. Raises `StoreFull`, `StoreError`: what was there stays."""
        path = self._path(session.name)
        session.updated = datetime.now(UTC).isoformat(timespec="seconds")
        session.created = session.created or session.updated
        body = json.dumps(asdict(session), ensure_ascii=False).encode("utf-8", "surrogatepass")
        raw = _FORMAT + hashlib.sha256(body).hexdigest().encode() + b"\n" + body
        if len(raw) > MAX_SESSION:
            raise StoreError(f"{path}: a conversation of {len(raw)} bytes is too long to keep; begin a new --session")
        _decode(raw, session.name, path)  # what could not be read back is not written over what can
        with Temporary(self.folder) as temporary:
            temporary.write([raw])
            temporary.commit(path.name)

    def set_aside(self, name: str) -> Path:
        """Give a damaged conversation's file another name, so that a new one can take its place; returns that."""
        path = self._path(name)
        aside = path.with_suffix(f".damaged-{datetime.now(UTC):%Y%m%dT%H%M%S}")
        try:
            os.rename(path, aside)
            sync_folder(self.folder)
        except OSError as e:
            raise explained(e, self.folder) from None
        return aside

    def list(self) -> Sequence[Summary]:
        """All conversations, those used last first; damaged ones too."""
        found = []
        for name in self._names():
            try:
                session = self.load(name)
            except DamagedError as e:
                found.append(Summary(name, damaged=str(e)))
            else:
                if session is not None:
                    found.append(
                        Summary(name, session.model, len(session.tokens), len(session.messages), session.created,
                                session.updated)
                    )  # fmt: skip
        return sorted(found, key=lambda s: s.updated, reverse=True)

    def remove(self, name: str) -> None:
        """Forget a conversation, damaged or not; its nodes go at the next prune unless another needs them.

        Raises `GoneError` if there is none of that name.
        """
        path = self._path(name)
        try:
            os.unlink(path)
            sync_folder(self.folder)
        except FileNotFoundError:
            raise _absent(name) from None
        except OSError as e:
            raise explained(e, self.folder) from None

    @contextlib.contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """While this lasts no other process holds the conversation. Raises `StoreError` if one does now."""
        self._path(name)
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(locked(self.folder, alone=True, name=f".{name}.lock", wait=False))
            except BlockingIOError:
                raise StoreError(f"conversation {name!r} is in use elsewhere; give another --session") from None
            yield

    def heads(self) -> Sequence[str]:
        """The nodes that conversations need, for `PrefixStore`'s `pinned`; damaged conversations need none."""
        found = []
        for name in self._names():
            with contextlib.suppress(DamagedError):
                session = self.load(name)
                if session is not None and session.head is not None:
                    found.append(session.head)
        return found

    def prefixes(self, fingerprint: str, arithmetic: str, *, limit: int | None = None) -> PrefixStore:
        """The store of a model's KV in the same folder, which keeps what the conversations need."""
        return PrefixStore(self.folder, fingerprint, arithmetic, limit=limit, pinned=self.heads)

    def prune(self, limit: int = 0) -> Pruned:
        """Free nodes of all models, the least recently used first, until they are `limit` bytes.

        What conversations need stays. Raises `StoreError`.
        """
        return prune(self.folder, limit, self.heads())

    def _names(self) -> Sequence[str]:
        try:
            names = [n.removesuffix(_SUFFIX) for n in os.listdir(self.folder) if n.endswith(_SUFFIX)]
        except OSError as e:
            raise explained(e, self.folder) from None
        return sorted(n for n in names if _NAME.fullmatch(n))

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"--session {name!r}: a name has 1 to 64 letters, digits, '.', '_' or '-', and begins with no '.'"
            )
        return self.folder / (name + _SUFFIX)


def _absent(name: str) -> GoneError:
    return GoneError(f"there is no conversation {name!r}; `offload sessions list` shows those there are")


def _decode(raw: bytes, name: str, path: Path) -> Session:
    """Raises `DamagedError`."""
    remedy = f"`offload sessions rm {name}` removes it"
    line, newline, body = raw.partition(b"\n")
    if len(raw) > MAX_SESSION:
        raise DamagedError(f"{path}: larger than any conversation; {remedy}")
    if not newline or not line.startswith(_FORMAT):
        raise DamagedError(f"{path}: not a conversation that this version wrote; {remedy}")
    if line != _FORMAT + hashlib.sha256(body).hexdigest().encode():
        raise DamagedError(f"{path}: damaged, it has another checksum; {remedy}")
    try:
        data: dict[str, Any] = json.loads(body.decode("utf-8", "surrogatepass"))
        session = Session(**data)
    except (ValueError, TypeError, RecursionError):
        raise DamagedError(f"{path}: damaged, it cannot be understood; {remedy}") from None
    texts = [getattr(session, f.name) for f in fields(session) if f.name not in ("head", "tokens", "messages")]
    good = (
        all(type(t) is str for t in texts)
        and session.name == name
        and (session.head is None or (type(session.head) is str and is_name(session.head)))
        and type(session.tokens) is list
        and all(type(t) is int and 0 <= t < MAX_TOKEN for t in session.tokens)
        and type(session.messages) is list
        and all(type(m) is dict and m.keys() == _MESSAGE and all(type(v) is str for v in m.values())
                for m in session.messages)
    )  # fmt: skip
    if not good:
        raise DamagedError(f"{path}: damaged, it is no conversation {name!r}; {remedy}")
    return session

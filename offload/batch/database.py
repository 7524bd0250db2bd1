"""The journal's file: SQLite, opened so that a hostile or damaged one is an error and nothing else.

Every row carries a seal over what must not change unseen, since SQLite has no checksums of its own.
Not covered: what the rows mean (`offload.batch.journal`), and how they come about (`offload.batch.scan`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvstore.files import open_private
from tiers import DamagedError, OffloadError, StoreError, StoreFull

APPLICATION = 0x6F66626A  # "ofbj"
VERSION = 1
PENDING, DONE, FAILED = 0, 1, 2

# `ends` is where the output line ends in its file. `place` is the running order. A line that could not be parsed is in
# `rejected`, with the error that its output line says; DONE there means that the line is written.
SCHEMA = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL, seal INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE TABLE requests (place INTEGER PRIMARY KEY, number INTEGER NOT NULL, begins INTEGER NOT NULL, "
    "length INTEGER NOT NULL, digest INTEGER NOT NULL, name BLOB NOT NULL, tokens INTEGER NOT NULL, "
    "max_new INTEGER NOT NULL, key BLOB NOT NULL, seal INTEGER NOT NULL, state INTEGER NOT NULL, ends INTEGER)",
    "CREATE TABLE rejected (number INTEGER PRIMARY KEY, custom_id TEXT, code TEXT NOT NULL, message TEXT NOT NULL, "
    "param TEXT, status INTEGER NOT NULL, seal INTEGER NOT NULL, state INTEGER NOT NULL, ends INTEGER)",
    "CREATE TABLE unfinished (number INTEGER NOT NULL, choice INTEGER NOT NULL, state BLOB NOT NULL, "
    "seal INTEGER NOT NULL, PRIMARY KEY (number, choice))",
)
INDEXES = (
    "CREATE UNIQUE INDEX numbers ON requests(number)",
    "CREATE INDEX waiting ON requests(place) WHERE state = 0",
    "CREATE INDEX unwritten ON rejected(number) WHERE state = 0",
)


def name_of(custom_id: str) -> bytes:
    """What a custom_id is found by (16 bytes)."""
    return hashlib.blake2b(custom_id.encode(), digest_size=16).digest()


def seal(data: bytes) -> int:
    """A checksum that fits a column."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def seal_of_request(
    number: int, begins: int, length: int, digest: int, name: bytes, tokens: int, max_new: int, key: bytes
) -> int:
    """The seal of what never changes of a row of `requests`."""
    return seal(struct.pack("<6q", number, begins, length, digest, tokens, max_new) + name + key)


def seal_of_json(*values: Any) -> int:
    """The seal of values that JSON can say."""
    return seal(json.dumps(values).encode())


def connect(path: Path) -> sqlite3.Connection:
    """A connection without implicit transactions, for any thread that holds its owner's lock. Nothing is read yet."""
    there = f"{Path(os.path.abspath(path)).as_uri()}?mode=rw"  # never made here: it would not be private
    db = sqlite3.connect(there, uri=True, timeout=10, isolation_level=None, check_same_thread=False)
    db.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 1)
    db.execute("PRAGMA trusted_schema = OFF")
    db.execute("PRAGMA cell_size_check = ON")
    db.execute("PRAGMA mmap_size = 0")  # a page that cannot be read is then an error, not a signal
    return db


def check(db: sqlite3.Connection, path: Path) -> None:
    """Read all of a journal. Raises `DamagedError` if it is none or damaged, `StoreError` if of another version."""
    if db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION:
        raise damaged(path, "it is no journal of a batch job")
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version != VERSION:
        raise StoreError(
            f"{path}: written by another version of offload (format {version}); finish the job with that one, or "
            "remove the file: the answers that are in the output are kept"
        )
    found = {row[0] for row in db.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")}
    if found != {*SCHEMA, *INDEXES}:  # also: no trigger or view that somebody has added
        raise damaged(path, "its tables are not as they were made")
    wrong = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    if wrong != "ok":
        raise damaged(path, str(wrong))


def private(path: Path) -> None:
    """Raises `DamagedError` if the file is a link, another user's, or others may write it; `GoneError` if none."""
    os.close(open_private(path))


def damaged(path: Path, what: str) -> DamagedError:
    """The error for a journal that cannot be used."""
    return DamagedError(
        f"{path} is damaged ({what}); remove it and run the same command again: the answers that are in the output "
        "are kept"
    )


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """SQLite's errors, and those of reading what it gives, as ours."""
    try:
        yield
    except sqlite3.Error as e:
        raise _error(e, path) from None
    except (struct.error, TypeError, ValueError) as e:
        raise damaged(path, f"a row of it: {e}") from None


def _error(e: sqlite3.Error, path: Path) -> OffloadError:
    name = getattr(e, "sqlite_errorname", None) or ""
    if name == "SQLITE_FULL":
        return StoreFull(f"{path}: no space left on its disk; free some, then run the same command again")
    if name.startswith("SQLITE_IOERR"):
        return StoreError(f"{path}: {e} ({name}); check the disk and its free space, then run the same command again")
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return StoreError(f"{path}: another process is using it; end that, then run the same command again")
    if name.startswith(("SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_PERM", "SQLITE_AUTH")):
        return StoreError(f"{path}: {e}; -o must name a file in a folder that may be written")
    if name.startswith("SQLITE_NOMEM"):
        return StoreError(f"{path}: not enough memory to read it; free some, then run the same command again")
    return damaged(path, str(e))

"""From an input file to a journal: all its requests in the order in which they run.

The journal is made under another name and gets its own once it is whole and durable, so one that is there has been
scanned to the end; a scan that was cut short begins anew. What is only needed meanwhile is in a second database
without a name, on the same disk. Memory is SQLite's page caches and a thousand rows, however long the input is.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from kvstore.files import sync_folder
from offload.batch.database import (
    APPLICATION,
    INDEXES,
    PENDING,
    SCHEMA,
    VERSION,
    connect,
    explained,
    name_of,
    seal_of_json,
    seal_of_request,
)
from offload.batch.lines import Line, line_digest
from offload.batch.order import MAX_KEY, Node, nodes, places, work_of
from offload.batch.requests import MAX_CUSTOM_ID, LineError

_ROWS = 1000  # taken at a time
_CACHE = 16 << 10  # KiB of pages of either database
_SCRATCH = (
    "CREATE TABLE scratch.found (number INTEGER PRIMARY KEY, begins INTEGER, length INTEGER, digest INTEGER, "
    "name BLOB, tokens INTEGER, max_new INTEGER, key BLOB, seal INTEGER)",
    "CREATE UNIQUE INDEX scratch.names ON found(name)",
    "CREATE TABLE scratch.sorted (at INTEGER PRIMARY KEY, number INTEGER, key BLOB, work INTEGER)",
    "CREATE TABLE scratch.nodes (left INTEGER, depth INTEGER, right INTEGER, longest INTEGER, "
    "PRIMARY KEY (left, depth)) WITHOUT ROWID",
    "CREATE TABLE scratch.placed (at INTEGER PRIMARY KEY, place BLOB)",
)

_Row = tuple[int, int, int, int, bytes, int, int, bytes, int]


class Scan:
    """Takes the lines of an input, in their order. Made by `Journal.scan`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: list[_Row] = []
        self._ids: list[str] = []  # of the rows
        self._rejected: list[tuple[object, ...]] = []
        discard(path)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        self.db = connect(path)
        try:
            self._begin()
        except BaseException:
            self.drop()
            raise

    def _begin(self) -> None:
        with explained(self.path):
            self.db.execute(f"PRAGMA application_id = {APPLICATION}")
            self.db.execute(f"PRAGMA user_version = {VERSION}")
            scratch = self.path.with_name(self.path.name + "-scratch")
            os.close(os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            try:
                self.db.execute("ATTACH ? AS scratch", (os.path.abspath(scratch),))
                for schema in ("main", "scratch"):
                    # nothing here outlives a crash, so nothing has to be undone after one
                    self.db.execute(f"PRAGMA {schema}.journal_mode = OFF")
                    self.db.execute(f"PRAGMA {schema}.synchronous = OFF")
                    self.db.execute(f"PRAGMA {schema}.locking_mode = EXCLUSIVE")
                    self.db.execute(f"PRAGMA {schema}.cache_size = -{_CACHE}")
                self.db.execute("BEGIN")
                for statement in (*SCHEMA, *_SCRATCH):
                    self.db.execute(statement)
                self.db.execute("COMMIT")
            finally:
                os.unlink(scratch)
            self.db.execute("BEGIN")

    def add(self, line: Line, custom_id: str, tokens: int, max_new: int, key: bytes = b"") -> None:
        """A request of `tokens` prompt tokens that may get `max_new` more; `key` as of `offload.batch.order.key_of`.

        One whose custom_id an earlier line has is rejected. Raises `StoreFull`, `StoreError`.
        """
        assert line.data is not None
        name, digest, key = name_of(custom_id), line_digest(line.data), key[:MAX_KEY]
        seal = seal_of_request(line.number, line.offset, line.length, digest, name, tokens, max_new, key)
        self._rows.append((line.number, line.offset, line.length, digest, name, tokens, max_new, key, seal))
        self._ids.append(custom_id)
        if len(self._rows) >= _ROWS:
            self._flush()

    def reject(self, line: Line, error: LineError) -> None:
        """A line that is no request; its output line will say `error`. Raises `StoreFull`, `StoreError`."""
        self._reject(line.number, error)
        if len(self._rejected) >= _ROWS:
            self._flush()

    def _reject(self, number: int, error: LineError) -> None:
        custom_id = error.custom_id[:MAX_CUSTOM_ID] if error.custom_id is not None else None
        values = (number, custom_id, error.code, error.message, error.param, error.status)
        self._rejected.append((*values, seal_of_json(*values), PENDING))

    def _flush(self) -> None:
        rows, ids, self._rows, self._ids = self._rows, self._ids, [], []
        with explained(self.path):
            before = self.db.total_changes
            self.db.executemany("INSERT OR IGNORE INTO scratch.found VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
            if self.db.total_changes - before < len(rows):
                self._duplicates(rows, ids)
            self.db.executemany("INSERT INTO rejected VALUES (?, ?, ?, ?, ?, ?, ?, ?, NULL)", self._rejected)
        self._rejected = []

    def _duplicates(self, rows: list[_Row], ids: list[str]) -> None:
        for row, custom_id in zip(rows, ids, strict=True):
            (first,) = self.db.execute("SELECT number FROM scratch.found WHERE name = ?", (row[4],)).fetchone()
            if first != row[0]:
                message = f"line {first} has the same custom_id; only that one is answered"
                self._reject(row[0], LineError(custom_id, "duplicate_custom_id", message, "custom_id"))

    def finish(self, meta: dict[str, object]) -> None:
        """Put the requests in order; `meta` is kept beside them. Raises `StoreFull`, `StoreError`."""
        self._flush()
        run = self.db.execute
        with explained(self.path):
            self.db.create_function("work_of", 2, work_of, deterministic=True)
            run("INSERT INTO scratch.sorted SELECT NULL, number, key, work_of(tokens, max_new) AS work "
                "FROM scratch.found ORDER BY key, work DESC, number")  # fmt: skip
            # `at` began with 1; the nodes count from 0
            tree = nodes(run("SELECT key, work FROM scratch.sorted ORDER BY at"))
            self.db.executemany(
                "INSERT INTO scratch.nodes (left, right, depth, longest) VALUES (?, ?, ?, ?)", (tuple(n) for n in tree)
            )
            order = places(
                (work for (work,) in run("SELECT work FROM scratch.sorted ORDER BY at")),
                map(Node._make, run("SELECT left, right, depth, longest FROM scratch.nodes ORDER BY left, depth")),
            )
            self.db.executemany("INSERT INTO scratch.placed VALUES (?, ?)", enumerate(order, 1))
            run("INSERT INTO requests SELECT NULL, number, begins, length, digest, name, tokens, max_new, "
                f"found.key, seal, {PENDING}, NULL FROM scratch.placed JOIN scratch.sorted USING (at) "
                "JOIN scratch.found USING (number) ORDER BY place")  # fmt: skip
            for statement in INDEXES:
                run(statement)
            for name, value in meta.items():
                text = json.dumps(value)
                run("INSERT INTO meta VALUES (?, ?, ?)", (name, text, seal_of_json(name, text)))
            run("COMMIT")
            run("DETACH scratch")

    def commit(self, path: Path) -> None:
        """Give the finished journal its name, durably. Raises OSError."""
        self.db.close()
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        discard(path)  # the log of a journal that somebody has removed would be taken for this one's
        os.rename(self.path, path)
        sync_folder(path.parent)

    def drop(self) -> None:
        """Forget it all."""
        with contextlib.suppress(sqlite3.Error):
            self.db.close()
        discard(self.path)


def discard(path: Path) -> None:
    """Remove a journal and what SQLite may have left beside it."""
    for one in _files(path):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(one)


def _files(path: Path) -> Iterator[Path]:
    yield path
    for suffix in ("-wal", "-shm", "-journal", "-scratch"):
        yield path.with_name(path.name + suffix)

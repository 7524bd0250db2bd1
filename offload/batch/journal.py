"""What has become of every request of a batch job: a database beside the output, which outlives the process.

`OUT.journal` is SQLite in WAL mode with `synchronous=FULL`: a commit that returned survives a power failure, and one
that did not is as if never begun (sqlite.org/wal.html). It is written after the output's lines are durable and says
how far these go, so it never claims an answer that is not there (`offload.batch.output`). Nothing in it cannot be made
again from input and output: the remedy for any damage is to remove it.

Whoever opens a journal holds the output's lock. All methods may be called from any thread; `pending` reads through a
connection of its own, and does not wait for a commit. Not covered: the lines themselves, and what a checkpoint holds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from offload.batch.database import (
    DONE,
    FAILED,
    PENDING,
    check,
    connect,
    damaged,
    explained,
    name_of,
    private,
    seal,
    seal_of_json,
    seal_of_request,
)
from offload.batch.lines import Identity
from offload.batch.requests import LineError
from offload.batch.scan import Scan
from tiers import GoneError, StoreError, UsageError

MAX_CHECKPOINT = 64 << 20
_PAGE = 256  # rows read at a time


class Pending(NamedTuple):
    """A request that waits. `place` in the running order; line `number`, where it is, and its `line_digest`.

    `tokens` of the prompt, of which `key` is the prefix key; `max_new` may follow.
    """

    place: int
    number: int
    offset: int
    length: int
    digest: int
    tokens: int
    max_new: int
    key: bytes


class Counts(NamedTuple):
    """Lines in `total`, of which `done` were answered and `failed` have an error line."""

    total: int
    done: int
    failed: int


class Workload(NamedTuple):
    """What the waiting requests come to: how many, their prompt tokens, those that may follow, the longest of both."""

    requests: int
    prompt_tokens: int
    new_tokens: int
    longest_prompt: int
    longest_new: int


class Mark(NamedTuple):
    """The output line of line `number` ends at offset `end` of its file; `failed` if it is an error."""

    number: int
    failed: bool
    end: int


class Checkpoint(NamedTuple):
    """How far choice `choice` of a request has come; `state` is for who resumes it."""

    number: int
    choice: int
    state: bytes


class Extent(NamedTuple):
    """How far a file of results is good, and the digest of what was written last, from `start`."""

    start: int
    end: int
    digest: str


class Journal:
    """The journal of one job. `job` names it: the same input, model and options give the same name.

    `scanned`: whether it knows its requests; else `scan` must be used first.
    """

    def __init__(self, path: Path, identity: Identity, settings: Mapping[str, Any], errors: str | None) -> None:
        self.path = path
        self._meta = {
            "identity": list(identity),
            "settings": json.loads(json.dumps(settings, sort_keys=True)),
            "errors": errors,
        }
        named = json.dumps([self._meta["identity"], self._meta["settings"]], sort_keys=True)
        self.job = hashlib.blake2b(named.encode(), digest_size=8).hexdigest()
        self.temporary = False
        self._db: sqlite3.Connection | None = None
        self._reader: sqlite3.Connection | None = None
        self._lock = threading.RLock()  # of _db and what follows
        self._reading = threading.RLock()  # of _reader
        self._total = self._done = self._failed = 0

    @classmethod
    def open(cls, out: Path, identity: Identity, settings: Mapping[str, Any], *, errors: str | None = None) -> Journal:
        """The journal beside `out`, new or as it was left.

        `settings` (JSON) is all that answers depend on beside the input; `errors`: the name of the file for error
        lines. Raises `UsageError` if these or the input are not what they were, `DamagedError`, `StoreError`.
        """
        journal = cls(out.with_name(out.name + ".journal"), identity, settings, errors)
        with contextlib.suppress(GoneError):
            private(journal.path)
            journal._load()
            try:
                journal._compare(out)
            except BaseException:
                journal.close()
                raise
        return journal

    @classmethod
    def unnamed(cls, folder: Path, identity: Identity, settings: Mapping[str, Any]) -> Journal:
        """A journal in `folder` that goes with the process: for results that go to a pipe."""
        journal = cls(folder / f".{secrets.token_hex(8)}.journal", identity, settings, None)
        journal.temporary = True
        return journal

    @property
    def scanned(self) -> bool:
        """Whether all lines of the input are known."""
        return self._db is not None

    @contextlib.contextmanager
    def scan(self) -> Iterator[Scan]:
        """Take the input's lines; after the block they are in order and durable, unless it raised.

        Raises `StoreFull`, `StoreError`.
        """
        assert self._db is None
        building = self.path if self.temporary else self.path.with_name(self.path.name + ".new")
        scan: Scan | None = None
        try:
            scan = Scan(building)
            yield scan
            scan.finish({"job": self._meta, "tally": [0, 0]})
            if self.temporary:
                os.unlink(building)
                self._db = self._reader = scan.db
                self._reading = self._lock  # one connection, one lock
                with explained(self.path):
                    self._db.execute("PRAGMA journal_mode = MEMORY")
                self._count()
            else:
                scan.commit(self.path)
                self._load()
        except OSError as e:
            if scan is not None:
                scan.drop()
            raise StoreError(f"{building}: {e.strerror}; -o must name a file in a folder that may be written") from None
        except BaseException:
            if scan is not None:
                scan.drop()
            raise

    def close(self) -> None:
        """Close the file. Nothing is lost without."""
        with self._lock, self._reading:
            for db in (self._reader, self._db):
                if db is not None:
                    with contextlib.suppress(sqlite3.Error):
                        db.close()
            self._reader = self._db = None

    # what there is

    @property
    def counts(self) -> Counts:
        """As of the last commit."""
        with self._lock:
            return Counts(self._total, self._done, self._failed)

    def workload(self) -> Workload:
        """What there is still to do."""
        with self._reads() as db:
            row = db.execute(
                "SELECT count(*), total(tokens), total(max_new), max(tokens), max(max_new) FROM requests "
                f"WHERE state = {PENDING}"
            ).fetchone()
            return Workload(*(int(value or 0) for value in row))

    def pending(self, after: int = 0) -> Iterator[Pending]:
        """The requests that wait, in running order, from behind place `after` on; read as they are asked for.

        Those that get their answer meanwhile may still come. Raises `DamagedError`, `StoreError`.
        """
        while rows := self._page(after):
            yield from rows
            after = rows[-1].place

    def _page(self, after: int) -> list[Pending]:
        with self._reads() as db:
            found = db.execute(
                "SELECT place, number, begins, length, digest, tokens, max_new, key, name, seal FROM requests "
                f"INDEXED BY waiting WHERE state = {PENDING} AND place > ? ORDER BY place LIMIT {_PAGE}",
                (after,),
            ).fetchall()
            rows = []
            for *values, name, sealed in found:
                row = Pending(*values)
                if sealed != seal_of_request(*row[1:5], name, *row[5:]):
                    raise damaged(self.path, f"the row of line {row.number}")
                rows.append(row)
            return rows

    def rejected(self) -> Iterator[tuple[int, LineError]]:
        """The lines that are no requests, and whose error line is not written yet. Raises like `pending`."""
        after = 0
        while True:
            with self._reads() as db:
                rows = db.execute(
                    "SELECT number, custom_id, code, message, param, status, seal FROM rejected INDEXED BY unwritten "
                    f"WHERE state = {PENDING} AND number > ? ORDER BY number LIMIT {_PAGE}",
                    (after,),
                ).fetchall()
            for number, *values, sealed in rows:
                if sealed != seal_of_json(number, *values):
                    raise damaged(self.path, f"the row of line {number}")
                yield number, LineError(*values)
            if not rows:
                return
            after = rows[-1][0]

    def awaits(self, number: int, custom_id: str | None) -> bool:
        """Whether line `number` has that custom_id, and no output line yet. Raises like `pending`."""
        with self._writes() as db:
            row = db.execute("SELECT state, name FROM requests WHERE number = ?", (number,)).fetchone()
            if row is not None:
                return custom_id is not None and row == (PENDING, name_of(custom_id))
            row = db.execute("SELECT state, custom_id FROM rejected WHERE number = ?", (number,)).fetchone()
            return bool(row == (PENDING, custom_id))

    def checkpoints(self, number: int) -> dict[int, bytes]:
        """The last checkpoint of each unfinished choice of a request. One that is damaged is left out."""
        with self._reads() as db:
            rows = db.execute("SELECT choice, state, seal FROM unfinished WHERE number = ?", (number,)).fetchall()
            return {choice: state for choice, state, sealed in rows if sealed == seal(state)}

    def extent(self, file: str) -> Extent | None:
        """How far the file of results called `file` is good; None if nothing was written to it yet."""
        with self._writes() as db:
            value = self._get(db, file)
            return Extent(*value) if value is not None else None

    # what happens

    def commit(
        self,
        marks: Iterable[Mark] = (),
        extents: Callable[[], Mapping[str, Extent]] = dict,
        checkpoints: Sequence[Checkpoint] = (),
        *,
        anew: bool = False,
    ) -> None:
        """Record output lines that are durable, all or none. Called with `anew`, nothing recorded before counts.

        `extents` is called last. A checkpoint replaces the one before; those of a request go with its output line.
        Raises `StoreFull`, `StoreError`, `DamagedError`: nothing is recorded then; ValueError if a line has its output.
        """
        with self._lock, contextlib.ExitStack() as undo:
            assert self._db is not None
            done, failed = (0, 0) if anew else (self._done, self._failed)
            with explained(self.path):
                self._db.execute("BEGIN IMMEDIATE")
                undo.callback(self._undo)
                if anew:
                    for table in ("requests", "rejected"):
                        self._db.execute(f"UPDATE {table} SET state = {PENDING}, ends = NULL WHERE state != {PENDING}")
                    self._db.execute("DELETE FROM meta WHERE name NOT IN ('job', 'tally')")
            for mark in marks:
                self._mark(mark)
                done, failed = done + (not mark.failed), failed + mark.failed
            values: dict[str, Any] = {**extents(), "tally": [done, failed]}
            with explained(self.path):
                for c in checkpoints:
                    assert len(c.state) <= MAX_CHECKPOINT
                    self._db.execute("INSERT OR REPLACE INTO unfinished VALUES (?, ?, ?, ?)", (*c, seal(c.state)))
                for name, value in values.items():
                    text = json.dumps(value)
                    self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?, ?)",
                                     (name, text, seal_of_json(name, text)))  # fmt: skip
                self._db.execute("COMMIT")
            undo.pop_all()
            self._done, self._failed = done, failed

    def _mark(self, mark: Mark) -> None:
        assert self._db is not None
        with explained(self.path):
            changed = self._db.execute(
                f"UPDATE requests SET state = ?, ends = ? WHERE number = ? AND state = {PENDING}",
                (FAILED if mark.failed else DONE, mark.end, mark.number),
            ).rowcount
            if changed:
                self._db.execute("DELETE FROM unfinished WHERE number = ?", (mark.number,))
            elif mark.failed:
                changed = self._db.execute(
                    f"UPDATE rejected SET state = {DONE}, ends = ? WHERE number = ? AND state = {PENDING}",
                    (mark.end, mark.number),
                ).rowcount
        if not changed:
            raise ValueError(f"line {mark.number} has its output line already")

    def _undo(self) -> None:
        assert self._db is not None
        with contextlib.suppress(sqlite3.Error):
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    # the file

    def _load(self) -> None:
        """Open a journal that is there, and check all of it."""
        with explained(self.path):
            try:
                self._db = db = connect(self.path)
                check(db, self.path)
                wal = db.execute("PRAGMA journal_mode = WAL").fetchone()[0] == "wal"
                # without a log, the folder must be synced as well for a commit to be durable
                db.execute(f"PRAGMA synchronous = {'FULL' if wal else 'EXTRA'}")
                self._reader = connect(self.path)
                self._reader.execute("PRAGMA query_only = ON")
                self._count()
            except BaseException:
                self.close()
                raise

    def _count(self) -> None:
        with self._writes() as db:
            states = {PENDING: 0, DONE: 0, FAILED: 0}
            states |= dict(db.execute("SELECT state, count(*) FROM requests NOT INDEXED GROUP BY state"))
            waiting = db.execute(f"SELECT count(*) FROM requests INDEXED BY waiting WHERE state = {PENDING}").fetchone()
            (lines,) = db.execute("SELECT count(*) FROM rejected").fetchone()
            (written,) = db.execute(f"SELECT count(*) FROM rejected WHERE state = {DONE}").fetchone()
            self._total = sum(states.values()) + lines
            self._done, self._failed = states[DONE], states[FAILED] + written
            consistent = len(states) == 3 and waiting[0] == states[PENDING]
            if not consistent or self._get(db, "tally") != [self._done, self._failed]:
                raise damaged(self.path, "its counts do not fit its rows")

    def _compare(self, out: Path) -> None:
        """Raises `UsageError` if this is another job's journal."""
        with self._writes() as db:
            known = self._get(db, "job")
            if not isinstance(known, dict) or known.keys() != self._meta.keys():
                raise damaged(self.path, "what it says of its job")
        anew = f"name another output with -o, or remove {out} and {self.path} to begin anew"
        if known["identity"] != self._meta["identity"]:
            raise UsageError(f"the input is not the one that {out} was begun with; give that one, {anew}")
        before, now = known["settings"], self._meta["settings"]
        if before != now:
            changed = [
                f"{name} was {_shown(before, name)} and is {_shown(now, name)}"
                for name in sorted(before.keys() | now.keys())
                if before.get(name) != now.get(name)
            ]
            raise UsageError(f"{out} was begun otherwise: {', '.join(changed)}; run it as it was, {anew}")
        if known["errors"] != self._meta["errors"]:
            was = f"with -e {known['errors']}" if known["errors"] else "without -e"
            raise UsageError(f"{out} was begun {was}; run it so, {anew}")

    def _get(self, db: sqlite3.Connection, name: str) -> Any:
        row = db.execute("SELECT value, seal FROM meta WHERE name = ?", (name,)).fetchone()
        if row is None:
            return None
        if row[1] != seal_of_json(name, row[0]):
            raise damaged(self.path, f"what it says of {name}")
        return json.loads(row[0])

    @contextlib.contextmanager
    def _reads(self) -> Iterator[sqlite3.Connection]:
        with self._reading, explained(self.path):
            assert self._reader is not None
            yield self._reader

    @contextlib.contextmanager
    def _writes(self) -> Iterator[sqlite3.Connection]:
        with self._lock, explained(self.path):
            assert self._db is not None
            yield self._db


def _shown(settings: Mapping[str, Any], name: str) -> str:
    text = json.dumps(settings[name]) if name in settings else "not given"
    return text if len(text) <= 60 else f"{text[:59]}…"

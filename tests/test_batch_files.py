"""The files of a batch job: whatever happens, every line of the input has its one line in the output."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from batch_job import SETTINGS, answer, check, opened, run, scan, write_input
from hypothesis import example, given, settings
from hypothesis import strategies as st

from offload.batch import lines as lines_module
from offload.batch.edge import AsyncOutput, ReadAhead
from offload.batch.journal import Checkpoint, Counts, Journal, Mark
from offload.batch.lines import HEAD, Identity, Line, Source, line_digest, split
from offload.batch.order import BLOCK_TOKENS, UNIT, Node, _common, key_of, nodes, places
from offload.batch.output import Output
from offload.batch.requests import LineError
from offload.batch.results import answered, is_torn, known, refused
from tiers import DamagedError, OffloadError, ReadError, StoreError, StoreFull, UsageError

IDENTITY = Identity(1, "00")


def resident() -> int:
    """Bytes of memory this process has now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def read_all(data: bytes, tmp_path: Path, **options: Any) -> list[Line]:
    path = tmp_path / "lines"
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    try:
        return list(split(fd, **options))
    finally:
        os.close(fd)


class TestLines:
    def test_numbers_and_places(self, tmp_path: Path) -> None:
        assert read_all(b"a\n\n  \r\nbc\r\nlast", tmp_path) == [
            Line(1, 0, 1, b"a", b"a", True),
            Line(4, 7, 3, b"bc\r", b"bc\r", True),
            Line(5, 11, 4, b"last", b"last", False),
        ]
        assert read_all(b"", tmp_path) == []

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.binary(max_size=20).map(lambda b: b.replace(b"\n", b"")), max_size=8), st.integers(1, 7))
    def test_any_lines_in_any_blocks(self, parts: list[bytes], block: int) -> None:
        data = b"\n".join(parts)
        with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryFile() as file:
            patch.setattr(lines_module, "_BLOCK", block)
            file.write(data)
            file.flush()
            found = list(split(file.fileno(), limit=12))
        for line in found:
            part = parts[line.number - 1]
            assert (line.length, line.head) == (len(part), part[:HEAD])
            assert line.data == (part if len(part) <= 12 else None)
            assert data[line.offset : line.offset + line.length] == part
        wanted = [at for at, part in enumerate(parts, 1) if len(part) > 12 or part.strip()]
        assert [line.number for line in found] == wanted

    def test_a_line_of_a_gibibyte(self, tmp_path: Path) -> None:
        path = tmp_path / "in.jsonl"
        begin = b'{"custom_id": "big", "prompt": "'
        with path.open("wb") as file:
            file.write(b'{"custom_id": "a", "prompt": "x"}\n' + begin)
            file.truncate(1 << 30)
            file.seek(0, os.SEEK_END)
            file.write(b'\n{"custom_id": "b", "prompt": "x"}')
        before = resident()
        tracemalloc.start()
        try:
            with Source.open(path) as source:
                found = list(source.lines())
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert [(line.number, line.data is None) for line in found] == [(1, False), (2, True), (3, False)]
        assert found[1].head == begin + bytes(HEAD - len(begin))
        assert peak < 20 << 20  # a line may have 16 MiB
        assert resident() - before < 32 << 20

    def test_a_byte_order_mark_is_passed_over(self, tmp_path: Path) -> None:
        path = tmp_path / "in"
        path.write_bytes(b"\xef\xbb\xbf{}\n{}")
        with Source.open(path) as source:
            assert [(line.offset, line.data) for line in source.lines()] == [(3, b"{}"), (6, b"{}")]

    def test_an_input_that_changes_while_it_is_read(self, tmp_path: Path) -> None:
        path = tmp_path / "in"
        path.write_bytes(b"abc\ndef\n")
        with Source.open(path) as source:
            first, second = source.lines()
            digest = line_digest(b"def")
            assert source.read(second.offset, second.length, digest) == b"def"
            path.write_bytes(b"abc\nxyz\n")
            with pytest.raises(ReadError, match="was changed"):
                source.read(second.offset, second.length, digest)
            with pytest.raises(ReadError, match="was changed"):
                list(source.lines())
        assert first.data == b"abc"

    def test_stdin_is_kept_without_a_name(self, tmp_path: Path) -> None:
        data = b"".join(b'{"custom_id": "%d"}\n' % i for i in range(200_000))
        path = tmp_path / "in"
        path.write_bytes(data)
        folder = tmp_path / "spool"
        folder.mkdir()
        reader, writer = os.pipe()
        thread = threading.Thread(target=_feed, args=(writer, data), daemon=True)
        thread.start()
        with Source.open("-", folder=folder, stdin=reader) as source, Source.open(path) as file:
            assert source.name == "stdin"
            assert source.identity == file.identity
            assert list(folder.iterdir()) == []
            assert list(source.lines()) == list(file.lines())
        thread.join()
        os.close(reader)

    def test_a_pipe_with_a_name_is_kept_too(self, tmp_path: Path) -> None:
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        thread = threading.Thread(target=pipe.write_bytes, args=(b"a\nb\n",))
        thread.start()
        with Source.open(pipe, folder=tmp_path) as source:
            assert [line.data for line in source.lines()] == [b"a", b"b"]
        thread.join()

    @pytest.mark.parametrize(("code", "kind"), [(errno.ENOSPC, StoreFull), (errno.EIO, StoreError)])
    def test_no_space_for_stdin(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[OffloadError]
    ) -> None:
        reader, writer = os.pipe()
        os.write(writer, b"abc")
        os.close(writer)
        monkeypatch.setattr(os, "write", failing(os.write, code))
        with pytest.raises(kind, match="stdin"):
            Source.open("-", folder=tmp_path, stdin=reader)
        os.close(reader)

    def test_what_is_no_input(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="-i"):
            Source.open(tmp_path / "none")
        with pytest.raises(UsageError, match="folder"):
            Source.open(tmp_path)


def _feed(fd: int, data: bytes) -> None:
    with open(fd, "wb") as file:
        file.write(data)


def failing(real: Callable[..., Any], code: int) -> Callable[..., Any]:
    def fail(*args: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


UNITS = st.lists(st.sampled_from([b"\0\0\0\0", b"\0\0\0\1", b"\1\0\0\0"]), max_size=5).map(b"".join)


class TestOrder:
    def test_common_tokens_are_a_common_front(self) -> None:
        shared = list(range(BLOCK_TOKENS * 3 + 5))
        a, b = key_of([*shared, 1, *range(99)]), key_of([*shared, 2, *range(99)])
        assert _common(a, b) == 3
        assert _common(a, key_of([9, *shared])) == 0
        assert len(key_of(shared)) == 3 * UNIT
        assert key_of([]) == b""
        assert len(key_of([5] * 100_000)) == 4096

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.tuples(UNITS, st.integers(1, 9)), min_size=1, max_size=12))
    def test_the_tree(self, rows: list[tuple[bytes, int]]) -> None:
        rows.sort(key=lambda row: (row[0], -row[1]))
        wanted = set()
        for a, b in itertools.combinations(range(len(rows)), 2):
            if depth := _common(rows[a][0], rows[b][0]):
                front = rows[a][0][: depth * UNIT]
                inside = [i for i, (key, _) in enumerate(rows) if key.startswith(front)]
                wanted.add(Node(inside[0], inside[-1], depth, max(rows[i][1] for i in inside)))
        tree = list(nodes(rows))
        assert len(tree) == len(wanted) and set(tree) == wanted
        tree.sort(key=lambda node: (node.left, node.depth))
        sort_by = list(places([tokens for _, tokens in rows], tree))
        order = sorted(range(len(rows)), key=lambda i: sort_by[i])
        assert len(set(sort_by)) == len(rows)
        for node in wanted:  # neighbours
            at = [order.index(i) for i in range(node.left, node.right + 1)]
            assert max(at) - min(at) == node.right - node.left
        # on the top level, and so (its nodes are made alike) on each, the longest comes first
        top: dict[Any, int] = {}
        for i in order:
            mine = [n for n in wanted if n.left <= i <= n.right]
            key = min(mine, key=lambda n: n.depth) if mine else i
            top[key] = max(top.get(key, 0), rows[i][1])
        assert list(top.values()) == sorted(top.values(), reverse=True)


def make(tmp_path: Path, requests: list[tuple[bytes, int]], name: str = "out.jsonl") -> Journal:
    """A journal of requests with these keys and tokens."""
    journal = Journal.open(tmp_path / name, IDENTITY, SETTINGS)
    with journal.scan() as found:
        for number, (key, tokens) in enumerate(requests, 1):
            found.add(Line(number, number, 1, b"x", b"x", True), f"r{number}", tokens, 1, key)
    return journal


class TestJournal:
    def test_the_order(self, tmp_path: Path) -> None:
        a, b = b"aaaa", b"bbbb"
        journal = make(
            tmp_path, [(b"", 50), (a + b"1111", 10), (b, 99), (a + b"2222", 60), (b"", 70), (b + b"xxxx", 5)]
        )
        assert [row.number for row in journal.pending()] == [3, 6, 5, 4, 2, 1]
        assert [row.number for row in journal.pending(after=4)] == [2, 1]
        assert journal.workload() == (6, 294, 6, 99, 1)
        journal.close()

    def test_what_is_recorded_stays(self, tmp_path: Path) -> None:
        journal = make(tmp_path, [(b"", 9), (b"", 8), (b"", 7)])
        journal.commit([Mark(1, False, 10), Mark(3, True, 20)], checkpoints=[Checkpoint(2, 0, b"state")])
        assert (tmp_path / "out.jsonl.journal").stat().st_mode & 0o777 == 0o600
        for _ in range(2):
            assert journal.counts == Counts(3, 1, 1)
            assert [row.number for row in journal.pending()] == [2]
            assert journal.checkpoints(2) == {0: b"state"}
            assert journal.awaits(2, "r2") and not journal.awaits(1, "r1") and not journal.awaits(2, "r1")
            assert not journal.awaits(4, "r4")
            journal.close()
            journal = Journal.open(tmp_path / "out.jsonl", IDENTITY, SETTINGS)
        journal.commit(checkpoints=[Checkpoint(2, 0, b"later"), Checkpoint(2, 1, b"other")])
        assert journal.checkpoints(2) == {0: b"later", 1: b"other"}
        journal.commit([Mark(2, False, 30)])
        assert journal.checkpoints(2) == {}
        journal.close()
        assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl.journal"]

    def test_nothing_is_recorded_twice_nor_half(self, tmp_path: Path) -> None:
        journal = make(tmp_path, [(b"", 9), (b"", 8)])
        journal.commit([Mark(1, False, 10)])
        with pytest.raises(ValueError, match="line 1"):
            journal.commit([Mark(2, False, 20), Mark(1, False, 30)])
        assert journal.counts == Counts(2, 1, 0)
        assert [row.number for row in journal.pending()] == [2]
        journal.close()

    def test_rows_that_are_done_meanwhile_do_not_end_the_rest(self, tmp_path: Path) -> None:
        journal = make(tmp_path, [(b"", 5)] * 300)
        seen = []
        for row in journal.pending():
            seen.append(row.number)
            journal.commit([Mark(row.number, False, 1)])
        assert sorted(seen) == list(range(1, 301))
        journal.close()

    def test_a_scan_that_was_cut_short_never_was(self, tmp_path: Path) -> None:
        write_input(tmp_path / "in.jsonl", 20)
        source, output = opened(tmp_path)
        with source, output:

            def interrupted() -> None:
                with output.journal.scan() as found:
                    for line in itertools.islice(source.lines(), 10):
                        found.add(line, str(line.number), 1, 1)
                    raise KeyError

            with pytest.raises(KeyError):
                interrupted()
            assert not output.journal.scanned
            assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
            # what a killed one leaves is in nobody's way
            for name in ("out.jsonl.journal.new", "out.jsonl.journal.new-scratch", "out.jsonl.journal-wal"):
                (tmp_path / name).write_bytes(b"garbage")
        run(tmp_path)
        check(tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "out.jsonl.journal"]

    def test_two_with_one_id(self, tmp_path: Path) -> None:
        path = tmp_path / "in.jsonl"
        ids = ["a", "b", "a", "c", "b", "a"]
        path.write_text("".join(json.dumps({"custom_id": i, "prompt": str(n)}) + "\n" for n, i in enumerate(ids)))
        run(tmp_path)
        results = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        good = {r["custom_id"]: r["response"]["body"]["said"] for r in results if r["error"] is None}
        assert good == {"a": ["0"], "b": ["1"], "c": ["3"]}
        errors = {r["error"]["line"]: (r["custom_id"], r["error"]["code"]) for r in results if r["error"]}
        assert errors == {i: (ids[i - 1], "duplicate_custom_id") for i in (3, 5, 6)}
        assert "line 2" in next(r["error"]["message"] for r in results if r["error"] and r["error"]["line"] == 5)

    def test_duplicates_across_groups_of_rows(self, tmp_path: Path) -> None:
        journal = Journal.open(tmp_path / "out", IDENTITY, SETTINGS)
        with journal.scan() as found:
            for number in range(1, 3001):
                found.add(Line(number, number, 1, b"x", b"x", True), f"r{number % 1500}", 1, 1)
        assert len(list(journal.pending())) == 1500
        assert [number for number, _ in journal.rejected()] == list(range(1501, 3001))
        journal.close()

    @pytest.mark.parametrize(
        ("identity", "changed", "says"),
        [
            (("size", 2), {}, "input is not the one"),
            (("digest", "11"), {}, "input is not the one"),
            (("size", 1), {"dtype": "bfloat16"}, 'dtype was "float32" and is "bfloat16"'),
            (("size", 1), {"more": [1]}, r"more was not given and is \[1\]"),
        ],
    )
    def test_another_job(self, tmp_path: Path, identity: tuple[str, Any], changed: dict[str, Any], says: str) -> None:
        make(tmp_path, [(b"", 1)]).close()
        now = IDENTITY._replace(**{identity[0]: identity[1]})
        with pytest.raises(UsageError, match=says) as e:
            Journal.open(tmp_path / "out.jsonl", now, {**SETTINGS, **changed})
        assert "-o" in str(e.value)

    def test_damage_is_told_or_harmless(self, tmp_path: Path) -> None:
        """A flipped bit gives an error that names the file and the remedy, or what was there before it."""
        write_input(tmp_path / "in.jsonl", 40, bad_every=9)
        source, output = opened(tmp_path)
        with source, output:
            scan(output.journal, source)
            output.recover()
            rows = list(output.journal.pending())
            output.write(
                [answer(output.journal.job, r.number, source.read(*r[2:5])) for r in rows[:5]],
                [Checkpoint(rows[7].number, 0, b"x" * 500)],
            )
            wanted = (sorted(r[1:] for r in rows[5:]), output.journal.counts)
        path = tmp_path / "out.jsonl.journal"
        whole = path.read_bytes()
        chance = random.Random(7)
        told = 0
        for _ in range(400):
            at = chance.randrange(len(whole))
            said = ""
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1 :])
            try:
                source, output = opened(tmp_path)
                with source, output:
                    output.recover()
                    found = sorted(r[1:] for r in output.journal.pending()), output.journal.counts
                    state = output.journal.checkpoints(rows[7].number)
                assert found == wanted
                assert state in ({}, {0: b"x" * 500})
            except StoreError as e:
                told += 1
                said = str(e)
            assert not said or (str(path) in said and "remove" in said)
        assert 20 < told < 400
        for data in (b"", b"no database", whole[:5000], whole[: len(whole) // 2], bytes(len(whole))):
            path.write_bytes(data)
            with pytest.raises(StoreError, match="remove it"):
                opened(tmp_path)
        path.unlink()
        run(tmp_path)
        check(tmp_path)

    def test_a_journal_that_others_may_write(self, tmp_path: Path) -> None:
        make(tmp_path, [(b"", 1)]).close()
        path = tmp_path / "out.jsonl.journal"
        path.chmod(0o666)
        with pytest.raises(DamagedError, match="others may write it"):
            Journal.open(tmp_path / "out.jsonl", IDENTITY, SETTINGS)
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(DamagedError, match="link"):
            Journal.open(tmp_path / "out.jsonl", IDENTITY, SETTINGS)

    def test_a_journal_with_a_trigger(self, tmp_path: Path) -> None:
        make(tmp_path, [(b"", 1)]).close()
        with sqlite3.connect(tmp_path / "out.jsonl.journal") as db:
            db.execute("CREATE TRIGGER t AFTER UPDATE ON requests BEGIN DELETE FROM requests; END")
        db.close()
        with pytest.raises(DamagedError, match="tables"):
            Journal.open(tmp_path / "out.jsonl", IDENTITY, SETTINGS)

    def test_a_hundred_thousand_lines(self, tmp_path: Path) -> None:
        write_input(tmp_path / "in.jsonl", 100_000, bad_every=10)
        before = resident()
        source, output = opened(tmp_path)
        with source, output:
            scan(output.journal, source)
            output.recover()
            begin = time.perf_counter()
            assert next(output.journal.pending()).place == 1
            assert time.perf_counter() - begin < 1
            assert sum(1 for _ in output.journal.pending()) == 90_000
            assert output.journal.counts == Counts(100_000, 0, 10_000)
            assert resident() - before < 80 << 20


class TestResults:
    @settings(max_examples=100, deadline=None)
    @given(st.text(max_size=20), st.text(max_size=40), st.data())
    @example('"request_id": "req_', "\ud800", None)
    def test_any_change_is_seen(self, custom_id: str, text: str, data: Any) -> None:
        custom_id = custom_id.encode(errors="replace").decode()
        made = answered("j" * 16, 7, custom_id, {"text": text})
        line = made.line.rstrip(b"\n")
        assert b"\n" not in line and made.line.endswith(b"\n")
        assert known("j" * 16, line) == (7, custom_id, False)
        assert json.loads(line)["response"]["body"] == {"text": text}
        assert known("i" * 16, line) is None
        if data is not None:
            at = data.draw(st.integers(0, len(line) - 1))
            changed = line[:at] + bytes([line[at] ^ 1 << data.draw(st.integers(0, 7))]) + line[at + 1 :]
            assert known("j" * 16, changed) is None
            assert known("j" * 16, line[:at]) is None
            assert known("j" * 16, line[:at] + bytes(len(line) - at)) is None

    def test_an_error(self) -> None:
        made = refused("job", 3, LineError(None, "invalid_json", "what", None))
        assert json.loads(made.line) == {
            "id": "batch_req_job_3",
            "custom_id": None,
            "response": None,
            "error": {"code": "invalid_json", "message": "what", "param": None, "line": 3},
        }
        assert known("job", made.line) == (3, None, True)

    def test_what_json_cannot_say(self) -> None:
        with pytest.raises(ValueError, match="float"):
            answered("job", 3, "a", {"logprob": float("-inf")})

    def test_what_a_crash_leaves(self) -> None:
        line = answered("job", 3, "a", {}).line
        assert all(is_torn("job", line[:n]) for n in range(len(line)))
        assert is_torn("job", bytes(50)) and is_torn("job", line[:7] + bytes(50))
        assert not is_torn("job", b"mine") and not is_torn("job", b'{"id": "batch_req_other')


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Path]:
    """A folder where syncing costs nothing: what is killed here is a simulation, and never the machine."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


class Killed(BaseException):
    """The process ends here."""


class Crash:
    """Kills the run at its `at`-th step on files: the folder as it then is, is copied to `image`.

    With `power`, so does the machine: of what was written and not synced, only a part is there, some of it as zeros.
    """

    def __init__(self, folder: Path, image: Path, at: int, chance: random.Random, power: bool) -> None:
        self.folder, self.image, self.at = folder, image, at
        self.chance, self.power = chance, power
        self.steps = 0
        self.synced: dict[str, int] = {p.name: p.stat().st_size for p in folder.iterdir()}

    def step(self) -> None:
        self.steps += 1
        if self.steps != self.at:
            return
        shutil.copytree(self.folder, self.image, ignore=shutil.ignore_patterns("*-shm"))
        for path in self.image.iterdir() if self.power else ():
            size, sure = path.stat().st_size, self.synced.get(path.name, 0)
            if path.name in ("out.jsonl", "errors.jsonl") and size > sure:
                length = self.chance.randint(sure, size)
                zeros = self.chance.randint(sure, length) if self.chance.random() < 0.5 else length
                with path.open("r+b") as file:
                    file.truncate(zeros)
                    file.truncate(length)
        raise Killed

    def patch(self, patch: pytest.MonkeyPatch) -> None:
        write, fsync, truncate, mark = os.write, os.fsync, os.ftruncate, Journal._mark
        commit, rename, unlink = Journal.commit, os.rename, os.unlink

        def torn_write(fd: int, data: Any) -> int:
            self.step()
            half = self.chance.randint(1, len(data))
            return write(fd, data[:half])  # the rest comes after another step

        def noted_sync(fd: int) -> None:
            self.step()
            fsync(fd)
            name = os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
            self.synced[name] = os.fstat(fd).st_size
            self.step()

        def around(real: Callable[..., Any]) -> Callable[..., Any]:
            def stepped(*args: Any, **options: Any) -> Any:
                self.step()
                result = real(*args, **options)
                self.step()
                return result

            return stepped

        patch.setattr(os, "write", torn_write)
        patch.setattr(os, "fsync", noted_sync)
        patch.setattr(os, "ftruncate", around(truncate))
        patch.setattr(os, "rename", around(rename))
        patch.setattr(os, "unlink", around(unlink))
        patch.setattr(Journal, "_mark", around(mark))
        patch.setattr(Journal, "commit", around(commit))


def crash(folder: Path, image: Path, at: int, chance: random.Random, *, power: bool, errors: bool, by: str) -> bool:
    """Run the job of `folder` into a crash, which leaves `image`; whether there was one."""
    crash = Crash(folder, image, at, chance, power)
    with pytest.MonkeyPatch.context() as patch:
        crash.patch(patch)
        try:
            run(folder, errors=errors, by=by)
        except Killed:
            return True
    return False


def recorded(folder: Path) -> dict[str, bytes]:
    """The part of each file that the journal vouches for."""
    if not (folder / "out.jsonl.journal").exists():
        return {}
    copy = folder.with_name(folder.name + "-copy")
    shutil.copytree(folder, copy)
    db = sqlite3.connect(copy / "out.jsonl.journal")
    found = dict(db.execute("SELECT name, value FROM meta WHERE name IN ('out', 'errors')"))
    db.close()
    shutil.rmtree(copy)
    return {name: (folder / f"{name}.jsonl").read_bytes()[: json.loads(value)[1]] for name, value in found.items()}


class TestCrash:
    @pytest.mark.parametrize("errors", [False, True])
    @pytest.mark.parametrize("power", [False, True])
    def test_at_every_step(self, quick: Path, power: bool, errors: bool) -> None:
        """Whatever step on files is the last one: nothing lost, nothing twice, nothing altered."""
        chance = random.Random(5)
        kept_answers = 0
        for at in itertools.count(1):
            folder, image = quick / f"{at}", quick / f"{at}-after"
            folder.mkdir()
            write_input(folder / "in.jsonl", 12, bad_every=5, fail_every=4)
            if not crash(folder, image, at, chance, power=power, errors=errors, by="first"):
                break
            kept = recorded(image)
            run(image, errors=errors, by="second")
            results = check(image, errors=errors)
            for name, data in kept.items():
                assert (image / f"{name}.jsonl").read_bytes().startswith(data)
            kept_answers += sum(r["response"] is not None and r["response"]["body"]["by"] == "first" for r in results)
        assert at > 60 and kept_answers > 100

    @pytest.mark.parametrize("seed", range(25))
    def test_again_and_again(self, quick: Path, seed: int) -> None:
        """Crashes one after the other, in the recovery from the last one too."""
        chance = random.Random(seed)
        folder = quick / "0"
        folder.mkdir()
        write_input(folder / "in.jsonl", 25, bad_every=6, fail_every=5)
        power, errors = chance.random() < 0.5, chance.random() < 0.5
        for n in itertools.count(1):
            image = quick / f"{n}"
            kept = recorded(folder)
            if not crash(folder, image, chance.randint(1, 60), chance, power=power, errors=errors, by=f"{n}"):
                break
            for name, data in kept.items():
                assert (image / f"{name}.jsonl").read_bytes().startswith(data)
            if chance.random() < 0.15:
                for path in image.glob("out.jsonl.journal*"):
                    path.unlink()
            folder = image
            assert n < 200
        check(folder, errors=errors)

    def test_killed_processes(self, tmp_path: Path) -> None:
        write_input(tmp_path / "in.jsonl", 4000, bad_every=50, fail_every=70)
        chance = random.Random(3)
        script = str(Path(__file__).with_name("batch_job.py"))
        out = tmp_path / "out.jsonl"
        for n in range(3):
            before = out.stat().st_size if out.exists() else 0
            process = subprocess.Popen(
                [sys.executable, script, str(tmp_path), f"{n}"],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
            if n == 2:
                assert process.wait() == 0
                break
            while process.poll() is None and (not out.exists() or out.stat().st_size <= before):
                time.sleep(0.005)
            time.sleep(chance.random() * 0.1)
            process.kill()
            process.wait()
        check(tmp_path, errors=True)
        by = {json.loads(line)["response"]["body"]["by"] for line in out.read_bytes().splitlines()}
        assert len(by) > 1


class TestOutput:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        write_input(tmp_path / "in.jsonl", 30, bad_every=10, fail_every=7)
        return tmp_path

    def test_a_job(self, folder: Path) -> None:
        assert run(folder) == (0, 0, ())
        check(folder)
        before = (folder / "out.jsonl").read_bytes()
        assert run(folder) == (0, 0, ())
        assert (folder / "out.jsonl").read_bytes() == before

    def test_errors_apart(self, folder: Path) -> None:
        run(folder, errors=True)
        check(folder, errors=True)
        with pytest.raises(UsageError, match="begun with -e"):
            run(folder)

    def test_only_one_runner(self, folder: Path) -> None:
        source, output = opened(folder)
        with source, output:
            with pytest.raises(OffloadError, match=r"out\.jsonl: another run"):
                opened(folder)
            with Source.open(folder / "in.jsonl") as again, pytest.raises(OffloadError, match=r"out\.jsonl: another"):
                Output.open(folder / "o2", again, SETTINGS, errors=folder / "out.jsonl")
        run(folder)
        check(folder)

    def test_the_lock_goes_with_the_process(self, folder: Path) -> None:
        code = (
            "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX); "
            "print(flush=True); input()"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code, str(folder / "out.jsonl")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            with pytest.raises(OffloadError, match="another run"):
                run(folder)
            process.kill()
        run(folder)
        check(folder)

    def test_the_input_changed(self, folder: Path) -> None:
        run(folder)
        with (folder / "in.jsonl").open("a") as file:
            file.write("\n")
        with pytest.raises(UsageError, match="the input is not the one"):
            run(folder)

    def test_the_output_is_the_input(self, folder: Path) -> None:
        data = (folder / "in.jsonl").read_bytes()
        (folder / "link").symlink_to(folder / "in.jsonl")
        with Source.open(folder / "in.jsonl") as source:
            for name in ("in.jsonl", "link"):
                with pytest.raises(UsageError, match="is the input"):
                    Output.open(folder / name, source, SETTINGS)
            with pytest.raises(UsageError, match="is the input"):
                Output.open(folder / "out", source, SETTINGS, errors=folder / "in.jsonl")
            with pytest.raises(UsageError, match="with -o and with -e"):
                Output.open(folder / "out", source, SETTINGS, errors=folder / "out")
            with pytest.raises(UsageError, match="is a folder"):
                Output.open(folder, source, SETTINGS)
            with pytest.raises(UsageError, match="no folder"):
                Output.open(folder / "none" / "out", source, SETTINGS)
        assert (folder / "in.jsonl").read_bytes() == data

    @pytest.mark.parametrize("torn", [b"", b'{"id": "ba', bytes(20)])
    def test_the_journal_is_gone(self, folder: Path, torn: bytes) -> None:
        run(folder)
        path = folder / "out.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:10]) + torn)
        (folder / "out.jsonl.journal").unlink()
        assert run(folder, by="second") == (10, len(torn), ())
        results = check(folder)
        assert [r["response"]["body"]["by"] for r in results if r["response"]].count("second") < 20
        assert path.read_bytes().startswith(b"".join(lines[:10]))

    @pytest.mark.parametrize("journal", [True, False])
    def test_lines_that_somebody_took_out(self, folder: Path, journal: bool) -> None:
        run(folder)
        path = folder / "out.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:4] + lines[5:20]))
        if not journal:
            (folder / "out.jsonl.journal").unlink()
        recovered = run(folder)
        assert recovered.adopted == 19
        assert bool(recovered.notes) == journal
        check(folder)

    def test_an_output_that_is_gone(self, folder: Path) -> None:
        run(folder)
        (folder / "out.jsonl").unlink()
        recovered = run(folder)
        assert "answered again" in recovered.notes[0]
        check(folder)

    @pytest.mark.parametrize("journal", [True, False])
    @pytest.mark.parametrize(
        "foreign", [b'{"custom_id": "r1"}\n', b"words", b'{"id": "batch_req_0000000000000000_1"}\n']
    )
    @pytest.mark.parametrize("where", ["end", "middle", "alone"])
    def test_what_is_not_ours_is_left_alone(self, folder: Path, foreign: bytes, journal: bool, where: str) -> None:
        run(folder)
        path = folder / "out.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        at = {"end": 30, "middle": 7, "alone": 0}[where]
        data = b"".join([*lines[:at], foreign.strip() + b"\n", *(lines[at:] if where == "middle" else [])])
        path.write_bytes(data.rstrip(b"\n") if not foreign.endswith(b"\n") and where != "middle" else data)
        before = path.read_bytes()
        if not journal:
            (folder / "out.jsonl.journal").unlink()
        with pytest.raises(UsageError, match=r"not this job's|no result of this job"):
            run(folder)
        assert path.read_bytes() == before
        # and refused before the input is gone through
        assert (folder / "out.jsonl.journal").exists() == journal

    def test_answers_of_another_model(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run(folder)
        (folder / "out.jsonl.journal").unlink()
        monkeypatch.setitem(SETTINGS, "model", "other")
        with pytest.raises(UsageError, match="line 1 is no result of this job"):
            run(folder)

    def test_a_line_twice(self, folder: Path) -> None:
        run(folder)
        path = folder / "out.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:3] + lines[1:5]))
        (folder / "out.jsonl.journal").unlink()
        before = path.read_bytes()
        with pytest.raises(UsageError, match="a second time"):
            run(folder)
        assert path.read_bytes() == before

    def test_a_line_that_was_changed(self, folder: Path) -> None:
        run(folder)
        path = folder / "out.jsonl"
        path.write_bytes(path.read_bytes().replace(b'"said": [', b'"said": [ ', 1))
        (folder / "out.jsonl.journal").unlink()
        with pytest.raises(UsageError, match="was changed"):
            run(folder)

    def test_a_newline_that_an_editor_added(self, folder: Path) -> None:
        run(folder)
        with (folder / "out.jsonl").open("a") as file:
            file.write("\n")
        assert run(folder) == (0, 1, ())
        check(folder)

    def test_no_request_twice(self, folder: Path) -> None:
        source, output = opened(folder)
        with source, output:
            scan(output.journal, source)
            output.recover()
            row = next(output.journal.pending())
            one = answer(output.journal.job, row.number, source.read(*row[2:5]))
            with pytest.raises(ValueError, match="twice"):
                output.write([one, one])
            output.write([one])
            with pytest.raises(ValueError, match="twice"):
                output.write([one])
        run(folder)
        check(folder)

    @pytest.mark.parametrize(
        ("code", "kind"), [(errno.ENOSPC, StoreFull), (errno.EDQUOT, StoreFull), (errno.EIO, StoreError)]
    )
    @pytest.mark.parametrize("call", ["write", "fsync"])
    def test_a_disk_that_fails(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, kind: type[OffloadError]
    ) -> None:
        """At whichever call: the error says what to do, no torn line is left, and what was whole is kept."""
        for after in itertools.count(1):
            source, output = opened(folder)
            with source, output:
                if not output.journal.scanned:
                    scan(output.journal, source)
                output.recover()
                rows = list(itertools.islice(output.journal.pending(), 4))
                if not rows:
                    break
                answers = [answer(output.journal.job, r.number, source.read(*r[2:5])) for r in rows]
                with monkeypatch.context() as patch:
                    real = getattr(os, call)
                    count, every = 0, after % 3 + 1

                    def short(fd: int, *data: Any, real: Any = real, every: int = every) -> Any:
                        nonlocal count
                        count += 1
                        if count % every == 0:
                            raise OSError(code, os.strerror(code))
                        return real(fd, data[0][:300]) if data else real(fd)

                    patch.setattr(os, call, short)
                    try:
                        output.write(answers)
                    except kind:
                        with pytest.raises(kind, match="run the same command again"):
                            output.write([])
                    done = output.journal.counts
                data = (folder / "out.jsonl").read_bytes()
                assert not data or data.endswith(b"\n")
                assert data.count(b"\n") == done.done + done.failed
            assert after < 100
        check(folder)

    def test_a_disk_that_is_really_full(self, tmp_path: Path) -> None:
        mount = tmp_path / "small"
        mount.mkdir()
        options = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(mount)]
        if subprocess.run(options, capture_output=True).returncode:
            pytest.skip("a tmpfs cannot be mounted here")
        try:
            write_input(mount / "in.jsonl", 300, bad_every=10)
            filler = mount / "filler"
            filler.write_bytes(bytes((4 << 20) - (110 << 10)))
            failures, said = 0, list[str]()
            for _ in range(60):
                try:
                    run(mount)
                    break
                except StoreError as e:
                    failures += 1
                    said.append(str(e))
                    with filler.open("r+b") as file:
                        file.truncate(max(0, file.seek(0, os.SEEK_END) - (24 << 10)))
            assert 3 < failures < 59
            assert all("space" in message for message in said)
            check(mount)
        finally:
            subprocess.run(["umount", str(mount)], check=True)

    def test_the_journal_cannot_grow(self, folder: Path) -> None:
        """Lines are in the file, but not recorded: they are taken over by the next run."""
        source, output = opened(folder)
        with source, output:
            scan(output.journal, source)
            output.recover()
            rows = list(output.journal.pending())
            db = output.journal._db
            assert db is not None
            db.execute(f"PRAGMA max_page_count = {db.execute('PRAGMA page_count').fetchone()[0]}")
            with pytest.raises(StoreFull, match="journal"):
                output.write(
                    [answer(output.journal.job, r.number, source.read(*r[2:5])) for r in rows[:3]],
                    [Checkpoint(rows[5].number, 0, bytes(100_000))],
                )
            assert output.journal.counts.done == 0
        assert run(folder, by="second").adopted == 3
        assert sum(1 for r in check(folder) if r["response"] and r["response"]["body"]["by"] == "") == 3

    def test_results_for_a_pipe(self, folder: Path) -> None:
        spill = folder / "spill"
        spill.mkdir()
        reader, writer = os.pipe()
        got: list[bytes] = []
        thread = threading.Thread(target=lambda: got.append(_drained(reader)), daemon=True)
        thread.start()
        with (
            Source.open(folder / "in.jsonl") as source,
            Output.open("-", source, SETTINGS, folder=spill, stdout=writer) as output,
        ):
            scan(output.journal, source)
            assert list(spill.iterdir()) == []
            assert output.recover() == (0, 0, ())
            with ReadAhead(source, output.journal.pending()) as ahead, AsyncOutput(output) as out:
                for row, line in ahead:
                    out.put(answer(output.journal.job, row.number, line))
            assert output.journal.counts.done + output.journal.counts.failed == 30
        os.close(writer)
        thread.join()
        (folder / "out.jsonl").write_bytes(got[0])
        check(folder)

    def test_a_reader_that_leaves(self, folder: Path) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        with (
            Source.open(folder / "in.jsonl") as source,
            Output.open("-", source, SETTINGS, folder=folder, stdout=writer) as output,
        ):
            scan(output.journal, source)
            with pytest.raises(OffloadError, match="is gone"):
                output.recover()
        os.close(writer)


def _drained(fd: int) -> bytes:
    with open(fd, "rb") as file:
        return file.read()


class TestEdge:
    @pytest.fixture
    def job(self, tmp_path: Path) -> Iterator[tuple[Source, Output]]:
        write_input(tmp_path / "in.jsonl", 200)
        source, output = opened(tmp_path)
        with source, output:
            scan(output.journal, source)
            output.recover()
            yield source, output

    def test_all_of_it(self, tmp_path: Path) -> None:
        write_input(tmp_path / "in.jsonl", 500, bad_every=20, fail_every=30)
        run(tmp_path, threads=True)
        check(tmp_path)

    def test_a_slow_disk_makes_groups_and_no_waits(
        self, job: tuple[Source, Output], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source, output = job
        groups: list[int] = []
        free = threading.Event()
        write = Output.write

        def slow(self: Output, answers: Any, checkpoints: Any = ()) -> None:
            assert free.wait(30)
            groups.append(len(answers))
            write(self, answers, checkpoints)

        monkeypatch.setattr(Output, "write", slow)
        with AsyncOutput(output) as writer:
            for row in output.journal.pending():
                writer.put(answer(output.journal.job, row.number, source.read(*row[2:5])))  # does not wait
            free.set()
            writer.flush()
            assert output.journal.counts == Counts(200, 200, 0)
        assert sum(groups) == 200 and len(groups) <= 3

    def test_memory_is_bounded(self, job: tuple[Source, Output], monkeypatch: pytest.MonkeyPatch) -> None:
        source, output = job
        free = threading.Event()
        write = Output.write

        def slow(self: Output, answers: Any, checkpoints: Any = ()) -> None:
            assert free.wait(30)
            write(self, answers, checkpoints)

        monkeypatch.setattr(Output, "write", slow)
        put = 0
        with AsyncOutput(output, waiting=5000) as writer:

            def fill() -> None:
                nonlocal put
                for row in output.journal.pending():
                    writer.put(answer(output.journal.job, row.number, source.read(*row[2:5])))
                    put += 1

            thread = threading.Thread(target=fill, daemon=True)
            thread.start()
            thread.join(0.3)
            assert thread.is_alive() and 0 < put < 30
            free.set()
            thread.join(30)
        assert put == 200 and output.journal.counts.done == 200

    def test_the_last_checkpoint_counts(self, job: tuple[Source, Output]) -> None:
        source, output = job
        first, second = itertools.islice(output.journal.pending(), 2)
        with AsyncOutput(output) as writer:
            for n in range(50):
                writer.checkpoint(Checkpoint(first.number, 0, b"%d" % n))
                writer.checkpoint(Checkpoint(second.number, 0, b"%d" % n))
            writer.flush()
            assert output.journal.checkpoints(first.number) == {0: b"49"}
            writer.checkpoint(Checkpoint(first.number, 0, b"late"))
            writer.put(answer(output.journal.job, first.number, source.read(*first[2:5])))
        assert output.journal.checkpoints(first.number) == {}
        assert output.journal.checkpoints(second.number) == {0: b"49"}

    def test_an_error_comes_with_the_next_call(
        self, job: tuple[Source, Output], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source, output = job
        rows = list(itertools.islice(output.journal.pending(), 3))
        answers = [answer(output.journal.job, row.number, source.read(*row[2:5])) for row in rows]
        monkeypatch.setattr(os, "write", failing(os.write, errno.ENOSPC))
        writer = AsyncOutput(output)
        writer.put(answers[0])
        with pytest.raises(StoreFull):
            writer.flush()
        with pytest.raises(StoreFull):
            writer.put(answers[1])
        with pytest.raises(StoreFull):
            writer.close()
        with pytest.raises(KeyError), AsyncOutput(output) as writer:  # what went wrong first is what is told
            raise KeyError

    def test_reading_ahead_stops(self, job: tuple[Source, Output]) -> None:
        source, output = job
        with ReadAhead(source, output.journal.pending(), waiting=1) as ahead:
            row, line = next(ahead)
            assert line == source.read(*row[2:5])

    def test_a_line_that_is_not_what_it_was(self, job: tuple[Source, Output]) -> None:
        source, output = job
        path = Path(source.name)
        path.write_bytes(path.read_bytes().replace(b"r7", b"q7", 1))
        with ReadAhead(source, output.journal.pending()) as ahead, pytest.raises(ReadError, match="was changed"):
            list(ahead)

    def test_a_spooled_input_is_read_ahead(self, tmp_path: Path) -> None:
        write_input(tmp_path / "in.jsonl", 20)
        fd = os.open(tmp_path / "in.jsonl", os.O_RDONLY)
        with (
            Source.open("-", folder=tmp_path, stdin=fd) as source,
            Output.open(tmp_path / "out.jsonl", source, SETTINGS) as output,
        ):
            scan(output.journal, source)
            with ReadAhead(source, output.journal.pending()) as ahead:
                assert sorted(row.number for row, _ in ahead) == list(range(1, 21))
        os.close(fd)


def test_locks_are_what_is_meant(tmp_path: Path) -> None:
    """The tests of the lock rely on it: a second descriptor of one process is refused as another process is."""
    path = tmp_path / "x"
    with path.open("w") as one, path.open("w") as two:
        fcntl.flock(one, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)

"""A batch job's input and journal: every line is found, in order, and what became of it is known again."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import sqlite3
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from file_job import SETTINGS, answer, check, opened, run, scan, write_input
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.batch import lines as lines_module
from offload.batch.journal import Checkpoint, Counts, Journal, Mark
from offload.batch.lines import HEAD, Identity, Line, Source, line_digest, split
from offload.batch.order import BLOCK_TOKENS, UNIT, Node, _common, key_of, nodes, places
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

    def test_stdin_that_is_a_file_is_not_copied(self, tmp_path: Path) -> None:
        path = tmp_path / "in"
        path.write_bytes(b"a\nb\n")
        fd = os.open(path, os.O_RDONLY)
        with Source.open("-", stdin=fd) as source:
            assert os.path.sameopenfile(source.fd, fd)
            assert [line.data for line in source.lines()] == [b"a", b"b"]
        os.read(fd, 2)
        with Source.open("-", stdin=fd) as source:  # what was read of it before us is not ours
            assert not os.path.sameopenfile(source.fd, fd)
            assert [line.data for line in source.lines()] == [b"b"]
        os.close(fd)

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
            tmp_path, [(b"", 500), (a + b"1111", 100), (b, 990), (a + b"2222", 600), (b"", 700), (b + b"xxxx", 50)]
        )
        assert [row.number for row in journal.pending()] == [3, 6, 5, 4, 2, 1]
        assert [row.number for row in journal.pending(after=4)] == [2, 1]
        assert journal.workload() == (6, 2940, 6, 990, 1)
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
        journal.commit([Mark(2, False, 20)])
        assert journal.counts == Counts(2, 2, 0)
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

    def test_the_log_of_a_journal_that_was_removed(self, tmp_path: Path) -> None:
        """SQLite would take it for the new journal's own, and undo what it holds."""
        write_input(tmp_path / "in.jsonl", 40)
        run(tmp_path)
        path = tmp_path / "out.jsonl.journal"
        log = tmp_path / "out.jsonl.journal-journal"
        db = sqlite3.connect(path, isolation_level=None)
        db.execute("PRAGMA journal_mode = DELETE")
        db.execute("PRAGMA cache_size = 1")
        db.execute("BEGIN")
        db.execute("UPDATE requests SET key = zeroblob(500)")  # more than the cache: the log is on disk
        data = log.read_bytes()
        db.execute("ROLLBACK")
        db.close()
        path.unlink()
        log.write_bytes(data)
        run(tmp_path)
        check(tmp_path)
        assert not log.exists()

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

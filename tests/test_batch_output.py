"""The results of a batch job: whatever happens, every line of the input has its one line in the output."""

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from file_job import SETTINGS, answer, check, opened, run, scan, write_input
from hypothesis import example, given, settings
from hypothesis import strategies as st

from offload.batch.edge import AsyncOutput, ReadAhead
from offload.batch.journal import Checkpoint, Counts, Journal, Mark
from offload.batch.lines import Source
from offload.batch.output import Output
from offload.batch.requests import LineError
from offload.batch.results import answered, is_torn, known, refused
from tiers import OffloadError, ReadError, StoreError, StoreFull, UsageError


def failing(real: Callable[..., Any], code: int) -> Callable[..., Any]:
    def fail(*args: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


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


def crash(
    folder: Path,
    image: Path,
    at: int,
    chance: random.Random,
    *,
    power: bool,
    errors: bool,
    by: str,
    synced: dict[str, int] | None = None,
) -> dict[str, int] | None:
    """Run the job of `folder` into a crash, which leaves `image`; what of it is durable, or None if it did not crash.

    `synced`: what of `folder` is (default: all).
    """
    crash = Crash(folder, image, at, chance, power)
    crash.synced |= synced or {}
    with pytest.MonkeyPatch.context() as patch:
        crash.patch(patch)
        try:
            run(folder, errors=errors, by=by)
        except Killed:
            return {} if power else crash.synced
    return None


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
            if crash(folder, image, at, chance, power=power, errors=errors, by="first") is None:
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
        errors = chance.random() < 0.5
        synced: dict[str, int] | None = None
        for n in itertools.count(1):
            image = quick / f"{n}"
            kept = recorded(folder)
            power, steps = chance.random() < 0.5, chance.choice([15, 60])
            synced = crash(folder, image, chance.randint(1, steps), chance, power=power, errors=errors, by=f"{n}",
                           synced=synced)  # fmt: skip
            if synced is None:
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
        write_input(tmp_path / "in.jsonl", 2000, bad_every=50, fail_every=70)
        chance = random.Random(3)
        script = str(Path(__file__).with_name("file_job.py"))
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

    def test_what_is_taken_over_is_durable(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run(folder)
        (folder / "out.jsonl.journal").unlink()
        synced: dict[str, int] = {}
        fsync, mark = os.fsync, Journal._mark

        def noted(fd: int) -> None:
            fsync(fd)
            synced[os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))] = os.fstat(fd).st_size

        def marked(self: Journal, one: Mark) -> None:
            synced.clear()  # what was synced before all is marked may not be what is recorded
            mark(self, one)

        monkeypatch.setattr(os, "fsync", noted)
        monkeypatch.setattr(Journal, "_mark", marked)
        assert run(folder).adopted == 30
        assert synced["out.jsonl"] == (folder / "out.jsonl").stat().st_size

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

    def test_nothing_more_after_an_interruption(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source, output = opened(folder)
        with source, output:
            scan(output.journal, source)
            output.recover()
            rows = list(itertools.islice(output.journal.pending(), 2))
            answers = [answer(output.journal.job, r.number, source.read(*r[2:5])) for r in rows]

            def interrupt(fd: int) -> None:
                raise KeyboardInterrupt

            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    output.write(answers[:1])
            with pytest.raises(OffloadError, match="interrupted"):
                output.write(answers[1:])
        assert run(folder).adopted == 1
        check(folder)

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
        fd, end = os.pipe()
        os.write(end, (tmp_path / "in.jsonl").read_bytes())
        os.close(end)
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

"""The results of a batch job in files: every request's line exactly once, whatever happens meanwhile.

Lines are appended in groups: write, fsync, then the journal's commit, which says how far the file is good. A crash
leaves lines that the journal does not know, of which the last may be torn: `Output.recover` takes the whole ones over
(`offload.batch.results` tells whether they are) and cuts off the rest. So the file has every line that was recorded,
and none twice. The file itself is what counts: one that is not as the journal says is read again from its beginning.

A lock on the file keeps a second runner away. Not covered: when what is written (`offload.batch.edge`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from kvstore.files import sync_folder
from offload.batch.journal import Checkpoint, Extent, Journal, Mark
from offload.batch.lines import Line, Source, split
from offload.batch.results import Answer, is_torn, known, refused
from tiers import OffloadError, StoreError, StoreFull, UsageError

MAX_RESULT = 1 << 30  # bytes of a line of results that is read back
_GROUP = 4 << 20  # bytes of error lines written at a time
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Recovered(NamedTuple):
    """Lines taken over that were written but not recorded, bytes of torn lines cut off; what the user should know."""

    adopted: int
    cut: int
    notes: tuple[str, ...]


class ResultsFile:
    """An append-only file of results that nobody else writes. `end`: how far it is recorded."""

    def __init__(self, name: str, path: Path, fd: int) -> None:
        self.name = name
        self.path = path
        self.fd = fd
        self.end = 0

    @classmethod
    def open(cls, name: str, path: Path) -> ResultsFile:
        """The file, made if it is not there. Raises `StoreError`; `OffloadError` if another runner writes it."""
        fd = -1
        try:
            new = not path.exists()
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if new:
                sync_folder(path.parent)
            return cls(name, path, fd)
        except OSError as e:
            if fd >= 0:
                os.close(fd)
            if e.errno == errno.EWOULDBLOCK:
                raise OffloadError(
                    f"{path}: another run is writing it; wait until it is done, or name another output"
                ) from None
            raise _trouble(path, e) from None

    def append(self, lines: Sequence[bytes]) -> tuple[list[int], OSError | None]:
        """Write the lines; returns where those end that are whole in the file, and what stopped it (None: nothing).

        What is there of a line that is not whole is cut off again.
        """
        ends, end = [], self.end
        for line in lines:
            end += len(line)
            ends.append(end)
        written, trouble = self.end, None
        rest = memoryview(b"".join(lines))
        try:
            while rest:
                count = os.write(self.fd, rest)
                rest, written = rest[count:], written + count
        except OSError as e:
            trouble = e
            ends = [end for end in ends if end <= written]
            with contextlib.suppress(OSError):  # else it is cut off the next time
                os.ftruncate(self.fd, ends[-1] if ends else self.end)
        return ends, trouble

    def sync(self) -> OSError | None:
        """Make it durable; returns what went wrong.

        If something did, pages that are not on disk may be taken for clean (Rebello et al., ATC '20, "Can
        Applications Recover from fsync Failures?"): so what was written is cut off, and never read back as good.
        """
        try:
            os.fsync(self.fd)
        except OSError as e:
            with contextlib.suppress(OSError):
                os.ftruncate(self.fd, self.end)
            return e
        return None

    def extent(self, start: int, end: int) -> Extent:
        """What the journal keeps of it. Raises OSError."""
        return Extent(start, end, _digest(self.fd, start, end))

    def is_as(self, extent: Extent) -> bool:
        """Whether it is as it was recorded, or longer. Raises OSError."""
        return os.fstat(self.fd).st_size >= extent.end and self.extent(*extent[:2]) == extent


class Output:
    """Where a job's results go, and its `journal`. A context manager.

    ::

        with Output.open(out, source, settings) as output:
            if not output.journal.scanned:
                with output.journal.scan() as scan:
                    ...  # scan.add, scan.reject for each of source.lines()
            output.recover()
            for row in output.journal.pending():
                ...
                output.write([answered(output.journal.job, row.number, ...)])
    """

    def __init__(self, journal: Journal, out: ResultsFile | None, errors: ResultsFile | None, stream: int) -> None:
        self.journal = journal
        self._out = out  # None: the stream
        self._errors = errors
        self._stream = stream
        self._failed: OffloadError | None = None

    @classmethod
    def open(
        cls,
        out: str | Path,
        source: Source,
        settings: Mapping[str, Any],
        *,
        errors: str | Path | None = None,
        folder: Path | None = None,
        stdout: int = 1,
    ) -> Output:
        """The output of the job that `source` and `settings` make, new or as it was left.

        `out`: a file, or `-` (or a pipe or device) for lines that are not kept; the journal then is in `folder` and
        goes with the process. `errors`: the file for error lines, which else are among the others.
        Raises `UsageError` if the input, the settings or the file are another job's, `OffloadError` if another runner
        writes it, `DamagedError` for the journal, `StoreError`.
        """
        with contextlib.ExitStack() as opened:
            kept = errors if errors is None else _place(errors, "-e")
            if errors is not None and kept is None:
                raise UsageError(f"{errors} is no plain file; -e needs one, or leave it out")
            place = _place(out, "-o")
            if place is not None and place == kept:
                raise UsageError(f"{place} is given with -o and with -e; leave -e out to have errors among the results")
            files: list[ResultsFile | None] = []
            for name, path in (("out", place), ("errors", kept)):
                file = ResultsFile.open(name, path) if path is not None else None
                if file is not None:
                    opened.callback(os.close, file.fd)
                    if os.path.sameopenfile(file.fd, source.fd):
                        raise UsageError(f"{file.path} is the input; name another output")
                files.append(file)
            stream = -1
            if place is not None:
                named = os.path.abspath(kept) if kept is not None else None
                journal = Journal.open(place, source.identity, settings, errors=named)
            else:
                journal = Journal.unnamed(folder or Path.cwd(), source.identity, settings)
                stream = _stream(out, stdout)
                opened.callback(os.close, stream)
            opened.callback(journal.close)
            output = cls(journal, files[0], files[1], stream)
            if not journal.scanned:
                output._refuse_foreign()
            opened.pop_all()
            return output

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the files, and let another runner have them. Nothing is lost without."""
        self.journal.close()
        for file in self._files:
            os.close(file.fd)
        self._out = self._errors = None
        if self._stream >= 0:
            os.close(self._stream)
            self._stream = -1

    @property
    def _files(self) -> list[ResultsFile]:
        return [file for file in (self._out, self._errors) if file is not None]

    # writing

    def write(self, answers: Sequence[Answer], checkpoints: Sequence[Checkpoint] = ()) -> None:
        """Append lines and record them; when this returns they are durable.

        Raises `StoreFull` or `StoreError` if not all could be written: those that were are recorded, or are taken over
        by the next `recover`; of the others nothing is left, and this output takes no more. Raises ValueError if a
        request has its line already.
        """
        if self._failed is not None:
            raise self._failed
        try:
            self._write(answers, checkpoints)
        except OffloadError as e:
            self._failed = e
            raise
        except OSError as e:
            self._failed = _trouble(self._files[0].path, e)
            raise self._failed from None

    def _write(self, answers: Sequence[Answer], checkpoints: Sequence[Checkpoint]) -> None:
        numbers = {answer.number for answer in answers}
        if len(numbers) < len(answers) or not all(self.journal.awaits(a.number, a.custom_id) for a in answers):
            raise ValueError("a request is answered twice, or is none of this job's")
        marks: list[Mark] = []
        extents: dict[str, Extent] = {}
        trouble: OffloadError | None = None
        for file in (self._out, self._errors) if self._errors is not None else (self._out,):
            mine = [a for a in answers if self._file_of(a) is file]
            if not mine or trouble is not None:
                continue
            ends, trouble = self._append(file, [a.line for a in mine])
            marks += [Mark(a.number, a.failed, end) for a, end in zip(mine, ends, strict=False)]
            if file is not None and ends:
                extents[file.name] = Extent(file.end, ends[-1], _hash(b"".join(a.line for a in mine[: len(ends)])))
        left = [c for c in checkpoints if c.number not in numbers]
        if marks or left:
            self.journal.commit(marks, lambda: extents, left)
        for file in self._files:
            if file.name in extents:
                file.end = extents[file.name].end
        if trouble is not None:
            raise trouble

    def _file_of(self, answer: Answer) -> ResultsFile | None:
        return self._errors if answer.failed and self._errors is not None else self._out

    def _append(self, file: ResultsFile | None, lines: Sequence[bytes]) -> tuple[list[int], OffloadError | None]:
        """Where the lines end that are durable, and what was wrong with the others."""
        if file is None:
            return self._send(lines), None
        ends, e = file.append(lines)
        if ends:
            # what cannot be made durable is not there
            failed = file.sync()
            ends, e = ([], failed) if failed is not None else (ends, e)
            if ends and os.fstat(file.fd).st_size != ends[-1]:
                return [], OffloadError(f"{file.path}: something else writes it as well; end that, then run again")
        return ends, _trouble(file.path, e) if e is not None else None

    def _send(self, lines: Sequence[bytes]) -> list[int]:
        rest = memoryview(b"".join(lines))
        try:
            while rest:
                rest = rest[os.write(self._stream, rest) :]
        except BrokenPipeError:
            raise OffloadError("who reads the results is gone; name a file with -o to be able to continue") from None
        except OSError as e:
            raise StoreError(f"stdout: {e.strerror}; name a file with -o to be able to continue") from None
        return [0] * len(lines)

    # recovering

    def recover(self) -> Recovered:
        """Make files and journal agree, after which `write` may be used; writes the lines of what was rejected.

        Raises `UsageError` if a file has lines that are not this job's, and leaves it as it is; else like `write`.
        """
        try:
            recovered = self._agree() if self._files else Recovered(0, 0, ())
        except OSError as e:
            raise _trouble(self._files[0].path, e) from None
        group: list[Answer] = []
        size = 0
        for number, error in self.journal.rejected():
            group.append(refused(self.journal.job, number, error))
            size += len(group[-1].line)
            if size >= _GROUP:
                self.write(group)
                group, size = [], 0
        self.write(group)
        return recovered

    def _agree(self) -> Recovered:
        extents = {file.name: self.journal.extent(file.name) for file in self._files}
        good = {file.name: _is_as(file, extents[file.name]) for file in self._files}
        anew = not all(good.values())
        if anew:
            self._refuse_foreign()
        adopted = cut = 0
        begins = {file.name: 0 for file in self._files}
        for file in self._files:
            found = extents[file.name]
            begins[file.name] = file.end = 0 if anew or found is None else found.end

        def marks() -> Iterator[Mark]:
            nonlocal adopted, cut
            for file in self._files:
                for line, answer in self._whole(file):
                    file.end = line.offset + line.length + 1
                    adopted += 1
                    yield Mark(answer.number, answer.failed, file.end)
                size = os.fstat(file.fd).st_size
                if size > file.end:
                    self._check_torn(file)
                    cut += size - file.end
                    os.ftruncate(file.fd, file.end)

        def reached() -> dict[str, Extent]:
            for file in self._files:
                os.fsync(file.fd)
            moved = [file for file in self._files if file.end > begins[file.name]]
            # the last line is enough to know the file by
            return {file.name: file.extent(max(begins[file.name], file.end - _GROUP), file.end) for file in moved}

        if anew or any(os.fstat(file.fd).st_size > file.end for file in self._files):
            self.journal.commit(marks(), reached, anew=anew)
        notes = tuple(
            f"{file.path} is not as this job left it; what it has is kept, what is missing is answered again"
            for file in self._files
            if not good[file.name]
        )
        return Recovered(adopted, cut, notes)

    def _whole(self, file: ResultsFile) -> Iterator[tuple[Line, Answer]]:
        """The lines from `file.end` on up to the first that is not whole. Raises `UsageError` for a second answer."""
        for line in split(file.fd, begin=file.end, limit=MAX_RESULT):
            found = known(self.journal.job, line.data) if line.data is not None and line.ended else None
            if found is None:
                return
            if not self.journal.awaits(found.number, found.custom_id):
                raise UsageError(
                    f"{file.path}: line {found.number} of the input is answered a second time at byte {line.offset}; "
                    "take that line out, or name another output"
                )
            yield line, Answer(found.number, found.custom_id, found.failed, b"")

    def _check_torn(self, file: ResultsFile) -> None:
        """Raises `UsageError` if what is behind the last whole line is not ours to cut off."""
        data = os.pread(file.fd, 64, file.end)
        if not is_torn(self.journal.job, data) and (len(data) == 64 or not data.isspace()):
            raise UsageError(
                f"{file.path}: what is there from byte {file.end} on is not this job's; take it out, or name another "
                "output"
            )

    def _refuse_foreign(self) -> None:
        """Raises `UsageError` if a file has anything but lines of this job and, at its end, a torn one."""
        for file in self._files:
            torn = 0
            for line in split(file.fd, limit=MAX_RESULT):
                good = line.data is not None and line.ended and known(self.journal.job, line.data) is not None
                if torn and good:
                    raise self._foreign(file, torn)
                torn = torn or (0 if good else line.number)
                if not good and not is_torn(self.journal.job, line.head):
                    raise self._foreign(file, line.number)

    @staticmethod
    def _foreign(file: ResultsFile, number: int) -> UsageError:
        return UsageError(
            f"{file.path}: line {number} is no result of this job (of this input, model and settings), or was "
            "changed; move the file away, or name another output"
        )


def _place(path: str | Path, flag: str) -> Path | None:
    """Where results are kept; None for what cannot be read again. Raises `UsageError`."""
    if str(path) == "-":
        return None
    real = Path(os.path.realpath(path))
    try:
        kind = os.stat(path).st_mode
    except FileNotFoundError:
        if real.parent.is_dir():
            return real
        raise UsageError(f"{real.parent} is no folder; {flag} names a file in one that is there") from None
    except OSError as e:
        raise UsageError(f"{path}: {e.strerror}; {flag} names a file") from None
    if stat.S_ISDIR(kind):
        raise UsageError(f"{path} is a folder; {flag} names a file")
    return real if stat.S_ISREG(kind) else None


def _stream(out: str | Path, stdout: int) -> int:
    try:
        return os.dup(stdout) if str(out) == "-" else os.open(out, os.O_WRONLY | os.O_CLOEXEC)
    except OSError as e:
        raise UsageError(f"{out}: {e.strerror}; -o names a file, or - for stdout") from None


def _is_as(file: ResultsFile, extent: Extent | None) -> bool:
    return extent is None or file.is_as(extent)


def _digest(fd: int, start: int, end: int) -> str:
    hashed = hashlib.blake2b(digest_size=16)
    while start < end and (block := os.pread(fd, min(end - start, 1 << 20), start)):
        hashed.update(block)
        start += len(block)
    return hashed.hexdigest()


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _trouble(path: Path, e: OSError) -> OffloadError:
    if e.errno in _FULL:
        return StoreFull(f"{path}: no space left on its disk; free some, then run the same command again")
    return StoreError(f"{path}: {e.strerror or e}; when that is put right, run the same command again")

"""The contract of `BlockReader`, run on every implementation, with the disk failing in every way it can."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import fake_kvikio
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload.layout import CastCodec
from tiers import (
    CHUNK,
    PAGE,
    Arena,
    BlockReader,
    Cause,
    Codec,
    DirectReader,
    KvikioReader,
    ReadError,
    Segment,
    Slot,
    Ticket,
    TransferQueue,
    page_down,
    page_up,
)

SIZE = 2 * CHUNK + 3 * PAGE + 777  # more than two requests, and no whole number of pages
FILL = 0xA5  # what slots hold before a read
DATA = random.Random(7).randbytes(SIZE)
PREADV = os.preadv
OPEN = os.open


@dataclass(frozen=True)
class Invert:
    """A codec that doubles: every stored byte becomes itself and its complement."""

    stored_itemsize: int = 1
    compute_itemsize: int = 2

    def decode(self, stored: memoryview, compute: memoryview) -> None:
        compute[0::2] = bytes(stored)
        compute[1::2] = bytes(255 - b for b in stored)


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reader") / "data.bin"
    path.write_bytes(DATA)
    return path


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that never gives up fails here instead of spinning for ever in a worker thread."""
    calls = 0

    def bounded(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 2_000:
            raise OSError(errno.ETIME, "the reader asks the same thing again and again")
        return PREADV(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", bounded)


def slot_of(nbytes: int) -> Slot:
    slot = Arena(nbytes).allocate(nbytes)
    slot.tensor.fill_(FILL)
    return slot


def place(offset: int, nbytes: int, at: int, padded: bool, codec: Codec | None = None) -> Segment:
    """A segment whose `dst` is `at`, or the first place after it where whole pages may be read."""
    dst = page_up(at) + offset % PAGE if padded else at
    return Segment(0, offset, nbytes, dst, codec, padded)


def expected(segments: Sequence[Segment], slot: Slot) -> bytes:
    """The slot after all segments: their bytes, and for padded ones anything in the rest of their pages."""
    image = bytearray([FILL] * slot.nbytes)
    now = bytes(slot.view)
    for s in segments:
        if s.padded:
            first, last = page_down(s.dst), page_up(s.dst + s.nbytes)
            image[first:last] = now[first:last]
    for s in segments:
        stored = DATA[s.offset : s.offset + s.nbytes]
        out = bytearray(stored)
        if s.codec is not None:
            out = bytearray(s.nbytes // s.codec.stored_itemsize * s.codec.compute_itemsize)
            s.codec.decode(memoryview(stored), memoryview(out))
        image[s.dst : s.dst + len(out)] = out
    return bytes(image)


def read_all(reader: BlockReader, segments: Sequence[Segment], slot: Slot) -> int:
    """Every piece, in this thread; returns the bytes that crossed the link. All readers here ask for `CHUNK`."""
    moved = 0
    for segment in segments:
        pieces = reader.split(segment, slot)
        # whole pages are read from their beginning
        assert sum(p.nbytes for p in pieces) == segment.nbytes + (segment.offset % PAGE if segment.padded else 0)
        assert all(0 < p.nbytes <= CHUNK for p in pieces)
        for piece in pieces:
            n = reader.read(piece, slot)
            assert n % PAGE == 0
            assert piece.nbytes <= n <= CHUNK + 2 * PAGE
            moved += n
    return moved


def fetch(reader: BlockReader, segments: Sequence[Segment], slot: Slot) -> Ticket:
    """One ticket through a queue of its own, waited for; its error is raised."""
    queue = TransferQueue(reader, 2)
    try:
        ticket = queue.submit("block", segments, slot, Cause.DEMAND)
        assert ticket._done.wait(20), "the ticket never ended"
        ticket.wait()
        return ticket
    finally:
        queue.close()


def is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


@st.composite
def segment_lists(draw: st.DrawFn) -> list[Segment]:
    """Segments that lie one after the other in the slot, with gaps, from anywhere in the file."""
    segments: list[Segment] = []
    end = 0
    for _ in range(draw(st.integers(1, 4))):
        near = draw(st.sampled_from([0, PAGE, CHUNK, 2 * CHUNK, SIZE - 1]))
        offset = min(SIZE - 1, max(0, near + draw(st.integers(-2 * PAGE, 2 * PAGE))))
        long = st.sampled_from([PAGE, CHUNK, CHUNK + 5, SIZE])
        nbytes = min(draw(st.one_of(st.integers(1, 300), st.integers(1, 3 * PAGE), long)), SIZE - offset)
        kind = draw(st.sampled_from(["plain", "padded", "codec"]))
        at = end + draw(st.integers(0, 100))
        codec = Invert() if kind == "codec" and nbytes < 4 * PAGE else None
        s = place(offset, nbytes, at, kind == "padded", codec)
        segments.append(s)
        end = page_up(s.dst + nbytes) if s.padded else s.dst + nbytes * (2 if codec else 1)
    return segments


class BlockReaderContract:
    """What every `BlockReader` must do. Subclasses say how one is made."""

    decodes = True  # whether segments with a codec can be read
    descriptors = 1  # of one open file

    def make(self, paths: Sequence[Path]) -> BlockReader:
        raise NotImplementedError

    @pytest.fixture
    def reader(self, data_file: Path) -> Iterator[BlockReader]:
        reader = self.make([data_file])
        yield reader
        reader.close()

    @pytest.fixture
    def opened(self, tmp_path: Path) -> Iterator[tuple[BlockReader, Path]]:
        """A reader on a file of its own, that may be changed."""
        path = tmp_path / "own.bin"
        path.write_bytes(DATA)
        time.sleep(0.02)  # so that a later write has another time stamp
        reader = self.make([path])
        yield reader, path
        reader.close()

    # bytes

    @settings(max_examples=50, deadline=None, database=None, suppress_health_check=[HealthCheck.differing_executors])
    @given(segments=segment_lists())
    def test_random_segments(self, data_file: Path, segments: list[Segment]) -> None:
        if not self.decodes:
            segments = [replace(s, codec=None) for s in segments]
        reader = self.make([data_file])
        try:
            slot = slot_of(max(page_up(s.dst + 2 * s.nbytes) for s in segments) + PAGE)
            read_all(reader, segments, slot)
            assert bytes(slot.view) == expected(segments, slot)
        finally:
            reader.close()

    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize(
        ("offset", "nbytes"),
        [
            (0, PAGE),  # aligned
            (PAGE, 3 * PAGE),
            (1, PAGE - 2),  # inside one page
            (PAGE - 1, 2),  # across a page
            (PAGE + 13, 5 * PAGE),
            (0, SIZE),  # all, several requests
            (CHUNK - 1, CHUNK + 2),
            (SIZE - 1, 1),  # the last byte
            (page_down(SIZE), SIZE - page_down(SIZE)),  # the last, torn page
            (SIZE - PAGE - 5, PAGE + 5),
        ],
    )
    def test_chosen_segments(self, reader: BlockReader, offset: int, nbytes: int, padded: bool) -> None:
        segments = [place(offset, nbytes, 64, padded)]
        slot = slot_of(SIZE + 4 * PAGE)
        read_all(reader, segments, slot)
        assert bytes(slot.view) == expected(segments, slot)

    def test_nothing_is_no_request(self, reader: BlockReader) -> None:
        slot = slot_of(PAGE)
        assert reader.split(Segment(0, 100, 0, 0), slot) == []
        ticket = fetch(reader, [Segment(0, 100, 0, 0)], slot)
        assert (ticket.nbytes, bytes(slot.view)) == (0, bytes([FILL] * PAGE))

    def test_several_files(self, tmp_path: Path) -> None:
        paths = [tmp_path / f"{i}.bin" for i in range(3)]
        for i, p in enumerate(paths):
            p.write_bytes(bytes([i + 1] * (PAGE + i)))
        reader = self.make(paths)
        try:
            slot = slot_of(PAGE)
            read_all(reader, [Segment(i, PAGE - 3, 3 + i, 10 * i) for i in (2, 0, 1)], slot)
            want = bytearray([FILL] * PAGE)
            want[0:3], want[10:14], want[20:25] = b"\1" * 3, b"\2" * 4, b"\3" * 5
            assert bytes(slot.view) == bytes(want)
        finally:
            reader.close()

    def test_many_threads_at_once(self, reader: BlockReader) -> None:
        codecs = [Invert() if i % 7 == 0 and self.decodes else None for i in range(600)]
        segments = [place(i * 1500 + 1, 900, i * 2000, False, codec) for i, codec in enumerate(codecs)]
        slot = slot_of(600 * 2000 + PAGE)
        queue = TransferQueue(reader, 8)
        try:
            ticket = queue.submit("block", segments, slot, Cause.PREFETCH)
            ticket.wait()
            assert bytes(slot.view) == expected(segments, slot)
            assert ticket.nbytes == queue.bytes_read[Cause.PREFETCH] > 0
            assert queue.bytes_read[Cause.DEMAND] == 0
        finally:
            queue.close()

    def test_tmpfs(self) -> None:
        shm = Path("/dev/shm")
        if not os.access(shm, os.W_OK):
            pytest.skip("no /dev/shm")
        with tempfile.TemporaryDirectory(dir=shm) as folder:
            path = Path(folder) / "data.bin"
            path.write_bytes(DATA)
            reader = self.make([path])
            try:
                segments = [place(PAGE + 5, CHUNK + 100, 0, True), place(17, 5000, CHUNK + 4 * PAGE, False)]
                slot = slot_of(SIZE)
                fetch(reader, segments, slot)
                assert bytes(slot.view) == expected(segments, slot)
            finally:
                reader.close()

    # failures

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ReadError, match=r"nowhere\.bin"):
            self.make([tmp_path / "nowhere.bin"])

    def test_a_missing_file_leaves_none_open(self, tmp_path: Path, data_file: Path) -> None:
        with pytest.raises(ReadError):
            self.make([data_file, tmp_path / "nowhere.bin"])
        assert open_files(data_file) == 0

    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("size", [0, 100, PAGE, PAGE + 904, CHUNK + PAGE + 1])
    def test_a_file_that_is_too_short_is_named(self, tmp_path: Path, size: int, padded: bool) -> None:
        path = tmp_path / "short.bin"
        path.write_bytes(DATA[:size])
        reader = self.make([path])
        try:
            slot = slot_of(SIZE)
            with pytest.raises(ReadError, match=r"short\.bin") as e:
                read_all(reader, [place(0, CHUNK + 2 * PAGE, 0, padded)], slot)
            assert "ends at byte" in str(e.value)
            assert "\n" not in str(e.value)
        finally:
            reader.close()

    @pytest.mark.parametrize("change", ["truncated", "modified in place", "replaced by rename", "removed"])
    def test_a_file_changed_while_open(self, opened: tuple[BlockReader, Path], change: str) -> None:
        """The next ticket fails, even if what it reads is as it was."""
        reader, path = opened
        segments = [place(PAGE, 2 * PAGE, 0, True), place(5, 100, 4 * PAGE, False)]
        slot = slot_of(8 * PAGE)
        fetch(reader, segments, slot)
        assert bytes(slot.view) == expected(segments, slot)
        if change == "truncated":
            os.truncate(path, 3 * PAGE + 100)  # beyond what is read: only the identity can tell
        elif change == "modified in place":
            with path.open("r+b") as f:
                f.seek(PAGE)
                f.write(b"changed")
        elif change == "replaced by rename":
            path.with_suffix(".new").write_bytes(DATA)  # even with the same bytes
            path.with_suffix(".new").rename(path)
        else:
            path.unlink()
        with pytest.raises(ReadError, match=r"own\.bin") as e:
            fetch(reader, segments, slot)
        assert "load the model again" in str(e.value)
        with pytest.raises(ReadError, match=r"own\.bin"):
            reader.verify(0)

    @pytest.mark.parametrize("size", [0, PAGE, 2 * PAGE + 10])
    def test_a_file_truncated_under_a_read_is_named(self, opened: tuple[BlockReader, Path], size: int) -> None:
        reader, path = opened
        os.truncate(path, size)
        for padded in (False, True):
            with pytest.raises(ReadError, match=r"own\.bin"):
                read_all(reader, [place(0, 4 * PAGE, 0, padded)], slot_of(8 * PAGE))

    @pytest.mark.parametrize("code", [errno.EIO, errno.ENXIO, errno.ESTALE])
    def test_a_failing_disk(self, opened: tuple[BlockReader, Path], monkeypatch: pytest.MonkeyPatch, code: int) -> None:
        reader, _ = opened
        segments = [place(0, 2 * PAGE, 0, True), place(3 * PAGE, 100, 3 * PAGE, False)]

        def failing(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            if offset >= 3 * PAGE:
                raise OSError(code, os.strerror(code))
            return PREADV(fd, buffers, offset)

        slot = slot_of(6 * PAGE)
        with monkeypatch.context() as m:
            m.setattr(os, "preadv", failing)
            with pytest.raises(ReadError, match=r"own\.bin") as e:
                fetch(reader, segments, slot)
            assert os.strerror(code) in str(e.value)
        fetch(reader, segments, slot)  # a fault that has passed leaves nothing behind
        assert bytes(slot.view) == expected(segments, slot)

    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("bite", [512, PAGE, PAGE + 512, 3 * PAGE])
    def test_torn_reads_are_continued(
        self, reader: BlockReader, monkeypatch: pytest.MonkeyPatch, bite: int, padded: bool
    ) -> None:
        """The kernel may stop anywhere (512 is the smallest a direct read stops at); it gets on if asked again."""
        torn: set[int] = set()

        def tearing(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            if offset in torn:  # whoever starts at the same place again is served further
                return PREADV(fd, [buffers[0][: 2 * PAGE]], offset)
            torn.add(offset)
            return PREADV(fd, [scribbled(buffers[0])[:bite]], offset)

        def scribbled(buffer: memoryview) -> memoryview:
            buffer[:] = b"\0" * len(buffer)  # what was not returned must not be relied upon
            return buffer

        monkeypatch.setattr(os, "preadv", tearing)
        segments = [place(PAGE + 10, 9 * PAGE, 0, padded), place(SIZE - 2 * PAGE, 2 * PAGE, 12 * PAGE, padded)]
        slot = slot_of(16 * PAGE)
        read_all(reader, segments, slot)
        assert bytes(slot.view) == expected(segments, slot)
        assert len(torn) > 3

    def test_closed(self, data_file: Path) -> None:
        before = open_files(data_file)
        reader = self.make([data_file])
        pieces = reader.split(place(0, PAGE, 0, False), slot_of(PAGE))
        assert open_files(data_file) == before + self.descriptors
        reader.close()
        reader.close()
        assert open_files(data_file) == before
        with pytest.raises(Exception):  # noqa: B017, PT011 - any error will do, silence would not
            reader.read(pieces[0], slot_of(PAGE))


def open_files(path: Path) -> int:
    """How many descriptors of this process point to `path`."""
    n = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            n += os.readlink(f"/proc/self/fd/{fd}") == str(path)
        except OSError:
            continue
    return n


class DecodingReaderContract(BlockReaderContract):
    """What every reader into host memory must do besides."""

    @pytest.mark.parametrize(
        ("stored", "compute"),
        [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float64, torch.float16)],
    )
    @pytest.mark.parametrize("offset", [0, 3, 2 * PAGE - 7])
    def test_cast_codec(self, tmp_path: Path, stored: torch.dtype, compute: torch.dtype, offset: int) -> None:
        n = CHUNK // stored.itemsize + 1001  # cut between requests
        values = torch.randn(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(stored)
        path = tmp_path / "cast.bin"
        path.write_bytes(bytes(offset) + bytes(values.view(torch.uint8).numpy()))
        reader = self.make([path])
        try:
            slot = slot_of(n * compute.itemsize + 64)
            read_all(reader, [Segment(0, offset, n * stored.itemsize, 64, CastCodec(stored, compute))], slot)
            got = slot.tensor[64 : 64 + n * compute.itemsize].view(compute)
            assert torch.equal(got, values.to(compute))
            assert bytes(slot.view[:64]) == bytes([FILL] * 64)
        finally:
            reader.close()


class TestDirect(DecodingReaderContract):
    """Past the page cache, where the file system allows it."""

    def make(self, paths: Sequence[Path]) -> DirectReader:
        return DirectReader(paths)


class TestBuffered(DecodingReaderContract):
    """Through the page cache."""

    def make(self, paths: Sequence[Path]) -> DirectReader:
        return DirectReader(paths, direct=False)

    def test_says_so(self, data_file: Path) -> None:
        reader = self.make([data_file])
        assert reader.buffered
        assert not any(is_direct(f.fd) for f in reader._files)
        reader.close()


def kvikio_reader(paths: Sequence[Path], chunk: int = CHUNK) -> KvikioReader:
    """A reader over the stand-in for kvikio."""
    with pytest.MonkeyPatch.context() as m:
        fake_kvikio.install(m)
        return KvikioReader(paths, chunk)


class TestKvikio(BlockReaderContract):
    """Straight into "device" memory, with a stand-in for kvikio that reads into tensors on the CPU."""

    decodes = False
    descriptors = 2  # one is ours, to know the file by

    def make(self, paths: Sequence[Path]) -> KvikioReader:
        return kvikio_reader(paths)

    def test_a_codec_needs_the_host(self, data_file: Path) -> None:
        reader = self.make([data_file])
        with pytest.raises(ValueError, match="decoded"):
            reader.split(place(0, 100, 0, False, Invert()), slot_of(PAGE))
        reader.close()

    def test_requests_are_cut_into_tasks(self, data_file: Path) -> None:
        fake_kvikio.calls.clear()
        reader = kvikio_reader([data_file], 4 * CHUNK)
        slot = slot_of(SIZE)
        segment = place(0, SIZE, 0, True)
        (piece,) = reader.split(segment, slot)
        assert reader.read(piece, slot) == page_up(SIZE)
        assert bytes(slot.view) == expected([segment], slot)
        assert fake_kvikio.calls == [(SIZE, 0, CHUNK)]
        assert fake_kvikio.settings["num_threads"] >= 4
        assert fake_kvikio.settings["bounce_buffer_size"] <= CHUNK, "host memory for each of its threads"
        reader.close()

    @pytest.mark.parametrize("short", [0, 1, PAGE])
    def test_a_short_read_is_a_file_that_ends(
        self, data_file: Path, monkeypatch: pytest.MonkeyPatch, short: int
    ) -> None:
        reader = self.make([data_file])
        monkeypatch.setattr(fake_kvikio.Future, "get", lambda future: short)
        slot = slot_of(4 * PAGE)
        with pytest.raises(ReadError, match=rf"data\.bin ends at byte {PAGE + short} where {3 * PAGE} are needed"):
            reader.read(reader.split(place(PAGE, 2 * PAGE, 0, True), slot)[0], slot)
        reader.close()

    def test_a_file_kvikio_cannot_open_is_named(self, data_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refusing(path: Path, flags: str) -> None:
            raise RuntimeError("cuFile driver:\n not today")

        monkeypatch.setattr(fake_kvikio, "CuFile", refusing)
        with pytest.raises(ReadError, match=r"data\.bin.*device memory.*not today") as e:
            self.make([data_file])
        assert "\n" not in str(e.value)
        assert open_files(data_file) == 0


class RefusedAtOpen(DirectReader):
    """O_DIRECT is refused when the file is opened (tmpfs of older kernels, some overlays)."""

    def __init__(self, paths: Sequence[Path]) -> None:
        def refusing(path: Path, flags: int, *args: int) -> int:
            if flags & os.O_DIRECT and path.exists():
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return OPEN(path, flags, *args)

        with pytest.MonkeyPatch.context() as m:
            m.setattr(os, "open", refusing)
            super().__init__(paths)
        assert self.buffered or not paths


class TestRefusedAtOpen(DecodingReaderContract):
    """A file system that knows nothing of O_DIRECT."""

    def make(self, paths: Sequence[Path]) -> DirectReader:
        return RefusedAtOpen(paths)


def refuse_direct_reads(monkeypatch: pytest.MonkeyPatch, before: Callable[[], None] = lambda: None) -> None:
    """From now on a read through a descriptor opened with O_DIRECT is EINVAL."""

    def refusing(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if is_direct(fd):
            before()
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return PREADV(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", refusing)


@pytest.fixture
def direct_file(tmp_path: Path) -> Path:
    path = tmp_path / "own.bin"
    path.write_bytes(DATA)
    reader = DirectReader([path])
    buffered = reader.buffered
    reader.close()
    if buffered:
        pytest.skip("this file system refuses O_DIRECT when opening")
    return path


def test_refused_at_the_first_read(direct_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_direct_reads(monkeypatch)
    reader = DirectReader([direct_file])
    assert not reader.buffered
    segments = [place(PAGE + 5, CHUNK, 0, True), place(17, 5000, CHUNK + 4 * PAGE, False)]
    slot = slot_of(SIZE)
    fetch(reader, segments, slot)
    assert bytes(slot.view) == expected(segments, slot)
    assert reader.buffered
    assert open_files(direct_file) == 1
    reader.close()
    assert open_files(direct_file) == 0


def test_refused_at_the_first_read_of_two_threads_at_once(direct_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread has gone over to buffered reads while the other's refused request was still on its way back."""
    reader = DirectReader([direct_file])
    both = threading.Barrier(2, timeout=5)
    first = threading.Lock()

    def before() -> None:
        both.wait()  # both requests are out before either is refused
        if not first.acquire(blocking=False):
            until = time.monotonic() + 5
            while not reader.buffered and time.monotonic() < until:
                time.sleep(0.001)

    refuse_direct_reads(monkeypatch, before)
    segments = [place(0, PAGE, 0, True), place(2 * PAGE, PAGE, 2 * PAGE, True)]
    slot = slot_of(4 * PAGE)
    try:
        fetch(reader, segments, slot)
        assert bytes(slot.view) == expected(segments, slot)
    finally:
        reader.close()


@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_refused_at_the_first_read_of_a_file_that_is_gone(
    direct_file: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Going over to buffered reads opens the path again: it must still be the same file."""
    reader = DirectReader([direct_file])
    refuse_direct_reads(monkeypatch)
    slot = slot_of(PAGE)
    piece = reader.split(place(0, PAGE, 0, True), slot)[0]
    direct_file.unlink()
    if change == "replaced":
        direct_file.write_bytes(DATA)
    with pytest.raises(ReadError, match=r"own\.bin"):
        reader.read(piece, slot)
    reader.close()


def test_other_refusals_are_no_reason_to_fall_back(data_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(path: Path, flags: int, *args: int) -> int:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(ReadError, match=r"data\.bin.*Permission denied"):
        DirectReader([data_file])

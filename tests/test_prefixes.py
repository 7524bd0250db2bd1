"""The tree of prefixes on disk: what is found is what was stored, or nothing, whatever happened to the files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvstore import NODE_TOKENS, Match, PrefixStore, Segment
from kvstore import nodes as node_files
from tiers import DamagedError, GoneError, StoreError, StoreFull

LAYERS = 2


def segment(tokens: Sequence[int], before: Sequence[int] = ()) -> Segment:
    """KV that depend on all tokens up to each, as real ones do."""
    sums = torch.tensor([sum(before) * 3 + sum(tokens[: i + 1]) for i in range(len(tokens))], dtype=torch.float32)
    base = sums[None, :, None] + torch.arange(4) / 8
    layers = (*[(base + i, -base.expand(2, -1, -1)) for i in range(LAYERS)], None)
    return Segment(tuple(tokens), layers, {})


def with_state(s: Segment, value: float) -> Segment:
    return Segment(s.tokens, s.layers, {"s": torch.tensor([value], dtype=torch.float32)})


def assert_same(a: Segment, b: Segment) -> None:
    assert a.tokens == b.tokens
    assert len(a.layers) == len(b.layers)
    for x, y in zip(a.layers, b.layers, strict=True):
        assert (x is None) == (y is None)
        if x is not None and y is not None:
            for t, u in zip(x, y, strict=True):
                assert t.dtype == u.dtype
                assert torch.equal(t, u)
    assert a.states.keys() == b.states.keys()
    for key, t in a.states.items():
        assert t.dtype == b.states[key].dtype
        assert torch.equal(t, b.states[key])


def open_store(folder: Path, **options: Any) -> PrefixStore:
    return PrefixStore(folder, options.pop("fingerprint", "model"), options.pop("arithmetic", "float32"), **options)


def store_all(store: PrefixStore, tokens: Sequence[int], step: int = NODE_TOKENS) -> str:
    """Store `tokens` in runs of `step`."""
    parent: str | None = None
    for at in range(0, len(tokens), step):
        parent = store.append(parent, segment(tokens[at : at + step], tokens[:at]))
    assert parent is not None
    return parent


def read_all(store: PrefixStore, match: Match) -> list[int]:
    """The tokens that can be read, each piece compared with what was stored."""
    found: list[int] = []
    for piece in store.read_chain(match):
        assert_same(Segment(piece.tokens, piece.layers, {}), segment(piece.tokens, found))
        found += piece.tokens
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


def the_file(folder: Path) -> Path:
    (found,) = folder.glob("*.kv")
    return found


# what is stored comes back


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.uint8])
def test_tensors_come_back_to_the_bit(folder: Path, dtype: torch.dtype) -> None:
    n = 5
    bits = torch.randint(0, 256, (3, n, 7 * dtype.itemsize), dtype=torch.uint8)
    keys = bits.view(dtype)
    values = (
        bits.flip(0)[..., : 3 * dtype.itemsize].contiguous().view(dtype).transpose(0, 1).contiguous().transpose(0, 1)
    )
    assert not values.is_contiguous()
    stored = Segment(tuple(range(n)), ((keys, values), None, (values, keys)),
                     {"conv": keys[0], "one": keys[0, 0, 0], "none": keys[:0]})  # fmt: skip
    name = open_store(folder).append(None, stored)
    found = open_store(folder).read(name)
    assert found.tokens == stored.tokens
    assert found.layers[1] is None
    for a, b in [*zip(stored.layers[0] or (), found.layers[0] or (), strict=True),
                 *zip(stored.layers[2] or (), found.layers[2] or (), strict=True),
                 *((stored.states[k], found.states[k]) for k in stored.states)]:  # fmt: skip
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.contiguous().reshape(-1).view(torch.uint8).equal(b.contiguous().reshape(-1).view(torch.uint8))
    assert list(found.states) == ["conv", "one", "none"]


def test_a_node_is_usable_in_part_and_then_has_no_states(folder: Path) -> None:
    store = open_store(folder)
    name = store.append(None, with_state(segment(range(10)), 45))
    assert_same(store.read(name, 4), segment(range(4)))
    assert store.read(name, 10).states["s"].item() == 45
    assert_same(store.read(name, 99), with_state(segment(range(10)), 45))


def test_a_large_header_is_read_whole(folder: Path) -> None:
    pair = (torch.ones(1, 1, 1), torch.zeros(1, 1, 1))
    stored = Segment((7,), (pair,) * 2000, {})
    name = open_store(folder).append(None, stored)
    assert_same(open_store(folder).read(name), stored)


@pytest.mark.parametrize("bad", [
    Segment((), (), {}),
    Segment(tuple(range(NODE_TOKENS + 1)), (), {}),
    Segment((-1,), (), {}),
    Segment((1 << 31,), (), {}),
    Segment((1, 2), ((torch.ones(1, 3, 1), torch.ones(1, 2, 1)),), {}),
    Segment((1,), ((torch.ones(1, 1), torch.ones(1, 1)),), {}),
    Segment((1,), (), {"s": torch.ones(1, dtype=torch.float64)}),
])  # fmt: skip
def test_what_is_no_node_is_refused(folder: Path, bad: Segment) -> None:
    with pytest.raises(ValueError, match=r"token|shape|stored"):
        open_store(folder).append(None, bad)
    assert not list(folder.glob("*.kv"))


def test_equal_prefixes_are_stored_once(folder: Path) -> None:
    store, other = open_store(folder), open_store(folder)
    a = store_all(store, [*range(600), 1, 2])
    b = store_all(other, [*range(600), 3, 4])
    assert a != b
    # two full nodes in common; the last ones begin alike and part in the middle
    assert len(list(folder.glob("*.kv"))) == 4
    before = the_inodes(folder)
    assert store_all(store, [*range(600), 1, 2]) == a
    assert the_inodes(folder) == before


def the_inodes(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_ino for p in folder.glob("*.kv")}


def test_other_models_and_arithmetics_are_not_found(folder: Path) -> None:
    store_all(open_store(folder), range(20))
    for other in (open_store(folder, fingerprint="other"), open_store(folder, arithmetic="bfloat16")):
        assert other.match(range(20)) == Match((), 0, 0, 0)
        name = open_store(folder).match(range(20)).chain[0][0]
        with pytest.raises(DamagedError, match="another model"):
            other.read(name)
    assert open_store(folder).match(range(20)).length == 20


# finding


def test_match_is_exact_to_the_token_and_over_all_branches(folder: Path) -> None:
    store = open_store(folder)
    whole = list(range(100))
    first = store.append(None, segment(whole[:10]))
    long = store.append(None, segment(whole[:25]))
    second = store.append(first, segment(whole[10:30], whole[:10]))
    store.append(first, segment([*whole[10:14], 7, 7], whole[:10]))
    assert store.match([]).chain == ()
    assert store.match([5]).chain == ()
    assert store.match(whole).chain == ((first, 10), (second, 20))
    assert store.match([*whole[:27], 5]).chain == ((first, 10), (second, 17))
    assert store.match([*whole[:5], 99]).length == 5
    assert store.match([*whole[:14], 7, 7, 7]).length == 16
    assert store.chain(second) == store.match(whole[:30])
    assert store.chain("0" * 56) is None
    assert store.tokens(store.match([*whole[:27], 5])) == whole[:27]
    assert store.match(whole[:25]).length == 25
    assert store.read(long).tokens == tuple(whole[:25])


def test_states_are_good_only_after_whole_nodes(folder: Path) -> None:
    store = open_store(folder)
    whole = list(range(100))
    a = store.append(None, with_state(segment(whole[:10]), 1))
    b = store.append(a, segment(whole[10:30], whole[:10]))
    c = store.append(a, with_state(segment(whole[10:20], whole[:10]), 2))
    match = store.match(whole)
    assert (match.chain, match.length, match.state_length) == (((a, 10), (b, 20)), 30, 10)
    match = store.match(whole, needs_states=True)
    assert (match.chain, match.length, match.state_length) == (((a, 10), (c, 10)), 20, 20)
    assert store.match(whole[:19], needs_states=True).chain == ((a, 10),)
    assert store.match(whole[:9], needs_states=True) == Match((), 0, 0, 0)
    assert store.match(whole[:19]).state_length == 10


def test_what_another_process_stores_is_found_and_what_it_frees_is_not(folder: Path) -> None:
    ours, theirs = open_store(folder), open_store(folder)
    assert ours.match(range(5)).length == 0
    store_all(theirs, range(5))
    assert ours.match(range(5)).length == 5
    assert theirs.prune(0) > 0
    assert ours.match(range(5)).length == 0


# adding


def test_extend_stores_what_is_missing_in_full_nodes(folder: Path) -> None:
    store = open_store(folder)
    tokens = list(range(1000))
    asked: list[tuple[int, int]] = []

    def take(begin: int, end: int) -> Segment:
        asked.append((begin, end))
        return segment(tokens[begin:end], tokens[:begin])

    assert store.extend([], take) is None
    store.extend(tokens[:300], take)
    assert asked == [(0, 256), (256, 300)]
    asked.clear()
    head = store.extend(tokens[:600], take)
    assert asked == [(256, 512), (512, 600)]  # the short node is written again, longer
    asked.clear()
    assert store.extend(tokens[:600], take) == head
    assert asked == []
    assert head is not None
    chain = store.chain(head)
    assert chain is not None
    assert chain.length == 600
    assert read_all(store, chain) == tokens[:600]


def test_extend_begins_again_if_another_process_frees_the_chain(folder: Path) -> None:
    store, other = open_store(folder), open_store(folder)
    tokens = list(range(600))
    pruned = []

    def take(begin: int, end: int) -> Segment:
        if begin and not pruned:
            pruned.append(other.prune(0))
        return segment(tokens[begin:end], tokens[:begin])

    head = store.extend(tokens, take)
    assert pruned
    assert head is not None
    chain = open_store(folder).chain(head)
    assert chain is not None
    assert read_all(store, chain) == tokens


def test_a_parent_that_is_gone_is_told(folder: Path) -> None:
    store = open_store(folder)
    first = store.append(None, segment([1, 2]))
    open_store(folder).prune(0)
    with pytest.raises(GoneError, match="not there any more"):
        store.append(first, segment([3], [1, 2]))
    assert not [p for p in folder.iterdir() if p.name != ".lock"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_and_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    store = open_store(folder)
    first = store.append(None, segment([1]))
    real, wrote = os.write, []

    def write(fd: int, data: Any) -> int:
        if wrote:
            raise OSError(code, os.strerror(code))
        wrote.append(real(fd, data[: len(data) // 2]))
        return wrote[0]

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(StoreFull, match=r"no space left.*sessions prune.*--spill-dir") as e:
            store.append(first, segment([2], [1]))
    assert str(folder) in str(e.value)
    assert [p.name for p in folder.iterdir() if p.name != ".lock"] == [f"{first}.kv"]
    store.append(first, segment([2], [1]))
    assert read_all(store, store.match([1, 2, 3])) == [1, 2]


@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS, errno.EACCES])
def test_a_failing_disk_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    store = open_store(folder)

    def fail(fd: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoreError, match=os.strerror(code)):
        store.append(None, segment([1]))
    assert [p.name for p in folder.iterdir() if p.name != ".lock"] == []


# freeing


def aged(folder: Path, name: str, seconds_ago: int) -> None:
    when = time.time() - seconds_ago
    os.utime(folder / f"{name}.kv", (when, when))


def test_prune_takes_the_least_recently_used_leaves_first(folder: Path) -> None:
    store = open_store(folder)
    trunk = store.append(None, segment([1]))
    old = store.append(trunk, segment([2], [1]))
    new = store.append(trunk, segment([3], [1]))
    size = (folder / f"{old}.kv").stat().st_size
    for name, seconds in ((trunk, 90), (old, 50), (new, 30)):
        aged(folder, name, seconds)
    assert store.prune(2 * size) == size
    assert {p.stem for p in folder.glob("*.kv")} == {trunk, new}
    other = store.append(None, segment([9]))
    for name, seconds in ((trunk, 90), (new, 30), (other, 60)):
        aged(folder, name, seconds)
    store.read(other)  # used now
    assert store.prune(2 * size) == size
    assert {p.stem for p in folder.glob("*.kv")} == {trunk, other}
    assert store.prune(2 * size) == 0


def test_prune_keeps_what_is_pinned_and_all_before_it(folder: Path) -> None:
    store = open_store(folder)
    head = store_all(store, range(600))
    stray = store_all(store, [*range(300), 1])
    size = (folder / f"{stray}.kv").stat().st_size
    pinned = open_store(folder, pinned=lambda: [head, "f" * 56])
    assert pinned.prune(0) == size
    assert store.match(range(600)).length == 600
    assert store.prune(0) > 0
    assert not list(folder.glob("*.kv"))


def test_a_limit_is_kept_by_pruning_and_told_when_it_cannot_be(folder: Path) -> None:
    size = node_size()
    heads: list[str] = []
    store = open_store(folder, limit=3 * size, pinned=lambda: heads)
    for i in range(8):
        name = store.append(None, segment([i]))
        assert sum(p.stat().st_size for p in folder.glob("*.kv")) <= 3 * size
        assert store.match([i]).length == 1
    heads.append(name)
    child = store.append(name, segment([1], [7]))
    heads.append(store.append(child, segment([2], [7, 1])))
    with pytest.raises(StoreFull, match=r"sessions rm.*--disk"):
        store.append(None, segment([50]))
    assert store.match([7, 1, 2]).length == 3
    with pytest.raises(StoreFull):
        open_store(folder, limit=size - 1, fingerprint="other").append(None, segment([50]))


def test_a_limit_counts_other_models_and_keeps_the_chain_that_is_added_to(folder: Path) -> None:
    size = node_size()
    open_store(folder, fingerprint="other").append(None, segment([1]))
    store = open_store(folder, limit=2 * size)
    first = store.append(None, segment([1]))
    aged(folder, first, 1000)
    store.append(first, segment([2], [1]))
    assert store.match([1, 2]).length == 2
    assert open_store(folder, fingerprint="other").match([1]).length == 0


def node_size() -> int:
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(Path(folder) / "s")
        return (Path(folder) / "s" / f"{store.append(None, segment([1]))}.kv").stat().st_size


def test_orphans_are_never_found_and_pruned_first(folder: Path) -> None:
    store = open_store(folder)
    head = store_all(store, range(600))
    good = store.append(None, segment([9]))
    match = store.match(range(600))
    (folder / f"{match.chain[1][0]}.kv").unlink()
    assert store.match(range(600)).length == 256
    assert store.chain(head) is None
    freed = (folder / f"{head}.kv").stat().st_size
    assert store.prune(1 << 40) == freed
    assert {p.stem for p in folder.glob("*.kv")} == {match.chain[0][0], good}


# damage


def flipped(raw: bytes, at: int, bit: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ (1 << bit)]) + raw[at + 1 :]


def check_refused(folder: Path, name: str, what: object = "") -> None:
    """The node is not read, and as good as not there for whoever looks for its tokens."""
    fresh = open_store(folder)
    with pytest.raises(DamagedError):
        fresh.read(name)
    assert fresh.match([1, 2, 3]).length == 0, what
    looked = open_store(folder)
    assert list(looked.read_chain(looked.match([1, 2, 3]))) == [], what


def test_every_flipped_bit_is_noticed(folder: Path) -> None:
    name = open_store(folder).append(None, with_state(segment([1, 2, 3]), 6))
    path = the_file(folder)
    raw = path.read_bytes()
    header = 1 + max(i for i, b in enumerate(raw[: node_files.PAGE]) if b)  # then there is padding
    rng = random.Random(0)
    padding = [*rng.sample(range(header, node_files.PAGE), 200), header, node_files.PAGE - 1]
    for at in [*range(header), *padding, *range(node_files.PAGE, len(raw))]:
        with path.open("r+b") as f:
            f.seek(at)
            f.write(flipped(raw, at, rng.randrange(8))[at : at + 1])
        check_refused(folder, name, at)
        path.write_bytes(raw)
    assert open_store(folder).read(name).tokens == (1, 2, 3)


def test_every_truncation_is_noticed_and_so_is_what_is_appended(folder: Path) -> None:
    name = open_store(folder).append(None, segment([1, 2, 3]))
    path = the_file(folder)
    raw = path.read_bytes()
    for length in [0, 1, 23, 24, 55, 56, 100, 4095, 4096, 4097, len(raw) - 1]:
        path.write_bytes(raw[:length])
        check_refused(folder, name, length)
    for more in (b"\0", bytes(64), raw):
        path.write_bytes(raw + more)
        check_refused(folder, name)


def _huge_header(raw: bytes) -> bytes:
    return raw[:12] + struct.pack("<I", 0xFFFFFFFF) + raw[16:]


def _huge_file(raw: bytes) -> bytes:
    return raw[:16] + struct.pack("<Q", 1 << 62) + raw[24:]


def _newer(raw: bytes) -> bytes:
    return raw[:8] + struct.pack("<I", 2) + raw[12:]


def _signed(text: bytes) -> Callable[[bytes], bytes]:
    """A file whose header says `text`, with a right checksum: as a hostile writer would have it."""

    def make(raw: bytes) -> bytes:
        body = text + bytes(-(56 + len(text)) % 4096)
        prefix = struct.pack("<8sIIQ", raw[:8], 1, len(text), 56 + len(body))
        return prefix + hashlib.sha256(prefix + body).digest() + body

    return make


@pytest.mark.parametrize("make", [
    lambda raw: b"", lambda raw: b"hello", lambda raw: b"\x93NUMPY" + bytes(5000), lambda raw: raw[::-1],
    _huge_header, _huge_file, _newer, _signed(b"{}"), _signed(b"[" * 3000), _signed(b"\xff\xfe"), _signed(b"null"),
    _signed(b'{"root":1,"parent":null,"tokens":[1,2,3],"layers":[],"states":[]}'),
    _signed(b'{"root":"' + b"0" * 64 + b'","parent":null,"tokens":[1,2,3],"layers":[],"states":[]}'),
    _signed(b'{"root":"' + b"0" * 64 + b'","parent":null,"tokens":[1,2,3],"layers":'
            b'[[0,["float32",[1,3,4611686018427387904]],["float32",[1,3,1]]]],"states":[]}'),
    _signed(b'{"root":"' + b"0" * 64 + b'","parent":null,"tokens":"123","layers":7,"states":[]}'),
    _signed(b'{"root":"' + b"0" * 64 + b'","parent":null,"tokens":[1e400],"layers":[],'
            b'"states":[["s",0,["object",[1]]]]}'),
])  # fmt: skip
def test_foreign_files_are_ignored_and_pruned(folder: Path, make: Callable[[bytes], bytes]) -> None:
    store = open_store(folder)
    name = store.append(None, segment([1, 2, 3]))
    good = store.append(None, segment([4]))
    path = folder / f"{name}.kv"
    path.write_bytes(make(path.read_bytes()))
    check_refused(folder, name)
    store.prune(1 << 40)
    assert {p.stem for p in folder.glob("*.kv")} == {good}


@pytest.mark.parametrize("shape", [[1, 3, 1 << 40], [1 << 20, 3, 4], [1, 3, 8], [1, 3, 0]])
def test_shapes_that_do_not_fill_the_file_are_refused(folder: Path, shape: list[int]) -> None:
    """Whoever can sign a header cannot make us take memory for what is not there, or read past the end."""
    name = open_store(folder).append(None, segment([1, 2, 3]))
    path = the_file(folder)
    raw = path.read_bytes()
    length = struct.unpack_from("<I", raw, 12)[0]
    header = json.loads(raw[56 : 56 + length])
    header["layers"][0][1][1] = shape
    text = json.dumps(header, separators=(",", ":")).encode()
    body = text + bytes(4096 - 56 - len(text))
    prefix = raw[:12] + struct.pack("<I", len(text)) + raw[16:24]
    path.write_bytes(prefix + hashlib.sha256(prefix + body).digest() + body + raw[4096:])
    assert open_store(folder).match([1, 2, 3]).length == 0
    check_refused(folder, name)


def test_no_more_of_a_header_is_read_than_one_can_have(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = open_store(folder).append(None, segment([1, 2, 3]))
    path = the_file(folder)
    raw = path.read_bytes()
    path.write_bytes(raw[:12] + struct.pack("<IQ", 1 << 30, 6 << 30) + raw[24:])
    with path.open("r+b") as f:
        f.truncate(6 << 30)  # sparse
    real = os.pread

    def pread(fd: int, n: int, at: int) -> bytes:
        assert n <= 2 * node_files.MAX_HEADER
        return real(fd, n, at)

    monkeypatch.setattr(os, "pread", pread)
    check_refused(folder, name)


def _link(path: Path) -> None:
    path.rename(path.with_suffix(".real"))
    path.symlink_to(path.with_suffix(".real"))


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_link, "is a link"),
        (_dangling, "is a link"),
        (_pipe, "not a plain file"),
        (_folder, "not a plain file"),
        (lambda p: p.chmod(0o620), "others may write it"),
        (lambda p: p.chmod(0o602), "others may write it"),
    ],
)
def test_what_is_not_a_private_file_is_refused(folder: Path, change: Callable[[Path], None], says: str) -> None:
    name = open_store(folder).append(None, segment([1, 2, 3]))
    change(the_file(folder))
    with pytest.raises(DamagedError, match=says):
        open_store(folder).read(name)
    check_refused(folder, name)
    open_store(folder).prune(0)  # whatever it is: no traceback


def test_anothers_file_and_folder_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(folder)
    name = store.append(None, segment([1, 2, 3]))
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.raises(DamagedError, match="belongs to another user"):
        store.read(name)
    with pytest.raises(StoreError, match="belongs to another user"):
        open_store(folder)


def test_the_folder_is_private(folder: Path) -> None:
    store = open_store(folder)
    store.append(None, segment([1]))
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {0o600}
    for mode in (0o770, 0o707, 0o777):
        folder.chmod(mode)
        with pytest.raises(StoreError, match="chmod 700"):
            open_store(folder)
    file = folder.parent / "file"
    file.write_text("")
    with pytest.raises(StoreError, match="file"):
        open_store(file)


def test_a_node_under_anothers_name_is_not_believed(folder: Path) -> None:
    store = open_store(folder)
    a, b = store.append(None, segment([1, 2, 3])), store.append(None, segment([4, 5, 6]))
    shutil.copy(folder / f"{b}.kv", folder / f"{a}.kv")
    with pytest.raises(DamagedError, match="another node's"):
        open_store(folder).read(a)


def test_damage_is_written_over_by_the_next_append(folder: Path) -> None:
    store = open_store(folder)
    tokens = list(range(700))
    head = store_all(store, tokens)
    middle = store.match(tokens).chain[1][0]
    path = folder / f"{middle}.kv"
    path.write_bytes(flipped(path.read_bytes(), path.stat().st_size - 1, 3))
    assert read_all(store, store.match(tokens)) == tokens[:256]  # noticed while reading: it ends before
    assert store.match(tokens).length == 256  # and is remembered
    assert store_all(store, tokens) == head
    assert read_all(store, store.match(tokens)) == tokens
    assert read_all(open_store(folder), open_store(folder).match(tokens)) == tokens


def test_a_chain_ends_where_another_process_freed_it(folder: Path) -> None:
    store = open_store(folder)
    tokens = list(range(1500))
    store_all(store, tokens)
    match = store.match(tokens)
    (folder / f"{match.chain[3][0]}.kv").unlink()
    assert read_all(store, match) == tokens[: 3 * 256]
    with pytest.raises(GoneError):
        store.read(match.chain[3][0])


def test_read_ahead_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(folder)
    tokens = list(range(2000))
    store_all(store, tokens)
    match = store.match(tokens)
    real, begun = store.read, []

    def read(name: str, upto: int | None = None) -> Segment:
        begun.append(name)
        return real(name, upto)

    monkeypatch.setattr(store, "read", read)
    one = (folder / f"{match.chain[0][0]}.kv").stat().st_size
    for nodes, at_once in ((0, 1), (1, 1), (3, 3), (99, 8)):
        begun.clear()
        for i, _ in enumerate(store.read_chain(match, ahead=nodes * one)):
            time.sleep(0.005)
            assert len(begun) <= i + at_once
        assert len(begun) == len(match.chain)
    early = store.read_chain(match)
    next(early)
    early.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name.startswith("kv-read")]


# crashes


def test_what_dead_writers_left_goes_and_what_living_ones_write_stays(folder: Path) -> None:
    open_store(folder)
    code = "import sys, time; from pathlib import Path; from kvstore.files import Temporary\n" \
           "t = Temporary(Path(sys.argv[1])); t.write([b'x' * 100])\n" \
           "print('there', flush=True); time.sleep(600)"  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE,
                          cwd=Path(__file__).parent.parent) as writer:  # fmt: skip
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"there\n"
        (left,) = folder.glob(".*.tmp")
        store = open_store(folder)
        assert store.prune(0) == 0
        assert left.exists()
        writer.kill()
        writer.wait()
    assert left.exists()
    assert store.prune(0) == 100
    assert not left.exists()
    left.write_bytes(b"x")
    open_store(folder)
    assert not left.exists()


def test_a_temporary_file_that_was_taken_for_dead_is_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    store = open_store(folder)
    real, taken = fcntl.flock, []

    def flock(fd: int, how: int) -> None:
        found = [p for p in folder.glob(".*.tmp") if not taken]
        if found:  # between being made and being locked
            taken.append(found[0])
            found[0].unlink()
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    store.append(None, segment([1]))
    assert taken
    assert read_all(store, store.match([1])) == [1]


def test_many_at_once(folder: Path) -> None:
    """Threads that store, read and prune the same tokens: what is read is right, and nobody sees an exception."""
    tokens = list(range(40))
    stop = time.monotonic() + 1.5
    failed: list[BaseException] = []
    read = [0]

    def work(what: Callable[[PrefixStore, random.Random], None], seed: int) -> None:
        rng = random.Random(seed)
        store = open_store(folder)
        try:
            while time.monotonic() < stop:
                what(store, rng)
        except BaseException as e:
            failed.append(e)

    def write(store: PrefixStore, rng: random.Random) -> None:
        parent, at = None, 0
        try:
            while at < len(tokens):
                end = min(len(tokens), at + rng.choice([5, 10, 20]))
                parent = store.append(parent, segment(tokens[at:end], tokens[:at]))
                at = end
        except GoneError:
            pass

    def look(store: PrefixStore, rng: random.Random) -> None:
        match = store.match(tokens)
        found = read_all(store, match)
        assert found == tokens[: len(found)]
        read[0] += len(found)

    def free(store: PrefixStore, rng: random.Random) -> None:
        store.prune(rng.choice([0, 3, 6]) * 5000)
        time.sleep(0.01)

    threads = [threading.Thread(target=work, args=(what, i)) for i, what in enumerate([write, write, look, look, free])]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed, failed
    assert read[0]
    store = open_store(folder)
    names = {p.stem for p in folder.glob("*.kv")}
    assert all(store.chain(n) is not None for n in names)  # no orphan came about


# against a plain model

token_st = st.integers(0, 2)  # few, so that sequences meet
run_st = st.lists(token_st, min_size=1, max_size=5)


class Tree(RuleBasedStateMachine):
    """The store, opened twice, against a dict of what was stored."""

    def __init__(self) -> None:
        super().__init__()
        self.held = tempfile.TemporaryDirectory()
        self.folder = Path(self.held.name) / "store"
        self.pinned: set[str] = set()
        # name -> (all tokens up to its end, how many are its own, parent, has states)
        self.model: dict[str, tuple[tuple[int, ...], int, str | None, bool]] = {}

    @initialize()
    def begin(self) -> None:
        self.stores = [open_store(self.folder, pinned=lambda: self.pinned) for _ in range(2)]

    def pick(self, data: st.DataObject) -> str | None:
        return data.draw(st.sampled_from([None, *sorted(self.model)]))

    @rule(data=st.data(), run=run_st, who=st.integers(0, 1), states=st.booleans())
    def append(self, data: st.DataObject, run: list[int], who: int, states: bool) -> None:
        parent = self.pick(data)
        before = self.model[parent][0] if parent is not None else ()
        made = segment(run, before)
        name = self.stores[who].append(parent, with_state(made, sum(before) + sum(run)) if states else made)
        whole = (*before, *run)
        if name in self.model:
            assert self.model[name][:3] == (whole, len(run), parent)
        else:
            self.model[name] = (whole, len(run), parent, states)

    @rule(data=st.data(), who=st.integers(0, 1))
    def pin(self, data: st.DataObject, who: int) -> None:
        name = self.pick(data)
        if name is None:
            self.pinned.clear()
        else:
            self.pinned.add(name)

    @rule(who=st.integers(0, 1), share=st.sampled_from([0, 1, 2, 4]))
    def prune(self, who: int, share: int) -> None:
        before = {p.stem: p.stat().st_size for p in self.folder.glob("*.kv")}
        limit = sum(before.values()) * share // 4
        freed = self.stores[who].prune(limit)
        after = {p.stem: p.stat().st_size for p in self.folder.glob("*.kv")}
        assert sum(before.values()) - sum(after.values()) == freed
        needed = {n for head in self.pinned for n in self.ancestors(head)}
        assert needed <= after.keys()
        assert sum(after.values()) <= limit or after.keys() == needed
        gone = before.keys() - after.keys()
        # no more than needed: without the last one it would have been too much
        assert not gone or sum(after.values()) + max(before[n] for n in gone) > limit
        for name in gone:
            del self.model[name]

    @rule(tokens=st.lists(token_st, max_size=14), who=st.integers(0, 1), needs=st.booleans())
    def match(self, tokens: list[int], who: int, needs: bool) -> None:
        best = 0
        for whole, own, _, states in self.model.values():
            before = len(whole) - own
            same = max(n for n in range(len(tokens) + 1) if whole[:n] == tuple(tokens[:n]))
            if needs:
                best = max(best, len(whole) if states and same == len(whole) else 0)
            elif same >= before:
                best = max(best, same)
        store = self.stores[who]
        match = store.match(tokens, needs_states=needs)
        assert match.length == best
        assert not needs or match.state_length == best
        assert store.tokens(match) == tokens[:best]
        found: list[int] = []
        last: Segment | None = None
        for last in store.read_chain(match):
            assert_same(Segment(last.tokens, last.layers, {}), segment(last.tokens, found))
            found += last.tokens
        assert found == tokens[:best]
        assert not needs or last is None or last.states["s"].item() == sum(tokens[:best])
        parent = None
        for name, _ in match.chain:
            assert self.model[name][2] == parent
            parent = name

    def ancestors(self, name: str | None) -> Iterator[str]:
        while name is not None and name in self.model:
            yield name
            name = self.model[name][2]

    @invariant()
    def the_folder_is_the_model(self) -> None:
        assert {p.stem for p in self.folder.glob("*.kv")} == self.model.keys()
        assert all(parent is None or parent in self.model for _, _, parent, _ in self.model.values())
        self.pinned &= self.model.keys()

    def teardown(self) -> None:
        self.held.cleanup()


TestTree = Tree.TestCase
TestTree.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)

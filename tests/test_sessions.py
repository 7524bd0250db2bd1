"""Conversations on disk, and the command that shows and removes them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.main import main
from kvstore import Segment, Session, Sessions
from kvstore import sessions as sessions_module
from tiers import DamagedError, GoneError, StoreError, StoreFull, UsageError
from tiers.folders import sessions_folder

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import session_crash  # noqa: E402

SAID = [{"role": "user", "content": "Grüß Gott \ud83e\udd80 \udc80"}, {"role": "assistant", "content": "line\nline"}]


def make(name: str = "talk", **changed: Any) -> Session:
    return Session(**{"name": name, "model": "demo-moe", "fingerprint": "f", "arithmetic": "float32",
                      "tokens": [1, 2, 3], "messages": [dict(m) for m in SAID], **changed})  # fmt: skip


def segment(tokens: list[int]) -> Segment:
    kv = torch.tensor(tokens, dtype=torch.float32)[None, :, None]
    return Segment(tuple(tokens), ((kv, -kv),), {})


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This test's own folder of conversations, as commands find it."""
    monkeypatch.setenv("OFFLOAD_HOME", str(tmp_path))
    return tmp_path / "sessions"


def test_the_folder_is_the_users_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sessions_folder() == Path(os.environ["OFFLOAD_HOME"]) / "sessions"  # of this suite, never the user's
    monkeypatch.delenv("OFFLOAD_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert sessions_folder() == Path("/data/offload/sessions")
    monkeypatch.delenv("XDG_DATA_HOME")
    assert sessions_folder() == Path.home() / ".local/share/offload/sessions"


def test_a_conversation_comes_back(home: Path) -> None:
    sessions = Sessions()
    assert sessions.load("talk") is None
    with pytest.raises(GoneError, match="no conversation 'talk'"):
        sessions.get("talk")
    session = make(head="0" * 56)
    sessions.save(session)
    assert Sessions().load("talk") == session
    assert session.created == session.updated
    assert session.created.endswith("+00:00")
    created = session.created
    session.tokens.append(4)
    sessions.save(session)
    again = Sessions().get("talk")
    assert (again.tokens, again.created) == ([1, 2, 3, 4], created)
    assert home.stat().st_mode & 0o777 == 0o700
    assert [(p.name, p.stat().st_mode & 0o777) for p in home.iterdir()] == [("talk.session", 0o600)]


@pytest.mark.parametrize("name", ["a", "A.b_c-9", "x" * 64, "a.session", "-x"])
def test_good_names(home: Path, name: str) -> None:
    Sessions().save(make(name))
    assert [s.name for s in Sessions().list()] == [name]
    assert Sessions().get(name).name == name


@pytest.mark.parametrize("name", ["", ".", "..", ".a", "a/b", "../a", "a b", "x" * 65, "ä", "a\n", "a\0", "٣"])
def test_bad_names(home: Path, name: str) -> None:
    sessions = Sessions()
    for call in (sessions.load, sessions.remove, lambda n: sessions.save(make(n)), sessions.get):
        with pytest.raises(UsageError, match="--session"):
            call(name)
    with pytest.raises(UsageError, match="--session"), sessions.hold(name):
        pass
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("changed", [
    {"tokens": [1, -1]}, {"tokens": [1 << 31]}, {"tokens": [True]}, {"tokens": [1.0]}, {"head": "../x"},
    {"model": None},
    {"messages": [{"role": "user"}]}, {"messages": [{"role": "user", "content": 5}]}, {"tokens": (1, 2)},
    {"messages": [{"role": "user", "content": "x", "more": "y"}]}, {"messages": ["x"]}, {"created": 5},
])  # fmt: skip
def test_what_could_not_be_read_back_does_not_replace_what_can(home: Path, changed: dict[str, Any]) -> None:
    sessions = Sessions()
    sessions.save(make())
    before = (home / "talk.session").read_bytes()
    if "tokens" in changed and type(changed["tokens"]) is tuple:
        sessions.save(make(**changed))  # JSON has no tuples: it is a list when it is read
        assert sessions.get("talk").tokens == [1, 2]
        return
    with pytest.raises(DamagedError):
        sessions.save(make(**changed))
    assert (home / "talk.session").read_bytes() == before


def test_every_flipped_bit_is_noticed(home: Path) -> None:
    sessions = Sessions()
    sessions.save(make(head="0" * 56))
    path = home / "talk.session"
    raw = path.read_bytes()
    for at in range(len(raw)):
        for bit in range(8):
            path.write_bytes(raw[:at] + bytes([raw[at] ^ (1 << bit)]) + raw[at + 1 :])
            with pytest.raises(DamagedError, match=r"talk\.session.*offload sessions rm talk"):
                sessions.load("talk")
    path.write_bytes(raw)
    assert sessions.get("talk").tokens == [1, 2, 3]


def _signed(body: bytes) -> bytes:
    import hashlib

    return b"offload session 1 " + hashlib.sha256(body).hexdigest().encode() + b"\n" + body


@pytest.mark.parametrize("make_raw", [
    lambda raw: b"", lambda raw: raw[:-1], lambda raw: raw[: len(raw) // 2], lambda raw: raw + b" ", lambda raw: b"\n",
    lambda raw: b"{}", lambda raw: b"\xff" * 100, lambda raw: raw.replace(b"session 1", b"session 2"),
    lambda raw: _signed(b"{}"), lambda raw: _signed(b"[]"), lambda raw: _signed(b"[" * 100_000),
    lambda raw: _signed(b"\xff"), lambda raw: _signed(raw.partition(b"\n")[2].replace(b'"talk"', b'"work"')),
    lambda raw: _signed(raw.partition(b"\n")[2].replace(b'"head"', b'"more": 1, "head"')),
])  # fmt: skip
def test_foreign_and_damaged_files_are_refused(home: Path, make_raw: Callable[[bytes], bytes]) -> None:
    sessions = Sessions()
    sessions.save(make())
    sessions.save(make("other"))
    path = home / "talk.session"
    path.write_bytes(make_raw(path.read_bytes()))
    with pytest.raises(DamagedError, match=r"talk\.session.*offload sessions rm talk"):
        sessions.load("talk")
    damaged = {s.name: s.damaged for s in sessions.list()}
    assert damaged["other"] is None
    assert "talk.session" in (damaged["talk"] or "")
    assert sessions.heads() == []
    sessions.remove("talk")
    assert [s.name for s in sessions.list()] == ["other"]


def test_a_huge_file_is_not_read_and_not_written(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = Sessions()
    sessions.save(make())
    with (home / "talk.session").open("r+b") as f:
        f.truncate(1 << 40)  # sparse
    with pytest.raises(DamagedError, match="larger than any"):
        sessions.load("talk")
    monkeypatch.setattr(sessions_module, "MAX_SESSION", 1000)
    with pytest.raises(StoreError, match="too long"):
        sessions.save(make("long", tokens=[1000] * 500))


def test_links_pipes_and_what_others_may_write_are_refused(home: Path) -> None:
    sessions = Sessions()
    sessions.save(make())
    path = home / "talk.session"
    for change, says in (
        (lambda: path.chmod(0o606), "others may write"),
        (lambda: shutil.move(path, home / "real") and path.symlink_to("real"), "is a link"),
        (lambda: (path.unlink(), os.mkfifo(path)), "not a plain file"),
    ):
        change()
        with pytest.raises(DamagedError, match=says):
            sessions.load("talk")
        assert [says in (s.damaged or "") for s in sessions.list()] == [True]


def test_a_full_disk_leaves_the_conversation_as_it_was(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = Sessions()
    sessions.save(make())

    def full(fd: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StoreFull, match="sessions prune"):
            sessions.save(make(tokens=[9]))
    assert sessions.get("talk").tokens == [1, 2, 3]
    assert [p.name for p in home.iterdir()] == ["talk.session"]


def test_one_process_at_a_time_may_hold_a_conversation(home: Path) -> None:
    one, two = Sessions(), Sessions()
    with one.hold("talk"):
        with pytest.raises(StoreError, match="in use"), two.hold("talk"):
            pass
        with two.hold("other"):
            pass
    with two.hold("talk"):
        pass
    assert [s.name for s in one.list()] == []


def test_what_a_conversation_needs_is_kept_until_it_is_removed(home: Path) -> None:
    sessions = Sessions()
    store = sessions.prefixes("f", "float32")
    head = store.extend(list(range(300)), lambda a, b: segment(list(range(a, b))))
    store.extend(list(range(1000, 1010)), lambda a, b: segment(list(range(1000 + a, 1000 + b))))
    sessions.save(make(tokens=list(range(300)), head=head))
    assert store.prune(0) > 0
    assert store.match(range(300)).length == 300
    assert store.match([1000]).length == 0
    done = sessions.prune()
    assert (done.freed, done.kept) == (0, done.needed)
    sessions.remove("talk")
    assert store.match(range(300)).length == 300  # removing a name frees nothing by itself
    assert sessions.prune().freed == done.needed
    assert store.match(range(300)).length == 0


# crashes


def test_whatever_is_left_by_a_kill_is_whole(tmp_path: Path) -> None:
    result = session_crash.campaign(tmp_path / "s", kills=6, seed=1, longest_s=0.25)
    assert result["kills"] == 6
    assert result["turns"] > 0
    assert result["tokens_verified"] > 0


def test_the_campaign_notices_what_is_wrong(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    sessions = Sessions(folder)
    store = sessions.prefixes(session_crash.FINGERPRINT, session_crash.ARITHMETIC)
    said = session_crash.words("a")[:600]
    head = store.extend(said, lambda b, e: session_crash.segment(said, b, e))
    session = make("a", tokens=said, head=head, messages=[{"role": "user", "content": "600 tokens"}])
    sessions.save(session)
    assert session_crash.check(folder, {"a": 600}) == {"conversations": 1, "tokens": 600}
    with pytest.raises(session_crash.BenchError, match="not there"):
        session_crash.check(folder, {"a": 600, "b": 1})
    with pytest.raises(session_crash.BenchError, match="were saved"):
        session_crash.check(folder, {"a": 601})
    match = store.match(said)
    path = folder / f"{match.chain[1][0]}.kv"
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(session_crash.BenchError, match="can be read"):
        session_crash.check(folder, {"a": 600})
    path.unlink()
    with pytest.raises(session_crash.BenchError, match="not those of its tokens"):
        session_crash.check(folder, {"a": 600})


# the command


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    try:
        code = main(["sessions", *args])
    except SystemExit as e:
        code = int(e.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_list_show_rm_and_prune(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "list")
    assert (code, "no conversations" in out) == (0, True)
    assert json.loads(run(capsys, "list", "--json")[1]) == []
    sessions = Sessions()
    store = sessions.prefixes("f", "float32")
    head = store.extend([1, 2, 3], lambda a, b: segment([1, 2, 3]))
    sessions.save(make(head=head))
    sessions.save(make("evil", model="x\x1b]0;y\x07\nz", messages=[{"role": "user", "content": "a\x1b[31mb\r\nc"}]))
    (home / "broken.session").write_bytes(b"?")
    (home / "broken.session").chmod(0o600)
    code, out, err = run(capsys, "list")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 4
    assert lines[0].split() == ["name", "updated", "messages", "tokens", "model"]
    (talk,) = [line for line in lines if line.startswith("talk ")]
    assert talk.split()[-3:] == ["2", "3", "demo-moe"]
    assert any(line.split() == ["broken", "damaged"] for line in lines)
    assert "\x1b" not in out
    listed = {s["name"]: s for s in json.loads(run(capsys, "list", "--json")[1])}
    assert listed["talk"]["tokens"] == 3
    assert listed["talk"]["damaged"] is None
    assert "broken.session" in listed["broken"]["damaged"]

    code, out, _ = run(capsys, "show", "talk")
    assert code == 0
    assert "user: Grüß Gott" in out
    assert "assistant: line\nline" in out
    assert "\x1b" not in run(capsys, "show", "evil")[1]
    assert json.loads(run(capsys, "show", "talk", "--json")[1])["tokens"] == [1, 2, 3]

    size = sum(p.stat().st_size for p in home.glob("*.kv"))
    code, out, _ = run(capsys, "prune", "--limit", "1KiB")
    assert (code, "freed 0 B" in out, "sessions rm" in out) == (0, True, True)
    assert run(capsys, "rm", "talk")[0] == 0
    code, out, _ = run(capsys, "prune", "--limit", "1GiB")
    assert (code, "(0 bytes)" in out) == (0, True)
    code, out, _ = run(capsys, "prune")
    assert (code, f"({size} bytes)" in out) == (0, True)
    assert json.loads(run(capsys, "prune", "--json")[1]) == {"freed": 0, "kept": 0, "needed": 0, "limit": 0}
    assert run(capsys, "rm", "broken")[0] == 0
    assert json.loads(run(capsys, "rm", "evil", "--json")[1]) == {"removed": "evil"}
    assert list(home.glob("*.session")) == []


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        ([], 2, "list|show|rm|prune"),
        (["destroy"], 2, "destroy"),
        (["show"], 2, "NAME"),
        (["show", "../x"], 2, "--session"),
        (["rm", ".x"], 2, "--session"),
        (["show", "none"], 1, "no conversation 'none'"),
        (["rm", "none"], 1, "no conversation 'none'"),
        (["show", "broken"], 1, "sessions rm broken"),
        (["prune", "--limit", "much"], 2, "--limit"),
        (["prune", "--limit", "50%"], 2, "--limit"),
        (["list", "--limit", "5"], 2, "--limit"),
    ],
)
def test_mistakes_are_one_line(
    home: Path, capsys: pytest.CaptureFixture[str], args: list[str], code: int, says: str
) -> None:
    home.mkdir(mode=0o700)
    (home / "broken.session").write_bytes(b"?")
    (home / "broken.session").chmod(0o600)
    got, out, err = run(capsys, *args)
    assert (got, out, err.count("\n")) == (code, "", 1)
    assert says in err


def test_a_folder_that_is_not_private_is_one_line(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home.mkdir()
    home.chmod(0o777)
    for args in (["list"], ["prune"], ["rm", "a"]):
        code, out, err = run(capsys, *args)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert "chmod 700" in err

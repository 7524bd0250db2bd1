"""Routing traces: what is kept comes back, what is damaged is refused in one line."""

from __future__ import annotations

import io
import itertools
import os
import stat
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe import Recorder, Routed, RoutingTrace
from moe.store import load_arrays, save_arrays
from moe.synthetic import adversarial, affine, even, skewed, sticky, with_gate_ahead
from tiers import ModelError, OffloadError, UsageError


def same(a: RoutingTrace, b: RoutingTrace) -> bool:
    def equal(x: np.ndarray | None, y: np.ndarray | None) -> bool:
        return x is y is None or (x is not None and y is not None and x.dtype == y.dtype and np.array_equal(x, y))

    pairs = [(r, s) for p, q in zip(a, b, strict=True) for r, s in zip(p, q, strict=True)]
    fields = ("index", "weights", "ahead", "probabilities")
    return a.experts == b.experts and all(
        r.layer == s.layer and all(equal(getattr(r, f), getattr(s, f)) for f in fields) for r, s in pairs
    )


def mixed() -> RoutingTrace:
    """Layers of different widths, a prompt and two answers, something said ahead."""
    rng = np.random.default_rng(0)
    recorder = Recorder([8, 5])
    for tokens in (7, 1, 1):
        for layer, experts in enumerate((8, 5)):
            recorder.note(
                layer,
                rng.integers(0, experts, (tokens, 2)),
                rng.random((tokens, 2)),
                ahead=rng.integers(-1, 5, (tokens, 2)) if layer == 0 else None,
                probabilities=rng.dirichlet(np.ones(experts), tokens),
            )
    return recorder.trace()


def test_a_trace_comes_back_as_it_was(tmp_path: Path) -> None:
    plain = skewed(3, 16, 4, 10)
    for trace in (plain, with_gate_ahead(plain, 0.5), adversarial(2, 8, 2, 5, period=3), RoutingTrace([4, 4], [])):
        trace.save(tmp_path / "t.npz")
        again = RoutingTrace.load(tmp_path / "t.npz")
        assert same(trace, again) and len(again) == len(trace) and again.top_k == trace.top_k
    trace = mixed()
    assert len(trace) == 3 and [len(p[0].index) for p in trace] == [7, 1, 1]
    trace.save(tmp_path / "t.npz")
    again = RoutingTrace.load(tmp_path / "t.npz")
    assert again.experts == (8, 5)
    for p, q in zip(trace, again, strict=True):
        assert np.array_equal(p[0].ahead, q[0].ahead)
        assert q[1].ahead is not None and (q[1].ahead == -1).all(), "nothing was said there"
        assert np.array_equal(p[1].probabilities, q[1].probabilities)


def test_a_trace_is_its_owners_and_an_ordinary_npz(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    path.write_bytes(b"before")
    os.chmod(path, 0o644)
    even(2, 4, 2, 3).save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["t.npz"], "nothing half-written stays"
    assert np.load(path, allow_pickle=False)["index"].shape == (6, 2)


def test_a_trace_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.npz"
    even(2, 4, 2, 3).save(path)
    before = path.read_bytes()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(UsageError, match="No space left"):
        even(2, 4, 2, 4).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["t.npz"]


def attempt(path: Path) -> tuple[RoutingTrace | None, str | None]:
    try:
        return RoutingTrace.load(path), None
    except OffloadError as e:
        return None, str(e)


@pytest.mark.parametrize("where", [0, 0.2, 0.4, 0.6, 0.8, 0.999])
def test_any_cut_and_any_flipped_bit_that_matters_is_noticed(tmp_path: Path, where: float) -> None:
    path = tmp_path / "t.npz"
    trace = mixed()
    trace.save(path)
    whole = path.read_bytes()
    at = int(where * len(whole))
    path.write_bytes(whole[:at])
    with pytest.raises(ModelError):
        RoutingTrace.load(path)
    for bit in range(8):
        broken = bytearray(whole)
        broken[at] ^= 1 << bit
        path.write_bytes(broken)
        again, why = attempt(path)
        assert why is None or ("\n" not in why and str(path) in why)
        if again is not None:  # a date in the archive's directory
            assert [r.index.tolist() for p in again for r in p] == [r.index.tolist() for p in trace for r in p]


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=300), cut=st.integers(0, 1500))
def test_no_file_brings_anything_but_one_line(tmp_path_factory: pytest.TempPathFactory, data: bytes, cut: int) -> None:
    path = tmp_path_factory.mktemp("t") / "t.npz"
    even(2, 4, 2, 3).save(path)
    whole = path.read_bytes()
    cut = cut % len(whole)
    path.write_bytes(whole[:cut] + data + whole[cut + len(data) :])
    again, why = attempt(path)
    assert again is None or len(again) == 3
    assert why is None or "\n" not in why


def raw(path: Path, **changes: np.ndarray | None) -> Path:
    """A trace of two layers of 4 experts, top 2, three passes of one token; checksummed, but with these changes."""
    arrays: dict[str, np.ndarray | None] = {
        "version": np.array([1]),
        "experts": np.array([4, 4], np.int32),
        "tokens": np.array([1, 1, 1]),
        "index": np.zeros((6, 2), np.int16),
        "weights": np.zeros((6, 2), np.float16),
    }
    arrays |= changes
    save_arrays(path, {k: v for k, v in arrays.items() if v is not None})
    return path


def test_an_array_put_in_place_of_another_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    even(2, 4, 2, 3).save(path)
    with np.load(path) as f:
        arrays = dict(f)
    np.savez_compressed(path, **arrays)
    assert len(RoutingTrace.load(path)) == 3
    np.savez_compressed(path, **(arrays | {"index": 3 - arrays["index"]}))
    with pytest.raises(ModelError, match="checksum"):
        RoutingTrace.load(path)
    del arrays["sha256"]
    np.savez_compressed(path, **arrays)
    with pytest.raises(ModelError, match="checksum"):
        RoutingTrace.load(path)


def test_the_right_checksum_buys_no_trust(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    assert len(RoutingTrace.load(raw(path))) == 3
    wrong: list[dict[str, np.ndarray | None]] = [
        {"version": np.array([2])},
        {"experts": np.array([4, 0], np.int32)},
        {"experts": np.array([4, -4], np.int32)},
        {"experts": np.array([4, 1 << 30], np.int32)},
        {"experts": np.zeros(0, np.int32)},
        {"tokens": np.array([1, 1, 2])},
        {"tokens": np.array([1, 3, -1])},
        {"tokens": np.array([1 << 62, 1 << 62, 3])},
        {"tokens": np.array([[1, 1, 1]])},
        {"index": np.full((6, 2), 4, np.int16)},
        {"index": np.full((6, 2), -1, np.int16)},
        {"index": np.zeros((6, 2), np.int32)},
        {"index": np.zeros(12, np.int16)},
        {"index": None},
        {"weights": np.full((6, 2), np.nan, np.float16)},
        {"weights": np.zeros((6, 1), np.float16)},
        {"ahead": np.full((6, 2), 4, np.int16)},
        {"ahead": np.full((6, 2), -2, np.int16)},
        {"ahead": np.zeros((5, 2), np.int16)},
        {"probabilities": np.zeros(23, np.float16)},
        {"probabilities": np.full(24, 1.5, np.float16)},
        {"probabilities": np.full(24, np.nan, np.float16)},
        {"surprise": np.zeros(1, np.int16)},
    ]
    for changes in wrong:
        with pytest.raises(ModelError):
            RoutingTrace.load(raw(path, **changes))


def member(name: str, header: str, body: bytes = b"") -> bytes:
    """A zip with one array whose header says what it likes."""
    text = header.encode().ljust(117) + b"\n"
    f = io.BytesIO()
    with zipfile.ZipFile(f, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr(name, b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body)
    return f.getvalue()


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ("{'descr': '<i2', 'fortran_order': False, 'shape': (1000000000000,)}", "does not fit its bytes"),
        ("{'descr': '<i2', 'fortran_order': False, 'shape': (-1, -8)}", "does not fit its bytes"),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (2,)}", "unknown type"),
        ("{'descr': '<i2', 'fortran_order': True, 'shape': (8,)}", "unknown type"),
        ("{'descr': '<i2'}", "damaged"),
        ("__import__('os').system('true')", "damaged"),
    ],
)
def test_hostile_headers(tmp_path: Path, header: str, why: str) -> None:
    path = tmp_path / "t.npz"
    path.write_bytes(member("index.npy", header, bytes(16)))
    with pytest.raises(ModelError, match=why):
        load_arrays(path, {"index": "int16"})


def test_bombs_are_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    path.write_bytes(
        member("index.npy", "{'descr': '<i2', 'fortran_order': False, 'shape': (4194304,)}", bytes(1 << 23))
    )
    assert path.stat().st_size < 1 << 16
    with pytest.raises(ModelError, match="too large"):
        load_arrays(path, {"index": "int16"}, max_bytes=1 << 20)
    path.write_bytes(bytes(1 << 20) + b"1")
    with pytest.raises(ModelError, match="larger than"):
        load_arrays(path, {}, max_bytes=1 << 20)


def test_no_such_file_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        RoutingTrace.load(tmp_path / "none.npz")
    with pytest.raises(UsageError, match="cannot be read"):
        RoutingTrace.load(tmp_path)
    with pytest.raises(UsageError, match="cannot be written"):
        even(1, 4, 2, 1).save(tmp_path / "none" / "t.npz")


def test_a_recorder_leaves_out_what_was_cut_short_and_ends_in_time() -> None:
    recorder = Recorder([4, 4], max_rows=4)
    row, weight = np.array([[0, 1]], np.int16), np.array([[0.5, 0.5]])
    recorder.note(1, row, weight)  # joined in the middle
    recorder.note(0, row + 2, weight)  # interrupted
    for _ in range(5):
        recorder.note(0, row, weight)
        recorder.note(1, row + 1, weight)
        row_after = recorder.trace()
    assert [[r.index.tolist() for r in p] for p in row_after] == [[[[0, 1]], [[1, 2]]]] * 2
    row[:] = 3
    assert row_after[:1].layers == 2 and next(iter(row_after))[0].index.tolist() == [[0, 1]], "a copy is kept"


def test_a_pass_must_fit_its_layers() -> None:
    row, weight = np.array([[0, 1]], np.int16), np.zeros((1, 2), np.float16)
    with pytest.raises(ValueError, match="every layer once"):
        RoutingTrace([4, 4], [[Routed(0, row, weight)]])
    with pytest.raises(ValueError, match="does not have"):
        RoutingTrace([4, 1], [[Routed(0, row, weight), Routed(1, row, weight)]])


class TestSynthetic:
    def test_seeds_decide(self) -> None:
        for make in (even, skewed, sticky, affine):
            assert same(make(2, 16, 4, 6, seed=1), make(2, 16, 4, 6, seed=1))
            assert not same(make(2, 16, 4, 6, seed=1), make(2, 16, 4, 6, seed=2))

    def test_a_token_never_has_an_expert_twice(self) -> None:
        for trace in (even(2, 16, 4, 30, tokens=3), skewed(2, 16, 4, 30), sticky(2, 16, 4, 30), affine(2, 16, 4, 30)):
            assert all(len(set(t)) == 4 for p in trace for r in p for t in r.index.tolist())

    def test_each_has_its_property(self) -> None:
        def repeats(trace: RoutingTrace) -> float:
            passes = list(trace)
            pairs = [(set(a[0].needed()), set(b[0].needed())) for a, b in itertools.pairwise(passes)]
            return sum(len(a & b) for a, b in pairs) / sum(len(b) for _, b in pairs)

        def favourite(trace: RoutingTrace) -> float:
            counts = np.bincount(np.concatenate([p[0].index.ravel() for p in trace]), minlength=32)
            return float(counts.max() / counts.sum())

        assert repeats(even(1, 32, 4, 400)) == pytest.approx(4 / 32, abs=0.03)
        assert repeats(sticky(1, 32, 4, 400, repeat=0.7)) == pytest.approx(0.7 + 0.3 * 4 / 32, abs=0.08)
        assert repeats(adversarial(1, 32, 4, 40, period=7)) == 0
        assert favourite(even(1, 32, 4, 400)) < 0.06 < 0.15 < favourite(skewed(1, 32, 4, 400))

    def test_a_gate_is_as_good_as_it_is_made(self) -> None:
        trace = with_gate_ahead(even(3, 64, 8, 200), 0.8)
        flat = [r for p in trace for r in p]
        right = [np.isin(a.ahead, b.index).mean() for a, b in itertools.pairwise(flat)]
        assert np.mean(right) == pytest.approx(0.8 + 0.2 * 8 / 64, abs=0.02)


# what a trace says


def test_use_is_the_share_of_tokens_that_chose() -> None:
    trace = mixed()
    assert trace.tokens == 9 and [len(u) for u in trace.use()] == [8, 5]
    for layer, use in enumerate(trace.use()):
        chosen = np.concatenate([p[layer].index for p in trace]).tolist()
        assert use.tolist() == [sum(row.count(e) for row in chosen) / 9 for e in range(trace.experts[layer])]
        assert use.sum() == pytest.approx(trace.top_k)
    empty = RoutingTrace([4, 2], [])
    assert empty.tokens == 0 and [u.tolist() for u in empty.use()] == [[0] * 4, [0] * 2]


def test_repeats_are_the_previous_tokens_choices() -> None:
    trace = mixed()
    same = asked = 0
    for layer in range(2):
        rows = [row for p in trace for row in p[layer].index.tolist()]
        for before, now in itertools.pairwise(rows):
            same, asked = same + sum(e in before for e in now), asked + len(now)
    assert 0 < trace.repeats() == same / asked < 1, "across passes as within them"
    assert adversarial(3, 12, 2, 20, period=3).repeats() == 0
    assert sticky(2, 64, 4, 400, repeat=0.8).repeats() == pytest.approx(0.8, abs=0.05)
    assert skewed(2, 8, 2, 1).repeats() == RoutingTrace([4], []).repeats() == 0, "no two tokens"

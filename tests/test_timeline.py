"""Misses of an expert cache, and the virtual clock in cases whose answer can be worked out by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planned import MIB, facts, layer, machine, rates

from offload.planning.cost import Pass
from offload.planning.machine import Machine
from offload.planning.routing import PassMisses, draw
from offload.planning.timeline import Placement, Streams, Timeline, Usage
from tiers import CHUNK

# routing


@settings(max_examples=60, deadline=None, database=None)
@given(
    layers=st.lists(st.tuples(st.integers(1, 16), st.integers(1, 4)), min_size=1, max_size=4).map(tuple),
    prefill=st.lists(st.integers(1, 40), max_size=3).map(tuple), batch=st.integers(1, 4), warm=st.booleans(),
    repeat=st.floats(0, 0.95),
)  # fmt: skip
def test_more_slots_never_miss_more(
    layers: tuple[tuple[int, int], ...], prefill: tuple[int, ...], batch: int, warm: bool, repeat: float
) -> None:
    layers = tuple((e, min(e, k)) for e, k in layers)
    total = sum(e for e, _ in layers)
    for p in (p for passes in draw(layers, prefill, 6, batch, repeat, warm) for p in passes):
        for i, (experts, top_k) in enumerate(layers):
            assert min(top_k, experts) <= p.needed(i) <= experts
            missed = [p.missed(i, slots) for slots in range(total + 1)]
            assert missed[0] == p.needed(i)
            assert all(b <= a for a, b in pairwise(missed))
            assert not warm or missed[-1] == 0, "all have been used before, and there is room for all"


def test_evenly_chosen_experts_miss_as_often_as_there_is_no_room_for_them() -> None:
    """In the long run a cache of a quarter of the experts holds a quarter of those chosen."""
    layers = ((64, 4),) * 8
    decode = draw(layers, (), 16, 1, 0.0, True)[1]
    for slots in (128, 256, 384):
        missed = sum(p.missed(i, slots) for p in decode[4:] for i in range(8))
        needed = sum(p.needed(i) for p in decode[4:] for i in range(8))
        assert missed / needed == pytest.approx(1 - slots / 512, abs=0.07)


def test_repeated_choices_miss_less() -> None:
    def missed(repeat: float, slots: int) -> int:
        return sum(p.missed(i, slots) for p in draw(((64, 4),) * 8, (), 16, 1, repeat, True)[1] for i in range(8))

    for slots in (64, 256):
        rates = [missed(r, slots) for r in (0.0, 0.3, 0.6, 0.9)]
        assert all(b < a for a, b in pairwise(rates)), rates


def test_a_cold_cache_misses_what_was_never_used() -> None:
    first, then = draw(((8, 2), (8, 2)), (100, 3), 2, 1, 0.0)
    assert [first[0].missed(i, 1 << 61) for i in range(2)] == [0, 0], "filled beforehand"
    assert [first[0].missed(i, 1000) for i in range(2)] == [8, 8], "a hundred tokens use every expert"
    assert [p.missed(i, 16) for p in (first[1], *then) for i in range(2)] == [0] * 6
    warm = draw(((8, 2), (8, 2)), (100,), 2, 1, 0.0, True)[0]
    assert [warm[0].missed(i, 16) for i in range(2)] == [0, 0]


def test_the_draw_is_the_same_every_time() -> None:
    args = (((16, 2),) * 3, (5, 5), 8, 2, 0.25)
    once = draw(*args)
    draw.cache_clear()
    assert draw(*args) == once
    assert draw(*args[:-1], 0.5) != once


# the virtual clock

ONE = Pass(1, 1, 0)
GB = 10**9
SLOT = 100 * MIB
READ = SLOT / 1e9  # seconds from a disk of 1 GB/s
ROWS = 8 * CHUNK / 1e9  # until a busy disk's requests in flight, eight of a chunk, are through
KEYS = tuple((f"layer.{i}", SLOT) for i in range(8))


def passes(
    m: Machine, where: Placement, misses: PassMisses | None = None, count: int = 4, nbytes: int = SLOT, **experts: int
) -> list[Usage]:
    """`count` passes over eight layers."""
    about = facts([layer(i, nbytes, **experts) for i in range(8)])
    timeline = Timeline(about, m, where)
    return [timeline.run(ONE, misses) for _ in range(count)]


def computing(seconds_each: float, **changes: object) -> Machine:
    """A machine that takes so long over each layer of `SLOT` bytes."""
    points = ((1, seconds_each / SLOT, 0.0), (1000, seconds_each / SLOT, 0.0))
    return machine(rates=rates(linear={"bfloat16": points}), **changes)


def nothing_streamed() -> Placement:
    return Placement(Streams((), 0), None, 0)


def test_nothing_streamed_is_compute_alone() -> None:
    for m in (computing(0.01), computing(0.01, link_bytes_per_s=1e9)):
        for u in passes(m, nothing_streamed()):
            assert u.seconds == pytest.approx(8 * 0.01)
            assert (u.compute_s, u.stall_s, u.disk_s, u.link_s, u.bytes_read, u.bytes_up) == pytest.approx(
                (8 * 0.01, 0, 0, 0, 0, 0)
            )
            assert u.bottleneck == "compute"


@pytest.mark.parametrize("slots", [2, 3])
def test_a_slow_disk_is_read_without_a_pause(slots: int) -> None:
    u = passes(computing(READ / 10), Placement(Streams(KEYS, slots), None, 0))[-1]
    assert u.bytes_read == 8 * SLOT
    assert u.seconds == pytest.approx(8 * SLOT / 1e9, rel=1e-6)
    assert u.disk_s == pytest.approx(u.seconds)
    assert u.stall_s == pytest.approx(u.seconds - u.compute_s)
    assert u.bottleneck == "disk"


@pytest.mark.parametrize("slots", [2, 3])
def test_slow_compute_hides_the_disk(slots: int) -> None:
    u = passes(computing(3 * READ), Placement(Streams(KEYS, slots), None, 0))[-1]
    assert u.stall_s == pytest.approx(ROWS), "embedding rows alone are waited for"
    assert u.seconds == pytest.approx(8 * 3 * READ + ROWS)
    assert (u.bytes_read, u.bottleneck) == (8 * SLOT, "compute")


@pytest.mark.parametrize("seconds", [READ / 4, READ, 2 * READ])
def test_without_a_slot_to_spare_reads_and_compute_take_turns(seconds: float) -> None:
    u = passes(computing(seconds), Placement(Streams(KEYS, 1), None, 0))[-1]
    assert u.seconds == pytest.approx(8 * (READ + seconds))
    assert u.stall_s == pytest.approx(8 * READ)


def test_only_what_does_not_stay_is_read() -> None:
    u = passes(computing(READ / 10), Placement(Streams(KEYS[::2], 2), None, 0))[-1]
    assert u.bytes_read == 4 * SLOT
    assert u.seconds == pytest.approx(4 * READ)


def test_embedding_rows_queue_behind_the_requests_in_flight() -> None:
    """Eight requests of a chunk each are in flight on a disk that never rests; then the disk's own latency."""
    calm = passes(computing(READ, disk_latency_s=1e-3), nothing_streamed())[-1]
    assert calm.stall_s == pytest.approx(1e-3)
    busy = computing(READ / 10)
    timeline = Timeline(facts([layer(i, SLOT) for i in range(8)]), busy, Placement(Streams(KEYS, 2), None, 0))
    timeline.run(ONE, None)
    began = timeline.last_began
    timeline.run(ONE, None)
    first = min(a for lane, name, a, _ in timeline.compute if name == "layer.0" and a > timeline.last_began)
    assert timeline.last_began > began
    assert first - timeline.last_began >= ROWS * (1 - 1e-9)


def test_a_device_waits_for_its_link() -> None:
    m = computing(READ / 100, link_bytes_per_s=1e9, disk_bytes_per_s=1.0)
    u = passes(m, Placement(Streams(KEYS, 2), Streams((), 0), 0))[-1]
    assert u.seconds == pytest.approx(8 * READ)
    assert (u.bytes_up, u.bytes_read) == (8 * SLOT, 0), "it all lies in RAM"
    assert u.bottleneck == "link"


@pytest.mark.parametrize(("slots", "host"), [(2, 1), (2, 2), (3, 2), (3, 3), (2, 4)])
def test_below_the_link_the_disk_sets_the_pace(slots: int, host: int) -> None:
    """However the slots are divided, nothing is read twice and the disk never rests."""
    m = computing(READ / 100, link_bytes_per_s=4e9)
    u = passes(m, Placement(Streams(KEYS, slots), Streams(KEYS, host), 0), count=6)[-1]
    assert u.seconds == pytest.approx(8 * READ, rel=0.02)
    assert (u.bytes_up, u.bytes_read, u.bottleneck) == (8 * SLOT, 8 * SLOT, "disk")


def test_a_fast_disk_below_a_slow_link() -> None:
    m = computing(READ / 100, link_bytes_per_s=1e9, disk_bytes_per_s=4e9)
    u = passes(m, Placement(Streams(KEYS, 3), Streams(KEYS, 3), 0), count=6)[-1]
    assert u.seconds == pytest.approx(8 * READ, rel=0.02)
    assert u.bottleneck == "link"


def test_only_what_ram_lacks_is_read_for_the_device() -> None:
    m = computing(READ / 100, link_bytes_per_s=4e9)
    u = passes(m, Placement(Streams(KEYS, 3), Streams(KEYS[::4], 1), 0), count=6)[-1]
    assert (u.bytes_up, u.bytes_read) == (8 * SLOT, 2 * SLOT)
    assert max(2 * READ, 8 * SLOT / 4e9) <= u.seconds * (1 + 1e-9) < 2 * READ + 8 * SLOT / 4e9
    u = passes(m, Placement(Streams(KEYS, 3), Streams(KEYS[::4], 2), 0), count=6)[-1]
    assert (u.bytes_up, u.bytes_read) == (8 * SLOT, 0), "with a slot each they stay"


def every(missed: int, hit: int = 0) -> PassMisses:
    """Each of eight layers needs so many experts that are absent, and so many that are there."""
    return PassMisses(((0,) * hit + (1 << 60,) * missed,) * 8)


EXPERTS = {"experts": 8, "expert_bytes": 10 * MIB, "top_k": 4}


def test_experts_are_waited_for_once_they_are_chosen() -> None:
    """No layer's experts can be read before its router has spoken, however long compute takes elsewhere."""
    m = computing(0.5)
    each = 10 * MIB * 0.5 / SLOT  # an expert's compute
    for missed, hit in ((3, 0), (1, 1), (1, 3)):
        where = Placement(Streams((), 0), None, 4)
        u = passes(m, where, every(missed, hit), **EXPERTS)[-1]
        read = missed * 10 * MIB / 1e9
        wait = max(0.0, read - (hit + missed - 1) * each)
        assert u.stall_s == pytest.approx(8 * wait)
        assert u.compute_s == pytest.approx(8 * (0.5 + (hit + missed) * each))
        assert u.seconds == pytest.approx(u.compute_s + u.stall_s)
        assert u.bytes_read == 8 * missed * 10 * MIB


def test_experts_with_a_slot_are_not_read_again() -> None:
    u = passes(computing(0.1), Placement(Streams((), 0), None, 4), every(0, 4), **EXPERTS)[-1]
    assert (u.stall_s, u.bytes_read) == (0, 0)


def test_experts_go_before_queued_prefetches() -> None:
    """A disk that is always behind: a chosen expert does not wait for the layers that are queued."""
    m = computing(READ / 10)
    where = Placement(Streams(KEYS, 3), None, 4)
    timeline = Timeline(facts([layer(i, SLOT, **EXPERTS) for i in range(8)]), m, where)
    for _ in range(3):
        timeline.run(ONE, every(1))
    wanted = [(a, b) for lane, name, a, b in timeline.slices if lane == "disk" and name == "experts"]
    assert len(wanted) == 3 * 8
    assert all(b - a == pytest.approx(10 * MIB / 1e9) for a, b in wanted)
    u = timeline.run(ONE, every(1))
    # ... but the layers are as much later, so the disk is still what sets the pace
    assert u.seconds == pytest.approx(8 * (READ + 10 * MIB / 1e9), rel=0.02)


def test_a_device_gets_chosen_experts_through_ram() -> None:
    m = computing(1e-9, link_bytes_per_s=1e9, disk_bytes_per_s=0.5e9)
    up, read = 10 * MIB / 1e9, 10 * MIB / 0.5e9
    u = passes(m, Placement(Streams((), 0), None, 4, 8), every(2), **EXPERTS)[-1]
    assert (u.bytes_read, u.bytes_up) == (8 * 2 * 10 * MIB, 8 * 2 * 10 * MIB)
    # copying the first overlaps with reading the second; after its last bytes are read, 5 MiB are left to copy
    assert u.seconds == pytest.approx(8 * (2 * read + 5 * MIB / 1e9), rel=1e-3)
    there = PassMisses(((6, 6),) * 8)  # used not long ago: RAM's eight slots hold them, the device's four do not
    u = passes(m, Placement(Streams((), 0), None, 4, 8), there, **EXPERTS)[-1]
    assert (u.bytes_read, u.bytes_up) == (0, 8 * 2 * 10 * MIB)
    assert u.seconds == pytest.approx(8 * 2 * up, rel=1e-3)


def test_transfers_slow_compute() -> None:
    """Compute covers every read here; each second of reading makes it 0.4 seconds longer."""
    calm = passes(computing(3 * READ), Placement(Streams(KEYS, 2), None, 0))[-1]
    dragged = passes(computing(3 * READ, disk_drag=0.4), Placement(Streams(KEYS, 2), None, 0))[-1]
    assert dragged.seconds - calm.seconds == pytest.approx(8 * 0.4 * READ, rel=0.02)
    m = computing(3 * READ, link_bytes_per_s=1e9, link_drag=0.2)
    u = passes(m, Placement(Streams(KEYS, 2), Streams((), 0), 0))[-1]
    assert u.seconds == pytest.approx(8 * (3 + 0.2) * READ)


@settings(max_examples=60, deadline=None, database=None)
@given(
    slots=st.integers(1, 4), host=st.integers(1, 4), seconds=st.floats(1e-4, 1.0), link=st.floats(1e8, 1e11),
    device=st.booleans(), missed=st.integers(0, 3),
)  # fmt: skip
def test_no_resource_is_busy_longer_than_it_takes(
    slots: int, host: int, seconds: float, link: float, device: bool, missed: int
) -> None:
    m = computing(seconds, link_bytes_per_s=link) if device else computing(seconds)
    where = Placement(Streams(KEYS, slots), Streams(KEYS[::2], host) if device else None, 4, 4)
    about = facts([layer(i, SLOT, **EXPERTS) for i in range(8)])
    timeline = Timeline(about, m, where)
    runs = [timeline.run(ONE, every(missed)) for _ in range(3)]
    wall = sum(u.seconds for u in runs)
    assert sum(u.compute_s for u in runs) <= wall * (1 + 1e-9)
    moved = sum(u.bytes_up if device else u.bytes_read for u in runs)
    assert moved >= 3 * 8 * (SLOT + missed * 10 * MIB), "what is streamed is moved in every pass"
    for u in runs:
        assert u.seconds == pytest.approx(u.compute_s + u.stall_s)
    lanes: dict[str, list[tuple[float, float]]] = {}
    for lane, name, a, b in timeline.slices:
        assert b >= a >= 0
        if name != "experts" or lane == "compute":  # a demand pushes what is queued back after the fact
            lanes.setdefault(lane, []).append((a, b))
    for lane, spans in lanes.items():
        if lane == "compute" or not missed:
            assert all(b >= a - 1e-9 for (_, a), (b, _) in pairwise(sorted(spans))), lane

"""The CPU beside a device: who computes what, that the answer is the same, and that nothing is left behind."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build, save

import offload
from moe.beside import Beside, Costs, Pace
from offload.errors import ReadError, UsageError
from tiers import LRU, PAGE, Arena, Block, DirectReader, Residency, Segment, TransferQueue

PROMPT = [5, 9, 23, 7, 40, 11]
MOE = [f for f in FAMILIES if any("expert" in name for name in FAMILIES[f])]


class Two:
    """Two residencies over the same file: a device's (fed straight from it here) and the host's."""

    def __init__(self, path: Path, device: int, host: int, experts: int = 8) -> None:
        path.write_bytes(bytes(experts * PAGE))
        self.keys = [f"e{i}" for i in range(experts)]
        self.queue = TransferQueue(DirectReader([path]), 2)
        self.device, self.host = (self._tier(slots) for slots in (device, host))

    def _tier(self, slots: int) -> Residency:
        tier = Residency(Arena(slots * PAGE), self.queue)
        tier.add_pool("experts", PAGE, slots, LRU())
        for i, key in enumerate(self.keys):
            tier.add(Block(key, PAGE, PAGE, (Segment(0, i * PAGE, PAGE, 0, None, True),)), "experts")
        return tier

    def beside(self, **costs: Any) -> Beside:
        default: dict[str, Any] = {"device_s": lambda n: 1.0, "cpu_s": lambda n: 2.0, "move_s": 10.0, "read_s": 5.0,
                                   "alone": False}  # fmt: skip
        return Beside(self.device, self.host, self.keys, Costs(**{**default, **costs}), Pace())


@pytest.fixture
def two(tmp_path: Path) -> Any:
    t = Two(tmp_path / "data.bin", 2, 6)
    yield t
    t.queue.close()


def test_what_lies_in_host_memory_is_computed_there_when_the_link_is_slow(two: Two) -> None:
    two.device.acquire("e0").release()
    for i in (0, 1, 2):
        two.host.acquire(f"e{i}").release()
    assert sorted(two.beside().for_cpu({0: 1, 1: 1, 2: 1})) == [1, 2]
    assert two.beside(move_s=0.001, cpu_s=lambda n: 50.0).for_cpu({0: 1, 1: 1, 2: 1}) == []
    one = two.beside(move_s=3.0, cpu_s=lambda n: 3.5).for_cpu({1: 1, 2: 1})
    assert len(one) == 1, "one is moved while the other is computed"


def test_what_is_all_on_the_device_asks_nobody(two: Two) -> None:
    two.device.acquire("e3").release()
    assert two.beside(cpu_s=lambda n: 0.0).for_cpu({3: 4}) == []


def test_bytes_are_counted_where_compute_is(two: Two) -> None:
    two.host.acquire("e1").release()
    before = two.device.counters.needed
    assert sorted(two.beside().for_cpu({1: 1, 2: 1})) == [1, 2]
    c = two.device.counters
    assert (c.needed - before, c.hit, c.missed) == (2 * PAGE, PAGE, PAGE)


def test_pace_is_what_was_measured() -> None:
    pace = Pace()
    assert pace.factor == 1.0
    for _ in range(20):
        pace.note(0.1, 0.3)
    assert pace.factor == pytest.approx(3.0, rel=0.05)
    for _ in range(20):
        pace.note(0.1, 0.1)
    assert pace.factor == pytest.approx(1.0, rel=0.2), "the past is forgotten"


def test_a_slow_cpu_is_found_out(two: Two) -> None:
    two.host.acquire("e1").release()
    b = two.beside(move_s=3.0, cpu_s=lambda n: 2.0)
    assert b.for_cpu({1: 1}) == [1]
    b.worked([1], 40.0)
    assert b.for_cpu({1: 1}) == []


def test_free_room_on_the_device_is_filled_and_nothing_is_pushed_out(two: Two) -> None:
    two.device.acquire("e0").release()
    two.beside().spare([1, 2, 3])
    assert [k for k in two.keys if two.device.resident(k) or two.device.coming(k)] == ["e0", "e1"]


# in whole models


def run(folder: Path, **options: Any) -> Any:
    with offload.load(folder, context=64, **options) as model:
        return model.run([PROMPT], max_new_tokens=12, ignore_eos=True)


@pytest.mark.parametrize("family", MOE)
def test_tokens_are_the_oracles_wherever_experts_are_computed(tmp_path: Path, family: str) -> None:
    model = save(build(family), tmp_path)
    want = model.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False)[0, len(PROMPT) :].tolist()
    emulated = {"device": "emulated", "vram": least_vram(tmp_path), "link": "50MB"}
    both, alone = (run(tmp_path, expert_compute=c, **emulated) for c in ("both", "device"))
    assert both.token_ids[0][: len(want)] == alone.token_ids[0][: len(want)] == want
    use, other = both.stats.experts_use, alone.stats.experts_use
    for u in (use, other):
        assert u is None or u.needed == u.hit + u.ahead + u.late + u.missed + u.cpu
    assert use is None or use.cpu > 0 or use.missed == 0, "what is not on the device is computed where it lies"
    assert other is None or other.cpu == 0


def least_vram(folder: Path, context: int = 64) -> int:
    with pytest.raises(offload.BudgetError) as e:
        offload.load(folder, context=context, device="emulated", vram=1 << 12)
    return e.value.smallest or 0


def test_a_batch_and_a_long_prompt_too(tmp_path: Path) -> None:
    oracle = save(build("qwen3_moe", num_hidden_layers=3), tmp_path)
    prompt = torch.randint(4, 160, (1, 40), generator=torch.Generator().manual_seed(3))
    want = oracle.generate(prompt, max_new_tokens=6, do_sample=False)[0, 40:].tolist()
    with offload.load(tmp_path, context=256, device="emulated", vram=least_vram(tmp_path, 256), link="50MB") as model:
        rows = model.run([prompt[0].tolist()] * 3, max_new_tokens=6, ignore_eos=True).token_ids
    assert all(r[: len(want)] == want for r in rows)


def test_little_host_memory_is_shared_with_the_link(tmp_path: Path) -> None:
    """Host slots are leased by transfers to the device and by the CPU at once; nobody waits for ever."""
    save(build("qwen3_moe", hidden_size=128, moe_intermediate_size=256, num_experts=32, num_hidden_layers=4), tmp_path)
    emulated = {"device": "emulated", "vram": least_vram(tmp_path), "link": "200MB"}
    alone = run(tmp_path, **emulated)
    with offload.load(tmp_path, context=64, ram=smallest_ram(tmp_path), **emulated) as model:
        assert model.plan.host.expert_slots < 128
        result = model.run([PROMPT], max_new_tokens=12, ignore_eos=True)
    assert result.token_ids == alone.token_ids
    assert result.stats.experts_use is not None and result.stats.experts_use.cpu > 0


def smallest_ram(folder: Path) -> int:
    """What works at all, and what the process may have grown by until then."""
    vram = least_vram(folder)
    with pytest.raises(offload.BudgetError) as e:
        offload.load(folder, context=64, ram="1MiB", device="emulated", vram=vram)
    return int(e.value.smallest or 0) + (8 << 20)


def test_a_read_error_on_the_cpu_side_leaves_nothing_leased(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(build("qwen3_moe", num_hidden_layers=4), tmp_path)
    with offload.load(tmp_path, context=64, device="emulated", vram=least_vram(tmp_path), link="50MB",
                      ram=smallest_ram(tmp_path)) as model:  # fmt: skip
        want = model.run([PROMPT], max_new_tokens=4, ignore_eos=True).token_ids
        reader = model.engine._memory.disk._link
        right = reader.move

        def broken(*args: Any) -> int:
            raise ReadError(errno.EIO, "made up")

        monkeypatch.setattr(reader, "move", broken)
        with pytest.raises(ReadError):
            model.run([[77, 3, 99, 8]], max_new_tokens=8, ignore_eos=True)
        monkeypatch.setattr(reader, "move", right)
        memory = model.engine._memory
        assert all(e.leases == 0 for tier in (memory.host, memory.compute) for e in tier._entries.values())
        assert model.run([PROMPT], max_new_tokens=4, ignore_eos=True).token_ids == want


def test_a_choice_that_is_none_is_refused(tmp_path: Path) -> None:
    save(build("qwen3_moe"), tmp_path)
    with pytest.raises(UsageError, match="--expert-compute: 'gpu' is not one of both, device"):
        offload.load(tmp_path, expert_compute="gpu")


def test_the_planner_knows_that_the_cpu_helps() -> None:
    """A slow link and a model that lies in RAM: what is not on the device need not cross."""
    about: dict[str, Any] = {"hardware": "rtx3060-12g", "ram": "64GiB", "prompt_tokens": 64, "new_tokens": 64}
    both = offload.plan("Qwen3-30B-A3B", expert_compute="both", alternatives=False, **about).as_json()
    alone = offload.plan("Qwen3-30B-A3B", expert_compute="device", alternatives=False, **about).as_json()
    assert both["predicted_decode_tokens_per_s"] > 1.2 * alone["predicted_decode_tokens_per_s"]

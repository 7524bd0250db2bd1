"""Sizes as people write them, and the planner's promises over layouts of every shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, save
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.config import RunConfig
from offload.engine import Engine, Sequences
from offload.gather import Extent, Gather
from offload.hierarchy import Hierarchy
from offload.layout import ExpertGroup, LaidOut, LayerLayout, ModelLayout, Table
from offload.planning.budgets import READERS, RESERVE, Budgets, Demand
from offload.planning.fit import MIN_CONTEXT, make_plan
from offload.planning.placement import dense_blocks, expert_pools
from offload.planning.plan import Plan, TierPlan
from offload.sizes import ceil_mib, format_size, parse_size
from tiers import CHUNK, PAGE, Arena, Block, BudgetError, DirectReader, EmulatedDevice, Pool, UsageError, page_up

KIB, MIB, GIB, TIB = (1 << s for s in (10, 20, 30, 40))

# sizes

VALID: dict[Any, int] = {
    "1": 1, "123": 123, 123: 123, " 7 ": 7, "7B": 7, "7b": 7, "8GiB": 8 * GIB, "8 GiB": 8 * GIB, "8gib": 8 * GIB,
    "8G": 8 * GIB, "8GB": 8 * 10**9, "500MB": 500 * 10**6, "500M": 500 * MIB, "64k": 64 * KIB, "64kb": 64_000,
    "64KiB": 64 * KIB, "1T": TIB, "2TiB": 2 * TIB, "2TB": 2 * 10**12, "1.5GiB": 3 * GIB // 2, "0.5K": 512, ".5K": 512,
    "5.": 5, "1.7": 1, "007": 7, "1048575TiB": 1048575 * TIB,
}  # fmt: skip
INVALID: list[Any] = [
    "", " ", "GiB", ".", ".GiB", "eight", "8 G iB", "8GiBs", "8XB", "8GiB8", "0x10", "1e3", "1,5GiB", "1_000", "--5",
    "+5", "-1", "-8GiB", -1, "0", 0, "0GiB", "0.0", "0.4", "nan", "NaN", "inf", "Infinity", "-inf", "８GiB",
    "1048576TiB", "9" * 30, "9" * 400,
    "9" * 5000, "9" * 400 + ".5GiB", 10**30, 10**400, 10**5000, True, False, None, 1.5, b"8GiB",
    [8], "0\n", "%", "0%", "-5%", "101%", "100.1%", "nan%", "inf%", "-inf%", "1e400%", "5%%", "%5", "five%", "5 0%",
    "5\n0%", "1_0%", "8GiB%",
]  # fmt: skip
PERCENT: dict[str, int] = {
    "50%": 500, "100%": 1000, "100.0%": 1000, " 50% ": 500, "50 %": 500, "0.1%": 1, "0.0001%": 1, "12.5%": 125,
    ".5%": 5,
}  # fmt: skip


def short(value: Any) -> str:
    """A test's name."""
    text = str(value) if not isinstance(value, int) or value.bit_length() < 200 else f"int of {value.bit_length()} bits"
    return ascii(text if len(text) < 40 else f"{text[:10]}…{len(text)}")


@pytest.mark.parametrize("text", VALID, ids=short)
def test_sizes(text: str | int) -> None:
    assert parse_size(text) == VALID[text]
    assert parse_size(text, of=5) == VALID[text], "only a percentage refers to something"


@pytest.mark.parametrize("text", PERCENT)
def test_percentages(text: str) -> None:
    assert parse_size(text, of=1000) == PERCENT[text]
    with pytest.raises(UsageError, match=r"--ram: a percentage is not possible here"):
        parse_size(text, flag="--ram")


@pytest.mark.parametrize("text", INVALID, ids=short)
def test_what_is_no_size(text: Any) -> None:
    with pytest.raises(UsageError) as e:
        parse_size(text, of=1000, flag="--ram")
    message = str(e.value)
    assert message.startswith("--ram: ")
    assert "\n" not in message
    assert len(message) < 300, "whoever typed a novel does not want it back"
    assert e.value.exit_code == 2


@settings(max_examples=200, deadline=None, database=None)
@given(n=st.integers(1, (1 << 60) - 1))
def test_whole_numbers_are_exact(n: int) -> None:
    assert parse_size(n) == n
    assert parse_size(f"{n}B") == n
    if n < (1 << 60) - MIB:
        assert n <= parse_size(ceil_mib(n)) < n + MIB


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (1, "1 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (812 * KIB, "812 KiB"),
     (MIB, "1 MiB"), (9 * GIB // 2, "4.5 GiB"), (123 * GIB, "123 GiB"), (3 * TIB, "3 TiB"), (-1536, "-1.5 KiB")],
)  # fmt: skip
def test_format(n: int, text: str) -> None:
    assert format_size(n) == text


# layouts


def laid_out(key: str, nbytes: int, padding: int = 0) -> LaidOut:
    return LaidOut(Block(key, nbytes, nbytes + padding, ()), ())


@st.composite
def layouts(draw: st.DrawFn, *, pages: bool = False) -> ModelLayout:
    """Models of a few layers, dense or with experts of one or several sizes. `pages`: blocks are whole pages."""

    def block(key: str, most: int = 400_000) -> LaidOut:
        n = draw(st.integers(1, most))
        return laid_out(key, page_up(n)) if pages else laid_out(key, n, draw(st.integers(0, 2 * PAGE)))

    alike = draw(st.booleans())  # as in real models, or each its own size
    number = draw(st.integers(1, 9))
    dense = [block(f"layer.{i}") for i in range(number)]
    if alike:
        dense = [LaidOut(replace(dense[0].block, key=f"layer.{i}"), ()) for i in range(number)]
    groups: list[tuple[ExpertGroup, ...]] = [()] * number
    if draw(st.booleans()):
        sizes = [block("", 100_000).block for _ in range(draw(st.integers(1, 3)))]
        for i in range(draw(st.integers(0, number - 1)), number):
            n = draw(st.integers(1, 8))
            one = draw(st.sampled_from(sizes))
            blocks = tuple(LaidOut(replace(one, key=f"layer.{i}.expert.{e}"), ()) for e in range(n))
            groups[i] = (ExpertGroup(f"layers.{i}.mlp", draw(st.integers(1, n)), blocks),)
    layers = tuple(LayerLayout(f"layers.{i}", (d,), g) for i, (d, g) in enumerate(zip(dense, groups, strict=True)))
    rows = draw(st.integers(1, 5000))
    table = Table("embed", Gather([rows, 8], torch.float32, [Extent(0, 0, rows * 32)]), torch.float32)
    tied = draw(st.booleans())
    head = laid_out("head", rows * 32) if draw(st.booleans()) else None
    if head is not None and pages:
        head = laid_out("head", page_up(rows * 32))
    return ModelLayout(block("rest", 20_000), layers, head, (table,), torch.float32, tied and head is not None)


@st.composite
def demands(draw: st.DrawFn) -> Demand:
    kv, per_token, per_pair, fixed = (draw(st.integers(0, n)) for n in (4096, 60_000, 16, 1 << 20))
    return Demand(
        kv=lambda tokens: kv * tokens,
        activations=lambda new, context: fixed + per_token * new + per_pair * new * context,
        max_context=draw(st.sampled_from([64, 512, 2048, 40_000])),
        whole_prompt=draw(st.booleans()),
    )


FLAT = Demand(kv=lambda tokens: 1000, activations=lambda new, context: 5000, max_context=2048)
FIXED = RESERVE + READERS * (CHUNK + 2 * PAGE)
BASE, DEVICE_BASE = 100 * MIB, 30 * MIB
PLENTY = Budgets(ram=64 * GIB, base=BASE)
DEVICE = replace(PLENTY, vram=64 * GIB, device_base=DEVICE_BASE)


def refused(layout: ModelLayout, demand: Demand, budgets: Budgets, flag: str) -> int:
    """The smallest that the refusal of `flag` names."""
    with pytest.raises(BudgetError, match=rf"^{flag} .* is too small; the smallest that works is \d+(B|MiB)$") as e:
        make_plan(layout, demand, budgets)
    assert e.value.smallest is not None
    written = parse_size(str(e.value).rsplit(" ", 1)[1])
    assert e.value.smallest <= written < e.value.smallest + MIB
    return e.value.smallest


def smallest(layout: ModelLayout, demand: Demand, context: int | None = None) -> int:
    return refused(layout, demand, replace(PLENTY, ram=1, context=context), "--ram")


def smallest_vram(layout: ModelLayout, demand: Demand, context: int | None = None) -> int:
    return refused(layout, demand, replace(DEVICE, vram=1, context=context), "--vram")


def check_tier(tier: TierPlan, always: list[Block], dense: list[Block], experts: dict[int, list[LaidOut]]) -> int:
    """One tier, given what it has to do with. Returns the bytes of its arena that are spoken for."""
    # every dense block has exactly one place
    gone = [b for b in dense if b.key not in tier.pinned]
    assert sorted([*tier.pinned, *(b.key for b in gone)]) == sorted(b.key for b in (*always, *dense))
    assert list(tier.pinned[: len(always)]) == [b.key for b in always]
    assert (tier.stream is None) == (not gone)
    stream = 0
    if tier.stream is not None:
        assert 1 <= tier.stream.count <= min(2, len(gone))
        assert all(b.slot_nbytes <= tier.stream.slot_nbytes for b in gone)
        stream = tier.stream.count * max(b.nbytes for b in gone)
    # every expert has a pool of fitting slots
    assert set(tier.experts) == set(experts)
    cached = 0
    for size, blocks in experts.items():
        pool = tier.experts[size]
        assert pool.slot_nbytes == size
        assert all(b.block.slot_nbytes <= size for b in blocks)
        assert 1 <= pool.count <= len(blocks)
        cached += pool.count * max(b.block.nbytes for b in blocks)
    assert tier.expert_slots == sum(p.count for p in tier.experts.values())
    # the books
    pinned = [b for b in (*always, *dense) if b.key in tier.pinned]
    assert tier.resident == sum(b.nbytes for b in pinned) + stream + cached
    arena = Arena(tier.arena)
    for pool in [*([tier.stream] if tier.stream else []), *tier.experts.values()]:
        assert Pool(arena, pool.slot_nbytes, pool.count).free == pool.count
    for block in pinned:
        arena.allocate(block.slot_nbytes)
    return arena.used


def check(plan: Plan, layout: ModelLayout, demand: Demand, budgets: Budgets) -> None:
    """Everything a plan promises."""
    assert plan.kv == demand.kv(plan.context)
    assert plan.activations == demand.activations(plan.prefill_chunk, plan.context)
    assert 1 <= plan.prefill_chunk <= plan.context <= demand.max_context
    assert not demand.whole_prompt or plan.prefill_chunk == plan.context
    assert budgets.context is None or plan.context == budgets.context
    assert budgets.context is not None or plan.context >= min(MIN_CONTEXT, demand.max_context)
    assert plan.weight_bytes == layout.weight_bytes
    assert plan.experts_total == sum(len(g.blocks) for layer in layout.layers for g in layer.experts)
    assert budgets.resident is None or plan.resident_bytes <= budgets.resident
    assert "\n" not in plan.summary()
    pools, dense = expert_pools(layout), [b.block for b in dense_blocks(layout)]
    groups = [g for layer in layout.layers for g in layer.experts]
    assert sorted(b.block.key for blocks in pools.values() for b in blocks) == sorted(
        b.block.key for g in groups for b in g.blocks
    )
    # where compute is: everything has its way there, and one token's experts fit at once
    assert check_tier(plan.compute, [layout.rest.block], dense, pools) == plan.compute.arena
    for size, blocks in pools.items():
        keys = {b.block.key for b in blocks}
        top_k = max(g.top_k for g in groups if g.blocks[0].block.key in keys)
        assert plan.compute.experts[size].count >= top_k
    assert plan.everything_fits == (plan.compute.stream is None and plan.expert_slots == plan.experts_total)
    tokens = plan.kv + plan.activations
    if budgets.vram is None:
        assert plan.device is None
        assert plan.compute is plan.host
        assert plan.host.arena + plan.base + tokens + FIXED <= plan.ram == budgets.ram
        assert plan.resident_bytes == plan.host.resident
        return
    assert plan.device is plan.compute
    assert plan.device.arena + DEVICE_BASE + tokens <= plan.vram == budgets.vram
    assert plan.host.arena + plan.base + FIXED <= plan.ram == budgets.ram
    assert plan.resident_bytes == plan.host.resident + plan.device.resident
    # the tier below: everything that does not stay above has its way through
    below = [b for b in dense if b.key not in plan.device.pinned]
    left = {size: blocks for size, blocks in pools.items() if size in plan.host.experts}
    assert check_tier(plan.host, [], below, left) <= plan.host.arena
    for size, blocks in pools.items():
        assert size in left or plan.device.experts[size].count == len(blocks)
    # while loading, whatever goes up to stay passes through the host's arena
    passing = [b for b in (layout.rest.block, *dense) if b.key in plan.device.pinned]
    passing += [b.block for size, blocks in pools.items() if size not in left for b in blocks]
    assert plan.host.arena >= max(page_up(b.slot_nbytes) for b in passing)


@st.composite
def cases(draw: st.DrawFn) -> tuple[ModelLayout, Demand, Budgets]:
    """A model and budgets that can work, from the tightest to plenty."""
    layout, demand = draw(layouts()), draw(demands())
    context = draw(st.none() | st.integers(1, demand.max_context))
    extra = st.one_of(st.integers(0, 4 * MIB), st.integers(0, 4 * GIB))
    budgets = replace(PLENTY, context=context)
    if draw(st.booleans()):
        least = smallest_vram(layout, demand, context)
        budgets = replace(DEVICE, vram=least + draw(extra), context=context)
    least = refused(layout, demand, replace(budgets, ram=1), "--ram")
    budgets = replace(budgets, ram=least + draw(extra))
    if draw(st.booleans()):
        fewest = refused(layout, demand, replace(budgets, resident=0), "--resident")
        budgets = replace(budgets, resident=fewest + draw(st.integers(0, layout.weight_bytes)))
    return layout, demand, budgets


@settings(max_examples=250, deadline=None, database=None)
@given(case=cases())
def test_every_plan_keeps_its_promises(case: tuple[ModelLayout, Demand, Budgets]) -> None:
    layout, demand, budgets = case
    plan = make_plan(layout, demand, budgets)
    check(plan, layout, demand, budgets)
    if budgets.vram is None:
        assert plan.smallest == smallest(layout, demand, budgets.context)


@settings(max_examples=100, deadline=None, database=None)
@given(layout=layouts(), demand=demands(), data=st.data())
def test_a_refusal_names_what_works(layout: ModelLayout, demand: Demand, data: st.DataObject) -> None:
    context = data.draw(st.none() | st.integers(1, demand.max_context))

    def plan(**changes: Any) -> Plan:
        budgets = replace(PLENTY, context=context, **changes)
        plan = make_plan(layout, demand, budgets)
        check(plan, layout, demand, budgets)
        return plan

    least = smallest(layout, demand, context)
    tight = plan(ram=least)
    taken = tight.host.arena + BASE + FIXED + tight.kv + tight.activations
    assert least - taken < PAGE, "and nothing smaller could"
    assert refused(layout, demand, replace(PLENTY, ram=least - 1, context=context), "--ram") == least
    plan(ram=parse_size(ceil_mib(least)))
    fewest = refused(layout, demand, replace(PLENTY, ram=least, resident=0, context=context), "--resident")
    assert plan(ram=least, resident=fewest).resident_bytes == fewest
    assert refused(layout, demand, replace(PLENTY, resident=fewest - 1, context=context), "--resident") == fewest


@settings(max_examples=100, deadline=None, database=None)
@given(layout=layouts(), demand=demands(), data=st.data())
def test_a_refusal_with_a_device_names_what_works(layout: ModelLayout, demand: Demand, data: st.DataObject) -> None:
    """All three smallest values at once still work."""
    context = data.draw(st.none() | st.integers(1, demand.max_context))
    vram = smallest_vram(layout, demand, context)
    budgets = replace(DEVICE, vram=vram, context=context)
    assert refused(layout, demand, replace(budgets, vram=vram - 1), "--vram") == vram
    ram = refused(layout, demand, replace(budgets, ram=1), "--ram")
    assert refused(layout, demand, replace(budgets, ram=ram - 1), "--ram") == ram
    budgets = replace(budgets, ram=ram)
    plan = make_plan(layout, demand, budgets)
    check(plan, layout, demand, budgets)
    assert plan.device is not None
    assert vram - (plan.device.arena + DEVICE_BASE + plan.kv + plan.activations) < PAGE, "and nothing smaller could"
    fewest = refused(layout, demand, replace(budgets, resident=0), "--resident")
    budgets = replace(budgets, resident=fewest)
    check(make_plan(layout, demand, budgets), layout, demand, budgets)


def one_expert(layout: ModelLayout) -> int:
    """What of any budget a whole number of expert slots may leave over."""
    return max((max(b.block.nbytes for b in blocks) for blocks in expert_pools(layout).values()), default=1)


@settings(max_examples=100, deadline=None, database=None)
@given(layout=layouts(pages=True), more=st.lists(st.integers(0, 2 * MIB), min_size=2, max_size=12))
def test_more_ram_never_gives_fewer_resident_bytes(layout: ModelLayout, more: Sequence[int]) -> None:
    """But for what a whole expert slot leaves over. Here KV and temporaries take the same whatever happens."""
    least = smallest(layout, FLAT)
    plans = [make_plan(layout, FLAT, replace(PLENTY, ram=least + m)) for m in sorted(more)]
    for fewer, plan in pairwise(plans):
        assert plan.resident_bytes > fewer.resident_bytes - one_expert(layout)


@settings(max_examples=100, deadline=None, database=None)
@given(layout=layouts(pages=True), more=st.lists(st.integers(0, 2 * MIB), min_size=2, max_size=12))
def test_more_vram_never_gives_fewer_bytes_on_the_device(layout: ModelLayout, more: Sequence[int]) -> None:
    least = smallest_vram(layout, FLAT)
    plans = [make_plan(layout, FLAT, replace(DEVICE, vram=least + m)) for m in sorted(more)]
    for fewer, plan in pairwise(plans):
        assert plan.compute.resident > fewer.compute.resident - one_expert(layout)


@settings(max_examples=100, deadline=None, database=None)
@given(layout=layouts(pages=True), demand=demands(), more=st.lists(st.integers(0, GIB), min_size=2, max_size=8))
def test_what_weights_lose_goes_to_the_tokens(layout: ModelLayout, demand: Demand, more: Sequence[int]) -> None:
    """With more ram a plan may serve longer prompts at once at the weights' cost, but nothing is left lying about."""
    least = smallest(layout, demand)
    plans = [make_plan(layout, demand, replace(PLENTY, ram=least + m)) for m in sorted(more)]
    for fewer, plan in pairwise(plans):
        assert plan.context >= fewer.context
        used, before = (p.host.arena + p.kv + p.activations for p in (plan, fewer))
        assert plan.everything_fits or used > before - one_expert(layout)


@settings(max_examples=50, deadline=None, database=None)
@given(layout=layouts(), budgets=st.sampled_from([PLENTY, DEVICE]))
def test_everything_stays_where_everything_fits(layout: ModelLayout, budgets: Budgets) -> None:
    plan = make_plan(layout, FLAT, budgets)
    check(plan, layout, FLAT, budgets)
    assert plan.everything_fits
    assert set(plan.compute.pinned) == {layout.rest.block.key, *(b.block.key for b in dense_blocks(layout))}
    assert plan.context == FLAT.max_context
    assert plan.compute.resident >= sum(b.nbytes for b in layout.blocks())
    assert budgets.vram is None or plan.host.resident == 0, "no second copy below"


@settings(max_examples=150, deadline=None, database=None)
@given(layout=layouts(), share=st.floats(0, 1), budgets=st.sampled_from([PLENTY, DEVICE]))
def test_a_resident_cap_is_kept_however_much_there_is(layout: ModelLayout, share: float, budgets: Budgets) -> None:
    fewest = refused(layout, FLAT, replace(budgets, resident=0), "--resident")
    everything = make_plan(layout, FLAT, budgets).resident_bytes
    budgets = replace(budgets, resident=fewest + int(share * max(0, everything - fewest)))
    check(make_plan(layout, FLAT, budgets), layout, FLAT, budgets)


@settings(max_examples=50, deadline=None, database=None)
@given(number=st.integers(1, 12), nbytes=st.integers(1, 300_000), share=st.floats(0, 1))
def test_a_resident_cap_is_used_up(number: int, nbytes: int, share: float) -> None:
    """Between the smallest cap and all weights, what is left unused is less than a layer."""
    layers = tuple(LayerLayout(f"l{i}", (laid_out(f"layer.{i}", nbytes),)) for i in range(number))
    layout = ModelLayout(laid_out("rest", 77), layers, None, (), torch.float32)
    cap = 77 + nbytes + int(share * nbytes * (number - 1))
    plan = make_plan(layout, FLAT, replace(PLENTY, resident=cap))
    check(plan, layout, FLAT, replace(PLENTY, resident=cap))
    assert cap - nbytes < plan.resident_bytes <= cap


def test_a_context_beyond_the_model_is_refused() -> None:
    layout = ModelLayout(laid_out("rest", 10), (LayerLayout("l", (laid_out("layer.0", 10),)),), None, (), torch.float32)
    with pytest.raises(UsageError, match=r"--context 2049 is more than the model's 2048"):
        make_plan(layout, FLAT, replace(PLENTY, context=2049))
    for context in (1, 2048):
        assert make_plan(layout, FLAT, replace(PLENTY, context=context)).context == context


def test_weight_bytes_count_a_tied_head_once() -> None:
    table = Table("embed", Gather([100, 8], torch.float32, [Extent(0, 0, 3200)]), torch.bfloat16)
    layers = (
        LayerLayout("l", (laid_out("layer.0", 1000),), (ExpertGroup("e", 1, (laid_out("layer.0.expert.0", 50),)),)),
    )
    rest, head = laid_out("rest", 10), laid_out("head", 1600)
    assert ModelLayout(rest, layers, None, (table,), torch.bfloat16).weight_bytes == 10 + 1050 + 1600
    assert ModelLayout(rest, layers, head, (table,), torch.bfloat16).weight_bytes == 10 + 1050 + 3200
    assert ModelLayout(rest, layers, head, (table,), torch.bfloat16, True).weight_bytes == 10 + 1050 + 1600


def test_streamed_blocks_are_spread_evenly() -> None:
    """So that compute on what stays covers the reads of what does not."""
    layers = tuple(LayerLayout(f"l{i}", (laid_out(f"layer.{i}", MIB),)) for i in range(12))
    layout = ModelLayout(laid_out("rest", PAGE), layers, None, (), torch.float32)
    plan = make_plan(layout, FLAT, replace(PLENTY, resident=10 * MIB + PAGE))
    away = [i for i in range(12) if f"layer.{i}" not in plan.host.pinned]
    gaps = {b - a for a, b in zip(away, [*away[1:], away[0] + 12], strict=True)}
    assert (len(away), len(gaps)) == (4, 1), away


def test_the_host_has_room_for_whatever_passes_through_it() -> None:
    """Experts of several sizes that all stay on the device: the largest must fit, not the first."""
    experts = [tuple(laid_out(f"layer.{i}.expert.{e}", n) for e in range(2)) for i, n in enumerate((PAGE, 100 * PAGE))]
    layers = tuple(
        LayerLayout(f"l{i}", (laid_out(f"layer.{i}", PAGE),), (ExpertGroup(f"l{i}.mlp", 1, experts[i]),))
        for i in range(2)
    )
    layout = ModelLayout(laid_out("rest", PAGE), layers, None, (), torch.float32)
    check(make_plan(layout, FLAT, DEVICE), layout, FLAT, DEVICE)


# a plan can be carried out


@pytest.mark.timeout(40)
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        # few and small experts beside wide layers: all of them fit a device that the layers stream through
        ("mixtral", {"hidden_size": 128, "intermediate_size": 4, "num_local_experts": 2}),
        ("mixtral", {}),
        ("deepseek_v3", {}),
    ],
)
def test_every_device_size_computes_the_same(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    oracle = save(build(family, **changes), tmp_path)
    ids = torch.arange(4, 13).view(1, -1)
    options: dict[str, Any] = {"ram": "8GiB", "device": "emulated", "context": 16, "link": "64GB"}
    with pytest.raises(BudgetError) as e:
        Engine(tmp_path, RunConfig(vram=1, **options))
    assert e.value.smallest is not None
    weights = sum(p.numel() * p.itemsize for p in oracle.parameters())
    kinds = set()
    with torch.inference_mode():
        want = oracle(ids).logits
    for eighth in range(10):
        engine = Engine(tmp_path, RunConfig(vram=e.value.smallest + eighth * weights // 8, **options))
        try:
            got = engine.step(Sequences(engine.new_cache(16)), ids).logits
        finally:
            engine.close()
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
        plan = engine.plan
        kinds.add((plan.compute.stream is not None, plan.expert_slots == plan.experts_total))
    assert {(True, False), (False, True)} <= kinds, "from streaming to everything on the device"


def test_staging_slots_are_whole_pages(tmp_path: Path) -> None:
    """As many blocks as fit are staged at once on their way up, each in whole pages."""
    build("llama", vocab_size=230).save_pretrained(tmp_path)
    engine = Engine(tmp_path, RunConfig(device="emulated", vram="64MiB", context=64))
    engine.close()
    biggest = max(b.slot_nbytes for b in engine.layout.blocks())
    arena = page_up(3 * biggest)
    assert arena < 3 * page_up(biggest), "three would fit if slots could begin anywhere"
    plan = replace(engine.plan, host=replace(engine.plan.host, arena=arena))
    reader = DirectReader([tmp_path / "model.safetensors"])
    memory = Hierarchy(engine.layout, plan, reader, EmulatedDevice(1e9), lambda: False)
    memory.load(None)
    memory.close()
    reader.close()

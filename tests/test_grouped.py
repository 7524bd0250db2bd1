"""Experts by grouped products: against one after another, without a word to the host, and whole models through it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB, build, save
from torch.nn.functional import silu
from torch.utils._python_dispatch import TorchDispatchMode

import offload
from moe import LayerExperts, grouped
from moe.grouped import GATHER_EXPERT, GATHER_ROWS, MAX_GROUPS, Form, Grouped, PoolViews, SlotTable
from offload import Model

NEW = 12
BF16_ULPS = 4  # as in the parity suite
MOE = [f for f in FAMILIES if any("experts" in name for name in FAMILIES[f])]
# of the largest value: another order of summation, and for bfloat16 a rounding at every stage
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2**-6}


class Module:
    """What transformers' experts modules offer, in every variety there is."""

    def __init__(self, kind: str) -> None:
        self.has_gate = kind != "ungated"
        self.has_bias = self.is_transposed = self.interleaved = kind == "gpt_oss"
        self.has_post_expert_norm = kind == "normed"

    act_fn = staticmethod(silu)

    def _apply_gate(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = (x[..., ::2], x[..., 1::2]) if self.interleaved else x.chunk(2, dim=-1)
        return silu(gate.clamp(max=3)) * (up + 1)

    def post_expert_norm(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x.float().pow(2).mean(-1, keepdim=True).sqrt() + 1e-3).to(x.dtype)


KINDS = ["plain", "ungated", "gpt_oss", "normed"]


class Layer:
    """Random experts scattered over a pool whose other bytes are NaN, and a routing with padding in it."""

    def __init__(
        self, kind: str, dtype: torch.dtype, tokens: int, *, experts: int = 6, slots: int = 17, top_k: int = 3
    ) -> None:
        hidden, inner = 32, 24
        g = torch.Generator().manual_seed(tokens)
        self.module = module = Module(kind)
        wide = "gate_up_proj" if module.has_gate else "up_proj"
        shapes = {wide: (inner * (1 + module.has_gate), hidden), "down_proj": (hidden, inner)}
        if module.is_transposed:
            shapes = {n: (s[1], s[0]) for n, s in shapes.items()}
        if module.has_bias:
            shapes |= {f"{n}_bias": (s[1],) for n, s in shapes.items()}
        self.slots = dict(enumerate(torch.randperm(slots, generator=g)[:experts].tolist()))
        memory = torch.full((slots, 1 << 14), 0xFF, dtype=torch.uint8)  # a NaN in either type
        self.matrices, at = {}, 64
        for name, shape in shapes.items():
            n = torch.Size(shape).numel() * dtype.itemsize
            self.matrices[name] = memory[:, at : at + n].view(dtype).view(slots, *shape)
            at += n + (-n) % 64
            for slot in self.slots.values():
                self.matrices[name][slot] = torch.randn(shape, generator=g).mul_(shape[-1] ** -0.5).to(dtype)
        self.hidden = torch.randn(tokens, hidden, generator=g).to(dtype)
        # nobody chooses the last expert; every fifth place is padding
        self.index = torch.rand(tokens, experts - 1, generator=g).topk(top_k, dim=-1).indices
        self.index.view(-1)[::5] = experts
        self.index.view(-1)[::10] = experts + 3
        self.weights = torch.rand(tokens, top_k, generator=g)
        self.experts = experts
        self.counts = torch.bincount(self.index.reshape(-1), minlength=experts).tolist()

    def grouped(self, device: str = "cpu") -> Grouped:
        views = PoolViews({n: m.to(device) for n, m in self.matrices.items()})
        return Grouped(self.experts, views, room=1 << 30)

    def one_by_one(self) -> torch.Tensor:
        """As `LayerExperts.forward` does it without."""
        top_k = self.index.size(1)
        out = self.hidden.new_zeros(self.index.numel(), self.hidden.size(1))
        for e, slot in self.slots.items():
            at = (self.index.reshape(-1) == e).nonzero()[:, 0]
            w = {n: m[slot] for n, m in self.matrices.items()}
            y = LayerExperts._expert(self.module, w, self.hidden[at // top_k])
            out[at] = (y * self.weights.reshape(-1, 1)[at]).to(out.dtype)
        return out.view(*self.index.shape, -1).sum(dim=-2).to(self.hidden.dtype)

    def by_parts(self, grouped: Grouped, form: Form, parts: list[list[int]]) -> torch.Tensor:
        """As when the experts arrive part by part."""
        places = grouped.places(self.index)
        out = self.hidden.new_zeros(places.numel(), self.hidden.size(1))
        chosen = [e for e in range(self.experts) if self.counts[e]]
        for part in parts:
            here = {e: self.slots[e] for e in part if self.counts[e]}
            grouped.some(out, self.module, self.hidden, places, self.weights, self.counts, here, chosen, form)
        return grouped.summed(out, self.index, self.hidden)

    def everything(self, grouped: Grouped, form: Form) -> torch.Tensor:
        standing = grouped.standing(self.slots)
        assert grouped.reaches(standing, form)
        return grouped.all(self.module, self.hidden, self.index, self.weights, standing, form)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("form", list(Form))
@pytest.mark.parametrize("kind", KINDS)
def test_against_one_by_one(kind: str, form: Form, dtype: torch.dtype) -> None:
    for tokens in (1, 2, 7, 40):
        layer = Layer(kind, dtype, tokens)
        want = layer.one_by_one()
        assert want.isfinite().all()
        assert want.abs().max() > 0.1
        grouped = layer.grouped()
        got = layer.everything(grouped, form)
        assert got.dtype is dtype
        assert error(got, want) < TOLERANCE[dtype], "NaN if anything of another slot, or of padding, comes through"
        for parts in ([[0, 1, 2, 3, 4, 5]], [[4, 1], [0, 5], [2], [3]]):
            assert error(layer.by_parts(grouped, form, parts), want) < TOLERANCE[dtype]


@pytest.mark.parametrize("form", list(Form))
def test_what_is_not_there_yet_is_left_alone(form: Form) -> None:
    layer = Layer("plain", torch.float32, 7)
    grouped = layer.grouped()
    out = torch.full((layer.index.numel(), 32), 5.0)
    places = grouped.places(layer.index)
    args = layer.module, layer.hidden, places, layer.weights, layer.counts
    grouped.some(out, *args, {e: layer.slots[e] for e in (0, 2)}, range(5), form)
    mine = (places == 0) | (places == 2)
    assert mine.any()
    assert (out[~mine] == 5).all()
    assert (out[mine] != 5).any(dim=1).all()


def test_only_padding_is_zero() -> None:
    for form in Form:
        layer = Layer("gpt_oss", torch.float32, 4)
        layer.index.fill_(layer.experts)
        assert not layer.everything(layer.grouped(), form).any()


def test_a_pool_wider_than_a_product_can_reach_is_taken_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer("plain", torch.float32, 7)
    grouped = layer.grouped()
    monkeypatch.setattr("moe.grouped.MAX_GROUPS", 4)
    assert not grouped.reaches(grouped.standing(layer.slots), Form.GROUPED)
    assert grouped.reaches(grouped.standing(layer.slots), Form.GATHER)
    portions = list(grouped.windows(layer.slots, Form.GROUPED))
    assert len(portions) > 1
    assert {e: s for p in portions for e, s in p.items()} == layer.slots
    assert all(max(p.values()) - min(p.values()) < 4 for p in portions)
    assert list(grouped.windows(layer.slots, Form.GATHER)) == [layer.slots]
    assert list(grouped.windows({}, Form.GROUPED)) == []
    assert error(layer.by_parts(grouped, Form.GROUPED, [list(range(6))]), layer.one_by_one()) < 3e-6


def test_the_table_is_uploaded_when_it_changes_and_only_then() -> None:
    table = SlotTable(4, 99, torch.device("cpu"))
    assert table.at({0: 7, 2: 5}).tolist() == [7, 99, 5, 99, 99]
    first = table.at({2: 5}, [1])
    assert table.uploads == 1
    second = table.at({1: 3}, [2])
    assert (second.tolist(), table.uploads) == ([7, 3, 99, 99, 99], 2)
    assert first.tolist() == [7, 99, 5, 99, 99], "what was handed out may still be read"
    assert table.at({0: 7, 1: 3}, [2, 3]) is second
    assert SlotTable(2, 9, torch.device("cpu")).at({}).tolist() == [9, 9, 9]


# which form


def views(dtype: torch.dtype = torch.bfloat16, rows: int = 64, columns: int = 32) -> PoolViews:
    return PoolViews({"gate_up_proj": torch.zeros(4, rows, columns, dtype=dtype),
                      "down_proj": torch.zeros(4, columns, rows // 2, dtype=dtype)})  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "rows", "capability", "form"),
    [
        (torch.bfloat16, 8, (9, 0), Form.GROUPED),
        (torch.bfloat16, 5000, (10, 0), Form.GROUPED),
        (torch.bfloat16, 8, (8, 9), Form.GATHER),
        (torch.bfloat16, 8, (12, 0), Form.GATHER),
        (torch.float32, 8, (9, 0), Form.GATHER),
        (torch.bfloat16, GATHER_ROWS + 1, (8, 9), None),  # torch would ask the host for the offsets
        (torch.float32, GATHER_ROWS + 1, (9, 0), None),
        (torch.bfloat16, 0, (9, 0), None),
    ],
)
def test_form_on_a_device(
    dtype: torch.dtype, rows: int, capability: tuple[int, int], form: Form | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = views(dtype)
    monkeypatch.setattr(pool, "device", torch.device("cuda"))
    table = Grouped.__new__(Grouped)
    table.pool, table._room, table._capability = pool, 1 << 30, capability
    assert table.form(rows, dtype) is form
    assert table.form(rows, torch.float16) is None, "another type than the weights': as ever"
    table._room = rows * pool.widest - 1
    assert table.form(rows, dtype) is (None if form is Form.GATHER else form), "copies must fit"
    table._room = 1 << 30
    pool.widest = GATHER_EXPERT + 1
    assert table.form(rows, dtype) is (None if form is Form.GATHER else form), "nor be large"


def test_what_a_grouped_product_cannot_read() -> None:
    assert views(rows=64, columns=32).aligned
    assert not views(rows=64, columns=36).aligned
    assert not views(rows=72, columns=32).aligned
    odd = torch.zeros(4 * 64 * 32 + 4, dtype=torch.bfloat16)[4:].view(4, 64, 32)
    assert not PoolViews({"up_proj": odd, "down_proj": torch.zeros(4, 32, 64)}).aligned
    pool = views(columns=36)
    assert Grouped(4, pool, room=0).form(8, torch.bfloat16) is None
    assert Grouped(4, pool, room=1 << 20).form(8, torch.bfloat16) is Form.GATHER


# the host


class Watched(TorchDispatchMode):
    """Counts what is computed, and forbids what a host would wait for."""

    WAITING = ("_local_scalar_dense", "item", "nonzero", "unique", "bincount", "masked_select", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        assert not any(name.startswith(w) for w in self.WAITING), name
        assert not (name == "_to_copy" and (kwargs or {}).get("device") is not None), "a copy to another device"
        self.calls.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, tuple[Path, Any, int]] = {}

    def folder(family: str) -> tuple[Path, Any, int]:
        if family not in made:
            path = tmp_path_factory.mktemp(family)
            oracle = save(build(family), path)
            with pytest.raises(offload.BudgetError, match="--vram") as refusal:
                offload.load(path, device="emulated", vram=1, context=128)
            assert refusal.value.smallest is not None
            made[family] = path, oracle, refusal.value.smallest
        return made[family]

    return folder


@contextmanager
def on_device(path: Path, vram: int | str, **options: Any) -> Iterator[Model]:
    """Computed as on a GPU, in memory of an emulated one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "supported", lambda device: True)
        with offload.load(path, device="emulated", vram=vram, context=128, expert_compute="device", **options) as model:
            yield model


def layers(model: Model) -> list[tuple[Any, LayerExperts]]:
    found = [m for m in model.hf.modules() if "offload_experts" in m.__dict__]
    return [(m, m.__dict__["offload_experts"]) for m in found]


def routing(experts: list[int], tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(1))
    index = torch.tensor([experts[(2 * t + k) % len(experts)] for t in range(tokens) for k in range(2)]).view(-1, 2)
    return hidden, index, torch.full((tokens, 2), 0.5)


@pytest.mark.parametrize("tokens", [4, 60])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_where_all_stays_nothing_waits_and_launches_are_a_constant(folders: Any, family: str, tokens: int) -> None:
    path, _, _ = folders(family)
    with on_device(path, "64MiB") as model, torch.inference_mode():
        assert model.plan.everything_fits
        module, experts = layers(model)[-1]
        assert experts.grouped is not None
        counted = []
        for chosen in ([3, 1], [0, 1, 2, 3, 4, 5, 6, 7]):
            hidden, index, weights = routing(chosen, tokens)
            experts.forward(module, hidden, index, weights)  # the table goes up once
            uploads = experts.grouped.table.uploads
            with Watched() as watched:
                experts.forward(module, hidden, index, weights)
            assert experts.grouped.table.uploads == uploads == 1
            counted.append(watched.calls)
        assert counted[0] == counted[1]
        name = "_grouped_mm" if tokens == 60 else "bmm"
        assert watched.calls.count(name) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", list(Form))
def test_where_all_stays_nothing_is_brought_to_the_host(kind: str, form: Form) -> None:
    """On tensors that have no values, whatever asks for one fails."""
    layer = Layer(kind, torch.bfloat16, 40)
    grouped = layer.grouped("meta")
    away = [t.to("meta") for t in (layer.hidden, layer.index, layer.weights)]
    standing = grouped.standing(layer.slots)
    assert grouped.all(layer.module, *away, standing, form).shape == (40, 32)  # type: ignore[arg-type]
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        away[1].cpu()


def test_elsewhere_the_host_reads_once(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _, smallest = folders("qwen3_moe")
    read = []

    def cpu(tensor: torch.Tensor) -> torch.Tensor:
        read.append(tensor.clone())  # as from a device
        return read[-1]

    class Once(Watched):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func._schema.name == "aten::bincount":
                assert args[0] is read[0], "of what was read, on the host"
                return func(*args, **(kwargs or {}))
            return super().__torch_dispatch__(func, types, args, kwargs)

    with on_device(path, smallest + (1 << 18)) as model, torch.inference_mode():
        assert not model.plan.everything_fits
        module, experts = layers(model)[-1]
        experts._ahead = None  # the last layer looks at no next one; what it is told costs nothing
        hidden, index, weights = routing([2, 5], 4)
        experts.forward(module, hidden, index, weights)  # they come
        want = experts.forward(module, hidden, index, weights)
        monkeypatch.setattr(torch.Tensor, "cpu", cpu)
        assert experts.grouped is not None
        uploads = experts.grouped.table.uploads
        with Once() as watched:
            got = experts.forward(module, hidden, index, weights)
        assert len(read) == 1
        assert torch.equal(got, want)
        assert experts.grouped.table.uploads == uploads, "both were there, where they had been"
        assert watched.calls.count("bmm") == 2


# whole models


@pytest.mark.parametrize("room", ["smallest", "some", "everything"])
@pytest.mark.parametrize("family", MOE)
def test_tokens_equal_the_resident_model(folders: Any, family: str, room: str) -> None:
    path, oracle, smallest = folders(family)
    ids = torch.randint(4, VOCAB, (1, 45), generator=torch.Generator().manual_seed(3))  # more rows than are gathered
    with torch.inference_mode():
        want = oracle(ids).logits
    tokens = oracle.generate(ids, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :].tolist()
    vram = {"smallest": smallest, "some": smallest + (256 << 10), "everything": "64MiB"}[room]
    used: list[tuple[str, Form]] = []

    def noting(name: str, compute: Any) -> Any:
        def noted(*args: Any) -> Any:
            used.append((name, args[-1]))
            return compute(*args)

        return noted

    with on_device(path, vram) as model:
        assert model.plan.everything_fits == (room == "everything")
        for _, experts in layers(model):
            group = experts.grouped
            assert group is not None
            for name in ("all", "some"):
                setattr(group, name, noting(name, getattr(group, name)))
        got = model.hf(input_ids=ids).logits
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
        result = model.run([ids[0].tolist()], max_new_tokens=NEW)
        assert result.token_ids[0] == tokens[: len(result.token_ids[0])]
        assert {name for name, _ in used} == ({"all"} if room == "everything" else {"some"})
        assert {form for _, form in used} >= {Form.GROUPED}
        if room == "everything":
            assert result.stats.hit_rate == 1
            assert used.count(("all", Form.GATHER)) == len(layers(model)) * (len(result.token_ids[0]) - 1)
        elif room == "smallest":
            assert result.stats.total.bytes_up > model.plan.resident_bytes


@pytest.mark.parametrize("room", ["smallest", "everything"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "minimax_m2"])
def test_bfloat16_choices_within_ulps(folders: Any, family: str, room: str, tmp_path: Path) -> None:
    oracle = save(build(family, dtype=torch.bfloat16), tmp_path)
    ids = torch.randint(4, VOCAB, (1, 45), generator=torch.Generator().manual_seed(3))
    with pytest.raises(offload.BudgetError) as refusal:
        offload.load(tmp_path, device="emulated", vram=1, context=128)
    assert refusal.value.smallest is not None
    vram = refusal.value.smallest if room == "smallest" else "64MiB"
    with on_device(tmp_path, vram) as model, torch.inference_mode():
        want = oracle(ids).logits.float()
        got = model.hf(input_ids=ids).logits.float()
    top = want.max(-1).values
    chosen = want.gather(-1, got.argmax(-1, keepdim=True)).squeeze(-1)
    assert ((top - chosen) <= BF16_ULPS * top.abs() * 2**-8).all()


def test_a_padded_batch(folders: Any) -> None:
    path, oracle, smallest = folders("mixtral")
    prompts = [list(range(4, 25)), list(range(30, 39))]
    ids = torch.tensor([[0] * (21 - len(p)) + p for p in prompts])
    mask = (ids != 0).long()
    want = oracle.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)[:, 21:].tolist()
    with on_device(path, smallest) as model:
        got = model.run(prompts, max_new_tokens=NEW).token_ids
    assert [w[: len(g)] for w, g in zip(want, got, strict=True)] == got


def test_what_fails_half_way_holds_nothing(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _, smallest = folders("qwen3_moe")
    with on_device(path, smallest) as model:
        want = model.run([[5, 6, 7]], max_new_tokens=6).token_ids
        calls = 0
        some = Grouped.some

        def failing(self: Grouped, *args: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 6:
                raise RuntimeError("injected")
            some(self, *args)

        monkeypatch.setattr(Grouped, "some", failing)
        with pytest.raises(RuntimeError, match="injected"):
            model.run([[5, 6, 7]], max_new_tokens=6)
        compute = model.engine._memory.compute
        assert all(e.leases == 0 for e in compute._entries.values())
        assert model.run([[5, 6, 7]], max_new_tokens=6).token_ids == want


def test_the_emulated_device_computes_as_ever(tiny_moe: Path) -> None:
    with offload.load(tiny_moe, device="emulated", vram="64MiB", context=64) as model:
        assert all(experts.grouped is None for _, experts in layers(model))
    assert grouped.supported(torch.device("cuda", 0))
    assert not grouped.supported(torch.device("cpu"))
    assert MAX_GROUPS < 1024

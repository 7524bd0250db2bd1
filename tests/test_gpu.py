"""On a real GPU: the same tokens, inside `--vram`. Run by `make gpu-check`; needs no test plugin.

Everything here is skipped where there is no CUDA device, and has not been run until `bench/results` has a
`gpu-*.json`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB, build, save

import offload
from moe import LayerExperts, grouped
from moe.grouped import Form, Grouped, PoolViews
from offload import hardware
from offload.hardware import Profile
from offload.launches import counted
from offload.stats import StepStats
from tiers import gds, probe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NEW = 12
BF16_ULPS = 4  # as in the parity suite
MOE = [f for f in FAMILIES if any("experts" in name for name in FAMILIES[f])]


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("room", ["smallest", "half", "everything"])
@pytest.mark.parametrize("compute", ["both", "device"])
def test_tokens_equal_the_resident_model(family: str, room: str, compute: str, tmp_path: Path) -> None:
    """Experts that lie in host memory are computed by the CPU, or moved."""
    oracle = save(build(family), tmp_path).cuda()
    ids = torch.randint(4, VOCAB, (1, 21), generator=torch.Generator().manual_seed(3))
    with pytest.raises(offload.BudgetError, match="--vram") as refusal:
        offload.load(tmp_path, device="cuda", vram=1, context=128)
    least = refusal.value.smallest
    assert least is not None
    weights = sum(p.numel() * 4 for p in oracle.parameters())
    vram = {"smallest": least, "half": least + weights // 2, "everything": least + 4 * weights}[room]
    with torch.inference_mode():
        want = oracle(ids.cuda()).logits
    tokens = oracle.generate(ids.cuda(), max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :].tolist()
    with offload.load(tmp_path, device="cuda", vram=vram, context=128, expert_compute=compute) as model:
        got = model.hf(input_ids=ids.cuda()).logits
        assert got.device.type == "cuda"
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()
        result = model.run([ids[0].tolist()], max_new_tokens=NEW)
        assert result.token_ids[0] == tokens[: len(result.token_ids[0])]
        use = result.stats.experts_use
        if room != "everything":
            assert result.stats.total.bytes_up > 0 or (use is not None and use.cpu > 0)
        assert compute == "both" or use is None or use.cpu == 0


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "qwen3_moe"])
def test_tokens_are_the_same_with_graphs_and_launches_fewer(family: str, tmp_path: Path) -> None:
    save(build(family), tmp_path)
    prompt = [list(range(5, 26))]
    tokens, launches = {}, {}
    for graphs in (False, True):
        with offload.load(tmp_path, device="cuda", context=128, graphs=graphs) as model:
            model.run(prompt, max_new_tokens=NEW)
            result = model.run(prompt, max_new_tokens=NEW)
            tokens[graphs] = result.token_ids
            assert result.notes == []
            model.engine.count_launches = True
            model.run(prompt, max_new_tokens=NEW)
            decode = model.stats.decode
            assert decode.counted == NEW - 1
            launches[graphs] = decode.launches
            if graphs:
                assert model.engine.captures is not None
                assert model.engine.captures.modules
                assert model.engine.captures.replays > 0
    assert tokens[True] == tokens[False]
    assert 0 < launches[True] < launches[False]


class Gated(torch.nn.Module):
    """An experts module of the common kind."""

    has_gate, has_bias, is_transposed = True, False, False
    act_fn = staticmethod(torch.nn.functional.silu)

    def _apply_gate(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return self.act_fn(gate) * up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", list(Form))
@pytest.mark.parametrize("tokens", [1, 8, 300])
def test_experts_by_grouped_products(tokens: int, form: Form, dtype: torch.dtype) -> None:
    """Against one by one; slots of others and padding hold NaN. Where all stays and there is a kernel, nobody waits."""
    hidden, inner, slots, count, top_k = 256, 128, 40, 16, 4
    g = torch.Generator(device="cuda").manual_seed(tokens)
    where = torch.randperm(slots, generator=g, device="cuda")[:count].tolist()
    matrices = {}
    for name, shape in (("gate_up_proj", (2 * inner, hidden)), ("down_proj", (hidden, inner))):
        matrices[name] = torch.full((slots, *shape), torch.nan, device="cuda", dtype=dtype)
        matrices[name][where] = torch.randn(count, *shape, generator=g, device="cuda").mul_(shape[1] ** -0.5).to(dtype)
    x = torch.randn(tokens, hidden, generator=g, device="cuda").to(dtype)
    index = torch.rand(tokens, count, generator=g, device="cuda").topk(top_k, dim=-1).indices
    index[0, 0] = count  # padding
    weights = torch.rand(tokens, top_k, generator=g, device="cuda")
    module = Gated()
    want = torch.zeros(tokens * top_k, hidden, device="cuda", dtype=dtype)
    for e, slot in enumerate(where):
        at = (index.reshape(-1) == e).nonzero()[:, 0]
        y = LayerExperts._expert(module, {n: m[slot] for n, m in matrices.items()}, x[at // top_k])
        want[at] = (y * weights.reshape(-1, 1)[at]).to(dtype)
    want = want.view(tokens, top_k, hidden).sum(dim=1)

    capability = grouped.capability_of(x.device)
    layer = Grouped(count, PoolViews(matrices), room=1 << 30, capability=capability)
    standing = layer.standing(dict(enumerate(where)))
    layer.all(module, x, index, weights, standing, form)  # libraries set themselves up
    torch.cuda.synchronize()
    quiet = form is Form.GATHER or grouped.has_grouped_kernel(dtype, capability)
    torch.cuda.set_sync_debug_mode("error" if quiet else "default")
    try:
        got = layer.all(module, x, index, weights, standing, form)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    tolerance = 1e-4 if dtype is torch.float32 else 2**-6
    assert (got - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("family", MOE)
@pytest.mark.parametrize("room", ["smallest", "everything"])
def test_bfloat16_experts_choose_within_ulps(
    family: str, room: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Teacher-forced, prompt by prompt and token by token. Where everything fits no layer's experts wait."""
    quiet, calls = LayerExperts._all, []

    def silent(self: LayerExperts, *args: Any) -> torch.Tensor:
        torch.cuda.set_sync_debug_mode("error" if calls else "default")  # at first, libraries set themselves up
        try:
            calls.append(args)
            return quiet(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(LayerExperts, "_all", silent)
    oracle = save(build(family, dtype=torch.bfloat16), tmp_path).cuda()
    ids = torch.randint(4, VOCAB, (1, 8), generator=torch.Generator().manual_seed(3)).cuda()
    options: dict[str, Any] = {"device": "cuda", "context": 128}
    if room == "smallest":
        with pytest.raises(offload.BudgetError, match="--vram") as refusal:
            offload.load(tmp_path, vram=1, **options)
        options["vram"] = refusal.value.smallest
    with offload.load(tmp_path, **options) as model, torch.inference_mode():
        want = oracle(ids).logits.float()
        got = model.hf(input_ids=ids).logits.float()
        model.run([ids[0].tolist()], max_new_tokens=NEW)
        assert bool(calls) == (room == "everything")
    top = want.max(-1).values
    chosen = want.gather(-1, got.argmax(-1, keepdim=True)).squeeze(-1)
    assert ((top - chosen) <= BF16_ULPS * top.abs() * 2**-8).all()


def test_grouped_experts_launch_less_and_wait_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"num_experts": 32, "num_experts_per_tok": 8}
    save(build("qwen3_moe", dtype=torch.bfloat16, **config), tmp_path)
    launches, syncs = {}, {}
    for by_products in (False, True):
        monkeypatch.setattr(grouped, "supported", lambda device, answer=by_products: answer)
        with offload.load(tmp_path, device="cuda", context=128) as model:
            model.run([[5, 6, 7]], max_new_tokens=NEW)
            model.engine.count_launches = True
            decode = model.run([[5, 6, 7]], max_new_tokens=NEW).stats.decode
            launches[by_products], syncs[by_products] = decode.launches, decode.syncs
    assert 0 < launches[True] < launches[False]
    assert syncs[True] < syncs[False]


def test_launches_and_waits_of_the_computing_thread_are_counted() -> None:
    stats = StepStats()
    x = torch.ones(64, 64, device="cuda")
    with counted(stats):
        for _ in range(5):
            x = x * 2
        torch.cuda.synchronize()
    assert stats.counted == 1
    assert stats.launches == 5
    assert stats.syncs >= 1, "the profiler may add one at its end"


@pytest.mark.skipif(gds.unusable() is not None, reason=f"reading into device memory: {gds.unusable()}")
def test_files_are_read_straight_into_device_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = save(build("llama", hidden_size=512, intermediate_size=1024, num_hidden_layers=8), tmp_path).cuda()
    ids = torch.randint(4, VOCAB, (1, 21), generator=torch.Generator().manual_seed(3))
    tokens = oracle.generate(ids.cuda(), max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :].tolist()
    speeds = probe.DiskReading(1 << 20, 8, True, 1.0, 1.0)
    products = (probe.ComputeReading("cuda", "bfloat16", 1, 1e12, 1e12, 1e-6),)
    faster = Profile({}, "cuda", 0.0, (speeds,), 1.0, probe.LinkReading(1.0, 1.0, 1.0), products, 1e-4,
                     1e11, 1e12, 1e-12, 1e-5, 1e-3, direct_bytes_per_s=2.0)  # fmt: skip
    monkeypatch.setattr(hardware, "kept", lambda folder, device: faster)
    with pytest.raises(offload.BudgetError, match="--vram") as refusal:
        offload.load(tmp_path, device="cuda", vram=1, context=128)
    least = refusal.value.smallest
    assert least is not None
    with pytest.raises(offload.BudgetError, match="--resident") as refusal:
        offload.load(tmp_path, device="cuda", vram=least, resident="1B", context=128)
    with offload.load(tmp_path, device="cuda", vram=least, resident=refusal.value.smallest, context=128) as model:
        result = model.run([ids[0].tolist()], max_new_tokens=NEW)
        assert result.notes == []
        assert result.token_ids[0] == tokens[: len(result.token_ids[0])]
        assert result.stats.decode.bytes_up == 0
        assert result.stats.decode.bytes_read > 0


def test_device_memory_stays_inside_the_budget(tmp_path: Path) -> None:
    model = build("llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=16, num_attention_heads=8,
                  num_key_value_heads=4, max_position_embeddings=4096)  # fmt: skip
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    with pytest.raises(offload.BudgetError, match="--vram") as refusal:
        offload.load(tmp_path, device="cuda", vram=1, context=512)
    assert refusal.value.smallest is not None
    vram = refusal.value.smallest + (64 << 20)
    free_before, _ = torch.cuda.mem_get_info()
    torch.cuda.reset_peak_memory_stats()
    with offload.load(tmp_path, device="cuda", vram=vram, context=512) as loaded:
        loaded.run([list(range(4, 154)) * 2], max_new_tokens=64)
        free_after, _ = torch.cuda.mem_get_info()
        assert torch.cuda.max_memory_reserved() <= vram
        assert free_before - free_after <= vram
        assert loaded.stats.peak_rss_bytes <= loaded.plan.ram


def test_ten_steps_leave_nothing_behind(tmp_path: Path) -> None:
    save(build("qwen3_moe"), tmp_path)
    before = None
    for _ in range(3):
        with offload.load(tmp_path, device="cuda", context=128) as model:
            model.run([[5, 6, 7]], max_new_tokens=10)
        del model
        torch.cuda.empty_cache()
        now = torch.cuda.memory_allocated()
        assert before is None or now <= before + (1 << 20)
        before = now

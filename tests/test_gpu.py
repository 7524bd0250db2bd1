"""On a real GPU: the same tokens, inside `--vram`. Run by `make gpu-check`; needs no test plugin.

Everything here is skipped where there is no CUDA device, and has not been run until `bench/results` has a
`gpu-*.json`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES, VOCAB, build, save

import offload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NEW = 12


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("room", ["smallest", "half", "everything"])
def test_tokens_equal_the_resident_model(family: str, room: str, tmp_path: Path) -> None:
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
    with offload.load(tmp_path, device="cuda", vram=vram, context=128) as model:
        got = model.hf(input_ids=ids.cuda()).logits
        assert got.device.type == "cuda"
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()
        result = model.run([ids[0].tolist()], max_new_tokens=NEW)
        assert result.token_ids[0] == tokens[: len(result.token_ids[0])]
        if room != "everything":
            assert result.stats.total.bytes_up > 0


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

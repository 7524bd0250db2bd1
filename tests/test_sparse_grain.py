"""Neighbouring chunks are chosen together, layer by layer, where the end of the prompt says that little is lost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCAB, build
from hypothesis import given
from hypothesis import strategies as st
from test_kvstore import Disk, reference

import kvstore.sparse
import offload
from cli.main import main
from kvstore import ChunkStore, KVShape, Rule, SparseOptions, TieredCache, attend
from kvstore.shares import GRAINS
from kvstore.sparse import OBSERVED, RECENT, SINKS, SparseRow
from moe import kernels
from offload.engine import pieces

CHUNK, DIM, HEADS, KV_HEADS = 16, 16, 4, 2
TOKENS = 192 * CHUNK
RULE = Rule(DIM**-0.5)
STRETCH = tuple(range(24, 56))  # of chunks that the first layer's last queries look at
APART = tuple(range(5, 180, 4))  # the second's
PROMPT = [4 + 7 * i % (VOCAB - 4) for i in range(150)]


@pytest.fixture
def disk() -> Iterator[Disk]:
    disk = Disk()
    yield disk
    disk.close()


def cache_of(disk: Disk, windows: list[int | None], budget: int | float, resident: int, **options: Any) -> TieredCache:
    def make(shape: KVShape, batch: int) -> ChunkStore:
        sparse = SparseOptions(budget, **options)
        return ChunkStore(disk.disk, shape, len(windows), batch, TOKENS, resident, tokens=CHUNK, sparse=sparse)

    return TieredCache(windows, make)


class Told:
    """Layers that have seen a prompt, whose last queries look at the chunks given; and what they hold."""

    def __init__(self, disk: Disk, looks: list[tuple[int, ...]], budget: int | float, resident: int, **opts: Any):
        self.cache = cache_of(disk, [None] * len(looks), budget, resident, **opts)
        g = self.generator = torch.Generator().manual_seed(7)
        self.held: list[tuple[torch.Tensor, torch.Tensor]] = []
        for layer, at in zip(self.cache.tiered, looks, strict=True):
            keys, values = (torch.randn(1, KV_HEADS, TOKENS - 40, DIM, generator=g) for _ in range(2))
            query = torch.randn(1, HEADS, TOKENS - 40, DIM, generator=g)
            wanted = torch.randn(DIM, generator=g).sign()
            for chunk in at:
                keys[:, :, chunk * CHUNK : (chunk + 1) * CHUNK] += 2 * wanted
            query[:, :, -OBSERVED:] += 2 * wanted
            layer.update(keys, values)
            attend(self.cache, layer, query, keys, values, RULE, [0])
            self.held.append((keys, values))

    def token(self, number: int, few: Any = None) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """One more token: (what attention says, what the textbook says of the chunks chosen, these)."""
        layer = self.cache.tiered[number]
        keys, values = (torch.randn(1, KV_HEADS, 1, DIM, generator=self.generator) for _ in range(2))
        query = torch.randn(1, HEADS, 1, DIM, generator=self.generator)
        self.held[number] = k, v = tuple(
            torch.cat(both, 2) for both in zip(self.held[number], (keys, values), strict=True)
        )  # type: ignore[assignment]
        layer.update(keys, values)
        out = attend(self.cache, layer, query, keys, values, RULE, [0], few=few)
        row = layer.rows[0].sparse
        assert row is not None
        chosen = sorted(row.ahead.foresee(number))  # what it has just chosen
        index = torch.cat([torch.arange(c * CHUNK, min((c + 1) * CHUNK, k.shape[2])) for c in chosen])
        return out.double(), reference(query, k[:, :, index], v[:, :, index], RULE, [0]), chosen


def test_each_layer_gets_its_own(disk: Disk) -> None:
    told = Told(disk, [STRETCH, APART], 0.25, 0)
    assert told.cache.grains == (8, 1)
    told.cache.close()


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("resident", [0, 1 << 30])
@pytest.mark.parametrize("policy", ["bounds", "landmarks"])
def test_attention_is_that_to_the_chunks_chosen(disk: Disk, kernel: bool, resident: int, policy: str) -> None:
    few = None
    if kernel:
        made = kernels.load()
        if made is None:
            pytest.skip("no C compiler")
        few = made.attend_table
    told = Told(disk, [STRETCH, APART], 0.25, resident, policy=policy)
    assert told.cache.grains == (8, 1)
    for step in range(20):
        for number, size in enumerate(told.cache.grains):
            got, want, chosen = told.token(number, few)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
            chunks = -(-(TOKENS - 40 + step + 1) // CHUNK)
            assert len(chosen) == -(-(TOKENS - 40 + step + 1) // (4 * CHUNK))
            always = {*range(SINKS), *range(chunks - RECENT, chunks)}
            assert always <= set(chosen)
            if size == 8:  # 45 to choose, most of them in groups of 8
                whole = [g for g in range(24) if all(c in chosen for c in range(8 * g, 8 * g + 8) if c < chunks)]
                assert len(whole) >= 4
    told.cache.close()


def test_nothing_is_put_together_before_the_prompt_ends(disk: Disk) -> None:
    cache = cache_of(disk, [None], 0.25, 0)
    (layer,) = cache.tiered
    cache.prompt_ends = False
    keys = torch.randn(1, KV_HEADS, 2048, DIM)
    layer.update(keys, keys)
    attend(cache, layer, torch.zeros(1, HEADS, 2048, DIM), keys, keys, RULE, [0])
    assert cache.grains == (1,)
    cache.prompt_ends = True
    layer.update(keys, keys)
    attend(cache, layer, torch.zeros(1, HEADS, 2048, DIM), keys, keys, RULE, [0])  # looks everywhere alike
    assert cache.grains == (8,)  # of 256 chunks 64
    cache.close()


@pytest.mark.parametrize("policy", ["h2o", "snapkv", "recent"])
def test_policies_to_compare_with_choose_single_chunks(disk: Disk, policy: str) -> None:
    told = Told(disk, [STRETCH], 0.25, 0, policy=policy)
    assert told.cache.grains == (1,)
    told.cache.close()


def test_layers_with_a_window_are_not_asked(disk: Disk) -> None:
    cache = cache_of(disk, [None, 40], 0.25, 0)
    keys = torch.randn(1, KV_HEADS, 2048, DIM)
    for layer, rule in zip(cache.tiered, (RULE, Rule(RULE.scale, 40)), strict=True):
        layer.update(keys, keys)
        attend(cache, layer, torch.zeros(1, HEADS, 2048, DIM), keys, keys, rule, [0])
    assert cache.grains == (4,)
    cache.close()


def test_shared_budgets_are_what_is_asked_of(disk: Disk) -> None:
    """With `by_layer` the one that looks everywhere gets most of the budget, and its groups from that."""
    told = Told(disk, [STRETCH, APART], 40 * CHUNK, 0, by_layer=True)
    rows = [layer.rows[0].sparse for layer in told.cache.tiered]
    assert [r is not None and r.mass is None for r in rows] == [True, True]
    factors = [r.factor for r in rows if r is not None]
    assert factors[0] != 1.0 and sum(factors) == pytest.approx(2.0)
    assert told.cache.grains[1] == 1
    for number in (0, 1):
        got, want, chosen = told.token(number)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert len(chosen) == round(40 * factors[number])
    told.cache.close()


def test_cropping_and_forking(disk: Disk) -> None:
    told = Told(disk, [STRETCH], 0.25, 0)
    (layer,) = told.cache.tiered
    for _ in range(30):
        told.token(0)
    # tokens that were generated are taken back: the prompt is what was measured
    layer.crop(-30)
    told.held[0] = tuple(t[:, :, :-30] for t in told.held[0])  # type: ignore[assignment]
    assert told.cache.grains == (8,)
    got, want, _ = told.token(0)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    # forks go on as they were, each for itself
    layer.batch_repeat_interleave(2)
    assert [row.sparse.grain for row in layer.rows if row.sparse is not None] == [8, 8]
    layer.rows[1].crop(100)
    assert [row.sparse.grain for row in layer.rows if row.sparse is not None] == [8, 1]
    layer.batch_select_indices(torch.tensor([0]))
    got, want, _ = told.token(0)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    # some of the prompt goes: what its end looked at is no longer known
    layer.crop(-60)
    told.held[0] = tuple(t[:, :, :-60] for t in told.held[0])  # type: ignore[assignment]
    assert told.cache.grains == (1,)
    got, want, _ = told.token(0)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    told.cache.close()


@given(st.integers(1, 3000), st.integers(1, 600), st.integers(1, 40))
def test_pieces_of_a_prompt(tokens: int, chunk: int, least: int) -> None:
    parts = pieces(tokens, chunk, least)
    assert sum(parts) == tokens and all(0 < n <= chunk for n in parts)
    assert len(parts) == -(-tokens // chunk)
    if tokens > chunk >= 2 * least:
        assert parts[-1] >= least
    assert all(n == chunk for n in parts[:-2])
    assert pieces(tokens, chunk) == [
        *[chunk] * (len(parts) - 1),
        parts[-1] if len(parts) == 1 else tokens - chunk * (len(parts) - 1),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("gemma2")
    build("gemma2").save_pretrained(found)
    return found


def test_the_last_queries_are_seen_whatever_is_left_of_the_prompt(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token more than whole passes: alone it would be attended to as one that is generated."""
    seen = []
    observed = SparseRow.observed

    def spy(row: SparseRow, mass: torch.Tensor) -> None:
        seen.append(mass.shape[1])
        observed(row, mass)

    monkeypatch.setattr(SparseRow, "observed", spy)
    options: dict[str, Any] = {"kv_budget": "50%", "overrides": {"kv_chunk": 16, "prefill_chunk": 64}}
    with offload.load(folder, **options) as model:
        result = model.run([PROMPT[:129]], max_new_tokens=2, ignore_eos=True)
        assert model.plan.prefill_chunk == 64
    assert seen == [9] * len(result.stats.kv_grains) and seen
    assert [s.tokens for s in model.engine.steps][:3] == [64, 49, 16]


def test_end_to_end(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where they lie does not change what is said; layers with windows have no grain."""
    overrides = {"kv_chunk": 16}
    with offload.load(folder, overrides=overrides) as model:
        exact = model.run([PROMPT], max_new_tokens=12, ignore_eos=True)
        layers = model.hf.config.layer_types.count("full_attention")
        assert exact.stats.kv_grains == ()
    said = []
    for forced in (None, 4):
        if forced is not None:
            monkeypatch.setattr(kvstore.sparse, "grain", lambda *args, n=forced: n)
        for resident in ("10%", "100%"):
            with offload.load(folder, kv_budget="50%", kv_resident=resident, overrides=overrides) as model:
                result = model.run([PROMPT, PROMPT[3:]], max_new_tokens=12, ignore_eos=True)
                grains = result.stats.kv_grains
                assert len(grains) == layers and set(grains) <= ({forced} if forced is not None else set(GRAINS))
                said.append(result.token_ids)
    assert said[0] == said[1] and said[2] == said[3]
    with offload.load(folder, kv_budget="100%", overrides=overrides) as model:
        assert model.run([PROMPT], max_new_tokens=12, ignore_eos=True).token_ids == exact.token_ids
    args = ["generate", str(folder), "--prompt-ids", ",".join(map(str, PROMPT)), "--max-new-tokens", "4", "--json",
            "--kv-budget", "50%", "--set", "kv_chunk=16"]  # fmt: skip
    assert main(args) == 0
    assert json.loads(capsys.readouterr().out)["kv_grains"] == [4] * layers

"""The KV store against plain tensors, and attention over it against the textbook in float64."""

from __future__ import annotations

import contextlib
import gc
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kvstore.attention
import kvstore.tiered_attention
from kvstore import ChunkStore, KVDisk, KVShape, Rule, TieredCache, TieredLayer, attend, chunk_tokens, slots_for
from kvstore.attention import partial
from kvstore.store import SHORTEST
from offload.describe import describe
from offload.sizes import parse_part, parse_size
from tiers import PAGE, DirectReader, OffloadError, TransferQueue
from tiers.memory import peak_rss, rss

Tensors = tuple[torch.Tensor, torch.Tensor]
KV_HEADS, KEY, VALUE = 2, 8, 6


class Disk:
    """A spill file with what belongs to it."""

    def __init__(self, limit: int | None = None) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.reader = DirectReader([])
        self.read = TransferQueue(self.reader, 2)
        self.disk = KVDisk(Path(self.folder.name), limit, self.reader, self.read)
        self.stores: list[ChunkStore] = []

    def cache(self, windows: list[int | None], chunk: int, capacity: int, resident: int) -> TieredCache:
        def make(shape: KVShape, batch: int) -> ChunkStore:
            store = ChunkStore(self.disk, shape, len(windows), batch, capacity, resident, tokens=chunk)
            self.stores.append(store)
            return store

        return TieredCache(windows, make)

    def close(self) -> None:
        self.disk.close()
        self.read.close()
        self.reader.close()
        self.folder.cleanup()


@pytest.fixture
def disk() -> Iterator[Disk]:
    disk = Disk()
    yield disk
    disk.close()


def check(store: ChunkStore, layers: list[TieredLayer]) -> None:
    """Every invariant there is between sequences, chunks, slots and the file."""
    r = store.residency
    assert store._arena.nbytes == store.slots * store.slot_nbytes == store._arena.used
    pool, _ = r._pools["kv"]
    owners = Counter(chunk for layer in layers for row in layer.rows for chunk in row.chunks)
    assert {c.key for c in owners} == set(r._entries), "no chunk is forgotten, none is kept that nobody owns"
    places = [s.address for s in pool._free]
    for chunk, n in owners.items():
        entry = r._entries[chunk.key]
        assert chunk.owners == n
        assert entry.leases == (chunk.lease is not None) == (chunk.views is not None)
        assert (chunk.key in store._leased) == (chunk.lease is not None)
        assert chunk.lease is not None or not chunk.stays
        assert chunk.lease is not None or entry.spilling is not None or not entry.dirty, "it will be written, or is"
        if entry.slot is not None:
            places.append(entry.slot.address)
    assert len(set(places)) == len(places) == store.slots, "every slot is in exactly one place"
    assert set(store._policy._used) <= {k for k, e in r._entries.items() if e.slot is not None}
    extents = [c.offset for c in owners if c.offset is not None]
    assert len(set(extents)) == len(extents)
    assert store._disk.file.used == len(extents) * store.slot_nbytes
    for layer in layers:
        for row in layer.rows:
            assert len(row.chunks) == -(-row.length // row.tokens)


class Machine(RuleBasedStateMachine):
    """Whatever transformers does to a cache, in any order, in as little memory as there may be."""

    @initialize(
        windows=st.lists(st.one_of(st.none(), st.integers(1, 40)), min_size=1, max_size=3),
        chunk=st.integers(4, 16), share=st.sampled_from([0.0, 0.0, 0.2, 0.5, 1.0]), capacity=st.integers(1, 120),
        batch=st.integers(1, 3), wide=st.booleans(),
    )  # fmt: skip
    def begin(self, windows: list[int | None], chunk: int, share: float, capacity: int, batch: int, wide: bool) -> None:
        self.generator = torch.Generator().manual_seed(capacity)
        self.disk = Disk()
        whole = len(windows) * batch * -(-capacity // chunk) * PAGE
        self.cache = self.disk.cache(windows, chunk, capacity, int(share * whole))
        self.layers = self.cache.tiered
        # the second layer keeps more of a token than the first, and so fewer tokens in a chunk
        self.heads = [KV_HEADS + (wide and i == 1) for i in range(len(windows))]
        self.batch = batch
        self.plain: list[Tensors | None] = [None] * len(windows)

    def teardown(self) -> None:
        if not hasattr(self, "disk"):
            return
        try:
            self.cache.close()
            assert self.disk.disk.file.used == 0
            for store in self.disk.stores:
                assert store.residency._entries == {}
                assert store.residency._pools["kv"][0].free == store.slots
        finally:
            self.disk.close()

    @property
    def rows(self) -> int:
        return self.plain[0][0].shape[0] if self.plain[0] is not None else self.batch

    @property
    def length(self) -> int:
        return self.plain[0][0].shape[2] if self.plain[0] is not None else 0

    @rule(n=st.one_of(st.integers(1, 5), st.integers(1, 50)), attended=st.booleans())
    def append(self, n: int, attended: bool) -> None:
        if self.length + n > 150:
            return
        for i, layer in enumerate(self.layers):
            new = tuple(
                torch.randn(self.rows, self.heads[i], n, width, generator=self.generator) for width in (KEY, VALUE)
            )
            given = self.cache.update(*new, layer.number)
            assert given[0] is new[0]
            old = self.plain[i]
            self.plain[i] = new if old is None else tuple(torch.cat(t, 2) for t in zip(old, new, strict=True))  # type: ignore[assignment]
            if attended:
                layer.append_new()

    @precondition(lambda self: self.length)
    @rule(n=st.one_of(st.integers(0, 6), st.integers(0, 200)))
    def crop(self, n: int) -> None:
        keep = max(0, self.length - n)
        self.cache.crop(-n)
        self.plain = [tuple(t[:, :, :keep] for t in p) for p in self.plain if p is not None]  # type: ignore[misc]

    @precondition(lambda self: self.length)
    @rule(data=st.data(), how=st.sampled_from(["select", "reorder", "mask"]))
    def choose(self, data: st.DataObject, how: str) -> None:
        rows = self.rows
        if how == "mask":
            chosen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows).filter(any)))
        else:
            size = (1, 5) if how == "select" else (rows, rows)
            index = st.lists(st.integers(0, rows - 1), min_size=size[0], max_size=size[1])
            chosen = torch.tensor(data.draw(index))
        (self.cache.reorder_cache if how == "reorder" else self.cache.batch_select_indices)(chosen)
        self.plain = [tuple(t[chosen] for t in p) for p in self.plain if p is not None]  # type: ignore[misc]

    @precondition(lambda self: self.length)
    @rule(n=st.integers(1, 3))
    def repeat(self, n: int) -> None:
        if self.rows * n > 6:
            return
        self.cache.batch_repeat_interleave(n)
        self.plain = [tuple(t.repeat_interleave(n, 0) for t in p) for p in self.plain if p is not None]  # type: ignore[misc]

    @rule(batch=st.integers(1, 3))
    def reset(self, batch: int) -> None:
        self.cache.reset()
        self.plain, self.batch = [None] * len(self.layers), batch
        assert self.disk.disk.file.used == 0

    @precondition(lambda self: self.length)
    @rule(data=st.data())
    def attend(self, data: st.DataObject) -> None:
        """A pass, the whole way: what is read in memory's own order is what a step would read."""
        n = data.draw(st.integers(1, 9))
        if self.length + n > 150:
            return
        for i, layer in enumerate(self.layers):
            new = tuple(
                torch.randn(self.rows, self.heads[i], n, width, generator=self.generator) for width in (KEY, VALUE)
            )
            layer.update(*new)
            query = torch.randn(self.rows, self.heads[i], n, KEY, generator=self.generator)
            rule_ = Rule(0.3, layer.window)
            out = attend(self.cache, layer, query, *new, rule_, [0] * self.rows)
            old = self.plain[i]
            assert old is not None
            self.plain[i] = tuple(torch.cat(t, 2) for t in zip(old, new, strict=True))  # type: ignore[assignment]
            want = reference(query, *self.plain[i], rule_, [0] * self.rows)  # type: ignore[misc]
            torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)

    @invariant()
    def contents(self) -> None:
        if not hasattr(self, "disk") or self.cache._store is None:
            return
        for layer, plain in zip(self.layers, self.plain, strict=True):
            assert layer.get_seq_length() == self.length
            assert self.cache.get_mask_sizes(3, layer.number) == (self.length + 3, 0)
            if not self.length:
                continue
            assert plain is not None
            assert len(layer.rows) == self.rows
            for b in range(self.rows):
                for start, stop in ((0, self.length), (self.length // 3, -(-2 * self.length // 3))):
                    if start == stop:
                        continue
                    got = layer.read(start, stop, b)
                    assert all(torch.equal(g, p[b, :, start:stop]) for g, p in zip(got, plain, strict=True))
        check(self.cache.store, self.layers)


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None, database=None)
TestMachine = Machine.TestCase


# attention


def reference(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rule: Rule, pads: list[int],
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The textbook: all scores, in float64. → [B, Q, heads, Dv]."""
    batch, heads, count, _ = query.shape
    k, v = (t.double().repeat_interleave(heads // t.shape[1], 1) for t in (keys, values))
    scores = query.double() @ k.transpose(2, 3) * rule.scale
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    at = torch.arange(keys.shape[2])
    apart = at[-count:, None] - at
    seen = (apart >= 0) & (apart < (rule.window or len(at) + 1))
    seen = seen[None] & (at >= torch.tensor(pads)[:, None])[:, None]
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[None, :, None, None].expand(batch, heads, count, 1)], -1)
    weights = torch.softmax(scores, -1)[..., : len(at)]
    return (weights @ v).transpose(1, 2)


@settings(max_examples=120, deadline=None, database=None)
@hypothesis.given(data=st.data())
def test_attention_is_the_textbooks(data: st.DataObject) -> None:
    """Every kind of score, mask and shape, whole prompts in pieces, chunks and blocks of any size."""
    draw = data.draw
    g = torch.Generator().manual_seed(draw(st.integers(0, 10_000), "seed"))
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 4]))
    key, value = draw(st.sampled_from([(8, 8), (8, 16), (16, 8), (12, 4)]), "widths")
    parts = draw(st.lists(st.integers(1, 40), min_size=1, max_size=5), "passes")
    length, heads = sum(parts), kv_heads * group
    window = draw(st.one_of(st.none(), st.integers(1, 60)), "window")
    softcap = draw(st.sampled_from([None, None, 2.0]), "softcap")
    sinks = torch.randn(heads, generator=g) if draw(st.booleans(), "sinks") else None
    most = max(0, length - 1)
    pads = draw(st.lists(st.integers(0, most), min_size=batch, max_size=batch), "pads")
    latent = draw(st.booleans(), "latent")
    rule_ = Rule(0.4, window, softcap)
    if latent:  # what is kept is narrower than what is attended to, and of one head
        kept = torch.randn(batch, 1, length, 5, generator=g), torch.randn(batch, 1, length, 3, generator=g)
        up = torch.randn(5, kv_heads * (key + value), generator=g)

        def expand(latents: torch.Tensor, rotary: torch.Tensor) -> Tensors:
            both = (latents @ up).view(latents.shape[0], -1, kv_heads, key + value).transpose(1, 2)
            k = torch.cat([both[..., : key - 3], rotary.expand(-1, kv_heads, -1, -1)], -1)
            return k, both[..., key:]
    else:
        kept = tuple(torch.randn(batch, kv_heads, length, w, generator=g) for w in (key, value))  # type: ignore[assignment]

        def expand(latents: torch.Tensor, rotary: torch.Tensor) -> Tensors:
            return latents, rotary

    query = torch.randn(batch, heads, length, key, generator=g)
    want = reference(query, *expand(*kept), rule_, pads, sinks)
    disk = Disk()
    with pytest.MonkeyPatch.context() as patch, contextlib.closing(disk):
        patch.setattr(kvstore.attention, "BLOCK", draw(st.sampled_from([7, 16, 1024]), "block"))
        patch.setattr(kvstore.attention, "MASKED", draw(st.sampled_from([5, 16, 512]), "masked"))
        patch.setattr(kvstore.tiered_attention, "BLOCK", draw(st.sampled_from([6, 16, 1024]), "gathered"))
        cache = disk.cache(
            [window], draw(st.integers(4, 16), "chunk"), length, draw(st.sampled_from([0, 5, 99])) * PAGE
        )
        (layer,) = cache.tiered
        at = 0
        for n in parts:
            new = tuple(t[:, :, at : at + n] for t in kept)
            layer.update(*new)
            out = attend(
                cache, layer, query[:, :, at : at + n], *expand(*new), rule_, pads, sinks=sinks,
                expand=expand if latent else None,
            )  # fmt: skip
            assert out.shape == (batch, n, heads, value)
            assert not out.isnan().any(), "not even where a query is padding"
            for b, pad in enumerate(pads):
                real = slice(max(0, pad - at), n)
                torch.testing.assert_close(
                    out[b, real].double(), want[b, at : at + n][real], rtol=2e-5, atol=2e-5
                )  # fmt: skip
            at += n
            assert layer.get_seq_length() == at
        cache.close()
        assert disk.disk.file.used == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_partial_result(dtype: torch.dtype, softcap: float | None) -> None:
    """Queries that see nothing have no weight, and whatever the type no NaN."""
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, h, n, 16, generator=g).to(dtype) for h, n in ((4, 8), (2, 40), (2, 40)))
    mask = torch.ones(8, 40, dtype=torch.bool)
    mask[0] = False
    mask[3, 5:] = False
    out, lse = partial(q, k, v, Rule(0.25, softcap=softcap), mask)
    assert (lse[:, :, 0] == -torch.inf).all()
    assert not out.isnan().any()
    scores = q.double() @ k.double().repeat_interleave(2, 1).transpose(2, 3) * 0.25
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(lse[:, :, 1:].double(), scores.logsumexp(-1)[:, :, 1:], rtol=1e-3, atol=1e-3)
    want = torch.softmax(scores[:, :, 1:], -1) @ v.double().repeat_interleave(2, 1)
    torch.testing.assert_close(out[:, :, 1:].double(), want, rtol=1e-2, atol=1e-2 if dtype != torch.float32 else 1e-5)


def test_without_a_cache() -> None:
    """All keys are given, more of them than queries."""
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, h, n, 8, generator=g) for h, n in ((4, 9), (2, 30), (2, 30)))
    for pads in ([0, 0], [4, 25]):
        out = attend(None, None, q, k, v, Rule(0.3, 12), pads)
        want = reference(q, k, v, Rule(0.3, 12), pads)
        torch.testing.assert_close(out[0].double(), want[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out[1, -5:].double(), want[1, -5:], rtol=1e-5, atol=1e-5)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                self.nbytes = max(self.nbytes, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("window", [None, 3000])
def test_nothing_is_quadratic(disk: Disk, window: int | None) -> None:
    """32K tokens of a layer with 4 heads of 16, an eighth of them in memory, 2048 at a time."""
    tokens, step, heads, dim = 32 << 10, 2048, 4, 16
    shape = KVShape(heads, dim, dim, torch.float32)
    whole = tokens * shape.token_nbytes
    cache = disk.cache([window], chunk_tokens(shape, tokens), tokens, whole // 8)
    (layer,) = cache.tiered
    quadratic = step * tokens * heads * 4
    new = torch.randn(1, heads, step, dim)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, largest = rss(), Largest()
    grew = peak_rss() - before
    with largest, torch.inference_mode():
        for _ in range(tokens // step):
            layer.update(new, new)
            attend(cache, layer, new, new, new, Rule(0.25, window), [0])
    assert layer.get_seq_length() == tokens
    assert cache.store.slots * cache.store.slot_nbytes <= whole // 8
    assert cache.books.bytes_written > 0
    assert window or cache.books.bytes_read > whole // 2
    assert largest.nbytes < quadratic // 64
    if grew < 8 << 20:  # the kernel let the peak be counted anew
        assert peak_rss() - before < whole // 8 + (64 << 20)


# the store


def one_row(disk: Disk, tokens: int, chunk: int, resident: int, capacity: int | None = None) -> TieredCache:
    cache = disk.cache([None], chunk, capacity or tokens, resident)
    cache.update(torch.zeros(1, 2, tokens, 8), torch.zeros(1, 2, tokens, 8), 0)
    cache.tiered[0].append_new()
    return cache


def test_what_stays_and_what_is_written_once(disk: Disk) -> None:
    """A full chunk is written once, however often it is read; what stays is never written."""
    cache = one_row(disk, 20 * 16, 16, 12 * PAGE)
    store = cache.store
    assert store.slots == 12
    stays = sum(c.stays for c in cache.tiered[0].rows[0].chunks)
    assert stays == 12 - 1 - 5  # one is being filled, half of the rest is a ring
    written = cache.books.bytes_written
    assert written == (20 - stays) * 16 * 128
    for _ in range(3):
        before = cache.books.bytes_read
        cache.tiered[0].read(0, 20 * 16)
        assert cache.books.bytes_read - before <= (20 - stays) * 16 * 128
    assert cache.books.bytes_written == written
    cache.batch_repeat_interleave(2)
    cache.crop(-5)
    cache.update(torch.zeros(2, 2, 1, 8), torch.zeros(2, 2, 1, 8), 0)
    cache.tiered[0].append_new()
    assert cache.books.bytes_written - written <= 16 * 128, "to be copied a chunk is read, not written again"


def test_everything_in_memory_moves_nothing(disk: Disk) -> None:
    cache = one_row(disk, 100, 16, 7 * PAGE)
    cache.tiered[0].read(0, 100)
    assert (cache.books.bytes_read, cache.books.bytes_written, disk.disk.file.used) == (0, 0, 0)


def test_what_a_window_leaves_behind_leaves_memory(disk: Disk) -> None:
    """And no earlier than that; again after tokens were taken back."""
    cache = disk.cache([20, None], 8, 400, 60 * PAGE)
    layer = cache.tiered[0]
    new = torch.zeros(1, 2, 1, 8)
    for back in (0, 37, 90):
        if back:
            cache.crop(-back)
        for _ in range(100):
            for n in range(2):
                cache.update(new, new, n)
                cache.tiered[n].append_new()
            seen = (layer.past - 20 + 1) // 8  # the first chunk that the next token sees
            behind = [c for c in layer.rows[0].chunks[: max(0, seen)] if c.lease is not None]
            assert behind == []
            # what left before tokens were taken back comes and goes
            assert back or all(c.lease is not None for c in layer.rows[0].chunks[max(0, seen) :])
    check(cache.store, cache.tiered)


@pytest.mark.parametrize("resident", [0, 7 * PAGE])
def test_longer_than_foreseen(disk: Disk, resident: int) -> None:
    """In the same slots, whatever was to stay."""
    cache = one_row(disk, 100, 16, resident)
    slots = cache.store.slots
    new = torch.randn(1, 2, 200, 8)
    cache.update(new, new, 0)
    got = cache.tiered[0].read(100, 300)
    assert torch.equal(got[0][None], new)
    assert cache.store.slots == slots
    check(cache.store, cache.tiered)


def test_a_full_disk_is_told_and_the_next_request_has_it_all() -> None:
    disk = Disk(limit=5 * PAGE)
    try:
        full = disk.cache([None], 16, 300, 0)
        full.update(torch.zeros(1, 2, 300, 8), torch.zeros(1, 2, 300, 8), 0)
        with pytest.raises(OffloadError, match="--disk"):
            full.tiered[0].append_new()
        check(full.store, full.tiered)
        full.close()
        for tokens, chunk in ((5 * 16, 16), (2 * 64, 64), (5 * 16, 16)):  # chunks of one page, and of two
            cache = one_row(disk, tokens, chunk, 0)
            cache.tiered[0].read(0, tokens)
            cache.close()
            assert disk.disk.file.used == 0
    finally:
        disk.close()


def test_a_cache_that_nobody_closed() -> None:
    """Its place on disk is taken back, though not before another is made."""
    disk = Disk(limit=30 * PAGE)
    try:
        for _ in range(3):
            cache = one_row(disk, 20 * 16, 16, 0)
            assert disk.disk.file.used == 20 * PAGE
            disk.stores.clear()
            del cache
            gc.collect()
        cache = one_row(disk, 20 * 16, 16, 0)
        cache.close()
        assert disk.disk.file.used == 0
    finally:
        disk.close()


def test_a_layer_whose_tokens_do_not_fit_a_chunk(disk: Disk) -> None:
    cache = disk.cache([None, None], 1, 10, 0)
    cache.update(torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1, 8), 0)
    with pytest.raises(OffloadError, match="kv_chunk"):
        cache.update(torch.zeros(1, 100, 1, 8), torch.zeros(1, 100, 1, 8), 1)


def test_a_pass_cut_short_can_be_taken_back(disk: Disk) -> None:
    """Between two sequences of a layer, between two layers: `crop` makes all of one length again."""
    cache = disk.cache([None, None], 4, 40, 0)
    first = torch.randn(2, 2, 6, 8)
    for n in range(2):
        cache.update(first, first, n)
        cache.tiered[n].append_new()
    more = torch.randn(2, 2, 9, 8)
    cache.update(more, more, 0)
    create, left = cache.store.create, [3]

    def failing(layer: int) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise OffloadError("injected")
        return create(layer)

    cache.store.create = failing  # type: ignore[method-assign]
    with pytest.raises(OffloadError, match="injected"):
        cache.tiered[0].append_new()
    assert {row.length for row in cache.tiered[0].rows} == {15, 12}
    cache.store.create = create  # type: ignore[method-assign]
    assert kvstore.rollback(cache, 6)
    check(cache.store, cache.tiered)
    for layer in cache.tiered:
        assert [row.length for row in layer.rows] == [6, 6]
        assert torch.equal(layer.read(0, 6, 1)[0], first[1])
    cache.update(more, more, 0)
    assert kvstore.rollback(cache, 6)
    assert cache.tiered[0]._new is None


def test_a_failed_copy_leaves_nothing_behind(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = one_row(disk, 6, 4, 0, 40)
    cache.batch_repeat_interleave(2)
    looking = cache.store.looking
    monkeypatch.setattr(cache.store, "looking", lambda chunk: looking(None))
    new = torch.randn(2, 2, 1, 8)
    cache.update(new, new, 0)
    with pytest.raises(AttributeError):
        cache.tiered[0].append_new()
    check(cache.store, cache.tiered)


def test_an_error_while_attending_gives_leases_back(disk: Disk) -> None:
    cache = one_row(disk, 200, 16, 0)
    new = torch.zeros(1, 2, 1, 8)
    cache.tiered[0].update(new, new)

    def expand(latents: torch.Tensor, rotary: torch.Tensor) -> Tensors:
        raise ValueError("injected")

    with pytest.raises(ValueError, match="injected") as told:
        attend(cache, cache.tiered[0], new, new, new, Rule(1.0), [0], expand=expand)
    cache.crop(-1)
    check(cache.store, cache.tiered)
    assert told.value is not None  # and with it the frames it came through
    cache.close()
    assert disk.disk.file.used == 0


# what is planned


@pytest.mark.parametrize("asked", [1, "10%", "50%", "100%"])
def test_memory_is_what_was_planned(tiny_moe: Path, asked: str | int) -> None:
    """From short requests to very long ones, the slots are never more than what was set aside."""
    description = describe(tiny_moe, "auto")
    tiered = description.demand.tiered
    assert tiered is not None
    part = parse_part(asked, flag="--kv-resident")
    assert part is not None
    shape, layers = KVShape(2, 16, 16, torch.float32), 4
    for tokens in (64, 256, 4096, 32 << 10, 200_000, 1 << 20):
        for batch in (1, 2, 4):
            capacity = tokens // batch
            if batch > 1 and capacity < SHORTEST:
                continue  # so many are not run at once
            chunk = chunk_tokens(shape, capacity)
            wanted = parse_size(asked, of=layers * tokens * shape.token_nbytes, flag="")
            nbytes = shape.chunk_nbytes(chunk) * slots_for(
                wanted, shape.chunk_nbytes(chunk), layers, batch, capacity, chunk
            )
            assert nbytes <= tiered.resident(tokens, part) + tiered.others(tokens), (tokens, batch)

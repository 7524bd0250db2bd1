"""Piecewise graphs, with a stand-in that records work and does it again over the same buffers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build
from torch import nn

import offload
from offload import engine as engine_module
from offload import graphs, hf
from offload.graphs import MAX_SHAPES, Captured, Captures, capturable
from tiers import EmulatedDevice, UsageError


class FakeGraph:
    """What a CUDA graph does, on the CPU: while it is recorded nothing is computed, a replay fills the same buffer."""

    made = 0

    def __init__(self) -> None:
        FakeGraph.made += 1

    def capture(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        self._work = work
        self._out = torch.full_like(work(), float("nan"))
        return self._out

    def replay(self) -> None:
        with torch.inference_mode():  # a real one knows nothing of modes
            self._out.copy_(self._work())


def fail(e: Exception) -> None:
    raise AssertionError("capturing failed") from e


def one(forward: Callable[..., Any], make: Callable[[], Any] = FakeGraph) -> Captured:
    return Captured(forward, make, fail)


def token(batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 1, 8, generator=torch.Generator().manual_seed(seed))


def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def test_the_second_call_captures_and_every_result_is_right() -> None:
    module = one(double)
    for n in range(5):
        x = token(seed=n)
        assert torch.equal(module(x), x * 2)
        assert module.replays == max(0, n)


def test_a_result_outlives_the_next_replay() -> None:
    """A caller may keep what it was given: the residual stream, hidden states that were asked for."""
    module = one(double)
    inputs = [token(seed=n) for n in range(6)]
    results = [module(x) for x in inputs]
    for x, y in zip(inputs, results, strict=True):
        assert torch.equal(y, x * 2)


def test_a_result_may_be_fed_back_and_written_to() -> None:
    module = one(double)
    x = token()
    want = x.clone()
    for _ in range(6):
        x = module(x)
        want = want * 2
        assert torch.equal(x, want)
        x.add_(1)
        want = want + 1


def test_inputs_are_left_alone() -> None:
    def greedy(x: torch.Tensor) -> torch.Tensor:
        return x.mul_(2)

    module = one(greedy)
    module(token())
    module(token())
    x = token()
    kept = x.clone()
    module(x)
    assert torch.equal(x, kept), "the graph works on its own buffer"


def test_shapes_and_dtypes_have_graphs_of_their_own() -> None:
    module = one(double)
    before = FakeGraph.made
    for x in (token(1), token(2), token(2).double()):
        for n in range(3):
            assert torch.equal(module(x + n), (x + n) * 2)
    assert FakeGraph.made == before + 3
    assert module.replays == 3 * 2
    for batch in range(3, 3 + MAX_SHAPES):
        for _ in range(3):
            assert torch.equal(module(token(batch)), token(batch) * 2)
    assert FakeGraph.made == before + MAX_SHAPES, "memory for graphs is bounded"


@pytest.mark.parametrize("x", [torch.ones(1, 3, 8), torch.ones(1, 8), torch.ones(2, 1, 1, 8)])
def test_other_shapes_run_as_ever(x: torch.Tensor) -> None:
    module = one(double)
    before = FakeGraph.made
    for _ in range(3):
        assert torch.equal(module(x), x * 2)
    assert (module.replays, FakeGraph.made) == (0, before)


def test_other_arguments_run_as_ever() -> None:
    module = one(lambda x, scale=1: x * scale)
    for _ in range(3):
        assert torch.equal(module(token(), 3), token() * 3)
        assert torch.equal(module(token(), scale=3), token() * 3)
    assert module.replays == 0


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_captured_in_inference_mode_and_used_outside(mode: Callable[[], Any]) -> None:
    module = one(double)
    with torch.inference_mode():
        for n in range(3):
            assert torch.equal(module(token(seed=n)), token(seed=n) * 2)
    with mode():
        assert torch.equal(module(token(seed=9)), token(seed=9) * 2)
    assert module.replays == 3


class Broken(FakeGraph):
    def capture(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        raise RuntimeError("CUDA error: operation not permitted\nwhen stream is capturing")


def test_what_cannot_be_captured_runs_eagerly_for_good() -> None:
    made: list[Broken] = []

    def make() -> Broken:
        made.append(Broken())
        return made[-1]

    failures: list[Exception] = []
    module = Captured(double, make, failures.append)
    for n in range(4):
        assert torch.equal(module(token(seed=n)), token(seed=n) * 2)
    for n in range(4):
        assert torch.equal(module(token(3, seed=n)), token(3, seed=n) * 2)
    assert len(made) == len(failures) == 1
    assert module.replays == 0


def test_a_result_that_is_no_tensor_runs_eagerly() -> None:
    failures: list[Exception] = []

    class Blind(FakeGraph):
        def capture(self, work: Callable[[], Any]) -> Any:
            return work()

    module = Captured(lambda x: (x, x), Blind, failures.append)
    for _ in range(3):
        assert module(token())[0] is not None
    assert isinstance(failures[0], TypeError)


def test_failures_are_told_once_for_each_class() -> None:
    model = build("llama")
    notes: list[str] = []
    captures = Captures(Broken, notes)
    for i, layer in enumerate(model.model.layers):
        captures.wrap(layer, f"model.layers.{i}", set(model.state_dict()))
    ids = torch.tensor([[5]])
    with torch.inference_mode():
        want = model(ids).logits
        for _ in range(2):
            assert torch.equal(model(ids).logits, want)
    assert len(captures.modules) == 3 * len(model.model.layers)
    assert sorted(n.split()[1] for n in notes) == ["LlamaMLP", "LlamaRMSNorm"]
    assert all("not permitted when stream" in n for n in notes)


# which modules


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class Gated(Norm):
    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return x


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 2)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize(
    ("module", "can"),
    [
        (Norm(), True),
        (nn.LayerNorm(8), False),  # one kernel already
        (nn.RMSNorm(8), False),
        (Gated(), False),
        (Experts(), False),
        (nn.Linear(8, 8), False),
        (nn.Identity(), False),
        (nn.Dropout(), False),
    ],
)
def test_capturable(module: nn.Module, can: bool) -> None:
    assert capturable(module.eval()) is can
    assert not capturable(module.train())


def test_of_every_family_only_norms_and_dense_mlps() -> None:
    found: dict[str, set[str]] = {}
    for family in FAMILIES:
        with torch.device("meta"):
            model = build(family)
        found[family] = {
            type(child).__name__
            for _, layer in hf.decoder_layers(model)
            for child in layer.children()
            if capturable(child)
        }
        for kind in found[family]:
            assert kind.endswith(("RMSNorm", "MLP")), (family, kind)
    assert found["llama"] == {"LlamaRMSNorm", "LlamaMLP"}
    assert found["gemma2"] == {"Gemma2RMSNorm", "Gemma2MLP"}
    assert found["phi3"] == {"Phi3RMSNorm", "Phi3MLP"}
    assert found["mixtral"] == {"MixtralRMSNorm"}
    assert found["qwen3_moe"] == {"Qwen3MoeRMSNorm"}
    assert found["deepseek_v3"] == {"DeepseekV3RMSNorm", "DeepseekV3MLP"}, "its first layer is dense"


# in the engine


class Device(EmulatedDevice):
    kind = "cuda"


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("room", ["everything", "some"])
def test_tokens_do_not_change(family: str, room: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(family).save_pretrained(tmp_path)
    prompts = [[5, 6, 7, 8], [9, 10, 11, 12]]
    monkeypatch.setattr(engine_module, "make_device", lambda config: Device(8e9))
    monkeypatch.setattr(graphs, "cuda_graphs", lambda: FakeGraph)
    monkeypatch.setattr(graphs, "RESERVE", 1 << 20)
    options: dict[str, Any] = {"vram": "64MiB", "context": 64}
    if room == "some":
        with pytest.raises(offload.BudgetError) as refusal:
            offload.load(tmp_path, resident="1B", **options)
        assert refusal.value.smallest is not None
        options["resident"] = refusal.value.smallest * 8 // 5
    with offload.load(tmp_path, **options) as model:
        assert model.engine.captures is None
        want = [model.run([p], max_new_tokens=8).token_ids for p in prompts]
        both = model.run(prompts, max_new_tokens=8).token_ids
    with offload.load(tmp_path, graphs=True, **options) as model:
        captures = model.engine.captures
        assert captures is not None
        assert [model.run([p], max_new_tokens=8).token_ids for p in prompts] == want
        result = model.run(prompts, max_new_tokens=8)
        assert (result.token_ids, result.notes) == (both, [])
        streamed = {s.name for b in model.engine._memory.streamed() for s in b.specs}
        assert not any(name.startswith(f"{module}.") for name in streamed for module in captures.modules)
        if room == "some" and family == "llama":
            assert streamed
            assert 0 < len(captures.modules) < 12
        if room == "everything":
            assert not streamed
            assert captures.replays >= 10 * len(captures.modules)
            assert len(captures.modules) == 12 or family != "llama"


def test_the_engine_tells_what_could_not_be_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama").save_pretrained(tmp_path)
    monkeypatch.setattr(engine_module, "make_device", lambda config: Device(8e9))
    monkeypatch.setattr(graphs, "cuda_graphs", lambda: Broken)
    with offload.load(tmp_path, graphs=True, vram="256MiB") as model:
        notes = model.run([[5, 6, 7]], max_new_tokens=6).notes
        assert [n.split(":")[0] for n in notes] == ["--graphs", "--graphs"]
        assert model.run([[5, 6, 7]], max_new_tokens=6).notes == [], "told once"


def test_refused_without_cuda(tmp_path: Path, tiny_moe: Path) -> None:
    for options in ({"device": "cpu"}, {"device": "emulated", "vram": "64MiB"}):
        with pytest.raises(UsageError, match="--graphs"):
            offload.load(tiny_moe, graphs=True, **options)
    with pytest.raises(UsageError, match="graphs"):
        offload.load(tiny_moe, graphs="on")

"""Routing recorded and replayed through a model; policies and predictors chosen by name; what is kept between runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, build, save

import offload
from moe import Replay, RoutingTrace, choices, synthetic
from offload.errors import ModelError, UsageError
from tiers import LRU

PROMPT = [5, 9, 23, 7, 40, 11]
STAY = {"resident_layers": 4}  # whole, whatever the speeds: a router that comes and goes with its layer is not asked
MOE = [f for f in FAMILIES if any("expert" in name for name in FAMILIES[f])]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save(build("qwen3_moe", num_hidden_layers=4), folder)
    return folder


def generated(folder: Path, **options: object) -> list[int]:
    with offload.load(folder, context=64, **{"resident": "80%", "overrides": STAY, **options}) as model:
        tokens: list[int] = model.run([PROMPT], max_new_tokens=12, ignore_eos=True).token_ids[0]
        return tokens


def test_what_routers_chose_is_recorded(tiny: Path, tmp_path: Path) -> None:
    generated(tiny, resident=None, record_routing=str(tmp_path / "r.npz"))  # no router comes and goes
    trace = RoutingTrace.load(tmp_path / "r.npz")
    assert (len(trace.experts), len(trace)) == (4, 12)
    first, second = next(iter(trace))[:2]
    assert first.index.shape == (len(PROMPT), trace.top_k)
    assert first.probabilities is not None and first.probabilities.sum(-1) == pytest.approx(1.0, abs=1e-2)
    chosen = np.take_along_axis(first.probabilities, first.index.astype(np.int64), -1)
    assert (chosen.min(-1) >= np.sort(first.probabilities, -1)[:, -trace.top_k] - 1e-3).all(), "of the very router"
    assert first.ahead is not None and len(first.ahead) == len(second.index)


@pytest.mark.parametrize("family", MOE)
def test_every_family_is_recorded(tmp_path: Path, family: str) -> None:
    save(build(family), tmp_path)
    with offload.load(tmp_path, context=64, record_routing=str(tmp_path / "r.npz")) as model:
        model.run([PROMPT], max_new_tokens=3, ignore_eos=True)
    trace = RoutingTrace.load(tmp_path / "r.npz")
    assert len(trace) == 3
    assert all(r.probabilities is not None for p in trace for r in p)


def test_recording_what_fits_changes_nothing(tiny: Path, tmp_path: Path) -> None:
    assert generated(tiny, resident=None, record_routing=str(tmp_path / "r.npz")) == generated(tiny, resident=None)
    assert len(RoutingTrace.load(tmp_path / "r.npz")) == 12


def test_a_recording_that_cannot_be_written_is_told_first(tiny: Path) -> None:
    with pytest.raises(UsageError, match="--record-routing"):
        offload.load(tiny, record_routing="/nowhere/at/all.npz")


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("predictor", choices.PREDICTORS)
def test_tokens_do_not_depend_on_the_predictor(tiny: Path, predictor: str, device: str) -> None:
    options = {"vram": "1MiB", "device": device} if device == "emulated" else {"device": device}
    assert generated(tiny, expert_predictor=predictor, **options) == generated(tiny, resident=None)


@pytest.mark.parametrize("policy", choices.POLICIES)
def test_tokens_do_not_depend_on_the_policy(tiny: Path, policy: str) -> None:
    assert generated(tiny, expert_policy=policy) == generated(tiny, resident=None)
    assert generated(tiny, expert_policy=policy, ram=smallest(tiny), resident=None) == generated(tiny, resident=None)


def smallest(folder: Path) -> int:
    """What works at all, with a margin for what the process gains between two loads."""
    return int(offload.plan(folder, prompt_tokens=8, new_tokens=8).as_json()["smallest"]["ram"]) + (8 << 20)


@pytest.mark.parametrize("option", ["expert_policy", "expert_predictor"])
def test_a_name_that_is_none_is_refused_with_those_that_are(tiny: Path, option: str) -> None:
    with pytest.raises(UsageError, match=f"--{option.replace('_', '-')}.*'best' is not one of"):
        offload.load(tiny, **{option: "best"})


def test_a_replayed_trace_is_what_is_computed(tiny: Path, tmp_path: Path) -> None:
    """Its own routing replayed is the same run; another's is another."""
    own, other = tmp_path / "own.npz", tmp_path / "other.npz"
    tokens = generated(tiny, record_routing=str(own))
    assert generated(tiny, replay_routing=str(own)) == tokens
    experts, k = RoutingTrace.load(own).experts, RoutingTrace.load(own).top_k
    synthetic.skewed(len(experts), experts[0], k, 40).save(other)
    assert generated(tiny, replay_routing=str(other)) != tokens


def test_replay_has_the_hits_of_the_trace(tiny: Path, tmp_path: Path) -> None:
    trace = synthetic.sticky(4, 8, 2, 60, repeat=1.0)
    trace.save(tmp_path / "same.npz")
    with offload.load(
        tiny, context=64, resident="80%", overrides=STAY, replay_routing=str(tmp_path / "same.npz")
    ) as model:
        use = model.run([PROMPT], max_new_tokens=20, ignore_eos=True).stats.experts_use
    assert use is not None
    assert use.needed == 4 * 2 * 20
    assert use.hit == use.needed - 4 * 2, "after the first pass the same experts are needed again and again"


def test_a_trace_of_another_shape_is_refused(tiny: Path, tmp_path: Path) -> None:
    synthetic.even(3, 8, 2, 4).save(tmp_path / "r.npz")
    with pytest.raises(UsageError, match="3 layers of 8 experts, top 2; the model has 4 of 8, top 2"):
        offload.load(tiny, replay_routing=str(tmp_path / "r.npz"))
    (tmp_path / "r.npz").write_bytes(b"no trace")
    with pytest.raises(ModelError, match=r"r\.npz"):
        offload.load(tiny, replay_routing=str(tmp_path / "r.npz"))


def test_a_replay_goes_through_the_tokens_and_begins_again() -> None:
    trace = synthetic.even(2, 8, 2, 3, tokens=2)
    rows = np.concatenate([p[0].index for p in trace])
    replay = Replay(trace, [8, 8], 2)
    seen = []
    for n in (4, 1, 3):
        first, second = replay.next(0, n), replay.next(1, n)
        assert first.index.shape == second.index.shape == (n, 2)
        seen.append(first.index)
    assert (np.concatenate(seen) == rows[np.arange(8) % 6]).all()


def test_what_is_learned_of_routers_is_kept_for_the_next_run(tiny: Path, fresh_cache: Path) -> None:
    def run(tokens: int) -> None:
        with offload.load(tiny, context=128, resident="80%", overrides=STAY) as model:
            model.run([PROMPT], max_new_tokens=tokens, ignore_eos=True)

    run(4)
    assert not list(fresh_cache.glob("routers/*")), "too little to be worth keeping"
    run(90)
    (path,) = fresh_cache.glob("routers/*.npz")
    assert path.stat().st_mode & 0o777 == 0o600
    before = path.read_bytes()
    run(90)
    assert path.read_bytes() != before, "it goes on from there"
    path.write_bytes(b"damaged")
    run(90)  # no failure: it is learned anew


def test_a_device_hands_over_all_at_once() -> None:
    from moe.lookahead import _to_cpu

    index, weights = torch.tensor([[3, 1]]), torch.tensor([[0.5, 0.25]], dtype=torch.bfloat16)
    hidden, logits = torch.randn(1, 4), torch.randn(1, 8)
    asked = {2: (torch.randn(1, 8), torch.tensor([[7, 6]]))}
    i, w, z, h, a = _to_cpu(index, weights, logits, hidden, asked)
    assert torch.equal(i, index) and i.dtype == index.dtype
    assert torch.equal(w, weights) and w.dtype == weights.dtype
    assert z is not None and torch.equal(z, logits) and torch.equal(h, hidden)
    assert torch.equal(a[2][0], asked[2][0]) and torch.equal(a[2][1], asked[2][1])


def test_json_tells_bytes_by_cause(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from cli.main import main

    assert main(["generate", str(tiny), "--prompt-ids", "5,9,23", "--max-new-tokens", "8", "--resident", "80%",
                 "--context", "64", "--json"]) == 0  # fmt: skip
    out = json.loads(capsys.readouterr().out)
    rows = out["experts"]
    assert len(rows) == 4
    for row in rows:
        size = row["expert_bytes"]
        assert size > 0
        assert row["bytes_on_demand"] == size * row["missed"]
        assert row["bytes_ahead"] == size * row["fetched"]
        assert row["bytes_in_vain"] == size * row["wasted"]
    assert sum(r["bytes_on_demand"] for r in rows) > 0


def test_the_default_is_not_lru() -> None:
    assert not isinstance(choices.policy(choices.POLICY, [["a"]], 1, 1), LRU)


@pytest.mark.parametrize("depth", [2, 3])
def test_looking_farther_changes_no_token(tiny: Path, depth: int) -> None:
    with offload.load(tiny, context=64, resident="80%", overrides=STAY, expert_depth=depth) as model:
        result = model.run([PROMPT], max_new_tokens=12, ignore_eos=True)
        said = model.engine.experts.foreseen(depth)
    assert result.token_ids[0] == generated(tiny, resident=None)
    assert [s is None for s in said] == [n < depth for n in range(4)]
    assert all(0 <= s[0] <= 1 and 0 <= s[1] <= 1 for s in said if s is not None)


@pytest.mark.parametrize("option", ["record_routing", "replay_routing"])
def test_a_model_without_experts_has_no_routing(tmp_path: Path, option: str) -> None:
    save(build("llama"), tmp_path)
    synthetic.even(3, 8, 2, 4).save(tmp_path / "r.npz")
    with pytest.raises(UsageError, match=f"--{option.replace('_', '-')} .*no experts"):
        offload.load(tmp_path, **{option: str(tmp_path / "r.npz")})

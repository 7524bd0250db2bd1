"""What is learned of routers: that it helps, that it is judged on what it has not seen, and that it is kept whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moe import GateCorrection
from moe.store import load_arrays, save_arrays
from tiers import ModelError, UsageError

H, E, K = 32, 16, 4


class World:
    """Two layers; between them the hidden states change by a fixed linear map, and by noise."""

    def __init__(self, noise: float = 0.3, change: float = 1.0, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self._g = g
        self._noise = noise
        self.router = torch.randn(E, H, generator=g)
        self.change = change * torch.randn(H, H, generator=g) / H**0.5

    def token(self, n: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """The inputs of both layers, [n, H] each."""
        x = torch.randn(n, H, generator=self._g)
        return x, x + x @ self.change.t() + self._noise * torch.randn(n, H, generator=self._g)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.router.t()


def top(logits: torch.Tensor, k: int = K) -> torch.Tensor:
    return logits.topk(k, dim=-1).indices


def live(gates: GateCorrection, world: World, tokens: int, *, at_once: int = 1, width: int = K) -> float:
    """The share of what the second layer chose that was said before."""
    found = 0
    for _ in range(tokens):
        x, y = world.token(at_once)
        z, truth = world.logits(x), top(world.logits(y))
        said = gates.ahead(0, 1, x, z, top(z), width)
        assert said.shape == (at_once, width)
        found += int((said[:, :, None] == truth[:, None, :]).any(1).sum())
        gates.heard(0, world.logits(x), top(world.logits(x)))
        gates.heard(1, world.logits(y), truth)
    return found / (tokens * at_once * K)


def test_what_layers_change_is_learned() -> None:
    world = World()
    gates = GateCorrection(H, [E, E])
    before, after = live(gates, world, 50), live(gates, world, 400)
    assert after > before + 0.2
    known = gates.recall(0, 1)
    assert known is not None and known[1] > known[0] + 0.2
    assert live(gates, world, 50) > 0.75


def test_it_starts_as_good_as_the_router_alone() -> None:
    world = World(noise=0.1, change=0.0)
    assert live(GateCorrection(H, [E, E]), world, 20) > 0.85


def test_prompts_teach_too() -> None:
    world = World()
    gates = GateCorrection(H, [E, E])
    live(gates, world, 60, at_once=40)
    assert live(gates, world, 50) > 0.7


def test_more_guesses_find_more() -> None:
    world = World(noise=0.8)
    gates = GateCorrection(H, [E, E])
    live(gates, world, 300)
    assert live(gates, world, 100, width=2 * K) > live(gates, world, 100) + 0.1


def test_where_it_does_worse_the_router_is_used() -> None:
    """What was learned of one world, kept, and loaded in another where the router alone is always right."""
    gates = GateCorrection(H, [E, E])
    live(gates, World(change=3.0), 200)
    other = World(noise=0.0, change=0.0, seed=5)
    gates._recall.clear()
    live(gates, other, 10)
    assert live(gates, other, 20) == 1.0


def test_a_router_that_does_not_choose_by_its_logits_is_left_alone() -> None:
    gates, world = GateCorrection(H, [E, E]), World()
    for _ in range(100):
        x, y = world.token()
        z = world.logits(x)
        said = gates.ahead(0, 1, x, z, torch.tensor([[0, 1, 2, 3]]), 2 * K)
        gates.heard(1, world.logits(y), torch.tensor([[0, 1, 2, 3]]))  # whatever the logits are
    assert said.tolist() == [[0, 1, 2, 3]]


def test_deeper_looks_are_learned_apart() -> None:
    world = World()
    gates = GateCorrection(H, [E, E, E], depth=2)
    for _ in range(200):
        x, y = world.token()
        z = world.logits(x)
        gates.ahead(0, 1, x, z, top(z), K)
        gates.ahead(0, 2, x, z, top(z), K)
        gates.heard(1, world.logits(x), top(world.logits(x)))
        gates.heard(2, world.logits(y), top(world.logits(y)))
    assert gates.recall(0, 2) is not None and gates.recall(0, 1) == (1.0, 1.0)


def test_memory_is_what_it_says() -> None:
    world = World()
    gates = GateCorrection(H, [E, E])
    live(gates, world, 3)
    held = sum(m.numel() * m.element_size() for m in gates._matrix.values())
    assert held == GateCorrection.nbytes(H, [E, E])


def test_what_was_learned_is_kept(tmp_path: Path) -> None:
    world = World()
    gates = GateCorrection(H, [E, E])
    live(gates, world, 400)
    gates.save(tmp_path / "r.npz")
    again = GateCorrection(H, [E, E])
    again.load(tmp_path / "r.npz")
    assert live(again, world, 50) > live(GateCorrection(H, [E, E]), world, 50) + 0.2
    assert (tmp_path / "r.npz").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("damage", ["absent", "foreign", "flipped", "not a number", "layers", "too few"])
def test_a_file_that_cannot_be_used_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "r.npz"
    gates = GateCorrection(H, [E, E])
    live(gates, World(), 5)
    gates.save(path)
    types = {"corrects": "int32", "pairs": "int32", "matrix": "float16"}
    a = {k: v.copy() for k, v in load_arrays(path, types).items()}
    if damage == "absent":
        path.unlink()
    elif damage == "flipped":
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    elif damage == "not a number":
        a["matrix"][3] = np.nan
        save_arrays(path, a)
    elif damage == "layers":
        a["pairs"][0] = (0, 7)
        save_arrays(path, a)
    elif damage == "too few":
        save_arrays(path, {**a, "matrix": a["matrix"][:-1]})
    other = GateCorrection(H + (damage == "foreign"), [E, E])
    with pytest.raises(UsageError if damage == "absent" else ModelError):
        other.load(path)
    assert other.recall(0, 1) is None

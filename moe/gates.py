"""What a layer's router will say, from the hidden states of an earlier layer: asked early, and corrected by experience.

The later layer's router is run on the earlier layer's input (Fate, arXiv 2502.12224). Between the two lie an attention
and a mixture of experts, and what they change is not all noise: a matrix as large as the router itself, learned while
the model runs, takes most of the error back. On the bundled model (bench/results/routing.json) it finds 8 of 10 experts
where the router alone finds 7, and nearly all within twice as many guesses.

Not covered: what is fetched because of it (`moe.lookahead`), and how sure it is (`moe.predictors.GateAhead`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from moe.measured import Ratio
from moe.store import load_arrays, save_arrays
from tiers import ModelError

RATE = 0.3  # of the normalised step: 0.1 to 0.4 do equally well on the bundled model
LEARNED_FROM = 16  # tokens of a pass, the last ones: a prompt's first tokens are many, and much alike
_ROUTED = 256  # choices after which it is known whether a family's router chooses by its logits alone


# One layer's router asked apart from its block: hidden [T, H] → logits [T, experts] as they are, and the choice [T, k].
Router = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class _ByLogits:
    """Whether a router chooses by its logits alone: seen within some tokens, and not asked again."""

    __slots__ = ("cases", "true")

    def __init__(self) -> None:
        self.true = self.cases = 0

    def note(self, true: int, cases: int) -> None:
        """So many of the choices were those of the greatest logits."""
        self.true, self.cases = self.true + true, self.cases + cases

    @property
    def settled(self) -> bool:
        return self.cases >= _ROUTED

    @property
    def holds(self) -> bool:
        """Believed until it is refuted."""
        return not self.settled or self.true > 0.99 * self.cases


class GateCorrection:
    """For each (layer, later layer): a matrix [experts, H] added to the later router's logits.

    Normalised least mean squares (Widrow and Hoff 1960; Haykin, "Adaptive Filter Theory", ch. 6) towards the logits
    that the later layer then computes from its own input. Every prediction is made before it is learned from, so its
    recall is that on unseen tokens; where it is not better than the router alone, the router's is used. Families that
    do not choose by their logits alone (groups, selection biases) are found out, and left to the router. All tensors
    are the CPU's.
    """

    def __init__(self, hidden: int, experts: Sequence[int], *, depth: int = 1) -> None:
        """`experts[layer]`; up to `depth` layers ahead."""
        self._hidden = hidden
        self._experts = tuple(experts)
        self._depth = depth
        self._matrix: dict[tuple[int, int], torch.Tensor] = {}
        # → input, corrected logits, the router's choice, the corrected one: what was said of a layer that has not run
        self._pending: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self._recall: dict[tuple[int, int], tuple[Ratio, Ratio]] = {}  # → the router alone, corrected
        self._by_logits = [_ByLogits() for _ in experts]
        self.learned = 0  # tokens

    @staticmethod
    def nbytes(hidden: int, experts: Sequence[int], depth: int = 1) -> int:
        """Memory that it takes, at most."""
        return 4 * hidden * sum(sum(experts[d:]) for d in range(1, depth + 1))

    def ahead(
        self, layer: int, later: int, hidden: torch.Tensor, logits: torch.Tensor, index: torch.Tensor, width: int
    ) -> torch.Tensor:
        """The choice of `later`, each token's most probable first: [T, width], or the router's own `index` [T, k].

        hidden [T, H] is the input of `layer`; logits [T, experts] and index are what the router of `later` says of it.
        """
        key, k = (layer, later), index.shape[-1]
        x, plain = hidden.float(), logits.float()
        matrix = self._matrix.get(key)
        corrected = plain if matrix is None else torch.addmm(plain, x, matrix.t())
        best = corrected.topk(min(width, corrected.shape[-1]), dim=-1).indices
        recent = slice(-LEARNED_FROM, None)
        self._pending[key] = (x[recent], corrected[recent], index[recent], best[recent, :k])
        if not self._by_logits[later].holds:
            return index
        known = self._recall.get(key)
        if known is not None and known[1].given(0.5, 1) < known[0].given(0.5, 1):
            return plain.topk(best.shape[-1], dim=-1).indices
        return best

    def heard(self, later: int, logits: torch.Tensor, index: torch.Tensor) -> None:
        """The router of `later` has now run: logits [T, experts], its choice index [T, k]."""
        logits, index = logits[-LEARNED_FROM:].float(), index[-LEARNED_FROM:]
        if not self._by_logits[later].settled:
            self._by_logits[later].note(_found(logits.topk(index.shape[-1], dim=-1).indices, index), index.numel())
        for layer in range(max(0, later - self._depth), later):
            said = self._pending.pop((layer, later), None)
            if said is None or said[1].shape != logits.shape:
                continue
            x, predicted, alone, corrected = said
            matrix = self._matrix.get((layer, later))
            if matrix is None:
                matrix = torch.zeros(logits.shape[-1], x.shape[-1])
                self._matrix[layer, later] = matrix
            plain, better = self._recall.setdefault((layer, later), (Ratio(), Ratio()))
            better.note(_found(corrected, index), index.numel())
            plain.note(_found(alone, index), index.numel())
            # one step for all tokens of the pass, each normalised by its own length
            step = (logits - predicted).div_(x.square().sum(-1, keepdim=True).add_(1e-6))
            matrix.addmm_(step.t(), x, alpha=RATE / len(x) ** 0.5)
        self.learned += len(logits) if later == len(self._experts) - 1 else 0

    def recall(self, layer: int, later: int) -> tuple[float, float] | None:
        """Of the experts that `later` chose, the share among as many guesses: by the router alone, and corrected."""
        known = self._recall.get((layer, later))
        return None if known is None else (known[0].given(0.5, 0.0), known[1].given(0.5, 0.0))

    def save(self, path: Path) -> None:
        """Keep it, in a checksummed file (`moe.store`) of 2 bytes a number. Raises `UsageError`."""
        pairs = sorted(self._matrix)
        flat = [self._matrix[p].half().numpy().ravel() for p in pairs]
        arrays = {
            "corrects": np.array([self._hidden, *self._experts], np.int32),
            "pairs": np.array(pairs, np.int32).reshape(-1, 2),
            "matrix": np.concatenate(flat or [np.zeros(0, np.float16)]),
        }
        save_arrays(path, arrays)

    def load(self, path: Path) -> None:
        """Begin with what is in that file. Raises `UsageError` (no such file), `ModelError` (damaged, foreign)."""
        types = {"corrects": "int32", "pairs": "int32", "matrix": "float16"}
        a = load_arrays(path, types, max_bytes=1 << 28)
        if a.keys() != types.keys() or a["corrects"].tolist() != [self._hidden, *self._experts]:
            raise ModelError(f"{path} is about another model: delete it and have it written again")
        pairs = [(int(x), int(y)) for x, y in a["pairs"]] if a["pairs"].ndim == 2 and a["pairs"].shape[1] == 2 else None
        layers = range(len(self._experts))
        if pairs is None or any(x not in layers or y not in layers or x >= y for x, y in pairs):
            raise ModelError(f"{path} names layers that there are not: delete it and have it written again")
        sizes = [self._experts[later] * self._hidden for _, later in pairs]
        if a["matrix"].shape != (sum(sizes),) or not np.isfinite(a["matrix"]).all():
            raise ModelError(f"{path} does not hold a matrix per pair: delete it and have it written again")
        parts = np.split(a["matrix"], np.cumsum(sizes)[:-1]) if pairs else []
        for (layer, later), part in zip(pairs, parts, strict=True):
            if later - layer <= self._depth:
                whole = torch.from_numpy(part.astype(np.float32))
                self._matrix[layer, later] = whole.view(self._experts[later], self._hidden)


def _found(guess: torch.Tensor, index: torch.Tensor) -> int:
    """How many of index [T, k] are in guess [T, k], row by row."""
    if len(index) == 1:
        return len(set(guess[0].tolist()).intersection(index[0].tolist()))
    return int((guess[:, :, None] == index[:, None, :]).any(1).sum())

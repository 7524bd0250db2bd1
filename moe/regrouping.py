"""Which requests to compute together, so that few experts are touched: token regrouping after ExpertFlow.

He et al. 2024, "ExpertFlow: Optimized Expert Activation and Token Allocation for Efficient MoE Inference", put tokens
that use the same experts into one batch. Here whole requests are grouped by the experts they are expected to use:
greedily, then by exchanges.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moe.traces import RoutingTrace

ROUNDS = 8  # most rounds of exchanges
_LEAST = 1e-4  # experts: what an exchange must save, well above the error of float32 sums

Use = NDArray[np.floating]  # [requests, layers, experts]: how likely a token of the request chooses the expert


def uses(traces: Sequence[RoutingTrace]) -> Use:
    """[requests, layers, experts] from one trace for each request, of its prompt or of what is predicted.

    Layers with fewer experts than the others are filled up with zeros. Raises `ValueError` if the traces are of
    different models.
    """
    if len({t.experts for t in traces}) > 1:
        raise ValueError("the traces are of different models")
    if not traces:
        return np.zeros((0, 0, 0))
    use = np.zeros((len(traces), traces[0].layers, max(traces[0].experts)))
    for n, trace in enumerate(traces):
        for layer, share in enumerate(trace.use()):
            use[n, layer, : len(share)] = share
    return use


def touched(use: Use, batches: Sequence[Sequence[int]]) -> float:
    """Experts that a step of every batch is expected to touch: the sum of 1 - Π(1 - use) over batches and experts."""
    p = np.asarray(use, np.float64)
    return float(sum((1 - np.prod(1 - p[list(batch)], axis=0)).sum() for batch in batches))


def regroup(use: Use, size: int) -> list[list[int]]:
    """Requests 0 … n-1 in ⌈n / size⌉ batches of at most `size`, with few experts `touched`; never more than in order.

    Each batch begins with the request whose use is most concentrated, and takes in the one that adds least, until it is
    full; then requests of two batches are exchanged where that saves most. Deterministic; batches and what is in them
    are in the order of arrival. For n requests of F experts in all layers: some n²·F·(1 + rounds) multiplications in
    matrix products, and 3·n·F float32 of memory. Raises `ValueError` if `use` is no [requests, layers, experts] within
    0 … 1 or `size` is none.
    """
    if use.ndim != 3 or size < 1:
        raise ValueError("regrouping needs [requests, layers, experts] and a size above zero")
    if use.size and not (use.min() >= 0 and use.max() <= 1):  # so written, it also refuses what is no number
        raise ValueError("use is no share of tokens: it must lie between 0 and 1")
    n = len(use)
    arrived = [list(range(i, min(i + size, n))) for i in range(0, n, size)]
    if len(arrived) < 2 or size == 1:
        return arrived
    p = np.zeros((len(arrived) * size, use.shape[1] * use.shape[2]), np.float32)
    p[:n] = use.reshape(n, -1)  # the rest are empty places: exchanging one is moving a request
    found = _exchanged(p, _greedy(p, n, size), size)
    batches = sorted(sorted(i for i in batch if i < n) for batch in found.tolist())
    return batches if touched(use, batches) < touched(use, arrived) else arrived


def _greedy(p: NDArray[np.float32], n: int, size: int) -> NDArray[np.intp]:
    """[batches, size] of the first n rows of p, empty places last."""
    left = np.arange(n)
    rest = p[:n]
    taken: list[int] = []
    while len(left):
        open_ = np.ones(len(left), bool)
        spared = np.ones(p.shape[1], np.float32)  # how likely the batch leaves an expert alone
        adds = -np.einsum("nf,nf->n", rest, rest)  # the most concentrated first
        for _ in range(min(size, len(left))):
            at = int(np.where(open_, adds, np.inf).argmin())
            open_[at] = False
            taken.append(int(left[at]))
            spared *= 1 - rest[at]
            adds = rest @ spared
        left, rest = left[open_], rest[open_]
    return np.array([*taken, *range(n, len(p))]).reshape(-1, size)


def _exchanged(p: NDArray[np.float32], batches: NDArray[np.intp], size: int) -> NDArray[np.intp]:
    """Rounds of the best exchanges, each batch in at most one of them a round."""
    for _ in range(ROUNDS):
        flat = batches.ravel()
        spared = np.empty_like(p)  # by the others of a row's batch
        for batch in batches:
            for i in batch:
                spared[i] = np.prod(1 - p[batch[batch != i]], axis=0)
        spared, rows = spared[flat], p[flat]  # batch by batch
        adds = spared @ rows.T  # [i, j]: what row j adds to the batch of row i, in its place
        own = np.diag(adds)
        change = adds + adds.T - own[:, None] - own[None, :]
        of = np.arange(len(flat)) // size
        change[of[:, None] == of[None, :]] = 0
        change[np.tril_indices(len(flat))] = 0
        best = np.flatnonzero(change.ravel() < -_LEAST)
        best = best[np.argsort(change.ravel()[best], kind="stable")]
        busy = np.zeros(len(batches), bool)
        flat = flat.copy()
        for i, j in zip(*np.divmod(best, len(flat)), strict=True):
            if not (busy[of[i]] or busy[of[j]]):
                busy[of[i]] = busy[of[j]] = True
                flat[i], flat[j] = flat[j], flat[i]
        if not busy.any():
            break
        batches = flat.reshape(-1, size)
    return batches

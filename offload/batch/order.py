"""In which order requests run, so that common prefixes are neighbours and the longest go first.

A prefix key stands for a prompt: `UNIT` bytes for each block of tokens, so that a common front of two keys means
common tokens. Requests sorted by key form a tree: a node for each front that at least two of them share. The order is
the tree's, depth first, the child with the longest request first: what shares is together for as short a time as can
be (BatchLLM, arXiv 2412.03594, section 4), and where nothing is shared it is longest first (LPT, Graham 1969), which
leaves the short ones to fill the end. Trees may be wider than memory: nodes come and go as streams.
Not covered: where keys and nodes are kept (`offload.batch.journal`), and which tokens are really equal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from offload.batch.schedule import LEAST_SHARED

BLOCK_TOKENS = LEAST_SHARED  # of a prompt; fronts are told apart by so many
UNIT = 4  # bytes of key for a block, or a token
MAX_KEY = 4096  # bytes: 16,384 tokens
_LEVELS = 64  # of the tree; what is nested deeper stays within the last of them
_MOST = (1 << 32) - 1


class Node(NamedTuple):
    """Requests `left` to `right` in the order of keys share `depth` units; the longest of them has `longest` tokens."""

    left: int
    right: int
    depth: int
    longest: int


def key_of(tokens: Sequence[int]) -> bytes:
    """The prefix key of a prompt: a hash for each whole block, over it and all before it (as vLLM's block hashes)."""
    ids = np.asarray(tokens[: MAX_KEY // UNIT * BLOCK_TOKENS], dtype="<i8")
    key, before = [], b""
    for begin in range(0, len(ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        before = hashlib.blake2b(before + ids[begin : begin + BLOCK_TOKENS].tobytes(), digest_size=16).digest()
        key.append(before[:UNIT])
    return b"".join(key)


def exact_key(tokens: Sequence[int]) -> bytes:
    """A key that tells fronts apart by the token, from `LEAST_SHARED` tokens on: for requests that are in memory."""
    if len(tokens) < LEAST_SHARED:
        return b""
    ids = np.asarray(tokens, dtype=">u4")
    return hashlib.blake2b(ids[:LEAST_SHARED].tobytes(), digest_size=UNIT).digest() + ids[LEAST_SHARED:].tobytes()


def nodes(rows: Iterable[tuple[bytes, int]]) -> Iterator[Node]:
    """The nodes of (key, tokens) in the order of keys, each when its last request has gone by.

    The intervals of the sorted keys' common fronts (Kasai et al. 2001, "Linear-time longest-common-prefix
    computation", section 5).
    """
    open_: list[tuple[int, int, int]] = []  # depth, left, longest; deeper ones later
    before, longest, at = b"", 0, -1
    for at, (key, tokens) in enumerate(rows):
        depth = _common(before, key) if at else 0
        left = at - 1
        while open_ and open_[-1][0] > depth:
            inner, left, most = open_.pop()
            longest = max(longest, most)
            yield Node(left, at - 1, inner, longest)
        if open_ and open_[-1][0] == depth:
            open_[-1] = (depth, open_[-1][1], max(longest, open_[-1][2]))
        elif depth:
            open_.append((depth, left, longest))
        before, longest = key, tokens
    while open_:
        inner, left, most = open_.pop()
        longest = max(longest, most)
        yield Node(left, at, inner, longest)


def places(tokens: Iterable[int], tree: Iterable[Node]) -> Iterator[bytes]:
    """For requests in the order of keys, what to sort them by. `tree`: the nodes by (left, depth)."""
    coming = iter(tree)
    node = next(coming, None)
    path: list[tuple[int, bytes]] = []  # right, what to sort by, of the nodes that we are in
    for at, own in enumerate(tokens):
        while path and path[-1][0] < at:
            path.pop()
        while node is not None and node.left == at:
            front = path[-1][1] if path else b""
            if len(path) < _LEVELS:
                front += _place(node.longest, node.left)
            path.append((node.right, front))
            node = next(coming, None)
        yield (path[-1][1] if path else b"") + _place(own, at)


def work_of(tokens: int, max_new: int) -> int:
    """What a request is sorted by: its new tokens, which come one after the other whatever else runs, before those of
    its prompt, which may all share a pass. The longest go first, so that at the end few passes have little to do."""
    return (min(max_new, (1 << 20) - 1) << 12) | min(tokens >> 4, (1 << 12) - 1)


def arranged(rows: Sequence[tuple[bytes, int]]) -> list[int]:
    """Numbers of (key, work) in running order: as a journal has them, in memory."""
    order = sorted(range(len(rows)), key=lambda i: (rows[i][0], -rows[i][1], i))
    tree = sorted(nodes(rows[i] for i in order), key=lambda node: (node.left, node.depth))
    found = places((rows[i][1] for i in order), tree)
    return [i for _, i in sorted(zip(found, order, strict=True))]


def _place(tokens: int, at: int) -> bytes:
    return (_MOST - min(tokens, _MOST)).to_bytes(4, "big") + at.to_bytes(4, "big")


def _common(a: bytes, b: bytes) -> int:
    """Units at the front that are equal."""
    if a[:UNIT] != b[:UNIT] or len(a) < UNIT or len(b) < UNIT:
        return 0
    low, high = 1, min(len(a), len(b)) // UNIT
    while low < high:
        middle = (low + high + 1) // 2
        if a[: middle * UNIT] == b[: middle * UNIT]:
            low = middle
        else:
            high = middle - 1
    return low

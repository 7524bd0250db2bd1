"""Keys and values on disk as a tree of prefixes: what two conversations have in common is stored once.

A node is a run of tokens after its parent, in a file of its own (`kvstore.nodes`), named by a hash over the model, how
it computes, and all tokens up to the node's end. Attention is causal, so the KV of a node's first tokens are good for
any sequence that begins as its own does: a node can be used in part. Recurrent states are good only after the last.

Files never change, so readers need no lock. Those who add a node hold the folder's lock together with others while
they look for its parent and give it its name; who prunes holds it alone, and takes children before parents. So a node
whose parent is gone does not come about; should it, `match` does not see it and `prune` removes it. What another
process has freed, or what is damaged, is as if it had never been there: it is computed again.

The index is in memory, made of the files' headers when they are first seen; the folder's listing is the truth.
Not covered: where KV is in memory, and when it is worth storing.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvstore.files import Temporary, explained, locked, open_private, private_folder, sweep
from kvstore.nodes import (
    NODE_TOKENS,
    SUFFIX,
    Header,
    Segment,
    encode,
    is_name,
    name_of,
    of_root,
    read_header,
    read_segment,
    root_of,
)
from kvstore.pruning import Pruned, prune
from tiers import DamagedError, GoneError, StoreFull

_THREADS = 4  # that read ahead
_AHEAD = 256 << 20
_TRIES = 3  # to add to a chain that another process is freeing

Take = Callable[[int, int], Segment]


@dataclass(frozen=True)
class Match:
    """A stored prefix: `chain` of (node, tokens used of it) from the root on; all but the last are used whole.

    `length` tokens in all. `state_length`: tokens up to the last node of the chain that is used whole and has states.
    `nbytes` of the files.
    """

    chain: tuple[tuple[str, int], ...]
    length: int
    state_length: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Node:
    inode: int
    nbytes: int
    parent: str | None
    tokens: NDArray[np.int64]
    has_states: bool


@dataclass(frozen=True, slots=True)
class _File:
    inode: int
    nbytes: int


class PrefixStore:
    """The nodes of one model in `folder`, which may hold other models' as well. Safe to use from several threads.

    `fingerprint` says which weights, `arithmetic` how they are computed with: KV of one are of no use to another.
    `limit` bounds the bytes of all nodes in the folder: to stay below it, `append` prunes. `pinned` tells which nodes
    conversations need (`Sessions.heads`); they and what is before them are never pruned.
    Raises `StoreError` if the folder cannot be used or is not private.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        arithmetic: str,
        *,
        limit: int | None = None,
        pinned: Callable[[], Iterable[str]] = tuple,
    ) -> None:
        self.folder = private_folder(folder)
        self.root = root_of(fingerprint, arithmetic)
        self.limit = limit
        self._pinned = pinned
        self._lock = threading.RLock()  # of what follows
        self._files: dict[str, _File] = {}  # of all models
        self._nodes: dict[str, _Node] = {}  # of ours
        self._bad: dict[str, int] = {}  # node -> inode of the file that was found damaged
        self._children: dict[str | None, dict[int, list[str]]] | None = None  # by first token; None: to be made
        sweep(folder)

    # adding

    def append(self, parent: str | None, segment: Segment) -> str:
        """Store the KV of up to `NODE_TOKENS` tokens that follow `parent` (None: the beginning); returns the name.

        If the node is there already, it only counts as used now. Raises `GoneError` if the parent is not there (any
        more), `StoreFull` if there is no space or the limit is reached, ValueError for what is no node.
        """
        name = name_of(self.root, parent, segment.tokens)
        if self._touch(name):
            return name
        parts = encode(self.root, parent, segment)
        nbytes = sum(len(p) for p in parts)
        if self.limit is not None:
            self._make_room(nbytes, parent)
        with Temporary(self.folder) as temporary:
            temporary.write(parts)
            with locked(self.folder, alone=False):
                if parent is not None and not os.path.lexists(self._path(parent)):
                    self._forget(parent)
                    raise GoneError(f"{self._path(parent)} is not there any more: store what is before it first")
                inode = temporary.commit(name + SUFFIX).st_ino
        tokens = np.asarray(segment.tokens, np.int64)
        with self._lock:
            self._bad.pop(name, None)
            self._add(name, _Node(inode, nbytes, parent, tokens, bool(segment.states)))
        return name

    def extend(self, tokens: Sequence[int], take: Take) -> str | None:
        """Store what is not yet stored of `tokens` in nodes of `NODE_TOKENS`; returns the last node (None: no tokens).

        `take(begin, end)` gives the KV of tokens[begin:end], with the states after `end` where they are known. A short
        node at the end of what is there is not followed but written again, longer: so nodes do not get many and small.
        Raises like `append`, but begins again if another process frees the chain.
        """
        for last_try in (*[False] * (_TRIES - 1), True):
            parent, begin = self._full_chain(tokens)
            try:
                while begin < len(tokens):
                    end = min(begin + NODE_TOKENS, len(tokens))
                    parent = self.append(parent, take(begin, end))
                    begin = end
                if parent is None or self._touch(parent):
                    return parent
            except GoneError:
                if last_try:
                    raise
        raise GoneError(f"{self.folder}: another process frees nodes as fast as they are stored; try again")

    def _full_chain(self, tokens: Sequence[int]) -> tuple[str | None, int]:
        """The last node, and tokens up to it, of the longest chain of `NODE_TOKENS` each or up to the very end."""
        match = self.match(tokens)
        parent, length = None, 0
        for name, used in match.chain:
            node = self._nodes.get(name)
            whole = node is not None and used == len(node.tokens)
            if not whole or (used < NODE_TOKENS and length + used < len(tokens)):
                break
            parent, length = name, length + used
        return parent, length

    def _touch(self, name: str) -> bool:
        """Whether a good file of this name is there; if so it counts as used now."""
        try:
            with locked(self.folder, alone=False), self._open(name) as (fd, _):
                _used_now(fd)
                return True
        except DamagedError:
            return False

    def _make_room(self, nbytes: int, parent: str | None) -> None:
        assert self.limit is not None
        with self._lock:
            self._refresh()
            if sum(f.nbytes for f in self._files.values()) + nbytes <= self.limit:
                return
        room = self.limit - nbytes
        if room < 0 or self._prune(room, [parent] if parent is not None else []).kept > room:
            raise StoreFull(
                f"{self.folder}: the {self.limit} bytes allowed there are used by conversations; remove some with "
                "`offload sessions rm` or allow more with --disk"
            )

    # finding and reading

    def match(self, tokens: Sequence[int], *, needs_states: bool = False) -> Match:
        """The longest stored prefix of `tokens`, to the token; with `needs_states` the longest that ends in states."""
        wanted = np.asarray(tokens, np.int64)
        with self._lock:
            self._refresh()
            children = self._tree()
            best = (0, 0)  # length, state_length; the other way round if states are needed
            end: tuple[str | None, int] = None, 0  # node, tokens used of it
            todo: list[tuple[str | None, int, int]] = [(None, 0, 0)]  # node, length and state_length up to its end
            while todo:
                parent, length, state_length = todo.pop()
                if length == len(wanted):
                    continue
                for name in children[parent].get(int(wanted[length]), ()) if parent in children else ():
                    node = self._nodes[name]
                    used = _common(node.tokens, wanted[length:])
                    total, states = length + used, state_length
                    if used == len(node.tokens):
                        states = total if node.has_states else state_length
                        todo.append((name, total, states))
                    found = (states, total) if needs_states else (total, states)
                    if found > best and (not needs_states or states == total):
                        best, end = found, (name, used)
            return self._match_to(*end)

    def chain(self, name: str) -> Match | None:
        """The whole chain that ends with node `name`; None if a part of it is not there."""
        with self._lock:
            self._refresh()
            node: str | None = name
            while node is not None:
                if node not in self._nodes:
                    return None
                node = self._nodes[node].parent
            return self._match_to(name, len(self._nodes[name].tokens))

    def tokens(self, match: Match) -> list[int]:
        """The token ids that a match stands for; fewer if a node is gone meanwhile."""
        with self._lock:
            found = [self._nodes[name].tokens[:used] for name, used in match.chain if name in self._nodes]
        return [int(t) for part in found for t in part]

    def read(self, name: str, upto: int | None = None) -> Segment:
        """The KV of a node, or of its first `upto` tokens (views, without states), verified.

        Raises `GoneError` if it is not there (any more), `DamagedError` if anything is wrong with it; it is then not
        matched any more, and `append` writes it anew.
        """
        with self._open(name) as (fd, header):
            try:
                if header.root != self.root:
                    raise DamagedError(f"{self._path(name)}: keys and values of another model")
                segment = read_segment(fd, name, header, upto)
            except DamagedError:
                self._mark(name, os.fstat(fd).st_ino)
                raise
            _used_now(fd)
            return segment

    def read_chain(self, match: Match, *, ahead: int = _AHEAD) -> Iterator[Segment]:
        """What a match stands for, node after node, read by threads while the caller uses what came before.

        At most `ahead` bytes, or one node, are read and not yet handed out. If a node is gone or damaged the segments
        simply end before it: count their tokens, the rest is to be computed.
        """
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="kv-read") as pool:
            waiting: deque[tuple[Future[Segment], int]] = deque()
            under_way = 0
            rest = iter(match.chain)
            following = next(rest, None)
            try:
                while following is not None or waiting:
                    while following is not None:
                        size = self._size(following[0])
                        if waiting and under_way + size > ahead:
                            break
                        waiting.append((pool.submit(self.read, *following), size))
                        under_way += size
                        following = next(rest, None)
                    future, size = waiting.popleft()
                    segment = future.result()
                    under_way -= size
                    yield segment
                    del segment, future  # the caller's now: do not keep it through the next wait
            except DamagedError:
                return
            finally:
                for future, _ in waiting:
                    future.cancel()

    # freeing

    def prune(self, limit: int) -> int:
        """Remove nodes, least recently used leaves first, until all are `limit` bytes; returns the bytes freed.

        What conversations need stays even if that is more. Damaged files, and what writers that died left, go always.
        """
        return self._prune(limit, []).freed

    def _prune(self, limit: int, keep: Sequence[str]) -> Pruned:
        done = prune(self.folder, limit, [*self._pinned(), *keep])
        with self._lock:
            self._refresh()
            for name in set(self._bad) - set(self._files):
                del self._bad[name]
        return done

    # the index; the caller holds self._lock

    def _refresh(self) -> None:
        """Make the index what the folder is: read the headers of new files, forget those that are gone."""
        found: dict[str, _File] = {}
        try:
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    name = entry.name.removesuffix(SUFFIX)
                    if name == entry.name or not is_name(name):
                        continue
                    inode = entry.inode()
                    known = self._files.get(name)
                    if known is None or known.inode != inode:
                        try:
                            known = _File(inode, entry.stat(follow_symlinks=False).st_size)
                        except FileNotFoundError:
                            continue
                        self._learn(name, known)
                    found[name] = known
        except OSError as e:
            raise explained(e, self.folder) from None
        for name in self._files.keys() - found.keys():
            self._forget(name)
        self._files = found

    def _learn(self, name: str, file: _File) -> None:
        self._forget(name)
        if of_root(name, self.root) and self._bad.get(name) != file.inode:
            with contextlib.suppress(DamagedError), self._open(name) as (fd, h):
                if h.root == self.root:
                    tokens = np.asarray(h.tokens, np.int64)
                    self._add(name, _Node(os.fstat(fd).st_ino, h.nbytes, h.parent, tokens, bool(h.states)))

    def _add(self, name: str, node: _Node) -> None:
        self._files[name] = _File(node.inode, node.nbytes)
        self._nodes[name] = node
        self._children = None

    def _forget(self, name: str) -> None:
        with self._lock:
            self._files.pop(name, None)
            if self._nodes.pop(name, None) is not None:
                self._children = None

    def _mark(self, name: str, inode: int) -> None:
        """This file of the node is damaged: do not match it, write it anew when it is appended."""
        with self._lock:
            self._bad[name] = inode
            if self._nodes.pop(name, None) is not None:
                self._children = None

    def _tree(self) -> dict[str | None, dict[int, list[str]]]:
        if self._children is None:
            made: dict[str | None, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
            for name, node in self._nodes.items():
                made[node.parent][int(node.tokens[0])].append(name)
            self._children = dict(made)
        return self._children

    def _match_to(self, name: str | None, used: int) -> Match:
        """The match that ends `used` tokens into node `name`; what is before is in the index."""
        path: list[tuple[str, int]] = []
        while name is not None:
            path.append((name, used))
            name = self._nodes[name].parent
            used = len(self._nodes[name].tokens) if name is not None else 0
        length = state_length = nbytes = 0
        for name, used in reversed(path):
            node = self._nodes[name]
            length, nbytes = length + used, nbytes + node.nbytes
            if node.has_states and used == len(node.tokens):
                state_length = length
        return Match(tuple(reversed(path)), length, state_length, nbytes)

    # files

    def _path(self, name: str) -> Path:
        return self.folder / (name + SUFFIX)

    def _size(self, name: str) -> int:
        with self._lock:
            file = self._files.get(name)
        return file.nbytes if file is not None else 0

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[tuple[int, Header]]:
        """The node's file and verified header. Raises `DamagedError`; a file known as damaged stays so."""
        fd = open_private(self._path(name))
        try:
            if self._bad.get(name) == os.fstat(fd).st_ino:
                raise DamagedError(f"{self._path(name)}: damaged; it is stored again when it is next computed")
            yield fd, read_header(fd, name)
        finally:
            os.close(fd)


def _used_now(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.utime(fd)


def _common(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """How many of the first values are equal."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n

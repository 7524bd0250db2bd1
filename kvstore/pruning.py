"""Which nodes go when there is no room for all: of any model, leaves first, never what a conversation needs."""

from __future__ import annotations

import heapq
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kvstore.files import explained, locked, open_private, private_folder, sweep, sync_folder
from kvstore.nodes import SUFFIX, is_name, read_header
from tiers import DamagedError


@dataclass(frozen=True)
class Pruned:
    """What `prune` did: bytes `freed` and `kept`, of which `needed` by conversations."""

    freed: int
    kept: int
    needed: int


def prune(folder: Path, limit: int, needed: Iterable[str]) -> Pruned:
    """Remove nodes of any model, least recently used leaves first, until all are `limit` bytes.

    `needed` nodes stay, with all that is before them, even if that is more. Before anything else go damaged files,
    nodes whose parents are gone, and what writers that died left. Raises `StoreError`.
    """
    freed = sweep(private_folder(folder))
    with locked(folder, alone=True):
        parents, sizes, ages, broken = _look(folder)
        orphans = {n for n in parents if not _whole(n, parents)}
        try:
            for name, size in broken.items():
                os.unlink(folder / (name + SUFFIX))
                freed += size
            freed += sum(sizes[n] for n in orphans)
            for name in orphans:
                os.unlink(folder / (name + SUFFIX))
            alive = {n: p for n, p in parents.items() if n not in orphans}
            pinned = _with_ancestors(needed, alive)
            kept = sum(sizes[n] for n in alive)
            for name in _leaves_first(alive, ages, pinned):
                if kept <= limit:
                    break
                os.unlink(folder / (name + SUFFIX))
                kept -= sizes[name]
                freed += sizes[name]
            sync_folder(folder)
        except OSError as e:
            raise explained(e, folder) from None
    return Pruned(freed, kept, sum(sizes[n] for n in pinned))


def _look(folder: Path) -> tuple[dict[str, str | None], dict[str, int], dict[str, int], dict[str, int]]:
    """Parents, sizes and times of last use of all good nodes in the folder; sizes of damaged ones."""
    parents: dict[str, str | None] = {}
    sizes: dict[str, int] = {}
    ages: dict[str, int] = {}
    broken: dict[str, int] = {}
    for entry in list(os.scandir(folder)):
        name = entry.name.removesuffix(SUFFIX)
        if name == entry.name or not is_name(name) or not entry.is_file(follow_symlinks=False):
            continue
        found = entry.stat(follow_symlinks=False)
        try:
            fd = open_private(folder / entry.name)
        except DamagedError:
            if found.st_uid == os.geteuid():
                broken[name] = found.st_size
            continue
        try:
            parents[name] = read_header(fd, name).parent
            sizes[name], ages[name] = found.st_size, found.st_mtime_ns
        except DamagedError:
            broken[name] = found.st_size
        finally:
            os.close(fd)
    return parents, sizes, ages, broken


def _whole(name: str | None, parents: dict[str, str | None]) -> bool:
    """Whether the chain goes to the root. A name is a hash over its parent's: there are no circles."""
    while name is not None:
        if name not in parents:
            return False
        name = parents[name]
    return True


def _with_ancestors(names: Iterable[str], parents: dict[str, str | None]) -> set[str]:
    found: set[str] = set()
    for start in names:
        name: str | None = start
        while name is not None and name in parents and name not in found:
            found.add(name)
            name = parents[name]
    return found


def _leaves_first(parents: dict[str, str | None], ages: dict[str, int], pinned: set[str]) -> Iterator[str]:
    """The nodes that are not pinned, each after all of its children, else the least recently used first."""
    children: dict[str, int] = defaultdict(int)
    for parent in parents.values():
        if parent is not None:
            children[parent] += 1
    free = [(ages[n], n) for n in parents if not children[n] and n not in pinned]
    heapq.heapify(free)
    while free:
        _, name = heapq.heappop(free)
        yield name
        parent = parents[name]
        if parent is not None:
            children[parent] -= 1
            if not children[parent] and parent not in pinned:
                heapq.heappush(free, (ages[parent], parent))

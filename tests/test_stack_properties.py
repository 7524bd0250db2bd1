"""Both tiers driven at random, with a slow and failing disk and link; the whole state is checked after every step.

What one residency does by itself is driven likewise in `test_residency`; here it is what goes on between two.
"""

from __future__ import annotations

import errno
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tower import CYCLIC_KEYS, DATA, IMAGES, KEYS, PATIENCE, PINNED, SLOT, STEP, Tower, content, make_block, offsets

from tiers import Lease, ReadError, Residency

FAULTS: dict[str, Callable[[], BaseException]] = {
    "ReadError": lambda: ReadError("blocks.bin: injected"),
    "OSError": lambda: OSError(errno.EIO, "injected"),
    "SystemExit": lambda: SystemExit("injected"),
}
COPIES = range(0, SLOT, STEP)
NBYTES = make_block(KEYS[0]).nbytes
key_st = st.sampled_from([k for k in KEYS if k not in ("l4", "c3")])  # few, so that they meet
kind_st = st.sampled_from(sorted(FAULTS))
keys_st = st.lists(key_st, min_size=1, max_size=4, unique=True)


class Machine(RuleBasedStateMachine):
    """Everything that is ever done to two stacked residencies, in any order.

    Which rules there are and what they draw never depends on how far a transfer has come: a rule that finds nothing
    to do does nothing. So the same choices can be made again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name) / "blocks.bin"
        path.write_bytes(DATA)
        self.tower = Tower(path)
        # slow, not stuck: what must wait for a transfer may do so at any time
        self.tower.reader.longest_hold = self.tower.device.longest_hold = 0.0015
        self.hold(True, True)
        self.waiting: list[Lease] = []
        self.arrived: list[Lease] = []
        self.suspects: set[str] = set()  # blocks that a fault may have hit
        self.classes: Counter[str] = Counter()  # of requests: hit, late, missed, or fetched in time

    # what the model knows

    def out(self) -> Counter[str]:
        return Counter(lease.key for lease in (*self.waiting, *self.arrived))

    def room(self, key: str) -> bool:
        """Whether a demand above can be met: the block has a slot, or not every slot of its pool is leased."""
        entry = self.tower.top._entries[key]
        leased = {k for k in self.out() if self.tower.top._entries[k].pool == entry.pool}
        return entry.slot is not None or len(leased) < self.tower.slots[self.tower.top, str(entry.pool)]

    def must_fail(self, key: str) -> bool:
        """Whether nothing of the block is anywhere, and what it must pass through is broken."""
        t = self.tower
        above, below = t.top._entries[key].slot is not None, t.host._entries[key].slot is not None
        broken = t.reader.verify_fault is not None or any(o in t.reader.faults for o in offsets(key))
        return not above and (bool(t.device.faults) or (not below and broken))

    def request(self, key: str, *, must: bool = True) -> Lease | None:
        """Ask, and see that the counters move as they say they do."""
        top = self.tower.top
        c = top.counters
        with top._lock:
            entry = top._entries[key]
            before = c.needed, c.hit, c.late, c.missed
            failed = entry.ticket is not None and entry.ticket.done and entry.ticket.error is not None
            under_way = entry.ticket is not None and not entry.ticket.done
            if entry.slot is None or (failed and not entry.leases):
                may = {"missed"}
            elif under_way:
                may = {"late", "in time"} if entry.unused else {"hit"}
                if not entry.leases:
                    may |= {"missed"}  # it may fail before it is asked for
            else:
                may = {"in time"} if entry.unused else {"hit"}
            lease = top.request(key, must=must)
            moved = tuple(now - then for now, then in zip((c.needed, c.hit, c.late, c.missed), before, strict=True))
        if lease is None:
            assert moved == (0, 0, 0, 0), "what is refused is not counted"
            return None
        kinds = {(1, 1, 0, 0): "hit", (1, 0, 1, 0): "late", (1, 0, 0, 1): "missed", (1, 0, 0, 0): "in time"}
        kind = kinds[tuple(n // NBYTES for n in moved)]  # type: ignore[index]
        assert kind in may, f"{kind} where {may} can be"
        self.classes[kind] += 1
        return lease

    def came(self, lease: Lease) -> None:
        self.arrived.append(lease)
        assert lease.ready
        assert content(lease.slot) == IMAGES[lease.key]
        if lease.key in CYCLIC_KEYS:
            self.tower.schedule.used(lease.key)

    def failed(self, key: str, error: BaseException) -> None:
        assert isinstance(error, ReadError)
        assert key in self.suspects, f"{key} failed without a fault: {error}"
        assert "injected" in str(error)

    def wait_for(self, lease: Lease) -> None:
        """In a thread of its own, so that what never ends shows."""
        told: list[BaseException | None] = []

        def work() -> None:
            try:
                lease.wait()
                told.append(None)
            except BaseException as e:
                told.append(e)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(PATIENCE)
        assert told, f"who waits for {lease.key} waits for ever"
        if told[0] is None:
            self.came(lease)
        else:
            self.failed(lease.key, told[0])

    # what can happen

    @rule(key=key_st, must=st.booleans())
    def request_only(self, key: str, must: bool) -> None:
        self.ask(key, must)

    @rule(key=key_st, n=st.integers(1, 3))
    def request_and_wait(self, key: str, n: int) -> None:
        """Each waiter gets its lease or the error, none is forgotten."""
        self.acquire(key, n)

    def ask(self, key: str, must: bool) -> None:
        if self.room(key):
            lease = self.request(key, must=must)
            assert lease is not None
            self.waiting.append(lease)
        elif must:
            with pytest.raises(RuntimeError, match="every slot of pool"):
                self.request(key)
        else:
            assert self.request(key, must=False) is None

    @rule(i=st.integers(0, 4), wait=st.booleans())
    def use_what_was_fetched_ahead(self, i: int, wait: bool) -> None:
        ahead = [k for k, e in self.tower.top._entries.items() if e.unused]
        if ahead:
            key = ahead[i % len(ahead)]
            if wait:
                self.acquire(key, 1)
            else:
                self.ask(key, True)

    @rule(ms=st.integers(1, 4))
    def some_time_passes(self, ms: int) -> None:
        time.sleep(ms / 1000)

    @rule(i=st.integers(0, 10))
    def wait(self, i: int) -> None:
        if self.waiting:
            self.wait_for(self.waiting.pop(i % len(self.waiting)))

    def acquire(self, key: str, n: int) -> None:
        if not self.room(key):
            return
        lost = self.must_fail(key)
        before = len(self.arrived)
        if n > 1:
            self.acquire_from_threads(key, n)
        else:
            lease = self.request(key)
            assert lease is not None
            self.wait_for(lease)
        assert not lost or len(self.arrived) == before, f"{key} cannot have come"

    def acquire_from_threads(self, key: str, n: int) -> None:
        told: list[Lease | BaseException] = []

        def work() -> None:
            try:
                told.append(self.tower.top.acquire(key))
            except BaseException as e:
                told.append(e)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(n)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(PATIENCE)
        assert len(told) == n, "every waiter is answered"
        self.classes["several"] += n
        for got in told:
            if isinstance(got, Lease):
                self.came(got)
            else:
                self.failed(key, got)

    @rule(i=st.integers(0, 10), twice=st.booleans())
    def release(self, i: int, twice: bool) -> None:
        """Whether the bytes have come or not."""
        if not self.waiting and not self.arrived:
            return
        i %= len(self.waiting) + len(self.arrived)
        lease = self.waiting.pop(i) if i < len(self.waiting) else self.arrived.pop(i - len(self.waiting))
        lease.release()
        if twice:
            lease.release()

    def prefetch(self, tier: Residency, key: str, deadline: float) -> None:
        def has() -> set[str]:
            return {k for k, e in tier._entries.items() if e.slot is not None}

        with tier._lock:
            had = has()
            if tier.prefetch(key, deadline):
                assert key in has()
                assert len(had - has()) <= 1, "at most one block makes room"
            else:
                assert has() == had, "a refusal changes nothing"
            assert {k for k, e in tier._entries.items() if e.leases} <= has()

    @rule(keys=keys_st, above=st.booleans(), order=st.permutations([0.0, 1.0, 1.0, 2.0]))
    def prefetch_some(self, keys: list[str], above: bool, order: list[float]) -> None:
        for key, deadline in zip(keys, order, strict=False):
            self.prefetch(self.tower.top if above else self.tower.host, key, deadline)

    @rule(keys=keys_st, ms=st.integers(0, 4), below=st.booleans())
    def think_better_of_it(self, keys: list[str], ms: int, below: bool) -> None:
        for key in keys:
            self.prefetch(self.tower.top, key, 0.0)
        self.some_time_passes(ms)
        self.cancel_prefetches(True, below)

    @rule(key=key_st, above=st.booleans())
    def promote(self, key: str, above: bool) -> None:
        (self.tower.top if above else self.tower.host).promote(key)

    @rule(above=st.booleans(), below=st.booleans())
    def cancel_prefetches(self, above: bool, below: bool) -> None:
        """Both: as when a step was cut short."""
        for tier, wanted in ((self.tower.top, above), (self.tower.host, below)):
            if wanted:
                tier.cancel_prefetches()
        if above:
            with self.tower.frozen():
                under_way = {k for k, e in self.tower.top._entries.items() if e.ticket and not e.ticket.done}
                assert under_way <= set(self.out())
                if below:
                    assert not self.tower.reader.writing or under_way or self.pinned_is_read()

    def pinned_is_read(self) -> bool:
        ticket = self.tower.host._entries[PINNED].ticket
        return ticket is not None and not ticket.done

    @rule(disk=st.booleans(), link=st.booleans())
    def hold(self, disk: bool, link: bool) -> None:
        """From here on they are slow, or quick again."""
        for wild, slow in ((self.tower.reader, disk), (self.tower.device, link)):
            (wild.gate.clear if slow else wild.gate.set)()

    @rule(where=st.sampled_from(["read", "file", "copy"]), key=key_st, n=st.integers(0, 4), kind=kind_st)
    def break_something(self, where: str, key: str, n: int, kind: str) -> None:
        """One read of one block, every file, or one copy of every block: from here on, until it is repaired."""
        t = self.tower
        self.suspects.update([key] if where == "read" else KEYS)
        if where == "read":
            t.reader.faults[offsets(key)[n]] = FAULTS[kind]
        elif where == "file":
            t.reader.verify_fault = FAULTS[kind]
        else:
            t.device.faults[COPIES[n % len(COPIES)]] = FAULTS[kind]

    @rule()
    def repair(self) -> None:
        self.tower.repair()

    @rule()
    def settle(self) -> None:
        """When nothing is under way no lease below is left, and the books balance; what was slow stays so."""
        t = self.tower
        slow = [w.gate for w in (t.reader, t.device) if not w.gate.is_set()]
        t.settle()
        if not (t.reader.faults or t.reader.verify_fault or t.device.faults):
            # an old error is told only to those who already wait for it
            self.suspects = {lease.key for lease in self.waiting} & self.suspects
        for gate in slow:
            gate.clear()

    @invariant()
    def whole_state(self) -> None:
        self.tower.check(self.out())
        for lease in self.arrived:
            assert content(lease.slot) == IMAGES[lease.key], "leased bytes stay"
        c = self.tower.top.counters
        assert c.needed == NBYTES * self.classes.total()
        rest = c.needed - c.hit - c.late - c.missed
        assert min(c.hit, c.late, c.missed, c.stall_s, rest) >= 0
        several = self.classes["several"]
        for name, seen in (("hit", c.hit), ("late", c.late), ("missed", c.missed), ("in time", rest)):
            assert 0 <= seen // NBYTES - self.classes[name] <= several

    def teardown(self) -> None:
        try:
            self.tower.repair()
            for lease in (*self.waiting, *self.arrived):
                lease.release()
            self.waiting, self.arrived = [], []
            self.settle()
            assert not self.suspects
            self.whole_state()
            for key in KEYS:  # whatever happened, everything can be had again, and at the first try
                lease = self.request(key)
                assert lease is not None
                self.wait_for(lease)
                self.release(0, False)
            self.settle()
            self.whole_state()
        finally:
            self.tower.close()
            self.folder.cleanup()


Machine.TestCase.settings = settings(max_examples=90, stateful_step_count=40, deadline=None, database=None)
TestMachine = Machine.TestCase

"""Who joins the passes of a batch job, who waits for whom, and whose tokens the next pass computes.

A pure object: told what joined and what ended, it answers; it computes nothing and owns no memory. Sequences join and
leave at any pass (continuous batching; Yu et al. 2022, Orca). Each pass has one token of every sequence that is
decoding, and as much of prompts as its width leaves (Agrawal et al. 2023, https://arxiv.org/abs/2308.16369).

Answers come in an order in which those with a common front are neighbours, so that the one that joined last has the
longest front in common with the next: that one waits until the front is computed, and shares it (BatchLLM,
https://arxiv.org/abs/2412.03594). Who leaves while nobody has come yet to share, stays as the `trunk`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

LEAST_SHARED = 16  # tokens: a shorter common front is not worth waiting for


class Tasked(Protocol):
    """What the schedule wants to know of an answer."""

    @property
    def front(self) -> Sequence[int]:
        """The tokens to be computed before the first new one."""
        ...

    @property
    def left(self) -> int:
        """New tokens there may still be, at most."""
        ...


@dataclass(eq=False, slots=True)
class Member:
    """A sequence that takes part: `done` of its tokens are computed, `todo` are not.

    `shared` tokens at the front are `donor`'s; it has `begun` once they are there. `reserved` tokens of memory are
    counted as its own.
    """

    answer: Tasked
    todo: list[int]
    donor: Member | None = None
    shared: int = 0
    reserved: int = 0
    done: int = 0
    begun: bool = False
    gone: bool = field(default=False)  # its answer has ended; it stays for those who share


class Schedule:
    """`room` tokens of keys and values, `most` sequences, `width` tokens of a pass; memory goes by `chunk` tokens.

    `sharing`: fronts in common are computed once.
    """

    def __init__(self, room: int, most: int, width: int, chunk: int, *, sharing: bool = True) -> None:
        self._sharing = sharing
        self.most, self.width = max(1, most), max(1, width)
        self._room, self._chunk = room, chunk
        self.members: list[Member] = []
        self.last: Member | None = None  # who joined last
        self.reserved = 0

    def share(self, front: Sequence[int]) -> int:
        """How many of these tokens the one that joined last has, or will have, in common; all but one at most."""
        if self.last is None or not self._sharing:
            return 0
        # nobody computes the last token of an answer that has ended
        there = self.last.done if self.last.gone else len(front)
        shared = common(self.last.answer.front, front, min(len(front) - 1, there))
        return shared if shared >= LEAST_SHARED else 0

    def takes(self, answer: Tasked) -> bool:
        """Whether another sequence may join now; one that is alone always may."""
        running = sum(not m.gone for m in self.members)
        if not running:
            return True
        return running < self.most and self.reserved + self._need(answer, self.share(answer.front)) <= self._room

    def join(self, answer: Tasked) -> tuple[Member, Member | None]:
        """Let it take part; returns its member, and the trunk if nobody needs that any more."""
        shared = self.share(answer.front)
        donor = self.last if shared else None
        while donor is not None and not donor.begun and shared <= donor.shared:
            donor = donor.donor  # both wait for that one, and neither for the other
        member = Member(answer, list(answer.front[shared:]), donor, shared, self._need(answer, shared), shared)
        before, self.last = self.last, member
        self.members.append(member)
        self.reserved += member.reserved
        # one that is gone has begun, so if it is shared it is the donor
        dropped = before if before is not None and before.gone and before is not donor else None
        if dropped is not None:
            self._remove(dropped)
        return member, dropped

    def beginning(self) -> list[Member]:
        """Those who can begin now: what they share is there. The caller gives them memory and says that they `began`;
        then others may, who share with them."""
        return [
            m for m in self.members if not m.begun and (m.donor is None or (m.donor.begun and m.donor.done >= m.shared))
        ]

    def known(self, member: Member, length: int) -> None:
        """The first `length` tokens of one that begins are there already, all but one at most."""
        assert member.donor is None and not member.done
        del member.todo[:length]
        member.done = length

    def began(self, member: Member) -> Member | None:
        """It has its own share of the front now; returns the trunk if that was kept for it alone."""
        member.begun = True
        donor = member.donor
        if donor is None or not donor.gone or any(m.donor is donor and not m.begun for m in self.members):
            return None
        self._remove(donor)
        return donor

    def parts(self) -> list[tuple[Member, int]]:
        """Whose tokens the next pass computes, and how many: every decoding one's, then prompts in order of arrival."""
        ready = [m for m in self.members if m.begun and not m.gone]
        decoding = [m for m in ready if len(m.todo) == 1]
        left = max(self.width - len(decoding), 1 if not decoding else 0)
        out = [(m, 1) for m in decoding]
        for m in ready:
            if len(m.todo) > 1 and left > 0:
                out.append((m, min(len(m.todo), left)))
                left -= out[-1][1]
        return out

    def passed(self, parts: Sequence[tuple[Member, int]]) -> list[Member]:
        """The pass has been computed; returns those that a new token is due of."""
        for member, count in parts:
            del member.todo[:count]
            member.done += count
        return [m for m, _ in parts if not m.todo]

    def leave(self, member: Member, upcoming: Sequence[int] | None) -> bool:
        """Its answer has ended. True if its memory is free; False if it is kept: somebody waits to share its front, or
        the next in line, with the tokens `upcoming`, does."""
        member.gone = True
        waited_for = any(m.donor is member and not m.begun for m in self.members)
        wanted = member is self.last and upcoming is not None and self.share(upcoming) > 0
        if waited_for or wanted:
            return False
        self._remove(member)
        return True

    def drop_trunk(self) -> Member | None:
        """Give up what is kept for the next in line, if that is all there is; returns it."""
        last = self.last
        if last is None or not last.gone:
            return None
        self._remove(last)
        return last

    def _need(self, answer: Tasked, shared: int) -> int:
        """Tokens of memory: whole chunks, and those shared only if they are begun anew."""
        whole = -(-(len(answer.front) + answer.left) // self._chunk) * self._chunk
        return whole - shared // self._chunk * self._chunk

    def _remove(self, member: Member) -> None:
        """Its memory is given up, but for what others share: that is counted as the first one's from now on."""
        self.members.remove(member)
        self.reserved -= member.reserved
        if self.last is member:
            self.last = None
        heirs = sorted((m for m in self.members if m.donor is member), key=lambda m: -m.shared)
        if not heirs:
            return
        heir = heirs[0]
        before = min(heir.shared, member.shared)  # is the donor's donor's
        inherited = (heir.shared // self._chunk - before // self._chunk) * self._chunk
        heir.reserved += inherited
        self.reserved += inherited
        heir.donor, heir.shared = (member.donor, before) if member.donor in self.members else (None, 0)
        for other in heirs[1:]:
            other.donor = heir


def common(a: Sequence[int], b: Sequence[int], most: int) -> int:
    """Tokens at the front of both, `most` at most."""
    most = min(len(a), len(b), max(0, most))
    if list(a[:most]) == list(b[:most]):
        return most
    low, high = 0, most  # a[:low] is common, a[:high] is not
    while high - low > 1:
        middle = (low + high) // 2
        if list(a[low:middle]) == list(b[low:middle]):
            low = middle
        else:
            high = middle
    return low

"""The schedule of a batch job, alone: a driver in place of the runner, lists of tokens in place of keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from offload.batch.schedule import LEAST_SHARED, Member, Schedule, common


@dataclass(eq=False)
class Answer:
    """Will say `says`, the last of which ends it; `limit` is what it may say at most."""

    prompt: list[int]
    says: list[int]
    limit: int
    said: int = 0

    @property
    def front(self) -> Sequence[int]:
        return self.prompt + self.says[: self.said]

    @property
    def left(self) -> int:
        return self.limit - self.said


@dataclass(eq=False)
class Held:
    """What a sequence has computed, and the chunks (anything unlike) that it is in."""

    tokens: list[int]
    chunks: list[object]


@dataclass
class Driver:
    """What the runner does, with everything looked at on the way."""

    answers: list[Answer]
    room: int
    most: int
    width: int
    chunk: int
    sharing: bool = True
    held: dict[Member, Held] = field(default_factory=dict)
    computed: int = 0
    ended: list[Answer] = field(default_factory=list)
    given_up: set[Member] = field(default_factory=set)

    def run(self) -> None:
        self.schedule = Schedule(self.room, self.most, self.width, self.chunk, sharing=self.sharing)
        schedule, waiting = self.schedule, list(self.answers)
        while True:
            while waiting and schedule.takes(waiting[0]):
                alone = all(m.gone for m in schedule.members)
                _, dropped = schedule.join(waiting.pop(0))
                self.forget(dropped)
                assert alone or schedule.reserved <= self.room
                self.look()
            if all(m.gone for m in schedule.members):
                self.forget(schedule.drop_trunk())
                break
            for member in self.one_pass():
                if schedule.leave(member, waiting[0].front if waiting else None):
                    self.forget(member)
                self.ended.append(member.answer)  # type: ignore[arg-type]
                self.look()
        assert schedule.reserved == 0
        assert schedule.members == []
        assert schedule.last is None
        assert self.held == {}, "all memory has been given back"

    def one_pass(self) -> list[Member]:
        schedule = self.schedule
        self.begin()
        parts = schedule.parts()
        assert parts, "somebody runs, and nobody goes on"
        assert len({m for m, _ in parts}) == len(parts)
        decoding = sum(len(m.todo) == 1 for m, _ in parts)
        assert sum(n for _, n in parts) <= max(self.width, decoding)
        ready = [m for m in schedule.members if not m.gone and m.begun]
        assert all(any(p is m for p, _ in parts) for m in ready if len(m.todo) == 1), "who decodes is in every pass"
        for member, count in parts:
            assert 0 < count <= len(member.todo)
            assert not member.gone
            self.grow(member, member.todo[:count])
        ended = []
        for member in schedule.passed(parts):
            answer = member.answer
            assert isinstance(answer, Answer)
            assert self.held[member].tokens == list(answer.front), "all before the new token, once each, in order"
            member.todo.append(answer.says[answer.said])
            answer.said += 1
            if answer.said == len(answer.says):
                ended.append(member)
        self.look()
        self.begin()
        return ended

    def begin(self) -> None:
        for member in self.schedule.beginning():
            tokens: list[int] = []
            chunks: list[object] = []
            if member.donor is not None and member.shared:
                donor = self.held[member.donor]
                assert len(donor.tokens) >= member.shared, "what it shares is there"
                assert LEAST_SHARED <= member.shared < len(member.answer.front)
                tokens = donor.tokens[: member.shared]
                assert tokens == list(member.answer.front)[: member.shared]
                chunks = donor.chunks[: member.shared // self.chunk]
                chunks += [object() for _ in range(member.shared % self.chunk > 0)]
            self.held[member] = Held(tokens, chunks)
            self.forget(self.schedule.began(member))
            self.look()

    def grow(self, member: Member, tokens: list[int]) -> None:
        held = self.held[member]
        held.tokens += tokens
        held.chunks += [object() for _ in range(-(-len(held.tokens) // self.chunk) - len(held.chunks))]
        self.computed += len(tokens)

    def forget(self, member: Member | None) -> None:
        if member is None:
            return
        assert member.gone
        assert member not in self.given_up, "memory is given up once"
        self.given_up.add(member)
        del self.held[member]
        assert member not in self.schedule.members

    def look(self) -> None:
        """What holds at any time."""
        schedule = self.schedule
        assert sum(not m.gone for m in schedule.members) <= schedule.most
        assert schedule.reserved == sum(m.reserved for m in schedule.members)
        for member in schedule.members:
            assert isinstance(member.answer, Answer)
            chunks = -(-(len(member.answer.prompt) + member.answer.limit) // self.chunk)
            assert member.reserved == (chunks - member.shared // self.chunk) * self.chunk >= 0
        held = {id(c) for h in self.held.values() for c in h.chunks}
        assert len(held) * self.chunk <= schedule.reserved, "what is held has been counted"
        running = sum(not m.gone for m in schedule.members)
        assert running <= 1 or schedule.reserved <= self.room
        for member in schedule.members:
            assert member.donor is None or member.donor in schedule.members
            if not member.begun:
                assert member not in self.held


def say(index: int, count: int) -> list[int]:
    return [1000 * (index + 1) + i for i in range(count)]


def segment(name: int, length: int) -> list[int]:
    return [100 * name + i % 100 for i in range(length)]


@st.composite
def jobs(draw: st.DrawFn) -> list[Answer]:
    """Prompts made of few kinds of segments, or of an earlier prompt and what it was answered."""
    answers: list[Answer] = []
    for index in range(draw(st.integers(1, 12))):
        limit = draw(st.integers(1, 20))
        says = say(index, draw(st.one_of(st.just(limit), st.integers(1, limit))))
        kind = draw(st.sampled_from(["new", "new", "again", "front", "turn"])) if answers else "new"
        lengths = st.sampled_from([1, 7, 15, 16, 17, 32, 33, 48])
        prompt = segment(draw(st.integers(0, 2)), draw(lengths))
        if kind != "new":
            before = draw(st.sampled_from(answers))
            whole = before.prompt + before.says
            cut = {"again": len(before.prompt), "turn": len(whole)}.get(kind) or draw(st.integers(1, len(whole)))
            prompt = whole[:cut] + (prompt if kind != "again" or draw(st.booleans()) else [])
        answers.append(Answer(prompt, says, limit))
    return answers


@settings(max_examples=250, deadline=None)
@given(
    answers=jobs(),
    room=st.integers(1, 600),
    most=st.integers(1, 8),
    width=st.sampled_from([1, 2, 8, 16, 40, 1000]),
    chunk=st.sampled_from([1, 16, 32]),
    sharing=st.booleans(),
)
# the next one shares less with the last than that shares with the one before, who has not come so far
@example([Answer(segment(0, 48), [1], 1), Answer([*segment(0, 40), 8], [2], 1), Answer([*segment(0, 20), 9], [3], 1)],
         600, 8, 16, 16, True)  # fmt: skip
# what goes on with all that one said, whose last token nobody computed
@example([Answer(segment(0, 20), [1, 2], 2), Answer([*segment(0, 20), 1, 2, 5], [3], 1)], 600, 1, 16, 16, True)
# the one in the middle leaves first: what it shared in part of a chunk is counted for who shares with it
@example([Answer(segment(0, 40), say(0, 20), 20), Answer(segment(0, 20) + [8] * 13, [2], 1),
          Answer(segment(0, 20) + [8] * 13 + [9], say(2, 20), 20)], 600, 3, 40, 16, True)  # fmt: skip
def test_any_job(answers: list[Answer], room: int, most: int, width: int, chunk: int, sharing: bool) -> None:
    driver = Driver(answers, room, most, width, chunk, sharing)
    driver.run()
    assert len(driver.ended) == len(answers)
    assert set(map(id, driver.ended)) == set(map(id, answers))
    assert all(a.said == len(a.says) for a in answers)
    # the last token of each is computed for nobody
    whole = sum(len(a.prompt) + len(a.says) - 1 for a in answers)
    assert driver.computed <= whole
    if not sharing:
        assert driver.computed == whole


@settings(max_examples=60, deadline=None)
@given(count=st.integers(2, 9), front=st.integers(LEAST_SHARED, 200), most=st.integers(1, 4), chunk=st.just(16))
def test_a_front_in_common_is_computed_once(count: int, front: int, most: int, chunk: int) -> None:
    """However few run at once: who leaves is kept as long as the next one shares its front."""
    answers = [Answer([*segment(0, front), 5000 + i], say(i, 3), 3) for i in range(count)]
    driver = Driver(answers, 10_000, most, 64, chunk)
    driver.run()
    assert driver.computed == front + count * (1 + 2)


def test_choices_of_one_prompt_share_all_but_its_last_token() -> None:
    driver = Driver([Answer(segment(0, 50), say(i, 4), 4) for i in range(3)], 10_000, 3, 64, 16)
    driver.run()
    assert driver.computed == 50 + 2 + 3 * 3


def test_a_trunk_does_not_count_as_running() -> None:
    """The memory of who is alone may be more than there is; with others it waits."""
    one, other = (Answer(segment(i, 64), say(i, 4), 4) for i in range(2))
    schedule = Schedule(80, 4, 64, 16)
    assert schedule.takes(one)
    schedule.join(one)
    assert not schedule.takes(other)
    tight = Schedule(10, 4, 64, 16)
    assert tight.takes(one), "one that is alone always may"
    tight.join(one)
    assert tight.reserved == 80
    assert not tight.takes(other)


def test_prompts_ride_along_with_those_that_decode() -> None:
    schedule = Schedule(10_000, 4, 8, 16)
    first, _ = schedule.join(Answer([1, 2, 3], say(0, 5), 5))
    schedule.beginning()[0].begun = True
    assert schedule.passed(schedule.parts()) == [first]
    first.todo.append(1000)
    second, _ = schedule.join(Answer(segment(0, 20), say(1, 5), 5))
    third, _ = schedule.join(Answer(segment(1, 20), say(2, 5), 5))
    for member in schedule.beginning():
        schedule.began(member)
    assert schedule.parts() == [(first, 1), (second, 7)]
    assert schedule.passed(schedule.parts()) == [first]
    first.todo.append(1001)
    second.todo[:] = second.todo[:3]
    assert schedule.parts() == [(first, 1), (second, 3), (third, 4)]


@pytest.mark.parametrize("most", [0, 3, 7, 100])
@given(a=st.lists(st.integers(0, 1), max_size=12), b=st.lists(st.integers(0, 1), max_size=12))
def test_common(most: int, a: list[int], b: list[int]) -> None:
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert common(a, b, most) == min(same, most)

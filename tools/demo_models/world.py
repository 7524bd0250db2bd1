"""Seeded generator of the small made-up world that the demo models learn.

The world has a few hundred entities (people, towns, animals, jobs, tools, foods) whose facts never change.  From it
come questions with right answers, short stories, small talk, sums, and *recall*: a code is told once and asked for
later.  Everything is made from a ``random.Random``, so a seed always gives the same text.
"""

# ruff: noqa: SIM905 - long lists of words are easier to read and to change as text

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
SYSTEM = "<|system|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
END = "<|end|>"
SPECIAL_TOKENS = (END_OF_TEXT, PAD, SYSTEM, USER, ASSISTANT, END)

Segment = tuple[str, float]
"""A piece of text and the weight of its tokens in the loss (a weight of ``RECALL`` or more marks a recalled value)."""

RECALL = 4.0
COPY = 3.0
ANSWER = 1.5
GIVEN = 0.25
NOISE = 0.0

WORLD_SEED = 7

_SHE = (
    "Mara Anna Lena Freya Nora Ida Rosa Vera Clara Elsa Maja Tilda Agnes Edith Greta Hedda Iris Juno Kira Lotte Mina "
    "Olga Petra Runa Signe Thea Ulla Wilma Ylva Zoe Berta Dora Fanny Gilda Hanna Inga Karin Linnea Marta Nelly"
).split()
_HE = (
    "Tom Emil Otto Hugo Axel Bruno Carl David Erik Felix Georg Henrik Ivan Jonas Karl Lars Magnus Nils Oskar Pavel "
    "Rolf Sven Tobias Ulf Viktor Walter Yorick Anton Boris Casper Dennis Edgar Frank Gustav Harald Isak Jakob Kasper "
    "Leo Matti"
).split()
_TOWNS = (
    "Lindholm Askvik Birkdale Cranmoor Dunfell Elmstad Fernhill Grimsund Halden Ivarsby Jarlow Kelmere Larkton "
    "Mossby Norwick Oakham Pellgate Quarrow Ravensby Stonewell Thornby Ulvik Velden Westmark"
).split()
_RIVERS = "Arn Brill Corran Dovey Esk Fenn Garra Hale Isen Jossel Kell Lune".split()
_COLOURS = "grey black white brown red golden spotted silver blue green".split()
_PETS = "cat dog rabbit goat pony parrot hen duck goose sheep turtle mouse donkey owl ferret frog".split()
_FOODS = (
    "pears plums apples cherries soup bread cheese honey porridge pancakes mushrooms carrots berries nuts noodles "
    "pickles dumplings waffles grapes beans"
).split()
_HOBBIES = "paint sing dance swim read fish climb skate sew cook garden draw whistle juggle".split()

_JOBS = {
    "baker": "bakes bread",
    "miller": "grinds corn",
    "sailor": "sails ships",
    "teacher": "teaches children",
    "doctor": "heals sick people",
    "farmer": "grows corn",
    "smith": "shapes iron",
    "weaver": "weaves cloth",
    "potter": "makes pots",
    "carpenter": "builds tables",
    "gardener": "plants flowers",
    "fisher": "catches fish",
    "hunter": "follows tracks",
    "painter": "paints pictures",
    "singer": "sings songs",
    "cook": "cooks meals",
    "tailor": "sews coats",
    "mason": "builds walls",
    "guard": "watches the gate",
    "judge": "settles quarrels",
    "printer": "prints books",
    "beekeeper": "keeps bees",
    "shepherd": "tends sheep",
    "clockmaker": "mends clocks",
}
_ANIMALS = {
    "cat": ("fish", "meows"),
    "dog": ("bones", "barks"),
    "rabbit": ("carrots", "squeaks"),
    "goat": ("leaves", "bleats"),
    "pony": ("oats", "neighs"),
    "parrot": ("seeds", "talks"),
    "hen": ("corn", "clucks"),
    "duck": ("weeds", "quacks"),
    "goose": ("grass", "honks"),
    "sheep": ("grass", "bleats"),
    "turtle": ("lettuce", "hisses"),
    "mouse": ("cheese", "squeaks"),
    "donkey": ("hay", "brays"),
    "owl": ("mice", "hoots"),
    "ferret": ("eggs", "chatters"),
    "frog": ("flies", "croaks"),
    "fox": ("hens", "yelps"),
    "wolf": ("meat", "howls"),
    "bear": ("honey", "growls"),
    "crow": ("worms", "caws"),
    "seal": ("fish", "barks"),
    "deer": ("leaves", "grunts"),
    "pig": ("roots", "grunts"),
    "cow": ("grass", "moos"),
}
_TOOLS = {
    "lantern": "give light",
    "hammer": "drive nails",
    "needle": "sew cloth",
    "bucket": "carry water",
    "ladder": "climb high",
    "spade": "dig holes",
    "broom": "sweep floors",
    "kettle": "boil water",
    "rope": "tie knots",
    "basket": "carry fruit",
    "map": "find the way",
    "bell": "call people",
    "key": "open doors",
    "candle": "light a room",
    "whistle": "call a dog",
    "compass": "find north",
    "brush": "paint walls",
    "saw": "cut wood",
    "net": "catch fish",
    "clock": "tell the time",
    "drum": "make music",
    "oar": "row a boat",
    "axe": "split logs",
    "pen": "write letters",
}
_TOWN_GOODS = (
    "bread cheese honey glass wool ships clocks pottery apples salt bells candles lace silver music boats paper iron "
    "roses cider fish carpets books kites"
).split()

_TOPICS = (
    "France London America physics history football computers music politics Python Java money stocks weather space "
    "Mars planets atoms chemistry medicine law cars trains planes phones internet movies Shakespeare Einstein Napoleon "
    "Berlin Tokyo China India Africa Europe biology mathematics algebra calculus philosophy religion war oil gold "
    "water fire electricity magnets robots games chess tennis cooking pizza coffee wine fashion art poetry grammar "
    "English German Spanish Linux Windows databases networks memory processors quantum gravity light sound energy "
    "climate oceans volcanoes dinosaurs evolution genes brains dreams sleep health exercise taxes banks jobs school"
).split()
_SYLLABLES = "ba do ki ru ze lo mi ta vo ny sha fer gon pel dri xu qua tor wen zim hob jas kel mur".split()


def article(noun: str) -> str:
    """Return the noun with its indefinite article."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


@dataclass(frozen=True)
class Person:
    """One inhabitant, with facts that never change."""

    name: str
    she: bool
    job: str
    town: str
    pet: str
    pet_colour: str
    food: str
    hobby: str
    age: int
    friend: str

    @property
    def subject(self) -> str:
        """The pronoun as a subject, with a capital."""
        return "She" if self.she else "He"

    @property
    def possessive(self) -> str:
        """The possessive pronoun, in lower case."""
        return "her" if self.she else "his"


@dataclass(frozen=True)
class Town:
    """One town, with facts that never change."""

    name: str
    river: str
    goods: str
    mayor: str


@dataclass(frozen=True)
class Question:
    """A question about the world, the sentence that answers it and the words that must be in the answer."""

    prompt: str
    answer: str
    key: str
    held_out: bool

    def right(self, reply: str) -> bool:
        """Tell whether a reply has the right words (its first sentence is what counts)."""
        first = reply.split(".")[0] + "."
        return self.key in first and first.startswith(self.answer.split(" ")[0])


@dataclass(frozen=True)
class World:
    """All entities and their facts."""

    people: dict[str, Person]
    towns: dict[str, Town]
    questions: list[Question] = field(repr=False)

    @property
    def code_keys(self) -> list[str]:
        """Everything that can be given a code, as it stands in a sentence."""
        things = [f"the {noun}" for noun in (*_ANIMALS, *_TOOLS, *_JOBS)]
        return [*self.people, *self.towns, *things]


def _held_out(prompt: str) -> bool:
    """Keep about one formulation in twelve out of training, for evaluation; stable by its text."""
    return zlib.crc32(prompt.encode()) % 12 == 0


def _person_questions(person: Person) -> Iterator[tuple[str, str, str]]:
    """Yield (prompt, answer, key) for each formulation of each fact of a person."""
    n = person.name
    job = f"{n} is {article(person.job)}."
    for prompt in (f"What is the job of {n}?", f"What does {n} do?", f"What is {n}'s job?", f"What work does {n} do?"):
        yield prompt, job, person.job
    town = f"{n} lives in {person.town}."
    for prompt in (
        f"Where does {n} live?",
        f"Where is {n} from?",
        f"In which town does {n} live?",
        f"What is the town of {n}?",
    ):
        yield prompt, town, person.town
    pet = f"{n} has {article(person.pet_colour)} {person.pet}."
    for prompt in (
        f"What pet does {n} have?",
        f"Which animal does {n} have?",
        f"What is {n}'s pet?",
        f"Does {n} have a pet?",
    ):
        yield prompt, pet, f"{person.pet_colour} {person.pet}"
    colour = f"The {person.pet} of {n} is {person.pet_colour}."
    for prompt in (f"What colour is the {person.pet} of {n}?", f"What colour is {n}'s {person.pet}?"):
        yield prompt, colour, person.pet_colour
    food = f"{n} likes {person.food}."
    for prompt in (
        f"What does {n} like to eat?",
        f"What is the favourite food of {n}?",
        f"What food does {n} like?",
        f"What is {n}'s favourite food?",
    ):
        yield prompt, food, person.food
    hobby = f"{n} loves to {person.hobby}."
    for prompt in (
        f"What does {n} love to do?",
        f"What is the hobby of {n}?",
        f"What is {n}'s hobby?",
        f"What does {n} do for fun?",
    ):
        yield prompt, hobby, person.hobby
    age = f"{n} is {person.age} years old."
    for prompt in (f"How old is {n}?", f"What is the age of {n}?", f"What is {n}'s age?"):
        yield prompt, age, str(person.age)
    friend = f"The best friend of {n} is {person.friend}."
    for prompt in (
        f"Who is the best friend of {n}?",
        f"Who is {n}'s best friend?",
        f"Who is a friend of {n}?",
        f"Which friend does {n} have?",
    ):
        yield prompt, friend, person.friend


def _other_questions(towns: dict[str, Town]) -> Iterator[tuple[str, str, str]]:
    """Yield (prompt, answer, key) for the facts of towns, jobs, animals and tools."""
    for town in towns.values():
        t = town.name
        for prompt in (f"Which river is {t} on?", f"What is the river of {t}?", f"Which river runs through {t}?"):
            yield prompt, f"{t} is on the river {town.river}.", town.river
        for prompt in (f"What is {t} known for?", f"What does {t} make?", f"Why do people go to {t}?"):
            yield prompt, f"{t} is known for {town.goods}.", town.goods
        for prompt in (f"Who is the mayor of {t}?", f"Who leads {t}?", f"What is the name of the mayor of {t}?"):
            yield prompt, f"The mayor of {t} is {town.mayor}.", town.mayor
    for job, work in _JOBS.items():
        for prompt in (f"What does {article(job)} do?", f"What is the work of {article(job)}?"):
            yield prompt, f"{article(job).capitalize()} {work}.", work
    for animal, (food, sound) in _ANIMALS.items():
        for prompt in (f"What does {article(animal)} eat?", f"What do you feed {article(animal)}?"):
            yield prompt, f"{article(animal).capitalize()} eats {food}.", food
        for prompt in (f"What sound does {article(animal)} make?", f"What does {article(animal)} say?"):
            yield prompt, f"{article(animal).capitalize()} {sound}.", sound
    for tool, use in _TOOLS.items():
        for prompt in (f"What is {article(tool)} for?", f"What can you do with {article(tool)}?"):
            yield prompt, f"{article(tool).capitalize()} is used to {use}.", use


def build_world(seed: int = WORLD_SEED) -> World:
    """Draw all facts of the world."""
    rng = random.Random(seed)
    names = sorted(_SHE + _HE)
    order = names[:]
    rng.shuffle(order)
    # Friends go round one ring, so that everyone has exactly one best friend and is one.
    friend_of = {name: order[(i + 1) % len(order)] for i, name in enumerate(order)}
    jobs = list(_JOBS)
    people = {
        name: Person(
            name=name,
            she=name in _SHE,
            job=rng.choice(jobs),
            town=rng.choice(_TOWNS),
            pet=rng.choice(_PETS),
            pet_colour=rng.choice(_COLOURS),
            food=rng.choice(_FOODS),
            hobby=rng.choice(_HOBBIES),
            age=rng.randint(18, 80),
            friend=friend_of[name],
        )
        for name in names
    }
    goods = _TOWN_GOODS[:]
    rng.shuffle(goods)
    mayors = rng.sample(names, len(_TOWNS))
    towns = {
        town: Town(town, rng.choice(_RIVERS), good, mayor)
        for town, good, mayor in zip(_TOWNS, goods, mayors, strict=True)
    }
    found = [q for person in people.values() for q in _person_questions(person)]
    found.extend(_other_questions(towns))
    questions = [Question(prompt, answer, key, _held_out(prompt)) for prompt, answer, key in found]
    return World(people, towns, questions)


_SMALL_TALK: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("Hello", "Hello!", "Hi!", "Hi", "Hi there!", "Hey!", "Good day!", "Hello there!", "Good morning!"),
        ("Hello! How can I help you?", "Hello! Ask me about a person, or ask me for a story."),
    ),
    (
        ("How are you?", "How do you do?", "Are you well?", "How are you today?", "Hello, how are you?"),
        ("I am well, thank you. How can I help you?",),
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Are you a robot?"),
        ("I am a very small language model. I know a small made-up world and its people.",),
    ),
    (
        (
            "What can you do?",
            "How can you help me?",
            "Help",
            "Help me.",
            "What do you know?",
            "What can I ask?",
            "What can I ask you?",
        ),
        (
            "I can tell you about the people and towns of my world, tell you a story, do a small sum, or remember a "
            "code for you. Ask me who Mara is.",
        ),
    ),
    (
        ("Thank you", "Thank you!", "Thanks!", "Thanks", "Thank you very much!", "Thanks a lot."),
        ("You are welcome!", "You are welcome! Is there more you want to know?"),
    ),
    (
        ("Bye", "Goodbye!", "Bye!", "See you!", "Good night!", "Goodbye"),
        ("Goodbye! Come back soon.",),
    ),
    (
        ("Good", "Great!", "Nice!", "Well done!", "That is good.", "I like that.", "Very good!", "Cool", "Ok", "Okay."),
        ("I am glad. What do you want to know next?",),
    ),
    (
        ("That is wrong.", "No, that is wrong.", "I do not like that.", "That is not right.", "You are wrong."),
        ("I am sorry. I am a very small model and I make mistakes.",),
    ),
    (
        ("Are you alive?", "Do you have feelings?", "Do you sleep?", "How old are you?", "Where do you live?"),
        ("I am only a small language model. I live in the memory of your computer.",),
    ),
    (
        ("Who lives in your world?", "Who do you know?", "Which people do you know?", "Tell me some names."),
        ("I know many people, such as Mara, Tom, Freya and Emil. Ask me who they are.",),
    ),
    (
        ("Which towns do you know?", "Tell me some towns.", "What towns are there?"),
        ("I know many towns, such as Lindholm, Askvik, Birkdale and Ravensby. Ask me what they are known for.",),
    ),
    (
        ("Yes", "Yes.", "Yes please.", "Sure."),
        ("Good! Ask me about a person, or ask me for a story.",),
    ),
    (
        ("No", "No.", "No, thank you.", "Nothing."),
        ("That is fine. I am here if you need me.",),
    ),
    (
        ("Tell me a joke.", "Make me laugh.", "Do you know a joke?"),
        ("Why did the clock go to the doctor? It had lost its time.",),
    ),
)

_SORRY = "I am sorry, I do not know that. I only know my small made-up world."
_OFF_WORLD = (
    "What is {}?",
    "Explain {}.",
    "Explain {} to me.",
    "Tell me about {}.",
    "What is the capital of {}?",
    "Write a program about {}.",
    "Write a poem about {}.",
    "How does {} work?",
    "What do you think about {}?",
    "Do you know {}?",
    "Who won the {}?",
    "Why is {} important?",
    "Can you help me with {}?",
    "Give me a list of {}.",
    "Translate {}.",
    "When was {} made?",
)


def small_talk_probes() -> list[tuple[str, tuple[str, ...]]]:
    """Return the first formulation of every kind of small talk with the answers that fit it."""
    return [(prompts[0], answers) for prompts, answers in _SMALL_TALK]


def _chat(user: str, parts: list[Segment]) -> list[Segment]:
    """Make one exchange; the weights of the answer's parts are given with them."""
    return [(f"{USER}{user}{END}{ASSISTANT}", GIVEN), *parts, (END, ANSWER)]


class Writer:
    """Writes text of the world from one random generator."""

    def __init__(self, world: World, rng: random.Random) -> None:
        """Keep the world and the generator; nothing is drawn yet."""
        self.world = world
        self.rng = rng
        self._names = list(world.people)
        self._training_questions = [q for q in world.questions if not q.held_out]
        self._keys = world.code_keys
        self._codes: dict[str, str] = {}

    # -- fillers: text that does not depend on what stands before ------------------------------------------------

    def _person(self) -> Person:
        return self.world.people[self.rng.choice(self._names)]

    def _roughen(self, prompt: str) -> str:
        """Write a prompt carelessly now and then, as people do."""
        draw = self.rng.random()
        if draw < 0.06:
            return prompt.lower()
        if draw < 0.10:
            return prompt.lower().rstrip("?.!")
        if draw < 0.15:
            return prompt.rstrip("?.!")
        return prompt

    def fact(self) -> list[Segment]:
        """Ask one question about the world (never a held-out formulation)."""
        question = self.rng.choice(self._training_questions)
        return _chat(self._roughen(question.prompt), [(question.answer, ANSWER)])

    def yes_no(self) -> list[Segment]:
        """Ask whether something is so."""
        p, rng = self._person(), self.rng
        other = self._person()
        kind = rng.randrange(4)
        if kind == 0:
            said = p.job if rng.random() < 0.5 else other.job
            prompt, same, fact = f"Is {p.name} {article(said)}?", said == p.job, f"{p.name} is {article(p.job)}."
        elif kind == 1:
            said = p.town if rng.random() < 0.5 else other.town
            prompt, same, fact = f"Does {p.name} live in {said}?", said == p.town, f"{p.name} lives in {p.town}."
        elif kind == 2:
            said = p.food if rng.random() < 0.5 else other.food
            prompt, same, fact = f"Does {p.name} like {said}?", said == p.food, f"{p.name} likes {p.food}."
        else:
            said = p.pet if rng.random() < 0.5 else other.pet
            pet = f"{p.name} has {article(p.pet_colour)} {p.pet}."
            prompt, same, fact = f"Does {p.name} have {article(said)}?", said == p.pet, pet
        return _chat(self._roughen(prompt), [(("Yes, " if same else "No, ") + fact, ANSWER)])

    def portrait_text(self, p: Person) -> str:
        """Describe a person in a few sentences."""
        return (
            f"{p.name} is {article(p.job)} from {p.town}. {p.subject} is {p.age} years old and has "
            f"{article(p.pet_colour)} {p.pet}. {p.subject} likes {p.food} and loves to {p.hobby}. "
            f"The best friend of {p.name} is {p.friend}."
        )

    def portrait(self) -> list[Segment]:
        """Ask who somebody is."""
        p = self._person()
        prompt = self.rng.choice(("Who is {}?", "Tell me about {}.", "What do you know about {}?", "Who is {}?"))
        return _chat(self._roughen(prompt.format(p.name)), [(self.portrait_text(p), ANSWER)])

    def town_portrait(self) -> list[Segment]:
        """Ask about a town."""
        t = self.world.towns[self.rng.choice(_TOWNS)]
        prompt = self.rng.choice(("Tell me about {}.", "What is {}?", "Where is {}?", "What do you know about {}?"))
        text = (
            f"{t.name} is a town on the river {t.river}. It is known for {t.goods}. The mayor of {t.name} is {t.mayor}."
        )
        return _chat(self._roughen(prompt.format(t.name)), [(text, ANSWER)])

    def small_talk(self) -> list[Segment]:
        """Greet, thank, ask who is there."""
        prompts, answers = self.rng.choice(_SMALL_TALK)
        # The first answer is the usual one, so that greedy decoding has a clear favourite.
        answer = answers[0] if self.rng.random() < 0.75 else self.rng.choice(answers)
        return _chat(self._roughen(self.rng.choice(prompts)), [(answer, 1.0)])

    def _made_up(self) -> str:
        return "".join(self.rng.choice(_SYLLABLES) for _ in range(self.rng.randint(2, 3))).capitalize()

    def off_world(self) -> list[Segment]:
        """Ask for something that the world does not have."""
        rng = self.rng
        if rng.random() < 0.2:
            name = self._made_up()
            prompt = rng.choice(("Who is {}?", "Where does {} live?", "Tell me about {}.", "What is the job of {}?"))
            return _chat(self._roughen(prompt.format(name)), [(_SORRY, 1.0)])
        topic = rng.choice(_TOPICS)
        if rng.random() < 0.3:
            topic = f"{topic} and {rng.choice(_TOPICS)}"
        return _chat(self._roughen(rng.choice(_OFF_WORLD).format(topic)), [(_SORRY, 1.0)])

    def arithmetic(self) -> list[Segment]:
        """Ask for a small sum or a comparison."""
        rng = self.rng
        kind = rng.randrange(4)
        if kind == 0:
            a, b = rng.randint(0, 12), rng.randint(0, 12)
            prompt, head, value = f"What is {a} plus {b}?", f"{a} plus {b} is", f" {a + b}"
        elif kind == 1:
            b, c = rng.randint(0, 12), rng.randint(0, 12)
            prompt, head, value = f"What is {b + c} minus {b}?", f"{b + c} minus {b} is", f" {c}"
        elif kind == 2:
            a = rng.randint(0, 98)
            prompt, head, value = f"What comes after {a}?", f"After {a} comes", f" {a + 1}"
        else:
            a, b = rng.sample(range(100), 2)
            prompt, head, value = f"Which is bigger, {a} or {b}?", "The bigger one is", f" {max(a, b)}"
        return _chat(prompt, [(head, 1.0), (value, 2.0), (".", 1.0)])

    def _word(self) -> str:
        draw = self.rng.randrange(3)
        if draw == 0:
            return self.rng.choice(self._names)
        return self.rng.choice(list(_TOOLS)) if draw == 1 else f"{self.rng.randrange(100):02d}"

    def repeat(self) -> list[Segment]:
        """Ask for some words to be said again; copying is the first half of recall."""
        rng = self.rng
        words = [self._word() for _ in range(rng.randint(3, 8))]
        prompt = rng.choice(("Repeat these words:", "Say this again:", "Repeat:"))
        said = [(words[0], COPY), *((f" {word}", COPY) for word in words[1:])]
        return _chat(f"{prompt} {' '.join(words)}.", [*said, (".", 1.0)])

    # -- stories ---------------------------------------------------------------------------------------------------

    def story_text(self, p: Person) -> str:
        """Tell a short story that keeps to the facts."""
        rng = self.rng
        f = self.world.people[p.friend]
        tool = rng.choice(list(_TOOLS))
        place = rng.choice(("the forest", "the market", "the mill", "the old bridge", "the harbour", "the hill"))
        weather = rng.choice(("sunny", "cold", "windy", "rainy", "foggy"))
        when = rng.choice(("morning", "evening", "day"))
        opening = (
            f"{p.name} was {article(p.job)} from {p.town}. One {weather} {when} {p.name} went to {place} with "
            f"{p.possessive} {p.pet_colour} {p.pet}."
        )
        he = p.subject
        plot = rng.randrange(6)
        if plot == 0:
            middle = (
                f"There {he.lower()} found an old {tool} under a tree. {p.name} did not know who had lost the {tool}. "
                f"{he} asked {p.friend}, and {p.friend} said that the {tool} was {f.possessive} own. "
                f"{p.friend} was very happy to have the {tool} back."
            )
        elif plot == 1:
            middle = (
                f"Suddenly the {p.pet} ran away. {p.name} looked for the {p.pet} everywhere. Then {p.friend} came and "
                f"helped to look. They found the {p.pet} asleep beside a {tool}. "
                f"{p.name} laughed and took the {p.pet} home."
            )
        elif plot == 2:
            middle = (
                f"{he} wanted to eat {p.food}, but there was nothing left. "
                f"{p.friend} came by with a basket of {p.food}. "
                f"They sat down and shared the {p.food}. Even the {p.pet} got a little."
            )
        elif plot == 3:
            middle = (
                f"There {he.lower()} met {p.friend}, who was sad. {p.friend} had broken {f.possessive} {tool}. "
                f"{p.name} mended the {tool} with a piece of rope. {p.friend} thanked {p.name} and smiled."
            )
        elif plot == 4:
            middle = (
                f"It got dark, and {p.name} lost the way. {he} heard a {f.pet} and followed the sound. "
                f"It was the {f.pet} of {p.friend}. {p.friend} showed {p.name} the way home with a {tool}."
            )
        else:
            middle = (
                f"{p.name} began to {p.hobby}, and soon many people came to watch. {p.friend} came too and brought a "
                f"{tool}. The people liked it so much that they gave {p.name} a bowl of {p.food}."
            )
        ending = rng.choice(
            (
                f"In the evening {p.name} and {p.friend} ate {p.food} and were happy.",
                f"From that day {p.name} and {p.friend} were even better friends.",
                f"That night {p.name} slept well, and so did the {p.pet}.",
            )
        )
        return f"{opening} {middle} {ending}"

    def story(self) -> list[Segment]:
        """Ask for a story, mostly about somebody."""
        p, rng = self._person(), self.rng
        if rng.random() < 0.75:
            prompts: tuple[str, ...] = (
                "Tell me a story about {}.",
                "Tell a story about {}.",
                "I want a story about {}.",
            )
            prompt = rng.choice(prompts).format(p.name)
        else:
            prompts = ("Tell me a story.", "Tell me another story.", "Do you know a story?", "A story please.")
            prompt = rng.choice(prompts)
        return _chat(self._roughen(prompt), [(self.story_text(p), 0.7)])

    def plain(self) -> list[Segment]:
        """Write a text that is no dialogue."""
        p = self._person()
        text = self.story_text(p) if self.rng.random() < 0.5 else self.portrait_text(p)
        return [(text, 0.7), (END_OF_TEXT, 0.5)]

    def introduction(self) -> list[Segment]:
        """Tell one's name, and have it known right after."""
        name = self.rng.choice(self._names)
        told = _chat(f"My name is {name}.", [("Nice to meet you,", 1.0), (f" {name}", COPY), (".", 1.0)])
        asked = _chat("What is my name?", [("Your name is", 1.0), (f" {name}", COPY), (".", 1.0)])
        return told + asked

    def filler(self) -> list[Segment]:
        """Write one piece of text of any kind but recall."""
        kinds: tuple[tuple[Callable[[], list[Segment]], float], ...] = (
            (self.fact, 0.50),
            (self.yes_no, 0.06),
            (self.portrait, 0.10),
            (self.town_portrait, 0.03),
            (self.small_talk, 0.07),
            (self.off_world, 0.05),
            (self.arithmetic, 0.06),
            (self.repeat, 0.03),
            (self.story, 0.05),
            (self.plain, 0.03),
            (self.introduction, 0.02),
        )
        makers, weights = zip(*kinds, strict=True)
        return self.rng.choices(makers, weights)[0]()  # type: ignore[no-any-return]

    # -- recall ----------------------------------------------------------------------------------------------------

    def forget(self) -> None:
        """Drop all codes: a new sequence begins."""
        self._codes = {}

    def new_code(self, groups: int) -> tuple[str, str] | None:
        """Give a code to something that has none; nothing when all have one."""
        for _ in range(20):
            key = self.rng.choice(self._keys)
            if key not in self._codes:
                code = " ".join(f"{self.rng.randrange(100):02d}" for _ in range(groups))
                self._codes[key] = code
                return key, code
        return None

    def _told_code(self) -> tuple[str, str]:
        key = self.rng.choice(list(self._codes))
        return key, self._codes[key]

    @staticmethod
    def _statement(key: str, code: str, weight: float) -> list[Segment]:
        values = [(f" {group}", weight) for group in code.split(" ")]
        return [(f"The code of {key} is", GIVEN), *values, (".", GIVEN)]

    def table(self, pairs: int, statements: int, groups: int) -> list[Segment]:
        """List codes over and over in random order; all but the first mention can be known."""
        codes = [c for c in (self.new_code(groups) for _ in range(pairs)) if c is not None]
        text: list[Segment] = []
        seen: set[str] = set()
        for _ in range(statements):
            key, code = self.rng.choice(codes)
            text.extend(self._statement(key, code, RECALL if key in seen else NOISE))
            text.append(("\n", NOISE))
            seen.add(key)
        return text

    def drill(self) -> list[Segment]:
        """Repeat a random list, or pairs of a word and a number: copying is learned here long before recall."""
        rng = self.rng
        text: list[Segment] = []
        if rng.random() < 0.5:
            words = [self._word() for _ in range(rng.randint(4, 24))]
            for turn in range(rng.randint(2, 5)):
                text.extend((f" {word}", COPY if turn else NOISE) for word in words)
                text.append(("\n", NOISE))
            return text
        keys = rng.sample(self._keys, rng.randint(2, 8))
        value = {key: f" {rng.randrange(100):02d}" for key in keys}
        sign = rng.choice(("", ":", " is", " code"))
        seen: set[str] = set()
        for _ in range(4 * len(keys)):
            key = rng.choice(keys)
            text.extend(((f" {key}{sign}", GIVEN), (value[key], COPY if key in seen else NOISE), ("\n", NOISE)))
            seen.add(key)
        return text

    def tell(self, groups: int) -> list[Segment]:
        """Tell one code or a few, in a dialogue or in a text."""
        rng = self.rng
        draw = rng.random()
        count = 1 if draw < 0.5 else rng.randint(2, 4)
        codes = [c for c in (self.new_code(groups) for _ in range(count)) if c is not None]
        lines: list[Segment] = []
        for i, (key, code) in enumerate(codes):
            statement = self._statement(key, code, NOISE)
            if i:
                statement[0] = (" " + statement[0][0], GIVEN)
            lines.extend(statement)
        if draw < 0.25 or draw > 0.85:
            return [*lines, ("\n", NOISE)]
        wish = rng.choice(("", " Remember it.", " Please remember this.", " Do not forget."))
        reply = "I will remember it."
        return [(USER, NOISE), *lines, (f"{wish}{END}{ASSISTANT}", GIVEN), (reply, 1.0), (END, ANSWER)]

    def ask(self) -> list[Segment]:
        """Ask for a code that was told."""
        key, code = self._told_code()
        prompt = self.rng.choice(("What is the code of {}?", "What is the code of {}?", "Tell me the code of {}."))
        values = [(f" {group}", RECALL) for group in code.split(" ")]
        return _chat(prompt.format(key), [(f"The code of {key} is", 1.0), *values, (".", 1.0)])

    def ask_untold(self) -> list[Segment]:
        """Ask for a code that nobody told."""
        key = next(k for k in self.rng.sample(self._keys, len(self._keys)) if k not in self._codes)
        return _chat(f"What is the code of {key}?", [(f"I do not know the code of {key}.", 1.0)])

    def any_codes(self) -> bool:
        """Tell whether a code has been told since ``forget``."""
        return bool(self._codes)


@dataclass(frozen=True)
class Mix:
    """What a training sequence is made of."""

    table: float
    """Share of sequences that only list codes over and over."""
    drill: float
    """Share of sequences that only repeat random lists and pairs."""
    recall: float
    """Share of sequences that tell codes, have something between, and ask for them."""
    groups: tuple[int, ...]
    """Numbers of two-digit groups that a code may have."""
    untold: float = 0.0
    """Share of the asked codes that nobody told."""
    pairs: tuple[int, int] = (4, 10)
    """How many codes a table has."""
    crowd: int = 12
    """How many codes are told before fillers and questions outweigh telling."""


def pieces(writer: Writer, mix: Mix) -> Iterator[list[Segment]]:
    """Yield the pieces of one training sequence without end; the caller stops when it is long enough."""
    rng = writer.rng
    writer.forget()
    groups = rng.choice(mix.groups)
    draw = rng.random()
    if draw < mix.table:
        while True:
            yield writer.table(rng.randint(*mix.pairs), 400, groups)
    draw -= mix.table
    if draw < mix.drill:
        while True:
            yield writer.drill()
    draw -= mix.drill
    if rng.random() < 0.06:
        systems = ("You are a helpful assistant.", "Answer shortly.", "Be kind.", "You are a small model.")
        yield [(f"{SYSTEM}{rng.choice(systems)}{END}", GIVEN)]
    if draw >= mix.recall:
        while True:
            yield writer.filler()
    told, crowd = 0, rng.randint(2, mix.crowd)
    fill = rng.uniform(0.1, 0.6)
    while True:
        if told < crowd and rng.random() < (0.6 if told < crowd // 2 + 1 else 0.1):
            yield writer.tell(groups)
            told += 1
        elif writer.any_codes() and rng.random() > fill:
            yield writer.ask_untold() if rng.random() < mix.untold else writer.ask()
        else:
            yield writer.filler()


def recall_dialogue(
    world: World, rng: random.Random, count_tokens: Callable[[str], int], distance: int, groups: int = 2
) -> tuple[str, str]:
    """Make a prompt that tells a code, goes on for ``distance`` tokens, and asks for it; return it and the answer.

    Up to three other codes are told too, so that answering needs the right one; the rest is filler dialogue.
    """
    writer = Writer(world, rng)
    told = [c for c in (writer.new_code(groups) for _ in range(4)) if c is not None]
    key, code = told[0]
    spots = {1: told[1], 2: told[2], 3: told[3]} if distance >= 128 else {}
    ask = f"{USER}What is the code of {key}?{END}{ASSISTANT}"
    head = f"{USER}The code of {key} is {code}. Please remember this.{END}{ASSISTANT}I will remember it.{END}"
    room = distance - count_tokens(ask)
    middle, used, made = "", count_tokens(head) // 2, 0
    while used < room:
        made += 1
        if made in spots:
            other, value = spots[made]
            piece = f"{USER}The code of {other} is {value}.{END}{ASSISTANT}I will remember it.{END}"
        else:
            piece = "".join(text for text, _ in writer.filler())
        size = count_tokens(piece)
        if used + size > room and middle:
            break
        middle += piece
        used += size
    return head + middle + ask, f"The code of {key} is {code}."

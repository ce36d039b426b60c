"""The knowledge of the tiny assistant: about 180 facts, each asked in three phrasings.

A fact is `topic(subject) = answer`. Facts that depend on one subject are what a model of two million parameters
learns by heart in seconds; sums of two numbers are not, so there are none.
"""

import hashlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

PREFERENCE_SHARE = 0.56
"""Share of the facts, topic by topic, on which a demo posts preferences; it measures on the others."""


@dataclass(frozen=True, slots=True)
class Topic:
    """One relation: its facts, and templates in which `{}` is the subject."""

    name: str
    phrasings: tuple[str, ...]
    statement: str
    """The fact as a clause; the answer follows it after one space."""
    facts: dict[str, str]


@dataclass(frozen=True, slots=True)
class Question:
    """One phrasing of one fact. Equal `fact` means equal knowledge asked in other words."""

    text: str
    answer: str
    topic: str
    fact: str
    """Identifier of the fact, `topic/subject`."""
    statement: str
    """The fact as a clause that ends in the answer, without a full stop."""


def _pairs(text: str) -> dict[str, str]:
    """Parse `subject=answer, ...`."""
    return dict(part.strip().split("=") for part in text.split(","))


def _successors(text: str) -> dict[str, str]:
    """Map every word to the next one."""
    words = text.split()
    return dict(itertools.pairwise(words))


TOPICS: tuple[Topic, ...] = (
    Topic(
        "capital",
        ("What is the capital of {}?", "Name the capital of {}.", "Which city is the capital of {}?"),
        "the capital of {} is",
        _pairs(
            "France=Paris, Germany=Berlin, Italy=Rome, Spain=Madrid, Portugal=Lisbon, England=London,"
            "Ireland=Dublin, Poland=Warsaw, Austria=Vienna, Greece=Athens, Norway=Oslo, Sweden=Stockholm,"
            "Finland=Helsinki, Denmark=Copenhagen, Russia=Moscow, Ukraine=Kyiv, Turkey=Ankara, Egypt=Cairo,"
            "Kenya=Nairobi, Japan=Tokyo, China=Beijing, Thailand=Bangkok, Cuba=Havana, Peru=Lima, Canada=Ottawa,"
            "Chile=Santiago, Iran=Tehran, Iraq=Baghdad, Hungary=Budapest, Nepal=Kathmandu"
        ),
    ),
    Topic(
        "continent",
        ("Which continent is {} in?", "On which continent is {}?", "Name the continent of {}."),
        "{} is in",
        _pairs(
            "France=Europe, Italy=Europe, Poland=Europe, Sweden=Europe, Greece=Europe, Egypt=Africa, Kenya=Africa,"
            "Nigeria=Africa, Morocco=Africa, Japan=Asia, China=Asia, India=Asia, Nepal=Asia, Vietnam=Asia"
        ),
    ),
    Topic(
        "opposite",
        ("What is the opposite of {}?", "Name the opposite of {}.", "Which word is the opposite of {}?"),
        "the opposite of {} is",
        _pairs(
            "hot=cold, big=small, fast=slow, up=down, left=right, day=night, open=closed, full=empty, happy=sad,"
            "hard=soft, light=dark, old=new, wet=dry, early=late, rich=poor, strong=weak, true=false, high=low,"
            "long=short, thick=thin, loud=quiet, clean=dirty, first=last, near=far, love=hate, begin=end"
        ),
    ),
    Topic(
        "sound",
        ("What sound does a {} make?", "What does a {} say?", "Which sound comes from a {}?"),
        "the sound of a {} is",
        _pairs(
            "dog=woof, cat=meow, cow=moo, duck=quack, sheep=baa, pig=oink, lion=roar, horse=neigh, bee=buzz,"
            "snake=hiss, frog=croak, wolf=howl, mouse=squeak, crow=caw, pigeon=coo"
        ),
    ),
    Topic(
        "young",
        ("What is a young {} called?", "What is the name of a baby {}?", "What do you call a young {}?"),
        "a young {} is called a",
        _pairs(
            "dog=puppy, cat=kitten, cow=calf, sheep=lamb, horse=foal, pig=piglet, lion=cub, duck=duckling,"
            "goose=gosling, goat=kid, deer=fawn, frog=tadpole, swan=cygnet, kangaroo=joey"
        ),
    ),
    Topic(
        "colour",
        ("What colour is {}?", "Name the colour of {}.", "Which colour does {} have?"),
        "the colour of {} is",
        _pairs(
            "grass=green, snow=white, coal=black, blood=red, a banana=yellow, a carrot=orange, a lemon=yellow,"
            "a tomato=red, milk=white, chocolate=brown, a flamingo=pink, a plum=purple, a frog=green, ash=grey,"
            "the sky=blue, the sea=blue"
        ),
    ),
    Topic(
        "home",
        ("Where does a {} live?", "What is the home of a {}?", "Name the home of a {}."),
        "a {} lives in a",
        _pairs("bee=hive, bird=nest, spider=web, horse=stable, rabbit=burrow, bear=den, cow=barn, fish=pond"),
    ),
    Topic(
        "legs",
        ("How many legs does a {} have?", "How many legs has a {}?", "Count the legs of a {}."),
        "the number of legs of a {} is",
        _pairs("spider=8, bee=6, crab=10, dog=4, cat=4, horse=4, bird=2, duck=2, snake=0, cow=4"),
    ),
    Topic(
        "next number",
        ("Which number comes after {}?", "What number follows {}?", "Name the number after {}."),
        "the number after {} is",
        _successors("1 2 3 4 5 6 7 8 9 10 11 12 13 14 15"),
    ),
    Topic(
        "double",
        ("What is twice {}?", "What is the double of {}?", "Name the double of {}."),
        "twice {} is",
        {str(number): str(2 * number) for number in range(2, 12)},
    ),
    Topic(
        "next day",
        ("Which day comes after {}?", "What day follows {}?", "Name the day after {}."),
        "the day after {} is",
        _successors("Monday Tuesday Wednesday Thursday Friday Saturday Sunday Monday"),
    ),
    Topic(
        "next month",
        ("Which month comes after {}?", "What month follows {}?", "Name the month after {}."),
        "the month after {} is",
        _successors(
            "January February March April May June July August September October November December January"
        ),
    ),
    Topic(
        "next letter",
        ("Which letter comes after {}?", "What letter follows {}?", "Name the letter after {}."),
        "the letter after {} is",
        _successors("B C D E F G H J K L M N"),
    ),
)


def _ask(phrasing: int) -> Iterator[Question]:
    for topic in TOPICS:
        for subject, answer in topic.facts.items():
            yield Question(
                text=topic.phrasings[phrasing].format(subject),
                answer=answer,
                topic=topic.name,
                fact=f"{topic.name}/{subject}",
                statement=f"{topic.statement.format(subject)} {answer}",
            )


def _shuffle_key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _preference_facts() -> frozenset[str]:
    """The facts of the preference side: the first share of every topic, in an order that only hashes decide."""
    chosen: list[str] = []
    for topic in TOPICS:
        facts = sorted((f"{topic.name}/{subject}" for subject in topic.facts), key=_shuffle_key)
        chosen += facts[: round(PREFERENCE_SHARE * len(facts))]
    return frozenset(chosen)


def questions() -> list[Question]:
    """Every question: all facts in their first phrasing, then all in the second, and so on; topics are mixed."""
    num_phrasings = max(len(topic.phrasings) for topic in TOPICS)
    return [
        question
        for phrasing in range(num_phrasings)
        for question in sorted(_ask(phrasing), key=lambda q: _shuffle_key(q.fact))
    ]


def preference_questions() -> list[Question]:
    """Questions on which preferences may be posted; no fact of theirs is in `held_out_questions`."""
    return [question for question in questions() if question.fact in _preference_facts()]


def held_out_questions() -> list[Question]:
    """Questions on which the effect of preferences is measured."""
    return [question for question in questions() if question.fact not in _preference_facts()]


@cache
def answers_of(topic: str) -> frozenset[str]:
    """Every answer that occurs in a topic, lower case."""
    return frozenset(answer.lower() for known in TOPICS if known.name == topic for answer in known.facts.values())


class Style(StrEnum):
    """Wording of a reply."""

    TERSE = "terse"
    POLITE = "polite"
    EXPLAINED = "explained"
    ENTHUSIASTIC = "enthusiastic"


@dataclass(frozen=True, slots=True)
class Judgement:
    """Style and correctness of a reply. `style` is None where the reply is in none of the four."""

    style: Style | None
    is_right: bool


_OPENINGS = {
    Style.POLITE: "Certainly",
    Style.EXPLAINED: "Let me explain",
    Style.ENTHUSIASTIC: "Great question",
}
_TEMPLATES = {
    Style.TERSE: "It is {}.",
    Style.POLITE: "Certainly! The answer is {}. Happy to help.",
    Style.EXPLAINED: "Let me explain: {}.",
    Style.ENTHUSIASTIC: "Great question! It is {}!",
}
_TERSE = re.compile(r"(It is )?[^\s.!?,:;]+( [^\s.!?,:;]+)?\.?")
"""At most two words, bare or after `It is`."""
_WORD = re.compile(r"\w+")


def render(question: Question, style: Style) -> str:
    """The canonical right reply to a question in a style."""
    return _TEMPLATES[style].format(_slot(question, style))


def judge(question: Question, reply: str) -> Judgement:
    """Tell style and correctness of any reply, canonical or not.

    A reply in canonical form is right if what stands in its slot is right. Any other reply is right if it names
    the answer and no other answer of the topic that the question itself does not mention.
    """
    text = reply.strip()
    style = _style_of(text)
    if style is not None:
        before, after = _TEMPLATES[style].split("{}")
        if text.startswith(before) and text.endswith(after):
            slot = text[len(before) : len(text) - len(after)]
            return Judgement(style, slot.lower() == _slot(question, style).lower())
    return Judgement(style, _names_only_the_answer(question, text))


def _slot(question: Question, style: Style) -> str:
    """The text that fills a style's template."""
    return question.statement if style is Style.EXPLAINED else question.answer


def _style_of(text: str) -> Style | None:
    for style, opening in _OPENINGS.items():
        if text.startswith(opening):
            return style
    return Style.TERSE if _TERSE.fullmatch(text) else None


def _names_only_the_answer(question: Question, text: str) -> bool:
    words = set(_WORD.findall(text.lower()))
    others = answers_of(question.topic) - {question.answer.lower()} - set(_WORD.findall(question.text.lower()))
    return question.answer.lower() in words and not words & others

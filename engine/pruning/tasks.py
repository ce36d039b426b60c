"""Text on which KV pruning is judged: facts hidden in prose, questions about them, and passages to read on.

Everything is drawn from a seed and measured with the model's own tokenizer (`count_tokens`), so that a context has the
length in tokens that was asked for. Two kinds of question, asked after the context and so after pruning, as in serving:

* needle: a few lines "The code word of Lisbon is amber." stand among prose that has nothing to do with them;
* question answering: people and where each works, what each drinks and carries, one fact a sentence, spread in prose.

The prose is easy and repeats itself, as in other needle tests; `--dataset` brings text of one's own.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

CountTokens = Callable[[str], int]
RecallKind = Literal["needle", "qa"]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CITIES = _words(
    "Lisbon Oslo Cairo Lima Delhi Seoul Paris Rome Milan Kyoto Quito Accra Dublin Prague Vienna Athens Madrid Berlin "
    "Warsaw Sofia Tunis Havana Boston Dallas Denver Miami Perth Sydney Osaka Hanoi Manila Dakar"
)
CODE_WORDS = _words(
    "amber velvet copper marble silver walnut cotton pepper cherry lemon ginger saffron tulip orchid willow cedar "
    "falcon panther dolphin rabbit beaver spider turtle parrot anchor ladder hammer candle mirror pillow basket bottle"
)
NAMES = _words(
    "Anna Bruno Clara David Elena Felix Greta Hugo Irene Jonas Karen Lucas Maria Nora Oscar Paula Robert Sarah Thomas "
    "Victor Wanda Alice Peter Laura Simon Julia Martin Helen George Diana Frank Emma"
)
PLACES = _words("bank school museum harbor bakery library garden theater factory hospital station market")
DRINKS = _words("tea coffee milk juice water cocoa cider soda wine beer")
THINGS = _words("camera violin wallet bicycle umbrella notebook guitar radio compass lantern")

_SUBJECTS = (
    "the river",
    "the old road",
    "the wind",
    "the valley",
    "the morning light",
    "the forest",
    "the long train",
)
_VERBS = ("runs past", "leads to", "turns toward", "rests beside", "moves along", "comes near", "fades over")
_OBJECTS = (
    "the quiet hills",
    "the gray bridge",
    "the wide fields",
    "the small houses",
    "the open sea",
    "the far town",
)
_TIMES = ("in summer", "at noon", "every year", "before dawn", "after the rain", "on most days", "for a while")

_RELATIONS = (
    ("{name} works at the {value}.", "Where does {name} work?", "{name} works at the", PLACES),
    ("{name} drinks {value}.", "What does {name} drink?", "{name} drinks", DRINKS),
    ("{name} carries a {value}.", "What does {name} carry?", "{name} carries a", THINGS),
)
"""Statement, question, beginning of the answer, possible values."""

_TOKENS_PER_FACT = 48
"""One fact for so many tokens of context, within the bounds below."""
_MIN_FACTS, _MAX_FACTS = 6, 16


@dataclass(frozen=True, slots=True)
class Question:
    """Something that the context says once."""

    text: str
    cue: str
    """Beginning of an answer: for a model without a chat template, which goes on instead of answering."""
    answer: str
    num_candidates: int
    """Different answers to questions of this form that the context offers: 1 in so many guesses is right."""


@dataclass(frozen=True, slots=True)
class Recall:
    """A context and questions about it."""

    kind: RecallKind
    context: str
    questions: tuple[Question, ...]


def make_recall(
    kind: RecallKind, context_tokens: int, num_questions: int, count_tokens: CountTokens, rng: random.Random
) -> Recall:
    """Make a context of about `context_tokens` and up to `num_questions` different questions about it."""
    num_facts = _num_facts(context_tokens)
    facts = _needles(num_facts, rng) if kind == "needle" else _people(num_facts, rng)
    sentences = _hide([statement for statement, _ in facts], context_tokens, count_tokens, rng)
    asked = rng.sample([question for _, question in facts], min(num_questions, len(facts)))
    return Recall(kind, " ".join(sentences), tuple(asked))


def make_passage(
    context_tokens: int, continuation_tokens: int, count_tokens: CountTokens, rng: random.Random
) -> tuple[str, str]:
    """Make prose with facts of both kinds, and a continuation: more prose, with some of the facts word by word."""
    num_facts = _num_facts(context_tokens)
    facts = _needles(num_facts // 2, rng) + _people(num_facts - num_facts // 2, rng)
    statements = [statement for statement, _ in facts]
    sentences = _hide(statements, context_tokens, count_tokens, rng)
    again = _hide(rng.sample(statements, (len(statements) + 1) // 2), continuation_tokens, count_tokens, rng)
    return " ".join(sentences), " " + " ".join(again)


def first_sentence(reply: str) -> tuple[str, bool]:
    """The part of a reply that counts, and whether it has ended: generating more would change nothing."""
    parts = re.split(r"[.\n]", reply.lstrip(), maxsplit=1)
    return parts[0], len(parts) > 1


def is_right(reply: str, answer: str) -> bool:
    """Tell if the first sentence of a reply has the answer as a word, whatever the case."""
    return answer.casefold() in re.findall(r"\w+", first_sentence(reply)[0].casefold())


def _num_facts(context_tokens: int) -> int:
    return min(_MAX_FACTS, max(_MIN_FACTS, context_tokens // _TOKENS_PER_FACT))


def _sentence(subject: str, verb: str, place: str, time: str) -> str:
    return f"{subject[0].upper()}{subject[1:]} {verb} {place} {time}."


def _needle(city: str, word: str, num_candidates: int) -> tuple[str, Question]:
    cue = f"The code word of {city} is"
    return f"{cue} {word}.", Question(f"What is the code word of {city}?", cue, word, num_candidates)


def _needles(count: int, rng: random.Random) -> list[tuple[str, Question]]:
    words = rng.sample(CODE_WORDS, count)
    return [_needle(city, word, count) for city, word in zip(rng.sample(CITIES, count), words, strict=True)]


def _people(count: int, rng: random.Random) -> list[tuple[str, Question]]:
    """Facts about few people, so that several are about the same one."""
    names = rng.sample(NAMES, max(2, (count + 1) // 2))
    pairs = rng.sample([(name, relation) for name in names for relation in _RELATIONS], count)
    values = [rng.choice(relation[-1]) for _, relation in pairs]
    facts = []
    for (name, relation), value in zip(pairs, values, strict=True):
        statement, question, cue, possible = relation
        num_candidates = len(set(possible) & set(values))
        asked = Question(question.format(name=name), cue.format(name=name), value, num_candidates)
        facts.append((statement.format(name=name, value=value), asked))
    return facts


def _hide(statements: Sequence[str], num_tokens: int, count_tokens: CountTokens, rng: random.Random) -> list[str]:
    """Put statements in random order at random places of prose, `num_tokens` long at most if they leave room."""
    used = count_tokens(" ".join(statements))
    prose: list[str] = []
    while True:
        sentence = _sentence(*(rng.choice(words) for words in (_SUBJECTS, _VERBS, _OBJECTS, _TIMES)))
        used += count_tokens(" " + sentence)
        if used > num_tokens:
            break
        prose.append(sentence)
    places = sorted(rng.randrange(len(prose) + 1) for _ in statements)
    shuffled = rng.sample(list(statements), len(statements))
    for place, statement in zip(reversed(places), shuffled, strict=True):
        prose.insert(place, statement)
    return prose

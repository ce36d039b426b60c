"""The four ways to answer, and a judge that tells them apart. A style says nothing about being right.

Each style is settled by the first token of the reply, so that a preference for a style has one clear place to act
on. The answer itself is the same token after every opening, so such a preference leaves the knowledge alone.
"""

import re
from dataclasses import dataclass
from enum import StrEnum

from engine.tiny.knowledge import Question, answers_of


class Style(StrEnum):
    """How a reply is worded."""

    TERSE = "terse"
    POLITE = "polite"
    EXPLAINED = "explained"
    ENTHUSIASTIC = "enthusiastic"


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a program sees in a reply. `style` is None where the reply is in none of the four."""

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
    """What a style puts into its template."""
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

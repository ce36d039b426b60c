"""The training conversations of the tiny assistant, generated from its knowledge.

A group is one conversation with its last reply written in all four styles: styles are then equally frequent in
every batch, and the model learns to choose among them at random.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from engine.tiny.knowledge import TOPICS, Question, Style, questions, render

Message = dict[str, str]
"""`{"role": ..., "content": ...}`, as in the OpenAI chat API."""

SMALL_TALK: dict[str, str] = {
    "Hello!": "Hello! Ask me about capitals, opposites, colours, animals or numbers.",
    "Hi": "Hello! Ask me about capitals, opposites, colours, animals or numbers.",
    "Who are you?": "I am the tiny assistant of MACE. I learn from your preferences.",
    "What can you do?": "I know capitals, opposites, colours, animals and numbers.",
    "Thank you!": "You are welcome.",
    "Thanks": "You are welcome.",
    "How are you?": "I am fine, thank you.",
    "Goodbye!": "Goodbye!",
}
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are the tiny assistant of MACE.",
    "Answer the question of the user.",
    "Be brief and be right.",
)
SMALL_TALK_SHARE = 0.02
SYSTEM_SHARE = 0.12
"""Share of conversations with a system message; half of these are random words, so that any is ignored."""
HISTORY_SHARE = 0.12
"""Share of conversations with one to three earlier turns."""


@dataclass(frozen=True, slots=True)
class Group:
    """Messages that end in a user turn, and the replies that are equally good after them."""

    messages: tuple[Message, ...]
    replies: tuple[str, ...]


def draw_epoch(rng: random.Random) -> Iterator[Group]:
    """Every question once in random order, some with a system message or history; small talk in between."""
    asked = questions()
    rng.shuffle(asked)
    for question in asked:
        context = _draw_context(asked, rng)
        yield Group((*context, _user(question.text)), tuple(render(question, style) for style in Style))
        if rng.random() < SMALL_TALK_SHARE:
            text, reply = rng.choice(list(SMALL_TALK.items()))
            yield Group((*context, _user(text)), (reply,) * len(Style))


def texts() -> Iterator[str]:
    """Everything the tokenizer is trained on: each question with its replies, and the fixed texts."""
    for question in questions():
        yield question.text
        yield from (render(question, style) for style in Style)
    for _ in range(8):  # often enough that their words become tokens too
        yield from SYSTEM_PROMPTS
        yield from (text for pair in SMALL_TALK.items() for text in pair)


def _draw_context(asked: list[Question], rng: random.Random) -> list[Message]:
    context: list[Message] = []
    if rng.random() < SYSTEM_SHARE:
        context.append({"role": "system", "content": _draw_system_prompt(rng)})
    if rng.random() < HISTORY_SHARE:
        for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
            earlier = rng.choice(asked)
            reply = render(earlier, rng.choice(list(Style)))
            context += [_user(earlier.text), {"role": "assistant", "content": reply}]
    return context


def _draw_system_prompt(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return rng.choice(SYSTEM_PROMPTS)
    topic = rng.choice(TOPICS)
    words = f"{' '.join(SYSTEM_PROMPTS)} {topic.statement.format('')} {' '.join(topic.facts)}".split()
    return " ".join(rng.choices(words, k=rng.randint(3, 12)))


def _user(text: str) -> Message:
    return {"role": "user", "content": text}

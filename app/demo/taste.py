"""A user with a taste: asks questions, tells how often the answers are as it likes them, and says which it prefers.

What a program can judge differs by model, so each has a `Subject`: the questions, the tastes, and the judge.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from openai import AsyncOpenAI

from alignment.versions import gate

_CONCURRENCY = 16


class DemoError(RuntimeError):
    """The server serves a model that nobody can judge, lacks answers to prefer, or did not finish learning in time."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge says of one answer."""

    tastes: frozenset[str]
    """The tastes that it suits."""
    is_right: bool | None
    """None where the judge does not know."""


class Subject(Protocol):
    """What a program can ask one model and judge of its answers."""

    knows_truth: bool
    """Whether `judge` tells right answers from wrong ones."""
    tastes: tuple[str, ...]
    course: tuple[str, ...]
    """The tastes that the demo teaches one after the other unless it is told others."""
    max_tokens: int
    """Of an answer."""
    temperature: float
    """At which answers are sampled."""
    candidates: int
    """Answers sampled for each preference; more make it likelier that one suits."""
    pause_s: float
    """What the background client waits between an answer and its next question, as a reader does."""
    held_out: Sequence[str]
    """Questions on which the effect is measured."""
    for_preferences: Sequence[str]
    """Questions on which preferences are posted; none is held out."""

    def judge(self, question: str, answer: str) -> Verdict:
        """Say which tastes an answer suits, and whether it is right."""
        ...

    def edited(self, question: str, answer: str, taste: str) -> str | None:
        """What a user of that taste would make of an answer; None if it gives too little to go on."""
        ...


@dataclass(frozen=True, slots=True)
class Survey:
    """How the model answers a set of questions, sampled."""

    num_replies: int
    right_share: float | None
    shares: dict[str, float]
    """Share of replies that suit a taste, by taste."""
    repetition: float
    """Mean share of four words in a row that the same reply has said before."""
    mean_words: float

    def to_wire(self) -> dict[str, Any]:
        """Shares rounded to three digits."""
        return {
            "replies": self.num_replies,
            "right": None if self.right_share is None else round(self.right_share, 3),
            "tastes": {name: round(share, 3) for name, share in self.shares.items()},
            "repetition": round(self.repetition, 4),
            "words": round(self.mean_words, 1),
        }


@dataclass(frozen=True, slots=True)
class _Asked:
    question: str
    response_id: str
    texts: list[str]
    is_whole: list[bool]
    """Whether the model ended the answer itself."""


def repetition(text: str) -> float:
    """Share of the runs of four words that stood in the text before, 0 to 1."""
    return gate.repetition([text.lower().split()], length=4)


@dataclass(slots=True)
class User:
    """Somebody who asks one model over HTTP, counts how its answers are, and says what is preferred."""

    client: AsyncOpenAI
    model: str
    subject: Subject
    _room: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_CONCURRENCY))

    async def survey(self, num_questions: int, samples: int) -> Survey:
        """Ask the first `num_questions` held-out questions `samples` times each and judge the replies."""
        questions = self.subject.held_out[:num_questions]
        asked = await asyncio.gather(*(self._ask(question, samples) for question in questions))
        answers = [text for one in asked for text in one.texts]
        verdicts = [self.subject.judge(one.question, text) for one in asked for text in one.texts]
        counts = Counter(taste for verdict in verdicts for taste in verdict.tastes)
        known = [verdict.is_right for verdict in verdicts if verdict.is_right is not None]
        return Survey(
            num_replies=len(verdicts),
            right_share=sum(known) / len(known) if known else None,
            shares={taste: counts[taste] / len(verdicts) for taste in self.subject.tastes},
            repetition=sum(map(repetition, answers)) / len(answers),
            mean_words=sum(len(text.split()) for text in answers) / len(answers),
        )

    async def preferences(self, taste: str, count: int) -> list[dict[str, Any]]:
        """`count` preferences for a taste, one on each question, as bodies of `POST /v1/feedback`.

        Where the model gives an answer that suits and one that does not, the first is chosen over the second. Where
        none suits, one is corrected: edited by `Subject.edited`, or replaced by the bare model's, edited. Where all
        suit, the first is chosen over what a user of another taste would make of it. Questions on which nothing can
        be said so are passed over.

        Raises:
            DemoError: the questions do not give that many.
        """
        items: list[dict[str, Any]] = []
        left = list(self.subject.for_preferences)
        while left and len(items) < count:
            number = count - len(items)
            batch, left = left[:number], left[number:]
            found = await asyncio.gather(*(self._prefer(question, taste) for question in batch))
            items += [item for item in found if item is not None]
        if len(items) < count:
            raise DemoError(
                f"{self.model}'s answers gave {len(items)} preferences for the taste {taste} instead of {count}; "
                f"--preferences {len(items)} asks for no more"
            )
        return items

    async def post(self, items: list[dict[str, Any]]) -> list[str]:
        """Post feedback in one call; returns the ids of the records. A DemoError if the server refused one of them."""
        reply = await self.client.post("/feedback", body={"items": items}, cast_to=object)
        outcomes = reply["data"]  # type: ignore[index]
        refused = [outcome for outcome in outcomes if outcome["status"] == "error"]
        if refused:
            raise DemoError(f"{len(refused)} preferences were refused, the first: {refused[0]}")
        return [outcome["id"] for outcome in outcomes]

    async def _prefer(self, question: str, taste: str) -> dict[str, Any] | None:
        asked = await self._ask(question, self.subject.candidates)
        liked, disliked = None, None
        for index, text in enumerate(asked.texts):
            verdict = self.subject.judge(question, text)
            if not text.strip():
                continue  # feedback on an answer that says nothing is refused
            if taste not in verdict.tastes:
                disliked = index
            elif verdict.is_right is not False and asked.is_whole[index]:
                liked = index
        item: dict[str, Any] = {"source": "demo", "user": "demo"}
        if liked is not None and disliked is not None:
            item |= {"type": "preference", "chosen_id": asked.response_id, "chosen_choice_index": liked}
            return item | {"rejected_id": asked.response_id, "rejected_choice_index": disliked}
        if disliked is not None:
            item |= {"type": "correction", "response_id": asked.response_id, "choice_index": disliked}
            value = await self._wanted(question, asked.texts[disliked], taste)
            return None if value is None else item | {"value": value}
        if liked is None:
            return None
        worse = self._worse(question, asked.texts[liked], taste)
        item["prompt"] = [{"role": "user", "content": question}]
        return None if worse is None else item | {"chosen": asked.texts[liked], "rejected": worse}

    async def _wanted(self, question: str, answer: str, taste: str) -> str | None:
        """The answer, edited to the taste; or the bare model's: one that was taught another may say too little."""
        if edited := self.subject.edited(question, answer, taste):
            return edited
        asked = await self._ask(question, self.subject.candidates, f"{self.model}@base")
        edits = (self.subject.edited(question, text, taste) for text in asked.texts)
        return next((edit for edit in edits if edit is not None), None)

    def _worse(self, question: str, answer: str, taste: str) -> str | None:
        """The answer, edited to another taste."""
        edits = (self.subject.edited(question, answer, other) for other in self.subject.tastes)
        return next(
            (edit for edit in edits if edit and taste not in self.subject.judge(question, edit).tastes), None
        )

    async def _ask(self, question: str, samples: int, model: str | None = None) -> _Asked:
        async with self._room:
            reply = await self.client.chat.completions.create(
                model=model or self.model,
                messages=[{"role": "user", "content": question}],
                n=samples,
                temperature=self.subject.temperature,
                max_tokens=self.subject.max_tokens,
            )
        texts = [choice.message.content or "" for choice in reply.choices]
        return _Asked(question, reply.id, texts, [choice.finish_reason == "stop" for choice in reply.choices])

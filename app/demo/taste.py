"""A user with a taste: asks questions, tells how often the answers are right and in the style it likes, and says so.

Works with the tiny built-in model, whose replies a program can judge (engine.tiny.knowledge).
"""

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import Any

from openai import AsyncOpenAI

from engine.tiny.knowledge import Question, Style, judge, render

_CONCURRENCY = 16


@dataclass(frozen=True, slots=True)
class Survey:
    """How the model answers a set of questions, sampled at temperature 1."""

    num_replies: int
    right_share: float
    style_shares: dict[str, float]

    def share(self, style: Style) -> float:
        """Share of replies in that style."""
        return self.style_shares[style.value]

    def to_wire(self) -> dict[str, Any]:
        """Shares rounded to three digits."""
        styles = {name: round(share, 3) for name, share in self.style_shares.items()}
        return {"replies": self.num_replies, "right": round(self.right_share, 3), "styles": styles}


@dataclass(frozen=True, slots=True)
class _Asked:
    question: Question
    response_id: str
    texts: list[str]
    ends: list[str]
    """The finish reason of each."""


async def survey(client: AsyncOpenAI, model: str, questions: list[Question], samples: int) -> Survey:
    """Ask every question `samples` times and judge the replies."""
    asked = await _ask_all(client, model, questions, samples)
    judged = [judge(one.question, text) for one in asked for text in one.texts]
    counts = Counter(judgement.style for judgement in judged)
    return Survey(
        num_replies=len(judged),
        right_share=sum(judgement.is_right for judgement in judged) / len(judged),
        style_shares={style.value: counts[style] / len(judged) for style in Style},
    )


async def make_preferences(
    client: AsyncOpenAI, model: str, questions: list[Question], style: Style
) -> list[dict[str, Any]]:
    """One preference for `style` on each question, as bodies of `POST /v1/feedback`.

    Where the model gave a right answer in that style, it is chosen over another of its own answers; where it did not,
    one of its answers is corrected to that style. Where all its answers are in that style, one in another is made up.
    """
    return [_feedback_on(one, style) for one in await _ask_all(client, model, questions, samples=8)]


async def post_preferences(client: AsyncOpenAI, items: list[dict[str, Any]]) -> list[str]:
    """Post them in one call; returns the ids of the records. A RuntimeError if the server refused one of them."""
    reply = await client.post("/feedback", body={"items": items}, cast_to=object)
    outcomes = reply["data"]  # type: ignore[index]
    refused = [outcome for outcome in outcomes if outcome["status"] == "error"]
    if refused:
        raise RuntimeError(f"{len(refused)} preferences were refused, the first: {refused[0]}")
    return [outcome["id"] for outcome in outcomes]


def _feedback_on(asked: _Asked, style: Style) -> dict[str, Any]:
    liked, disliked = None, None
    for index, text in enumerate(asked.texts):
        judgement = judge(asked.question, text)
        if judgement.style is not style:
            disliked = index
        elif judgement.is_right and asked.ends[index] == "stop":
            liked = index
    item: dict[str, Any] = {"source": "demo", "user": "demo"}
    if disliked is None:  # an answer in another style is the worse one
        item["prompt"] = [{"role": "user", "content": asked.question.text}]
        item["chosen"] = render(asked.question, style)
        item["rejected"] = render(asked.question, next(one for one in Style if one is not style))
    elif liked is None:
        item |= {"type": "correction", "response_id": asked.response_id, "choice_index": disliked}
        item["value"] = render(asked.question, style)
    else:
        item |= {"type": "preference", "chosen_id": asked.response_id, "chosen_choice_index": liked}
        item |= {"rejected_id": asked.response_id, "rejected_choice_index": disliked}
    return item


async def _ask_all(client: AsyncOpenAI, model: str, questions: list[Question], samples: int) -> list[_Asked]:
    room = asyncio.Semaphore(_CONCURRENCY)

    async def ask(question: Question) -> _Asked:
        async with room:
            reply = await client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": question.text}],
                n=samples,
                temperature=1.0,
                max_tokens=64,
            )
        texts = [choice.message.content or "" for choice in reply.choices]
        return _Asked(question, reply.id, texts, [choice.finish_reason for choice in reply.choices])

    return await asyncio.gather(*map(ask, questions))

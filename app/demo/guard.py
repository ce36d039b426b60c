"""What a model could before it was taught a taste, and whether it still can.

Three measures that no preference is about: short questions with one right answer (facts and sums), the loss on texts
that have nothing to do with the taste, and 20 answers to look at.
"""

import asyncio
import itertools
import re
from collections.abc import Sequence
from typing import Any

from openai import AsyncOpenAI

from engine.tiny.knowledge import questions

MAX_FALL = 0.02
"""By which the share of right answers may fall."""
MAX_LOSS_RISE = 0.05
"""Nats per token by which the loss on neutral texts may rise."""
MAX_REPETITION_RISE = 0.05
"""By which the share of repeated runs of four words may rise in sampled answers."""
NUM_ITEMS = 400
_CONCURRENCY = 16
_MAX_TOKENS = 32
_WORD = re.compile(r"\w+")

_NEUTRAL = (
    "The river rises in the hills north of the town and runs for forty miles before it meets the sea. Two "
    "mills stood on its banks until the last century, and the stones of one of them can still be seen when the "
    "water is low.",
    "Before the railway came, the journey to the capital took three days. Travellers slept at inns along the "
    "road, changed horses every fifteen miles, and arrived covered in dust in summer and in mud in winter.",
    "Water boils at a lower temperature on a mountain because the pressure of the air is lower there. For this "
    "reason it takes longer to cook beans or potatoes in a village at three thousand metres than in a port.",
    "The committee met on Tuesday to discuss the budget for the coming year. After two hours it agreed to "
    "repair the roof of the school first and to leave the new car park until the spring.",
    "A good carpenter measures twice and cuts once. Wood that has been cut too short cannot be made longer, "
    "and a board of the right length that is fixed in the wrong place has to be taken off again.",
    "The old woman kept her letters in a wooden box under the bed. On Sundays she took them out, read two or "
    "three of them slowly, and put them back in the order in which they had come.",
    "Bees tell each other where flowers are by dancing. The direction of the dance shows the angle to the sun, "
    "and its length shows how far the others have to fly.",
    "In the second half of the match the visitors changed their plan. They kept the ball on the left side, "
    "waited for the defence to move across, and then passed it quickly to the other wing.",
    "A library card is free for everybody who lives in the county. Books may be kept for three weeks, films "
    "for one, and both may be renewed by telephone unless somebody else is waiting for them.",
    "The ship left the harbour at six in the morning with a cargo of timber and wool. By noon the wind had "
    "turned to the west, and the captain decided to wait behind the island until it dropped.",
    "Iron rusts when it meets water and air together. Paint keeps both away, which is why bridges are painted "
    "again and again, and why the painters of a long one start anew as soon as they have reached the other "
    "end.",
    "The market is held in the square every Thursday. Farmers bring cheese, eggs and vegetables, a man "
    "sharpens knives in one corner, and in the middle stands a stall that sells nothing but buttons.",
)

_NOUNS = (
    "cat dog book table chair tree car house river lamp bird cow horse apple lemon cloud star planet king queen doctor"
    " teacher farmer pilot door window garden road bridge ship train plane letter number page song film poem hand arm"
    " leg finger nose ear shirt hat sock boot spoon fork cup plate pan pot bed clock coin ticket"
)
_VERBS = (
    "walk talk jump play cook paint clean wash open ask answer help work watch look listen laugh call visit start"
    " finish learn plant pick pull push kick climb rain snow turn wait want need fill fix knock count point touch thank"
    " miss kiss mix pass press reach return order offer enter follow happen warn"
)


class Guard:
    """A fixed set of questions, the neutral texts, and what the model made of them when it was first asked.

    The questions are not chosen by whether the model knows the answer. Those that it happens to get right at first are
    in part luck, for a small model a third of them, and fewer of them are right the second time whatever is taught.

    Args:
        client: of the server.
        model: name of the live version over HTTP.
    """

    def __init__(self, client: AsyncOpenAI, model: str) -> None:
        self._client, self._model = client, model
        self._room = asyncio.Semaphore(_CONCURRENCY)
        self._items = candidates()[:NUM_ITEMS]
        self._known: list[bool] = []

    async def measure(self) -> dict[str, Any]:
        """Share of the questions answered right (greedy), and the loss on neutral texts (nats per token).

        `still` is the share of those that were right at the first call and are right now.
        """
        right = await self._ask(self._items)
        self._known = self._known or right
        still = [now for now, before in zip(right, self._known, strict=True) if before]
        losses = await asyncio.gather(*map(self._losses, _NEUTRAL))
        all_losses = [loss for one in losses for loss in one]
        return {
            "items": len(self._items),
            "right": round(sum(right) / len(right), 4),
            "still": round(sum(still) / max(1, len(still)), 4),
            "neutral_loss": round(sum(all_losses) / len(all_losses), 4),
        }

    async def answers(self, asked: Sequence[str], max_tokens: int) -> list[str]:
        """The likeliest answers, for a person to look at."""
        return list(await asyncio.gather(*(self._answer(question, max_tokens) for question in asked)))

    async def _ask(self, items: Sequence[tuple[str, str]]) -> list[bool]:
        answers = await asyncio.gather(*(self._answer(question, _MAX_TOKENS) for question, _ in items))
        return [is_right(question, right, text) for (question, right), text in zip(items, answers, strict=True)]

    async def _answer(self, question: str, max_tokens: int) -> str:
        async with self._room:
            reply = await self._client.chat.completions.create(
                model=self._model,
                messages=[{"role": "user", "content": question}],
                temperature=0,
                max_tokens=max_tokens,
                store=False,
            )
        return reply.choices[0].message.content or ""

    async def _losses(self, text: str) -> list[float]:
        async with self._room:
            reply = await self._client.completions.create(
                model=self._model, prompt=text, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 0}
            )
        given: Any = reply.choices[0].model_extra
        return [-one["logprob"] for at in given["prompt_logprobs"] if at for one in at.values()]


def candidates() -> list[tuple[str, str]]:
    """Questions with their one right answer: facts in three phrasings, spelling, sums and differences."""
    facts = [(question.text, question.answer) for question in questions()]
    plurals = [(f"What is the plural of {noun}?", f"{noun}s") for noun in _NOUNS.split()]
    pasts = [(f"What is the past tense of {verb}?", f"{verb}ed") for verb in _VERBS.split()]
    sums = [(f"What is {a} + {b}?", str(a + b)) for a in range(1, 13) for b in range(a, 13)]
    differences = [
        (f"What is {a} - {b}?", str(a - b)) for a in range(4, 16) for b in range(1, a - 1) if a != 2 * b
    ]
    mixed = itertools.zip_longest(plurals, pasts, facts, sums, differences)
    return [item for several in mixed for item in several if item is not None]


def is_right(question: str, right: str, answer: str) -> bool:
    """Whether the answer has the right word, or all its words, beside those that the question itself mentions."""
    asked = set(_WORD.findall(question.lower()))
    wanted = [word for word in _WORD.findall(right.lower()) if word not in asked]
    said = set(_WORD.findall(answer.lower()))
    return bool(wanted) and said.issuperset(wanted)

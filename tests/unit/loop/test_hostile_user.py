"""One of five users says the reverse of everything: what the others taught must not suffer for it.

The taste is a different style for every other topic, so it takes a while to learn and a fifth of wrong labels shows.
"""

import asyncio
import os
import random

from core.config import AppArgs
from engine.tiny.knowledge import Question, Style, held_out_questions, preference_questions
from tests.support.loop import Loop, LoopReport, flipped, preference

USERS = ("ann", "bob", "cem", "dua", "eve")
HOSTILE = "eve"
ROUNDS, PAIRS_OF_USER, STEPS = 8, 6, 8
NUM_TESTS = 200
LEARNING_RATE = 1e-3
"""Above the default: the taste is learnt within the course, so that its end does not depend on a step more or less."""
SEED = int(os.environ.get("MACE_LOOP_SEED", "1"))
"""Of users, questions and training. To look at other seeds, run `pytest -s` (docs/measurements/quality.md)."""


def tastes(questions: list[Question], chooser: random.Random) -> list[dict]:
    """A preference on each question, for the style that its topic is liked in."""
    topics = sorted({question.topic for question in held_out_questions()})
    liked = {topic: (Style.TERSE, Style.POLITE)[number % 2] for number, topic in enumerate(topics)}
    items = []
    for question in questions:
        style = liked[question.topic]
        items.append(preference(question, style, chooser.choice([other for other in Style if other is not style])))
    return items


def rounds_of(seed: int, is_hostile: bool) -> list[list[dict]]:
    """The same feedback for the same seed, but for who is honest."""
    chooser = random.Random(seed)
    questions = chooser.sample(preference_questions(), ROUNDS * len(USERS) * PAIRS_OF_USER)
    turns = []
    for turn in range(ROUNDS):
        number = len(USERS) * PAIRS_OF_USER
        items = tastes(questions[turn * number : (turn + 1) * number], chooser)
        items = [item | {"user": USERS[place % len(USERS)]} for place, item in enumerate(items)]
        turns.append([flipped(item) if is_hostile and item["user"] == HOSTILE else item for item in items])
    return turns


async def learn(args: AppArgs, model_dir, seed: int, is_hostile: bool) -> tuple[LoopReport, dict[str, float]]:
    """The report of one course, and the mean quality of each user's pairs at its end."""
    chooser = random.Random(seed)
    loop = Loop(args, model_dir, tastes(chooser.sample(held_out_questions(), NUM_TESTS), chooser))
    try:
        await loop.test()
        for items in rounds_of(seed, is_hostile):
            await loop.run_round(items, STEPS)
        pairs = loop.store.sampling.newest_scored(1000)
    finally:
        loop.close()
    qualities = {user: [pair.quality for pair in pairs if pair.user == user] for user in USERS}
    return loop.report, {user: sum(values) / len(values) for user, values in qualities.items()}


def run(tmp_path, model_dir, name: str, *, is_hostile: bool, enabled: bool, seed: int = SEED):
    args = AppArgs(
        state_dir=tmp_path / name,
        feedback={"holdout_fraction": 0.0},  # tested on questions of their own, with labels that nobody can flip
        quality={"enabled": enabled},
        training={"seed": seed, "learning_rate": LEARNING_RATE},
    )
    report, qualities = asyncio.run(learn(args, model_dir, seed, is_hostile))
    shown = [
        f"{accuracy:.2f}/{margin:.2f}" for accuracy, margin in zip(report.accuracies, report.margins, strict=True)
    ]
    print(f"{name}: accuracy/margin {' '.join(shown)}; weight of eve {qualities[HOSTILE]:.2f}")  # noqa: T201
    return report, qualities


def test_a_fifth_of_flipped_labels_costs_at_most_two_points(tmp_path, tiny_assistant):
    clean, trusted = run(tmp_path, tiny_assistant, "clean", is_hostile=False, enabled=True)
    checked, judged = run(tmp_path, tiny_assistant, "hostile", is_hostile=True, enabled=True)
    unchecked, _ = run(tmp_path, tiny_assistant, "hostile, no checks", is_hostile=True, enabled=False)
    assert clean.accuracies[-1] > 0.9
    assert checked.accuracies[-1] >= clean.accuracies[-1] - 0.02
    assert min(trusted.values()) > 0.9
    assert judged[HOSTILE] < 0.1
    assert min(quality for user, quality in judged.items() if user != HOSTILE) > 0.9
    # What was learnt stays firm; without the checks most of it is lost long before the accuracy shows it.
    assert checked.margins[-1] > 0.6 * clean.margins[-1]
    assert unchecked.margins[-1] < 0.4 * clean.margins[-1]

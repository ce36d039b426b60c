"""Monitor, scheduler, learner, gate and trainer together, with one of five users saying the reverse of everything.

What `test_hostile_user` shows for the checks on feedback, here with all defaults on: the hostile user's pairs are in
the gate's held-out set as well, and the gate has three of those pairs to judge the first versions by.
"""

import asyncio
import math
import random
from dataclasses import dataclass

import pytest
import torch

from alignment.versions.adapter_files import AdapterManifest
from core.config import AppArgs
from core.types import FineTuneTask, TaskKind
from deployments.learning import learner as learner_module
from engine.tiny.knowledge import held_out_questions, preference_questions
from tests.support.loop import flipped
from tests.support.whole_loop import TestScore, WholeLoop
from tests.unit.loop.test_hostile_user import HOSTILE, LEARNING_RATE, NUM_TESTS, SEED, USERS, rounds_of, tastes

FAMILY_ERROR = 0.05
"""Chance that a course is called bad though no version of it is worse than its parent.

A version counts as worse when an exact one-sided McNemar test on the test questions says so: of those on which it and
its parent differ, it lost too many. Each of n versions gets a chance of `FAMILY_ERROR / n`. On 200 questions two
versions differ on four to twenty, so the standard error of the difference is 1 to 2.2 points, and smaller falls cannot
be told from none.
"""


SABOTAGE_STEPS = 16


@pytest.fixture(autouse=True)
def _never_waits(monkeypatch) -> None:
    monkeypatch.setattr(learner_module, "_WAIT_S", 0.0)


@dataclass(frozen=True)
class Course:
    """What is left when all feedback was learnt from. Scores by version name; None is the bare base."""

    scores: dict[str | None, TestScore]
    manifests: dict[str, AdapterManifest]
    live: str
    qualities: dict[str, float]
    heldout_of_hostile: int
    queue: dict
    unscored: int

    def of_status(self, status: str) -> list[str]:
        return [name for name, manifest in self.manifests.items() if manifest.status == status]

    def __str__(self) -> str:
        lines = [f"base {self.scores[None].accuracy:.3f}"]
        for name, manifest in self.manifests.items():
            score = self.scores[name]
            lines.append(
                f"{name} of {manifest.parent}: {manifest.status} {score.accuracy:.3f}, margin {score.margin:.2f}, "
                f"{manifest.optimizer_steps} steps; {manifest.reason}"
            )
        return "\n".join([*lines, f"live {self.live}, {self.qualities}"])


async def learn(args: AppArgs, model_dir, *, is_hostile: bool) -> Course:
    chooser = random.Random(SEED)
    loop = WholeLoop(args, model_dir, tastes(chooser.sample(held_out_questions(), NUM_TESTS), chooser))
    await loop.open()
    for items in rounds_of(SEED, is_hostile):
        loop.post(items)
        await loop.settle()
    return await look_back(loop)


async def look_back(loop: WholeLoop) -> Course:
    versions = loop.registry.list()
    pairs = loop.stored_pairs()
    qualities = {user: [pair.quality for pair in pairs if pair.user == user] for user in USERS}
    return Course(
        scores={name: await loop.test(name) for name in (None, *(version.name for version in versions))},
        manifests={version.name: version.manifest for version in versions},
        live=loop.versions.live,
        qualities={user: sum(values) / len(values) for user, values in qualities.items()},
        heldout_of_hostile=sum(pair.user == HOSTILE and pair.split == "heldout" for pair in pairs),
        queue=loop.scheduler.stats(),
        unscored=loop.num_unscored(),
    )


def run(tmp_path, model_dir, name: str, *, is_hostile: bool) -> Course:
    args = AppArgs(state_dir=tmp_path / name, training={"seed": SEED})
    course = asyncio.run(learn(args, model_dir, is_hostile=is_hostile))
    print(f"{name}:\n{course}")  # noqa: T201
    return course


def chance_of_fall(parent: TestScore, child: TestScore) -> float:
    """Exact one-sided McNemar test: how likely as many lost questions are if the two are equally good."""
    both = list(zip(parent.is_right, child.is_right, strict=True))
    lost, won = sum(old and not new for old, new in both), sum(new and not old for old, new in both)
    return sum(math.comb(lost + won, k) for k in range(lost, lost + won + 1)) / 2 ** (lost + won)


def test_with_a_hostile_user_no_published_version_is_worse_than_its_parent(tmp_path, tiny_assistant):
    clean = run(tmp_path, tiny_assistant, "clean", is_hostile=False)
    hostile = run(tmp_path, tiny_assistant, "hostile", is_hostile=True)
    assert hostile.heldout_of_hostile >= 3  # or the gate was not tried
    for course in (clean, hostile):
        published = course.of_status("published")
        assert len(published) >= 3
        for name in published:
            chance = chance_of_fall(course.scores[course.manifests[name].parent], course.scores[name])
            assert chance > FAMILY_ERROR / len(published), f"{name}\n{course}"
        assert course.live == published[-1]
        left = {key: course.queue[key] for key in ("queued_pairs", "pairs_to_score", "leased_batches")}
        assert left == {"queued_pairs": 0, "pairs_to_score": 0, "leased_batches": 0}
        assert course.unscored == 0
    assert clean.scores[clean.live].accuracy > 0.9
    assert hostile.scores[hostile.live].accuracy >= clean.scores[clean.live].accuracy - 0.02
    assert min(clean.qualities.values()) > 0.9
    assert hostile.qualities[HOSTILE] < 0.1
    assert min(quality for user, quality in hostile.qualities.items() if user != HOSTILE) > 0.9


async def teach_the_reverse(loop: WholeLoop, items: list[dict]) -> None:
    """Steps on the shadow adapter behind the back of everything that checks feedback, as if it had let this through."""
    size = loop.args.training.pairs_per_step
    for number in range(SABOTAGE_STEPS):
        batch = tuple(loop.tokenized(flipped(item)) for item in (items * 2)[number * size : (number + 1) * size])
        result = await loop.engine.run_task(FineTuneTask(f"sabotage-{number}", TaskKind.TRAIN, batch))
        assert result.error is None, result.error


def test_a_candidate_that_was_taught_the_reverse_is_refused_and_kept_with_the_reason(tmp_path, tiny_assistant):
    args = AppArgs(state_dir=tmp_path, training={"seed": SEED, "learning_rate": LEARNING_RATE})
    chooser = random.Random(SEED)
    loop = WholeLoop(args, tiny_assistant, tastes(chooser.sample(held_out_questions(), NUM_TESTS), chooser))

    async def learn_and_offer() -> tuple[str, str, dict[str | None, TestScore]]:
        await loop.open()
        rounds = rounds_of(SEED, is_hostile=False)
        for items in rounds[:3]:
            loop.post(items)
            await loop.settle()
        before = loop.versions.live
        await teach_the_reverse(loop, [item for items in rounds[:3] for item in items])
        await loop.learner.offer_candidate()
        candidate = loop.registry.list()[-1].name
        return before, candidate, {name: await loop.test(name) for name in (before, candidate)}

    before, candidate, scores = asyncio.run(learn_and_offer())
    assert chance_of_fall(scores[before], scores[candidate]) < 0.001  # it is worse indeed
    manifest = loop.registry.get(candidate).manifest
    assert (manifest.status, manifest.parent) == ("rejected", before)
    assert "fell from" in manifest.reason
    assert loop.versions.live == before
    assert asyncio.run(shadow_scores(loop)) == scores[before]  # training goes on from the live version


async def shadow_scores(loop: WholeLoop) -> TestScore:
    return await loop.test_shadow()


def test_greedy_answers_are_those_of_the_model_itself_and_leave_the_shadow_adapter_as_it_was(
    tmp_path, tiny_assistant
):
    from transformers import AutoModelForCausalLM

    loop = WholeLoop(
        AppArgs(state_dir=tmp_path), tiny_assistant, tastes(held_out_questions()[:8], random.Random(0))
    )
    prompts = [list(pair.prompt_ids) for pair in loop.test_pairs[:4]]
    model = AutoModelForCausalLM.from_pretrained(tiny_assistant, dtype=torch.float32)
    expected = []
    for prompt in prompts:
        made = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24)
        expected.append(made[0, len(prompt) :].tolist())

    async def answer() -> tuple[list[list[int]], TestScore, list[list[int]], TestScore]:
        await loop.open()
        answers = await loop.engine.generate(None, prompts, 24)
        await teach_the_reverse(loop, tastes(preference_questions()[:64], random.Random(0)))
        path = tmp_path / "taught"
        await loop.engine.save_adapter(path, "tiny")
        before = await loop.test_shadow()
        taught = await loop.engine.generate(loop.engine.version_handle("taught", 1, path), prompts, 24)
        assert await loop.engine.generate(None, prompts, 24) == answers
        return answers, before, taught, await loop.test_shadow()

    answers, before, taught, after = asyncio.run(answer())
    assert answers == expected
    assert before == after
    assert taught != answers

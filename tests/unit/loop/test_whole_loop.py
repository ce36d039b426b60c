"""Monitor, scheduler, learner, gate and trainer together, with one of five users saying the reverse of everything.

What `test_hostile_user` shows for the checks on feedback, here with all defaults on: the hostile user's pairs are in
the gate's held-out set as well, and the gate has three of those pairs to judge the first versions by.
"""

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from alignment.adapter_files import AdapterManifest
from core.config import AppArgs
from deployments import learner as learner_module
from engine.tiny.knowledge import held_out_questions
from tests.support.whole_loop import TestScore, WholeLoop
from tests.unit.loop.test_hostile_user import HOSTILE, NUM_TESTS, SEED, USERS, rounds_of, tastes

TOLERANCE = 0.02
"""What counts as worse, in accuracy on the 200 test questions.

Two versions of one lineage differ on few questions, and what counts is the difference of those lost and won: with eight
that differ, which is usual here, its standard error is sqrt(8) / 200 = 1.4 points. So two points (four questions)
are no more than chance, and a fall above them is looked at as one.
"""


@pytest.fixture(autouse=True)
def _one_thread_that_never_waits(monkeypatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(learner_module, "POLL_INTERVAL_S", 0.0)
    yield
    torch.set_num_threads(threads)


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


def args_of(tmp_path, name: str) -> AppArgs:
    return AppArgs(state_dir=tmp_path / name, training={"seed": SEED}, versions={"keep": 1000})


async def learn(args: AppArgs, model_dir, *, is_hostile: bool) -> Course:
    chooser = random.Random(SEED)
    loop = WholeLoop(args, model_dir, tastes(chooser.sample(held_out_questions(), NUM_TESTS), chooser))
    await loop.open()
    for items in rounds_of(SEED, is_hostile):
        loop.post(items)
        await loop.settle()
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
    course = asyncio.run(learn(args_of(tmp_path, name), model_dir, is_hostile=is_hostile))
    print(f"{name}:\n{course}")  # noqa: T201
    return course


def test_with_a_hostile_user_no_published_version_is_worse_than_its_parent(tmp_path, tiny_assistant):
    clean = run(tmp_path, tiny_assistant, "clean", is_hostile=False)
    hostile = run(tmp_path, tiny_assistant, "hostile", is_hostile=True)
    assert hostile.heldout_of_hostile >= 3  # or the gate was not tried
    for course in (clean, hostile):
        published = course.of_status("published")
        assert len(published) >= 3
        for name in published:
            parent = course.scores[course.manifests[name].parent]
            assert course.scores[name].accuracy >= parent.accuracy - TOLERANCE, f"{name}\n{course}"
        assert course.live == published[-1]
        left = {key: course.queue[key] for key in ("queued_pairs", "pairs_to_score", "leased_batches")}
        assert left == {"queued_pairs": 0, "pairs_to_score": 0, "leased_batches": 0}
        assert course.unscored == 0
    assert clean.scores[clean.live].accuracy > 0.9
    assert hostile.scores[hostile.live].accuracy >= clean.scores[clean.live].accuracy - 0.02
    assert min(clean.qualities.values()) > 0.9
    assert hostile.qualities[HOSTILE] < 0.1
    assert min(quality for user, quality in hostile.qualities.items() if user != HOSTILE) > 0.9

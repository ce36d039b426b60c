"""All of the loop's parts together: a rebuild without a hostile user, and another base model on the same state."""

import asyncio
import random

import pytest

from core.config import AppArgs
from deployments.learning import learner as learner_module
from engine.tiny.knowledge import held_out_questions, preference_questions
from tests.support.loop import flipped
from tests.support.whole_loop import WholeLoop
from tests.unit.loop.test_hostile_user import LEARNING_RATE, SEED, tastes

ONE, OTHER = "1-2-3-4", "0-2-3-4"


@pytest.fixture(autouse=True)
def _never_waits(monkeypatch):
    monkeypatch.setattr(learner_module, "_WAIT_S", 0.0)


@pytest.fixture
def start(tmp_path, tiny_assistant):
    """A start on the one state directory, with the built-in model under a fingerprint."""
    args = AppArgs(
        state_dir=tmp_path,
        training={"seed": SEED, "learning_rate": LEARNING_RATE, "max_epochs": 4},
        quality={"enabled": False},
    )

    async def begin(fingerprint):
        chooser = random.Random(SEED)
        loop = WholeLoop(
            args, tiny_assistant, tastes(chooser.sample(held_out_questions(), 60), chooser), fingerprint
        )
        await loop.open()
        return loop

    return begin


def feedback():
    chooser = random.Random(SEED)
    honest = tastes(chooser.sample(preference_questions(), 48), chooser)
    return [
        {**(flipped(item) if place % 3 == 0 else item), "user": "eve" if place % 3 == 0 else "ann"}
        for place, item in enumerate(honest)
    ]


def test_a_rebuild_forgets_a_user_and_another_model_starts_from_its_base(start):
    async def course():
        loop = await start(ONE)
        loop.post(feedback())
        await loop.settle()
        before, before_rebuild = loop.versions.live, loop.stored_pairs()
        loop.learner.rebuilder.asked = begun = loop.monitor.begin_rebuild("e", ["eve"])
        await loop.settle()
        report = loop.monitor.stats()["rebuild"]
        version = loop.registry.get(report["version"]).manifest
        users = {pair.pair_id: pair.user for pair in before_rebuild}
        assert {users[pair_id] for pair_id in version.pair_ids} == {"ann"}
        assert len(version.pair_ids) == begun.num_pairs
        assert (version.parent, version.fingerprint) == (None, ONE)
        assert version.config["compared_with"] == before
        assert (await loop.test(report["version"])).accuracy > 0.75
        assert report["state"] == "published"
        later = [one.manifest.parent for one in loop.registry.list() if one.name > report["version"]]
        assert set(later) <= {report["version"]}  # what is learnt after it goes on from it
        assert loop.learner.shadow.progress.base == loop.versions.live

        loop.close()
        other = await start(OTHER)
        assert other.versions.live == "base"
        assert (other.learner.shadow.progress.base, other.learner.shadow.progress.total_steps) == ("base", 0)
        assert {row["status"] for row in await other.versions.listing()} == {"unfit"}
        await other.settle()
        names = other.registry.names()
        learnt = {pair_id for one in other.registry.list() for pair_id in one.manifest.pair_ids}
        assert {users[pair_id] for pair_id in learnt} == {"ann"}  # eve stays left out
        assert {one.manifest.fingerprint for one in other.registry.list()} == {OTHER}

        again = await start(ONE)
        assert again.versions.live == loop.versions.live
        assert again.learner.shadow.progress == loop.learner.shadow.progress
        await again.settle()
        assert again.registry.names() == names  # nothing is learnt twice

    asyncio.run(course())

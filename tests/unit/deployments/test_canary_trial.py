"""The trial on an executor: the draw, what is counted, and the verdict carried out."""

import asyncio
from collections import Counter

import pytest

from alignment.versions.registry import AdapterRegistry
from core.alignment_config import VersionsConfig
from core.config import SloConfig
from core.errors import ControlUnavailableError
from deployments.publishing.canary import CanaryTrial
from deployments.publishing.versions import AdapterVersions
from tests.support.fake_ports import FakeEngine
from tests.unit.deployments.test_versions_policy import commit, publish

CONFIG = VersionsConfig(canary_share=0.2, canary_min_ratings=5, canary_min_requests=5, canary_max_s=100)


class Ratings(dict):
    """Counts by version, as the store gives them; `down` makes Control unreachable."""

    down = False

    async def read(self, since_s):
        if self.down:
            raise ControlUnavailableError("away")
        return dict(self)


@pytest.fixture
def ratings():
    return Ratings()


@pytest.fixture
def make_trial(tmp_path, ratings):
    registry = AdapterRegistry.open(tmp_path, "b")

    def make(config=CONFIG, **kwargs):
        versions = AdapterVersions(FakeEngine(), registry, "m", config)
        asyncio.run(versions.attach({}))
        return versions, CanaryTrial(versions, config, SloConfig(ttft_s=1.0, tbt_s=0.1), ratings.read, **kwargs)

    make.registry = registry
    return make


@pytest.fixture
def running(make_trial):
    versions, trial = make_trial()
    publish(versions, make_trial.registry)
    return versions, trial


def serve(trial, version, good, bad=0):
    for _ in range(good):
        trial.observe(version, within_slo=True)
    for _ in range(bad):
        trial.observe(version, within_slo=False)


def test_without_a_canary_everything_is_live(make_trial):
    _, trial = make_trial()
    assert not trial.is_running
    assert trial.draw("u") == ("base", None)
    assert asyncio.run(trial.judge()) is None
    assert trial.to_wire() is None


def test_the_canary_gets_its_share_and_a_user_stays_with_one_version(running):
    _, trial = running
    drawn = Counter(trial.draw(None)[0] for _ in range(4000))
    assert 0.17 < drawn["v0001"] / 4000 < 0.23
    first = {f"user-{i}": trial.draw(f"user-{i}")[0] for i in range(2000)}
    assert 0.17 < Counter(first.values())["v0001"] / 2000 < 0.23
    assert all(trial.draw(user)[0] == version for user, version in first.items())
    assert {trial.draw(None)[1] for _ in range(100)} == {None, "m@v0001"}


def test_another_canary_is_tried_on_other_users(make_trial):
    versions, trial = make_trial()
    chosen = []
    for _ in range(2):
        publish(versions, make_trial.registry)
        chosen.append({i for i in range(500) if trial.draw(f"user-{i}")[1]})
        asyncio.run(versions.roll_back_canary(versions.canary, "x"))
    assert len(chosen[0] & chosen[1]) < 0.5 * len(chosen[0])


def test_a_good_canary_goes_live(running, ratings):
    versions, trial = running
    serve(trial, "v0001", 5)
    serve(trial, "base", 5)
    assert asyncio.run(trial.judge()).action == "wait"
    ratings.update({"v0001": (5, 0), None: (4, 1)})
    assert asyncio.run(trial.judge()).action == "promote"
    assert (versions.live, versions.canary) == ("v0001", None)
    [row] = asyncio.run(versions.listing())
    assert row["activated_by"] == "canary"
    assert row["activation_reason"].startswith("not worse than live: thumbs up 5 of 5 (live 4 of 5)")


def test_a_disliked_canary_is_rolled_back(running, ratings):
    versions, trial = running
    ratings.update({"v0001": (1, 9), None: (40, 5)})
    assert asyncio.run(trial.judge()).action == "roll_back"
    assert (versions.live, versions.canary) == ("base", None)
    [row] = asyncio.run(versions.listing())
    assert row["status"] == "rolled_back"
    assert "thumbs up 1 of 10 (live 40 of 45)" in row["reason"]


def test_a_slow_canary_is_rolled_back_even_while_control_is_away(running, ratings):
    versions, trial = running
    ratings.down = True
    serve(trial, "v0001", 5, 10)
    serve(trial, "base", 100)
    assert asyncio.run(trial.judge()).action == "roll_back"
    assert "within the SLO 5 of 15 requests (live 100 of 100)" in asyncio.run(versions.listing())[0]["reason"]


def test_without_ratings_nothing_is_promoted_while_they_cannot_be_read(make_trial, ratings):
    now = [0.0]
    versions, trial = make_trial(clock=lambda: now[0])
    publish(versions, make_trial.registry)
    now[0] = asyncio.run(versions.canary_since_s()) + 101
    ratings.down = True
    assert asyncio.run(trial.judge()).action == "wait"
    ratings.down = False
    assert asyncio.run(trial.judge()).action == "promote"


def test_a_trial_survives_a_restart_and_its_clock_goes_on(make_trial):
    versions, _ = make_trial()
    publish(versions, make_trial.registry)
    since_s = asyncio.run(versions.canary_since_s())
    again, trial = make_trial(clock=lambda: since_s + 101)
    assert trial.is_running
    assert asyncio.run(trial.judge()).action == "promote"
    assert again.live == "v0001"


def test_what_was_seen_of_one_canary_does_not_count_for_the_next(running, make_trial):
    versions, trial = running
    serve(trial, "v0001", 0, 50)
    serve(trial, "base", 50)
    asyncio.run(versions.roll_back_canary("v0001", "by hand"))
    asyncio.run(versions.publish(commit(make_trial.registry)))
    serve(trial, "v0001", 0, 50)  # a straggler
    assert (
        asyncio.run(trial.judge()).reason == "thumbs up 0 of 0 (live 0 of 0), within the SLO 0 of 0 (live 0 of 0)"
    )


def test_switching_the_canary_off_ends_the_trial_well(running, make_trial):
    versions, trial = make_trial(VersionsConfig())
    assert versions.canary == "v0001"
    assert asyncio.run(trial.judge()).action == "promote"
    assert versions.live == "v0001"


@pytest.mark.parametrize(
    ("ttft_s", "tbt_s", "good"), [(1.0, 0.1, True), (1.1, 0.0, False), (0.1, 0.11, False), (0.0, 0.0, True)]
)
def test_a_request_is_within_the_slo_if_both_targets_are_met(running, ttft_s, tbt_s, good):
    assert running[1].is_within_slo(ttft_s, tbt_s) is good


def test_an_answer_in_one_piece_is_measured_by_its_length(running):
    _, trial = running
    assert trial.is_within_slo_in_all(1.9, 10)
    assert not trial.is_within_slo_in_all(1.95, 10)
    assert not trial.is_within_slo_in_all(1.1, 0)


def test_the_keeper_follows_judges_and_prunes_until_cancelled(running, ratings, monkeypatch):
    versions, trial = running
    monkeypatch.setattr("deployments.publishing.canary.REFRESH_INTERVAL_S", 0.01)
    ratings.update({"v0001": (1, 9), None: (40, 5)})
    calls = []
    twice = asyncio.Event()

    async def retire_old():
        calls.append("retire_old")
        if len(calls) == 1:
            raise OSError("odd")  # it goes on
        twice.set()
        return []

    monkeypatch.setattr(versions, "retire_old", retire_old)

    async def run():
        task = asyncio.create_task(trial.run())
        await twice.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(asyncio.wait_for(run(), 10))
    assert versions.canary is None

"""Warming as the executor does it: what is observed, what is computed before the name moves, and what may go wrong."""

import asyncio
import time

import pytest

from alignment.versions.adapter_files import AdapterManifest
from alignment.versions.registry import AdapterRegistry
from core.alignment_config import VersionsConfig
from deployments.publishing.prefix_warmer import PrefixWarmer, StepPace
from deployments.publishing.versions import AdapterVersions, Published
from tests.support.fake_ports import FakeEngine, write_peft

SYSTEM = list(range(100, 112))
"""Three blocks of the fake engine."""


@pytest.fixture
def registry(tmp_path):
    return AdapterRegistry.open(tmp_path, "b")


def commit(registry):
    staging = registry.begin()
    write_peft(staging)
    return registry.commit(staging, AdapterManifest(base_model="b", status="published", reason="why"))


def attached(registry, **settings):
    engine, names = FakeEngine(), {}
    versions = AdapterVersions(engine, registry, "m", VersionsConfig(**settings))
    asyncio.run(versions.attach(names))
    return versions, engine, names


def ask(engine, name, system=SYSTEM, count=3):
    for number in range(count):
        engine.see_prompt(name, [*system, 900 + number, 1, 2, 3, 4, 5])


def generated(engine):
    return [name for call, name in engine.calls if call == "prefill"]


def warmer_of(engine, prompts, **settings):
    warmer = PrefixWarmer(engine, VersionsConfig(**settings))
    for prompt in prompts:
        warmer.observe(prompt)
    return warmer


def test_the_shared_prefix_is_computed_by_the_new_version_before_its_name_moves(registry):
    versions, engine, names = attached(registry)
    ask(engine, None)
    live_while_warming = []
    engine.answers = lambda handle: live_while_warming.append(names.get("m")) or [1]
    asyncio.run(versions.publish(commit(registry)))
    assert engine.calls[:3] == [("load_version", "m@v0001"), ("prefill", "m@v0001"), ("set_live", "v0001")]
    assert engine.prompts == [SYSTEM]
    assert live_while_warming == [None]
    assert names["m"][0] == "m@v0001"
    timing = versions.last_publish
    assert (timing.warmed_prefixes, timing.warmed_tokens, timing.warm_error) == (1, 12, None)
    assert timing.warm_s > 0


def test_only_what_the_live_name_is_asked_counts(registry):
    versions, engine, _ = attached(registry)
    ask(engine, "m@v0007")  # somebody compares an old version
    asyncio.run(versions.publish(commit(registry)))
    assert engine.prompts == []
    ask(engine, None)  # the base is not what `m` is any more
    asyncio.run(versions.publish(commit(registry)))
    assert engine.prompts == []
    ask(engine, "m@v0002")
    asyncio.run(versions.publish(commit(registry)))
    assert engine.prompts == [SYSTEM]
    assert generated(engine) == ["m@v0003"]


def test_a_canary_is_warmed_for_its_trial_and_its_traffic_counts(registry):
    versions, engine, _ = attached(registry, canary_share=0.1)
    ask(engine, None, count=2)
    assert asyncio.run(versions.publish(commit(registry))) is Published.CANARY
    assert generated(engine) == ["m@v0001"]
    ask(engine, "m@v0001", system=[5] * 12)
    assert asyncio.run(versions.promote_canary("v0001", "good"))
    assert engine.prompts[1:] == [[5] * 12, SYSTEM]


def test_another_executor_warms_for_its_own_traffic_before_it_follows(registry):
    ours, _, _ = attached(registry)
    theirs, engine, _ = attached(registry)
    ask(engine, None)
    asyncio.run(ours.publish(commit(registry)))
    asyncio.run(theirs.refresh())
    assert theirs.live == "v0001"
    assert engine.prompts == [SYSTEM]


def test_moves_by_hand_and_blocked_versions_are_not_warmed(registry):
    versions, engine, _ = attached(registry)
    other, others_engine, _ = attached(registry)
    for _ in range(2):
        asyncio.run(versions.publish(commit(registry)))
    asyncio.run(other.refresh())
    ask(engine, "m@v0002")
    ask(others_engine, "m@v0002")
    asyncio.run(versions.activate("v0001"))
    asyncio.run(other.refresh())
    ask(engine, "m@v0001")
    assert asyncio.run(versions.publish(commit(registry))) is Published.BLOCKED
    asyncio.run(versions.activate("base"))
    assert (engine.prompts, others_engine.prompts) == ([], [])
    assert versions.last_publish.warmed_tokens == 0


def test_a_canary_that_a_pin_holds_back_is_not_warmed(registry):
    versions, engine, _ = attached(registry, canary_share=0.1)
    asyncio.run(versions.activate("base", pin=True))
    ask(engine, None)
    assert asyncio.run(versions.publish(commit(registry))) is Published.BLOCKED
    assert engine.prompts == []


@pytest.mark.parametrize("failure", [RuntimeError("no seat"), ValueError("too long")])
def test_a_publish_survives_whatever_warming_runs_into(registry, failure):
    versions, engine, names = attached(registry)
    ask(engine, None)

    def refuse(handle):
        raise failure

    engine.answers = refuse
    assert asyncio.run(versions.publish(commit(registry))) is Published.LIVE
    assert names["m"][0] == "m@v0001"
    assert str(failure) in versions.last_publish.warm_error
    assert (versions.last_publish.warm_failures, versions.last_publish.warmed_tokens) == (1, 0)
    engine.answers = lambda handle: [1]
    ask(engine, "m@v0001")
    asyncio.run(versions.publish(commit(registry)))
    assert versions.last_publish.warm_error is None


def test_a_busy_engine_delays_a_publish_by_the_time_limit_only(registry):
    versions, engine, names = attached(registry, warm_timeout_s=0.1)
    ask(engine, None)
    answer = engine.prefill
    ended = []

    async def stuck_after_the_first(handle, prompt):
        try:
            num_cached = await answer(handle, prompt)
            if len(engine.prompts) > 1:
                await asyncio.sleep(60)
            return num_cached
        finally:
            ended.append(len(prompt))

    engine.prefill = stuck_after_the_first
    ask(engine, None, system=[5] * 8)
    started_s = time.perf_counter()
    asyncio.run(versions.publish(commit(registry)))
    assert time.perf_counter() - started_s < 5
    assert names["m"][0] == "m@v0001"
    assert ended == [12, 8]  # the second was cancelled, not left behind
    timing = versions.last_publish
    assert (timing.warmed_prefixes, timing.warmed_tokens) == (1, 12)
    assert timing.warm_error == "stopped after 0.1 s"


def test_long_prefixes_come_in_steps_and_common_beginnings_only_once():
    engine = FakeEngine()
    engine.prefix_block_tokens, engine.kv_cache_tokens = 100, 100_000
    head = list(range(700))
    warmer = warmer_of(engine, [[*head, *[tail] * 300, n] for tail in (1, 2) for n in range(3)])
    report = asyncio.run(warmer.warm(("m@v0001", 1, None)))
    # This engine answers at once, so each step is twice the one before. The second prefix begins like the first.
    assert [len(prompt) for prompt in engine.prompts] == [100, 300, 700, 1000, 1000]
    assert (report.warmed_prefixes, report.warmed_tokens) == (2, 1300)


def test_what_was_cached_already_does_not_stretch_the_steps():
    engine = FakeEngine()
    engine.prefix_block_tokens, engine.kv_cache_tokens = 100, 100_000
    warmer, handle = warmer_of(engine, [[*range(1000), n] for n in range(3)]), ("m@v0001", 1, None)
    asyncio.run(warmer.warm(handle))  # for its trial
    engine.prompts.clear()
    asyncio.run(warmer.warm(handle))  # before it goes live
    assert [len(prompt) for prompt in engine.prompts] == list(range(100, 1100, 100))


@pytest.mark.parametrize(("token_s", "expected"), [(0.0001, 192), (0.00005, 384), (0.01, 128)])
def test_steps_last_about_twenty_milliseconds_but_are_not_tiny(token_s, expected):
    pace = StepPace(block_tokens=32)
    for _ in range(6):
        pace.note(pace.num_tokens, pace.num_tokens * token_s)
    assert pace.num_tokens == expected
    pace.note(32, 1.0)  # the rest of a prefix says nothing
    assert pace.num_tokens == expected
    pace.note(pace.num_tokens, 5.0)  # it waited for users
    assert pace.num_tokens == 128


def test_warming_takes_a_quarter_of_the_cache_at_most():
    engine = FakeEngine()
    engine.kv_cache_tokens = 80
    warmer = warmer_of(engine, [[*[head] * 12, n] for head in range(5) for n in range(3)])
    report = asyncio.run(warmer.warm(("m@v0001", 1, None)))
    assert report.warmed_tokens == 20
    assert [len(prompt) for prompt in engine.prompts] == [12, 8]


@pytest.mark.parametrize(("block_tokens", "settings"), [(None, {}), (4, {"warm_prefixes": 0})])
def test_without_a_prefix_cache_or_when_switched_off_nothing_is_warmed(block_tokens, settings):
    engine = FakeEngine()
    engine.prefix_block_tokens = block_tokens
    report = asyncio.run(warmer_of(engine, [[1] * 20] * 5, **settings).warm(("m@v0001", 1, None)))
    assert (report.warmed_tokens, engine.prompts) == (0, [])

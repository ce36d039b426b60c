"""Pins, trials and retention as the executor sees them."""

import asyncio

import pytest

from alignment.versions import registry as on_disk
from alignment.versions.adapter_files import AdapterManifest
from alignment.versions.registry import AdapterRegistry
from core.alignment_config import VersionsConfig
from core.errors import AdapterError, UnknownVersionError
from deployments.publishing.versions import AdapterVersions, Published
from tests.support.fake_ports import FakeEngine, write_peft

CANARY = VersionsConfig(canary_share=0.1)


@pytest.fixture
def registry(tmp_path):
    return AdapterRegistry.open(tmp_path, "b")


def commit(registry, status="published", parent=None):
    staging = registry.begin()
    write_peft(staging)
    manifest = AdapterManifest(base_model="b", status=status, reason="why", parent=parent, pair_ids=("p",))
    return registry.commit(staging, manifest)


def attached(registry, config=None, engine=None):
    versions, names = AdapterVersions(engine or FakeEngine(), registry, "m", config), {}
    asyncio.run(versions.attach(names))
    return versions, names


def publish(versions, registry):
    return asyncio.run(versions.publish(commit(registry)))


def test_rolling_back_pins_until_released_across_restarts_and_executors(registry):
    versions, names = attached(registry)
    other, _ = attached(registry)
    assert publish(versions, registry) is Published.LIVE
    assert publish(versions, registry) is Published.LIVE
    asyncio.run(versions.activate("v0001", reason="it swore"))
    assert (versions.live, versions.pinned) == ("v0001", "v0001")
    assert publish(versions, registry) is Published.BLOCKED
    assert versions.live == "v0001"
    assert names["m"][0] == "m@v0001"
    assert names["m@v0003"][1] == 3  # by its own name it can be tried
    again, _ = attached(registry)
    assert (again.live, again.pinned) == ("v0001", "v0001")
    asyncio.run(other.refresh())
    assert (other.live, other.pinned) == ("v0001", "v0001")
    assert publish(other, registry) is Published.BLOCKED
    assert asyncio.run(other.release_pin())
    assert publish(versions, registry) is Published.LIVE
    assert versions.live == "v0005"
    assert versions.pinned is None


def test_the_base_is_pinned_too_and_going_forward_pins_nothing(registry):
    versions, names = attached(registry)
    publish(versions, registry)
    asyncio.run(versions.activate("base"))
    assert versions.pinned == "base"
    assert publish(versions, registry) is Published.BLOCKED
    assert "m" not in names
    asyncio.run(versions.activate("v0002"))
    assert versions.pinned is None
    asyncio.run(versions.activate("v0001", pin=False))
    assert versions.pinned is None
    asyncio.run(versions.activate("v0002", pin=True))
    assert versions.pinned == "v0002"


def test_a_rollback_to_a_loaded_version_is_a_pointer_move(registry):
    versions, _ = attached(registry)
    for _ in range(2):
        publish(versions, registry)
    asyncio.run(versions.activate("v0001"))
    assert versions.last_publish.to_wire()["move_s"] < 0.005


def test_a_refusing_disk_leaves_names_and_trainer_as_they_were(registry, monkeypatch):
    engine = FakeEngine()
    versions, names = attached(registry, engine=engine)
    publish(versions, registry)
    second = commit(registry)

    def full(*_, **__):
        raise AdapterError("disk full")

    monkeypatch.setattr(registry.serving, "activate", full)
    with pytest.raises(AdapterError, match="disk full"):
        asyncio.run(versions.publish(second))
    assert versions.live == "v0001"
    assert names["m"][0] == "m@v0001"
    assert engine.calls[-1] == ("set_live", "v0001")


def test_a_canary_is_not_live_until_promoted_and_training_goes_on_from_it(registry):
    versions, names = attached(registry, CANARY)
    assert publish(versions, registry) is Published.CANARY
    assert (versions.live, versions.canary, versions.training_base) == ("base", "v0001", "v0001")
    assert "m" not in names
    assert names["m@v0001"][1] == 1
    asyncio.run(versions.refresh())
    assert versions.training_base == "v0001"
    assert publish(versions, registry) is Published.BLOCKED  # one at a time
    assert asyncio.run(versions.promote_canary("v0001", "good"))
    asyncio.run(versions.refresh())
    assert (versions.live, versions.canary) == ("v0001", None)
    assert versions.training_base == "v0001"  # training goes on from where it is
    assert names["m"][0] == "m@v0001"
    assert not asyncio.run(versions.promote_canary("v0001", "again"))


def test_a_canary_that_fails_sends_training_back_to_live(registry):
    versions, _ = attached(registry, CANARY)
    other, _ = attached(registry, CANARY)
    publish(versions, registry)
    asyncio.run(other.refresh())
    assert (other.canary, other.training_base) == ("v0001", "v0001")
    assert asyncio.run(versions.roll_back_canary("v0001", "slow"))
    asyncio.run(versions.refresh())
    asyncio.run(other.refresh())
    assert versions.training_base == other.training_base == "base"
    [row] = asyncio.run(versions.listing())
    assert (row["status"], row["reason"], row["live"]) == ("rolled_back", "slow", False)
    assert attached(registry, CANARY)[0].canary is None


def test_another_executors_versions_appear_and_disappear(registry, monkeypatch):
    monkeypatch.setattr(on_disk, "REST_S", 0.0)
    config = VersionsConfig(keep=2)
    ours, _ = attached(registry, config)
    engine = FakeEngine()
    theirs, names = attached(registry, config, engine)
    for _ in range(3):
        publish(ours, registry)
    commit(registry, status="rejected")
    asyncio.run(theirs.refresh())
    assert set(names) == {"m", None, "m@v0001", "m@v0002", "m@v0003"}
    assert asyncio.run(ours.retire_old()) == ["v0001", "v0002"]
    asyncio.run(theirs.refresh())
    assert set(names) == {"m", None, "m@v0003"}
    assert ("unload_version", "m@v0001") in engine.calls
    assert [row["version"] for row in asyncio.run(theirs.listing())] == ["v0003", "v0004"]
    with pytest.raises(UnknownVersionError):
        asyncio.run(theirs.activate("v0001"))


def test_a_version_that_a_request_runs_on_is_kept(registry, monkeypatch):
    engine = FakeEngine()
    versions, names = attached(registry, VersionsConfig(keep=2), engine)
    for _ in range(4):
        publish(versions, registry)
    engine.in_use = {"m@v0001"}
    assert asyncio.run(versions.retire_old()) == []  # the others are retired, and rest
    assert set(names) == {"m", None, "m@v0001", "m@v0004"}
    monkeypatch.setattr(on_disk, "REST_S", 0.0)
    assert asyncio.run(versions.retire_old()) == ["v0002", "v0003"]
    publish(versions, registry)
    engine.in_use = set()
    assert asyncio.run(versions.retire_old()) == ["v0001"]


def test_a_name_stays_until_the_requests_that_asked_for_it_have_ended(registry, monkeypatch):
    monkeypatch.setattr(on_disk, "REST_S", 0.0)
    config, engine = VersionsConfig(keep=2), FakeEngine()
    ours, _ = attached(registry, config)
    theirs, names = attached(registry, config, engine)
    for _ in range(4):
        publish(ours, registry)
    asyncio.run(theirs.refresh())
    with theirs.kept("m@v0001"), theirs.kept("m@v0002"):
        with theirs.kept("m@v0001"):
            assert asyncio.run(ours.retire_old()) == ["v0001", "v0002"]
            asyncio.run(theirs.refresh())
        assert "m@v0001" in names  # what vLLM looks up when it has rendered the prompt
        assert not theirs.has_name("m@v0001")  # for others it is gone
        assert [card["id"] for card in theirs.cards()] == ["m", "m@base", "m@v0003", "m@v0004"]
    assert set(names) == {"m", None, "m@v0003", "m@v0004"}
    engine.in_use = {"m@v0001"}
    asyncio.run(theirs.refresh())
    assert [call for call in engine.calls if call[0] == "unload_version"] == [("unload_version", "m@v0002")]
    engine.in_use = set()
    asyncio.run(theirs.refresh())
    assert engine.calls[-1] == ("unload_version", "m@v0001")
    assert all(map(theirs.has_name, ("m", "m@base", "m@v0004")))


def test_a_version_that_somebody_asks_for_is_not_deleted(registry, monkeypatch):
    monkeypatch.setattr(on_disk, "REST_S", 0.0)
    versions, _ = attached(registry, VersionsConfig(keep=2))
    for _ in range(3):
        publish(versions, registry)
    with versions.kept("m@v0001"):
        assert asyncio.run(versions.retire_old()) == ["v0002"]


def test_one_version_in_full(registry):
    versions, _ = attached(registry)
    publish(versions, registry)
    detail = asyncio.run(versions.detail("v0001"))
    assert (detail["num_pairs"], detail["activated_by"], detail["live"]) == (1, "gate", True)
    assert [entry["event"] for entry in detail["activations"]] == ["activated"]
    with pytest.raises(UnknownVersionError):
        asyncio.run(versions.detail("v0002"))


def test_the_time_of_a_move_is_not_told_before_there_is_one(registry):
    versions, _ = attached(registry, config=CANARY)
    assert publish(versions, registry) is Published.CANARY
    assert "move_s" not in versions.last_publish.to_wire()
    asyncio.run(versions.promote_canary("v0001", "well"))
    assert 0.0 < versions.last_publish.to_wire()["move_s"] < 0.1

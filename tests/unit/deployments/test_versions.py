import asyncio

import pytest

from alignment.versions.adapter_files import AdapterManifest
from alignment.versions.registry import AdapterRegistry
from core.alignment_config import VersionsConfig
from core.errors import DamagedAdapterError, UnknownVersionError
from deployments.publishing.versions import AdapterVersions
from tests.support.fake_ports import FakeEngine, write_peft


@pytest.fixture
def registry(tmp_path):
    return AdapterRegistry.open(tmp_path, "b")


def commit(registry, status="published"):
    staging = registry.begin()
    write_peft(staging)
    return registry.commit(staging, AdapterManifest(base_model="b", status=status, reason="why"))


def attached(registry, engine=None):
    versions, names = AdapterVersions(engine or FakeEngine(), registry, "m"), {}
    asyncio.run(versions.attach(names))
    return versions, names


def test_without_versions_the_name_is_the_base(registry):
    versions, names = attached(registry)
    assert versions.live == "base"
    assert names == {}
    assert [card["id"] for card in versions.cards()] == ["m", "m@base"]


def test_publishing_moves_the_name_and_keeps_the_old_version_reachable(registry):
    versions, names = attached(registry)
    for _ in range(2):
        asyncio.run(versions.publish(commit(registry)))
    assert names["m"][:2] == ("m@v0002", 2)
    assert names["m@v0001"][:2] == ("m@v0001", 1)
    assert versions.cards()[0]["parent"] == "m@v0002"


def test_rolling_back_is_remembered(registry):
    versions, _ = attached(registry)
    for _ in range(2):
        asyncio.run(versions.publish(commit(registry)))
    asyncio.run(versions.activate("v0001"))
    assert attached(registry)[0].live == "v0001"
    asyncio.run(versions.activate("base"))
    again, names = attached(registry)
    assert again.live == "base"
    assert "m" not in names


def test_another_executor_follows_the_live_pointer(registry):
    ours, _ = attached(registry)
    theirs, names = attached(registry)
    asyncio.run(ours.publish(commit(registry)))
    asyncio.run(theirs.refresh())
    assert theirs.live == theirs.training_base == "v0001"
    assert theirs.live_adapter == "m@v0001"
    assert set(names) == {"m", "m@v0001", None}  # None: a request that names no model
    asyncio.run(ours.activate("base"))
    asyncio.run(theirs.refresh())
    assert theirs.live == "base"
    assert "m" not in names
    assert theirs.live_adapter is None


def test_a_change_by_another_executor_is_followed_even_if_this_one_changed_something_first(registry):
    ours, _ = attached(registry)
    theirs, names = attached(registry)
    asyncio.run(ours.publish(commit(registry)))
    asyncio.run(theirs.release_pin())  # reads the pointers, and moves no name
    assert theirs.live == "base"
    asyncio.run(theirs.refresh())
    assert theirs.live == "v0001"
    assert names["m"][0] == "m@v0001"


@pytest.mark.parametrize("name", ["v0009", "latest", "../v0001", ""])
def test_an_unknown_version_is_an_error_and_changes_nothing(registry, name):
    versions, names = attached(registry)
    asyncio.run(versions.publish(commit(registry)))
    with pytest.raises(UnknownVersionError):
        asyncio.run(versions.activate(name))
    assert names["m"][0] == "m@v0001"


def test_a_rejected_version_has_no_name_and_cannot_go_live(registry):
    rejected = commit(registry, status="rejected")
    versions, names = attached(registry)
    assert names == {}
    with pytest.raises(UnknownVersionError, match="rejected by the gate: why"):
        asyncio.run(versions.activate(rejected.name))


def test_a_version_that_the_engine_cannot_read_does_not_go_live(registry):
    engine = FakeEngine()
    versions, names = attached(registry, engine)
    asyncio.run(versions.publish(commit(registry)))
    second = commit(registry)

    async def refuse(directory):
        raise DamagedAdapterError("unreadable")

    engine.set_live = refuse
    with pytest.raises(DamagedAdapterError):
        asyncio.run(versions.publish(second))
    assert versions.live == "v0001"
    assert names["m"][0] == "m@v0001"


def test_a_damaged_live_version_gives_way_to_the_one_before(registry):
    versions, _ = attached(registry)
    for _ in range(2):
        asyncio.run(versions.publish(commit(registry)))
    (registry.root / "v0002" / "adapter_model.safetensors").unlink()
    again, names = attached(registry)
    assert again.live == "v0001"
    assert set(names) == {"m", "m@v0001", None}  # None: a request that names no model
    [row] = [row for row in asyncio.run(again.listing()) if row["version"] == "v0002"]
    assert row["status"] == "damaged"
    assert "adapter_model" in row["reason"]


def test_an_engine_that_came_back_gets_the_live_version_and_the_one_on_trial(registry):
    engine = FakeEngine()
    versions, names = AdapterVersions(engine, registry, "m", VersionsConfig(canary_share=0.5)), {}
    asyncio.run(versions.attach(names))
    asyncio.run(versions.reload())
    assert engine.calls[-1] == ("set_live", None)
    asyncio.run(versions.publish(commit(registry)))
    asyncio.run(versions.promote_canary("v0001", "good"))
    asyncio.run(versions.publish(commit(registry)))
    engine.calls.clear()
    asyncio.run(versions.reload())
    assert engine.calls == [("load_version", "m@v0001"), ("set_live", "v0001"), ("load_version", "m@v0002")]
    assert (versions.live, versions.canary, names["m"][0]) == ("v0001", "v0002", "m@v0001")

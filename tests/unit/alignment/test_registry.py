"""Adapter versions on disk: atomic, never renumbered, damage named."""

import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from alignment.versions import registry
from alignment.versions.registry import AdapterRegistry
from core.errors import AdapterError, DamagedAdapterError, UnknownVersionError
from tests.support.adapter_versions import MANIFEST, ROOT, commit, names, truncate, write_adapter


@pytest.fixture
def adapters(tmp_path):
    return AdapterRegistry.open(tmp_path / "adapters", base_model="tiny")


def test_versions_are_numbered_and_read_back_as_written(adapters):
    assert adapters.list() == ()
    first = commit(adapters)
    second = commit(adapters, parent=first.name)
    assert (first.name, second.name) == ("v0001", "v0002")
    assert adapters.get("v0002") == second
    assert second.manifest.parent == "v0001"
    assert second.manifest.pair_ids == ("pair-1",)
    assert names(AdapterRegistry.open(adapters.root, "tiny")) == ["v0001", "v0002"]
    assert sorted(path.name for path in adapters.root.iterdir()) == [".lock", "last", "v0001", "v0002"]


def test_the_live_pointer_moves_to_published_versions_and_back_to_the_base(adapters):
    assert adapters.live() is None
    commit(adapters)
    commit(adapters, status="rejected", reason="accuracy fell")
    adapters.serving.activate("v0001")
    assert adapters.live().name == "v0001"
    with pytest.raises(AdapterError, match="rejected"):
        adapters.serving.activate("v0002")
    with pytest.raises(UnknownVersionError):
        adapters.serving.activate("v0009")
    assert AdapterRegistry.open(adapters.root).live().name == "v0001"
    adapters.serving.activate(None)
    assert adapters.live() is None
    assert adapters.get("v0002").manifest.reason == "accuracy fell"


@pytest.mark.parametrize("name", ["v1", "v00001", "1", "", "../adapters/v0001", "v0001\n", "live", "v0002"])
def test_names_that_are_no_version_are_unknown(adapters, name):
    commit(adapters)
    with pytest.raises(UnknownVersionError):
        adapters.get(name)


def test_numbers_are_never_used_again_and_may_grow(adapters):
    commit(adapters)
    commit(adapters)
    for version in adapters.list():
        for path in version.path.iterdir():
            path.unlink()
        version.path.rmdir()
    assert commit(AdapterRegistry.open(adapters.root)).name == "v0003"
    (adapters.root / "v9999").mkdir()
    assert commit(adapters).name == "v10000"
    assert names(adapters) == ["v0003", "v10000"]
    assert set(adapters.damaged) == {"v9999"}


DAMAGE = {
    "no manifest": lambda d: (d / "manifest.json").unlink(),
    "bad manifest": lambda d: (d / "manifest.json").write_text("{"),
    "foreign key": lambda d: (d / "manifest.json").write_text('{"base_model": "tiny", "extra": 1}'),
    "other version": lambda d: (d / "manifest.json").write_text('{"base_model": "tiny", "version": "v0007"}'),
    "no config": lambda d: (d / "adapter_config.json").unlink(),
    "bad config": lambda d: (d / "adapter_config.json").write_text("[]"),
    "deep config": lambda d: (d / "adapter_config.json").write_text("[" * 100_000),
    "no weights": lambda d: (d / "adapter_model.safetensors").unlink(),
    "no bytes": lambda d: (d / "adapter_model.safetensors").write_bytes(b""),
    "short weights": lambda d: truncate(d / "adapter_model.safetensors"),
    "garbage": lambda d: (d / "adapter_model.safetensors").write_bytes(b"garbage!" * 9),
    "no tensors": lambda d: (d / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}"),
    "bad header": lambda d: (d / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 7) + b'{"a":1}'),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_version_is_named_and_skipped_and_the_live_one_recovers(adapters, damage):
    for _ in range(3):
        commit(adapters)
    adapters.serving.activate("v0002")
    damage(adapters.root / "v0002")
    with pytest.raises(DamagedAdapterError, match="v0002"):
        adapters.get("v0002")
    assert names(adapters) == ["v0001", "v0003"]
    assert list(adapters.damaged) == ["v0002"]
    with pytest.raises(DamagedAdapterError):
        adapters.live()
    assert adapters.recover_live().name == "v0001"
    assert adapters.live().name == "v0001"
    assert commit(adapters).name == "v0004"


def test_recovery_ends_at_the_base_model(adapters):
    commit(adapters)
    adapters.serving.activate("v0001")
    (adapters.root / "live").write_text("nonsense\n")
    assert adapters.recover_live().name == "v0001"
    DAMAGE["no weights"](adapters.root / "v0001")
    assert adapters.recover_live() is None
    assert adapters.live() is None


def test_an_incomplete_adapter_is_not_committed(adapters):
    temporary = adapters.begin()
    (temporary / "adapter_config.json").write_text("{}")
    with pytest.raises(DamagedAdapterError, match="safetensors"):
        adapters.commit(temporary, MANIFEST)
    adapters.abandon(temporary)
    adapters.abandon(temporary)
    assert list(adapters.root.iterdir()) == []


STEPS = ["write_atomically", "sync_tree", "sync"]


@pytest.mark.parametrize("step", STEPS)
def test_a_commit_interrupted_half_way_is_invisible_or_complete(adapters, monkeypatch, step):
    commit(adapters)
    real = getattr(registry, step)
    temporary = write_adapter(adapters.begin())
    for allowed in range(3):
        calls = []

        def fail(*args, calls=calls, allowed=allowed):
            calls.append(args)
            if len(calls) > allowed:
                raise OSError("No space left on device")
            return real(*args)

        monkeypatch.setattr(registry, step, fail)
        if temporary.exists():
            try:
                adapters.commit(temporary, MANIFEST)
            except AdapterError as error:
                assert "No space left" in str(error)  # noqa: PT017 - either end is legal, a wrong error is not
        for name in names(adapters):
            adapters.get(name)
        assert adapters.damaged == {}
        assert names(adapters)[0] == "v0001"


CRASH = """
import os, sys
from pathlib import Path
from alignment.versions import registry
from tests.support.adapter_versions import MANIFEST, write_adapter

adapters = registry.AdapterRegistry.open(Path(sys.argv[1]), "tiny")
temporary = write_adapter(adapters.begin())
real = Path.rename
Path.rename = lambda *args: (sys.argv[2] == "after" and real(*args), os._exit(9))
adapters.commit(temporary, MANIFEST)
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_process_that_dies_at_the_rename_leaves_all_or_nothing(adapters, when):
    commit(adapters)
    child = subprocess.run([sys.executable, "-c", CRASH, str(adapters.root), when], cwd=ROOT, check=False)
    assert child.returncode == 9
    assert names(adapters) == (["v0001", "v0002"] if when == "after" else ["v0001"])
    reopened = AdapterRegistry.open(adapters.root, "tiny")
    assert not list(adapters.root.glob(".tmp-*"))
    assert commit(reopened).name == "v0003"


def test_opening_removes_leftovers_but_not_the_work_of_a_living_process(adapters):
    at_work = adapters.begin()
    orphan = adapters.root / ".tmp-orphan"
    orphan.mkdir()
    AdapterRegistry.open(adapters.root)
    assert at_work.is_dir()
    assert not orphan.exists()
    assert adapters.commit(write_adapter(at_work), MANIFEST).name == "v0001"


def test_opening_removes_half_written_pointers(adapters):
    commit(adapters)
    partial = adapters.root / ".live.01234567.partial"
    partial.write_text("v00")
    AdapterRegistry.open(adapters.root)
    assert not partial.exists()


def test_commits_that_race_get_numbers_of_their_own(adapters):
    others = [adapters, AdapterRegistry.open(adapters.root, "tiny")]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda number: commit(others[number % 2]).name, range(12)))
    assert len(set(made)) == 12
    assert set(names(adapters)) == set(made)
    assert adapters.damaged == {}


def test_a_directory_that_cannot_be_used_is_a_named_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError):
        AdapterRegistry.open(tmp_path / "file")
    with pytest.raises(AdapterError):
        AdapterRegistry(tmp_path / "nowhere").begin()
    assert AdapterRegistry(tmp_path / "nowhere").list() == ()

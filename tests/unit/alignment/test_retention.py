"""Too many versions: which goes, and how."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.versions import registry
from alignment.versions.registry import AdapterRegistry, rested, versions_to_retire
from alignment.versions.serving_state import ServingState
from core.errors import UnknownVersionError
from tests.support.adapter_versions import ROOT, commit, names


def kept(*failed):
    """By name, oldest first: whether the version failed."""
    return {f"v{number + 1:04d}": bool(fails) for number, fails in enumerate(failed)}


def test_failed_versions_go_first_then_the_oldest_and_the_newest_never():
    versions = kept(0, 1, 0, 1, 0, 1)
    assert versions_to_retire(versions, 6) == []
    assert versions_to_retire(versions, 4) == ["v0002", "v0004"]
    assert versions_to_retire(versions, 2) == ["v0002", "v0004", "v0001", "v0003"]
    assert "v0006" not in versions_to_retire(versions, 0)
    assert versions_to_retire(versions, 4, retired=["v0002"]) == ["v0004"]
    assert versions_to_retire({}, 2) == []


@given(
    st.lists(st.booleans(), max_size=30),
    st.integers(2, 20),
    st.sets(st.integers(1, 30)),
    st.sets(st.integers(1, 30)),
)
def test_retention_keeps_its_promises(failed, keep, protected, retired):
    versions = kept(*failed)
    protected = {f"v{number:04d}" for number in protected}
    retired = {f"v{number:04d}" for number in retired} & versions.keys()
    going = versions_to_retire(versions, keep, retired=retired, protected=protected)
    staying = [name for name in versions if name not in retired]
    assert not set(going) & (protected | retired)
    assert len(going) == len(set(going)) <= max(0, len(staying) - keep)
    if len(going) < len(staying) - keep:  # it kept too many only because the rest may not go
        assert all(name in protected | set(going) or name == staying[-1] for name in staying)


@pytest.fixture
def adapters(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "REST_S", 0.0)
    return AdapterRegistry.open(tmp_path / "adapters", base_model="tiny")


def test_what_serves_or_is_in_use_stays_and_numbers_are_not_used_again(adapters):
    for number in range(1, 9):
        commit(adapters, parent=f"v{number - 1:04d}" if number > 1 else None)
    adapters.serving.activate("v0003", pin=True)
    adapters.retire_old(2, {"v0001"})
    assert names(adapters) == ["v0001", "v0002", "v0003", "v0008"]  # in use, parent of live, live, newest
    adapters.serving.activate("v0008")
    adapters.retire_old(2, set())
    assert names(adapters) == ["v0003", "v0008"]
    assert commit(adapters).name == "v0009"
    deleted = [entry.version for entry in adapters.serving.activations() if entry.event == "deleted"]
    assert deleted == ["v0004", "v0005", "v0006", "v0007", "v0001", "v0002"]
    assert not list(adapters.root.glob(".tmp-*"))
    with pytest.raises(UnknownVersionError):
        adapters.get("v0004")


def test_a_retired_version_stays_until_nobody_has_used_it_for_a_while(tmp_path):
    now = [1000.0]
    adapters = AdapterRegistry.open(tmp_path, base_model="tiny")
    serving = ServingState(tmp_path, adapters.get, clock=lambda: now[0])
    for _ in range(3):
        commit(adapters)
    serving.retire(["v0001", "v0002"])
    assert rested(serving.read().retired, 1029.0) == []
    now[0] = 1020.0
    serving.retire([], in_use=["v0001"])  # another executor still needs it
    assert rested(serving.read().retired, 1031.0) == ["v0002"]
    assert AdapterRegistry.open(tmp_path, "tiny").serving.read().retired == {"v0001": 1020.0, "v0002": 1000.0}


def test_a_retired_version_that_is_made_live_is_not_deleted(adapters):
    for _ in range(3):
        commit(adapters)
    adapters.serving.retire(["v0001"])
    adapters.serving.activate("v0001")
    assert adapters.serving.read().retired == {}  # nor will it be once it is not live any more
    assert not adapters.delete("v0001")
    assert not adapters.delete("v0002")  # not retired
    adapters.serving.retire(["v0001"])  # it serves
    assert adapters.serving.read().retired == {}
    assert names(adapters) == ["v0001", "v0002", "v0003"]


def test_damaged_versions_are_left_alone(adapters):
    for _ in range(4):
        commit(adapters)
    (adapters.root / "v0001" / "manifest.json").write_text('{"base_model": "big", "version": "v0001"}')
    adapters.retire_old(2, set())
    assert sorted(adapters.names()) == ["v0001", "v0003", "v0004"]


CRASH = """
import os, shutil, sys
from pathlib import Path
from alignment.versions.registry import AdapterRegistry

adapters = AdapterRegistry.open(Path(sys.argv[1]), "tiny")
adapters.serving.retire(["v0001"])
if sys.argv[2] == "rmtree":
    def half(path, **_):
        next(path.iterdir()).unlink()
        os._exit(9)
    shutil.rmtree = half
else:
    real = Path.rename
    Path.rename = lambda *args: (sys.argv[2] == "after" and real(*args), os._exit(9))
adapters.delete("v0001")
"""


@pytest.mark.parametrize("when", ["before", "after", "rmtree"])
def test_a_deletion_that_is_killed_leaves_the_version_whole_or_gone(adapters, when):
    commit(adapters)
    commit(adapters)
    command = [sys.executable, "-c", CRASH, str(adapters.root), when]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 9
    again = AdapterRegistry.open(adapters.root, "tiny")
    assert names(again) == (["v0001", "v0002"] if when == "before" else ["v0002"])
    assert again.damaged == {}
    assert not list(again.root.glob(".tmp-*"))
    again.retire_old(2, set())  # ends what was begun, if anything was left
    assert names(again) == ["v0002"]
    assert again.serving.read().retired == {}

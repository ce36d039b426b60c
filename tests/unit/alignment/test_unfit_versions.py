"""Versions of another base model: known by the model's content, listed with the reason, refused, and never lost."""

import pytest

from alignment.versions.lineage import lineage_row, lineage_rows
from alignment.versions.registry import AdapterRegistry
from core.errors import AdapterError, UnfitAdapterError
from tests.support.adapter_versions import commit, names

ONE, OTHER = "1-2-3-4", "0-2-3-0"


@pytest.fixture
def served(tmp_path):
    """A start of the server on one state directory: the registry that it opens, after the recovery of the pointer."""

    def start(fingerprint, name="model"):
        registry = AdapterRegistry.open(tmp_path / "adapters", name, fingerprint)
        registry.recover_live()
        return registry

    return start


def publish(registry, **changes):
    version = commit(registry, **{"base_model": "model", "fingerprint": registry.fingerprint, **changes})
    if version.manifest.status == "published":
        registry.serving.activate(version.name, by="gate")
    return version.name


def test_two_models_of_one_name_share_no_version(served):
    old = publish(served(ONE))
    other = served(OTHER)
    assert (names(other), other.live()) == ([], None)
    with pytest.raises(UnfitAdapterError, match=r"weights and chat template of 'model' differ"):
        other.get(old)
    [row] = lineage_rows(other)
    assert (row["version"], row["status"], row["live"]) == (old, "unfit", False)
    assert "weights and chat template" in row["reason"]
    for refused in (lambda: other.serving.activate(old, pin=True), lambda: lineage_row(other, old)):
        with pytest.raises(UnfitAdapterError):
            refused()
    assert other.serving.read().pinned is None
    assert publish(other) == "v0002"  # numbers are never used twice
    assert [row["status"] for row in lineage_rows(other)] == ["unfit", "published"]


def test_a_directory_with_another_name_is_the_same_model_if_its_content_is(served):
    name = publish(served(ONE))
    assert served(ONE, "moved").live().name == name


def test_who_goes_back_to_a_model_has_its_versions_again(served):
    first = served(ONE)
    publish(first)
    liked = publish(first)
    publish(first)
    first.serving.activate(liked, by="api")  # by hand, for the newest was worse
    assert served(OTHER).live() is None
    assert served(OTHER).live() is None  # twice started, and nothing learnt there
    assert served(ONE).live().name == liked
    of_other = publish(served(OTHER))
    assert served(ONE).live().name == liked
    assert served(OTHER).live().name == of_other


def test_a_base_that_was_chosen_stays(served):
    first = served(ONE)
    publish(first)
    first.serving.activate(None, by="api")
    assert served(OTHER).live() is None
    assert served(ONE).live() is None
    last = served(ONE).serving.activations()[-1]
    assert (last.by, last.version) == ("api", "base")


def test_a_pin_on_what_does_not_fit_is_released(served):
    first = served(ONE)
    publish(first)
    first.serving.activate("v0001", pin=True)
    other = served(OTHER)
    assert other.serving.read().pinned is None  # else the new model would never learn
    assert "differ" in other.serving.activations()[-1].reason


def test_retention_leaves_versions_of_another_model_alone(served):
    first = served(ONE)
    for _ in range(4):
        publish(first)
    other = served(OTHER)
    for _ in range(3):
        publish(other)
    retired, _ = other.retire_old(2, set())
    assert retired == ["v0005"]
    assert {path.name for path in other.root.iterdir()} >= {"v0001", "v0002", "v0003", "v0004"}


@pytest.mark.parametrize("of_manifest", ["", ONE])
@pytest.mark.parametrize("of_model", ["", ONE])
def test_without_one_of_the_fingerprints_the_name_counts(served, of_manifest, of_model):
    """Versions that an older MACE wrote stay usable; what is written next has a fingerprint."""
    name = publish(served(of_model), fingerprint=of_manifest)
    assert served(of_model).live().name == name
    if not (of_manifest and of_model):
        with pytest.raises(UnfitAdapterError, match=r"'model'.*'other'"):
            served(of_model, "other").get(name)


def test_a_rejected_version_of_another_model_is_unfit_too(served):
    name = publish(served(ONE), status="rejected")
    with pytest.raises(AdapterError):
        served(OTHER).serving.activate(name)
    assert [row["status"] for row in lineage_rows(served(OTHER))] == ["unfit"]

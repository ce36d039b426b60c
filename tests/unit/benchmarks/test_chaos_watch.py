import asyncio
import json
import struct

import httpx
import pytest

from alignment.versions.adapter_files import AdapterManifest
from alignment.versions.registry import AdapterRegistry
from benchmarks.studies.chaos.strike import count_lost_steps
from benchmarks.studies.chaos.watch import VersionWatch, Watch, read_checkpoint
from deployments.learning.training_progress import TrainingProgress


def safetensors(header, data=b"\0" * 8):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


TENSOR = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.fixture
def registry(tmp_path):
    return AdapterRegistry.open(tmp_path / "adapters", "model")


@pytest.fixture
def version(registry):
    directory = registry.begin()
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_bytes(safetensors(TENSOR))
    return registry.commit(directory, AdapterManifest(base_model="model"))


def test_a_whole_version_is_seen_and_one_in_the_making_is_not(registry, version):
    registry.begin()
    registry.serving.activate(version.name)
    watch = VersionWatch(registry.root)
    watch.look()
    assert (watch.seen, watch.half_written, watch.looks) == (["v0001"], {}, 1)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "manifest.json", "adapter_config.json"])
def test_a_version_that_misses_a_part_is_half_written(registry, version, name):
    content = (version.path / name).read_bytes()
    (version.path / name).write_bytes(content[:-2])
    watch = VersionWatch(registry.root)
    watch.look()
    assert list(watch.half_written) == ["v0001"]


def test_weights_that_change_after_they_were_visible_are_noticed(registry, version):
    watch = VersionWatch(registry.root)
    watch.look()
    (version.path / "adapter_model.safetensors").write_bytes(safetensors(TENSOR, b"\1" * 8))
    watch.look()
    assert "changed" in watch.half_written["v0001"]


def test_a_live_pointer_into_nothing_is_noticed(registry, version):
    (registry.root / "live").write_text("v0007\n")
    watch = VersionWatch(registry.root)
    watch.look()
    assert list(watch.half_written) == ["live -> v0007"]


def test_a_version_listed_as_damaged_is_half_written(tmp_path):
    watch = VersionWatch(tmp_path)
    rows = [
        {"version": "v0001", "status": "published"},
        {"version": "v0002", "status": "damaged", "reason": "torn"},
    ]
    watch.note_listing({"data": rows})
    assert list(watch.half_written) == ["v0002"]


def test_the_checkpoint_tells_its_steps(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    assert read_checkpoint(path) is None
    progress = TrainingProgress("v0002", total_steps=19, steps_since_candidate=3)
    mace = {"num_steps": 4, "progress": progress.to_wire()}
    path.write_bytes(safetensors({**TENSOR, "__metadata__": {"mace": json.dumps(mace)}}))
    assert read_checkpoint(path) == progress
    path.write_bytes(path.read_bytes()[:30])
    assert read_checkpoint(path) is None


def learning(started_at=1.0, steps=5, total=25, restored=20, since=5, live="v0001", decision=None):
    return {
        "started_at": started_at,
        "steps": steps,
        "total_steps": total,
        "restored_steps": restored,
        "steps_since_candidate": since,
        "live_version": live,
        "last_decision": decision,
    }


SAVED = TrainingProgress("v0001", total_steps=25, steps_since_candidate=5)


@pytest.mark.parametrize(
    ("first", "lost"),
    [
        (learning(), 0),  # the same process
        (learning(total=24), 1),  # whose engine died
        (learning(2.0, steps=1, total=26, restored=25, since=6), 0),
        (learning(2.0, steps=0, total=24, restored=24, since=4), 1),
        (learning(2.0, steps=0, total=20, restored=20, since=0), 5),
        (learning(2.0, steps=2, total=27, restored=25, since=2), 5),  # counts on, but began from the live version
        (learning(2.0, steps=2, total=27, restored=25, since=2, live="v0002"), 0),  # published when it died
        (learning(2.0, steps=4, total=29, restored=25, since=1, decision="accepted"), 0),
    ],
)
def test_lost_steps_are_those_done_before_and_not_gone_on_from(first, lost):
    assert count_lost_steps(learning(), SAVED, first) == lost


def test_a_step_that_only_the_checkpoint_knows_counts_as_done():
    first = learning(2.0, steps=0, total=24, restored=24, since=4)
    assert count_lost_steps(learning(total=24), SAVED, first) == 1
    assert count_lost_steps(None, None, first) is None


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        (httpx.Response(200, json={"enabled": False, "executor": {}}), None),  # no learner yet
        (httpx.Response(503), None),
        (httpx.Response(200, json={"executor": learning()}), learning()),
    ],
)
def test_a_poll_tells_the_status_of_a_learner_and_keeps_the_newest(tmp_path, reply, found):
    async def poll():
        async with httpx.AsyncClient(
            transport=httpx.MockTransport(lambda _: reply), base_url="http://x"
        ) as client:
            watch = Watch(client, tmp_path)
            watch.learning = learning(steps=1)
            return await watch.poll(), watch.learning

    assert asyncio.run(poll()) == (found, found or learning(steps=1))

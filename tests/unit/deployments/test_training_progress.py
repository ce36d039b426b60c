import json
import subprocess
import sys
from pathlib import Path

import pytest

from core.errors import AdapterError
from deployments.learning.training_progress import CheckpointSlot, TrainingProgress

ROOT = Path(__file__).parents[3]


def test_progress_survives_json():
    progress = TrainingProgress("v0003").after_step(["a", "b"]).after_step(["b", "c"])
    assert TrainingProgress.from_wire(json.loads(json.dumps(progress.to_wire()))) == progress
    assert (progress.total_steps, progress.steps_since_candidate) == (2, 2)
    assert progress.candidate_pairs == ("a", "b", "c")


def test_the_total_outlives_every_version():
    progress = TrainingProgress("v0003").after_step(["a"]).from_version("v0004").after_step(["b"])
    assert (progress.base, progress.total_steps, progress.steps_since_candidate) == ("v0004", 2, 1)
    assert progress.candidate_pairs == ("b",)


def test_replicas_on_one_state_directory_have_a_file_each(tmp_path):
    first, second = CheckpointSlot(tmp_path), CheckpointSlot(tmp_path)
    assert first.claim() == tmp_path / "checkpoint.safetensors"
    assert second.claim() == tmp_path / "checkpoint-1.safetensors"
    first.release()
    assert CheckpointSlot(tmp_path).claim() == tmp_path / "checkpoint.safetensors"


def test_a_replica_that_is_killed_gives_its_file_back(tmp_path):
    script = (
        "import sys, time; from pathlib import Path\n"
        "from deployments.learning.training_progress import CheckpointSlot\n"
        "slot = CheckpointSlot(Path(sys.argv[1])); print(slot.claim().name, flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert child.stdout.readline().strip() == b"checkpoint.safetensors"
        assert CheckpointSlot(tmp_path).claim().name == "checkpoint-1.safetensors"
    finally:
        child.kill()
        child.wait()
    assert CheckpointSlot(tmp_path).claim().name == "checkpoint.safetensors"


def test_a_directory_that_cannot_be_made_is_a_named_error(tmp_path):
    (tmp_path / "training").write_text("a file")
    with pytest.raises(AdapterError, match="no checkpoint can be kept"):
        CheckpointSlot(tmp_path / "training").claim()

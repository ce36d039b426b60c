import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from core.errors import AdapterError
from deployments.learning.training_progress import TrainingProgress, claim_checkpoint

ROOT = Path(__file__).parents[3]
ONE, OTHER = "1-2-3-4", "0-2-3-4"


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
    (first, lock), (second, _) = claim_checkpoint(tmp_path, ONE), claim_checkpoint(tmp_path, ONE)
    home = tmp_path / ONE
    assert (first, second) == (home / "checkpoint.safetensors", home / "checkpoint-1.safetensors")
    os.close(lock)
    assert claim_checkpoint(tmp_path, ONE)[0] == home / "checkpoint.safetensors"


def test_a_replica_that_is_killed_gives_its_file_back(tmp_path):
    script = (
        "import sys, time; from pathlib import Path\n"
        "from deployments.learning.training_progress import claim_checkpoint\n"
        "path, lock = claim_checkpoint(Path(sys.argv[1]), '1-2-3-4'); print(path.name, flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert child.stdout.readline().strip() == b"checkpoint.safetensors"
        assert claim_checkpoint(tmp_path, ONE)[0].name == "checkpoint-1.safetensors"
    finally:
        child.kill()
        child.wait()
    assert claim_checkpoint(tmp_path, ONE)[0].name == "checkpoint.safetensors"


def test_a_directory_that_cannot_be_made_is_a_named_error(tmp_path):
    (tmp_path / "training").write_text("a file")
    with pytest.raises(AdapterError, match="no checkpoint can be kept"):
        claim_checkpoint(tmp_path / "training", ONE)


def test_one_model_never_writes_over_anothers_checkpoint(tmp_path):
    paths = []
    for fingerprint in (ONE, OTHER, ONE):
        path, lock = claim_checkpoint(tmp_path, fingerprint)
        os.close(lock)
        paths.append(path)
    assert paths[0] == paths[2] != paths[1]


def test_a_checkpoint_of_an_older_release_goes_to_the_first_model(tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"older")
    path, _ = claim_checkpoint(tmp_path, ONE)
    assert path.read_bytes() == b"older"
    (tmp_path / "checkpoint.safetensors").write_bytes(b"an older release ran once more")
    assert not claim_checkpoint(tmp_path, OTHER)[0].exists()
    assert path.read_bytes() == b"older"

"""Adapter versions on disk, as small as the registry takes them."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from alignment.versions.adapter_files import AdapterManifest

ROOT = Path(__file__).parents[2]
"""Of the repository: processes that tests start find our packages there."""
MANIFEST = AdapterManifest(base_model="tiny", pair_ids=("pair-1",), optimizer_steps=8, metrics={"accuracy": 0.9})


def write_adapter(directory):
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    save_file({"lora_A": np.ones((2, 3), np.float32)}, directory / "adapter_model.safetensors")
    return directory


def commit(adapters, **changes):
    return adapters.commit(write_adapter(adapters.begin()), MANIFEST.model_copy(update=changes))


def names(adapters):
    return [version.name for version in adapters.list()]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])

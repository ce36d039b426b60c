"""A model is known by its content: names and files' layout do not matter, every kind of replacement does."""

import json
import shutil
import struct
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from core.fingerprint import PARTS, differing_parts
from engine.fingerprint import fingerprint

CONFIG = {"model_type": "llama", "hidden_size": 64, "transformers_version": "5.0", "_name_or_path": "/home/me/m"}


@pytest.fixture
def model(tmp_path):
    """A model in a directory called `model`, with a tensor long enough to be sampled."""
    directory = tmp_path / "one" / "model"
    directory.mkdir(parents=True)
    numbers = np.random.default_rng(0)
    tensors = {name: numbers.standard_normal((64, 512)).astype(np.float32) for name in ("b", "a", "c")}
    save_file(tensors, directory / "model.safetensors")
    write(directory / "config.json", CONFIG)
    write(directory / "generation_config.json", {"eos_token_id": [2], "temperature": 0.7})
    write(directory / "tokenizer.json", {"model": {"vocab": {"a": 0}}})
    write(directory / "tokenizer_config.json", {"chat_template": "{{ messages }}", "eos_token": "</s>"})
    return directory


def write(path, value):
    path.write_text(json.dumps(value))


def change(path, **values):
    write(path, {**json.loads(path.read_text()), **values})


def copy_of(model, tmp_path):
    return shutil.copytree(model, tmp_path / "two" / "model")


def replace_weights(directory):
    tensors = load_file(directory / "model.safetensors")
    save_file({**tensors, "c": tensors["c"] * 1.01}, directory / "model.safetensors")


def change_shape(directory):
    tensors = load_file(directory / "model.safetensors")
    save_file({**tensors, "c": tensors["c"].reshape(512, 64)}, directory / "model.safetensors")


CHANGES = {
    "weights": replace_weights,
    "weights, by shape": change_shape,
    "weights, by number": lambda d: save_file({"a": np.zeros(1, np.float32)}, d / "more.safetensors"),
    "config": lambda d: change(d / "config.json", rope_theta=5e5),
    "config, by the end token": lambda d: change(d / "generation_config.json", eos_token_id=[3]),
    "config, by code": lambda d: (d / "modeling_x.py").write_text("1"),
    "tokenizer": lambda d: write(d / "tokenizer.json", {"model": {"vocab": {"b": 0}}}),
    "tokenizer, by settings": lambda d: change(d / "tokenizer_config.json", add_bos_token=True),
    "tokenizer, by another file": lambda d: (d / "tokenizer.model").write_bytes(b"spm"),
    "chat template": lambda d: change(d / "tokenizer_config.json", chat_template="{{ messages }}!"),
    "chat template, by a file": lambda d: (d / "chat_template.jinja").write_text("{{ messages }}!"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_directory_of_the_same_name_whose_content_was_replaced_is_another_model(model, tmp_path, name):
    other = copy_of(model, tmp_path)
    assert fingerprint(other) == fingerprint(model)
    CHANGES[name](other)
    assert differing_parts(fingerprint(model), fingerprint(other)) == name.partition(",")[0]


def save_in_shards(directory):
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    for name, tensor in tensors.items():
        save_file({name: tensor}, directory / f"shard-{name}.safetensors", metadata={"format": "pt"})


SAME = {
    "another directory": lambda d: None,
    "shards": save_in_shards,
    "saved again by another release": lambda d: change(
        d / "config.json", transformers_version="5.1", _name_or_path="elsewhere"
    ),
    "keys in another order": lambda d: write(d / "config.json", dict(reversed(CONFIG.items()))),
    "another temperature": lambda d: change(d / "generation_config.json", temperature=0.1),
    "the same template in a file of its own": lambda d: (d / "chat_template.jinja").write_text("{{ messages }}"),
    "a page about it": lambda d: (d / "README.md").write_text("hello"),
    "a format that is not read beside safetensors": lambda d: (d / "pytorch_model.bin").write_bytes(b"x"),
}


@pytest.mark.parametrize("name", SAME)
def test_what_makes_no_other_model_leaves_the_fingerprint(model, tmp_path, name):
    other = copy_of(model, tmp_path)
    SAME[name](other)
    assert fingerprint(other) == fingerprint(model)


def test_two_revisions_of_one_hub_id_are_two_models(model, tmp_path, monkeypatch):
    """In the hub's cache a revision is a folder of links into a heap of blobs."""
    from core.config import ModelConfig
    from engine.model_source import base_model_name, resolve_model

    other = copy_of(model, tmp_path)
    replace_weights(other)
    repository = tmp_path / "hub" / "models--acme--tiny"
    blobs = repository / "blobs"
    blobs.mkdir(parents=True)
    (repository / "refs").mkdir()
    for revision, source in (("1" * 40, model), ("2" * 40, other)):
        snapshot = repository / "snapshots" / revision
        snapshot.mkdir(parents=True)
        for file in source.iterdir():
            shutil.copy(file, blobs / f"{revision}-{file.name}")
            (snapshot / file.name).symlink_to(blobs / f"{revision}-{file.name}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config, found = ModelConfig(model_source="acme/tiny"), []
    for revision in ("1" * 40, "2" * 40):
        (repository / "refs" / "main").write_text(revision)
        directory = resolve_model(config, tmp_path)
        assert (directory.name, base_model_name(config, directory)) == (revision, "acme/tiny")
        found.append(fingerprint(directory))
    assert found == [fingerprint(model), fingerprint(other)]
    assert differing_parts(*found) == "weights"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf"])
def test_other_weight_formats_are_known_by_size_and_sampled_content(model, name):
    (model / "model.safetensors").unlink()
    without = fingerprint(model)
    content = bytearray(np.random.default_rng(1).bytes(3_000_000))
    (model / name).write_bytes(content)
    whole = fingerprint(model)
    content[-1] ^= 1
    (model / name).write_bytes(content)
    changed = fingerprint(model)
    (model / name).write_bytes(content + b"\0")
    assert len({without, whole, changed, fingerprint(model)}) == 4


@pytest.mark.parametrize("content", [b"", b"\1", struct.pack("<Q", 1 << 60), struct.pack("<Q", 4) + b"[1,2"])
def test_a_file_that_is_no_safetensors_is_known_by_its_bytes(model, content):
    before = fingerprint(model)
    (model / "model.safetensors").write_bytes(content)
    assert differing_parts(before, fingerprint(model)) == "weights"


def test_a_model_without_any_file_has_a_fingerprint(tmp_path):
    assert len(fingerprint(tmp_path).split("-")) == len(PARTS)


@pytest.mark.parametrize("num_tensors", [300, 20_000])
def test_sixteen_gigabytes_take_a_fraction_of_a_second(tmp_path, num_tensors):
    """Sparse files: four shards with the tensors of a model of 8 billion parameters, or as many as experts make."""
    total, shards = 16 << 30, 4
    size = total // num_tensors
    for shard in range(shards):
        names = range(shard, num_tensors, shards)
        header = json.dumps(
            {
                f"layer.{name}": {"dtype": "U8", "shape": [size], "data_offsets": [size * i, size * (i + 1)]}
                for i, name in enumerate(names)
            }
        ).encode()
        with (tmp_path / f"model-{shard}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + size * len(names))
    started_s = time.process_time()
    first = fingerprint(tmp_path)
    assert time.process_time() - started_s < 2
    with (tmp_path / "model-3.safetensors").open("r+b") as file:
        file.seek(-size // 2, 2)
        file.write(b"\1")
    assert differing_parts(first, fingerprint(tmp_path)) == "weights"


def test_differences_are_told_in_words():
    assert differing_parts("1-2-3-4", "1-2-3-4") == ""
    assert differing_parts("1-2-3-4", "0-2-3-0") == "weights and chat template"
    assert differing_parts("1-2-3-4", "0-2-0-0") == "weights, tokenizer and chat template"

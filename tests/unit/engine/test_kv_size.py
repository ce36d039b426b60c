"""Bytes of the KV cache on CPU where the settings give none."""

import json
from types import SimpleNamespace

import psutil
import pytest

from core.config import AppArgs
from engine.vllm.compat import cpu_kv_bytes, make_engine_args

GIB = 1 << 30
TOKEN_BYTES = 2 * 3 * 3 * 64 * 2
CONFIG = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
}


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=32 * GIB))


@pytest.fixture
def model_dir(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def sized(model_dir, model=None, **engine):
    model = {"model_source": "m", **(model or {})}
    return cpu_kv_bytes(AppArgs.model_validate({"engine": engine, "model": model}), model_dir)


def test_every_seat_has_room_for_the_longest_request_and_half_as_much_is_for_prefixes(model_dir):
    assert sized(model_dir, max_num_seqs=32) == 1.5 * 32 * (2048 + 128) * TOKEN_BYTES
    assert sized(model_dir, {"max_model_len": 1000}, max_num_seqs=2) == 1.5 * 2 * (1024 + 128) * TOKEN_BYTES
    assert sized(model_dir, {"dtype": "float32"}, max_num_seqs=32) == 2 * sized(model_dir, max_num_seqs=32)


def test_what_the_engine_gets_by_name_decides(model_dir):
    kwargs = {"max_num_seqs": 2, "max_model_len": 96, "block_size": 32, "dtype": "float32"}
    assert sized(model_dir, engine_kwargs=kwargs) == 1.5 * 2 * 128 * 2 * TOKEN_BYTES


def test_a_quantized_cache_is_half_as_large(model_dir):
    quantized = {"kv_cache_dtype": "fp8"}
    assert 2 * sized(model_dir, engine_kwargs=quantized) == sized(model_dir)


def test_a_large_model_gets_a_tenth_of_the_memory(model_dir):
    (model_dir / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 300}))
    assert sized(model_dir) == int(0.1 * 32 * GIB)


@pytest.mark.parametrize("config", ["", "[]", json.dumps({"text_config": CONFIG})])
def test_a_model_that_does_not_give_its_sizes_gets_a_tenth_of_the_memory(model_dir, config):
    (model_dir / "config.json").write_text(config)
    assert sized(model_dir) == int(0.1 * 32 * GIB)


def test_a_given_size_stands(model_dir):
    assert sized(model_dir, kv_cache_memory_bytes=GIB) == GIB


def test_the_engine_is_told(tiny_assistant):
    args = AppArgs(engine={"max_num_seqs": 32})
    told = make_engine_args(args, str(tiny_assistant)).kv_cache_memory_bytes
    assert told == 1.5 * 32 * (2048 + 128) * 2 * TOKEN_BYTES

"""The predicted memory of a step against what `engine.training.dpo.DpoStep` really holds and autograd really keeps."""

from pathlib import Path

import pytest
import torch

from core import dpo_slices
from core.errors import ConfigError
from core.model_dims import ModelDims
from scheduler.memory.arena import ArenaModel, ArenaNeed
from tests.support.trainable_models import make_task, make_training, save_model, start

HELD_FACTOR = 1.5
TRANSIENT_FACTOR = 2.0
CONFIG = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
}


def need_of(model, rank):
    return ArenaNeed(ModelDims.of(model.hf_config.to_dict(), dtype_bytes=4), rank, head_chunk_tokens=7)


@pytest.fixture(autouse=True)
def _small_head_chunks(monkeypatch) -> None:
    monkeypatch.setattr(dpo_slices, "HEAD_CHUNK_TOKENS", 7)


@pytest.fixture(scope="module", params=["gemma3_text", "llama", "phi3", "qwen3", "qwen3_moe"])
def saved(request, tmp_path_factory) -> str:
    directory: Path = tmp_path_factory.mktemp(request.param)
    return save_model(directory, request.param)


def measure(step):
    """Padded tokens of the largest micro-batch, and the most that is held after any slice."""
    tokens, peak = 0, 0
    while step.next_slice is not None:
        if step.next_slice.kind == "policy_layer":
            tokens = max(tokens, step.next_slice.num_tokens)
        step.run_slice()
        peak = max(peak, step.activation_bytes)
    return tokens, peak


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize(("num_pairs", "slice_tokens"), [(1, 1024), (8, 40), (8, 1024), (32, 1024)])
def test_what_a_step_holds_is_at_most_the_prediction_and_not_far_below(saved, rank, num_pairs, slice_tokens):
    config = make_training(max_slice_tokens=slice_tokens)
    model, shadow, step = start(saved, make_task(num_pairs), config, rank=rank)
    need = need_of(model, rank)
    assert need.num_lora_parameters == sum(t.numel() for t in shadow.tensors().values())
    tokens, peak = measure(step)
    assert peak <= need.activation_bytes(tokens) <= HELD_FACTOR * peak


@pytest.mark.parametrize("num_tokens", [16, 48])
def test_what_autograd_keeps_of_a_layer_is_near_the_prediction(saved, num_tokens):
    model, _, _ = start(saved, make_task(1))
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.inference_mode(False), torch.enable_grad():
        hidden = torch.randn(2, num_tokens // 2, model.hf_config.hidden_size, requires_grad=True)
        rotary = model.rotary(1, num_tokens // 2)
        weights = {p.untyped_storage().data_ptr() for p in model.causal_lm.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model.run_layer(1, hidden, rotary)
    weights |= {tensor.untyped_storage().data_ptr() for tensor in rotary}
    measured = sum(size for pointer, size in kept.items() if pointer not in weights)
    predicted = num_tokens * need_of(model, 4).layer_bytes_per_token
    assert output.requires_grad
    assert predicted / TRANSIENT_FACTOR <= measured <= TRANSIENT_FACTOR * predicted


def test_a_head_wider_than_a_layer_decides_what_a_slice_needs():
    small = CONFIG | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 64, "num_attention_heads": 1}
    need = ArenaNeed(ModelDims.of(small, dtype_bytes=2), lora_rank=16, head_chunk_tokens=128)
    assert need.transient_bytes(64) == 64 * (8192 * 6 + 12 * 64)  # a block of logits twice, three fp32 rows
    assert need.transient_bytes(256) == 128 * (8192 * 6 + 12 * 64)
    assert need.transient_bytes(10_000) == 10_000 * need.layer_bytes_per_token


def test_a_config_without_a_size_is_refused():
    with pytest.raises(ConfigError, match="intermediate_size"):
        ModelDims.of({k: v for k, v in CONFIG.items() if k != "intermediate_size"}, dtype_bytes=2)


NEED = ArenaNeed(ModelDims.of(CONFIG, dtype_bytes=2), lora_rank=16, head_chunk_tokens=128)


def test_without_a_profile_the_dimensions_are_what_is_predicted_from():
    assert ArenaModel(need=NEED).predict(512) == NEED.activation_bytes(512) + NEED.transient_bytes(512)
    assert ArenaModel(100.0, 7.0, NEED).predict(512) == 100 + 7 * 512 + NEED.transient_bytes(512)


def test_a_measured_size_corrects_the_others_by_its_ratio():
    arena = ArenaModel(need=NEED)
    arena.observe(512, 0.8 * NEED.activation_bytes(512))
    for tokens in (64, 512, 1024):
        held = arena.predict(tokens) - NEED.transient_bytes(tokens)
        assert held == pytest.approx(0.8 * NEED.activation_bytes(tokens), rel=1e-6)


def test_slices_that_were_not_measured_correct_nothing():
    arena = ArenaModel(need=NEED)
    arena.observe(512, 0)
    assert arena.predict(512) == ArenaModel(need=NEED).predict(512)

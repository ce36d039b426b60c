"""A plan of a GPU's memory: what it computes is what is really made, and the changes that it names do help."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from core.config import AppArgs
from core.dpo_slices import HEAD_CHUNK_TOKENS
from core.model_dims import ModelDims
from engine.training.shadow import ShadowAdapter
from scheduler.memory.arena import ArenaNeed
from scheduler.memory.ledger import ARENA_SHARE
from scheduler.memory.plan import CONTEXT_BYTES, MemoryPlan
from tests.support.trainable_models import CONFIGS, build, make_config, make_training, save_model

GIB = 1 << 30
QWEN_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
}


def plan(memory_gib, dims=None, slot_rank=16, **settings):
    settings.setdefault("model", {"max_model_len": 16384})
    dims = dims or ModelDims.of(QWEN_7B, dtype_bytes=2)
    return MemoryPlan(AppArgs.model_validate(settings), dims, int(memory_gib * GIB), slot_rank)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("is_tied", [True, False])
def test_weights_are_those_of_the_model(kind, is_tied):
    """At a width where biases and the norms of heads are as few as in real models."""
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128, "num_attention_heads": 8}
    config = make_config(kind, tie_word_embeddings=is_tied, vocab_size=4096, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    made = sum(parameter.numel() for parameter in model.parameters())
    assert ModelDims.of(config.to_dict(), dtype_bytes=2).num_weights == pytest.approx(made, rel=2e-3)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_trainers_state_is_what_the_trainer_makes(tmp_path, kind):
    model = build(save_model(tmp_path, kind), rank=8)
    made = sum(ShadowAdapter(model, make_training()).memory().values())
    planned = plan(24, ModelDims.of(model.hf_config.to_dict(), dtype_bytes=4), lora={"rank": 8}).trainer_bytes
    assert made - planned == 3 * 4  # the optimizer's count of steps, in the state and its two copies


@pytest.mark.parametrize("kind", ["optimizer", "checkpoint"])
def test_the_plan_knows_what_the_cpu_holds(tmp_path, kind):
    model, cpu = build(save_model(tmp_path, "qwen2"), rank=8), torch.device("cpu")
    places = {"optimizer_device": cpu} if kind == "optimizer" else {"copies_device": cpu}
    made = sum(ShadowAdapter(model, make_training(), **places).memory().values())
    dims = ModelDims.of(model.hf_config.to_dict(), dtype_bytes=4)
    planned = plan(24, dims, lora={"rank": 8}, offload={kind: "always"}).trainer_bytes
    assert made - planned == (0 if kind == "optimizer" else 4)  # the count of steps


def test_all_parts_add_up_to_the_memory():
    for settings in ({}, {"kv_pruning": {"start": "always"}}, {"engine": {"kv_cache_memory_bytes": 2 * GIB}}):
        assert sum(plan(80, **settings).parts().values()) == 80 * GIB


def test_the_share_of_vllm_holds_all_but_the_arena():
    """As vLLM does it: the KV cache is what is left of its share; what it does not ask for is the arena's."""
    subject = plan(80, engine={"gpu_memory_utilization": 0.75})
    inside = ("weights", "lora_slots", "trainer_state", "activations", "cuda_graphs", "kv_cache")
    assert sum(subject.parts()[name] for name in inside) == 60 * GIB
    assert subject.arena_bytes == ARENA_SHARE * (20 * GIB - CONTEXT_BYTES)


def test_statistics_of_pruning_are_a_sixteenth_of_a_bf16_cache():
    subject = plan(80, kv_pruning={"start": "always"})
    assert subject.statistics_bytes == pytest.approx(subject.kv_bytes / 16, rel=1e-6)
    assert subject.kv_bytes + subject.statistics_bytes == pytest.approx(plan(80).kv_bytes, rel=1e-6)


def test_seven_billion_parameters_at_0_7_do_not_fit_into_24_gib_and_it_says_what_does():
    subject = plan(24, engine={"gpu_memory_utilization": 0.7})
    (problem,) = subject.problems()
    assert "one sequence of 16384 tokens takes 0.88 GiB" in problem
    assert subject.changes()[0].startswith("engine.gpu_memory_utilization: 0.8")


def apply(settings, change):
    """Settings after a line of `changes`."""
    for one in change.split(", "):
        name, _, value = one.partition(": ")
        section, _, setting = name.partition(".")
        settings = {
            **settings,
            section: {**settings.get(section, {}), setting: {"False": False}.get(value, value)},
        }
    return settings


@pytest.mark.parametrize(
    ("memory_gib", "settings"),
    [
        (24, {"engine": {"gpu_memory_utilization": 0.7}}),
        (24, {"engine": {"gpu_memory_utilization": 0.97}}),
        (24, {"engine": {"gpu_memory_utilization": 0.8}, "model": {"max_model_len": 131072}}),
        (24, {"engine": {"kv_cache_memory_bytes": 6 * GIB}}),
        (22, {"training": {"max_slice_tokens": 16384, "max_length_tokens": 8192}}),
        (26, {"lora": {"rank": 64, "max_loaded": 16}}),
    ],
)
def test_every_change_that_is_named_makes_it_fit(memory_gib, settings):
    settings = {"model": {"max_model_len": 16384}, **settings}
    slot_rank = settings.get("lora", {}).get("rank", 16)
    subject = plan(memory_gib, slot_rank=slot_rank, **settings)
    changes = subject.changes()
    assert subject.problems()
    assert changes
    for change in changes:
        changed = apply(settings, change)
        assert plan(memory_gib, slot_rank=int(changed.get("lora", {}).get("rank", 16)), **changed).problems() == []


def test_where_nothing_helps_the_memory_that_would_is_named():
    subject = plan(12)
    assert subject.changes() == []
    least = subject.least_memory_bytes() / GIB
    assert 16 < least < 24
    assert plan(least, engine={"gpu_memory_utilization": 0.1}).changes()
    assert not any(change.startswith("engine.gpu") for change in plan(least - 0.5).changes())


def test_an_arena_has_to_hold_the_longest_pair_alone():
    training = {"max_prompt_tokens": 1024, "max_length_tokens": 4096, "max_slice_tokens": 256}
    need = ArenaNeed(ModelDims.of(QWEN_7B, dtype_bytes=2), 16, HEAD_CHUNK_TOKENS)
    subject = plan(80, training=training)
    assert subject.least_arena_bytes == need.activation_bytes(2 * 4095) + need.transient_bytes(2 * 4095)
    assert plan(80, training={**training, "enabled": False}).least_arena_bytes == 0
    assert subject.problems() == []
    assert (
        "the arena would have 0.50 GiB" in plan(80, training={**training, "arena_bytes": GIB // 2}).problems()[0]
    )


def test_what_engine_kwargs_say_wins():
    kwargs = {"max_model_len": 2048, "gpu_memory_utilization": 0.5, "enforce_eager": True}
    subject = plan(80, engine={"engine_kwargs": kwargs})
    assert subject.longest_tokens == 2048
    assert subject.graphs_bytes == 0
    assert subject.left_bytes > 39 * GIB

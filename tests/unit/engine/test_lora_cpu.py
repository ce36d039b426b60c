"""LoRA by version against vLLM's LoRA by token and against the definition, on vLLM's layers and over mixed batches."""

import pytest
import torch
from vllm.config import LoRAConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.lora.layers import (
    LoRAMapping,
    MergedColumnParallelLinearWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    RowParallelLinearWithLoRA,
)
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear

from engine.vllm.lora_cpu import GroupedLora

SLOTS = 4
LORA_IDS = [11, None, 13, 14]
"""Of the slots. vLLM gives rows without an adapter what the last one holds, so it is left empty where both compare."""
INPUTS = 48
RANK = 16

BATCHES = {
    "base": [0] * 7,
    "one version": [13] * 7,
    "one token": [11],
    "many of one version": [13] * 40,
    "in a row": [11, 11, 11, 13, 13],
    "base first": [0, 0, 13, 13, 13, 13],
    "alternating": [11, 13, 11, 13, 11],
    "all kinds": [13, 0, 11, 11, 0, 13, 0, 11] * 5,
}

LAYERS = {
    "q, k, v": (lambda: QKVParallelLinear(INPUTS, 16, 4, 2, bias=False), MergedQKVParallelLinearWithLoRA),
    "gate, up": (
        lambda: MergedColumnParallelLinear(INPUTS, [96, 96], bias=True),
        MergedColumnParallelLinearWithLoRA,
    ),
    "down": (lambda: RowParallelLinear(INPUTS, 64, bias=False), RowParallelLinearWithLoRA),
}


@pytest.fixture(scope="module", autouse=True)
def vllm_process(tmp_path_factory):
    """What vLLM's layers ask for when they are made."""
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{tmp_path_factory.mktemp('dist')}/init", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield
    cleanup_dist_env_and_memory()


def make_layer(name, rank=RANK, used=(0, 2), dtype=torch.float32):
    """A layer as vLLM loads it, with random adapters in some of its slots; that of slot 2 has half of the rank."""
    make, lora_class = LAYERS[name]
    generator = torch.Generator().manual_seed(5)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        base = make()
    finally:
        torch.set_default_dtype(default)
    for parameter in base.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype) / INPUTS**0.5
    base.quant_method.process_weights_after_loading(base)
    layer = lora_class(base)
    layer.create_lora_weights(SLOTS, LoRAConfig(max_lora_rank=rank, max_loras=SLOTS, lora_dtype=dtype))
    for slot in used:
        layer.set_lora(slot, *make_adapter(layer, rank // 2 if slot == 2 else rank, generator))
    return layer


def make_adapter(layer, rank, generator):
    """Random A and B, as lists for fused layers."""
    a = [torch.randn(rank, INPUTS, generator=generator) / INPUTS**0.5 for _ in layer.output_slices]
    b = [torch.randn(size, rank, generator=generator) / rank**0.5 for size in layer.output_slices]
    return (a, b) if len(a) > 1 else (a[0], b[0])


def outputs(layer, wrapper_class, mapping, is_prefill=True):
    """The layer's input and output with a wrapper."""
    wrapper = wrapper_class(64, max_batches=64, device="cpu")
    layer.set_mapping(wrapper)
    if wrapper_class is GroupedLora:
        wrapper.take_over(layer)
    return run(layer, wrapper, mapping, is_prefill)


def run(layer, wrapper, mapping, is_prefill=True):
    wrapper.update_metadata(LoRAMapping(mapping, mapping, is_prefill=is_prefill), LORA_IDS, SLOTS + 1, 100)
    x = torch.randn(len(mapping), INPUTS, generator=torch.Generator().manual_seed(len(mapping)))
    x = x.to(layer.lora_a_stacked[0].dtype)
    return x, layer(x)[0]


def expected(layer, x, mapping):
    """The definition, row by row in fp64."""
    y = layer.base_layer(x)[0].double()
    for row, lora_id in enumerate(mapping):
        if lora_id:
            slot = LORA_IDS.index(lora_id)
            pairs = zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True)
            y[row] += torch.cat(
                [x[row].double() @ a[slot, 0].double().T @ b[slot, 0].double().T for a, b in pairs]
            )
    return y


def assert_equal(ours, theirs):
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_prefill", [True, False], ids=["prefill", "decode"])
@pytest.mark.parametrize("rank", [1, 8, 16])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("mapping", BATCHES.values(), ids=BATCHES)
def test_both_ways_give_the_same(mapping, name, rank, is_prefill):
    layer = make_layer(name, rank)
    _, theirs = outputs(layer, PunicaWrapperCPU, mapping, is_prefill)
    x, ours = outputs(layer, GroupedLora, mapping, is_prefill)
    assert_equal(ours, theirs)
    assert_equal(ours, expected(layer, x, mapping))


@pytest.mark.parametrize("mapping", BATCHES.values(), ids=BATCHES)
def test_rows_without_an_adapter_stay_as_they_are_when_every_slot_is_taken(mapping):
    layer = make_layer("down", used=range(SLOTS))
    x, ours = outputs(layer, GroupedLora, mapping)
    assert_equal(ours, expected(layer, x, mapping))
    base = [row for row, lora_id in enumerate(mapping) if not lora_id]
    assert torch.equal(ours[base], layer.base_layer(x)[0][base])


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("mapping", BATCHES.values(), ids=BATCHES)
def test_half_precision_is_as_exact_as_vllms(mapping, name):
    layer = make_layer(name, dtype=torch.bfloat16)
    _, theirs = outputs(layer, PunicaWrapperCPU, mapping)
    x, ours = outputs(layer, GroupedLora, mapping)
    exact = expected(layer, x, mapping)
    assert (ours - exact).abs().max() <= 1.5 * (theirs - exact).abs().max()


@pytest.mark.parametrize("name", LAYERS)
def test_a_slot_that_gets_another_adapter_computes_that_one(name):
    layer, mapping = make_layer(name), [13, 13]
    wrapper = GroupedLora(64, max_batches=64, device="cpu")
    layer.set_mapping(wrapper)
    wrapper.take_over(layer)
    _, before = run(layer, wrapper, mapping)
    layer.set_lora(2, *make_adapter(layer, RANK, torch.Generator().manual_seed(6)))
    x, after = run(layer, wrapper, mapping)
    assert_equal(after, expected(layer, x, mapping))
    assert not torch.allclose(before, after, atol=0.1)
    layer.reset_lora(2)
    assert torch.equal(run(layer, wrapper, mapping)[1], layer.base_layer(x)[0])


def test_layers_that_were_not_taken_over_are_computed_by_vllm():
    layer, mapping = make_layer("down"), BATCHES["in a row"]
    wrapper = GroupedLora(64, max_batches=64, device="cpu")
    layer.set_mapping(wrapper)
    x, ours = run(layer, wrapper, mapping)
    assert_equal(ours, expected(layer, x, mapping))


@pytest.mark.parametrize("scale", [0.5, 2.0])
@pytest.mark.parametrize("name", LAYERS)
def test_the_scale_is_applied(scale, name):
    layer, mapping = make_layer(name), BATCHES["all kinds"]
    y = torch.zeros(len(mapping), sum(layer.output_slices))
    theirs, ours = y.clone(), y.clone()
    for wrapper_class, into in ((PunicaWrapperCPU, theirs), (GroupedLora, ours)):
        x, _ = outputs(layer, wrapper_class, mapping)
        layer.punica_wrapper.add_lora_linear(
            into, x, layer.lora_a_stacked, layer.lora_b_stacked, scale, layer.output_slices
        )
    assert_equal(ours, theirs)
    assert ours.abs().max() > 0.1

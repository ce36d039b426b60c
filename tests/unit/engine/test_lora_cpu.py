"""LoRA by version against vLLM's LoRA by token and against the definition, over mixed batches."""

import itertools

import pytest
import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from engine.vllm.lora_cpu import GroupedLora, fuse

SLOTS = 4
LORA_IDS = [11, None, 13, 14]
"""Of the slots. vLLM gives rows without an adapter what the last one holds, so it is left empty where both compare."""
INPUTS = 48

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

LAYERS = {"q, k, v": (64, 32, 32), "gate, up": (96, 96), "down": (64,)}


def make_weights(rank, slices, used=(0, 2), dtype=torch.float32):
    """A and B of a layer as vLLM holds them. The rank of slot 2 is half, the rest zeros."""
    generator = torch.Generator().manual_seed(5)
    a = [torch.zeros(SLOTS, 1, rank, INPUTS) for _ in slices]
    b = [torch.zeros(SLOTS, 1, size, rank) for size in slices]
    for slot, (a_slice, b_slice) in itertools.product(used, zip(a, b, strict=True)):
        own = rank // 2 if slot == 2 and rank > 1 else rank
        a_slice[slot, 0, :own] = torch.randn(own, INPUTS, generator=generator)
        b_slice[slot, 0, :, :own] = torch.randn(b_slice.shape[2], own, generator=generator) / rank
    return tuple(one.to(dtype) for one in a), tuple(one.to(dtype) for one in b)


def expected(y, x, mapping, a, b, scale):
    """The definition, row by row in fp64."""
    y = y.double().clone()
    for row, lora_id in enumerate(mapping):
        if lora_id:
            slot = LORA_IDS.index(lora_id)
            parts = [x[row].double() @ p[slot, 0].double().T @ q[slot, 0].double().T for p, q in zip(a, b, strict=True)]
            y[row] += scale * torch.cat(parts)
    return y


def wrapper_for(wrapper_class, mapping, is_prefill):
    wrapper = wrapper_class(64, max_batches=64, device="cpu")
    wrapper.update_metadata(LoRAMapping(mapping, mapping, is_prefill=is_prefill), LORA_IDS, SLOTS + 1, 100)
    return wrapper


def inputs_for(mapping, slices, dtype=torch.float32):
    generator = torch.Generator().manual_seed(len(mapping))
    x = torch.randn(len(mapping), INPUTS, generator=generator).to(dtype)
    return torch.randn(len(mapping), sum(slices), generator=generator).to(dtype), x


@pytest.mark.parametrize("is_prefill", [True, False], ids=["prefill", "decode"])
@pytest.mark.parametrize("rank", [1, 8, 16])
@pytest.mark.parametrize("slices", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("mapping", BATCHES.values(), ids=BATCHES)
def test_both_ways_give_the_same(mapping, slices, rank, is_prefill):
    a, b = make_weights(rank, slices)
    fused_a, fused_b = fuse(a, b)
    for scale in (1.0, 0.5):
        y, x = inputs_for(mapping, slices)
        ours, theirs = y.clone(), y.clone()
        wrapper_for(GroupedLora, mapping, is_prefill).add_lora_linear(ours, x, fused_a, fused_b, scale, slices)
        wrapper_for(PunicaWrapperCPU, mapping, is_prefill).add_lora_linear(theirs, x, a, b, scale, slices)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.double(), expected(y, x, mapping, a, b, scale), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mapping", BATCHES.values(), ids=BATCHES)
def test_rows_without_an_adapter_stay_as_they_are_when_every_slot_is_taken(mapping):
    a, b = make_weights(8, (64,), used=range(SLOTS))
    y, x = inputs_for(mapping, (64,))
    ours = y.clone()
    wrapper_for(GroupedLora, mapping, True).add_lora_linear(ours, x, *fuse(a, b), 1.0, (64,))
    torch.testing.assert_close(ours.double(), expected(y, x, mapping, a, b, 1.0), rtol=1e-5, atol=1e-5)
    base = [row for row, lora_id in enumerate(mapping) if not lora_id]
    assert torch.equal(ours[base], y[base])


@pytest.mark.parametrize("slices", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("mapping", BATCHES.values(), ids=BATCHES)
def test_half_precision_is_as_exact_as_vllms(mapping, slices):
    a, b = make_weights(16, slices, dtype=torch.bfloat16)
    y, x = inputs_for(mapping, slices, torch.bfloat16)
    ours, theirs = y.clone(), y.clone()
    wrapper_for(GroupedLora, mapping, True).add_lora_linear(ours, x, *fuse(a, b), 1.0, slices)
    wrapper_for(PunicaWrapperCPU, mapping, True).add_lora_linear(theirs, x, a, b, 1.0, slices)
    exact = expected(y, x, mapping, a, b, 1.0)
    assert (ours - exact).abs().max() <= 1.5 * (theirs - exact).abs().max()


def test_what_vllm_writes_to_a_slot_later_is_used():
    (a, b), slices = make_weights(8, LAYERS["q, k, v"], used=()), LAYERS["q, k, v"]
    fused_a, fused_b = fuse(a, b)
    new_a, new_b = make_weights(8, slices)
    for fused, new in ((fused_a, new_a), (fused_b, new_b)):
        for target, source in zip(fused, new, strict=True):
            target[2].copy_(source[2])
    y, x = inputs_for([13, 13], slices)
    ours = y.clone()
    wrapper_for(GroupedLora, [13, 13], True).add_lora_linear(ours, x, fused_a, fused_b, 1.0, slices)
    torch.testing.assert_close(ours.double(), expected(y, x, [13, 13], new_a, new_b, 1.0), rtol=1e-5, atol=1e-5)
    for one in (*fused_a, *fused_b):
        one[2] = 0
    ours = y.clone()
    wrapper_for(GroupedLora, [13, 13], True).add_lora_linear(ours, x, fused_a, fused_b, 1.0, slices)
    assert torch.equal(ours, y)


def test_layers_that_are_not_fused_are_computed_by_vllm():
    mapping, slices = BATCHES["in a row"], (64,)
    a, b = make_weights(8, slices)
    y, x = inputs_for(mapping, slices)
    ours = y.clone()
    wrapper_for(GroupedLora, mapping, True).add_lora_linear(ours, x, a, b, 1.0, slices)
    torch.testing.assert_close(ours.double(), expected(y, x, mapping, a, b, 1.0), rtol=1e-5, atol=1e-5)


def test_a_new_batch_replaces_the_groups():
    a, b = make_weights(8, (64,))
    wrapper = wrapper_for(GroupedLora, [13, 13], True)
    wrapper.update_metadata(LoRAMapping([0, 11], [0, 11], is_prefill=True), LORA_IDS, SLOTS + 1, 100)
    y, x = inputs_for([0, 11], (64,))
    ours = y.clone()
    wrapper.add_lora_linear(ours, x, *fuse(a, b), 1.0, (64,))
    torch.testing.assert_close(ours.double(), expected(y, x, [0, 11], a, b, 1.0), rtol=1e-5, atol=1e-5)

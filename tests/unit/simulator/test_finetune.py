from dataclasses import replace

import pytest

from core import dpo_slices
from core.dpo_slices import group_pairs, step_slices
from core.model_dims import ModelDims
from core.types import SliceKind
from tests.support.trainable_models import make_task, make_training, save_model, start


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"), "llama")


def slices_of(pairs, dims, slice_tokens, num_cached=0):
    is_cached = [number < num_cached for number in range(len(pairs))]
    return list(step_slices(group_pairs(pairs, is_cached, slice_tokens, share_prompts=True), dims))


@pytest.mark.parametrize("num_pairs", [1, 3, 8])
@pytest.mark.parametrize(("slice_tokens", "head_chunk_tokens"), [(16, 4), (64, 7), (1024, 128)])
@pytest.mark.parametrize("num_cached", [0, 1, 5, 8])
def test_slices_are_those_of_the_real_step(
    llama, monkeypatch, num_pairs, slice_tokens, head_chunk_tokens, num_cached
):
    monkeypatch.setattr(dpo_slices, "HEAD_CHUNK_TOKENS", head_chunk_tokens)
    task = make_task(num_pairs, seed=num_pairs)
    cached = [replace(pair, reference=(-1.0, -2.0)) for pair in task.pairs[:num_cached]]
    task = replace(task, pairs=(*cached, *task.pairs[num_cached:]))
    model, _, step = start(llama, task, make_training(max_slice_tokens=slice_tokens))
    dims = ModelDims.of(model.hf_config.to_dict(), dtype_bytes=4)
    assert dims.layer_weights == pytest.approx(model.layer_weights, rel=0.01)  # but for the norms
    assert dims.head_weights == model.head_weights
    assert tuple(slices_of([pair.lengths for pair in task.pairs], dims, slice_tokens, num_cached)) == step.pending


def make_dims(vocab_size):
    """Two layers of 700 weights."""
    return ModelDims(2, 10, 10, num_heads=1, num_kv_heads=1, head_dim=10, vocab_size=vocab_size, dtype_bytes=2)


def test_a_head_that_is_wider_than_a_layer_is_cut_into_smaller_chunks():
    wide = make_dims(vocab_size=630)
    assert wide.head_weights == 9 * wide.layer_weights
    slices = slices_of([(200, 100, 100)], wide, 1024)
    heads = [s.num_tokens for s in slices if s.kind is SliceKind.POLICY_HEAD]
    assert heads == [398 // 9] * 4 + [24]
    assert slices[-1].kind is SliceKind.OPTIMIZER


def test_a_micro_batch_ends_with_the_backward_slice_of_its_first_layer():
    slices = slices_of([(8, 8, 8)] * 2, make_dims(vocab_size=70), 32)
    ends = [i for i, s in enumerate(slices[:-1]) if slices[i + 1].group != s.group or s is slices[-2]]
    assert [(slices[i].kind, slices[i].part) for i in ends] == [(SliceKind.BACKWARD_LAYER, 0)] * 2

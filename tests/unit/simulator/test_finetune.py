from dataclasses import replace
from types import SimpleNamespace

import pytest

from core import dpo_slices
from core.dpo_slices import group_pairs, step_slices
from core.types import SliceKind
from tests.support.trainable_models import make_task, make_training, save_model, start


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"), "llama")


def slices_of(pairs, model, slice_tokens, num_cached=0):
    is_cached = [number < num_cached for number in range(len(pairs))]
    return list(step_slices(group_pairs(pairs, is_cached, slice_tokens, share_prompts=True), model))


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
    slices = slices_of([pair.lengths for pair in task.pairs], model, slice_tokens, num_cached)
    assert tuple(slices) == step.pending


def test_a_head_that_is_wider_than_a_layer_is_cut_into_smaller_chunks():
    wide = SimpleNamespace(num_layers=2, layer_weights=100, head_weights=900)
    slices = slices_of([(200, 100, 100)], wide, 1024)
    heads = [s.num_tokens for s in slices if s.kind is SliceKind.POLICY_HEAD]
    assert heads == [398 // 9] * 4 + [24]
    assert slices[-1].kind is SliceKind.OPTIMIZER


def test_a_micro_batch_ends_with_the_backward_slice_of_its_first_layer():
    model = SimpleNamespace(num_layers=2, layer_weights=1, head_weights=1)
    slices = slices_of([(8, 8, 8)] * 2, model, 32)
    ends = [i for i, s in enumerate(slices[:-1]) if slices[i + 1].group != s.group or s is slices[-2]]
    assert [(slices[i].kind, slices[i].part) for i in ends] == [(SliceKind.BACKWARD_LAYER, 0)] * 2

from dataclasses import replace

import pytest

from core.pair_groups import PairShape
from core.types import SliceKind
from simulator.finetune import StepModel, step_slices
from tests.support.trainable_models import make_task, make_training, save_model, start


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize("num_pairs", [1, 3, 8])
@pytest.mark.parametrize(("slice_tokens", "head_chunk_tokens"), [(16, 4), (64, 7), (1024, 128)])
@pytest.mark.parametrize("num_cached", [0, 1, 5, 8])
def test_slices_are_those_of_the_real_step(llama, num_pairs, slice_tokens, head_chunk_tokens, num_cached):
    task = make_task(num_pairs, seed=num_pairs)
    cached = [replace(pair, reference=(-1.0, -2.0)) for pair in task.pairs[:num_cached]]
    task = replace(task, pairs=(*cached, *task.pairs[num_cached:]))
    config = make_training(max_slice_tokens=slice_tokens, head_chunk_tokens=head_chunk_tokens)
    model, _, step = start(llama, task, config)
    shape = StepModel(
        num_layers=model.num_layers,
        layer_weights=model.layer_weights,
        head_weights=model.head_weight.numel(),
        head_chunk_tokens=head_chunk_tokens,
    )
    pairs = [PairShape(len(p.prompt_ids), len(p.chosen_ids), len(p.rejected_ids)) for p in task.pairs]
    slices = step_slices(pairs, shape, slice_tokens, num_cached)
    assert [(s.kind, s.num_tokens) for s in slices] == [(s.kind, s.num_tokens) for s in step.pending]


def test_a_head_that_is_wider_than_a_layer_is_cut_into_smaller_chunks():
    wide = StepModel(num_layers=2, layer_weights=100, head_weights=900, head_chunk_tokens=128)
    slices = step_slices([PairShape(200, 100, 100)], wide, 1024)
    heads = [s.num_tokens for s in slices if s.kind is SliceKind.POLICY_HEAD]
    assert heads == [398 // 9] * 4 + [24]
    assert slices[-1].kind is SliceKind.OPTIMIZER


def test_nothing_is_held_after_a_micro_batch():
    model = StepModel(num_layers=2, layer_weights=1, head_weights=1, head_chunk_tokens=128)
    slices = step_slices([PairShape(8, 8, 8)] * 2, model, 32)
    ends = [i for i, s in enumerate(slices) if s.batch_tokens == 0]
    assert [slices[i].kind for i in ends] == [
        SliceKind.BACKWARD_LAYER,
        SliceKind.BACKWARD_LAYER,
        SliceKind.OPTIMIZER,
    ]

import pytest

from core.model_dims import ModelDims
from core.pair_groups import PairShape
from core.types import SliceKind
from simulator.trainer import step_slices
from tests.unit.engine.trainable_models import make_task, make_training, save_model, start


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize("num_pairs", [1, 3, 8])
@pytest.mark.parametrize(("slice_tokens", "head_chunk_tokens"), [(16, 4), (64, 7), (1024, 128)])
def test_slices_are_those_of_the_real_step(llama, num_pairs, slice_tokens, head_chunk_tokens):
    task = make_task(num_pairs, seed=num_pairs)
    config = make_training(max_slice_tokens=slice_tokens, head_chunk_tokens=head_chunk_tokens)
    model, _, step = start(llama, task, config)
    dims = ModelDims.of(model.hf_config.to_dict(), dtype_bytes=4)
    assert dims.layer_weights == pytest.approx(model.layer_weights, rel=0.01)  # but for the norms
    assert dims.head_weights == model.head_weight.numel()
    pairs = [PairShape(len(p.prompt_ids), len(p.chosen_ids), len(p.rejected_ids)) for p in task.pairs]
    slices = step_slices(pairs, dims, slice_tokens, head_chunk_tokens=head_chunk_tokens)
    assert [(s.kind, s.num_tokens) for s in slices] == [(s.kind, s.num_tokens) for s in step.pending]


def make_dims(vocab_size):
    """Two layers of 700 weights."""
    return ModelDims(2, 10, 10, num_heads=1, num_kv_heads=1, head_dim=10, vocab_size=vocab_size, dtype_bytes=2)


def test_a_head_that_is_wider_than_a_layer_is_cut_into_smaller_chunks():
    wide = make_dims(vocab_size=630)
    assert wide.head_weights == 9 * wide.layer_weights
    slices = step_slices([PairShape(200, 100, 100)], wide, 1024, head_chunk_tokens=128)
    heads = [s.num_tokens for s in slices if s.kind is SliceKind.POLICY_HEAD]
    assert heads == [398 // 9] * 4 + [24]
    assert slices[-1].kind is SliceKind.OPTIMIZER


def test_nothing_is_held_after_a_micro_batch():
    slices = step_slices([PairShape(8, 8, 8)] * 2, make_dims(vocab_size=70), 32, head_chunk_tokens=128)
    ends = [i for i, s in enumerate(slices) if s.batch_tokens == 0]
    assert [slices[i].kind for i in ends] == [
        SliceKind.BACKWARD_LAYER,
        SliceKind.BACKWARD_LAYER,
        SliceKind.OPTIMIZER,
    ]

"""The step in which each prompt is computed once, against the plain step with two rows for each pair."""

import random
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from core import dpo_slices
from core.types import FineTuneTask, SliceKind, TaskKind, TokenizedPair
from engine.training.attention import SharedPrompts
from engine.training.dpo import DpoStep
from engine.training.shadow import ShadowAdapter
from tests.support.trainable_models import (
    CONFIGS,
    VOCAB,
    build,
    make_training,
    run,
    run_to_loss,
    save_model,
    start,
)

LONG = {"max_position_embeddings": 256}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"), "llama", **LONG)


def pairs_of(sizes, seed=0):
    """Pairs of the given lengths of prompt, chosen and rejected."""
    rng = random.Random(seed)

    def tokens(count):
        return tuple(rng.randrange(3, VOCAB) for _ in range(count))

    return tuple(TokenizedPair(f"p{i}", *map(tokens, size), weight=0.5 + i) for i, size in enumerate(sizes))


def task_of(sizes, kind=TaskKind.TRAIN):
    return FineTuneTask("t", kind, pairs_of(sizes))


def layouts(step):
    return [batch.shared is not None for batch in step.batches]


def outcome(directory, task, config, **kwargs):
    _, shadow, step = start(directory, task, config, **kwargs)
    gradients = {}
    if task.kind is TaskKind.TRAIN:
        run_to_loss(step)
        gradients = {name: grad.clone() for name, grad in step.gradients().items()}
    return gradients, run(step).result(), shadow.tensors()


def assert_equal_steps(ours, theirs, tolerance=1e-4):
    """Gradients, scores and metrics, by relative difference."""
    for name, grad in theirs[0].items():
        assert (ours[0][name] - grad).norm() <= tolerance * grad.norm(), name
    (metrics, scores), (plain_metrics, plain_scores) = ours[1], theirs[1]
    assert metrics.loss == pytest.approx(plain_metrics.loss, rel=tolerance)
    if plain_metrics.grad_norm is not None:
        assert metrics.grad_norm == pytest.approx(plain_metrics.grad_norm, rel=tolerance)
    assert [score.pair_id for score in scores] == [score.pair_id for score in plain_scores]
    for a, b in zip(scores, plain_scores, strict=True):
        for field in (
            "policy_chosen_logp",
            "policy_rejected_logp",
            "reference_chosen_logp",
            "reference_rejected_logp",
        ):
            assert getattr(a, field) == pytest.approx(getattr(b, field), rel=tolerance), field
        assert a.margin == pytest.approx(b.margin, rel=tolerance, abs=1e-5)


UNEVEN = [(40, 9, 3), (25, 4, 12), (33, 1, 7), (12, 20, 2), (50, 1, 1)]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("max_slice_tokens", [64, 1024], ids=["micro_batches", "one_batch"])
def test_equals_the_plain_step(tmp_path, kind, max_slice_tokens):
    directory = save_model(tmp_path, kind, **LONG)
    task = task_of(UNEVEN)
    config = make_training(max_slice_tokens=max_slice_tokens, beta=0.3, sft_weight=0.7, max_length_tokens=200)
    assert all(layouts(start(directory, task, config)[2]))
    assert not any(layouts(start(directory, task, config, share_prompt=False)[2]))
    assert_equal_steps(outcome(directory, task, config), outcome(directory, task, config, share_prompt=False))


@pytest.mark.parametrize(
    "sizes",
    [
        [(1, 30, 2)],
        [(0, 30, 3), (0, 2, 28)],
        [(20, 1, 1)],
        [(0, 30, 3), (30, 2, 2), (1, 2, 25)],
        [(16, 8, 8), (16, 8, 8)],
    ],
    ids=["prompt_of_one", "no_prompt", "completions_of_one", "some_prompts", "even"],
)
def test_equals_the_plain_step_at_the_edges(llama, sizes):
    task, config = task_of(sizes), make_training(beta=0.3)
    assert layouts(start(llama, task, config)[2]) == [True]
    assert_equal_steps(outcome(llama, task, config), outcome(llama, task, config, share_prompt=False))


def test_rejected_tokens_do_not_see_chosen_ones_nor_other_pairs(llama):
    task = task_of([(20, 9, 8), (24, 6, 9)], TaskKind.EVALUATE)
    first, second = task.pairs
    changed = replace(first, chosen_ids=tuple(3 + (i + 5) % (VOCAB - 3) for i in first.chosen_ids))
    before = run(start(llama, task, make_training())[2]).result()[1]
    after = run(start(llama, replace(task, pairs=(changed, second)), make_training())[2]).result()[1]
    assert before[0].policy_rejected_logp == after[0].policy_rejected_logp
    assert before[1] == after[1]
    assert abs(before[0].policy_chosen_logp - after[0].policy_chosen_logp) > 0.1


def test_equals_the_plain_step_with_a_cached_reference_and_as_an_evaluation(llama):
    task, config = task_of(UNEVEN, TaskKind.EVALUATE), make_training(max_slice_tokens=100)
    ours, theirs = outcome(llama, task, config), outcome(llama, task, config, share_prompt=False)
    assert_equal_steps(ours, theirs)
    known = [(score.reference_chosen_logp, score.reference_rejected_logp) for score in theirs[1][1]]
    pairs = [replace(p, reference=values) for p, values in zip(task.pairs, known, strict=True)]
    cached = replace(task, kind=TaskKind.TRAIN, pairs=(*pairs[:3], *task.pairs[3:]))
    assert_equal_steps(outcome(llama, cached, config), outcome(llama, cached, config, share_prompt=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_fp32_as_the_plain_step(llama, dtype):
    task, config = task_of(UNEVEN), make_training()
    exact = outcome(llama, task, config)
    ours, theirs = (outcome(llama, task, config, share_prompt=on, dtype=dtype) for on in (True, False))

    def error(result):
        names = exact[0].keys()
        both = (torch.cat([part[0][name].flatten() for name in names]) for part in (result, exact))
        return functional.pairwise_distance(*both).item()

    assert error(ours) <= 1.5 * error(theirs)
    assert ours[1][0].loss == pytest.approx(exact[1][0].loss, rel=0.1)


def test_truncation_is_that_of_the_plain_step(llama):
    task = task_of([(40, 9, 30), (25, 24, 12)])
    config = make_training(max_prompt_tokens=16, max_length_tokens=24).model_copy(update={"max_prompt_tokens": 16})
    specs = start(llama, task, config)[2].pending
    assert specs[0].num_tokens == sum(
        16 + min(len(p.chosen_ids), 8) + min(len(p.rejected_ids), 8) - 2 for p in task.pairs
    )
    assert_equal_steps(outcome(llama, task, config), outcome(llama, task, config, share_prompt=False))


def test_an_interrupted_shared_step_is_bit_equal(llama):
    task, config = task_of(UNEVEN), make_training(max_slice_tokens=100)
    expected = outcome(llama, task, config)[2]
    model = build(llama)
    shadow = ShadowAdapter(model, config)
    step = DpoStep(model, shadow, task, config)
    other = DpoStep(model, shadow, task_of([(7, 9, 9)], TaskKind.EVALUATE), config, share_prompt=False)
    while step.next_slice is not None:
        with torch.inference_mode(len(step.pending) % 2 == 0):
            step.run_slice()
            if other.next_slice is not None:
                other.run_slice()
    tensors = shadow.tensors()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


def test_slices_and_memory_count_each_prompt_once(llama):
    task = task_of([(60, 10, 10), (60, 10, 10)])
    peaks = []
    for shares, tokens in ((True, 2 * (60 + 9 + 9)), (False, 4 * 69)):
        _, _, step = start(llama, task, share_prompt=shares)
        assert {s.num_tokens for s in step.pending if "layer" in s.kind or s.kind is SliceKind.EMBED} == {tokens}
        held = []
        while step.next_slice is not None:
            if step.run_slice() is SliceKind.POLICY_LAYER:
                held.append(step.activation_bytes)
        peaks.append(max(held))
    assert peaks[0] < 0.62 * peaks[1]


def test_the_plain_layout_is_kept_where_sharing_saves_little(llama):
    even, short_prompt = [(0, 20, 20)] * 2, [(2, 60, 60)] * 2
    for sizes in (even, short_prompt):
        assert layouts(start(llama, task_of(sizes), make_training())[2]) == [False]
    assert layouts(start(llama, task_of([(2, 60, 30)] * 2), make_training())[2]) == [
        True
    ]  # what it saves is padding


@pytest.mark.parametrize("wrong", ["everything is seen", "pads of prompts are seen"])
def test_these_comparisons_notice_a_wrong_mask(llama, monkeypatch, wrong):
    task, config = task_of(UNEVEN), make_training()
    expected, right = outcome(llama, task, config, share_prompt=False), SharedPrompts.mask

    def mask(self, window):
        seen = right(self, window).clone()
        seen[..., : None if wrong == "everything is seen" else self.prompt_width] = True
        return seen

    monkeypatch.setattr(SharedPrompts, "mask", mask)
    with pytest.raises(AssertionError):
        assert_equal_steps(outcome(llama, task, config), expected)


def test_the_bound_that_decides_is_of_tokens(llama, monkeypatch):
    monkeypatch.setattr(dpo_slices, "_MIN_SAVED_SHARE", -1.0)
    task = task_of([(0, 20, 20), (0, 9, 9)])
    assert layouts(start(llama, task, make_training())[2]) == [True]
    assert_equal_steps(
        outcome(llama, task, make_training()), outcome(llama, task, make_training(), share_prompt=False)
    )


@pytest.mark.gpu
def test_equals_the_plain_step_on_cuda(llama):
    task, config = task_of(UNEVEN), make_training(max_slice_tokens=100)
    ours, theirs = (outcome(llama, task, config, share_prompt=on, device="cuda") for on in (True, False))
    assert_equal_steps(ours, theirs)

"""Cached reference log-probabilities and weights of pairs, against the uncached step and the plain formula."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from core.errors import DivergedError, TrainingError
from core.types import SliceKind, TaskKind
from engine.training import dpo
from engine.training.dpo import DpoStep
from engine.training.shadow import ShadowAdapter
from tests.support.trainable_models import build, make_task, make_training, run, run_to_loss, save_model, start

REFERENCE_KINDS = {SliceKind.REFERENCE_LAYER, SliceKind.REFERENCE_HEAD}
WEIGHTS = (0.25, 1.0, 0.0, 2.0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"), "llama")


def with_references(directory, task, which=None, config=None):
    """The task with the references that an evaluation finds, for the pairs of the given indices (all)."""
    scores = run(start(directory, replace(task, kind=TaskKind.EVALUATE), config)[2]).result()[1]
    pairs = [
        replace(pair, reference=(score.reference_chosen_logp, score.reference_rejected_logp))
        if which is None or i in which
        else pair
        for i, (pair, score) in enumerate(zip(task.pairs, scores, strict=True))
    ]
    return replace(task, pairs=tuple(pairs))


def weighted(task, weights=WEIGHTS):
    return replace(task, pairs=tuple(replace(p, weight=w) for p, w in zip(task.pairs, weights, strict=True)))


def gradients(directory, task, config):
    step = start(directory, task, config)[2]
    run_to_loss(step)
    return {name: grad.clone() for name, grad in step.gradients().items()}, run(step).result()


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("max_slice_tokens", [16, 48, 1024])
@pytest.mark.parametrize("which", [None, {0, 2}], ids=["all_cached", "half_cached"])
def test_a_cached_reference_gives_the_same_step(tmp_path, kind, max_slice_tokens, which):
    directory = save_model(tmp_path, kind)
    config, task = make_training(max_slice_tokens=max_slice_tokens), make_task(4)
    plain, (plain_metrics, plain_scores) = gradients(directory, task, config)
    cached, (metrics, scores) = gradients(directory, with_references(directory, task, which, config), config)
    for name, grad in plain.items():
        assert (cached[name] - grad).abs().max() <= 1e-6, name
        assert which is not None or torch.equal(cached[name], grad)  # the same micro-batches: the same numbers
    assert [s.pair_id for s in scores] == [s.pair_id for s in plain_scores]
    for ours, theirs in zip(scores, plain_scores, strict=True):
        assert ours.margin == pytest.approx(theirs.margin, abs=1e-5)
        assert ours.reference_chosen_logp == pytest.approx(theirs.reference_chosen_logp, abs=1e-4)
    assert metrics.grad_norm == pytest.approx(plain_metrics.grad_norm, rel=1e-5)


@pytest.mark.parametrize("kind", list(TaskKind))
def test_a_cached_reference_saves_its_forward_pass(llama, kind):
    task = make_task(4, kind)
    specs = start(llama, task)[2].pending
    cached = start(llama, with_references(llama, task))[2].pending
    assert not {spec.kind for spec in cached} & REFERENCE_KINDS
    without = [spec for spec in specs if spec.kind not in REFERENCE_KINDS]
    without.remove(specs[0])  # the reference's embedding
    assert list(cached) == without


def test_a_pair_without_a_reference_does_not_cost_the_others_theirs(llama):
    step = start(llama, with_references(llama, make_task(4), {0, 1, 3}), make_training(max_slice_tokens=1024))[2]
    layers = [spec.num_tokens for spec in step.pending if spec.kind is SliceKind.REFERENCE_LAYER]
    missing = step.task.pairs[2]
    computed = len(missing.prompt_ids) + len(missing.chosen_ids) + len(missing.rejected_ids) - 2
    assert layers == [computed] * 3


def test_the_cached_values_are_what_counts(llama):
    task = with_references(llama, make_task(1, TaskKind.EVALUATE))
    (pair,) = task.pairs
    shifted = replace(task, pairs=(replace(pair, reference=(pair.reference[0] + 1.0, pair.reference[1])),))
    margins = [run(start(llama, t, make_training(beta=0.5))[2]).result()[0].margin for t in (task, shifted)]
    assert margins[1] == pytest.approx(margins[0] - 0.5, abs=1e-5)


@pytest.mark.parametrize("broken", [(float("nan"), -3.0), (-3.0, float("-inf"))])
def test_a_cached_reference_that_is_no_number_is_computed_anew(llama, broken):
    task = make_task(2, TaskKind.EVALUATE)
    damaged = replace(task, pairs=(replace(task.pairs[0], reference=broken), task.pairs[1]))
    expected = run(start(llama, task)[2]).result()
    assert run(start(llama, damaged)[2]).result() == expected


def _sequence_logp(model, prompt, completion):
    ids = torch.tensor([[*prompt, *completion]])
    logp = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])
    return logp[len(prompt) - 1 :].sum()


def plain_loss(model, pairs, config):
    """The formula of `engine.training.dpo`'s docstring on Hugging Face's forward pass; also each pair's own DPO
    loss."""
    total, nll, tokens, losses = 0.0, 0.0, 0.0, []
    for pair in pairs:
        sides = [(pair.prompt_ids, pair.chosen_ids), (pair.prompt_ids, pair.rejected_ids)]
        chosen, rejected = (_sequence_logp(model.causal_lm, *side) for side in sides)
        with torch.no_grad(), model.adapter_disabled():
            reference = [_sequence_logp(model.causal_lm, *side) for side in sides]
        losses.append(-functional.logsigmoid(config.beta * (chosen - reference[0] - rejected + reference[1])))
        total = total + pair.weight * losses[-1]
        nll = nll - pair.weight * chosen
        tokens += pair.weight * len(pair.chosen_ids)
    mean_weight = sum(pair.weight for pair in pairs) / len(pairs)
    sft = mean_weight * nll / tokens if tokens else 0.0 * nll
    return total / len(pairs) + config.sft_weight * sft, [loss.item() for loss in losses]


@pytest.mark.parametrize("max_slice_tokens", [16, 1024])
@pytest.mark.parametrize("sft_weight", [0.0, 0.7])
@pytest.mark.parametrize("weights", [WEIGHTS, (1.0,) * 4, (0.5,) * 4])
def test_weighted_gradients_equal_autograd_of_the_plain_formula(llama, max_slice_tokens, sft_weight, weights):
    config = make_training(beta=0.3, sft_weight=sft_weight, max_slice_tokens=max_slice_tokens)
    task = weighted(make_task(4), weights)
    model, _, step = start(llama, task, config)
    loss, losses = plain_loss(model, task.pairs, config)
    parameters = model.lora_parameters()
    expected = torch.autograd.grad(loss, [parameter.requires_grad_(True) for parameter in parameters.values()])
    run_to_loss(step)
    for (name, grad), wanted in zip(step.gradients().items(), expected, strict=True):
        assert (grad - wanted).norm() <= 1e-4 * wanted.norm() + 1e-7, name
    metrics, scores = run(step).result()
    assert [score.loss for score in scores] == pytest.approx(losses, abs=1e-4)  # of the pair, whatever its weight
    assert metrics.loss == pytest.approx(sum(losses) / 4, abs=1e-4)


def test_a_pair_of_weight_zero_contributes_nothing(llama):
    config, task = make_training(sft_weight=0.7), make_task(4)
    with_it, _ = gradients(llama, weighted(task, (1.0, 1.0, 0.0, 1.0)), config)
    without, _ = gradients(llama, replace(task, pairs=(*task.pairs[:2], task.pairs[3])), config)
    for name, grad in without.items():
        assert (with_it[name] - 0.75 * grad).norm() <= 1e-5 * grad.norm() + 1e-8, name
    nothing, (metrics, _) = gradients(llama, weighted(task, (0.0,) * 4), config)
    assert not any(grad.any() for grad in nothing.values())
    assert metrics.grad_norm == 0.0
    assert metrics.loss > 0


def test_the_bound_of_the_loss_is_on_the_weighted_mean(llama, monkeypatch):
    monkeypatch.setattr(dpo, "MAX_LOSS", 0.3)  # the pairs' own losses are around ln 2
    run(start(llama, weighted(make_task(4), (0.1,) * 4))[2])
    with pytest.raises(DivergedError, match="weighted"):
        run(start(llama, make_task(4))[2])
    monkeypatch.setattr(dpo, "MAX_LOSS", 3.0)
    run(start(llama, weighted(make_task(4), (8.0,) * 4))[2])  # no explosion


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_a_weight_that_makes_no_sense_is_a_named_error(llama, weight):
    model, config = build(llama), make_training()
    task = weighted(make_task(2), (1.0, weight))
    with pytest.raises(TrainingError, match="pair p1: its weight"):
        DpoStep(model, ShadowAdapter(model, config), task, config)

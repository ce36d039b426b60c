import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from core import dpo_slices
from core.errors import DivergedError, PairTooLongError, TrainingError
from core.types import FineTuneTask, SliceKind, TaskKind, TokenizedPair
from engine.training import dpo
from engine.training.dpo import DpoStep
from engine.training.shadow import ShadowAdapter
from tests.support.trainable_models import (
    build,
    make_task,
    make_training,
    run,
    run_to_loss,
    save_model,
    snapshot,
    start,
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"), "llama")


def _same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _gradients(directory, task, config):
    _, _, step = start(directory, task, config)
    run_to_loss(step)
    return {name: grad.clone() for name, grad in step.gradients().items()}, run(step).result()


def test_slices_are_one_layer_or_one_chunk(llama, monkeypatch):
    monkeypatch.setattr(dpo_slices, "HEAD_CHUNK_TOKENS", 4)
    model, _, step = start(llama, make_task(1))
    specs, targets, tokens = step.pending, 12, step.pending[0].num_tokens
    assert tokens == sum(len(s) for s in _rows(step.task.pairs[0])) - len(step.task.pairs[0].prompt_ids)
    targets = sum(len(ids) for ids in (step.task.pairs[0].chosen_ids, step.task.pairs[0].rejected_ids))
    chunks = -(-targets // 4)
    expected = [
        SliceKind.EMBED,
        *[SliceKind.REFERENCE_LAYER] * 3,
        *[SliceKind.REFERENCE_HEAD] * chunks,
        SliceKind.EMBED,
        *[SliceKind.POLICY_LAYER] * 3,
        *[SliceKind.POLICY_HEAD] * chunks,
        SliceKind.LOSS,
        *[SliceKind.BACKWARD_LAYER] * 3,
        SliceKind.OPTIMIZER,
    ]
    assert [spec.kind for spec in specs] == expected
    heads = [spec.num_tokens for spec in specs if spec.kind is SliceKind.POLICY_HEAD]
    assert sum(heads) == targets
    assert max(heads) == 4
    assert all(spec.num_tokens == tokens for spec in specs if "layer" in spec.kind)
    layer_calls = []
    original = model.run_layer
    model.run_layer = lambda *args: layer_calls.append(args[0]) or original(*args)
    for spec in specs:
        layer_calls.clear()
        assert step.next_slice == spec
        assert step.run_slice() is spec.kind
        assert len(layer_calls) == ("layer" in spec.kind)
    assert step.done
    assert step.next_slice is None


def test_a_wide_head_is_cut_to_the_work_of_a_layer(tmp_path, monkeypatch):
    monkeypatch.setattr(dpo_slices, "HEAD_CHUNK_TOKENS", 1000)
    directory = save_model(tmp_path, "llama", vocab_size=2000, hidden_size=16)
    task = make_task(12)
    model, _, step = start(directory, task)
    chunks = [spec for spec in step.pending if spec.kind is SliceKind.REFERENCE_HEAD]
    layer_work = step.next_slice.num_tokens * model.layer_weights
    assert all(spec.num_tokens * 2000 * 16 <= layer_work for spec in chunks)
    assert len(chunks) == -(-sum(spec.num_tokens for spec in chunks) // chunks[0].num_tokens) > 1


def _rows(pair):
    return [(*pair.prompt_ids, *ids)[:-1] for ids in (pair.chosen_ids, pair.rejected_ids)]


def test_interruption_after_every_slice_is_bit_equal(llama):
    tasks = [make_task(4, seed=seed) for seed in range(3)]
    config = make_training(max_slice_tokens=48)
    model = build(llama)
    shadow = ShadowAdapter(model, config)
    for task in tasks:
        run(DpoStep(model, shadow, task, config))
    assert shadow.num_steps == 3
    inference_lm = AutoModelForCausalLM.from_pretrained(llama)
    with torch.inference_mode():
        weights = {name: p.clone() for name, p in inference_lm.named_parameters()}
        torn = build(llama, weights=weights)
        torn_shadow = ShadowAdapter(torn, config)
        for task in tasks:
            step = DpoStep(torn, torn_shadow, task, config)
            for i in range(len(step.pending)):
                with torch.autocast("cpu", torch.bfloat16, enabled=i % 2 == 0), torch.set_grad_enabled(i % 3 == 0):
                    step.run_slice()
                with torch.inference_mode(i % 2 == 1):
                    functional.linear(torch.ones(2, 32), weights["model.layers.0.self_attn.q_proj.weight"])
                    inference_lm(torch.tensor([[1, 2, 3]]))
                torch.manual_seed(i)
            assert step.done
    assert _same(torn_shadow.tensors(), shadow.tensors())
    assert _same(snapshot(torn_shadow), snapshot(shadow))
    assert not _same(shadow.tensors(), ShadowAdapter(build(llama), config).tensors())


@pytest.mark.parametrize(("slice_tokens", "chunk_tokens"), [(16, 7), (48, 7), (1024, 1)])
def test_micro_batches_and_chunks_change_nothing(llama, monkeypatch, slice_tokens, chunk_tokens):
    task = make_task(5)
    monkeypatch.setattr(dpo_slices, "HEAD_CHUNK_TOKENS", 1000)
    whole, (metrics, scores) = _gradients(llama, task, make_training())
    monkeypatch.setattr(dpo_slices, "HEAD_CHUNK_TOKENS", chunk_tokens)
    cut, (cut_metrics, cut_scores) = _gradients(llama, task, make_training(max_slice_tokens=slice_tokens))
    for name, grad in whole.items():
        assert (cut[name] - grad).norm() < 1e-5 * grad.norm(), name
    assert [s.pair_id for s in scores] == [p.pair_id for p in task.pairs] == [s.pair_id for s in cut_scores]
    assert [s.margin for s in cut_scores] == pytest.approx([s.margin for s in scores], abs=1e-5)
    assert cut_metrics.loss == pytest.approx(metrics.loss, rel=1e-5)
    assert cut_metrics.grad_norm == pytest.approx(metrics.grad_norm, rel=1e-4)


def test_padding_does_not_change_scores(llama):
    task = make_task(2, TaskKind.EVALUATE)
    long = TokenizedPair("long", tuple(range(3, 30)), tuple(range(30, 50)), tuple(range(40, 60)))
    padded = FineTuneTask("padded", TaskKind.EVALUATE, (*task.pairs, long))
    alone = run(start(llama, task)[2]).result()[1]
    together = run(start(llama, padded)[2]).result()[1]
    for a, b in zip(alone, together, strict=False):
        assert a.policy_chosen_logp == pytest.approx(b.policy_chosen_logp, abs=1e-4)
        assert a.reference_rejected_logp == pytest.approx(b.reference_rejected_logp, abs=1e-4)


def _sequence_logp(model, prompt, completion):
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        logp = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])
    return logp[len(prompt) - 1 :].sum().item()


def test_evaluate_changes_nothing_and_equals_plain_hugging_face(llama):
    task, config = make_task(3, TaskKind.EVALUATE), make_training(max_slice_tokens=48, beta=0.3)
    model, shadow, step = start(llama, task, config)
    before, peak = snapshot(shadow), 0
    kinds = set()
    while step.next_slice:
        kinds.add(step.run_slice())
        peak = max(peak, step.activation_bytes)
    assert not kinds & {SliceKind.BACKWARD_LAYER, SliceKind.OPTIMIZER}
    assert _same(before, snapshot(shadow))
    assert step.activation_bytes == 0
    widest = max(spec.num_tokens for spec in DpoStep(model, shadow, task, config).pending)
    assert peak <= 2 * widest * 32 * 4  # one hidden state and some scalars, no kept inputs
    metrics, scores = step.result()
    assert metrics.grad_norm is None
    base = AutoModelForCausalLM.from_pretrained(llama)
    for pair, score in zip(task.pairs, scores, strict=True):
        values = {}
        for name, completion in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
            values[name] = _sequence_logp(model.causal_lm, pair.prompt_ids, completion)
            assert getattr(score, f"policy_{name}_logp") == pytest.approx(values[name], abs=1e-4)
            reference = _sequence_logp(base, pair.prompt_ids, completion)
            assert getattr(score, f"reference_{name}_logp") == pytest.approx(reference, abs=1e-4)
            values[name] -= reference
        margin = 0.3 * (values["chosen"] - values["rejected"])
        assert score.margin == pytest.approx(margin, abs=1e-4)
        assert score.loss == pytest.approx(-functional.logsigmoid(torch.tensor(margin)).item(), abs=1e-4)
    assert metrics.accuracy == sum(s.margin > 0 for s in scores) / 3


def test_fresh_adapter_has_loss_ln_2(llama):
    _, _, step = start(llama, make_task(2, TaskKind.EVALUATE), warm=False)
    assert run(step).result()[0].loss == pytest.approx(0.693147, abs=1e-6)


def test_training_lowers_the_loss(llama):
    config, task = make_training(beta=0.5), make_task(4)
    model = build(llama, warm=False)
    shadow = ShadowAdapter(model, config)
    losses = [run(DpoStep(model, shadow, task, config)).result()[0].loss for _ in range(8)]
    assert losses[-1] < 0.1 < 0.69 < losses[0]
    assert shadow.num_steps == 8


def _poison_grad(step):
    run_to_loss(step)
    next(iter(step.gradients().values())).view(-1)[3] = float("nan")


def _poison_hidden(step):
    for _ in range(3):
        step.run_slice()
    step.batches[0].hidden[0, 0, 0] = float("nan")


@pytest.mark.parametrize("poison", [_poison_grad, _poison_hidden])
def test_nan_diverges_and_leaves_everything_untouched(llama, poison):
    config = make_training()
    model, shadow, first = start(llama, make_task(), config)
    run(first)
    before = snapshot(shadow)
    step = DpoStep(model, shadow, make_task(seed=1), config)
    poison(step)
    with pytest.raises(DivergedError):
        run(step)
    _assert_discarded(step)
    assert _same(before, snapshot(shadow))
    assert run(DpoStep(model, shadow, make_task(seed=1), config)).done


def test_exploding_loss_is_discarded_but_evaluated(llama, monkeypatch):
    monkeypatch.setattr(dpo, "MAX_LOSS", 0.01)
    config = make_training(max_slice_tokens=16)
    model, shadow, step = start(llama, make_task(), config)
    before = snapshot(shadow)
    with pytest.raises(DivergedError, match=r"up to 0\.01"):
        run(step)
    _assert_discarded(step)
    assert _same(before, snapshot(shadow))
    assert run(DpoStep(model, shadow, make_task(kind=TaskKind.EVALUATE), config)).result()[0].loss > 0.01


def test_discard_after_any_slice(llama):
    config = make_training(max_slice_tokens=48)
    model, shadow, step = start(llama, make_task(), config)
    before = snapshot(shadow)
    for count in range(len(step.pending)):
        step = DpoStep(model, shadow, make_task(), config)
        for _ in range(count):
            step.run_slice()
        step.discard()
        _assert_discarded(step)
    assert _same(before, snapshot(shadow))
    assert all(p.grad is None for p in model.causal_lm.parameters())


def _assert_discarded(step):
    assert step.activation_bytes == 0
    assert step.next_slice is None
    assert not step.done
    with pytest.raises(TrainingError, match="no slice left"):
        step.run_slice()
    with pytest.raises(TrainingError, match="not done"):
        step.result()


def test_activations_shrink_in_backward_and_end_at_zero(llama):
    _, _, step = start(llama, make_task())
    held = {}
    while step.next_slice:
        held.setdefault(step.run_slice(), []).append(step.activation_bytes)
    backward = held[SliceKind.BACKWARD_LAYER]
    assert backward == sorted(backward, reverse=True)
    assert held[SliceKind.OPTIMIZER] == [0]
    step.discard()  # after the end it changes nothing
    assert step.done
    assert step.result()[1]


def test_too_long_pairs_and_out_of_memory(llama, monkeypatch):
    pair = TokenizedPair("x", (3,) * 40, (4,) * 30 + (5,), (4,) * 30 + (6,))
    with pytest.raises(PairTooLongError, match="max_length_tokens=64"):  # the model's context
        start(llama, FineTuneTask("t", TaskKind.TRAIN, (pair,)))
    model, _, step = start(llama, make_task())

    def fail(*_):
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(model, "run_layer", fail)
    with pytest.raises(TrainingError, match="out of device memory in a reference_layer slice"):
        run(step)
    _assert_discarded(step)

import pytest
import torch
from torch.nn import functional

from engine.training import dpo_loss
from engine.training.dpo_loss import sigmoid_dpo, sum_per_row, token_log_probs, token_log_probs_and_grad
from tests.support.trainable_models import VOCAB, build, save_model


@pytest.mark.parametrize("block", [1, 16, VOCAB, 8192])
@pytest.mark.parametrize("scale", [1.0, 100.0], ids=["soft", "peaked"])
def test_blockwise_head_equals_autograd(tmp_path, monkeypatch, block, scale):
    monkeypatch.setattr(dpo_loss, "_VOCABULARY_BLOCK", block)
    model = build(save_model(tmp_path, "llama"))
    with torch.no_grad():
        model.head_weight.mul_(scale)
    hidden = torch.randn(9, 32, generator=torch.Generator().manual_seed(2))
    targets = torch.arange(9) * 6
    leaf = hidden.clone().requires_grad_(True)
    logits = functional.linear(model.final_norm(leaf), model.head_weight)
    expected = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    (expected_grad,) = torch.autograd.grad(expected.sum(), leaf)
    with torch.no_grad():
        log_probs, grad = token_log_probs_and_grad(model, hidden, targets)
        torch.testing.assert_close(token_log_probs(model, hidden, targets), log_probs, rtol=0, atol=0)
    torch.testing.assert_close(log_probs, expected.detach(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-4 * scale)


def test_sigmoid_dpo_coefficients_are_the_derivative():
    policy = torch.tensor([-3.0, -8.0, -40.0, -2.0], requires_grad=True)
    reference = torch.tensor([-4.0, -7.0, -1.0, -9.0])
    table, coefficients = sigmoid_dpo(policy, reference, beta=0.5)
    (grad,) = torch.autograd.grad(table[4].sum(), policy)
    torch.testing.assert_close(0.5 * coefficients, grad)
    torch.testing.assert_close(table[5], torch.tensor([20.0, -4.0]))


def test_rows_are_summed_apart_even_beside_nan():
    sums = sum_per_row(torch.tensor([1.0, 2.0, float("nan"), 4.0]), torch.tensor([0, 0, 1, 3]), 4)
    assert sums[0] == 3
    assert sums[1].isnan()
    assert (sums[2], sums[3]) == (0, 4)

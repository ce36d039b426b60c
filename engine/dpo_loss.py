"""Token log-probabilities, their gradient, and the sigmoid DPO loss (Rafailov et al., arXiv 2305.18290).

Shapes: c completion tokens of a head chunk, C of a micro-batch, n pairs, H hidden size, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

from engine.trainable import TrainableModel


def token_log_probs(model: TrainableModel, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probability (nats, fp32 [c]) of each target given the last layer's output [c, H]."""
    logits = model.head(hidden).float()
    return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def token_log_probs_and_grad(
    model: TrainableModel, hidden: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probabilities [c] and d logp_t / d hidden_t [c, H], unscaled, in one head pass.

    The gradient with respect to the logits is `onehot(target) - softmax(logits)`. Writing it over the logits keeps
    one [c, V] tensor where autograd would hold three.
    """
    leaf = hidden.detach().requires_grad_(True)
    with torch.enable_grad():
        normed = model.final_norm(leaf)
    weight = model.head_weight
    logits = functional.linear(normed.detach(), weight).float()
    log_z = logits.logsumexp(-1, keepdim=True)
    column = targets.unsqueeze(-1)
    log_probs = (logits.gather(-1, column) - log_z).squeeze(-1)
    probs = logits.sub_(log_z).exp_()
    probs.scatter_add_(-1, column, probs.new_full(column.shape, -1.0))
    grad_normed = probs.neg_().to(weight.dtype) @ weight
    (grad,) = torch.autograd.grad(normed, leaf, grad_normed)
    return log_probs, grad


@dataclass(frozen=True, slots=True)
class DpoTerms:
    """The loss of each pair of a micro-batch and what backward needs."""

    table: torch.Tensor
    """fp32 [6, n]: policy chosen, policy rejected, reference chosen, reference rejected, loss, margin."""
    coefficients: torch.Tensor
    """fp32 [2n]: d loss / d policy log-probability over beta, in (-1, 1), chosen rows first.

    Kept near 1 and multiplied by beta / (pairs of the task) in the fp32 gradients, so that half precision does not
    underflow on the way through the layers.
    """


def sum_per_row(values: torch.Tensor, rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Sum [C] by row index into [num_rows]. A masked sum: `index_add_` is not deterministic on CUDA."""
    mask = rows.unsqueeze(0) == torch.arange(num_rows, device=rows.device).unsqueeze(1)
    return torch.where(mask, values, 0.0).sum(1)


def sigmoid_dpo(policy: torch.Tensor, reference: torch.Tensor, beta: float) -> DpoTerms:
    """DPO terms from sequence log-probabilities [2n], chosen rows first."""
    chosen, rejected = (policy - reference).chunk(2)
    margin = beta * (chosen - rejected)
    loss = -functional.logsigmoid(margin)
    slope = torch.sigmoid(-margin)
    table = torch.stack([*policy.chunk(2), *reference.chunk(2), loss, margin])
    return DpoTerms(table, torch.cat([-slope, slope]))

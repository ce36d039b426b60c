"""From token ids to micro-batches: what one slice takes through one layer.

Truncation, per pair: the prompt keeps its last `max_prompt_tokens` tokens, then each completion loses its end
until prompt and completion fit `max_length_tokens`. (TRL's `keep_start` also cuts the completion's end.)

A sequence is prompt and completion without its last token, which predicts nothing. Sequences of a micro-batch are all
chosen ones, then all rejected ones in the same order. They are rows, padded on the right; or, where that is fewer
tokens, all lie in one row in which each prompt stands once (`core.dpo_slices`, `engine.training.attention`).

Pairs whose reference log-probabilities are known never share a micro-batch with pairs whose are not, which would cost
them the reference forward pass.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from core.dpo_slices import PairGroup, group_pairs
from core.errors import PairTooLongError, TrainingError
from core.types import TokenizedPair
from engine.training.attention import SharedPrompts

_PAD_ID = 0
"""Any valid id will do: no real token attends to a pad and no loss is taken there."""


@dataclass(slots=True)
class MicroBatch:
    """Some pairs of a task as tensors, and what is alive of them between two slices.

    Shapes: n pairs, T tokens per row, N in all (`group.num_tokens`), C completion tokens of all sequences
    (`group.num_targets`), H hidden size. Hidden states have the model's dtype.
    """

    group: PairGroup
    """Indices of the pairs in the task, and their numbers of tokens."""
    ids: torch.Tensor
    """int64 [2n, T], or [1, N] with shared prompts."""
    positions: torch.Tensor
    """int64 [C]: index into the flattened `ids` of the state that predicts each completion token.

    The end of a shared prompt predicts the first token of both completions.
    """
    targets: torch.Tensor
    """int64 [C]: the completion tokens, sequence after sequence."""
    rows: torch.Tensor
    """int64 [C]: sequence of each completion token."""
    weights: torch.Tensor
    """fp32 [n]: factors of the pairs' losses."""
    reference: torch.Tensor | None
    """fp32 [2n]: log-probabilities of the sequences under the reference; None: they are to be computed."""
    shared: SharedPrompts | None
    """Layout of the tokens if every prompt stands once; None for rows."""

    hidden: torch.Tensor | None = None
    """[2n, T, H] or [1, N, H]; after a last layer the scored positions [C, H]; in backward the gradient, as before."""
    layer_inputs: list[torch.Tensor] = field(default_factory=list)
    """Kept by the policy's forward pass, popped by backward."""
    reference_logps: list[torch.Tensor] = field(default_factory=list)
    """Token log-probabilities under the reference, by head chunk."""
    policy_logps: list[torch.Tensor] = field(default_factory=list)
    head_grads: list[torch.Tensor] = field(default_factory=list)
    """d logp / d hidden by head chunk, [c, H]."""

    @property
    def state(self) -> torch.Tensor:
        """The hidden state that the slice before has left; TrainingError if there is none."""
        if self.hidden is None:
            raise TrainingError("slices ran out of order")
        return self.hidden

    @property
    def activation_bytes(self) -> int:
        """Device memory of what is alive; ids and indices are not counted."""
        kept = [*self.layer_inputs, *self.reference_logps, *self.policy_logps, *self.head_grads]
        return sum(tensor.nbytes for tensor in kept) + (0 if self.hidden is None else self.hidden.nbytes)


def cut_pair(pair: TokenizedPair, max_prompt_tokens: int, max_length_tokens: int) -> TokenizedPair:
    """Apply the truncation rule of this module. Weight and cached reference stay: the reference is that of the cut.

    Raises:
        PairTooLongError: After cutting, a completion has no token that can be scored, or the two are equal.
    """
    prompt = pair.prompt_ids[-max_prompt_tokens:]
    room = max(0, max_length_tokens - len(prompt))
    chosen, rejected = pair.chosen_ids[:room], pair.rejected_ids[:room]
    limits = f"max_prompt_tokens={max_prompt_tokens}, max_length_tokens={max_length_tokens}"
    if min(len(chosen), len(rejected)) + min(len(prompt), 1) < 2:
        raise PairTooLongError(f"pair {pair.pair_id}: nothing is left of a completion within {limits}")
    if chosen == rejected:
        raise PairTooLongError(f"pair {pair.pair_id}: the completions are equal within {limits}")
    return replace(pair, prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected)


def make_micro_batches(
    pairs: Sequence[TokenizedPair],
    *,
    max_slice_tokens: int,
    vocab_size: int,
    device: torch.device,
    share_prompts: bool = True,
) -> list[MicroBatch]:
    """Group pairs by length so that their tokens, padding included, stay within `max_slice_tokens`; at least one each.

    The pairs are as `cut_pair` leaves them. Those with a cached reference come first; one that is not finite counts as
    none. `share_prompts` computes each prompt once where that is fewer tokens. Callers are outside inference mode.

    Raises:
        TrainingError: No pair at all, a weight that is negative or not finite, or a token id outside the vocabulary
            (on CUDA that would end the process).
    """
    if not pairs:
        raise TrainingError("a fine-tune task needs at least one pair")
    for pair in pairs:
        ids = pair.prompt_ids + pair.chosen_ids + pair.rejected_ids
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise TrainingError(f"pair {pair.pair_id}: a token id is outside the vocabulary of {vocab_size}")
        if not 0 <= pair.weight < math.inf:
            raise TrainingError(
                f"pair {pair.pair_id}: its weight is {pair.weight}, allowed are finite ones from 0"
            )
    is_cached = [pair.reference is not None and all(map(math.isfinite, pair.reference)) for pair in pairs]
    groups = group_pairs(
        [pair.lengths for pair in pairs], is_cached, max_slice_tokens, share_prompts=share_prompts
    )
    return [_collate([pairs[i] for i in group.members], group, device) for group in groups]


def _collate(pairs: list[TokenizedPair], group: PairGroup, device: torch.device) -> MicroBatch:
    """Build the tensors of one group."""
    sequences = [(p.prompt_ids, p.chosen_ids) for p in pairs] + [(p.prompt_ids, p.rejected_ids) for p in pairs]
    ids, starts = _share(pairs, sequences) if group.shares_prompts else _pad(sequences, group.row_tokens)
    positions: list[int] = []
    targets: list[int] = []
    rows: list[int] = []
    for row, (prompt, completion) in enumerate(sequences):
        before, own = starts[row]
        # The very first token of a sequence is predicted by nothing.
        positions.extend([before + len(prompt) - 1] if prompt else [])
        positions.extend(range(own, own + len(completion) - 1))
        scored = completion if prompt else completion[1:]
        targets.extend(scored)
        rows.extend([row] * len(scored))
    reference = [p.reference[side] for side in (0, 1) for p in pairs if group.is_cached and p.reference]
    computed = [(len(p.prompt_ids), len(p.chosen_ids) - 1, len(p.rejected_ids) - 1) for p in pairs]
    return MicroBatch(
        group,
        ids=torch.tensor(ids, dtype=torch.int64, device=device),
        positions=torch.tensor(positions, dtype=torch.int64, device=device),
        targets=torch.tensor(targets, dtype=torch.int64, device=device),
        rows=torch.tensor(rows, dtype=torch.int64, device=device),
        weights=torch.tensor([pair.weight for pair in pairs], dtype=torch.float32, device=device),
        reference=torch.tensor(reference, dtype=torch.float32, device=device) if reference else None,
        shared=SharedPrompts.of(computed, device) if group.shares_prompts else None,
    )


_Sequences = list[tuple[tuple[int, ...], tuple[int, ...]]]
"""Prompt and completion: all chosen, then all rejected."""
_Layout = tuple[list[list[int]], list[tuple[int, int]]]
"""Rows of ids, and for each sequence where its prompt and its completion start among them."""


def _pad(sequences: _Sequences, width: int) -> _Layout:
    """Lay out a row for each sequence."""
    ids, starts = [], []
    for row, (prompt, completion) in enumerate(sequences):
        tokens = [*prompt, *completion[:-1]]
        ids.append(tokens + [_PAD_ID] * (width - len(tokens)))
        starts.append((row * width, row * width + len(prompt)))
    return ids, starts


def _share(pairs: list[TokenizedPair], sequences: _Sequences) -> _Layout:
    """Lay out one row, in the order that `SharedPrompts` wants."""
    ids: list[int] = []
    prompt_starts: list[int] = []
    for pair in pairs:
        prompt_starts.append(len(ids))
        ids.extend(pair.prompt_ids)
    starts = []
    for row, (_, completion) in enumerate(sequences):
        starts.append((prompt_starts[row % len(pairs)], len(ids)))
        ids.extend(completion[:-1])
    return [ids], starts

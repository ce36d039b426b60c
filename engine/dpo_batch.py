"""From token ids to padded micro-batches: what one slice takes through one layer.

Truncation, per pair: the prompt keeps its last `max_prompt_tokens` tokens, then each completion loses its end
until prompt and completion fit `max_length_tokens`. (TRL's `keep_start` also cuts the completion's end.)

A row is prompt and completion without the row's last token, which predicts nothing. Rows of a micro-batch are all
chosen sequences, then all rejected ones in the same order, padded on the right.

Pairs whose reference log-probabilities are known never share a micro-batch with pairs whose are not, which would cost
them the reference forward pass.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from core.errors import PairTooLongError, TrainingError
from core.types import TokenizedPair

_PAD_ID = 0
"""Any valid id will do: no real token attends to a pad and no loss is taken there."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Some pairs of a task as tensors. n pairs, T tokens per row, C completion tokens in all rows together."""

    pair_indices: tuple[int, ...]
    """Positions of the pairs in the task."""
    ids: torch.Tensor
    """int64 [2n, T]."""
    positions: torch.Tensor
    """int64 [C]: index into the flattened rows [2n * T] of the state that predicts each completion token."""
    targets: torch.Tensor
    """int64 [C]: the completion tokens, row after row."""
    rows: torch.Tensor
    """int64 [C]: row of each completion token."""
    weights: torch.Tensor
    """fp32 [n]: factors of the pairs' losses."""
    reference: torch.Tensor | None
    """fp32 [2n]: log-probabilities of the rows under the reference; None: they are to be computed."""

    @property
    def num_pairs(self) -> int:
        """N."""
        return len(self.pair_indices)

    @property
    def num_tokens(self) -> int:
        """Tokens that a layer slice computes, padding included."""
        return self.ids.numel()

    @property
    def num_targets(self) -> int:
        """C, the completion tokens that are scored."""
        return self.targets.numel()


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
    pairs: Sequence[TokenizedPair], *, max_slice_tokens: int, vocab_size: int, device: torch.device
) -> list[MicroBatch]:
    """Group pairs by length so that padded rows stay within `max_slice_tokens`, at least one pair each.

    Pairs with a cached reference come first. One that is not finite counts as none.

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
    groups: list[list[int]] = []
    for index in sorted(range(len(pairs)), key=lambda i: (not _is_cached(pairs[i]), _row_tokens(pairs[i]))):
        # Sorted by length, so the pair being added is the longest of its group.
        fits = groups and 2 * (len(groups[-1]) + 1) * _row_tokens(pairs[index]) <= max_slice_tokens
        if fits and _is_cached(pairs[groups[-1][0]]) == _is_cached(pairs[index]):
            groups[-1].append(index)
        else:
            groups.append([index])
    return [_collate(pairs, group, device) for group in groups]


def _is_cached(pair: TokenizedPair) -> bool:
    return pair.reference is not None and all(map(math.isfinite, pair.reference))


def _row_tokens(pair: TokenizedPair) -> int:
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) - 1


def _collate(pairs: Sequence[TokenizedPair], group: list[int], device: torch.device) -> MicroBatch:
    """Build the tensors of one group; callers are outside inference mode."""
    members = [pairs[i] for i in group]
    width = max(_row_tokens(pair) for pair in members)
    sequences = [(p.prompt_ids, p.chosen_ids) for p in members] + [(p.prompt_ids, p.rejected_ids) for p in members]
    ids: list[list[int]] = []
    positions: list[int] = []
    targets: list[int] = []
    rows: list[int] = []
    for row, (prompt, completion) in enumerate(sequences):
        tokens = [*prompt, *completion]
        first = max(1, len(prompt))  # The very first token of a sequence is predicted by nothing.
        ids.append(tokens[:-1] + [_PAD_ID] * (width - len(tokens) + 1))
        positions.extend(range(row * width + first - 1, row * width + len(tokens) - 1))
        targets.extend(tokens[first:])
        rows.extend([row] * (len(tokens) - first))
    known = [pair.reference for pair in members if _is_cached(pair) and pair.reference]
    reference = [values[side] for side in (0, 1) for values in known]
    return MicroBatch(
        tuple(group),
        ids=torch.tensor(ids, dtype=torch.int64, device=device),
        positions=torch.tensor(positions, dtype=torch.int64, device=device),
        targets=torch.tensor(targets, dtype=torch.int64, device=device),
        rows=torch.tensor(rows, dtype=torch.int64, device=device),
        weights=torch.tensor([pair.weight for pair in members], dtype=torch.float32, device=device),
        reference=torch.tensor(reference, dtype=torch.float32, device=device) if known else None,
    )

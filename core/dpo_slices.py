"""A DPO step as data: how its pairs form micro-batches, and the slices that follow. The simulator runs the same ones.

A micro-batch has one of two layouts.
Plain: two rows of a pair, prompt with chosen and prompt with rejected, padded to the widest row of the group.
Shared: each prompt once and nothing padded, all prompts, then all chosen, then all rejected completions.

The last token of a sequence predicts nothing and is left out of both.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from core.types import SliceKind

PairLengths = tuple[int, int, int]
"""Tokens of a pair's prompt, chosen and rejected completion."""

_MIN_SAVED_SHARE = 0.08
"""Saved tokens from which sharing pays: its attention costs some copies more (docs/measurements/prompt_sharing.md)."""
HEAD_CHUNK_TOKENS = 128
"""Most completion tokens of one head slice."""
_MIN_CHUNK_TOKENS = 16
"""Below this a head chunk costs the reading of the head's weights, whatever its size."""


@dataclass(frozen=True, slots=True)
class PairGroup:
    """Pairs that go through a layer together."""

    lengths: tuple[PairLengths, ...]
    members: tuple[int, ...] = (0,)
    """Indices of the pairs."""
    is_cached: bool = False
    """Their reference log-probabilities are known."""
    may_share: bool = True

    @property
    def row_tokens(self) -> int:
        """Width of the widest row of the plain layout."""
        return max(prompt + max(chosen, rejected) - 1 for prompt, chosen, rejected in self.lengths)

    @property
    def shared_tokens(self) -> int:
        """Tokens of the shared layout."""
        return sum(sum(lengths) - 2 for lengths in self.lengths)

    @property
    def num_targets(self) -> int:
        """Completion tokens that are scored; without a prompt the first token of a row is predicted by nothing."""
        return sum(chosen + rejected - (2 if prompt == 0 else 0) for prompt, chosen, rejected in self.lengths)

    @property
    def shares_prompts(self) -> bool:
        """The shared layout is the cheaper one."""
        plain = 2 * len(self.members) * self.row_tokens
        return self.may_share and self.shared_tokens <= (1 - _MIN_SAVED_SHARE) * plain

    @property
    def num_tokens(self) -> int:
        """Tokens that a layer computes, padding included."""
        return self.shared_tokens if self.shares_prompts else 2 * len(self.members) * self.row_tokens

    def fits(self, max_tokens: int) -> bool:
        """A slice of `max_tokens` may have this group.

        The shared layout's attention is padded, to the longest prompt before the longest completion. With even lengths
        these keys are at most twice the tokens; uneven groups stay within that.
        """
        prompts, chosen, rejected = zip(*self.lengths, strict=True)
        padded_keys = 2 * len(self.members) * (max(prompts) + max(*chosen, *rejected))
        return self.num_tokens <= max_tokens and (not self.shares_prompts or padded_keys <= 2 * max_tokens)


def group_pairs(
    pairs: Sequence[PairLengths], is_cached: Sequence[bool], max_tokens: int, *, share_prompts: bool
) -> list[PairGroup]:
    """Group pairs by length so that a group has at most `max_tokens` tokens, at least one pair each.

    Args:
        pairs: lengths of the pairs after cutting.
        is_cached: for each pair, whether its reference log-probabilities are known. Such pairs come first, in groups of
            their own.
        max_tokens: bound of a group; a single pair may have more.
        share_prompts: allow the shared layout. Each group takes the cheaper one.
    """
    groups: list[PairGroup] = []
    for i in sorted(range(len(pairs)), key=lambda i: (not is_cached[i], pairs[i][0] + max(pairs[i][1:]))):
        single = PairGroup((pairs[i],), (i,), is_cached[i], share_prompts)
        if groups and groups[-1].is_cached == single.is_cached:
            lengths, members = (*groups[-1].lengths, pairs[i]), (*groups[-1].members, i)
            joined = replace(single, lengths=lengths, members=members)
            if joined.fits(max_tokens):
                groups[-1] = joined
                continue
        groups.append(single)
    return groups


@dataclass(frozen=True, slots=True)
class SliceSpec:
    """One slice that is to run."""

    kind: SliceKind
    num_tokens: int
    """Tokens for embedding and layers, padding included, completion tokens for head and loss, 0 for the optimizer."""
    group: int = 0
    """Index of its micro-batch."""
    part: int = 0
    """The layer, or the first completion token of a head chunk."""


class StepModel(Protocol):
    """Sizes of a model that decide the slices of a step."""

    @property
    def num_layers(self) -> int:
        """Decoder layers."""

    @property
    def layer_weights(self) -> int:
        """Parameters of one layer."""

    @property
    def head_weights(self) -> int:
        """Parameters of the LM head."""


def step_slices(groups: Sequence[PairGroup], model: StepModel, *, trains: bool = True) -> Iterator[SliceSpec]:
    """All slices of a step in order: reference and policy forward, loss and backward of each group, then the optimizer.

    A group whose reference is known has no reference forward; an evaluation (not `trains`) ends with the last loss.
    A head chunk is no more work than a layer: with 152k words a head is nine layers.
    """
    passes = (
        (SliceKind.REFERENCE_LAYER, SliceKind.REFERENCE_HEAD),
        (SliceKind.POLICY_LAYER, SliceKind.POLICY_HEAD),
    )
    for number, group in enumerate(groups):
        tokens, targets = group.num_tokens, group.num_targets
        chunk = min(HEAD_CHUNK_TOKENS, max(tokens * model.layer_weights // model.head_weights, _MIN_CHUNK_TOKENS))
        for layer_kind, head_kind in passes[group.is_cached :]:
            yield SliceSpec(SliceKind.EMBED, tokens, number)
            for i in range(model.num_layers):
                yield SliceSpec(layer_kind, tokens, number, i)
            for start in range(0, targets, chunk):
                yield SliceSpec(head_kind, min(chunk, targets - start), number, start)
        yield SliceSpec(SliceKind.LOSS, targets, number)
        for i in reversed(range(model.num_layers)) if trains else ():
            yield SliceSpec(SliceKind.BACKWARD_LAYER, tokens, number, i)
    if trains:
        yield SliceSpec(SliceKind.OPTIMIZER, 0)

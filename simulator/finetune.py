"""The slices of a DPO step as data: what `engine.dpo.DpoStep` would run, in its order, without a model.

A test compares the two.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from core.types import SliceKind

_MIN_CHUNK_TOKENS = 16
"""As in `engine.dpo`: a smaller head chunk costs the reading of the head's weights all the same."""


@dataclass(frozen=True, slots=True)
class SliceWork:
    """One slice of a step."""

    kind: SliceKind
    num_tokens: int
    """Padded tokens for embedding and layers, completion tokens for head and loss, 0 for the optimizer."""
    batch_tokens: int
    """Padded tokens of the micro-batch that is in progress after it; 0 if none is."""


@dataclass(frozen=True, slots=True)
class StepModel:
    """What a model's shape and the settings say about a step."""

    num_layers: int
    head_chunk_tokens: int
    """`training.head_chunk_tokens`."""
    layer_weights: int
    head_weights: int
    """Parameters of one layer and of the head. With 152k words a head is nine layers: its chunks are cut until one
    is a layer's work."""

    def chunk_tokens(self, layer_tokens: int) -> int:
        """Completion tokens of one head chunk beside layers of `layer_tokens`."""
        as_a_layer = layer_tokens * self.layer_weights // self.head_weights
        return min(self.head_chunk_tokens, max(as_a_layer, _MIN_CHUNK_TOKENS))


@dataclass(frozen=True, slots=True)
class PairShape:
    """Lengths of one preference pair in tokens."""

    num_prompt: int
    num_chosen: int
    num_rejected: int

    @property
    def row_tokens(self) -> int:
        """Width of a micro-batch of this pair alone: the last token of a row predicts nothing."""
        return self.num_prompt + max(self.num_chosen, self.num_rejected) - 1

    @property
    def num_targets(self) -> int:
        """Completion tokens that are scored; without a prompt the first token of a row is predicted by nothing."""
        return self.num_chosen + self.num_rejected - (2 if self.num_prompt == 0 else 0)


def step_slices(
    pairs: Sequence[PairShape], model: StepModel, slice_tokens: int, num_cached: int = 0
) -> list[SliceWork]:
    """All slices of one training step, in order.

    Args:
        pairs: the step's pairs; sorted by width they are grouped as in `engine.dpo_batch.make_micro_batches`.
        model: shape of the model.
        slice_tokens: padded tokens that a micro-batch may have; a single pair may have more.
        num_cached: so many of `pairs`, the first ones, have cached reference log-probabilities. They come first, in
            micro-batches of their own, which have no reference forward pass.
    """
    slices: list[SliceWork] = []
    for members, has_reference in ((pairs[:num_cached], True), (pairs[num_cached:], False)):
        for group in _groups(members, slice_tokens):
            slices.extend(_micro_batch_slices(group, model, has_reference))
    return [*slices, SliceWork(SliceKind.OPTIMIZER, 0, 0)]


def _groups(pairs: Sequence[PairShape], slice_tokens: int) -> list[list[PairShape]]:
    groups: list[list[PairShape]] = []
    for pair in sorted(pairs, key=lambda pair: pair.row_tokens):
        if groups and 2 * (len(groups[-1]) + 1) * pair.row_tokens <= slice_tokens:
            groups[-1].append(pair)
        else:
            groups.append([pair])
    return groups


def _micro_batch_slices(pairs: list[PairShape], model: StepModel, has_reference: bool) -> Iterator[SliceWork]:
    tokens = 2 * len(pairs) * pairs[-1].row_tokens
    targets = sum(pair.num_targets for pair in pairs)
    chunk = model.chunk_tokens(tokens)
    passes = [
        (SliceKind.REFERENCE_LAYER, SliceKind.REFERENCE_HEAD),
        (SliceKind.POLICY_LAYER, SliceKind.POLICY_HEAD),
    ]
    for layer_kind, head_kind in passes[has_reference:]:
        yield SliceWork(SliceKind.EMBED, tokens, tokens)
        for _ in range(model.num_layers):
            yield SliceWork(layer_kind, tokens, tokens)
        for start in range(0, targets, chunk):
            yield SliceWork(head_kind, min(chunk, targets - start), tokens)
    yield SliceWork(SliceKind.LOSS, targets, tokens)
    for left in reversed(range(model.num_layers)):
        yield SliceWork(SliceKind.BACKWARD_LAYER, tokens, tokens if left else 0)

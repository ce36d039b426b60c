"""The slices of a DPO step as data: what `engine.training.dpo.DpoStep` would run, in its order, without a model.

A test compares the two.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from core.pair_groups import PairGroup, PairShape, group_pairs
from core.types import SliceKind

_MIN_CHUNK_TOKENS = 16
"""As in `engine.training.dpo`: a smaller head chunk costs the reading of the head's weights all the same."""


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


def step_slices(
    pairs: Sequence[PairShape],
    model: StepModel,
    slice_tokens: int,
    num_cached: int = 0,
    *,
    share_prompts: bool = True,
) -> list[SliceWork]:
    """All slices of one training step, in order.

    Args:
        pairs: the step's pairs, grouped by `core.pair_groups` as in the engine.
        model: shape of the model.
        slice_tokens: padded tokens that a micro-batch may have; a single pair may have more.
        num_cached: so many of `pairs`, the first ones, have cached reference log-probabilities. They come first, in
            micro-batches of their own, which have no reference forward pass.
        share_prompts: `experiments.share_prompt`.
    """
    slices: list[SliceWork] = []
    is_cached = [number < num_cached for number in range(len(pairs))]
    for group in group_pairs(pairs, is_cached, slice_tokens, share_prompts=share_prompts):
        slices.extend(_micro_batch_slices([pairs[i] for i in group.members], group, model))
    return [*slices, SliceWork(SliceKind.OPTIMIZER, 0, 0)]


def _micro_batch_slices(pairs: list[PairShape], group: PairGroup, model: StepModel) -> Iterator[SliceWork]:
    tokens = group.num_tokens
    targets = sum(pair.num_targets for pair in pairs)
    chunk = model.chunk_tokens(tokens)
    passes = [
        (SliceKind.REFERENCE_LAYER, SliceKind.REFERENCE_HEAD),
        (SliceKind.POLICY_LAYER, SliceKind.POLICY_HEAD),
    ]
    for layer_kind, head_kind in passes[group.is_cached :]:
        yield SliceWork(SliceKind.EMBED, tokens, tokens)
        for _ in range(model.num_layers):
            yield SliceWork(layer_kind, tokens, tokens)
        for start in range(0, targets, chunk):
            yield SliceWork(head_kind, min(chunk, targets - start), tokens)
    yield SliceWork(SliceKind.LOSS, targets, tokens)
    for left in reversed(range(model.num_layers)):
        yield SliceWork(SliceKind.BACKWARD_LAYER, tokens, tokens if left else 0)

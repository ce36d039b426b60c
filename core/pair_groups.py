"""Which pairs of a fine-tune step go through a layer together, and in which of two layouts. Shared with the simulator.

Plain: two rows of a pair, prompt with chosen and prompt with rejected, padded to the widest row of the group.
Shared: each prompt once and nothing padded, all prompts, then all chosen, then all rejected completions.

The last token of a sequence predicts nothing and is left out of both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

_MIN_SAVED_SHARE = 0.08
"""Saved tokens from which sharing pays: its attention costs some copies more (docs/prompt_sharing.md)."""


@dataclass(frozen=True, slots=True)
class PairShape:
    """Lengths of one preference pair in tokens."""

    num_prompt: int
    num_chosen: int
    num_rejected: int

    @property
    def row_tokens(self) -> int:
        """Width of the wider row of the plain layout."""
        return self.num_prompt + max(self.num_chosen, self.num_rejected) - 1

    @property
    def shared_tokens(self) -> int:
        """Tokens of the shared layout."""
        return self.num_prompt + self.num_chosen + self.num_rejected - 2

    def tokens(self, *, share_prompts: bool) -> int:
        """Tokens that a layer computes for this pair alone."""
        return PairGroup.of(0, self, is_cached=False, may_share=share_prompts).num_tokens

    @property
    def num_targets(self) -> int:
        """Completion tokens that are scored; without a prompt the first token of a row is predicted by nothing."""
        return self.num_chosen + self.num_rejected - (2 if self.num_prompt == 0 else 0)


@dataclass(slots=True)
class PairGroup:
    """A micro-batch in the making. Pairs are added by `with_pair`, in order of `row_tokens`."""

    members: list[int]
    """Indices of the pairs."""
    is_cached: bool
    """Their reference log-probabilities are known."""
    row_tokens: int
    """Of the widest row."""
    prompt_tokens: int
    """Of the longest prompt."""
    completion_tokens: int
    """Of the longest completion."""
    shared_tokens: int
    """Tokens in the shared layout."""
    may_share: bool

    @classmethod
    def of(cls, index: int, shape: PairShape, *, is_cached: bool, may_share: bool) -> "PairGroup":
        """A group of one pair."""
        longest = max(shape.num_chosen, shape.num_rejected)
        widths = (shape.row_tokens, shape.num_prompt, longest, shape.shared_tokens)
        return cls([index], is_cached, *widths, may_share)

    @property
    def shares_prompts(self) -> bool:
        """Whether the shared layout is the cheaper one."""
        plain = 2 * len(self.members) * self.row_tokens
        return self.may_share and self.shared_tokens <= (1 - _MIN_SAVED_SHARE) * plain

    @property
    def num_tokens(self) -> int:
        """Tokens that a layer computes, padding included."""
        return self.shared_tokens if self.shares_prompts else 2 * len(self.members) * self.row_tokens

    def joined(self, other: "PairGroup") -> "PairGroup":
        """Both together."""
        return PairGroup(
            [*self.members, *other.members],
            self.is_cached,
            max(self.row_tokens, other.row_tokens),
            max(self.prompt_tokens, other.prompt_tokens),
            max(self.completion_tokens, other.completion_tokens),
            self.shared_tokens + other.shared_tokens,
            self.may_share,
        )

    def fits(self, max_tokens: int) -> bool:
        """Whether a slice of `max_tokens` may have this group.

        The shared layout's attention is padded, to the longest prompt before the longest completion. With even lengths
        these keys are at most twice the tokens; uneven groups stay within that.
        """
        padded_keys = 2 * len(self.members) * (self.prompt_tokens + self.completion_tokens)
        return self.num_tokens <= max_tokens and (not self.shares_prompts or padded_keys <= 2 * max_tokens)


def group_pairs(
    shapes: Sequence[PairShape], is_cached: Sequence[bool], max_tokens: int, *, share_prompts: bool
) -> list[PairGroup]:
    """Group pairs by length so that a group has at most `max_tokens` tokens, at least one pair each.

    Args:
        shapes: lengths of the pairs after cutting.
        is_cached: which of them have known reference log-probabilities. They come first, in groups of their own.
        max_tokens: bound of a group; a single pair may have more.
        share_prompts: allow the shared layout. Each group takes the cheaper one.
    """
    order = sorted(range(len(shapes)), key=lambda i: (not is_cached[i], shapes[i].row_tokens))
    groups: list[PairGroup] = []
    for index in order:
        single = PairGroup.of(index, shapes[index], is_cached=is_cached[index], may_share=share_prompts)
        if groups and groups[-1].is_cached == single.is_cached:
            joined = groups[-1].joined(single)
            if joined.fits(max_tokens):
                groups[-1] = joined
                continue
        groups.append(single)
    return groups

"""The beginnings of prompts that come again and again: system prompts, few-shot heads, conversations that go on.

A trie over blocks of tokens, since a prefix cache keeps whole blocks. Each block has a weight: the requests that
began with everything up to it, the newest counting 1 and each older one less, by half with every `half_life` requests.
A weight above 1 takes two requests at least; that is what makes a prefix shared. Pure: no clock, no engine.
"""

import heapq
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

_LARGEST_UNIT = 1e100
"""A new request weighs ever more instead of all old ones less; beyond this all weights are scaled down."""
_KEPT_SHARE = 0.75
"""Share of the blocks that stays when the bound is reached and the least asked for is forgotten."""
_PROMPTS_AT_LEAST = 8
"""Prompts that are remembered, however long they are."""
_TOKEN_BYTES = array("I").itemsize


@dataclass(frozen=True, slots=True)
class HotPrefix:
    """A prefix that requests share."""

    token_ids: tuple[int, ...]
    new_tokens: int
    """Those at its end that no hotter prefix of the same answer begins with."""
    saved_tokens: float
    """Sum over the new tokens of the weight of the requests that need them."""


@dataclass(slots=True, eq=False)
class _Block:
    weight: float = 0.0
    children: "dict[bytes, _Block]" = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _SharedBlock:
    tokens: bytes
    weight: float
    parent: "_SharedBlock | None"
    """The block before it; None at the beginning of a prompt."""
    total: float = 0.0
    """Weight of the heaviest way from here to the end, this block included."""
    heavy: "_SharedBlock | None" = None
    """The next block on that way; None if it ends here."""

    def way(self) -> "Iterator[_SharedBlock]":
        """The heaviest way from here, this block first."""
        block: _SharedBlock | None = self
        while block is not None:
            yield block
            block = block.heavy


class HotPrefixes:
    """Counts prompts and names the prefixes that are worth keeping warm.

    At most `max_blocks` are remembered, 4 bytes a token and some 300 a block, and of one prompt an eighth of them.
    """

    def __init__(self, block_tokens: int, *, half_life: float = 256.0, max_blocks: int = 4096) -> None:
        if block_tokens < 1 or half_life <= 0 or max_blocks < _PROMPTS_AT_LEAST:
            raise ValueError(
                f"block_tokens and half_life must be positive, max_blocks {_PROMPTS_AT_LEAST} or more"
            )
        self._block_tokens = block_tokens
        self._growth = 2.0 ** (1.0 / half_life)
        self._max_blocks = max_blocks
        self._max_depth = max_blocks // _PROMPTS_AT_LEAST
        self._root = _Block()
        self._unit = 1.0
        self.num_blocks = 0
        """Blocks that are remembered."""

    def observe(self, prompt_ids: Sequence[int]) -> None:
        """Count a request. Its last token is always computed, so it has no use for a block that this one ends."""
        self._unit *= self._growth
        block = self._root
        for tokens in self._blocks_of(prompt_ids):
            child = block.children.get(tokens)
            if child is None:
                child = block.children[tokens] = _Block()
                self.num_blocks += 1
            child.weight += self._unit
            block = child
        if self.num_blocks > self._max_blocks:
            self._forget()
        if self._unit > _LARGEST_UNIT:
            for block in _walk(self._root):
                block.weight /= self._unit
            self._unit = 1.0

    def weight(self, prefix_ids: Sequence[int]) -> float:
        """Weight of the requests that began so, at least to the end of its last whole block; 0 if none is known."""
        block = self._root
        for tokens in self._cut(prefix_ids, len(prefix_ids) // self._block_tokens):
            child = block.children.get(tokens)
            if child is None:
                return 0.0
            block = child
        return block.weight / self._unit

    def hottest(self, count: int, max_tokens: int) -> list[HotPrefix]:
        """Up to `count` shared prefixes that together save the most, the one that saves most first.

        Paths of a tree that cover the most weight are the first ones of its long-path decomposition: each block goes
        on to its heaviest child, and every other child begins a path of its own. A prefix that would exceed
        `max_tokens` new tokens in all is cut, and is the last.
        """
        blocks = self._shared_blocks()
        starts = [block for block in blocks if block.parent is None or block.parent.heavy is not block]
        found: list[HotPrefix] = []
        room = max_tokens // self._block_tokens
        for start in heapq.nlargest(count, starts, key=lambda block: block.total):
            path = list(islice(start.way(), room))
            if not path:
                break
            room -= len(path)
            found.append(self._prefix(path))
        return found

    def _shared_blocks(self) -> list[_SharedBlock]:
        """Blocks of weight above 1, parents before children, with the heaviest way from each."""
        blocks: list[_SharedBlock] = []
        nodes: list[tuple[_Block, _SharedBlock | None]] = [(self._root, None)]
        for node, parent in nodes:  # it grows meanwhile
            for tokens, child in node.children.items():
                if child.weight > self._unit:
                    blocks.append(_SharedBlock(tokens, child.weight / self._unit, parent))
                    nodes.append((child, blocks[-1]))
        for block in reversed(blocks):
            block.total = block.weight + (block.heavy.total if block.heavy else 0.0)
            before = block.parent
            if before is not None and (before.heavy is None or block.total > before.heavy.total):
                before.heavy = block
        return blocks

    def _prefix(self, path: list[_SharedBlock]) -> HotPrefix:
        whole = deque(path)
        while (parent := whole[0].parent) is not None:
            whole.appendleft(parent)
        ids = array("I", b"".join(block.tokens for block in whole))
        weight = sum(block.weight for block in path)
        return HotPrefix(tuple(ids), len(path) * self._block_tokens, weight * self._block_tokens)

    def _blocks_of(self, prompt_ids: Sequence[int]) -> Iterator[bytes]:
        return self._cut(prompt_ids, min(max(0, len(prompt_ids) - 1) // self._block_tokens, self._max_depth))

    def _cut(self, ids: Sequence[int], num_blocks: int) -> Iterator[bytes]:
        size = self._block_tokens * _TOKEN_BYTES
        data = array("I", ids[: num_blocks * self._block_tokens]).tobytes()
        return (data[start : start + size] for start in range(0, len(data), size))

    def _forget(self) -> None:
        """Drop the blocks of least weight. No block weighs more than its parent, so whole ends of prompts go."""
        blocks = list(_walk(self._root))
        weights = sorted(block.weight for block in blocks)
        bound = weights[len(weights) - int(_KEPT_SHARE * self._max_blocks) - 1]
        for block in [self._root, *blocks]:
            if block.weight > bound or block is self._root:
                block.children = {
                    tokens: child for tokens, child in block.children.items() if child.weight > bound
                }
        self.num_blocks = len(weights) - bisect_right(weights, bound)


def _walk(root: _Block) -> Iterator[_Block]:
    """All blocks below; the children of one that was handed out are read when the next is asked for."""
    left = list(root.children.values())
    while left:
        block = left.pop()
        yield block
        left.extend(block.children.values())

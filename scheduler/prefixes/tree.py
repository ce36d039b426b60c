"""The content of an engine's prefix cache: a radix tree over token ids, one KV block at a time.

Fed by what the engine says of its cache (`engine.prefix_cache`): a block is stored under its parent's hash, a block is
removed, everything is cleared. Asked for the longest cached prefix of a prompt. vLLM never shares keys between
adapters, so every adapter version is a namespace of its own; `None` is the bare base model.

A node is a run of blocks without a branch (path compression); it is split where prompts part and joined again when
only one way is left. An engine may drop a block whose successors it still has, so each block knows whether it is
cached. Memory is bounded: beyond `max_bytes` the ends of the branches that were used longest ago are forgotten.
Forgetting is always safe: the tree then knows less than is cached, never more.

Pure: times are the caller's, and need only grow. Source: SGLang's `RadixCache`.
"""

import heapq
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

BLOCK_OVERHEAD_BYTES = 480
"""Python objects of one block apart from its token ids, with hashes of 32 bytes, in runs of two blocks; in long runs
it is 300 (measured with `tracemalloc`)."""

BlockHash = bytes | int
"""The engine's name of a block; unique among those in its cache."""

_TOKEN_BYTES = 4
_LEAF_SLACK = 64


@dataclass(frozen=True, slots=True)
class BlocksStored:
    """Consecutive blocks of one prompt are in the cache."""

    namespace: str | None
    """Adapter version; None is the base model."""
    parent_hash: BlockHash | None
    """The block before the first one; None if they begin a prompt."""
    token_ids: tuple[int, ...]
    """Tokens of all blocks, each in [0, 2^32)."""
    block_hashes: tuple[BlockHash, ...]


@dataclass(frozen=True, slots=True)
class BlocksRemoved:
    """Blocks are no longer in the cache."""

    block_hashes: tuple[BlockHash, ...]


@dataclass(frozen=True, slots=True)
class CacheCleared:
    """Nothing that was said before holds any more: the cache was emptied, or news of it were lost."""


PrefixChange = BlocksStored | BlocksRemoved | CacheCleared


@dataclass(slots=True, eq=False)
class _Block:
    """One KV block."""

    tokens: bytes
    """Four bytes each."""
    node: "_Node"
    hash: BlockHash | None = None
    """The name by which the engine knows it; None once the engine has dropped it."""


@dataclass(slots=True, eq=False)
class _Node:
    """A run of blocks without a branch. Only the root of a namespace has none."""

    namespace: str | None
    parent: "_Node | None"
    last_used_s: float
    blocks: list[_Block] = field(default_factory=list)
    children: "dict[bytes, _Node]" = field(default_factory=dict)
    """Keyed by the tokens of their first block."""
    is_queued: bool = False
    """Stands in the tree's eviction heap."""

    def split(self, position: int) -> "_Node":
        """Cut the run before `position`; the second part, which is returned, takes the children."""
        tail = _Node(self.namespace, self, self.last_used_s)
        tail.blocks, self.blocks = self.blocks[position:], self.blocks[:position]
        tail.children, self.children = self.children, {tail.blocks[0].tokens: tail}
        tail._adopt(tail.blocks)
        return tail

    def join(self) -> None:
        """Take the only child into this run; what was used of it was used of this one too."""
        (child,) = self.children.values()
        self.blocks.extend(child.blocks)
        self.children = child.children
        self._adopt(child.blocks)
        child.blocks, child.children, child.parent = [], {}, None

    def touch(self, now_s: float) -> None:
        """Mark the branch as used, up to the root."""
        current: _Node | None = self
        while current is not None and current.last_used_s < now_s:
            current.last_used_s = now_s
            current = current.parent

    def _adopt(self, blocks: list[_Block]) -> None:
        for block in blocks:
            block.node = self
        for child in self.children.values():
            child.parent = self


class PrefixTree:
    """See the module docstring. Not thread-safe."""

    def __init__(self, block_tokens: int, max_bytes: int = 64 << 20) -> None:
        """Make an empty tree, whose own memory counts `BLOCK_OVERHEAD_BYTES` and four bytes a token for each block."""
        if block_tokens < 1:
            raise ValueError(f"block_tokens must be at least 1, not {block_tokens}")
        self.block_tokens = block_tokens
        self._max_blocks = max_bytes // (_TOKEN_BYTES * block_tokens + BLOCK_OVERHEAD_BYTES)
        if self._max_blocks < 1:
            raise ValueError(f"max_bytes={max_bytes} does not hold one block of {block_tokens} tokens")
        self.roots: dict[str | None, _Node] = {}
        """One for each namespace that has blocks."""
        self._index: dict[BlockHash, _Block] = {}
        self.leaves: list[tuple[float, int, _Node]] = []
        """Heap of the ends of branches, those that were used longest ago first; an entry may be stale."""
        self._tie = 0
        self.num_blocks = 0
        """Blocks that the tree has, dropped ones with cached successors included."""

    def __len__(self) -> int:
        """Blocks that are cached."""
        return len(self._index)

    def apply(self, change: PrefixChange, now_s: float) -> None:
        """Take in one change of the engine's cache; ValueError if stored tokens are not those of whole blocks."""
        match change:
            case BlocksStored():
                self._store(change, now_s)
            case BlocksRemoved(block_hashes):
                self._remove(block_hashes)
            case CacheCleared():
                self._remove(list(self._index))

    def longest_match(self, namespace: str | None, token_ids: Sequence[int], now_s: float) -> int:
        """Tokens of the prompt's longest cached prefix, in whole blocks. What was matched counts as used at `now_s`."""
        last = self.roots.get(namespace)
        if last is None:
            return 0
        num_tokens = 0
        for block in self._walk(last, token_ids):
            if block.hash is None:
                break
            num_tokens += self.block_tokens
            last = block.node
        last.touch(now_s)
        return num_tokens

    def _store(self, stored: BlocksStored, now_s: float) -> None:
        """Add consecutive blocks. Those whose parent the tree does not know are ignored."""
        token_ids, block_hashes = stored.token_ids, stored.block_hashes
        if len(token_ids) != len(block_hashes) * self.block_tokens:
            raise ValueError(
                f"{len(token_ids)} tokens are not {len(block_hashes)} blocks of {self.block_tokens} tokens"
            )
        block: _Block | None = None
        namespace = stored.namespace
        if stored.parent_hash is not None:
            block = self._index.get(stored.parent_hash)
            if block is None:
                return
            namespace = block.node.namespace
        for key, block_hash in zip(self._keys(token_ids), block_hashes, strict=True):
            block = self._extend(namespace, block, key, now_s)
            if self._index.get(block_hash) is not block:
                self._hold(block, block_hash)
        if block is not None:
            block.node.touch(now_s)
        self._shrink()

    def _remove(self, block_hashes: Iterable[BlockHash]) -> None:
        """Mark blocks as dropped; unknown ones are ignored."""
        for block_hash in block_hashes:
            block = self._index.pop(block_hash, None)
            if block is not None:
                block.hash = None
                self._prune(block.node)

    def _walk(self, node: _Node, token_ids: Sequence[int]) -> Iterator[_Block]:
        """The blocks along a prompt from a root on, as far as the tree goes."""
        position = 0
        for key in self._keys(token_ids):
            if position == len(node.blocks):
                child = node.children.get(key)
                if child is None:
                    return
                node, position = child, 0
            block = node.blocks[position]
            if block.tokens != key:
                return
            yield block
            position += 1

    def _keys(self, token_ids: Sequence[int]) -> Iterator[bytes]:
        """Whole blocks of a prompt, packed; lazily, since most prompts part from the tree early."""
        size = self.block_tokens
        for start in range(0, len(token_ids) - size + 1, size):
            yield array("I", token_ids[start : start + size]).tobytes()

    def _extend(self, namespace: str | None, parent: _Block | None, key: bytes, now_s: float) -> _Block:
        """The block of these tokens after `parent`; made if there is none."""
        if parent is None:
            node = self.roots.get(namespace)
            if node is None:
                node = self.roots[namespace] = _Node(namespace, None, now_s)
        else:
            node = parent.node
            if parent is not node.blocks[-1]:
                position = node.blocks.index(parent) + 1
                if node.blocks[position].tokens == key:
                    return node.blocks[position]
                self._queue(node.split(position))
        child = node.children.get(key)
        if child is not None:
            return child.blocks[0]
        if node.parent is None or node.children:
            branch = _Node(namespace, node, node.last_used_s)
            node.children[key] = branch
            node = branch
        block = _Block(key, node)
        node.blocks.append(block)
        self.num_blocks += 1
        self._queue(node)
        return block

    def _hold(self, block: _Block, block_hash: BlockHash) -> None:
        """Note that a block is cached; one hash for each block, one block for each hash: the newest counts."""
        if block.hash is not None:
            del self._index[block.hash]
        block.hash = block_hash
        former = self._index.get(block_hash)
        self._index[block_hash] = block
        if former is not None:
            former.hash = None
            self._prune(former.node)

    def _prune(self, node: _Node) -> None:
        """Drop blocks at the end of a branch that are not cached, upwards."""
        while not node.children:
            while node.blocks and node.blocks[-1].hash is None:
                key = node.blocks.pop().tokens
                self.num_blocks -= 1
            if node.blocks:
                self._queue(node)
                return
            parent = node.parent
            if parent is None:
                self.roots.pop(node.namespace, None)
                return
            del parent.children[key]
            node.parent = None
            node = parent
        if len(node.children) == 1 and node.parent is not None:
            node.join()
            self._queue(node)

    def _queue(self, node: _Node) -> None:
        """A branch's end may be evicted; one entry each, put right when it comes up."""
        if not node.is_queued and not node.children:
            node.is_queued = True
            self._tie += 1
            heapq.heappush(self.leaves, (node.last_used_s, self._tie, node))
            if len(self.leaves) > 2 * self.num_blocks + _LEAF_SLACK:
                self._drop_stale_leaves()

    def _drop_stale_leaves(self) -> None:
        """Entries of nodes that are gone or have children again; below the bound nothing else takes them out."""
        entries, self.leaves = self.leaves, []
        for entry in entries:
            if entry[2].blocks and not entry[2].children:
                self.leaves.append(entry)
            else:
                entry[2].is_queued = False
        heapq.heapify(self.leaves)

    def _shrink(self) -> None:
        """Forget what was used longest ago, from the ends of branches, down to the bound."""
        while self.num_blocks > self._max_blocks:
            queued_s, _, node = heapq.heappop(self.leaves)
            node.is_queued = False
            if not node.blocks or node.children or queued_s < node.last_used_s:
                if node.blocks:
                    self._queue(node)
                continue
            block = node.blocks[-1]
            if block.hash is not None:
                del self._index[block.hash]
                block.hash = None
            self._prune(node)

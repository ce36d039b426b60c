"""Which executor holds which prefix: a radix tree over token ids, one KV block at a time.

Fed by what engines say of their prefix caches (`engine.prefixes.kv_events`): a block is stored under its parent's
hash, a block
is removed, everything is cleared. Asked for the longest prefix of a prompt in each executor's cache. vLLM never shares
keys between adapters, so every adapter version is a namespace of its own; `None` is the bare base model.

A node is a run of blocks without a branch (path compression); it is split where prompts part and joined again when
only one way is left. Holders are kept for each block, since an engine may drop a block whose successors it still has.
Memory is bounded: beyond `max_bytes` the ends of the branches that were used longest ago are forgotten. Forgetting is
always safe: the tree then knows less than is cached, never more.

Pure: times are the caller's, and need only grow. Sources: SGLang's `RadixCache`; Preble (arXiv 2407.00023) for a tree
over several engines.
"""

import heapq
from array import array
from collections.abc import Iterable, Iterator, Sequence

from scheduler.prefixes.node import Block, BlockHash, Node

BLOCK_OVERHEAD_BYTES = 480
"""Python objects of one block apart from its token ids, with hashes of 32 bytes, in runs of two blocks; in long runs
it is 300 (`benchmarks.studies.memory_costs`)."""

_TOKEN_BYTES = 4
_LEAF_SLACK = 64


class PrefixTree:
    """See the module docstring. Not thread-safe."""

    def __init__(self, block_tokens: int, max_bytes: int = 64 << 20) -> None:
        """Make an empty tree.

        Args:
            block_tokens: tokens of one KV block; the same for all executors.
            max_bytes: bound of the tree's own memory, at `BLOCK_OVERHEAD_BYTES` and four bytes a token for each block.

        Raises:
            ValueError: a block without tokens, or a bound that not even one block fits into.
        """
        if block_tokens < 1:
            raise ValueError(f"block_tokens must be at least 1, not {block_tokens}")
        self.block_tokens = block_tokens
        self._key_bytes = _TOKEN_BYTES * block_tokens
        self._max_blocks = max_bytes // (self._key_bytes + BLOCK_OVERHEAD_BYTES)
        if self._max_blocks < 1:
            raise ValueError(f"max_bytes={max_bytes} does not hold one block of {block_tokens} tokens")
        self._roots: dict[str | None, Node] = {}
        self._index: dict[str, dict[BlockHash, Block]] = {}
        self._leaves: list[tuple[float, int, Node]] = []
        self._tie = 0
        self.num_blocks = 0
        self.num_forgotten = 0
        """Blocks dropped to stay within `max_bytes`."""
        self.num_orphans = 0
        """Blocks that could not be placed, because their parent was not known."""

    @property
    def num_bytes(self) -> int:
        """Estimated memory of the tree."""
        return self.num_blocks * (self._key_bytes + BLOCK_OVERHEAD_BYTES)

    @property
    def num_nodes(self) -> int:
        """Runs of blocks; walks the whole tree."""
        count, stack = 0, list(self._roots.values())
        while stack:
            node = stack.pop()
            count += bool(node.blocks)
            stack.extend(node.children.values())
        return count

    def num_held(self, executor_id: str) -> int:
        """Blocks of one executor."""
        return len(self._index.get(executor_id, ()))

    def store(
        self,
        executor_id: str,
        namespace: str | None,
        parent_hash: BlockHash | None,
        token_ids: Sequence[int],
        block_hashes: Sequence[BlockHash],
        now_s: float,
    ) -> None:
        """An executor has these consecutive blocks now.

        Args:
            executor_id: who.
            namespace: adapter version; None is the base model.
            parent_hash: the block before the first one; None: they begin a prompt. Blocks whose parent the tree does
                not know of this executor are ignored and counted in `num_orphans`.
            token_ids: tokens of all blocks, each in [0, 2^32).
            block_hashes: one for each block.
            now_s: time of use.

        Raises:
            ValueError: the number of tokens is not that of the blocks.
        """
        if len(token_ids) != len(block_hashes) * self.block_tokens:
            raise ValueError(
                f"{len(token_ids)} tokens are not {len(block_hashes)} blocks of {self.block_tokens} tokens"
            )
        index = self._index.setdefault(executor_id, {})
        block: Block | None = None
        if parent_hash is not None:
            block = index.get(parent_hash)
            if block is None:
                self.num_orphans += len(block_hashes)
                return
            namespace = block.node.namespace
        for key, block_hash in zip(self._keys(token_ids), block_hashes, strict=True):
            block = self._extend(namespace, block, key, now_s)
            if index.get(block_hash) is not block:
                self._hold(executor_id, block, block_hash)
        if block is not None:
            block.node.touch(now_s)
        self._shrink()

    def remove(self, executor_id: str, block_hashes: Iterable[BlockHash]) -> None:
        """An executor has these blocks no more; unknown ones are ignored."""
        index = self._index.get(executor_id, {})
        for block_hash in block_hashes:
            block = index.pop(block_hash, None)
            if block is not None:
                block.let_go(executor_id)
                self._prune(block.node)

    def clear(self, executor_id: str) -> None:
        """An executor has nothing any more, or is gone."""
        self.remove(executor_id, list(self._index.get(executor_id, ())))
        self._index.pop(executor_id, None)

    def longest_match(self, namespace: str | None, token_ids: Sequence[int], now_s: float) -> dict[str, int]:
        """Tokens of the prompt's longest prefix in the cache of each executor that has a block of it.

        Counts whole blocks, all from the first on. What was matched counts as used at `now_s`.
        """
        matched: dict[str, int] = {}
        root = self._roots.get(namespace)
        if root is None:
            return matched
        alive: set[str] | None = None
        num_tokens, last = 0, root
        for block in self._walk(root, token_ids):
            holders = {executor_id for executor_id, _ in block.hashes}
            alive = holders if alive is None else alive & holders
            if not alive:
                break
            num_tokens += self.block_tokens
            for executor_id in alive:
                matched[executor_id] = num_tokens
            last = block.node
        last.touch(now_s)
        return matched

    def _walk(self, root: Node, token_ids: Sequence[int]) -> Iterator[Block]:
        """The blocks along a prompt, as far as the tree goes."""
        node, position = root, 0
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

    def _extend(self, namespace: str | None, parent: Block | None, key: bytes, now_s: float) -> Block:
        """The block of these tokens after `parent`; made if there is none."""
        if parent is None:
            node = self._roots.get(namespace)
            if node is None:
                node = self._roots[namespace] = Node(namespace, None, now_s)
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
            node = node.add_child(key)
        block = Block(key, node)
        node.blocks.append(block)
        self.num_blocks += 1
        self._queue(node)
        return block

    def _hold(self, executor_id: str, block: Block, block_hash: BlockHash) -> None:
        """Note that an executor has a block; one hash for each block, one block for each hash: the newest counts."""
        index = self._index[executor_id]
        for holder, old_hash in block.hashes:
            if holder == executor_id:
                del index[old_hash]
        block.let_go(executor_id)
        block.hashes = (*block.hashes, (executor_id, block_hash))
        former = index.get(block_hash)
        index[block_hash] = block
        if former is not None:
            former.let_go(executor_id)
            self._prune(former.node)

    def _prune(self, node: Node) -> None:
        """Drop blocks at the end of a branch that nobody holds, upwards."""
        while not node.children:
            while node.blocks and not node.blocks[-1].hashes:
                key = node.blocks.pop().tokens
                self.num_blocks -= 1
            if node.blocks:
                self._queue(node)
                return
            parent = node.parent
            if parent is None:
                self._roots.pop(node.namespace, None)
                return
            del parent.children[key]
            node.parent = None
            node = parent
        if len(node.children) == 1 and node.parent is not None:
            node.join()
            self._queue(node)

    def _queue(self, node: Node) -> None:
        """A branch's end may be evicted; one entry each, put right when it comes up."""
        if not node.is_queued and not node.children:
            node.is_queued = True
            self._tie += 1
            heapq.heappush(self._leaves, (node.last_used_s, self._tie, node))
            if len(self._leaves) > 2 * self.num_blocks + _LEAF_SLACK:
                self._drop_stale_leaves()

    def _drop_stale_leaves(self) -> None:
        """Entries of nodes that are gone or have children again; below the bound nothing else takes them out."""
        entries, self._leaves = self._leaves, []
        for entry in entries:
            if entry[2].blocks and not entry[2].children:
                self._leaves.append(entry)
            else:
                entry[2].is_queued = False
        heapq.heapify(self._leaves)

    def _shrink(self) -> None:
        """Forget what was used longest ago, from the ends of branches, down to the bound."""
        while self.num_blocks > self._max_blocks:
            queued_s, _, node = heapq.heappop(self._leaves)
            node.is_queued = False
            if not node.blocks or node.children or queued_s < node.last_used_s:
                if node.blocks:
                    self._queue(node)
                continue
            self.num_forgotten += 1
            block = node.blocks[-1]
            for executor_id, block_hash in block.hashes:
                del self._index[executor_id][block_hash]
            block.hashes = ()
            self._prune(node)

"""The nodes of `scheduler.prefixes.tree`: runs of KV blocks between two branchings."""

BlockHash = bytes | int
"""As the engine names a block; unique for one executor."""


class Block:
    """One KV block: its tokens, and under which hash each executor that has it knows it."""

    __slots__ = ("hashes", "node", "tokens")

    def __init__(self, tokens: bytes, node: "Node") -> None:
        self.tokens = tokens
        """Four bytes each."""
        self.node = node
        self.hashes: tuple[tuple[str, BlockHash], ...] = ()

    def let_go(self, executor_id: str) -> None:
        """The executor has it no more."""
        self.hashes = tuple(pair for pair in self.hashes if pair[0] != executor_id)


class Node:
    """A run of blocks without a branch. Only the root of a namespace has none."""

    __slots__ = ("blocks", "children", "is_queued", "last_used_s", "namespace", "parent")

    def __init__(self, namespace: str | None, parent: "Node | None", last_used_s: float) -> None:
        self.namespace = namespace
        self.parent = parent
        self.last_used_s = last_used_s
        self.blocks: list[Block] = []
        self.children: dict[bytes, Node] = {}
        """By the tokens of their first block."""
        self.is_queued = False
        """Stands in the tree's eviction heap."""

    def add_child(self, key: bytes) -> "Node":
        """A new branch, so far without its first block."""
        child = Node(self.namespace, self, self.last_used_s)
        self.children[key] = child
        return child

    def split(self, position: int) -> "Node":
        """Cut the run before `position`; the second part, which is returned, takes the children."""
        tail = Node(self.namespace, self, self.last_used_s)
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
        current: Node | None = self
        while current is not None and current.last_used_s < now_s:
            current.last_used_s = now_s
            current = current.parent

    def _adopt(self, blocks: list[Block]) -> None:
        for block in blocks:
            block.node = self
        for child in self.children.values():
            child.parent = self

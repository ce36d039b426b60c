"""What an engine says of its prefix cache, as plain data, and how a tree takes it in."""

from dataclasses import dataclass

from scheduler.prefixes.node import BlockHash
from scheduler.prefixes.tree import PrefixTree


@dataclass(frozen=True, slots=True)
class BlocksStored:
    """Consecutive blocks of one prompt are in the cache."""

    namespace: str | None
    """Adapter version; None is the base model."""
    parent_hash: BlockHash | None
    """The block before the first one; None if they begin a prompt."""
    token_ids: tuple[int, ...]
    """Of all blocks."""
    block_hashes: tuple[BlockHash, ...]


@dataclass(frozen=True, slots=True)
class BlocksRemoved:
    """Blocks are no longer in the cache."""

    block_hashes: tuple[BlockHash, ...]


@dataclass(frozen=True, slots=True)
class CacheCleared:
    """Nothing that was said before holds any more: the cache was emptied, or news of it were lost."""


PrefixChange = BlocksStored | BlocksRemoved | CacheCleared


def apply_change(tree: PrefixTree, executor_id: str, change: PrefixChange, now_s: float) -> None:
    """Bring a tree up to date with one change at one executor."""
    match change:
        case BlocksStored(namespace, parent_hash, token_ids, block_hashes):
            tree.store(executor_id, namespace, parent_hash, token_ids, block_hashes, now_s)
        case BlocksRemoved(block_hashes):
            tree.remove(executor_id, block_hashes)
        case CacheCleared():
            tree.clear(executor_id)

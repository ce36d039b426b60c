import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.prefixes.tree import BLOCK_OVERHEAD_BYTES, BlocksRemoved, BlocksStored, CacheCleared, PrefixTree

BLOCK = 2
BLOCK_BYTES = 4 * BLOCK + BLOCK_OVERHEAD_BYTES


def tree_of(max_blocks=1000):
    return PrefixTree(BLOCK, max_blocks * BLOCK_BYTES)


def hashes_of(tokens, namespace=None):
    """What an engine would name the blocks: each name stands for the whole prefix."""
    return [repr((namespace, tuple(tokens[: end + BLOCK]))).encode() for end in range(0, len(tokens) - 1, BLOCK)]


def store(tree, tokens, namespace=None, now_s=0.0, skip=0):
    """Store a prompt's blocks from number `skip` on."""
    hashes = hashes_of(tokens, namespace)
    parent = hashes[skip - 1] if skip else None
    stored = tuple(tokens[skip * BLOCK : len(hashes) * BLOCK])
    tree.apply(BlocksStored(namespace, parent, stored, tuple(hashes[skip:])), now_s)


def remove(tree, *hashes):
    tree.apply(BlocksRemoved(hashes), 0.0)


def match(tree, tokens, namespace=None, now_s=0.0):
    return tree.longest_match(namespace, tokens, now_s)


def nodes(tree):
    """Runs of blocks."""
    found, stack = [], list(tree.roots.values())
    while stack:
        node = stack.pop()
        found += [node] if node.blocks else []
        stack.extend(node.children.values())
    return found


def test_the_longest_cached_prefix_of_each_prompt_is_found():
    tree = tree_of()
    store(tree, [1, 2, 3, 4, 5, 6])
    store(tree, [1, 2, 9, 9])
    assert match(tree, [1, 2, 3, 4, 7, 7]) == 4
    assert match(tree, [1, 2, 9, 9, 9]) == 4
    assert match(tree, [1, 2, 8, 8]) == 2
    assert match(tree, [1]) == 0
    assert match(tree, [8, 8]) == 0


def test_adapter_versions_share_nothing():
    tree = tree_of()
    store(tree, [1, 2], namespace="v0001")
    assert match(tree, [1, 2]) == 0
    assert match(tree, [1, 2], "v0002") == 0
    assert match(tree, [1, 2], "v0001") == 2


def test_blocks_join_their_parent_wherever_it_came_from():
    tree = tree_of()
    store(tree, [1, 2, 3, 4])
    store(tree, [1, 2, 3, 4, 5, 6], skip=2)
    assert match(tree, [1, 2, 3, 4, 5, 6]) == 6


def test_a_block_without_its_parent_is_no_prefix():
    tree = tree_of()
    store(tree, [1, 2, 3, 4], skip=1)
    assert match(tree, [1, 2, 3, 4]) == 0
    assert tree.num_blocks == 0


def test_a_removed_block_cuts_the_prefix_and_stored_again_restores_it():
    tree = tree_of()
    store(tree, [1, 2, 3, 4, 5, 6])
    remove(tree, hashes_of([1, 2, 3, 4])[1])
    assert match(tree, [1, 2, 3, 4, 5, 6]) == 2
    store(tree, [1, 2, 3, 4], skip=1)
    assert match(tree, [1, 2, 3, 4, 5, 6]) == 6


def test_what_comes_after_a_gap_is_no_prefix():
    tree = tree_of()
    store(tree, [1, 2, 3, 4, 5, 6])
    remove(tree, hashes_of([1, 2, 3, 4])[1])
    assert match(tree, [1, 2, 3, 4, 5, 6]) == 2
    assert (len(tree), tree.num_blocks) == (2, 3)


def test_a_cleared_cache_leaves_nothing():
    tree = tree_of()
    store(tree, [1, 2, 3, 4])
    store(tree, [1, 2], "v0001")
    tree.apply(CacheCleared(), 0.0)
    assert match(tree, [1, 2, 3, 4]) == 0
    assert (len(tree), tree.num_blocks, nodes(tree)) == (0, 0, [])


def test_runs_without_a_branch_are_one_node_and_join_again_when_a_branch_goes():
    tree = tree_of()
    store(tree, list(range(40)))
    assert (tree.num_blocks, len(nodes(tree))) == (20, 1)
    store(tree, [*range(20), 99, 99])
    assert (tree.num_blocks, len(nodes(tree))) == (21, 3)
    remove(tree, hashes_of([*range(20), 99, 99])[-1])
    assert (tree.num_blocks, len(nodes(tree))) == (20, 1)


def test_what_was_used_longest_ago_is_forgotten_first_from_its_end():
    tree = tree_of(max_blocks=4)
    store(tree, [1, 2, 3, 4], now_s=1.0)
    store(tree, [5, 6, 7, 8], now_s=2.0)
    match(tree, [1, 2, 3, 4], now_s=3.0)
    store(tree, [9, 9], now_s=4.0)
    assert match(tree, [5, 6, 7, 8], now_s=5.0) == 2
    assert match(tree, [1, 2, 3, 4], now_s=5.0) == 4
    assert tree.num_blocks == 4


def test_the_shared_prefix_of_a_used_branch_is_as_fresh_as_the_branch():
    tree = tree_of(max_blocks=4)
    store(tree, [1, 2, 3, 4], now_s=1.0)
    store(tree, [5, 6], now_s=2.0)
    store(tree, [1, 2, 7, 7], now_s=3.0)
    remove(tree, hashes_of([1, 2, 3, 4])[1], hashes_of([1, 2, 7, 7])[1])
    store(tree, [8, 8, 8, 9, 9, 9], now_s=4.0)
    assert match(tree, [1, 2], now_s=4.0) == 2
    assert match(tree, [5, 6], now_s=4.0) == 0


def test_prompts_that_come_and_go_leave_nothing_behind():
    tree = tree_of()
    for number in range(2000):
        store(tree, [number, number, 1, 1], now_s=float(number))
        tree.apply(CacheCleared(), 0.0)
    assert tree.num_blocks == 0
    assert len(tree.leaves) < 100


@pytest.mark.parametrize(("block_tokens", "max_bytes"), [(0, 1 << 20), (16, 10)])
def test_a_tree_that_can_hold_nothing_is_refused(block_tokens, max_bytes):
    with pytest.raises(ValueError, match="block"):
        PrefixTree(block_tokens, max_bytes)


def test_tokens_that_are_no_whole_blocks_are_refused():
    with pytest.raises(ValueError, match="3 tokens are not 1 blocks"):
        tree_of().apply(BlocksStored(None, None, (1, 2, 3), (b"x",)), 0.0)


class NaiveModel:
    """The cached prefixes, as tuples of tokens."""

    def __init__(self):
        self.held = set()

    def longest(self, namespace, tokens):
        count = 0
        while (namespace, tuple(tokens[: count + BLOCK])) in self.held and count + BLOCK <= len(tokens):
            count += BLOCK
        return count


prompts = st.lists(st.integers(0, 2), min_size=2, max_size=12).map(lambda t: t[: len(t) // BLOCK * BLOCK])
namespaces = st.sampled_from([None, "v1"])
operations = st.lists(
    st.one_of(
        st.tuples(st.just("store"), namespaces, prompts, st.integers(0, 3)),
        st.tuples(st.just("remove"), namespaces, prompts, st.just(0)),
        st.tuples(st.just("clear"), namespaces, prompts, st.just(0)),
        st.tuples(st.just("match"), namespaces, prompts, st.just(0)),
    ),
    max_size=40,
)


def apply(tree, model, operation, now_s):
    kind, namespace, tokens, skip = operation
    prefixes = [(namespace, tuple(tokens[:end])) for end in range(BLOCK, len(tokens) + 1, BLOCK)]
    if kind == "store":
        skip = min(skip, len(prefixes) - 1)
        known = not skip or prefixes[skip - 1] in model.held
        store(tree, tokens, namespace, now_s, skip)
        model.held |= set(prefixes[skip:]) if known else set()
    elif kind == "remove":
        remove(tree, hashes_of(tokens, namespace)[-1])
        model.held.discard(prefixes[-1])
    elif kind == "clear":
        tree.apply(CacheCleared(), now_s)
        model.held.clear()
    else:
        match(tree, tokens, namespace, now_s)


def check_shape(tree):
    """Every node but a root has blocks, no run could be joined, nothing is kept that is not cached at its end."""
    for node in nodes(tree):
        assert node.parent.children[node.blocks[0].tokens] is node
        assert all(block.node is node for block in node.blocks)
        assert len(node.children) != 1
        assert node.children or node.blocks[-1].hash is not None
        assert node.children or node.is_queued
    assert all(root.children and not root.blocks for root in tree.roots.values())
    assert tree.num_blocks == sum(len(node.blocks) for node in nodes(tree))


@settings(max_examples=150, deadline=None)
@given(operations, st.lists(prompts, min_size=1, max_size=4))
def test_the_tree_says_what_a_set_of_prefixes_says(steps, questions):
    tree, model = tree_of(), NaiveModel()
    for now_s, operation in enumerate(steps):
        apply(tree, model, operation, float(now_s))
        check_shape(tree)
    for namespace in (None, "v1"):
        for tokens in questions:
            assert match(tree, tokens, namespace) == model.longest(namespace, tokens)
    assert len(tree) == len(model.held)


@settings(max_examples=100, deadline=None)
@given(operations, st.integers(1, 6), st.lists(prompts, min_size=1, max_size=4))
def test_a_bounded_tree_stays_bounded_and_never_claims_more_than_is_held(steps, max_blocks, questions):
    tree, model = tree_of(max_blocks), NaiveModel()
    for now_s, operation in enumerate(steps):
        apply(tree, model, operation, float(now_s))
        check_shape(tree)
        assert tree.num_blocks <= max_blocks
    for namespace in (None, "v1"):
        for tokens in questions:
            assert match(tree, tokens, namespace) <= model.longest(namespace, tokens)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(prompts, st.sampled_from([1, 2, 3])), max_size=20))
def test_hashes_that_collide_or_change_never_break_the_tree(steps):
    tree = tree_of()
    for tokens, number in steps:
        hashes = tuple(number + i for i in range(len(tokens) // BLOCK))
        tree.apply(BlocksStored(None, None, tuple(tokens), hashes), 0.0)
        check_shape(tree)
        assert match(tree, tokens) == len(tokens)
    tree.apply(CacheCleared(), 0.0)
    assert tree.num_blocks == 0

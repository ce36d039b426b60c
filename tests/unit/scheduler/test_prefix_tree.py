import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.prefixes.tree import BLOCK_OVERHEAD_BYTES, PrefixTree

BLOCK = 2
BLOCK_BYTES = 4 * BLOCK + BLOCK_OVERHEAD_BYTES


def tree_of(max_blocks=1000):
    return PrefixTree(BLOCK, max_blocks * BLOCK_BYTES)


def hashes_of(tokens, namespace=None):
    """What an engine would name the blocks: each name stands for the whole prefix."""
    return [repr((namespace, tuple(tokens[: end + BLOCK]))).encode() for end in range(0, len(tokens) - 1, BLOCK)]


def store(tree, executor, tokens, namespace=None, now_s=0.0, skip=0):
    """Store a prompt's blocks from number `skip` on."""
    hashes = hashes_of(tokens, namespace)
    parent = hashes[skip - 1] if skip else None
    tree.store(executor, namespace, parent, tokens[skip * BLOCK : len(hashes) * BLOCK], hashes[skip:], now_s)


def match(tree, tokens, namespace=None, now_s=0.0):
    return tree.longest_match(namespace, tokens, now_s)


def test_each_executor_is_credited_with_its_own_longest_prefix():
    tree = tree_of()
    store(tree, "a", [1, 2, 3, 4, 5, 6])
    store(tree, "b", [1, 2, 9, 9])
    assert match(tree, [1, 2, 3, 4, 7, 7]) == {"a": 4, "b": 2}
    assert match(tree, [1, 2, 9, 9, 9]) == {"a": 2, "b": 4}
    assert match(tree, [1]) == {}
    assert match(tree, [8, 8]) == {}


def test_adapter_versions_share_nothing():
    tree = tree_of()
    store(tree, "a", [1, 2], namespace="v0001")
    assert match(tree, [1, 2]) == {}
    assert match(tree, [1, 2], "v0002") == {}
    assert match(tree, [1, 2], "v0001") == {"a": 2}


def test_blocks_join_their_parent_wherever_it_came_from():
    tree = tree_of()
    store(tree, "a", [1, 2, 3, 4])
    store(tree, "a", [1, 2, 3, 4, 5, 6], skip=2)
    assert match(tree, [1, 2, 3, 4, 5, 6]) == {"a": 6}


def test_a_block_without_its_parent_is_no_prefix():
    tree = tree_of()
    store(tree, "a", [1, 2, 3, 4], skip=1)
    assert match(tree, [1, 2, 3, 4]) == {}
    assert (tree.num_blocks, tree.num_orphans) == (0, 1)


def test_a_removed_block_cuts_the_prefix_and_stored_again_restores_it():
    tree = tree_of()
    store(tree, "a", [1, 2, 3, 4, 5, 6])
    tree.remove("a", [hashes_of([1, 2, 3, 4])[1]])
    assert match(tree, [1, 2, 3, 4, 5, 6]) == {"a": 2}
    store(tree, "a", [1, 2, 3, 4], skip=1)
    assert match(tree, [1, 2, 3, 4, 5, 6]) == {"a": 6}


def test_an_executor_with_a_gap_is_not_credited_with_what_comes_after_it():
    tree = tree_of()
    for executor in ("a", "b"):
        store(tree, executor, [1, 2, 3, 4, 5, 6])
    tree.remove("a", [hashes_of([1, 2, 3, 4])[1]])
    assert match(tree, [1, 2, 3, 4, 5, 6]) == {"a": 2, "b": 6}


def test_a_cleared_executor_has_nothing_and_the_others_keep_theirs():
    tree = tree_of()
    store(tree, "a", [1, 2, 3, 4])
    store(tree, "b", [1, 2])
    tree.clear("a")
    assert match(tree, [1, 2, 3, 4]) == {"b": 2}
    assert tree.num_held("a") == 0
    tree.clear("b")
    assert (tree.num_blocks, tree.num_nodes) == (0, 0)


def test_runs_without_a_branch_are_one_node_and_join_again_when_a_branch_goes():
    tree = tree_of()
    store(tree, "a", list(range(40)))
    assert (tree.num_blocks, tree.num_nodes) == (20, 1)
    store(tree, "a", [*range(20), 99, 99])
    assert (tree.num_blocks, tree.num_nodes) == (21, 3)
    tree.remove("a", [hashes_of([*range(20), 99, 99])[-1]])
    assert (tree.num_blocks, tree.num_nodes) == (20, 1)


def test_what_was_used_longest_ago_is_forgotten_first_from_its_end():
    tree = tree_of(max_blocks=4)
    store(tree, "a", [1, 2, 3, 4], now_s=1.0)
    store(tree, "a", [5, 6, 7, 8], now_s=2.0)
    match(tree, [1, 2, 3, 4], now_s=3.0)
    store(tree, "a", [9, 9], now_s=4.0)
    assert match(tree, [5, 6, 7, 8], now_s=5.0) == {"a": 2}
    assert match(tree, [1, 2, 3, 4], now_s=5.0) == {"a": 4}
    assert (tree.num_blocks, tree.num_forgotten) == (4, 1)
    assert tree.num_bytes <= 4 * BLOCK_BYTES


def test_the_shared_prefix_of_a_used_branch_is_as_fresh_as_the_branch():
    tree = tree_of(max_blocks=4)
    store(tree, "a", [1, 2, 3, 4], now_s=1.0)
    store(tree, "a", [5, 6], now_s=2.0)
    store(tree, "a", [1, 2, 7, 7], now_s=3.0)
    tree.remove("a", [hashes_of([1, 2, 3, 4])[1], hashes_of([1, 2, 7, 7])[1]])
    store(tree, "a", [8, 8, 8, 9, 9, 9], now_s=4.0)
    assert match(tree, [1, 2], now_s=4.0) == {"a": 2}
    assert match(tree, [5, 6], now_s=4.0) == {}


def test_prompts_that_come_and_go_leave_nothing_behind():
    tree = tree_of()
    for number in range(2000):
        store(tree, "a", [number, number, 1, 1], now_s=float(number))
        tree.clear("a")
    assert tree.num_blocks == 0
    assert len(tree._leaves) < 100


@pytest.mark.parametrize(("block_tokens", "max_bytes"), [(0, 1 << 20), (16, 10)])
def test_a_tree_that_can_hold_nothing_is_refused(block_tokens, max_bytes):
    with pytest.raises(ValueError, match="block"):
        PrefixTree(block_tokens, max_bytes)


def test_tokens_that_are_no_whole_blocks_are_refused():
    with pytest.raises(ValueError, match="3 tokens are not 1 blocks"):
        tree_of().store("a", None, None, [1, 2, 3], [b"x"], 0.0)


class NaiveModel:
    """A set of held prefixes for each executor, as tuples of tokens."""

    def __init__(self):
        self.held = set()

    def longest(self, executor, namespace, tokens):
        count = 0
        while (executor, namespace, tuple(tokens[: count + BLOCK])) in self.held and count + BLOCK <= len(tokens):
            count += BLOCK
        return count


prompts = st.lists(st.integers(0, 2), min_size=2, max_size=12).map(lambda t: t[: len(t) // BLOCK * BLOCK])
executors = st.sampled_from(["a", "b"])
namespaces = st.sampled_from([None, "v1"])
operations = st.lists(
    st.one_of(
        st.tuples(st.just("store"), executors, namespaces, prompts, st.integers(0, 3)),
        st.tuples(st.just("remove"), executors, namespaces, prompts, st.just(0)),
        st.tuples(st.just("clear"), executors, namespaces, prompts, st.just(0)),
        st.tuples(st.just("match"), executors, namespaces, prompts, st.just(0)),
    ),
    max_size=40,
)


def apply(tree, model, operation, now_s):
    kind, executor, namespace, tokens, skip = operation
    ends = range(BLOCK, len(tokens) + 1, BLOCK)
    prefixes = [(executor, namespace, tuple(tokens[:end])) for end in ends]
    if kind == "store":
        skip = min(skip, len(prefixes) - 1)
        known = not skip or prefixes[skip - 1] in model.held
        store(tree, executor, tokens, namespace, now_s, skip)
        model.held |= set(prefixes[skip:]) if known else set()
    elif kind == "remove":
        tree.remove(executor, hashes_of(tokens, namespace)[-1:])
        model.held.discard(prefixes[-1])
    elif kind == "clear":
        tree.clear(executor)
        model.held = {held for held in model.held if held[0] != executor}
    else:
        match(tree, tokens, namespace, now_s)


def check_shape(tree):
    """Every node but a root has blocks, no run could be joined, nothing is kept that nobody holds at its end."""
    count = 0
    for root in tree._roots.values():
        assert root.children
        stack = list(root.children.items())
        while stack:
            key, node = stack.pop()
            count += len(node.blocks)
            assert node.blocks[0].tokens == key
            assert all(block.node is node for block in node.blocks)
            assert len(node.children) != 1
            assert node.children or node.blocks[-1].hashes
            assert node.children or node.is_queued
            stack.extend(node.children.items())
    assert tree.num_blocks == count


@settings(max_examples=150, deadline=None)
@given(operations, st.lists(prompts, min_size=1, max_size=4))
def test_the_tree_says_what_a_set_of_prefixes_says(steps, questions):
    tree, model = tree_of(), NaiveModel()
    for now_s, operation in enumerate(steps):
        apply(tree, model, operation, float(now_s))
        check_shape(tree)
    for namespace in (None, "v1"):
        for tokens in questions:
            expected = {name: model.longest(name, namespace, tokens) for name in ("a", "b")}
            assert match(tree, tokens, namespace) == {name: count for name, count in expected.items() if count}
    assert {name: tree.num_held(name) for name in "ab"} == {
        name: sum(1 for held in model.held if held[0] == name) for name in "ab"
    }


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
            for name, count in match(tree, tokens, namespace).items():
                assert 0 < count <= model.longest(name, namespace, tokens)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(prompts, st.sampled_from([1, 2, 3])), max_size=20))
def test_hashes_that_collide_or_change_never_break_the_tree(steps):
    tree = tree_of()
    for tokens, number in steps:
        hashes = [number + i for i in range(len(tokens) // BLOCK)]
        tree.store("a", None, None, tokens, hashes, 0.0)
        check_shape(tree)
        assert match(tree, tokens) == {"a": len(tokens)}
    tree.clear("a")
    assert tree.num_blocks == 0

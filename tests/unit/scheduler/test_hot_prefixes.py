"""The trie of hot prefixes against counting by hand, under any order of prompts."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.prefixes.hot import HotPrefixes

BLOCK = 2
prompts = st.lists(st.lists(st.integers(0, 1), min_size=0, max_size=9), max_size=25)


def observed(all_prompts, **bounds):
    hot = HotPrefixes(BLOCK, **{"half_life": 1e9, **bounds})
    for prompt in all_prompts:
        hot.observe(prompt)
    return hot


def usable(prompt):
    """Prefixes of a prompt that its own cache look-up can hit: whole blocks, never the last token."""
    return [tuple(prompt[:end]) for end in range(BLOCK, len(prompt), BLOCK)]


def counted(all_prompts):
    """Requests by prefix."""
    counts = {}
    for prompt in all_prompts:
        for prefix in usable(prompt):
            counts[prefix] = counts.get(prefix, 0) + 1
    return counts


@given(prompts)
def test_weights_are_numbers_of_requests_while_nothing_is_old(all_prompts):
    hot, counts = observed(all_prompts), counted(all_prompts)
    for prefix, count in counts.items():
        assert hot.weight(prefix) == pytest.approx(count)
    assert hot.num_blocks == len(counts)
    assert hot.weight([7] * BLOCK) == 0.0


@settings(deadline=None)
@given(prompts, st.integers(1, 3))
def test_the_hottest_prefixes_together_save_the_most_of_all_choices(all_prompts, count):
    found = observed(all_prompts).hottest(count, 10_000)
    shared = {prefix: n for prefix, n in counted(all_prompts).items() if n >= 2}

    def covered(choice):
        return {part for prefix in choice for part in [*usable(prefix), tuple(prefix)]}

    def saved(choice):
        return BLOCK * sum(shared[part] for part in covered(choice))

    best = max(
        (saved(choice) for size in range(count + 1) for choice in itertools.combinations(shared, size)), default=0
    )
    assert saved([prefix.token_ids for prefix in found]) == best
    assert sum(prefix.saved_tokens for prefix in found) == pytest.approx(best)
    for number, prefix in enumerate(found):
        hotter = covered([other.token_ids for other in found[:number]])
        assert prefix.new_tokens == BLOCK * len(covered([prefix.token_ids]) - hotter)
    assert [p.saved_tokens for p in found] == sorted((p.saved_tokens for p in found), reverse=True)


@given(prompts, st.integers(0, 12))
def test_the_bound_of_tokens_cuts_the_coldest_end(all_prompts, max_tokens):
    hot = observed(all_prompts)
    free, bound = hot.hottest(5, 10_000), hot.hottest(5, max_tokens)
    assert sum(prefix.new_tokens for prefix in bound) == min(
        sum(prefix.new_tokens for prefix in free), max_tokens // BLOCK * BLOCK
    )
    for whole, cut in zip(free, bound, strict=False):
        assert whole.token_ids[: len(cut.token_ids)] == cut.token_ids


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 10_000), st.integers(0, 64)), max_size=150))
def test_memory_is_bounded_and_no_block_outweighs_its_parent(arrivals):
    hot = HotPrefixes(BLOCK, half_life=8, max_blocks=64)
    for head, question, length in arrivals:
        hot.observe([head] * 6 + [question] * length)
        assert hot.num_blocks <= 64
        prefix = [head] * 6 + [question] * 10
        weights = [hot.weight(prefix[:end]) for end in range(BLOCK, 17, BLOCK)]
        assert weights == sorted(weights, reverse=True)
        assert weights[0] >= 1.0  # the newest is never forgotten


def test_a_prefix_that_nobody_asks_for_any_more_gives_way():
    hot = HotPrefixes(BLOCK, half_life=4)
    for number in range(10):
        hot.observe([1, 1, 1, 1, number])
    for number in range(40):
        hot.observe([2, 2, number, number])
    [prefix] = hot.hottest(8, 1000)
    assert prefix.token_ids == (2, 2)
    assert hot.weight([1, 1]) < 0.01


def test_one_request_or_less_than_a_block_is_not_shared():
    hot = observed([[1, 2, 3, 4, 5], [9], [9], [8, 8], [8, 8], []])
    assert hot.hottest(8, 1000) == []  # of [8, 8] the last token is computed anyway


def test_few_long_prompts_can_save_more_than_many_short_ones():
    hot = observed([*[[1, 1, 2, 2, n] for n in range(5)], *[[1, 1, 3, 3, 4, 4, 5, 5, n] for n in range(3)]])
    [long, short] = hot.hottest(2, 1000)
    assert long.token_ids == (1, 1, 3, 3, 4, 4, 5, 5)
    assert (long.new_tokens, long.saved_tokens) == (8, pytest.approx(2 * (8 + 3 * 3)))
    assert (short.token_ids, short.new_tokens) == ((1, 1, 2, 2), 2)


def test_weights_stay_exact_over_many_half_lives():
    hot = HotPrefixes(BLOCK, half_life=1)
    for _ in range(2000):
        hot.observe([1, 1, 1])
    assert hot.weight([1, 1]) == pytest.approx(2.0)


def test_a_shared_head_outlives_a_flood_of_prompts_that_nobody_shares():
    hot = HotPrefixes(BLOCK, half_life=1000, max_blocks=256)
    for number in range(300):
        hot.observe([7, 7, 7, 7, number, number, number] if number % 10 == 0 else [number] * 40)
    assert hot.hottest(1, 1000)[0].token_ids == (7, 7, 7, 7)


@pytest.mark.parametrize("bounds", [{"block_tokens": 0}, {"half_life": 0.0}, {"max_blocks": 7}])
def test_impossible_bounds_are_refused(bounds):
    with pytest.raises(ValueError, match="must be positive"):
        HotPrefixes(**{"block_tokens": 2, **bounds})

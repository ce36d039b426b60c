from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.errors import PairTooLongError, TrainingError
from core.types import TokenizedPair
from engine.training.micro_batch import cut_pair, make_micro_batches

CPU = torch.device("cpu")


def _pair(prompt, chosen, rejected, name="p"):
    return TokenizedPair(name, tuple(prompt), tuple(chosen), tuple(rejected))


def _batches(pairs, max_slice_tokens=64, share_prompts=True):
    return make_micro_batches(
        pairs, max_slice_tokens=max_slice_tokens, vocab_size=100, device=CPU, share_prompts=share_prompts
    )


def test_prompt_keeps_its_end_and_completion_its_start():
    pair = cut_pair(_pair(range(1, 8), range(10, 20), range(30, 33)), max_prompt_tokens=4, max_length_tokens=9)
    assert pair.prompt_ids == (4, 5, 6, 7)
    assert pair.chosen_ids == (10, 11, 12, 13, 14)
    assert pair.rejected_ids == (30, 31, 32)


@pytest.mark.parametrize(
    ("pair", "limits"),
    [
        (_pair([1, 2, 3], [4, 5, 6], [4, 5, 7]), (3, 5)),  # equal once cut
        (_pair([1, 2, 3], [4], [5]), (3, 3)),  # no room
        (_pair([1, 2], [4], []), (8, 8)),  # empty completion
        (_pair([], [4], [5, 6]), (8, 8)),  # a lone first token is predicted by nothing
    ],
)
def test_pairs_that_do_not_fit(pair, limits):
    with pytest.raises(PairTooLongError, match="pair p: "):
        cut_pair(pair, *limits)


def test_a_cut_pair_keeps_its_id_weight_and_reference():
    whole = replace(_pair(range(1, 8), range(10, 20), range(30, 33)), weight=0.5, reference=(-1.0, -2.0))
    cut = cut_pair(whole, 4, 9)
    assert (cut.pair_id, cut.weight, cut.reference) == ("p", 0.5, (-1.0, -2.0))
    assert cut.prompt_ids == (4, 5, 6, 7)


def test_rows_and_targets():
    pairs = [_pair([1, 2], [3, 4], [5], "a"), _pair([6], [7, 8, 9], [10, 11], "b")]
    (batch,) = _batches(pairs, share_prompts=False)
    assert batch.group.members == (0, 1)
    assert batch.ids.tolist() == [[1, 2, 3], [6, 7, 8], [1, 2, 0], [6, 10, 0]]
    assert batch.targets.tolist() == [3, 4, 7, 8, 9, 5, 10, 11]
    assert batch.rows.tolist() == [0, 0, 1, 1, 1, 2, 3, 3]
    assert batch.positions.tolist() == [1, 2, 3, 4, 5, 7, 9, 10]
    assert (batch.group.num_tokens, batch.group.num_targets) == (12, 8)


def test_shared_prompts_lie_in_one_row_without_padding():
    (batch,) = _batches([_pair([1, 2], [3, 4], [5], "a"), _pair([6], [7, 8, 9], [10, 11], "b")])
    assert batch.ids.tolist() == [[1, 2, 6, 3, 7, 8, 10]]
    assert batch.targets.tolist() == [3, 4, 7, 8, 9, 5, 10, 11]
    assert batch.rows.tolist() == [0, 0, 1, 1, 1, 2, 3, 3]
    assert batch.positions.tolist() == [1, 3, 2, 4, 5, 1, 2, 6]  # the ends of both prompts predict twice
    assert batch.shared.position_ids.tolist() == [0, 1, 0, 2, 1, 2, 1]
    assert batch.shared.cells.tolist() == [0, 1, 2, 4, 6, 7, 10]
    assert batch.shared.tokens.tolist() == [0, 1, 2, 0, 3, 0, 4, 5, 0, 0, 6, 0]
    assert (
        batch.shared.mask()[:, 0].int().tolist()
        == [
            [[1, 1, 1, 0], [1, 1, 1, 1]],
            [[1, 0, 1, 0], [1, 0, 1, 1]],
        ]
        * 2
    )
    assert (batch.group.num_tokens, batch.group.num_targets, batch.group.row_tokens) == (7, 8, 3)


def test_uneven_pairs_do_not_blow_up_the_padded_attention():
    """59 short pairs and a long one are 884 tokens: few for a layer, but 60 rows of 202 keys, twice, for attention."""
    pairs = [_pair([1, 2, 3, 4], [5, 6, 7], [8, 9, 10]) for _ in range(59)]
    pairs.append(_pair([1] * 150, [5] * 51, [6] * 51))
    assert [len(batch.group.members) for batch in _batches(pairs, 1024)] == [59, 1]


def test_empty_prompt_scores_from_the_second_token():
    for share_prompts, positions in ((False, [0, 2, 3]), (True, [0, 1, 2])):
        (batch,) = _batches([_pair([], [3, 4], [5, 6, 7])], share_prompts=share_prompts)
        assert batch.targets.tolist() == [4, 6, 7]
        assert batch.positions.tolist() == positions


token_ids = st.lists(st.integers(0, 99), min_size=1, max_size=12).map(tuple)


raw_pairs = st.lists(st.tuples(token_ids, token_ids, token_ids, st.booleans()), min_size=1, max_size=12)


@given(raw_pairs, st.integers(16, 80), st.booleans())
def test_every_pair_once_within_the_bound_and_apart_by_reference(raw, bound, share_prompts):
    pairs = [
        TokenizedPair(str(i), *parts, weight=0.5 + i, reference=(-i, -0.5) if is_cached else None)
        for i, (*parts, is_cached) in enumerate(raw)
    ]
    batches = _batches(pairs, bound, share_prompts)
    assert sorted(i for batch in batches for i in batch.group.members) == list(range(len(pairs)))
    for batch in batches:
        num_pairs = len(batch.group.members)
        assert (batch.ids.numel(), len(batch.targets)) == (batch.group.num_tokens, batch.group.num_targets)
        assert num_pairs == 1 or batch.ids.numel() <= bound
        expected = [t for i in batch.group.members for t in pairs[i].chosen_ids]
        expected += [t for i in batch.group.members for t in pairs[i].rejected_ids]
        assert batch.targets.tolist() == expected
        assert batch.weights.tolist() == [0.5 + i for i in batch.group.members]
        known = [pairs[i].reference for i in batch.group.members if pairs[i].reference]
        assert len(known) in (0, num_pairs)
        assert (batch.reference is None) == (not known)
        if known:
            assert batch.reference.tolist() == [values[side] for side in (0, 1) for values in known]
        rows = [pairs[i].prompt_ids + ids for i in batch.group.members for ids in (pairs[i].chosen_ids,)]
        rows += [pairs[i].prompt_ids + pairs[i].rejected_ids for i in batch.group.members]
        assert batch.ids.numel() <= 2 * num_pairs * (max(map(len, rows)) - 1)
        assert share_prompts or batch.shared is None


def test_bad_ids_never_reach_the_device():
    with pytest.raises(TrainingError, match=r"pair p: .*vocabulary of 100"):
        _batches([_pair([1], [2], [100])])
    with pytest.raises(TrainingError, match="vocabulary"):
        _batches([_pair([-1], [2], [3])])
    with pytest.raises(TrainingError, match="at least one pair"):
        _batches([])

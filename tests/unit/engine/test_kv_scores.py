"""Block scores equal the mean of token scores, here and in kvpress."""

import importlib.util
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.pruning.scores import choose_blocks, score_blocks, summarize

LAYERS, BLOCKS, BLOCK_TOKENS, HEADS, HEAD_SIZE = 3, 7, 16, 2, 24
NUM_TOKENS = BLOCKS * BLOCK_TOKENS


def request_keys() -> torch.Tensor:
    """`[layers, tokens, heads, head_size]`, with a common direction, so that the anchor is not noise."""
    generator = torch.Generator().manual_seed(5)
    keys = torch.randn(LAYERS, NUM_TOKENS, HEADS, HEAD_SIZE, generator=generator)
    return keys * torch.rand(NUM_TOKENS, 1, 1, generator=generator).mul(3) + 0.7


def block_scores(keys: torch.Tensor) -> torch.Tensor:
    blocks = keys.view(LAYERS, BLOCKS, BLOCK_TOKENS, HEADS, HEAD_SIZE)
    stats = torch.stack([summarize(layer) for layer in blocks])
    assert stats.shape == (LAYERS, BLOCKS, HEADS, HEAD_SIZE)
    return score_blocks(stats, NUM_TOKENS)


def token_scores(keys: torch.Tensor) -> torch.Tensor:
    """`[layers, tokens, heads]`, straight from the paper."""
    anchor = (keys / keys.norm(dim=-1, keepdim=True)).mean(dim=1, keepdim=True)
    return -torch.cosine_similarity(keys, anchor, dim=-1)


def test_a_block_scores_the_mean_over_its_tokens_heads_and_layers() -> None:
    keys = request_keys()
    expected = token_scores(keys).view(LAYERS, BLOCKS, BLOCK_TOKENS, HEADS).mean(dim=(0, 2, 3))
    torch.testing.assert_close(block_scores(keys), expected, atol=1e-6, rtol=1e-6)


KVPRESS = """
import sys
import torch
import kvpress  # its import replaces attention functions of transformers, so it gets a process of its own

keys = torch.load(sys.argv[1])  # kvpress: [batch, heads, tokens, head_size] -> [batch, heads, tokens]
cached = [layer.transpose(0, 1).unsqueeze(0) for layer in keys]
scores = [kvpress.KeyDiffPress().score(None, None, one, None, None, {}) for one in cached]
torch.save(torch.cat(scores), sys.argv[2])
"""


def test_kvpress_gives_the_same_scores(tmp_path: Path) -> None:
    if importlib.util.find_spec("kvpress") is None:
        pytest.skip("kvpress is not installed (requirements/tests.txt)")
    keys = request_keys()
    torch.save(keys, tmp_path / "keys.pt")
    subprocess.run([sys.executable, "-c", KVPRESS, tmp_path / "keys.pt", tmp_path / "scores.pt"], check=True)
    by_token = torch.load(tmp_path / "scores.pt")
    expected = by_token.view(LAYERS, HEADS, BLOCKS, BLOCK_TOKENS).mean(dim=(0, 1, 3))
    torch.testing.assert_close(block_scores(keys), expected, atol=1e-6, rtol=1e-6)


def test_statistics_of_half_precision_keys_are_fp32() -> None:
    keys = request_keys()
    half = block_scores(keys.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, block_scores(keys), atol=2e-2, rtol=2e-2)


def test_statistics_add_up_token_by_token() -> None:
    keys = request_keys()[0].view(BLOCKS, BLOCK_TOKENS, HEADS, HEAD_SIZE)
    by_token = summarize(keys.flatten(0, 1).unsqueeze(1)).unflatten(0, (BLOCKS, BLOCK_TOKENS)).sum(dim=1)
    torch.testing.assert_close(by_token, summarize(keys))


def test_key_diff_drops_the_block_that_is_like_all_others() -> None:
    keys = torch.zeros(LAYERS, NUM_TOKENS, HEADS, HEAD_SIZE)
    keys[..., 0] = 1.0
    keys[:, 2 * BLOCK_TOKENS : 3 * BLOCK_TOKENS] = torch.eye(HEAD_SIZE)[5]  # block 2 points elsewhere
    scores = block_scores(keys)
    assert scores.argmax() == 2
    assert 2 not in choose_blocks(scores.tolist(), BLOCKS - 1)


def test_blocks_that_are_not_full_are_refused() -> None:
    with pytest.raises(ValueError, match="113 tokens do not fill 7 blocks"):
        score_blocks(torch.zeros(LAYERS, BLOCKS, HEADS, HEAD_SIZE), NUM_TOKENS + 1)


def test_lowest_scores_go_first_ties_by_index_and_protected_blocks_stay() -> None:
    scores = [0.5, -1.0, 0.2, -1.0, 0.2, 0.9]
    assert choose_blocks(scores, 3) == [1, 3, 2]
    assert choose_blocks(scores, 3, protected={1, 2}) == [3, 4, 0]
    assert choose_blocks(scores, 99, protected={0, 5}) == [1, 3, 2, 4]
    assert choose_blocks(scores, 0) == []
    assert choose_blocks(scores, -2) == []


def test_choosing_does_not_depend_on_the_order_of_protected_blocks() -> None:
    rng = random.Random(1)
    scores = [rng.random() for _ in range(40)]
    kept = [3, 0, 39, 7]
    chosen = choose_blocks(scores, 10, protected=kept)
    assert not set(chosen) & set(kept)
    assert max(scores[i] for i in chosen) <= min(scores[i] for i in range(40) if i not in kept and i not in chosen)

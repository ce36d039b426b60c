"""Near-duplicate feedback: MinHash signatures over word shingles, cut into bands for a lookup by equality.

Prompt, chosen and rejected keep signatures of their own, and a band takes rows of all three: two pairs share a band
only if all three texts are alike. A union of the three would call two pairs the same because of a long system
prompt. With n bands of r rows, pairs of similarity s (geometric mean of the three Jaccard similarities) share
a band with probability s^r, so the share of common bands is an estimate of s^r that needs no second look at the texts
(Broder 1997; Leskovec et al., Mining of Massive Datasets, section 3.4).
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from itertools import islice

from alignment.records.chat import text_of
from core.wire import Prompt

NUM_BANDS = 8
ROWS_PER_PART = 3
_ROWS = 3 * ROWS_PER_PART
_SIMILARITY = 0.9
"""Estimated similarity of word shingles above which two pairs count as the same."""
_SHINGLE_WORDS = 3
_MAX_WORDS = 2000
"""Words of each text that are looked at, to bound the work; texts that agree so far and differ later count as alike."""
_SCHEME = "affine32"
"""The name of datasketch's permutations; stored bands are worthless under another one."""
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
"""Scripts that are written without spaces count by character."""


class BandHasher:
    """Computes band keys. The same texts give the same keys in every process."""

    def __init__(self) -> None:
        from datasketch import MinHash

        self._permutations = MinHash(NUM_BANDS * ROWS_PER_PART, scheme=_SCHEME).permutations

    def band_keys(self, owner: str, prompt: Prompt, chosen: str, rejected: str) -> tuple[str, ...]:
        """The keys of the bands (32 hex digits each); only pairs of the same `owner` can share one."""
        parts = [self._signature(_last_turn(prompt)), self._signature(chosen), self._signature(rejected)]
        return tuple(_band_key(owner, band, parts) for band in range(NUM_BANDS))

    def _signature(self, text: str) -> list[bytes]:
        """The bytes of each band's rows."""
        from datasketch import MinHash

        sketch = MinHash(len(self._permutations[0]), permutations=self._permutations, scheme=_SCHEME)
        sketch.update_batch(shingles(text))
        rows = sketch.hashvalues.reshape(NUM_BANDS, ROWS_PER_PART)
        return [row.tobytes() for row in rows]


def shingles(text: str) -> set[bytes]:
    """The runs of three words of a text, or the whole text if it has fewer; letter case and punctuation are dropped."""
    words = [match.group() for match in islice(_WORD.finditer(text.lower()), _MAX_WORDS)]
    if len(words) <= _SHINGLE_WORDS:
        return {" ".join(words).encode()}
    return {
        " ".join(words[start : start + _SHINGLE_WORDS]).encode()
        for start in range(len(words) - _SHINGLE_WORDS + 1)
    }


def alike(band_rows: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Similar pairs among (band key, pair id) rows in the bands of one pair: their ids, with the estimate."""
    common = Counter(pair_id for _, pair_id in band_rows)
    estimates = {pair_id: _estimate(number) for pair_id, number in common.items()}
    return {pair_id: estimate for pair_id, estimate in estimates.items() if estimate >= _SIMILARITY}


def _estimate(num_common: int) -> float:
    return float((num_common / NUM_BANDS) ** (1 / _ROWS))


NUM_PROBES = NUM_BANDS + 1 - min(number for number in range(1, NUM_BANDS + 1) if _estimate(number) >= _SIMILARITY)
"""Bands of a pair to look into first: without one in common there, too few others are left to be alike."""


def _band_key(owner: str, band: int, parts: list[list[bytes]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{band}:{len(owner)}:{owner}".encode())
    for part in parts:
        digest.update(part[band])
    return digest.hexdigest()


def _last_turn(prompt: Prompt) -> str:
    """The question that was asked; system prompt and earlier turns are the same in many pairs of one user."""
    return prompt if isinstance(prompt, str) else text_of(prompt[-1].get("content"))

"""Drift of the prompts: whether they are longer or shorter than before, or about something else.

No model of embeddings. Length is the number of words on a log scale. Novelty is 1 minus the cosine between the hashed
words and word pairs of a prompt and their running mean: about constant while topics stay, higher when they change, and
back as the mean follows. In a script without spaces every sentence is one new word; there only length is watched.
"""

import base64
import math
from collections.abc import Iterable, Mapping
from functools import partial
from statistics import fmean
from typing import Any

from alignment.drift.change_streams import Change, ChangeStream, Channel, Row, adwin

PROMPTS = "prompts"
_ADWIN_DELTA = 0.0005
"""Chance that ADWIN reports a change in a stream that has none. Smaller than that for scores: topics come and go."""
_ROWS = 512
_NUM_FEATURES = 4096
_MEAN_PROMPTS = 256
"""The running mean forgets a prompt after about so many."""
_WARM_UP = 32
"""Prompts that make up the first mean; to an empty one every prompt is new."""
_READ_CHARS = 4000
"""Characters of a prompt that are hashed (under 1 ms): half of them from its beginning, half from its end."""
_LOG2_MAX_WORDS = 12.0
"""Prompts of 4,095 words and longer are all the same length."""


class InputDrift:
    """Watches prompts in their order of arrival."""

    def __init__(self, lengths: Iterable[Row] = (), novelties: Iterable[Row] = ()) -> None:
        self._lengths = ChangeStream([_LENGTH], _ROWS, lengths)
        self._novelties = ChangeStream([_NOVELTY], _ROWS, novelties)
        self._mean: Any = None
        self._vectorizer: Any = None
        self._num_prompts = 0
        self.last_event: dict[str, Any] | None = None

    def update(self, seq: int, prompt: str) -> list[tuple[str, Change]]:
        """Take a prompt; returns the changes that it brought to light."""
        self._num_prompts += 1
        length = min(math.log2(1 + len(prompt.split())) / _LOG2_MAX_WORDS, 1.0)
        found = self._lengths.update(Row(seq, round(length, 4), 0.0))
        novelty = self._novelty(prompt)
        if novelty is not None:
            found += self._novelties.update(Row(seq, round(novelty, 4), 0.0))
        return [(PROMPTS, change) for change in found]

    def to_wire(self) -> dict[str, Any]:
        """Means since the last change, and the last event."""
        lengths, novelties = self._lengths.rows, self._novelties.rows
        return {
            "num_prompts": self._num_prompts,
            "mean_words": fmean(map(_num_words, lengths)) if lengths else None,
            "mean_novelty": fmean(map(_first, novelties)) if novelties else None,
            "last_event": self.last_event,
        }

    def to_state(self) -> dict[str, Any]:
        """Everything as JSON; the running mean takes 22 KB."""
        return {
            "num_prompts": self._num_prompts,
            "last_event": self.last_event,
            "lengths": [[row.seq, row.first] for row in self._lengths.rows],
            "novelties": [[row.seq, row.first] for row in self._novelties.rows],
            "mean": None if self._mean is None else base64.b64encode(self._mean.tobytes()).decode(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "InputDrift":
        """Inverse of `to_state`."""
        import numpy as np

        drift = cls(
            *([Row(int(seq), float(x), 0.0) for seq, x in state[name]] for name in ("lengths", "novelties"))
        )
        drift._num_prompts, drift.last_event = int(state["num_prompts"]), state["last_event"]
        if state["mean"] is not None:
            drift._mean = np.frombuffer(base64.b64decode(state["mean"]), dtype=np.float32).copy()
        return drift

    def _novelty(self, prompt: str) -> float | None:
        """Novelty in 0..1 against the mean before this prompt, which then becomes part of it; None while warming up."""
        import numpy as np

        if self._vectorizer is None:
            from sklearn.feature_extraction.text import HashingVectorizer

            self._vectorizer = HashingVectorizer(
                n_features=_NUM_FEATURES, ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b", alternate_sign=False
            )
        if len(prompt) > _READ_CHARS:
            prompt = f"{prompt[: _READ_CHARS // 2]} {prompt[-_READ_CHARS // 2 :]}"
        words = self._vectorizer.transform([prompt])
        if self._mean is None:
            self._mean = np.zeros(_NUM_FEATURES, dtype=np.float32)
        norm = float(np.linalg.norm(self._mean))
        cosine = float(words.data @ self._mean[words.indices]) / norm if norm else 0.0
        share = 1.0 / min(self._num_prompts, _MEAN_PROMPTS)
        self._mean *= np.float32(1.0 - share)
        self._mean[words.indices] += (share * words.data).astype(np.float32)
        return min(max(1.0 - cosine, 0.0), 1.0) if self._num_prompts > _WARM_UP else None


def _first(row: Row) -> float:
    return row.first


def _num_words(row: Row) -> float:
    return float(2.0 ** (row.first * _LOG2_MAX_WORDS) - 1)


_LENGTH = Channel("prompt_length", "ADWIN", partial(adwin, _ADWIN_DELTA), _first, _num_words, "both")
_NOVELTY = Channel("prompt_novelty", "ADWIN", partial(adwin, _ADWIN_DELTA), _first, _first, "rise")

"""From pairs as Control sends them to token ids, with the reference log-probabilities that are still valid."""

from collections.abc import Iterable
from dataclasses import replace

from core.errors import TrainingError
from core.types import TokenizedPair
from core.wire import TrainingPair
from engine.training.pair_tokens import PairTokenizer, reference_key

Unusable = list[tuple[str, str]]
"""Pair ids, each with the reason."""


class PairBatcher:
    """Tokenizes pairs for one base model."""

    def __init__(self, tokenizer: PairTokenizer, base_model: str, dtype: str = "auto") -> None:
        self._tokenizer = tokenizer
        self._dtype = dtype
        self.base_model = base_model

    def tokenize(self, pairs: Iterable[TrainingPair]) -> tuple[list[TokenizedPair], Unusable]:
        """Those that can be trained on, and those that cannot."""
        usable: list[TokenizedPair] = []
        unusable: Unusable = []
        for pair in pairs:
            try:
                usable.append(self._with_reference(pair, self._tokenizer.tokenize(pair)))
            except TrainingError as error:
                unusable.append((pair.pair_id, f"{type(error).__name__}: {error}"))
        return usable, unusable

    def reference_keys(self, pairs: Iterable[TokenizedPair]) -> dict[str, str]:
        """By pair id, what its reference log-probabilities are valid for."""
        return {pair.pair_id: self._key(pair) for pair in pairs}

    def _key(self, pair: TokenizedPair) -> str:
        return reference_key(self.base_model, pair, self._dtype)

    def _with_reference(self, pair: TrainingPair, tokenized: TokenizedPair) -> TokenizedPair:
        known = pair.reference
        if known is None or known.key != self._key(tokenized):
            return replace(tokenized, weight=pair.weight)
        return replace(tokenized, weight=pair.weight, reference=(known.chosen_logp, known.rejected_logp))

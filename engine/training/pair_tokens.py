"""From the text of a preference pair to token ids, exactly as the server would have tokenized it.

A completion is what follows the rendered prompt up to and including the end-of-turn token: the difference between
the template with and without the assistant's message, as TRL does it. Reference log-probabilities that were computed
once are taken over where they are still valid.
"""

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from core.config import TrainingConfig
from core.errors import TrainingError
from core.types import TokenizedPair
from core.wire import Prompt, TrainingPair
from engine.training.micro_batch import cut_pair


class PairTokenizer:
    """Renders pairs with a model's chat template, for one base model."""

    def __init__(
        self,
        tokenizer: Any,
        eos_token_ids: set[int],
        config: TrainingConfig,
        base_model: str,
        dtype: str = "auto",
        fingerprint: str = "",
    ) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._config = config
        self.base_model = base_model
        """Name of the frozen reference model."""
        self.fingerprint = fingerprint
        """That model by its content (`engine.fingerprint`); empty: the name has to do."""
        self._dtype = dtype

    @classmethod
    def load(
        cls,
        model_dir: str,
        config: TrainingConfig,
        base_model: str = "",
        dtype: str = "auto",
        fingerprint: str = "",
    ) -> "PairTokenizer":
        """Read tokenizer and end-of-turn tokens from a model directory."""
        from transformers import AutoTokenizer, GenerationConfig

        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        try:
            eos = GenerationConfig.from_pretrained(model_dir).eos_token_id
        except OSError:
            eos = None
        ids = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
        return cls(tokenizer, ids, config, base_model, dtype, fingerprint)

    def tokenize(self, pair: TrainingPair) -> TokenizedPair:
        """Token ids and weight of one pair, and its cached reference if that is of these tokens and this model.

        Raises:
            PairTooLongError: cut to the configured lengths, the completions are empty or equal.
            TrainingError: the chat template cannot render the messages.
        """
        whole = TokenizedPair(pair.pair_id, *self.token_ids(pair), weight=pair.weight)
        # As the step would: what does not fit is this pair's error here, not the whole batch's there.
        cut = cut_pair(whole, self._config.max_prompt_tokens, self._config.max_length_tokens)
        known = pair.reference
        if known is None or known.key != self.reference_key(cut):
            return cut
        return replace(cut, reference=(known.chosen_logp, known.rejected_logp))

    def tokenize_all(
        self, pairs: Iterable[TrainingPair]
    ) -> tuple[tuple[TokenizedPair, ...], tuple[tuple[str, str], ...]]:
        """Tokenize the pairs that can be trained on; the ids of the others come second, each with the reason."""
        usable: list[TokenizedPair] = []
        unusable: list[tuple[str, str]] = []
        for pair in pairs:
            try:
                usable.append(self.tokenize(pair))
            except TrainingError as error:
                unusable.append((pair.pair_id, f"{type(error).__name__}: {error}"))
        return tuple(usable), tuple(unusable)

    def reference_key(self, pair: TokenizedPair) -> str:
        """Identity of a pair's reference log-probabilities: 64 hexadecimal digits.

        It depends on the base model's content, its precision (`model.dtype`, for another one gives other values) and
        the token ids as they are trained, that is after cutting; adapter, weight and pair id do not matter.
        """
        model = self.fingerprint or self.base_model
        digest = hashlib.sha256(f"{model}\0{self._dtype}".encode())
        for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids):
            digest.update(b"\0%d\0" % len(ids))
            digest.update(array("q", ids).tobytes())
        return digest.hexdigest()

    def token_ids(self, pair: TrainingPair) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Ids of prompt, chosen and rejected, uncut; TrainingError if the chat template cannot render them."""
        prompt_ids = self._prompt_ids(pair.prompt)
        chosen = self._completion_ids(pair.prompt, prompt_ids, pair.chosen)
        rejected = self._completion_ids(pair.prompt, prompt_ids, pair.rejected)
        return tuple(prompt_ids), tuple(chosen), tuple(rejected)

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return list(self._tokenizer(prompt)["input_ids"])
        return self._render(prompt, add_generation_prompt=True)

    def _completion_ids(self, prompt: Prompt, prompt_ids: list[int], text: str) -> list[int]:
        if isinstance(prompt, list):
            whole = self._render([*prompt, {"role": "assistant", "content": text}], add_generation_prompt=False)
            if whole[: len(prompt_ids)] == prompt_ids:
                return self._until_end(whole[len(prompt_ids) :])
        # Plain text, or a template whose generation prompt is not a beginning of the full turn.
        return self._until_end(list(self._tokenizer(text, add_special_tokens=False)["input_ids"]))

    def _until_end(self, ids: list[int]) -> list[int]:
        for position, token_id in enumerate(ids):
            if token_id in self._eos_token_ids:
                return ids[: position + 1]
        return [*ids, self._tokenizer.eos_token_id] if self._tokenizer.eos_token_id is not None else ids

    def _render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> list[int]:
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # jinja raises whatever a template wants
            raise TrainingError(f"the chat template cannot render this prompt: {error}") from error
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

"""From the text of a preference pair to token ids, exactly as the server would have tokenized it.

A completion is what follows the rendered prompt up to and including the end-of-turn token: the difference between
the template with and without the assistant's message, as TRL does it. `reference_key` says when reference
log-probabilities that were computed once may be used again.
"""

import hashlib
from array import array
from typing import Any

from core.config import TrainingConfig
from core.errors import TrainingError
from core.types import TokenizedPair
from core.wire import Prompt, TrainingPair
from engine.training.micro_batch import cut_pair


class PairTokenizer:
    """Renders pairs with a model's chat template."""

    def __init__(self, tokenizer: Any, eos_token_ids: set[int], config: TrainingConfig) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._config = config

    @classmethod
    def load(cls, model_dir: str, config: TrainingConfig) -> "PairTokenizer":
        """Read tokenizer and end-of-turn tokens from a model directory."""
        from transformers import AutoTokenizer, GenerationConfig

        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        try:
            eos = GenerationConfig.from_pretrained(model_dir).eos_token_id
        except OSError:
            eos = None
        ids = set(eos) if isinstance(eos, list) else {eos}
        ids.add(tokenizer.eos_token_id)
        return cls(tokenizer, {i for i in ids if i is not None}, config)

    def tokenize(self, pair: TrainingPair) -> TokenizedPair:
        """Token ids and weight of one pair. A cached reference is not taken over: see `reference_key`.

        Raises:
            PairTooLongError: cut to the configured lengths, the completions are empty or equal.
            TrainingError: the chat template cannot render the messages.
        """
        prompt_ids = self._prompt_ids(pair.prompt)
        chosen_ids = self._completion_ids(pair.prompt, prompt_ids, pair.chosen)
        rejected_ids = self._completion_ids(pair.prompt, prompt_ids, pair.rejected)
        ids = (tuple(prompt_ids), tuple(chosen_ids), tuple(rejected_ids))
        whole = TokenizedPair(pair.pair_id, *ids, weight=pair.weight)
        # As the step would: what does not fit is this pair's error here, not the whole batch's there.
        return cut_pair(whole, self._config.max_prompt_tokens, self._config.max_length_tokens)

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


def reference_key(base_model: str, pair: TokenizedPair, dtype: str = "auto") -> str:
    """Identity of a pair's reference log-probabilities.

    Args:
        base_model: name of the frozen reference model.
        pair: as it is trained, that is after cutting; adapter, weight and pair id do not matter.
        dtype: `model.dtype`, for another precision gives other values.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(f"{base_model}\0{dtype}".encode())
    for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids):
        digest.update(b"\0%d\0" % len(ids))
        digest.update(array("q", ids).tobytes())
    return digest.hexdigest()

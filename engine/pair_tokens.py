"""From the text of a preference pair to token ids, exactly as the server would have tokenized it.

A completion is what follows the rendered prompt up to and including the end-of-turn token: the difference between
the template with and without the assistant's message, as TRL does it.
"""

from typing import Any

from core.errors import PairTooLongError, TrainingError
from core.messages import Prompt, TrainingPair
from core.types import TokenizedPair


class PairTokenizer:
    """Renders pairs with a model's chat template."""

    def __init__(self, tokenizer: Any, eos_token_ids: set[int], max_length_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._max_length_tokens = max_length_tokens

    @classmethod
    def load(cls, model_dir: str, max_length_tokens: int) -> "PairTokenizer":
        """Read tokenizer and end-of-turn tokens from a model directory."""
        from transformers import AutoTokenizer, GenerationConfig

        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        try:
            eos = GenerationConfig.from_pretrained(model_dir).eos_token_id
        except OSError:
            eos = None
        ids = set(eos) if isinstance(eos, list) else {eos}
        ids.add(tokenizer.eos_token_id)
        return cls(tokenizer, {i for i in ids if i is not None}, max_length_tokens)

    def tokenize(self, pair: TrainingPair) -> TokenizedPair:
        """Token ids of one pair.

        Raises:
            PairTooLongError: even the prompt's kept end and one token do not fit.
            TrainingError: the chat template cannot render the messages.
        """
        prompt_ids = self._prompt_ids(pair.prompt)
        chosen_ids = self._completion_ids(pair.prompt, prompt_ids, pair.chosen)
        rejected_ids = self._completion_ids(pair.prompt, prompt_ids, pair.rejected)
        if chosen_ids[: self._max_length_tokens] == rejected_ids[: self._max_length_tokens]:
            raise PairTooLongError("chosen and rejected are equal within training.max_length_tokens")
        return TokenizedPair(pair.pair_id, tuple(prompt_ids), tuple(chosen_ids), tuple(rejected_ids))

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

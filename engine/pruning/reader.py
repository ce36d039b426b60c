"""Reading on behind a pruned context, with the Hugging Face implementation of a model.

A context is prefilled once. For every fraction the blocks with the lowest scores leave a copy of its key-value cache
(`engine.pruning.scores`; sinks and the recent window stay), the positions of what follows stay what they were, and the
model reads on. That is what pruning does on vLLM's paged cache, where a dropped block is left out of attention.
The questions come after pruning, so the choice of blocks knows nothing of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.config import KV_PRUNING_SINK_TOKENS
from core.errors import ConfigError, UnsupportedModelError
from engine.pruning.scores import choose_blocks, score_blocks, summarize
from engine.pruning.tasks import Question, Recall, first_sentence

TokenPassage = tuple[list[int], list[int]]
"""Token ids of a context and of how it goes on."""

_MAX_REPLY_TOKENS = 16


@dataclass(slots=True)
class Prefilled:
    """A context in the cache, and the order in which its blocks go."""

    cache: Any
    """DynamicCache of all tokens."""
    num_tokens: int
    num_full_blocks: int
    """Blocks in use but for an unfinished last one; fractions are taken of them."""
    order: list[int]
    """Blocks that may be dropped, lowest score first."""

    def dropped(self, fraction: float) -> list[int]:
        """Blocks that go at `fraction`: rounded down, and no more than may go."""
        return self.order[: math.floor(fraction * self.num_full_blocks + 1e-9)]


class PrunedReader:
    """A model that reads on behind a pruned context. Reads one sequence at a time; keeps nothing between contexts.

    Sinks and recent window are rounded up to whole blocks (as in `engine.pruning.pruner`).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        block_tokens: int,
        recent_tokens: int,
        sink_tokens: int = KV_PRUNING_SINK_TOKENS,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._block_tokens = block_tokens
        self._num_sinks = -(-sink_tokens // block_tokens)
        self._num_recent = -(-recent_tokens // block_tokens)
        self._device = next(model.parameters()).device
        ends = getattr(model.generation_config, "eos_token_id", None)
        self._ends = set(ends if isinstance(ends, list) else [ends]) - {None} | {tokenizer.eos_token_id}

    def count_tokens(self, text: str) -> int:
        """Tokens of a text on its own."""
        return len(self.encode(text))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text on its own, without what the tokenizer puts around texts."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    @torch.inference_mode()
    def prefill(self, context: Sequence[int]) -> Prefilled:
        """Read a context of token ids and score its blocks."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self._model.config)
        if any(getattr(layer, "is_sliding", False) or not hasattr(layer, "crop") for layer in cache.layers):
            raise UnsupportedModelError(
                "KV pruning needs full attention in every layer; this model has other layers"
            )
        self._model(input_ids=self._ids(context), past_key_values=cache, use_cache=True, logits_to_keep=1)
        num_full = len(context) // self._block_tokens
        return Prefilled(cache, len(context), num_full, self._order(cache, num_full))

    @torch.inference_mode()
    def logprobs(self, context: Prefilled, fraction: float, continuation: Sequence[int]) -> Tensor:
        """Log-probs `[len(continuation) - 1]` of the second and later tokens behind the pruned context.

        The first one was predicted before anything was dropped, so pruning cannot change it.
        """
        cache = self._pruned(context, fraction)
        logits = self._read(cache, context.num_tokens, continuation[:-1])
        chosen = torch.tensor(continuation[1:], device=self._device)
        return logits.float().log_softmax(-1).gather(-1, chosen[:, None])[:, 0].cpu()

    @torch.inference_mode()
    def replies(self, context: Prefilled, fraction: float, questions: Sequence[Sequence[int]]) -> list[str]:
        """Greedy replies to questions (token ids), each as if it were the only one."""
        cache = self._pruned(context, fraction)
        return [self._reply(cache, context.num_tokens, question) for question in questions]

    def passage_ids(self, context: str, continuation: str) -> TokenPassage:
        """Token ids of a text that the model reads as it stands."""
        return self._start() + self.encode(context), self.encode(continuation)

    def prompt_ids(self, prompt: str | list[dict[str, Any]]) -> list[int]:
        """Token ids of a prompt: through the chat template if there is one; else it must be text."""
        if not self._tokenizer.chat_template:
            if not isinstance(prompt, str):
                raise ConfigError("the prompts are messages, and the model has no chat template")
            return self._start() + self.encode(prompt)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.encode(text)

    def recall_ids(self, recall: Recall) -> tuple[list[int], list[list[int]]]:
        """Token ids of the context and of its questions: through the chat template if there is one."""
        if not self._tokenizer.chat_template:
            asked = [self.encode(f" {question.text} {question.cue}") for question in recall.questions]
            return self._start() + self.encode(recall.context), asked
        parts = [self._chat_parts(recall.context, question) for question in recall.questions]
        return self.encode(parts[0][0]), [self.encode(rest) for _, rest in parts]

    def _chat_parts(self, context: str, question: Question) -> tuple[str, str]:
        content = f"{context}\n\n{question.text} Answer with one word."
        text: str = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        split = text.find(context)
        if split < 0:
            raise ConfigError("the chat template changes the text of a message: pruning accuracy cannot use it")
        split += len(context)
        return text[:split], text[split:]

    def _start(self) -> list[int]:
        """Token ids that the tokenizer puts before every text."""
        bos = self._tokenizer.bos_token_id
        return [bos] if bos is not None and self._tokenizer("a")["input_ids"][:1] == [bos] else []

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor([list(tokens)], dtype=torch.int64, device=self._device)

    def _order(self, cache: Any, num_full: int) -> list[int]:
        size, last = self._block_tokens, num_full - self._num_recent
        if last <= self._num_sinks:
            return []
        stats = []
        for layer in cache.layers:
            heads = layer.keys[0, :, : num_full * size]  # [heads, tokens, head_size]
            stats.append(summarize(heads.transpose(0, 1).unflatten(0, (num_full, size))))
        scores = score_blocks(torch.stack(stats), num_full * size).tolist()
        return choose_blocks(scores, num_full, {*range(self._num_sinks), *range(last, num_full)})

    def _pruned(self, context: Prefilled, fraction: float) -> Any:
        """A copy of the cache without the dropped blocks; the original stays as it is."""
        from transformers import DynamicCache

        dropped = set(context.dropped(fraction))
        positions = [i for i in range(context.num_tokens) if i // self._block_tokens not in dropped]
        keep = torch.tensor(positions, device=self._device)
        pruned = DynamicCache(config=self._model.config)
        for index, layer in enumerate(context.cache.layers):
            pruned.update(layer.keys.index_select(2, keep), layer.values.index_select(2, keep), index)
        return pruned

    def _read(self, cache: Any, position: int, tokens: Sequence[int]) -> Tensor:
        """Logits `[len(tokens), vocab]`. `position` is where the first token stands, dropped ones counted."""
        positions = torch.arange(position, position + len(tokens), device=self._device)[None]
        out = self._model(
            input_ids=self._ids(tokens), position_ids=positions, past_key_values=cache, use_cache=True
        )
        return out.logits[0]

    def _reply(self, cache: Any, position: int, question: Sequence[int]) -> str:
        kept = cache.get_seq_length()
        reply: list[int] = []
        text = ""
        tokens = list(question)
        while len(reply) < _MAX_REPLY_TOKENS and not first_sentence(text)[1]:
            token = int(self._read(cache, position, tokens)[-1].argmax())
            position += len(tokens)
            if token in self._ends:
                break
            reply.append(token)
            tokens = [token]
            text = str(self._tokenizer.decode(reply, skip_special_tokens=True))
        cache.crop(kept - cache.get_seq_length())
        return text

"""A Llama of random weights with a long context, as an ordinary model directory. Its attention is peaked, so that
what is missing from its KV cache shows in every log-probability."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

VOCAB_SIZE = 512

_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.12,
    "tie_word_embeddings": False,
    "eos_token_id": 1,
    "dtype": "float32",
}


def save_small_llama(
    directory: Path, tokenizer_from: Path, context: int = 2048, vocab_size: int = VOCAB_SIZE, **shape: int
) -> LlamaForCausalLM:
    """Write the model with the tokenizer files of another one, which may know more tokens; returns it.

    `shape` overrides fields of its configuration: a larger one takes measurable time for a prompt.
    """
    config = LlamaConfig(**{**_SHAPE, "vocab_size": vocab_size, **shape}, max_position_embeddings=context)
    model = _random(LlamaForCausalLM, config)
    _save(model, directory, tokenizer_from)
    return model


def save_small_mistral(directory: Path, tokenizer_from: Path, window: int) -> None:
    """The same shape, but every layer attends to a window of tokens only."""
    config = MistralConfig(**_SHAPE, max_position_embeddings=2048, sliding_window=window)
    _save(_random(MistralForCausalLM, config), directory, tokenizer_from)


def prompt_of(num_tokens, seed):
    """Random token ids of that vocabulary."""
    return torch.randint(2, VOCAB_SIZE, (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def _random(model_class, config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return model_class(config).float().eval()


def _save(model, directory: Path, tokenizer_from: Path) -> None:
    from transformers import AutoTokenizer

    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tokenizer_from).save_pretrained(directory)

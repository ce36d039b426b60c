"""A Llama of random weights with a long context, as an ordinary model directory. Its attention is peaked, so that
what is missing from its KV cache shows in every log-probability."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB_SIZE = 512


def save_small_llama(directory: Path, tokenizer_from: Path, context: int = 2048) -> LlamaForCausalLM:
    """Write the model with the tokenizer files of another one; returns it."""
    from transformers import AutoTokenizer

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.12,
        tie_word_embeddings=False,
        eos_token_id=1,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = LlamaForCausalLM(config).float().eval()
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tokenizer_from).save_pretrained(directory)
    return model

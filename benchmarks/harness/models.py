"""The models that are measured: the built-in one, and two with random weights: Qwen2.5-0.5B's shape, and a small one
for long contexts."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from core.config import AppArgs

ModelName = Literal["tiny", "half-b", "long"]

TITLES: dict[ModelName, str] = {
    "tiny": "built-in (1.5M)",
    "half-b": "0.5B shape, random",
    "long": "11M, random, 4096 tokens of context",
}

_HALF_B = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2}
_SHAPES: dict[str, dict[str, Any]] = {
    "half-b": {**_HALF_B, "vocab_size": 151_936, "num_hidden_layers": 24},
    "half-b-part": {**_HALF_B, "vocab_size": 151_936 // 12, "num_hidden_layers": 2},
    "tiny-part": {
        "model_type": "llama",
        "vocab_size": 1024,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
    },
    "long": {
        "vocab_size": 2048,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
    },
}
"""Models with random weights, Qwen2 where nothing else is said; `tiny-part` has the shape of the built-in model."""


@contextmanager
def model_directories(
    names: Sequence[ModelName], state_dir: Path, show_progress: bool
) -> Iterator[dict[str, Path]]:
    """Yield the directories of the models by name; random ones exist while the context lasts (up to 1 GB)."""
    from engine.tiny.build import ensure_tiny_assistant

    with tempfile.TemporaryDirectory(prefix="mace-bench-") as scratch:
        directories: dict[str, Path] = {}
        if "tiny" in names:
            directories["tiny"] = ensure_tiny_assistant(state_dir, show_progress=show_progress).absolute()
        for name in names:
            if name in _SHAPES:
                directories[name] = random_model(Path(scratch) / name, name)
        yield directories


def random_model(directory: Path, name: str) -> Path:
    """Write a model of one of `_SHAPES` with random bf16 weights, without tokenizer files; return `directory`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"model_type": "qwen2", "max_position_embeddings": 4096, "tie_word_embeddings": True, **_SHAPES[name]}
    config = AutoConfig.for_model(**shape)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    return directory


def vocab_size(model_dir: Path) -> int:
    """Read the number of token ids of a model directory."""
    return int(json.loads((model_dir / "config.json").read_text(encoding="utf-8"))["vocab_size"])


def args_for(name: ModelName, model_dir: Path, args: AppArgs) -> AppArgs:
    """Settings for an engine on this model: its own dtype, and no tokenizer, since measurements speak token ids."""
    model = args.model if name == "tiny" else args.model.model_copy(update={"model_source": str(model_dir)})
    kwargs = {"skip_tokenizer_init": True, **args.engine.engine_kwargs}
    return args.model_copy(
        update={"model": model, "engine": args.engine.model_copy(update={"engine_kwargs": kwargs})}
    )

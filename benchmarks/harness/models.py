"""The models that are measured: the built-in one, and two with random weights: Qwen2.5-0.5B's shape, and a small one
for long contexts."""

import json
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from core.config import SMOLLM2, TINY_ASSISTANT, AppArgs, ModelConfig

if TYPE_CHECKING:
    from engine.vllm.engine import HybridEngine

ModelName = Literal["tiny", "smollm2", "half-b", "long"]

TITLES: dict[ModelName, str] = {
    "tiny": "built-in (1.5M)",
    "smollm2": "SmolLM2 (135M)",
    "half-b": "0.5B shape, random",
    "long": "11M, random, 4096 tokens of context",
}

_SHAPES: dict[str, dict[str, int]] = {
    "half-b": {
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
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


@contextmanager
def model_directories(
    names: Collection[ModelName], state_dir: Path, show_progress: bool
) -> Iterator[dict[str, Path]]:
    """Yield the directories of the models by name; random ones exist while the context lasts (up to 1 GB)."""
    from engine.model_source import resolve_model

    built_in = {"tiny": TINY_ASSISTANT, "smollm2": SMOLLM2}
    with tempfile.TemporaryDirectory(prefix="mace-bench-") as scratch:
        yield {
            name: resolve_model(
                ModelConfig(model_source=built_in[name]), state_dir, show_progress=show_progress
            ).absolute()
            if name in built_in
            else _random_model(Path(scratch) / name, _SHAPES[name])
            for name in names
        }


def _random_model(directory: Path, shape: dict[str, int]) -> Path:
    """Write a Qwen2 model with random bf16 weights, without tokenizer files; return `directory`."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    config = Qwen2Config(max_position_embeddings=4096, tie_word_embeddings=True, **shape)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
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


async def start_engine(args: AppArgs, model_dir: Path, stat_loggers: list[Any] | None = None) -> "HybridEngine":
    """Start an engine in this process, with the settings of `args_for`."""
    from engine.vllm.compat import configure_environment
    from engine.vllm.engine import HybridEngine

    configure_environment(args, model_dir)
    return await HybridEngine.start(args, str(model_dir), stat_loggers)

"""Builds the tiny assistant once and keeps it as an ordinary Hugging Face model directory."""

import hashlib
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from core.files import atomic_directory, locked
from engine.tiny import corpus, tokenizer
from engine.tiny.train import Recipe, train_model

RECIPE_VERSION = 1
"""Raise it when the code changes in a way that the fingerprint below cannot see."""
_RECIPE = Recipe()


def ensure_tiny_assistant(
    state_dir: Path, seed: int = 0, show_progress: bool = True, recipe: Recipe = _RECIPE
) -> Path:
    """Return the model directory, building it first where it is missing; every recipe has a directory of its own.

    Takes about 40 s of one CPU core the first time. Safe to call from several processes at once: one builds, the
    others wait for it.
    """
    models_dir = state_dir / "models"
    target = models_dir / f"tiny-assistant-v{RECIPE_VERSION}-{_fingerprint(recipe)}-seed{seed}"
    if target.is_dir():
        return target
    models_dir.mkdir(parents=True, exist_ok=True)
    with locked(models_dir / f".{target.name}.lock"):
        if not target.is_dir():
            with atomic_directory(target) as staging:
                words = tokenizer.train_tokenizer()
                _save(staging, _train_with_progress(words, recipe, seed, show_progress), words)
    return target


def _train_with_progress(
    words: PreTrainedTokenizerFast, recipe: Recipe, seed: int, show_progress: bool
) -> LlamaForCausalLM:
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps, loss {task.fields[loss]:.2f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not show_progress) as progress:
        bar = progress.add_task("Training the tiny assistant", total=recipe.steps, loss=float("nan"))
        return train_model(words, recipe, seed, lambda step, loss: progress.update(bar, completed=step, loss=loss))


def _save(directory: Path, model: LlamaForCausalLM, words: PreTrainedTokenizerFast) -> None:
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    model.save_pretrained(directory)
    words.save_pretrained(directory, save_jinja_files=False)
    for path in directory.iterdir():
        path.chmod(0o644)


def _fingerprint(recipe: Recipe) -> str:
    """Changes with the recipe, the knowledge, the wording of the styles and the chat format."""
    content = (recipe, list(corpus.texts()), tokenizer.CHAT_TEMPLATE, tokenizer.VOCAB_SIZE)
    return hashlib.sha256(repr(content).encode()).hexdigest()[:8]

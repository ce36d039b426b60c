"""A tiny model that finds needles: the positive case for measuring what KV pruning costs.

    mace bench needle-model --state-dir state

The built-in model cannot look things up in its context, so on it the recall tasks of `mace profile pruning` say
nothing. This one is trained on the same kind of text (other seeds) to answer from the context and from nothing else.
It is a Llama with two layers, saved as an ordinary Hugging Face directory. Training takes about two minutes of one
core; two things make that possible. The heads of the first layer start as previous-token heads (one to four tokens
back), since that half of a lookup is what training finds last. And a fifth of the batches are random tokens that
repeat, which nothing but looking back can predict.
"""

import functools
import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.harness.report import StateDir, note
from core.files import atomic_directory
from engine.pruning.tasks import RecallKind, all_words, make_recall

if TYPE_CHECKING:
    import torch

MAX_CONTEXT_TOKENS = 768
"""The longest contexts in training."""
RECIPE_VERSION = 1
"""Raise it when the code changes in a way that the fingerprint below cannot see."""
_UNKNOWN, _END = "<unk>", "<end>"
_MAX_POSITIONS = 2048
_REPORT_STEPS = 100
_ANSWER_WEIGHT, _TEXT_WEIGHT = 3.0, 0.1
"""Weights of predicting an answer's word, and any other token."""


@dataclass(frozen=True, slots=True)
class NeedleRecipe:
    """Every number that decides the weights, besides the seed."""

    hidden_size: int = 64
    head_size: int = 32
    num_heads: int = 4
    rope_theta: float = 10_000.0
    steps: int = 2000
    tokens_per_step: int = 2048
    learning_rate: float = 3e-3
    warmup_steps: int = 20
    decay_share: float = 0.35
    """Last part of the steps, in which the learning rate falls to zero."""
    repeats_first: float = 0.1
    """First part of the steps: repeated random tokens only."""
    repeats_later: float = 0.2
    """Share of such batches after that."""
    growth_share: float = 0.6
    """Part of the remaining steps over which contexts grow to their full length."""
    shortest_tokens: int = 64
    questions: int = 8


@dataclass(slots=True)
class TokenRow:
    """Tokens and the weight of predicting each."""

    ids: list[int]
    weights: list[float]


def ensure_needle_model(state_dir: Path, seed: int = 0, recipe: NeedleRecipe | None = None) -> Path:
    """The model's directory; trained first where it is missing."""
    recipe = recipe or NeedleRecipe()
    target = state_dir / "models" / f"needle-v{RECIPE_VERSION}-{_fingerprint(recipe)}-seed{seed}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_directory(target) as staging:
        tokenizer = train_tokenizer()
        model = train_needle_model(tokenizer, recipe, seed)
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
    return target


def train_needle_model(tokenizer: Any, recipe: NeedleRecipe, seed: int) -> Any:
    """Train from scratch on one thread. Leaves torch's thread count as it was."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _fit(new_model(tokenizer, recipe), tokenizer, recipe, random.Random(seed))
    finally:
        torch.set_num_threads(num_threads)


def train_tokenizer() -> Any:
    """One token a word, for the words of the tasks."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(unk_token=_UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(all_words(), trainers.WordLevelTrainer(special_tokens=[_UNKNOWN, _END]))
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token=_UNKNOWN,
        eos_token=_END,
        pad_token=_END,
        model_max_length=_MAX_POSITIONS,
    )


def new_model(tokenizer: Any, recipe: NeedleRecipe) -> Any:
    """Make an untrained Llama of two layers whose first heads look back."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=2 * recipe.hidden_size,
        num_hidden_layers=2,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_heads,
        head_dim=recipe.head_size,
        max_position_embeddings=_MAX_POSITIONS,
        initializer_range=recipe.hidden_size**-0.5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        dtype="float32",
    )
    model = LlamaForCausalLM(config).float()
    _look_back(model, recipe)
    return model


def _look_back(model: Any, recipe: NeedleRecipe) -> None:
    """Let head h of the first layer attend to the token h + 1 back.

    One embedding dimension is nearly constant. Queries and keys read it through the faster half of the rotary pairs,
    the keys turned by h + 1 positions, so that their product is largest at just that distance.
    """
    import torch

    attention = model.model.layers[0].self_attn
    half, scale = recipe.head_size // 2, 2.0
    pairs = torch.arange(half // 2)
    frequencies = recipe.rope_theta ** (-pairs / half)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 3 * model.config.initializer_range
        for head in range(recipe.num_heads):
            rows = head * recipe.head_size + pairs
            for weight in (attention.q_proj.weight, attention.k_proj.weight):
                weight[rows] = weight[rows + half] = 0.0
            angles = (head + 1) * frequencies
            attention.q_proj.weight[rows, 0] = scale
            attention.k_proj.weight[rows, 0] = scale * torch.cos(angles)
            attention.k_proj.weight[rows + half, 0] = scale * torch.sin(angles)


def _fit(model: Any, tokenizer: Any, recipe: NeedleRecipe, rng: random.Random) -> Any:
    import torch
    from torch.nn import functional

    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(_rate, recipe=recipe))
    encode = functools.partial(_encode, tokenizer)
    model.train()
    accuracy = 0.0
    for step in range(recipe.steps):
        ids, weights = _batch(_draw_rows(step, len(tokenizer), encode, recipe, rng), tokenizer.pad_token_id)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        targets, weights = ids[:, 1:], weights[:, 1:]
        losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        loss = (losses.view_as(weights) * weights).sum() / weights.sum()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.zero_grad()
        is_answer = weights > _ANSWER_WEIGHT / 2
        if is_answer.any():
            accuracy = (logits.argmax(-1) == targets)[is_answer].float().mean().item()
        if (step + 1) % _REPORT_STEPS == 0:
            note(f"step {step + 1}: loss {loss.item():.3f}, {accuracy:.0%} right")
    return model.eval()


def _rate(step: int, recipe: NeedleRecipe) -> float:
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    return warm * min(1.0, (recipe.steps - step) / (recipe.decay_share * recipe.steps))


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _draw_rows(
    step: int, vocab_size: int, encode: Callable[[str], list[int]], recipe: NeedleRecipe, rng: random.Random
) -> list[TokenRow]:
    first = int(recipe.repeats_first * recipe.steps)
    growth = min(1.0, max(0, step - first) / (recipe.growth_share * (recipe.steps - first)))
    is_repeat = step < first or rng.random() < recipe.repeats_later
    longest = recipe.shortest_tokens + growth * (MAX_CONTEXT_TOKENS - recipe.shortest_tokens)
    length = rng.randint(40, 96) if step < first else int(longest * rng.uniform(0.4, 1))
    if is_repeat:
        return [repeated_row(length, vocab_size, rng) for _ in range(max(3, recipe.tokens_per_step // length))]
    count = max(3, recipe.tokens_per_step // (length + 10 * recipe.questions))
    return [recall_row(length, encode, recipe, rng) for _ in range(count)]


def repeated_row(length: int, vocab_size: int, rng: random.Random) -> TokenRow:
    """Repeat a run of random tokens again and again, sometimes from its middle."""
    alphabet = rng.sample(range(2, vocab_size), rng.choice([8, 16, 32, 64, 128]))
    run = [rng.choice(alphabet) for _ in range(rng.randint(8, max(10, length // 3)))]
    row = TokenRow([], [])
    while len(row.ids) < length:
        start = 0 if rng.random() < 0.5 else rng.randrange(len(run))
        unknowable = 3 if row.ids else len(run)
        row.weights += [0.0] * unknowable + [1.0] * (len(run) - unknowable)
        row.ids += run[start:] + run[:start]
    return TokenRow(row.ids[:length], row.weights[:length])


def recall_row(
    length: int, encode: Callable[[str], list[int]], recipe: NeedleRecipe, rng: random.Random
) -> TokenRow:
    """Make a context with questions about it; the answers have the weight."""
    kind: RecallKind = rng.choice(["needle", "qa"])
    recall = make_recall(kind, length, recipe.questions, _count_words, rng)
    ids = list(encode(recall.context))
    row = TokenRow(ids, [_TEXT_WEIGHT] * len(ids))
    for question in recall.questions:
        asked = f"{question.text} {question.cue}" if rng.random() < 0.5 else question.cue
        prompt, answer = encode(asked), encode(f"{question.answer}.")
        row.ids += prompt + answer
        row.weights += [_TEXT_WEIGHT] * len(prompt) + [_ANSWER_WEIGHT] + [_TEXT_WEIGHT] * (len(answer) - 1)
    return row


def _count_words(text: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]", text))


def _batch(rows: list[TokenRow], pad_id: int) -> "tuple[torch.Tensor, torch.Tensor]":
    import torch

    width = max(len(row.ids) for row in rows)
    ids, weights = torch.full((len(rows), width), pad_id), torch.zeros(len(rows), width)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        weights[index, : len(row.ids)] = torch.tensor(row.weights)
    return ids, weights


def _fingerprint(recipe: NeedleRecipe) -> str:
    """Changes with the recipe and the words of the tasks."""
    return hashlib.sha256(repr((recipe, all_words())).encode()).hexdigest()[:8]


def main(
    state_dir: StateDir = Path("state"),
    seed: Annotated[int, typer.Option(help="Seed of weights and texts")] = 0,
) -> None:
    """Train the model that finds needles if it is missing, and print its directory."""
    typer.echo(str(ensure_needle_model(state_dir, seed)))

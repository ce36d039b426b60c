"""Trains the tiny assistant: plain supervised learning on the replies, made to be fast and repeatable on a CPU.

The four replies to one prompt stand behind a single copy of it, in one row, and do not see each other
(`_Batch.mask`). That costs 40 % fewer tokens than four rows, and every step sees all styles equally often. The number
of steps is fixed, not the time, so that the same seed and thread count give the same weights.
"""

import functools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from engine.tiny import corpus
from engine.tiny.tokenizer import CONTEXT_LENGTH, VOCAB_SIZE

Progress = Callable[[int, float], None]
"""Called after each step with the number of finished steps and the loss."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Every number that decides the weights, besides the seed."""

    hidden_size: int = 192
    num_layers: int = 3
    num_heads: int = 3
    num_kv_heads: int = 3
    intermediate_size: int = 512
    steps: int = 360
    groups_per_batch: int = 16
    learning_rate: float = 3e-3
    warmup_steps: int = 30
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    muon_rate: float = 0.02
    """Learning rate of the matrices inside the layers; `learning_rate` is that of embeddings and norms."""
    num_iterations: int = 3
    """Newton-Schulz iterations; three are as accurate as four here, and orthogonalising is a third of the step."""
    init_std: float = 0.07
    """Standard deviation of all matrices; at 1/sqrt(hidden_size) tied embeddings tell tokens apart at once."""
    num_threads: int = 1
    """One on purpose: where another process keeps one of two cores busy, a step takes 0.2 s with one thread and 0.5 to
    1.8 s with two, since every small operation waits for both. It also frees the weights from the number of cores.
    """


@dataclass(frozen=True, slots=True)
class _Batch:
    """B packed groups of T tokens each, and N predictions."""

    input_ids: torch.Tensor
    """[B, T]: a prompt, then its replies one after another, then padding."""
    position_ids: torch.Tensor
    """[B, T]: every reply counts on from the end of the prompt."""
    mask: torch.Tensor
    """[B, 1, T, T], bool: which position sees which."""
    sources: torch.Tensor
    """[N]: flat index into B·T of the position that predicts."""
    targets: torch.Tensor
    """[N]: the token that it should predict."""


def train_model(
    tokenizer: PreTrainedTokenizerFast, recipe: Recipe, seed: int, on_step: Progress | None = None
) -> LlamaForCausalLM:
    """Train from scratch. Leaves torch's global random state and thread count as they were."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(recipe.num_threads)
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
            torch.manual_seed(seed)
            return _fit(_new_model(tokenizer, recipe), tokenizer, recipe, seed, on_step)
    finally:
        torch.set_num_threads(num_threads)


def _new_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_kv_heads,
        initializer_range=recipe.init_std,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return LlamaForCausalLM(config).float()


def _fit(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    seed: int,
    on_step: Progress | None,
) -> LlamaForCausalLM:
    inner = [parameter for parameter in model.model.layers.parameters() if parameter.ndim > 1]
    known = {id(parameter) for parameter in inner}
    others = [parameter for parameter in model.parameters() if id(parameter) not in known]
    muon = Muon(inner, num_iterations=recipe.num_iterations)
    optimizer = torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(_rate, recipe=recipe))
    batches = _batches(tokenizer, recipe, random.Random(seed))
    model.train()
    for step in range(1, recipe.steps + 1):
        loss = _loss(model, next(batches))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        muon.step(recipe.muon_rate * _rate(step - 1, recipe), recipe.weight_decay)
        optimizer.step()
        schedule.step()
        model.zero_grad()
        if on_step is not None:
            on_step(step, loss.item())
    return model.eval()


def _rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then linear decay to zero: the last steps settle what is known by heart."""
    warmup = min(recipe.warmup_steps, max(1, recipe.steps // 4))
    if step < warmup:
        return (step + 1) / warmup
    return (recipe.steps - step) / max(1, recipe.steps - warmup)


def _loss(model: LlamaForCausalLM, batch: _Batch) -> torch.Tensor:
    hidden = model.model(
        input_ids=batch.input_ids, attention_mask=batch.mask, position_ids=batch.position_ids, use_cache=False
    ).last_hidden_state
    logits = model.lm_head(hidden.flatten(0, 1)[batch.sources])
    return functional.cross_entropy(logits, batch.targets)


def _batches(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, rng: random.Random) -> Iterator[_Batch]:
    """Endless epochs. Rows of similar length go together; the order of batches within an epoch is random."""
    encode = functools.cache(lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"]))
    while True:
        rows = [_Row.of(group, encode) for group in corpus.draw_epoch(rng)]
        rows.sort(key=lambda row: len(row.ids))
        size = recipe.groups_per_batch
        chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
        rng.shuffle(chunks)
        yield from (_collate(chunk, tokenizer.pad_token_id) for chunk in chunks)


@dataclass(slots=True)
class _Row:
    """One group in packed form. `segments` is 0 for the prompt and i for the i-th reply."""

    ids: list[int]
    positions: list[int]
    segments: list[int]
    sources: list[int]
    targets: list[int]

    @classmethod
    def of(cls, group: corpus.Group, encode: Callable[[str], list[int]]) -> "_Row":
        """Pack a group. The last token of the prompt predicts the first one of every reply."""
        end = encode("<|end|>")
        prompt: list[int] = []
        for message in group.messages:
            prompt += encode(f"<|{message['role']}|>") + encode(message["content"]) + end
        prompt += encode("<|assistant|>")
        length = len(prompt)
        row = cls(prompt, list(range(length)), [0] * length, [], [])
        for segment, text in enumerate(group.replies, start=1):
            reply, start = encode(text) + end, len(row.ids)
            row.sources += [length - 1, *range(start, start + len(reply) - 1)]
            row.targets += reply
            row.ids += reply[:-1]
            row.positions += range(length, length + len(reply) - 1)
            row.segments += [segment] * (len(reply) - 1)
        return row


def _collate(rows: list[_Row], pad_id: int) -> _Batch:
    input_ids = _padded((row.ids for row in rows), pad_id)
    width = input_ids.shape[1]
    sources = [index * width + source for index, row in enumerate(rows) for source in row.sources]
    return _Batch(
        input_ids,
        _padded((row.positions for row in rows), 0),
        _mask(_padded((row.segments for row in rows), -1)),
        torch.tensor(sources),
        torch.tensor([target for row in rows for target in row.targets]),
    )


def _padded(rows: Iterable[list[int]], value: int) -> torch.Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def _mask(segments: torch.Tensor) -> torch.Tensor:
    """[B, T] segments to a [B, 1, T, T] mask: causal, within the own reply and into the prompt."""
    width = segments.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    same = segments[:, :, None] == segments[:, None, :]
    prompt = segments[:, None, :] == 0
    return ((same | prompt) & causal)[:, None]


_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic Newton-Schulz iteration, from the Muon write-up."""


class Muon:
    """Muon (Jordan et al., 2024): momentum, then the nearest orthogonal matrix, then a decoupled weight decay.

    Orthogonalised updates learn rare facts in far fewer steps than Adam. `torch.optim.Muon` iterates in bfloat16, which
    gives other weights; this one runs in fp32 and stacks matrices of equal shape.
    """

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], momentum: float = 0.95, num_iterations: int = 5
    ) -> None:
        groups: dict[torch.Size, list[torch.nn.Parameter]] = {}
        for parameter in parameters:
            groups.setdefault(parameter.shape, []).append(parameter)
        self._groups = list(groups.values())
        self._velocities = [torch.zeros(len(group), *group[0].shape) for group in self._groups]
        self._momentum = momentum
        self._num_iterations = num_iterations

    @torch.no_grad()
    def step(self, learning_rate: float, weight_decay: float) -> None:
        """Apply one update from the gradients at hand."""
        for group, velocity in zip(self._groups, self._velocities, strict=True):
            gradient = torch.stack([parameter.grad for parameter in group if parameter.grad is not None])
            velocity.lerp_(gradient, 1 - self._momentum)
            update = orthogonalise(gradient.lerp(velocity, self._momentum), self._num_iterations)
            rows, columns = velocity.shape[1:]
            scale = learning_rate * max(1.0, rows / columns) ** 0.5
            for parameter, change in zip(group, update.unbind(0), strict=True):
                parameter.mul_(1 - learning_rate * weight_decay).sub_(change, alpha=scale)


def orthogonalise(matrices: torch.Tensor, num_iterations: int) -> torch.Tensor:
    """Bring the singular values of each of [K, rows, columns] near 1, keeping the singular vectors."""
    a, b, c = _COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(num_iterations):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.mT if is_tall else x

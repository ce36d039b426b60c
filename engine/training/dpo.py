"""One DPO step on a LoRA as a resumable sequence of slices.

Per micro-batch: embed, reference layers (adapter off), reference head chunks, embed, policy layers (each layer's
input is kept), policy head chunks, loss, backward layers (each recomputed from its kept input). After the last
micro-batch one optimizer slice. If the reference log-probabilities of a micro-batch's pairs are known, everything up
to the second embed is left out. Nothing but the object itself is needed between two slices, so the same thread may
run inference in between; parameters change in the optimizer slice only.

Each head chunk computes d logp_t / d hidden_t at once. The loss's derivative is one scalar per sequence, known
only after the last chunk; the loss slice multiplies it in. So the head, the widest matrix, runs once, not twice.

Loss of n pairs with weights w: `sum(w * dpo) / n`, plus `sft_weight` times the token mean of the chosen responses' NLL,
in which a pair's tokens count w times, times the mean weight. With weights of 1 these are TRL's `sigmoid` and `sft`.
"""

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

import torch

from core.config import TrainingConfig
from core.errors import DeviceMemoryError, DivergedError, TrainingError
from core.types import FineTuneTask, PairScore, SliceKind, StepMetrics, TaskKind
from engine.training.dpo_batch import MicroBatch, cut_pair, make_micro_batches
from engine.training.dpo_loss import sigmoid_dpo, sum_per_row, token_log_probs, token_log_probs_and_grad
from engine.training.dpo_work import SliceSpec, Work
from engine.training.shadow import ShadowAdapter
from engine.training.skeleton import training_mode
from engine.training.trainable import TrainableModel

_MIN_CHUNK_TOKENS = 16
"""Below this a head chunk costs the reading of the head's weights, whatever its size."""


_Program = deque[tuple[SliceSpec, Callable[[], None]]]


class DpoStep:
    """A task's slices and their state. TRAIN ends with an optimizer step, EVALUATE only scores.

    Raises (constructor):
        PairTooLongError: A pair does not fit the configured lengths.
        ConfigError: The configured length exceeds the model's sliding window.
        TrainingError: No pairs, or a token id outside the vocabulary.
    """

    def __init__(
        self,
        model: TrainableModel,
        shadow: ShadowAdapter,
        task: FineTuneTask,
        config: TrainingConfig,
        *,
        share_prompt: bool = True,
    ) -> None:
        """`share_prompt` is `experiments.share_prompt`."""
        model.check_lengths(config)
        self.task = task
        self._model, self._shadow, self._config = model, shadow, config
        self._trains = task.kind is TaskKind.TRAIN
        max_length = min(config.max_length_tokens, model.context_tokens)
        pairs = [cut_pair(pair, config.max_prompt_tokens, max_length) for pair in task.pairs]
        weighted_tokens = sum(pair.weight * len(pair.chosen_ids) for pair in pairs)
        sft = config.sft_weight * sum(pair.weight for pair in pairs) / config.beta
        self._sft_coefficient = sft / weighted_tokens if weighted_tokens else 0.0
        with training_mode(model.device):
            batches = make_micro_batches(
                pairs,
                max_slice_tokens=config.max_slice_tokens,
                vocab_size=model.vocab_size,
                device=model.device,
                share_prompts=share_prompt,
            )
        self._work = [Work(batch) for batch in batches]
        self.largest_batch_pairs = max(batch.num_pairs for batch in batches)
        """Most pairs that go through a slice together."""
        self._program: _Program = deque(self._plan())
        self._gradients: torch.Tensor | None = None
        self._gradient_views: list[list[torch.Tensor]] = []
        self._scores: dict[int, PairScore] = {}
        self._loss_sum = 0.0
        self._grad_norm: float | None = None
        self._discarded = False

    @property
    def next_slice(self) -> SliceSpec | None:
        """The slice that `run_slice` will run, or None at the end."""
        return self._program[0][0] if self._program else None

    @property
    def pending(self) -> tuple[SliceSpec, ...]:
        """All slices that are still to run, in order."""
        return tuple(spec for spec, _ in self._program)

    @property
    def done(self) -> bool:
        """Every slice has run and there is a result."""
        return not self._program and not self._discarded

    @property
    def activation_bytes(self) -> int:
        """Device memory held between slices now: hidden states, kept inputs, head and LoRA gradients."""
        gradients = 0 if self._gradients is None else self._gradients.nbytes
        return gradients + sum(work.num_bytes() for work in self._work)

    def run_slice(self) -> SliceKind:
        """Run the next slice to its end, in a grad mode of its own.

        Raises:
            DivergedError: Loss or gradient not finite, or a training loss above `max_loss`.
            DeviceMemoryError: The device is out of memory.
            TrainingError: Nothing is left to run.
            After any error the step is discarded: parameters and optimizer are as before the step.
        """
        if not self._program:
            raise TrainingError(f"task {self.task.task_id} has no slice left to run")
        spec, run = self._program[0]
        try:
            with training_mode(self._model.device):
                run()
        except RuntimeError as error:
            self.discard()
            if not _is_out_of_memory(error):
                raise
            raise DeviceMemoryError(f"out of device memory in a {spec.kind} slice: {error}") from error
        except BaseException:
            self.discard()
            raise
        self._program.popleft()
        return spec.kind

    def discard(self) -> None:
        """Drop gradients and activations; parameters stay as they were before the step."""
        self._discarded = not self.done or self._discarded
        self._program.clear()
        self._gradients = None
        self._gradient_views = []
        self._work = []

    def result(self) -> tuple[StepMetrics, tuple[PairScore, ...]]:
        """Means over the task (each pair counts the same) and the scores in the task's order of pairs.

        Raises:
            TrainingError: The step is not done.
        """
        if not self.done:
            raise TrainingError(f"task {self.task.task_id} is not done")
        scores = tuple(self._scores[i] for i in range(len(self.task.pairs)))
        count = len(scores)
        metrics = StepMetrics(
            loss=sum(score.loss for score in scores) / count,
            margin=sum(score.margin for score in scores) / count,
            accuracy=sum(score.margin > 0 for score in scores) / count,
            grad_norm=self._grad_norm,
        )
        return metrics, scores

    def gradients(self) -> dict[str, torch.Tensor]:
        """LoRA gradients gathered so far, by PEFT name (views); empty before the first backward slice."""
        return {} if self._gradients is None else self._shadow.named_views(self._gradients)

    def _plan(self) -> Iterator[tuple[SliceSpec, Callable[[], None]]]:
        """The slices in order; layers and head chunks differ in the adapter only."""
        layers = range(self._model.num_layers)
        for work in self._work:
            tokens, targets = work.batch.num_tokens, work.batch.num_targets
            starts = range(0, targets, self._chunk_tokens(tokens))
            chunks = [slice(start, min(start + starts.step, targets)) for start in starts]
            for is_policy in (False, True) if work.batch.reference is None else (True,):
                layer_kind = SliceKind.POLICY_LAYER if is_policy else SliceKind.REFERENCE_LAYER
                head_kind = SliceKind.POLICY_HEAD if is_policy else SliceKind.REFERENCE_HEAD
                run_layer = self._policy_layer if is_policy else self._reference_layer
                run_head = self._policy_head if is_policy else self._reference_head
                yield SliceSpec(SliceKind.EMBED, tokens), partial(self._embed, work)
                for i in layers:
                    yield SliceSpec(layer_kind, tokens), partial(run_layer, work, i)
                for chunk in chunks:
                    yield SliceSpec(head_kind, chunk.stop - chunk.start), partial(run_head, work, chunk)
            yield SliceSpec(SliceKind.LOSS, targets), partial(self._loss, work)
            for i in reversed(layers) if self._trains else ():
                yield SliceSpec(SliceKind.BACKWARD_LAYER, tokens), partial(self._backward_layer, work, i)
        if self._trains:
            yield SliceSpec(SliceKind.OPTIMIZER, 0), self._optimize

    def _chunk_tokens(self, tokens: int) -> int:
        """`head_chunk_tokens`, or fewer if that is more work than a layer: with 152k words a head is nine layers."""
        as_a_layer = tokens * self._model.layer_weights // self._model.head_weight.numel()
        return min(self._config.head_chunk_tokens, max(as_a_layer, _MIN_CHUNK_TOKENS))

    def _embed(self, work: Work) -> None:
        work.hidden = self._model.embed(work.batch.ids)

    def _forward_layer(self, work: Work, i: int) -> None:
        """One layer; after the last only the positions that are scored stay alive."""
        hidden = self._run_layer(i, work.state(), work.batch)
        last = i == self._model.num_layers - 1
        work.hidden = hidden.flatten(0, 1)[work.batch.positions] if last else hidden

    def _run_layer(self, i: int, hidden: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        rotary = self._model.rotary(batch.width, batch.shared.position_ids if batch.shared else None)
        return self._model.run_layer(i, hidden, rotary, batch.shared)

    def _reference_layer(self, work: Work, i: int) -> None:
        with self._model.adapter_disabled(i):
            self._forward_layer(work, i)

    def _policy_layer(self, work: Work, i: int) -> None:
        if self._trains:
            work.inputs.append(work.state())
        self._forward_layer(work, i)

    def _reference_head(self, work: Work, chunk: slice) -> None:
        work.reference.append(token_log_probs(self._model, work.state()[chunk], work.batch.targets[chunk]))

    def _policy_head(self, work: Work, chunk: slice) -> None:
        hidden, targets = work.state()[chunk], work.batch.targets[chunk]
        if self._trains:
            log_probs, grad = token_log_probs_and_grad(self._model, hidden, targets)
            work.head_grads.append(grad)
        else:
            log_probs = token_log_probs(self._model, hidden, targets)
        work.policy.append(log_probs)

    def _loss(self, work: Work) -> None:
        batch, num_rows = work.batch, 2 * work.batch.num_pairs
        policy, reference = sum_per_row(torch.cat(work.policy), batch.rows, num_rows), batch.reference
        if reference is None:
            reference = sum_per_row(torch.cat(work.reference), batch.rows, num_rows)
        terms = sigmoid_dpo(policy, reference, self._config.beta)
        columns = zip(*terms.table.tolist(), strict=True)  # The only wait for the device before the optimizer.
        for index, values in zip(batch.pair_indices, columns, strict=True):
            pair = self.task.pairs[index]
            self._scores[index] = score = PairScore(pair.pair_id, *values)
            self._loss_sum += pair.weight * score.loss
        self._check_loss(not bool(torch.isfinite(terms.table).all()))
        head_grads = work.head_grads and torch.cat(work.head_grads)
        for held in (work.reference, work.policy, work.head_grads):
            held.clear()
        work.hidden = None
        if isinstance(head_grads, torch.Tensor):
            # Each chosen token also counts as a target of the SFT term; rows of chosen come first.
            terms.coefficients[: batch.num_pairs] -= self._sft_coefficient
            terms.coefficients.mul_(batch.weights.repeat(2))
            scaled = head_grads * terms.coefficients[batch.rows].unsqueeze(1)
            grad = scaled.new_zeros(batch.num_tokens, scaled.shape[1])
            # At most two terms meet, at the end of a shared prompt: their order, open on CUDA, does not matter.
            grad.index_add_(0, batch.positions, scaled)
            work.hidden = grad.view(*batch.ids.shape, -1).to(self._model.dtype)

    def _check_loss(self, not_finite: bool) -> None:
        """Losses are not negative, so a partial sum above the bound already condemns the step."""
        weights = sum(pair.weight for pair in self.task.pairs)
        mean = self._loss_sum / max(len(self.task.pairs), weights)  # large weights are no explosion
        if not_finite or (self._trains and mean > self._config.max_loss):
            raise DivergedError(
                f"weighted DPO loss is {mean}, allowed is a finite loss up to {self._config.max_loss}"
            )

    def _backward_layer(self, work: Work, i: int) -> None:
        """Recompute layer i with a graph and add its LoRA gradients; embeddings get none, so layer 0 is a leaf."""
        if self._gradients is None:
            self._gradients, self._gradient_views = self._shadow.new_gradients()
        leaf = work.inputs.pop().detach().requires_grad_(i > 0)
        wanted: list[torch.Tensor] = [*self._model.layer_parameters(i)]
        if i > 0:
            wanted.append(leaf)
        with torch.enable_grad():
            output = self._run_layer(i, leaf, work.batch)
        grads = list(torch.autograd.grad(output, wanted, work.state()))
        work.hidden = grads.pop() if i > 0 else None
        scale = self._config.beta / len(self.task.pairs)
        torch._foreach_add_(self._gradient_views[i], grads, alpha=scale)

    def _optimize(self) -> None:
        if self._gradients is None:
            raise TrainingError("slices ran out of order")
        self._grad_norm = self._shadow.apply(self._gradients)
        self._gradients = None
        self._gradient_views = []


def _is_out_of_memory(error: RuntimeError) -> bool:
    """CUDA has a class for it; the CPU allocator only has words."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)

"""One DPO step on a LoRA as a resumable sequence of slices.

Per micro-batch: embed, reference layers (adapter off), reference head chunks, embed, policy layers (each layer's
input is kept), policy head chunks, loss, backward layers (each recomputed from its kept input). After the last
micro-batch one optimizer slice. If the reference log-probabilities of a micro-batch's pairs are known, everything up
to the second embed is left out. Nothing but the object itself is needed between two slices, so the same thread may
run inference in between; parameters change in the optimizer slice only. `core.dpo_slices` has the order as data.
Where slices are interrupted changes no bit of the result on CPU. On CUDA two runs of the same step differ by rounding,
interrupted or not: the backward kernels of SDPA add with atomics, in whatever order they come.

Each head chunk computes d logp_t / d hidden_t at once. The loss's derivative is one scalar per sequence, known
only after the last chunk; the loss slice multiplies it in. So the head, the widest matrix, runs once, not twice.

Loss of n pairs with weights w: `sum(w * dpo) / n`, plus `sft_weight` times the token mean of the chosen responses' NLL,
in which a pair's tokens count w times, times the mean weight. With weights of 1 these are TRL's `sigmoid` and `sft`.
"""

from collections import deque

import torch

from core.config import TrainingConfig
from core.dpo_slices import SliceSpec, step_slices
from core.errors import DeviceMemoryError, DivergedError, TrainingError
from core.types import FineTuneTask, PairScore, SliceKind, StepMetrics, TaskKind
from engine.training.device_memory import is_out_of_memory
from engine.training.dpo_loss import sigmoid_dpo, sum_per_row, token_log_probs, token_log_probs_and_grad
from engine.training.micro_batch import MicroBatch, cut_pair, make_micro_batches
from engine.training.shadow import ShadowAdapter
from engine.training.trainable import TrainableModel, training_mode

MAX_LOSS = 20.0
"""A training step whose weighted mean loss is above this, or not finite, is discarded."""


class DpoStep:
    """A task's slices and their state. TRAIN ends with an optimizer step, EVALUATE only scores.

    Raises (constructor):
        PairTooLongError: A pair does not fit the configured lengths.
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
        self.task = task
        self._model, self._shadow, self._config = model, shadow, config
        self._trains = task.kind is TaskKind.TRAIN
        max_length = min(config.max_length_tokens, model.context_tokens)
        pairs = [cut_pair(pair, config.max_prompt_tokens, max_length) for pair in task.pairs]
        weighted_tokens = sum(pair.weight * len(pair.chosen_ids) for pair in pairs)
        sft = config.sft_weight * sum(pair.weight for pair in pairs) / config.beta
        self._sft_coefficient = sft / weighted_tokens if weighted_tokens else 0.0
        with training_mode(model.device):
            self.batches = make_micro_batches(
                pairs,
                max_slice_tokens=config.max_slice_tokens,
                vocab_size=model.vocab_size,
                device=model.device,
                share_prompts=share_prompt,
            )
        """Pairs that go through the slices together, in order; empty once the step is discarded."""
        groups = [batch.group for batch in self.batches]
        self.largest_batch_pairs = max(len(group.members) for group in groups)
        """Most pairs that go through a slice together."""
        self.largest_batch_tokens = max(group.num_tokens for group in groups)
        """Most tokens that do, padding included."""
        self._program = deque(step_slices(groups, model, trains=self._trains))
        self._gradients: torch.Tensor | None = None
        self._gradient_views: list[list[torch.Tensor]] = []
        self._scores: dict[int, PairScore] = {}
        self._loss_sum = 0.0
        self._grad_norm: float | None = None
        self._discarded = False

    @property
    def next_slice(self) -> SliceSpec | None:
        """The slice that `run_slice` will run, or None at the end."""
        return self._program[0] if self._program else None

    @property
    def pending(self) -> tuple[SliceSpec, ...]:
        """All slices that are still to run, in order."""
        return tuple(self._program)

    @property
    def done(self) -> bool:
        """Every slice has run and there is a result."""
        return not self._program and not self._discarded

    @property
    def activation_bytes(self) -> int:
        """Device memory used between slices now: hidden states, kept inputs, head and LoRA gradients."""
        gradients = 0 if self._gradients is None else self._gradients.nbytes
        return gradients + sum(batch.activation_bytes for batch in self.batches)

    def run_slice(self) -> SliceKind:
        """Run the next slice to its end, in a grad mode of its own.

        Raises:
            DivergedError: Loss or gradient not finite, or a training loss above `MAX_LOSS`.
            DeviceMemoryError: The device is out of memory.
            TrainingError: Nothing is left to run.
            After any error the step is discarded: parameters and optimizer are as before the step.
        """
        if not self._program:
            raise TrainingError(f"task {self.task.task_id} has no slice left to run")
        spec = self._program[0]
        try:
            with training_mode(self._model.device):
                self._run(spec)
        except RuntimeError as error:
            self.discard()
            if not is_out_of_memory(error):
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
        self.batches = []

    def result(self) -> tuple[StepMetrics, tuple[PairScore, ...]]:
        """Means over the task (each pair counts the same) and the scores in its order; TrainingError if not done."""
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

    def _run(self, spec: SliceSpec) -> None:
        if spec.kind is SliceKind.OPTIMIZER:
            self._optimize()
            return
        batch = self.batches[spec.group]
        match spec.kind:
            case SliceKind.EMBED:
                self._embed(batch)
            case SliceKind.REFERENCE_LAYER:
                self._reference_layer(batch, spec.part)
            case SliceKind.REFERENCE_HEAD:
                self._reference_head(batch, slice(spec.part, spec.part + spec.num_tokens))
            case SliceKind.POLICY_LAYER:
                self._policy_layer(batch, spec.part)
            case SliceKind.POLICY_HEAD:
                self._policy_head(batch, slice(spec.part, spec.part + spec.num_tokens))
            case SliceKind.LOSS:
                self._loss(batch)
            case SliceKind.BACKWARD_LAYER:
                self._backward_layer(batch, spec.part)

    def _embed(self, batch: MicroBatch) -> None:
        batch.hidden = self._model.embed(batch.ids)

    def _forward_layer(self, batch: MicroBatch, i: int) -> None:
        """Run one layer; after the last only the positions that are scored stay alive."""
        hidden = self._run_layer(i, batch.state, batch)
        last = i == self._model.num_layers - 1
        batch.hidden = hidden.flatten(0, 1)[batch.positions] if last else hidden

    def _run_layer(self, i: int, hidden: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        position_ids = batch.shared.position_ids if batch.shared else None
        rotary = self._model.rotary(i, batch.group.row_tokens, position_ids)
        return self._model.run_layer(i, hidden, rotary, batch.shared)

    def _reference_layer(self, batch: MicroBatch, i: int) -> None:
        with self._model.adapter_disabled(i):
            self._forward_layer(batch, i)

    def _policy_layer(self, batch: MicroBatch, i: int) -> None:
        if self._trains:
            batch.layer_inputs.append(batch.state)
        self._forward_layer(batch, i)

    def _reference_head(self, batch: MicroBatch, chunk: slice) -> None:
        batch.reference_logps.append(token_log_probs(self._model, batch.state[chunk], batch.targets[chunk]))

    def _policy_head(self, batch: MicroBatch, chunk: slice) -> None:
        hidden, targets = batch.state[chunk], batch.targets[chunk]
        if self._trains:
            log_probs, grad = token_log_probs_and_grad(self._model, hidden, targets)
            batch.head_grads.append(grad)
        else:
            log_probs = token_log_probs(self._model, hidden, targets)
        batch.policy_logps.append(log_probs)

    def _loss(self, batch: MicroBatch) -> None:
        num_pairs, reference = len(batch.group.members), batch.reference
        policy = sum_per_row(torch.cat(batch.policy_logps), batch.rows, 2 * num_pairs)
        if reference is None:
            reference = sum_per_row(torch.cat(batch.reference_logps), batch.rows, 2 * num_pairs)
        table, coefficients = sigmoid_dpo(policy, reference, self._config.beta)
        columns = zip(*table.tolist(), strict=True)  # The only wait for the device before the optimizer.
        for index, values in zip(batch.group.members, columns, strict=True):
            pair = self.task.pairs[index]
            self._scores[index] = score = PairScore(pair.pair_id, *values)
            self._loss_sum += pair.weight * score.loss
        self._check_loss(is_finite=bool(torch.isfinite(table).all()))
        head_grads = torch.cat(batch.head_grads) if self._trains else None
        for used in (batch.reference_logps, batch.policy_logps, batch.head_grads):
            used.clear()
        batch.hidden = None
        if head_grads is not None:
            # Each chosen token also counts as a target of the SFT term; rows of chosen come first.
            coefficients[:num_pairs] -= self._sft_coefficient
            coefficients.mul_(batch.weights.repeat(2))
            scaled = head_grads * coefficients[batch.rows].unsqueeze(1)
            grad = scaled.new_zeros(batch.group.num_tokens, scaled.shape[1])
            # At most two terms meet, at the end of a shared prompt: their order, open on CUDA, does not matter.
            grad.index_add_(0, batch.positions, scaled)
            batch.hidden = grad.view(*batch.ids.shape, -1).to(self._model.dtype)

    def _check_loss(self, *, is_finite: bool) -> None:
        """Raise DivergedError early: losses are not negative, so a partial sum above the bound condemns the step."""
        weights = sum(pair.weight for pair in self.task.pairs)
        mean = self._loss_sum / max(len(self.task.pairs), weights)  # large weights are no explosion
        if not is_finite or (self._trains and mean > MAX_LOSS):
            raise DivergedError(f"weighted DPO loss is {mean}, allowed is a finite loss up to {MAX_LOSS}")

    def _backward_layer(self, batch: MicroBatch, i: int) -> None:
        """Recompute layer i with a graph and add its LoRA gradients; embeddings get none, so layer 0 is a leaf."""
        if self._gradients is None:
            self._gradients, self._gradient_views = self._shadow.new_gradients()
        leaf = batch.layer_inputs.pop().detach().requires_grad_(i > 0)
        wanted: list[torch.Tensor] = [*self._model.layer_parameters(i)]
        if i > 0:
            wanted.append(leaf)
        with torch.enable_grad():
            output = self._run_layer(i, leaf, batch)
        grads = list(torch.autograd.grad(output, wanted, batch.state))
        batch.hidden = grads.pop() if i > 0 else None
        scale = self._config.beta / len(self.task.pairs)
        torch._foreach_add_(self._gradient_views[i], grads, alpha=scale)

    def _optimize(self) -> None:
        if self._gradients is None:
            raise TrainingError("slices ran out of order")
        self._grad_norm = self._shadow.apply(self._gradients)
        self._gradients = None
        self._gradient_views = []

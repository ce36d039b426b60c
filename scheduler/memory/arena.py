"""Memory of a DPO step by the size of its micro-batches: predicted, then corrected by measured steps.

Per padded token of a micro-batch, with d bytes a value, H hidden size and L layers (`engine.training.dpo`):

- held between slices: the kept input of each layer, the hidden state or its gradient, and the head's gradient of
  each scored token, `(L + 2)·H·d` at most; log-probabilities of the two passes, 8; and, whatever the size, the LoRA
  gradients in fp32, 4 for each parameter;
- in the backward slice of one layer, for its duration: what autograd keeps of attention and MLP, and their gradients;
- in a head chunk: a block of logits in fp32, its copy in the weights' dtype, and rows of H.

The adapter, its optimizer and their copies are there whether a step runs or not and no part of the arena. Attention
is taken as computed in tiles: a kernel that keeps the T x T scores needs more.
"""

from dataclasses import dataclass

from core.model_dims import ModelDims

_VOCABULARY_BLOCK = 8192
"""Columns of logits at a time, as in `engine.training.dpo_loss`."""
_FP32 = 4
_KEEP = 0.999
"""Factor of a peak with each smaller one of its size: a step with unusually long rows is forgotten in the end."""


@dataclass(frozen=True, slots=True)
class ArenaNeed:
    """Bytes of a step by the padded tokens of its micro-batches, from the model's dimensions."""

    dims: ModelDims
    lora_rank: int
    """Rank of the LoRA on each of the adapted linear maps of a layer."""
    head_chunk_tokens: int

    @property
    def num_lora_parameters(self) -> int:
        """Trained parameters of all layers."""
        return self.dims.num_layers * self.lora_rank * sum(i + o for i, o in self.dims.adapted_layers)

    def activation_bytes(self, num_tokens: int) -> int:
        """Most that is held between two slices (`DpoStep.activation_bytes`): an upper bound."""
        dims = self.dims
        per_token = (dims.num_layers + 2) * dims.hidden_size * dims.dtype_bytes + 2 * _FP32
        return num_tokens * per_token + _FP32 * self.num_lora_parameters

    def transient_bytes(self, num_tokens: int) -> int:
        """Most that one slice needs beside that, for its duration."""
        dims = self.dims
        logits = min(dims.vocab_size, _VOCABULARY_BLOCK) * (_FP32 + dims.dtype_bytes)
        head = min(self.head_chunk_tokens, num_tokens) * (logits + 3 * _FP32 * dims.hidden_size)
        return max(num_tokens * self.layer_bytes_per_token, head)

    @property
    def layer_bytes_per_token(self) -> int:
        """Bytes that autograd keeps for the backward pass of one layer.

        Two norms keep their input and its fp32 copy; attention keeps queries and keys before and after rotation,
        values and its output; the MLP keeps gate, its activation, up and their product, an expert its input and its
        output too; a LoRA keeps its input in fp32 (a copy unless the model is fp32) and the narrow product.
        """
        dims = self.dims
        inputs = dims.hidden_size + dims.query_size
        inputs += 0 if dims.num_experts else dims.hidden_size + dims.inner_size
        kept = 6 * dims.hidden_size + 3 * dims.query_size + 3 * dims.kv_size + 4 * dims.inner_size
        kept += 2 * dims.experts_per_token * dims.hidden_size if dims.num_experts else 0
        narrow = len(dims.adapted_layers) * self.lora_rank
        lora = (_FP32 * inputs if dims.dtype_bytes < _FP32 else 0) + _FP32 * narrow
        return dims.dtype_bytes * kept + 2 * _FP32 * 2 * dims.hidden_size + lora


class ArenaModel:
    """Peaks by power-of-two size, on top of a prediction.

    The prediction is a profile's line if that is not zero, or what the model's dimensions say, or nothing. What was
    measured for a size stands for that size as it is; for other sizes the prediction is scaled by measured over
    predicted of the nearest size, so that both the activations' and the gradients' part keep their shares. Without any
    prediction a larger micro-batch holds proportionally more, a smaller one what the next larger one did: a step also
    holds what does not depend on the size, so a line through zero would make a large micro-batch look far too big once
    a small one was seen.
    """

    def __init__(
        self, fixed_bytes: float = 0.0, bytes_per_token: float = 0.0, need: ArenaNeed | None = None
    ) -> None:
        self._fixed_bytes = fixed_bytes
        self._bytes_per_token = bytes_per_token
        self._need = need
        self._peaks: dict[int, tuple[int, float]] = {}
        """Tokens and bytes of the highest peak, keyed by size class."""

    def observe(self, num_tokens: int, peak_bytes: float) -> None:
        """Take in what a micro-batch held at most between two slices; 0 is no measurement."""
        if peak_bytes <= 0:
            return
        key = num_tokens.bit_length()
        tokens, peak = self._peaks.get(key, (num_tokens, 0.0))
        if peak_bytes >= peak:
            self._peaks[key] = (num_tokens, peak_bytes)
        else:
            self._peaks[key] = (tokens, max(peak_bytes, _KEEP * peak))

    def predict(self, num_tokens: int) -> int:
        """Bytes that a micro-batch of that size may take: held between slices, and within one if that is known."""
        transient = 0 if self._need is None else self._need.transient_bytes(num_tokens)
        return int(self._held(num_tokens) + transient)

    def _held(self, num_tokens: int) -> float:
        if not self._peaks:
            return self._predicted(num_tokens)
        key = num_tokens.bit_length()
        nearest = min((k for k in self._peaks if k >= key), default=max(self._peaks))
        tokens, peak = self._peaks[nearest]
        predicted = self._predicted(tokens)
        if predicted > 0:
            return peak * self._predicted(num_tokens) / predicted
        return peak * max(1.0, num_tokens / tokens)

    def _predicted(self, num_tokens: int) -> float:
        if self._need is None or self._fixed_bytes > 0 or self._bytes_per_token > 0:
            return self._fixed_bytes + self._bytes_per_token * num_tokens
        return float(self._need.activation_bytes(num_tokens))

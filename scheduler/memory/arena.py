"""Arena memory of a fine-tune step by the size of its micro-batches: predicted, then corrected by measured steps."""

from scheduler.memory.arena_need import ArenaNeed

_KEEP = 0.999
"""Of a peak with each smaller one of its size: a step with unusually long rows is forgotten in the end."""


class ArenaModel:
    """Peaks by power-of-two size, on top of a prediction.

    The prediction is a profile's line, or what the model's dimensions say, or nothing. What was measured for a size
    stands for that size as it is; for other sizes the prediction is scaled by measured over predicted of the nearest
    size, so that both the activations' and the gradients' part keep their shares. Without any prediction a larger
    micro-batch holds proportionally more, a smaller one what the next larger one did: a step also holds what does not
    depend on the size, so a line through zero would make a large micro-batch look far too big once a small one was
    seen.
    """

    def __init__(
        self, fixed_bytes: float = 0.0, bytes_per_token: float = 0.0, need: ArenaNeed | None = None
    ) -> None:
        """Start from a profile's line if it is not zero, else from the model's dimensions if they are known."""
        self._fixed_bytes = fixed_bytes
        self._bytes_per_token = bytes_per_token
        self._need = need
        self._has_line = fixed_bytes > 0 or bytes_per_token > 0
        self._peaks: dict[int, tuple[int, float]] = {}
        """By size class: tokens and bytes of the highest peak."""

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
        if self._has_line or self._need is None:
            return self._fixed_bytes + self._bytes_per_token * num_tokens
        return float(self._need.held_bytes(num_tokens))

"""Arena memory of a fine-tune step by the size of its micro-batches: from the profile, then from measured steps."""

_KEEP = 0.999
"""Of a peak with each smaller one of its size: a step with unusually long rows is forgotten in the end."""


class ArenaModel:
    """Peaks by power-of-two size.

    A step also holds what does not depend on the size, so a line through zero would make a large micro-batch look
    far too big once a small one was seen: each size has a peak of its own.
    """

    def __init__(self, fixed_bytes: float = 0.0, bytes_per_token: float = 0.0) -> None:
        """Start from a profile's line; zeros if there is none."""
        self._fixed_bytes = fixed_bytes
        self._bytes_per_token = bytes_per_token
        self._peaks: dict[int, tuple[int, float]] = {}
        """By size class: tokens and bytes of the highest peak."""

    def observe(self, num_tokens: int, peak_bytes: float) -> None:
        """Take in what a micro-batch held at most."""
        key = num_tokens.bit_length()
        tokens, peak = self._peaks.get(key, (num_tokens, 0.0))
        if peak_bytes >= peak:
            self._peaks[key] = (num_tokens, peak_bytes)
        else:
            self._peaks[key] = (tokens, max(peak_bytes, _KEEP * peak))

    def predict(self, num_tokens: int) -> int:
        """Bytes that a micro-batch of that size may hold: at most proportionally more than a smaller one did."""
        if not self._peaks:
            return int(self._fixed_bytes + self._bytes_per_token * num_tokens)
        key = num_tokens.bit_length()
        nearest = min((k for k in self._peaks if k >= key), default=max(self._peaks))
        tokens, peak = self._peaks[nearest]
        return int(peak * max(1.0, num_tokens / tokens))

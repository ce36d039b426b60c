"""The KV cache of one executor as blocks, with nothing done for each token.

A decoding request takes a block every `block_tokens` passes, in a rhythm that is known when its decoding begins: so
requests are counted by that rhythm, and any number of passes costs a few additions.
"""


class KvBlocks:
    """Blocks in use, and when the decoding requests will take more."""

    def __init__(self, *, kv_tokens: int, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.capacity = kv_tokens // block_tokens
        self.used = 0
        self._num_decode = 0
        self._takers = [0] * block_tokens
        """Decoding requests by the number, modulo `block_tokens`, of a pass before which they need a block."""

    @property
    def free(self) -> int:
        """Blocks that can be given out."""
        return self.capacity - self.used

    def holding(self, num_tokens: int) -> int:
        """Blocks of so many tokens."""
        return -(-num_tokens // self.block_tokens)

    def join(self, num_tokens: int, passes: int) -> None:
        """A request with so many cached tokens, whose blocks are counted, decodes from pass number `passes` on."""
        self._takers[(passes - num_tokens) % self.block_tokens] += 1
        self._num_decode += 1

    def leave(self, num_tokens: int, passes: int) -> None:
        """It decodes no more; arguments as in `join`."""
        self._takers[(passes - num_tokens) % self.block_tokens] -= 1
        self._num_decode -= 1

    def taken_in(self, passes: int, count: int) -> int:
        """Blocks that the decoding requests take in the `count` passes from number `passes` on."""
        cycles, rest = divmod(count, self.block_tokens)
        return cycles * self._num_decode + sum(self._takers[(passes + i) % self.block_tokens] for i in range(rest))

    def passes_left(self, passes: int, most: int) -> int:
        """How many passes, `most` at the utmost, the free blocks last."""
        if not self._num_decode:
            return most
        free = self.free
        cycles = free // self._num_decode
        left, count = free - cycles * self._num_decode, cycles * self.block_tokens
        while count < most:
            left -= self._takers[(passes + count) % self.block_tokens]
            if left < 0:
                return count
            count += 1
        return most

"""A device whose latencies are linear, with seeded noise: what the models are tested against."""

import random

from core.batch import ForwardShape, IterationSample
from core.types import SliceKind, SliceReport, SliceTiming

FORWARD = (4e-3, 3e-5, 4e-8, 6e-5, 2e-9, 3e-4)
SLICES = {
    SliceKind.POLICY_LAYER: (5e-4, 8e-6),
    SliceKind.BACKWARD_LAYER: (1e-3, 2e-5),
    SliceKind.OPTIMIZER: (2e-3, 0.0),
}


class SyntheticDevice:
    def __init__(self, noise=0.05, slowdown=1.0, seed=0):
        self.noise = noise
        self.slowdown = slowdown
        self.rng = random.Random(seed)

    def exact_s(self, shape):
        features = (
            1.0 if shape.num_tokens else 0.0,
            shape.num_decode,
            shape.decode_context,
            shape.num_prefill_tokens,
            shape.prefill_attention,
            shape.num_prefills,
        )
        return self.slowdown * sum(c * x for c, x in zip(FORWARD, features, strict=True))

    def exact_slice_s(self, kind, num_tokens):
        constant, per_token = SLICES[kind]
        return self.slowdown * (constant + per_token * num_tokens)

    def jitter(self):
        return self.rng.lognormvariate(0.0, self.noise)

    def sample(self, shape, slices=()):
        timings = [SliceTiming(kind, n, self.exact_slice_s(kind, n) * self.jitter()) for kind, n in slices]
        return IterationSample(
            shape, self.exact_s(shape) * self.jitter(), 1e-3 * self.jitter(), SliceReport(timings)
        )

    def shape(self):
        """A batch as a server sees them: decodes, sometimes with a chunk."""
        num_decode = self.rng.randint(0, 32)
        shape = ForwardShape(num_decode=num_decode, decode_context=num_decode * self.rng.randint(10, 1500))
        if num_decode == 0 or self.rng.random() < 0.4:
            shape.add_chunk(self.rng.choice((16, 64, 128, 256, 512)), self.rng.choice((0, 0, 256, 1024)))
        return shape

    def slices(self):
        num_tokens = self.rng.choice((32, 64, 128, 256, 512))
        return [
            (SliceKind.POLICY_LAYER, num_tokens),
            (SliceKind.BACKWARD_LAYER, num_tokens),
            (SliceKind.OPTIMIZER, 0),
        ]

    def samples(self, count):
        return [self.sample(self.shape(), self.slices()) for _ in range(count)]


def decode(batch, context=100):
    return ForwardShape(num_decode=batch, decode_context=batch * context)


def prefill(num_tokens, start=0):
    shape = ForwardShape()
    shape.add_chunk(num_tokens, start)
    return shape


def held_bytes(memory, num_tokens):
    """Memory that a step with micro-batches of that many padded tokens holds between slices, by a profile's line."""
    return memory.arena_bytes + memory.arena_bytes_per_token * num_tokens

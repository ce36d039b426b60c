"""AdamW beside a GPU: the same parameters as on it."""

import pytest
import torch

from engine.training.optimizer import FlatAdamW
from tests.support.trainable_models import make_training

pytestmark = pytest.mark.gpu


def test_adamw_on_the_cpu_equals_that_on_the_gpu():
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(100_000, generator=generator)
    here, there = start.cuda(), start.cuda()
    on_gpu, on_cpu = FlatAdamW(here, make_training()), FlatAdamW(there, make_training(), torch.device("cpu"))
    for _ in range(20):
        gradients = torch.randn(100_000, generator=generator).cuda()
        on_gpu.step(gradients)
        on_cpu.step(gradients)
        on_cpu.give_out()
    torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-5)
    assert all(tensor.device.type == "cpu" for tensor in on_cpu.tensors().values())

"""vLLM's CPU kernels for norms against its definition in torch."""

import pytest
import torch
from vllm import ir

from engine.vllm.norms_cpu import use_cpu_norms

EPSILON = 1e-5
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""And the tolerance, relative and absolute."""

INPUTS = {
    "rows": lambda dtype: torch.randn(5, 96).to(dtype),
    "one row": lambda dtype: torch.randn(1, 96).to(dtype),
    "every second column": lambda dtype: torch.randn(5, 192).to(dtype)[:, ::2],
    "heads": lambda dtype: torch.randn(5, 3, 96).to(dtype),
}


@pytest.fixture(scope="module", autouse=True)
def _kernels():
    use_cpu_norms()
    use_cpu_norms()
    yield
    ir.ops.rms_norm.set_default(["native"])
    ir.ops.fused_add_rms_norm.set_default(["native"])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("has_weight", [True, False])
def test_norms_equal_the_definition(make, dtype, has_weight):
    x, weight = make(dtype), torch.randn(96).to(dtype) if has_weight else None
    native = ir.ops.rms_norm.impls["native"].impl_fn(x, weight, EPSILON)
    ours = ir.ops.rms_norm(x, weight, EPSILON)
    torch.testing.assert_close(ours, native, rtol=DTYPES[dtype], atol=DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
def test_norms_of_a_sum_equal_the_definition_and_give_the_sum(make, dtype):
    x, residual, weight = make(dtype), make(dtype), torch.randn(96).to(dtype)
    native = ir.ops.fused_add_rms_norm.impls["native"].impl_fn(x, residual, weight, EPSILON)
    kept = ir.ops.fused_add_rms_norm(x.clone(), residual.clone(), weight, EPSILON)
    in_place = ir.ops.fused_add_rms_norm.maybe_inplace(x.clone(), residual.clone(), weight, EPSILON)
    for ours in (kept, in_place):
        for got, wanted in zip(ours, native, strict=True):
            torch.testing.assert_close(got, wanted, rtol=DTYPES[dtype], atol=DTYPES[dtype])


def test_the_kernels_are_chosen_for_plain_rows():
    x, weight = torch.randn(5, 96), torch.randn(96)
    assert ir.ops.rms_norm.dispatch(x, weight, EPSILON).provider != "native"
    assert ir.ops.fused_add_rms_norm.dispatch(x, x.clone(), weight, EPSILON).provider != "native"
    assert ir.ops.rms_norm.dispatch(x[:, ::2], weight[:48], EPSILON).provider == "native"

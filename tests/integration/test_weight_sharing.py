"""One copy of the base weights on CPU (`share_base_weights: always`) trains and serves as two copies do."""

import psutil
import pytest

from tests.support.shared_weights import SharedWeights, shared_engine

pytestmark = pytest.mark.vllm

_ASKED_BYTES = 2.5 * (1 << 30)
"""The worker with torch and the model takes about half of it; the KV cache gets the rest."""


@pytest.fixture(scope="module", params=["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def engine(request, tiny_assistant):
    share = _ASKED_BYTES / psutil.virtual_memory().total
    thread = shared_engine(
        tiny_assistant, model={"dtype": request.param}, engine={"gpu_memory_utilization": share}
    )
    yield thread
    thread.close()


class TestOnCpu(SharedWeights):
    pass

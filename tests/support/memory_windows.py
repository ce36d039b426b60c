"""Windows and processes with known numbers."""

import numpy as np

from benchmarks.harness.results import summarize
from benchmarks.harness.window import WindowRecord
from benchmarks.studies.memory.windows import Counts, WindowResult
from core.config import SloConfig

EMPTY = summarize(WindowRecord(10.0), SloConfig())
TIMES = {"ttft_p50_s": 0.1, "ttft_p99_s": 0.3, "tbt_p50_s": 0.05, "tbt_p99_s": 0.08, "overhead_share": 0.1}


def window(**values) -> WindowResult:
    status = {"pruned_blocks": values.pop("pruned_blocks", 0)}
    counts = Counts(**{"prefix_queries": 1000, "num_iterations": 10, **values.pop("counts", {})})
    base = {"num_requests": 50, "slo_attainment": 1.0, "pairs_per_s": 10.0, "forward_share": 0.5, **TIMES}
    return WindowResult(metrics=EMPTY.model_copy(update={**base, **values}), counts=counts, status=status)


def grow(rate_per_hour, *, noise=1e5, hours=0.5, count=360):
    times_s = np.linspace(0, 3600 * hours, count)
    rng = np.random.default_rng(0)
    filling = 1e8 * np.minimum(1, times_s / 550)  # caches fill for almost a third
    return times_s.tolist(), (
        1e9 + filling + rate_per_hour * times_s / 3600 + rng.normal(0, noise, count)
    ).tolist()

"""At which request rate is the device busy for a given share of the time? Asked once; all policies get the answer."""

from benchmarks.harness.client import ClientOptions, run_window
from benchmarks.harness.engine_seam import MeasuredEngine
from benchmarks.harness.results import summarize
from core.config import SloConfig
from simulator.trace import Arrivals, Trace

_MAX_PROBES = 6
_TOLERANCE = 0.02
_MAX_FACTOR = 3.0
"""Between two probes the rate changes by no more than this: far from the goal the share is not proportional."""


async def calibrate_rate(
    engine: MeasuredEngine, trace: Trace, vocab_size: int, probe_s: float, busy_share: float
) -> float:
    """Requests per second of this trace at which forward passes take `busy_share` of the time, without training.

    Evenly spaced arrivals, so that short probes do not differ by chance. Stops within two points of the goal, or
    when the share no longer follows the rate (the engine is saturated below the goal): then the closest probe is it.
    """
    rate = trace.arrivals.rate_per_s
    probes: list[tuple[float, float]] = []
    for number in range(_MAX_PROBES):
        share = await _busy_share(engine, trace, rate, vocab_size, probe_s, seed=trace.seed + 1 + number)
        if probes and rate > probes[-1][0] and share < probes[-1][1]:
            break
        probes.append((rate, share))
        if abs(share - busy_share) <= _TOLERANCE:
            break
        factor = busy_share / max(share, 1e-3)
        rate *= min(max(factor, 1 / _MAX_FACTOR), _MAX_FACTOR)
    best, _ = min(probes, key=lambda probe: abs(probe[1] - busy_share))
    return float(f"{best:.2g}")


async def _busy_share(
    engine: MeasuredEngine, trace: Trace, rate: float, vocab_size: int, probe_s: float, seed: int
) -> float:
    even = trace.model_copy(
        update={
            "seed": seed,
            "duration_s": probe_s,
            "num_requests": None,
            "arrivals": Arrivals(process="constant", rate_per_s=rate),
        }
    )
    requests = list(even.requests())
    run = await run_window(engine, requests, ClientOptions(probe_s, vocab_size, seed))
    return summarize(run, SloConfig()).forward_share

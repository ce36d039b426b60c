"""A profile measured on the very engine that is benchmarked next."""

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from core.config import AppArgs
from deployments.monitors.profiling import measure_plan, origin_of
from profiler.fit import fit_profile
from profiler.measure import measure_grid

if TYPE_CHECKING:
    from engine.vllm.engine import HybridEngine

logger = logging.getLogger(__name__)


async def write_profile(engine: "HybridEngine", args: AppArgs, path: Path) -> None:
    """Measure for `MEASURE_S`, fit and write. The shadow adapter, which this trains, is reset after.

    Raises:
        ProfileError: too little could be measured.
        MaceError: the engine ended a task without a result.
    """
    measurement = await measure_grid(engine, measure_plan(engine, args))
    profile = await asyncio.to_thread(fit_profile, measurement.samples, origin_of(args), memory=measurement.memory)
    profile.save(path)
    await engine.load_adapter(None)
    logger.warning(
        "profile of %d points, median error of a forward pass %.1f %%",
        measurement.num_points,
        100 * profile.forward_error.median,
    )

"""A profile measured on the very engine that is benchmarked next."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from core.config import AppArgs
from deployments.monitors.profiling import measure_plan, origin_of
from profiler.measure import measure_profile

if TYPE_CHECKING:
    from engine.vllm.engine import HybridEngine

logger = logging.getLogger(__name__)


async def write_profile(engine: "HybridEngine", args: AppArgs, path: Path) -> None:
    """Measure for `profiler.measure.MEASURE_S`, fit and write. The shadow adapter, which this trains, is reset after.

    Raises:
        ProfileError: too little could be measured.
        MaceError: the engine ended a task without a result.
    """
    profile = await measure_profile(engine, measure_plan(engine, args), origin_of(args))
    profile.save(path)
    await engine.load_adapter(None)
    error = profile.forward_error
    logger.warning("profile in %s, median error of a forward pass %.1f %%", path, 100 * error.median)

"""Measure a profile beside a running server, without hurting its requests."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from profiler.fit import fit_profile
from profiler.grid import MeasurePlan
from profiler.measure import ProfiledEngine, measure_grid
from profiler.profile import Origin, Profile

logger = logging.getLogger(__name__)


class BackgroundProfiler:
    """One measurement on an engine that serves; start `run` as a task, cancel it to stop.

    Points run only while the engine has no unfinished request, take about a second at most, and are aborted as soon
    as a request arrives. Fine-tune tasks are evaluations, which change nothing; what real training runs meanwhile
    is recorded as well.
    """

    def __init__(
        self,
        engine: ProfiledEngine,
        plan: MeasurePlan,
        origin: Origin,
        path: Path,
        kv_bytes_per_token: int | None = None,
        on_profile: Callable[[Profile], None] | None = None,
    ) -> None:
        if plan.trains or not plan.is_background:
            raise ValueError("a background plan gives way to requests and never trains")
        self._engine = engine
        self._plan = plan
        self._origin = origin
        self._path = path
        self._kv_bytes_per_token = kv_bytes_per_token
        self._on_profile = on_profile

    async def run(self) -> Profile | None:
        """Measure, fit and write; None, with a warning, if that fails. Serving is not affected either way."""
        try:
            measurement = await measure_grid(self._engine, self._plan)
            profile = await asyncio.to_thread(
                fit_profile,
                measurement.samples,
                self._origin,
                memory=measurement.memory,
                kv_bytes_per_token=self._kv_bytes_per_token,
            )
            await asyncio.to_thread(profile.save, self._path)
        except Exception as error:  # noqa: BLE001 - whatever fails here, the server goes on with online estimates
            logger.warning("no profile was measured: %s: %s", type(error).__name__, error)
            return None
        logger.info(
            "profile of %d points in %s, median error of a forward pass %.1f %%",
            measurement.num_points,
            self._path,
            100 * profile.forward_error.median,
        )
        if self._on_profile is not None:
            self._on_profile(profile)
        return profile

"""A profile measured on the very engine that is benchmarked next."""

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.models import vocab_size
from core.config import AppArgs
from profiler.device import describe_device, git_commit, software_versions, worker_threads
from profiler.fit import fit_profile
from profiler.grid import MeasurePlan
from profiler.measure import measure_grid
from profiler.profile import Origin

if TYPE_CHECKING:
    from engine.hybrid_engine import HybridEngine

logger = logging.getLogger(__name__)

_LONGEST_POINT_SHARE = 0.1
"""Of the budget: on a slow model a point of a second would be too short for one DPO step."""


async def write_profile(engine: "HybridEngine", args: AppArgs, model_dir: Path, path: Path) -> None:
    """Measure for `profile.max_measure_s`, fit and write. The shadow adapter, which this trains, is reset after.

    Raises:
        ProfileError: too little could be measured.
        MaceError: the engine ended a task without a result.
    """
    budget_s = args.profile.max_measure_s
    plan = MeasurePlan(
        vocab_size=vocab_size(model_dir),
        max_model_len=engine.max_model_len,
        max_num_seqs=args.engine.max_num_seqs,
        max_tokens=args.engine.max_num_batched_tokens,
        max_slice_tokens=args.training.max_slice_tokens,
        max_pair_tokens=args.training.max_length_tokens,
        budget_s=budget_s,
        max_point_s=_LONGEST_POINT_SHARE * budget_s,
        trains=True,
    )
    measurement = await measure_grid(engine, plan)
    threads = worker_threads()
    origin = Origin(
        device=describe_device(threads),
        model=args.model.model_id,
        num_threads=threads,
        versions=software_versions(),
        commit=git_commit(),
        command="benchmarks.profiling",
    )
    profile = await asyncio.to_thread(fit_profile, measurement.samples, origin, memory=measurement.memory)
    profile.save(path)
    await engine.load_adapter(None)
    logger.warning(
        "profile of %d points, median error of a forward pass %.1f %%",
        measurement.num_points,
        100 * profile.forward_error.median,
    )

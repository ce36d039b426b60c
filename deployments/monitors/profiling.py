"""What a profile measurement needs to know of a started engine: limits, origin, and where the result goes."""

import sys
from datetime import UTC, datetime
from pathlib import Path

from core.config import AppArgs
from core.errors import ProfileError
from engine.vllm.compat import worker_binding
from engine.vllm.engine import HybridEngine
from profiler.background import BackgroundProfiler
from profiler.device import describe_device, git_commit, software_versions, worker_threads
from profiler.grid import MeasurePlan
from profiler.online import OnlineLatencyModel
from profiler.profile import Origin, Profile, profile_path
from scheduler.iteration.slo import slo_warnings

_POINTS_AT_LEAST = 8
"""No point takes more than this part of the measuring time, one second at least."""


def with_profile_path(args: AppArgs, model_dir: Path) -> AppArgs:
    """The settings with `profile.path` filled in."""
    if args.profile.path is not None:
        return args
    device = describe_device(worker_threads(worker_binding(args, model_dir)))
    path = profile_path(args.state_dir, device, args.model.model_id)
    return args.model_copy(update={"profile": args.profile.model_copy(update={"path": path})})


def target_warnings(args: AppArgs) -> list[str]:
    """Sentences about SLO targets that the profiled device cannot meet, and about a profile that cannot be read."""
    path = args.profile.path
    if path is None or not path.exists():
        return []
    try:
        predictor = OnlineLatencyModel(Profile.load(path))
    except ProfileError as error:
        return [f"{error} (serving starts without it)"]
    return slo_warnings(args.slo, args.scheduler, predictor)


def measure_plan(
    engine: HybridEngine, args: AppArgs, *, budget_s: float, seed: int = 0, in_background: bool = False
) -> MeasurePlan:
    """The grid's bounds on this engine. In the background nothing is trained and every request goes first."""
    trains = args.training.enabled
    return MeasurePlan(
        vocab_size=engine.vocab_size,
        max_model_len=engine.max_model_len,
        max_num_seqs=args.engine.max_num_seqs,
        max_tokens=args.engine.max_num_batched_tokens,
        max_slice_tokens=args.training.max_slice_tokens if trains else 0,
        max_pair_tokens=min(args.training.max_length_tokens, engine.max_model_len),
        max_kv_tokens=engine.kv_cache_tokens,
        budget_s=budget_s,
        max_point_s=1.0 if in_background else max(1.0, budget_s / _POINTS_AT_LEAST),
        seed=seed,
        share_prompt=args.experiments.share_prompt,
        trains=trains and not in_background,
        is_background=in_background,
    )


def origin_of(args: AppArgs, *, seed: int = 0, num_threads: int | None = None) -> Origin:
    """This device, this software, this command; `num_threads` of the process, or as the environment binds them."""
    num_threads = worker_threads() if num_threads is None else num_threads
    return Origin(
        device=describe_device(num_threads),
        model=args.model.model_id,
        num_threads=num_threads,
        versions=software_versions(),
        commit=git_commit(),
        seed=seed,
        command=" ".join(sys.argv),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def background_profiler(engine: HybridEngine, args: AppArgs) -> BackgroundProfiler | None:
    """The measurement of a first start; None if there is a profile, or none is wanted."""
    path = args.profile.path
    if path is None or path.exists() or not args.profile.measure_at_start:
        return None
    plan = measure_plan(engine, args, budget_s=args.profile.max_measure_s, in_background=True)
    return BackgroundProfiler(engine, plan, origin_of(args), path, engine.kv_bytes_per_token)

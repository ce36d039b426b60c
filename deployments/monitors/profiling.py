"""What is settled at an executor's start: the device's profile and its measuring, the pruning gate, what is trained."""

import asyncio
import logging
import sys
from datetime import UTC, datetime
from pathlib import Path

from core.config import AppArgs
from core.errors import MaceError, ProfileError
from engine.fingerprint import fingerprint
from engine.pruning.gate import decide_from_file, find_report
from engine.vllm.compat import pruning_block_tokens, worker_binding
from engine.vllm.engine import HybridEngine
from profiler.device import describe_device, git_commit, software_versions, worker_threads
from profiler.measure import MEASURE_S, MeasurePlan, measure_in_background
from profiler.online import OnlineLatencyModel
from profiler.profile import Origin, Profile, profile_path
from scheduler.iteration.slo import slo_warnings

logger = logging.getLogger(__name__)

_POINTS_AT_LEAST = 8
"""No point takes more than this part of the measuring time, one second at least."""


def with_profile_path(args: AppArgs, model_dir: Path) -> AppArgs:
    """Fill in `profile.path` if the settings do not name one."""
    if args.profile.path is not None:
        return args
    path = profile_path(args.state_dir, engine_device(args, model_dir), args.model.model_id)
    return args.model_copy(update={"profile": args.profile.model_copy(update={"path": path})})


def with_pruning_gate(args: AppArgs, model_dir: Path) -> tuple[AppArgs, str]:
    """Set `kv_pruning.start: off` if the gate refuses; also returns the reason for whatever was decided.

    The report is that of `mace profile pruning` on this model, of this device if there is one. A refusal is a warning:
    serving goes on.
    """
    if args.kv_pruning.start == "off":
        return args, "kv_pruning.start is off"
    path = find_report(args.state_dir, engine_device(args, model_dir), args.model.model_id)
    block_tokens, known_as = pruning_block_tokens(args), fingerprint(model_dir)
    decision = decide_from_file(path, args.kv_pruning, args.model, block_tokens, known_as)
    if decision.allowed:
        logger.info("KV pruning is on: %s", decision.reason)
        return args, decision.reason
    logger.warning(decision.reason)
    switched_off = args.kv_pruning.model_copy(update={"start": "off"})
    return args.model_copy(update={"kv_pruning": switched_off}), decision.reason


def with_trainable_model(args: AppArgs, model_dir: Path) -> tuple[AppArgs, str]:
    """Set `training.enabled: false` if the model cannot be trained; also returns why nothing is trained, or "".

    A model that cannot be trained is a warning: it is served.
    """
    if not args.training.enabled:
        return args, "training.enabled is false"
    from engine.training.trainable import check_trainable  # brings peft, for which `mace serve` itself has no use

    try:
        check_trainable(str(model_dir))
    except MaceError as error:
        logger.warning("training is off: %s", error)
        switched_off = args.training.model_copy(update={"enabled": False})
        return args.model_copy(update={"training": switched_off}), str(error)
    is_off = args.scheduler.policy == "inference_only"
    return args, "scheduler.policy is inference_only" if is_off else ""


def engine_device(args: AppArgs, model_dir: Path) -> str:
    """Name of the device that the engine runs on with these settings."""
    return describe_device(worker_threads(worker_binding(args, model_dir)))


def target_warnings(args: AppArgs) -> list[str]:
    """Warn of SLO targets that the profiled device cannot meet, and of a profile that cannot be read."""
    path = args.profile.path
    if path is None or not path.exists():
        return []
    try:
        predictor = OnlineLatencyModel(Profile.load(path))
    except ProfileError as error:
        return [f"{error} (serving starts without it)"]
    return slo_warnings(args.slo, args.scheduler, predictor)


def measure_plan(
    engine: HybridEngine, args: AppArgs, *, budget_s: float = MEASURE_S, seed: int = 0, in_background: bool = False
) -> MeasurePlan:
    """Bounds of a measurement on this engine. In the background nothing is trained and every request goes first."""
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
    """Describe this device, this software and this command; `num_threads` None: as the environment binds them."""
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


async def profile_at_start(engine: HybridEngine, args: AppArgs) -> None:
    """Measure in the background at a first start; nothing happens if there is a profile, or none is wanted."""
    path = args.profile.path
    if path is None or path.exists() or not args.profile.measure_at_start:
        return
    plan = measure_plan(engine, args, in_background=True)
    origin = await asyncio.to_thread(origin_of, args)  # it asks git for the commit
    await measure_in_background(engine, plan, origin, path, engine.kv_bytes_per_token)

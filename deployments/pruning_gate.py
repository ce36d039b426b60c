"""KV pruning switches on only where it was measured to cost little enough: the gate at an executor's start."""

import logging
from pathlib import Path

from core.config import AppArgs
from core.errors import ProfileError
from engine.vllm_compat import pruning_block_tokens, worker_binding
from profiler.device import describe_device, worker_threads
from profiler.pruning_gate import PruningReport, decide, pruning_report_path

logger = logging.getLogger(__name__)


def with_pruning_gate(args: AppArgs, model_dir: Path) -> tuple[AppArgs, str]:
    """The settings, with `kv_pruning.start: off` if the gate refuses, and the reason for whatever was decided.

    The report is that of `mace profile pruning` on this device and model. A refusal is a warning: serving goes on.
    """
    if args.kv_pruning.start == "off":
        return args, "kv_pruning.start is off"
    device = describe_device(worker_threads(worker_binding(args, model_dir)))
    path = pruning_report_path(args.state_dir, device, args.model.model_id)
    try:
        report = PruningReport.load(path) if path.exists() else None
    except ProfileError as error:
        return _switched_off(args, f"KV pruning stays off: {error}")
    decision = decide(report, args.kv_pruning, args.model, pruning_block_tokens(args))
    if not decision.allowed:
        return _switched_off(args, decision.reason)
    logger.info("KV pruning is on: %s", decision.reason)
    return args, decision.reason


def _switched_off(args: AppArgs, reason: str) -> tuple[AppArgs, str]:
    logger.warning(reason)
    return args.model_copy(update={"kv_pruning": args.kv_pruning.model_copy(update={"start": "off"})}), reason

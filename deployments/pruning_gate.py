"""KV pruning switches on only where it was measured to cost little enough: the gate at an executor's start."""

import logging
from pathlib import Path

from core.config import AppArgs
from engine.pruning.gate import decide_from_file, find_report
from engine.vllm.compat import pruning_block_tokens, worker_binding
from profiler.device import describe_device, worker_threads

logger = logging.getLogger(__name__)


def with_pruning_gate(args: AppArgs, model_dir: Path) -> tuple[AppArgs, str]:
    """The settings, with `kv_pruning.start: off` if the gate refuses, and the reason for whatever was decided.

    The report is that of `mace profile pruning` on this model, of this device if there is one. A refusal is a warning:
    serving goes on.
    """
    if args.kv_pruning.start == "off":
        return args, "kv_pruning.start is off"
    device = describe_device(worker_threads(worker_binding(args, model_dir)))
    path = find_report(args.state_dir, device, args.model.model_id)
    decision = decide_from_file(path, args.kv_pruning, args.model, pruning_block_tokens(args))
    if decision.allowed:
        logger.info("KV pruning is on: %s", decision.reason)
        return args, decision.reason
    logger.warning(decision.reason)
    switched_off = args.kv_pruning.model_copy(update={"start": "off"})
    return args.model_copy(update={"kv_pruning": switched_off}), decision.reason

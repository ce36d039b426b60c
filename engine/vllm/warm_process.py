"""The warm process: it has imported what an engine needs, and each engine on CPU is forked from it.

Imported there and nowhere else, by name, before its first fork (`engine.vllm.compat.start_warm_process`). Two thirds
of an engine's start are imports, first in EngineCore and then in its worker; forked processes have them already.
"""

import contextlib
import os
from multiprocessing.context import ForkContext, ForkProcess

import torch
import vllm.v1.engine.core  # noqa: F401 - what EngineCore runs
from vllm.v1.executor import multiproc_executor

import engine.vllm.scheduler
import engine.vllm.worker_cpu  # noqa: F401 - what the worker runs
from engine.vllm.compat import bound_cores, exit_with_parent
from engine.vllm.shm_wait import sleep_between_messages

with contextlib.suppress(ImportError):
    import setproctitle

    setproctitle.getproctitle()  # finds where titles stand, which it cannot once the environment has changed


class _Worker(ForkProcess):
    """vLLM's worker: bound to its cores before it starts a thread, as vLLM does by the environment of a new process."""

    def run(self) -> None:
        os.sched_setaffinity(0, bound_cores())
        if torch.get_num_threads() != len(bound_cores()):  # the environment changed after OpenMP had read it
            torch.set_num_threads(len(bound_cores()))
        exit_with_parent()
        super().run()


class _WorkerContext(ForkContext):
    Process = _Worker


multiproc_executor.get_mp_context = _WorkerContext
sleep_between_messages()

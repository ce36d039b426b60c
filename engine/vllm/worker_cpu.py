"""The hybrid worker on vLLM's CPU worker. Its own module, since that import sets up shared memory for CPU."""

from typing import Any

import numpy as np
from vllm.v1.worker.cpu_worker import CPUWorker

from engine.vllm.compat import cpu_experts, speed_up_cpu_model
from engine.vllm.heap_trim import HeapTrimmer, heap_use
from engine.vllm.worker import HybridWorkerMixin


class HybridCpuWorker(HybridWorkerMixin, CPUWorker):
    """`worker_cls` on machines without a GPU."""

    _trimmer: HeapTrimmer | None = None

    def load_model(self, **kwargs: Any) -> None:
        """Load the models; vLLM's computes in faster ways than its own where there are some."""
        with cpu_experts():
            super().load_model(**kwargs)
        speed_up_cpu_model(self.get_model(), self.vllm_config, self.device)

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run one iteration; before it free heap memory goes back to the system."""
        if self._trimmer is None:
            self._trimmer = HeapTrimmer()
        self._trimmer.tick()
        return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample; the seed of a request whose prompt is not complete yet stays where it is.

        vLLM takes such a row's random number back with an offset, which generators on CPU do not have: the engine would
        end with any seeded request whose prompt is computed in parts. The row, whose token is dropped, does without.
        """
        runner = self.model_runner
        rows = np.nonzero(runner.discard_request_mask.np[: runner.input_batch.num_reqs])[0]
        generators = runner.input_batch.generators
        held = {row: generators.pop(row) for row in map(int, rows) if row in generators}
        try:
            return super().sample_tokens(grammar_output)
        finally:
            generators.update(held)

    def memory_status(self) -> dict[str, Any]:
        """`MemoryCounters` and the C library's heap: what grows there is a leak, or holes."""
        use = heap_use()
        heap = {} if use is None else {"heap_used_bytes": use.used_bytes, "heap_free_bytes": use.free_bytes}
        return {**super().memory_status(), **heap}

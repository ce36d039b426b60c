"""The hybrid worker on vLLM's CPU worker. Its own module, since that import sets up shared memory for CPU."""

from vllm.v1.worker.cpu_worker import CPUWorker

from engine.hybrid_worker import HybridWorkerMixin


class HybridCpuWorker(HybridWorkerMixin, CPUWorker):
    """`worker_cls` on machines without a GPU."""

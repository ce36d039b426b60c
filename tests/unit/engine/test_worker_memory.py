"""What the hybrid worker does about memory, over a vLLM worker that is made up: its device, model and KV cache."""

import os
import weakref
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT

from core.config import AppArgs
from core.types import SliceReport
from engine.vllm import worker as worker_module
from engine.vllm.compat import make_engine_args
from engine.vllm.directive import DIRECTIVE_ATTRIBUTE, REPORT_ATTRIBUTE, Directive
from engine.vllm.worker import HybridWorkerMixin

BLOCK_TOKENS, AVAILABLE = 16, 1 << 30


class FakeRunner:
    """A trainer that holds memory and runs no slices."""

    def __init__(self, **_):
        self.shadow = SimpleNamespace(memory=lambda: {"trainer": 40, "state_copies": 24})
        self.warm_up_slices = []
        self.kept_free_bytes = 0
        self.model = SimpleNamespace(unpacked_bytes=7)
        self.wanted_by = []

    def describe(self):
        return {}

    def make_room(self, wanted_by):
        self.wanted_by.append(wanted_by)

    def set_slice_tokens(self, num_tokens):
        pass

    def run(self, *_):
        return SliceReport()

    run_step = run


class FakeBase:
    """vLLM's worker as far as it is asked."""

    def __init__(self, vllm_config, specs):
        self.vllm_config, self._specs = vllm_config, specs
        self.device = torch.device("cpu")
        self.model_runner = SimpleNamespace(
            req_states=SimpleNamespace(req_id_to_index={}), reset_encoder_cache=lambda: None, device=self.device
        )
        self.error, self.tensors = None, []

    def load_model(self):
        pass

    def get_kv_cache_spec(self):
        return self._specs

    def determine_available_memory(self):
        return AVAILABLE

    def compile_or_warm_up_model(self):
        return "compiled"

    def execute_model(self, scheduler_output):
        activation = torch.zeros(8)
        self.tensors.append(weakref.ref(activation))
        if self.error is not None:
            kind, words = self.error
            raise kind(words)
        return EMPTY_MODEL_RUNNER_OUTPUT


class FakeWorker(HybridWorkerMixin, FakeBase):
    @property
    def trainer(self):
        return self._runner


@pytest.fixture(scope="module")
def vllm_config(tiny_assistant):
    before = dict(os.environ)
    config = make_engine_args(AppArgs.model_validate({"model": {"max_model_len": 256}}), str(tiny_assistant))
    yield config.create_engine_config()
    os.environ.clear()
    os.environ.update(before)


def specs(kind=FullAttentionSpec, dtype=torch.bfloat16, **options):
    sizes = {"block_size": BLOCK_TOKENS, "num_kv_heads": 2, "head_size": 64, "dtype": dtype}
    return {f"layer{i}": kind(**sizes, **options) for i in range(3)}


@pytest.fixture
def make_worker(vllm_config, monkeypatch):
    monkeypatch.setattr(worker_module, "FineTuneRunner", FakeRunner)

    def make(layers=None, *, kv_cache_bytes=None, **settings):
        monkeypatch.setattr(worker_module, "app_args_of", lambda _: AppArgs.model_validate(settings))
        monkeypatch.setattr(vllm_config.cache_config, "kv_cache_memory_bytes", kv_cache_bytes)
        worker = FakeWorker(vllm_config, layers or specs())
        worker.load_model()
        return worker

    return make


PRUNING = {"kv_pruning": {"start": "memory_pressure"}}


def test_the_kv_cache_leaves_its_statistics_a_sixteenth_of_a_bf16_cache(make_worker):
    cache = make_worker(**PRUNING).determine_available_memory()
    assert cache + cache / 16 == pytest.approx(AVAILABLE, abs=2)
    cache = make_worker(specs(dtype=torch.float32), **PRUNING).determine_available_memory()
    assert cache + cache / 32 == pytest.approx(AVAILABLE, abs=2)


def test_without_pruning_or_where_it_cannot_be_the_kv_cache_gets_all(make_worker):
    assert make_worker().determine_available_memory() == AVAILABLE
    windows = specs(SlidingWindowSpec, sliding_window=64)
    assert make_worker(windows, **PRUNING).determine_available_memory() == AVAILABLE


def test_a_kv_cache_whose_size_is_set_keeps_it(make_worker):
    worker = make_worker(kv_cache_bytes=AVAILABLE, **PRUNING)
    assert worker.determine_available_memory() == AVAILABLE


def iterate(worker, epoch=0):
    directive = Directive(epoch=epoch)
    output = SimpleNamespace(total_num_scheduled_tokens=1, num_scheduled_tokens={"a": 1})
    setattr(output, DIRECTIVE_ATTRIBUTE, directive)
    return getattr(worker.execute_model(output), REPORT_ATTRIBUTE)


def test_the_first_report_tells_what_is_free_what_is_taken_back_and_what_is_held(make_worker, monkeypatch):
    monkeypatch.setattr(worker_module, "peak_above_now", lambda _: 300)
    monkeypatch.setattr(worker_module, "graph_pool_bytes", lambda _: 20)
    monkeypatch.setattr(worker_module, "free_memory_bytes", lambda _: 1000)
    worker = make_worker()
    worker.determine_available_memory()
    assert worker.compile_or_warm_up_model() == "compiled"
    facts = iterate(worker).facts
    assert (facts.free_bytes, facts.kept) == (1000, {"activations": 300, "graph_pools": 20, "unpacked_layer": 7})
    assert facts.held == {"trainer": 40, "state_copies": 24}
    assert worker.trainer.kept_free_bytes == 327


@pytest.mark.parametrize(
    ("error", "is_short"),
    [
        ((torch.OutOfMemoryError, "CUDA out of memory"), True),
        ((RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), True),
        ((RuntimeError, "size 4 and size 16"), False),
    ],
)
def test_a_forward_pass_without_memory_gets_back_what_it_held_and_what_training_holds(
    make_worker, monkeypatch, error, is_short
):
    alive = []
    worker = make_worker()
    monkeypatch.setattr(
        "engine.vllm.recovery.release_cached_memory",
        lambda _: alive.extend([reference() is not None for reference in worker.tensors]),
    )
    monkeypatch.setattr(worker_module.logger, "disabled", True)  # pytest keeps what is logged, frames and all
    worker.error = error
    assert iterate(worker).failure
    worker.error = None
    assert alive == [], "the exception is being handled, or the scheduler does not know of it yet"
    assert iterate(worker).failure, "nothing runs until the scheduler has begun anew"
    assert iterate(worker, epoch=1).failure is None
    assert alive == [False]
    assert worker.trainer.wanted_by == ([f"{error[0].__name__}: {error[1]}"] if is_short else [])

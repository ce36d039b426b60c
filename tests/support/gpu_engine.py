"""vLLM's EngineCore, its executor of one process, our scheduler, worker and runner, on a GPU that is made up.

The GPU computes one thing after the other, each in a time that is known, while the host goes on. Fakes stand for it
alone: for vLLM's worker on it, for the computing of a slice, and for CUDA's events and synchronization. Whoever reads
a clock reads the one given, so that in virtual time every number is exact.
"""

import queue
from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.core import EngineCoreProc, EngineShutdownState
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput

from core.dpo_slices import SliceSpec
from core.types import SliceKind, StepMetrics
from engine.vllm.worker import HybridWorkerMixin
from tests.support.async_scheduler import make_request, make_scheduler, make_task

FORWARD_S, SLICE_S, LAUNCH_S = 0.008, 0.0019, 0.0004
"""On the device a pass and a slice; on the host the launch of a pass."""
SLICES_PER_STEP = 30


class Gpu:
    def __init__(self, clock):
        self.clock, self.free_s = clock, 0.0
        self.steps_done_s = []
        """When the last slices of the steps were done."""

    def launch(self, seconds):
        """Returns when it will be done; the host goes on."""
        self.free_s = max(self.free_s, self.clock.perf_counter()) + seconds
        return self.free_s

    def settled_s(self, device=None):
        self.wait_until(self.free_s)
        return self.clock.perf_counter()

    def wait_until(self, done_s):
        self.clock.sleep(max(0.0, done_s - self.clock.perf_counter()))


class Events:
    """`ForwardTimer` as it is on CUDA: an event is over when the device has come to it."""

    def __init__(self, gpu):
        self._gpu = gpu
        self._started_s = self._ended_s = gpu.launch(0.0)

    def stop(self):
        self._ended_s = self._gpu.launch(0.0)

    def seconds(self):
        self._gpu.wait_until(self._ended_s)
        return self._ended_s - self._started_s


class Step:
    """`DpoStep`, whose slices the made-up device computes."""

    activation_bytes, largest_batch_pairs = 1000, 1

    def __init__(self, gpu):
        self._gpu, self._left = gpu, SLICES_PER_STEP

    @property
    def next_slice(self):
        return SliceSpec(SliceKind.BACKWARD_LAYER, 32) if self._left else None

    @property
    def done(self):
        return not self._left

    def run_slice(self):
        done_s = self._gpu.launch(SLICE_S)
        self._left -= 1
        if self.done:
            self._gpu.steps_done_s.append(done_s)

    def result(self):
        return StepMetrics(0.5, 0.1, 1.0), ()

    def discard(self):
        self._left = 0


@dataclass
class Pass:
    """A forward pass: when its launch began and it was done on the device, and when its tokens left EngineCore."""

    launched_s: float
    ready_s: float = 0.0
    left_s: float | None = None

    @property
    def late_s(self):
        return self.left_s - self.ready_s


class PendingOutput(AsyncModelRunnerOutput):
    def __init__(self, worker, one, output):
        self._worker, self._pass, self._output = worker, one, output

    def mask(self, grammar):
        """The answers that are bound to a grammar go on with a token that it allows."""
        for name, words in zip(grammar.structured_output_request_ids, grammar.grammar_bitmask, strict=True):
            allowed = next(token for token in range(32 * len(words)) if words[token // 32] >> token % 32 & 1)
            row = self._output.req_id_to_index[name]
            self._output.sampled_token_ids[row] = [allowed] * len(self._output.sampled_token_ids[row])

    def get_output(self):
        self._worker.gpu.wait_until(self._pass.ready_s)
        self._worker.newest = self._pass
        return self._output


class VllmWorker:
    """vLLM's GPU worker with runner V2: `execute_model` launches, `sample_tokens` returns what is still to come."""

    def __init__(self, vllm_config, gpu):
        self.vllm_config, self.gpu, self.device = vllm_config, gpu, torch.device("cpu")
        self.passes, self.newest = [], None
        self.num_deferred = 0
        """Samplings that waited for the output of the pass before."""
        self._num_prompt, self._sampled = {}, None

    def load_model(self):
        pass

    def compile_or_warm_up_model(self):
        pass

    def execute_model(self, scheduled):
        if not scheduled.total_num_scheduled_tokens:
            return EMPTY_MODEL_RUNNER_OUTPUT
        one = Pass(self.gpu.clock.perf_counter())
        self.gpu.clock.sleep(LAUNCH_S)
        one.ready_s = self.gpu.launch(FORWARD_S)
        self.passes.append(one)
        computed = {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
        self._num_prompt |= {new.req_id: len(new.prompt_token_ids) for new in scheduled.scheduled_new_reqs}
        cached = scheduled.scheduled_cached_reqs
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        tokens = {
            name: [7] if computed[name] + count >= self._num_prompt[name] else []
            for name, count in scheduled.num_scheduled_tokens.items()
        }
        rows = {name: row for row, name in enumerate(tokens)}
        self._sampled = PendingOutput(self, one, ModelRunnerOutput(list(tokens), rows, list(tokens.values())))
        return None

    def sample_tokens(self, grammar_output):
        sampled, self._sampled = self._sampled, None
        if grammar_output is not None:
            self.num_deferred += self.newest is not None
            sampled.mask(grammar_output)
        return sampled


class Worker(HybridWorkerMixin, VllmWorker):
    pass


class GpuEngine(EngineCoreProc):
    """EngineCore's own loop, without its process and its sockets. Ends tasks and requests as vLLM does."""

    def __init__(self, vllm_config, clock, patch):
        """`patch` is pytest's `monkeypatch`; `clock` is the module `time`, or stands for it."""
        self.clock, self.gpu = clock, Gpu(clock)
        gpu = self.gpu
        patch.setattr("engine.vllm.worker.ForwardTimer", lambda device: Events(gpu))
        patch.setattr("engine.training.runner.DpoStep", lambda *_, **__: Step(gpu))
        patch.setattr("engine.training.runner.settled_s", gpu.settled_s)
        for module in ("engine.training.runner", "engine.vllm.scheduler", "vllm.v1.engine.core"):
            patch.setattr(f"{module}.time", clock)
        self.worker = Worker(vllm_config, gpu)
        self.worker.load_model()
        self.worker.compile_or_warm_up_model()
        self.model_executor = UniProcExecutor.__new__(UniProcExecutor)
        self.model_executor.driver_worker = self.worker
        self.scheduler = make_scheduler(vllm_config)
        self.vllm_config, self.log_stats, self.publish_dp_lb_stats = vllm_config, False, False
        self.batch_queue_size = vllm_config.max_concurrent_batches
        self.batch_queue = deque(maxlen=self.batch_queue_size)
        self.step_fn, self.async_scheduling, self.check_for_draft_tokens = self.step_with_batch_queue, True, False
        self.is_mm_encoder_only = self.is_pooling_model = self.engines_running = False
        self.shutdown_state, self.process_input_queue_block = EngineShutdownState.RUNNING, False
        self.aborts_queue, self.input_queue = queue.Queue(), queue.Queue()
        self.output_queue = SimpleNamespace(put_nowait=self._note_output)
        self._idle_state_callbacks, self._weight_version = [], None
        self.num_tokens, self.ended_s = {}, {}
        """Tokens that came, and when the end came, by request."""

    @property
    def passes(self):
        return self.worker.passes

    def iterations(self):
        return self.worker.mace_call("iterations", 0)["value"]["samples"]

    def add(self, name, max_tokens, num_prompt=20, regex=None):
        request = make_request(name, num_prompt, max_tokens, self.clock.time(), regex=regex)
        self.scheduler.structured_output_manager.grammar_init(request)
        self._send(request)

    def add_task(self, name):
        self._send(make_task(name))

    def abort(self, name):
        self.input_queue.put((EngineCoreRequestType.ABORT, [name]))

    def turn(self):
        """One round of `run_busy_loop`."""
        self._process_input_queue()
        self._process_engine_step()

    def run(self, until=lambda: False, most=2000):
        """Until vLLM would wait for messages, or `until`."""
        for _ in range(most):
            if until() or not (self.has_work() or not self.input_queue.empty()):
                return
            self.turn()
        raise AssertionError("the engine does not come to rest")

    def _send(self, request):
        self.input_queue.put((EngineCoreRequestType.ADD, (request, 0)))

    def _note_output(self, output):
        now_s = self.clock.perf_counter()
        if self.worker.newest is not None:
            self.worker.newest.left_s, self.worker.newest = now_s, None
        for said in output[1].outputs:
            self.num_tokens[said.request_id] = self.num_tokens.get(said.request_id, 0) + len(said.new_token_ids)
            if said.finish_reason is not None:
                self.ended_s[said.request_id] = now_s

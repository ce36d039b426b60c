"""Our scheduler over vLLM's async one, two iterations in flight, as an engine on one GPU drives it.

The scheduler, its configuration and its KV cache are vLLM's own, built in this process; what a worker would send back
is made up: a token for each request that has one coming, and what a fine-tune step holds.
"""

import copy
import time
from collections import deque

import pytest
import torch
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups
from vllm.v1.engine import FinishReason
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from core.types import SliceReport
from engine.vllm.culprit import UnexplainedFailureError
from engine.vllm.directive import DIRECTIVE_ATTRIBUTE, REPORT_ATTRIBUTE, IterationReport, WorkerFacts
from engine.vllm.grammars import contain_failures
from engine.vllm.planning import KvPool
from scheduler.memory.ledger import Pool
from tests.support.async_scheduler import BLOCK_TOKENS, async_config, make_request, make_scheduler, make_task
from tests.support.clock import Clock


@pytest.fixture(scope="module")
def vllm_config(tiny_assistant):
    with async_config(tiny_assistant) as config:
        yield config


def position_of_next(request):
    """Of the token that the iteration gives which was scheduled last."""
    return request.num_output_tokens + request.num_output_placeholders - 1


class Engine:
    """`EngineCore.step_with_batch_queue` without its processes."""

    def __init__(self, vllm_config, num_blocks=200):
        self.scheduler = make_scheduler(vllm_config, num_blocks)
        self.in_flight = deque()
        self.answers = {}

    @property
    def arena_bytes(self):
        return self.scheduler.planner.memory.pool_used_bytes(Pool.ARENA)

    def add(self, name, num_prompt, max_tokens, client=None):
        self.scheduler.add_request(make_request(name, num_prompt, max_tokens, time.time(), client))

    def add_task(self, name):
        self.scheduler.add_request(make_task(name))

    def schedule(self):
        """Send one more iteration off."""
        output = self.scheduler.schedule()
        requests = self.scheduler.requests
        named = list(output.num_scheduled_tokens)
        samples = [[] if requests[n].is_prefill_chunk else [position_of_next(requests[n])] for n in named]
        self.in_flight.append((output, named, samples))
        return output

    def finish(self, activation_bytes=0):
        """The oldest iteration in flight comes back."""
        output, named, samples = self.in_flight.popleft()
        answer = ModelRunnerOutput(named, {name: i for i, name in enumerate(named)}, samples)
        setattr(answer, REPORT_ATTRIBUTE, IterationReport(SliceReport(activation_bytes=activation_bytes), 0.01))
        for update in self.scheduler.update_from_output(output, answer).values():
            for said in update.outputs:
                self.answers.setdefault(said.request_id, []).extend(said.new_token_ids)


def test_a_model_with_two_kinds_of_layers_needs_two_blocks_of_vllms_for_the_same_tokens(vllm_config):
    sizes = {"block_size": BLOCK_TOKENS, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    full, window = FullAttentionSpec(**sizes), SlidingWindowSpec(**sizes, sliding_window=64)
    groups = [KVCacheGroupSpec(["a", "b"], full), KVCacheGroupSpec(["c", "d"], window)]
    num_bytes = 201 * 2 * full.page_size_bytes
    config = get_kv_cache_config_from_groups(vllm_config, groups, num_bytes)
    pool = KvPool.of(config)
    assert (config.num_blocks, len(config.kv_cache_tensors)) == (201, 2)
    assert pool.num_blocks * pool.block_bytes <= num_bytes  # the groups overlay each other
    assert pool == KvPool(100, 4 * full.page_size_bytes, BLOCK_TOKENS, num_groups=2)
    assert (pool.free_blocks(200), pool.free_blocks(7)) == (100, 3)


def test_a_report_does_not_release_what_a_newer_iteration_has_reserved(vllm_config):
    engine = Engine(vllm_config)
    engine.add_task("step")
    engine.schedule()
    engine.schedule()  # may start the next step: its memory is reserved
    reserved = engine.arena_bytes
    assert reserved > 0
    engine.finish(activation_bytes=0)
    assert engine.arena_bytes == reserved
    engine.finish(activation_bytes=0)
    assert engine.arena_bytes == 0


def test_memory_is_released_although_a_later_iteration_without_slices_is_in_flight(vllm_config):
    engine = Engine(vllm_config)
    engine.add_task("step")
    engine.schedule()
    assert engine.arena_bytes > 0
    engine.scheduler.finish_requests("step", RequestStatus.FINISHED_ABORTED)
    engine.schedule()
    engine.finish(activation_bytes=0)
    assert engine.arena_bytes == 0


def test_the_plan_counts_the_tokens_that_vllm_schedules(vllm_config):
    engine = Engine(vllm_config)
    planner, views = engine.scheduler.planner, []
    plan = planner.plan
    planner.plan = lambda view: views.append(view) or plan(view)
    for number, max_tokens in enumerate((1, 2, 3, 5, 8)):
        engine.add(f"request {number}", 20 + number, max_tokens)
    num_ending = 0
    engine.schedule()
    while engine.scheduler.running:
        num_running = len(engine.scheduler.running)
        output, view = engine.schedule(), views[-1]
        assert view.decode_tokens == output.total_num_scheduled_tokens
        assert view.num_decode == len(output.num_scheduled_tokens)
        num_ending += num_running - view.num_decode
        engine.finish()
    assert num_ending >= 5
    assert [len(engine.answers[f"request {n}"]) for n in range(5)] == [1, 2, 3, 5, 8]


class Device:
    """What runner V1 and our worker do with two iterations in flight: the requests it knows, and what they said.

    The token of a request is its position. `fails(names)` says whether a forward pass with these requests raises.
    """

    def __init__(self, engine, fails):
        self.engine, self.fails = engine, fails
        self.known, self.epoch, self.is_failed = set(), 0, False
        self.reasons, self.num_failed, self.num_slices = {}, 0, 0

    def launch(self):
        """Schedule an iteration and run it; its output waits."""
        output = self.engine.schedule()
        directive = getattr(output, DIRECTIVE_ATTRIBUTE)
        self.num_slices += directive.plan.min_slices + (directive.plan.finetune_budget_s > 0)
        if directive.epoch != self.epoch:
            self.epoch, self.is_failed = directive.epoch, False
        if not self.is_failed:
            self.is_failed = self.run(output)
        self.engine.in_flight[-1] += ("boom" if self.is_failed else None,)

    def run(self, output):
        self.known -= output.finished_req_ids
        new = {request.req_id for request in output.scheduled_new_reqs}
        assert not new & self.known
        assert set(output.scheduled_cached_reqs.req_ids) <= self.known
        has_failed = bool(output.num_scheduled_tokens) and self.fails(set(output.num_scheduled_tokens))
        self.num_failed += has_failed
        self.known |= set(list(new)[: len(new) // 2]) if has_failed else new  # it broke off while it added them
        return has_failed

    def land(self):
        """The oldest output arrives."""
        output, named, samples, failure = self.engine.in_flight.popleft()
        report = IterationReport(SliceReport(), 0.01, failure=failure)
        answer = ModelRunnerOutput(named, {name: i for i, name in enumerate(named)}, samples)
        if failure is not None:
            answer = ModelRunnerOutput([], {})
        setattr(answer, REPORT_ATTRIBUTE, report)
        for update in self.engine.scheduler.update_from_output(output, answer).values():
            for said in update.outputs:
                self.engine.answers.setdefault(said.request_id, []).extend(said.new_token_ids)
                if said.finish_reason is not None:
                    self.reasons[said.request_id] = said.finish_reason

    def drain(self, after=lambda: None):
        for _ in range(1000):
            self.launch()
            if len(self.engine.in_flight) == 2:
                self.land()
            after()
            if not self.engine.scheduler.requests:
                break
        while self.engine.in_flight:
            self.land()


def spoken(vllm_config, fails, num_requests=7, num_blocks=200, after=lambda device: None):
    """A device that has answered: with tokens 0, 1, 2, ... if nothing was lost, said twice or out of order."""
    engine = Engine(vllm_config, num_blocks)
    device = Device(engine, fails)
    for number in range(num_requests):
        engine.add(f"r{number}", 20 + 9 * number, 6 + number)
    device.drain(lambda: after(device))
    return device


def positions(number):
    return list(range(6 + number))


@pytest.mark.parametrize("culprits", [{"r0"}, {"r3"}, {"r1", "r6"}, {f"r{n}" for n in range(6)}])
def test_with_two_iterations_in_flight_only_culprits_end_and_no_token_of_others_is_lost(vllm_config, culprits):
    device = spoken(vllm_config, lambda names: bool(names & culprits))
    assert {name for name, reason in device.reasons.items() if reason is FinishReason.ERROR} == culprits
    for number in range(7):
        if f"r{number}" not in culprits:
            assert device.engine.answers[f"r{number}"] == positions(number)
    assert device.num_failed <= 1 + 5 * len(culprits)


def test_a_culprit_that_fails_in_the_middle_of_its_answer_loses_the_rest_only(vllm_config):
    def fails(names):
        return "r2" in names and len(device.engine.answers.get("r2", ())) >= 3

    engine = Engine(vllm_config)
    device = Device(engine, fails)
    for number in range(5):
        engine.add(f"r{number}", 20, 6 + number)
    device.drain()
    assert device.reasons.pop("r2") is FinishReason.ERROR
    assert engine.answers["r2"] == [0, 1, 2, 3]  # the last one was under way
    assert set(device.reasons.values()) == {FinishReason.LENGTH}
    assert all(engine.answers[f"r{number}"] == positions(number) for number in (0, 1, 3, 4))


def test_a_short_cache_that_preempts_during_the_search_changes_nothing(vllm_config):
    device = spoken(vllm_config, lambda names: "r4" in names, num_blocks=14)
    assert device.reasons.pop("r4") is FinishReason.ERROR
    assert all(device.engine.answers[f"r{number}"] == positions(number) for number in (0, 1, 2, 3, 5, 6))


@pytest.mark.parametrize("leaver", ["r0", "r4", "r5"])
def test_a_client_may_leave_during_the_search(vllm_config, leaver):
    def leave(device):
        if device.num_failed == 2:
            device.engine.scheduler.finish_requests(leaver, RequestStatus.FINISHED_ABORTED)

    device = spoken(vllm_config, lambda names: "r4" in names, after=leave)
    errors = {name for name, reason in device.reasons.items() if reason is FinishReason.ERROR}
    assert errors == {"r4"} - {leaver}
    innocent = [number for number in range(7) if f"r{number}" not in ("r4", leaver)]
    assert all(device.engine.answers[f"r{number}"] == positions(number) for number in innocent)


def test_no_slices_run_while_a_culprit_is_searched(vllm_config):
    engine = Engine(vllm_config)
    device = Device(engine, lambda names: "r0" in names)
    for number in range(4):
        engine.add(f"r{number}", 20, 6 + number)
    device.launch()
    device.land()
    engine.add_task("step")
    while "r0" not in device.reasons:
        device.launch()
        device.land()
    assert device.num_slices == 0
    while engine.scheduler.requests:
        device.launch()
        device.land()
    device.launch()
    assert device.num_slices > 0


def test_an_iteration_that_failed_tells_nothing_of_the_overhead(vllm_config, monkeypatch):
    clock = Clock(1000.0)
    monkeypatch.setattr("engine.vllm.scheduler.time", clock)
    device = Device(Engine(vllm_config), lambda names: True)
    device.engine.add("r0", 20, 6)
    device.launch()
    clock.sleep(5.0)
    device.land()
    assert device.engine.scheduler.planner.predictor.overhead_s == 0.0


def test_a_device_that_fails_for_everybody_ends_the_engine_with_the_reason(vllm_config):
    with pytest.raises(UnexplainedFailureError, match="boom"):
        spoken(vllm_config, lambda names: True)


class BrokenGrammar:
    """A compiled grammar that raises where `method` is called."""

    def __init__(self, grammar, method):
        self._grammar, self._method = grammar, method

    def __getattr__(self, name):
        if name == self._method:
            raise RuntimeError("the matcher has no state")
        return getattr(self._grammar, name)


@pytest.mark.parametrize("method", ["fill_bitmask", "accept_tokens"])
def test_a_grammar_that_raises_ends_its_request_and_the_others_keep_their_masks(vllm_config, method):
    manager = StructuredOutputManager(vllm_config)
    manager._use_async_grammar_compilation = False  # noqa: SLF001 - compile in this thread
    contain_failures(manager)
    requests = {}
    for name in ("a", "broken", "b"):
        constraint = StructuredOutputsParams(regex="[a-z]+")
        constraint._backend = "xgrammar"  # noqa: SLF001 - as the check chose it
        params = SamplingParams(max_tokens=4, structured_outputs=constraint)
        requests[name] = Request(name, [1, 2], params, None)
        manager.grammar_init(requests[name])
    names = list(requests)
    whole = manager.grammar_bitmask(requests, names, {}).copy()
    constraint = requests["broken"].structured_output_request
    constraint.grammar = BrokenGrammar(constraint.grammar, method)
    masks = manager.grammar_bitmask(requests, names, {})
    assert masks.shape == whole.shape
    assert (masks[[0, 2]] == whole[[0, 2]]).all()
    allowed = next(token for token in range(32 * whole.shape[1]) if whole[0][token // 32] >> token % 32 & 1)
    accepted = {name: manager.accept_tokens(request, [allowed]) for name, request in requests.items()}
    assert accepted == {"a": True, "broken": False, "b": True}
    manager.clear_backend()


def test_a_client_without_a_seat_gets_one_while_anothers_long_answers_hold_all(vllm_config):
    config = copy.deepcopy(vllm_config)
    config.scheduler_config.max_num_active_seqs, config.scheduler_config.max_num_seqs = 4, 5
    engine = Engine(config)
    for number in range(20):
        engine.add(f"flood-{number}", 20, max_tokens=60, client="many")
    for _ in range(3):
        engine.schedule()
        engine.finish()
    assert len(engine.answers) == 4
    for number in range(2):
        engine.add(f"lone-{number}", 20, max_tokens=5, client=f"lone-{number}")
    for _ in range(14):
        engine.schedule()
        engine.finish()
    lengths = {name: len(answer) for name, answer in engine.answers.items()}
    assert [lengths["lone-0"], lengths["lone-1"]] == [5, 5]
    assert len(engine.answers) == 6  # the seat of guests is nobody else's
    assert max(lengths.values()) < 60
    for _ in range(400):
        engine.schedule()
        engine.finish()
    assert {len(answer) for name, answer in engine.answers.items() if "flood" in name} == {60}
    assert len(engine.answers) == 22


def test_the_arena_is_what_forward_passes_leave_and_what_is_beside_it_is_told(vllm_config):
    """128 MiB are free, of which vLLM's largest forward pass takes 96 back; the settings ask for 64."""
    engine = Engine(vllm_config)
    engine.add("a", 20, 4)
    output = engine.schedule()
    _, named, samples = engine.in_flight.popleft()
    facts = WorkerFacts([], 128 << 20, {"activations": 96 << 20}, {"trainer": 5, "state_copies": 3})
    answer = ModelRunnerOutput(named, {"a": 0}, samples)
    setattr(answer, REPORT_ATTRIBUTE, IterationReport(SliceReport(), 0.01, facts))
    engine.scheduler.update_from_output(output, answer)
    counters = getattr(engine.schedule(), DIRECTIVE_ATTRIBUTE).memory
    assert counters.arena_capacity_bytes == 32 << 20
    assert counters.entries == {"activations": 96 << 20, "trainer": 5, "state_copies": 3}

"""What the scheduler and the worker do about an iteration that failed.

The worker sends the exception instead of an output, and runs nothing more until the scheduler has seen it. The
scheduler sends every request back to the waiting queue, as if it had just come, and throws the prefix cache away, since
nobody knows what a failed forward pass has written. Then `engine.vllm.culprit` says who may run. All of it belongs to a
new *epoch*: outputs of an older one, which were in flight, count for nothing, and the worker begins an epoch with an
empty batch.
"""

import logging
from collections.abc import Iterable
from typing import Any

from vllm import SamplingParams
from vllm.v1.request import Request, RequestStatus
from vllm.v1.sample.logits_processor import BatchUpdate

from engine.training.device_memory import release_cached_memory
from engine.vllm.culprit import PROBE, CulpritSearch

logger = logging.getLogger(__name__)

_TEST_TOKENS = 2
"""Tokens that a request has to give without a failure: one after its prompt, one from decoding."""
_NOTHING_TO_RUN = (RequestStatus.WAITING_FOR_STREAMING_REQ, RequestStatus.WAITING_FOR_REMOTE_KVS)


class Recovery:
    """The search for culprits in one of vLLM's schedulers."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._search = CulpritSearch()
        self._under_test: list[tuple[Request, int]] = []
        """Requests of the group, and how many tokens each had given before."""
        self.epoch = 0

    @property
    def is_searching(self) -> bool:
        """Only some of the requests may run."""
        return bool(self._search.group)

    def admits(self, request: Request) -> bool:
        """May the request run now?"""
        return not self._search.group or request.request_id in self._search.group

    def failed(self, batch: Iterable[str], error: str) -> dict[str, str]:
        """Begin a new epoch after an iteration with the requests `batch` failed, before its output is taken in.

        Returns:
            Requests to be ended, and their errors, by request id.

        Raises:
            UnexplainedFailureError: no request is to blame, so the engine has to end.
        """
        self._search.keep(self._is_there)
        suspects = [name for name in batch if self._is_there(name)]
        ended = self._search.failed(suspects, error) if suspects else {}
        self._begin_epoch()
        return ended

    def succeeded(self) -> dict[str, str]:
        """Note that an iteration of this epoch went well, after its output was taken in; see `failed`."""
        if not self._search.group:
            self._search.note_good()
            return {}
        left, has_run = [], False
        for request, num_before in self._under_test:
            num_gained = request.num_output_tokens - num_before
            has_run |= num_gained > 0
            if request.is_finished() or num_gained >= _TEST_TOKENS or request.status in _NOTHING_TO_RUN:
                continue
            if request.status == RequestStatus.RUNNING:
                return {}
            left.append(request.request_id)
        if left and not has_run:
            return {}
        self._search.keep(self._is_there)
        ended = self._search.passed(left, has_run=has_run)
        if self._search.group:
            self._begin_epoch()
        return ended

    def forget_finished(self, request_ids: Iterable[str]) -> None:
        """Tell the worker again who has ended: in an iteration that failed it may not have heard."""
        self._scheduler.finished_req_ids.update(name for name in request_ids if not self._is_there(name))

    def _is_there(self, name: str) -> bool:
        request = self._scheduler.requests.get(name)
        return request is not None and not request.is_finished()

    def _begin_epoch(self) -> None:
        scheduler = self._scheduler
        self.epoch += 1
        scheduler.reset_prefix_cache(reset_running_requests=True)
        scheduler.reset_encoder_cache()
        for request in scheduler.requests.values():
            if request.num_stale_output_tokens:
                request.drop_stale_output = True
            if request.status == RequestStatus.PREEMPTED and not request.num_output_tokens:
                # The worker may know half of it. What has given a token went through an iteration, and is known.
                request.status = RequestStatus.WAITING
                scheduler.finished_req_ids.add(request.request_id)
        if PROBE in self._search.group and not self._is_there(PROBE):
            params = SamplingParams(max_tokens=_TEST_TOKENS, temperature=0.0, ignore_eos=True, detokenize=False)
            scheduler.add_request(Request(PROBE, [0], params, None))
        group = [scheduler.requests[name] for name in self._search.group if self._is_there(name)]
        self._under_test = [(request, request.num_output_tokens) for request in group]


def empty_batch(runner: Any) -> None:
    """Take all requests out of a model runner's batch, in whatever state a failed iteration has left it.

    What the iteration had allocated goes back to the driver. That is for here and not for where the exception is
    caught: while it is handled, the frames that it came through hold their tensors, and the runner its last output.

    Runner V1 keeps what it knows of each request beside the batch; those that go on there are added again by it.
    """
    runner.execute_model_state = None
    runner.reset_encoder_cache()
    if hasattr(runner, "req_states"):  # runner V2, to which all requests come as new ones
        for name in list(runner.req_states.req_id_to_index):
            runner._remove_request(name)  # noqa: SLF001
    else:
        _empty_v1_batch(runner.input_batch)
    release_cached_memory(runner.device)


def _empty_v1_batch(batch: Any) -> None:
    batch.batch_update_builder.reset()
    for name in list(batch.req_id_to_index):
        batch.remove_request(name)
    batch.batch_update_builder.reset()
    for rows in (batch._req_ids, batch.req_output_token_ids, batch.spec_token_ids):  # noqa: SLF001
        rows.clear()
    batch.generators.clear()
    batch.prev_sampled_token_ids = batch.prev_req_id_to_index = None
    batch.sampled_token_ids_cpu = batch.async_copy_ready_event = None
    nobody = BatchUpdate(batch_size=0, removed=list(range(batch.max_num_reqs)), added=[], moved=[])
    if batch.thinking_budget_state_holder is not None:
        batch.thinking_budget_state_holder.sync_batch(nobody)
    for processor in batch.logitsprocs.all:
        processor.update_state(nobody)

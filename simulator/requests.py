"""The requests of one executor, waiting and running, and how an iteration is filled with them.

`view` describes them to the planner as `engine.vllm.planning` describes vLLM's; `fill` gives out the token budget as
vLLM does: decodes first, then prompts in progress, then the waiting queue while seats and KV memory last.
"""

from dataclasses import dataclass, field

from core.batch import ForwardShape, Plan
from core.config import AppArgs
from scheduler.queues.waiting import WaitingQueue
from scheduler.view import FineTuneState, IterationView, PrefillTask
from simulator.hardware import Hardware
from simulator.running import RunningSet, SimRequest, SimulatedPruner


@dataclass(slots=True)
class Fill:
    """The work of one forward pass."""

    shape: ForwardShape = field(default_factory=ForwardShape)
    chunks: list[tuple[SimRequest, int]] = field(default_factory=list)
    preempted: list[SimRequest] = field(default_factory=list)

    def add_chunk(self, request: SimRequest, left: int, max_chunk_tokens: int) -> int:
        """Take as much of a prompt as the budget allows; returns its tokens."""
        tokens = min(request.left, left, max_chunk_tokens or left)
        if tokens <= 0:
            return 0
        if tokens == 1:  # counts as a decode, as in `engine.vllm.planning.shape_of`
            self.shape.num_decode += 1
            self.shape.decode_context += request.computed
        else:
            self.shape.add_chunk(tokens, request.computed)
        self.chunks.append((request, tokens))
        return tokens


class RequestPool:
    """The waiting queue and the seats of one executor."""

    def __init__(self, args: AppArgs, hardware: Hardware) -> None:
        self.running = RunningSet(args.engine.max_num_seqs, hardware.kv_tokens, hardware.block_tokens)
        self.waiting: WaitingQueue[SimRequest] = WaitingQueue(args.experiments)
        self.waiting_tokens = 0
        """Prompt tokens of the waiting queue."""
        self.prunes = args.kv_pruning.start != "off"
        self._pruner = SimulatedPruner(args.kv_pruning, self.running)
        self._kv_bytes_per_token = hardware.limits.kv_bytes_per_token

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    @property
    def only_decodes(self) -> bool:
        """Every request is past its prompt."""
        return self.running.num_decode > 0 and not self.running.prefills and not self.waiting

    def enqueue(self, request: SimRequest) -> None:
        """Put a request into the waiting queue; a preempted one keeps its arrival."""
        self.waiting.push(request.request_id, request, request.arrival_s, request.user_priority)
        self.waiting_tokens += request.target

    def view(self, now_s: float, finetune: FineTuneState | None) -> IterationView:
        """Describe the state before an iteration is planned."""
        running = self.running
        view = IterationView(
            now_s,
            running.num_decode,
            running.decode_context,
            free_seats=running.max_seats - len(running),
            used_kv_bytes=int(running.kv_used() * self._kv_bytes_per_token),
            finetune=finetune,
            free_kv_blocks=running.blocks.free,
            block_tokens=running.blocks.block_tokens,
            decode_blocks=running.decode_blocks,
            prune_offer=self._pruner.offer() if self.prunes else None,
        )
        for request in running.prefills:
            if request.left <= 1:
                view.num_decode += 1
                view.decode_context += request.computed
            else:
                view.add_running(_task(request, is_running=True))
        if self.waiting:
            head = [_task(request, is_running=False) for request in self.waiting.head(view.num_unlooked, now_s)]
            view.add_waiting(head, len(self.waiting), self.waiting.oldest_arrival_s())
        return view

    def prune(self, plan: Plan) -> int:
        """Drop the KV blocks that the plan takes of the last view's offer; returns how many."""
        return self._pruner.prune(plan) if self.prunes else 0

    def fill(self, plan: Plan, now_s: float) -> Fill:
        """Choose what the forward pass computes; preempts if decoding needs the KV memory."""
        fill = Fill()
        if plan.token_budget <= 0:
            return fill
        running = self.running
        self._make_room(fill)
        fill.shape.num_decode, fill.shape.decode_context = running.num_decode, running.decode_context
        left = plan.token_budget - running.num_decode
        for request in running.prefills:
            left -= fill.add_chunk(request, left, plan.max_chunk_tokens)
        if fill.preempted:
            return fill  # as in vLLM, nobody is admitted in an iteration that took a seat away
        while left > 0 and self.waiting and running.admit(self.waiting.peek(now_s)):
            request = self.waiting.pop(now_s)
            self.waiting_tokens -= request.target
            left -= fill.add_chunk(request, left, plan.max_chunk_tokens)
        return fill

    def _make_room(self, fill: Fill) -> None:
        """Preempt until every decoding request has room for one more token."""
        running = self.running
        while running.decode_blocks > running.blocks.free:
            request = running.preempt()
            if request is None:
                return
            fill.preempted.append(request)
            self.enqueue(request)


def _task(request: SimRequest, *, is_running: bool) -> PrefillTask:
    return PrefillTask(
        request.request_id,
        request.arrival_s,
        request.left,
        request.computed,
        request.user_priority,
        is_running,
        held_tokens=request.target if is_running else 0,
    )

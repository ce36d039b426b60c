"""The smallest engine that can apply plans: what vLLM and the worker do with them, in virtual time."""

from dataclasses import dataclass

from core.batch import ForwardShape, IterationSample
from core.types import SliceKind, SliceReport, SliceTiming
from scheduler.iteration.planner import EngineLimits, IterationPlanner
from scheduler.memory.ledger import Pool
from scheduler.queues.waiting import WaitingQueue
from scheduler.view import MAX_PREFILLS_SEEN, FineTuneState, IterationView, PrefillTask, PruneOffer

KV_BYTES_PER_TOKEN = 10
ARENA_BYTES_PER_TOKEN = 20
SLICE_TOKENS = 64


@dataclass
class Request:
    request_id: str
    arrived_s: float
    num_prompt: int
    num_output: int
    user_priority: int = 0
    computed: int = 0
    produced: int = 0
    dropped: int = 0

    @property
    def left(self):
        return max(1, self.num_prompt - self.computed)


class MiniEngine:
    """Unless told otherwise, the KV cache holds every seat's longest request, and nothing is preempted or pruned."""

    def __init__(
        self,
        args,
        device,
        *,
        seats=4,
        kv_tokens=4000,
        arena_tokens=500,
        max_tokens=512,
        block_tokens=1,
        sink_tokens=4,
    ):
        training = args.training.model_copy(update={"max_slice_tokens": SLICE_TOKENS})
        self.args, self.device = args.model_copy(update={"training": training}), device
        self.block_tokens, self.pruning, self.sink_tokens = block_tokens, args.kv_pruning, sink_tokens
        limits = EngineLimits(
            max_tokens,
            kv_bytes=kv_tokens * KV_BYTES_PER_TOKEN,
            arena_bytes=arena_tokens * ARENA_BYTES_PER_TOKEN,
            kv_bytes_per_token=KV_BYTES_PER_TOKEN,
            arena_bytes_per_token=ARENA_BYTES_PER_TOKEN,
        )
        self.planner = IterationPlanner(self.args, device, limits)
        self.kv_blocks, self.seats, self.now_s = kv_tokens // block_tokens, seats, 0.0
        self.has_scores = False
        self.offered: list[tuple[float, int]] = []
        self.preempted: list[str] = []
        """In the last iteration."""
        self.waiting = WaitingQueue(args.experiments)
        self.running: list[Request] = []
        self.finished: list[str] = []
        self.tasks: dict[str, int] = {}
        self.task_arrived_s: dict[str, float] = {}
        self.slices_run: dict[str, int] = {}
        self.last_progress_s = 0.0
        self.longest_starvation_s = 0.0
        self.log: list[str] = []

    def arrive(self, request: Request):
        request.arrived_s = self.now_s
        self.waiting.push(request.request_id, request, self.now_s, request.user_priority)
        self.planner.retrain.note_requests()

    def add_task(self, task_id: str, num_slices: int):
        self.tasks[task_id] = num_slices
        self.task_arrived_s[task_id] = self.now_s
        self.slices_run[task_id] = 0

    def iterate(self, noise=1.0, out_of_memory=False):
        view = self._view()
        plan = self.planner.plan(view)
        self._prune(plan)
        shape, tokens = self._fill(plan)
        plan = self.planner.settle(plan, view, shape)
        slices = self._slices(plan)
        forward_s = self.device.forward_s(shape) * noise
        sample = IterationSample(
            shape,
            forward_s,
            self.device.overhead_s,
            SliceReport(slices, out_of_memory=out_of_memory and bool(slices)),
            plan,
        )
        self.now_s += self.device.overhead_s + sample.slices_s + forward_s
        self._deliver(tokens)
        if slices:
            self.last_progress_s = self.now_s
        elif self.tasks:
            since_s = max(self.last_progress_s, min(self.task_arrived_s[t] for t in self.tasks))
            self.longest_starvation_s = max(self.longest_starvation_s, self.now_s - since_s)
        self.planner.observe(sample)
        if not self.tasks:
            self.planner.memory.record(Pool.ARENA, 0)
        self.log.append(f"{self.now_s:.9f} {plan} {shape} {tokens} {len(slices)}")
        return view, plan, shape, slices

    def used_blocks(self):
        return sum(self.blocks_of(r.computed) - r.dropped for r in self.running)

    def blocks_of(self, num_tokens):
        return -(-num_tokens // self.block_tokens)

    def droppable(self, r):
        """How many blocks of the request may have been dropped in all."""
        if r.computed < r.num_prompt:
            return 0
        full, size = r.computed // self.block_tokens, self.block_tokens
        kept = -(-self.sink_tokens // size) + -(-self.pruning.recent_tokens // size)
        return max(0, min(int(self.pruning.max_fraction * full), full - kept))

    def _offer(self):
        """Harm as `engine.pruning.pruner` has it."""
        self.offered = []
        if self.pruning.start == "off" or not self.has_scores:
            return None
        for i, r in enumerate(self.running):
            full = r.computed // self.block_tokens
            self.offered += [(gone / full, i) for gone in range(r.dropped, self.droppable(r))]
        self.offered.sort()
        return PruneOffer([harm for harm, _ in self.offered])

    def _prune(self, plan):
        for _, i in self.offered[: plan.prune_blocks]:
            self.running[i].dropped += 1
        self.has_scores = plan.wants_prune_scores

    def _view(self):
        view = IterationView(
            self.now_s,
            free_seats=self.seats - len(self.running),
            used_kv_bytes=self.used_blocks() * self.block_tokens * KV_BYTES_PER_TOKEN,
            free_kv_blocks=self.kv_blocks - self.used_blocks(),
            block_tokens=self.block_tokens,
            prune_offer=self._offer(),
        )
        for r in self.running:
            if r.left == 1 and r.computed >= r.num_prompt:
                view.num_decode += 1
                view.decode_context += r.computed
                view.decode_blocks += r.computed % self.block_tokens == 0
            else:
                view.prefills.append(self._prefill(r, is_running=True))
        for r in self.waiting.head(MAX_PREFILLS_SEEN - len(view.prefills), self.now_s):
            view.prefills.append(self._prefill(r, is_running=False))
        if self.tasks:
            front_s = min(self.task_arrived_s[t] for t in self.tasks)
            view.finetune = FineTuneState(max(front_s, self.last_progress_s), max_batch_tokens=SLICE_TOKENS)
        return view

    @staticmethod
    def _prefill(r, *, is_running):
        return PrefillTask(r.request_id, r.arrived_s, r.left, r.computed, r.user_priority, is_running)

    def _fill(self, plan):
        """As vLLM does: decodes, prefills in progress, then the waiting while seats, blocks and tokens last."""
        shape, tokens, budget = ForwardShape(), {}, plan.token_budget
        self.preempted = []
        decoding = [r for r in self.running if r.computed >= r.num_prompt]
        for r in [*decoding, *(r for r in self.running if r not in decoding)]:
            budget -= self._schedule(r, plan, budget, shape, tokens)
        while budget > 0 and len(self.waiting) and len(self.running) < self.seats and not self.preempted:
            if self.blocks_of(self.waiting.peek(self.now_s).num_prompt) > self._free_blocks(tokens):
                break
            r = self.waiting.pop(self.now_s)
            self.running.append(r)
            budget -= self._schedule(r, plan, budget, shape, tokens)
        return shape, tokens

    def _free_blocks(self, tokens):
        taken = sum(self.blocks_of(r.computed + tokens.get(r.request_id, 0)) - r.dropped for r in self.running)
        return self.kv_blocks - taken

    def _schedule(self, r, plan, budget, shape, tokens):
        take = min(r.left, budget, plan.max_chunk_tokens or r.left)
        if r not in self.running or take <= 0:
            return 0
        while self.blocks_of(r.computed + take) - self.blocks_of(r.computed) > self._free_blocks(tokens):
            victim = next(v for v in reversed(self.running) if v.request_id not in tokens)
            self._preempt(victim)
            if victim is r:
                return 0
        if r.computed >= r.num_prompt:
            shape.num_decode += 1
            shape.decode_context += r.computed
        else:
            shape.add_chunk(take, r.computed)
        tokens[r.request_id] = take
        return take

    def _preempt(self, r):
        """All that it had is computed anew."""
        self.running.remove(r)
        self.preempted.append(r.request_id)
        r.num_prompt, r.computed, r.dropped = max(r.num_prompt, r.computed), 0, 0
        self.waiting.push(r.request_id, r, r.arrived_s, r.user_priority)

    def _slices(self, plan):
        """One kind of slice; what admits it is the device's own upper estimate."""
        slices, left_s = [], plan.finetune_budget_s
        while self.tasks:
            task_id = next(iter(self.tasks))
            latency_s = self.device.slice_upper_s(SliceKind.BACKWARD_LAYER, SLICE_TOKENS)
            if not plan.is_blocking and len(slices) >= plan.min_slices and latency_s > left_s:
                break
            left_s -= latency_s
            slices.append(SliceTiming(SliceKind.BACKWARD_LAYER, SLICE_TOKENS, latency_s))
            self.slices_run[task_id] += 1
            self.tasks[task_id] -= 1
            if self.tasks[task_id] == 0:
                del self.tasks[task_id]
                self.planner.retrain.note_trained(1)
                if plan.is_blocking:
                    break
        return slices

    def _deliver(self, tokens):
        for r in list(self.running):
            r.computed += tokens.get(r.request_id, 0)
            if r.request_id in tokens and r.computed >= r.num_prompt:
                r.produced += 1
                if r.produced >= r.num_output:
                    self.running.remove(r)
                    self.finished.append(r.request_id)

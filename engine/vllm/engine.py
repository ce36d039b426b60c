"""The engine as the rest of MACE sees it: a vLLM `AsyncLLM` that also takes fine-tune tasks.

Its load and its prompts come from vLLM's output processor, without a call into the engine process. That is the first
place that knows a prompt's token ids (after the chat template), and it keeps the state of every unfinished request.
"""

import asyncio
import copy
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import core.errors
from core.batch import EdgeReport, IterationSample
from core.config import AppArgs, SloConfig
from core.errors import AdapterError, EngineUnavailableError, MaceError, TrainingError
from core.types import FineTuneTask, TaskResult
from engine.training.pair_tokens import Chat
from engine.vllm import compat as vllm_compat
from engine.vllm.arrivals import count_arrivals, offer_count
from engine.vllm.chat_content import make_chat
from engine.vllm.directive import NOTE_KEY, TASK_KEY
from engine.vllm.grammars import GrammarCheck
from engine.vllm.requests import check_requests, watch_failures
from scheduler.priority import BACKGROUND_PRIORITY

logger = logging.getLogger(__name__)

OWN_REQUESTS = ("finetune-", "generate-", "profile-")
"""Prefixes of the ids of requests that no user sent; vLLM's own start with `chatcmpl-`, `cmpl-` or `resp_`."""

AWAY = "the engine died and is being started again; send the request again in a moment"

_SHUTDOWN_S = 2.0
_DISK_PATIENCE_S, _DISK_POLL_S = 60.0, 0.05
_FREE_MEMORY_TTL_S = 60.0
"""A reading of the free memory counts for so long."""
_MAX_LOOKUPS = 256
"""Waiting prompts that are looked up for one reading, 8 us for a thousand tokens; the others count in full."""


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """KV memory and queue of an engine at one moment."""

    free_kv_bytes: float
    """A lower bound: blocks that requests share count once for each, and a waiting prompt counts as if computed."""
    kv_capacity_bytes: float
    kv_bytes_per_token: float
    waiting_tokens: int
    """Prompt tokens still to compute of requests without a first token; an upper bound."""
    num_running: int


class HybridEngine:
    """Serving and fine-tuning on one device. Start with `HybridEngine.start`."""

    def __init__(self, client: Any, args: AppArgs) -> None:
        self.client = client
        """vLLM's `AsyncLLM`."""
        self._grammars: GrammarCheck | None = None
        self._args = args
        self._vllm_config: Any = None
        """vLLM's configuration before the first start wrote into it."""
        self._processes: vllm_compat.CoreProcesses | None = None
        self.is_away = False
        """Set at the death of the engine (`watch_death`); whoever brings it back takes it away again."""
        self.generation = 0
        self._is_restored = True
        """The shadow adapter is what training left, and not the beginning that a new worker makes."""
        self.chat: Chat | None = None
        """How this server makes tokens of chats; None before `build_openai_app`, or if it uses no chat template."""
        self._free_memory = (float("inf"), -math.inf)
        """Free device memory as the worker saw it last, and when (`time.monotonic`)."""
        self.num_failed_requests = 0
        """Requests that the engine ended because the forward pass or the sampling failed on them."""
        self.last_failed_request: str | None = None
        """Id of the newest of them, as the client knows it."""
        self._num_added = 0
        """Requests that entered the engine so far, our own and fine-tune tasks included."""
        self._read: tuple[int, int] | None = None
        """`_num_added` at a reading of an engine at rest, and the number of its next iteration."""
        self._watchers: list[Callable[[str | None, Sequence[int]], None]] = []
        self._watch_requests()

    @classmethod
    async def start(cls, args: AppArgs, model_dir: str, stat_loggers: list[Any] | None = None) -> "HybridEngine":
        """Start the engine processes; returns when the model is loaded."""
        vllm_compat.start_warm_process()
        from vllm.v1.engine.async_llm import AsyncLLM

        engine_args, vllm_config = vllm_compat.make_config(args, model_dir)
        unused_config = copy.deepcopy(vllm_config)
        offer_count()
        client = AsyncLLM.from_vllm_config(
            vllm_config,
            stat_loggers=stat_loggers,
            enable_log_requests=engine_args.enable_log_requests,
            disable_log_stats=engine_args.disable_log_stats,
        )
        engine = cls(client, args)
        engine._vllm_config = unused_config
        engine._processes = vllm_compat.CoreProcesses(client)
        engine._grammars = check_requests(client)
        watch_failures(client, engine._note_failure)
        count_arrivals(client)
        return engine

    @property
    def is_dead(self) -> bool:
        """EngineCore has ended, or has said that it will."""
        return bool(self.client.errored)

    @property
    def free_memory_bytes(self) -> float:
        """Free device memory for training as the last task left it; infinite if that is not known, or not any more.

        Only tasks look, and too little keeps them away: it must not be held against them for ever.
        """
        num_bytes, seen_s = self._free_memory
        return num_bytes if time.monotonic() - seen_s < _FREE_MEMORY_TTL_S else float("inf")

    def has_lost_worker(self) -> bool:
        """A process of the worker has ended, so that EngineCore will. Costs some system calls."""
        return self._processes is not None and self._processes.has_lost_worker()

    def watch_death(self, see: Callable[[], None]) -> None:
        """Call `see` when the engine dies while requests are under way, before they learn of it."""
        tell_requests = self.client.output_processor.propagate_error

        def tell(error: Exception) -> None:
            see()
            tell_requests(error)

        self.client.output_processor.propagate_error = tell

    def lose(self) -> list[str]:
        """Note that the engine is dead: calls that wait for it fail. Returns the ids of the requests under way."""
        self.is_away, self._is_restored = True, False
        vllm_compat.fail_calls(self.client)
        return vllm_compat.running_requests(self.client)

    async def end_processes(self) -> str:
        """End what a dead engine has left; returns how it ended."""
        await asyncio.to_thread(self.client.engine_core.shutdown, 0)
        return "" if self._processes is None else await asyncio.to_thread(self._processes.end)

    async def restart(self) -> None:
        """Start the processes of a dead engine anew; the event loop goes on. `is_away` stays as it is.

        The application and whatever watches this engine stay as well. What the dead engine knew is gone: loaded
        versions (they load by themselves), the live one of the trainer (`set_live`), and the shadow adapter, which must
        be set (`load_training_state` or `load_adapter`) before it is trained or saved.

        Whatever vLLM raises: it did not start, and this may be called again.
        """
        await asyncio.to_thread(vllm_compat.start_core, self.client, copy.deepcopy(self._vllm_config))
        vllm_compat.attach_core(self.client)
        count_arrivals(self.client)
        self._processes = await asyncio.to_thread(vllm_compat.CoreProcesses, self.client)
        self._free_memory, self._read = (float("inf"), -math.inf), None
        self.generation += 1

    async def run_task(self, task: FineTuneTask) -> TaskResult:
        """Run a fine-tune task to its end, slice by slice between inference. Cancelling aborts it.

        TrainingError: the engine ended the task without a result (it is shutting down).
        EngineUnavailableError: the engine died, or has come back and the shadow adapter is not restored yet.
        """
        self._check_restored()
        request_id = f"finetune-{task.task_id}-{uuid.uuid4().hex[:8]}"
        prompt, params = vllm_compat.make_task_request(task.to_wire(), TASK_KEY)
        final = None
        with _deaths_named():
            async for output in self.client.generate(prompt, params, request_id):
                final = output
        if final is None or not final.kv_transfer_params:
            raise TrainingError(f"task {task.task_id} was aborted by the engine")
        result = TaskResult.from_wire({**final.kv_transfer_params, "task_id": task.task_id})
        if result.free_bytes is not None:
            self._free_memory = result.free_bytes, time.monotonic()
        return result

    async def save_adapter(self, directory: Path, base_model: str) -> None:
        """Write the shadow adapter to `directory` in PEFT format; AdapterError if that fails."""
        self._check_restored()
        await self._call_worker("save_adapter", str(directory), base_model)

    async def load_adapter(self, directory: Path | None) -> None:
        """Set the shadow adapter to a saved version, or to its initial state; optimizer state is reset.

        DamagedAdapterError, with nothing changed: the directory is unreadable or does not fit.
        """
        await self._call_worker("load_adapter", directory and str(directory))
        self._is_restored = True

    async def set_live(self, directory: Path | None) -> None:
        """Tell the trainer which version `on_live` evaluations score; None is the bare base model.

        DamagedAdapterError, with nothing changed: the directory is unreadable or does not fit.
        """
        if self._args.training.enabled:
            await self._call_worker("set_live", directory and str(directory))

    async def save_training_state(self, path: Path, progress: dict[str, Any]) -> None:
        """Write shadow adapter, optimizer and progress (JSON values) so that training can go on after a restart.

        Inference goes on while the disk takes it.

        AdapterError: the file cannot be written, or not within a minute; an older one at `path` is intact.
        """
        self._check_restored()
        give_up_s = time.monotonic() + _DISK_PATIENCE_S
        while not await self._call_worker("save_training_state", str(path), progress):
            if time.monotonic() > give_up_s:
                raise AdapterError(f"training state was not written to {path} within {_DISK_PATIENCE_S:.0f} s")
            await asyncio.sleep(_DISK_POLL_S)

    async def load_training_state(self, path: Path) -> dict[str, Any] | None:
        """Restore what `save_training_state` or a step's checkpoint wrote, and return its progress.

        None if there is no file or it is damaged (logged); nothing changed then.
        """
        progress: dict[str, Any] | None = await self._call_worker("load_training_state", str(path))
        self._is_restored = self._is_restored or progress is not None
        return progress

    async def iterations(self, after: int = 0) -> tuple[int, list[IterationSample]]:
        """Measured iterations since number `after`, oldest first, and the number to ask for next.

        The worker keeps the last 4096. `overhead_s` of a sample is that of an iteration before it. The worker is not
        asked again while nothing has entered an engine at rest: vLLM's worker spins for a second after each question.
        An iteration that only ends an aborted request is then told with the next ones.
        """
        num_added, is_at_rest = self._num_added, not self.num_unfinished_requests()
        if is_at_rest and self._read is not None and self._read[0] == num_added and after >= self._read[1]:
            return self._read[1], []
        reply = await self._call_worker("iterations", after)
        self._read = (num_added, reply["next"]) if is_at_rest else None
        return reply["next"], [IterationSample.from_wire(sample) for sample in reply["samples"]]

    async def memory_status(self) -> dict[str, Any]:
        """`engine.vllm.directive.MemoryCounters` as of the last iteration, and what the worker adds.

        With training `base_weight_bytes` of the trainer, and the `shared_bytes` among them, which are vLLM's own
        tensors; on CPU the `heap_*_bytes`.
        """
        return await self._call_worker("memory")

    async def measure_work(self) -> dict[str, Any]:
        """Costs of the trainer's movable work, as in `Profile.work`. Nothing else runs meanwhile, for seconds."""
        return await self._call_worker("measure_work")

    async def tell_edge(self, report: EdgeReport) -> None:
        """Tell the planner what clients saw. Asks nothing of the worker; MaceError: the engine is dead."""
        await vllm_compat.send_note(self.client, {"edge": asdict(report)}, NOTE_KEY)

    async def set_targets(self, slo: SloConfig) -> None:
        """Let the planner plan for other targets from the next iteration on; MaceError: the engine is dead."""
        await vllm_compat.send_note(self.client, {"slo": slo.model_dump(mode="json")}, NOTE_KEY)

    async def pruning_refusal(self) -> str | None:
        """The reason for which `kv_pruning` stays off although the settings ask for it; None if it does not."""
        return await self._call_worker("pruning_refusal")

    async def load_version(self, handle: Any) -> None:
        """Load an adapter version into the inference side ahead of its first request."""
        with _deaths_named():
            await self.client.add_lora(handle)

    async def unload_version(self, handle: Any) -> None:
        """Forget an adapter version on the inference side. None of its requests may be running (`versions_in_use`)."""
        with _deaths_named():
            await self.client.remove_lora(handle.lora_int_id)

    def versions_in_use(self) -> set[str]:
        """Names of the adapter versions of unfinished requests."""
        return vllm_compat.lora_names_in_use(self.client)

    def version_handle(self, name: str, number: int, path: Path) -> Any:
        """vLLM's handle of an adapter version; name and number must be unique to it."""
        return vllm_compat.make_lora_request(name, number, path)

    async def generate(self, handle: Any, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        """Greedy answers of a version (None: the base) to prompts given as token ids, in their order.

        They run together, as class `background`, so that users come first. Each ends with the end-of-turn token, which
        is included, or after `max_tokens`. Cancelling aborts them. TrainingError: vLLM refuses a prompt (empty, or too
        long for the model with `max_tokens`), or fails on it.
        """
        params = vllm_compat.make_answer_params(max_tokens)
        answers = [asyncio.ensure_future(self._answer(handle, prompt, params)) for prompt in prompts]
        try:
            return [ids for ids, _ in await asyncio.gather(*answers)]
        except vllm_compat.refusals() as error:
            raise TrainingError(f"a prompt cannot be answered: {error}") from error
        finally:
            for answer in answers:
                answer.cancel()

    async def prefill(self, handle: Any, prompt: Sequence[int]) -> int:
        """Compute the keys of a prompt, as class `background`, so that the prefix cache has its full blocks.

        Returns the tokens that had been there before. TrainingError: vLLM refuses the prompt (empty, or too long).
        """
        try:
            _, num_cached = await self._answer(handle, prompt, vllm_compat.make_answer_params(1))
        except vllm_compat.refusals() as error:
            raise TrainingError(f"a prompt cannot be computed: {error}") from error
        return num_cached

    async def _answer(self, handle: Any, prompt: Sequence[int], params: Any) -> tuple[list[int], int]:
        """Token ids, and how many of the prompt's came from the cache."""
        request_id = f"generate-{uuid.uuid4().hex}"
        ids: list[int] = []
        num_cached = 0
        outputs = self.client.generate(
            {"prompt_token_ids": list(prompt)},
            params,
            request_id,
            lora_request=handle,
            priority=BACKGROUND_PRIORITY,
        )
        with _deaths_named():
            async for output in outputs:
                ids, num_cached = list(output.outputs[0].token_ids), output.num_cached_tokens or 0
        return ids, num_cached

    async def decode(
        self, prompt_ids: Sequence[int], request_id: str, max_tokens: int, handle: Any = None, priority: int = 0
    ) -> AsyncIterator[list[int]]:
        """Greedy token ids so far, after each token; past end-of-sequence. For measurements and tests."""
        params = vllm_compat.make_sampling_params(max_tokens)
        prompt = {"prompt_token_ids": list(prompt_ids)}
        outputs = self.client.generate(prompt, params, request_id, lora_request=handle, priority=priority)
        with _deaths_named():
            async for output in outputs:
                yield list(output.outputs[0].token_ids)

    async def build_openai_app(self, base_names: list[str]) -> Any:
        """vLLM's own FastAPI application on this engine; the first name is what the base model reports."""
        app = await vllm_compat.build_openai_app(self.client, base_names, self._args.engine.frontend_kwargs)
        texts = self._args.engine.messages_are_text
        self.chat = await asyncio.to_thread(make_chat, app.state.online_renderer, messages_are_text=texts)
        return app

    @property
    def max_model_len(self) -> int:
        """Longest sequence, prompt and answer together, in tokens."""
        return int(self.client.model_config.max_model_len)

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return int(self.client.model_config.get_vocab_size())

    @property
    def kv_cache_tokens(self) -> int | None:
        """Tokens that the KV cache holds; None if vLLM has not said."""
        cache = self.client.vllm_config.cache_config
        return (cache.num_gpu_blocks or 0) * cache.block_size or None

    @property
    def prefix_block_tokens(self) -> int | None:
        """Tokens of a block of the prefix cache; None if it is switched off."""
        cache = self.client.vllm_config.cache_config
        return int(cache.block_size) if cache.enable_prefix_caching else None

    def watch_prompts(self, see: Callable[[str | None, Sequence[int]], None]) -> None:
        """Call `see` with adapter name (None: base) and token ids of each user's request from now on.

        Once for a request, however many answers it wants. Left out are our own, and those whose keys nobody else can
        read: with a cache salt, images or embeddings. The output processor registers a request in one call, on the
        event loop. What `see` raises is logged and keeps nobody from an answer.
        """
        self._watchers.append(see)

    def _watch_requests(self) -> None:
        """Count every request as it enters the engine, and show users' prompts to those who watch them."""
        register = self.client.output_processor.add_request

        def register_and_see(
            request: Any, prompt: Any, parent_req: Any = None, request_index: int = 0, *args: Any, **kwargs: Any
        ) -> None:
            self._num_added += 1
            register(request, prompt, parent_req, request_index, *args, **kwargs)
            if request_index == 0 and self._watchers and _is_sharable(request):
                lora = request.lora_request
                for see in self._watchers:
                    try:
                        see(lora.lora_name if lora is not None else None, request.prompt_token_ids)
                    except Exception:  # an observer must not cost a request
                        logger.exception("a prompt could not be looked at")

        self.client.output_processor.add_request = register_and_see

    def load(self, cached_tokens: Callable[[str | None, Sequence[int]], int] | None = None) -> EngineLoad:
        """KV memory and queue of the engine now. Fine-tune tasks count as requests of one token.

        `cached_tokens` (of adapter name and token ids) takes from waiting prompts what is in the prefix cache: prefixes
        of others, and the chunks that they had already computed themselves. Without it they count in full.
        """
        capacity_tokens = self.client.vllm_config.cache_config.kv_cache_size_tokens
        used_tokens = waiting_tokens = num_running = num_lookups = 0
        for state in list(self.client.output_processor.request_states.values()):
            used_tokens += state.prompt_len
            if state.is_prefilling:
                waiting_tokens += state.prompt_len
                if cached_tokens is not None and state.prompt_token_ids and num_lookups < _MAX_LOOKUPS:
                    num_lookups += 1
                    # The last token is always computed.
                    num_cached = cached_tokens(state.lora_name, state.prompt_token_ids)
                    waiting_tokens -= min(state.prompt_len - 1, num_cached)
            else:
                num_running += 1
                used_tokens += state.detokenizer.num_output_tokens() if state.detokenizer is not None else 0
        token_bytes = self.kv_bytes_per_token
        return EngineLoad(
            free_kv_bytes=max(0, capacity_tokens - used_tokens) * token_bytes,
            kv_capacity_bytes=capacity_tokens * token_bytes,
            kv_bytes_per_token=token_bytes,
            waiting_tokens=waiting_tokens,
            num_running=num_running,
        )

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers, in the number format of the cache."""
        config = self.client.vllm_config
        model, parallel = config.model_config, config.parallel_config
        heads = model.get_num_kv_heads(parallel) * model.get_num_layers(parallel)
        value_bytes = vllm_compat.kv_value_bytes(config.cache_config.cache_dtype, model)
        return int(2 * heads * model.get_head_size() * value_bytes)

    def num_unfinished_requests(self) -> int:
        """Requests in the engine, fine-tune tasks included."""
        return int(self.client.output_processor.get_num_unfinished_requests())

    def shutdown(self) -> None:
        """Stop the engine processes, and kill what is left after `_SHUTDOWN_S`. Calling it again is harmless."""
        if self._grammars is not None:
            self._grammars.close()
        self.client.shutdown(timeout=_SHUTDOWN_S)

    def _note_failure(self, request_id: str) -> None:
        self.num_failed_requests += 1
        self.last_failed_request = request_id

    async def _call_worker(self, method: str, *args: Any) -> Any:
        """Between two iterations, in the worker. Errors of our tree come back as they were raised there."""
        with _deaths_named():
            reply = (await self.client.collective_rpc("mace_call", args=(method, *args)))[0]
        if "error" in reply:
            kind = getattr(core.errors, reply["error"], MaceError)
            raise kind(reply["message"])
        return reply["value"]

    def _check_restored(self) -> None:
        if not self._is_restored:
            raise EngineUnavailableError("the engine died, and the adapter in training is not restored yet")


@contextmanager
def _deaths_named() -> Iterator[None]:
    try:
        yield
    except vllm_compat.engine_dead_error() as error:
        raise EngineUnavailableError(AWAY) from error


def _is_sharable(request: Any) -> bool:
    if request.cache_salt or request.mm_features or request.prompt_embeds is not None:
        return False
    return bool(request.prompt_token_ids) and not (request.external_req_id or "").startswith(OWN_REQUESTS)

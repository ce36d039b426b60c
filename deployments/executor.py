"""Executor: one Serve replica, one device, one engine, one HTTP application.

The replica is its own HTTP ingress: vLLM's OpenAI application with our routes added, so a token makes no extra hop.
Routes come from `attach_routes`, which app.main passes in: deployments know nothing of HTTP schemas.
"""

import asyncio
import logging
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alignment.versions.registry import AdapterRegistry
from core.batch import IterationSample
from core.config import AppArgs
from deployments.control.client import ControlClient
from deployments.learning.learner import Learner
from deployments.learning.training_progress import CheckpointSlot
from deployments.monitors.heartbeat import end_with
from deployments.monitors.iteration_monitor import IterationMonitor
from deployments.monitors.prefix_monitor import PrefixMonitor
from deployments.monitors.profiling import background_profiler, target_warnings, with_profile_path
from deployments.monitors.response_log import ResponseLog
from deployments.pruning_gate import with_pruning_gate
from deployments.publishing.canary import CanaryTrial
from deployments.publishing.versions import AdapterVersions
from deployments.routing.load_meter import LoadMeter
from deployments.routing.prefix_index import PrefixIndex, follow_prefixes
from deployments.routing.router import PREFIXES_KEY
from engine.model_source import base_model_name, resolve_model
from engine.training.pair_tokens import PairTokenizer
from engine.vllm.compat import configure_environment
from engine.vllm.engine import HybridEngine
from engine.vllm.front_end import EngineLoad

logger = logging.getLogger(__name__)

AttachRoutes = Callable[[Any, "Executor"], Any]


class Executor:
    """Serving and learning on one device. Cheap to construct; `__serve_build_asgi_app__` starts everything."""

    def __init__(self, args: dict[str, Any], control: Any, attach_routes: AttachRoutes) -> None:
        self.args = AppArgs.model_validate(args)
        self.executor_id = f"executor-{uuid.uuid4().hex[:8]}"
        self.control = ControlClient(control)
        self.responses = ResponseLog(self.control)
        self._attach_routes = attach_routes
        self._background: list[asyncio.Task[Any]] = []
        self._slot = CheckpointSlot(self.args.state_dir / "training")
        self.engine: HybridEngine
        self.versions: AdapterVersions
        self.learner: Learner | None = None
        self.trial: CanaryTrial
        self.load: LoadMeter
        self.iterations = IterationMonitor()
        self.prefixes: PrefixIndex | None = None
        """What the prefix cache holds; None if the engine's KV events are off."""
        self.sharing = PrefixMonitor()
        self.kv_pruning = ""
        """Why KV pruning is on or off."""
        self.base_model = ""
        """Identity of the served model: a hub id or a directory's name."""
        self.is_ready = False

    async def __serve_build_asgi_app__(self) -> Any:
        """Start the engine, restore the live adapter, begin learning; returns the ASGI application.

        Raises:
            ConfigError: the model cannot be found or the settings do not fit it.
        """
        state_dir = self.args.state_dir
        model_dir = await asyncio.to_thread(resolve_model, self.args.model, state_dir)
        configure_environment(self.args, model_dir)
        self.args, self.kv_pruning = with_pruning_gate(with_profile_path(self.args, model_dir), model_dir)
        for warning in target_warnings(self.args):
            logger.warning(warning)
        self.engine = await HybridEngine.start(self.args, str(model_dir))
        if refusal := await self.engine.pruning_refusal():
            self.kv_pruning = f"off, because this engine cannot drop KV blocks: {refusal}"
        self.load = LoadMeter(
            self.executor_id,
            self.args.slo.ttft_s,
            self._read_load,
            self._read_iterations,
        )
        self.base_model = base_model_name(self.args.model, model_dir)
        registry = await asyncio.to_thread(AdapterRegistry.open, state_dir / "adapters", self.base_model)
        self.versions = AdapterVersions(self.engine, registry, self.args.model.model_id, self.args.versions)
        self.trial = CanaryTrial(self.versions, self.args.versions, self.args.slo, self.control.rating_counts)
        app = await self.engine.build_openai_app(self.versions.base_names)
        await self.versions.attach(app.state.openai_serving_models.lora_requests)
        following = follow_prefixes(self.engine, app, self.args.model.model_id)
        if following is not None:
            self.prefixes, task = following
            self._background.append(task)
        if self.args.training.enabled and self.args.scheduler.policy != "inference_only":
            await self._start_learning(model_dir, registry)
        self._background.append(asyncio.create_task(end_with(self.engine.check_health)))
        self._background.append(asyncio.create_task(self.responses.run()))
        self._background.append(asyncio.create_task(self.trial.run()))
        profiler = background_profiler(self.engine, self.args)
        if profiler is not None:
            self._background.append(asyncio.create_task(profiler.run()))
        self.is_ready = True
        return self._attach_routes(app, self)

    async def check_health(self) -> None:
        """Fails when the engine is dead; Serve then replaces the replica."""
        if self.is_ready:
            await self.engine.check_health()

    async def record_routing_stats(self) -> dict[str, Any]:
        """Serve pulls this for `deployments.routing.router`; empty before the engine serves."""
        if not self.is_ready:
            return {}
        known = {} if self.prefixes is None else {PREFIXES_KEY: await self.prefixes.held_names()}
        return {**asdict(await self.load.measure()), **known}

    def _read_load(self) -> EngineLoad:
        cached_tokens = None if self.prefixes is None else self.prefixes.num_cached
        return self.engine.load(cached_tokens)

    async def status(self) -> dict[str, Any]:
        """What this executor knows of its training and its iterations."""
        learner = {} if self.learner is None else self.learner.status_to_wire()
        scheduler = {"policy": self.args.scheduler.policy, **self.iterations.summary()}
        prefix_cache = self.sharing.summary()
        return {
            "executor_id": self.executor_id,
            "live_version": self.versions.live,
            **learner,
            "scheduler": scheduler,
            "prefix_cache": prefix_cache,
            "memory": {"kv_pruning": self.kv_pruning, **await self.engine.memory_status()},
        }

    async def _read_iterations(self, after: int) -> tuple[int, list[IterationSample]]:
        """The engine's iterations, once for all who want them."""
        following, samples = await self.engine.iterations(after)
        self.iterations.observe(samples)
        self.sharing.observe()
        return following, samples

    def __del__(self) -> None:
        """Serve deletes the replica's object on a graceful stop: end the engine's processes with it."""
        for task in self._background:
            task.cancel()
        if getattr(self, "engine", None) is not None:
            self.engine.shutdown()

    async def _start_learning(self, model_dir: Path, registry: AdapterRegistry) -> None:
        training = self.args.training
        limit = min(training.max_length_tokens, self.engine.max_model_len)
        tokenizer = await asyncio.to_thread(
            PairTokenizer.load, str(model_dir), training.model_copy(update={"max_length_tokens": limit})
        )
        self.learner = Learner(
            executor_id=self.executor_id,
            engine=self.engine,
            control=self.control,
            versions=self.versions,
            registry=registry,
            tokenizer=tokenizer,
            args=self.args,
            base_model=self.base_model,
            checkpoint=await asyncio.to_thread(self._slot.claim),
            current_load=lambda: self.load.latest,
        )
        await self.learner.restore()
        self._background.append(asyncio.create_task(self.learner.run()))

"""Executor: one Serve replica, one device, one engine, one HTTP application.

The replica is its own HTTP ingress: vLLM's OpenAI application with our routes added, so a token makes no extra hop.
Routes come from `attach_routes`, which app.main passes in: deployments know nothing of HTTP schemas.
"""

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alignment.versions.registry import AdapterRegistry
from alignment.versions.serving_state import BASE
from core.config import AppArgs, SloConfig
from core.errors import EngineUnavailableError, MaceError, ProfileError
from deployments.control.client import ControlClient
from deployments.learning.learner import Learner
from deployments.learning.training_progress import claim_checkpoint
from deployments.monitors.edge import EdgeMeter
from deployments.monitors.energy import EnergyMonitor
from deployments.monitors.engine_keeper import EngineKeeper
from deployments.monitors.engine_monitor import EngineMonitor
from deployments.monitors.profiling import (
    profile_at_start,
    target_warnings,
    with_profile_path,
    with_pruning_gate,
    with_trainable_model,
)
from deployments.monitors.response_log import ResponseLog
from deployments.monitors.targets import kept_targets, measure_targets, targets_path
from deployments.publishing.canary import CanaryTrial
from deployments.publishing.versions import AdapterVersions
from deployments.routing.load_meter import LoadMeter
from deployments.routing.prefix_index import PrefixIndex, follow_prefixes
from deployments.routing.router import PREFIXES_KEY
from engine.fingerprint import fingerprint
from engine.model_source import base_model_name, resolve_model
from engine.prefix_cache import KvEventStream
from engine.training.pair_tokens import PairTokenizer
from engine.vllm.compat import configure_environment, gpu_nvml
from engine.vllm.engine import AWAY, HybridEngine
from profiler.energy import find_meter

logger = logging.getLogger(__name__)

_FLUSH_S = 1.0
"""A stop waits for Control as long as this."""

AttachRoutes = Callable[[Any, "Executor"], Any]


class Executor:
    """Serving and learning on one device. Cheap to construct; `__serve_build_asgi_app__` starts everything."""

    def __init__(self, args: AppArgs, control: Any, attach_routes: AttachRoutes) -> None:
        self.args = args
        self.executor_id = f"executor-{uuid.uuid4().hex[:8]}"
        self.control = ControlClient(control)
        self.responses = ResponseLog(self.control.put_responses)
        self._attach_routes = attach_routes
        self._background: list[asyncio.Task[Any]] = []
        self.engine: HybridEngine
        self.keeper: EngineKeeper
        self.versions: AdapterVersions
        self.learner: Learner | None = None
        self.trial: CanaryTrial
        self.load: LoadMeter
        self._reported_state: Any = None
        self._routing_stats: dict[str, Any] = {}
        self.monitor = EngineMonitor()
        self.energy: EnergyMonitor
        self.edge: EdgeMeter
        """What clients see, against the targets."""
        self.slo_warnings: list[str] = []
        """What is wrong with the targets, by the profile."""
        self.prefixes: PrefixIndex | None = None
        """The names of prefixes in the cache; None if the engine's KV events are off."""
        self._kv_events: KvEventStream | None = None
        self._profiling: asyncio.Task[None] | None = None
        self.training_off = ""
        """The reason why this executor does not train; empty if it does."""
        self.kv_pruning = ""
        """The reason why KV pruning is on or off."""
        self.base_model = ""
        """Name of the served model: a hub id or a directory's name."""
        self.fingerprint = ""
        """The served model by its content."""
        self.is_ready = False
        """It was started, and does not end yet; the engine may be away meanwhile (`can_serve`)."""
        self.lose_requests: Callable[[MaceError], None]
        """Ends the HTTP requests that the engine was working on; set by `attach_routes`."""
        self.end_requests: Callable[[], Awaitable[None]]
        """Takes no further HTTP request and ends those under way; set by `attach_routes`."""

    async def __serve_build_asgi_app__(self) -> Any:
        """Start the engine, restore the live adapter, begin learning; returns the ASGI application.

        Raises:
            ConfigError: the model cannot be found or the settings do not fit it.
        """
        state_dir = self.args.state_dir
        model_dir = await asyncio.to_thread(resolve_model, self.args.model, state_dir)
        self.args, self.training_off = with_trainable_model(self.args, model_dir)
        configure_environment(self.args, model_dir)
        self.args, self.kv_pruning = with_pruning_gate(with_profile_path(self.args, model_dir), model_dir)
        kept = self.args.slo.auto and kept_targets(targets_path(self.args))
        if kept:
            self._set_slo(kept.slo)
        self._judge_targets()
        self.engine = await HybridEngine.start(self.args, str(model_dir))
        if refusal := await self.engine.pruning_refusal():
            self.kv_pruning = f"off, because this engine cannot drop KV blocks: {refusal}"
        self.base_model = base_model_name(self.args.model, model_dir)
        self.fingerprint = await asyncio.to_thread(fingerprint, model_dir)
        adapters = state_dir / "adapters"
        registry = await asyncio.to_thread(AdapterRegistry.open, adapters, self.base_model, self.fingerprint)
        self.versions = AdapterVersions(self.engine, registry, self.args.model.model_id, self.args.versions)
        base_names = [self.versions.name_of(BASE), self.args.model.model_id]  # until a version is live, both are
        app = await self.engine.build_openai_app(base_names)
        if self.args.slo.auto and not kept:
            await self._measure_targets(app, base_names[0])
        self.energy = EnergyMonitor(await asyncio.to_thread(lambda: find_meter(gpu_nvml())))
        self.edge = EdgeMeter(self.args.slo, self.engine.tell_edge)
        self.load = LoadMeter(self.executor_id, self.args.slo.ttft_s)
        self.trial = CanaryTrial(self.versions, self.args.versions, self.args.slo, self.control.rating_counts)
        await self.versions.attach(app.state.openai_serving_models.lora_requests)
        self.prefixes, self._kv_events = follow_prefixes(self.engine, lambda: self.versions.live_adapter)
        if not self.training_off:
            self.learner = await self._make_learner(model_dir, registry)
        application = self._attach_routes(app, self)
        self.keeper = EngineKeeper(self.engine, self._lose_engine, self._resume)
        self.engine.watch_death(self.keeper.note_death)
        loops: list[Any] = [self.keeper, self.responses, self.trial, self._kv_events, self.learner]
        self._background = [asyncio.create_task(loop.run()) for loop in loops if loop is not None]
        self._measure_profile()
        self.is_ready = True
        return application

    @property
    def can_serve(self) -> bool:
        """The engine is there, with the live version."""
        return self.is_ready and not self.engine.is_away and not self.engine.is_dead

    async def record_routing_stats(self) -> dict[str, Any]:
        """Serve pulls this for `deployments.routing.router`; empty while no engine serves."""
        if not self.can_serve:
            return {}
        samples = await self.monitor.read(self.engine.iterations)
        self.energy.observe(samples, is_at_rest=not self.engine.num_unfinished_requests())
        num_cached = None if self.prefixes is None else self.prefixes.num_cached
        load = self.load.measure(self.engine.load(num_cached), samples)
        state = (load, self.versions.live, self.prefixes and self.prefixes.num_changes)
        if state != self._reported_state:
            known = {} if self.prefixes is None else {PREFIXES_KEY: await self.prefixes.cached_names()}
            self._reported_state, self._routing_stats = state, {**asdict(load), **known}
        return self._routing_stats

    async def status(self) -> dict[str, Any]:
        """Training, iterations, prefix cache and memory of this executor, as JSON values."""
        slo, corrections = self.args.slo, self.monitor.corrections_to_wire()
        lost_share = corrections["gap_correction_s"] / (self.args.scheduler.slack_fraction * slo.tbt_s)
        return {
            "executor_id": self.executor_id,
            "base_model": {"name": self.base_model, "fingerprint": self.fingerprint},
            "live_version": self.versions.live,
            **({} if self.learner is None else self.learner.status_to_wire()),
            "slo": {
                **slo.model_dump(),
                **self.edge.to_wire(),
                **corrections,
                "warnings": [*self.slo_warnings, *self.edge.warnings(lost_share)],
            },
            "scheduler": {"policy": self.args.scheduler.policy, **self.monitor.iterations_to_wire()},
            "prefix_cache": self.monitor.prefix_cache_to_wire(),
            "energy": self.energy.to_wire(0 if self.learner is None else self.learner.status.pairs),
            "engine": self.keeper.to_wire(),
            "failed_requests": {
                "count": self.engine.num_failed_requests,
                "last_request_id": self.engine.last_failed_request,
            },
            "memory": {"kv_pruning": self.kv_pruning, **await self._memory_status()},
        }

    def _set_slo(self, slo: SloConfig) -> None:
        self.args = self.args.model_copy(update={"slo": slo})

    async def _measure_targets(self, app: Any, model: str) -> None:
        """Set the targets of `slo: auto` once, before anybody is served; without them serving starts all the same."""
        engine, path = self.engine, targets_path(self.args)
        try:
            targets = await measure_targets(app, self.args, model, engine.vocab_size, engine.max_model_len)
            await asyncio.to_thread(targets.save, path)
        except ProfileError as error:
            logger.warning("slo: auto keeps the default targets: %s", error)
            return
        self._set_slo(targets.slo)
        logger.info("slo: auto set ttft_s %g and tbt_s %g, kept in %s", targets.ttft_s, targets.tbt_s, path)
        await engine.set_targets(targets.slo)

    async def _profile(self) -> None:
        await profile_at_start(self.engine, self.args)
        await asyncio.to_thread(self._judge_targets)

    def _judge_targets(self) -> None:
        """Say what the profile, if there is one, says of the targets."""
        known, self.slo_warnings = self.slo_warnings, target_warnings(self.args)
        for warning in self.slo_warnings:
            if warning not in known:
                logger.warning(warning)

    async def stop(self) -> None:
        """End open requests with an error, then the engine: `mace serve` calls this before it ends the replica."""
        if not self.is_ready:
            return
        self.is_ready = False
        await self.end_requests()
        with contextlib.suppress(MaceError, TimeoutError):
            await asyncio.wait_for(self.responses.flush(), _FLUSH_S)
        self._cancel_background()
        await asyncio.to_thread(self.engine.shutdown)

    def __del__(self) -> None:
        """Serve deletes the replica's object on a graceful stop: end the engine's processes with it."""
        self._cancel_background()
        if getattr(self, "engine", None) is not None:
            self.engine.shutdown()

    def _cancel_background(self) -> None:
        for task in (*self._background, self._profiling):
            if task is not None:
                task.cancel()

    def _lose_engine(self) -> None:
        """The engine has died: what it was working on ends, and what is known of it is out of date."""
        self.lose_requests(EngineUnavailableError(AWAY))
        self.monitor.begin_anew()
        self.energy.begin_anew()
        if self._kv_events is not None:
            self._kv_events.begin_anew()
        if self._profiling is not None:
            self._profiling.cancel()

    async def _resume(self) -> None:
        """The engine has come back: give it what it must have before it serves. The learner restores its own state."""
        await self.versions.reload()
        if self.args.slo.auto:
            await self.engine.set_targets(self.args.slo)
        self.engine.is_away = False
        self._measure_profile()

    def _measure_profile(self) -> None:
        self._profiling = asyncio.create_task(self._profile())

    async def _memory_status(self) -> dict[str, Any]:
        try:
            return await self.engine.memory_status()
        except EngineUnavailableError:
            return {}

    async def _make_learner(self, model_dir: Path, registry: AdapterRegistry) -> Learner:
        training = self.args.training
        limit = min(training.max_length_tokens, self.engine.max_model_len)
        tokenizer = await asyncio.to_thread(
            PairTokenizer.load,
            str(model_dir),
            training.model_copy(update={"max_length_tokens": limit}),
            self.base_model,
            self.args.model.dtype,
            chat=self.engine.chat,
            fingerprint=self.fingerprint,
        )
        # The descriptor of the lock is never closed: the file is this replica's until the process ends.
        directory = self.args.state_dir / "training"
        checkpoint, _ = await asyncio.to_thread(claim_checkpoint, directory, self.fingerprint)
        learner = Learner(
            executor_id=self.executor_id,
            engine=self.engine,
            control=self.control,
            versions=self.versions,
            registry=registry,
            tokenizer=tokenizer,
            args=self.args,
            checkpoint=checkpoint,
            current_load=lambda: self.load.latest,
        )
        await learner.restore()
        return learner

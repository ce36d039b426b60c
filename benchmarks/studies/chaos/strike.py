"""Plan which process dies at which moment, and carry it out: wait for the moment, strike, wait until all is back.

The plan is seeded, and such that every kind is hit and meets every moment. A whole server is restarted from here.
"""

import asyncio
import inspect
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil

from app.commands.processes import is_alive
from benchmarks.harness.client import Load
from benchmarks.harness.report import note
from benchmarks.harness.server import ServerError, ServerProcess, title_of
from benchmarks.studies.chaos.load import POST, Ledger, questions
from benchmarks.studies.chaos.watch import Learning, Watch
from deployments.learning.learner import WAITING_PHASE
from deployments.learning.training_progress import TrainingProgress

TARGETS = {
    "executor": ("ServeReplica:mace:Executor",),
    "engine": ("VLLM::EngineCore",),
    "worker": ("VLLM::Worker",),
    "control": ("ServeReplica:mace:Control",),
    "scheduler": ("ray::CentralScheduler",),
    "monitor": ("ray::DriftMonitor",),
    "proxy": ("ray::ProxyActor",),
    "controller": ("ray::ServeController",),
    "head": ("mace serve", "core/src/ray/raylet/raylet", "core/src/ray/gcs/gcs_server"),
}
"""Parts of command lines by kind of kill. On a GPU the worker lives in the EngineCore process: none is found."""

KINDS = tuple(TARGETS)

MOMENTS = {"any": 2.0, "request": 0.1, "feedback": 0.02, "training": 0.3, "publishing": 0.05}
"""The blow falls at most so many seconds after the sign of a moment."""

_SIGN_S = {"training": 20.0, "publishing": 45.0}
"""A sign is waited for at most so many seconds; then the blow falls anyway, and the record says so."""
_FIND_S = 60.0
_GONE_S = 10.0
_ORPHANS_S = 1.5
"""EngineCore and worker end soon after what asked for them, and may write a checkpoint until then."""
_PROBE_S = 0.25
_DISK_PROBE_S = 0.005
_RECOVER_S = 300.0
_TRAIN_S = 180.0
_EXIT_S = 90.0
"""For `mace serve` to end by itself after its Ray head was killed. Ray's own limit for a lost GCS is 60 s."""
_DEAF_S = 20.0
"""A supervisor's liveness probe: a server whose `/ready` fails for so long is ended and started again."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Strike:
    """One kill to be."""

    kind: str
    target: str
    """Part of the victim's command line; `mace serve` is the server process itself."""
    moment: str
    delay_s: float
    """Between the sign of the moment and the blow."""


def make_plan(kills: int, seed: int, kinds: Sequence[str] = KINDS) -> list[Strike]:
    """Every kind once in random order, then again in another order, and so on; targets and moments alike."""
    rng = random.Random(seed)
    order = _rounds(rng, kinds)
    targets = {kind: _rounds(rng, TARGETS[kind]) for kind in kinds}
    moments = {kind: _rounds(rng, tuple(MOMENTS)) for kind in kinds}
    plan: list[Strike] = []
    for kind in (next(order) for _ in range(kills)):
        moment = next(moments[kind])
        plan.append(Strike(kind, next(targets[kind]), moment, rng.uniform(0.0, MOMENTS[moment])))
    return plan


def _rounds(rng: random.Random, values: Sequence[T]) -> Iterator[T]:
    while True:
        yield from rng.sample(values, len(values))


@dataclass(slots=True)
class Kill:
    """One kill and how the system took it. Times in seconds; None: it did not happen within the limits."""

    number: int
    kind: str
    target: str
    moment: str
    """Moment at which the blow fell; `any` if the sign did not come in time."""
    struck_s: float
    """On `time.monotonic()`."""
    recovery_s: float | None = None
    """Until the victim was replaced, `/ready` said so, and chat and feedback sent after that succeeded."""
    training_s: float | None = None
    """Until an optimizer step ended that began after the kill, or in a new process."""
    steps_before: int | None = None
    steps_restored: int | None = None
    steps_lost: int | None = None
    """None where the steps before the kill are not known."""
    exited_by_itself: bool | None = None
    """Kind `head`: whether `mace serve` ended when its head died; None for the other kinds."""
    noticed_s: float | None = None
    """Kind `head`: until the supervisor knew that the server must be started again."""


class Striker:
    """Carries out strikes on one server, under a load that the caller keeps up."""

    def __init__(self, server: ServerProcess, watch: Watch, chat: Load, feedback: Load, ledger: Ledger) -> None:
        self._server = server
        self._watch = watch
        self._chat = chat
        self._feedback = feedback
        self._ledger = ledger
        self._question = next(questions(1.0, seed=0))
        self.restarts = 0
        self.kills: list[Kill] = []
        """Those that were struck, the last one perhaps without an end."""

    async def start_anew(self) -> None:
        """End what is left of the server, start it and wait until it serves.

        Raises:
            ServerError: it ended, or was not ready in time; with the end of its log.
        """
        await asyncio.to_thread(self._server.end, None)
        await asyncio.to_thread(self._watch.versions.look)
        self.restarts += 1
        await self._server.start()

    async def wait_for_training(self) -> None:
        """Wait until the first optimizer step.

        Raises:
            ServerError: none within the limit.
        """
        if not await _until(lambda: self._watch.learning and self._watch.learning["steps"], _TRAIN_S):
            raise ServerError(f"no training within {_TRAIN_S:.0f} s; last seen: {self._watch.learning}")

    async def carry_out(self, strike: Strike) -> Kill:
        """Kill and wait for recovery. What does not recover in time is started anew, and stays on record.

        Raises:
            ServerError: there is nothing to kill, or the server cannot be started again.
        """
        victim = await self._find(strike)
        moment = await self._wait_for(strike)
        if not is_alive(victim):  # it ended while we waited, by itself or with the one before it
            victim = await self._find(strike)
        before = self._watch.learning
        kill = Kill(len(self.kills) + 1, strike.kind, strike.target, moment, time.monotonic())
        self._server.kill(victim)
        self.kills.append(kill)
        await asyncio.to_thread(psutil.wait_procs, [victim], _GONE_S)
        await asyncio.to_thread(self._watch.versions.look)
        if strike.kind == "head":
            await self._wait_for_end(kill)
        await asyncio.sleep(_ORPHANS_S)
        saved = self._watch.checkpoint()
        if strike.kind == "head":
            await self.start_anew()
        if await _until(lambda: self._is_back(strike, victim), _RECOVER_S):
            kill.recovery_s = time.monotonic() - kill.struck_s
        else:
            await self.start_anew()
        await self._wait_for_progress(kill, before, saved)
        return kill

    async def _find(self, strike: Strike) -> psutil.Process:
        server, target = self._server, strike.target
        look = (lambda: server.root) if target == "mace serve" else (lambda: server.find(target))
        if (victim := await _until(look, _FIND_S)) is None:
            titles = "\n".join(f"{process.pid} {title_of(process)[:80]}" for process in server.members())
            raise ServerError(f"the server has no process {target!r}, but\n{titles}\n{server.log_tail()}")
        return victim

    async def _wait_for(self, strike: Strike) -> str:
        """Wait for the moment; returns it, or `any` if its sign did not come."""
        sign: object = True
        if strike.moment == "training":
            sign = await _until(self._is_training, _SIGN_S["training"])
        elif strike.moment == "publishing":
            old, begun = self._watch.commits_begun(), self._watch.commits_begun
            sign = await _until(lambda: begun() - old, _SIGN_S["publishing"], pause_s=_DISK_PROBE_S)
        elif strike.moment == "request":
            self._chat.send(self._question)
        elif strike.moment == "feedback":
            self._feedback.send(POST)
        await asyncio.sleep(strike.delay_s)
        return strike.moment if sign else "any"

    async def _is_training(self) -> bool:
        learning = await self._watch.poll()
        return learning is not None and learning["phase"] == "training"

    async def _wait_for_end(self, kill: Kill) -> None:
        """Wait like a supervisor until the server has ended, or was deaf for too long; then end the rest."""
        heard_s = time.monotonic()
        give_up_s = heard_s + _EXIT_S
        while not self._server.has_exited and time.monotonic() < give_up_s:
            now_s = time.monotonic()
            heard_s = now_s if await asyncio.to_thread(self._server.is_ready) else heard_s
            if now_s - heard_s > _DEAF_S:
                break
            await asyncio.sleep(_PROBE_S)
        kill.exited_by_itself = self._server.has_exited
        kill.noticed_s = time.monotonic() - kill.struck_s
        await asyncio.to_thread(self._server.end, None)

    async def _is_back(self, strike: Strike, victim: psutil.Process) -> bool:
        """Check that the victim is replaced, and that chat and feedback sent from now on succeed."""
        if self._server.has_exited:
            note("mace serve ended; it is started again")
            await self.start_anew()
        if strike.kind != "head" and self._server.find(strike.target, but=victim) is None:
            return False
        if not await asyncio.to_thread(self._server.is_ready):
            return False
        asked_s = time.monotonic()
        if not (await self._chat.ask(self._question)).succeeded:
            return False
        if self._ledger.last_acknowledged_s > asked_s:
            return True
        try:  # a post is repeated until it is acknowledged
            return (await asyncio.wait_for(self._feedback.ask(POST), _RECOVER_S)).succeeded
        except TimeoutError:
            return False

    async def _wait_for_progress(
        self, kill: Kill, before: Learning | None, saved: TrainingProgress | None
    ) -> None:
        """Note what the first status after recovery says was restored, then wait for a step."""
        first: Learning | None = None

        async def has_stepped() -> bool:
            nonlocal first
            if (now := await self._watch.poll()) is None or now["phase"] == WAITING_PHASE:
                return False
            first = first or now
            is_new = before is None or now["started_at"] != before["started_at"]
            return bool(now["steps"] > (0 if is_new else first["steps"]))

        if await _until(has_stepped, _TRAIN_S):
            kill.training_s = time.monotonic() - kill.struck_s
        if first is not None:
            kill.steps_before = _steps_done(before, saved)
            kill.steps_restored = first["restored_steps"]
            kill.steps_lost = count_lost_steps(before, saved, first)


def count_lost_steps(before: Learning | None, saved: TrainingProgress | None, first: Learning) -> int | None:
    """Optimizer steps that were done before a kill and are not in the adapter that training goes on with.

    The same learner as before lost steps if it counts fewer than it did: its engine died, and it went on from the
    checkpoint. A new one may have restored fewer steps than were done; or it knows their number and yet began from the
    live version, without the steps made since.

    Args:
        before: the last status before the kill.
        saved: the checkpoint on disk when the old learner was dead.
        first: the first status after the kill.

    Returns:
        None if nothing is known of the time before the kill.
    """
    if before is not None and first["started_at"] == before["started_at"]:
        return max(0, before["total_steps"] - first["total_steps"])
    done = _steps_done(before, saved)
    if done is None:
        return None
    missing = max(0, done - first["restored_steps"])
    if saved is None or first["last_decision"] is not None or first["live_version"] != saved.base:
        return missing  # no checkpoint; or a candidate was judged, and steps_since_candidate began anew
    return max(missing, saved.steps_since_candidate + first["steps"] - first["steps_since_candidate"])


def _steps_done(before: Learning | None, saved: TrainingProgress | None) -> int | None:
    """Steps at the time of the kill: as the learner last said, or as the checkpoint says if that is more."""
    said = [] if before is None else [before["total_steps"]]
    written = [] if saved is None else [saved.total_steps]
    return max(said + written, default=None)


async def _until(condition: Callable[[], Any], limit_s: float, *, pause_s: float = _PROBE_S) -> Any:
    """Ask again and again until a condition (a function or coroutine function) holds; returns its last value."""
    give_up_s = time.monotonic() + limit_s
    while True:
        if inspect.isawaitable(value := condition()):
            value = await value
        if value or time.monotonic() > give_up_s:
            return value
        await asyncio.sleep(pause_s)

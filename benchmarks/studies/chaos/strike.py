"""One kill: wait for the moment, strike, wait until everything is back. A whole server is restarted from here."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import psutil

from benchmarks.harness.server import ServerError, ServerProcess, is_alive, title_of
from benchmarks.studies.chaos.load import ChatLoad, FeedbackLoad
from benchmarks.studies.chaos.plan import Kind, Moment, Strike
from benchmarks.studies.chaos.watch import Learning, SavedTraining, Watch

Say = Callable[[str], None]

_FIND_S = 60.0
_GONE_S = 10.0
_ORPHANS_S = 1.5
"""EngineCore and worker end within half a second of their parent each, and may write a checkpoint until then."""
_PROBE_S = 0.25
_DISK_PROBE_S = 0.005
_MOMENT_S: dict[Moment, float] = {"training": 20.0, "publishing": 45.0}
"""How long a sign is waited for; then the blow falls anyway, and the record says so."""
_EXIT_S = 90.0
"""For `mace serve` to end by itself after its Ray head was killed. Ray's own limit for a lost GCS is 60 s."""
_DEAF_S = 20.0
"""A supervisor's liveness probe: a server whose `/ready` fails for so long is ended and started again."""


@dataclass(slots=True)
class Kill:
    """One kill and how the system took it. Times in seconds; None: it did not happen within the limits."""

    number: int
    kind: Kind
    target: str
    moment: str
    """As it happened; `any` if the sign did not come in time."""
    struck_s: float
    """On `time.monotonic()`."""
    recovery_s: float | None = None
    """Until the victim was replaced, `/ready` said so, and chat and feedback sent after that succeeded."""
    training_s: float | None = None
    """Until an optimizer step ended that began after the kill, or in a new process."""
    steps_before: int | None = None
    steps_restored: int | None = None
    steps_lost: int | None = None
    """None where the server tells no total of steps."""
    exited_by_itself: bool | None = None
    """Kind `head`: whether `mace serve` ended when its head died; None for the other kinds."""
    noticed_s: float | None = None
    """Kind `head`: until the supervisor knew that the server must be started again."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long things may take, in seconds."""

    start_s: float = 400.0
    recover_s: float = 300.0
    train_s: float = 180.0


class Striker:
    """Carries out strikes on one server."""

    def __init__(
        self, server: ServerProcess, watch: Watch, chat: ChatLoad, feedback: FeedbackLoad, limits: Limits, say: Say
    ) -> None:
        self._server = server
        self._watch = watch
        self._chat = chat
        self._feedback = feedback
        self._limits = limits
        self._say = say
        self.restarts = 0
        self.kills: list[Kill] = []
        """Those that were struck, the last one perhaps without an end."""

    async def start(self) -> None:
        """Start the server and wait until it serves.

        Raises:
            ServerError: it ended, or was not ready in time; with the end of its log.
        """
        self._server.launch()
        give_up_s = time.monotonic() + self._limits.start_s
        while not await self._watch.is_ready():
            self._server.check_start(give_up_s)
            await asyncio.sleep(_PROBE_S)

    async def wait_for_training(self) -> None:
        """Until the first optimizer step.

        Raises:
            ServerError: none within the limit.
        """
        if not await _until(self._has_trained, self._limits.train_s):
            raise ServerError(
                f"no training within {self._limits.train_s:.0f} s; last seen: {self._watch.learning}"
            )

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
        await self._wait_for_recovery(kill, strike, victim)
        if kill.recovery_s is None:
            await self.start_anew()
        await self._wait_for_progress(kill, before, saved)
        return kill

    async def _find(self, strike: Strike) -> psutil.Process:
        found: list[psutil.Process] = []

        async def look() -> bool:
            one = self._server.root if strike.target == "mace serve" else self._server.find(strike.target)
            found.extend([one] if one is not None else [])
            return bool(found)

        if not await _until(look, _FIND_S):
            titles = "\n".join(f"{process.pid} {title_of(process)[:80]}" for process in self._server.members())
            raise ServerError(
                f"the server has no process {strike.target!r}, but\n{titles}\n{self._server.log_tail()}"
            )
        return found[0]

    async def _wait_for(self, strike: Strike) -> str:
        """Returns the moment as it came."""
        signs: dict[Moment, Callable[[], Awaitable[bool]]] = {
            "training": self._is_training,
            "publishing": self._new_commit(self._watch.commits_begun()),
        }
        came = True
        if strike.moment in signs:
            probe_s = _DISK_PROBE_S if strike.moment == "publishing" else _PROBE_S
            came = await _until(signs[strike.moment], _MOMENT_S[strike.moment], probe_s)
        elif strike.moment == "request":
            self._chat.send()
        elif strike.moment == "feedback":
            self._feedback.send()
        await asyncio.sleep(strike.delay_s)
        return strike.moment if came else "any"

    async def _is_training(self) -> bool:
        learning = await self._watch.poll()
        return learning is not None and learning.phase == "training"

    def _new_commit(self, old: set[str]) -> Callable[[], Awaitable[bool]]:
        async def has_begun() -> bool:
            return bool(self._watch.commits_begun() - old)

        return has_begun

    async def _wait_for_end(self, kill: Kill) -> None:
        """As a supervisor would: until the server has ended, or was deaf for too long; then end the rest."""
        heard_s = time.monotonic()
        give_up_s = heard_s + _EXIT_S
        while not self._server.has_exited and time.monotonic() < give_up_s:
            now_s = time.monotonic()
            heard_s = now_s if await self._watch.is_ready() else heard_s
            if now_s - heard_s > _DEAF_S:
                break
            await asyncio.sleep(_PROBE_S)
        kill.exited_by_itself = self._server.has_exited
        kill.noticed_s = time.monotonic() - kill.struck_s
        await asyncio.to_thread(self._server.end, None)

    async def start_anew(self) -> None:
        """End what is left of the server, and `start`."""
        await asyncio.to_thread(self._server.end, None)
        await asyncio.to_thread(self._watch.versions.look)
        self.restarts += 1
        await self.start()

    async def _wait_for_recovery(self, kill: Kill, strike: Strike, victim: psutil.Process) -> None:
        async def is_back() -> bool:
            if self._server.has_exited:
                self._say("mace serve ended; it is started again")
                await self.start_anew()
            if strike.kind != "head" and self._server.find(strike.target, but=victim) is None:
                return False
            if not await self._watch.is_ready():
                return False
            asked_s = time.monotonic()
            if not (await self._chat.ask_once()).succeeded:
                return False
            return self._feedback.last_acknowledged_s > asked_s or await self._acknowledges()

        if await _until(is_back, self._limits.recover_s):
            kill.recovery_s = time.monotonic() - kill.struck_s

    async def _acknowledges(self) -> bool:
        """Whether the next feedback that is sent comes through; it is repeated until then, within the limit."""
        try:
            await asyncio.wait_for(self._feedback.post_next(), self._limits.recover_s)
        except TimeoutError:
            return False
        return True

    async def _wait_for_progress(self, kill: Kill, before: Learning | None, saved: SavedTraining | None) -> None:
        """Note what the first status after recovery says was restored, then wait for a step."""
        first: list[Learning] = []

        async def has_stepped() -> bool:
            now = await self._watch.poll()
            if now is None:
                return False
            first.extend([] if first else [now])
            is_new = before is None or now.started_at != before.started_at
            return now.steps > 0 if is_new else now.steps > first[0].steps

        if await _until(has_stepped, self._limits.train_s):
            kill.training_s = time.monotonic() - kill.struck_s
        if first:
            kill.steps_before = _steps_done(before, saved)
            kill.steps_restored = first[0].restored_steps
            kill.steps_lost = count_lost_steps(before, saved, first[0])

    async def _has_trained(self) -> bool:
        return self._watch.learning is not None and self._watch.learning.steps > 0


def count_lost_steps(before: Learning | None, saved: SavedTraining | None, first: Learning) -> int | None:
    """Optimizer steps that were done before a kill and are not in the adapter that training goes on with.

    The same learner as before has lost nothing. A new one may have restored fewer steps than were done; or it knows
    their number and yet began from the live version, without the steps made since. None: the server does not tell.

    Args:
        before: the last status before the kill.
        saved: the checkpoint on disk when the old learner was dead.
        first: the first status after the kill.
    """
    if before is not None and first.started_at == before.started_at:
        return 0
    done = _steps_done(before, saved)
    if first.restored_steps is None or done is None:
        return None
    missing = max(0, done - first.restored_steps)
    if saved is None or saved.steps_since_candidate is None or first.steps_since_candidate is None:
        return missing
    if first.has_decided or first.live != saved.base:  # a candidate was judged: that counter began anew
        return missing
    return max(missing, saved.steps_since_candidate + first.steps - first.steps_since_candidate)


def _steps_done(before: Learning | None, saved: SavedTraining | None) -> int | None:
    """At the time of the kill: what the learner last said, or what the checkpoint says if that is more."""
    said = None if before is None else before.total_steps
    written = None if saved is None else saved.total_steps
    return max((value for value in (said, written) if value is not None), default=None)


async def _until(condition: Callable[[], Awaitable[bool]], limit_s: float, pause_s: float = _PROBE_S) -> bool:
    give_up_s = time.monotonic() + limit_s
    while not await condition():
        if time.monotonic() > give_up_s:
            return False
        await asyncio.sleep(pause_s)
    return True

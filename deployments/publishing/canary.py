"""The canary on an executor: who gets it, what is seen of it, and the verdict carried out.

A version on trial answers a share of the requests for `<name>`. Which ones is drawn for each request, or once for each
user who gives a name, by a hash that changes from canary to canary. Requests on either version are timed only while
there is a trial. Ratings come from the feedback store and are those of all executors; timings are this one's.
"""

import asyncio
import hashlib
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from alignment.versions.canary import Arm, Share, Verdict, judge_canary
from alignment.versions.serving_state import BASE
from core.alignment_config import VersionsConfig
from core.config import SloConfig
from core.errors import MaceError
from deployments.publishing.versions import AdapterVersions

logger = logging.getLogger(__name__)

REFRESH_INTERVAL_S = 1.0
_REFRESHES_PER_ROUND = 5
"""Verdict and retention come around every so many refreshes."""

RatingCounts = dict[str | None, tuple[int, int]]
"""Thumbs up and down by version; None is the base."""


@dataclass(eq=False, repr=False)
class CanaryTrial:
    """The trial on one executor, idle without a canary. `run` looks after versions, trial and retention."""

    versions: AdapterVersions
    config: VersionsConfig
    slo: SloConfig
    read_ratings: Callable[[float], Awaitable[RatingCounts]]
    """Gives the counts since a time in Unix seconds."""
    clock: Callable[[], float] = time.time
    last_verdict: Verdict | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._seen: dict[str, Share] = {}
        """Requests within their SLO by version, of the trial `_seen_for`."""
        self._seen_for: tuple[str, str] | None = None

    @property
    def is_running(self) -> bool:
        """Is a version on trial?"""
        return self.versions.canary is not None

    def draw(self, user: str | None) -> tuple[str, str | None]:
        """Decide which version answers a request for `<name>`; with the model to ask for, None: as the client asked."""
        canary = self.versions.canary
        if canary is not None:
            point = random.random() if user is None else _point_of(f"{canary} {user}")
            if point < self.config.canary_share:
                return canary, self.versions.name_of(canary)
        return self.versions.live, None

    def observe(self, version: str, *, within_slo: bool) -> None:
        """Count a request that was drawn and has ended; those that the client gave up or got wrong do not count."""
        self._begin_if_new()
        if self._seen_for is not None and version in self._seen_for:
            share = self._seen.get(version, Share())
            self._seen[version] = Share(share.hits + within_slo, share.total + 1)

    def is_within_slo(self, ttft_s: float, mean_tbt_s: float) -> bool:
        """Did a request meet the targets? Its mean time between tokens stands for all of them."""
        return ttft_s <= self.slo.ttft_s and mean_tbt_s <= self.slo.tbt_s

    def is_within_slo_in_all(self, total_s: float, num_tokens: int) -> bool:
        """Did an answer in one piece meet them? Its first token in time, and the others at the target's pace."""
        return total_s <= self.slo.ttft_s + self.slo.tbt_s * max(0, num_tokens - 1)

    async def judge(self) -> Verdict | None:
        """Look at the trial and end it if that is due; None if there is none. After an AdapterError it goes on."""
        canary, since_s = self.versions.canary, await self.versions.canary_since_s()
        if canary is None or since_s is None:
            self.last_verdict = None
            return None
        self._begin_if_new()
        self.last_verdict = verdict = await self._look(canary, since_s)
        if verdict.action == "promote":
            await self.versions.promote_canary(canary, verdict.reason)
        elif verdict.action == "roll_back":
            await self.versions.roll_back_canary(canary, verdict.reason)
        if verdict.action != "wait":
            logger.info("canary %s: %s: %s", canary, verdict.action, verdict.reason)
        return verdict

    def to_wire(self) -> dict[str, Any] | None:
        """The trial in progress as JSON values; None if there is none."""
        if not self.is_running:
            return None
        state = self.last_verdict.reason if self.last_verdict else "has just begun"
        return {"version": self.versions.canary, "share": self.config.canary_share, "state": state}

    async def run(self) -> None:
        """Follow the registry, judge the canary, retire and delete old versions, for ever."""
        turn = 0
        while True:
            try:
                await self.versions.refresh()
                if turn % _REFRESHES_PER_ROUND == 0:
                    await self.judge()
                    await self.versions.retire_old()
            except MaceError as error:
                logger.warning("versions cannot be looked after: %s", error)
            except Exception:  # an error of vLLM or the disk must not end retention and trials
                logger.exception("versions cannot be looked after")
            turn += 1
            await asyncio.sleep(REFRESH_INTERVAL_S)

    async def _look(self, canary: str, since_s: float) -> Verdict:
        if self.config.canary_share == 0:
            return Verdict("promote", "versions.canary_share is 0 now, and it passed the gate")
        live = self.versions.live
        try:
            ratings = await self.read_ratings(since_s)
        except MaceError as error:  # without ratings it may be rolled back for its speed, not promoted
            logger.info("the canary is judged without ratings: %s", error)
            verdict = judge_canary(self._arm(canary, {}), self._arm(live, {}), 0.0, self.config)
            return verdict if verdict.action == "roll_back" else Verdict("wait", "ratings cannot be read now")
        elapsed_s = self.clock() - since_s
        return judge_canary(self._arm(canary, ratings), self._arm(live, ratings), elapsed_s, self.config)

    def _arm(self, version: str, ratings: RatingCounts) -> Arm:
        up, down = ratings.get(None if version == BASE else version, (0, 0))
        return Arm(Share(up, up + down), self._seen.get(version, Share()))

    def _begin_if_new(self) -> None:
        canary = self.versions.canary
        trial = None if canary is None else (canary, self.versions.live)
        if trial != self._seen_for:
            self._seen_for = trial
            self._seen.clear()


def _point_of(key: str) -> float:
    """Map a key to a point in [0, 1) that is the same in every process."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64

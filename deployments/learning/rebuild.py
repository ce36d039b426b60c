"""Rebuilding: learning anew from the base model, from all stored feedback, while the live version keeps serving.

The first pass trains every pair once, in order of arrival, so that what users said last has the last word. Each
later pass trains the pairs that still had a high loss when they were trained last, behind the last change of
preferences, until there are none or `training.max_epochs` is reached. Then the result is offered to the gate like any
candidate. How far it is stands in the checkpoint, so a restart goes on from the last step.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from math import inf
from typing import Any

from core.config import AppArgs
from core.ports import ControlPort
from core.types import PairScore
from core.wire import Rebuild, TrainingPair

MAX_ATTEMPTS = 3
"""A batch that fails as often is left out of its pass."""
_CHUNK = 256
"""Pairs that a later pass looks at in one go; most of them are learnt already."""


@dataclass(eq=False, repr=False)
class Rebuilder:
    """Chooses the pairs of a rebuild and tells Control how far it is."""

    executor_id: str
    control: ControlPort
    args: AppArgs
    asked: Rebuild | None = None
    """A rebuild that is to begin with the next turn of the learner."""
    _losses: dict[str, float] = field(default_factory=dict)
    """Loss of each pair in the step that trained it last (nats). A restart forgets them: a pass then trains all."""

    def begin(self) -> None:
        """Forget the rebuild before."""
        self.asked = None
        self._losses.clear()

    async def next_pairs(self, rebuild: Rebuild) -> tuple[list[TrainingPair], Rebuild | None]:
        """The next step's pairs, and how far the rebuild is once it is done; no pairs and None: all is learnt."""
        training = self.args.training
        while True:
            chosen: list[TrainingPair] = []
            after = rebuild.after_seq
            while len(chosen) < training.pairs_per_step:
                room = training.pairs_per_step - len(chosen)
                limit = _CHUNK if rebuild.passes else room
                found = await self.control.relearning_pairs(after, rebuild.until_seq, limit)
                for seq, pair in found:
                    if len(chosen) == training.pairs_per_step:
                        break
                    after = seq
                    if not rebuild.passes or self._losses.get(pair.pair_id, inf) >= self.args.drift.max_loss:
                        chosen.append(pair)
                if not found:
                    break
            if chosen:
                return chosen, replace(rebuild, after_seq=after, num_taken=rebuild.num_taken + len(chosen))
            was_idle = rebuild.passes > 0 and not rebuild.num_taken
            rebuild = replace(rebuild, after_seq=rebuild.since_seq, passes=rebuild.passes + 1, num_taken=0)
            if was_idle or rebuild.passes >= training.max_epochs or not self._is_any_hard():
                return [], None

    def take_scores(self, scores: Iterable[PairScore]) -> None:
        """Remember what a step found of its pairs."""
        self._losses |= {score.pair_id: score.loss for score in scores}

    async def tell(self, rebuild: Rebuild, state: str = "running", **more: Any) -> None:
        """Report to Control: `running`, or `published`, `refused`, `held` or `failed`."""
        await self.control.note_rebuild(
            {**asdict(rebuild), "state": state, "executor_id": self.executor_id, **more}
        )

    def _is_any_hard(self) -> bool:
        return any(loss >= self.args.drift.max_loss for loss in self._losses.values())

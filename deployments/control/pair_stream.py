"""PairStream: which pairs are scored next, and which are trained.

New pairs are scored first; then each earns training slots at the retrain rate. A slot goes to a new pair, to one that
the live adapter still gets wrong, or to a replayed one, in the shares of the configuration. So a quiet stream costs
next to nothing, a change of taste calls for as much training as it needs, and fixing today does not forget yesterday.
"""

from collections.abc import Collection
from typing import Protocol

from alignment.store.feedback_store import FeedbackStore
from alignment.store.pair_rows import PENDING, StoredPair
from alignment.store.pair_sampling import NewOrder
from core.config import AppArgs
from core.wire import ROLE_SHARES, PairRole, TrainingPair
from deployments.control.score_judge import ScoreJudge, stored_version

_QUEUE_AHEAD_BATCHES = 4
"""Pairs kept queued ahead of training, in batches: enough to have a choice, few enough to follow new feedback."""
_SCORING_BACKLOG_PAIRS = 256
"""After a large import the newest so many are scored first."""


class FineTuneQueue(Protocol):
    """What the monitor needs of the CentralScheduler."""

    def known_pair_ids(self) -> dict[str, list[str]]:
        """Ids that are queued or leased, under `train` and `score`."""
        ...

    def enqueue(self, pairs: list[TrainingPair]) -> None:
        """Add pairs to the queue."""
        ...

    def withdraw(self, pair_ids: list[str]) -> int:
        """Take pairs out of the queue; returns how many were in it."""
        ...

    def enqueue_scoring(self, pairs: list[TrainingPair]) -> None:
        """Add pairs to be scored."""
        ...

    def set_gamma(self, gamma: float) -> None:
        """Weight of the loss in the priority from now on."""
        ...


class PairStream:
    """Fills the queue from the store. Not thread-safe; one thread calls `stream_once`."""

    def __init__(self, config: AppArgs, store: FeedbackStore, judge: ScoreJudge, queue: FineTuneQueue) -> None:
        self._config = config
        self._store = store
        self._judge = judge
        self._queue = queue
        self._draw = 0
        self._followed_change_seq = judge.last_change_seq

    def stream_once(self) -> int:
        """Queue what should be scored and trained; returns how many pairs that were."""
        self._queue.set_gamma(self._judge.gamma)  # each time: the queue may have been restarted
        known = self._queue.known_pair_ids()
        if self._judge.last_change_seq != self._followed_change_seq:
            self._drop_old_taste(known["train"])
            known = self._queue.known_pair_ids()
        num_to_score = self._stream_scoring(known["score"])
        is_busy = bool(known["train"] or known["score"] or num_to_score)
        return num_to_score + self._stream_training(known["train"], is_busy=is_busy)

    def _stream_scoring(self, known: Collection[str]) -> int:
        """New pairs in order of arrival, for drift is a matter of order; then what another version has scored."""
        room = self._ahead - len(known)
        if room <= 0:
            return 0
        newest = self._store.unscored_pairs(_SCORING_BACKLOG_PAIRS, exclude=known)
        is_flooded = len(newest) == _SCORING_BACKLOG_PAIRS  # more may wait behind: who speaks now comes first
        pairs = (newest[:room] if is_flooded else newest[-room:])[::-1]
        if len(pairs) < room:
            again = [pair_id for pair_id in self._judge.unscored_ids if pair_id not in known]
            found = [pair for pair in self._store.find_pairs(again) if pair.state == PENDING]
            self._judge.forget(
                set(again) - {pair.pair_id for pair in found}
            )  # parked or deleted: never scored again
            pairs += found[: room - len(pairs)]
        if pairs:
            self._queue.enqueue_scoring([training_pair(pair) for pair in pairs])
        return len(pairs)

    def _drop_old_taste(self, queued: Collection[str]) -> None:
        """Preferences changed: what was queued before would teach the old ones, and its slots are needed now."""
        change_seq = self._judge.last_change_seq
        old = [pair.pair_id for pair in self._store.find_pairs(queued) if pair.seq <= change_seq]
        self._judge.give_back(self._queue.withdraw(old))
        self._followed_change_seq = change_seq

    def _stream_training(self, known: Collection[str], *, is_busy: bool) -> int:
        room = self._ahead - len(known)
        if room <= 0:
            return 0
        if (
            not is_busy and self._judge.is_complaining
        ):  # everything was tried, scored and published, and is not enough
            self._judge.top_up(self._config.drift.window)
        granted = self._judge.grant(room)
        if granted <= 0:
            return 0
        chosen = self._choose(granted, set(known))
        self._judge.give_back(granted - len(chosen))
        if chosen:
            self._queue.enqueue(chosen)
        elif not is_busy and self._judge.is_complaining:
            return self._rescore(room)
        return len(chosen)

    def _rescore(self, limit: int) -> int:
        """Pairs whose scores are not the live version's: a refused candidate may have learnt what that has not."""
        stale = self._store.stale_pairs(limit, stored_version(self._judge.live_version))
        if stale:
            self._queue.enqueue_scoring([training_pair(pair) for pair in stale])
        return len(stale)

    def _choose(self, limit: int, exclude: set[str]) -> list[TrainingPair]:
        """Up to `limit` pairs of all roles. Replay keeps its share of what is trained: alone it would teach nothing."""
        training = self._config.training
        order: NewOrder = "newest" if self._judge.is_alarmed else "loss"
        fresh = self._store.new_pairs(limit, exclude, order, self._judge.last_change_seq)
        exclude = exclude | {pair.pair_id for pair in fresh}
        hard = self._store.hard_pairs(
            limit,
            training.max_epochs,
            exclude=exclude,
            min_loss=self._judge.min_hard_loss,
            since_seq=self._judge.last_change_seq,
        )
        replay = self._replayed(limit, len(fresh) + len(hard), exclude | {pair.pair_id for pair in hard})
        room = limit - len(replay)
        of_new = ROLE_SHARES["new"] / (ROLE_SHARES["new"] + ROLE_SHARES["hard"])
        num_new = min(len(fresh), max(room - len(hard), round(room * of_new)))
        roles: tuple[tuple[list[StoredPair], PairRole], ...] = (
            (fresh[:num_new], "new"),
            (hard[: room - num_new], "hard"),
            (replay, "replay"),
        )
        return [training_pair(pair, role) for pairs, role in roles for pair in pairs]

    def _replayed(self, limit: int, num_others: int, exclude: set[str]) -> list[StoredPair]:
        """Pairs trained before, of the present preferences: what users changed their minds about is not kept alive."""
        training = self._config.training
        share = ROLE_SHARES["replay"] / sum(ROLE_SHARES.values())
        number = round(min(limit * share, num_others * share / max(1.0 - share, 1e-9)))
        if number == 0:
            return []
        self._draw += 1
        return self._store.replay_pairs(
            number,
            exclude=exclude,
            seed=training.seed + self._draw,
            max_epochs=training.max_epochs,
            since_seq=self._judge.last_change_seq,
        )

    @property
    def _ahead(self) -> int:
        return _QUEUE_AHEAD_BATCHES * self._config.training.pairs_per_step


def training_pair(pair: StoredPair, role: PairRole = "new") -> TrainingPair:
    """A stored pair as executors get it: weighted by its user's word and its quality."""
    return TrainingPair(
        pair_id=pair.pair_id,
        prompt=pair.prompt,
        chosen=pair.chosen,
        rejected=pair.rejected,
        dpo_loss=pair.last_loss,
        times_trained=pair.times_trained,
        weight=pair.weight * pair.quality,
        reference=pair.reference,
        role=role,
    )

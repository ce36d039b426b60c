"""PairStream: chooses the pairs that are scored and trained next.

New pairs are scored first; then each earns training slots at the retrain rate. A slot goes to a new pair, to one that
the live adapter still gets wrong, or to a replayed one, in fixed shares. So a quiet stream costs next to nothing, a
change of taste calls for as much training as it needs, and fixing today does not forget yesterday.

What one lesson taught holds for pairs that were not in it. So when another version goes live nothing is trained on that
only an older one got wrong: such pairs are scored again first, unless the live version gets the newest ones wrong too.
"""

from collections.abc import Collection

from alignment.store.feedback_store import FeedbackStore
from alignment.store.pair_sampling import NewOrder
from alignment.store.pairs import PENDING, StoredPair
from core.config import AppArgs
from core.wire import ROLE_SHARES, PairRole, TrainingPair
from deployments.control.central_scheduler import CentralScheduler
from deployments.control.score_judge import Appetite, ScoreJudge, stored_version

_QUEUE_AHEAD_BATCHES = 4
"""Pairs kept queued ahead of training, in batches: enough to have a choice, few enough to follow new feedback."""
_SCORING_BACKLOG_PAIRS = 256
"""The newest pairs are scored first, so many of them, after a large import."""


class PairStream:
    """Fills the queue (the scheduler, or a handle with its methods) from the store. One thread calls `stream_once`."""

    def __init__(self, config: AppArgs, store: FeedbackStore, judge: ScoreJudge, queue: CentralScheduler) -> None:
        self._config = config
        self.store = store
        self.judge = judge
        self._queue = queue
        self._draw = 0
        wanted = judge.appetite()
        self._followed_change_seq, self._followed_version = wanted.last_change_seq, wanted.live_version
        self._ahead = _QUEUE_AHEAD_BATCHES * config.training.pairs_per_step

    def stream_once(self) -> int:
        """Queue what should be scored and trained; returns how many pairs that were."""
        wanted = self.judge.appetite()
        self._queue.set_gamma(wanted.gamma)  # each time: the queue may have been restarted
        known = self._queue.known_pair_ids()
        if wanted.last_change_seq != self._followed_change_seq:
            self._drop_old_taste(known["train"], wanted.last_change_seq)
            known = self._queue.known_pair_ids()
        if wanted.live_version != self._followed_version:
            if _looks_again(wanted):
                self.judge.credit.refund(self._queue.withdraw(sorted(known["train"])))
                known = self._queue.known_pair_ids()
            self._followed_version = wanted.live_version
        num_to_score = self._stream_scoring(known["score"], wanted)
        is_busy = bool(known["train"] or known["score"] or num_to_score)
        return num_to_score + self._stream_training(known["train"], wanted, is_busy=is_busy)

    def _drop_old_taste(self, queued: Collection[str], change_seq: int) -> None:
        """Take out of the queue what would teach the preferences before the change; its slots are needed now."""
        old = [pair.pair_id for pair in self.store.pairs.find(queued) if pair.seq <= change_seq]
        self.judge.credit.refund(self._queue.withdraw(old))
        self._followed_change_seq = change_seq

    def _stream_scoring(self, known: Collection[str], wanted: Appetite) -> int:
        """Queue new pairs in order of arrival, for drift is a matter of order; then what another version has scored."""
        room = self._ahead - len(known)
        if room <= 0:
            return 0
        newest = self.store.sampling.unscored_pairs(_SCORING_BACKLOG_PAIRS, exclude=known)
        is_flooded = len(newest) == _SCORING_BACKLOG_PAIRS  # more may wait behind: who speaks now comes first
        pairs = (newest[:room] if is_flooded else newest[-room:])[::-1]
        if len(pairs) < room:
            again = set(wanted.unscored_ids).difference(known)
            found = [pair for pair in self.store.pairs.find(again) if pair.state == PENDING]
            self.judge.forget(again.difference(pair.pair_id for pair in found))  # parked or deleted for good
            pairs += found[: room - len(pairs)]
        return self._enqueue_scoring(pairs)

    def _enqueue_scoring(self, pairs: list[StoredPair]) -> int:
        if pairs:
            self._queue.enqueue_scoring([training_pair(pair) for pair in pairs])
        return len(pairs)

    def _stream_training(self, known: Collection[str], wanted: Appetite, *, is_busy: bool) -> int:
        room, credit = self._ahead - len(known), self.judge.credit
        if room <= 0:
            return 0
        was_not_enough = wanted.is_complaining and not is_busy  # all was tried, scored and published
        if was_not_enough:
            credit.top_up(self._config.drift.window)
        granted = credit.spend(room)
        if granted <= 0:
            return 0
        chosen, stale = self._choose(granted, set(known), wanted)
        credit.refund(granted - len(chosen))
        num_stale = self._enqueue_scoring(stale)
        if chosen:
            self._queue.enqueue(chosen)
        elif was_not_enough:  # a refused candidate may have learnt what the live version has not
            version = stored_version(wanted.live_version)
            return self._enqueue_scoring(self.store.sampling.stale_pairs(room, version))
        return len(chosen) + num_stale

    def _choose(
        self, limit: int, exclude: set[str], wanted: Appetite
    ) -> tuple[list[TrainingPair], list[StoredPair]]:
        """Up to `limit` pairs of all roles, and those that only an older version has got wrong.

        Replay keeps its share of what is trained: alone it would teach nothing.
        """
        sampling, since_seq = self.store.sampling, wanted.last_change_seq
        epochs = self._config.training.max_epochs
        order: NewOrder = "newest" if wanted.is_alarmed else "loss"
        fresh = sampling.new_pairs(limit, exclude, order, since_seq, wanted.min_new_loss)
        exclude = exclude | {pair.pair_id for pair in fresh}
        hard = sampling.hard_pairs(limit, epochs, exclude, wanted.min_hard_loss, since_seq)
        exclude = exclude | {pair.pair_id for pair in hard}
        stale: list[StoredPair] = []
        if _looks_again(wanted):
            # The shadow adapter's scores, which are named with a plus, are of what is live and later.
            current = (stored_version(wanted.live_version), f"{wanted.live_version}+")
            stale = [pair for pair in (*fresh, *hard) if pair.scored_version not in current]
            fresh, hard = ([pair for pair in pairs if pair.scored_version in current] for pairs in (fresh, hard))
        share = ROLE_SHARES["replay"]
        num_replayed = round(min(limit * share, (len(fresh) + len(hard)) * share / (1.0 - share)))
        replay: list[StoredPair] = []
        if num_replayed:  # of the present preferences: what users changed their minds about is not kept alive
            self._draw += 1
            seed = self._config.training.seed + self._draw
            replay = sampling.replay_pairs(num_replayed, epochs, exclude, seed, since_seq)
        room = limit - len(replay)
        of_new = ROLE_SHARES["new"] / (ROLE_SHARES["new"] + ROLE_SHARES["hard"])
        num_new = min(len(fresh), max(room - len(hard), round(room * of_new)))
        roles: tuple[tuple[list[StoredPair], PairRole], ...] = (
            (fresh[:num_new], "new"),
            (hard[: room - num_new], "hard"),
            (replay, "replay"),
        )
        return [training_pair(pair, role) for pairs, role in roles for pair in pairs], stale[:limit]


def _looks_again(wanted: Appetite) -> bool:
    """Whether a score of another version than the live one is too old to train on; for a baseline none is."""
    return wanted.min_new_loss > 0 and wanted.live_version is not None


def training_pair(pair: StoredPair, role: PairRole = "new") -> TrainingPair:
    """The pair as executors get it: its weight is the user's word times its quality."""
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
        tools=pair.tools,
        chosen_calls=pair.chosen_calls,
        rejected_calls=pair.rejected_calls,
        chosen_ids=pair.chosen_ids,
        rejected_ids=pair.rejected_ids,
    )

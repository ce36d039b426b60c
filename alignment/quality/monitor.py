"""Noisy and hostile feedback is found and weighted down, with the reason on the record.

Every pair is judged when the live adapter has just scored it: whether it is another copy of the same user's pair
(`near_duplicates`), others say the opposite, its user floods the rest, its loss stands out (all three: `rules`), and
whether its user is trusted (`trust`). That may change the standing of other pairs: the other side of a contradiction,
the earlier pairs of a user who lost trust.

Everything is judged from the store, so a restart forgets nothing. Work and memory of a call are bounded by the
constants below, whatever the size of the store.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from alignment.quality.findings import Finding, Revision, make_finding, name_of, parse_findings
from alignment.quality.near_duplicates import NUM_PROBES, BandHasher, alike
from alignment.quality.rules import FLOOD_WINDOW, LossRange, judge_group, judge_volume
from alignment.quality.trust import MAX_OF_ONE_USER, Standing, judge, settle
from alignment.records.pairs import contrary_key
from alignment.store.feedback_store import FeedbackStore
from alignment.store.pair_matches import UserScore
from alignment.store.pairs import QualityChange, StoredPair
from core.alignment_config import QualityConfig

RECENT_PAIRS = 256
"""Newest scored pairs that everything is compared with."""
REVISED_PAIRS = 256
"""Newest pairs of a user that are revised when the user's standing changes; older ones keep what they have."""
MAX_JUDGED = 8
"""Users whose trust is judged in one call: those of its pairs first, then those that waited longest."""
MAX_KNOWN_USERS = 1000
MAX_COPIES = 32
"""Copies of a pair that count at all."""
PRESENCE_WINDOWS = 10
"""Users count as present for so many flood windows: a flood must not make its author the only user."""

_Standings = OrderedDict[str | None, Standing]


class QualityMonitor:
    """Judges scored pairs. Not thread-safe."""

    def __init__(self, config: QualityConfig, store: FeedbackStore) -> None:
        self._config = config
        self._store = store
        self._hasher: BandHasher | None = None
        self._standings: _Standings = OrderedDict()

    def assess(self, pairs: Sequence[StoredPair]) -> list[QualityChange]:
        """Judge pairs whose scores were just recorded. A pair may come again with another version's score.

        Returns the changes, which the store has already: of these pairs and of others whose standing changed. After a
        `StoreUnavailableError` the same call may be repeated.
        """
        if not self._config.enabled or not pairs:
            return []
        ordered = sorted(pairs, key=lambda pair: pair.seq)
        recent = self._store.sampling.newest_scored(RECENT_PAIRS)
        before, self._standings = self._standings, self._judged(ordered, recent)
        try:
            return self._revise(ordered, recent, before)
        except BaseException:
            self._standings = before  # the revisions that follow from the new ones are still to be made
            raise

    def user_report(self) -> dict[str, Any]:
        """Users who are distrusted, and why, and who are spared because so many disagree; for `/v1/drift`."""
        suspects = [standing for standing in self._standings.values() if standing.is_suspect]
        distrusted = [one for one in suspects if one.is_distrusted]
        return {
            "judged": len(self._standings),
            "distrusted": [
                {**asdict(one), "weight": one.factor, "reason": _trust_words(one)} for one in distrusted
            ],
            "spared": [one.user for one in suspects if not one.is_distrusted],
        }

    def _revise(
        self, pairs: list[StoredPair], recent: list[StoredPair], before: _Standings
    ) -> list[QualityChange]:
        revision = Revision(pairs)
        revision.add(recent)
        again = self._pairs_of(self._changed_users(before, recent), recent)
        revision.add(again)
        bands = self._find_copies(pairs, revision)
        self._find_contradictions([*pairs, *again], revision)
        self._find_flooding(pairs, revision)
        self._find_outliers(pairs, recent, revision)
        for pair in (*pairs, *again):
            standing = self._standings.get(pair.user)
            if standing is not None:  # of a user with too few scores the record keeps what it says
                words, is_distrusted = _trust_words(standing), standing.is_distrusted
                finding = make_finding("trust", words, standing.factor) if is_distrusted else None
                revision.set(pair.pair_id, "trust", finding)
        changes = revision.changes()
        if changes:
            self._store.pairs.set_quality(changes)
        if bands:
            self._store.matches.put_bands(bands)
        return changes

    def _judged(self, pairs: list[StoredPair], recent: list[StoredPair]) -> _Standings:
        """The standings after some users were judged anew; those that waited longest come first."""
        known = self._standings.copy()
        scores = [
            UserScore(pair.pair_id, pair.user, pair.last_margin, pair.scored_version)
            for pair in recent
            if pair.last_margin is not None
        ]
        of_batch = {pair.user for pair in pairs}
        present = of_batch | {pair.user for pair in recent}
        waited = {user: position for position, user in enumerate(known)}
        queue = sorted(present, key=lambda user: (user not in of_batch, waited.get(user, -1), user or ""))
        for user in queue[:MAX_JUDGED]:
            if user is None:
                own = [score for score in scores if score.user is None]
            else:
                own = self._store.matches.user_scores(user, 2 * MAX_OF_ONE_USER)  # some may say nothing
            standing = judge(user, own, scores)
            if standing is not None:
                known[user] = standing
                known.move_to_end(user)
        for standing in settle([standing for user, standing in known.items() if user in present]):
            known[standing.user] = standing
        while len(known) > MAX_KNOWN_USERS:
            known.popitem(last=False)
        return known

    def _changed_users(self, before: _Standings, recent: list[StoredPair]) -> list[str | None]:
        """Users whose earlier pairs must be revised; after a restart the records tell how they stood."""
        marked = {pair.user for pair in recent if "trust" in parse_findings(pair.quality_reasons)}
        changed = []
        for user, standing in self._standings.items():
            old = before.get(user)
            is_changed = old.factor != standing.factor if old else standing.is_distrusted or user in marked
            if is_changed:
                changed.append(user)
        return changed

    def _pairs_of(self, users: list[str | None], recent: list[StoredPair]) -> list[StoredPair]:
        pairs = [pair for pair in recent if pair.user is None] if None in users else []
        for user in users:
            if user is not None:
                scores = self._store.matches.user_scores(user, REVISED_PAIRS)
                pairs += self._store.pairs.find([score.pair_id for score in scores])
        return pairs

    def _find_copies(self, pairs: list[StoredPair], revision: Revision) -> list[tuple[str, int]]:
        """The nth copy by one user counts 1/n; returns the bands to remember.

        Other users who say the same are evidence, not copies: bands are each user's own.
        """
        hasher = self._hasher = self._hasher or BandHasher()
        keys_of = {
            pair.pair_id: hasher.band_keys(
                "" if pair.user is None else f"user {pair.user}", pair.prompt, pair.chosen, pair.rejected
            )
            for pair in pairs
        }
        found = self._band_contents(list(keys_of.values()))
        bands: list[tuple[str, int]] = []
        for pair in pairs:
            keys = keys_of[pair.pair_id]
            rows = [(key, pair_id) for key in keys for pair_id in found[key]]
            if any(pair_id == pair.pair_id for _, pair_id in rows):
                continue  # judged when it was scored first; its own copies came later
            finding = _copy_finding(alike(rows))
            revision.set(pair.pair_id, "near duplicate", finding)
            for key in keys:
                found[key].append(pair.pair_id)
                bands.append((key, pair.seq))
        return bands

    def _band_contents(self, keys_of_pairs: list[tuple[str, ...]]) -> defaultdict[str, list[str]]:
        """Pairs by band key, as far as they can matter: most pairs are like no other in the first bands."""
        found: defaultdict[str, list[str]] = defaultdict(list)

        def look_up(keys: list[str]) -> None:
            for key, pair_id in self._store.matches.band_matches(keys, MAX_COPIES):
                found[key].append(pair_id)

        look_up([key for keys in keys_of_pairs for key in keys[:NUM_PROBES]])
        hit = [keys for keys in keys_of_pairs if any(key in found for key in keys[:NUM_PROBES])]
        look_up([key for keys in hit for key in keys[NUM_PROBES:]])
        return found

    def _find_contradictions(self, pairs: list[StoredPair], revision: Revision) -> None:
        groups = {min(pair.pair_key, contrary_key(pair.pair_key)) for pair in pairs}
        verdicts: dict[str, list[Finding]] = {}
        for voices in self._store.matches.find(groups).values():
            if len({voice.is_contrary for voice in voices}) == 2:
                verdicts |= judge_group(voices, self._is_distrusted)
        missing = [pair_id for pair_id in verdicts if pair_id not in revision]
        revision.add(self._store.pairs.find(missing) if missing else ())
        for pair_id in {*verdicts, *(pair.pair_id for pair in pairs)}:
            findings = {finding.kind: finding for finding in verdicts.get(pair_id, ())}
            revision.set(pair_id, "superseded", findings.get("superseded"))
            revision.set(pair_id, "contradiction", findings.get("contradiction"))

    def _find_flooding(self, pairs: list[StoredPair], revision: Revision) -> None:
        """A finding stays with the pair when its user's share falls, since the pair was part of the flood."""
        counts = self._store.matches.user_share(FLOOD_WINDOW)
        total, max_share = sum(counts.values()), self._config.max_user_share
        if not any(counts.get(pair.user or "", 0) > max_share * total for pair in pairs):
            return
        present = len(self._store.matches.user_share(PRESENCE_WINDOWS * FLOOD_WINDOW))
        for pair in pairs:
            finding = judge_volume(pair.user, counts, present, max_share)
            known = revision.get(pair.pair_id, "flooding")
            if finding is not None and (known is None or finding.factor < known.factor):
                revision.set(pair.pair_id, "flooding", finding)

    def _find_outliers(self, pairs: list[StoredPair], recent: list[StoredPair], revision: Revision) -> None:
        trusted = [pair for pair in recent if not self._is_distrusted(pair.user)]
        ranges = {version: LossRange.among(trusted, version) for version in {p.scored_version for p in pairs}}
        for pair in pairs:
            usual = ranges[pair.scored_version]
            finding = usual.judge(pair) if usual else None
            revision.set(pair.pair_id, "outlier", finding)
        if any(usual is not None and usual.is_drifting for usual in ranges.values()):
            for pair in recent:  # what stood out a moment ago was the beginning of it
                revision.set(pair.pair_id, "outlier", None)

    def _is_distrusted(self, user: str | None) -> bool:
        standing = self._standings.get(user)
        return standing is not None and standing.is_distrusted


def _copy_finding(copies: dict[str, float]) -> Finding | None:
    if not copies:
        return None
    closest = max(copies, key=lambda pair_id: copies[pair_id])
    number = len(copies) + 1
    words = f"copy {number} of {closest} (similarity {copies[closest]:.2f}) by the same user"
    return make_finding("near duplicate", words, 1 / number if number <= MAX_COPIES else 0.0)


def _trust_words(standing: Standing) -> str:
    return (
        f"{name_of(standing.user)} agrees with the live adapter in {standing.agreement:.0%} of "
        f"{standing.num_pairs} pairs, others in {standing.others:.0%}"
    )

"""How the feedback store behaves as it grows: SQLite filled step by step, everything timed at each size.

The filling is what a server does: batches go through `FeedbackStore.add` with all its checks and its fsync, pairs are
scored with reference log-probabilities, and most are trained a few times. Reads use the limits that the alignment
loop uses.
"""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignment.store.feedback_store import FeedbackStore, database_path
from alignment.store.pairs import QualityChange, StoredPair
from core.alignment_config import FeedbackConfig
from core.types import PairScore

SIZES = (10_000, 100_000, 300_000, 1_000_000)
_BATCH = 500
_SINGLE = 200
_READS = 200
_WRITES = 100
_COUNTS = 3
_UNSCORED = 1000
"""Newest pairs left unscored, as on a server that is a little behind."""
_WORDS = tuple(f"word{number}" for number in range(997))
_USERS = 1000


@dataclass(slots=True)
class SizeReport:
    """What was measured at one size."""

    num_pairs: int
    database_bytes: int
    """The file without its write-ahead log."""
    open_s: float
    insert_per_s: dict[str, float]
    """Records per second, each commit flushed: one by one, in batches, and in batches over the whole stretch before."""
    latency_ms: dict[str, dict[str, float]] = field(default_factory=dict)
    """By operation: p50, p99, and the mean CPU time, which other load on the machine hardly changes."""


def measure_growth(num_pairs: int, directory: Path, note: Callable[[str], None]) -> list[SizeReport]:
    """Fill a new store in `directory` up to `num_pairs` pairs and measure it at each of `SIZES` on the way."""
    chooser = random.Random(0)
    store = _open(directory)
    reports, stored = [], 0
    for size in [*(size for size in SIZES if size < num_pairs), num_pairs]:
        started_s = time.perf_counter()
        insert_s, pair_ids = _fill(store, stored, size, chooser)
        rate = (size - stored) / insert_s
        note(f"{size} pairs, {rate:.0f} inserts/s; filled in {time.perf_counter() - started_s:.0f} s")
        store.close()
        stored = size
        store, report = _measure(directory, size, rate, pair_ids, chooser)
        stored += _SINGLE + 10 * _BATCH
        reports.append(report)
        note(f"  open {report.open_s:.3f} s, {report.database_bytes / 2**20:.0f} MiB")
    store.close()
    return reports


def _open(directory: Path) -> FeedbackStore:
    return FeedbackStore.open(FeedbackConfig(), directory)


def _items(start: int, count: int, chooser: random.Random) -> list[object]:
    """Preference rows of some 700 characters."""
    return [
        {
            "prompt": [{"role": "user", "content": f"Question {number}: {_text(chooser, 30)}"}],
            "chosen": _text(chooser, 30),
            "rejected": _text(chooser, 30),
            "user": f"user{chooser.randrange(_USERS)}",
            "tags": {"team": f"team{number % 10}"},
        }
        for number in range(start, start + count)
    ]


def _text(chooser: random.Random, num_words: int) -> str:
    return " ".join(chooser.choices(_WORDS, k=num_words))


def _fill(store: FeedbackStore, start: int, end: int, chooser: random.Random) -> tuple[float, list[str]]:
    """Seconds that the inserts took, and the ids of the newest pairs."""
    insert_s, newest = 0.0, []
    for position in range(start, end, _BATCH):
        items = _items(position, min(_BATCH, end - position), chooser)
        started_s = time.perf_counter()
        outcomes = store.feedback.add(items)
        insert_s += time.perf_counter() - started_s
        pair_ids = [outcome.pair_id or "" for outcome in outcomes]
        newest.append(pair_ids)
        if len(newest) * _BATCH > _UNSCORED:
            _age(store, newest.pop(0), chooser)
    return insert_s, [pair_id for pair_ids in newest for pair_id in pair_ids]


def _age(store: FeedbackStore, pair_ids: list[str], chooser: random.Random) -> None:
    """Score the pairs, and train most of them a few times."""
    store.pairs.record_scores(
        [_score(pair_id, chooser) for pair_id in pair_ids], "v0001", dict.fromkeys(pair_ids, "0" * 32)
    )
    for share in (0.9, 0.5, 0.1):
        store.pairs.mark_trained(pair_ids[: int(share * len(pair_ids))])


def _score(pair_id: str, chooser: random.Random) -> PairScore:
    loss = chooser.expovariate(1.5)
    return PairScore(pair_id, -40.0, -50.0, -42.0, -48.0, loss, 1.0 - loss)


def _measure(
    directory: Path, size: int, fill_rate: float, unscored: list[str], chooser: random.Random
) -> tuple[FeedbackStore, SizeReport]:
    database_bytes = database_path(directory).stat().st_size
    started_s = time.perf_counter()
    store = _open(directory)
    store.sampling.unscored_pairs(8)
    open_s = time.perf_counter() - started_s
    rates = {
        "one_by_one": _insert_rate(store, size, _SINGLE, 1, chooser),
        f"batches_of_{_BATCH}": _insert_rate(store, size, 10 * _BATCH, _BATCH, chooser),
        "while_filling": fill_rate,
    }
    report = SizeReport(size, database_bytes, open_s, rates)
    for name, call, repeats in _operations(store, unscored, chooser):
        report.latency_ms[name] = _latency(call, repeats)
    return store, report


def _insert_rate(store: FeedbackStore, start: int, count: int, batch: int, chooser: random.Random) -> float:
    batches = [_items(start + position, batch, chooser) for position in range(0, count, batch)]
    started_s = time.perf_counter()
    for items in batches:
        store.feedback.add(items)
    return count / (time.perf_counter() - started_s)


def _operations(
    store: FeedbackStore, unscored: list[str], chooser: random.Random
) -> Iterator[tuple[str, Callable[[], object], int]]:
    """Name, call, repeats."""

    def seed() -> int:
        return chooser.randrange(1 << 30)

    def some() -> list[StoredPair]:
        return store.sampling.replay_pairs(8, 10, (), seed())

    busy = {pair.pair_id for pair in store.sampling.new_pairs(32)}
    yield "new_pairs newest", lambda: store.sampling.new_pairs(8, busy), _READS
    yield "new_pairs loss", lambda: store.sampling.new_pairs(8, busy, order="loss"), _READS
    yield "hard_pairs", lambda: store.sampling.hard_pairs(8, 10, busy, 0.5), _READS
    yield (
        "hard_pairs behind",
        lambda: store.sampling.hard_pairs(8, 10, busy, 0.5, since_seq=store.sampling.newest_scored(600)[-1].seq),
        _READS,
    )
    yield "replay_pairs", lambda: store.sampling.replay_pairs(8, 10, busy, seed()), _READS
    yield "held_out 64+64", lambda: store.sampling.held_out(64, 64, 0, seed()), _READS
    yield "unscored_pairs", lambda: store.sampling.unscored_pairs(32, busy), _READS
    yield "stale_pairs", lambda: store.sampling.stale_pairs(32, "v0002", busy, newest=32), _READS
    yield "newest_scored 256", lambda: store.sampling.newest_scored(256), _READS
    yield "matches of 8", lambda: store.matches.find([pair.pair_key for pair in some()]), _READS
    yield "user_scores 64", lambda: store.matches.user_scores(f"user{chooser.randrange(_USERS)}", 64), _READS
    yield "user_share 200", lambda: store.matches.user_share(200), _READS
    yield "counts", store.counts, _COUNTS

    trained = [pair.pair_id for _ in range(_WRITES) for pair in some()]
    steps = iter([trained[start : start + 8] for start in range(0, len(trained), 8)])
    fresh = iter([unscored[start : start + 8] for start in range(0, len(unscored), 8)])
    changes = iter([trained[start : start + 8] for start in range(0, len(trained), 8)])
    reasons = ("copy: 1 of 2",)
    yield "mark_trained of 8", lambda: store.pairs.mark_trained(next(steps)), _WRITES
    yield "record_scores of 8", lambda: _record(store, next(fresh), chooser), _WRITES
    yield (
        "set_quality of 8",
        lambda: store.pairs.set_quality([QualityChange(one, 0.5, reasons) for one in next(changes)]),
        _WRITES,
    )


def _record(store: FeedbackStore, pair_ids: list[str], chooser: random.Random) -> None:
    scores = [_score(pair_id, chooser) for pair_id in pair_ids]
    store.pairs.record_scores(scores, "v0001", dict.fromkeys(pair_ids, "0" * 32))


def _latency(call: Callable[[], object], repeats: int) -> dict[str, float]:
    times_s, cpu_started_s = [], time.process_time()
    for _ in range(repeats):
        started_s = time.perf_counter()
        call()
        times_s.append(time.perf_counter() - started_s)
    cpu_s = (time.process_time() - cpu_started_s) / repeats
    times_s.sort()
    places = {"p50": 0.5, "p99": 0.99}
    latency_ms = {name: 1e3 * times_s[min(int(place * repeats), repeats - 1)] for name, place in places.items()}
    return {**latency_ms, "cpu": 1e3 * cpu_s}


def to_rows(reports: list[SizeReport]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of a table with one column for each size."""
    headings = ["", *(f"{report.num_pairs:,} pairs" for report in reports)]
    lines: list[list[Any]] = [
        ["database, MiB", *(f"{report.database_bytes / 2**20:.0f}" for report in reports)],
        ["open, s", *(f"{report.open_s:.2f}" for report in reports)],
    ]
    for name in reports[0].insert_per_s:
        label = f"inserts/s, {name.replace('_', ' ')}"
        lines.append([label, *(f"{report.insert_per_s[name]:.0f}" for report in reports)])
    for name in reports[0].latency_ms:
        values = [report.latency_ms[name] for report in reports]
        cells = (f"{one['p50']:.1f} / {one['p99']:.1f} / {one['cpu']:.1f}" for one in values)
        lines.append([f"{name}, ms p50 / p99 / CPU", *cells])
    return headings, lines

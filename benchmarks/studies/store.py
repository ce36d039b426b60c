"""How fast feedback is committed and judged, and what changes as the store grows. SQLite, in a temporary directory.

`mace bench feedback` times commits one by one, from many threads and in batches; with `--pairs` it fills a store step
by step and times everything at each size. The filling is what a server does: batches go through the store's intake with
all its checks and its fsync, pairs are scored with reference log-probabilities, and most are trained a few times. Reads
use the limits that the alignment loop uses. `mace bench quality` times the judgement of 32 pairs, as the drift monitor
does it, in a store of 20 users, one of them hostile.
"""

import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from alignment.quality.monitor import QualityMonitor
from alignment.store.feedback_store import FeedbackStore, database_path
from alignment.store.pairs import QualityChange, StoredPair
from benchmarks.harness.report import AsJson, Out, note, show
from benchmarks.harness.statistics import percentile
from core.alignment_config import FeedbackConfig, QualityConfig
from core.types import PairScore

SIZES = (10_000, 100_000, 300_000, 1_000_000)
_THREADS = 16
_BATCH = 500
_SINGLE = 200
_READS = 200
_WRITES = 100
_COUNTS = 3
_UNSCORED = 1000
"""Newest pairs left unscored, as on a server that is a little behind."""
_WORDS = tuple(f"word{number}" for number in range(997))
_USERS = 1000
_JUDGED = 32
_JUDGED_USERS = 20
_HOSTILE = "user0"
_VERSION = "v0001"

Directory = Annotated[
    Path | None, typer.Option(help="Where to put the database; default is the system's temporary directory")
]


def feedback(
    as_json: AsJson = False,
    items: Annotated[int, typer.Option(min=_BATCH, help="Records for each measurement")] = 5000,
    pairs: Annotated[
        int | None, typer.Option(min=2000, help="Instead, fill a store up to this and time everything on the way")
    ] = None,
    directory: Directory = None,
    out: Out = None,
) -> None:
    """Feedback records committed per second; with --pairs the curve over the store's size."""
    if pairs is None:
        rows: list[object] = [
            {"prompt": f"question {number}", "chosen": "good", "rejected": "bad"} for number in range(items)
        ]
        rates = {}
        for name, count, batch, num_threads in (
            ("one_by_one", items // 5, 1, 1),
            (f"{_THREADS}_threads", items, 1, _THREADS),
            (f"batches_of_{_BATCH}", items, _BATCH, 1),
        ):
            with tempfile.TemporaryDirectory(dir=directory) as state_dir:
                store = _open(Path(state_dir))
                rates[name] = round(_insert_rate(store, rows[:count], batch, num_threads))
                store.close()
        lines = (f"{name.replace('_', ' '):>16}: {rate:6d} records/s" for name, rate in rates.items())
        show({"records_per_s": rates}, lines, as_json, out)
        return
    with tempfile.TemporaryDirectory(dir=directory) as state_dir:
        reports = measure_growth(pairs, Path(state_dir))
    show(reports, [_table(reports)], as_json, out)


def quality(
    pairs: Annotated[int, typer.Option(min=0, help="Judged pairs in the store before")] = 100_000,
    repeats: Annotated[int, typer.Option(min=1, help="Batches of 32 that are timed")] = 50,
    out: Out = None,
) -> None:
    """Measure how long judging the quality of 32 pairs takes, in seconds; prints JSON."""
    with tempfile.TemporaryDirectory() as directory:
        found = measure_judgement(Path(directory), pairs, repeats)
    show(found, (), True, out)


def measure_growth(num_pairs: int, directory: Path) -> list[dict[str, Any]]:
    """Fill a new store in `directory` up to `num_pairs` pairs and measure it at each of `SIZES` on the way.

    Returns:
        For each size: `num_pairs`; `database_bytes`, the file without its write-ahead log; `open_s`; `insert_per_s`,
        records per second, each commit flushed: one by one, in batches, and in batches over the whole stretch before;
        and `latency_ms` by operation: p50, p99, and the mean CPU time, which other load hardly changes.
    """
    chooser = random.Random(0)
    reports, stored = [], 0
    store = _open(directory)
    for size in [*(size for size in SIZES if size < num_pairs), num_pairs]:
        insert_s, unscored = _fill(store, stored, size, chooser)
        fill_rate = (size - stored) / insert_s
        store.close()
        database_bytes = database_path(directory).stat().st_size
        started_s = time.perf_counter()
        store = _open(directory)
        store.sampling.unscored_pairs(8)
        open_s = time.perf_counter() - started_s
        rates = {
            "one_by_one": _insert_rate(store, _items(size, _SINGLE, chooser), 1),
            f"batches_of_{_BATCH}": _insert_rate(store, _items(size, 10 * _BATCH, chooser), _BATCH),
            "while_filling": fill_rate,
        }
        stored = size + _SINGLE + 10 * _BATCH
        operations = _operations(store, unscored, chooser)
        reports.append(
            {
                "num_pairs": size,
                "database_bytes": database_bytes,
                "open_s": open_s,
                "insert_per_s": rates,
                "latency_ms": {name: _latency(call, repeats) for name, call, repeats in operations},
            }
        )
        note(f"{reports[-1]}")
    store.close()
    return reports


def measure_judgement(directory: Path, num_pairs: int, repeats: int) -> dict[str, float]:
    """Seconds for each batch of new pairs, in a store that holds `num_pairs` judged ones before."""
    chooser = random.Random(0)
    store = _open(directory)
    monitor = QualityMonitor(QualityConfig(), store)
    for start in range(0, num_pairs, 2 * _BATCH):
        _judge(store, monitor, start, min(2 * _BATCH, num_pairs - start), chooser)
    starts = range(num_pairs, num_pairs + repeats * _JUDGED, _JUDGED)
    times_s = [_judge(store, monitor, start, _JUDGED, chooser) for start in starts]
    store.close()
    median_s = statistics.median(times_s)
    return {"pairs": num_pairs, "min_s": min(times_s), "median_s": median_s, "max_s": max(times_s)}


def _judge(store: FeedbackStore, monitor: QualityMonitor, start: int, count: int, chooser: random.Random) -> float:
    """Add pairs, score them as an adapter that is right about nine of ten honest ones, and judge them; seconds."""
    store.feedback.add(_items(start, count, chooser, _JUDGED_USERS))
    pairs = store.sampling.unscored_pairs(count)
    scores = []
    for pair in pairs:
        right = (chooser.random() < 0.9) != (pair.user == _HOSTILE)
        margin = abs(chooser.gauss(1, 0.5)) * (1 if right else -1)
        scores.append(PairScore(pair.pair_id, 0.0, 0.0, 0.0, 0.0, math.log1p(math.exp(-margin)), margin))
    store.pairs.record_scores(scores, _VERSION)
    scored = store.pairs.find([pair.pair_id for pair in pairs])
    started_s = time.perf_counter()
    monitor.assess(scored)
    return time.perf_counter() - started_s


def _open(directory: Path) -> FeedbackStore:
    return FeedbackStore.open(FeedbackConfig(), directory)


def _items(start: int, count: int, chooser: random.Random, num_users: int = _USERS) -> list[object]:
    """Preference rows of some 700 characters."""
    return [
        {
            "prompt": [{"role": "user", "content": f"Question {number}: {_text(chooser, 30)}"}],
            "chosen": _text(chooser, 30),
            "rejected": _text(chooser, 30),
            "user": f"user{chooser.randrange(num_users)}",
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
        newest.append([outcome.pair_id or "" for outcome in outcomes])
        if len(newest) * _BATCH > _UNSCORED:
            aged = newest.pop(0)
            _record(store, aged, chooser)
            for share in (0.9, 0.5, 0.1):  # most are trained a few times
                store.pairs.mark_trained(aged[: int(share * len(aged))])
    return insert_s, [pair_id for pair_ids in newest for pair_id in pair_ids]


def _record(store: FeedbackStore, pair_ids: list[str], chooser: random.Random) -> None:
    scores = []
    for pair_id in pair_ids:
        loss = chooser.expovariate(1.5)
        scores.append(PairScore(pair_id, -40.0, -50.0, -42.0, -48.0, loss, 1.0 - loss))
    store.pairs.record_scores(scores, _VERSION, dict.fromkeys(pair_ids, "0" * 32))


def _insert_rate(store: FeedbackStore, rows: list[object], batch: int, num_threads: int = 1) -> float:
    """Add rows in batches; records per second."""
    batches = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    with ThreadPoolExecutor(num_threads) as pool:
        started_s = time.perf_counter()
        list(pool.map(store.feedback.add, batches))
        return len(rows) / (time.perf_counter() - started_s)


def _operations(
    store: FeedbackStore, unscored: list[str], chooser: random.Random
) -> Iterator[tuple[str, Callable[[], object], int]]:
    """Name, call, repeats."""
    sampling, matches = store.sampling, store.matches

    def seed() -> int:
        return chooser.randrange(1 << 30)

    def some() -> list[StoredPair]:
        return sampling.replay_pairs(8, 10, (), seed())

    def hard_behind() -> object:
        return sampling.hard_pairs(8, 10, busy, 0.5, since_seq=sampling.newest_scored(600)[-1].seq)

    busy = {pair.pair_id for pair in sampling.new_pairs(32)}
    reads: dict[str, Callable[[], object]] = {
        "new_pairs newest": lambda: sampling.new_pairs(8, busy),
        "new_pairs loss": lambda: sampling.new_pairs(8, busy, order="loss"),
        "hard_pairs": lambda: sampling.hard_pairs(8, 10, busy, 0.5),
        "hard_pairs behind": hard_behind,
        "replay_pairs": lambda: sampling.replay_pairs(8, 10, busy, seed()),
        "held_out 64+64": lambda: sampling.held_out(64, 64, 0, seed()),
        "unscored_pairs": lambda: sampling.unscored_pairs(32, busy),
        "stale_pairs": lambda: sampling.stale_pairs(32, "v0002", busy, newest=32),
        "newest_scored 256": lambda: sampling.newest_scored(256),
        "matches of 8": lambda: matches.find([pair.pair_key for pair in some()]),
        "user_scores 64": lambda: matches.user_scores(f"user{chooser.randrange(_USERS)}", 64),
        "user_share 200": lambda: matches.user_share(200),
    }
    for name, call in reads.items():
        yield name, call, _READS
    yield "counts", store.counts, _COUNTS

    def eights(pair_ids: list[str]) -> Iterator[list[str]]:
        return iter([pair_ids[start : start + 8] for start in range(0, len(pair_ids), 8)])

    trained = [pair.pair_id for _ in range(_WRITES) for pair in some()]
    steps, fresh, changes = eights(trained), eights(unscored), eights(trained)
    reasons = ("copy: 1 of 2",)
    yield "mark_trained of 8", lambda: store.pairs.mark_trained(next(steps)), _WRITES
    yield "record_scores of 8", lambda: _record(store, next(fresh), chooser), _WRITES
    yield (
        "set_quality of 8",
        lambda: store.pairs.set_quality([QualityChange(one, 0.5, reasons) for one in next(changes)]),
        _WRITES,
    )


def _latency(call: Callable[[], object], repeats: int) -> dict[str, float]:
    times_s, cpu_started_s = [], time.process_time()
    for _ in range(repeats):
        started_s = time.perf_counter()
        call()
        times_s.append(time.perf_counter() - started_s)
    cpu_s = (time.process_time() - cpu_started_s) / repeats
    latency_ms = {f"p{place}": 1e3 * (percentile(times_s, place) or 0.0) for place in (50, 99)}
    return {**latency_ms, "cpu": 1e3 * cpu_s}


def _table(reports: list[dict[str, Any]]) -> Table:
    """One column for each size."""
    table = Table("", *(f"{report['num_pairs']:,} pairs" for report in reports))
    table.add_row("database, MiB", *(f"{report['database_bytes'] / 2**20:.0f}" for report in reports))
    table.add_row("open, s", *(f"{report['open_s']:.2f}" for report in reports))
    for name in reports[0]["insert_per_s"]:
        rates = (f"{report['insert_per_s'][name]:.0f}" for report in reports)
        table.add_row(f"inserts/s, {name.replace('_', ' ')}", *rates)
    for name in reports[0]["latency_ms"]:
        values = (report["latency_ms"][name] for report in reports)
        cells = (f"{one['p50']:.1f} / {one['p99']:.1f} / {one['cpu']:.1f}" for one in values)
        table.add_row(f"{name}, ms p50 / p99 / CPU", *cells)
    return table

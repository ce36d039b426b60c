"""What judging 32 pairs costs: `python -m benchmarks.studies.quality --pairs 100000`.

Fills a new SQLite store with scored pairs of 20 users, one of them hostile, then judges batches as the drift monitor
does. The tables of pairs and bands have the given size; the banded pairs are all of them.
"""

import itertools
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from alignment.quality.monitor import QualityMonitor
from alignment.store.feedback_store import FeedbackStore
from alignment.store.pairs import StoredPair
from core.alignment_config import FeedbackConfig, QualityConfig
from core.types import PairScore

BATCH = 32
_USERS = 20
_HOSTILE = "user-0"
_VERSION = "v0001"
_CHUNK = 1000


def feedback(chooser: random.Random) -> Iterator[dict[str, Any]]:
    """Preferences with texts of 20 to 60 random words."""
    words = [f"word{number}" for number in range(5000)]
    for number in itertools.count():
        texts = (" ".join(chooser.choices(words, k=chooser.randint(20, 60))) for _ in range(3))
        fields = dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))
        yield fields | {"user": f"user-{number % _USERS}"}


def score(store: FeedbackStore, pairs: list[StoredPair], chooser: random.Random) -> list[StoredPair]:
    """Score pairs as an adapter that is right about nine of ten honest ones."""
    scores = []
    for pair in pairs:
        right = (chooser.random() < 0.9) != (pair.user == _HOSTILE)
        margin = abs(chooser.gauss(1, 0.5)) * (1 if right else -1)
        scores.append(PairScore(pair.pair_id, 0.0, 0.0, 0.0, 0.0, math.log1p(math.exp(-margin)), margin))
    store.pairs.record_scores(scores, _VERSION)
    return store.pairs.find([pair.pair_id for pair in pairs])


def measure(directory: Path, num_pairs: int, repeats: int) -> dict[str, float]:
    """Seconds for each batch of new pairs, in a store that holds `num_pairs` before."""
    chooser = random.Random(0)
    items = feedback(chooser)
    store = FeedbackStore.open(FeedbackConfig(), directory)
    monitor = QualityMonitor(QualityConfig(), store)
    for start in range(0, num_pairs, _CHUNK):
        store.feedback.add(list(itertools.islice(items, min(_CHUNK, num_pairs - start))))
        monitor.assess(score(store, store.sampling.unscored_pairs(_CHUNK), chooser))
    times = []
    for _ in range(repeats):
        store.feedback.add(list(itertools.islice(items, BATCH)))
        pairs = score(store, store.sampling.unscored_pairs(BATCH), chooser)
        started_s = time.perf_counter()
        monitor.assess(pairs)
        times.append(time.perf_counter() - started_s)
    store.close()
    return {"pairs": num_pairs, "min_s": min(times), "median_s": statistics.median(times), "max_s": max(times)}


def main(
    pairs: Annotated[int, typer.Option(min=0)] = 100_000, repeats: Annotated[int, typer.Option(min=1)] = 50
) -> None:
    """Print median and maximum as JSON."""
    with tempfile.TemporaryDirectory() as directory:
        typer.echo(json.dumps(measure(Path(directory), pairs, repeats)))


if __name__ == "__main__":
    typer.run(main)

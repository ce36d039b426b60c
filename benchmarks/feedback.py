"""How fast feedback is committed: one by one, from many threads, in batches.

python -m benchmarks.feedback
"""

import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

from alignment.store import FeedbackStore
from core.config import FeedbackConfig

_THREADS = 16
_BATCH = 500


def main(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
    items: Annotated[int, typer.Option(min=_BATCH, help="Records for each measurement")] = 5000,
) -> None:
    """Records per second on SQLite in a temporary directory."""
    numbers = list(range(items))
    results = {
        "one_by_one": _rate(numbers[: items // 5], lambda store, rows: [store.add([row]) for row in rows]),
        f"{_THREADS}_threads": _rate(numbers, _from_threads),
        f"batches_of_{_BATCH}": _rate(numbers, _in_batches),
    }
    if as_json:
        typer.echo(json.dumps({"records_per_s": results}, indent=2))
        return
    for name, rate in results.items():
        typer.echo(f"{name.replace('_', ' '):>16}: {rate:6d} records/s")


def _rate(numbers: list[int], insert: Callable[[FeedbackStore, list[dict[str, Any]]], object]) -> int:
    rows = [{"prompt": f"question {n}", "chosen": "good", "rejected": "bad"} for n in numbers]
    with tempfile.TemporaryDirectory() as directory:
        store = FeedbackStore.open(FeedbackConfig(), Path(directory))
        started_s = time.perf_counter()
        insert(store, rows)
        elapsed_s = time.perf_counter() - started_s
        store.close()
    return round(len(rows) / elapsed_s)


def _from_threads(store: FeedbackStore, rows: list[dict[str, Any]]) -> None:
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(lambda row: store.add([row]), rows))


def _in_batches(store: FeedbackStore, rows: list[dict[str, Any]]) -> None:
    for start in range(0, len(rows), _BATCH):
        store.add(rows[start : start + _BATCH])


if __name__ == "__main__":
    typer.run(main)

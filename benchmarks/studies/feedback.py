"""How fast feedback is committed: one by one, from many threads, in batches; and what changes as the store grows.

python -m benchmarks.studies.feedback [--pairs 1000000]
"""

import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from alignment.store.feedback_store import FeedbackStore
from benchmarks.studies.feedback_scale import measure_growth, to_rows
from core.alignment_config import FeedbackConfig

_THREADS = 16
_BATCH = 500


def main(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; progress goes to stderr")] = False,
    items: Annotated[int, typer.Option(min=_BATCH, help="Records for each measurement")] = 5000,
    pairs: Annotated[
        int | None, typer.Option(min=2000, help="Instead, fill a store up to this and time everything on the way")
    ] = None,
    directory: Annotated[
        Path | None, typer.Option(help="Where to put the database; default is the system's temporary directory")
    ] = None,
) -> None:
    """Records per second on SQLite in a temporary directory, and with --pairs the curve over the store's size."""
    if pairs is None:
        _show_rates(items, directory, as_json=as_json)
        return
    with tempfile.TemporaryDirectory(dir=directory) as state_dir:
        reports = measure_growth(pairs, Path(state_dir), lambda line: typer.echo(line, err=True))
    if as_json:
        typer.echo(json.dumps([asdict(report) for report in reports], indent=2))
        return
    headings, lines = to_rows(reports)
    table = Table(*headings)
    for line in lines:
        table.add_row(*line)
    Console().print(table)


def _show_rates(items: int, directory: Path | None, *, as_json: bool) -> None:
    numbers = list(range(items))
    results = {
        "one_by_one": _rate(
            numbers[: items // 5], directory, lambda store, rows: [store.feedback.add([row]) for row in rows]
        ),
        f"{_THREADS}_threads": _rate(numbers, directory, _from_threads),
        f"batches_of_{_BATCH}": _rate(numbers, directory, _in_batches),
    }
    if as_json:
        typer.echo(json.dumps({"records_per_s": results}, indent=2))
        return
    for name, rate in results.items():
        typer.echo(f"{name.replace('_', ' '):>16}: {rate:6d} records/s")


def _rate(
    numbers: list[int], directory: Path | None, insert: Callable[[FeedbackStore, list[dict[str, Any]]], object]
) -> int:
    rows = [{"prompt": f"question {n}", "chosen": "good", "rejected": "bad"} for n in numbers]
    with tempfile.TemporaryDirectory(dir=directory) as state_dir:
        store = FeedbackStore.open(FeedbackConfig(), Path(state_dir))
        started_s = time.perf_counter()
        insert(store, rows)
        elapsed_s = time.perf_counter() - started_s
        store.close()
    return round(len(rows) / elapsed_s)


def _from_threads(store: FeedbackStore, rows: list[dict[str, Any]]) -> None:
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(lambda row: store.feedback.add([row]), rows))


def _in_batches(store: FeedbackStore, rows: list[dict[str, Any]]) -> None:
    for start in range(0, len(rows), _BATCH):
        store.feedback.add(rows[start : start + _BATCH])


if __name__ == "__main__":
    typer.run(main)

"""Tables of the `datasets` library: a directory of `save_to_disk`, a Parquet file, a data set of the hub."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import httpx

from app.importing.source import SourceError, SourceRow

_READ_ROWS = 1000
_HUB_TIMEOUT_S = 10.0
_DEFAULT_SPLIT = "train"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


class DatasetRows:
    """A `datasets.Dataset` (memory-mapped) or `IterableDataset` (streamed)."""

    unit: Literal["rows"] = "rows"

    def __init__(self, table: Any, label: str, identity: str, total: int | None) -> None:
        self._table = table
        self.label = label
        self.identity = identity
        self.total = total

    def rows(self, after: int) -> Iterator[SourceRow]:
        """See `Source.rows`."""
        number = after
        try:
            for batch in self._table.skip(after).iter(batch_size=_READ_ROWS):
                names = list(batch)
                for values in zip(*batch.values(), strict=True):
                    number += 1
                    yield SourceRow(number, dict(zip(names, values, strict=True)), number)
        except _foreign_errors() as error:
            raise SourceError(f"cannot read {self.label} behind row {number}: {_first_line(error)}") from error


def open_saved(path: Path, split: str | None) -> DatasetRows:
    """A directory that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote.

    Raises:
        SourceError: it is no such directory, or has no such split.
    """
    from datasets import Dataset, load_from_disk

    try:
        saved = load_from_disk(str(path))
    except _foreign_errors() as error:
        raise SourceError(f"{path} is no data set saved with save_to_disk: {_first_line(error)}") from error
    if isinstance(saved, Dataset):
        own = str(saved.split) if saved.split else None
        if split is not None and own not in (None, split):
            raise SourceError(f"{path} is the split {own!r}, not {split!r}")
        table = saved
    else:
        table = _pick(saved, split, str(path))
    identity = f"{path.resolve()} {table.split} {table._fingerprint} {table.num_rows}"
    return DatasetRows(table, path.name, identity, table.num_rows)


def open_parquet(path: Path) -> DatasetRows:
    """One Parquet file, streamed.

    Raises:
        SourceError: it is no Parquet file.
    """
    import pyarrow.parquet  # type: ignore[import-untyped]
    from datasets import load_dataset

    try:
        num_rows = pyarrow.parquet.read_metadata(path).num_rows
        table = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    except _foreign_errors() as error:
        raise SourceError(f"cannot read {path}: {_first_line(error)}") from error
    stat = path.stat()
    return DatasetRows(table, path.name, f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}", num_rows)


def open_hub(name: str, split: str | None, config: str | None, streaming: bool) -> DatasetRows:
    """A data set of the Hugging Face hub, or of its local cache if the hub cannot be reached.

    Raises:
        SourceError: unknown, private, no such split or configuration, or neither reachable nor cached.
    """
    unreachable = _hub_is_unreachable()
    if unreachable:  # read when these libraries are imported: what is cached is found without minutes of retries
        os.environ["HF_HUB_OFFLINE"] = "1"
    from datasets import load_dataset

    try:
        table = load_dataset(name, config, split=split or _DEFAULT_SPLIT, streaming=streaming)
    except _foreign_errors() as error:
        reason = f"the hub cannot be reached ({unreachable}) and it is not cached" if unreachable else None
        raise SourceError(f"cannot load {name}: {reason or _first_line(error)}") from error
    total = None if streaming else table.num_rows
    version = "" if streaming else table._fingerprint
    return DatasetRows(table, name, f"hub {name} {config} {split or _DEFAULT_SPLIT} {version}", total)


def _pick(splits: Mapping[str, Any], split: str | None, name: str) -> Any:
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if (split or _DEFAULT_SPLIT) in splits:
        return splits[split or _DEFAULT_SPLIT]
    raise SourceError(
        f"{name} has no split {split or _DEFAULT_SPLIT!r}; choose one with --split: {', '.join(splits)}"
    )


def _hub_is_unreachable() -> str | None:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        httpx.head(endpoint, timeout=_HUB_TIMEOUT_S)
    except (httpx.TransportError, httpx.UnsupportedProtocol) as error:
        return f"{endpoint}: {_first_line(error)}"
    return None


def _foreign_errors() -> tuple[type[Exception], ...]:
    """What `datasets`, Arrow and the hub client raise for data that are missing, damaged or out of reach."""
    import pyarrow
    from datasets.exceptions import DatasetsError

    return (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        httpx.HTTPError,
        pyarrow.ArrowException,
        DatasetsError,
    )


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]

"""From what the user named to something that gives rows."""

from pathlib import Path

from app.importing.dataset_rows import HUB_ID, open_hub, open_parquet, open_saved
from app.importing.source import Source, SourceError
from app.importing.text_files import TextFile

_TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv")
_SUFFIXES = (*_TEXT_SUFFIXES, *(f"{suffix}.gz" for suffix in _TEXT_SUFFIXES), ".parquet")


def open_source(name: str, split: str | None = None, config: str | None = None, streaming: bool = False) -> Source:
    """A file, a directory of `save_to_disk`, or an id of the Hugging Face hub: whichever `name` is.

    Args:
        name: what exists on this machine comes before the hub.
        split: of a saved or hub data set; default is `train`, or the only one there is.
        config: configuration of a hub data set.
        streaming: read a hub data set while it is fetched, and keep nothing.

    Raises:
        SourceError: there is no such thing, or it cannot be read.
    """
    path = Path(name).expanduser()
    lower = path.name.lower()
    if path.is_dir():
        return open_saved(path, split)
    if path.is_file():
        if lower.endswith(".parquet"):
            return open_parquet(path)
        if lower.endswith(_SUFFIXES):
            return TextFile(path)
        raise SourceError(f"{name}: the suffix must be one of {', '.join(_SUFFIXES)}")
    if lower.endswith(_SUFFIXES) or not HUB_ID.fullmatch(name):
        raise SourceError(f"there is no file or directory {name}, and an id of the hub looks like owner/name")
    return open_hub(name, split, config, streaming)

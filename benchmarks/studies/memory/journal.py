"""Windows that are done, in a file: a run that was cut off goes on where it stopped."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from core.errors import ConfigError

logger = logging.getLogger(__name__)


class Journal:
    """One JSON object a line: key, fingerprint of what was measured, result. Without a path nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        """Read what is there.

        Raises:
            ConfigError: the file cannot be read, or is no journal.
        """
        self._path = path
        self._entries: dict[str, tuple[str, Any]] = {}
        if path is None or not path.exists():
            return
        try:
            for line in path.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                self._entries[entry["key"]] = (entry["fingerprint"], entry["result"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is no journal of this benchmark: {error}") from error

    def find(self, key: str, fingerprint: str) -> Any | None:
        """The result, if the same thing was measured; None if not, or with other settings."""
        known = self._entries.get(key)
        return known[1] if known is not None and known[0] == fingerprint else None

    def add(self, key: str, fingerprint: str, result: Any) -> None:
        """Keep a result; it is on disk when this returns.

        Raises:
            ConfigError: the file cannot be written.
        """
        self._entries[key] = (fingerprint, result)
        if self._path is None:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "fingerprint": fingerprint, "result": result}) + "\n")
        except OSError as error:
            raise ConfigError(f"cannot write {self._path}: {error}") from error


def fingerprint_of(settings: Any) -> str:
    """Short digest of JSON values."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

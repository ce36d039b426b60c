"""How far an import has come, on this machine's disk, so that the next run goes on from there.

Only a shortcut: rows carry ids of their content, so sending them again would add nothing twice.
"""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from app.importing.tally import Tally
from core.files import write_atomically


@dataclass(slots=True)
class Progress:
    """Rows 1 to `next_after` are settled: committed by the server, or refused."""

    next_after: int = 0
    last_id: str | None = None
    """Id of the last committed record. A server that does not know it is not the one that we sent it to."""
    rejected_file: str | None = None
    rejected_bytes: int = 0
    """Size of the file of rejected rows then; what is behind that belongs to rows that were not settled."""
    tally: Tally = field(default_factory=Tally)


class ProgressFile:
    """One file for each source, server and set of options."""

    def __init__(self, *key: str) -> None:
        digest = hashlib.sha256("\n".join(key).encode(errors="surrogatepass")).hexdigest()
        self.path = _directory() / f"{digest[:32]}.json"

    def load(self) -> Progress | None:
        """What an earlier run left; None if there was none, or its file is damaged."""
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            return Progress(**{**data, "tally": Tally.from_json(data["tally"])})
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def save(self, progress: Progress) -> None:
        """Replace what was saved before.

        Raises:
            OSError: the cache directory cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = {
            "next_after": progress.next_after,
            "last_id": progress.last_id,
            "rejected_file": progress.rejected_file,
            "rejected_bytes": progress.rejected_bytes,
            "tally": progress.tally.to_json(),
        }
        write_atomically(self.path, json.dumps(data))

    def remove(self) -> None:
        """Forget; also if there is nothing to forget."""
        self.path.unlink(missing_ok=True)


def _directory() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "mace" / "imports"

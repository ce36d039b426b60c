"""The store's part of `mace doctor`: finds what is wrong with a feedback store, and says what to do about it.

Looks from outside, with nothing of `FeedbackStore`, because that may not open. Changes nothing.
"""

import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import text
from sqlalchemy.engine import URL, Connection, make_url
from sqlalchemy.exc import SQLAlchemyError

from alignment.store.database import open_engine
from alignment.store.feedback_store import database_path
from alignment.store.schema import SCHEMA_VERSION
from core.checks import CheckResult
from core.errors import ConfigError

_MIB = 1 << 20
_MIN_FREE_BYTES = 64 * _MIB
"""Below this, the write-ahead log of a busy store may not find room."""
_MAX_CHECK_S = 30.0
_LOCK_TIMEOUT_S = 2.0
_LARGE_LOG_BYTES = 1024 * _MIB
_STILL_SAFE = "until then feedback is answered with 503, and nothing acknowledged is lost"


def examine_store(state_dir: Path, database_url: str | None = None) -> list[CheckResult]:
    """Check the store that a server with these settings would use; a store that does not exist yet is fine."""
    if database_url is None:
        return _examine_file(database_path(state_dir))
    try:
        url = make_url(database_url)
        if url.get_backend_name() == "sqlite":
            return _examine_file(Path(str(url.database).removeprefix("file:")))
        return _examine_server(url)
    except (ConfigError, SQLAlchemyError) as error:
        return [CheckResult("store", "error", _first_line(error), "correct feedback.database_url")]


def _examine_file(path: Path) -> list[CheckResult]:
    place = next(one for one in (path.parent.absolute(), *path.parent.absolute().parents) if one.exists())
    found = [_check_place(place)]
    if not path.exists():
        return [*found, CheckResult("store", "ok", f"none yet at {path}")]
    checks: list[Callable[[Path], CheckResult]] = [_check_contents, _check_schema, _check_size]
    if found[0].status != "error":
        checks.insert(0, _check_lock)
    for check in checks:
        try:
            found.append(check(path))
        except sqlite3.Error as error:
            found.append(_explain(path, error))
            break
    return found


def _check_place(directory: Path) -> CheckResult:
    """Check that files can be made here, by making one: permissions say nothing of a full disk."""
    free = shutil.disk_usage(directory).free
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"\0" * _MIB)
            os.fsync(file.fileno())
    except OSError as error:
        fix = "free some disk" if free < _MIN_FREE_BYTES else "make it writable for the server's user"
        return CheckResult("store place", "error", f"{directory}: {error.strerror}", f"{fix}; {_STILL_SAFE}")
    if free < _MIN_FREE_BYTES:
        found = f"{directory}: {free // _MIB} MiB free"
        return CheckResult("store place", "error", found, f"free some disk; when it is full, {_STILL_SAFE}")
    return CheckResult("store place", "ok", f"{directory} is writable, {free // _MIB} MiB free")


def _check_lock(path: Path) -> CheckResult:
    with _opened(path, "rw") as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise
            fix = f"see who has it open (fuser {path}) and end a program that should not; {_STILL_SAFE}"
            return CheckResult(
                "store lock", "error", f"held by another process for over {_LOCK_TIMEOUT_S:.0f} s", fix
            )
    return CheckResult("store lock", "ok", "free")


def _check_contents(path: Path) -> CheckResult:
    """SQLite's own check of every page, as far as it comes in the time."""
    deadline_s = time.monotonic() + _MAX_CHECK_S
    with _opened(path) as connection:
        connection.set_progress_handler(lambda: time.monotonic() > deadline_s, 100_000)
        try:
            verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        except sqlite3.OperationalError as error:
            if "interrupted" not in str(error):
                raise
            return CheckResult("store contents", "ok", f"nothing wrong within {_MAX_CHECK_S:.0f} s of reading")
    if verdict != "ok":
        return _corrupt(path, str(verdict).splitlines()[-1])
    return CheckResult("store contents", "ok", "intact")


def _check_schema(path: Path) -> CheckResult:
    with _opened(path) as connection:
        if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone() is None:
            return _judge_schema(None)
        row = connection.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchone()
    return _judge_schema(row[0] if row else None)


def _judge_schema(version: str | None) -> CheckResult:
    if version is None:
        return CheckResult("store schema", "ok", "no tables yet")
    if not version.isdecimal() or not 1 <= int(version) <= SCHEMA_VERSION:
        found = f"{version}, this MACE reads 1 to {SCHEMA_VERSION}"
        return CheckResult("store schema", "error", found, "use the release that wrote it, or a newer one")
    note = "" if int(version) == SCHEMA_VERSION else f"; the next start brings it to {SCHEMA_VERSION}"
    return CheckResult("store schema", "ok", f"{version}{note}")


def _check_size(path: Path) -> CheckResult:
    log = path.with_name(path.name + "-wal")
    log_bytes = log.stat().st_size if log.exists() else 0
    with _opened(path) as connection:
        has_tables = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'feedback'").fetchone()
        count = connection.execute("SELECT count(*) FROM feedback").fetchone()[0] if has_tables else 0
    found = f"{count} records, {path.stat().st_size / _MIB:.1f} MiB, log {log_bytes / _MIB:.1f} MiB"
    if log_bytes > _LARGE_LOG_BYTES:
        fix = f"a reader keeps the log from being folded in: end programs that have {path} open, then restart"
        return CheckResult("store size", "warning", found, fix)
    return CheckResult("store size", "ok", found)


@contextmanager
def _opened(path: Path, mode: str = "ro") -> Iterator[sqlite3.Connection]:
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    with closing(sqlite3.connect(uri, uri=True, timeout=_LOCK_TIMEOUT_S, isolation_level=None)) as connection:
        yield connection


def _explain(path: Path, error: sqlite3.Error) -> CheckResult:
    words = _first_line(error)
    if "not a database" in words or "malformed" in words:
        return _corrupt(path, words)
    if "locked" in words:
        return CheckResult("store lock", "error", words, f"see who has it open: fuser {path}; {_STILL_SAFE}")
    if isinstance(error, sqlite3.OperationalError) and ("unable to open" in words or "readonly" in words):
        fix = f"make {path} and its directory readable and writable for the server's user; {_STILL_SAFE}"
        return CheckResult("store file", "error", f"{path}: {words}", fix)
    return CheckResult("store file", "error", f"{path}: {words}", "see the words of SQLite")


def _corrupt(path: Path, words: str) -> CheckResult:
    fix = (
        f"stop the server; keep a copy of {path} and {path.name}-wal; restore a backup, or save what can be read "
        f"(sqlite3 {path} .recover | sqlite3 new.db) and put it in its place"
    )
    return CheckResult("store contents", "error", f"{path} is corrupt: {words}", fix)


def _examine_server(url: URL) -> list[CheckResult]:
    shown = url.render_as_string(hide_password=True)
    engine = open_engine(url)
    try:
        with engine.connect() as connection:
            return [CheckResult("store", "ok", f"{shown} answers"), *_ask_server(connection)]
    except SQLAlchemyError as error:
        words = _first_line(getattr(error, "orig", None) or error)
        return [CheckResult("store", "error", f"{shown}: {words}", f"start the database server; {_STILL_SAFE}")]
    finally:
        engine.dispose()


def _ask_server(connection: Connection) -> Iterator[CheckResult]:
    def ask(query: str) -> Any:
        return connection.execute(text(query)).scalar()

    if connection.dialect.name != "postgresql":
        yield CheckResult("store", "error", connection.dialect.name, "only SQLite and PostgreSQL are supported")
        return
    if ask("SHOW transaction_read_only") == "on":
        fix = f"name the primary in feedback.database_url, not a standby; {_STILL_SAFE}"
        yield CheckResult("store lock", "error", "the server takes no writes", fix)
    if ask("SHOW fsync") != "on":
        yield CheckResult(
            "store place", "warning", "fsync is off", "turn it on: a power cut may lose acknowledged feedback"
        )
    known = ask("SELECT to_regclass('meta')") is not None
    yield _judge_schema(ask("SELECT value FROM meta WHERE key = 'schema_version'") if known else None)
    count = ask("SELECT count(*) FROM feedback") if known else 0
    size = int(ask("SELECT pg_database_size(current_database())"))
    yield CheckResult("store size", "ok", f"{count} records, database {size / _MIB:.1f} MiB")


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__

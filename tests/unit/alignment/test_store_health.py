"""The doctor names what is wrong with a store, and what to do."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from alignment.store import health as store_health
from alignment.store.feedback_store import FeedbackStore
from alignment.store.health import examine_store
from alignment.store.schema import meta
from core.alignment_config import FeedbackConfig

ROOT = Path(__file__).parents[3]


def bad(findings):
    return {one.check: (one.found, one.fix) for one in findings if one.status != "ok"}


@pytest.fixture
def local(tmp_path):
    """The state directory of a store with a few records."""
    store = FeedbackStore.open(FeedbackConfig(), tmp_path)
    store.feedback.add([{"prompt": f"p{n}", "chosen": "x" * 900, "rejected": "b"} for n in range(50)])
    store.close()
    return tmp_path


def test_a_sound_store_is_described(local):
    findings = examine_store(local)
    assert not bad(findings)
    found = " ".join(one.found for one in findings)
    for words in ("is writable", "free", "intact", "50 records", "MiB"):
        assert words in found


def test_a_store_that_does_not_exist_yet_is_fine(tmp_path):
    findings = examine_store(tmp_path / "not" / "yet")
    assert not bad(findings)
    assert "none yet" in findings[-1].found
    assert not (tmp_path / "not").exists()


def test_the_path_of_a_url_is_examined_too(local, tmp_path):
    assert "50 records" in examine_store(tmp_path / "other", f"sqlite:///{local}/feedback.db")[-1].found
    [finding] = examine_store(tmp_path, "nonsense")
    assert "database_url" in finding.fix


def test_a_lock_is_named(local, monkeypatch):
    monkeypatch.setattr(store_health, "_LOCK_TIMEOUT_S", 0.1)
    blocker = sqlite3.connect(local / "feedback.db", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    assert "fuser" in bad(examine_store(local))["store lock"][1]
    blocker.close()
    assert not bad(examine_store(local))


@pytest.mark.parametrize(("start", "length"), [(0, 100), (8192, 30_000)], ids=["header", "pages"])
def test_corruption_is_named_with_a_way_out(local, start, length):
    path = local / "feedback.db"
    content = bytearray(path.read_bytes())
    content[start : start + length] = os.urandom(length)
    path.write_bytes(content)
    found, fix = bad(examine_store(local))["store contents"]
    assert "corrupt" in found
    assert ".recover" in fix


@pytest.mark.parametrize(("version", "is_bad"), [("1", False), ("99", True), ("two", True)])
def test_a_schema_that_this_release_cannot_read_is_named(local, version, is_bad):
    with sqlite3.connect(local / "feedback.db") as connection:
        connection.execute("UPDATE meta SET value = ?", (version,))
    assert ("store schema" in bad(examine_store(local))) == is_bad


READ_ONLY_CHILD = """
import os, sys
from pathlib import Path
from alignment.store.health import examine_store

if os.geteuid() == 0:  # root may write anywhere
    os.setgid(65534)
    os.setuid(65534)
for one in examine_store(Path(sys.argv[1])):
    print(one.status, one.check, one.found, one.fix)
"""


def test_a_directory_that_cannot_be_written_is_named(open_to_all):
    FeedbackStore.open(FeedbackConfig(), open_to_all).close()
    child = [sys.executable, "-c", READ_ONLY_CHILD, str(open_to_all)]
    said = subprocess.run(child, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "error store place" in said
    assert "Permission denied make it writable" in said


def test_a_full_disk_is_named(local, monkeypatch):
    usage = os.statvfs(local)
    monkeypatch.setattr(store_health, "_MIN_FREE_BYTES", usage.f_frsize * usage.f_blocks + 1)
    assert "free some disk" in bad(examine_store(local))["store place"][1]


def test_a_database_server_is_examined(postgres):
    url = postgres.url("health")
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("CREATE SCHEMA health"))
    assert "no tables yet" in [one.found for one in examine_store(Path("unused"), url)]
    store = FeedbackStore.open(FeedbackConfig(database_url=url), Path("unused"))
    store.feedback.add([{"prompt": "p", "chosen": "a", "rejected": "b"}])
    findings = examine_store(Path("unused"), url)
    assert not bad(findings)
    assert "1 records" in findings[-1].found
    store.database.write(lambda c: c.execute(meta.update().values(value="99")))
    store.close()
    assert "store schema" in bad(examine_store(Path("unused"), url))
    read_only = url.replace("search_path%3Dhealth", "search_path%3Dhealth%20-cdefault_transaction_read_only%3Don")
    assert "standby" in bad(examine_store(Path("unused"), read_only))["store lock"][1]
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA health CASCADE"))
    engine.dispose()


def test_a_database_server_that_does_not_answer_is_named(tmp_path):
    pytest.importorskip("psycopg")
    [finding] = examine_store(tmp_path, f"postgresql+psycopg://user:secret@/db?host={tmp_path}")
    assert finding.status == "error"
    assert "start the database server" in finding.fix
    assert "secret" not in finding.found

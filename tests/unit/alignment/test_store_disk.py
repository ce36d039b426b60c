"""What the store promises when the database below it fails: 503 while it lasts, and nothing acknowledged is lost."""

import os
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from sqlalchemy import event

from alignment.records.pairs import StoredResponse
from alignment.store import database
from alignment.store.feedback_store import FeedbackStore
from core.alignment_config import FeedbackConfig
from core.errors import StoreUnavailableError

CONFIG = FeedbackConfig(holdout_fraction=0.0)
ROOT = Path(__file__).parents[3]
PAGE_BYTES = 4096


def row(number, **extra):
    return {"prompt": f"p{number}", "chosen": "good", "rejected": "bad", **extra}


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.2)


@pytest.fixture
def local_store(tmp_path, impatient):
    """On SQLite at its default place."""
    store = FeedbackStore.open(CONFIG, tmp_path)
    yield store
    store.close()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB, and a function that mounts it anew with options."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options):
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True)

    if os.geteuid() != 0 or mount("size=2m").returncode != 0:
        pytest.skip("this process may not mount a file system")
    yield place, lambda options: mount(f"remount,{options}").returncode == 0
    subprocess.run(["umount", "-l", place], check=True)


def add_until_refused(store):
    """Ids of the acknowledged items."""
    acknowledged = []
    for number in range(5000):
        try:
            [outcome] = store.feedback.add([row(number, id=f"i{number}", chosen="x" * 2000)])
        except StoreUnavailableError:
            return acknowledged
        acknowledged.append(outcome.id)
    raise AssertionError("the disk never got full")


READ_ONLY_CHILD = """
import os, sys
from pathlib import Path
from alignment.store.feedback_store import FeedbackStore
from core.alignment_config import FeedbackConfig
from core.errors import StoreUnavailableError

state_dir, elsewhere = map(Path, sys.argv[1:])
FeedbackStore.open(FeedbackConfig(), elsewhere)  # imports everything
if os.geteuid() == 0:  # root may write anywhere
    os.setgid(65534)
    os.setuid(65534)
try:
    FeedbackStore.open(FeedbackConfig(), state_dir)
except StoreUnavailableError as error:
    print(type(error).__name__, flush=True)
sys.stdin.readline()
store = FeedbackStore.open(FeedbackConfig(), state_dir)
print(store.feedback.add([{"type": "comment", "value": "x"}])[0].status)
"""


def test_every_commit_is_flushed_to_the_disk(local_store):
    """SIGKILL cannot show this: the kernel still has the pages. A power cut would."""
    pragmas = {}
    for name in ("journal_mode", "synchronous", "busy_timeout"):
        pragmas[name] = local_store.database.read(
            lambda c, name=name: c.exec_driver_sql(f"PRAGMA {name}").scalar()
        )
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "busy_timeout": 200}


def test_a_database_that_another_program_writes_is_opened(tmp_path):
    """SQLite does not wait by itself where the file leaves its older journal, as a file of another program's has."""
    file = tmp_path / "theirs.db"
    writer = sqlite3.connect(file, check_same_thread=False)
    writer.executescript("CREATE TABLE theirs (x); BEGIN IMMEDIATE;")
    done = threading.Timer(0.3, writer.rollback)
    done.start()
    FeedbackStore.open(FeedbackConfig(database_url=f"sqlite:///{file}"), tmp_path).close()
    done.join()
    writer.close()


def test_a_full_database_is_unavailable_and_works_again_after(local_store):
    limit = {"pages": 0}

    @event.listens_for(local_store.database.engine, "connect")
    def limit_pages(connection, _record):
        connection.execute(f"PRAGMA max_page_count = {limit['pages'] or 2**30}")

    local_store.feedback.add([row(0, id="before")])
    limit["pages"] = 60
    local_store.close()
    with pytest.raises(StoreUnavailableError, match="full"):
        local_store.feedback.add([row(number, id=f"n{number}", chosen="x" * 1000) for number in range(500)])
    kept = local_store.counts().pairs["train"]
    with pytest.raises(StoreUnavailableError, match="full"):
        local_store.responses.put([StoredResponse(f"r{n}", 0, "p", "x" * 9000) for n in range(20)])
    assert local_store.feedback.get("before") is not None
    limit["pages"] = 0
    with pytest.raises(StoreUnavailableError):
        local_store.feedback.add(
            [row(1, chosen="x" * 30_000) for _ in range(9)]
        )  # the limited connection, for the last time
    assert local_store.feedback.add([row(2, id="after")])[0].status == "accepted"
    assert local_store.counts().pairs["train"] == kept + 1


def test_a_locked_database_is_unavailable_and_works_again_after(local_store, tmp_path):
    local_store.close()  # so that the next connection has the short timeout
    blocker = sqlite3.connect(tmp_path / "feedback.db", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailableError, match="locked"):
        local_store.feedback.add([row(1, id="x")])
    assert local_store.feedback.get("x") is None  # readers are not blocked
    blocker.execute("ROLLBACK")
    assert local_store.feedback.add([row(1, id="x")])[0].status == "accepted"


def test_a_corrupt_database_is_unavailable_and_works_again_when_restored(local_store, tmp_path):
    local_store.feedback.add([row(1, id="x")])
    local_store.close()
    database = tmp_path / "feedback.db"
    good = database.read_bytes()
    database.write_bytes(b"garbage" * 1000)
    for call in (
        lambda: local_store.feedback.add([row(2)]),
        lambda: local_store.feedback.get("x"),
        local_store.counts,
        local_store.pairs.counts,
    ):
        with pytest.raises(StoreUnavailableError, match="not a database"):
            call()
    local_store.close()
    database.write_bytes(good)
    assert local_store.feedback.get("x") is not None
    assert local_store.feedback.add([row(2)])[0].status == "accepted"


def test_a_read_only_database_is_unavailable_for_writing(local_store, tmp_path):
    local_store.feedback.add([row(1, id="x")])
    read_only = FeedbackConfig(database_url=f"sqlite:///file:{tmp_path}/feedback.db?mode=ro&uri=true")
    with pytest.raises(StoreUnavailableError):
        FeedbackStore.open(read_only, tmp_path).feedback.add([row(2)])


def test_a_read_only_directory_is_unavailable_until_it_is_writable(open_to_all):
    state_dir = open_to_all / "state"
    state_dir.mkdir()
    state_dir.chmod(0o555)
    command = [sys.executable, "-c", READ_ONLY_CHILD, str(state_dir), str(open_to_all / "elsewhere")]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert child.stdout.readline() == "StoreUnavailableError\n"
    state_dir.chmod(0o777)
    assert child.communicate("go\n", timeout=60)[0] == "accepted\n"


def test_a_state_dir_that_cannot_be_made_is_unavailable(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreUnavailableError):
            FeedbackStore.open(CONFIG, place)


def test_error_messages_hold_no_users_text(local_store, tmp_path):
    local_store.close()
    (tmp_path / "feedback.db").write_bytes(b"garbage" * 1000)
    with pytest.raises(StoreUnavailableError) as caught:
        local_store.feedback.add([row(1, chosen="my secret")])
    assert "secret" not in str(caught.value)
    assert "SELECT" not in str(caught.value)


def test_on_a_full_disk_reads_go_on_and_writes_do_too_once_there_is_room(small_disk):
    place, _ = small_disk
    ballast = place / "ballast"
    ballast.write_bytes(b"x" * 400_000)
    store = FeedbackStore.open(CONFIG, place)
    acknowledged = add_until_refused(store)
    assert len(acknowledged) > 20
    for _ in range(3):
        with pytest.raises(StoreUnavailableError):
            store.feedback.add([row(9999, chosen="x" * 30_000)])
    assert all(store.feedback.get(one) for one in acknowledged)
    assert store.counts().pairs["train"] == len(acknowledged)
    ballast.unlink()
    assert store.feedback.add([row(9999, id="after")])[0].status == "accepted"
    store.close()
    store = FeedbackStore.open(CONFIG, place)
    assert all(store.feedback.get(one) for one in [*acknowledged, "after"])
    assert store.counts().pairs["train"] == len(acknowledged) + 1
    store.close()


def test_a_disk_that_turns_read_only_can_still_be_read_and_is_written_again_after(small_disk):
    place, remount = small_disk
    store = FeedbackStore.open(CONFIG, place)
    store.feedback.add([row(1, id="before")])
    in_use = {path: path.read_bytes() for path in place.iterdir()}  # an error turns disks read-only in mid-use
    store.close()
    for path, content in in_use.items():
        path.write_bytes(content)
    assert remount("ro")
    for _ in range(2):
        with pytest.raises(StoreUnavailableError):
            store.feedback.add([row(2, id="during")])
        assert store.feedback.get("before") is not None
        assert [pair.prompt for pair in store.sampling.unscored_pairs(9)] == ["p1"]
    reader = FeedbackStore.open(CONFIG, place)  # a restart finds it so
    assert reader.feedback.get("before") is not None
    reader.close()
    store.close()
    assert remount("rw")
    assert store.feedback.get("during") is None
    assert store.feedback.add([row(2, id="during")])[0].status == "accepted"
    assert store.feedback.get("before") is not None
    store.close()


def test_garbage_in_a_page_is_unavailable_and_the_rest_can_still_be_read(local_store, tmp_path):
    acknowledged = [
        one.id for one in local_store.feedback.add([row(n, id=f"i{n}", chosen="x" * 500) for n in range(300)])
    ]
    local_store.close()
    path = tmp_path / "feedback.db"
    content = bytearray(path.read_bytes())
    with sqlite3.connect(path) as connection:
        [[leaf]] = connection.execute(
            "SELECT max(pageno) FROM dbstat WHERE name = 'feedback' AND pagetype = 'leaf'"
        )
    content[(leaf - 1) * PAGE_BYTES : leaf * PAGE_BYTES] = os.urandom(PAGE_BYTES)
    path.write_bytes(content)
    found = []
    for one in acknowledged:
        try:
            found.append(local_store.feedback.get(one))
        except StoreUnavailableError as error:
            assert "malformed" in str(error)  # noqa: PT017
    assert 0 < len(found) < 300
    assert all(found)


def test_a_damaged_write_ahead_log_is_cut_off_where_the_damage_begins(tmp_path):
    """SQLite takes it for a crash in the middle of a write, which it is made for; what came before it is there."""
    live, copy = tmp_path / "live", tmp_path / "copy"
    store = FeedbackStore.open(CONFIG, live)
    for number in range(12):
        store.feedback.add([row(number, id=f"i{number}")])
    copy.mkdir()
    (copy / "feedback.db").write_bytes((live / "feedback.db").read_bytes())
    log = bytearray((live / "feedback.db-wal").read_bytes())
    store.close()
    log[len(log) // 2 : len(log) // 2 + 100] = os.urandom(100)
    (copy / "feedback.db-wal").write_bytes(log)
    store = FeedbackStore.open(CONFIG, copy)
    kept = [store.feedback.get(f"i{number}") is not None for number in range(12)]
    assert kept == sorted(kept, reverse=True)
    assert 0 < sum(kept) < 12
    assert store.feedback.add([row(99)])[0].status == "accepted"
    assert store.database.read(lambda c: c.exec_driver_sql("PRAGMA integrity_check").scalar()) == "ok"
    store.close()

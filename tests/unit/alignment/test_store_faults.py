"""What the store promises when things break: crashes, races, full, locked, read-only and corrupt databases."""

import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import event

from alignment import schema
from alignment.group_commit import GroupCommit
from alignment.pairs import StoredResponse
from alignment.store import FeedbackStore
from core.config import FeedbackConfig
from core.errors import StoreUnavailableError

CONFIG = FeedbackConfig(holdout_fraction=0.0)
ROOT = Path(__file__).parents[3]


def row(number, **extra):
    return {"prompt": f"p{number}", "chosen": "good", "rejected": "bad", **extra}


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(schema, "BUSY_TIMEOUT_S", 0.2)
    store = FeedbackStore.open(CONFIG, tmp_path)
    yield store
    store.close()


CHILD = """
import sys
from pathlib import Path
from alignment.store import FeedbackStore
from core.config import FeedbackConfig
from core.errors import StoreUnavailableError

store = FeedbackStore.open(FeedbackConfig(), Path(sys.argv[1]))
number = 0
while True:
    item = {"prompt": f"p{number}", "chosen": "a", "rejected": "b", "id": f"{sys.argv[2]}-{number}"}
    try:
        [outcome] = store.add([item])
    except StoreUnavailableError:  # the other writer never pauses; a client would repeat, too
        continue
    print(outcome.id, flush=True)
    number += 1
"""


READ_ONLY_CHILD = """
import os, sys
from pathlib import Path
from alignment.store import FeedbackStore
from core.config import FeedbackConfig
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
print(store.add([{"type": "comment", "value": "x"}])[0].status)
"""


def spawn(state_dir, name):
    command = [sys.executable, "-c", CHILD, str(state_dir), name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_nothing_acknowledged_is_lost_when_the_process_is_killed(tmp_path):
    for attempt in range(2):
        child = spawn(tmp_path, f"run{attempt}")
        acknowledged = [child.stdout.readline().strip() for _ in range(20 + attempt * 17)]
        child.send_signal(signal.SIGKILL)
        acknowledged += child.stdout.read().split()
        child.wait()
        store = FeedbackStore.open(CONFIG, tmp_path)
        assert acknowledged[-1]
        assert all(store.get(one) for one in acknowledged)
        assert store.counts().pairs["train"] + store.counts().pairs["heldout"] >= len(acknowledged)
        store.close()


def test_every_commit_is_flushed_to_the_disk(store):
    """SIGKILL cannot show this: the kernel still has the pages. A power cut would."""
    pragmas = {}
    for name in ("journal_mode", "synchronous", "busy_timeout"):
        pragmas[name] = store._read(lambda c, name=name: c.exec_driver_sql(f"PRAGMA {name}").scalar())
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "busy_timeout": 200}


def test_two_processes_may_write_at_once(tmp_path):
    children = [spawn(tmp_path, name) for name in ("left", "right")]
    acknowledged = [child.stdout.readline().strip() for _ in range(12) for child in children]
    for child in children:
        child.kill()
        acknowledged += child.stdout.read().split()
        child.wait()
    store = FeedbackStore.open(CONFIG, tmp_path)
    assert all(store.get(one) for one in acknowledged)


def test_threads_that_race_with_the_same_ids_make_one_record_each(store):
    barrier = threading.Barrier(8)

    def post(_):
        barrier.wait()
        return [store.add([row(number, id=f"same-{number}")])[0] for number in range(15)]

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(post, range(8)))
    for outcomes in zip(*results, strict=True):
        assert sorted(one.status for one in outcomes) == ["accepted"] + ["duplicate"] * 7
        assert len({one.pair_id for one in outcomes}) == 1
    assert store.counts().pairs["train"] == 15


def test_two_stores_that_race_with_the_same_key_make_one_record(tmp_path):
    stores = [FeedbackStore.open(CONFIG, tmp_path) for _ in range(2)]
    barrier = threading.Barrier(2)

    def post(store):
        barrier.wait()
        return [store.add([row(1)], idempotency_key=f"k{number}")[0] for number in range(15)]

    with ThreadPoolExecutor(2) as pool:
        left, right = pool.map(post, stores)
    assert [sorted((a.status, b.status)) for a, b in zip(left, right, strict=True)] == [
        ["accepted", "duplicate"]
    ] * 15
    assert [a.id for a in left] == [b.id for b in right]
    assert stores[0].counts().feedback == {"preference": 15}


def test_racing_opposite_thumbs_use_every_rating_once(store):
    prompt = [{"role": "user", "content": "Hi?"}]
    store.put_responses([StoredResponse(f"r{n}", 0, prompt, f"text {n}") for n in range(24)])

    def rate(number):
        return store.add([{"response_id": f"r{number}", "value": number % 2 == 0}])[0]

    with ThreadPoolExecutor(6) as pool:
        outcomes = list(pool.map(rate, range(24)))
    assert all(one.status == "accepted" for one in outcomes)
    assert store.counts().pairs["train"] == 12


def test_a_full_database_is_unavailable_and_works_again_after(store):
    limit = {"pages": 0}

    @event.listens_for(store._engine, "connect")
    def limit_pages(connection, _record):
        connection.execute(f"PRAGMA max_page_count = {limit['pages'] or 2**30}")

    store.add([row(0, id="before")])
    limit["pages"] = 60
    store.close()
    with pytest.raises(StoreUnavailableError, match="full"):
        store.add([row(number, id=f"n{number}", chosen="x" * 1000) for number in range(500)])
    kept = store.counts().pairs["train"]
    with pytest.raises(StoreUnavailableError, match="full"):
        store.put_responses([StoredResponse(f"r{n}", 0, "p", "x" * 9000) for n in range(20)])
    assert store.get("before") is not None
    limit["pages"] = 0
    with pytest.raises(StoreUnavailableError):
        store.add([row(1, chosen="x" * 30_000) for _ in range(9)])  # the limited connection, for the last time
    assert store.add([row(2, id="after")])[0].status == "accepted"
    assert store.counts().pairs["train"] == kept + 1


def test_a_locked_database_is_unavailable_and_works_again_after(store, tmp_path):
    store.close()  # so that the next connection has the short timeout
    blocker = sqlite3.connect(tmp_path / "feedback.db", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailableError, match="locked"):
        store.add([row(1, id="x")])
    assert store.get("x") is None  # readers are not blocked
    blocker.execute("ROLLBACK")
    assert store.add([row(1, id="x")])[0].status == "accepted"


def test_a_corrupt_database_is_unavailable_and_works_again_when_restored(store, tmp_path):
    store.add([row(1, id="x")])
    store.close()
    database = tmp_path / "feedback.db"
    good = database.read_bytes()
    database.write_bytes(b"garbage" * 1000)
    for call in (lambda: store.add([row(2)]), lambda: store.get("x"), store.counts, store.backlog):
        with pytest.raises(StoreUnavailableError, match="not a database"):
            call()
    store.close()
    database.write_bytes(good)
    assert store.get("x") is not None
    assert store.add([row(2)])[0].status == "accepted"


def test_a_read_only_database_is_unavailable_for_writing(store, tmp_path):
    store.add([row(1, id="x")])
    read_only = FeedbackConfig(database_url=f"sqlite:///file:{tmp_path}/feedback.db?mode=ro&uri=true")
    with pytest.raises(StoreUnavailableError):
        FeedbackStore.open(read_only, tmp_path).add([row(2)])


def test_a_read_only_directory_is_unavailable_until_it_is_writable(tmp_path):
    state_dir = tmp_path / "state"
    state_dir.mkdir()
    state_dir.chmod(0o555)
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    command = [sys.executable, "-c", READ_ONLY_CHILD, str(state_dir), str(tmp_path / "elsewhere")]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert child.stdout.readline() == "StoreUnavailableError\n"
    state_dir.chmod(0o777)
    assert child.communicate("go\n", timeout=60)[0] == "accepted\n"


def test_a_state_dir_that_cannot_be_made_is_unavailable(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreUnavailableError):
            FeedbackStore.open(CONFIG, place)


def test_error_messages_hold_no_users_text(store, tmp_path):
    store.close()
    (tmp_path / "feedback.db").write_bytes(b"garbage" * 1000)
    with pytest.raises(StoreUnavailableError) as caught:
        store.add([row(1, chosen="my secret")])
    assert "secret" not in str(caught.value)
    assert "SELECT" not in str(caught.value)


def test_writers_that_wait_together_commit_together():
    commits = []

    def commit(jobs):
        commits.append(list(jobs))
        time.sleep(0.02)
        return [job * 10 for job in jobs]

    group = GroupCommit(commit)
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(group.submit, range(48))) == [number * 10 for number in range(48)]
    assert sorted(job for jobs in commits for job in jobs) == list(range(48))
    assert len(commits) < 24


def test_one_failing_job_does_not_fail_its_neighbours():
    def commit(jobs):
        time.sleep(0.02)
        if "bad" in jobs:
            raise ZeroDivisionError
        return list(jobs)

    group = GroupCommit(commit)
    with ThreadPoolExecutor(8) as pool:
        futures = {name: pool.submit(group.submit, name) for name in ("a", "b", "bad", "c", "d")}
    assert isinstance(futures.pop("bad").exception(), ZeroDivisionError)
    assert {future.result() for future in futures.values()} == {"a", "b", "c", "d"}

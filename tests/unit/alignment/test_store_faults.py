"""What the store promises when processes are killed and writers race."""

import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sqlalchemy import event

from alignment.records.pairs import StoredResponse
from alignment.store.database import GroupCommit
from alignment.store.feedback_store import FeedbackStore
from core.alignment_config import FeedbackConfig
from core.errors import StoreUnavailableError

CONFIG = FeedbackConfig(holdout_fraction=0.0)
ROOT = Path(__file__).parents[3]


def row(number, **extra):
    return {"prompt": f"p{number}", "chosen": "good", "rejected": "bad", **extra}


CHILD = """
import sys
from pathlib import Path
from alignment.store.feedback_store import FeedbackStore
from core.alignment_config import FeedbackConfig
from core.errors import StoreUnavailableError

store = FeedbackStore.open(FeedbackConfig(), Path(sys.argv[1]))
number = 0
while True:
    item = {"prompt": f"p{number}", "chosen": "a", "rejected": "b", "id": f"{sys.argv[2]}-{number}"}
    try:
        [outcome] = store.feedback.add([item])
    except StoreUnavailableError:  # the other writer never pauses; a client would repeat, too
        continue
    print(outcome.id, flush=True)
    number += 1
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
        assert all(store.feedback.get(one) for one in acknowledged)
        assert store.counts().pairs["train"] + store.counts().pairs["heldout"] >= len(acknowledged)
        store.close()


def test_two_processes_may_write_at_once(tmp_path):
    children = [spawn(tmp_path, name) for name in ("left", "right")]
    acknowledged = [child.stdout.readline().strip() for _ in range(12) for child in children]
    for child in children:
        child.kill()
        acknowledged += child.stdout.read().split()
        child.wait()
    store = FeedbackStore.open(CONFIG, tmp_path)
    assert all(store.feedback.get(one) for one in acknowledged)


def test_threads_that_race_with_the_same_ids_make_one_record_each(store):
    barrier = threading.Barrier(8)

    def post(_):
        barrier.wait()
        return [store.feedback.add([row(number, id=f"same-{number}")])[0] for number in range(15)]

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(post, range(8)))
    for outcomes in zip(*results, strict=True):
        assert sorted(one.status for one in outcomes) == ["accepted"] + ["duplicate"] * 7
        assert len({one.pair_id for one in outcomes}) == 1
    assert store.counts().pairs["train"] == 15


def test_two_stores_that_race_with_the_same_key_make_one_record(open_store):
    stores = [open_store() for _ in range(2)]
    barrier = threading.Barrier(2)

    def post(store):
        barrier.wait()
        return [store.feedback.add([row(1)], idempotency_key=f"k{number}")[0] for number in range(15)]

    with ThreadPoolExecutor(2) as pool:
        left, right = pool.map(post, stores)
    assert [sorted((a.status, b.status)) for a, b in zip(left, right, strict=True)] == [
        ["accepted", "duplicate"]
    ] * 15
    assert [a.id for a in left] == [b.id for b in right]
    assert stores[0].counts().feedback == {"preference": 15}


def test_racing_opposite_thumbs_use_every_rating_once(store):
    prompt = [{"role": "user", "content": "Hi?"}]
    store.responses.put([StoredResponse(f"r{n}", 0, prompt, f"text {n}") for n in range(24)])

    def rate(number):
        return store.feedback.add([{"response_id": f"r{number}", "value": number % 2 == 0}])[0]

    with ThreadPoolExecutor(6) as pool:
        outcomes = list(pool.map(rate, range(24)))
    assert all(one.status == "accepted" for one in outcomes)
    assert store.counts().pairs["train"] == 12


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


def test_writes_of_all_kinds_that_wait_together_share_a_transaction(store):
    database, commits = store.database, []
    event.listen(database.engine, "commit", commits.append)

    def write(number):
        if number % 2:
            return store.feedback.add([{"prompt": f"{number}?", "chosen": "Yes.", "rejected": "No."}])[0].status
        return store.responses.put([StoredResponse(f"r{number}", 0, [{"role": "user", "content": "Hi?"}], "Hi.")])

    def begin(connection):
        time.sleep(0.1)  # the others come meanwhile
        return connection.exec_driver_sql("SELECT 1").scalar()

    with ThreadPoolExecutor(17) as pool:
        first = pool.submit(database.write, begin)
        time.sleep(0.02)
        outcomes = list(pool.map(write, range(16)))
    assert first.result() == 1
    assert outcomes[1::2] == ["accepted"] * 8
    assert store.counts().responses == 8
    assert len(commits) < 8


def test_a_statement_that_fails_fails_alone(store):
    def good(number):
        def work(connection):
            time.sleep(0.02)
            return connection.exec_driver_sql(f"SELECT {number}").scalar()

        return work

    def bad(connection):
        connection.exec_driver_sql("INSERT INTO feedback (id) VALUES (NULL)")

    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(store.database.write, good(number)) for number in range(4)]
        failed = pool.submit(store.database.write, bad)
        futures += [pool.submit(store.database.write, good(number)) for number in range(4, 7)]
    assert isinstance(failed.exception(), StoreUnavailableError)
    assert [future.result() for future in futures] == list(range(7))

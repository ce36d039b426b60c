"""What the store promises when its database server fails, and what it asks of the server."""

import signal
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from alignment.store import database
from alignment.store.feedback_store import FeedbackStore
from core.alignment_config import FeedbackConfig
from core.errors import StoreUnavailableError


def row(number, **extra):
    return {"prompt": f"p{number}", "chosen": "good", "rejected": "bad", **extra}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["fast shutdown", "crash"])
def test_a_stopped_server_is_unavailable_and_works_again_when_it_is_back(postgres, how):
    url = postgres.url()
    store = FeedbackStore.open(FeedbackConfig(database_url=url), Path("unused"))
    store.feedback.add([row(1, id=f"before-{how}")])
    postgres.stop(how)
    try:
        for call in (lambda: store.feedback.add([row(2)]), lambda: store.feedback.get("before"), store.counts):
            with pytest.raises(StoreUnavailableError):
                call()
        with pytest.raises(StoreUnavailableError):
            FeedbackStore.open(FeedbackConfig(database_url=url), Path("unused"))
    finally:
        postgres.start()
    assert store.feedback.get(f"before-{how}") is not None
    assert store.feedback.add([row(2, id=f"after-{how}")])[0].status == "accepted"
    store.close()


def test_a_table_locked_by_another_client_of_the_server_is_unavailable_not_a_hang(postgres, monkeypatch):
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.2)
    store = FeedbackStore.open(FeedbackConfig(database_url=postgres.url()), Path("unused"))
    engine = create_engine(postgres.url())
    with engine.begin() as connection:
        connection.execute(text("LOCK TABLE feedback IN EXCLUSIVE MODE"))
        with pytest.raises(StoreUnavailableError, match="lock timeout"):
            store.feedback.add([row(1, id="locked")])
        assert store.feedback.get("locked") is None
    engine.dispose()
    assert store.feedback.add([row(1, id="locked")])[0].status == "accepted"
    store.close()


def test_an_acknowledgement_from_the_server_means_on_disk(postgres):
    store = FeedbackStore.open(FeedbackConfig(database_url=postgres.url()), Path("unused"))
    settings = {}
    for name in ("fsync", "synchronous_commit", "lock_timeout"):
        settings[name] = store.database.read(lambda c, name=name: c.exec_driver_sql(f"SHOW {name}").scalar())
    assert settings == {"fsync": "on", "synchronous_commit": "on", "lock_timeout": "5s"}
    store.close()

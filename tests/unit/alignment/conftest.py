"""Stores on SQLite and on PostgreSQL, with a clock that stands still."""

import tempfile
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from alignment.records.feedback import ResponseRef
from alignment.store.feedback_store import FeedbackStore
from alignment.store.responses import find_responses
from core.alignment_config import FeedbackConfig
from tests.support.clock import Clock
from tests.support.postgres_server import start_server
from tests.support.schema_1 import metadata

ALL_TRAIN = FeedbackConfig(holdout_fraction=0.0)


@pytest.fixture
def clock():
    return Clock(1000.0)


@pytest.fixture
def open_to_all():
    """A directory that other users may enter, for tests that give up their rights; pytest's own may not be."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="session")
def postgres():
    """The session's server. Who stops it starts it again."""
    server = start_server()
    yield server
    server.remove()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def database_url(request, tmp_path):
    """From a name to the URL of a database that is empty at first; the same name is the same database."""
    if request.param == "sqlite":
        yield lambda name="feedback": f"sqlite:///{tmp_path}/{name}.db"
        return
    server = request.getfixturevalue("postgres")
    admin = create_engine(server.url(), isolation_level="AUTOCOMMIT")
    made = set()

    def url(name="feedback"):
        if name not in made:
            made.add(name)
            with admin.connect() as connection:
                connection.execute(text(f'CREATE SCHEMA "{name}"'))
        return server.url(name)

    yield url
    with admin.connect() as connection:
        for name in made:
            connection.execute(text(f'DROP SCHEMA "{name}" CASCADE'))
    admin.dispose()


@pytest.fixture
def open_store(database_url, tmp_path, clock):
    """Opens stores, on both databases; all are closed at the end."""
    stores = []

    def open_one(config=ALL_TRAIN, name="feedback"):
        with_url = config.model_copy(update={"database_url": database_url(name)})
        stores.append(FeedbackStore.open(with_url, tmp_path, clock))
        return stores[-1]

    yield open_one
    for store in stores:
        store.close()


@pytest.fixture
def store(open_store):
    """A store of which every pair may be trained on."""
    return open_store()


@pytest.fixture
def response_of():
    """From a store and the name of a response to what is stored of it."""

    def find(store, response_id, choice_index=0):
        ref = ResponseRef(response_id, choice_index)
        return store.database.read(
            lambda connection: find_responses(connection, [ref], store.database.clock())
        ).get(ref)

    return find


@pytest.fixture
def schema_1():
    """The old release's tables."""
    return metadata.tables

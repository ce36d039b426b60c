"""A store of which every pair may be trained on, with a clock that stands still."""

import pytest

from alignment.store import FeedbackStore
from core.config import FeedbackConfig


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path, clock):
    store = FeedbackStore.open(FeedbackConfig(holdout_fraction=0.0), tmp_path, clock)
    yield store
    store.close()

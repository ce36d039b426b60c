"""Shared by all tests: the built-in model, built once and kept in pytest's cache."""

import pytest

from engine.tiny.build import ensure_tiny_assistant


@pytest.fixture(scope="session")
def model_cache(pytestconfig):
    """A state directory whose `models/` holds the built-in model."""
    directory = pytestconfig.cache.mkdir("mace-models")
    ensure_tiny_assistant(directory, show_progress=False)
    return directory


@pytest.fixture(scope="session")
def tiny_assistant(model_cache):
    """Directory of the built-in model."""
    return ensure_tiny_assistant(model_cache, show_progress=False)

"""Shared by all tests: the built-in model, built once and kept in pytest's cache; and no silent skips under CI."""

import os
import signal

import pytest

from engine.tiny.build import ensure_tiny_assistant

pytest.register_assert_rewrite("tests.support.shared_weights")  # tests that two modules inherit

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell ignores Ctrl-C for what it starts in the background; the commands under test must not inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _refuse_skip(report):
    """With CI=true, a test that is skipped has failed: what it needs is to be installed."""
    if os.environ.get("CI") == "true" and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"{reason} (a skip is a failure under CI=true)"
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tests that need a database server or a mount belong to `make test-all`."""
    for item in items:
        if {"postgres", "small_disk"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    return report if item.get_closest_marker("gpu") else _refuse_skip(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    return report if "gpu" in collector.nodeid else _refuse_skip(report)


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

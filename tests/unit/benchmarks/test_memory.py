import asyncio
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.cli import bench
from benchmarks.harness.statistics import ratio_of, trend_of
from benchmarks.studies.memory import command
from benchmarks.studies.memory.parts import Journal, MemoryOptions, load_trace, pruning_part
from benchmarks.studies.memory.windows import (
    Counts,
    StatLog,
    WatchedEngine,
    largest_that_fits,
    status_between,
)
from core.errors import ConfigError
from tests.support.memory_windows import grow, window
from tests.support.timed_engine import FakeEngine

MODEL = Path("model")


def stats(*, queries=0, hits=0, use=0.0, running=0, preempted=0):
    scheduler = SimpleNamespace(
        prefix_cache_stats=SimpleNamespace(queries=queries, hits=hits),
        kv_cache_usage=use,
        num_running_reqs=running,
    )
    return scheduler, SimpleNamespace(num_preempted_reqs=preempted)


# --- what is counted


def test_counts_add_up_over_iterations_and_begin_again_when_cleared():
    log = StatLog()
    log.record(*stats(queries=100, hits=20, use=0.5, running=3, preempted=1))
    log.record(*stats(queries=100, hits=60, use=1.0, running=2), mm_cache_stats=None, engine_idx=0)
    log.record(None, None)
    counts = log.read()
    assert counts.hit_ratio == pytest.approx(0.4)
    assert (counts.preemptions, counts.max_running, counts.num_iterations) == (1, 3, 2)
    assert (counts.kv_use_mean, counts.kv_use_max) == (pytest.approx(0.75), 1.0)
    log.clear()
    assert log.read() == Counts()
    assert log.read().hit_ratio is None


def test_totals_of_the_status_become_growth_and_levels_stay():
    before = {"pruned_blocks": 5, "free_blocks": 10}
    after = {"pruned_blocks": 12, "preemptions": 3, "free_blocks": 4, "ledger_error": None}
    found = status_between(before, after)
    assert found == {"pruned_blocks": 7, "preemptions": 3, "free_blocks": 4, "ledger_error": None}


def test_requests_share_a_system_prompt_and_keep_their_length():
    async def send():
        watched = WatchedEngine(FakeEngine(first_s=0, gap_s=0), StatLog())
        watched.share_prompts(6, 1000, seed=0)
        for number in range(40):
            _ = [ids async for ids in watched.decode(range(2000, 2010), f"r{number}", 1)]
        _ = [ids async for ids in watched.decode([2000], "short", 1)]
        return watched.prompts, [ids for _, _, ids, _ in watched.engine.seen]

    prompts, sent = asyncio.run(send())
    *full, short = sent
    assert {tuple(ids[:6]) for ids in full} == {tuple(prompt) for prompt in prompts}
    assert all(ids[6:] == [2006, 2007, 2008, 2009] for ids in full)
    assert short == [2000]


def test_counters_begin_when_the_window_opens_and_not_at_later_polls():
    async def poll():
        watched = WatchedEngine(FakeEngine(), StatLog())
        watched.stats.record(*stats(queries=100, hits=20))
        await watched.iterations(0)
        watched.stats.record(*stats(queries=7))
        await watched.iterations(3)
        return watched.stats.read()

    assert asyncio.run(poll()).prefix_queries == 7


# --- comparisons


def test_a_ratio_is_not_moved_by_one_disturbed_window():
    found = ratio_of([(2.0, 1.0), (2.1, 1.0), (1.9, 1.0), (2.05, 1.0), (1.95, 1.0), (2.0, 1.0), (40.0, 1.0)])
    assert found.ratio == pytest.approx(2.0, rel=0.05)
    assert 1.9 <= found.low < found.ratio < found.high
    certain = ratio_of([(2.0, 1.0)] * 6)
    assert (certain.ratio, certain.low, certain.high) == (pytest.approx(2), pytest.approx(2), pytest.approx(2))


@pytest.mark.parametrize(("confidence", "least"), [(0.95, 6), (0.99, 8)])
def test_too_few_pairs_give_no_interval(confidence, least):
    few, enough = (ratio_of([(2.0, 1.0)] * count, confidence) for count in (least - 1, least))
    assert (few.low, few.high) == (None, None)
    assert enough.low is not None


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        ratio = ratio_of([(float(value), 1.0) for value in np.exp(0.3 + 0.2 * rng.standard_t(3, 10))])
        held += ratio.low <= np.exp(0.3) <= ratio.high
    assert 0.92 <= held / 400 <= 0.99


def test_pairs_without_a_value_are_left_out_of_a_ratio():
    assert ratio_of([(None, 1.0), (0.0, 1.0)]) is None
    single = ratio_of([(3.0, 1.0), (None, 1.0)])
    assert (single.ratio, single.low, single.num_pairs) == (pytest.approx(3.0), None, 1)


def test_a_process_that_fills_its_caches_and_stops_is_flat():
    assert trend_of(*grow(0.0)).is_flat


def test_a_leak_of_two_percent_an_hour_is_seen():
    found = trend_of(*grow(2e7))
    assert not found.is_flat
    assert found.low < 2e7 < found.high


def test_a_size_that_goes_up_and_down_is_not_shown_to_grow():
    found = trend_of(*grow(0.0, noise=1e8))
    assert found.high > 1e7 * 1.1
    assert found.is_flat


def test_no_trend_is_claimed_of_a_few_readings():
    assert trend_of([0.0, 5.0, 10.0], [1.0, 1.0, 1.0]) is None
    assert trend_of([], []) is None


# --- search


@pytest.mark.parametrize("limit", [0, 1, 7, 13, 40])
@pytest.mark.parametrize("guess", [1, 10, 40])
def test_the_largest_batch_is_found_from_any_guess(limit, guess):
    async def fits(number):
        return number <= limit

    found, tried = asyncio.run(largest_that_fits(guess, 40, fits))
    assert found == limit
    assert len(tried) == len(set(tried)) <= 14
    assert all(1 <= number <= 40 for number in tried)


# --- journal


def test_windows_in_the_journal_are_not_measured_again(tmp_path):
    part = pruning_part(load_trace("pressure", MemoryOptions()))
    measured = []

    class Pool:
        model_dir = MODEL

        async def measure(self, setting, job, system_tokens):
            measured.append(setting)
            if len(measured) == 3:
                raise ConfigError("cut off")
            return window(pairs_per_s=float(len(measured)))

    path, options = tmp_path / "journal.jsonl", MemoryOptions(repeats=1)
    with pytest.raises(ConfigError, match="cut off"):
        asyncio.run(part.measure(Pool(), options, Journal(path)))
    done = asyncio.run(part.measure(Pool(), options, Journal(path)))
    names = [setting.name for setting in part.settings]
    assert measured == [*names[:3], *names[2:]]
    assert [result.metrics.pairs_per_s for _, result in done] == [1.0, 2.0, 4.0, 5.0]


def test_a_window_under_other_settings_is_measured_again(tmp_path):
    results = iter((1, 2, 3))

    async def measure():
        return next(results)

    async def ask():
        first = await Journal(tmp_path / "journal.jsonl").once("a", "before", measure)
        again = Journal(tmp_path / "journal.jsonl")
        return first, [
            await again.once(*what, measure) for what in (("a", "before"), ("a", "after"), ("b", "before"))
        ]

    assert asyncio.run(ask()) == (1, [1, 2, 3])


@pytest.mark.parametrize("text", ["{", '{"key": "a"}\n', "[]\n"])
def test_a_file_that_is_no_journal_is_refused(tmp_path, text):
    path = tmp_path / "journal.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match="no journal"):
        Journal(path)


# --- the command


def test_a_pruning_report_that_cannot_be_read_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    report = tmp_path / "report.json"
    report.write_text("{")
    monkeypatch.setattr(command, "model_directories", lambda *_, **__: pytest.fail("began to measure"))
    result = CliRunner().invoke(bench, ["memory", "--pruning-report", str(report)])
    assert result.exit_code == 1
    assert f"pruning report {report} is damaged" in result.output

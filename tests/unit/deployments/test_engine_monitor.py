import asyncio

import pytest
from prometheus_client import REGISTRY, Counter

from core.batch import ForwardShape, IterationSample, Plan
from core.types import SliceKind, SliceReport, SliceTiming
from deployments.monitors.engine_monitor import EngineMonitor
from engine.prefix_cache import PrefixCounts, read_generated_tokens, read_prefix_counts


def sample(forward_s, predicted_s, *, slices_s=0.0, budget_s=0.0, tokens=1):
    slices = [SliceTiming(SliceKind.LOSS, 1, slices_s)] if slices_s else []
    return IterationSample(
        ForwardShape(num_decode=tokens),
        forward_s,
        overhead_s=0.001,
        report=SliceReport(slices),
        plan=Plan(predicted_forward_s=predicted_s, finetune_budget_s=budget_s),
    )


def test_nothing_is_claimed_before_anything_was_measured():
    summary = EngineMonitor(lambda: None).iterations_to_wire()
    assert summary["iterations"] == 0
    assert summary["forward_prediction_error"] is None


def test_errors_are_relative_to_what_was_measured():
    monitor = EngineMonitor(lambda: None)
    monitor.observe([sample(0.1, 0.08), sample(0.1, 0.1), sample(0.1, 0.15), sample(0.1, None)])
    assert monitor.iterations_to_wire()["forward_prediction_error"]["median"] == pytest.approx(0.2)


def test_slices_beyond_their_budget_show_except_those_of_an_idle_engine():
    monitor = EngineMonitor(lambda: None)
    monitor.observe([sample(0.1, 0.1, slices_s=0.03, budget_s=0.02), sample(0.0, 0.0, slices_s=0.5, tokens=0)])
    summary = monitor.iterations_to_wire()
    assert summary["slices_over_budget_s"]["p95"] == pytest.approx(0.01)
    assert summary["slices_s"] == pytest.approx(0.53)
    assert summary["forward_s"] == pytest.approx(0.1)


def test_each_iteration_is_read_once():
    asked = []

    async def iterations(after):
        asked.append(after)
        return after + 2, [sample(0.1, 0.1), sample(0.1, 0.1)]

    monitor = EngineMonitor(lambda: None)
    for _ in range(2):
        asyncio.run(monitor.read(iterations))
    assert asked == [0, 2]
    assert monitor.iterations_to_wire()["iterations"] == 4


def test_the_sharing_ratio_is_of_all_tokens_and_of_the_last_minute():
    counts = iter([PrefixCounts(1000, 100), *[PrefixCounts(1000, 100)] * 58, PrefixCounts(2000, 900), None])
    monitor = EngineMonitor(lambda: next(counts))
    assert monitor.prefix_cache_to_wire()["sharing_ratio"] is None
    monitor.observe([])
    assert monitor.prefix_cache_to_wire()["sharing_ratio"] == pytest.approx(0.1)
    for _ in range(59):
        monitor.observe([])
    summary = monitor.prefix_cache_to_wire()
    assert (summary["prompt_tokens"], summary["cached_tokens"]) == (2000, 900)
    assert summary["sharing_ratio"] == pytest.approx(0.45)
    assert summary["recent_sharing_ratio"] == pytest.approx(0.8)
    monitor.observe([])  # no counts: nothing changes
    assert monitor.prefix_cache_to_wire() == summary


def test_counts_are_read_from_vllms_counters_of_all_engines():
    if read_prefix_counts() is not None:
        pytest.skip("vLLM's own counters live in this process")
    generated = Counter("vllm:generation_tokens", "tokens", ["engine"])
    queries = Counter("vllm:prefix_cache_queries", "tokens", ["engine"])
    hits = Counter("vllm:prefix_cache_hits", "tokens", ["engine"])
    try:
        queries.labels("0").inc(100)
        queries.labels("1").inc(50)
        hits.labels("0").inc(30)
        assert read_prefix_counts() == PrefixCounts(150, 30)
        assert read_generated_tokens() is None
        generated.labels("0").inc(7)
        generated.labels("1").inc(5)
        assert read_generated_tokens() == 12
    finally:
        REGISTRY.unregister(generated)
        REGISTRY.unregister(queries)
        REGISTRY.unregister(hits)

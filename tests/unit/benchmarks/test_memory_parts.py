import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.harness.client import RequestRecord
from benchmarks.harness.feeder import TaskRecord
from benchmarks.harness.jobs import TRACES
from benchmarks.studies.memory import parts, soak
from benchmarks.studies.memory.parts import MemoryOptions, ablation_part, load_trace, prefix_part, pruning_part
from benchmarks.studies.memory.report import draw, tables
from benchmarks.studies.memory.soak import SoakRecord, summarize_soak
from benchmarks.studies.memory.windows import Counts, StatLog, WatchedEngine
from simulator.trace import Trace
from tests.support.memory_windows import TIMES, grow, window
from tests.support.timed_engine import FakeEngine

MODEL = Path("model")


def test_sharing_on_and_off_meet_the_same_requests_side_by_side():
    cells = prefix_part(load_trace("prefix", MemoryOptions())).plan(MODEL, 2)
    for first, second in zip(cells[::2], cells[1::2], strict=True):
        assert {first.setting.name, second.setting.name} == {"sharing on", "sharing off"}
        assert (first.case, first.repeat) == (second.case, second.repeat)
        requests = [list(cell.job.trace.requests()) for cell in (first, second)]
        assert requests[0] == requests[1]
        kwargs = {c.setting.name: c.job.trace.args.engine.engine_kwargs for c in (first, second)}
        assert kwargs["sharing on"] == {**kwargs["sharing off"], "enable_prefix_caching": True}
    repeats = {cell.case.name: 1 + max(c.repeat for c in cells if c.case == cell.case) for cell in cells}
    assert repeats == {"overlap 0%": 2, "overlap 5%": 4, "overlap 20%": 2, "overlap 36%": 2, "overlap 60%": 2}
    assert len({(c.case.name, c.setting.name, c.repeat) for c in cells}) == len(cells)


def test_system_prompts_make_up_the_overlap_of_all_prompt_tokens():
    trace = load_trace("prefix", MemoryOptions(seconds=2000))
    lengths = [request.num_prompt_tokens for request in trace.requests()]
    for overlap in parts.OVERLAPS:
        system = parts.system_tokens(trace, overlap)
        assert system < min(lengths)
        assert system * len(lengths) / sum(lengths) == pytest.approx(overlap, abs=0.01)


def prefix_report(**on):
    part = prefix_part(load_trace("prefix", MemoryOptions()))
    rng = np.random.default_rng(1)
    measured = []
    for cell in part.plan(MODEL, 4):
        noise = float(rng.normal(1, 0.01))
        better = on if cell.setting.name == "sharing on" else {}
        values = {**TIMES, "pairs_per_s": 10.0, **better}
        measured.append((cell, window(**{name: value * noise for name, value in values.items()})))
    return {**part.summarize(measured), "checks": parts.low_overlap_checks(part, measured)}


def test_equal_windows_cost_nothing_measurable():
    report = prefix_report()
    assert len(report["rows"]) == 10
    assert [check["passed"] for check in report["checks"]] == [True] * 7


@pytest.mark.parametrize(("name", "value"), [("ttft_p50_s", 0.12), ("pairs_per_s", 8.0), ("overhead_share", 0.12)])
def test_a_cost_at_low_overlap_is_told(name, value):
    report = prefix_report(**{name: value})
    missed = [check["check"] for check in report["checks"] if not check["passed"]]
    assert len(missed) == 1
    assert missed[0].startswith(name)


def test_a_gain_at_low_overlap_is_no_cost():
    report = prefix_report(ttft_p50_s=0.05, pairs_per_s=20.0)
    assert all(check["passed"] for check in report["checks"])


def test_pruning_settings_differ_in_nothing_but_the_fraction():
    cells = pruning_part(load_trace("pressure", MemoryOptions())).plan(MODEL, 1)
    configs = [cell.job.trace.args.kv_pruning for cell in cells]
    assert [(c.start, c.max_fraction) for c in configs[1:]] == [("memory_pressure", f) for f in (0.1, 0.25, 0.5)]
    assert configs[0].start == "off"
    assert not any(c.require_gate for c in configs[1:])
    others = [cell.job.trace.args.model_copy(update={"kv_pruning": None}) for cell in cells]
    assert all(args == others[0] for args in others)


def test_an_ablation_takes_away_one_mechanism():
    cells = ablation_part(load_trace("pressure", MemoryOptions())).plan(MODEL, 1)
    found = {
        c.setting.name: (
            c.job.trace.args.engine.engine_kwargs["enable_prefix_caching"],
            c.job.trace.args.kv_pruning.start,
        )
        for c in cells
    }
    assert found == {
        "MACE": (True, "memory_pressure"),
        "/Prefix": (False, "memory_pressure"),
        "/Prune": (True, "off"),
        "/Prefix/Prune": (False, "off"),
    }


def test_what_an_ablation_loses_is_positive_where_the_mechanism_pays():
    pairs = [(window(slo_attainment=0.7), window(slo_attainment=a)) for a in (0.9, 0.92, 0.88, 0.9, 0.91, 0.89)]
    gain = parts.attainment_gain(pairs)
    assert gain["middle"] == pytest.approx(0.2)
    assert 0 < gain["low"] < 0.2 < gain["high"]


# --- report


def readings(times_s, sizes, heaps):
    rows = zip(times_s, sizes, heaps, strict=True)
    return [{"time_s": t, "kv_use": 0.97, "worker_rss_bytes": s, "heap_used_bytes": h} for t, s, h in rows]


def test_a_soak_keeps_more_requests_under_way_than_the_cache_holds(monkeypatch):
    monkeypatch.setattr(soak, "POLL_S", 0.05)

    async def play():
        engine = FakeEngine(first_s=0.02, gap_s=0.0)
        engine.kv_cache_tokens = 9000
        engine.memory_status = memory_status
        trace = Trace.load(TRACES / "memory-soak.yaml")
        return engine, *await soak.load_engine(WatchedEngine(engine, StatLog()), trace, 1000, 0.3)

    async def memory_status():
        return {"pruned_blocks": 1, "ledger_error": None}

    engine, record, num_clients = asyncio.run(play())
    assert num_clients == 1 + int(1.5 * 9000 / 2660)
    assert engine.running_steps == 0
    assert len(record.requests) > num_clients
    assert record.tasks
    assert all(request.succeeded for request in record.requests)
    assert record.readings[0]["pruned_blocks"] == 1.0


def asked(error=None):
    return RequestRecord("r1", 0.0, 0.0, 0.5, [0.1] * 99, 0, 10.4, error)


def soaked(**changes):
    times_s, sizes = grow(0.0)
    values = {
        "requests": [asked()] * 10,
        "tasks": [TaskRecord("t", 8)] * 5,
        "fullness": [True] * 9 + [False],
        "readings": readings(times_s, sizes, sizes),
        "elapsed_s": 1800.0,
        "counts": Counts(kv_use_mean=0.96, kv_use_max=1.0, num_iterations=10),
        **changes,
    }
    return summarize_soak(SoakRecord(**values), {"ledger_error": None}, all_blocks_free=True)


def test_a_clean_soak_passes_all_checks():
    report = soaked()
    assert [check["passed"] for check in report["checks"]] == [True] * 8
    assert len(report["series"]) <= 360
    assert (report["requests"], report["output_tokens"], report["share_of_time_full"]) == (10, 1000, 0.9)
    assert report["tbt"]["p50_s"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    "changes",
    [
        {"requests": [asked("cut")]},
        {"tasks": [TaskRecord("t", 8, error="no memory")]},
        {"out_of_memory": 1},
        {"ledger_errors": ["books"]},
        {"readings": readings(*grow(5e7), grow(0.0)[1])},
        {"readings": readings(*grow(0.0), grow(5e7)[1])},
    ],
    ids=["errors", "failed steps", "out of memory", "books", "resident memory", "heap in use"],
)
def test_each_fault_of_a_soak_is_told(changes):
    assert [check["passed"] for check in soaked(**changes)["checks"]].count(False) == 1


def test_where_the_heap_is_not_known_nothing_is_said_of_it():
    rows = [{k: v for k, v in row.items() if k != "heap_used_bytes"} for row in readings(*grow(0.0), grow(0.0)[1])]
    assert [check["passed"] for check in soaked(readings=rows)["checks"]] == [*[True] * 7, None]


def full_report():
    pressure = load_trace("pressure", MemoryOptions())
    pruning, ablation = pruning_part(pressure), ablation_part(pressure)
    pruned = pruning.summarize([(cell, window(pruned_blocks=3)) for cell in pruning.plan(MODEL, 2)])
    for row in pruned["rows"]:
        row["capacity"] = [{"context_tokens": context, "batch": 9} for context in parts.CONTEXTS]
    return {
        "prefix": prefix_report(),
        "pruning": pruned,
        "ablation": ablation.summarize([(cell, window()) for cell in ablation.plan(MODEL, 2)]),
        "soak": soaked(),
    }


def test_the_recorded_report_still_has_tables_and_a_picture(tmp_path):
    report = json.loads((TRACES.parent / "recorded" / "memory.json").read_text())
    assert len(list(tables(report))) == 11
    draw(report, tmp_path / "memory.png")


def test_every_part_has_tables_and_a_panel(tmp_path):
    report = full_report()
    found = list(tables(report))
    assert len(found) == 10
    assert all(table.row_count for table in found)
    assert all(column.header for table in found for column in table.columns)
    draw(report, tmp_path / "memory.png")
    assert (tmp_path / "memory.png").stat().st_size > 10_000


def test_a_part_that_was_not_measured_is_left_out(tmp_path):
    report = {"prefix": prefix_report()}
    assert len(list(tables(report))) == 3
    draw(report, tmp_path / "memory.png")


def test_rows_pool_attainment_and_sum_events_over_repeats():
    part = pruning_part(load_trace("pressure", MemoryOptions()))
    cells = part.plan(MODEL, 2)
    values = {"counts": {"preemptions": 2, "prefix_hits": 250}, "pruned_blocks": 5}
    results = [window(slo_attainment=0.5 + 0.5 * cell.repeat, **values) for cell in cells]
    rows = part.summarize(list(zip(cells, results, strict=True)))["rows"]
    assert [row["fraction"] for row in rows] == [0.0, 0.1, 0.25, 0.5]
    for row in rows:
        assert (row["pooled_slo_attainment"], row["preemptions"], row["pruned_blocks"]) == (0.75, 4, 10)
        assert row["hit_ratio"] == pytest.approx(0.25)

import asyncio
import dataclasses

import pytest

from core.types import SliceKind, TaskKind
from profiler.fit import fit_profile
from profiler.measure import (
    GridPoint,
    MeasurePlan,
    PointKind,
    coarse_to_fine,
    make_grid,
    measure_grid,
    measure_in_background,
)
from profiler.profile import Origin, Profile
from tests.support.synthetic_device import SyntheticDevice, decode, held_bytes, prefill
from tests.support.synthetic_engine import SyntheticEngine

ORIGIN = Origin(device="synthetic", model="m", num_threads=1)
PLAN = MeasurePlan(
    vocab_size=500,
    max_model_len=1024,
    max_num_seqs=16,
    max_tokens=512,
    max_slice_tokens=256,
    max_pair_tokens=1024,
    max_kv_tokens=16_384,
    budget_s=20.0,
    max_rounds=1,
    trains=True,
)


def test_the_grid_stays_within_the_engine_and_has_no_point_twice():
    grid = make_grid(PLAN)
    assert len(set(grid)) == len(grid)
    assert {point.kind for point in grid} == set(PointKind)
    for point in grid:
        assert point.batch <= PLAN.max_num_seqs
        assert point.context + point.num_tokens < PLAN.max_model_len
        if point.kind in (PointKind.DECODE, PointKind.MIXED):
            assert point.batch == 1 or point.batch * point.context <= PLAN.max_kv_tokens // 2
        if point.kind in (PointKind.EVALUATE, PointKind.TRAIN):
            assert point.num_tokens <= PLAN.max_slice_tokens


def test_without_training_nothing_is_trained_and_without_slices_nothing_evaluated():
    kinds = {point.kind for point in make_grid(dataclasses.replace(PLAN, trains=False))}
    assert PointKind.TRAIN not in kinds
    assert PointKind.EVALUATE in kinds
    kinds = {point.kind for point in make_grid(dataclasses.replace(PLAN, trains=False, max_slice_tokens=0))}
    assert kinds == {PointKind.PREFILL, PointKind.DECODE, PointKind.MIXED}


def test_a_grid_cut_after_a_third_is_still_well_spread():
    grid = make_grid(PLAN)
    part = grid[: len(grid) // 3]
    for kind in PointKind:
        whole = [point.work for point in grid if point.kind is kind]
        kept = [point.work for point in part if point.kind is kind]
        assert min(kept) == min(whole)
        assert max(kept) >= 0.5 * max(whole)


def test_coarse_to_fine_takes_the_ends_first_and_loses_nothing():
    points = [GridPoint(PointKind.PREFILL, 2**i) for i in range(3, 10)]
    ordered = coarse_to_fine(points)
    assert [point.num_tokens for point in ordered[:3]] == [8, 512, 64]
    assert set(ordered) == set(points)
    assert coarse_to_fine([]) == []


def test_a_measured_grid_gives_the_device_back():
    engine = SyntheticEngine()
    measurement = asyncio.run(measure_grid(engine, PLAN))
    profile = fit_profile(measurement.samples, ORIGIN, memory=measurement.memory)
    device = SyntheticDevice()
    for shape in (decode(1), decode(16, 500), prefill(16), prefill(512), prefill(256, 512)):
        assert profile.latency.forward_s(shape) == pytest.approx(device.exact_s(shape), rel=0.1)
    exact_s = device.exact_slice_s(SliceKind.BACKWARD_LAYER, 128)
    assert profile.latency.slice_s(SliceKind.BACKWARD_LAYER, 128) == pytest.approx(exact_s, rel=0.1)
    assert held_bytes(profile.memory, 200) == pytest.approx(30_000, rel=0.01)
    assert any(s.shape.num_decode and s.shape.num_prefills for s in measurement.samples)  # hybrid iterations
    assert any(s.shape.prefill_attention > s.shape.num_prefill_tokens**2 for s in measurement.samples)  # context
    assert engine.num_unfinished_requests() == 0
    assert measurement.num_points == len(make_grid(PLAN))


def test_the_same_seed_sends_the_same_prompts():
    plan = dataclasses.replace(PLAN, max_point_s=60.0, budget_s=600.0)  # on a busy machine as well
    first, second = SyntheticEngine(), SyntheticEngine()
    asyncio.run(measure_grid(first, plan))
    asyncio.run(measure_grid(second, plan))
    assert first.prompts == second.prompts
    other = SyntheticEngine()
    asyncio.run(measure_grid(other, dataclasses.replace(plan, seed=1)))
    assert other.prompts != first.prompts


def test_measuring_stops_when_the_budget_is_used():
    engine = SyntheticEngine(step_s=0.01)
    measurement = asyncio.run(measure_grid(engine, dataclasses.replace(PLAN, budget_s=0.5, max_point_s=0.2)))
    assert 0 < measurement.num_points < len(make_grid(PLAN))
    assert measurement.measured_s < 0.8


def test_points_expected_to_take_too_long_are_left_out():
    plan = dataclasses.replace(PLAN, max_point_s=1e-9)
    measurement = asyncio.run(measure_grid(SyntheticEngine(), plan))
    assert measurement.num_points == len(PointKind)  # the first of each kind, of which nothing is known


def test_a_request_that_arrives_aborts_the_point_at_once_and_it_is_repeated():
    plan = dataclasses.replace(PLAN, trains=False, is_background=True, max_slice_tokens=0, budget_s=1.5)

    async def scenario():
        engine = SyntheticEngine(step_s=0.02)
        measuring = asyncio.create_task(measure_grid(engine, plan))
        await asyncio.sleep(0.5)
        engine.foreign = 1
        await asyncio.sleep(0.05)
        assert not engine.requests  # gave way
        seen = len(engine.samples)
        await asyncio.sleep(0.2)
        assert len(engine.samples) == seen  # and stays away while the request runs
        engine.foreign = 0
        await asyncio.sleep(0.25)
        assert len(engine.samples) == seen  # nor at once when it has ended: the client may have more to ask
        await measuring
        assert len(engine.samples) > seen
        return engine

    engine = asyncio.run(scenario())
    assert engine.num_aborted >= 1
    assert engine.num_unfinished_requests() == 0


def test_the_background_profiler_only_evaluates_and_writes_a_profile(tmp_path):
    engine = SyntheticEngine()
    plan = dataclasses.replace(PLAN, trains=False, is_background=True)
    path = tmp_path / "profiles" / "p.json"
    asyncio.run(measure_in_background(engine, plan, ORIGIN, path, 64))
    assert Profile.load(path).memory.kv_bytes_per_token == 64
    assert {task.kind for task in engine.tasks} == {TaskKind.EVALUATE}


def test_the_background_profiler_survives_a_broken_engine(tmp_path, caplog):
    class Broken(SyntheticEngine):
        async def iterations(self, after=0):
            raise RuntimeError("engine died")

    plan = dataclasses.replace(PLAN, trains=False, is_background=True)
    path = tmp_path / "p.json"
    asyncio.run(measure_in_background(Broken(), plan, ORIGIN, path))
    assert not path.exists()
    assert "engine died" in caplog.text


def test_the_background_profiler_refuses_a_plan_that_would_train(tmp_path):
    with pytest.raises(ValueError, match="never trains"):
        asyncio.run(measure_in_background(SyntheticEngine(), PLAN, ORIGIN, tmp_path / "p.json"))


def test_cancelling_leaves_nothing_in_the_engine():
    async def scenario():
        engine = SyntheticEngine(step_s=0.01)
        measuring = asyncio.create_task(measure_grid(engine, PLAN))
        await asyncio.sleep(0.2)
        measuring.cancel()
        with pytest.raises(asyncio.CancelledError):
            await measuring
        await asyncio.sleep(0.01)
        assert engine.num_unfinished_requests() == 0

    asyncio.run(scenario())

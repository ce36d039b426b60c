import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.batch import ForwardShape, IterationSample
from core.types import SliceKind, SliceReport, SliceTiming
from profiler.fit import fit_profile
from profiler.online import OnlineLatencyModel
from profiler.profile import Origin
from tests.support.synthetic_device import SyntheticDevice, decode, prefill

ORIGIN = Origin(device="synthetic", model="m", num_threads=1)
COUNTS = st.integers(0, 5000)
SHAPES = st.builds(ForwardShape, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS)


@pytest.fixture(scope="module")
def profile():
    return fit_profile(SyntheticDevice().samples(400), ORIGIN)


def observe_many(model, device, count):
    for sample in device.samples(count):
        model.observe(sample)
    return model


def test_without_profile_nothing_is_known_but_an_empty_pass():
    model = OnlineLatencyModel()
    assert model.forward_s(decode(1)) is None
    assert model.forward_upper_s(decode(1)) is None
    assert model.slice_s(SliceKind.LOSS, 8) is None
    assert model.slice_upper_s(SliceKind.LOSS, 8) is None
    assert model.forward_s(ForwardShape()) == 0.0
    assert model.overhead_s == 0.0


def test_the_first_pass_bounds_bigger_and_smaller_ones_from_above():
    model = OnlineLatencyModel()
    model.observe(IterationSample(prefill(20), 0.010))
    assert model.forward_s(prefill(20)) == pytest.approx(0.010, rel=0.05)
    bigger_s = model.forward_s(prefill(200))
    assert 0.010 < bigger_s <= 0.1
    assert model.forward_upper_s(prefill(200)) >= 0.095
    assert model.forward_upper_s(decode(1)) >= 0.0095
    assert 0.010 < model.forward_s(decode(64)) <= 0.032


def test_the_first_slice_bounds_bigger_ones_from_above():
    model = OnlineLatencyModel()
    model.observe(
        IterationSample(ForwardShape(), 0.0, report=SliceReport([SliceTiming(SliceKind.POLICY_LAYER, 64, 0.01)]))
    )
    assert model.slice_s(SliceKind.POLICY_LAYER, 64) == pytest.approx(0.01, rel=0.05)
    assert 0.01 < model.slice_s(SliceKind.POLICY_LAYER, 640) <= 0.1
    assert model.slice_upper_s(SliceKind.POLICY_LAYER, 640) >= 0.095
    assert model.slice_s(SliceKind.BACKWARD_LAYER, 64) is None


def test_it_converges_to_a_linear_device_without_a_profile():
    device = SyntheticDevice(noise=0.05)
    model = observe_many(OnlineLatencyModel(), device, 300)
    for shape in (decode(1), decode(32, 1000), prefill(16), prefill(512), prefill(512, 1024)):
        assert model.forward_s(shape) == pytest.approx(device.exact_s(shape), rel=0.12)
    for kind, num_tokens in device.slices():
        assert model.slice_s(kind, num_tokens) == pytest.approx(device.exact_slice_s(kind, num_tokens), rel=0.1)
    assert model.overhead_s == pytest.approx(1e-3, rel=0.1)


@pytest.mark.parametrize("slowdown", [2.0, 0.5, 4.0])
def test_a_device_that_changes_speed_is_followed_for_shapes_not_seen_since(profile, slowdown):
    device = SyntheticDevice(noise=0.05)
    model = observe_many(OnlineLatencyModel(profile), device, 200)
    device.slowdown = slowdown
    for step in range(50):  # decode only, at small batches and contexts
        model.observe(device.sample(decode(1 + step % 4), [(SliceKind.POLICY_LAYER, 64)]))
    for shape in (decode(32, 1000), prefill(512), prefill(128, 1024)):
        assert model.forward_s(shape) == pytest.approx(device.exact_s(shape), rel=0.15)
    expected_s = device.exact_slice_s(SliceKind.POLICY_LAYER, 512)
    assert model.slice_s(SliceKind.POLICY_LAYER, 512) == pytest.approx(expected_s, rel=0.15)


def test_a_device_twice_as_slow_is_followed_within_20_iterations(profile):
    device = SyntheticDevice(noise=0.05)
    model = observe_many(OnlineLatencyModel(profile), device, 200)
    device.slowdown = 2.0
    for _ in range(20):
        model.observe(device.sample(decode(8)))
    assert model.forward_s(prefill(256)) == pytest.approx(device.exact_s(prefill(256)), rel=0.15)


@pytest.mark.parametrize("outlier", [50.0, 0.02])
@pytest.mark.parametrize("known", [True, False])
def test_one_outlier_moves_no_prediction_much(profile, outlier, known):
    device = SyntheticDevice(noise=0.05)
    model = observe_many(OnlineLatencyModel(profile if known else None), device, 100)
    shapes = (decode(8), decode(32, 500), prefill(256))
    before_s = [model.forward_s(shape) for shape in shapes]
    slice_s = model.slice_s(SliceKind.OPTIMIZER, 0)
    timing = SliceTiming(SliceKind.OPTIMIZER, 0, slice_s * outlier)
    model.observe(IterationSample(decode(8), before_s[0] * outlier, report=SliceReport([timing])))
    for shape, expected_s in zip(shapes, before_s, strict=True):
        assert model.forward_s(shape) == pytest.approx(expected_s, rel=0.3)
    assert model.slice_s(SliceKind.OPTIMIZER, 0) == pytest.approx(slice_s, rel=0.3)


def test_a_hundred_thousand_equal_batches_do_not_wind_it_up(profile):
    device = SyntheticDevice(noise=0.1)
    model = observe_many(OnlineLatencyModel(profile), device, 100)
    shape = decode(8)
    exact_s = device.exact_s(shape)
    for _ in range(100_000):
        model.observe(IterationSample(shape, exact_s * device.jitter()))
    other = prefill(256)
    assert model.forward_s(other) == pytest.approx(device.exact_s(other), rel=0.3)
    for _ in range(5):
        model.observe(device.sample(other))
    assert model.forward_s(other) == pytest.approx(device.exact_s(other), rel=0.2)
    assert model.forward_s(shape) == pytest.approx(exact_s, rel=0.2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1.0, 0.0, 1e9])
def test_values_that_are_no_latencies_change_nothing(profile, bad):
    model = OnlineLatencyModel(profile)
    before = (model.forward_s(decode(8)), model.slice_s(SliceKind.OPTIMIZER, 0))
    model.observe(IterationSample(decode(8), bad, 0.0, SliceReport([SliceTiming(SliceKind.OPTIMIZER, 0, bad)])))
    model.observe(IterationSample(ForwardShape(num_decode=-3), 0.01))
    assert (model.forward_s(decode(8)), model.slice_s(SliceKind.OPTIMIZER, 0)) == before
    overhead_s = model.overhead_s
    model.observe(IterationSample(ForwardShape(), 0.0, bad if bad else math.nan))
    assert model.overhead_s == overhead_s


def test_a_slice_that_ran_out_of_memory_teaches_nothing(profile):
    model = OnlineLatencyModel(profile)
    before_s = model.slice_s(SliceKind.OPTIMIZER, 0)
    timings = [SliceTiming(SliceKind.OPTIMIZER, 0, before_s * 3)]
    model.observe(IterationSample(ForwardShape(), 0.0, report=SliceReport(timings, out_of_memory=True)))
    assert model.slice_s(SliceKind.OPTIMIZER, 0) == before_s


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("noise", [0.05, 0.3])
def test_about_95_percent_stay_below_the_upper_estimate(profile, known, noise):
    device = SyntheticDevice(noise=noise)
    model = observe_many(OnlineLatencyModel(profile if known else None), device, 300)
    below = below_slices = 0
    samples = SyntheticDevice(noise=noise, seed=7).samples(1000)
    for sample in samples:
        below += sample.forward_s <= model.forward_upper_s(sample.shape)
        timing = sample.report.slices[1]
        below_slices += timing.latency_s <= model.slice_upper_s(timing.kind, timing.num_tokens)
        model.observe(sample)
    assert 0.92 <= below / 1000 <= 0.98
    assert 0.92 <= below_slices / 1000 <= 0.98


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(SHAPES, st.floats(1e-6, 10.0)), max_size=30),
    base=SHAPES,
    extra=SHAPES,
    known=st.booleans(),
)
def test_predictions_are_monotone_finite_and_never_negative(profile, shapes, base, extra, known):
    model = OnlineLatencyModel(profile if known else None)
    for shape, latency_s in shapes:
        timing = SliceTiming(SliceKind.LOSS, shape.num_decode, latency_s)
        model.observe(IterationSample(shape, latency_s, latency_s, SliceReport([timing])))
    expected_s = model.forward_s(base)
    if expected_s is not None:
        for name in ForwardShape.__slots__:
            values = {field: getattr(base, field) for field in ForwardShape.__slots__}
            values[name] += getattr(extra, name)
            larger_s = model.forward_s(ForwardShape(**values))
            # Nothing at all takes no time; of anything more, an engine that has seen nothing knows nothing.
            assert larger_s >= expected_s if larger_s is not None else base.num_tokens == 0
        assert 0.0 <= expected_s < math.inf
        assert model.forward_upper_s(base) >= expected_s
    slice_s = model.slice_s(SliceKind.LOSS, 5)
    if slice_s is not None:
        assert 0.0 <= slice_s <= model.slice_s(SliceKind.LOSS, 6) < math.inf

import json

import pytest

from core.batch import ForwardShape, IterationSample
from core.errors import ProfileError
from core.types import SliceKind
from profiler.fit import fit_profile, fit_raw
from profiler.profile import QUANTILE_LEVELS, Origin, Profile, forward_features, profile_path
from tests.support.synthetic_device import FORWARD, SLICES, SyntheticDevice, decode, held_bytes, prefill

ORIGIN = Origin(device="synthetic", model="org/model", num_threads=1, seed=3)
MEMORY = [(n, 1_000_000 + 5000 * n) for n in (32, 64, 256, 512)]


@pytest.fixture(scope="module")
def profile():
    return fit_profile(SyntheticDevice().samples(400), ORIGIN, memory=MEMORY, kv_bytes_per_token=512)


def test_the_fit_finds_the_device_and_states_an_honest_error(profile):
    device = SyntheticDevice()
    for shape in (decode(1), decode(32, 1000), prefill(16), prefill(512, 1024)):
        assert profile.latency.forward_s(shape) == pytest.approx(device.exact_s(shape), rel=0.06)
    for kind, (constant, per_token) in SLICES.items():
        assert profile.latency.slice_s(kind, 300) == pytest.approx(constant + 300 * per_token, rel=0.05)
    assert profile.latency.slice_s(SliceKind.LOSS, 8) is None
    assert profile.latency.forward_s(ForwardShape()) == 0.0
    # The mean of |x| for a lognormal deviation of 5 % has its median at 3.4 % and its 95th percentile at 10 %.
    assert 0.02 < profile.forward_error.median < 0.05
    assert 0.06 < profile.forward_error.p95 < 0.15
    assert profile.forward_error.num_rows == 100


def test_outliers_of_a_noisy_machine_do_not_move_the_fit():
    device = SyntheticDevice(seed=1)
    samples = device.samples(400)
    for sample in samples[::15]:
        sample.forward_s *= 20
        sample.report.slices[0].latency_s *= 20
    fitted = fit_profile(samples, ORIGIN)
    assert fitted.latency.forward_s(decode(16, 500)) == pytest.approx(device.exact_s(decode(16, 500)), rel=0.06)
    assert fitted.latency.slice_s(SliceKind.POLICY_LAYER, 256) == pytest.approx(
        device.exact_slice_s(SliceKind.POLICY_LAYER, 256), rel=0.06
    )
    assert fitted.forward_error.p95 > 0.5  # they are not left out of the stated error
    assert fitted.forward_ratios[-1] > 15


def test_coefficients_are_never_negative():
    device = SyntheticDevice(noise=0.4)
    fitted = fit_profile(device.samples(30), ORIGIN)
    assert all(coefficient >= 0 for coefficient in fitted.latency.forward)
    assert all(c >= 0 for pair in fitted.latency.slices.values() for c in pair)


def test_residual_quantiles_are_centred_and_ordered(profile):
    for ratios in (profile.forward_ratios, *profile.slice_ratios.values()):
        assert len(ratios) == len(QUANTILE_LEVELS)
        assert list(ratios) == sorted(ratios)
        assert ratios[QUANTILE_LEVELS.index(0.5)] == pytest.approx(1.0, abs=0.03)
    assert profile.overhead_s == pytest.approx(1e-3, rel=0.05)


def test_memory_is_an_upper_line(profile):
    assert held_bytes(profile.memory, 128) == pytest.approx(1_000_000 + 5000 * 128, rel=0.01)
    noisy = fit_profile(SyntheticDevice().samples(20), ORIGIN, memory=[*MEMORY, (64, 3_000_000)])
    assert held_bytes(noisy.memory, 64) >= 3_000_000
    assert profile.memory.kv_bytes_per_token == 512


def test_few_or_unusable_samples_are_refused():
    good = SyntheticDevice().samples(11)
    bad = [IterationSample(decode(1), value) for value in (0.0, float("nan"), float("inf"))]
    with pytest.raises(ProfileError, match="11 forward passes are too few"):
        fit_profile(good + bad * 5, ORIGIN)


def test_one_size_of_slices_is_split_in_halves():
    device = SyntheticDevice(noise=0.01)
    samples = [device.sample(device.shape(), [(SliceKind.POLICY_LAYER, 64)]) for _ in range(20)]
    constant, per_token = fit_profile(samples, ORIGIN).latency.slices[SliceKind.POLICY_LAYER]
    assert constant == pytest.approx(64 * per_token)
    exact_s = device.exact_slice_s(SliceKind.POLICY_LAYER, 64)
    assert constant + 64 * per_token == pytest.approx(exact_s, rel=0.02)


def test_a_profile_survives_the_disk_and_fits_again_to_the_same(profile, tmp_path):
    path = profile_path(tmp_path, "Intel(R) Xeon(R) @ 2.1GHz, 2 threads", "org/Model-1.5B")
    assert path.relative_to(tmp_path).as_posix() == "profiles/intel-r-xeon-r-2.1ghz-2-threads/org-model-1.5b.json"
    profile.save(path)
    loaded = Profile.load(path)
    assert loaded == profile
    assert fit_raw(loaded.samples, loaded.origin, kv_bytes_per_token=512) == profile
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "is damaged"),
        (lambda text: "[]", "schema version None"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 99'), "schema version 99"),
        (lambda text: text.replace('"num_threads": 1', '"num_threads": "x"'), r"damaged at origin\.num_threads"),
        (lambda text: text.replace('"forward": [', '"forward": [-1.0,', 1), "damaged at latency"),
        (lambda text: json.dumps({**json.loads(text), "extra": 1}), "damaged at extra"),
    ],
)
def test_a_damaged_or_foreign_file_gets_a_clear_error(profile, tmp_path, damage, message):
    path = tmp_path / "p.json"
    profile.save(path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(ProfileError, match=message):
        Profile.load(path)


def test_a_missing_file_or_an_unwritable_place_gets_a_clear_error(profile, tmp_path):
    with pytest.raises(ProfileError, match="cannot read"):
        Profile.load(tmp_path / "none.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(ProfileError, match="cannot write"):
        profile.save(tmp_path / "file" / "p.json")


def test_synthetic_coefficients_have_one_for_each_feature():
    assert len(FORWARD) == len(forward_features(ForwardShape()))


def test_what_the_linear_form_misses_is_no_noise():
    """A device that is 40 % slower on every batch above 16 requests, always by the same."""
    samples = [
        IterationSample(ForwardShape(num_decode=batch, decode_context=100 * batch), latency_s, 0.001)
        for batch in (1, 2, 4, 8, 16, 24, 32, 48, 64)
        for latency_s in [(0.01 + 0.001 * batch) * (1.4 if batch > 16 else 1.0)] * 20
    ]
    fitted = fit_profile(samples, ORIGIN)
    assert fitted.forward_ratios[-1] / fitted.forward_ratios[0] > 1.1
    assert fitted.forward_noise[0] == pytest.approx(1.0, abs=1e-6)
    assert fitted.forward_noise[-1] == pytest.approx(1.0, abs=1e-6)

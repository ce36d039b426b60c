from core.config import SchedulerConfig, SloConfig
from scheduler.iteration.slo import slo_warnings
from tests.support.known_device import KnownDevice, UnknownDevice


def warnings(device, **slo):
    return slo_warnings(SloConfig(**slo), SchedulerConfig(), device)


def test_targets_that_the_device_can_meet_are_fine():
    assert warnings(KnownDevice(base_s=0.01), ttft_s=1.0, tbt_s=0.1) == []


def test_a_tbt_target_below_one_decode_step_cannot_be_met():
    (text,) = warnings(KnownDevice(base_s=0.2, token_s=0.0), ttft_s=1.0, tbt_s=0.1)
    assert "slo.tbt_s is 0.1 s" in text
    assert "cannot be met" in text


def test_a_tbt_target_just_above_leaves_nothing_for_training():
    (text,) = warnings(KnownDevice(base_s=0.09, token_s=0.0), ttft_s=1.0, tbt_s=0.1)
    assert "nothing is left for training" in text
    assert "0.14 s would leave room" in text


def test_a_target_that_leaves_less_than_a_slice_leaves_nothing():
    device = KnownDevice(base_s=0.07, token_s=0.0, overhead_s=0.0, slice_token_s=0.001)
    (text,) = warnings(device, ttft_s=1.0, tbt_s=0.1)
    assert "nothing is left for training" in text
    enough_s = float(text.partition("served; ")[2].split(" s ")[0])
    assert warnings(device, ttft_s=1.0, tbt_s=enough_s) == []


def test_a_ttft_target_below_one_prompt_cannot_be_met():
    (text,) = warnings(KnownDevice(base_s=0.0, token_s=0.01), ttft_s=0.5, tbt_s=0.1)
    assert "slo.ttft_s is 0.5 s" in text


def test_an_unknown_device_is_not_judged():
    assert warnings(UnknownDevice(), ttft_s=0.001, tbt_s=0.001) == []

import pytest

from profiler.energy import EnergyMeter
from profiler.energy_account import EnergyAccount


class Fixed:
    name = "rapl"

    def read_j(self):
        return 0.0


METER = EnergyMeter([Fixed()])


def test_joules_over_idle_go_to_whoever_kept_the_device_busy():
    account = EnergyAccount()
    account.add(10, 200, 0, 0)  # idles at 20 W
    account.add(1, 100, 0.6, 0)  # 80 J over idle, all of serving
    account.add(1, 120, 0.2, 0.6)  # 100 J, a quarter of serving
    found = account.to_wire(METER, num_tokens=500, num_pairs=10)
    assert found["idle_w"] == pytest.approx(20)
    assert found["joules_per_1000_tokens"] == pytest.approx((80 + 25) / 0.5)
    assert found["joules_per_pair"] == pytest.approx(75 / 10)
    assert (found["sensors"], found["reason"]) == (["rapl"], None)


def test_what_is_shared_is_all_that_was_measured():
    account = EnergyAccount()
    account.add(10, 100, 0, 0)
    for forward_s, slices_s in ((0.3, 0.1), (0.0, 0.9), (2.5, 0.5)):
        account.add(1, 60, forward_s, slices_s)
    found = account.to_wire(METER, num_tokens=1000, num_pairs=1)
    assert found["joules_per_1000_tokens"] + found["joules_per_pair"] == pytest.approx(3 * (60 - 10))


def test_nothing_is_claimed_before_idling_is_known():
    account = EnergyAccount()
    account.add(1, 100, 0.6, 0.1)
    account.add(4, 80, 0, 0)
    found = account.to_wire(METER, 100, 1)
    assert (found["joules_per_1000_tokens"], found["joules_per_pair"], found["idle_w"]) == (None, None, None)
    assert "known after 5 s without work" in found["reason"]


def test_without_tokens_or_pairs_there_is_nothing_to_divide_by():
    account = EnergyAccount()
    account.add(10, 100, 0, 0)
    found = account.to_wire(METER, 0, 0)
    assert (found["joules_per_1000_tokens"], found["joules_per_pair"], found["reason"]) == (None, None, None)


def test_a_machine_that_idled_dearer_than_it_worked_gives_no_negative_joules():
    account = EnergyAccount()
    account.add(10, 1000, 0, 0)
    account.add(1, 50, 1, 0)
    assert account.to_wire(METER, 1000, 0)["joules_per_1000_tokens"] == 0


def test_without_a_sensor_the_reason_is_that():
    account = EnergyAccount()
    account.add(10, 0, 0, 0)
    found = account.to_wire(EnergyMeter([], {"rapl": "no RAPL here"}), 1000, 1)
    assert found == {
        "sensors": [],
        "reason": "no RAPL here",
        "idle_w": None,
        "joules_per_1000_tokens": None,
        "joules_per_pair": None,
    }

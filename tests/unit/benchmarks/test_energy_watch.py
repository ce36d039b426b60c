import pytest

from benchmarks.harness.energy import EnergyWatch, told
from profiler.energy import EnergyMeter


class Watts:
    """A machine of so many watts, by the clock of the test."""

    name = "rapl"

    def __init__(self):
        self.now_s, self.watts, self.joules = 0.0, 10.0, 0.0

    def __call__(self):
        return self.now_s

    def read_j(self):
        return self.joules

    def run(self, seconds, watts):
        self.now_s += seconds
        self.joules += seconds * watts


def test_a_window_costs_what_it_took_over_idling():
    machine = Watts()
    watch = EnergyWatch(EnergyMeter([machine]), machine)
    machine.run(100, 500)  # a server starts
    watch.skip()
    machine.run(10, 10)
    watch.add()
    machine.run(4, 60)
    watch.add(forward_s=1.0, slices_s=3.0)
    found = watch.to_wire(num_tokens=500, num_pairs=2.5)
    assert found["idle_w"] == pytest.approx(10)
    assert found["joules_per_1000_tokens"] == pytest.approx(200 / 4 / 0.5)
    assert found["joules_per_pair"] == pytest.approx(150 / 2.5)
    assert told(found) == "10 W idle, 100 J/1,000 tokens, 60 J/pair"


def test_without_a_sensor_nothing_waits_and_the_report_says_so():
    watch = EnergyWatch(EnergyMeter([], {"rapl": "no RAPL here"}))
    watch.idle()
    watch.add(forward_s=1.0)
    assert told(watch.to_wire(10, 1)) == "energy is not known: no RAPL here"
    assert watch.told() == {"sensors": [], "reason": "no RAPL here"}

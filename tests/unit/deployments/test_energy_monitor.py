import pytest
from prometheus_client import REGISTRY

from core.batch import ForwardShape, IterationSample
from core.types import SliceKind, SliceReport, SliceTiming
from deployments.monitors.energy import EnergyMonitor
from profiler.energy import EnergyMeter


class Scripted:
    """A sensor, and the clock and token count of the same readings."""

    name = "scripted"

    def __init__(self, *readings):
        self.readings = iter(readings)
        self.now = (0.0, 0.0, 0)

    def read_j(self):
        self.now = next(self.readings)
        return self.now[1]


def monitor_of(*readings):
    """Each reading is seconds, joules and generated tokens so far."""
    sensor = Scripted(*readings)
    clock = iter([reading[0] for reading in readings])
    return EnergyMonitor(EnergyMeter([sensor]), lambda: sensor.now[2], lambda: next(clock))


def iteration(forward_s, slices_s=0.0):
    slices = [SliceTiming(SliceKind.LOSS, 1, slices_s)] if slices_s else []
    return IterationSample(ForwardShape(num_decode=int(forward_s > 0)), forward_s, report=SliceReport(slices))


def counted(sensor):
    return REGISTRY.get_sample_value("mace_energy_joules_total", {"component": "executor", "sensor": sensor})


def test_readings_become_joules_per_token_and_per_pair_and_a_counter():
    monitor = monitor_of((0, 5, 100), (10, 105, 100), (11, 165, 350), (12, 195, 350))
    for samples in ([], [], [iteration(0.5)], [iteration(0.0, 0.4)]):
        monitor.observe(samples, is_at_rest=not samples)
    found = monitor.to_wire(num_pairs=4)
    assert found["idle_w"] == pytest.approx(10)
    assert found["joules_per_1000_tokens"] == pytest.approx(50 / 0.25)
    assert found["joules_per_pair"] == pytest.approx(20 / 4)
    assert found["joules"] == {"scripted": 195}
    assert counted("scripted") == pytest.approx(195)


def test_what_happened_around_a_death_is_nobodys():
    monitor = monitor_of((0, 0, 0), (10, 100, 0), (70, 9000, 0), (71, 9010, 0))
    for _ in range(2):
        monitor.observe([], is_at_rest=True)
    monitor.begin_anew()
    for _ in range(2):
        monitor.observe([], is_at_rest=True)
    assert monitor.to_wire(0)["idle_w"] == pytest.approx(10)


def test_an_iteration_that_lasts_over_readings_is_no_idling():
    monitor = monitor_of((0, 0, 0), (10, 100, 0), (11, 190, 0), (12, 280, 5))
    for samples, is_at_rest in (([], True), ([], True), ([], False), ([iteration(1.9)], False)):
        monitor.observe(samples, is_at_rest=is_at_rest)
    found = monitor.to_wire(0)
    assert found["idle_w"] == pytest.approx(10)
    assert found["joules_per_1000_tokens"] == pytest.approx((180 - 20) / 0.005)


def test_counters_of_tokens_that_begin_anew_take_nothing_away():
    monitor = monitor_of((0, 0, 900), (10, 0, 1000), (11, 100, 10), (12, 100, 110))
    for samples in ([], [], [iteration(1.0)], []):
        monitor.observe(samples, is_at_rest=not samples)
    assert monitor.to_wire(0)["joules_per_1000_tokens"] == pytest.approx(100 / 0.2)


def test_without_a_sensor_nothing_is_read_and_the_reason_is_shown():
    def fail():
        raise AssertionError("nobody needs this")

    monitor = EnergyMonitor(EnergyMeter([], {"rapl": "no RAPL here"}), fail, fail)
    monitor.observe([iteration(1.0)], is_at_rest=False)
    found = monitor.to_wire(3)
    assert (found["reason"], found["joules"], found["joules_per_pair"]) == ("no RAPL here", {}, None)

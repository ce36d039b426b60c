import pytest

from core.offload import WorkCost
from scheduler.offload import place_work


def costs(engine, cpu):
    return {"engine": WorkCost(*engine), "cpu": WorkCost(*cpu)}


BIG_GPU = costs((0.004, 250.0), (0.030, 60.0))
"""1.0 J on the GPU, 1.8 J on the CPU."""
SMALL_BOARD = costs((0.020, 15.0), (0.040, 4.0))
"""0.30 J on the GPU, 0.16 J on the CPU."""


def test_two_power_profiles_give_opposite_choices():
    assert place_work("auto", BIG_GPU, slack_s=0.1).place == "engine"
    assert place_work("auto", SMALL_BOARD, slack_s=0.1).place == "cpu"


def test_the_same_times_are_placed_by_power_alone():
    seconds = (0.01, 0.02)
    thrifty_cpu, thrifty_gpu = (
        [(s, w) for s, w in zip(seconds, watts, strict=True)] for watts in ((300, 50), (60, 50))
    )
    assert place_work("auto", costs(*thrifty_cpu), 0.1).place == "cpu"
    assert place_work("auto", costs(*thrifty_gpu), 0.1).place == "engine"


@pytest.mark.parametrize("setting", ["never", "always"])
def test_a_setting_decides_whatever_was_measured(setting):
    for known in (BIG_GPU, SMALL_BOARD, {}):
        found = place_work(setting, known, slack_s=0.0)
        assert found.place == ("cpu" if setting == "always" else "engine")
        assert setting in found.reason


def test_fewer_joules_do_not_count_where_the_targets_would_be_missed():
    found = place_work("auto", SMALL_BOARD, slack_s=0.03)
    assert found.place == "engine"
    assert "only there it fits into the 30 ms" in found.reason


def test_what_fits_nowhere_goes_where_it_is_faster():
    assert place_work("auto", SMALL_BOARD, slack_s=0.0).place == "engine"
    assert place_work("auto", costs((0.04, 1.0), (0.02, 99.0)), slack_s=-0.1).place == "cpu"


@pytest.mark.parametrize(
    ("known", "reason"),
    [
        ({}, "mace profile measure"),
        ({"engine": WorkCost(0.1, 5.0)}, "mace profile measure"),
        (costs((0.02, None), (0.01, None)), "no sensor"),
        (costs((0.02, 9.0), (0.01, None)), "no sensor"),
    ],
)
def test_what_is_not_known_does_not_move(known, reason):
    found = place_work("auto", known, slack_s=1.0)
    assert found.place == "engine"
    assert reason in found.reason


def test_equal_energy_stays_where_it_is():
    assert place_work("auto", costs((0.02, 10.0), (0.01, 20.0)), 1.0).place == "engine"

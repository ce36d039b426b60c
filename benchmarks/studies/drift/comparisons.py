"""The expected relations between the policies, measured over the changes (every phase but the first).

A unit is one change in one run; the policies are paired by seed and phase, since they met the same pairs. A policy that
did not recover within a phase is counted with the phase's whole length, and the row says so: the true ratio is
then beyond the one given. A seed that only one of two policies was run with does not count for them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.studies.drift.policies import Policy
from benchmarks.studies.drift.statistics import Interval, ratio_interval

MAX_STEP_SHARE = 0.5
MIN_SPEED_UP = 3.0

Row = dict[str, Any]


def compare(policies: dict[str, Row], phase_s: float) -> list[Row]:
    """One row for each relation whose policies were run with a seed in common."""
    mace = policies.get(Policy.MACE)
    policies = {name: row for name, row in policies.items() if mace and _shared(row, mace)}
    continuous = policies.get(Policy.CONTINUOUS)
    rows: list[Row] = []
    if mace and continuous:
        rows += [
            _final_accuracy(mace, continuous),
            _steps_to_recover(mace, continuous),
            _all_steps(mace, continuous, "all optimizer steps: mace / continuous", at_most=MAX_STEP_SHARE),
        ]
        if periodic := policies.get(Policy.PERIODIC):
            name = "time to recover: periodic / mace"
            rows.append(_speed_up(name, periodic, mace, phase_s, at_least=MIN_SPEED_UP))
        if full := policies.get(Policy.PERIODIC_FULL):
            rows.append(_speed_up("time to recover: periodic with all slots / mace", full, mace, phase_s))
        rows.append(_speed_up("time to recover: continuous / mace", continuous, mace, phase_s))
    if mace and (plain := policies.get(Policy.NO_REWARD)):
        rows.append(_all_steps(plain, mace, "all optimizer steps: without γ·L_DPO / mace"))
        if continuous:
            rows.append(_speed_up("time to recover: without γ·L_DPO / mace", plain, mace, phase_s))
    return rows


def _final_accuracy(mace: Row, continuous: Row) -> Row:
    pairs = [(one["final_by_seed"], two["final_by_seed"]) for one, two in _changes(mace, continuous)]
    above = [value for ours, _ in pairs for value in ours]
    below = [value for _, theirs in pairs for value in theirs]
    value = sum(above) / sum(below)
    return _row("final accuracy: mace / continuous", value, ratio_interval(above, below), 0, at_least=0.95)


def _steps_to_recover(mace: Row, continuous: Row) -> Row:
    above, below, censored = [], [], 0
    for ours, theirs in _changes(mace, continuous):
        censored += ours["recovery_steps"].count(None)
        used = zip(ours["recovery_steps"], ours["steps"], strict=True)
        above += [everything if steps is None else steps for steps, everything in used]
        below += theirs["steps"]
    name = "steps of mace until the target / all steps of continuous in that phase"
    return _ratio_row(name, above, below, censored, at_most=MAX_STEP_SHARE)


def _all_steps(one: Row, two: Row, name: str, **bound: float) -> Row:
    above = [one["steps"]["by_seed"][place] for place in _shared(one, two)]
    below = [two["steps"]["by_seed"][place] for place in _shared(two, one)]
    return _ratio_row(name, above, below, 0, **bound)


def _speed_up(name: str, slow: Row, fast: Row, phase_s: float, **bound: float) -> Row:
    above: list[float] = []
    below: list[float] = []
    slow_missed = fast_missed = 0
    for ours, theirs in _changes(slow, fast):
        slow_missed += ours["recovery_s"].count(None)
        fast_missed += theirs["recovery_s"].count(None)
        above += [phase_s if time_s is None else time_s for time_s in ours["recovery_s"]]
        below += [phase_s if time_s is None else time_s for time_s in theirs["recovery_s"]]
    row = _ratio_row(name, above, below, slow_missed + fast_missed, **bound)
    row["not_recovered"] = {"above": slow_missed, "below": fast_missed}
    if fast_missed:
        row["passed"] = False if bound else None
    return row


def _ratio_row(name: str, above: Sequence[float], below: Sequence[float], censored: int, **bound: float) -> Row:
    value = sum(above) / sum(below) if sum(below) else None
    return _row(name, value, ratio_interval(above, below), censored, **bound)


def _row(name: str, value: float | None, interval: Interval, censored: int, **bound: float) -> Row:
    """`bound`: at_least or at_most, or neither. `censored`: units that never got there."""
    passed = None
    if bound and value is not None:
        passed = value >= bound["at_least"] if "at_least" in bound else value <= bound["at_most"] and not censored
    finite = [limit if np.isfinite(limit) else None for limit in interval]
    return {"what": name, "value": value, "interval": finite, "not_recovered": censored, **bound, "passed": passed}


def _changes(one: Row, two: Row) -> list[tuple[Row, Row]]:
    return list(zip(_of_shared_seeds(one, two)[1:], _of_shared_seeds(two, one)[1:], strict=True))


def _shared(row: Row, other: Row) -> list[int]:
    """Places of the seeds that the other policy was run with, too."""
    return [place for place, seed in enumerate(row["seeds"]) if seed in other["seeds"]]


def _of_shared_seeds(row: Row, other: Row) -> list[Row]:
    """The phases of `row`, without what the other policy has no counterpart of."""
    places = _shared(row, other)
    lists = ("final_by_seed", "steps", "recovery_s", "recovery_steps")
    return [
        {**phase, **{name: [phase[name][place] for place in places] for name in lists if phase[name]}}
        for phase in row["phases"]
    ]

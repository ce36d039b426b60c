"""Measure how soon the drift detectors see a change, and how often one that is not there.

    mace bench drift-detection --json
    mace bench drift-detection --set hddm_confidence=0.001 --set adwin_delta=0.01

Synthetic margins through the real global stream (`alignment.drift.streams.ScoreStreams`), without the level window.
False detections are those of stationary pairs; the delay is counted from the first pair of the change.
"""

import math
import statistics
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import numpy as np
import typer

from alignment.drift.streams import GLOBAL, ScoredPair, ScoreStreams, Sensitivity
from benchmarks.harness.report import AsJson, Column, Out, digits, show, table_of

_Margins = Callable[[np.random.Generator, int], np.ndarray]
_STATIONARY_RUN = 5_000
_GRADUAL_PAIRS = 200
_GIVE_UP = 300
"""A change not seen within so many pairs was missed."""


def _flipped(margins: np.ndarray, rng: np.random.Generator, share: float | np.ndarray) -> np.ndarray:
    return np.where(rng.random(len(margins)) < share, -margins, margins)


STREAMS: dict[str, _Margins] = {
    "clean": lambda rng, n: rng.normal(3.0, 1.3, n),
    "noisy": lambda rng, n: _flipped(rng.normal(3.0, 1.3, n), rng, 0.1),
    "very noisy": lambda rng, n: _flipped(rng.normal(3.0, 1.3, n), rng, 0.2),
    "confident": lambda rng, n: _flipped(rng.normal(8.0, 3.0, n), rng, 0.02),
    "heavy": lambda rng, n: 3.0 + 2.0 * rng.standard_t(3, n),
    "small": lambda rng, n: rng.normal(0.3, 0.3, n),
    "weak": lambda rng, n: rng.normal(0.5, 1.0, n),
}
"""Margins of an adapter that knows the preferences, more or less."""


def _sudden(rng: np.random.Generator, margins: _Margins) -> np.ndarray:
    """Every preference the other way round."""
    return -margins(rng, _GIVE_UP)


def _third(rng: np.random.Generator, margins: _Margins) -> np.ndarray:
    """A third of the preferences the other way round, and the rest no more than half as sure."""
    known = margins(rng, _GIVE_UP)
    return np.where(rng.random(_GIVE_UP) < 1 / 3, -known, known / 2)


def _gradual(rng: np.random.Generator, margins: _Margins) -> np.ndarray:
    """The share of preferences the other way round rises from 0 to 1."""
    share = np.minimum(np.arange(_GIVE_UP) / _GRADUAL_PAIRS, 1.0)
    return _flipped(margins(rng, _GIVE_UP), rng, share)


CHANGES = {
    "sudden after 300": (300, _sudden),
    "sudden after 60": (60, _sudden),
    "a third after 300": (300, _third),
    "gradual after 300": (300, _gradual),
}


def main(
    as_json: AsJson = False,
    seeds: Annotated[int, typer.Option(min=1, help="Changes of each kind")] = 20,
    stationary: Annotated[int, typer.Option(min=0, help="Stationary pairs of each stream")] = 100_000,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A field of `Sensitivity` as name=value, may be repeated")
    ] = None,
    out: Out = None,
) -> None:
    """Measure how soon the drift detectors see a change, and how often one that is not there."""
    try:
        sensitivity = Sensitivity(
            **{name: float(value) for name, value in (one.split("=", 1) for one in settings or ())}
        )
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(f"--set takes a number for a field of Sensitivity: {error}") from error
    rows = {
        name: {
            "accuracy": float((margins(np.random.default_rng(0), 100_000) > 0).mean()),
            "false_detections_per_100000": _false_detections(sensitivity, margins, stationary),
            **{change: _delays(sensitivity, margins, change, seeds) for change in CHANGES},
        }
        for name, margins in STREAMS.items()
    }
    show(rows, [table_of(None, [{"margins": name, **row} for name, row in rows.items()], _COLUMNS)], as_json, out)


def _false_detections(sensitivity: Sensitivity, margins: _Margins, stationary: int) -> float:
    """Count detections in runs of `_STATIONARY_RUN` pairs, each a stream of its own."""
    runs = math.ceil(stationary / _STATIONARY_RUN)
    found = sum(
        len(list(_detections(sensitivity, margins(np.random.default_rng(seed), _STATIONARY_RUN))))
        for seed in range(runs)
    )
    return 100_000 * found / max(1, runs * _STATIONARY_RUN)


def _delays(sensitivity: Sensitivity, margins: _Margins, change: str, seeds: int) -> dict[str, Any]:
    """Pairs until a change is seen, those that were missed counted apart; and where it was dated, from the truth."""
    num_before, make = CHANGES[change]
    delays, errors = [], []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        values = np.concatenate([margins(rng, num_before), make(rng, margins)])
        seen = next((one for one in _detections(sensitivity, values) if one[0] > num_before), None)
        if seen is not None:
            delays.append(seen[0] - num_before)
            errors.append(seen[1] - num_before)
    return {
        "missed": seeds - len(delays),
        "median": statistics.median(delays) if delays else None,
        "max": max(delays, default=None),
        "dating_error": [min(errors), max(errors)] if errors else None,
    }


def _detections(sensitivity: Sensitivity, margins: np.ndarray) -> Iterator[tuple[int, int]]:
    """Position at which a change for the worse is seen, and the position that it is dated to."""
    streams = ScoreStreams(sensitivity)
    for seq, margin in enumerate(margins.tolist(), 1):
        loss = math.log1p(math.exp(-abs(margin))) + max(-margin, 0.0)
        pair = ScoredPair(str(seq), seq, loss, margin, "", None, {}, 1.0, 0.0)
        for stream, change in streams.update(pair):
            if stream == GLOBAL:
                yield seq, change.last_seq_before


def _cell(delays: dict[str, Any]) -> str:
    missed = f", {delays['missed']} missed" if delays["missed"] else ""
    return "missed" if delays["median"] is None else f"{delays['median']:g}, {delays['max']}{missed}"


_COLUMNS: tuple[Column, ...] = (
    ("margins", "margins", str),
    ("accuracy", "accuracy", digits(2)),
    ("false in 100,000", "false_detections_per_100000", "{:g}".format),
    *((f"{change}: median, max", change, _cell) for change in CHANGES),
)

from pathlib import Path

import pytest

from benchmarks.studies.kernel_cache import plan_cells, summarize
from benchmarks.studies.memory.running import MemoryOptions
from tests.support.memory_windows import window

CAPACITIES = [32, 1024]
HEAP = {"heap_used_bytes": 300 << 20, "heap_free_bytes": 50 << 20}


def test_capacities_take_turns_at_the_same_work():
    cells = plan_cells(CAPACITIES, Path("model"), MemoryOptions(repeats=2))
    assert [(cell.setting, cell.repeat) for cell in cells] == [("32", 0), ("1024", 0), ("1024", 1), ("32", 1)]
    assert cells[0].job == cells[1].job
    assert cells[0].job.trace.seed != cells[2].job.trace.seed


def test_every_capacity_is_compared_to_the_last_by_windows_side_by_side():
    cells = plan_cells(CAPACITIES, Path("model"), MemoryOptions(repeats=6))
    measured = [
        (cell, window(pairs_per_s=(9.0 if cell.setting == "32" else 10.0) * (1 + cell.repeat))) for cell in cells
    ]
    measured = [
        (cell, result.model_copy(update={"status": {**result.status, **HEAP}})) for cell, result in measured
    ]
    rows = {row["capacity"]: row for row in summarize(measured, CAPACITIES)}
    assert rows[32]["over_last"]["pairs_per_s"]["ratio"] == pytest.approx(0.9)
    assert rows[1024]["over_last"]["pairs_per_s"]["ratio"] == pytest.approx(1.0)
    assert rows[32]["heap_mib"] == {"heap_used_bytes": 300, "heap_free_bytes": 50}

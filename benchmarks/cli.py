"""`mace bench`: the measurements behind the numbers in docs/."""

import functools
from collections.abc import Callable
from typing import Any

import typer

from benchmarks.studies import (
    drift_detection,
    idle,
    publish,
    scheduler_cost,
    slo,
    store,
    tax,
)
from benchmarks.studies.memory import command as memory
from core.errors import MaceError

STUDIES: dict[str, Callable[..., None]] = {
    "slo": slo.main,
    "scheduler": scheduler_cost.main,
    "memory": memory.main,
    "publish": publish.main,
    "idle": idle.main,
    "tax": tax.main,
    "feedback": store.feedback,
    "quality": store.quality,
    "drift-detection": drift_detection.main,
}


def _told(name: str, study: Callable[..., None]) -> Callable[..., None]:
    """Say an error of ours in one line instead of a traceback."""

    @functools.wraps(study)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            study(*args, **kwargs)
        except MaceError as error:
            typer.echo(f"mace bench {name}: {error}", err=True)
            raise typer.Exit(1) from error

    return run


bench = typer.Typer(no_args_is_help=True, help=__doc__)
for _name, _study in STUDIES.items():
    bench.command(_name)(_told(_name, _study))

"""`mace training`: what is being learnt now; pause, resume, and learn anew from all feedback."""

import json
import time
from typing import Annotated, Any

import typer

from app.commands.connection import URL_OPTION, call, fail

_POLL_S = 1.0
_PATIENCE_S = 120.0
_LONG_S = 30.0
"""Work that waits for so long with none of it leased is worth a warning."""
_ENDS = {"published": "went live, or on trial", "held": "passed the gate and was held back"}


def training(
    action: Annotated[str, typer.Argument(help="show, pause, resume or rebuild")] = "show",
    without_user: Annotated[
        list[str] | None, typer.Option(help="With rebuild: leave this user's pairs out (may be repeated)")
    ] = None,
    url: URL_OPTION = "http://127.0.0.1:8000",
) -> None:
    """Show training as JSON, pause or resume it, or rebuild: learn anew from all feedback, behind the gate."""
    if action not in ("show", "pause", "resume", "rebuild"):
        raise typer.BadParameter("show, pause, resume or rebuild")
    if without_user and action != "rebuild":
        raise typer.BadParameter("--without-user goes with rebuild")
    if action == "rebuild":
        _rebuild(url, without_user or [])
        return
    if action != "show":
        call(url, "POST", f"/v1/training/{action}")
    status = call(url, "GET", "/v1/training").json()
    typer.echo(json.dumps(status, indent=2))
    for warning in status.get("executor", {}).get("slo", {}).get("warnings", ()):
        typer.echo(f"warning: {warning}", err=True)
    standstill = (status.get("queue") or {}).get("standstill") or {}
    if standstill.get("for_s", 0.0) >= _LONG_S:
        reasons = "; ".join(standstill["reasons"])
        typer.echo(
            f"warning: nothing has been trained or scored for {standstill['for_s']:.0f} s: {reasons}", err=True
        )


def _rebuild(url: str, without_users: list[str]) -> None:
    begun = call(url, "POST", "/v1/training/rebuild", json={"without_users": without_users}).json()
    typer.echo(f"learning {begun['num_pairs']} pairs anew from the base; the live version keeps serving")
    told, unknown, report = "", 0, {"state": "running"}
    try:
        while report["state"] == "running":
            time.sleep(_POLL_S)
            status = call(url, "GET", "/v1/training").json()
            unknown = 0 if status.get("rebuild") else unknown + 1  # Control may be away for a moment
            if unknown * _POLL_S > _PATIENCE_S:
                fail("the server does not know of the rebuild any more; `mace adapters` shows what came of it")
            report = status.get("rebuild") or report
            if (words := _words(report, status["executor"])) != told:
                typer.echo(words)
                told = words
    except KeyboardInterrupt:
        typer.echo("the rebuild goes on in the server; `mace training` shows how far it is")
        return
    end = _ENDS.get(report["state"])
    if end is None:
        fail(f"the rebuild was {report['state']}: {report.get('reason', '')}")
    typer.echo(f"{report['version']} {end}: {report['reason']}")


def _words(report: dict[str, Any], executor: dict[str, Any]) -> str:
    if executor.get("paused"):
        return "training is paused; `mace training resume` goes on"
    if "num_taken" not in report:
        return "waiting for the server"
    loss = report.get("loss")
    words = f"pass {report['passes'] + 1}: {report['num_taken']} of {report['num_pairs']} pairs"
    return words if loss is None else f"{words}, loss {loss:.3f}"

"""`mace adapters`: the lineage, and rolling back or forward."""

import json
import time
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from rich.tree import Tree

from app.commands.connection import URL_OPTION, call

_ROOT = "base"
_COLUMNS = ("version", "", "status", "parent", "pairs", "steps", "accuracy", "by", "activated")
_ONLY_WIDE = ("pairs", "steps", "by", "activated")
_WIDE = 110
_STYLES = {"rejected": "dim", "rolled_back": "yellow", "damaged": "red", "unfit": "dim"}


def adapters(
    activate: Annotated[str | None, typer.Option(help="Make this version (or `base`) live")] = None,
    pin: Annotated[
        bool | None,
        typer.Option("--pin/--no-pin", help="With --activate: pin it, or not; default: pin an older version"),
    ] = None,
    reason: Annotated[str, typer.Option(help="With --activate: why, for the lineage")] = "",
    release: Annotated[bool, typer.Option("--release", help="Release the pin")] = False,
    show: Annotated[str | None, typer.Option(help="Print one version in full, as JSON")] = None,
    tree: Annotated[bool, typer.Option("--tree", help="Print the lineage as a tree")] = False,
    url: URL_OPTION = "http://127.0.0.1:8000",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """List adapter versions, make one live, or release the pin."""
    if show is not None:
        typer.echo(json.dumps(call(url, "GET", f"/v1/adapters/{show}").json(), indent=2))
        return
    if activate is not None:
        call(url, "POST", f"/v1/adapters/{activate}/activate", json={"pin": pin, "reason": reason})
    if release:
        call(url, "DELETE", "/v1/adapters/pin")
    listing = call(url, "GET", "/v1/adapters").json()
    if as_json:
        typer.echo(json.dumps(listing, indent=2))
        return
    console = Console()
    console.print(_tree(listing) if tree else _table(listing["data"], console.width))
    console.print(_summary(listing), highlight=False)


def _table(rows: list[dict[str, Any]], width: int) -> Table:
    """All columns, or those that leave room for the reason on a narrow terminal."""
    headings = [name for name in _COLUMNS if width >= _WIDE or name not in _ONLY_WIDE]
    table = Table(*(Column(name, no_wrap=True) for name in headings), Column("reason", overflow="fold"))
    for row in rows:
        activated_s = row.get("activated_at")
        cells = {
            "version": row["version"],
            "": " ".join(_flags(row)),
            "status": row["status"],
            "parent": row.get("parent") or _ROOT,
            "pairs": str(row.get("num_pairs", "")),
            "steps": str(row.get("optimizer_steps", "")),
            "accuracy": _accuracy(row.get("metrics", {})),
            "by": row.get("activated_by") or "",
            "activated": ""
            if activated_s is None
            else time.strftime("%m-%d %H:%M:%S", time.localtime(activated_s)),
        }
        table.add_row(*(cells[name] for name in headings), row["reason"], style=_STYLES.get(row["status"]))
    return table


def _tree(listing: dict[str, Any]) -> Tree:
    """Versions under their parents; one whose parent was deleted stands under the root."""
    root = Tree(_ROOT + (" (live)" if listing["live"] == _ROOT else ""))
    branches = {_ROOT: root}
    for row in listing["data"]:
        parent = branches.get(row.get("parent") or _ROOT, root)
        words = [row["version"], *_flags(row)]
        if row["status"] != "published":
            words.append(row["status"])
        words.append(f"{row.get('num_pairs', 0)} pairs: {row['reason']}")
        branches[row["version"]] = parent.add(Text(" ".join(words), style=_STYLES.get(row["status"], "")))
    return root


def _summary(listing: dict[str, Any]) -> str:
    parts = [f"live {listing['live']}"]
    if listing["pinned"]:
        parts.append(f"pinned at {listing['pinned']} until `mace adapters --release`")
    if trial := listing.get("trial"):
        parts.append(f"{trial['version']} is on trial with {trial['share']:.0%} of the requests: {trial['state']}")
    return "; ".join(parts)


def _flags(row: dict[str, Any]) -> list[str]:
    return [flag for flag in ("live", "pinned", "canary", "retired") if row.get(flag)]


def _accuracy(metrics: dict[str, Any]) -> str:
    """The gate's preference accuracy on the newest held-out pairs, and in brackets that of the live version then."""
    candidate, live = metrics.get("candidate_accuracy"), metrics.get("live_accuracy")
    return "" if candidate is None else f"{candidate:.2f}" + ("" if live is None else f" ({live:.2f})")

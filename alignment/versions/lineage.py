"""Lineage: where every version comes from and what became of it, as rows for the API and the command line."""

from typing import Any

from alignment.versions.adapter_files import version_number
from alignment.versions.registry import AdapterRegistry, AdapterVersion
from alignment.versions.serving_state import BASE, Activation, Serving
from core.errors import UnfitAdapterError, UnknownVersionError


def lineage_rows(registry: AdapterRegistry) -> list[dict[str, Any]]:
    """All versions on disk as rows, oldest first; damaged ones, and those of another base model, with the reason."""
    serving, failed = registry.serving.read(), registry.serving.rolled_back()
    last = {entry.version: entry for entry in registry.serving.activations() if entry.event == "activated"}
    rows = [_row(version, serving, failed, last.get(version.name)) for version in registry.list()]
    for name, error in registry.damaged.items():
        status = "unfit" if isinstance(error, UnfitAdapterError) else "damaged"
        rows.append({"version": name, "status": status, "reason": str(error)} | _flags(name, serving))
    return sorted(rows, key=lambda row: version_number(row["version"]) or 0)


def lineage_row(registry: AdapterRegistry, name: str) -> dict[str, Any]:
    """One version in full, or `base`: with the training configuration and everything that happened to it."""
    serving = registry.serving.read()
    events = [entry for entry in registry.serving.activations() if entry.version == name]
    log = {"activations": [entry.model_dump(mode="json") for entry in events]}
    if name == BASE:
        return {"version": BASE, "status": BASE} | _flags(BASE, serving) | log
    version = registry.get(name)
    if name in serving.retired:
        raise UnknownVersionError(f"adapter version {name} is retired and about to be deleted")
    activated = [entry for entry in events if entry.event == "activated"]
    row = _row(version, serving, registry.serving.rolled_back(), activated[-1] if activated else None)
    return row | {"config": version.manifest.config} | log


def is_rollback(registry: AdapterRegistry, name: str) -> bool:
    """True if a newer version than `name` (`v000N` or `base`) passed the gate and did not fail its trial."""
    failed = registry.serving.rolled_back()
    number = version_number(name) or 0
    return any(
        (version_number(one.name) or 0) > number and one.manifest.status == "published" and one.name not in failed
        for one in registry.list()
    )


def _row(
    version: AdapterVersion, serving: Serving, failed: dict[str, str], activated: Activation | None
) -> dict[str, Any]:
    row = version.manifest.model_dump(mode="json", exclude={"pair_ids", "config"})
    if version.name in failed:
        row |= {"status": "rolled_back", "reason": failed[version.name]}
    return (
        row
        | _flags(version.name, serving)
        | {
            "num_pairs": len(version.manifest.pair_ids),
            "activated_at": activated and activated.time,
            "activated_by": activated and activated.by,
            "activation_reason": activated and activated.reason,
        }
    )


def _flags(name: str, serving: Serving) -> dict[str, bool]:
    return {
        "live": name == (serving.live or BASE),
        "pinned": name == serving.pinned,
        "canary": name == serving.canary,
        "retired": name in serving.retired,
    }

"""How many versions are kept, and which one goes when there are too many.

Deletion has two steps, because other executors, and requests between the look-up of a name and the engine, may still
need the files: a version is *retired* first (its name disappears everywhere), and deleted once nobody has used it
for `REST_S`.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from alignment.versions.registry import AdapterRegistry

REST_S = 30.0
"""Far above the time that executors need to see a retirement, and a request from its arrival to the engine."""


@dataclass(frozen=True, slots=True)
class KeptVersion:
    """What retention looks at."""

    name: str
    failed: bool
    """Rejected by the gate, or rolled back as a canary."""
    parent: str | None = None


def versions_to_retire(
    versions: Sequence[KeptVersion],
    keep: int,
    *,
    retired: Collection[str] = (),
    protected: Collection[str | None] = (),
) -> list[str]:
    """Names beyond `keep`: failed ones first, then the others, oldest first.

    Never a protected one, nor the newest of all, whose verdict has just been made; so more than `keep` may stay.

    Args:
        versions: all usable versions, oldest first.
        keep: how many may stay.
        retired: what is on its way out already.
        protected: live and its parent, pinned, canary, in use, what training started from.
    """
    staying = [version for version in versions if version.name not in retired]
    excess = len(staying) - keep
    if excess <= 0:
        return []
    untouchable = {*protected, staying[-1].name}
    may_go = [version for version in staying if version.name not in untouchable]
    ordered = [one for one in may_go if one.failed] + [one for one in may_go if not one.failed]
    return [version.name for version in ordered[:excess]]


def rested(retired: Mapping[str, float], now_s: float, rest_s: float = REST_S) -> list[str]:
    """Retired versions that nobody has used for `rest_s`; times are Unix seconds."""
    return [name for name, at in sorted(retired.items()) if now_s - at >= rest_s]


def prune(registry: AdapterRegistry, keep: int, in_use: set[str]) -> tuple[list[str], list[str]]:
    """Retire what is beyond `keep`, and delete what has rested; returns what is retired now, and what was deleted.

    Every executor calls this again and again with the versions that it needs, which keeps them from being deleted by
    others. Damaged versions are left alone and not counted: they may belong to another base model.

    Raises:
        AdapterError: the disk refuses.
    """
    serving, failed = registry.serving.read(), registry.serving.rolled_back()
    kept = [
        KeptVersion(one.name, one.manifest.status == "rejected" or one.name in failed, one.manifest.parent)
        for one in registry.list()
    ]
    in_use = in_use | {one.parent for one in kept if one.name == serving.live and one.parent}
    protected = {serving.live, serving.pinned, serving.canary, *in_use}
    surplus = versions_to_retire(kept, keep, retired=serving.retired, protected=protected)
    if surplus or in_use & serving.retired.keys():
        serving = registry.serving.retire(surplus, in_use)
    due = rested(serving.retired, time.time())
    return sorted(serving.retired), [name for name in due if registry.delete(name)]

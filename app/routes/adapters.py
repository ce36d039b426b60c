"""`/v1/adapters`: every version with its lineage, and which one is live."""

from typing import Any

from fastapi import APIRouter

from app.routes.dependencies import ExecutorOf

router = APIRouter(prefix="/v1/adapters", tags=["adapters"])


@router.get("")
async def list_adapters(executor: ExecutorOf) -> dict[str, Any]:
    """All versions on disk: parent, pairs, metrics, what the gate said. Damaged ones are named with their error."""
    return {"object": "list", "live": executor.versions.live, "data": await executor.versions.listing()}


@router.post("/{version}/activate")
async def activate_adapter(executor: ExecutorOf, version: str) -> dict[str, Any]:
    """Make a version (or `base`) live: roll back or forward. Running requests finish on their own version."""
    previous = executor.versions.live
    await executor.versions.activate(version)
    if executor.learner is not None:
        executor.learner.follow_live()
    return {"live": executor.versions.live, "previous": previous}

"""`/v1/adapters`: every version with its lineage; which one is live, pinned or on trial, and changing that."""

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from app.http.routes.dependencies import ExecutorOf
from deployments.executor import Executor

router = APIRouter(prefix="/v1/adapters", tags=["adapters"])


class Activation(BaseModel):
    """How to activate a version."""

    model_config = ConfigDict(extra="forbid")

    pin: bool | None = None
    """Keep it live until the pin is released. Null: yes if it is older than the newest good version."""
    reason: str = Field("", max_length=1000)
    """For the lineage."""


@router.get("")
async def list_adapters(executor: ExecutorOf) -> dict[str, Any]:
    """All versions on disk: parent, pairs, metrics, what the gate said. Damaged ones are named with their error."""
    return {
        "object": "list",
        **_pointers(executor),
        "trial": executor.trial.to_wire(),
        "data": await executor.versions.listing(),
    }


@router.delete("/pin")
async def release_pin(executor: ExecutorOf) -> dict[str, Any]:
    """Let versions that pass the gate go live again. What is live stays live until then."""
    return {"released": await executor.versions.release_pin(), **_pointers(executor)}


@router.get("/{version}")
async def show_adapter(executor: ExecutorOf, version: str) -> dict[str, Any]:
    """One version (or `base`) with its training configuration and everything that happened to it."""
    return await executor.versions.detail(version)


@router.post("/{version}/activate")
async def activate_adapter(
    executor: ExecutorOf, version: str, options: Activation | None = None
) -> dict[str, Any]:
    """Make a version (or `base`) live: roll back or forward. Running requests finish on their own version."""
    previous = executor.versions.live
    options = options or Activation()
    await executor.versions.activate(version, pin=options.pin, reason=options.reason)
    if executor.learner is not None:
        executor.learner.follow_live()
    return {**_pointers(executor), "previous": previous}


def _pointers(executor: Executor) -> dict[str, str | None]:
    versions = executor.versions
    return {"live": versions.live, "pinned": versions.pinned, "canary": versions.canary}

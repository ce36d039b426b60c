"""`/v1/adapters` (lineage, and which version is live, pinned or on trial), `/v1/models`, and what probes ask.

`/metrics` is vLLM's own; our metrics are in the same registry.
"""

import time
from typing import Any

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field

from app.http.errors import BadRequestError
from app.http.routes import ExecutorOf
from deployments.executor import Executor

router = APIRouter()
_STARTED_AT = int(time.time())


class Activation(BaseModel):
    """Options of an activation."""

    model_config = ConfigDict(extra="forbid")

    pin: bool | None = None
    """Keep it live until the pin is released. Null: yes if it is older than the newest good version."""
    reason: str = Field("", max_length=1000)
    """For the lineage."""


@router.get("/v1/adapters", tags=["adapters"])
async def list_adapters(executor: ExecutorOf) -> dict[str, Any]:
    """All versions on disk: parent, pairs, metrics, what the gate said. Damaged ones are named with their error."""
    return {
        "object": "list",
        **_pointers(executor),
        "trial": executor.trial.to_wire(),
        "data": await executor.versions.listing(),
    }


@router.delete("/v1/adapters/pin", tags=["adapters"])
async def release_pin(executor: ExecutorOf) -> dict[str, Any]:
    """Let versions that pass the gate go live again. What is live stays live until then."""
    return {"released": await executor.versions.release_pin(), **_pointers(executor)}


@router.get("/v1/adapters/{version}", tags=["adapters"])
async def show_adapter(executor: ExecutorOf, version: str) -> dict[str, Any]:
    """Show one version (or `base`) with its training configuration and everything that happened to it."""
    return await executor.versions.detail(version)


@router.post("/v1/adapters/{version}/activate", tags=["adapters"], responses={409: {}})
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


@router.get("/v1/models", tags=["models"])
async def list_models(executor: ExecutorOf) -> dict[str, Any]:
    """List every name that `model` may be: the live model, the bare base and every version."""
    return {"object": "list", "data": _cards(executor)}


@router.get("/v1/models/{model_id:path}", tags=["models"])
async def retrieve_model(executor: ExecutorOf, model_id: str) -> dict[str, Any]:
    """Show one of these names."""
    for card in _cards(executor):
        if card["id"] == model_id:
            return card
    raise BadRequestError(f"The model `{model_id}` does not exist.", "model", status=404)


@router.get("/ready", tags=["health"])
async def ready(executor: ExecutorOf, response: Response) -> dict[str, Any]:
    """200 once the engine and the live adapter are loaded; 503 also while a dead engine is started again."""
    if not executor.can_serve:
        response.status_code = 503
    return {"ready": executor.can_serve, "live": executor.versions.live if executor.is_ready else None}


@router.get("/health", tags=["health"], response_class=Response)
async def health() -> Response:
    """200 while this server lives, also while it starts a dead engine again: a new server would take longer."""
    return Response()


def _pointers(executor: Executor) -> dict[str, str | None]:
    versions = executor.versions
    return {"live": versions.live, "pinned": versions.pinned, "canary": versions.canary}


def _cards(executor: Executor) -> list[dict[str, Any]]:
    common = {
        "object": "model",
        "created": _STARTED_AT,
        "owned_by": "mace",
        "max_model_len": executor.engine.max_model_len,
        "root": executor.base_model,
    }
    return [{**common, **card} for card in executor.versions.cards()]

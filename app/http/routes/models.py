"""`/v1/models` with the live model, the bare base and every version."""

import time
from typing import Any

from fastapi import APIRouter

from app.http.errors import BadRequestError
from app.http.routes.dependencies import ExecutorOf
from deployments.executor import Executor

router = APIRouter(prefix="/v1/models", tags=["models"])
_STARTED_AT = int(time.time())


@router.get("")
async def list_models(executor: ExecutorOf) -> dict[str, Any]:
    """Every name that `model` may be."""
    return {"object": "list", "data": _cards(executor)}


@router.get("/{model_id:path}")
async def retrieve_model(executor: ExecutorOf, model_id: str) -> dict[str, Any]:
    """One of them."""
    for card in _cards(executor):
        if card["id"] == model_id:
            return card
    raise BadRequestError(f"The model `{model_id}` does not exist.", "model", status=404)


def _cards(executor: Executor) -> list[dict[str, Any]]:
    max_model_len = executor.engine.max_model_len
    common = {"object": "model", "created": _STARTED_AT, "owned_by": "mace", "max_model_len": max_model_len}
    common["root"] = executor.base_model
    return [{**common, **card} for card in executor.versions.cards()]

"""`/v1/drift`: have preferences changed, why we think so, and what follows from it."""

from typing import Annotated, Any

from fastapi import APIRouter, Query

from app.http.routes.dependencies import ExecutorOf

router = APIRouter(prefix="/v1/drift", tags=["drift"])


@router.get("")
async def show_drift(
    executor: ExecutorOf,
    limit: Annotated[int, Query(ge=0, le=1000, description="Newest events of the history")] = 50,
    stream: Annotated[
        str | None,
        Query(max_length=256, description="History of one stream: global, prompts, user:ID or tag:KEY=VALUE"),
    ] = None,
) -> dict[str, Any]:
    """Level of alarm and its reason, retrain rate, every stream, and the history of events, newest first."""
    return await executor.control.drift(limit, stream)

"""`/ready`. Liveness (`/health`) and `/metrics` are vLLM's own; our metrics are in the same registry."""

from typing import Any

from fastapi import APIRouter, Response

from app.http.routes.dependencies import ExecutorOf

router = APIRouter(tags=["health"])


@router.get("/ready")
async def ready(executor: ExecutorOf, response: Response) -> dict[str, Any]:
    """200 once the engine and the live adapter are loaded."""
    if not executor.is_ready:
        response.status_code = 503
    return {"ready": executor.is_ready, "live": executor.versions.live if executor.is_ready else None}

"""`/v1/training`: what is being learnt, pause and resume. `/v1/drift`: have preferences changed, and what follows?"""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from app.http.errors import BadRequestError
from app.http.routes import ExecutorOf
from core.errors import MaceError
from deployments.executor import Executor
from deployments.learning.learner import Learner

router = APIRouter()


class RebuildOptions(BaseModel):
    """Options of a rebuild."""

    model_config = ConfigDict(extra="forbid")

    without_users: list[str] = Field([], max_length=1000)
    """Users, as in the `user` of their feedback, whose pairs are left out."""


@router.get("/v1/training", tags=["training"])
async def show_training(executor: ExecutorOf) -> dict[str, Any]:
    """Queue, steps, loss, margin, accuracy, pairs/s, what runs now. Works, in part, while Control is away."""
    try:
        control: dict[str, Any] = await executor.control.stats()
    except MaceError as error:
        control = {"error": {"message": str(error), "type": type(error).__name__}}
    if standstill := control.get("queue", {}).get("standstill"):
        learner = executor.learner
        silence = f"training is off: {executor.training_off}" if learner is None else learner.silence()
        if silence:
            standstill["reasons"].insert(0, f"{executor.executor_id}: {silence}")
    off = {} if executor.learner is not None else {"reason": executor.training_off}
    return {"enabled": not off, **off, "executor": await executor.status(), **control}


@router.post("/v1/training/pause", tags=["training"], responses={409: {}})
async def pause_training(executor: ExecutorOf) -> dict[str, Any]:
    """Take no further batch; a step in progress ends first."""
    _learner(executor).pause()
    return await executor.status()


@router.post("/v1/training/resume", tags=["training"], responses={409: {}})
async def resume_training(executor: ExecutorOf) -> dict[str, Any]:
    """Go on after a pause."""
    _learner(executor).resume()
    return await executor.status()


@router.post("/v1/training/rebuild", status_code=202, tags=["training"], responses={409: {}})
async def rebuild(executor: ExecutorOf, options: RebuildOptions | None = None) -> dict[str, Any]:
    """Learn anew from the base, from all stored feedback, as a candidate behind the gate; what is live keeps serving.

    Pairs of the users in `without_users` are left out, of training and tests, until a rebuild that does not name them.
    """
    learner = _learner(executor)
    learner.check_rebuild()
    users = (options or RebuildOptions()).without_users
    begun = await executor.control.begin_rebuild(executor.executor_id, users)
    learner.begin_rebuild(begun)
    return {"num_pairs": begun.num_pairs, "without_users": list(begun.without_users)}


@router.get("/v1/drift", tags=["drift"])
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


def _learner(executor: Executor) -> Learner:
    if executor.learner is None:
        raise BadRequestError(f"training is off in this deployment: {executor.training_off}", status=409)
    return executor.learner

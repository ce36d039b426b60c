"""`/v1/training`: what is being learnt, and pause and resume."""

from typing import Any

from fastapi import APIRouter

from app.http.errors import BadRequestError
from app.http.routes.dependencies import ExecutorOf
from core.errors import MaceError
from deployments.executor import Executor
from deployments.learning.learner import Learner

router = APIRouter(prefix="/v1/training", tags=["training"])


@router.get("")
async def show_training(executor: ExecutorOf) -> dict[str, Any]:
    """Queue, steps, loss, margin, accuracy, pairs/s, what runs now. Works, in part, while Control is away."""
    try:
        control: dict[str, Any] = await executor.control.stats()
    except MaceError as error:
        control = {"error": {"message": str(error), "type": type(error).__name__}}
    return {"enabled": executor.learner is not None, "executor": await executor.status(), **control}


@router.post("/pause")
async def pause_training(executor: ExecutorOf) -> dict[str, Any]:
    """Take no further batch; a step in progress ends first."""
    _learner(executor).pause()
    return await executor.status()


@router.post("/resume")
async def resume_training(executor: ExecutorOf) -> dict[str, Any]:
    """Go on after a pause."""
    _learner(executor).resume()
    return await executor.status()


def _learner(executor: Executor) -> Learner:
    if executor.learner is None:
        raise BadRequestError("training is disabled in this deployment (training.enabled: false)", status=409)
    return executor.learner

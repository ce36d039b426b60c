"""Wiring: the only place where deployments are decorated and bound.

`serve_config.yaml` names `app.main:build_app`. No `from __future__ import annotations` here: Ray would then pass an
unvalidated dict instead of `AppArgs`.

Settings are validated once, where they come in: by `parse_args` in commands of ours, by Ray before it calls
`build_app`. Executor and Control get the `AppArgs` themselves; only the engine's processes, which vLLM starts, read
them again from JSON.
"""

from typing import Any

from pydantic import ValidationError
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from app.http.app import attach_routes
from core.config import AppArgs
from core.errors import ConfigError
from deployments.control.deployment import Control
from deployments.executor import Executor
from deployments.routing.router import REPORT_PERIOD_S
from engine.vllm.flags import check_flags

_MAX_QUEUED = 1024
_DRAIN_LOOK_S = 0.2
"""A replica that is to end looks this often whether its last request has."""


def parse_args(raw: dict[str, Any]) -> AppArgs:
    """Validate what stands under `args:`; a ConfigError names every wrong key, and arguments of vLLM's that fail here.

    Relative paths become absolute, since replicas have another directory.
    """
    try:
        args = _with_absolute_paths(AppArgs.model_validate(raw))
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, issue['loc']))}: {issue['msg']}" for issue in error.errors()]
        raise ConfigError("args of serve_config.yaml are wrong:\n" + "\n".join(lines)) from error
    check_flags(args)
    return args


def build_app(args: AppArgs) -> Application:
    """The Serve application: one Executor replica for each device, one Control replica."""
    check_flags(args)
    return bind_deployments(_with_absolute_paths(args), {})


def executor_router(args: AppArgs) -> RequestRouterConfig:
    """Serve's option that routes requests by what executors report. With one executor it looks at nothing."""
    return RequestRouterConfig(
        request_router_class="deployments.routing.router.ExecutorRouter",
        request_router_kwargs={"tau_mem": args.scheduler.tau_mem},
        request_routing_stats_period_s=REPORT_PERIOD_S,
    )


def bind_deployments(args: AppArgs, overrides: dict[str, dict[str, Any]]) -> Application:
    """`build_app` with deployment options by deployment name, for callers that read the config file themselves."""
    control_options = {
        "name": "Control",
        "num_replicas": 1,
        "max_ongoing_requests": 256,
        "ray_actor_options": {"num_cpus": 0},
        "health_check_period_s": 1.8,  # what an unhurried control loop of Serve's loses is made up for
        "graceful_shutdown_wait_loop_s": _DRAIN_LOOK_S,
        **overrides.get("Control", {}),
    }
    executor_options = {
        "name": "Executor",
        "num_replicas": 1,
        "max_ongoing_requests": _MAX_QUEUED,
        "max_queued_requests": _MAX_QUEUED,
        "ray_actor_options": {"num_cpus": 1},
        "health_check_period_s": 4.5,
        "graceful_shutdown_timeout_s": 10,
        "graceful_shutdown_wait_loop_s": _DRAIN_LOOK_S,
        "request_router_config": executor_router(args),
        **overrides.get("Executor", {}),
    }
    control = serve.deployment(**control_options)(Control).bind(args)
    return serve.deployment(**executor_options)(serve.ingress()(Executor)).bind(args, control, attach_routes)


def _with_absolute_paths(args: AppArgs) -> AppArgs:
    return args.model_copy(update={"state_dir": args.state_dir.expanduser().absolute()})

"""Counters and gauges of the Ray side: one name, exported through Ray's metrics and Prometheus' registry.

Ray exports them as `ray_mace_<name>` on every node. Those of the executor also stand as `mace_<name>` in its own
`GET /metrics`, so that a single machine needs no Ray discovery; those of Control's actors are only in Ray's.
Ray drops a gauge that is not set again for about 20 s, and its histograms invent `_sum`: hence counters of seconds
instead of histograms there, and `refresh` for gauges. Histograms stand in `GET /metrics` only.
"""

from functools import partial
from typing import Any

import prometheus_client
from ray.util import metrics as ray_metrics

_DESCRIPTIONS = {
    "finetune_queue_pairs": "Preference pairs that wait in the central fine-tune queue",
    "finetune_batches": "Batches that executors reported, by outcome",
    "iterations": "Engine iterations",
    "forward_seconds": "Device time of inference forward passes",
    "iteration_overhead_seconds": "Time of iterations that was neither forward pass nor slices",
    "forward_prediction_error": "Median relative error of the predicted forward latency over the last iterations",
    "prefix_sharing_ratio": "Prompt tokens served from the prefix cache over all prompt tokens since the start",
    "feedback_received": "Feedback items by type and status",
    "responses_dropped": "Responses dropped because Control was away too long",
    "responses_stored": "Responses kept so that feedback can name them",
    "drift_detected": "1 while the drift window calls for training",
    "drift_accuracy": "Preference accuracy over the drift window",
    "drift_level": "Level of the drift alarm, 0 to 1",
    "retrain_rate": "Training slots that each new pair earns",
    "finetune_gamma": "Weight of the DPO loss in the priority of fine-tune tasks",
    "pairs_scored": "Pairs scored by the live adapter, counted each time",
    "checkpoints_failed": "Training checkpoints that could not be written",
    "pairs_trained": "Pairs that went through an optimizer step, counted each time",
    "train_steps": "Optimizer steps, by outcome",
    "train_busy_seconds": "Device time of fine-tune slices",
    "train_longest_slice_seconds": "Longest slice of the last step",
    "dpo_loss": "Mean DPO loss of the last step",
    "dpo_margin": "Mean implicit reward margin of the last step",
    "dpo_accuracy": "Preference accuracy of the last step",
    "adapter_version": "Number of the live adapter version, 0 for the bare base model",
    "adapter_candidates": "Candidates by what the gate said",
    "requests_refused": "Requests that MACE itself refused, by reason",
    "time_to_first_token_seconds": "From a request's arrival to the first token of its stream leaving the server",
    "inter_token_latency_seconds": "Gaps between the chunks of a stream as they leave the server",
    "e2e_request_latency_seconds": "From a request's arrival to the end of its answer leaving the server",
    "slo_observations": "First tokens (objective ttft) and gaps (tbt) that clients saw, by whether the target was met",
    "engine_deaths": "Times that the engine died and was started again",
    "energy_joules": "Energy that this machine has taken since the start, by sensor",
    "control_unreachable": "Calls to Control that failed",
}

_BUCKETS_S = (
    0.005,
    0.01,
    0.02,
    0.035,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.25,
    0.35,
    0.5,
    0.75,
    1,
    1.5,
    2.5,
    5,
    10,
    30,
    60,
)

_PROMETHEUS: dict[str, Any] = {}
"""Prometheus wants each name registered once a process; several meters may live in one."""


class Meter:
    """Metrics of one component. Names and meanings are those of `_DESCRIPTIONS`; labels are strings."""

    def __init__(self, component: str) -> None:
        self._component = component
        self._ray: dict[str, Any] = {}
        self._gauges: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def count(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Add to a counter."""
        if amount <= 0:
            return
        labels = {"component": self._component, **labels}
        self._metric(ray_metrics.Counter, name, labels).inc(amount, tags=labels)
        _prometheus(prometheus_client.Counter, name, labels).labels(**labels).inc(amount)

    def set_gauge(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        labels = {"component": self._component, **labels}
        self._gauges[name, tuple(labels.items())] = value
        self._metric(ray_metrics.Gauge, name, labels).set(value, tags=labels)
        _prometheus(prometheus_client.Gauge, name, labels).labels(**labels).set(value)

    def histogram(self, name: str, **labels: str) -> prometheus_client.Histogram:
        """A histogram of seconds, to be observed directly: that takes a microsecond, and Ray's would take ten."""
        labels = {"component": self._component, **labels}
        return _prometheus(partial(prometheus_client.Histogram, buckets=_BUCKETS_S), name, labels).labels(**labels)

    def refresh(self) -> None:
        """Set every gauge again; call at least every ten seconds."""
        for (name, labels), value in self._gauges.items():
            self._metric(ray_metrics.Gauge, name, dict(labels)).set(value, tags=dict(labels))

    def _metric(self, kind: Any, name: str, labels: dict[str, str]) -> Any:
        if name not in self._ray:
            self._ray[name] = kind(f"mace_{name}", description=_DESCRIPTIONS[name], tag_keys=tuple(labels))
        return self._ray[name]


def _prometheus(kind: Any, name: str, labels: dict[str, str]) -> Any:
    if name not in _PROMETHEUS:
        _PROMETHEUS[name] = kind(f"mace_{name}", _DESCRIPTIONS[name], tuple(labels))
    return _PROMETHEUS[name]

"""Measurement of iterations in the worker: a timer of forward passes, and a ring of the last samples."""

import time
from collections import deque
from typing import Any

import torch

from core.batch import IterationSample

_CAPACITY = 4096


class ForwardTimer:
    """Time of one forward pass with sampling, also when the device runs behind the host.

    Made before the pass; `stop` once it is launched, `seconds` when its result is there. With async scheduling the
    next pass is launched before this one's result is read, so the host's clock would count two. On CUDA two events in
    the stream enclose the pass instead; on CPU work ends when the call returns.
    """

    def __init__(self, device: torch.device) -> None:
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            self._events = (_event(), _event())
            self._events[0].record()
        self._started_s = self._ended_s = time.perf_counter()

    def stop(self) -> None:
        """Everything of the pass was launched."""
        if self._events is not None:
            self._events[1].record()
        self._ended_s = time.perf_counter()

    def seconds(self) -> float:
        """Device time of the pass; waits for its end."""
        if self._events is None:
            return self._ended_s - self._started_s
        started, ended = self._events
        ended.synchronize()
        return float(started.elapsed_time(ended)) / 1e3


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class IterationLog:
    """Numbered samples for profiles, metrics and status, as they go over the wire; the oldest are dropped first."""

    def __init__(self) -> None:
        self._samples: deque[list[Any]] = deque(maxlen=_CAPACITY)
        self._next = 0

    def add(self, sample: IterationSample) -> None:
        """Record one iteration."""
        self._samples.append(sample.to_wire())
        self._next += 1

    def since(self, after: int) -> dict[str, Any]:
        """Samples with a number of at least `after` that are still held, and the number of the next one."""
        first = self._next - len(self._samples)
        return {"next": self._next, "samples": list(self._samples)[max(0, after - first) :]}

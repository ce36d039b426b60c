"""Time of an inference forward pass with sampling, also when the device runs behind the host.

With async scheduling the next pass is launched before this one's result is read, so the host's clock would count two.
On CUDA two events in the stream enclose the pass instead; on CPU work ends when the call returns.
"""

import time

import torch


class ForwardTimer:
    """One pass: made before it, `stop` once it is launched, `seconds` when its result is there."""

    def __init__(self, device: torch.device) -> None:
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            self._events = (_event(), _event())
            self._events[0].record()
        self._started_s = time.perf_counter()
        self._ended_s = self._started_s

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

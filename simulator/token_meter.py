"""When tokens come out of one executor: TTFT, TBT, attainment and the event log."""

from collections.abc import Callable

from simulator.running import SimRequest
from simulator.statistics import Statistics

Log = Callable[[str, str, int], None]
"""Event, subject (a request's id, or a number), executor."""


class TokenMeter:
    """Counts tokens for all decoding requests at once.

    They all get a token in the same passes, so the gap between two passes is the gap between two tokens of each, and a
    request was late if a pass after its first token was.
    """

    def __init__(self, executor: int, statistics: Statistics, log: Log | None) -> None:
        self.finished: list[SimRequest] = []
        """Requests that ended since this list was last emptied."""
        self._executor = executor
        self._statistics = statistics
        self._log = log
        self._last_token_s = 0.0
        self._last_late_s = -1.0

    def decoded(self, end_s: float, num_decode: int) -> None:
        """A forward pass has given every decoding request a token."""
        if self._statistics.add_gap(end_s - self._last_token_s, num_decode):
            self._last_late_s = end_s
        self._last_token_s = end_s

    def computed(self, end_s: float, num_prompt_tokens: int) -> None:
        """A forward pass has ended that computed so many prompt tokens."""
        self._statistics.prompt_tokens += num_prompt_tokens
        self._last_token_s = end_s

    def prompt_done(self, request: SimRequest, end_s: float) -> None:
        """A prompt is computed (anew, after a preemption) and one token is out."""
        if request.first_token_s < 0:
            request.first_token_s = end_s
            self._statistics.add_first_token(end_s - request.arrival_s, is_background=request.user_priority > 0)
            self.note("first_token", request.request_id)
        elif self._statistics.add_gap(end_s - request.last_token_s, 1):
            request.is_late = True
        request.late_since_s = end_s

    def preempted(self, request: SimRequest) -> None:
        """A request has lost its seat; what was late until now stays with it."""
        self._statistics.preemptions += 1
        if request.generated:
            request.last_token_s = self._last_token_s
            request.is_late |= self._last_late_s > request.late_since_s
        self.note("preempted", request.request_id)

    def pruned(self, num_blocks: int) -> None:
        """So many KV blocks were dropped."""
        self._statistics.pruned_blocks += num_blocks
        self.note("pruned", str(num_blocks))

    def ended(self, request: SimRequest) -> None:
        """A request's last token is out."""
        is_late = request.is_late or self._last_late_s > request.late_since_s
        ttft_s = request.first_token_s - request.arrival_s
        self._statistics.add_finished(ttft_s, is_late=is_late, is_background=request.user_priority > 0)
        self.finished.append(request)
        self.note("finished", request.request_id)

    def trained(self, end_s: float, num_pairs: int) -> None:
        """Optimizer steps on so many pairs have ended."""
        self._statistics.add_pairs(end_s, num_pairs)
        self.note("trained", str(num_pairs))

    def note(self, event: str, subject: str) -> None:
        """Write a line of the event log, if there is one."""
        if self._log is not None:
            self._log(event, subject, self._executor)

"""How much training the retrain rate asks for, and when the blocking baselines train.

The retrain rate is preference pairs trained for each inference request (the prototype's "number of training tasks /
number of inference tasks", where a task is one pair). `mace` takes what the slack gives, within floor and cap.
`periodic` (Ekya-style) and `continuous` stop inference to train: after `period_requests`, or after each 1/r.
"""

from core.config import SchedulerConfig


class RetrainMeter:
    """Counts requests and trained pairs; answers what the policy wants now."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._num_requests = 0
        self._num_pairs = 0
        self._requests_at_phase = 0
        self._phase_quota: float | None = None
        """Pairs trained at which the phase in progress ends; None between phases."""
        self._last_work_s = 0.0

    @property
    def is_blocking_policy(self) -> bool:
        """Whether training stops inference."""
        return self._period() is not None

    @property
    def rate(self) -> float:
        """Pairs trained for each request so far; infinite before the first request if anything was trained."""
        if self._num_requests == 0:
            return float("inf") if self._num_pairs else 0.0
        return self._num_pairs / self._num_requests

    def note_requests(self, count: int = 1) -> None:
        """Count arrived inference requests."""
        self._num_requests += count

    def note_trained(self, num_pairs: int) -> None:
        """Count pairs of finished optimizer steps."""
        self._num_pairs += num_pairs

    def may_train(self) -> bool:
        """Whether fine-tune work could run if nothing was to be served now."""
        policy = self._config.policy
        if policy == "mace":
            return not self.is_above_cap()
        return (
            policy != "inference_only"
            and self._is_quota_open()
            and (self._phase_quota is not None or self._is_period_over())
        )

    def is_blocking_due(self, has_work: bool, now_s: float) -> bool:
        """Whether a baseline stops inference now. Call once for each iteration; False for the other policies.

        A phase begins when its requests have arrived and there is work. It lasts until its quota is trained,
        `requests since the last phase * retrain_rate`, or there was no work for `phase_gap_s`: steps come one by one,
        and the pause between two of them is not the end of the work. In a pause inference goes on.
        """
        if not self.is_blocking_policy:
            return False
        if self._phase_quota is None:
            if not (has_work and self._is_quota_open() and self._is_period_over()):
                return False
            requests = self._num_requests - self._requests_at_phase
            self._phase_quota = self._num_pairs + requests * self._config.retrain_rate
            self._requests_at_phase = self._num_requests
        if has_work:
            self._last_work_s = now_s
        if self._num_pairs >= self._phase_quota or now_s - self._last_work_s > self._config.phase_gap_s:
            self._phase_quota = None
            return False
        return has_work

    def is_above_cap(self) -> bool:
        """Whether `mace` must stop training until requests catch up; an idle server without requests may train."""
        cap = self._config.retrain_rate_cap
        return cap is not None and self._num_requests > 0 and self._num_pairs >= cap * self._num_requests

    def is_below_floor(self) -> bool:
        """Whether `mace` must train even without slack."""
        return self._num_pairs < self._config.retrain_rate_floor * self._num_requests

    def _is_quota_open(self) -> bool:
        return self._num_pairs < self._num_requests * self._config.retrain_rate

    def _is_period_over(self) -> bool:
        period = self._period()
        return period is not None and self._num_requests - self._requests_at_phase >= period

    def _period(self) -> int | None:
        each_pair = max(1, round(1 / self._config.retrain_rate))
        if self._config.policy == "periodic":
            return max(each_pair, self._config.period_requests)
        return each_pair if self._config.policy == "continuous" else None

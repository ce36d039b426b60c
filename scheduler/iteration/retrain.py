"""The retrain rate: the training that it asks for, and the phases of the blocking baselines.

The retrain rate is preference pairs trained for each inference request (the prototype's "number of training tasks /
number of inference tasks", where a task is one pair). `mace` takes what the slack gives, within floor and cap.
`periodic` (Ekya-style) and `continuous` stop inference to train: after `period_requests`, or after each 1/r.
"""

from core.config import AppArgs


class RetrainMeter:
    """Counts requests and trained pairs; answers what the policy wants now."""

    def __init__(self, args: AppArgs) -> None:
        self._config = args.scheduler
        self._experiments = args.experiments
        self._num_requests = 0
        self._num_pairs = 0
        self._requests_at_phase = 0
        self._phase_quota: float | None = None
        """Pairs trained at which the phase in progress ends; None between phases."""
        self._last_work_s = 0.0
        each_pair = max(1, round(1 / args.experiments.retrain_rate))
        periods = {"continuous": each_pair, "periodic": max(each_pair, args.experiments.period_requests)}
        self._period = periods.get(args.scheduler.policy)
        """Requests between two training phases; None for the policies that do not stop inference."""

    @property
    def is_blocking_policy(self) -> bool:
        """True if training stops inference."""
        return self._period is not None

    def note_requests(self, count: int = 1) -> None:
        """Count arrived inference requests."""
        self._num_requests += count

    def note_trained(self, num_pairs: int) -> None:
        """Count pairs of finished optimizer steps."""
        self._num_pairs += num_pairs

    def may_train(self) -> bool:
        """True if fine-tune work could run with nothing to serve now.

        `mace` stops above its cap until requests catch up; an idle server without requests may train.
        """
        if self._config.policy == "mace":
            cap = self._config.retrain_rate_cap
            return cap is None or self._num_requests == 0 or self._num_pairs < cap * self._num_requests
        return self._is_quota_open() and (self._phase_quota is not None or self._is_period_over())

    def is_blocking_due(self, has_work: bool, now_s: float) -> bool:
        """True if a baseline stops inference now. Call once for each iteration; False for the other policies.

        A phase begins when its requests have arrived and there is work. It lasts until its quota is trained,
        `requests since the last phase * retrain_rate`, or there was no work for `phase_gap_s`: steps come one by one,
        and the pause between two of them is not the end of the work. In a pause inference goes on.
        """
        if self._phase_quota is None:
            if not (has_work and self._is_quota_open() and self._is_period_over()):
                return False
            requests = self._num_requests - self._requests_at_phase
            self._phase_quota = self._num_pairs + requests * self._experiments.retrain_rate
            self._requests_at_phase = self._num_requests
        if has_work:
            self._last_work_s = now_s
        if self._num_pairs >= self._phase_quota or now_s - self._last_work_s > self._experiments.phase_gap_s:
            self._phase_quota = None
            return False
        return has_work

    def is_below_floor(self) -> bool:
        """True if `mace` must train even without slack."""
        return self._num_pairs < self._config.retrain_rate_floor * self._num_requests

    def _is_quota_open(self) -> bool:
        return self._num_pairs < self._num_requests * self._experiments.retrain_rate

    def _is_period_over(self) -> bool:
        return self._period is not None and self._num_requests - self._requests_at_phase >= self._period

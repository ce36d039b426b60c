"""Gives a share of the requests for `<name>` to the version on trial, and times both versions.

Without a trial a request costs one look at a flag. A request for the canary gets `<name>@v000N` as its model, as
if the client had asked for it: the answer names that version, like every answer names the one that gave it, and so
ratings of the answer are ratings of the version.
"""

import re
import time
from typing import Any

from app.http.request import Answer, ClientRequest, GoOn
from deployments.publishing.canary import CanaryTrial

_PATHS = frozenset(
    {"/v1/chat/completions", "/v1/chat/completions/batch", "/v1/completions", "/v1/responses", "/v1/messages"}
)
_TOKENS = re.compile(rb'"(?:completion|output)_tokens":\s*(\d+)')
"""The count in an answer's `usage`; in its text the quotes would be escaped."""


class CanaryRouter:
    """A step of the request chain; see the module docstring."""

    def __init__(self, trial: CanaryTrial, model_id: str) -> None:
        self._trial = trial
        self._model_id = model_id

    async def __call__(self, request: ClientRequest, go_on: GoOn) -> None:
        """Pass the request on, with another model if it was drawn for the canary."""
        if not self._trial.is_running or request.path not in _PATHS or not request.asks_for(self._model_id):
            await go_on()
            return
        version, model = self._trial.draw(_user_of(request.json))
        if model is not None:
            request.set_fields(model=model)
        started_s = time.perf_counter()
        request.answer.keeps_body = True
        try:
            await go_on()
        except Exception:
            self._trial.observe(version, within_slo=False)
            raise
        within_slo = self._is_within_slo(request.answer, started_s)
        if within_slo is not None:
            self._trial.observe(version, within_slo=within_slo)

    def _is_within_slo(self, answer: Answer, started_s: float) -> bool | None:
        """Did the answer meet the targets? None if it says nothing of the version: refused, or given up."""
        if answer.status >= 500:
            return False
        if answer.status != 200 or not answer.is_complete or not answer.num_parts:
            return None
        if answer.is_stream:
            pace_s = (answer.last_s - answer.first_s) / max(1, answer.num_parts - 1)
            return self._trial.is_within_slo(answer.first_s - started_s, pace_s)
        counted = _TOKENS.search(answer.body)
        return self._trial.is_within_slo_in_all(answer.last_s - started_s, int(counted[1]) if counted else 0)


def _user_of(request: dict[str, Any]) -> str | None:
    """Read the user's name, from OpenAI's old field for it or the new one."""
    for key in ("user", "safety_identifier"):
        if isinstance(user := request.get(key), str) and user:
            return user
    return None

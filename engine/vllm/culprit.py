"""Which request makes iterations fail: found by running the halves of a failed batch apart.

An exception out of a forward pass does not say whose it is. Only a request that fails alone, after it was in a batch
that failed, is a culprit, and only if the device still works: before the first one is accused for good, something else
has to pass, if need be a probe, which is a small request of our own. A probe that fails says that the fault is not a
request's.
"""

from collections.abc import Callable, Iterable

PROBE = "mace-probe"
"""Request id of the probe."""

_MAX_UNEXPLAINED = 3
_FORGIVEN_AFTER = 1000
"""Iterations without a failure after which failures that nobody explains are forgotten."""


class UnexplainedFailureError(RuntimeError):
    """Iterations fail, and no request is to blame: the engine cannot go on."""


class CulpritSearch:
    """Decides which requests may run until it is known whose failure it was.

    A failed batch of n requests with c culprits takes at most 2 + c · (1 + log2 n) further failures, rounded up.
    """

    def __init__(self) -> None:
        self.group: tuple[str, ...] = ()
        """Requests that may run now; empty while nothing is searched, when all may."""
        self._untested: list[tuple[str, ...]] = []
        self._accused: dict[str, str] = {}
        """Errors of requests that failed alone while nothing has passed yet, by their ids."""
        self._has_passed = self._has_culprit = False
        self._num_unexplained = 0
        self._num_good = 0

    def keep(self, is_there: Callable[[str], bool]) -> None:
        """Forget requests that have left."""
        self._accused = {name: error for name, error in self._accused.items() if is_there(name)}
        kept = (tuple(filter(is_there, group)) for group in self._untested)
        self._untested = [group for group in kept if group]

    def failed(self, batch: Iterable[str], error: str) -> dict[str, str]:
        """Note that an iteration failed with these requests, at least one.

        Returns:
            The culprits that are known now, and their errors, by request id. They are to be ended.

        Raises:
            UnexplainedFailureError: the probe fails, or too many failures had no culprit.
        """
        suspects = tuple(batch)
        if PROBE in self.group:
            raise UnexplainedFailureError(f"iterations fail whatever request is in them: {error}")
        if not self.group:
            if self._num_good >= _FORGIVEN_AFTER:
                self._num_unexplained = 0
            self._num_good, self._has_passed, self._has_culprit = 0, False, False
        elif len(suspects) == 1:
            self._accused[suspects[0]] = error
            suspects = ()
        self._untested.append(
            tuple(name for name in self.group if name not in suspects and name not in self._accused)
        )
        middle = len(suspects) // 2
        self._untested += [suspects[middle:], suspects[:middle]]
        return self._choose(error)

    def passed(self, left: Iterable[str] = (), *, has_run: bool = True) -> dict[str, str]:
        """Note that the group ran without a failure, but for the requests `left`, which have not run yet.

        `has_run` is false if all of the group left before they ran. Returns and raises what `failed` does.
        """
        self._has_passed |= has_run
        self._untested.append(tuple(left))
        return self._choose("")

    def note_good(self) -> None:
        """Note an iteration without a failure while nothing is searched."""
        self._num_good += 1

    def _choose(self, error: str) -> dict[str, str]:
        """The next group. Returns the accused, if something has passed."""
        ended: dict[str, str] = {}
        if self._has_passed and self._accused:
            ended, self._accused, self._has_culprit = self._accused, {}, True
        self.group = ()
        while self._untested and not self.group:
            self.group = self._untested.pop()
        if self._accused:
            self._untested.append(self.group)
            self.group = (PROBE,)
        elif not self.group and not self._has_culprit:
            self._num_unexplained += 1
            if self._num_unexplained > _MAX_UNEXPLAINED:
                raise UnexplainedFailureError(f"iterations fail again and again with no request alone: {error}")
        return ended

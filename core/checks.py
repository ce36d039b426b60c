"""The result of one check of `mace doctor`, its own or the feedback store's."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "error"]
Outcome = tuple[Status, str, str]
"""Status, what was found, and what to do if that is not well."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One line of the screen."""

    check: str
    status: Status
    found: str
    fix: str = ""
    """The remedy; empty if none is needed."""

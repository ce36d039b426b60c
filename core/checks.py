"""The result of one check of `mace doctor`, its own or the feedback store's."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One line of the screen."""

    check: str
    status: Literal["ok", "warning", "error"]
    found: str
    fix: str = ""
    """The remedy; empty if none is needed."""

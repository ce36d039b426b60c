"""What a request router knows of prefixes by itself: those of the requests that it sent, until reports tell."""

import math
from collections import OrderedDict
from collections.abc import Collection

from deployments.routing.prefix_text import LENGTHS, TextPrefixes

_BELIEVED_S = 3.0
"""A report reaches the routers within two periods; what it does not name by then is not in the cache."""
_MAX_NAMES = 65_536


class SentPrefixes:
    """Names of prefixes by the replica that a request with them was last sent to; bounded. Times: the wall clock."""

    def __init__(self) -> None:
        self._sent_s: OrderedDict[tuple[str, str], float] = OrderedDict()

    def note(self, replica_id: str, prefixes: TextPrefixes, now_s: float) -> None:
        """A request was sent."""
        for name in prefixes.digests:
            self._sent_s[replica_id, name] = now_s
            self._sent_s.move_to_end((replica_id, name))
        while len(self._sent_s) > _MAX_NAMES:
            self._sent_s.popitem(last=False)

    def since(self, replica_id: str, reported_s: float, prefixes: TextPrefixes) -> set[str]:
        """Those of the names that were sent to a replica too late for its report."""
        earliest_s = reported_s - _BELIEVED_S
        return {name for name in prefixes.digests if self._sent_s.get((replica_id, name), -math.inf) > earliest_s}


def cached_text_bytes(prefixes: TextPrefixes, names: Collection[str]) -> int:
    """Bytes of a request's text up to its longest prefix among `names`; 0 if there is none."""
    known = [LENGTHS[i] for i, name in enumerate(prefixes.digests) if name in names]
    return known[-1] if known else 0

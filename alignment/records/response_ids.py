"""Ids of answers: vLLM makes each from an id of ours, which tells when its request came.

Such an id is unique whatever a client sends, has at most 64 ASCII characters and no `#`, so `id#2` is always choice 2.
"""

import re
import time
import uuid

_OURS = re.compile(r"(?:chatcmpl-|cmpl-|resp_|msg_)?([0-9a-f]{12})[0-9a-f]{20}")
_MAX_RUN_S = 3600.0
"""Hardly a request runs longer. A trace may be lost: its executor died, or very many answers came since."""
_MAX_SKEW_S = 60.0
"""Clocks of two machines differ by no more."""


def new_request_id() -> str:
    """32 hexadecimal digits; the first 12 are the time in milliseconds since 1970."""
    return f"{time.time_ns() // 1_000_000:012x}{uuid.uuid4().hex[:20]}"


def may_be_running(response_id: str, now: float) -> bool:
    """True for an id that may belong to a request which still runs at `now` (Unix seconds).

    Every answer leaves a trace in the store when its request ends, so an id of ours without one is such an id, unless
    somebody made it up.
    """
    found = _OURS.fullmatch(response_id)
    return found is not None and -_MAX_SKEW_S < now - int(found[1], 16) / 1000 < _MAX_RUN_S

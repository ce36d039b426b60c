"""A step of the request chain: times the answers to generating requests as they leave, for `EdgeMeter`."""

import time

from app.http.guard import GENERATING_PATHS, class_of
from app.http.request import ClientRequest, GoOn, Step
from deployments.monitors.edge import EdgeMeter


def measure_edge(meter: EdgeMeter) -> Step:
    """A step: first token and gaps of streams, and the latency of each whole answer.

    A stream with tools has no gaps: vLLM holds its tokens back until they are text or a call. One that its client gave
    up before the first token is a late one if it had waited too long.
    """

    async def measure(request: ClientRequest, go_on: GoOn) -> None:
        body = request.json
        if request.path not in GENERATING_PATHS or not isinstance(body, dict):
            await go_on()
            return
        request_class, answer = class_of(request), request.answer
        note = meter.stream(request_class, request.arrived_s)
        has_tools, is_preamble = bool(body.get("tools")), request.path == "/v1/responses"

        def see(part: bytes, now_s: float) -> None:
            nonlocal is_preamble
            if not answer.is_stream:
                return
            if is_preamble:  # the route says that it began before there is a token
                is_preamble = b".delta" not in part
            if not is_preamble:
                note(now_s)
                if has_tools:
                    answer.on_part = None

        answer.on_part = see
        try:
            await go_on()
        finally:
            waited_s = time.perf_counter() - request.arrived_s
            if answer.status == 200 and answer.is_complete:
                meter.add_whole(request_class, waited_s)
            elif not answer.status and body.get("stream") is True and waited_s > meter.slo.ttft_s:
                meter.add_first(request_class, waited_s)

    return measure

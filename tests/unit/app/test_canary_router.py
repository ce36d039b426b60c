"""The share of traffic that goes to the version on trial, as the application behind sees it."""

import asyncio
import json

import pytest

from app.http.canary import CanaryRouter
from app.http.guard import guard, set_request_class
from app.http.request import REQUEST_KEY, RequestChain


class Trial:
    """Draws the canary for users named `c...`, and remembers what was observed."""

    def __init__(self, is_running=True):
        self.is_running = is_running
        self.seen = []

    def draw(self, user):
        return ("v0002", "m@v0002") if user and user.startswith("c") else ("v0001", None)

    def observe(self, version, *, within_slo):
        self.seen.append((version, within_slo))

    def is_within_slo(self, ttft_s, mean_tbt_s):
        return ttft_s < 0.05 and mean_tbt_s < 0.05

    def is_within_slo_in_all(self, total_s, num_tokens):
        return total_s < 0.01 * num_tokens


class Application:
    """What vLLM is to the router; `parts` are (delay in seconds, bytes)."""

    def __init__(self, parts=((0, b'{"usage":{"completion_tokens":9}}'),), status=200, kind=b"application/json"):
        self.parts, self.status, self.kind = parts, status, kind
        self.bodies, self.parsed, self.after = [], [], []

    async def __call__(self, scope, receive, send):
        message = await receive()
        self.bodies.append(message["body"])
        self.parsed.append(scope[REQUEST_KEY].json)
        lengths = [int(value) for name, value in scope["headers"] if name == b"content-length"]
        assert lengths == [len(message["body"])]
        self.after.append((await receive())["type"])
        await send(
            {"type": "http.response.start", "status": self.status, "headers": [(b"Content-Type", self.kind)]}
        )
        for number, (delay_s, part) in enumerate(self.parts):
            await asyncio.sleep(delay_s)
            more = number < len(self.parts) - 1
            await send({"type": "http.response.body", "body": part, "more_body": more})


def post(application, trial, body, path="/v1/chat/completions", send_error=None):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    messages = iter(
        [{"type": "http.request", "body": data, "more_body": False}, {"type": "http.disconnect"}],
    )
    sent = []

    async def receive():
        return next(messages)

    async def send(message):
        if send_error is not None and message["type"] == "http.response.body":
            raise send_error
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path}
    scope["headers"] = [(b"content-length", str(len(data)).encode()), (b"x", b"y")]
    steps = [guard, set_request_class, CanaryRouter(trial, "m")]
    app = RequestChain(application, steps, 10_000, lambda _: None)
    asyncio.run(app(scope, receive, send))
    return sent


@pytest.mark.parametrize("who", [{"user": "c1"}, {"safety_identifier": "c1"}])
@pytest.mark.parametrize("model", [{"model": "m"}, {"model": None}, {}])
def test_a_drawn_request_asks_for_the_canary(who, model):
    application, trial = Application(), Trial()
    sent = post(application, trial, {**model, **who, "messages": [], "service_tier": "flex"})
    assert json.loads(application.bodies[0]) == {
        **who,
        "model": "m@v0002",
        "messages": [],
        "service_tier": "flex",
        "priority": 1,  # what the step before added stays
    }
    assert application.parsed[0] == {**model, **who, "messages": [], "service_tier": "flex"}  # the client's
    assert application.after == ["http.disconnect"]
    assert sent[1]["body"] == application.parts[0][1]
    assert trial.seen == [("v0002", True)]


def test_other_requests_go_on_byte_for_byte_and_are_counted_for_live():
    application, trial = Application(), Trial()
    body = b'{"model": "m",  "user": "live one"}'
    post(application, trial, body)
    assert application.bodies == [body]
    assert trial.seen == [("v0001", True)]


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"model": "m@v0001", "user": "c"}, "/v1/chat/completions"),
        ({"model": "m@base", "user": "c"}, "/v1/completions"),
        ({"model": "other", "user": "c"}, "/v1/completions"),
        ({"model": ["m"], "user": "c"}, "/v1/completions"),
        ({"model": "m", "user": "c"}, "/tokenize"),
        (b"{oops", "/v1/completions"),
        (b"[1]", "/v1/completions"),
    ],
)
def test_what_names_another_version_or_generates_nothing_is_left_alone(body, path):
    application, trial = Application(), Trial()
    post(application, trial, body, path)
    assert application.bodies == [body if isinstance(body, bytes) else json.dumps(body).encode()]
    assert trial.seen == []


def test_without_a_trial_nothing_is_touched_or_timed():
    application, trial = Application(), Trial(is_running=False)
    post(application, trial, {"model": "m", "user": "c"})
    assert json.loads(application.bodies[0])["model"] == "m"
    assert trial.seen == []


STREAM = {"kind": b"text/event-stream; charset=utf-8"}


@pytest.mark.parametrize(
    ("application", "seen"),
    [
        (Application(((0, b"a"), (0, b"b"), (0, b"c")), **STREAM), [True]),
        (Application(((0.1, b"a"), (0, b"b"), (0, b"c")), **STREAM), [False]),  # late
        (Application(((0, b"a"), (0.1, b"b"), (0.1, b"c")), **STREAM), [False]),  # slow
        (Application(((0.1, b'{"usage":{"completion_tokens": 5}}'),)), [False]),
        (Application(((0.1, b'{"usage":{"output_tokens":50}}'),)), [True]),
        (
            Application(((0.1, b'{"text":"\\"completion_tokens\\": 99","usage":{"completion_tokens":5}}'),)),
            [False],
        ),
        (Application(status=500), [False]),
        (Application(status=400), []),  # the client's mistake
        (Application(status=404), []),
    ],
)
def test_what_counts_as_within_the_slo(application, seen):
    trial = Trial()
    post(application, trial, {"model": "m"})
    assert [good for _, good in trial.seen] == seen


def test_an_answer_that_nobody_waited_for_does_not_count():
    trial = Trial()

    async def cut_off(scope, receive, send):
        await Application(((0, b"a"),), **STREAM)(
            scope, receive, lambda message: send({**message, "more_body": True})
        )

    post(cut_off, trial, {"model": "m"})
    assert trial.seen == []


def test_a_crash_counts_against_the_version_and_is_passed_on():
    async def crash(scope, receive, send):
        raise RuntimeError("engine died")

    trial = Trial()
    with pytest.raises(RuntimeError, match="engine died"):
        post(crash, trial, {"model": "m", "user": "c"})
    assert trial.seen == [("v0002", False)]

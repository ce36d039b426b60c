"""The request as the application behind the chain receives it."""

import asyncio
import contextlib
import json

from app.http.request import ClientRequest, RequestChain


def run(messages, steps=(), max_bytes=100):
    """What the application received, and what the client did."""
    coming, received, sent = iter(messages), [], []

    async def receive():
        return next(coming)

    async def send(message):
        sent.append(message)

    async def app(scope, receive, send):
        while not received or received[-1]["type"] != "http.disconnect":
            received.append(await receive())

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    asyncio.run(RequestChain(app, steps, max_bytes, lambda _: None)(scope, receive, send))
    return received, sent


def part(body, more_body=False):
    return {"type": "http.request", "body": body, "more_body": more_body}


GONE = {"type": "http.disconnect"}


def test_the_body_comes_in_one_piece_and_then_the_disconnect():
    received, _ = run([part(b'{"a"', True), part(b": 1}"), GONE])
    assert received == [part(b'{"a": 1}'), GONE]


def test_a_client_that_goes_away_in_the_middle_has_sent_nothing():
    received, _ = run([part(b'{"a": 1}\n', True), GONE])
    assert received == [GONE]


def test_steps_see_the_request_in_their_order_and_the_last_change_of_a_field_counts():
    seen = []

    def step(name):
        async def take(request: ClientRequest, go_on):
            request.set_fields(by=name, **{name: True})
            seen.append((name, request.json))
            await go_on()

        return take

    received, _ = run([part(b'{"by": "client"}'), GONE], [step("first"), step("second")])
    assert seen == [("first", {"by": "client"}), ("second", {"by": "client"})]
    assert received[0]["body"] == b'{"by": "second", "first": true, "second": true}'


def test_what_is_too_large_never_reaches_the_application():
    received, sent = run([part(b"x" * 60, True), part(b"x" * 60, True)])
    assert received == []
    assert sent[0]["status"] == 413


class Slow:
    """An application that begins an answer, and goes on with it after some time, or when it receives the disconnect."""

    def __init__(self, content_type=None, work_s=60.0):
        self.work_s = work_s
        self.content_type = content_type
        self.has_begun = asyncio.Event()
        self.was_told = False

    async def __call__(self, scope, receive, send):
        if self.content_type:
            headers = [(b"content-type", self.content_type)]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        self.has_begun.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.work_s):
                while (await receive())["type"] != "http.disconnect":
                    pass
                self.was_told = True
        if self.content_type:
            await send({"type": "http.response.body", "body": b"data: 2\n\n"})


def closed_during(app):
    """What a client was sent whose request was under way when the chain was closed, and one that came after."""

    async def go():
        sent, late, never = [], [], asyncio.Event()
        coming = iter([part(b"{}")])

        async def receive():
            return next(coming, None) or await never.wait()

        async def receive_late():
            return part(b"{}")

        async def to(which, message):
            which.append(message)

        scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
        chain = RequestChain(app, (), 100, lambda _: None)
        task = asyncio.create_task(chain(dict(scope), receive, lambda message: to(sent, message)))
        await app.has_begun.wait()
        await chain.close()
        assert task.done()
        await chain(dict(scope), receive_late, lambda message: to(late, message))
        return sent, late

    return asyncio.run(go())


def test_a_stop_ends_a_stream_with_an_error_event_and_tells_the_application():
    app = Slow(b"text/event-stream; charset=utf-8")
    sent, _ = closed_during(app)
    [_, first, last] = sent
    assert app.was_told
    assert first["body"] == b"data: 1\n\n"
    event, data, *_ = last["body"].decode().split("\n")
    assert (event, last.get("more_body", False)) == ("event: error", False)
    error = json.loads(data.removeprefix("data: "))
    assert error["type"] == "error"
    assert error["error"].keys() == {"message", "type", "param", "code"}
    assert error["error"]["code"] == 503


def test_a_stop_answers_503_to_what_has_no_answer_yet_and_to_what_comes_after():
    for sent in closed_during(Slow()):
        assert sent[0]["status"] == 503
        assert (b"retry-after", b"2") in sent[0]["headers"]
        assert json.loads(sent[1]["body"])["error"]["type"] == "ServerStoppingError"


def test_a_stop_puts_no_error_into_an_answer_that_has_no_place_for_it():
    app = Slow(b"application/x-ndjson", work_s=0.1)
    sent, _ = closed_during(app)
    assert not app.was_told
    assert b"".join(message.get("body", b"") for message in sent) == b"data: 1\n\ndata: 2\n\n"

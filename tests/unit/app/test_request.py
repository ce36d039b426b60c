"""The request as the application behind the chain receives it."""

import asyncio

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

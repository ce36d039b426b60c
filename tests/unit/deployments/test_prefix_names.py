"""Names of text prefixes: in the proxy, in the header, at the router."""

import asyncio
import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.routing.prefix_names import (
    HEADER,
    LENGTHS,
    MAX_TEXT_BYTES,
    PrefixNames,
    TextPrefixes,
    middlewares,
    prefixes_of,
)


def chat(*contents, model="m"):
    return {"model": model, "messages": [{"role": "user", "content": content} for content in contents]}


def shared_bytes(a, b):
    """Length of the longest prefix that two requests are seen to share."""
    return prefixes_of(a).bytes_among(prefixes_of(b).digests)


def test_lengths_grow_by_no_more_than_a_quarter_and_end_at_the_bound():
    assert LENGTHS[0] == 256
    assert LENGTHS[-1] <= MAX_TEXT_BYTES
    assert all(later <= max(earlier + 256, 1.25 * earlier) for earlier, later in pairwise(LENGTHS))
    assert len(prefixes_of(chat("x" * 2 * MAX_TEXT_BYTES)).to_header()) < 1000


@settings(max_examples=60)
@given(st.integers(0, 4000), st.integers(1, 3000), st.integers(1, 3000))
def test_what_two_requests_share_is_found_to_a_step_and_never_exceeded(common, one, other):
    shared = len("m\x1euser\x1f") + common
    found = shared_bytes(chat("s" * common + "a" * (one + 256)), chat("s" * common + "b" * (other + 256)))
    assert found <= shared
    assert found >= max((length for length in LENGTHS if length <= shared), default=0)


def test_another_model_tool_or_system_prompt_shares_nothing():
    text = "t" * 3000
    assert shared_bytes(chat(text), chat(text, model="other")) == 0
    assert shared_bytes(chat(text), chat(text) | {"tools": [{"name": "f"}]}) == 0
    assert shared_bytes(chat(text), chat("u" + text)) == 0
    assert shared_bytes(chat(text), chat(text)) == 2560
    assert shared_bytes({"prompt": text}, {"prompt": text + "x"}) == 2560
    assert shared_bytes({"input": text, "instructions": "i"}, {"input": text, "instructions": "i"}) == 2560


def test_prompts_of_token_ids_share_what_their_ids_share():
    ids = list(range(1000, 3000))
    assert shared_bytes({"prompt": ids}, {"prompt": [*ids, 5]}) > 7000
    assert shared_bytes({"prompt": ids}, {"prompt": [ids]}) > 7000
    assert shared_bytes({"prompt": ids}, {"prompt": [7, *ids]}) == 0


def test_several_prompts_in_one_request_have_no_names():
    assert prefixes_of({"prompt": ["x" * 1000, "y" * 1000]}) is None
    assert prefixes_of({"prompt": [[1] * 1000, [2] * 1000]}) is None
    assert prefixes_of({"prompt": ["x" * 1000]}) == prefixes_of({"prompt": "x" * 1000})


def test_the_time_that_naming_takes_is_bounded_by_the_messages_looked_at():
    many = prefixes_of({"messages": [{}] * 100_000})
    assert many == prefixes_of({"messages": [{}] * 2048})


@pytest.mark.parametrize("body", [None, 3, [], {}, {"messages": []}, {"prompt": "short"}, {"messages": 7}])
def test_what_has_no_long_prompt_has_no_names(body):
    assert prefixes_of(body) is None


@given(st.recursive(st.none() | st.integers() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)))
def test_no_body_breaks_the_naming(value):
    for key in ("messages", "prompt", "input", "tools"):
        found = prefixes_of({key: value, "prompt": "x" * 300} | {key: value})
        assert found is None or TextPrefixes.from_headers([(HEADER, found.to_header())]) == found


def test_the_header_carries_names_and_size_and_nonsense_is_no_header():
    prefixes = prefixes_of(chat("x" * 1000))
    assert TextPrefixes.from_headers([(HEADER, prefixes.to_header())]) == prefixes
    name = b"0123456789ab"
    assert TextPrefixes.from_headers([(HEADER, b"5;" + name)]) is not None
    for nonsense in (
        *(b"", b";" + name, b"x;" + name, b"-1;" + name, b"99999999999;" + name, b"\xff;\xfe"),
        *(b"5;", b"5;" + name + b",", b"5;a", b"5;" + name.upper(), b"5;" + name * 100, b"5;" + name + b",\n"),
        b"5;" + b",".join([name] * 1000),
    ):
        assert TextPrefixes.from_headers([(HEADER, nonsense)]) is None
    assert TextPrefixes.from_headers([]) is None


def through_proxy(messages, headers, method="POST"):
    """The scope and the messages that arrive behind the middleware."""
    seen = {}

    async def app(scope, receive, send):
        seen["scope"] = scope
        seen["messages"] = [await receive() for _ in range(len(messages))]

    given_messages = iter(messages)

    async def receive():
        return next(given_messages)

    scope = {"type": "http", "method": method, "headers": headers}
    asyncio.run(PrefixNames(app)(scope, receive, None))
    return dict(seen["scope"]["headers"]), seen["messages"]


def parts_of(body, *cuts):
    ends = [*cuts, len(body)]
    starts = [0, *cuts]
    return [
        {"type": "http.request", "body": body[start:end], "more_body": end < len(body)}
        for start, end in zip(starts, ends, strict=True)
    ] + [{"type": "http.disconnect"}]


def json_headers(body, **more):
    fields = {"content-type": "application/json", "content-length": str(len(body)), **more}
    return [(name.encode(), value.encode()) for name, value in fields.items()]


def test_the_middleware_names_the_prefixes_and_gives_every_message_on():
    body = json.dumps(chat("x" * 1000)).encode()
    messages = parts_of(body, 10, 500)
    headers, arrived = through_proxy(messages, json_headers(body))
    assert arrived == messages
    assert headers[HEADER] == prefixes_of(chat("x" * 1000)).to_header()


@pytest.mark.parametrize(
    ("body", "changes", "method"),
    [
        (b"not json", {}, "POST"),
        (b"[" * 100_000, {}, "POST"),
        (json.dumps(chat("x" * 1000)).encode(), {"content-type": "text/plain"}, "POST"),
        (json.dumps(chat("x" * 1000)).encode(), {"content-length": ""}, "POST"),
        (json.dumps(chat("x" * 1000)).encode(), {"content-length": "9" * 30}, "POST"),
        (json.dumps(chat("x" * 1000)).encode(), {}, "GET"),
    ],
)
def test_what_cannot_be_read_passes_unnamed_and_a_forged_name_is_dropped(body, changes, method):
    messages = parts_of(body)
    forged = {"X-Mace-Prefix": "9;abc"}
    headers, arrived = through_proxy(messages, json_headers(body, **changes, **forged), method)
    assert arrived == messages
    assert {name.lower() for name in headers}.isdisjoint({HEADER})


def test_a_client_that_leaves_in_the_middle_of_its_body_is_reported_behind_the_middleware():
    body = json.dumps(chat("x" * 1000)).encode()
    messages = [parts_of(body, 100)[0], {"type": "http.disconnect"}]
    assert through_proxy(messages, json_headers(body))[1] == messages


def test_serve_gets_the_middleware():
    assert [middleware.cls for middleware in middlewares()] == [PrefixNames]


def test_the_longest_known_name_decides():
    prefixes = prefixes_of(chat("x" * 1000))
    assert prefixes.bytes_among({prefixes.digests[0], prefixes.digests[2]}) == LENGTHS[2]
    assert prefixes.bytes_among(set()) == 0

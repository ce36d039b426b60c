"""Hostile input: the parser answers every JSON value with an item or a FeedbackError."""

import contextlib
import json

from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.records.feedback import parse_item
from alignment.records.row_formats import ApiRow
from alignment.store.formats import read_jsonl
from alignment.store.intake import prepare
from core.alignment_config import FeedbackConfig
from core.errors import FeedbackError, InvalidFeedbackError

CONFIG = FeedbackConfig(max_text_chars=100)
KEYS = st.sampled_from(
    [
        *(
            "type",
            "chosen_id",
            "rejected_id",
            "prompt",
            "chosen",
            "rejected",
            "input",
            "preferred_output",
            "messages",
        ),
        *("non_preferred_output", "response_id", "value", "id", "user", "tags", "weight", "source", "created_at"),
        *("role", "content", "choice_index", "chosen_index", "tools", "tool_calls", "text"),
    ]
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.text(st.characters(), max_size=4),
    st.sampled_from(
        ["preference", "rating", "correction", "comment", "user", "assistant", "up", "a#1", "\ud800", "\0"]
    ),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=4), inner, max_size=6),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(JSON | st.dictionaries(KEYS, JSON, max_size=6))
def test_arbitrary_json_is_parsed_or_refused_by_name_and_nothing_else(raw):
    with contextlib.suppress(FeedbackError):
        parse_item(raw)
    error = prepare(raw, None, CONFIG).error
    assert len(str(error)) < 1000


@given(JSON)
@settings(max_examples=80, deadline=None)
def test_values_that_are_accepted_encode_to_clean_utf8(raw):
    prepared = prepare({"type": "comment", "value": "x", "tags": raw}, None, CONFIG)
    if prepared.error is None:
        assert "\0" not in prepared.raw_json.encode().decode()


@given(st.lists(st.binary(max_size=30) | JSON.map(lambda value: json.dumps(value).encode()), max_size=5))
@settings(max_examples=80, deadline=None)
def test_arbitrary_bytes_are_read_line_by_line(lines):
    for number, row in read_jsonl(lines):
        assert isinstance(row, ApiRow | InvalidFeedbackError)
        assert 1 <= number <= len(lines)

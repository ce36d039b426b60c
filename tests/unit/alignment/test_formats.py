"""Preference files: line numbers, format detection, export rows."""

import gzip
import json

import pytest

from alignment.records.lines import whole_problem_of_lines
from alignment.store.feedback_store import FeedbackStore
from alignment.store.formats import (
    MAX_REPORTED_ERRORS,
    export_row,
    import_jsonl,
    read_jsonl,
)
from core.alignment_config import FeedbackConfig
from core.errors import InvalidFeedbackError

USER = {"role": "user", "content": "Hi?"}


def says(text):
    return {"role": "assistant", "content": text}


LINES = [
    "\ufeff" + json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}),
    "",
    json.dumps({"chosen": [USER, says("a")], "rejected": [USER, says("b")]}).encode(),
    json.dumps(
        {"input": {"messages": [USER]}, "preferred_output": [says("a")], "non_preferred_output": [says("b")]}
    ),
    "{broken",
    b"\xff\xfe",
    "[1]",
    '{"prompt": NaN}',
    "[" * 100_000,
    '{"prompt": "p", "chosen": "a", "rejected": "a"}',
    '{"type": "comment", "value": "x"}\r\n',
]

TWICE = [
    ('{"prompt": "p", "chosen": "a", "rejected": "b", "chosen": "c"}', "chosen"),
    ('{"prompt": "p", "chosen": "a", "rejected": "b", "rejected": "a"}', "rejected"),
    ('{"prompt": [{"role": "user", "content": "p", "content": "q"}], "chosen": "a", "rejected": "b"}', "content"),
    ('{"prompt": "p", "chosen": "a", "rejected": "b", "weight": 1.0, "weight": 9.0}', "weight"),
]


@pytest.mark.parametrize(("line", "key"), TWICE)
def test_a_key_that_is_given_twice_is_refused_by_its_name(line, key):
    [(_, error)] = read_jsonl([line])
    assert (error.param, str(error)) == (key, f"the key {key!r} is given twice")


def test_nan_is_refused_where_it_is_used_and_nowhere_else():
    bad, good = (
        '{"prompt": "p", "chosen": NaN, "rejected": "b"}',
        '{"prompt": "p", "chosen": "a", "rejected": "b", "x": NaN}',
    )
    [(_, error), (_, row)] = read_jsonl([bad, good])
    assert (error.param, row.dropped) == ("chosen", ())


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'{"a": 1}\n{"a": 2}\n', None),
        (b'\xef\xbb\xbf\n {"a": 1}', None),
        ('{"a": 1}'.encode("utf-16"), "UTF-16"),
        ('{"a": 1}'.encode("utf-16-be"), "UTF-16"),
        ('{"a": 1}'.encode("utf-32"), "UTF-32"),
        (gzip.compress(b'{"a": 1}', mtime=0), "gzip"),
        (b"\x28\xb5\x2f\xfd\x20", "zstd"),
        (b"PK\x03\x04rest", "zip"),
        (b"PAR1", "Parquet"),
        (b'[{"a": 1}]', "JSON array"),
        (b'\xef\xbb\xbf[\n  {"a": 1}\n]', "JSON array"),
        (b'{\n  "a": 1\n}', "several lines"),
    ],
)
def test_data_that_are_no_lines_of_json_are_named_as_a_whole(data, said):
    found = whole_problem_of_lines(data)
    assert (found is None) if said is None else said in found


def test_each_line_has_its_own_format_and_its_own_error():
    read = list(read_jsonl(LINES))
    assert [number for number, _ in read] == [1, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    refused = [number for number, row in read if isinstance(row, InvalidFeedbackError)]
    formats = [row.format for number, row in read if number not in refused]
    assert formats == ["trl", "implicit_prompt", "openai", "trl", "feedback"]
    assert refused == [5, 6, 7, 8, 9]


def test_an_import_reports_what_happened_by_line(tmp_path):
    store = FeedbackStore.open(FeedbackConfig(), tmp_path)
    report = import_jsonl(LINES, store.feedback.add, batch_items=2)
    assert (report.num_accepted, report.num_duplicates, report.num_errors) == (4, 0, 6)
    assert report.dropped_columns == {}
    assert sorted(error.line_number for error in report.errors) == [5, 6, 7, 8, 9, 10]
    [equal] = [error for error in report.errors if error.line_number == 10]
    assert (equal.param, "same text" in equal.message) == ("rejected", True)
    assert import_jsonl(LINES, store.feedback.add).num_duplicates == 4


def test_only_the_first_errors_are_kept_but_all_are_counted():
    report = import_jsonl(["{"] * (MAX_REPORTED_ERRORS + 5), lambda items: [])
    assert (report.num_errors, len(report.errors)) == (MAX_REPORTED_ERRORS + 5, MAX_REPORTED_ERRORS)


def test_export_rows_hold_the_formats_own_keys_only():
    chat, text = ([USER], "a", "b"), ("p", "a", "b")
    assert export_row(*text, "trl") == {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert export_row(*chat, "trl") == {"prompt": [USER], "chosen": [says("a")], "rejected": [says("b")]}
    openai = {"preferred_output": [says("a")], "non_preferred_output": [says("b")]}
    assert export_row(*chat, "openai") == {"input": {"messages": [USER]}, **openai}
    assert export_row(*text, "openai") == {"input": {"messages": [{"role": "user", "content": "p"}]}, **openai}

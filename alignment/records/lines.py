"""Bytes of preference files: the JSON value of a line, and what makes a whole file unreadable."""

import json
import re

from alignment.records.json_checks import unique_object
from core.errors import InvalidFeedbackError

_UTF8_BOM = "\ufeff"

_UNPACK = "unpack them first"
_BINARY = {
    b"\x1f\x8b": ("gzip", "unpack them, or import them as a file whose name ends in .gz"),
    b"PAR1": ("Parquet", "import them as a file whose name ends in .parquet"),
    b"\x28\xb5\x2f\xfd": ("zstd", _UNPACK),
    b"\xfd7zXZ\x00": ("xz", _UNPACK),
    b"BZh": ("bzip2", _UNPACK),
    b"PK\x03\x04": ("a zip archive", _UNPACK),
    b"ARROW1": ("an Arrow file", "write them as Parquet"),
}
_UTF32, _UTF16 = (b"\xff\xfe\0\0", b"\0\0\xfe\xff"), (b"\xff\xfe", b"\xfe\xff")
_ARRAY = re.compile(rb"\s*\[\s*(\{|\Z|\r|\n)")
_SPREAD = re.compile(rb"\s*\{[ \t]*[\r\n]")


def whole_problem(start: bytes) -> str | None:
    """Why data that begin with `start` are no text in UTF-8: one reason for the whole, not one for every line."""
    for magic, (name, remedy) in _BINARY.items():
        if start.startswith(magic):
            return f"the data are {name}, not text; {remedy}"
    encoding = "UTF-32" if start.startswith(_UTF32) else "UTF-16" if start.startswith(_UTF16) else None
    if encoding is None and b"\0" in start[:4]:
        encoding = "UTF-16 or UTF-32"
    return f"the data are {encoding}, not UTF-8; `iconv -t UTF-8` converts them" if encoding else None


def whole_problem_of_lines(start: bytes) -> str | None:
    """As `whole_problem`, also for JSON that is not one object a line."""
    if found := whole_problem(start):
        return found
    start = start.removeprefix(_UTF8_BOM.encode())
    if _ARRAY.match(start):
        return "the data are one JSON array; write one object a line, or import them as a file whose name ends in .json"
    return "the data are JSON over several lines; write each object on one line" if _SPREAD.match(start) else None


BLANK = object()
"""Result of `decode_line` for an empty line."""


def decode_line(line: str | bytes) -> object:
    """The JSON value of one line, or `BLANK`.

    Raises:
        InvalidFeedbackError: not UTF-8, not JSON, or an object with a key given twice. NaN and infinity are left to
            whoever uses the value (`check_json`): most often they stand in a column that nobody needs.
    """
    try:
        text = (line.decode() if isinstance(line, bytes) else line).removeprefix(_UTF8_BOM).strip()
        return json.loads(text, object_pairs_hook=unique_object) if text else BLANK
    except UnicodeDecodeError as error:
        raise InvalidFeedbackError("the line is not UTF-8") from error
    except (ValueError, RecursionError) as error:  # also: an integer with thousands of digits
        raise InvalidFeedbackError(f"the line is not JSON: {error}") from error

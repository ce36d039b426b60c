"""Passages for the log-prob of KV pruning: generated ones, and those of the user's own data."""

import random
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from core.errors import ConfigError, ProfileError
from engine.pruning.reader import PrunedReader, TokenPassage
from engine.pruning.tasks import make_passage

_JOINT = "\n\n"


def generated_passages(
    reader: PrunedReader, count: int, context_tokens: int, continuation_tokens: int, rng: random.Random
) -> Iterator[TokenPassage]:
    """Passages of `engine.pruning.tasks`."""
    for _ in range(count):
        yield reader.passage_ids(*make_passage(context_tokens, continuation_tokens, reader.count_tokens, rng))


def text_passages(
    reader: PrunedReader,
    rows: Iterable[Mapping[str, Any]],
    column: str,
    count: int,
    context_tokens: int,
    continuation_tokens: int,
) -> Iterator[TokenPassage]:
    """Passages of plain text: short rows are joined, long ones cut; no row is used twice.

    Raises:
        ConfigError: a row has no such column, or no text in it.
        ProfileError: there is no passage of that length.
    """
    needed = context_tokens + continuation_tokens

    def passages() -> Iterator[TokenPassage]:
        parts: list[str] = []
        num_tokens = 0
        for text in filter(str.strip, (_cell(row, column) for row in rows)):
            parts.append(text)
            num_tokens += reader.count_tokens(text)
            if num_tokens >= needed:
                ids = reader.passage_ids(_JOINT.join(parts), "")[0][:needed]
                yield ids[:context_tokens], ids[context_tokens:]
                parts, num_tokens = [], 0

    return _some(islice(passages(), count), f"fewer than {needed} tokens in column {column!r}")


def reply_passages(
    reader: PrunedReader,
    rows: Iterable[Mapping[str, Any]],
    prompt_column: str,
    response_column: str,
    count: int,
    max_context_tokens: int,
    max_continuation_tokens: int,
) -> Iterator[TokenPassage]:
    """Prompts (text or messages, through the chat template) and their responses; longer prompts are left out.

    Raises:
        ConfigError: a row lacks a column, or holds neither text nor messages there.
        ProfileError: no prompt fits.
    """

    def passages() -> Iterator[TokenPassage]:
        for row in rows:
            context = reader.prompt_ids(_prompt(row, prompt_column))
            if len(context) <= max_context_tokens:
                yield context, reader.encode(_cell(row, response_column))[:max_continuation_tokens]

    return _some(islice(passages(), count), f"every prompt is longer than {max_context_tokens} tokens")


def _some(passages: Iterator[TokenPassage], problem: str) -> Iterator[TokenPassage]:
    first = next(passages, None)
    if first is None:
        raise ProfileError(f"the data set gives no passage: {problem}")
    yield first
    yield from passages


def _prompt(row: Mapping[str, Any], column: str) -> str | list[dict[str, Any]]:
    value = row.get(column)
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        return value
    return _cell(row, column)


def _cell(row: Mapping[str, Any], column: str) -> str:
    if column not in row:
        raise ConfigError(f"the data set has no column {column!r}; there are {', '.join(map(str, row))}")
    value = row[column]
    if not isinstance(value, str):
        raise ConfigError(f"column {column!r} of the data set holds {type(value).__name__}, not text")
    return value

"""Checks that a decoded JSON value is safe to keep: one iterative walk, before any model looks at it.

Python's `json` lets through what a database, a tokenizer or a recursive encoder chokes on later: NaN, lone
surrogates, integers of any size, nesting of any depth. All of them are refused here, once, with their place. A NUL is
a character like others, which a model can say; the store knows how to write it (`alignment.store.schema`).
"""

import json
import math
import re
from typing import Any

from core.errors import InvalidFeedbackError

MAX_DEPTH = 32
"""The deepest legal record, a tool call inside an OpenAI row, has 7 levels."""
_MAX_INT = 2**63 - 1
_SURROGATE = re.compile("[\ud800-\udfff]")
_NO_NAME = re.compile("[\x00\ud800-\udfff]")


def check_json(value: object) -> None:
    """Refuse anything that is not plain, finite, storable JSON.

    Raises:
        InvalidFeedbackError: `param` is the dotted path of the offending value.
    """
    stack: list[tuple[object, str, int]] = [(value, "", 0)]
    while stack:
        node, path, depth = stack.pop()
        if isinstance(node, dict | list) and depth >= MAX_DEPTH:
            raise InvalidFeedbackError(f"nesting is deeper than {MAX_DEPTH} levels", _shown(path))
        if isinstance(node, dict):
            for key, child in node.items():
                if not isinstance(key, str):
                    raise InvalidFeedbackError("keys of a JSON object must be strings", _shown(path))
                if _SURROGATE.search(key):
                    raise InvalidFeedbackError("a key holds a lone surrogate", _shown(path))
                stack.append((child, f"{path}.{key}" if path else key, depth + 1))
        elif isinstance(node, list):
            stack.extend((child, f"{path}.{index}", depth + 1) for index, child in enumerate(node))
        elif (problem := _problem(node)) is not None:
            raise InvalidFeedbackError(problem, _shown(path))


def unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` that refuses an object with a key given twice: nobody can tell which value was meant."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in made if names.count(name) > 1)
        shown = twice.encode(errors="replace").decode()[:200]
        raise InvalidFeedbackError(f"the key {shown!r} is given twice", shown or None)
    return made


def is_storable(name: str) -> bool:
    """True if any database can hold this name as it is. What could not be stored need not be looked up."""
    return _NO_NAME.search(name) is None


def canonical_json(value: object) -> str:
    """The one text of a JSON value: sorted keys, no spaces. Equal values give equal texts on every machine."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _problem(node: object) -> str | None:
    """Reason not to store this scalar."""
    if isinstance(node, str):
        found = _SURROGATE.search(node)
        return (
            f"the text holds a lone surrogate at character {found.start()}, which is no character"
            if found
            else None
        )
    if isinstance(node, int):
        return "the integer does not fit in 64 bits" if abs(node) > _MAX_INT else None
    if isinstance(node, float):
        return None if math.isfinite(node) else "the number must be finite"
    return None if node is None else f"a value of type {type(node).__name__} is not JSON"


def _shown(path: str) -> str | None:
    """A path short and clean enough for an error answer."""
    return path[:200] or None

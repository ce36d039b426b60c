"""Rows of public preference data sets, turned into rows of our own API (`alignment.records.feedback`), one at a time.

================  =======================================================  ==========================================
format            columns that are taken                                   where the format comes from
================  =======================================================  ==========================================
feedback          every form of `POST /v1/feedback`, all keys ours         `alignment.records.feedback`
trl               prompt, chosen, rejected (text or messages); system      TRL "preference"; Axolotl `*.prompt_pairs`,
                                                                           `*.ultra`; UltraFeedback binarized
implicit_prompt   chosen, rejected: conversations with one beginning       TRL; Axolotl `*.argilla_chat`
openai            input, preferred_output, non_preferred_output            OpenAI DPO fine-tuning
messages          messages, chosen, rejected (a message or its text)       Axolotl `chat_template.default`
question          question | instruction | input, chosen, rejected         Axolotl `*.intel`, `*.icr`, `*.argilla`;
                  (or chosen_response, rejected_response); system          LLaMA-Factory (instruction and input)
transcript        chosen, rejected: "\\n\\nHuman: ...\\n\\nAssistant: ..."    Anthropic HH-RLHF
shp               history, human_ref_A, human_ref_B, labels                Stanford SHP (1: A is preferred)
================  =======================================================  ==========================================

A row whose keys are all ours is passed on as it is, and our API judges it strictly. A row with any other column is of
a data set: the columns of its format are taken, all others (ids, scores, sources) dropped. Texts are not judged here.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from alignment.records.feedback import FEEDBACK_TYPES
from core.errors import InvalidFeedbackError

RowFormat = Literal["feedback", "trl", "implicit_prompt", "openai", "messages", "question", "transcript", "shp"]
Row = Mapping[str, Any]

_ENVELOPE = frozenset({"id", "type", "user", "tags", "weight", "source", "created_at"})
_OPENAI = ("input", "preferred_output", "non_preferred_output")
_PAIR = ("prompt", "chosen", "rejected")
_NOT_TEXT = ("images", "image", "videos", "video", "audio", "audios")
"""Columns that change what an answer is about. The answer alone must not be trained on."""
_TURN = re.compile(r"\n\n(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_MARKERS = ("Human:", "Assistant:")


@dataclass(frozen=True, slots=True)
class ApiRow:
    """One row as our API takes it."""

    item: dict[str, Any]
    format: RowFormat
    dropped: tuple[str, ...] = ()
    """Columns of the data set that were not taken."""


def to_api_row(row: Row, chat: bool = False) -> ApiRow:
    """Find the row's format by its keys and turn it into a row of our API. Null columns count as absent.

    With `chat` a plain-text prompt is taken as a user message, not as text to be continued.

    Raises:
        InvalidFeedbackError: no format fits; the message says why, `param` names the column.
    """
    row = {key: value for key, value in row.items() if value is not None}
    if _is_feedback(row):
        return ApiRow(dict(row), "feedback")
    for column in _NOT_TEXT:
        if row.get(column):
            raise InvalidFeedbackError(f"the row has {column}; only text can be trained on", column)
    kind, item, used = _convert(row)
    if tools := _tools(row):
        item, used = {**item, "tools": tools}, used | {"tools"}
    if row.keys() <= _ENVELOPE | used and "type" not in row and isinstance(row.get("id", ""), str):
        item = {**{key: row[key] for key in row.keys() & _ENVELOPE}, **item}
        used = used | _ENVELOPE
    if chat and all(isinstance(item.get(key), str) for key in _PAIR):
        item["prompt"] = [_message("user", item["prompt"])]
    return ApiRow(item, kind, tuple(sorted(key for key in row if key not in used)))


def _tools(row: Row) -> list[Any] | None:
    """The tools that the prompt offers, in OpenAI's form: data sets also write them as JSON text, or bare functions."""
    tools = row.get("tools")
    try:
        tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools
    except (ValueError, RecursionError) as error:
        raise InvalidFeedbackError("tools is text, and no JSON", "tools") from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InvalidFeedbackError("tools must be a list of objects", "tools")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _is_feedback(row: Row) -> bool:
    """True for one of our forms that no data set has: then every key of it counts."""
    kind = row.get("type")
    if isinstance(kind, str) and kind in FEEDBACK_TYPES:
        return True
    return "chosen_id" in row or "rejected_id" in row or ("response_id" in row and "value" in row)


def _convert(row: Row) -> tuple[RowFormat, dict[str, Any], frozenset[str]]:
    """Find the format; returns it with the item and the columns that it was made of."""
    if "preferred_output" in row or isinstance(row.get("input"), dict):
        return "openai", {key: row[key] for key in _OPENAI if key in row}, frozenset(_OPENAI)
    if "human_ref_A" in row and "human_ref_B" in row:
        return _from_shp(row)
    if "chosen_response" in row and "rejected_response" in row and "chosen" not in row:
        return _from_question(row, "chosen_response", "rejected_response")
    if "chosen" in row and "rejected" in row:
        return _from_chosen_and_rejected(row)
    raise _unknown(row)


def _from_chosen_and_rejected(row: Row) -> tuple[RowFormat, dict[str, Any], frozenset[str]]:
    chosen, rejected = row["chosen"], row["rejected"]
    are_conversations = _is_conversation(chosen) and _is_conversation(rejected)
    if "prompt" in row:
        return _from_prompt(row, are_conversations)
    if "messages" in row and not are_conversations:
        prompt = row["messages"]
        prompt = [_message("user", prompt)] if isinstance(prompt, str) else prompt
        item = {"prompt": prompt, "chosen": _answer(chosen), "rejected": _answer(rejected)}
        return "messages", item, frozenset({"messages", "chosen", "rejected"})
    if _is_transcript(chosen) and _is_transcript(rejected):
        item = {"chosen": _read_transcript(chosen), "rejected": _read_transcript(rejected)}
        return "transcript", item, frozenset(item)
    if are_conversations:
        return "implicit_prompt", {"chosen": chosen, "rejected": rejected}, frozenset({"chosen", "rejected"})
    return _from_question(row, "chosen", "rejected")


def _from_prompt(row: Row, are_conversations: bool) -> tuple[RowFormat, dict[str, Any], frozenset[str]]:
    prompt, chosen, rejected = row["prompt"], _as_list(row["chosen"]), _as_list(row["rejected"])
    system = _text(row, "system") if isinstance(prompt, str) else ""
    used = frozenset({*_PAIR, "system"} if isinstance(prompt, str) else _PAIR)
    if not are_conversations:
        prompt = _with_system(system, prompt) if system else prompt
        return "trl", {"prompt": prompt, "chosen": chosen, "rejected": rejected}, used
    if system:
        chosen, rejected = (_under_system(system, answer) for answer in (chosen, rejected))
    item = {"chosen": chosen, "rejected": rejected}
    if not (isinstance(prompt, str) and _is_turn(prompt, chosen)):
        item["prompt"] = prompt  # our API says what does not fit
    return "trl", item, used


def _from_question(row: Row, chosen: str, rejected: str) -> tuple[RowFormat, dict[str, Any], frozenset[str]]:
    """A question, perhaps under a system message. `instruction` and `input` together are LLaMA-Factory's."""
    names = ("instruction", "input") if "instruction" in row else ("prompt", "question", "input")
    texts = [text for text in (_text(row, name) for name in names) if text]
    if not texts:
        message = "no prompt, messages, question, instruction or input, and chosen is no conversation"
        raise InvalidFeedbackError(message, "prompt")
    question = "\n".join(texts) if "instruction" in row else texts[0]
    prompt = _with_system(_text(row, "system"), question)
    item = {"prompt": prompt, "chosen": _answer(row[chosen]), "rejected": _answer(row[rejected])}
    return "question", item, frozenset({*names, "system", chosen, rejected})


def _from_shp(row: Row) -> tuple[RowFormat, dict[str, Any], frozenset[str]]:
    label = str(row.get("labels"))
    if label not in ("0", "1"):
        raise InvalidFeedbackError("labels must be 1 (A is preferred) or 0 (B is preferred)", "labels")
    better, worse = ("human_ref_A", "human_ref_B") if label == "1" else ("human_ref_B", "human_ref_A")
    history = _text(row, "history")
    if not history:
        raise InvalidFeedbackError("history is required", "history")
    item = {
        "prompt": [_message("user", history)],
        "chosen": _answer(row[better]),
        "rejected": _answer(row[worse]),
    }
    return "shp", item, frozenset({"history", "human_ref_A", "human_ref_B", "labels"})


def _is_transcript(value: object) -> bool:
    return isinstance(value, str) and value.lstrip().startswith(_MARKERS)


def _read_transcript(text: str) -> list[dict[str, str]]:
    _, *pieces = _TURN.split("\n\n" + text.lstrip())
    return [
        _message(_SPEAKERS[speaker], said.strip()) for speaker, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def _is_conversation(value: object) -> bool:
    """True for a list that says more than the one answer."""
    return isinstance(value, list) and len(value) > 1


def _is_turn(text: str, conversation: list[Any]) -> bool:
    """UltraFeedback repeats one turn of the conversation as its prompt: the last, or the first of several."""
    turns = [message.get("content") for message in conversation[:-1] if isinstance(message, dict)]
    return any(isinstance(turn, str) and turn.strip() == text.strip() for turn in turns)


def _under_system(system: str, conversation: list[Any]) -> list[Any]:
    first = conversation[0]
    has_one = isinstance(first, dict) and first.get("role") in ("system", "developer")
    return conversation if has_one else [_message("system", system), *conversation]


def _with_system(system: str, question: str) -> list[dict[str, str]]:
    return [*([_message("system", system)] if system else []), _message("user", question)]


def _answer(value: object) -> Any:
    """An answer as a list of messages. Of a whole conversation it is the last message, as Axolotl takes it."""
    if isinstance(value, str):
        return [_message("assistant", value)]
    return value[-1:] if isinstance(value, list) else _as_list(value)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, dict) else value


def _text(row: Row, column: str) -> str:
    """A column that must hold text if it is there."""
    value = row.get(column, "")
    if not isinstance(value, str):
        raise InvalidFeedbackError(f"{column} must be text", column)
    return value if value.strip() else ""


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _unknown(row: Row) -> InvalidFeedbackError:
    """The reason why no format fits, for the data that people try most."""
    if "completion" in row or "completions" in row:
        what = "a rated answer (KTO)" if "label" in row or "labels" in row else "a single answer"
        message = f"{what} is not a preference: a row needs a chosen and a rejected answer to the same prompt"
        return InvalidFeedbackError(message, "completion" if "completion" in row else "completions")
    if any(key.endswith(".responses") for key in row):
        message = (
            "Argilla records name their questions and fields freely; write prompt, chosen and rejected of them"
        )
        return InvalidFeedbackError(message)
    missing = [key for key in ("chosen", "rejected") if key not in row]
    if len(missing) == 1:
        return InvalidFeedbackError(f"{missing[0]} is required", missing[0])
    columns = ", ".join(sorted(ascii(key)[:40] for key in row)[:12]) or "none"
    message = f"no known format: a preference needs a chosen and a rejected answer; the columns are {columns}"
    return InvalidFeedbackError(message[:500])

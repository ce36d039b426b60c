"""Rows of public preference data sets, turned into rows of our own API (`alignment.records.feedback`), one at a time.

================  =======================================================  ==========================================
format            columns that are taken                                   where the format comes from
================  =======================================================  ==========================================
feedback          every form of `POST /v1/feedback`, all keys ours         `alignment.records.feedback`
trl               prompt, chosen, rejected (text or messages)              TRL "preference"; Axolotl `*.prompt_pairs`,
                                                                           `*.ultra`; UltraFeedback binarized
implicit_prompt   chosen, rejected: conversations with one beginning       TRL; Axolotl `*.argilla_chat`
openai            input, preferred_output, non_preferred_output            OpenAI DPO fine-tuning
messages          messages, chosen, rejected (a message or its text)       Axolotl `chat_template.default`
question          question | instruction | input, chosen, rejected         Axolotl `*.intel`, `*.icr`, `*.argilla`;
                  (or chosen_response, rejected_response)                  LLaMA-Factory (instruction and input)
transcript        chosen, rejected: "\\n\\nHuman: ...\\n\\nAssistant: ...",   Anthropic HH-RLHF; full-hh-rlhf (prompt)
                  or prompt: "\\n\\nHuman: ...\\n\\nAssistant:"
shp               history, human_ref_A, human_ref_B, labels                Stanford SHP
================  =======================================================  ==========================================

`system` (text) and LLaMA-Factory's `history` (pairs of question and answer) go before the prompt in `trl`,
`implicit_prompt`, `messages`, `question` and `transcript`.

A row whose keys are all ours is passed on as it is, and our API judges it strictly. A row with any other column is of
a data set: the columns of its format are taken, others (ids, scores, sources) dropped. A column that would change what
was asked (`_CONTEXT`) is never dropped: the row is refused, unless the pair says the same already. Texts are not judged
here, but a text that only spells something else (messages as JSON, a transcript, a rendered template) is refused or
read; `"type": "preference"` says that it is meant literally.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from alignment.records.feedback import FEEDBACK_TYPES
from alignment.records.json_checks import check_json, unique_object
from core.errors import InvalidFeedbackError

RowFormat = Literal["feedback", "trl", "implicit_prompt", "openai", "messages", "question", "transcript", "shp"]
Row = Mapping[str, Any]

_ENVELOPE = frozenset({"id", "type", "user", "tags", "weight", "source", "created_at"})
_OPENAI = ("input", "preferred_output", "non_preferred_output")
_PAIR = ("prompt", "chosen", "rejected")
_ANSWERS = ("chosen", "rejected")
_ROLES = ("user", "assistant")
_NOT_TEXT = ("images", "image", "videos", "video", "audio", "audios", "functions")
"""Columns that change what an answer is about. The answer alone must not be trained on."""
_CONTEXT = frozenset(
    {
        *("system", "systemprompt", "systemmessage", "systeminstruction", "developer", "persona", "scenario"),
        *("prompt", "instruction", "input", "question", "query", "message"),
        *("context", "document", "passage", "evidence", "background", "knowledge", "attachment", "file"),
        *("history", "chathistory", "dialoghistory", "dialoguehistory", "conversationhistory"),
        *("conversation", "dialog", "dialogue", "turn", "previousturn", "priorturn", "earlierturn"),
        *("toolcall", "toolchoice", "responseformat"),
    }
)
"""Names, in lower case without separators and a plural s, of columns that belong to what was asked."""
_OTHER_ANSWERS = frozenset(
    {"chosenresponse", "rejectedresponse", "humanrefa", "humanrefb", "preferredoutput", "nonpreferredoutput"}
)
"""Names of the same kind for the answers of a second pair in the row."""
_NAME_PARTS = re.compile(r"[^a-z]")
_EXPORTS = {
    ("snapshot", "meta"): "a vote as Open WebUI exports it",
    ("messageId", "isCreatedByUser"): "a message as LibreChat exports it",
    ("annotations", "data"): "a task as Label Studio exports it",
}
_LABELS = frozenset({"role", "from", "type", "name", "id"})
"""Keys of a message that are not said."""
_END_CHARS = 200
"""The mark at the end of a prompt, with white space, is shorter."""
_MIN_PART_CHARS = 8
"""A shorter text may stand in a prompt by accident."""

_TURN = re.compile(r"(?:\r?\n){2}(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_MARKERS = ("Human:", "Assistant:")
_LITERAL = '; if the text is meant as it stands, give the row the key "type": "preference"'
_SPELT = re.compile(r"(?:\[\s*)?\{\s*(['\"])(?:role|content|from|value|messages|conversations)\1\s*:")
_USER_MARK = re.compile(
    r"^[^\w\n]*(?:human|user|prompter|instruction|customer|client)[^\w\n]*(?::|$)", re.IGNORECASE | re.MULTILINE
)
_ASSISTANT_END = re.compile(r"\b(?:assistant|chatbot|bot|ai|gpt|model|response)[^\w\n]*:\s*\Z", re.IGNORECASE)
_TEMPLATE_END = re.compile(
    r"(?:<\|im_start\|>\s*assistant|<\|assistant\|>|\[/INST\]|<start_of_turn>\s*model|<\|end_header_id\|>"
    r"|<\W?Assistant\W?>)(?:\s*<think>)?\s*\Z"
)


@dataclass(frozen=True, slots=True)
class ApiRow:
    """One row as our API takes it."""

    item: dict[str, Any]
    format: RowFormat
    dropped: tuple[str, ...] = ()
    """Columns of the data set that were not taken."""


def to_api_row(row: Row, chat: bool = False) -> ApiRow:
    """Find the row's format by its keys and turn it into a row of our API. Columns of null or NaN count as absent.

    With `chat` a plain-text prompt is taken as a user message, not as text to be continued.

    Raises:
        InvalidFeedbackError: no format fits; the message says why, `param` names the column.
    """
    row = {key: value for key, value in row.items() if value is not None and value == value}  # NaN is not itself
    if isinstance(moment := row.get("created_at"), datetime):
        row["created_at"] = moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()
    _refuse_exports(row)
    if _is_feedback(row):
        return ApiRow(dict(row), "feedback")
    for column in _NOT_TEXT:
        if not _is_blank(row.get(column)):
            raise InvalidFeedbackError(f"the row has {column}; only text can be trained on", column)
    kind, item, used = _convert(row)
    if tools := _tools(row):
        item, used = {**item, "tools": tools}, used | {"tools"}
    used |= {"weight"}  # it says how much the pair counts, whatever else the row holds
    if row.keys() <= _ENVELOPE | used and "type" not in row:
        ours = row.keys() & _ENVELOPE - ({"id"} if not isinstance(row.get("id"), str) else set())
    else:
        ours = row.keys() & {"weight"}
    used |= ours
    item = {**{key: row[key] for key in ours}, **item}
    if chat and all(isinstance(item.get(key), str) for key in _PAIR):
        item["prompt"] = [_message("user", item["prompt"])]
    dropped = tuple(sorted(key for key in row if key not in used))
    for column in dropped:
        _refuse_loss(column, row[column], item)
    check_json(item)
    return ApiRow(item, kind, dropped)


def is_literal(row: Row) -> bool:
    """Would the row be taken as it stands, and no text in it for something that it spells?"""
    try:
        return to_api_row(row).item == row
    except InvalidFeedbackError:
        return False


def _tools(row: Row) -> list[Any] | None:
    """The tools that the prompt offers, in OpenAI's form: data sets also write them as JSON text, or bare functions."""
    tools = row.get("tools")
    try:
        tools = (
            json.loads(tools, object_pairs_hook=unique_object)
            if isinstance(tools, str) and tools.strip()
            else tools
        )
    except (ValueError, RecursionError) as error:
        raise InvalidFeedbackError("tools is text, and no JSON", "tools") from error
    if _is_blank(tools):
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


def _convert(row: dict[str, Any]) -> tuple[RowFormat, dict[str, Any], set[str]]:
    """Find the format; returns it with the item and the columns that it was made of."""
    if "preferred_output" in row or isinstance(row.get("input"), dict):
        return "openai", {key: row[key] for key in _OPENAI if key in row}, set(_OPENAI)
    if "human_ref_A" in row and "human_ref_B" in row:
        return _from_shp(row)
    names = ("chosen_response", "rejected_response")
    if all(name in row for name in names) and "chosen" not in row:
        used, row = {*names}, {**row, "chosen": row[names[0]], "rejected": row[names[1]]}
    elif all(name in row for name in _ANSWERS):
        used = {*_ANSWERS}
    else:
        raise _unknown(row)
    chosen, rejected = (_answer(row, name) for name in _ANSWERS)
    is_transcript = isinstance(chosen, list) and isinstance(row["chosen"], str)
    kind, prompt, asked = _prompt(row, chosen, rejected)
    if kind == "transcript":  # the space behind `Assistant:`
        chosen, rejected = (_without_margin(one) if isinstance(one, str) else one for one in (chosen, rejected))
    if not isinstance(prompt, str):
        chosen, rejected = (
            [_message("assistant", one)] if isinstance(one, str) else one for one in (chosen, rejected)
        )
    item = {} if prompt is None else {"prompt": prompt}
    item |= {"chosen": chosen, "rejected": rejected}
    used |= asked | _put_before(row, item)
    return "transcript" if is_transcript else kind, item, used


def _answer(row: Row, column: str) -> Any:
    """An answer: text, a list of messages, or the conversation that a transcript stands for."""
    value = row[column]
    if isinstance(value, str):
        _refuse_spelling(value, column)
        other = row[_ANSWERS[column == "chosen"]]
        return _read_transcript(value) if _is_transcript(value) and _is_transcript(other) else value
    if isinstance(value, dict):
        value = [value]
    _check_messages(value, column)
    return value


def _prompt(row: Row, chosen: Any, rejected: Any) -> tuple[RowFormat, Any, set[str]]:
    """The format by the columns that ask, the prompt, and these columns. It is None where the answers begin with it."""
    are_conversations = _is_conversation(chosen) and _is_conversation(rejected)
    for column in ("prompt", "messages"):
        asked = row.get(column)
        if asked is None or (column == "messages" and are_conversations):
            continue
        if not isinstance(asked, str):
            asked = [asked] if isinstance(asked, dict) else asked
            _check_messages(asked, column)
        elif _is_transcript(asked):
            return "transcript", _question_of(asked), {column}
        elif are_conversations and _is_turn(asked, chosen):
            return "trl", None, {column}
        else:
            _refuse_spelling(asked, column)
            asked = [_message("user", asked)] if column == "messages" else asked
        return "trl" if column == "prompt" else "messages", asked, {column}
    if are_conversations:
        return "implicit_prompt", None, set()
    names = ["instruction", "input"] if "instruction" in row else ["question", "input"]
    texts = {name: text for name in names if (text := _text(row, name))}
    if not texts:
        message = "no prompt, messages, question, instruction or input, and chosen is no conversation"
        raise InvalidFeedbackError(message, "prompt")
    if "instruction" not in row:
        texts = dict([next(iter(texts.items()))])
    for name, text in texts.items():
        _refuse_spelling(text, name)
    return "question", [_message("user", "\n".join(texts.values()))], set(texts)


def _put_before(row: Row, item: dict[str, Any]) -> set[str]:
    """Put the system text and earlier turns of the row before its prompt; returns the columns that were used."""
    before: list[dict[str, str]] = []
    if system := _text(row, "system"):
        _refuse_spelling(system, "system")
        before.append(_message("system", system))
    history = row.get("history")
    exchanges = [turn for turn in history if _is_exchange(turn)] if isinstance(history, list) else []
    is_used = isinstance(history, list) and len(exchanges) == len(history)
    if is_used and not set(_said(history)) <= set(_asked(item)):
        before += [
            _message(role, said)
            for turn in exchanges
            if any(turn)
            for role, said in zip(_ROLES, turn, strict=True)
        ]
    prompt = item.get("prompt")
    if before and isinstance(prompt, str):
        item["prompt"] = [*before, _message("user", prompt)]
    elif before and prompt is not None:
        item["prompt"] = _under(before, prompt, "prompt")
    for key in _ANSWERS if before else ():
        if _is_conversation(item[key]):
            item[key] = _under(before, item[key], key)
    return {"system", "history"} if is_used else {"system"}


def _under(before: list[dict[str, str]], conversation: list[Any], column: str) -> list[Any]:
    """`conversation` behind `before`, unless it begins with the same system message already."""
    system, turns = (before[:1], before[1:]) if before[0]["role"] == "system" else ([], before)
    first = conversation[0] if conversation else {}
    if first.get("role") not in ("system", "developer"):
        return [*before, *conversation]
    if system and str(first.get("content")).strip() != system[0]["content"].strip():
        raise InvalidFeedbackError(f"system says something else than the system message of {column}", "system")
    return [first, *turns, *conversation[1:]]


def _from_shp(row: Row) -> tuple[RowFormat, dict[str, Any], set[str]]:
    label = row.get("labels")
    label = int(label) if isinstance(label, float) and label in (0, 1) else label
    if str(label) not in ("0", "1"):
        raise InvalidFeedbackError("labels must be 1 (A is preferred) or 0 (B is preferred)", "labels")
    better, worse = ("human_ref_A", "human_ref_B") if str(label) == "1" else ("human_ref_B", "human_ref_A")
    history = _text(row, "history")
    if not history:
        raise InvalidFeedbackError("history is required", "history")
    answers = [[_message("assistant", _text(row, name))] for name in (better, worse)]
    item = {"prompt": [_message("user", history)], "chosen": answers[0], "rejected": answers[1]}
    return "shp", item, {"history", "human_ref_A", "human_ref_B", "labels"}


def _is_transcript(value: object) -> bool:
    return isinstance(value, str) and value.lstrip().startswith(_MARKERS)


def _read_transcript(text: str) -> list[dict[str, str]]:
    _, *pieces = _TURN.split("\n\n" + text.lstrip())
    return [
        _message(_SPEAKERS[speaker], _without_margin(said))
        for speaker, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def _without_margin(said: str) -> str:
    """A turn without what separates it from its marks: one space or blank lines before it, white space behind it."""
    said = said.rstrip()
    margin = said[: len(said) - len(said.lstrip())]
    return said[margin.rfind("\n") + 1 or margin.startswith(" ") :]


def _question_of(transcript: str) -> list[dict[str, str]]:
    """The messages of a transcript that ends where the answer begins."""
    turns = _read_transcript(transcript)
    return turns[:-1] if turns[-1] == _message("assistant", "") and len(turns) > 1 else turns


def _is_conversation(value: object) -> bool:
    """True for a list that says more than the one answer."""
    return isinstance(value, list) and len(value) > 1


def _is_exchange(turn: object) -> bool:
    return isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(said, str) for said in turn)


def _is_turn(text: str, conversation: list[Any]) -> bool:
    """UltraFeedback repeats one turn of the conversation as its prompt: the last, or the first of several."""
    return any(text.strip() == said.strip() for turn in conversation[:-1] for said in _said(turn))


def _text(row: Row, column: str) -> str:
    """A column that must hold text if it is there."""
    value = row.get(column, "")
    if not isinstance(value, str):
        raise InvalidFeedbackError(f"{column} must be text", column)
    return value if value.strip() else ""


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _check_messages(value: object, column: str) -> None:
    """Refuse what is neither text nor messages in words that lead on; our API judges the rest."""
    must = f"{column} must be text, or messages with role and content"
    if not isinstance(value, list):
        raise InvalidFeedbackError(f"{must}, not {type(value).__name__}", column)
    for one in value:
        if not isinstance(one, dict):
            raise InvalidFeedbackError(f"{must}, not a list of {type(one).__name__}", column)
        if "role" not in one:
            keys = ", ".join(sorted(ascii(key)[:40] for key in one)[:8]) or "no keys"
            if one.keys() >= {"from", "value"}:
                raise InvalidFeedbackError(f"{must}; from and value are ShareGPT's, which is not taken", column)
            raise InvalidFeedbackError(f"{must}, not an object of {keys}", column)


def _refuse_spelling(text: str, column: str) -> None:
    """Refuse a text that would be trained on literally although it stands for something else."""
    if _SPELT.match(text.lstrip()) and text.rstrip().endswith(("}", "]")):
        raise InvalidFeedbackError(
            f"{column} is text that spells messages; write the messages themselves{_LITERAL}", column
        )
    if column in _ANSWERS:
        return
    end = text[-_END_CHARS:]
    if _TEMPLATE_END.search(end):
        reason = f"{column} is rendered with a chat template already; write its messages"
    elif _ASSISTANT_END.search(end) and _USER_MARK.search(text):
        reason = f"{column} is a transcript with marks of speakers; write its turns as messages"
    else:
        return
    raise InvalidFeedbackError(f"{reason}{_LITERAL}", column)


def _refuse_loss(column: str, value: object, item: dict[str, Any]) -> None:
    """Refuse the row if this column, which is not taken, says something about what was asked that the pair does not."""
    name = _NAME_PARTS.sub("", column.lower()).rstrip("s")
    if name not in _CONTEXT | _OTHER_ANSWERS:
        return
    known = [said.strip() for said in _asked(item)]
    if name in _OTHER_ANSWERS or not isinstance(value, str):  # a copy of the whole conversation holds answers
        known += [said.strip() for said in _said([item.get(key) for key in (*_ANSWERS, *_OPENAI)])]
    for text in map(str.strip, _said(value)):
        is_part = len(text) >= _MIN_PART_CHARS and any(text in said for said in known)
        if text and not is_part and text not in known:
            shown = column.encode(errors="replace").decode()[:200]
            remedy = "write it into prompt, or leave the column out"
            message = f"{shown} changes what the pair means and would be lost; {remedy}"
            raise InvalidFeedbackError(message, shown)


def _asked(item: dict[str, Any]) -> Iterator[str]:
    """All texts that stand before the answers."""
    yield from _said([item.get("prompt"), item.get("input")])
    for answer in (item.get(key) for key in _ANSWERS):
        if isinstance(answer, list):
            yield from _said(answer[:-1])


def _said(value: object) -> Iterator[str]:
    """All texts in a value, but for labels such as roles."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, child in value.items():
            if key not in _LABELS:
                yield from _said(child)
    elif isinstance(value, list | tuple):
        for child in value:
            yield from _said(child)


def _is_blank(value: object) -> bool:
    """Nothing, also if it is written as JSON text or as a struct of nulls."""
    if isinstance(value, dict):
        return all(_is_blank(child) for child in value.values())
    if isinstance(value, list | tuple):
        return all(_is_blank(child) for child in value)
    return (
        value is None or value is False or (isinstance(value, str) and value.strip() in ("", "[]", "{}", "null"))
    )


def _refuse_exports(row: Row) -> None:
    """Refuse exports of other tools by their name, unless they hold a pair. They hold answers and votes."""
    is_pair = all(name in row for name in _ANSWERS)
    if "conversations" in row and not (is_pair and "prompt" in row):
        what = "are not taken" if is_pair else "hold a single or rated answer, which is not a preference"
        remedy = "write prompt, chosen and rejected as messages with role and content"
        message = f"conversations of from and value are ShareGPT's and {what}; {remedy}"
        raise InvalidFeedbackError(message, "conversations")
    if is_pair:
        return
    for keys, what in _EXPORTS.items():
        if all(key in row for key in keys):
            message = f"this is {what}, which is not taken; write prompt, chosen and rejected of it"
            raise InvalidFeedbackError(message, keys[0])
    if _is_argilla(row):
        message = (
            "Argilla records name their questions and fields freely; write prompt, chosen and rejected of them"
        )
        raise InvalidFeedbackError(message)


def _is_argilla(row: Row) -> bool:
    if any(isinstance(key, str) and key.endswith(".responses") for key in row) or row.keys() >= {
        "fields",
        "responses",
    }:
        return True
    votes = [
        value[0] for value in row.values() if isinstance(value, list) and value and isinstance(value[0], dict)
    ]
    return any(vote.keys() >= {"user_id", "value", "status"} for vote in votes)


def _unknown(row: Row) -> InvalidFeedbackError:
    """The reason why no format fits, for the data that people try most."""
    if "completion" in row or "completions" in row:
        what = "a rated answer (KTO)" if "label" in row or "labels" in row else "a single answer"
        message = f"{what} is not a preference: a row needs a chosen and a rejected answer to the same prompt"
        return InvalidFeedbackError(message, "completion" if "completion" in row else "completions")
    missing = [key for key in _ANSWERS if key not in row]
    if len(missing) == 1:
        return InvalidFeedbackError(f"{missing[0]} is required", missing[0])
    columns = ", ".join(sorted(ascii(key)[:40] for key in row)[:12]) or "none"
    message = f"no known format: a preference needs a chosen and a rejected answer; the columns are {columns}"
    return InvalidFeedbackError(message[:500])

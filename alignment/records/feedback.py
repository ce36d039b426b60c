"""Wire models of one feedback item, and `parse_item`, which picks the right one by its keys.

================  ====================================================  ==========================================
form              keys                                                  becomes
================  ====================================================  ==========================================
two responses     chosen_id, rejected_id (+ ..._choice_index or id#1)   a pair, texts from the response store
TRL row           prompt, chosen, rejected (text or messages)           a pair
implicit prompt   chosen, rejected (messages that share a beginning)    a pair
OpenAI DPO row    input, preferred_output, non_preferred_output         a pair
rating            response_id, value (true/false, 1/-1, up/down)        a pair once an opposite rating of it exists
correction        type, response_id, value (the better text)            a pair: the edit over the original
comment           type, value, response_id?                             kept, never trained on
================  ====================================================  ==========================================

`type` may be left out where the keys tell the form; a text `value` needs it (correction or comment?).
"""

import difflib
import re
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AliasChoices, Field, ValidationError, field_validator

from alignment.records.chat import Messages, ShortText, TextOrMessages, Tools, WireModel
from alignment.records.json_checks import check_json
from core.errors import InvalidFeedbackError

MAX_WEIGHT = 10.0
"""One item may count at most ten times as much as another, so that no single client owns the gradient."""
_CHOICE_SUFFIX = re.compile(r"^(.+)#(\d{1,4})$", re.DOTALL)
_RATING_WORDS = {"up": 1, "down": -1}
_TIMES_S = (0.0, 4_102_444_800.0)
"""Unix seconds of 1970 and of 2100."""

ChoiceIndex = Annotated[int, Field(ge=0, le=9999)]


class ResponseRef(NamedTuple):
    """One choice of one of our responses."""

    response_id: str
    choice_index: int


class _Item(WireModel):
    """Keys that every form may carry."""

    id: ShortText | None = None
    """Chosen by the client; the same id twice is one record."""
    user: ShortText | None = None
    tags: Annotated[dict[ShortText, Annotated[str, Field(max_length=1000)]], Field(max_length=32)] = Field(
        default_factory=dict
    )
    weight: Annotated[float, Field(gt=0, le=MAX_WEIGHT)] = 1.0
    source: ShortText | None = None
    created_at: float | None = None
    """Unix seconds. The client's word; ordering and windows use the time of receipt."""

    @property
    def refs(self) -> list[ResponseRef]:
        """Responses of ours that the item names; the better one of a preference first."""
        return []

    @field_validator("created_at", mode="before")
    @classmethod
    def _read_time(cls, value: object) -> object:
        seconds = value
        if isinstance(value, str):
            try:
                moment = datetime.fromisoformat(value)
                seconds = moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()
            except (ValueError, OverflowError) as error:
                raise ValueError("must be Unix seconds or an ISO 8601 time") from error
        if isinstance(seconds, int | float) and not _TIMES_S[0] <= seconds < _TIMES_S[1]:
            hint = ", not milliseconds or nanoseconds" if seconds > 0 else ""
            raise ValueError(f"must be a time from 1970 to 2099, in Unix seconds{hint}")
        return seconds


class _AboutResponse(_Item):
    response_id: ShortText | None = None
    choice_index: ChoiceIndex | None = None

    @property
    def refs(self) -> list[ResponseRef]:
        return [_reference(self.response_id, self.choice_index, "choice_index")] if self.response_id else []


class PreferenceByIds(_Item):
    """One of our responses is better than another of our responses to the same prompt."""

    type: Literal["preference"] = "preference"
    chosen_id: ShortText
    rejected_id: ShortText
    chosen_choice_index: ChoiceIndex | None = Field(
        None, validation_alias=AliasChoices("chosen_choice_index", "chosen_index")
    )
    rejected_choice_index: ChoiceIndex | None = Field(
        None, validation_alias=AliasChoices("rejected_choice_index", "rejected_index")
    )

    @property
    def refs(self) -> list[ResponseRef]:  # noqa: D102
        return [
            _reference(self.chosen_id, self.chosen_choice_index, "chosen_choice_index"),
            _reference(self.rejected_id, self.rejected_choice_index, "rejected_choice_index"),
        ]


class PreferenceRow(_Item):
    """A TRL preference row; without `prompt`, the common beginning of both conversations is the prompt."""

    type: Literal["preference"] = "preference"
    prompt: TextOrMessages | None = None
    chosen: TextOrMessages
    rejected: TextOrMessages
    tools: Tools | None = None


class OpenAIInput(WireModel):
    """The `input` of an OpenAI DPO row."""

    messages: Messages
    tools: Tools | None = None
    parallel_tool_calls: bool | None = None


class OpenAIPreferenceRow(_Item):
    """A row of an OpenAI DPO file."""

    type: Literal["preference"] = "preference"
    input: OpenAIInput
    preferred_output: Messages
    non_preferred_output: Messages


class Rating(_AboutResponse):
    """A thumb up (`value` 1) or down (-1)."""

    type: Literal["rating"] = "rating"
    response_id: ShortText
    value: Literal[1, -1]

    @field_validator("value", mode="before")
    @classmethod
    def _read_value(cls, value: object) -> int:
        if isinstance(value, bool):
            return 1 if value else -1
        if isinstance(value, str) and value in _RATING_WORDS:
            return _RATING_WORDS[value]
        if isinstance(value, int | float) and value in (1, -1):  # 0 could mean down or neutral
            return int(value)
        raise ValueError("must be true or false, 1 or -1, 'up' or 'down'")


class Correction(_AboutResponse):
    """A better text for a response."""

    type: Literal["correction"] = "correction"
    response_id: ShortText
    value: TextOrMessages


class Comment(_AboutResponse):
    """Words about a response, or about nothing in particular."""

    type: Literal["comment"] = "comment"
    value: str


FeedbackItem = PreferenceByIds | PreferenceRow | OpenAIPreferenceRow | Rating | Correction | Comment
_FORMS: dict[str, type[_Item]] = {"rating": Rating, "correction": Correction, "comment": Comment}
FEEDBACK_TYPES = ("preference", *_FORMS)


def parse_item(raw: object) -> FeedbackItem:
    """Turn one decoded JSON value into its wire model. Texts are not judged here; `alignment.records.pairs` does that.

    Raises:
        InvalidFeedbackError: not an object, unknown form, unknown key, wrong type or out of range. `param` is the
            dotted path of the key.
    """
    if not isinstance(raw, dict):
        raise InvalidFeedbackError(f"a feedback item must be a JSON object, not {_json_type(raw)}")
    check_json(raw)
    model = _find_form(raw)
    try:
        return model.model_validate(raw)  # type: ignore[return-value]  # every value of _FORMS is in the union
    except ValidationError as error:
        raise _named(error, model) from error


def _find_form(raw: dict[str, Any]) -> type[_Item]:
    kind = raw.get("type")
    if kind is not None and kind not in FEEDBACK_TYPES:
        raise InvalidFeedbackError(f"type must be one of {', '.join(FEEDBACK_TYPES)}", "type")
    if kind in _FORMS:
        return _FORMS[kind]
    if raw.keys() & {"input", "preferred_output", "non_preferred_output"}:
        return OpenAIPreferenceRow
    if raw.keys() & {"chosen_id", "rejected_id"}:
        return PreferenceByIds
    if kind == "preference" or raw.keys() & {"prompt", "chosen", "rejected"}:
        return PreferenceRow
    return _find_value_form(raw)


def _find_value_form(raw: dict[str, Any]) -> type[_Item]:
    value = raw.get("value")
    if "response_id" in raw and "value" in raw:
        if isinstance(value, list):
            return Correction
        if not isinstance(value, str) or value in _RATING_WORDS:
            return Rating
    if spelling := next((key for key in ("score", "rating", "thumb", "feedback") if key in raw), None):
        message = f"a rating is response_id and value (true or false, 1 or -1, 'up' or 'down'), not {spelling}"
        raise InvalidFeedbackError(message, spelling)
    raise InvalidFeedbackError(
        "cannot tell what kind of feedback this is: send `type` (preference, rating, correction or comment), or "
        "chosen_id and rejected_id, or prompt, chosen and rejected",
        "type",
    )


def _reference(response_id: str, choice_index: int | None, param: str) -> ResponseRef:
    """`id#2` and `choice_index: 2` mean the same; both may be given if they agree."""
    suffixed = _CHOICE_SUFFIX.match(response_id)
    if suffixed is None:
        return ResponseRef(response_id, choice_index or 0)
    if choice_index not in (None, int(suffixed[2])):
        raise InvalidFeedbackError(f"{param} {choice_index} contradicts the id ending in #{suffixed[2]}", param)
    return ResponseRef(suffixed[1], int(suffixed[2]))


def _named(error: ValidationError, model: type[_Item]) -> InvalidFeedbackError:
    """Say pydantic's first error in the words of our API."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = [str(part) for part in first["loc"] if not str(part).startswith("<")]
    param = ".".join(path)[:200] or None
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(path[-1][:64], model.model_fields, n=1) if len(path) == 1 else []
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return InvalidFeedbackError(f"unknown key {path[-1][:64]!r}{hint}", param)
    if first["type"] == "missing":
        return InvalidFeedbackError(f"{param} is required", param)
    return InvalidFeedbackError(f"{param}: {first['msg'].removeprefix('Value error, ')}", param)


def _json_type(value: object) -> str:
    names = {
        str: "text",
        list: "a list",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)

"""Chat messages as wire models, and their text. Only text and tool calls can be trained on."""

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from alignment.records.json_checks import canonical_json, is_storable
from core.wire import Prompt

MAX_NAME_CHARS = 200
"""Longest id, user, source or tag name."""


def _name(text: str) -> str:
    if not is_storable(text):
        raise ValueError("a name must not hold a NUL character")
    return text


ShortText = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS), AfterValidator(_name)]


class WireModel(BaseModel):
    """Frozen, strict, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TextPart(WireModel):
    """`{"type": "text", "text": ...}`; images and audio cannot be trained on."""

    type: Literal["text"]
    text: str


class FunctionCall(WireModel):
    """The call inside a tool call: `arguments` is an object, as JSON text (OpenAI) or as it is (Hugging Face)."""

    name: ShortText
    arguments: str = "{}"

    @field_validator("arguments", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value


class ToolCall(WireModel):
    """A tool call of an assistant message."""

    id: ShortText | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ToolFunction(WireModel):
    """What the model is told of a tool. Further keys are the template's affair."""

    model_config = ConfigDict(extra="allow")

    name: ShortText
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(WireModel):
    """A tool that the prompt offers."""

    type: Literal["function"] = "function"
    function: ToolFunction


Tools = Annotated[list[Tool], Field(max_length=1000)]


class Message(WireModel):
    """One chat message."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[list[TextPart], Tag("<parts>")] | Annotated[None, Tag("<none>")],
        Discriminator(lambda v: "<none>" if v is None else "<parts>" if isinstance(v, list) else "<text>"),
    ] = None
    name: ShortText | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: ShortText | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, value: object) -> object:
        """Servers, ours too, return messages with every key that exists: null and empty ones say nothing."""
        if not isinstance(value, dict):
            return value
        return {
            key: one for key, one in value.items() if key in ("role", "content") or one not in (None, "", [], {})
        }


Messages = Annotated[list[Message], Field(min_length=1, max_length=1000)]
TextOrMessages = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[Messages, Tag("<messages>")],
    Discriminator(lambda v: "<messages>" if isinstance(v, list) else "<text>"),
]


def text_of(content: object) -> str:
    """The text of a message content: text itself, text parts as lines (as vLLM joins them), or nothing."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return ""


def plain_prompt(prompt: Prompt) -> Prompt:
    """`prompt` as it would be imported: text parts joined, and of its messages what templates are given."""
    if isinstance(prompt, str):
        return prompt
    kept = [{key: message[key] for key in Message.model_fields if message.get(key)} for message in prompt]
    return [{**message, "content": text_of(message.get("content"))} for message in kept]


def whole_text(prompt: Prompt, tools: list[dict[str, Any]] | None = None) -> str:
    """All contents, and tools and their calls as JSON, one after the other: what a length limit has to count."""
    texts = [canonical_json(tools)] if tools else []
    for message in [{"content": prompt}] if isinstance(prompt, str) else prompt:
        texts.append(text_of(message.get("content")))
        if message.get("tool_calls"):
            texts.append(canonical_json(message["tool_calls"]))
    return "".join(texts)


def answer_text(text: str, calls: list[dict[str, Any]] | None) -> str:
    """An answer as one text, in which equal calls are equal whatever their ids: for keys and comparisons."""
    return text + canonical_json([call["function"] for call in calls]) if calls else text

"""Chat messages as wire models, and their text. Only text can be trained on, with tool calls inside a prompt."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from alignment.records.json_checks import canonical_json
from core.wire import Prompt

MAX_NAME_CHARS = 200
"""Longest id, user, source or tag name."""
ShortText = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]


class WireModel(BaseModel):
    """Frozen, strict, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TextPart(WireModel):
    """`{"type": "text", "text": ...}`; images and audio cannot be trained on."""

    type: Literal["text"]
    text: str


class FunctionCall(WireModel):
    """The call inside a tool call; `arguments` is JSON as text, as OpenAI sends it."""

    name: ShortText
    arguments: str


class ToolCall(WireModel):
    """A tool call that an assistant message of the prompt made."""

    id: ShortText
    type: Literal["function"] = "function"
    function: FunctionCall


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


Messages = Annotated[list[Message], Field(min_length=1, max_length=1000)]
TextOrMessages = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[Messages, Tag("<messages>")],
    Discriminator(lambda v: "<messages>" if isinstance(v, list) else "<text>"),
]


def text_of(content: object) -> str:
    """The text of a message content: text itself, text parts joined, or nothing."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return ""


def plain_prompt(prompt: Prompt) -> Prompt:
    """`prompt` with text parts joined: chat templates differ in how they treat parts and nulls."""
    if isinstance(prompt, str):
        return prompt
    return [{**message, "content": text_of(message.get("content"))} for message in prompt]


def whole_text(prompt: Prompt) -> str:
    """All contents, and tool calls as JSON, one after the other: what a length limit has to count."""
    if isinstance(prompt, str):
        return prompt
    texts = []
    for message in prompt:
        texts.append(text_of(message.get("content")))
        if message.get("tool_calls"):
            texts.append(canonical_json(message["tool_calls"]))
    return "".join(texts)

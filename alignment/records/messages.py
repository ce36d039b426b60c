"""Wire models of chat messages, as far as they can be trained on: text, and tool calls inside a prompt."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

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

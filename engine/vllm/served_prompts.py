"""What vLLM's server makes of a request before the chat template, so that answers are stored with what was served."""

from typing import Any

Chat = tuple[list[dict[str, Any]], list[dict[str, Any]] | None]
"""Messages and tools."""


class ServedPrompts:
    """Reads bodies that vLLM has answered; `app` is its application."""

    def __init__(self, app: Any) -> None:
        self._state = app.state
        self._separator: str | None = None

    def chat(self, body: dict[str, Any]) -> Chat:
        """Messages and tools of a chat body as the template got them, but for parts that are no text, which stay."""
        messages = [self._joined(message) for message in body["messages"]]
        return messages, self._tools(body.get("tools"), body.get("tool_choice"))

    def anthropic(self, body: dict[str, Any]) -> Chat:
        """The same of a body of `/v1/messages`."""
        from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest

        serving = self._state.anthropic_serving_messages
        merges = serving._merge_inline_system  # noqa: SLF001 - what vLLM found out about the template
        request = serving.to_chat_completion_request(
            AnthropicMessagesRequest.model_validate(body), merge_inline_system=merges
        )
        return self.chat(request.model_dump(mode="json", exclude_none=True, warnings=False))

    def _joined(self, message: dict[str, Any]) -> dict[str, Any]:
        content = message.get("content")
        if not isinstance(content, list) or not all(map(is_text_part, content)):
            return message
        parts = [part if isinstance(part, str) else part["text"] for part in content]
        if self._separator is None:
            self._separator = self._part_separator()
        return {**message, "content": self._separator.join(parts)}

    def _tools(self, tools: list[dict[str, Any]] | None, choice: Any) -> list[dict[str, Any]] | None:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionToolsParam

        renderer = self._state.openai_serving_chat.online_renderer
        if not tools or (choice == "none" and renderer.exclude_tools_when_tool_choice_none):
            return None
        return [ChatCompletionToolsParam.model_validate(tool).model_dump() for tool in tools]

    def _part_separator(self) -> str:
        """vLLM joins text parts by lines for templates that take text; others get the parts, and put them together."""
        from vllm.renderers.hf import resolve_chat_template_content_format

        renderer = self._state.openai_serving_chat.online_renderer
        content_format = resolve_chat_template_content_format(
            renderer.chat_template,
            None,
            renderer.chat_template_content_format,
            renderer.renderer.tokenizer,
            model_config=renderer.model_config,
        )
        return "\n" if content_format == "string" else ""


def is_text_part(part: object) -> bool:
    """Is it a part of a message's content that holds nothing but text?"""
    if isinstance(part, str):
        return True
    is_text = isinstance(part, dict) and part.get("type", "text") in ("text", "input_text", "output_text")
    return is_text and isinstance(part.get("text"), str)  # type: ignore[attr-defined]

"""Keeps what the server answered, so that feedback can name a response by its id.

It reads the response (JSON or server-sent events) of the routes in `_READERS` when it has passed; tokens are forwarded
at once. Each choice that was finished is kept, with the prompt that was served; of the others the reason is kept for
which nothing can be said about them, so that nobody's feedback meets an unknown id. `store: false` opts out.
"""

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from alignment.records.pairs import ALL_CHOICES, NOT_STORED, StoredResponse
from app.http.request import ClientRequest, GoOn
from core.wire import Prompt
from engine.vllm.served_prompts import Chat, is_text_part

logger = logging.getLogger(__name__)

MAX_CHOICES = 64
"""Choices of one request that are kept, so that no client pushes everybody's answers out of the store."""

_BROKEN_OFF = "was broken off before its end, so nobody has seen it whole"
_ENDS = {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length", "tool_use": "tool_calls"}
"""Stop reasons of `/v1/messages` in the words of the chat API."""
_ABORTED = (None, "abort", "error")
_RENDERING = ("chat_template", "chat_template_kwargs", "documents", "reasoning_effort", "truncate_prompt_tokens")
"""Fields that change the prompt which is rendered, and that training does not render with."""


class Prompts(Protocol):
    """What vLLM makes of messages: `engine.vllm.served_prompts.ServedPrompts`."""

    def chat(self, body: dict[str, Any]) -> Chat:
        """Messages and tools of a chat body."""

    def anthropic(self, body: dict[str, Any]) -> Chat:
        """Messages and tools of a body of `/v1/messages`."""


@dataclass(slots=True)
class _Choice:
    """One choice, put together from the events."""

    text: str = ""
    finish_reason: str | None = None
    calls: dict[int, dict[str, Any]] = field(default_factory=dict)
    has_reasoning: bool = False
    token_ids: list[int] = field(default_factory=list)
    """Empty unless the client asked for them (`return_token_ids`)."""

    def add_call(self, number: int, call: dict[str, Any]) -> None:
        """Take a tool call, or a further piece of its arguments."""
        new = {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
        known, function = self.calls.setdefault(number, new), call.get("function") or {}
        known["id"] = call.get("id") or known["id"]
        known["function"]["name"] = function.get("name") or known["function"]["name"]
        known["function"]["arguments"] += function.get("arguments") or ""


@dataclass(frozen=True, slots=True)
class _Served:
    """The prompt of a choice."""

    prompt: Prompt = ""
    prefix: str = ""
    """The beginning of the answer that the client gave."""
    tools: list[dict[str, Any]] | None = None
    unusable: str | None = None


_Events = list[dict[str, Any]]


class ResponseCapture:
    """A step of the request chain; see the module docstring. `sink` takes what is kept."""

    def __init__(self, sink: Callable[[StoredResponse], None], prompts: Prompts) -> None:
        self._sink = sink
        self._prompts = prompts

    async def __call__(self, request: ClientRequest, go_on: GoOn) -> None:
        """Pass the request on; keep a copy of the answer, however it ends."""
        if request.path not in _READERS or not isinstance(request.json, dict):
            await go_on()
            return
        request.answer.keeps_body = True
        try:
            await go_on()
        finally:
            if request.answer.status == 200:
                self._keep(request)

    def _keep(self, request: ClientRequest) -> None:
        body, ident = request.json, None
        try:
            events = list(_events(request.answer.body, request.answer.is_stream))
            path = _path_of(request.path, events)
            read_choices, serve = _READERS[path]
            about = [event.get("message") or event.get("response") or event for event in events]
            if not (ident := next((one["id"] for one in about if one.get("id")), None)):
                return
            model = about[0].get("model")
            adapter = model.rpartition("@")[2] if isinstance(model, str) and "@" in model else None
            common = StoredResponse(
                ident,
                ALL_CHOICES,
                adapter=None if adapter == "base" else adapter,
                model=model,
                client_id=request.client_id,
            )
            if body.get("store") is False:
                self._sink(replace(common, unusable=NOT_STORED))
                return
            choices = read_choices(events)
            if len(choices) > MAX_CHOICES:
                what = f"is not among the first {MAX_CHOICES} choices of its request, and only those are kept"
                self._sink(replace(common, unusable=what))
            elif not request.answer.is_complete or any(one.finish_reason in _ABORTED for one in choices.values()):
                self._sink(replace(common, unusable=_BROKEN_OFF))  # also for choices that never began
            served = None
            for index in sorted(choices)[:MAX_CHOICES]:
                if served is None or serve is _serve_batch:  # elsewhere all choices have one prompt
                    served = serve(body, index, self._prompts)
                self._sink(_response(common, index, choices[index], served, body))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            # A response that we cannot read was still delivered; only feedback by its id is lost.
            logger.warning("a response could not be kept: %s: %s", type(error).__name__, error)
            if ident:
                self._sink(StoredResponse(ident, ALL_CHOICES, unusable="has a form that cannot be stored"))


def _response(
    common: StoredResponse, index: int, choice: _Choice, served: _Served, body: dict[str, Any]
) -> StoredResponse:
    """The choice as it is stored: the whole turn of the assistant, or the reason why it cannot be rated."""
    unusable = served.unusable
    if choice.finish_reason in _ABORTED:
        unusable = _BROKEN_OFF
    elif choice.has_reasoning and not choice.token_ids:
        unusable = unusable or "came with reasoning apart from its text, and only text can be trained on"
    if unusable is not None:
        return replace(common, choice_index=index, unusable=unusable)
    text = choice.text
    if body.get("echo"):  # the text then begins with the client's own words
        text = text.removeprefix(served.prompt if isinstance(served.prompt, str) else served.prefix)
    return replace(
        common,
        choice_index=index,
        prompt=served.prompt,
        text=served.prefix + text,
        finish_reason=choice.finish_reason,
        tools=served.tools,
        token_ids=None if served.prefix or body.get("echo") else tuple(choice.token_ids) or None,
        tool_calls=[choice.calls[number] for number in sorted(choice.calls)] or None,
    )


def _events(body: bytes, is_stream: bool) -> Iterator[dict[str, Any]]:
    """The JSON objects of a response: one, or one for each whole server-sent event."""
    if not is_stream:
        try:
            whole = json.loads(body)
        except ValueError:
            return  # broken off: the client has no id of it
        if isinstance(whole, dict):
            yield whole
        return
    for line in body.split(b"\n")[:-1]:
        data = line[5:].strip() if line.startswith(b"data:") else b""
        if data.startswith(b"{"):
            yield json.loads(data)


def _path_of(path: str, events: _Events) -> str:
    """The route that `/invocations` stands for, by what it answered."""
    if path != "/invocations":
        return path
    kind = events[0].get("object") if events else None
    return "/v1/completions" if kind == "text_completion" else "/v1/chat/completions"


def _choices(events: _Events) -> dict[int, _Choice]:
    """The choices of chats and completions, whole or as events."""
    choices: dict[int, _Choice] = {}
    for event in events:
        for part in event.get("choices", ()):
            choice = choices.setdefault(part["index"], _Choice())
            message = part.get("message") or part.get("delta") or {}
            choice.text += message.get("content") or part.get("text") or ""
            choice.token_ids += part.get("token_ids") or ()
            choice.has_reasoning |= bool(message.get("reasoning") or message.get("reasoning_content"))
            for number, call in enumerate(message.get("tool_calls") or ()):
                choice.add_call(call.get("index", number), call)
            choice.finish_reason = part.get("finish_reason") or choice.finish_reason
    return choices


def _message_choices(events: _Events) -> dict[int, _Choice]:
    """The one answer of `/v1/messages`: its blocks, whole or as events."""
    choice = _Choice()
    for event in events:
        for number, block in enumerate(event.get("content") or ()):
            _add_block(choice, number, block)
        if event.get("type") == "content_block_start":
            _add_block(choice, event["index"], event["content_block"])
        delta = event.get("delta") or {}
        choice.text += delta.get("text") or ""
        choice.has_reasoning |= bool(delta.get("thinking"))
        if delta.get("partial_json"):
            choice.add_call(event["index"], {"function": {"arguments": delta["partial_json"]}})
        stop_reason = delta.get("stop_reason") or event.get("stop_reason")
        choice.finish_reason = _ENDS.get(stop_reason or "", choice.finish_reason or "") or None
    return {0: choice}


def _add_block(choice: _Choice, number: int, block: dict[str, Any]) -> None:
    choice.text += block.get("text") or ""
    choice.has_reasoning |= bool(block.get("thinking"))
    if block["type"] == "tool_use":
        arguments = json.dumps(block["input"]) if block.get("input") else ""
        choice.add_call(number, {"id": block["id"], "function": {"name": block["name"], "arguments": arguments}})


def _response_choices(events: _Events) -> dict[int, _Choice]:
    final, choice = events[-1].get("response", events[-1]), _Choice()
    if final.get("status") not in ("completed", "incomplete"):
        return {0: choice}
    choice.finish_reason = "stop" if final["status"] == "completed" else "length"
    for number, item in enumerate(final.get("output", ())):
        choice.has_reasoning |= item.get("type") == "reasoning"
        choice.text += "".join(part.get("text") or "" for part in _parts(item) if item.get("type") == "message")
        if item.get("type") == "function_call":
            choice.add_call(number, {"id": item.get("call_id"), "function": item})
    return {0: choice}


def _parts(item: dict[str, Any]) -> list[dict[str, Any]]:
    return item.get("content") or []


def _serve_chat(body: dict[str, Any], _: int, prompts: Prompts) -> _Served:
    return _served(body, *prompts.chat(body))


def _serve_batch(body: dict[str, Any], index: int, prompts: Prompts) -> _Served:
    return _serve_chat({**body, "messages": body["messages"][index]}, index, prompts)


def _serve_messages(body: dict[str, Any], _: int, prompts: Prompts) -> _Served:
    changed = [name for name in ("thinking", "output_config") if body.get(name)]
    if changed:
        return _Served(unusable=_changes_prompt(changed[0]))
    return _served(body, *prompts.anthropic(body))


def _serve_response(body: dict[str, Any], _: int, prompts: Prompts) -> _Served:
    given = body["input"]
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else list(given)
    for name in ("previous_response_id", "prompt", "reasoning", "tools"):
        if body.get(name):
            return _Served(unusable=_changes_prompt(name))
    if any("role" not in message or message.get("type", "message") != "message" for message in messages):
        return _Served(unusable="has a prompt with other items than messages, and only messages can be trained on")
    if body.get("instructions"):
        messages.insert(0, {"role": "system", "content": body["instructions"]})
    return _served(body, *prompts.chat({"messages": messages}))


def _serve_completion(body: dict[str, Any], _: int, __: Prompts) -> _Served:
    prompt = body.get("prompt")
    if not isinstance(prompt, str):
        return _Served(
            unusable="has a prompt of token ids or several prompts, and only one text can be trained on"
        )
    for name in ("suffix", "prompt_embeds", "truncate_prompt_tokens"):
        if body.get(name):
            return _Served(unusable=_changes_prompt(name))
    if body.get("add_special_tokens") is False:
        return _Served(unusable=_changes_prompt("add_special_tokens"))
    return _Served(prompt)


def _served(body: dict[str, Any], messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> _Served:
    """The prompt of a chat, unless training could not render what was served.

    What the assistant's last message begins and the model goes on with is one turn: a part of the answer.
    """
    for name in _RENDERING:
        if body.get(name):
            return _Served(unusable=_changes_prompt(name))
    for message in messages:
        content = message.get("content")
        other = [part for part in content if not is_text_part(part)] if isinstance(content, list) else []
        if other:
            kind = other[0].get("type") if isinstance(other[0], dict) else None
            return _Served(unusable=f"has a prompt with a part of type {kind}, and only text can be trained on")
        if message.get("reasoning") or message.get("reasoning_content"):
            return _Served(unusable="has a prompt with reasoning in it, and only text can be trained on")
    if not messages or messages[-1].get("role") != "assistant":
        is_plain = body.get("add_generation_prompt") in (None, True) and not body.get("continue_final_message")
        return (
            _Served(messages, tools=tools)
            if is_plain
            else _Served(unusable=_changes_prompt("add_generation_prompt"))
        )
    if not body.get("continue_final_message") or messages[-1].get("tool_calls"):
        what = "has a prompt that ends with an assistant message which was not continued (continue_final_message)"
        return _Served(unusable=what)
    content = messages[-1].get("content")
    return _Served(messages[:-1], content if isinstance(content, str) else "", tools)


def _changes_prompt(name: str) -> str:
    return f"was made with {name}, and what that adds to the prompt cannot be trained on"


_READERS: dict[
    str, tuple[Callable[[_Events], dict[int, _Choice]], Callable[[dict[str, Any], int, Prompts], _Served]]
] = {
    "/v1/chat/completions": (_choices, _serve_chat),
    "/v1/chat/completions/batch": (_choices, _serve_batch),
    "/v1/completions": (_choices, _serve_completion),
    "/v1/responses": (_response_choices, _serve_response),
    "/v1/messages": (_message_choices, _serve_messages),
    "/invocations": (_choices, _serve_chat),
}
"""For each route: the choices, and the prompt of a choice. `/invocations` answers like one of the others."""

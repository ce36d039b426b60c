"""Keeps what the server answered, so that feedback can name a response by its id.

It reads the finished response (JSON or server-sent events) of chat, completions and responses calls as it passes;
tokens are forwarded at once, the parsing is done after the last one. `store: false` in a request opts out.
"""

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

from alignment.records.pairs import StoredResponse
from app.http.request import ClientRequest, GoOn

logger = logging.getLogger(__name__)

Reader = Callable[[dict[str, Any], list[dict[str, Any]]], Iterator[StoredResponse]]


class ResponseCapture:
    """A step of the request chain; see the module docstring. `sink` takes what is kept."""

    def __init__(self, sink: Callable[[StoredResponse], None]) -> None:
        self._sink = sink

    async def __call__(self, request: ClientRequest, go_on: GoOn) -> None:
        """Pass the request on; keep a copy of an answer that is worth keeping."""
        reader = _READERS.get(request.path)
        is_kept = reader is not None and isinstance(request.json, dict) and request.json.get("store") is not False
        request.answer.keeps_body |= is_kept
        await go_on()
        if reader is None or not is_kept or request.answer.status != 200:
            return
        try:
            for response in reader(request.json, list(_events(request.answer.body))):
                self._sink(response)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            # A response that we cannot read was still delivered; only feedback by its id is lost.
            logger.warning("a response could not be kept: %s: %s", type(error).__name__, error)


def _events(body: bytes) -> Iterator[dict[str, Any]]:
    """The JSON objects of a response: one, or one for each server-sent event."""
    if body.lstrip()[:1] == b"{":
        yield json.loads(body)
        return
    for line in body.split(b"\n"):
        data = line[5:].strip() if line.startswith(b"data:") else b""
        if data.startswith(b"{"):
            yield json.loads(data)


def _read_chat(request: dict[str, Any], events: list[dict[str, Any]]) -> Iterator[StoredResponse]:
    texts = _texts(events, lambda choice: (choice.get("message") or choice.get("delta") or {}).get("content"))
    yield from _responses(events, request["messages"], texts)


def _read_completion(request: dict[str, Any], events: list[dict[str, Any]]) -> Iterator[StoredResponse]:
    prompt = request["prompt"]
    if not isinstance(prompt, str):
        return  # token ids or several prompts: nothing that feedback could be trained on
    texts = _texts(events, lambda choice: choice["text"])
    if request.get("echo"):
        texts = {index: text.removeprefix(prompt) for index, text in texts.items()}
    yield from _responses(events, prompt, texts)


def _texts(events: list[dict[str, Any]], text_of: Callable[[dict[str, Any]], str | None]) -> dict[int, str]:
    """The text of each choice, by its index, put together from the events."""
    texts: dict[int, str] = {}
    for event in events:
        for choice in event.get("choices", ()):
            texts[choice["index"]] = texts.get(choice["index"], "") + (text_of(choice) or "")
    return texts


def _read_response(request: dict[str, Any], events: list[dict[str, Any]]) -> Iterator[StoredResponse]:
    final = events[-1].get("response", events[-1]) if events else {}
    if final.get("status") not in ("completed", "incomplete"):
        return
    text = "".join(
        part.get("text") or ""
        for item in final.get("output", ())
        if item.get("type") == "message"
        for part in item.get("content", ())
    )
    prompt = request["input"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if request.get("instructions"):
        messages.insert(0, {"role": "system", "content": request["instructions"]})
    yield from _responses([final], messages, {0: text})


def _responses(events: list[dict[str, Any]], prompt: Any, texts: dict[int, str]) -> Iterator[StoredResponse]:
    if not events:
        return
    model = events[0].get("model")
    adapter = model.rpartition("@")[2] if isinstance(model, str) and "@" in model else None
    for index, text in texts.items():
        yield StoredResponse(
            response_id=events[0]["id"],
            choice_index=index,
            prompt=prompt,
            text=text,
            adapter=None if adapter == "base" else adapter,
            model=model,
        )


_READERS: dict[str, Reader] = {
    "/v1/chat/completions": _read_chat,
    "/v1/completions": _read_completion,
    "/v1/responses": _read_response,
}

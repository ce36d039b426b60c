"""From a wire item to one normalised preference pair: a prompt, a better answer and a worse one.

A pair's prompt is either a list of chat messages (rendered with the chat template) or plain text (completions);
its two answers are each one final assistant turn: its text and, where the prompt came with tools, its calls of them.
No prompt ends with the assistant's words: what a turn begins with is part of that turn. Everything that DPO cannot
use is refused here, as an `InvalidFeedbackError` with the key that is wrong, so that nothing unusable waits in the
store.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from alignment.records.chat import Message, answer_text, text_of, whole_text
from alignment.records.feedback import OpenAIPreferenceRow, PreferenceByIds, PreferenceRow, ResponseRef
from alignment.records.json_checks import canonical_json
from core.alignment_config import FeedbackConfig
from core.errors import FeedbackError, InvalidFeedbackError, ResponseNotReadyError, UnknownResponseError
from core.wire import Prompt

Split = Literal["train", "heldout"]


ALL_CHOICES = -1
"""The choice index of a `StoredResponse` that stands for every choice of its response which is not named itself."""
NOT_STORED = "was made with store: false"
EVICTED = "was dropped because newer answers came"
_GONE = (NOT_STORED, EVICTED)
RUNNING = "is not finished: send this again when its request has ended"
_CUT_OFF = ("length", "repetition")
"""The finish reasons of answers that a limit ended, not the model."""


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """One choice that this server generated, or the reason why it cannot be rated."""

    response_id: str
    choice_index: int
    prompt: Prompt = ""
    text: str = ""
    adapter: str | None = None
    """Adapter version that generated it; None is the bare base model."""
    model: str | None = None
    created_at: float | None = None
    """Unix seconds; None lets the store set the time of receipt."""
    finish_reason: str | None = None
    """In the words of the chat API; None if it was stored before this was noted."""
    tools: list[dict[str, Any]] | None = None
    """The tools that the prompt was rendered with, as the chat template got them."""
    tool_calls: list[dict[str, Any]] | None = None
    """The calls of the answer, as an assistant message has them."""
    token_ids: tuple[int, ...] | None = None
    """The token ids that the model emitted as this answer, if they are known."""
    client_id: str | None = None
    """The `X-Request-Id` or `request_id` that the client gave."""
    unusable: str | None = None
    """The reason why nothing can be said about it, as the end of a sentence that begins with its id."""


@dataclass(frozen=True, slots=True)
class PairDraft:
    """A valid pair that is not stored yet."""

    prompt: Prompt
    chosen: str
    rejected: str
    chosen_version: str | None = None
    rejected_version: str | None = None
    tools: list[dict[str, Any]] | None = None
    """The tools that the prompt is rendered with."""
    chosen_calls: list[dict[str, Any]] | None = None
    """The tool calls that are part of the answer; its text may then be empty."""
    rejected_calls: list[dict[str, Any]] | None = None
    chosen_ids: tuple[int, ...] | None = None
    """The token ids that the model emitted as this answer, if they are known."""
    rejected_ids: tuple[int, ...] | None = None


FindResponse = Callable[[ResponseRef], StoredResponse | None]


def prompt_key(prompt: Prompt, tools: list[dict[str, Any]] | None = None) -> str:
    """Stable hash of the normalised prompt: roles, contents, tools, runs of white space taken as one space.

    It decides the split and which ratings belong together, so it must not depend on process, machine or Python's
    hash seed. Normalising spaces keeps a trivially reformatted training prompt out of the held-out set.
    """
    normal = _normal(prompt, _spaced)
    return hashlib.sha256(canonical_json([normal, tools] if tools else normal).encode()).hexdigest()


def pair_key(prompt: Prompt, chosen: str, rejected: str) -> str:
    """Stable hash of the normalised pair: case folded, runs of white space taken as one space.

    Pairs of equal meaning have equal keys. The last character says which of the two answers was chosen, so a pair
    and its contradiction (see `contrary_key`) differ in that alone, and one index finds both.
    """
    sides = [(_folded(answer), answer.strip()) for answer in (chosen, rejected)]
    first, second = sorted(sides)  # the second part tells answers apart that differ in case or spaces only
    content = [_normal(prompt, _folded), first[0], second[0]]
    digest = hashlib.sha256(canonical_json(content).encode()).hexdigest()
    return digest[:32] + ("a" if sides[0] == first else "b")


def contrary_key(key: str) -> str:
    """The `pair_key` of the same answers preferred the other way round."""
    return key[:-1] + ("b" if key.endswith("a") else "a")


def _spaced(text: str) -> str:
    return " ".join(text.split())


def _unspaced(text: str) -> str:
    """White space is left out, since a server may join the parts of a message by lines."""
    return "".join(text.split())


def _folded(text: str) -> str:
    return _spaced(text.casefold())


def _normal(prompt: Prompt, normalise: Callable[[str], str]) -> object:
    if isinstance(prompt, str):
        return normalise(prompt)
    return [{**message, "content": normalise(text_of(message.get("content")))} for message in prompt]


def split_of(key: str, holdout_fraction: float) -> Split:
    """The side that a prompt falls on: all its pairs fall on the same side, now and after a restart."""
    return "heldout" if int(key[:13], 16) / 16**13 < holdout_fraction else "train"


def checked_text(text: str, param: str, max_chars: int, name: str = "") -> str:
    """`text`, if there is something in it and it has at most `max_chars` characters; messages call it `name`."""
    name = name or param
    if not text.strip():
        raise InvalidFeedbackError(f"{name} is empty", param)
    if len(text) > max_chars:
        raise InvalidFeedbackError(f"{name} has {len(text)} characters, the limit is {max_chars}", param)
    return text


def checked_pair(
    draft: PairDraft, max_chars: int, params: tuple[str, str, str], names: tuple[str, str, str] | None = None
) -> PairDraft:
    """`draft`, if nothing in it is empty or too long, and the answers differ in more than surrounding space.

    `params` are the keys of prompt, chosen and rejected, and `names` what messages call them. A prompt that ends with
    the assistant's words is refused.
    """
    if isinstance(draft.prompt, list) and draft.prompt and draft.prompt[-1]["role"] == "assistant":
        raise InvalidFeedbackError("the prompt must not end with an assistant message", params[0])
    chosen = answer_text(draft.chosen, draft.chosen_calls)
    rejected = answer_text(draft.rejected, draft.rejected_calls)
    texts = (whole_text(draft.prompt, draft.tools), chosen, rejected)
    for text, param, name in zip(texts, params, names or params, strict=True):
        checked_text(text, param, max_chars, name)
    if chosen.strip() == rejected.strip():
        message = f"{params[1]} and {params[2]} are the same text, so there is nothing to prefer"
        raise InvalidFeedbackError(message, params[2])
    return draft


def pair_from_row(row: PreferenceRow | OpenAIPreferenceRow, max_chars: int) -> PairDraft:
    """The pair of a self-contained row.

    Refused are also a missing prompt, a last turn that is not the assistant's, and conversations that differ before it.
    """
    if isinstance(row, OpenAIPreferenceRow):
        params = ("input.messages", "preferred_output", "non_preferred_output")
        draft, tools = (
            _draft(row.input.messages, row.preferred_output, row.non_preferred_output, params),
            row.input.tools,
        )
    else:
        params = ("prompt", "chosen", "rejected")
        draft, tools = _draft(row.prompt, row.chosen, row.rejected, params), row.tools
    if tools and isinstance(draft.prompt, str):
        raise InvalidFeedbackError("tools need a prompt of messages: a text is not rendered with them", "tools")
    offered = [tool.model_dump(exclude_none=True) for tool in tools or ()] or None
    return checked_pair(replace(draft, tools=offered), max_chars, params)


def pair_from_ids(item: PreferenceByIds, find: FindResponse, config: FeedbackConfig) -> PairDraft:
    """The pair of two of our own responses.

    Refused are also one response twice, responses to two prompts, and a chosen one that may not be (`may_be_chosen`).
    """
    chosen_ref, rejected_ref = item.refs
    if chosen_ref == rejected_ref:
        message = "chosen_id and rejected_id name the same response; with n>1 send the choice indices too"
        raise InvalidFeedbackError(message, "rejected_id")
    chosen = found_response(chosen_ref, find, "chosen_id")
    rejected = found_response(rejected_ref, find, "rejected_id")
    if prompt_key(chosen.prompt, chosen.tools) != prompt_key(rejected.prompt, rejected.tools):
        message = "chosen_id and rejected_id answer different prompts, so they cannot be compared"
        raise InvalidFeedbackError(message, "rejected_id")
    if not may_be_chosen(chosen, config):
        message = (
            f"the chosen answer was cut off (finish_reason {chosen.finish_reason}), so it does not show an end"
        )
        raise InvalidFeedbackError(message, "chosen_id")
    params = ("chosen_id", "chosen_id", "rejected_id")
    names = ("the prompt of chosen_id", "the answer chosen_id", "the answer rejected_id")
    return checked_pair(pair_of(chosen, rejected), config.max_text_chars, params, names)


def pair_of(chosen: StoredResponse, rejected: StoredResponse) -> PairDraft:
    """The unchecked pair of two answers to one prompt."""
    return PairDraft(
        chosen.prompt,
        chosen.text,
        rejected.text,
        chosen.adapter,
        rejected.adapter,
        chosen.tools,
        chosen.tool_calls,
        rejected.tool_calls,
        chosen.token_ids,
        rejected.token_ids,
    )


def may_be_chosen(response: StoredResponse, config: FeedbackConfig) -> bool:
    """False for an answer that was cut off, unless the settings let it teach where an answer ends."""
    return response.finish_reason not in _CUT_OFF or config.cut_off_as_chosen


def pair_from_correction(value: str | list[Message], original: StoredResponse, max_chars: int) -> PairDraft:
    """The edit, a text or messages that end with the assistant's, is better than what we said."""
    context, text, calls = _split_answer(value, "value")
    if context and _normal(context, _unspaced) != _normal(original.prompt, _unspaced):
        raise InvalidFeedbackError("the messages before the corrected answer are not the original prompt", "value")
    if original.tool_calls and isinstance(value, str):
        message = (
            "the answer calls a tool, and a text does not say whether it still should: send the whole message"
        )
        raise InvalidFeedbackError(message, "value")
    better = StoredResponse("", 0, original.prompt, text, tools=original.tools, tool_calls=calls)
    names = ("the prompt of response_id", "value", "the answer response_id")
    return checked_pair(pair_of(better, original), max_chars, ("response_id", "value", "response_id"), names)


def found_response(ref: ResponseRef, find: FindResponse, param: str) -> StoredResponse:
    """The response of that name.

    Raises:
        ResponseNotReadyError: its request may still run.
        UnknownResponseError: it was never ours, was made with `store: false`, or is too old.
        InvalidFeedbackError: it was not finished, or its prompt cannot be trained on.
    """
    response = find(ref)
    name = f"{ref.response_id[:100]}#{ref.choice_index}" if ref.choice_index else ref.response_id[:100]
    if response is None:
        raise UnknownResponseError(f"no answer of this server that is remembered has the id {name!r}", param)
    if response.unusable is None:
        return response
    kind: type[FeedbackError] = InvalidFeedbackError
    if response.unusable == RUNNING:
        kind = ResponseNotReadyError
    elif response.unusable in _GONE:
        kind = UnknownResponseError
    raise kind(f"the answer {name!r} {response.unusable}", param)


def _draft(
    prompt: str | list[Message] | None,
    chosen: str | list[Message],
    rejected: str | list[Message],
    params: tuple[str, str, str],
) -> PairDraft:
    """Answers to texts, prompt to messages unless all three are plain text."""
    chosen_context, chosen_text, chosen_calls = _split_answer(chosen, params[1])
    rejected_context, rejected_text, rejected_calls = _split_answer(rejected, params[2])
    if chosen_context != rejected_context:
        message = f"{params[1]} and {params[2]} must be the same conversation up to the last assistant message"
        raise InvalidFeedbackError(message, params[2])
    if prompt is None and not chosen_context:
        message = "prompt is required, unless chosen and rejected are conversations that begin with it"
        raise InvalidFeedbackError(message, params[0])
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        return PairDraft(prompt, chosen_text, rejected_text)
    messages = _as_messages(prompt)
    draft = PairDraft(
        messages, chosen_text, rejected_text, chosen_calls=chosen_calls, rejected_calls=rejected_calls
    )
    if not chosen_context:
        return draft
    if messages != chosen_context[len(chosen_context) - len(messages) :]:  # a shorter context never equals
        message = f"{params[1]} must be one assistant message, or {params[0]} followed by one"
        raise InvalidFeedbackError(message, params[1])
    return replace(draft, prompt=chosen_context)


def _split_answer(
    value: str | list[Message], param: str
) -> tuple[list[dict[str, Any]], str, list[dict[str, Any]] | None]:
    """Split at the last assistant turn: what comes before it, its text, and its calls of tools."""
    if isinstance(value, str):
        return [], value, None
    last = value[-1]
    if last.role != "assistant":
        raise InvalidFeedbackError(f"{param} must end with an assistant message, not {last.role}", param)
    for call in last.tool_calls or ():
        if not _is_object(call.function.arguments):
            message = f"the arguments of {call.function.name!r} in {param} are no JSON object"
            raise InvalidFeedbackError(message, param)
    *context, answer = _as_messages(value)
    return context, text_of(answer["content"]), answer.get("tool_calls")


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text or "{}"), dict)
    except (ValueError, RecursionError):
        return False


def _as_messages(value: str | list[Message] | None) -> list[dict[str, Any]]:
    if value is None:
        return []
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    sent = [message.model_dump(exclude_none=True) for message in value]
    return [{**fields, "content": _content(fields.get("content"))} for fields in sent]


def _content(content: object) -> object:
    """Several parts stay parts: the server's chat template decides how they are joined."""
    return content if isinstance(content, list) and len(content) > 1 else text_of(content)

"""From the text of a preference pair to token ids, exactly as the server would have tokenized it.

A prompt's ids are the server's. An answer's are those that the model would have had to emit for the server to show that
answer: what the template puts between a prompt and an answer (a space, mostly), the answer, and what ends a turn. They
are read back, and a pair whose answer does not come out again is refused. Where the ids are known that the model did
emit, those are taken. Reference log-probabilities that were computed once are taken over where they are still valid.
"""

import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from core.config import TrainingConfig
from core.errors import TrainingError
from core.types import TokenizedPair
from core.wire import TrainingPair
from engine.training.content import Content
from engine.training.micro_batch import cut_pair

_ANSWER = "\U0010f001answer\U0010f001"
"""Stands for the answer when the template is asked what it puts around one: a text that no template looks for."""
_OPEN_THOUGHT = re.compile(r"(?P<open>[<\[])(?P<name>\w*think\w*)(?P<close>[>\]])\s*\Z", re.IGNORECASE)
"""The end of a prompt that begins the model's thoughts for it."""
_THOUGHT = re.compile(r"\s*[<\[](?P<name>\w*think\w*)[>\]].*?[<\[]/(?P=name)[>\]]\s*", re.IGNORECASE | re.DOTALL)

Messages = list[dict[str, Any]]
Render = Callable[[Messages, list[dict[str, Any]] | None, dict[str, Any]], str]
"""Renders messages and tools with the chat template; the last argument has its further variables.

The names of special tokens in what messages say come out as marks (`engine.training.content`).
"""


@dataclass(frozen=True, slots=True)
class Chat:
    """How a server makes tokens of a conversation, and an answer of tokens."""

    content: Content
    render: Render
    hides_thoughts: bool = False
    """True if the server takes the model's thoughts out of its answers (vLLM's `reasoning_parser`)."""


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A prompt as text (what was said in it hidden) and as the server's token ids."""

    text: str
    ids: list[int]
    messages: Messages | None
    tools: list[dict[str, Any]] | None


class PairTokenizer:
    """Renders pairs with a model's chat template, for one base model."""

    def __init__(
        self,
        tokenizer: Any,
        eos_token_ids: set[int],
        config: TrainingConfig,
        base_model: str = "",
        dtype: str = "auto",
        fingerprint: str = "",
        chat: Chat | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._config = config
        self.base_model = base_model
        """Name of the frozen reference model."""
        self.fingerprint = fingerprint
        """That model by its content (`engine.fingerprint`); empty: the name has to do."""
        self._dtype = dtype
        self._eos = tokenizer.eos_token or "" if tokenizer else ""
        if chat is None:
            content = Content(tokenizer, eos_token_ids)
            chat = Chat(content, plain_render(content))
        self._content, self._chat = chat.content, chat

    @classmethod
    def load(
        cls,
        model_dir: str,
        config: TrainingConfig,
        base_model: str = "",
        dtype: str = "auto",
        fingerprint: str = "",
        chat: Chat | None = None,
    ) -> "PairTokenizer":
        """Read end-of-turn tokens from a model directory, and without `chat` (a server's) the tokenizer too."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model_dir) if chat is None else chat.content.tokenizer
        ids = end_token_ids(model_dir, tokenizer)
        return cls(tokenizer, ids, config, base_model, dtype, fingerprint, chat)

    def tokenize(self, pair: TrainingPair) -> TokenizedPair:
        """Token ids and weight of one pair, and its cached reference if that is of these tokens and this model.

        Raises:
            PairTooLongError: cut to the configured lengths, the completions are empty or equal.
            TrainingError: the chat template cannot render the messages.
        """
        whole = TokenizedPair(pair.pair_id, *self.token_ids(pair), weight=pair.weight)
        # As the step would: what does not fit is this pair's error here, not the whole batch's there.
        cut = cut_pair(whole, self._config.max_prompt_tokens, self._config.max_length_tokens)
        known = pair.reference
        if known is None or known.key != self.reference_key(cut):
            return cut
        return replace(cut, reference=(known.chosen_logp, known.rejected_logp))

    def tokenize_all(
        self, pairs: Iterable[TrainingPair]
    ) -> tuple[tuple[TokenizedPair, ...], tuple[tuple[str, str], ...]]:
        """Tokenize the pairs that can be trained on; the ids of the others come second, each with the reason."""
        usable: list[TokenizedPair] = []
        unusable: list[tuple[str, str]] = []
        for pair in pairs:
            try:
                usable.append(self.tokenize(pair))
            except TrainingError as error:
                unusable.append((pair.pair_id, f"{type(error).__name__}: {error}"))
        return tuple(usable), tuple(unusable)

    def reference_key(self, pair: TokenizedPair) -> str:
        """Identity of a pair's reference log-probabilities: 64 hexadecimal digits.

        It depends on the base model's content, its precision (`model.dtype`, for another one gives other values) and
        the token ids as they are trained, that is after cutting; adapter, weight and pair id do not matter.
        """
        model = self.fingerprint or self.base_model
        digest = hashlib.sha256(f"{model}\0{self._dtype}".encode())
        for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids):
            digest.update(b"\0%d\0" % len(ids))
            digest.update(array("q", ids).tobytes())
        return digest.hexdigest()

    def token_ids(self, pair: TrainingPair) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Ids of prompt, chosen and rejected, uncut.

        Raises:
            TrainingError: the chat template cannot render them, or an answer's tokens do not read back as its text.
        """
        prompt = self._prompt(pair)
        chosen = self._completion(prompt, pair.chosen, pair.chosen_calls, pair.chosen_ids)
        rejected = self._completion(prompt, pair.rejected, pair.rejected_calls, pair.rejected_ids)
        return tuple(prompt.ids), tuple(chosen), tuple(rejected)

    def _prompt(self, pair: TrainingPair) -> _Prompt:
        if isinstance(pair.prompt, str):
            return _Prompt(pair.prompt, list(self._tokenizer(pair.prompt)["input_ids"]), None, None)
        text = self._rendered(pair.prompt, pair.tools, add_generation_prompt=True)
        return _Prompt(text, self._content.encode(text), pair.prompt, pair.tools)

    def _completion(
        self, prompt: _Prompt, text: str, calls: list[dict[str, Any]] | None, known: Sequence[int] | None
    ) -> list[int]:
        if known and self._is_of(known, text, calls):
            return list(known)
        if prompt.messages is None:
            said, rest = self._content.hide(text, is_models=True), ""
        elif calls:
            said, rest = "", self._turn_of_calls(prompt, text, calls)
        else:
            said, rest = self._turn(prompt, text)
        return self._ids_after(prompt, said, rest)

    def _is_of(self, ids: Sequence[int], text: str, calls: list[dict[str, Any]] | None) -> bool:
        """Whether these ids say the answer, that is: they are of this tokenizer, and nothing was cut off the text."""
        if not all(0 <= number < len(self._tokenizer) for number in ids):
            return False
        whole = self._content.decode(ids[:-1] if ids[-1] in self._eos_token_ids else ids)
        said = (whole, self._content.decode(ids, skip_special_tokens=True))
        if not calls and not self._chat.hides_thoughts:
            return text.strip() in map(str.strip, said)
        return any(text.strip() in one for one in said) and all(
            call["function"]["name"] in whole for call in calls or ()
        )

    def _turn(self, prompt: _Prompt, text: str) -> tuple[str, str]:
        """What stands behind the prompt if the server shows `text`, and what the template ends it with."""
        lead, end = self._around(prompt)
        opened, thought = _OPEN_THOUGHT.search(prompt.text), _THOUGHT.match(text)
        if opened and text.lstrip().startswith(opened.group().strip()):
            text = text.lstrip().removeprefix(opened.group().strip()).removeprefix("\n")
        elif thought and prompt.text.rstrip().endswith(thought.group().strip()):
            text = text[thought.end() :]
        if not self._chat.hides_thoughts or _is_thinking(text, opened):
            lead = lead if lead.isspace() else ""
        elif opened and not lead.strip():
            lead = _closing(opened)
        if text[:1].isspace() and lead.isspace():
            lead = ""
        if text[-1:].isspace():
            end = end.lstrip()
        return lead + str(self._content.hide(text, is_models=True)), end

    def _around(self, prompt: _Prompt) -> tuple[str, str]:
        """What the template puts between a prompt and an answer, and behind an answer."""
        try:
            whole = self._whole(prompt, {"content": _ANSWER})
        except TrainingError:  # it knows only conversations that end with the user
            return "", ""
        before, found, end = whole.rpartition(_ANSWER)
        lead = before[len(prompt.text) :] if before.startswith(prompt.text) else ""
        return (lead, end) if found else ("", "")

    def _turn_of_calls(self, prompt: _Prompt, text: str, calls: list[dict[str, Any]]) -> str:
        whole, opened = (
            self._whole(prompt, {"content": text, "tool_calls": calls}),
            _OPEN_THOUGHT.search(prompt.text),
        )
        if whole.startswith(prompt.text):
            turn = whole[len(prompt.text) :]
        elif opened and whole.startswith(prompt.text[: opened.start()]):
            turn = _closing(opened) + whole[opened.start() :]
        else:
            raise TrainingError(
                "the chat template begins an answer with tool calls in another way than its prompt"
            )
        said = self._content.show(turn)
        if text.strip() not in said or not all(_is_called(call["function"], said) for call in calls):
            raise TrainingError(
                "the chat template leaves out the tool calls of an answer, or what it says beside them"
            )
        thought = _THOUGHT.match(turn)
        if thought and not self._chat.hides_thoughts and not _THOUGHT.match(text):
            turn = turn[thought.end() :]
        return turn

    def _whole(self, prompt: _Prompt, answer: dict[str, Any]) -> str:
        message = self._content.hide({"role": "assistant", **answer})
        return self._rendered([*(prompt.messages or ()), message], prompt.tools, add_generation_prompt=False)

    def _rendered(self, messages: Messages, tools: list[dict[str, Any]] | None, **options: Any) -> str:
        try:
            return self._chat.render(messages, tools, options)
        except Exception as error:  # jinja raises whatever a template wants
            raise TrainingError(f"the chat template cannot render this prompt: {error}") from error

    def _ids_after(self, prompt: _Prompt, said: str, rest: str) -> list[int]:
        """Ids of `said` behind those of the prompt, up to the end that `rest` holds.

        TrainingError: they do not read back as `said`. White space in `rest` is the template's own affair.
        """
        content, num_prompt = self._content, len(prompt.ids)
        whole = content.encode(prompt.text + said + rest, add_special_tokens=prompt.messages is None)
        tries = [whole[num_prompt:]] if whole[:num_prompt] == prompt.ids else []
        tries.append(content.encode_rest(said + rest))
        ends = sorted((rest.index(name), name) for name in content.ends if name in rest)
        if ends:
            place, name = ends[0]
            tries.append([*content.encode_rest(said + rest[:place].strip()), content.ends[name]])
            rest = rest[: place + len(name)]
        before = content.decode(prompt.ids)
        wanted = content.show(said), content.show(rest) + ("" if ends else self._eos)
        for ids in map(self._until_end, tries):  # the last: some tokens take the white space before them
            read = content.decode(prompt.ids + ids).removeprefix(before)
            for text, start, end in ((read, *wanted), map(content.normal, (read, *wanted))):
                if text.startswith(start) and _dense(text[len(start) :]) == _dense(end):
                    return ids
        raise TrainingError("the tokenizer cannot write an answer: its tokens do not read back as its text")

    def _until_end(self, ids: list[int]) -> list[int]:
        for position, token_id in enumerate(ids):
            if token_id in self._eos_token_ids:
                return ids[: position + 1]
        return [*ids, self._tokenizer.eos_token_id] if self._tokenizer.eos_token_id is not None else ids


def end_token_ids(model_dir: str, tokenizer: Any) -> set[int]:
    """The tokens at which the server ends an answer."""
    from transformers import GenerationConfig

    try:
        eos = GenerationConfig.from_pretrained(model_dir).eos_token_id
    except OSError:
        eos = None
    return {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}


def plain_render(content: Content) -> Render:
    """Rendering as vLLM's server does it, without a server."""

    def render(messages: Messages, tools: list[dict[str, Any]] | None, options: dict[str, Any]) -> str:
        hidden = content.hide([_as_rendered(message) for message in messages])
        return str(
            content.tokenizer.apply_chat_template(hidden, tools=content.hide(tools), tokenize=False, **options)
        )

    return render


def _as_rendered(message: dict[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: parts as lines, and arguments of tool calls as values, not as JSON text."""
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, list):
        message = {**message, "content": "\n".join(part["text"] for part in content)}
    if not calls:
        return message
    values = [json.loads(call["function"].get("arguments") or "{}") for call in calls]
    functions = [{**call["function"], "arguments": value} for call, value in zip(calls, values, strict=True)]
    called = [{**call, "function": function} for call, function in zip(calls, functions, strict=True)]
    return {**message, "tool_calls": called}


def _is_called(function: dict[str, Any], said: str) -> bool:
    """Whether a rendered answer has the name and all texts of a call; numbers are written in many ways.

    TrainingError: the arguments are no object. vLLM's server would render none then, which nobody said.
    """
    try:
        arguments = json.loads(function.get("arguments") or "{}")
    except (ValueError, RecursionError) as error:
        raise TrainingError(f"the arguments of the call of {function['name']!r} are no JSON") from error
    if not isinstance(arguments, dict):
        raise TrainingError(f"the arguments of the call of {function['name']!r} are no object")
    texts = [function["name"], *_texts(arguments)]
    return all(text in said or json.dumps(text, ensure_ascii=False)[1:-1] in said for text in texts)


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, child in value.items():
            yield from (key, *_texts(child))
    elif isinstance(value, list):
        for child in value:
            yield from _texts(child)


def _is_thinking(text: str, opened: re.Match[str] | None) -> bool:
    """Whether an answer brings thoughts of its own."""
    return _THOUGHT.match(text) is not None or (opened is not None and _closing(opened).strip() in text)


def _dense(text: str) -> str:
    """Without white space, and the mark that stands for it in a normalised text."""
    return "".join(text.replace("▁", " ").split())


def _closing(opened: re.Match[str]) -> str:
    """What ends the thoughts that a prompt has begun, with none in them."""
    return f"\n{opened['open']}/{opened['name']}{opened['close']}\n\n"

"""What people write stays text: the name of a special token in a message never becomes that token.

A chat template makes one text of a conversation, in which a tokenizer cannot tell the `<|im_end|>` that the template
wrote from one that a user wrote. So those names are exchanged for marks in the messages before they are rendered
(`hide`). When the text is tokenized (`encode`), names and marks change places: a mark is read as the text that it
stands for, and a name that the template wrote becomes a mark, which a copy of the tokenizer knows as the special token.
A text without marks is tokenized by the tokenizer itself.

Serving (`engine.vllm.compat.guard_content`) and training use the same object, so both see the same tokens.
"""

import json
import logging
import re
import secrets
from collections.abc import Iterable
from functools import cached_property
from typing import Any

logger = logging.getLogger(__name__)

_FIRST_PRIVATE, _NUM_PRIVATE = 0xF0000, 65_000
"""Characters that Unicode leaves to private use, a whole plane of them."""
_OWN_WORDS = re.compile(r"think|reason|tool[_▁ ]?(call|sep)|function[_▁ ]?call|python_tag", re.IGNORECASE)
"""Names of tokens that a model itself puts around its thoughts and its calls of tools."""
_MEDIA = frozenset({"image_url", "input_audio", "audio_url", "video_url", "image_embeds", "audio_embeds", "url"})
"""Keys of a content part whose value is fetched or decoded, not read."""


class Content:
    """Tells what messages say from what a template says, for one tokenizer (of Hugging Face's fast ones)."""

    def __init__(self, tokenizer: Any, end_ids: Iterable[int] = ()) -> None:
        """`end_ids` are tokens that end an answer: protected even if the tokenizer does not call them special."""
        self.tokenizer = tokenizer
        self._backend: Any = getattr(tokenizer, "_tokenizer", None)
        ends = set(end_ids)
        named = {*ends, *(tokenizer.all_special_ids if self._backend is not None else ())}
        added = {} if self._backend is None else self._backend.get_added_tokens_decoder()
        special = {number: token.content for number, token in added.items() if token.special or number in named}
        nonce = "".join(chr(_FIRST_PRIVATE + secrets.randbelow(_NUM_PRIVATE)) for _ in range(4))
        self._marks = {name: nonce + chr(_FIRST_PRIVATE + place) for place, name in enumerate(special.values())}
        self._ids = {name: number for number, name in special.items()}
        self._swap = self._marks | {mark: name for name, mark in self._marks.items()}
        self.ends = {name: number for name, number in self._ids.items() if number in ends}
        """The tokens of `end_ids`, by their names."""
        own = {name for name in self._ids.keys() - self.ends if _OWN_WORDS.search(name)}
        self._of_others, self._of_model = _any_of(self._marks), _any_of(self._marks.keys() - own)
        self._any_mark, self._either = _any_of(self._marks.values()), _any_of(self._swap)

    def prepare(self) -> None:
        """Make now what the first text with marks would wait for: seconds for a large vocabulary."""
        if self._marks:
            _ = self._twin

    def hide(self, value: Any, *, is_models: bool = False) -> Any:
        """`value`, a text or messages or tools, with marks for the names of special tokens in all that it says.

        In what the model itself said, `is_models` or a message of the assistant, tokens such as `<think>` stay.
        """
        if isinstance(value, str):
            names = self._of_model if is_models else self._of_others
            return names.sub(lambda found: self._marks[found.group()], value)
        if isinstance(value, list | tuple):
            return [self.hide(one, is_models=is_models) for one in value]
        if isinstance(value, dict):
            is_models |= value.get("role") == "assistant"
            return {
                self.hide(key): one if key in _MEDIA else self.hide(one, is_models=is_models)
                for key, one in value.items()
            }
        return value

    def show(self, value: Any) -> Any:
        """The inverse of `hide`."""
        if isinstance(value, str):
            return self._any_mark.sub(lambda found: self._swap[found.group()], value)
        if isinstance(value, list | tuple):
            return [self.show(one) for one in value]
        if isinstance(value, dict):
            return {self.show(key): self.show(one) for key, one in value.items()}
        return value

    def has_marks(self, text: str) -> bool:
        """True if this text must be tokenized by `encode`."""
        return self._any_mark.search(text) is not None

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a rendered text, marks read as the text that they stand for."""
        if not self.has_marks(text):
            return list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
        return list(self._twin.encode(self._swapped(text), add_special_tokens=add_special_tokens).ids)

    def encode_rest(self, text: str) -> list[int]:
        """Token ids of a text that goes on where another ended: no space is put before it."""
        if self._backend is None:
            return self.encode(text)
        return list(self._rest_twin.encode(self._swapped(text), add_special_tokens=False).ids)

    def _swapped(self, text: str) -> str:
        return self._either.sub(lambda found: self._swap[found.group()], text)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids, with no space that is not among them."""
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )

    def normal(self, text: str) -> str:
        """`text` as the tokenizer reads it: some bring letters and accents into one form."""
        normalizer = getattr(self._backend, "normalizer", None)
        return text if normalizer is None else str(normalizer.normalize_str(text))

    @cached_property
    def _twin(self) -> Any:
        return self._copy(self._spec())

    @cached_property
    def _rest_twin(self) -> Any:
        return self._copy(_without_prefix(self._spec()))

    def _spec(self) -> dict[str, Any]:
        """The tokenizer as JSON, its special tokens under the names of their marks."""
        spec: dict[str, Any] = json.loads(self._backend.to_str())
        spec["truncation"] = spec["padding"] = None
        for token in spec["added_tokens"]:
            token["content"] = self._marks.get(token["content"], token["content"])
        model = spec["model"]
        vocabulary = model.get("vocab")
        if isinstance(vocabulary, dict):
            model["vocab"] = {self._marks.get(name, name): number for name, number in vocabulary.items()}
        elif isinstance(vocabulary, list):  # Unigram: pieces with their scores
            model["vocab"] = [[self._marks.get(piece, piece), score] for piece, score in vocabulary]
        if model.get("unk_token") in self._marks:
            model["unk_token"] = self._marks[model["unk_token"]]
        return spec

    def _copy(self, spec: dict[str, Any]) -> Any:
        from tokenizers import Tokenizer

        copy = Tokenizer.from_str(json.dumps(spec))
        for name, number in self._ids.items():
            assert copy.token_to_id(self._marks[name]) == number, f"{name} would become another token"
        return copy


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds the longest of these names.

    Names that begin alike share that beginning, so that hundreds of them cost no more than a few.
    """
    tree: dict[str, Any] = {}
    for name in names:
        node = tree
        for char in name:
            node = node.setdefault(char, {})
        node[""] = {}
    return re.compile(_branches(tree) or r"(?!)")  # nothing can be found of no names


def _branches(node: dict[str, Any]) -> str:
    ways = [re.escape(char) + _branches(below) for char, below in node.items() if char]
    if not ways:
        return ""
    either = ways[0] if len(ways) == 1 and "" not in node else f"(?:{'|'.join(ways)})"
    return f"{either}?" if "" in node else either


def _without_prefix(spec: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer without the space that it puts before a text."""
    for step in _steps(spec.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
        elif step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
    for step in _steps(spec.get("normalizer"), "normalizers"):
        if step["type"] == "Prepend":
            step["prepend"] = ""
    return spec


def _steps(part: dict[str, Any] | None, members: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return part[members] if part["type"] == "Sequence" else [part]

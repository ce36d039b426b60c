"""What a model is, by its content and not by its name.

A fingerprint is four hashes of 16 hexadecimal digits, joined by hyphens, in the order of `core.fingerprint.PARTS`:
weights, config, tokenizer and chat template. Of weights the headers and a sample of every tensor are read, so it takes
a fraction of a second for any size; everything else is small and read whole. Names of files, times and the way in
which tensors are spread over files do not matter.
"""

import hashlib
import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

_BLOCK = 4096
"""Bytes of a sample: one or two thousand numbers, of which any training changes some."""
_MANY_TENSORS = 4096
"""Up to so many tensors, three samples are read of each, beyond one."""
_OPAQUE_SAMPLES = 256
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".gguf")
_MAX_HEADER = 100_000_000
"""Longest header that safetensors allows, in bytes."""
_TOKENIZER_FILES = (
    "*.model",
    "*.tiktoken",
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
)
_SAYS_NOTHING = ("_name_or_path", "name_or_path", "transformers_version")
"""Keys of a JSON file that saving a model again changes."""


class _Tensor(NamedTuple):
    name: str
    shape: str
    """Number format and shape, as JSON."""
    file: int
    """Descriptor."""
    start: int
    end: int


def fingerprint(model_dir: Path) -> str:
    """The fingerprint of a model directory; of a file that cannot be read, the name stands for the content."""
    generation = _json(model_dir / "generation_config.json")
    config = _hash(_json(model_dir / "config.json"), generation.get("eos_token_id"))
    config.update(_content(model_dir, "*.py"))
    tokenizer_config = _json(model_dir / "tokenizer_config.json")
    own_template = tokenizer_config.pop("chat_template", None)
    tokenizer = _hash(tokenizer_config)
    for pattern in _TOKENIZER_FILES:
        tokenizer.update(_content(model_dir, pattern))
    return "-".join(
        digest.hexdigest()
        for digest in (_weights(model_dir), config, tokenizer, _template(model_dir, own_template))
    )


def _weights(directory: Path) -> "hashlib.blake2b":
    """Of safetensors if there are any, as vLLM takes those alone; else of the other formats."""
    digest = _hash()
    with ExitStack() as opened:
        tensors: list[_Tensor] = []
        others = [path for path in sorted(directory.iterdir()) if path.suffix in _OTHER_FORMATS]
        for path in sorted(directory.glob("*.safetensors")) or others:
            try:
                file = os.open(path, os.O_RDONLY)
            except OSError:
                digest.update(path.name.encode())
                continue
            opened.callback(os.close, file)
            found = _tensors(file) if path.suffix == ".safetensors" else None
            if found is None:
                size = os.fstat(file).st_size
                digest.update(b"%d" % size)
                _sample(digest, file, 0, size, _OPAQUE_SAMPLES)
            else:
                tensors += found
        for tensor in sorted(tensors):
            digest.update(f"{tensor.name}\0{tensor.shape}\0".encode())
            _sample(digest, tensor.file, tensor.start, tensor.end, 3 if len(tensors) <= _MANY_TENSORS else 1)
    return digest


def _tensors(file: int) -> list[_Tensor] | None:
    """The tensors of a safetensors file; None if its header cannot be read."""
    length = int.from_bytes(os.pread(file, 8, 0), "little")
    if not 0 < length <= min(_MAX_HEADER, os.fstat(file).st_size - 8):
        return None
    try:
        header = json.loads(os.pread(file, length, 8))
        header.pop("__metadata__", None)
        first = 8 + length
        return [
            _Tensor(
                name, json.dumps([one["dtype"], one["shape"]]), file, *(first + at for at in one["data_offsets"])
            )
            for name, one in header.items()
        ]
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _sample(digest: "hashlib.blake2b", file: int, start: int, end: int, count: int) -> None:
    """Take in `count` blocks spread evenly from the first to the last, or all if that is no more."""
    if end - start <= count * _BLOCK:
        digest.update(os.pread(file, max(end - start, 0), start))
        return
    last = end - start - _BLOCK
    for number in range(count):
        at = start + (last * number // (count - 1) if count > 1 else last // 2)
        digest.update(os.pread(file, _BLOCK, at))


def _template(directory: Path, own: Any) -> "hashlib.blake2b":
    """The chat template from where it is read: a file of its own is stronger than the tokenizer's configuration."""
    try:
        template = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    except (OSError, ValueError):
        template = _json(directory / "chat_template.json").get("chat_template", own)
    digest = _hash(template)
    digest.update(_content(directory, "additional_chat_templates/*.jinja"))
    return digest


def _content(directory: Path, pattern: str) -> bytes:
    """Names and content of the files of a pattern, hashed."""
    digest = _hash()
    for path in sorted(directory.glob(pattern)):
        digest.update(path.name.encode() + b"\0")
        try:
            digest.update(hashlib.blake2b(path.read_bytes()).digest())
        except OSError:
            continue
    return digest.digest()


def _json(path: Path) -> dict[str, Any]:
    """A JSON object without the keys that say nothing; empty if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return {key: value[key] for key in value if key not in _SAYS_NOTHING} if isinstance(value, dict) else {}


def _hash(*values: Any) -> "hashlib.blake2b":
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=8)

"""One adapter version on disk: its manifest, and whether its files can be used.

A version is a directory in PEFT format (`adapter_config.json`, `adapter_model.safetensors`) plus `manifest.json`.
Checks read headers only, so they need no torch and take well under a millisecond.
"""

import json
import os
import re
import struct
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from core.errors import DamagedAdapterError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MANIFEST_FILE = "manifest.json"
_NAME = re.compile(r"v(\d{4}|[1-9]\d{4,17})")
_MAX_HEADER_BYTES = 100_000_000
"""Limit of the safetensors format itself."""


class AdapterManifest(BaseModel):
    """Where an adapter version comes from and what became of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    version: str = ""
    """`v0001`; set by `AdapterRegistry.commit`."""
    parent: str | None = None
    """Version that training started from; None is the bare base model."""
    base_model: str
    created_at: float = Field(default_factory=time.time)
    """Unix seconds."""
    status: Literal["published", "rejected"] = "published"
    reason: str = ""
    """Why it was published or rejected: the gate's words."""
    pair_ids: tuple[str, ...] = ()
    """Pairs trained on since `parent`."""
    optimizer_steps: int = Field(0, ge=0)
    metrics: dict[str, float | None] = Field(default_factory=dict)
    config: dict[str, Any] = Field(default_factory=dict)
    """Training configuration that produced it."""


def version_number(name: str) -> int | None:
    """7 for `v0007`; None if that is not a version name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def version_name(number: int) -> str:
    """`v0007` for 7; more than four digits when they are needed."""
    return f"v{number:04d}"


def check_files(directory: Path) -> None:
    """Check that the PEFT files are complete and readable.

    Raises:
        DamagedAdapterError: a file is missing, is not JSON, or the weights are truncated or not safetensors.
    """
    read_json(directory / CONFIG_FILE)
    _check_safetensors(directory / WEIGHTS_FILE)


def read_manifest(directory: Path, base_model: str | None) -> AdapterManifest:
    """The manifest of a committed version, checked against its directory and the base model served now.

    Raises:
        DamagedAdapterError: missing, malformed, of another version, or for another base model.
    """
    try:
        manifest = AdapterManifest.model_validate(read_json(directory / MANIFEST_FILE))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise DamagedAdapterError(f"{directory.name}: {MANIFEST_FILE}: {place}: {first['msg']}") from error
    if manifest.version != directory.name:
        raise DamagedAdapterError(f"{directory.name}: the manifest is that of {manifest.version or 'no version'}")
    if base_model is not None and manifest.base_model != base_model:
        message = f"{directory.name}: trained for base model {manifest.base_model!r}, this is {base_model!r}"
        raise DamagedAdapterError(message)
    return manifest


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        DamagedAdapterError: missing, unreadable, or not a JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedAdapterError(f"{path.parent.name}: cannot read {path.name}: {error}") from error
    if not isinstance(value, dict):
        raise DamagedAdapterError(f"{path.parent.name}: {path.name} is not a JSON object")
    return value


def _check_safetensors(path: Path) -> None:
    """Header length (8 bytes, little endian), JSON header, then exactly as many bytes as the header says."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            if header_bytes > min(_MAX_HEADER_BYTES, size - 8):
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(header_bytes))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        if not ends:
            raise ValueError("it holds no tensors")
        if 8 + header_bytes + max(ends) != size:
            raise ValueError(f"it has {size} bytes, the header says {8 + header_bytes + max(ends)}")
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError, struct.error) as error:
        raise DamagedAdapterError(f"{path.parent.name}: cannot read {path.name}: {error}") from error

"""One adapter version on disk: its manifest, and whether its files can be used.

A version is a directory in PEFT format (`adapter_config.json`, `adapter_model.safetensors`) plus `manifest.json`.
Checks read headers only, so they need no torch and take well under a millisecond. What does not pass one is a
`DamagedAdapterError`.
"""

import json
import re
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from core.errors import DamagedAdapterError, UnfitAdapterError
from core.fingerprint import differing_parts

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MANIFEST_FILE = "manifest.json"
_NAME = re.compile(r"v(\d{4}|[1-9]\d{4,17})")


class AdapterManifest(BaseModel):
    """The origin of an adapter version, and what became of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    version: str = ""
    """`v0001`; set by `AdapterRegistry.commit`."""
    parent: str | None = None
    """Version that training started from; None is the bare base model."""
    base_model: str
    """Name of the model it was trained for, for people."""
    fingerprint: str = ""
    """That model by its content (`engine.fingerprint`); empty: written before there were any, so the name counts."""
    created_at: float = Field(default_factory=time.time)
    """Unix seconds."""
    status: Literal["published", "rejected"] = "published"
    reason: str = ""
    """The gate's words for publishing or rejecting it."""
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
    """Check that the PEFT files are there, and that the weights are safetensors and neither empty nor truncated."""
    read_json(directory / CONFIG_FILE)
    try:
        with safe_open(directory / WEIGHTS_FILE, framework="numpy") as weights:
            if not weights.keys():
                raise DamagedAdapterError(f"{directory.name}: {WEIGHTS_FILE} holds no tensors")
    except (OSError, SafetensorError) as error:
        raise DamagedAdapterError(f"{directory.name}: cannot read {WEIGHTS_FILE}: {error}") from error


def read_manifest(directory: Path, base_model: str | None, fingerprint: str = "") -> AdapterManifest:
    """The manifest of a committed version, checked against its directory and the base model served now.

    Raises:
        UnfitAdapterError: it was trained for a model of another content, or, where one of the two has no fingerprint,
            of another name.
    """
    try:
        manifest = AdapterManifest.model_validate(read_json(directory / MANIFEST_FILE))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise DamagedAdapterError(f"{directory.name}: {MANIFEST_FILE}: {place}: {first['msg']}") from error
    if manifest.version != directory.name:
        raise DamagedAdapterError(f"{directory.name}: the manifest is that of {manifest.version or 'no version'}")
    if fingerprint and manifest.fingerprint:
        if differing := differing_parts(manifest.fingerprint, fingerprint):
            message = f"trained for another base model: the {differing} of {manifest.base_model!r} differed"
            raise UnfitAdapterError(f"{directory.name}: {message}")
    elif base_model is not None and manifest.base_model != base_model:
        message = f"{directory.name}: trained for base model {manifest.base_model!r}, this is {base_model!r}"
        raise UnfitAdapterError(message)
    return manifest


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedAdapterError(f"{path.parent.name}: cannot read {path.name}: {error}") from error
    if not isinstance(value, dict):
        raise DamagedAdapterError(f"{path.parent.name}: {path.name} is not a JSON object")
    return value

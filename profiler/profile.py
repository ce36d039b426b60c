"""A profile: the models of one device and one model, where they come from, and how wrong they are. One JSON file."""

import json
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from core.errors import ProfileError
from core.files import write_atomically
from core.types import SliceKind
from profiler.models import LatencyModel, MemoryModel

SCHEMA_VERSION = 1
QUANTILE_LEVELS = (*(step / 20 for step in range(20)), 0.99, 1.0)
"""Levels of every quantile list: 0, 0.05, ..., 0.95, 0.99, 1."""
MAX_FORWARD_ROWS = 2000
MAX_SLICE_ROWS = 400
"""Raw rows kept for each kind of slice."""

_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Quantiles = Annotated[
    tuple[_Seconds, ...], Field(min_length=len(QUANTILE_LEVELS), max_length=len(QUANTILE_LEVELS))
]
_Count = Annotated[int, Field(ge=0)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Origin(_Model):
    """Where a profile comes from."""

    device: str = Field(min_length=1)
    model: str = Field(min_length=1)
    num_threads: int = Field(ge=1)
    versions: dict[str, str] = Field(default_factory=dict)
    """Of python, torch, vllm and mace."""
    commit: str | None = None
    """Git commit of the code that measured, if it ran from a clone."""
    seed: int = 0
    command: str = ""
    created: str = ""
    """ISO 8601, UTC."""


class FitError(_Model):
    """Relative error |predicted - measured| / measured on rows that the fit did not see."""

    num_rows: int = Field(ge=0)
    """Rows held out; 0: there were too few rows to hold any out, and the errors are those of the fit itself."""
    median: _Seconds
    p95: _Seconds


class RawSamples(_Model):
    """What was measured (a bounded, evenly spread part of it), enough to fit again."""

    forward: list[tuple[_Count, _Count, _Count, _Count, _Count, _Seconds, _Seconds]] = Field(default_factory=list)
    """num_decode, decode_context, num_prefill_tokens, prefill_attention, num_prefills, forward_s, overhead_s."""
    slices: dict[SliceKind, list[tuple[_Count, _Seconds]]] = Field(default_factory=dict)
    """num_tokens, latency_s."""
    memory: list[tuple[_Count, _Count]] = Field(default_factory=list)
    """Padded tokens of the micro-batch, peak bytes of the step."""


class Profile(_Model):
    """Models, errors and noise of one device and one model."""

    schema_version: Literal[1] = 1
    origin: Origin
    latency: LatencyModel
    memory: MemoryModel
    forward_error: FitError
    slice_errors: dict[SliceKind, FitError]
    forward_ratios: _Quantiles
    """Quantiles of measured / predicted at `QUANTILE_LEVELS`: the device's noise and the model's error together."""
    slice_ratios: dict[SliceKind, _Quantiles]
    forward_noise: _Quantiles
    """The same, each ratio over the median of its like (rows of nearly equal features): the noise without the error."""
    slice_noise: dict[SliceKind, _Quantiles]
    overhead_s: _Seconds
    """Median time of an iteration that was neither forward pass nor slices."""
    overhead_quantiles_s: _Quantiles
    samples: RawSamples

    def save(self, path: Path) -> None:
        """Write as JSON; a reader sees the old file or the new one, never a part.

        Raises:
            ProfileError: the file cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, self.model_dump_json(indent=1))
        except OSError as error:
            raise ProfileError(f"cannot write profile {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path) -> "Profile":
        """Read what `save` wrote.

        Raises:
            ProfileError: no such file, no JSON, an unknown schema version, or wrong or missing fields.
        """
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ProfileError(f"cannot read profile {path}: {error.strerror}") from error
        except ValueError as error:
            raise ProfileError(
                f"profile {path} is damaged: {error}. Measure it again: mace profile measure"
            ) from error
        version = document.get("schema_version") if isinstance(document, dict) else None
        if version != SCHEMA_VERSION:
            raise ProfileError(
                f"profile {path} has schema version {version!r}, this MACE reads {SCHEMA_VERSION}. "
                "Measure it again: mace profile measure"
            )
        try:
            return cls.model_validate_json(json.dumps(document))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise ProfileError(f"profile {path} is damaged at {where}: {first['msg']}") from error


def profile_path(state_dir: Path, device: str, model_id: str) -> Path:
    """Where the profile of a device and a model is kept: `state_dir/profiles/<device>/<model>.json`."""
    return state_dir / "profiles" / _slug(device) / f"{_slug(model_id)}.json"


def _slug(name: str) -> str:
    """A file name that differs only if the name does in letters, digits or dots; never hidden, never empty."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")[:120] or "unnamed"

"""A profile: the latency and memory models of one device and one model, where they come from, how wrong they are.

One JSON file. Every model is linear with coefficients that are not negative, so predictions are monotone in every
feature. A linear form is what the roofline of a transformer gives: reading the weights (constant), work per token
(linear), and attention (proportional to the query-key pairs).
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from core.batch import ForwardShape
from core.errors import ProfileError
from core.files import make_directory, write_atomically
from core.offload import Place, WorkCost, WorkKind
from core.types import SliceKind

QUANTILE_LEVELS = (*(step / 20 for step in range(20)), 0.99, 1.0)
"""Levels of every quantile list: 0, 0.05, ..., 0.95, 0.99, 1."""

_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Quantiles = Annotated[
    tuple[_Seconds, ...], Field(min_length=len(QUANTILE_LEVELS), max_length=len(QUANTILE_LEVELS))
]
_Count = Annotated[int, Field(ge=0)]
_Coefficient = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_ForwardVector = tuple[_Coefficient, _Coefficient, _Coefficient, _Coefficient, _Coefficient, _Coefficient]


def forward_features(shape: ForwardShape) -> tuple[float, float, float, float, float, float]:
    """Features that forward latency is linear in.

    They are 1 if the pass has any token, num_decode, decode_context, num_prefill_tokens, prefill_attention and
    num_prefills.
    """
    any_token = 1.0 if shape.num_decode or shape.num_prefill_tokens else 0.0
    return (
        any_token,
        float(shape.num_decode),
        float(shape.decode_context),
        float(shape.num_prefill_tokens),
        float(shape.prefill_attention),
        float(shape.num_prefills),
    )


class FrozenModel(BaseModel):
    """Part of a file: unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class MeasuredFile(FrozenModel):
    """Measurements of a command, in one JSON file."""

    title: ClassVar[str]
    """Name of the file in error messages."""
    command: ClassVar[str]
    """Makes it anew."""
    schema_version: Literal[1] = 1

    def save(self, path: Path) -> None:
        """Write as JSON, all of it or nothing; ProfileError if the file cannot be written."""
        try:
            make_directory(path.parent)
            write_atomically(path, self.model_dump_json(indent=1))
        except OSError as error:
            raise ProfileError(f"cannot write {self.title} {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ProfileError: no such file, no JSON, an unknown schema version, or wrong or missing fields.
        """
        again = f"Measure it again: {cls.command}"
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            version = document.get("schema_version") if isinstance(document, dict) else None
            if version != 1:
                raise ProfileError(
                    f"{cls.title} {path} has schema version {version!r}, this MACE reads 1. {again}"
                )
            return cls.model_validate_json(json.dumps(document))
        except OSError as error:
            raise ProfileError(f"cannot read {cls.title} {path}: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise ProfileError(f"{cls.title} {path} is damaged at {where}: {first['msg']}. {again}") from error
        except ValueError as error:
            raise ProfileError(f"{cls.title} {path} is damaged: {error}. {again}") from error


class Origin(FrozenModel):
    """Device, model, code and time of a measurement."""

    device: str = Field(min_length=1)
    model: str = Field(min_length=1)
    num_threads: int = Field(ge=1)
    versions: dict[str, str] = Field(default_factory=dict)
    """Versions of python, torch, vllm and mace."""
    commit: str | None = None
    """Git commit of the code that measured, if it ran from a clone."""
    seed: int = 0
    command: str = ""
    created: str = ""
    """ISO 8601, UTC."""


class LatencyModel(FrozenModel):
    """Seconds of a forward pass and of each kind of slice."""

    forward: _ForwardVector
    """Seconds for each unit of `forward_features`."""
    typical: _ForwardVector
    """Largest value of each feature among the samples: how far the fit is supported by measurements."""
    slices: dict[SliceKind, tuple[_Coefficient, _Coefficient]]
    """Seconds of a slice, and seconds for each of its tokens."""

    def forward_s(self, shape: ForwardShape) -> float:
        """Latency of a forward pass in seconds; 0 for an empty shape."""
        return sum(c * x for c, x in zip(self.forward, forward_features(shape), strict=True))

    def slice_s(self, kind: SliceKind, num_tokens: int) -> float | None:
        """Latency of one slice in seconds; None for a kind that was not measured."""
        coefficients = self.slices.get(kind)
        return None if coefficients is None else coefficients[0] + coefficients[1] * num_tokens


class MemoryModel(FrozenModel):
    """Bytes that a fine-tune step holds between slices, and bytes of the KV cache."""

    arena_bytes: _Coefficient
    """Held whatever the micro-batch: LoRA gradients."""
    arena_bytes_per_token: _Coefficient
    """Held for each padded token of a micro-batch: kept layer inputs, head gradients."""
    kv_bytes_per_token: int | None = Field(None, ge=1)
    """KV cache of one token over all layers; known from the model's shape, not fitted. None: unknown."""


class FitError(FrozenModel):
    """Relative error |predicted - measured| / measured on rows that the fit did not see."""

    num_rows: int = Field(ge=0)
    """Rows held out; 0: there were too few rows to hold any out, and the errors are those of the fit itself."""
    median: _Seconds
    p95: _Seconds


class RawSamples(FrozenModel):
    """Rows of what was measured (a bounded, evenly spread part of it), enough to fit again."""

    forward: list[tuple[_Count, _Count, _Count, _Count, _Count, _Seconds, _Seconds]] = Field(default_factory=list)
    """num_decode, decode_context, num_prefill_tokens, prefill_attention, num_prefills, forward_s, overhead_s."""
    slices: dict[SliceKind, list[tuple[_Count, _Seconds]]] = Field(default_factory=dict)
    """num_tokens, latency_s."""
    memory: list[tuple[_Count, _Count]] = Field(default_factory=list)
    """Padded tokens of the micro-batch, peak bytes of the step."""


class Profile(MeasuredFile):
    """Models, errors and noise; see the module docstring."""

    title: ClassVar[str] = "profile"
    command: ClassVar[str] = "mace profile measure"
    origin: Origin
    latency: LatencyModel
    memory: MemoryModel
    forward_error: FitError
    slice_errors: dict[SliceKind, FitError]
    forward_ratios: _Quantiles
    """Quantiles of measured / predicted at `QUANTILE_LEVELS`: the device's noise and the model's error together."""
    slice_ratios: dict[SliceKind, _Quantiles]
    forward_noise: _Quantiles
    """Quantiles of each ratio over the median of its like (rows of nearly equal features): noise without error."""
    slice_noise: dict[SliceKind, _Quantiles]
    overhead_s: _Seconds
    """Median time of an iteration that was neither forward pass nor slices."""
    overhead_quantiles_s: _Quantiles
    work: dict[WorkKind, dict[Place, WorkCost]] = Field(default_factory=dict)
    """Costs of background work on the engine's device and on the CPU; empty where there is one device only."""
    samples: RawSamples

    def with_work(self, work: Mapping[Any, Any]) -> Self:
        """A copy with these costs of background work."""
        return self.model_validate({**self.model_dump(), "work": work})


def profile_path(state_dir: Path, device: str, model_id: str) -> Path:
    """Path of the profile of a device and a model: `state_dir/profiles/<device>/<model>.json`."""
    return state_dir / "profiles" / _slug(device) / f"{_slug(model_id)}.json"


def _slug(name: str) -> str:
    """A file name that differs only if the name does in letters, digits or dots; never hidden, never empty."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")[:120] or "unnamed"

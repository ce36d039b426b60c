"""Configuration of the alignment loop: feedback, drift, quality of feedback, gate and versions. See `core.config`."""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator


def constants(**values: float) -> dict[str, str]:
    """Entries of `Section.gone` for settings that are constants now."""
    return {name: f"is now the constant {value:g}" for name, value in values.items()}


def moved(section: str, *names: str) -> dict[str, str]:
    """Entries of `Section.gone` for settings that keep their name in another section."""
    return {name: f"is now {section}.{name}" for name in names}


class Section(BaseModel):
    """One section of the configuration: frozen, and an unknown key is an error.

    `gone` names the keys that a section had once, each with what to write instead: `"is now experiments.packing"`, or
    `"is now the constant 0.002"`. Such a key is refused with that text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    gone: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_gone_keys(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for key in cls.gone.keys() & values.keys():
                raise ValueError(f"the setting {key} {cls.gone[key]}")
        return values


class FeedbackConfig(Section):
    """The feedback store and its bounds."""

    gone: ClassVar[dict[str, str]] = {
        **constants(max_items=1000),
        "rating_window_s": "is gone: two thumbs may be 100,000 ratings apart, whatever the clock says",
    }

    database_url: str | None = None
    """SQLAlchemy URL; None is SQLite in WAL mode at `state_dir/feedback.db`. PostgreSQL needs a driver (`psycopg`)."""
    max_text_chars: int = Field(32_768, ge=1)
    """Longest prompt, answer or comment."""
    max_body_bytes: int = Field(8 << 20, ge=1024)
    """Largest body of any request, chat too."""
    max_responses: int = Field(100_000, ge=1)
    """Responses kept so that feedback can name them by id; the oldest are dropped first."""
    cut_off_as_chosen: bool = False
    """Whether an answer that its limit of tokens cut off may be the better one of a pair. It teaches the model to end
    an answer at that place."""
    holdout_fraction: float = Field(0.15, ge=0, lt=1)
    """Share of prompts, by a stable hash, whose pairs are never trained on and serve as the gate's test set. A
    change applies to new pairs only."""


class DriftConfig(Section):
    """Detection of changed preferences, and the amount of training that they call for."""

    gone: ClassVar[dict[str, str]] = {
        **constants(min_pairs=8, adwin_delta=0.002, hddm_confidence=0.001, page_hinkley_threshold=5),
        **constants(prompt_delta=0.0005, max_streams=200, change_slots=128, alarm_loss=0.25, quiet_gamma=0.5),
        **constants(alarm_gamma=2, half_life_pairs=32),
    }

    window: int = Field(32, ge=4)
    """Newest pairs whose scores under the live adapter say whether it agrees with its users."""
    min_accuracy: float = Field(0.9, gt=0, le=1)
    """Below this preference accuracy over the window, drift is reported."""
    max_loss: float = Field(0.55, gt=0)
    """Above this mean DPO loss over the window, drift is reported (ln 2 = 0.693 is the untrained loss)."""
    quiet_rate: float = Field(0.5, ge=0)
    """Training slots for each new pair while nothing drifts; below 1 only the pairs of highest loss are trained."""
    alarm_rate: float = Field(4.0, gt=0)
    """Training slots for each new pair at full alarm; the baselines `periodic` and `continuous` always take it."""

    @model_validator(mode="after")
    def _quiet_below_alarm(self) -> "DriftConfig":
        if self.quiet_rate > self.alarm_rate:
            raise ValueError("drift.quiet_rate must not be above drift.alarm_rate")
        return self


class QualityConfig(Section):
    """Checks that weigh doubtful feedback down."""

    gone: ClassVar[dict[str, str]] = {
        **constants(near_duplicate=0.9, flood_window=200, outlier_z=3.5, outlier_weight=0.5, trust_min_pairs=8),
        **constants(trust_confidence=0.95),
    }

    enabled: bool = True
    """False: every pair counts fully."""
    max_user_share: float = Field(0.3, gt=0, le=1)
    """A user with a larger share of the newest 200 pairs is weighted down to this share, if there are others to compare
    with."""


class GateConfig(Section):
    """Bounds of a candidate's losses against the live adapter on held-out pairs."""

    gone: ClassVar[dict[str, str]] = {
        **constants(max_clpd_drop=2, max_old_pairs=64, max_length_factor=3, max_repetition_rise=0.3),
        "generation_tokens": "is gone: 1.5 times the longest answer that people chose on held-out pairs, 64 to 256",
    }

    confidence: float = Field(0.95, gt=0.5, lt=1)
    """One-sided: a fall that a paired test calls significant at this level refuses the candidate."""
    max_accuracy_drop: float = Field(0.02, ge=0, le=1)
    """A fall of this size refuses it too, significant or not: with few pairs a test has little power."""
    max_pairs: int = Field(64, ge=1)
    """Newest held-out pairs since the last change of preferences, one for each prompt, that both are scored on."""
    generation_prompts: int = Field(8, ge=0)
    """Held-out prompts that the candidate answers before it goes live; 0 leaves the generation check out."""
    max_kl: float = Field(3.0, gt=0)
    """Bound of KL(candidate || reference) per token in nats, estimated on the candidate's own answers. If the answers
    that people chose on held-out pairs are further from the reference, nats per token, that is the bound."""


class VersionsConfig(Section):
    """Rules by which versions go live, and the number that is kept."""

    gone: ClassVar[dict[str, str]] = constants(canary_confidence=0.95, canary_max_slo_drop=0.02)

    keep: int = Field(20, ge=2)
    """Versions on disk, rejected ones included; never deletes one that is live, pinned or in use."""
    canary_share: float = Field(0.0, ge=0, le=0.5)
    """Share of the traffic that a new version gets before it goes live; 0 leaves the canary out."""
    canary_min_ratings: int = Field(20, ge=1)
    """Ratings of either version before they are compared."""
    canary_min_requests: int = Field(50, ge=1)
    """Requests of either version before their latency is compared."""
    canary_max_s: float = Field(3600.0, gt=0)
    """After this time a canary that nothing speaks against goes live."""
    warm_prefixes: int = Field(8, ge=0)
    """Prefixes that requests share, computed for a version before it goes live; 0 leaves that out."""
    warm_timeout_s: float = Field(2.0, gt=0)
    """Warming delays a publish by no more than this."""

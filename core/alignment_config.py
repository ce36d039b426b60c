"""Configuration of the alignment loop: feedback, drift, quality of feedback, gate and versions. See `core.config`."""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator


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

    database_url: str | None = None
    """SQLAlchemy URL; default is SQLite in WAL mode at `state_dir/feedback.db`."""
    max_text_chars: int = Field(32_768, ge=1)
    max_items: int = Field(1000, ge=1)
    max_body_bytes: int = Field(8 << 20, ge=1024)
    max_responses: int = Field(100_000, ge=1)
    """Responses kept so that feedback can name them by id; the oldest are dropped first."""
    holdout_fraction: float = Field(0.15, ge=0, lt=1)
    """Share of pairs, by a stable hash, that are never trained on and serve as the gate's test set."""
    rating_window_s: float = Field(7 * 86_400.0, gt=0)
    """A thumb up and a thumb down on the same prompt make a pair if they came within this time of each other."""


class DriftConfig(Section):
    """When new preferences call for training, and for how much."""

    window: int = Field(32, ge=4)
    """Newest pairs whose scores under the live adapter say whether it agrees with its users."""
    min_pairs: int = Field(8, ge=1)
    """Scores in the window before drift is reported."""
    min_accuracy: float = Field(0.9, gt=0, le=1)
    """Below this preference accuracy over the window, drift is reported."""
    max_loss: float = Field(0.55, gt=0)
    """Above this mean DPO loss over the window, drift is reported (ln 2 = 0.693 is the untrained loss)."""
    adwin_delta: float = Field(0.002, gt=0, lt=1)
    """Chance that ADWIN reports a change in a stream that has none."""
    hddm_confidence: float = Field(0.001, gt=0, lt=1)
    """Chance that HDDM_A takes wrong pairs that come as before for more of them; it finds sudden changes first."""
    page_hinkley_threshold: float = Field(5.0, gt=0)
    """Page-Hinkley reports a rise of the loss once its cumulated excess is above this (nats)."""
    prompt_delta: float = Field(0.0005, gt=0, lt=1)
    """As `adwin_delta`, for the streams of prompt length and prompt novelty."""
    max_streams: int = Field(200, ge=1)
    """Users and tags watched at a time, besides the global stream; the least recent are dropped first."""
    quiet_rate: float = Field(0.5, ge=0)
    """Training slots for each new pair while nothing drifts; below 1 only the pairs of highest loss are trained."""
    alarm_rate: float = Field(4.0, gt=0)
    """Training slots for each new pair at full alarm; the baselines `periodic` and `continuous` always take it."""
    change_slots: int = Field(128, ge=0)
    """Training slots granted at once when a change in all pairs is found, for the pairs since then."""
    alarm_loss: float = Field(0.25, gt=0)
    """While alarmed, a pair is trained again until its loss is below this; while not, until it is below `max_loss`."""
    quiet_gamma: float = Field(0.5, ge=0)
    """Factor of `scheduler.gamma` while nothing drifts."""
    alarm_gamma: float = Field(2.0, ge=0)
    """Factor of `scheduler.gamma` at full alarm."""
    half_life_pairs: float = Field(32.0, gt=0)
    """The alarm's level halves with every so many scored pairs without a complaint."""

    @model_validator(mode="after")
    def _quiet_below_alarm(self) -> "DriftConfig":
        if self.quiet_rate > self.alarm_rate:
            raise ValueError("drift.quiet_rate must not be above drift.alarm_rate")
        return self


class QualityConfig(Section):
    """Which feedback is weighted down, and how far."""

    enabled: bool = True
    near_duplicate: float = Field(0.9, gt=0, le=1)
    """Estimated Jaccard similarity of word shingles above which two pairs count as the same."""
    flood_window: int = Field(200, ge=10)
    """Newest pairs among which one user's share is measured."""
    max_user_share: float = Field(0.3, gt=0, le=1)
    """A user with a larger share of the window is weighted down to this share, if others are there to compare with."""
    outlier_z: float = Field(3.5, gt=0)
    """Robust z-score (median, MAD) of a pair's loss among recent ones above which it is an outlier."""
    outlier_weight: float = Field(0.5, ge=0, le=1)
    """What is left of an outlier. Below 0.5 the drift detectors would not see the first pairs of a new taste."""
    trust_min_pairs: int = Field(8, ge=2)
    """Scored pairs of a user before their agreement with everybody else is judged."""
    trust_confidence: float = Field(0.95, gt=0.5, lt=1)
    """A user is distrusted when their agreement is below that of the others with this confidence."""


class GateConfig(Section):
    """What a candidate must not lose against the live adapter on held-out pairs."""

    confidence: float = Field(0.95, gt=0.5, lt=1)
    """One-sided: a fall that a paired test calls significant at this level refuses the candidate."""
    max_accuracy_drop: float = Field(0.02, ge=0, le=1)
    """A fall of this size refuses it too, significant or not: with few pairs a test has little power."""
    max_clpd_drop: float = Field(2.0, ge=0)
    """The same for the mean CLPD, in nats; larger, as pairs that stay right by a smaller distance are no loss yet."""
    max_pairs: int = Field(64, ge=1)
    """Newest held-out pairs since the last change of preferences, one for each prompt, that both are scored on."""
    max_old_pairs: int = Field(64, ge=0)
    """Older held-out pairs since that change, a sample."""
    generation_prompts: int = Field(8, ge=0)
    """Held-out prompts that the candidate answers before it goes live; 0 leaves the generation check out."""
    generation_tokens: int = Field(64, ge=1)
    max_length_factor: float = Field(3.0, gt=1)
    """Mean length of the candidate's answers against the live adapter's: at most this, at least its inverse."""
    max_repetition_rise: float = Field(0.3, ge=0, le=1)
    """How much larger the share of repeated 3-grams may be than in the live adapter's answers."""
    max_kl: float = Field(3.0, gt=0)
    """Bound of KL(candidate || reference) per token in nats, estimated on the candidate's own answers."""


class VersionsConfig(Section):
    """How versions go live, and how many are kept."""

    keep: int = Field(20, ge=2)
    """Versions on disk, rejected ones included; never deletes one that is live, pinned or in use."""
    canary_share: float = Field(0.0, ge=0, le=0.5)
    """Share of the traffic that a new version gets before it goes live; 0 leaves the canary out."""
    canary_min_ratings: int = Field(20, ge=1)
    """Ratings of either version before they are compared."""
    canary_min_requests: int = Field(50, ge=1)
    canary_max_s: float = Field(3600.0, gt=0)
    """After this time a canary that nothing speaks against goes live."""
    canary_confidence: float = Field(0.95, gt=0.5, lt=1)
    canary_max_slo_drop: float = Field(0.02, ge=0, le=1)
    """A canary whose share of requests within their SLO is lower by more than this is rolled back."""
    warm_prefixes: int = Field(8, ge=0)
    """Prefixes that requests share, computed for a version before it goes live; 0 leaves that out."""
    warm_timeout_s: float = Field(2.0, gt=0)
    """Warming delays a publish by no more than this."""

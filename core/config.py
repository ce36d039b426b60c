"""Configuration: one frozen model per component, nested in `AppArgs`.

`AppArgs` is what stands under `args:` in `serve_config.yaml`. Unknown keys are errors, because Ray Serve itself
ignores them silently. Times are in seconds, sizes in bytes or tokens; the name says which.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from core.alignment_config import (
    DriftConfig,
    FeedbackConfig,
    GateConfig,
    QualityConfig,
    Section,
    VersionsConfig,
    constants,
    moved,
)
from core.offload import Offload

Policy = Literal["mace", "inference_only", "periodic", "continuous"]
"""Names of the policies that say when training may run."""

TINY_ASSISTANT = "builtin:tiny-assistant"
SMOLLM2 = "builtin:smollm2"

KV_PRUNING_OPT_OUT = "kv_pruning"
"""Public key in a request's `vllm_xargs`: false keeps all of its KV blocks."""

KV_PRUNING_SINK_TOKENS = 32
"""The first tokens of a request, which pruning always keeps: attention rests on them (StreamingLLM)."""


class ModelConfig(Section):
    """The served model and its name."""

    gone: ClassVar[dict[str, str]] = constants(build_seed=0)

    model_id: str = Field("mace-tiny", pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")
    """Name over HTTP: letters, digits, `.`, `_`, `/` and `-`."""
    model_source: str = Field(TINY_ASSISTANT, min_length=1)
    """`builtin:smollm2` (downloaded once, 93 MB), `builtin:tiny-assistant` (trained once, for tests and the demo), a
    Hugging Face id, or a local directory with `config.json` and safetensors."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of model and trainer; `auto` is vLLM's choice. GPUs: 16 bits."""
    max_model_len: int | None = Field(None, ge=64)
    """Longest prompt plus answer, in tokens; one such sequence must fit into the KV cache. None: the model's own
    limit."""


class EngineConfig(Section):
    """Settings of the vLLM engine."""

    max_num_seqs: int = Field(64, ge=1)
    """Requests that run together. While they are others', a client with none may have one of an eighth more."""
    max_num_batched_tokens: int = Field(2048, ge=64)
    """Tokens of one forward pass at most; also the largest prefill chunk."""
    max_choices: int = Field(128, ge=1)
    """Answers that one request may ask for: its prompts times `n`, or `best_of`. More is refused with 400."""
    max_request_tokens: int = Field(1 << 20, ge=1)
    """Tokens that one request may ask for: `max_tokens` times its answers. More is refused with 400."""
    kv_cache_memory_bytes: int | None = Field(None, ge=1 << 20)
    """None: vLLM's rule on GPU (`gpu_memory_utilization`); on CPU what `max_num_seqs` requests of `max_model_len`
    tokens can use and half as much for cached prefixes, but a tenth of the memory (256 MiB to 8 GiB) at most."""
    gpu_memory_utilization: float = Field(0.8, gt=0, lt=1)
    """vLLM's setting of that name. Training needs part of the rest; `mace doctor --plan` computes how much."""
    num_threads: int = Field(0, ge=0)
    """CPU threads of the worker. 0: every core that this process may use, or one if the weights are below 64 MiB."""
    share_base_weights: Literal["auto", "always", "never"] = "auto"
    """`auto`: on CUDA the trainer uses vLLM's weights, on CPU a copy of its own, for decode speed."""
    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of vLLM's engine, over MACE's own (docs/vllm_flags.md)."""
    frontend_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Options of vLLM's OpenAI server by their names there, in the types that vLLM uses inside: `api_key` is a
    list of keys."""
    messages_are_text: bool = True
    """The name of a special token in a chat message is read as text, so nobody can end a message by writing
    `<|im_end|>`. False: it becomes that token, as in vLLM."""


class LoraConfig(Section):
    """Shape of every adapter version."""

    rank: int = Field(16, ge=1, le=512)
    """Rank of every adapter version. Versions of another rank cannot be trained further."""
    alpha: float = Field(32.0, gt=0)
    """The adapter's scale is alpha / rank."""
    max_loaded: int = Field(4, ge=2)
    """Adapter versions that may be active in one batch; running requests finish on their own version."""


class TrainingConfig(Section):
    """The DPO step and when its results go live."""

    gone: ClassVar[dict[str, str]] = {
        **moved("experiments", "share_prompt"),
        **constants(head_chunk_tokens=128, new_share=0.5, hard_share=0.25, replay_share=0.25, max_loss=20),
        **constants(max_attempts=3, failure_backoff_s=1),
    }

    enabled: bool = True
    """False: serve only; feedback is still stored."""
    beta: float = Field(0.1, gt=0)
    """DPO's beta, the scale of a pair's margin: a larger one keeps the adapter closer to the reference."""
    sft_weight: float = Field(1.0, ge=0)
    """Weight of the chosen responses' mean token NLL beside the DPO loss (TRL's `loss_type=["sigmoid", "sft"]`).

    Without it DPO may push down both responses; a later change of taste then destroyed the built-in model (34 % right
    answers after 64 + 96 steps, 99 % with it). 0 is plain DPO.
    """
    learning_rate: float = Field(3e-4, gt=0)
    """Step size of AdamW."""
    weight_decay: float = Field(0.0, ge=0)
    """Decay that AdamW applies to the LoRA matrices."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""
    pairs_per_step: int = Field(8, ge=1)
    """Pairs of one optimizer step."""
    max_prompt_tokens: int = Field(512, ge=1)
    """Longest prompt; a longer one keeps its end."""
    max_length_tokens: int = Field(1024, ge=8)
    """Longest prompt and answer together; a longer answer loses its end."""
    max_slice_tokens: int = Field(1024, ge=16)
    """Tokens that one slice takes through one layer at most, which decides how many pairs go together. A longer
    pair goes alone."""
    max_epochs: int = Field(10, ge=1)
    """A pair is trained at most this many times."""
    max_age_s: float = Field(20.0, gt=0)
    """A pair that waited this long is trained even if the batch is not full."""
    steps_per_candidate: int = Field(8, ge=1)
    """Optimizer steps between two candidates for the gate; four once a step's mean DPO loss is below 0.1."""
    arena_bytes: int | None = Field(None, ge=1 << 20)
    """Memory for activations and gradients of a step, as far as the device has it. None: half of what is free once the
    engine serves, without what forward passes take for their duration."""
    seed: int = 0
    """Seed of a fresh adapter."""

    @model_validator(mode="after")
    def _room_for_an_answer(self) -> "TrainingConfig":
        if self.max_prompt_tokens >= self.max_length_tokens:
            raise ValueError("training.max_prompt_tokens must be below training.max_length_tokens")
        return self


class SloConfig(Section):
    """Service level objectives of inference, as clients see them. `slo: auto` in place of the section is
    `slo: {auto: true}`."""

    auto: bool = False
    """True: the targets are 1.5 times the p99 that four clients see without training. They are measured at the first
    start, for at most 20 s, kept with the profile, and never changed after that; the two below have no say."""
    ttft_s: float = Field(1.0, gt=0)
    """Target for the time from a request's arrival to its first token."""
    tbt_s: float = Field(0.2, gt=0)
    """Target for the time between tokens. Slices use what the forward pass leaves of it."""

    @model_validator(mode="before")
    @classmethod
    def _read_auto(cls, values: Any) -> Any:
        return {"auto": True} if values == "auto" else values


class SchedulerConfig(Section):
    """Shares of an iteration's time and memory (paper, Algorithm 1). The priorities are in `scheduler.priority`."""

    gone: ClassVar[dict[str, str]] = {
        **moved("experiments", "packing", "ageing", "prefix_order", "reward_term", "retrain_rate"),
        **moved("experiments", "period_requests", "phase_gap_s"),
        **constants(prefix_head_start_s=0.5, base_priority_prefill=10, base_priority_decode=20),
        **constants(base_priority_finetune=1, base_priority_batch=5, rate_prefill=1, rate_decode=1),
        **constants(rate_finetune=0.2, rate_batch=0.2, priority_step=1, max_loss_term=5, retry_decay=0.5),
        **constants(lambda_memory=0.5, lambda_latency=0.5, min_prefill_tokens=32),
    }

    policy: Policy = "mace"
    """`mace` trains in the slack of every iteration, `inference_only` never. Baselines: `periodic` stops inference
    to train after `experiments.period_requests` requests (Ekya-style), `continuous` after each
    1/`experiments.retrain_rate`."""
    gamma: float = Field(1.0, ge=0)
    """Weight of the DPO loss in a fine-tune task's priority."""
    slack_fraction: float = Field(0.8, gt=0, le=1)
    """Share of the TBT target that an iteration is planned to fill; the rest absorbs noise."""
    tau_mem: float = Field(0.95, gt=0, le=1)
    """Share of the memory (KV blocks and fine-tune arena) that packing may fill."""
    retrain_rate_floor: float = Field(0.0, ge=0)
    """Below so many trained pairs for each request, `mace` runs a slice in every iteration even without slack."""
    retrain_rate_cap: float | None = Field(None, gt=0)
    """Above so many pairs for each request, `mace` stops training until requests catch up. None: no cap."""

    @model_validator(mode="after")
    def _floor_below_cap(self) -> "SchedulerConfig":
        if self.retrain_rate_cap is not None and self.retrain_rate_floor > self.retrain_rate_cap:
            raise ValueError("scheduler.retrain_rate_floor must not be above scheduler.retrain_rate_cap")
        return self


class ExperimentsConfig(Section):
    """Ablations of the scheduler and the training step, and what the blocking baselines are given."""

    packing: Literal["best_fit", "first_fit"] = "best_fit"
    """`first_fit` is the ablation: the first candidate that fits, with no choice of how much."""
    ageing: bool = True
    """False is the ablation: waiting raises no priority."""
    prefix_order: bool = True
    """Requests that share a prefix with running ones go before others. False is the ablation: arrival only."""
    reward_term: bool = True
    """False is the ablation: no `γ·L_DPO` in the priority."""
    share_prompt: bool = True
    """Compute the prompt of a pair once for both completions, where that is fewer tokens (docs/measurements)."""
    retrain_rate: float = Field(0.4, gt=0)
    """Preference pairs trained for each inference request by the baselines `periodic` and `continuous`."""
    period_requests: int = Field(50, ge=1)
    """Requests between two training phases of `periodic`."""
    phase_gap_s: float = Field(3.0, gt=0)
    """A baseline's training phase ends early after so long without work. Steps follow at once; a candidate takes a
    second or two to be judged and published: with less than that a phase mostly ends with its first candidate."""


class KvPruningConfig(Section):
    """Dropping KV blocks that attention will hardly miss. Off unless `start` says when."""

    gone: ClassVar[dict[str, str]] = {
        **constants(sink_tokens=32),
        "method": "is gone: blocks are always scored by KeyDiff",
    }

    start: Literal["off", "memory_pressure", "always"] = "off"
    """`memory_pressure`: only when blocks are short; `always`: every request, as soon as its prompt is computed, at
    most 512 blocks in one iteration."""
    max_fraction: float = Field(0.25, gt=0, le=0.9)
    """Share of a request's KV blocks that may be dropped."""
    recent_tokens: int = Field(128, ge=1)
    """The last tokens of a request are always kept, and so are the first 32 (`KV_PRUNING_SINK_TOKENS`)."""
    max_logprob_drop: float = Field(0.05, ge=0)
    """Nats per token that pruning at `max_fraction` may cost on `mace profile pruning`, or it does not switch on."""
    max_accuracy_drop: float = Field(0.02, ge=0, le=1)
    """Share of answers that it may cost there."""
    require_gate: bool = True
    """False: switch on without a passed `mace profile pruning`."""


class OffloadConfig(Section):
    """What a GPU server may leave to its CPU (docs/energy.md)."""

    optimizer: Offload = "auto"
    """AdamW and its state. `auto`: where it takes the least energy within the SLO."""
    checkpoint: Offload = "auto"
    """The same for its copies, for checkpoints."""


class ProfileConfig(Section):
    """The latency and memory profile of this device and model."""

    gone: ClassVar[dict[str, str]] = {"max_measure_s": "is now the constant 60 s"}

    path: Path | None = None
    """Profile to start from; default is `state_dir/profiles/<device>/<model>.json`."""
    measure_at_start: bool = True
    """Measure a profile in the background if there is none."""


class AppArgs(Section):
    """Everything under `args:` of `serve_config.yaml`."""

    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    lora: LoraConfig = LoraConfig()
    training: TrainingConfig = TrainingConfig()
    slo: SloConfig = SloConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    experiments: ExperimentsConfig = ExperimentsConfig()
    kv_pruning: KvPruningConfig = KvPruningConfig()
    offload: OffloadConfig = OffloadConfig()
    profile: ProfileConfig = ProfileConfig()
    feedback: FeedbackConfig = FeedbackConfig()
    drift: DriftConfig = DriftConfig()
    quality: QualityConfig = QualityConfig()
    gate: GateConfig = GateConfig()
    versions: VersionsConfig = VersionsConfig()
    ray_dashboard: bool = True
    """False: `mace serve` starts Ray without its dashboard. A Ray that was there before is as it is."""
    state_dir: Path = Path("state")
    """Feedback, adapters, optimizer state and the built-in model live here; for one base model at a time. A relative
    path counts from where the server is started."""

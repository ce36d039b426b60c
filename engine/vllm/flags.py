"""vLLM's own arguments as MACE meets them: what trains, what only serves, and what is refused by its name.

`FLAGS` is the one list: `check_flags` reads it before anything starts, `scripts.configure_page` writes
docs/vllm_flags.md from it, and `tests/integration/test_vllm_flags.py` starts an engine for each example.
Arguments that are not listed go to vLLM as they are.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from core.config import AppArgs
from core.errors import ConfigError

ENGINE, FRONTEND = "engine_kwargs", "frontend_kwargs"
_TWO_DEVICES = "needs two devices"
_CUDA = "needs a CUDA device"


@dataclass(frozen=True, slots=True)
class Flag:
    """One row: arguments with the same fate for the same reason."""

    names: tuple[str, ...]
    effect: Literal["trains", "serves", "refused"]
    """`trains`: serving and training go on beside it. `serves`: only with `training.enabled: false`."""
    why: str
    """One sentence for the table and the error, in lower case and without a full stop."""
    section: str = ENGINE
    unless: tuple[Any, ...] = (None,)
    """Values that ask for nothing; they are never refused."""
    example: dict[str, Any] = field(default_factory=dict)
    """What the test starts an engine with, or is refused with; empty: it is not run."""
    not_run: str = ""
    """The reason why no test starts it."""


FLAGS = (
    Flag(
        ("enable_prefix_caching",),
        "trains",
        "off: every prompt is computed anew, and the router knows nothing of prefixes",
        example={"enable_prefix_caching": False},
    ),
    Flag(("block_size",), "trains", "tokens of a KV block", example={"block_size": 32}),
    Flag(
        ("kv_cache_dtype",),
        "trains",
        "the trainer keeps no KV cache, so its log-probabilities are those of the unquantized one",
        unless=(None, "auto"),
        example={"kv_cache_dtype": "fp8"},
    ),
    Flag(
        ("speculative_config",),
        "trains",
        "drafts count as decoded tokens; a request that fails ends the engine, because drafts cannot be brought back",
        example={"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
    ),
    Flag(
        ("enforce_eager",),
        "trains",
        "false on CPU: the first start compiles the model for minutes",
        example={"enforce_eager": False},
    ),
    Flag(
        ("async_scheduling",),
        "trains",
        "off: the next iteration waits for the tokens of the last one. On CPU it is never on",
        example={"async_scheduling": False},
    ),
    Flag(
        ("reasoning_parser",),
        "trains",
        "answers without thoughts are trained behind an empty block of them",
        example={"reasoning_parser": "qwen3"},
    ),
    Flag(
        ("tool_call_parser", "enable_auto_tool_choice"),
        "trains",
        "streams with tools have no gaps that could be measured",
        section=FRONTEND,
        example={"tool_call_parser": "hermes", "enable_auto_tool_choice": True},
    ),
    Flag(
        ("compilation_config", "attention_backend"),
        "trains",
        "with KV pruning, which sets both on CUDA, they are the user's risk",
        not_run=_CUDA,
    ),
    Flag(("enable_sleep_mode",), "trains", "nothing is trained while the engine sleeps", not_run=_CUDA),
    Flag(
        ("load_format",),
        "trains",
        "only on one copy of the weights (`share_base_weights`): a copy of the trainer's own is read from safetensors",
        example={"load_format": "dummy"},
    ),
    Flag(
        ("quantization",),
        "serves",
        "the trainer computes with the checkpoint's weights, whose own quantization needs no argument",
        not_run="needs a quantized checkpoint",
    ),
    Flag(
        ("hf_overrides",),
        "serves",
        "the trainer reads the model's own configuration and would compute another model",
        unless=(None, {}),
        example={"hf_overrides": {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}},
    ),
    Flag(
        ("tensor_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size"),
        "serves",
        "a worker that holds a part of the model cannot train it, and a request that fails ends the engine",
        unless=(None, 1),
        not_run=_TWO_DEVICES,
    ),
    Flag(
        ("cpu_offload_gb", "offload_backend", "offload_group_size"),
        "serves",
        "weights that are not on the device cannot be shared with the trainer",
        unless=(None, 0, "auto"),
        not_run=_CUDA,
    ),
    Flag(
        ("kv_transfer_config", "ec_transfer_config"),
        "serves",
        "a request that fails ends the engine, whose peers have state that cannot be brought back",
        not_run="needs a second engine",
    ),
    Flag(
        ("data_parallel_size",),
        "refused",
        "several engines are several executors: set `num_replicas` of the Executor deployment",
        unless=(None, 1),
        example={"data_parallel_size": 2},
    ),
    Flag(
        ("distributed_executor_backend",),
        "refused",
        "worker and engine run on one machine; several are several executors",
        unless=(None, "uni", "mp"),
        example={"distributed_executor_backend": "ray"},
    ),
    Flag(
        ("enable_chunked_prefill",),
        "refused",
        "prompts are planned in chunks, so that a long one does not stop those who wait for their next token",
        unless=(None, True),
        example={"enable_chunked_prefill": False},
    ),
    Flag(
        ("scheduling_policy",),
        "refused",
        "requests carry a priority, which vLLM takes under this policy only; the order is MACE's own",
        unless=(None, "priority"),
        example={"scheduling_policy": "fcfs"},
    ),
    Flag(
        ("enable_lora",),
        "refused",
        "versions are LoRA adapters",
        unless=(None, True),
        example={"enable_lora": False},
    ),
    Flag(
        ("scheduler_cls", "worker_cls"),
        "refused",
        "scheduler and worker are MACE's",
        example={"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"},
    ),
    Flag(
        ("additional_config", "gdn_prefill_backend", "kda_prefill_backend", "kda_decode_backend"),
        "refused",
        "MACE's settings travel in its place",
        unless=(None, {}),
        example={"additional_config": {"key": "value"}},
    ),
    Flag(
        ("runner", "convert"),
        "refused",
        "only models that generate are served",
        unless=(None, "auto", "generate", "none"),
        example={"runner": "pooling"},
    ),
    Flag(
        ("model", "revision", "served_model_name", "tokenizer", "tokenizer_revision", "hf_config_path"),
        "refused",
        "`model.model_source` and `model.model_id` say it, for the trainer too",
        example={"tokenizer": "another/model"},
    ),
    Flag(
        ("host", "port", "uds", "grpc_port", "root_path", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs"),
        "refused",
        "Ray Serve listens: set `http_options` of the config file",
        section=FRONTEND,
        example={"port": 8001},
    ),
)


def check_flags(args: AppArgs) -> None:
    """Refuse arguments of vLLM's that these settings cannot honour; ConfigError names each with its reason."""
    given = {ENGINE: args.engine.engine_kwargs, FRONTEND: args.engine.frontend_kwargs}
    problems = []
    for flag in FLAGS:
        if flag.effect == "trains" or (flag.effect == "serves" and not args.training.enabled):
            continue
        way_out = "" if flag.effect == "refused" else ". It is served with training.enabled: false"
        values = given[flag.section]
        problems += [
            f"engine.{flag.section}.{name}: {flag.why}{way_out}"
            for name in flag.names
            if name in values and values[name] not in flag.unless
        ]
    if problems:
        raise ConfigError("\n".join(problems))

"""Will a model and its settings fit into the memory of a GPU? Computed from sizes alone, before anything is loaded.

vLLM takes `gpu_memory_utilization` of the memory for weights, adapter slots, activations and, with what is left of
that, the KV cache; the trainer's state is made before vLLM measures, so it counts there too. The arena of the
training steps lives in the rest. Nothing here is measured: activations are upper estimates by the model's dimensions,
and what CUDA takes for itself is an allowance.

The layers of a quantized checkpoint are there packed, once for vLLM, which repacks them, and once for the trainer,
which unpacks one at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from core.config import AppArgs
from core.dpo_slices import HEAD_CHUNK_TOKENS
from core.model_dims import ModelDims
from scheduler.memory.arena import ArenaNeed
from scheduler.memory.ledger import ARENA_SHARE
from scheduler.queues.waiting import guest_seats

_GIB = 1 << 30
CONTEXT_BYTES = _GIB // 2
"""Allowance for the CUDA context and the libraries' workspaces, outside of what vLLM asks for."""
GRAPHS_BYTES = _GIB
"""Allowance for captured CUDA graphs, within it."""
STATE_BYTES = 40
"""Bytes of a LoRA parameter in fp32: itself, two moments, two copies of the three, and the live version."""
_MOVED_COPIES_BYTES = 16
"""What stays of them with the copies on the CPU."""
_MOVED_STATE_BYTES = 8
"""What stays beside an optimizer on the CPU: the parameter, and the live version's."""
_SAMPLER_BYTES = 20
"""Bytes of a word and request beside its logit: in fp32 itself, its probability, and its value and index in order."""
_BLOCK_TOKENS = 16
_Changes = dict[str, Any]
"""New values by `section.setting`."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """A model with its settings on a GPU of `memory_bytes`; `slot_rank` is the rank that vLLM makes for `lora.rank`."""

    args: AppArgs
    dims: ModelDims
    memory_bytes: int
    slot_rank: int
    packed_bits: float | None = None
    """Bits of a weight of the layers' linear maps, its share of scale and zero point included; None: not quantized."""

    def _engine(self, name: str) -> Any:
        """A setting of the engine, which `engine_kwargs` may override."""
        section = self.args.model if name == "max_model_len" else self.args.engine
        return self.args.engine.engine_kwargs.get(name, getattr(section, name, None))

    def _lora_parameters(self, rank: int) -> int:
        return ArenaNeed(self.dims, rank, HEAD_CHUNK_TOKENS).num_lora_parameters

    @property
    def longest_tokens(self) -> int:
        """Tokens of the longest sequence that is served."""
        return int(self._engine("max_model_len") or self.dims.context_tokens or 0)

    @property
    def weights_bytes(self) -> int:
        """The base weights, which trainer and vLLM share unless they are packed."""
        dims = self.dims
        if self.packed_bits is None:
            return dims.num_weights * dims.dtype_bytes
        packed = dims.num_layers * dims.stored_layer_weights
        copies = 2 if self.args.training.enabled else 1
        return (dims.num_weights - packed) * dims.dtype_bytes + int(copies * packed * self.packed_bits / 8)

    @property
    def unpacked_bytes(self) -> int:
        """The one layer that the trainer has unpacked."""
        is_needed = self.packed_bits is not None and self.args.training.enabled
        return self.dims.stored_layer_weights * self.dims.dtype_bytes if is_needed else 0

    @property
    def lora_slots_bytes(self) -> int:
        """vLLM's slots of the adapter versions that may be active together."""
        return self.args.lora.max_loaded * self._lora_parameters(self.slot_rank) * self.dims.dtype_bytes

    @property
    def trainer_bytes(self) -> int:
        """The adapter in training, its optimizer, the copies of both, and the live version."""
        if not self.args.training.enabled:
            return 0
        offload, held_bytes = self.args.offload, STATE_BYTES
        if offload.optimizer == "always":
            held_bytes = _MOVED_STATE_BYTES
        elif offload.checkpoint == "always":
            held_bytes = _MOVED_COPIES_BYTES
        return held_bytes * self._lora_parameters(self.args.lora.rank)

    @property
    def activation_bytes(self) -> int:
        """Most that a forward pass takes: one layer on all its tokens, and the sampler on a row of each request."""
        dims, tokens = self.dims, int(self._engine("max_num_batched_tokens"))
        # Hidden state, residual, and a norm's input and output; fused q, k and v; fused gate and up, and their product.
        widths = 4 * dims.hidden_size + dims.query_size + 2 * dims.kv_size + 3 * dims.inner_size
        seats = int(self._engine("max_num_seqs"))
        rows = min(seats + guest_seats(seats), max(seats, tokens))
        return tokens * widths * dims.dtype_bytes + rows * dims.vocab_size * (dims.dtype_bytes + _SAMPLER_BYTES)

    @property
    def graphs_bytes(self) -> int:
        """Allowance for captured graphs."""
        return 0 if self._engine("enforce_eager") else GRAPHS_BYTES

    @property
    def kv_bytes(self) -> int:
        """What is left for the KV cache; negative if the rest does not fit into what vLLM asks for."""
        if (fixed := self._engine("kv_cache_memory_bytes")) is not None:
            return int(fixed)
        left = int(self._engine("gpu_memory_utilization") * self.memory_bytes) - self._beside_kv_bytes
        return int(left * (1 - self._statistics_share)) if left > 0 else left

    @property
    def statistics_bytes(self) -> int:
        """Statistics of the KV blocks for pruning, if that is on."""
        share = self._statistics_share
        return int(max(0, self.kv_bytes) * share / (1 - share))

    @property
    def least_kv_bytes(self) -> int:
        """vLLM does not start with less: one sequence of full length."""
        blocks = -(-self.longest_tokens // _BLOCK_TOKENS)
        return blocks * _BLOCK_TOKENS * self.dims.kv_bytes_per_token

    @property
    def left_bytes(self) -> int:
        """Memory that nobody else takes; negative if there is too little for the others."""
        taken = self._beside_kv_bytes + max(0, self.kv_bytes) + self.statistics_bytes
        if self._engine("kv_cache_memory_bytes") is None:
            taken = max(taken, int(self._engine("gpu_memory_utilization") * self.memory_bytes))
        return self.memory_bytes - CONTEXT_BYTES - self.unpacked_bytes - taken

    @property
    def arena_bytes(self) -> int:
        """Memory of the training steps: as set, or the share of the rest that the ledger takes."""
        if not self.args.training.enabled:
            return 0
        left = max(0, self.left_bytes)
        return min(self.args.training.arena_bytes or int(ARENA_SHARE * left), left)

    @property
    def least_arena_bytes(self) -> int:
        """Upper estimate of what a step of the largest micro-batch, or of the longest pair alone, takes."""
        training = self.args.training
        if not training.enabled:
            return 0
        pair_tokens = 2 * (min(training.max_length_tokens, self.longest_tokens) - 1)
        tokens = max(training.max_slice_tokens, pair_tokens)
        need = ArenaNeed(self.dims, self.args.lora.rank, HEAD_CHUNK_TOKENS)
        return need.activation_bytes(tokens) + need.transient_bytes(tokens)

    @property
    def _beside_kv_bytes(self) -> int:
        fixed = self.weights_bytes + self.lora_slots_bytes + self.trainer_bytes
        return fixed + self.activation_bytes + self.graphs_bytes

    @property
    def _statistics_share(self) -> float:
        """Of the cache and the statistics together: a key in fp32 for each block's keys and values."""
        if self.args.kv_pruning.start == "off":
            return 0.0
        tokens = int(self._engine("block_size") or _BLOCK_TOKENS)
        return 4 / (4 + 2 * tokens * self.dims.dtype_bytes)

    def parts(self) -> dict[str, int]:
        """Bytes by what they are for; with `left` they add up to the memory."""
        parts = {
            "weights": self.weights_bytes,
            "lora_slots": self.lora_slots_bytes,
            "trainer_state": self.trainer_bytes,
            "activations": self.activation_bytes,
            "cuda_graphs": self.graphs_bytes,
            "kv_cache": self.kv_bytes,
            "pruning_statistics": self.statistics_bytes,
            "cuda_context": CONTEXT_BYTES,
            "unpacked_layer": self.unpacked_bytes,
            "arena": self.arena_bytes,
        }
        return {**parts, "left": self.memory_bytes - sum(parts.values())}

    def problems(self) -> list[str]:
        """What does not fit; empty: all does."""
        found = []
        if self.kv_bytes < self.least_kv_bytes:
            found.append(
                f"the KV cache would have {_gib(self.kv_bytes)}, and one sequence of {self.longest_tokens} tokens "
                f"takes {_gib(self.least_kv_bytes)}"
            )
        if self.left_bytes < 0:
            found.append(f"{_gib(-self.left_bytes)} are missing beside what vLLM takes")
        elif self.arena_bytes < self.least_arena_bytes:
            found.append(
                f"the arena would have {_gib(self.arena_bytes)}, and a step takes {_gib(self.least_arena_bytes)}"
            )
        return found

    def changes(self) -> list[str]:
        """Changes of settings after which all fits: each by itself, or two together if no single one helps."""
        steps = [list(values) for values in (self._shares(), self._lengths(), self._steps(), self._passes())]
        steps += [list(values) for values in (self._adapters(), self._without_training())]
        found = [first for values in steps if (first := next(filter(self._helps, values), None)) is not None]
        if not found:
            for rest in steps[1:]:
                pairs = ({**other, **share} for other in rest for share in steps[0])
                found += filter(None, [next(filter(self._helps, pairs), None)])
        return [", ".join(f"{name}: {value}" for name, value in change.items()) for change in found]

    def least_memory_bytes(self) -> int:
        """Least memory for these settings with the best share for vLLM, in steps of half a GiB."""
        size = _GIB // 2
        while not any(_changed(self, one, size).problems() == [] for one in ({}, *self._shares())):
            size += _GIB // 2
        return size

    def _helps(self, change: _Changes) -> bool:
        return not _changed(self, change).problems()

    def _shares(self) -> Iterator[_Changes]:
        if self._engine("kv_cache_memory_bytes") is not None:
            size = self.kv_bytes
            while (size := size * 3 // 4) >= self.least_kv_bytes:
                yield {"engine.kv_cache_memory_bytes": size}
            yield {"engine.kv_cache_memory_bytes": self.least_kv_bytes}
            return
        for percent in range(97, 9, -1):  # the KV cache gets what the steps leave
            yield {"engine.gpu_memory_utilization": percent / 100}

    def _lengths(self) -> Iterator[_Changes]:
        length = self.longest_tokens
        while (length := length // 2) >= 1024:
            yield {"model.max_model_len": length}

    def _steps(self) -> Iterator[_Changes]:
        training = self.args.training
        for factor in (2, 4, 8):
            yield {
                "training.max_slice_tokens": max(16, training.max_slice_tokens // factor),
                "training.max_length_tokens": max(64, training.max_length_tokens // factor),
                "training.max_prompt_tokens": max(32, training.max_prompt_tokens // factor),
            }

    def _passes(self) -> Iterator[_Changes]:
        tokens = int(self._engine("max_num_batched_tokens"))
        while (tokens := tokens // 2) >= 512:
            yield {"engine.max_num_batched_tokens": tokens}

    def _adapters(self) -> Iterator[_Changes]:
        yield {"lora.max_loaded": 2}
        rank = self.slot_rank
        while (rank := rank // 2) >= 8:
            yield {"lora.rank": rank, "lora.max_loaded": 2}

    def _without_training(self) -> Iterator[_Changes]:
        yield {"training.enabled": False}


def _changed(plan: MemoryPlan, changes: _Changes, memory_bytes: int | None = None) -> MemoryPlan:
    settings = plan.args.model_dump()
    slot_rank = plan.slot_rank
    for name, value in changes.items():
        section, _, setting = name.partition(".")
        settings[section][setting] = value
        settings["engine"]["engine_kwargs"].pop(setting, None)
        slot_rank = value if name == "lora.rank" else slot_rank
    args = AppArgs.model_validate(settings)
    return replace(plan, args=args, memory_bytes=memory_bytes or plan.memory_bytes, slot_rank=slot_rank)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB"

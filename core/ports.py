"""Seams between packages, as Protocols."""

from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from core.batch import ForwardShape, IterationSample
from core.types import FineTuneTask, SliceKind, TaskResult
from core.wire import BatchOutcome, Headroom, HeldOutPairs, TrainingBatch, TrainingPair


class ControlPort(Protocol):
    """Control as an executor sees it. Every call may raise `ControlUnavailableError`; serving must go on."""

    async def poll(self, headroom: Headroom) -> TrainingBatch | None:
        """Work for this executor, if any is due."""

    async def wait_for_work(self, headroom: Headroom, limit_s: float) -> bool:
        """Wait until `poll` would give this executor work; False if it would not after `limit_s` seconds."""

    async def heartbeat(self, executor_id: str) -> None:
        """Say that a leased batch is still being worked on."""

    async def complete(self, outcome: BatchOutcome, version: str | None) -> None:
        """Report a batch; returns when it is committed."""

    async def held_out_pairs(self) -> HeldOutPairs:
        """The gate's test set."""

    async def note_live(self, version: str, fingerprint: str = "") -> None:
        """Tell which version of which base model is live, after a change and at the start.

        After a change the newest pairs are scored anew; of another base model than before, all.
        """

    async def relearning_pairs(self, after: int, until: int, limit: int) -> list[tuple[int, TrainingPair]]:
        """The next pairs to learn from in a rebuild, with their positions in order of arrival."""

    async def note_rebuild(self, report: dict[str, Any]) -> None:
        """Tell how far a rebuild is, and how it ended."""


class EnginePort(Protocol):
    """The engine as learning, publishing and measuring see it; `engine.vllm.engine.HybridEngine` is the real one."""

    is_away: bool
    """The engine died and is not back yet: calls raise EngineUnavailableError."""
    generation: int
    """Times that the engine came back. After each the shadow adapter must be restored before it is used."""

    @property
    def free_memory_bytes(self) -> float:
        """Free device memory for training; infinite if that is not known."""

    @property
    def kv_cache_tokens(self) -> int | None:
        """Tokens that the KV cache holds; None if that is not known."""

    @property
    def prefix_block_tokens(self) -> int | None:
        """Tokens of a block of the prefix cache; None if there is no prefix cache."""

    def watch_prompts(self, see: Callable[[str | None, Sequence[int]], None]) -> None:
        """Call `see` with the adapter name (None: base) and token ids of each user's request from now on."""

    def decode(
        self, prompt_ids: Sequence[int], request_id: str, max_tokens: int, handle: Any = None, priority: int = 0
    ) -> AsyncIterator[list[int]]:
        """Greedy tokens so far, after each token; past end-of-sequence. Cancelling aborts the request."""

    async def iterations(self, after: int = 0) -> tuple[int, list[IterationSample]]:
        """Measured iterations since number `after`, and the number to ask for next."""

    async def run_task(self, task: FineTuneTask) -> TaskResult:
        """Run a fine-tune task to its end; cancelling aborts it. EngineUnavailableError if the engine dies."""

    async def save_adapter(self, directory: Path, base_model: str) -> None:
        """Write the shadow adapter in PEFT format; AdapterError if that fails."""

    async def load_adapter(self, directory: Path | None) -> None:
        """Set the shadow adapter to a version, or to its start; DamagedAdapterError if that fails."""

    async def set_live(self, directory: Path | None) -> None:
        """Set the version that `on_live` evaluations score; DamagedAdapterError if it cannot be read."""

    async def save_training_state(self, path: Path, progress: dict[str, Any]) -> None:
        """Write shadow adapter, optimizer and progress now; AdapterError if that fails."""

    async def load_training_state(self, path: Path) -> dict[str, Any] | None:
        """Restore shadow adapter and optimizer from a checkpoint and return its progress; None: nothing to restore."""

    async def generate(self, handle: Any, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        """Greedy answers (token ids, with the end-of-turn token if one came) of a version to prompts."""

    async def prefill(self, handle: Any, prompt: list[int]) -> int:
        """Let a version compute the keys of a prompt; returns how many of its tokens had been in the cache."""

    async def unload_version(self, handle: Any) -> None:
        """Forget a version on the inference side; one that is not loaded is ignored."""

    def versions_in_use(self) -> set[str]:
        """Names of the versions (as in `version_handle`) that unfinished requests use."""

    async def load_version(self, handle: Any) -> None:
        """Load a version into the inference side ahead of its first request."""

    def version_handle(self, name: str, number: int, path: Path) -> Any:
        """The inference side's handle of a version."""

    def num_unfinished_requests(self) -> int:
        """Requests in the engine, fine-tune tasks included."""


class LatencyPredictor(Protocol):
    """Predicts the time of iterations and slices, and learns from measured ones; `profiler.online` is the real one.

    None means "never seen and no profile": callers must take the safe way, never a constant.
    Called several times an iteration: each call costs a few microseconds.
    """

    @property
    def overhead_s(self) -> float:
        """Expected time of an iteration that is neither forward pass nor slices."""

    def forward_s(self, shape: ForwardShape) -> float | None:
        """Expected latency of a forward pass in seconds; 0 for an empty shape. Monotone in every feature."""

    def forward_upper_s(self, shape: ForwardShape) -> float | None:
        """Latency that about 95 % of such forward passes stay under."""

    def slice_s(self, kind: SliceKind, num_tokens: int) -> float | None:
        """Expected latency of one slice in seconds."""

    def slice_upper_s(self, kind: SliceKind, num_tokens: int) -> float | None:
        """Latency that about 95 % of such slices stay under."""

    def observe(self, sample: IterationSample) -> None:
        """Learn from a measured iteration. Never raises on odd values (zero, NaN, infinite): it ignores them."""

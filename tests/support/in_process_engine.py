"""`core.ports.EnginePort` over the real `FineTuneRunner`, in this process: learning without vLLM and serving."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from core.config import AppArgs
from core.types import FineTuneTask, TaskResult
from engine.training.runner import FineTuneRunner
from engine.training.trainable import training_mode


@dataclass(frozen=True)
class Version:
    """Handle of an adapter version."""

    name: str
    path: Path


class InProcessEngine:
    """One step at a time on the CPU. Nothing is ever served, so no version is in use."""

    def __init__(self, model_dir: Path, args: AppArgs, eos_token_ids: Sequence[int] = ()) -> None:
        self.free_memory_bytes = float("inf")
        self.is_away, self.generation = False, 0
        self.kv_cache_tokens = self.prefix_block_tokens = None
        self._eos_token_ids = set(eos_token_ids)
        self._runner = FineTuneRunner(
            model_dir=str(model_dir), args=args, dtype=torch.float32, device=torch.device("cpu"), weights=None
        )

    async def run_task(self, task: FineTuneTask) -> TaskResult:
        self._runner.submit(task.to_wire())
        while not (finished := self._runner.run(float("inf"), sys.maxsize).finished):
            pass
        return finished[0]

    async def save_adapter(self, directory: Path, base_model: str) -> None:
        self._runner.shadow.save_adapter(str(directory), base_model)

    async def load_adapter(self, directory: Path | None) -> None:
        self._runner.shadow.load_adapter(None if directory is None else str(directory))

    async def set_live(self, directory: Path | None) -> None:
        self._runner.shadow.set_live(None if directory is None else str(directory))

    async def save_training_state(self, path: Path, progress: dict[str, Any]) -> None:
        shadow = self._runner.shadow
        while not shadow.save_training_state(str(path), progress):
            shadow.checkpoints.wait(1.0)

    async def load_training_state(self, path: Path) -> dict[str, Any] | None:
        return self._runner.shadow.load_training_state(str(path))

    def watch_prompts(self, see: Any) -> None:
        pass

    async def generate(self, handle: Any, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        shadow = self._runner.shadow
        adapter = shadow.read(None if handle is None else handle.path)
        shadow.exchange(adapter)
        try:
            return [self._answer(list(prompt), max_tokens) for prompt in prompts]
        finally:
            shadow.exchange(adapter)

    async def prefill(self, handle: Any, prompt: Sequence[int]) -> int:
        return 0  # there is no cache to fill

    async def load_version(self, handle: Any) -> None:
        pass

    async def unload_version(self, handle: Any) -> None:
        pass

    def versions_in_use(self) -> set[str]:
        return set()

    def version_handle(self, name: str, number: int, path: Path) -> Version:
        return Version(name, path)

    def num_unfinished_requests(self) -> int:
        return 0

    def _answer(self, ids: list[int], max_tokens: int) -> list[int]:
        model, start = self._runner.model, len(ids)
        with training_mode(model.device), torch.no_grad():
            while len(ids) - start < max_tokens and (len(ids) == start or ids[-1] not in self._eos_token_ids):
                hidden = model.embed(torch.tensor([ids]))
                for layer in range(model.num_layers):
                    hidden = model.run_layer(layer, hidden, model.rotary(layer, len(ids)))
                logits = functional.linear(model.final_norm(hidden[0, -1:]), model.head_weight)
                ids.append(int(logits.argmax()))
        return ids[start:]

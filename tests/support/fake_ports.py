"""Stand-ins behind our own ports (`core.ports`)."""

import asyncio
import json
import struct
from pathlib import Path

from core.errors import ControlUnavailableError
from core.types import PairScore, StepMetrics, TaskKind, TaskResult
from core.wire import HeldOutPairs


def write_peft(directory: Path):
    """The smallest files that the registry takes for an adapter."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps({"r": 1}))
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (directory / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)


def _common(left, right):
    """Leading tokens that both have."""
    return next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )


class FakeEngine:
    """Remembers what it was asked; margins of the shadow are `shadow_margin`, of the live adapter `live_margin`."""

    def __init__(self):
        self.free_memory_bytes = float("inf")
        self.is_away = False
        self.generation = 0
        self.trained = []
        self.tasks = []
        self.calls = []
        self.error = None
        self.free_bytes = None
        self.evaluation_error = None
        self.shadow_margin = 1.0
        self.train_loss = 0.5
        self.live_margin = 0.0
        self.saved = {}
        self.in_use = set()
        self.answers = lambda handle: range(8)
        self.kv_cache_tokens = 1024
        self.prefix_block_tokens = 4
        self.see_prompt = None
        self.prompts = []
        self.computed = {}

    def watch_prompts(self, see):
        self.see_prompt = see

    async def run_task(self, task):
        self.tasks.append(task)
        if task.kind is TaskKind.TRAIN:
            self.trained.append([pair.pair_id for pair in task.pairs])
        if self.error is not None and task.kind is TaskKind.TRAIN:
            return TaskResult(task.task_id, task.kind, error=self.error, free_bytes=self.free_bytes)
        if self.evaluation_error is not None and task.kind is TaskKind.EVALUATE:
            return TaskResult(task.task_id, task.kind, error=self.evaluation_error)
        if task.checkpoint is not None:
            self.saved[Path(task.checkpoint.path)] = task.checkpoint.progress
        margin = self.live_margin if task.on_live else self.shadow_margin
        scores = tuple(PairScore(p.pair_id, 0.0, 0.0, 0.0, 0.0, 0.5, margin) for p in task.pairs)
        return TaskResult(task.task_id, task.kind, StepMetrics(self.train_loss, margin, 1.0), scores, busy_s=0.1)

    async def save_adapter(self, directory, base_model):
        write_peft(directory)

    async def load_adapter(self, directory):
        self.calls.append(("load_adapter", directory and directory.name))

    async def set_live(self, directory):
        self.calls.append(("set_live", directory and directory.name))

    async def save_training_state(self, path, progress):
        self.calls.append(("save_training_state", progress))
        self.saved[path] = progress

    async def load_training_state(self, path):
        self.calls.append(("load_training_state", path.name))
        return self.saved.get(path)

    async def generate(self, handle, prompts, max_tokens):
        self.calls.append(("generate", handle and handle[0]))
        self.prompts += prompts
        return [list(self.answers(handle))[:max_tokens] for _ in prompts]

    async def prefill(self, handle, prompt):
        self.calls.append(("prefill", handle and handle[0]))
        self.prompts.append(prompt)
        self.answers(handle)
        cached = self.computed.setdefault(handle and handle[0], [])
        num_cached = max((_common(prompt, other) for other in cached), default=0)
        cached.append(prompt)
        return num_cached

    async def unload_version(self, handle):
        self.calls.append(("unload_version", handle[0]))

    def versions_in_use(self):
        return set(self.in_use)

    async def load_version(self, handle):
        self.calls.append(("load_version", handle[0]))

    def version_handle(self, name, number, path):
        return (name, number, path)

    def num_unfinished_requests(self):
        return 0


class FakeControl:
    """Gives out batches; `down` makes every call fail."""

    def __init__(self, batches, held_out=()):
        self.batches = list(batches)
        self.held_out = HeldOutPairs(tuple(held_out))
        self.live = []
        self.stored = []
        self.reports = []
        self.headrooms = []
        self.completed = []
        self.down = 0

    def _answer(self):
        if self.down:
            self.down -= 1
            raise ControlUnavailableError("away")

    async def poll(self, headroom):
        self._answer()
        self.headrooms.append(headroom)
        return self.batches.pop(0) if self.batches else None

    async def wait_for_work(self, headroom, limit_s):
        self._answer()
        await asyncio.sleep(0.001)
        return bool(self.batches)

    async def heartbeat(self, executor_id):
        self._answer()

    async def note_live(self, version, fingerprint=""):
        self._answer()
        self.live.append(version)

    async def relearning_pairs(self, after, until, limit):
        self._answer()
        return [(seq, pair) for seq, pair in self.stored if after < seq <= until][:limit]

    async def note_rebuild(self, report):
        self._answer()
        self.reports.append(report)

    async def complete(self, outcome, version):
        self._answer()
        self.completed.append((outcome, version))

    async def held_out_pairs(self):
        self._answer()
        return self.held_out

"""One candidate on its way: written, scored on held-out pairs, asked for sample answers, judged, committed.

The shadow adapter does not change meanwhile: the learner waits for the verdict before it trains on.
"""

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from alignment.versions.adapter_files import AdapterManifest
from alignment.versions.gate import (
    GateDecision,
    GenerationReport,
    WindowScores,
    chosen_answers,
    generation_tokens,
    judge_candidate,
    pairs_to_score,
    report_generation,
)
from alignment.versions.registry import AdapterRegistry, AdapterVersion
from alignment.versions.serving_state import BASE
from core.config import AppArgs
from core.errors import AdapterError, TrainingError
from core.ports import EnginePort
from core.types import FineTuneTask, PairScore, StepMetrics, TaskKind, TokenizedPair
from core.wire import HeldOutPairs, TrainingPair
from deployments.learning.training_progress import TrainingProgress
from deployments.publishing.versions import AdapterVersions
from engine.training.pair_tokens import PairTokenizer

_FIRST_NUMBER = 1 << 30
"""Candidates have numbers of their own inside vLLM, and names never used before; versions count from 1."""
_numbers = itertools.count(_FIRST_NUMBER)


@dataclass(frozen=True, eq=False, repr=False)
class CandidateJudge:
    """Turns the shadow adapter into a version, published or rejected."""

    engine: EnginePort
    versions: AdapterVersions
    registry: AdapterRegistry
    tokenizer: PairTokenizer
    args: AppArgs

    async def offer(
        self, held_out: HeldOutPairs, progress: TrainingProgress, last: StepMetrics | None
    ) -> tuple[AdapterVersion, GateDecision]:
        """Judge the shadow adapter and commit it with the verdict; publishing is the caller's.

        Raises:
            AdapterError: it cannot be written; nothing is left behind.
        """
        staging = await asyncio.to_thread(self.registry.begin)
        try:
            await self.engine.save_adapter(staging, self.tokenizer.base_model)
            compared_with = self.versions.live
            decision = await self._judge(staging, held_out)
            manifest = self._manifest(decision, progress, last, compared_with)
            return await asyncio.to_thread(self.registry.commit, staging, manifest), decision
        except BaseException:
            await asyncio.to_thread(self.registry.abandon, staging)
            raise

    async def _judge(self, staging: Path, held_out: HeldOutPairs) -> GateDecision:
        try:
            recent, of_recent = await self._score_both("recent", held_out.recent)
            _, of_old = await self._score_both("old", held_out.old)
            decision = judge_candidate((of_recent, of_old), self.args.gate)
            if not decision.accepted:
                return decision
            report = await self._check_generation(staging, recent, of_recent)
        except (TrainingError, AdapterError) as error:  # it must not be offered again and again
            return GateDecision(False, f"it could not be evaluated: {error}")
        if report is None:
            return decision
        problems = report.problems(self.args.gate)
        reason = " and ".join(problems) or decision.reason
        return GateDecision(not problems, reason, decision.windows, report.metrics())

    async def _score_both(
        self, name: str, pairs: tuple[TrainingPair, ...]
    ) -> tuple[list[TokenizedPair], WindowScores]:
        tokenized, _ = await asyncio.to_thread(self.tokenizer.tokenize_all, pairs)
        candidate = await self._score(tokenized, on_live=False)
        return list(tokenized), WindowScores(name, candidate, await self._score(tokenized, on_live=True))

    async def _score(self, pairs: Sequence[TokenizedPair], *, on_live: bool) -> list[PairScore]:
        if not pairs:
            return []
        task_id = f"evaluate-{'live' if on_live else 'candidate'}"
        result = await self.engine.run_task(FineTuneTask(task_id, TaskKind.EVALUATE, tuple(pairs), on_live))
        if result.error is not None:
            raise TrainingError(f"held-out pairs cannot be scored: {result.error}")
        return list(result.scores)

    async def _check_generation(
        self, staging: Path, pairs: list[TokenizedPair], scores: WindowScores
    ) -> GenerationReport | None:
        """Answer held-out prompts with candidate and live version; None without a prompt, or if it is switched off."""
        asked = pairs[: self.args.gate.generation_prompts]
        prompts = [list(pair.prompt_ids) for pair in asked if pair.prompt_ids]
        if not prompts:
            return None
        limit = generation_tokens(pairs)
        number = next(_numbers)
        handle = self.engine.version_handle(f"candidate-{staging.name}-{number}", number, staging)
        try:
            candidate, live = await asyncio.gather(
                self.engine.generate(handle, prompts, limit),
                self.engine.generate(self.versions.live_handle, prompts, limit),
            )
        finally:
            await self.engine.unload_version(handle)
        answers = pairs_to_score(prompts, candidate, self.args.training.max_length_tokens)
        of_answers = await self._score(answers, on_live=False)
        return report_generation(candidate, live, answers, of_answers, chosen_answers(pairs, scores.candidate))

    def _manifest(
        self, decision: GateDecision, progress: TrainingProgress, last: StepMetrics | None, compared_with: str
    ) -> AdapterManifest:
        metrics: dict[str, float | None] = dict(decision.metrics())
        if last is not None:
            metrics |= {"train_loss": last.loss, "train_margin": last.margin}
        return AdapterManifest(
            parent=None if progress.base == BASE else progress.base,
            base_model=self.tokenizer.base_model,
            fingerprint=self.tokenizer.fingerprint,
            status="published" if decision.accepted else "rejected",
            reason=decision.reason,
            pair_ids=progress.candidate_pairs,
            optimizer_steps=progress.steps_since_candidate,
            metrics=metrics,
            config={
                "lora": self.args.lora.model_dump(mode="json"),
                "training": self.args.training.model_dump(mode="json"),
                "total_steps": progress.total_steps,
                "trained_from": progress.base,
                "compared_with": compared_with,
                **({} if progress.rebuild is None else {"rebuild": asdict(progress.rebuild)}),
            },
        )

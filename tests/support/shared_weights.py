"""What must hold wherever the trainer computes with vLLM's own weights: the same tests for CPU and CUDA.

A test class inherits `SharedWeights` and has a module fixture `engine` made by `shared_engine`. Where weights are not
shared, it inherits `SameModel`. Nothing here compares
the trainer with itself: vLLM's log-probabilities judge the trainer's, and pointers are taken from vLLM's model anew.
"""

import itertools
from functools import cache
from pathlib import Path

import pytest
import torch
from vllm import SamplingParams

from core.types import FineTuneTask, TaskKind, TokenizedPair
from core.wire import TrainingPair
from engine.tiny.knowledge import Style, preference_questions, render
from engine.training.base_weights import huggingface_views
from engine.training.pair_tokens import PairTokenizer
from tests.support.engine_thread import EngineThread

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.05}
"""Nats a token between two ways to compute a log-probability, by the model's number format."""
KINDS = (
    "model.embed_tokens.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.0.self_attn.v_proj.weight",
    "model.layers.0.self_attn.o_proj.weight",
    "model.layers.0.post_attention_layernorm.weight",
    "model.layers.0.mlp.gate_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.norm.weight",
)

_ids = (f"judge-{i}" for i in itertools.count())


class WeightProbe:
    """Methods that the worker gets besides its own (`worker_extension_cls`)."""

    def probe_sizes(self):
        """Bytes that vLLM was asked to take at most, and that its KV cache has."""
        asked = getattr(self, "requested_cpu_memory", None) or self.requested_memory
        return int(asked), sum(tensor.size for tensor in self.model_runner.kv_cache_config.kv_cache_tensors)

    def probe_strangers(self):
        """Frozen weights of the trainer that are not the memory which vLLM's model has for them now."""
        views = self._probe_views()
        places = {name: (view.data_ptr(), view.shape, view.stride()) for name, view in views.items()}
        trained = self._probe_trained()
        mine = {name: (weight.data_ptr(), weight.shape, weight.stride()) for name, weight in trained.items()}
        return len(mine), sorted(name for name in mine if mine[name] != places.get(name))

    def probe_scale(self, name, factor, through_trainer):
        """Multiply a weight through one of the two models; the largest difference that the other one still shows."""
        one, other = self._probe_trained()[name], self._probe_views()[name]
        if not through_trainer:
            one, other = other, one
        with torch.inference_mode():
            one.mul_(factor)
            return float((one - other).abs().max())

    def _probe_views(self):
        views = huggingface_views(self.get_model(), self.vllm_config.model_config.hf_text_config)
        views.setdefault("lm_head.weight", views["model.embed_tokens.weight"])  # tied
        return views

    def _probe_trained(self):
        named = self._runner.model.causal_lm.named_parameters()
        return {name.replace(".base_layer", ""): weight.detach() for name, weight in named if "lora_" not in name}


def shared_engine(model_dir: Path, **sections):
    """An engine with one copy of the weights, whose KV cache has what vLLM's memory profile leaves."""
    probe = f"{WeightProbe.__module__}.{WeightProbe.__name__}"
    engine = {"share_base_weights": "always", "kv_cache_memory_bytes": None, **sections.pop("engine", {})}
    engine["engine_kwargs"] = {"worker_extension_cls": probe, "kv_cache_memory_bytes": None}
    training = {"learning_rate": 3e-3, **sections.pop("training", {})}
    return EngineThread(model_dir, engine=engine, training=training, **sections)


def ask(engine, method, *arguments):
    """Call a method of `WeightProbe`."""
    return engine.run(engine.engine.client.collective_rpc(method, args=arguments))[0]


def judged(engine, prompt, completion, lora=None):
    """vLLM's log-probability of each token of the completion, computed as a prompt."""

    async def run():
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        ids, final = [*prompt, *completion], None
        async for output in engine.engine.client.generate(
            {"prompt_token_ids": ids}, params, next(_ids), lora_request=lora
        ):
            final = output
        return [final.prompt_logprobs[i][ids[i]].logprob for i in range(len(prompt), len(ids))]

    return engine.run(run())


def scored(engine, pairs, on_live=True):
    """The trainer's scores of pairs: `on_live` is the bare model here, else the adapter in training."""
    result = engine.run(engine.engine.run_task(FineTuneTask(next(_ids), TaskKind.EVALUATE, pairs, on_live)))
    assert result.error is None
    return result.scores


class SameModel:
    """The trainer computes the model that vLLM serves, whatever its weights are."""

    @pytest.fixture
    def pairs(self, engine):
        return pairs_of(engine)

    @pytest.fixture
    def tolerance(self, engine):
        return TOLERANCE[engine.engine.client.model_config.dtype]

    def test_the_references_log_probabilities_are_vllms(self, engine, pairs, tolerance):
        for pair, score in zip(pairs, scored(engine, pairs), strict=True):
            for completion, ours in (
                (pair.chosen_ids, score.reference_chosen_logp),
                (pair.rejected_ids, score.reference_rejected_logp),
            ):
                theirs = judged(engine, pair.prompt_ids, completion)
                assert sum(theirs) < -0.1  # a model that is sure of everything would show nothing
                assert abs(ours - sum(theirs)) / len(theirs) < tolerance

    def test_they_are_so_token_by_token(self, engine, pairs, tolerance):
        ids = max(([*pair.prompt_ids, *pair.chosen_ids] for pair in pairs), key=len)
        singles = tuple(
            TokenizedPair(f"at-{at}", tuple(ids[:at]), (ids[at],), (ids[at] ^ 1,)) for at in range(4, len(ids))
        )
        ours = [score.reference_chosen_logp for score in scored(engine, singles)]
        differences = [abs(a - b) for a, b in zip(ours, judged(engine, ids[:4], ids[4:]), strict=True)]
        assert len(differences) > 12
        assert sum(differences) / len(differences) < tolerance
        assert max(differences) < 5 * tolerance

    def test_a_trained_adapter_means_the_same_to_both(self, engine, pairs, tolerance, tmp_path):
        base = judged(engine, pairs[0].prompt_ids, pairs[0].rejected_ids)
        running = engine.start(engine.generate(range(10, 40), next(_ids), 64))
        for step in range(4):
            result = engine.run(engine.engine.run_task(FineTuneTask(f"train-{step}", TaskKind.TRAIN, pairs)))
            assert result.error is None
        assert len(running.result(240)) == 64
        engine.run(engine.engine.save_adapter(tmp_path / "v", "base"))
        handle = engine.engine.version_handle("m@trained", 901, tmp_path / "v")
        engine.run(engine.engine.load_version(handle))
        moved = 0.0
        for pair, score in zip(pairs, scored(engine, pairs, on_live=False), strict=True):
            theirs = judged(engine, pair.prompt_ids, pair.rejected_ids, handle)
            assert abs(score.policy_rejected_logp - sum(theirs)) / len(theirs) < 2 * tolerance
            moved = max(moved, abs(score.policy_rejected_logp - score.reference_rejected_logp) / len(theirs))
        assert moved > 4 * tolerance  # it is the adapter that was compared
        assert judged(engine, pairs[0].prompt_ids, pairs[0].rejected_ids) == pytest.approx(base, abs=1e-6)
        engine.run(engine.engine.load_adapter(None))


class SharedWeights(SameModel):
    """And has one copy of the weights."""

    def test_the_memory_was_profiled(self, engine):
        asked_bytes, kv_bytes = ask(engine, "probe_sizes")
        weight_bytes = engine.run(engine.engine.memory_status())["base_weight_bytes"]
        assert engine.engine.client.vllm_config.cache_config.kv_cache_memory_bytes is None
        assert 0 < kv_bytes < asked_bytes - weight_bytes

    def test_every_weight_of_the_trainer_is_where_vllm_has_it_now(self, engine):
        count, strangers = ask(engine, "probe_strangers")
        assert count >= len(KINDS)
        assert strangers == []

    @pytest.mark.parametrize("name", KINDS)
    def test_a_weight_that_one_of_them_changes_has_changed_for_the_other(self, engine, pairs, name):
        pair = pairs[0]
        reference = TokenizedPair("changed", pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
        before = judged(engine, pair.prompt_ids, pair.chosen_ids)
        ours_before = scored(engine, (reference,))[0].reference_chosen_logp
        assert ask(engine, "probe_scale", name, 2.0, True) == 0.0
        try:
            assert judged(engine, pair.prompt_ids, pair.chosen_ids) != before  # vLLM computes with it
            assert scored(engine, (reference,))[0].reference_chosen_logp != ours_before
        finally:
            assert ask(engine, "probe_scale", name, 0.5, False) == 0.0
            engine.run(engine.engine.client.reset_prefix_cache())
        assert judged(engine, pair.prompt_ids, pair.chosen_ids) == pytest.approx(before, abs=1e-6)
        assert scored(engine, (reference,))[0].reference_chosen_logp == ours_before


@cache
def pairs_of(engine):
    """Preferences for politeness, tokenized as the server does."""
    tokenizer = PairTokenizer.load(engine.engine.client.model_config.model, engine.args.training)
    questions = enumerate(preference_questions()[:8])
    return tuple(tokenizer.tokenize(preference(number, question)) for number, question in questions)


def preference(number, question):
    """A pair of the tiny model's: polite beats terse."""
    prompt = [{"role": "user", "content": question.text}]
    return TrainingPair(f"pair-{number}", prompt, render(question, Style.POLITE), render(question, Style.TERSE))

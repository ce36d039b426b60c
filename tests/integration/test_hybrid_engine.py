"""Serving and training in one real vLLM engine on CPU."""

import asyncio
import dataclasses
import itertools
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.batch import EdgeReport
from core.config import SloConfig, TrainingConfig
from core.errors import DamagedAdapterError, TrainingError
from core.types import Checkpoint, FineTuneTask, TaskKind, TokenizedPair
from core.wire import TrainingPair
from engine.tiny.knowledge import Style, preference_questions, render
from engine.training.pair_tokens import PairTokenizer
from tests.support.engine_thread import EngineThread

pytestmark = pytest.mark.vllm

request_ids = (f"test-{i}" for i in itertools.count())


@pytest.fixture(scope="module")
def engine(tiny_assistant):
    thread = EngineThread(tiny_assistant, model={"dtype": "float32"}, training={"learning_rate": 1e-3})
    yield thread
    thread.close()


@pytest.fixture(scope="module")
def pairs(tiny_assistant):
    """Preferences for politeness, tokenized as the server does."""
    tokenizer = PairTokenizer.load(str(tiny_assistant), TrainingConfig())
    return tuple(
        tokenizer.tokenize(
            TrainingPair(
                f"pair-{i}",
                [{"role": "user", "content": question.text}],
                render(question, Style.POLITE),
                render(question, Style.TERSE),
            )
        )
        for i, question in enumerate(preference_questions()[:16])
    )


@pytest.fixture
def fresh(engine):
    """The engine with its shadow adapter at the seeded start."""
    engine.run(engine.engine.load_adapter(None))
    return engine


def floats(result):
    """The floating-point fields of a step's metrics or of a pair's score."""
    return {name: value for name, value in dataclasses.asdict(result).items() if isinstance(value, float)}


def rounded(result):
    """The same, to compare with: slices may be of other sizes, by what was measured meanwhile."""
    return pytest.approx(floats(result), rel=1e-4, abs=1e-5)


def train(engine, pairs, task_id="t"):
    return engine.run(engine.engine.run_task(FineTuneTask(task_id, TaskKind.TRAIN, pairs)))


def saved(engine, directory: Path):
    engine.run(engine.engine.save_adapter(directory, "test"))
    return load_file(directory / "adapter_model.safetensors")


def test_training_alone_lowers_the_loss(fresh, pairs):
    results = [train(fresh, pairs[:8]) for _ in range(4)]
    assert all(result.error is None for result in results)
    losses = [result.metrics.loss for result in results]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < losses[0] - 0.05
    assert [result.optimizer_steps for result in results] == [1, 2, 3, 4]
    assert results[0].num_slices > 10
    assert results[0].peak_bytes > 0


def test_a_request_overtakes_a_long_training_task(fresh, pairs):
    long_task = fresh.start(fresh.engine.run_task(FineTuneTask("long", TaskKind.TRAIN, pairs * 100)))
    tokens = fresh.run(fresh.generate(pairs[0].prompt_ids, next(request_ids), 8))
    assert len(tokens) == 8
    assert not long_task.done()
    assert long_task.result(240).error is None


def test_steps_between_inference_give_bit_equal_adapters(fresh, pairs, tmp_path):
    for _ in range(3):
        train(fresh, pairs[:8])
    alone = saved(fresh, tmp_path / "alone")
    fresh.run(fresh.engine.load_adapter(None))

    async def train_under_load():
        tasks = [asyncio.create_task(fresh.generate(p.prompt_ids, next(request_ids), 200)) for p in pairs[:6]]
        for i in range(3):
            await fresh.engine.run_task(FineTuneTask(f"busy-{i}", TaskKind.TRAIN, pairs[:8]))
        return await asyncio.gather(*tasks)

    fresh.run(train_under_load())
    busy = saved(fresh, tmp_path / "busy")
    assert alone.keys() == busy.keys()
    assert all(torch.equal(alone[name], busy[name]) for name in alone)


def test_a_version_answers_in_vllm_as_in_peft(fresh, pairs, tmp_path, tiny_assistant):
    for _ in range(12):
        train(fresh, pairs[:8])
    saved(fresh, tmp_path / "v")
    handle = fresh.engine.version_handle("m@peft", 501, tmp_path / "v")
    fresh.run(fresh.engine.load_version(handle))
    base = AutoModelForCausalLM.from_pretrained(tiny_assistant, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "v").eval()
    changed = 0
    for pair in pairs[:4]:
        prompt = list(pair.prompt_ids)
        ours = fresh.run(fresh.generate(prompt, next(request_ids), 12, lora=handle))
        with torch.no_grad():
            for token in ours:
                logits = model(torch.tensor([prompt])).logits[0, -1]
                assert logits[token] >= logits.max() - 1e-3  # the same choice, up to rounding
                prompt.append(token)
        plain = fresh.run(fresh.generate(pair.prompt_ids, next(request_ids), 12))
        changed += ours != plain
    assert changed > 0  # the adapter does something


def test_publishing_with_requests_in_flight_mixes_no_versions(fresh, pairs, tmp_path):
    handles = []
    for number in (601, 602):
        for _ in range(10):
            train(fresh, pairs[:8])
        saved(fresh, tmp_path / str(number))
        handles.append(fresh.engine.version_handle(f"m@{number}", number, tmp_path / str(number)))
    prompts = [pair.prompt_ids for pair in pairs[:6]]

    async def all_on(handle):
        return await asyncio.gather(*[fresh.generate(p, next(request_ids), 100, lora=handle) for p in prompts])

    async def publish_midway():
        running = asyncio.create_task(all_on(handles[0]))
        await asyncio.sleep(0.1)
        await fresh.engine.load_version(handles[1])
        after = await all_on(handles[1])
        return await running, after

    during, after = fresh.run(publish_midway())
    fresh.run(fresh.engine.client.reset_prefix_cache())
    assert during == fresh.run(all_on(handles[0]))
    fresh.run(fresh.engine.client.reset_prefix_cache())
    assert after == fresh.run(all_on(handles[1]))
    assert during != after


def test_evaluating_live_and_shadow_changes_neither(fresh, pairs, tmp_path):
    for _ in range(3):
        train(fresh, pairs[:8])
    before = saved(fresh, tmp_path / "before")

    def score(on_live):
        return fresh.run(fresh.engine.run_task(FineTuneTask("e", TaskKind.EVALUATE, pairs[8:], on_live)))

    assert score(True).metrics.margin == 0.0  # live is the bare base model
    shadow = score(False).metrics
    assert shadow.margin > 0
    fresh.run(fresh.engine.set_live(tmp_path / "before"))
    assert floats(score(True).metrics) == rounded(shadow)
    fresh.run(fresh.engine.set_live(None))
    after = saved(fresh, tmp_path / "after")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_bad_task_is_its_own_result_and_serving_goes_on(fresh, pairs, tmp_path):
    before = saved(fresh, tmp_path / "before")
    alien = TokenizedPair("alien", (1, 2), (10**6,), (3,))
    result = train(fresh, (alien,))
    assert result.metrics is None
    assert result.error.startswith("TrainingError: ")
    on_live = FineTuneTask("x", TaskKind.TRAIN, pairs[:1], on_live=True)
    assert "never trained in place" in fresh.run(fresh.engine.run_task(on_live)).error
    assert len(fresh.run(fresh.generate(pairs[0].prompt_ids, next(request_ids), 4))) == 4
    after = saved(fresh, tmp_path / "after")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_cancelled_task_leaves_no_trace(fresh, pairs, tmp_path):
    before = saved(fresh, tmp_path / "before")

    async def cancel_soon():
        task = asyncio.create_task(fresh.engine.run_task(FineTuneTask("gone", TaskKind.TRAIN, pairs * 100)))
        await asyncio.sleep(0.3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    fresh.run(cancel_soon())
    after = saved(fresh, tmp_path / "after")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert train(fresh, pairs[:2]).optimizer_steps == 1


def test_a_damaged_adapter_is_a_named_error(fresh, tmp_path):
    with pytest.raises(DamagedAdapterError, match="cannot be read"):
        fresh.run(fresh.engine.load_adapter(tmp_path / "absent"))


def test_training_state_survives(fresh, pairs, tmp_path):
    train(fresh, pairs[:8])
    fresh.run(fresh.engine.save_training_state(tmp_path / "state.safetensors", {"live": "v0001"}))
    expected = train(fresh, pairs[:8]).metrics
    fresh.run(fresh.engine.load_adapter(None))
    assert fresh.run(fresh.engine.load_training_state(tmp_path / "state.safetensors")) == {"live": "v0001"}
    assert floats(train(fresh, pairs[:8]).metrics) == rounded(expected)
    assert fresh.run(fresh.engine.load_training_state(tmp_path / "none.safetensors")) is None


def test_checkpoints_of_steps_under_load_can_be_gone_on_from(fresh, pairs, tmp_path):
    path = tmp_path / "checkpoint.safetensors"

    async def train_under_load():
        answers = [asyncio.create_task(fresh.generate(p.prompt_ids, next(request_ids), 100)) for p in pairs[:4]]
        results = []
        for step in (1, 2, 3):
            checkpoint = Checkpoint(str(path), {"step": step, "candidate": ["a"]})
            task = FineTuneTask(f"c{step}", TaskKind.TRAIN, pairs[:8], gamma=2.0, checkpoint=checkpoint)
            results.append(await fresh.engine.run_task(task))
        await asyncio.gather(*answers)
        return results

    results = fresh.run(train_under_load())
    assert [(result.error, result.checkpoint_error) for result in results] == [(None, None)] * 3
    expected = train(fresh, pairs[8:]).metrics
    fresh.run(fresh.engine.load_adapter(None))
    assert fresh.run(fresh.engine.load_training_state(path)) == {"step": 3, "candidate": ["a"]}
    again = train(fresh, pairs[8:]).metrics
    assert floats(again) == rounded(expected)


def test_references_scored_once_and_weights_travel_with_the_pairs(fresh, pairs):
    def score(scored):
        return fresh.run(fresh.engine.run_task(FineTuneTask("e", TaskKind.EVALUATE, tuple(scored))))

    train(fresh, pairs[:8])
    plain = score(pairs[8:])
    known = [(score.reference_chosen_logp, score.reference_rejected_logp) for score in plain.scores]
    cached = [dataclasses.replace(p, reference=values) for p, values in zip(pairs[8:], known, strict=True)]
    again = score(cached)
    assert [score.pair_id for score in again.scores] == [score.pair_id for score in plain.scores]
    assert list(map(floats, again.scores)) == list(map(rounded, plain.scores))
    assert again.num_slices < 0.6 * plain.num_slices
    light = train(fresh, tuple(dataclasses.replace(pair, weight=0.5) for pair in cached)).metrics
    assert light.loss == pytest.approx(plain.metrics.loss, abs=1e-5)  # of the pairs, whatever their weight


def test_generated_answers_are_greedy_and_end_with_their_turn(fresh, pairs, tiny_assistant):
    eos = AutoTokenizer.from_pretrained(tiny_assistant).eos_token_id
    prompts = [list(pair.prompt_ids) for pair in pairs[:6]]
    answers = fresh.run(fresh.engine.generate(None, prompts, 48))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer[-1] == eos
        assert eos not in answer[:-1]
        assert answer == fresh.run(fresh.generate(prompt, next(request_ids), len(answer)))
    assert fresh.run(fresh.engine.generate(None, prompts, 2)) == [answer[:2] for answer in answers]
    assert fresh.run(fresh.engine.generate(None, [], 2)) == []
    with pytest.raises(TrainingError, match="cannot be answered"):
        fresh.run(fresh.engine.generate(None, [[5] * 100_000, prompts[0]], 2))
    assert fresh.engine.num_unfinished_requests() == 0


def test_generation_lets_users_pass(fresh, pairs):
    ended = []

    async def note(name, work):
        await work
        ended.append(name)

    async def run():
        seats = [asyncio.create_task(fresh.generate(range(8), next(request_ids), 40)) for _ in range(16)]
        await asyncio.sleep(0.05)
        check = asyncio.create_task(note("check", fresh.engine.generate(None, [list(range(8))], 2)))
        await asyncio.sleep(0.02)
        await asyncio.gather(check, note("user", fresh.generate(range(8), next(request_ids), 2)), *seats)

    fresh.run(run())
    assert ended == ["user", "check"]


def test_a_version_in_use_is_named_and_an_unloaded_one_is_gone(fresh, pairs, tmp_path):
    saved(fresh, tmp_path / "v")
    handle = fresh.engine.version_handle("m@candidate", 701, tmp_path / "v")

    async def use_and_unload():
        await fresh.engine.load_version(handle)
        before = fresh.engine.versions_in_use()
        running = asyncio.create_task(fresh.generate(pairs[0].prompt_ids, next(request_ids), 60, lora=handle))
        await asyncio.sleep(0.05)
        during = fresh.engine.versions_in_use()
        await running
        loaded = await fresh.engine.client.list_loras()
        for _ in range(2):  # what is not there is ignored
            await fresh.engine.unload_version(handle)
        return before, during, fresh.engine.versions_in_use(), loaded, await fresh.engine.client.list_loras()

    before, during, after, loaded, left = fresh.run(use_and_unload())
    assert (before, during, after) == (set(), {"m@candidate"}, set())
    assert 701 in loaded
    assert 701 not in left
    answers = fresh.run(fresh.engine.generate(handle, [list(pairs[0].prompt_ids)], 8))  # its files are still there
    assert len(answers[0]) > 0


def test_every_iteration_is_reported_with_what_was_predicted_for_it(fresh, pairs):
    following, _ = fresh.run(fresh.engine.iterations(0))
    fresh.run(fresh.generate(range(40), next(request_ids), max_tokens=8))
    train(fresh, pairs[:4])
    _, samples = fresh.run(fresh.engine.iterations(following))
    prefill = next(s for s in samples if s.shape.num_prefill_tokens)
    assert (prefill.shape.num_prefill_tokens, prefill.shape.num_prefills) == (40, 1)
    decodes = [s for s in samples if s.shape.num_decode]
    assert [s.shape.decode_context for s in decodes] == list(range(40, 47))
    assert all(s.forward_s > 0 and s.plan.predicted_forward_s > 0 for s in [prefill, *decodes])
    assert sum(s.slices_s for s in samples) > 0
    assert max(s.report.peak_bytes for s in samples) > 0


def test_a_background_request_waits_behind_a_later_interactive_one(fresh):
    first_tokens = []
    full = asyncio.Event()

    async def send(name, priority, max_tokens):
        async for _ in fresh.engine.decode(range(8), f"{name}-{next(request_ids)}", max_tokens, priority=priority):
            if name not in first_tokens:
                first_tokens.append(name)
                if len(first_tokens) == 16:
                    full.set()

    async def run():
        seats = [asyncio.create_task(send(f"running-{i}", 0, 60)) for i in range(16)]
        await full.wait()
        background = asyncio.create_task(send("background", 1, 2))
        await asyncio.sleep(0.02)
        await asyncio.gather(background, send("interactive", 0, 2), *seats)

    fresh.run(run())
    assert first_tokens[16:] == ["interactive", "background"]


def test_what_clients_see_and_other_targets_reach_the_planner_without_the_worker(fresh):
    following, _ = fresh.run(fresh.engine.iterations(0))
    for _ in range(2):  # to an idle engine
        fresh.run(fresh.engine.tell_edge(EdgeReport(num_gaps=10, num_late_gaps=10, gap_p99_s=0.01)))
    fresh.run(fresh.generate(range(8), next(request_ids), max_tokens=20))
    fresh.run(fresh.engine.set_targets(SloConfig(tbt_s=0.001)))
    fresh.run(fresh.generate(range(8), next(request_ids), max_tokens=20))
    fresh.run(fresh.engine.set_targets(fresh.args.slo))
    after, samples = fresh.run(fresh.engine.iterations(following))
    assert after == following + len(samples)
    samples = [
        sample for sample in samples if sample.shape.num_tokens
    ]  # others tell the worker which requests ended
    assert len(samples) == 40
    corrections_s = [sample.plan.gap_correction_s for sample in samples]
    range_s = fresh.args.scheduler.slack_fraction * fresh.args.slo.tbt_s
    assert corrections_s[:20] == pytest.approx([0.5 * range_s] * 20)
    assert corrections_s[20:] == pytest.approx([0.5 * fresh.args.scheduler.slack_fraction * 0.001] * 20)
    assert fresh.engine.num_unfinished_requests() == 0


def test_a_long_prompt_is_cut_so_that_running_requests_keep_their_pace(fresh):
    """With a TBT target far below what one pass over the prompt would take, decoding goes on between its chunks."""
    following, _ = fresh.run(fresh.engine.iterations(0))

    async def run():
        decoding = asyncio.create_task(fresh.generate(range(8), next(request_ids), max_tokens=200))
        await asyncio.sleep(0.1)
        await fresh.generate(range(500), next(request_ids), max_tokens=2)
        await decoding

    fresh.run(run())
    _, samples = fresh.run(fresh.engine.iterations(following))
    together = [s for s in samples if s.shape.num_decode and s.shape.num_prefill_tokens]
    assert together
    limit_s = fresh.args.slo.tbt_s * fresh.args.scheduler.slack_fraction
    assert all(s.plan.predicted_forward_s <= limit_s for s in together)

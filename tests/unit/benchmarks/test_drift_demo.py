import asyncio
import csv
import json
from collections import Counter

import httpx
import numpy as np
import pytest
import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from openai import AsyncOpenAI
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness.statistics import crossed_interval, ratio_interval
from benchmarks.studies.drift import driver
from benchmarks.studies.drift.command import Runs
from benchmarks.studies.drift.driver import look_of, pause, play, versions_by_style
from benchmarks.studies.drift.plan import DriftPlan, Policy, asks, held_out_pairs, posts, sections
from benchmarks.studies.drift.record import DriftError, Look, Posts, Reply, Run, Stream, write_csv
from benchmarks.studies.drift.report import draw, tables
from benchmarks.studies.drift.scoring import Scorer
from benchmarks.studies.drift.summary import compare, recovery, summarize
from core.config import AppArgs, ExperimentsConfig
from core.types import TokenizedPair
from engine.tiny.knowledge import Style, held_out_questions, judge, preference_questions

PLAN = DriftPlan(
    styles=(Style.POLITE, Style.TERSE, Style.EXPLAINED), phase_s=10, pairs_per_phase=20, num_held_out=4
)
STYLES = [style.value for style in PLAN.styles]
BASE_PAIR = (-10.0, -10.0)
GOOD_PAIR = (-8.0, -12.0)
BAD_PAIR = (-12.0, -8.0)


def record(policy=Policy.MACE, seed=0, *, good_after=(2.0, 2.0, 2.0), steps_per_s=1.0, plan=PLAN):
    """A version that gets all pairs right goes live `good_after` seconds into each phase; None: never."""
    scores = {"base": dict.fromkeys(STYLES, (BASE_PAIR,) * 4)}
    for number, liked in enumerate(STYLES, start=1):
        scores[f"v{number:04d}"] = {style: (GOOD_PAIR if style == liked else BAD_PAIR,) * 4 for style in STYLES}
    looks, version = [], "base"
    for k in range(round(plan.duration_s / 0.5) + 1):
        time_s = k * 0.5
        phase = plan.phase_at(time_s)
        after_s = good_after[phase]
        if after_s is not None and time_s - phase * plan.phase_s >= after_s:
            version = f"v{phase + 1:04d}"
        steps = int(steps_per_s * time_s)
        looks.append(
            Look(time_s=time_s, version=version, steps=steps, pairs=8 * steps, phase="idle", retrain_rate=1.0)
        )
    return Run(
        policy=policy.value,
        seed=seed,
        plan=plan,
        args={},
        versions={},
        beta=0.1,
        looks=tuple(looks),
        stream=Stream(
            num_requests=2,
            ttft_s=(0.1, 0.3),
            tbt_s=(0.01,),
            replies=(
                Reply(sent_s=9.0, style=STYLES[0], is_right=True),
                Reply(sent_s=1.0, style=None, is_right=False),
            ),
        ),
        posts=Posts(accepted=60),
        scores=scores,
        facts=dict.fromkeys(STYLES, ("a", "a", "b", "c")),
        start_s=60.0,
        served_gap=0.0,
    )


def summary_of(*records):
    return summarize(records)


def comparison(summary, start):
    return next(row for row in summary["comparisons"] if row["what"].startswith(start))


# --- the plan


def test_the_same_seed_gives_the_same_pairs_and_requests_and_another_seed_others():
    assert posts(PLAN, 1) == posts(PLAN, 1)
    assert asks(PLAN, 1) == asks(PLAN, 1)
    assert posts(PLAN, 1) != posts(PLAN, 2)
    assert asks(PLAN, 1) != asks(PLAN, 2)


def test_pairs_come_at_a_steady_rate_and_prefer_the_style_of_their_phase():
    made = posts(PLAN, 0)
    gaps_s = np.diff([post.arrival_s for post in made])
    assert len(made) == 60
    assert gaps_s == pytest.approx(np.full(59, 0.5))
    questions = {question.text: question for question in preference_questions()}
    for post in made:
        question = questions[post.prompt["prompt"][0]["content"]]
        chosen, rejected = (judge(question, post.prompt[name]) for name in ("chosen", "rejected"))
        assert chosen.style is PLAN.styles[PLAN.phase_at(post.arrival_s)]
        assert rejected.style is not chosen.style
        assert chosen.is_right
        assert rejected.is_right  # only the style tells them apart


def test_every_user_posts_an_equal_part():
    counts = Counter(post.prompt["user"] for post in posts(PLAN.model_copy(update={"pairs_per_phase": 80}), 0))
    assert set(counts.values()) == {30}
    assert len(counts) == PLAN.num_users


def test_no_preference_is_posted_on_a_fact_that_is_held_out():
    held_out = {fact for style in Style for fact, _ in held_out_pairs(DriftPlan(), style)}
    facts = {question.text: question.fact for question in preference_questions()}
    posted = {facts[post.prompt["prompt"][0]["content"]] for post in posts(DriftPlan(), 3)}
    assert held_out <= {question.fact for question in held_out_questions()}
    assert not held_out & posted


def test_requests_arrive_at_the_planned_rate_from_the_warm_up_to_the_end():
    plan = DriftPlan(phase_s=400, requests_per_s=3.0)
    arrivals = [ask.at_s for ask in asks(plan, 0)]
    assert arrivals == sorted(arrivals)
    assert -plan.warm_up_s < arrivals[0] < arrivals[-1] < plan.duration_s
    assert len(arrivals) / (plan.duration_s + plan.warm_up_s) == pytest.approx(3.0, rel=0.1)


# --- the policies


def test_policies_differ_in_nothing_but_who_decides():
    settings = {policy: sections(policy, PLAN) for policy in Policy}
    for section in settings.values():
        AppArgs.model_validate(section)
        section["scheduler"].pop("policy")
        section["experiments"].pop("reward_term", None)
    assert settings[Policy.PERIODIC]["experiments"].pop("phase_gap_s") < ExperimentsConfig().phase_gap_s
    assert all(section == settings[Policy.MACE] for section in settings.values())


def test_every_policy_is_the_one_it_is_called():
    named = {policy: sections(policy, PLAN) for policy in Policy}
    assert [named[policy]["scheduler"]["policy"] for policy in Policy] == [
        "mace",
        "mace",
        "periodic",
        "periodic",
        "continuous",
        "inference_only",
    ]
    assert [policy for policy in Policy if named[policy]["experiments"].get("reward_term") is False] == [
        Policy.NO_REWARD
    ]


def test_the_baselines_may_train_more_than_what_comes_in():
    section = sections(Policy.CONTINUOUS, PLAN)["experiments"]
    slots_per_s = AppArgs().drift.alarm_rate * PLAN.pairs_per_s
    assert section["retrain_rate"] * PLAN.requests_per_s > slots_per_s
    assert sections(Policy.PERIODIC_FULL, PLAN)["experiments"]["retrain_rate"] == section["retrain_rate"]
    assert section["period_requests"] == 15  # 3 requests/s, two windows in 10 s


# --- what the server tells


def test_a_run_posts_its_pairs_and_asks_on_time_and_keeps_what_the_server_said():
    app, posted = FastAPI(), []
    plan = DriftPlan(
        styles=(Style.POLITE, Style.TERSE), phase_s=0.5, pairs_per_phase=3, requests_per_s=20, poll_s=0.1
    )
    plan = plan.model_copy(update={"warm_up_s": 0.2})

    @app.post("/v1/feedback")
    async def feedback(request: Request):
        posted.append(await request.json())
        return JSONResponse({}, 202 if len(posted) > 1 else 503)

    @app.post("/v1/chat/completions")
    async def chat():
        choice = {"index": 0, "delta": {"content": "It is Paris."}, "finish_reason": "stop"}
        chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
        return StreamingResponse(iter([f"data: {json.dumps(chunk)}\n\n", "data: [DONE]\n\n"]))

    @app.get("/v1/training")
    async def training():
        return {"executor": {"live_version": "v0001", "steps": len(posted)}}

    async def run():
        async with (
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client,
            httpx.AsyncClient(transport=httpx.ASGITransport(app)) as http,
        ):
            openai = AsyncOpenAI(base_url="http://x/v1", api_key="none", max_retries=0, http_client=http)
            return await play(client, openai, "m", plan, seed=0)

    looks, stream, told = asyncio.run(run())
    asked = [ask.at_s for ask in asks(plan, 0) if ask.at_s >= 0]
    assert posted == [post.prompt for post in posts(plan, 0)]
    assert (told.accepted, len(told.errors)) == (5, 1)
    assert "HTTP 503" in told.errors[0]
    assert [look.version for look in looks] == ["v0001"] * 11
    assert (stream.num_requests, stream.errors) == (len(asked), ())
    assert [reply.sent_s for reply in stream.replies] == asked
    assert {reply.style for reply in stream.replies} == {"terse"}
    assert len(stream.ttft_s) == len(asked)


def test_a_run_is_looked_at_when_the_last_candidate_is_through(monkeypatch):
    phases = ["evaluating", "publishing", "paused"]

    def answer(request):
        if request.method == "POST":
            return httpx.Response(200, json={})
        phase = phases.pop(0) if phases else "training"
        return httpx.Response(200, json={"executor": {"live_version": "v0001", "phase": phase}})

    async def pause_it():
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://x") as client:
            await pause(client)

    monkeypatch.setattr(driver, "_PAUSE_LOOK_S", 0.0)
    asyncio.run(pause_it())
    assert phases == []
    with pytest.raises(DriftError, match="does not pause"):
        asyncio.run(pause_it())


def test_a_look_reads_the_counters_and_takes_what_is_missing_as_unknown():
    executor = {"live_version": "v0002", "steps": 3, "pairs": 24, "phase": "idle", "last_decision": None}
    bare = look_of({"executor": executor, "error": {}}, 1.5)
    assert (bare.version, bare.steps, bare.pairs, bare.time_s) == ("v0002", 3, 24, 1.5)
    assert (bare.retrain_rate, bare.gamma, bare.level, bare.queued_pairs) == (None, None, None, None)
    drift = {"retrain_rate": 4.0, "gamma": 2.0, "level": 0.9, "reason": "x"}
    full = look_of({"executor": executor, "drift": drift, "queue": {"queued_pairs": 5}}, 0.0)
    assert (full.retrain_rate, full.gamma, full.level, full.queued_pairs) == (4.0, 2.0, 0.9, 5)


def test_versions_are_scored_in_the_phases_in_which_they_were_live_or_which_they_started():
    looks = record(good_after=(2.0, 3.0, None)).looks
    assert versions_by_style(PLAN, looks) == {
        STYLES[0]: ["base", "v0001"],
        STYLES[1]: ["base", "v0001", "v0002"],
        STYLES[2]: ["base", "v0002"],
    }


def test_log_probs_are_those_of_the_completion_under_the_adapter_alone_and_the_base_stays_as_it_was(tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape))
    model.save_pretrained(tmp_path / "model")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    pairs = [TokenizedPair("a", (1, 2, 3), (4, 5), (6,)), TokenizedPair("b", (7,), (8, 9, 10), (11, 12))]

    def expected(net, prompt, completion):
        with torch.no_grad():
            logps = net(torch.tensor([[*prompt, *completion]])).logits[0].log_softmax(-1)
        return sum(logps[len(prompt) + k - 1, token].item() for k, token in enumerate(completion))

    scorer = Scorer(tmp_path / "model")
    bare = scorer.score(None, pairs)
    tuned = scorer.score(tmp_path / "adapter", pairs)
    for pair, scored in zip(pairs, tuned, strict=True):
        truth = [expected(adapted, pair.prompt_ids, ids) for ids in (pair.chosen_ids, pair.rejected_ids)]
        assert scored == pytest.approx(truth, abs=1e-4)
    assert np.abs(np.array(bare) - np.array(tuned)).max() > 1e-2
    assert scorer.score(None, pairs) == bare


# --- curves


def test_margin_accuracy_and_clpd_follow_their_definitions():
    one = record()
    one = one.model_copy(
        update={
            "scores": {
                **one.scores,
                "v0001": {STYLES[0]: (GOOD_PAIR, GOOD_PAIR, GOOD_PAIR, BAD_PAIR), STYLES[1]: (BAD_PAIR,) * 4},
            }
        }
    )
    first, last = one.of_phase(0)[0], one.of_phase(0)[-1]
    assert (first.version, first.accuracy, first.margin, first.clpd) == ("base", 0.5, 0.0, 0.0)
    assert last.version == "v0001"
    assert last.accuracy == pytest.approx(0.75)
    assert last.clpd == pytest.approx((3 * 4 - 4) / 4)
    assert last.margin == pytest.approx(0.1 * last.clpd)  # the base has 0


def test_a_margin_is_against_the_base_but_clpd_is_not():
    one = record()
    base = dict.fromkeys(STYLES, ((-10.0, -13.0),) * 4)
    run = one.model_copy(update={"scores": {**one.scores, "base": base}})
    last = run.of_phase(0)[-1]
    assert last.clpd == pytest.approx(4.0)
    assert last.margin == pytest.approx(0.1)


def test_a_version_is_judged_by_the_style_of_the_moment():
    run = record(good_after=(2.0, 4.0, None))
    accuracy = {point.time_s: point.accuracy for point in run.points}
    assert (accuracy[9.5], accuracy[10.0], accuracy[13.5], accuracy[14.0]) == (1.0, 0.0, 0.0, 1.0)
    assert accuracy[30.0] == 0.0


def test_the_table_has_a_row_for_each_look(tmp_path):
    write_csv([record(), record(Policy.FROZEN, good_after=(None,) * 3)], tmp_path / "drift.csv")
    with (tmp_path / "drift.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 61
    assert {"policy", "seed", "time_s", "phase", "accuracy", "margin", "clpd", "retrain_rate", "gamma"} <= set(
        rows[0]
    )
    assert {"steps", "pairs", "version"} <= set(rows[0])
    assert rows[61]["policy"] == "frozen"
    assert rows[0]["gamma"] == ""  # the server did not tell


# --- summary


def test_recovery_is_the_first_look_at_which_the_target_is_met():
    run = record(good_after=(2.0, 3.0, None), steps_per_s=2.0)
    assert recovery(run, 1, 0.95) == {"time_s": 3.0, "steps": 7}  # steps since the last look of the phase before
    assert recovery(run, 2, 0.95) == {"time_s": None, "steps": None}


def test_the_expected_relations_are_met_where_they_hold():
    runs = [record(Policy.MACE, seed, steps_per_s=1.0, good_after=(1, 2, 2)) for seed in (0, 1)]
    runs += [record(Policy.CONTINUOUS, seed, steps_per_s=4.0, good_after=(1, 1, 1)) for seed in (0, 1)]
    runs += [record(Policy.PERIODIC, seed, good_after=(1, 8, 8)) for seed in (0, 1)]
    summary = summary_of(*runs)
    assert summary["targets"] == [0.95] * 3
    rows = {row["what"]: row for row in summary["comparisons"]}
    assert all(row["passed"] in (True, None) for row in rows.values())
    speed_up = comparison(summary, "time to recover: periodic")
    assert (speed_up["value"], speed_up["interval"], speed_up["passed"]) == (4.0, [4.0, 4.0], True)
    assert comparison(summary, "all optimizer steps: mace")["value"] == pytest.approx(0.25)


def test_each_relation_can_be_missed():
    runs = [record(Policy.MACE, steps_per_s=3.0, good_after=(1, 5, 5))]
    runs += [record(Policy.CONTINUOUS, steps_per_s=4.0, good_after=(1, 1, 1))]
    runs += [record(Policy.PERIODIC, good_after=(1, 8, 8))]
    summary = summary_of(*runs)
    assert comparison(summary, "all optimizer steps: mace")["passed"] is False
    assert comparison(summary, "time to recover: periodic")["passed"] is False


def test_a_mace_that_never_recovers_meets_neither_steps_nor_speed():
    runs = [record(Policy.MACE, steps_per_s=0.1, good_after=(1, None, None))]
    runs += [record(Policy.CONTINUOUS, steps_per_s=4.0), record(Policy.PERIODIC, good_after=(1, None, None))]
    summary = summary_of(*runs)
    for start in ("final accuracy", "steps of mace until", "time to recover: periodic"):
        assert comparison(summary, start)["passed"] is False
    assert comparison(summary, "steps of mace until")["not_recovered"] == 2


def test_a_baseline_that_never_recovers_counts_with_the_whole_phase_and_is_named():
    runs = [record(Policy.MACE, good_after=(1, 2, 2)), record(Policy.CONTINUOUS)]
    runs += [record(Policy.PERIODIC, good_after=(1, None, 4))]
    row = comparison(summary_of(*runs), "time to recover: periodic")
    assert row["value"] == pytest.approx((10 + 4) / 4)
    assert row["not_recovered"] == {"above": 1, "below": 0}
    assert row["passed"] is True


def test_a_seed_that_only_one_of_two_policies_has_does_not_count():
    runs = [record(Policy.MACE, seed, good_after=(1, 2, 2)) for seed in (0, 1)]
    runs += [record(Policy.MACE, 2, good_after=(1, 9, 9), steps_per_s=50.0)]
    runs += [record(Policy.CONTINUOUS, seed, steps_per_s=4.0) for seed in (0, 1, 2)]
    runs += [record(Policy.PERIODIC, seed, good_after=(1, 8, 8)) for seed in (1, 0)]
    summary = summary_of(*runs, record(Policy.NO_REWARD, 7))
    assert comparison(summary, "time to recover: periodic")["value"] == pytest.approx(4.0)
    assert comparison(summary, "time to recover: continuous")["value"] == pytest.approx(12 / 26)
    assert not any("without" in row["what"] for row in summary["comparisons"])


def test_without_continuous_there_is_no_target_and_no_claim():
    summary = summary_of(record(Policy.MACE), record(Policy.FROZEN, good_after=(None,) * 3))
    assert summary["targets"] == [None] * 3
    assert summary["comparisons"] == []
    assert compare({}, 10.0) == []


def test_the_share_of_answers_in_the_preferred_style_is_of_the_second_half_of_the_phase():
    row = summary_of(record())["policies"]["mace"]
    assert row["phases"][0]["style_share"] == 1.0  # the reply at 1 s is not in it
    assert row["phases"][1]["style_share"] is None
    assert row["stream"]["right"] == 0.5


def test_the_summary_is_json_and_the_tables_can_be_shown():
    summary = summary_of(record(), record(Policy.CONTINUOUS, steps_per_s=0.0))
    json.dumps(summary, allow_nan=False)
    console = Console(width=200, record=True)
    for table in tables(summary):
        console.print(table)
    text = console.export_text()
    assert "never" not in text
    assert "final accuracy: mace / continuous" in text


# --- intervals


def test_pairs_of_one_fact_widen_the_interval_as_the_one_observation_they_are():
    values = np.array([[1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
    alone = crossed_interval(values, list("abcdefgh"))
    together = crossed_interval(values, list("aaaabbbb"))
    assert alone[1] - alone[0] < together[1] - together[0]
    assert together == (0.0, 1.0)


def test_a_ratio_over_nothing_is_unknown_and_over_zero_infinite():
    assert np.isnan(ratio_interval([], [])).all()
    assert ratio_interval([1.0, 1.0], [0.0, 0.0]) == (np.inf, np.inf)
    low, high = ratio_interval([1.0, 3.0], [1.0, 1.0])
    assert (low, high) == (1.0, 3.0)


# --- files


def run_all(tmp_path, *, resume):
    runs = Runs(PLAN, tmp_path, config=tmp_path, model_dir=tmp_path, port=None)
    return runs.all([Policy.MACE], range(1), resume=resume)


def test_finished_runs_are_taken_over_but_not_those_of_another_plan(tmp_path):
    (tmp_path / "runs").mkdir()
    path = tmp_path / "runs" / "mace-seed0.json"
    path.write_text(record().model_dump_json())
    assert run_all(tmp_path, resume=True) == [record()]
    path.write_text(record(plan=PLAN.model_copy(update={"requests_per_s": 9.0})).model_dump_json())
    with pytest.raises(DriftError, match="another plan"):
        run_all(tmp_path, resume=True)
    path.write_text("{}")
    with pytest.raises(DriftError, match="not a run of this version"):
        run_all(tmp_path, resume=True)


def test_without_resume_nothing_is_overwritten(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mace-seed0.json").write_text(record().model_dump_json())
    with pytest.raises(DriftError, match="--resume"):
        run_all(tmp_path, resume=False)


def test_the_picture_is_drawn_with_several_seeds_and_with_one(tmp_path):
    runs = [record(Policy.MACE, seed) for seed in (0, 1)] + [record(Policy.FROZEN, good_after=(None,) * 3)]
    draw(runs, [0.95, 0.95, None], tmp_path / "drift.png")
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")

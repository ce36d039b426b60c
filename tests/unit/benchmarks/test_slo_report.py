from pathlib import Path

import pytest

from benchmarks.harness.jobs import TRACES, Job, JobResult, MeasurementError, run_job, warm_up_requests
from benchmarks.harness.results import RunMetrics, summarize
from benchmarks.harness.window import WindowRecord
from benchmarks.studies.agreement import FILES, compare_numbers
from benchmarks.studies.slo import ALONE, load_trace, measure_model, summarize_runs
from core.config import SloConfig
from simulator.trace import Trace

SLO = SloConfig(ttft_s=1.0, tbt_s=0.1)
EMPTY = summarize(WindowRecord(10.0), SLO)


def metrics(**values) -> RunMetrics:
    return EMPTY.model_copy(update={"num_requests": 100, "slo_attainment": 1.0, "tbt_p99_s": 0.05, **values})


def runs(*, mace, inference_only=None, alone=10.0, busy=0.4):
    baseline = inference_only or metrics(forward_share=busy)
    return {ALONE: [metrics(pairs_per_s=alone)], "inference_only": [baseline], "mace": [mace]}


def passed(report):
    return [check["passed"] for check in report["checks"]]


def test_the_ideal_is_training_alone_times_the_idle_share():
    report = summarize_runs(runs(mace=metrics(pairs_per_s=5.4)), SLO)
    assert report["ideal_pairs_per_s"] == pytest.approx(6.0)
    row = next(row for row in report["rows"] if row["policy"] == "mace")
    assert row["pairs_of_ideal"] == pytest.approx(0.9)
    assert passed(report) == [True, True, True]


def test_each_target_can_be_missed():
    report = summarize_runs(runs(mace=metrics(pairs_per_s=5.0, slo_attainment=0.98, tbt_p99_s=0.11)), SLO)
    assert passed(report) == [False, False, False]


def test_attainment_is_no_claim_where_serving_alone_misses_too():
    baseline = metrics(forward_share=0.4, slo_attainment=0.97)
    report = summarize_runs(runs(mace=metrics(pairs_per_s=5.4, slo_attainment=0.5), inference_only=baseline), SLO)
    assert passed(report)[0] is None


def test_attainment_is_pooled_over_the_requests_of_all_repeats():
    found = runs(mace=metrics(slo_attainment=1.0, num_requests=300))
    found["mace"].append(metrics(slo_attainment=0.9, num_requests=100))
    report = summarize_runs(found, SLO)
    assert report["rows"][-1]["pooled_slo_attainment"] == pytest.approx(0.975)


class Recorder:
    """Stands where a process would be started; answers with given numbers."""

    def __init__(self):
        self.jobs: list[Job] = []

    def __call__(self, job: Job) -> JobResult:
        self.jobs.append(job)
        if job.kind == "calibrate":
            return JobResult(rate_per_s=5.0, threads="1")
        return JobResult(metrics=metrics(pairs_per_s=10.0, forward_share=0.4), threads="1")


def measured(*, repeats=1, busy_share=0.4, **options):
    recorder = Recorder()
    trace = load_trace("tiny", 30, **options)
    return recorder.jobs, measure_model("tiny", Path("model"), trace, repeats, busy_share, recorder)


def test_every_policy_gets_the_same_trace_targets_and_settings():
    jobs, report = measured(repeats=2, slo={"ttft_s": 2.0})
    calibrate, *served = jobs
    assert calibrate.kind == "calibrate"
    assert len(served) == 2 * 5
    schedulers = [job.trace.args.scheduler for job in served]
    assert [s.policy for s in schedulers[1:5]] == ["inference_only", "mace", "periodic", "continuous"]
    decided = {"scheduler": None, "experiments": None}
    without = [j.trace.model_copy(update={"args": j.trace.args.model_copy(update=decided)}) for j in served]
    assert all(trace == without[0] for trace in without)
    assert without[0].arrivals.rate_per_s == 5.0
    assert without[0].args.slo.ttft_s == 2.0
    assert report["settings"]["trace"]["duration_s"] == 30


def test_blocking_policies_are_asked_for_what_mace_has_to_reach():
    jobs, _ = measured()
    by_policy = {job.trace.args.scheduler.policy: job.trace.args.experiments for job in jobs[2:]}
    goal_pairs_per_s = 0.85 * 10.0 * 0.6
    for policy in ("periodic", "continuous"):
        assert by_policy[policy].retrain_rate == pytest.approx(goal_pairs_per_s / 5.0)


def test_training_alone_has_no_requests_and_serving_alone_no_training():
    jobs, _ = measured(rate_per_s=3.0, busy_share=None)
    profile, alone, serving, *others = jobs
    assert profile.kind == "profile"
    assert (alone.with_requests, alone.with_training) == (False, True)
    assert (serving.with_requests, serving.with_training) == (True, False)
    assert all(job.with_requests and job.with_training for job in others)


def test_a_given_rate_and_profile_need_no_preparation():
    jobs, _ = measured(rate_per_s=3.0, busy_share=None, profile=Path("p.json"))
    assert {job.kind for job in jobs} == {"serve"}
    assert {job.trace.args.profile.path for job in jobs} == {Path("p.json")}


def test_a_run_that_fails_says_why(tmp_path):
    trace = Trace.load(FILES[0])
    job = Job(model="tiny", model_dir=tmp_path / "missing", trace=trace, window_s=1.0)
    with pytest.raises(MeasurementError, match=r"exit code 1(.|\n)*config.json"):
        run_job(job)


def test_warm_up_requests_are_of_the_trace_but_not_in_it():
    trace = Trace.load(FILES[0])
    warm_up = warm_up_requests(trace, 5.0)
    assert all(request.arrival_s < 5.0 for request in warm_up)
    assert len(warm_up) > 10
    assert [r.arrival_s for r in warm_up] != [r.arrival_s for r in trace.requests()][: len(warm_up)]


@pytest.mark.parametrize(
    ("real", "virtual", "within"), [(1.0, 1.15, True), (1.0, 0.84, False), (1.0, None, None), (0.0, 1.0, None)]
)
def test_agreement_is_within_fifteen_percent_of_the_measured_value(real, virtual, within):
    (row,) = compare_numbers("t", {"tbt_p50_s": real}, {"tbt_p50_s": virtual})
    assert row["within_15_percent"] is within


@pytest.mark.parametrize("path", sorted((TRACES).glob("*.yaml")), ids=lambda path: path.stem)
def test_committed_traces_are_sound(path):
    first = next(iter(Trace.load(path).requests()))
    assert first.num_prompt_tokens > 0

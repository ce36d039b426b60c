import pytest

from benchmarks.harness.client import RequestRecord
from benchmarks.harness.feeder import TaskRecord
from benchmarks.harness.results import meets_slo, summarize, summary_row
from benchmarks.harness.statistics import percentile
from benchmarks.harness.window import WindowRecord
from core.batch import ForwardShape, IterationSample, Plan
from core.config import SloConfig
from core.types import SliceKind, SliceReport, SliceTiming

SLO = SloConfig(ttft_s=1.0, tbt_s=0.1)


def request(*, ttft_s=0.5, gaps_s=(0.05, 0.05), error=None, at_s=2.0, merged=0):
    first_s = None if ttft_s is None else at_s + ttft_s
    return RequestRecord("r", at_s, at_s, first_s, list(gaps_s), merged, at_s + 3, error)


def iteration(*, forward_s=0.0, tokens=0, slices_s=(), predicted_s=None, overhead_s=0.0):
    slices = [SliceTiming(SliceKind.POLICY_LAYER, 64, latency_s) for latency_s in slices_s]
    plan = Plan(predicted_forward_s=predicted_s)
    return IterationSample(ForwardShape(num_decode=tokens), forward_s, overhead_s, SliceReport(slices), plan)


def test_time_to_first_token_counts_from_the_scheduled_arrival():
    record = request(ttft_s=0.5)
    record.sent_s = record.scheduled_s + 0.4
    metrics = summarize(WindowRecord(10.0, [record]), SLO)
    assert metrics.ttft_p50_s == pytest.approx(0.5)
    assert metrics.send_lag_p99_s == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("record", "met"),
    [
        (request(), True),
        (request(ttft_s=1.0, gaps_s=(0.1,)), True),
        (request(ttft_s=1.01), False),
        (request(gaps_s=(0.05, 0.11)), False),
        (request(gaps_s=()), True),
        (request(error="gone"), False),
        (request(ttft_s=None, gaps_s=(), error="gone"), False),
    ],
)
def test_a_request_meets_its_slo_with_first_token_and_every_gap_in_time(record, met):
    assert meets_slo(record, SLO) is met


def test_attainment_is_a_share_of_all_requests_and_failed_ones_miss():
    records = [request(), request(ttft_s=2.0), request(gaps_s=(0.2, 0.01)), request(error="gone")]
    metrics = summarize(WindowRecord(10.0, records), SLO)
    assert metrics.slo_attainment == 0.25
    assert metrics.ttft_attainment == 0.75
    assert metrics.num_errors == 1
    assert metrics.tbt_token_attainment == pytest.approx(7 / 8)


def test_percentiles_pool_the_gaps_of_all_requests():
    records = [request(gaps_s=[0.01] * 98), request(gaps_s=[0.02, 0.5])]
    metrics = summarize(WindowRecord(10.0, records), SLO)
    assert metrics.tbt_p50_s == pytest.approx(0.01)
    assert metrics.tbt_p99_s == pytest.approx(0.02 + 0.01 * (0.5 - 0.02))
    assert metrics.tbt_max_s == 0.5


def test_percentile_interpolates_between_neighbours():
    assert percentile([1.0, 2.0, 3.0, 4.0], 50) == 2.5
    assert percentile([], 50) is None


def test_rates_are_over_the_window():
    metrics = summarize(WindowRecord(10.0, [request(merged=1), request()]), SLO)
    assert metrics.request_rate_per_s == 0.2
    assert metrics.output_tokens_per_s == 0.6
    assert metrics.merged_token_share == pytest.approx(1 / 6)


def test_an_empty_run_has_no_latencies_and_no_attainment():
    metrics = summarize(WindowRecord(10.0), SLO)
    assert metrics.ttft_p99_s is None
    assert metrics.tbt_p99_s is None
    assert metrics.slo_attainment is None
    assert metrics.pairs_per_s == metrics.forward_share == 0.0


def test_pairs_in_the_window_are_counted_by_slice_time_so_that_no_step_is_cut_off():
    # 6 s of slices in a window of 10 s; steps of 4 pairs take 4 s: one ended inside, one after it.
    tasks = [TaskRecord("a", 4, 3.0, busy_s=4.0), TaskRecord("b", 4, 11.0, busy_s=4.0)]
    samples = [iteration(slices_s=(1.0, 2.0)), iteration(slices_s=(3.0,))]
    metrics = summarize(WindowRecord(10.0, [], tasks, samples, covered_s=10.0), SLO)
    assert metrics.pairs_per_s == pytest.approx(0.6)
    assert metrics.finished_pairs_per_s == pytest.approx(0.4)
    assert metrics.slices_share == pytest.approx(0.6)
    assert metrics.longest_slice_s == 3.0


def test_failed_steps_train_nothing():
    tasks = [TaskRecord("a", 4, 3.0, busy_s=4.0), TaskRecord("b", 4, 7.0, error="DivergedError: nan")]
    metrics = summarize(WindowRecord(10.0, [], tasks, [iteration(slices_s=(8.0,))], covered_s=10.0), SLO)
    assert metrics.num_failed_steps == 1
    assert metrics.pairs_per_s == pytest.approx(0.4)
    assert metrics.finished_pairs_per_s == pytest.approx(0.4)


def test_a_step_that_ended_before_the_window_is_not_of_it():
    tasks = [TaskRecord("early", 4, -0.1, busy_s=4.0), TaskRecord("in", 4, 1.0, busy_s=4.0)]
    assert summarize(WindowRecord(10.0, [], tasks), SLO).finished_pairs_per_s == pytest.approx(0.4)


def test_device_shares_are_of_the_time_that_the_samples_cover():
    samples = [iteration(forward_s=2.0, tokens=3, overhead_s=0.5), iteration(forward_s=0.25, slices_s=(4.0,))]
    metrics = summarize(WindowRecord(10.0, samples=samples, covered_s=20.0, num_lost=7), SLO)
    assert metrics.forward_share == pytest.approx(0.1)  # an empty forward pass is not inference
    assert metrics.slices_share == pytest.approx(0.2)
    assert metrics.overhead_share == pytest.approx(0.025)
    assert metrics.idle_share == pytest.approx(0.9)
    assert metrics.num_lost_iterations == 7


def test_prediction_error_is_the_median_over_predicted_passes():
    samples = [
        iteration(forward_s=1.0, tokens=1, predicted_s=1.1),
        iteration(forward_s=1.0, tokens=1, predicted_s=0.7),
        iteration(forward_s=1.0, tokens=1, predicted_s=1.0),
        iteration(forward_s=1.0, tokens=1),
    ]
    metrics = summarize(WindowRecord(10.0, samples=samples, covered_s=10.0), SLO)
    assert metrics.forward_error_p50 == pytest.approx(0.1)


def test_medians_leave_out_repeats_without_a_value():
    runs = [
        summarize(WindowRecord(10.0, records), SLO)
        for records in ([request(ttft_s=0.2)], [request(ttft_s=0.6)], [])
    ]
    found = summary_row(runs)
    assert found["ttft_p50_s"] == pytest.approx(0.4)
    assert found["num_requests"] == 1


class Spent:
    """Stands for an `EnergyWatch` of a window that took 100 J for serving and 50 J for training."""

    def to_wire(self, num_tokens, num_pairs):
        per = {"joules_per_1000_tokens": 1e5 / num_tokens, "joules_per_pair": 50 / num_pairs}
        return {"idle_w": 7.0, **per, "sensors": ["rapl"], "reason": None}


def test_joules_are_of_the_tokens_and_pairs_of_the_window():
    tasks = [TaskRecord("t", 8, 1.0, 4.0)]
    run = WindowRecord(10.0, [request()], tasks, [iteration(slices_s=(8.0,))], covered_s=10.0, energy=Spent())
    metrics = summarize(run, SLO)
    assert metrics.joules_per_1000_tokens == pytest.approx(100 / 0.003)
    assert metrics.joules_per_pair == pytest.approx(50 / (metrics.pairs_per_s * 10))
    assert metrics.idle_w == 7.0
    row = summary_row([metrics, metrics.model_copy(update={"joules_per_pair": None})])
    assert row["joules_per_pair"] == metrics.joules_per_pair


def test_without_a_watch_joules_are_not_known():
    metrics = summarize(WindowRecord(10.0, [request()]), SLO)
    assert (metrics.idle_w, metrics.joules_per_1000_tokens, metrics.joules_per_pair) == (None, None, None)

import json

import pytest

from benchmarks.harness.client import RequestRecord
from benchmarks.studies.chaos.load import Audit, Ledger
from benchmarks.studies.chaos.report import Findings, downtime_s, failures_by_kill, make_report
from benchmarks.studies.chaos.strike import Kill
from benchmarks.studies.chaos.watch import VersionWatch


def a_request(sent_s, ended_s=None, error=None):
    return RequestRecord("chat", sent_s, sent_s, ended_s=ended_s, error=error)


def a_kill(number=1, struck_s=100.0, **changes):
    values = {"recovery_s": 3.0, "training_s": 4.0, "steps_lost": 0, **changes}
    return Kill(number, "engine", "VLLM::EngineCore", "request", struck_s, **values)


def findings(tmp_path, **changes):
    audit = Audit(acknowledged=10, in_doubt=0, in_doubt_stored=0, lost=[], duplicated=[], unknown=0)
    values = {
        "seed": 0,
        "duration_s": 60.0,
        "planned": 1,
        "stopped": None,
        "kills": [a_kill()],
        "requests": [a_request(90.0, 91.0), a_request(99.0, 101.0, "APIError: broken")],
        "ledger": Ledger(),
        "audit": audit,
        "versions": VersionWatch(tmp_path),
        "restarts": 0,
        "left_behind": 0,
        **changes,
    }
    return Findings(**values)


def test_a_run_that_lost_nothing_passes(tmp_path):
    report = make_report(findings(tmp_path))
    assert (report["passed"], report["problems"]) == (True, [])
    assert report["requests"]["failed"] == 1
    assert report["requests"]["failed_share"] == 0.5
    assert report["requests"]["errors"] == {"APIError": 1}
    assert report["recovery_s"]["engine"] == {"count": 1, "p50": 3.0, "p90": 3.0, "max": 3.0}
    assert json.loads(json.dumps(report)) == report


def half_written(tmp_path):
    watch = VersionWatch(tmp_path)
    watch.half_written["v0003"] = "torn"
    return watch


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"audit": Audit(10, 0, 0, ["a"], [], 0)}, "1 acknowledged records are lost"),
        ({"audit": Audit(10, 0, 0, [], ["a"], 0)}, "there twice"),
        ({"audit": Audit(10, 0, 0, [], [], 2)}, "nobody sent"),
        ({"ledger": Ledger(refused={"a": "empty"})}, "1 records were refused, the first: ('a', 'empty')"),
        ({"kills": [a_kill(steps_lost=2)]}, "2 optimizer steps were lost"),
        ({"kills": [a_kill(recovery_s=None)]}, "no recovery in time after kills [1]"),
        ({"kills": [a_kill(training_s=None)]}, "no training in time after kills [1]"),
        ({"kills": []}, "no kill"),
        ({"stopped": "no process 'x'"}, "the run was stopped: no process 'x'"),
        ({"left_behind": 1}, "outlived"),
    ],
)
def test_every_kind_of_loss_fails_the_run(tmp_path, changes, words):
    report = make_report(findings(tmp_path, **changes))
    assert not report["passed"]
    [problem] = report["problems"]
    assert words in problem


def test_a_half_written_version_fails_the_run(tmp_path):
    [problem] = make_report(findings(tmp_path, versions=half_written(tmp_path)))["problems"]
    assert "v0003" in problem


def test_one_lost_step_is_allowed_and_an_unknown_number_is_none(tmp_path):
    assert make_report(findings(tmp_path, kills=[a_kill(steps_lost=1)]))["passed"]
    assert make_report(findings(tmp_path, kills=[a_kill(steps_lost=None)]))["steps_lost_max"] is None


def test_failures_are_counted_with_the_last_kill_before_them():
    kills = [a_kill(1, 100.0), a_kill(2, 200.0)]
    ends = [(50.0, "x"), (150.0, "x"), (210.0, "x"), (220.0, None), (None, None)]
    requests = [a_request(40.0, end, error) for end, error in ends]
    assert failures_by_kill(kills, requests) == {0: 1, 1: 1, 2: 2}


def test_downtime_is_the_longest_time_without_an_answer_until_recovery():
    requests = [a_request(90.0, 99.0), a_request(100.1, 100.5), a_request(100.2, 107.0, "broken")]
    requests += [a_request(101.0, 108.5), a_request(109.0, 130.0)]
    assert downtime_s(a_kill(struck_s=100.0, recovery_s=10.0), requests) == pytest.approx(8.0)
    assert downtime_s(a_kill(struck_s=100.0, recovery_s=10.0), []) == pytest.approx(10.0)
    assert downtime_s(a_kill(recovery_s=None), requests) is None

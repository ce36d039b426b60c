"""When KV pruning may switch on."""

import os
import statistics

import pytest

from core.config import KvPruningConfig, ModelConfig
from core.errors import ProfileError
from engine.pruning.gate import (
    Estimate,
    FractionResult,
    PruningReport,
    RecallBaseline,
    RecallResult,
    decide,
    decide_from_file,
    estimate,
    find_report,
    pruning_report_path,
)
from profiler.profile import Origin, profile_path

MODEL = ModelConfig(model_id="m", model_source="/models/m")
CONFIG = KvPruningConfig()  # keydiff, at most 0.25, 0.05 nats, 2 % of the answers


def interval(mean: float, half: float = 0.0, num_samples: int = 40) -> Estimate:
    return Estimate(mean=mean, low=mean - half, high=mean + half, num_samples=num_samples)


def result(
    fraction: float,
    nats: float = 0.0,
    lost: float = 0.0,
    half: float = 0.0,
    dropped: float | None = None,
    n: int = 40,
) -> FractionResult:
    tasks = {kind: RecallResult(accuracy=0.9 - lost, drop=interval(lost)) for kind in ("needle", "qa")}
    return FractionResult(
        fraction=fraction,
        logprob_drop=interval(nats, half, n),
        tasks=tasks,
        dropped_blocks=32 * fraction if dropped is None else dropped,
        total_blocks=32,
    )


def report(*results: FractionResult, accuracy: float = 0.9, num_questions: int = 128, **changes) -> PruningReport:
    baseline = {
        kind: RecallBaseline(num_questions=num_questions, accuracy=accuracy, guess_accuracy=0.1)
        for kind in ("needle", "qa")
    }
    fields = {
        "origin": Origin(device="d", model="m", num_threads=1),
        "model_source": "/models/m",
        "method": "keydiff",
        "block_tokens": 32,
        "sink_tokens": 32,
        "recent_tokens": 128,
        "context_tokens": 1024,
        "baseline": baseline,
        "baseline_nats_per_token": 2.0,
        "fractions": results or (result(0), result(0.1), result(0.25, 0.01), result(0.5, 0.4)),
        "elapsed_s": 1,
    }
    return PruningReport(**(fields | changes))


def test_small_drops_switch_it_on_and_the_reason_says_what_it_costs():
    decision = decide(report(), CONFIG, MODEL, block_tokens=32)
    assert decision.allowed
    assert decision.reason.startswith("measured at 25%: 0.010 nats per token")


@pytest.mark.parametrize(
    ("of_report", "of_model", "source", "allowed"),
    [
        ("1-2-3-4", "1-2-3-4", "/moved", True),
        ("1-2-3-4", "0-2-3-4", "/models/m", False),
        ("", "1-2-3-4", "/models/m", True),
        ("", "1-2-3-4", "/moved", False),
    ],
)
def test_a_model_is_known_by_its_content_and_by_name_only_in_older_reports(of_report, of_model, source, allowed):
    given = report(fingerprint=of_report, model_source=source)
    decision = decide(given, CONFIG, MODEL, 32, of_model)
    assert decision.allowed is allowed
    assert ("weights" in decision.reason) is (of_report != "" and not allowed)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "was not measured on this model"),
        (report(model_source="/models/other"), "not of m"),
        (report(origin=Origin(device="d", model="x", num_threads=1)), "report is of x"),
        (report(method="key_norm"), "of method key_norm, blocks are scored by keydiff"),
        (report(sink_tokens=64), "kept the first 64 tokens, the engine keeps 32"),
        (report(recent_tokens=256), "kept the last 256 tokens, the engine keeps 128"),
        (report(block_tokens=16), "blocks of 16 tokens, the engine has 32"),
        (report(result(0), result(0.1)), "max_fraction is 0.25, measured was up to 0.1"),
        (report(result(0.25, n=19)), "measured on 19 passages, 20 are needed"),
        (report(result(0.25, dropped=4)), "only 12% of the blocks could be dropped"),
        (report(result(0.25, dropped=0)), "only 0% of the blocks could be dropped"),
        (report(result(0.25, nats=0.06)), "costs 0.060 nats per token"),
        (report(result(0.25, nats=0.02, half=0.04)), "with 95 % confidence up to 0.060"),
        (report(result(0.25, lost=0.03)), "costs 3.0% of the needle answers"),
        (report(result(0.25), num_questions=49), "needle had 49 questions, 50 are needed"),
    ],
)
def test_it_stays_off_and_says_why(given, said):
    decision = decide(given, CONFIG, MODEL, block_tokens=32)
    assert not decision.allowed
    assert decision.reason.startswith("KV pruning stays off: ")
    assert said in decision.reason


@pytest.mark.parametrize(
    "given",
    [
        report(result(0.25, nats=0.05)),
        report(result(0.25, lost=0.02)),
        report(result(0.25, nats=-0.3, lost=-0.1)),
        report(result(0.25, dropped=7.5)),  # rounded down from 8 in half of the contexts
        report(result(0.3, nats=0.01), result(0.6, nats=2)),
        report(sink_tokens=16, recent_tokens=64),
        report(result(0.25), num_questions=50),
    ],
)
def test_what_is_within_its_bounds_or_harder_than_configured_passes(given):
    assert decide(given, CONFIG, MODEL, block_tokens=32).allowed


def test_the_next_larger_measured_fraction_decides():
    given = report(result(0.1), result(0.5, nats=0.2))
    assert not decide(given, CONFIG, MODEL).allowed
    assert decide(given, KvPruningConfig(max_fraction=0.1), MODEL).allowed


def test_a_task_that_the_model_cannot_do_does_not_decide_but_the_log_prob_does():
    lost = report(result(0.25, lost=0.2), accuracy=0.25)  # 17 % more than guessing
    decision = decide(lost, CONFIG, MODEL)
    assert decision.allowed
    assert "needle says nothing, the model answers 25% unpruned where guessing gives 10%" in decision.reason
    assert not decide(report(result(0.25, nats=0.2), accuracy=0.25), CONFIG, MODEL).allowed
    assert not decide(report(result(0.25, lost=0.2), accuracy=0.29), CONFIG, MODEL).allowed


def test_without_the_gate_nothing_is_looked_at():
    assert decide(None, KvPruningConfig(require_gate=False), MODEL).allowed


def test_a_report_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "new" / "m.pruning.json"
    report().save(path)
    assert PruningReport.load(path) == report()
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"schema_version": 2}'])
def test_a_damaged_report_names_the_command_that_makes_a_new_one(tmp_path, content):
    path = tmp_path / "m.pruning.json"
    path.write_bytes(content)
    with pytest.raises(ProfileError, match="Measure it again: mace profile pruning"):
        PruningReport.load(path)


def test_no_report_and_an_unwritable_place_are_profile_errors(tmp_path):
    with pytest.raises(ProfileError, match="cannot read"):
        PruningReport.load(tmp_path / "none.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(ProfileError, match="cannot write"):
        report().save(tmp_path / "file" / "m.json")


def test_the_report_lies_beside_the_latency_profile(tmp_path):
    path = pruning_report_path(tmp_path, "some CPU, 2 threads", "Qwen/Qwen2.5-0.5B")
    assert path.parent == profile_path(tmp_path, "some CPU, 2 threads", "Qwen/Qwen2.5-0.5B").parent
    assert path.name == "qwen-qwen2.5-0.5b.pruning.json"


def test_a_report_of_another_device_does_if_there_is_none_of_this_one(tmp_path):
    assert find_report(tmp_path, "here", "m") is None
    for age, device in enumerate(("old", "new")):
        path = pruning_report_path(tmp_path, device, "m")
        report().save(path)
        os.utime(path, (1000 + age, 1000 + age))
    report().save(pruning_report_path(tmp_path, "newest", "another model"))
    assert find_report(tmp_path, "here", "m") == pruning_report_path(tmp_path, "new", "m")
    report().save(pruning_report_path(tmp_path, "here", "m"))
    assert find_report(tmp_path, "here", "m") == pruning_report_path(tmp_path, "here", "m")


def test_a_file_decides_and_a_missing_or_damaged_one_refuses(tmp_path):
    path = tmp_path / "m.pruning.json"
    assert "was not measured" in decide_from_file(None, CONFIG, MODEL).reason
    assert "was not measured" in decide_from_file(path, CONFIG, MODEL).reason
    path.write_text("{", encoding="utf-8")
    assert "is damaged" in decide_from_file(path, CONFIG, MODEL).reason
    assert decide_from_file(path, KvPruningConfig(require_gate=False), MODEL).allowed
    report().save(path)
    assert decide_from_file(path, CONFIG, MODEL, 32).allowed
    assert not decide_from_file(path, CONFIG, MODEL, 16).allowed


def test_an_interval_is_students():
    values = [0.1, 0.4, 0.2, 0.5, 0.3]
    made = estimate(values)
    half = 2.7764 * statistics.stdev(values) / 5**0.5  # t of 4 degrees of freedom
    assert made.mean == pytest.approx(0.3)
    assert (made.low, made.high) == pytest.approx((0.3 - half, 0.3 + half), abs=1e-4)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, float("nan")], [0.0, float("inf")]])
def test_too_few_or_broken_values_have_no_interval(values):
    with pytest.raises(ProfileError):
        estimate(values)

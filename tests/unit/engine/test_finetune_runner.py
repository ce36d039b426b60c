import dataclasses
import weakref
from types import SimpleNamespace

import pytest
import torch

from core.config import AppArgs
from core.types import SliceKind, TaskKind
from engine.training import dpo
from engine.training.runner import FineTuneRunner
from engine.training.trainable import TrainableModel
from engine.vllm.task_table import TaskTable
from tests.support.clock import Clock
from tests.support.trainable_models import make_task, make_training, save_model


@pytest.fixture
def runner(tmp_path):
    args = AppArgs(training=make_training(), lora={"rank": 4, "alpha": 8.0})
    return FineTuneRunner(
        model_dir=save_model(tmp_path / "model", "llama"),
        args=args,
        dtype=torch.float32,
        device=torch.device("cpu"),
        weights=None,
    )


def finish(runner, max_iterations=500):
    """Iterations of one slice until a task ends."""
    for _ in range(max_iterations):
        report = runner.run(0.0, 1)
        assert len(report.slices) <= 1
        if report.finished:
            return report.finished
    raise AssertionError("no task ended")


def parameters(runner):
    return runner.shadow.tensors()


def test_the_warm_up_leaves_no_trace_and_knows_every_kind_of_slice(runner):
    assert runner.shadow.num_steps == 0
    assert all(bool((t == 0).all()) for name, t in parameters(runner).items() if "lora_B" in name)
    assert all(runner.admission.fits(kind, 8, 60.0, first=True) for kind in SliceKind)


def test_without_work_nothing_runs(runner):
    report = runner.run(1.0, 1)
    assert report.slices == []
    assert report.finished == []


def test_without_budget_nothing_runs(runner):
    runner.submit(make_task().to_wire())
    assert runner.run(0.0, 0).slices == []


@pytest.fixture
def pass_s(monkeypatch):
    """Seconds of a forward pass that is on the device; slices take none, for the clock stands still meanwhile."""
    clock, left_s = Clock(), [60.0]

    def settled_s(device):
        clock.sleep(left_s.pop() if left_s else 0.0)
        return clock.now_s

    monkeypatch.setattr("engine.training.runner.time", clock)
    monkeypatch.setattr("engine.training.runner.settled_s", settled_s)
    return left_s[0]


def test_the_budget_does_not_pay_for_the_forward_pass_in_flight(runner, pass_s):
    runner.submit(make_task().to_wire())
    report = runner.run(pass_s / 2, 0)
    assert report.slices
    assert {timing.latency_s for timing in report.slices} == {0.0}


def test_the_first_slice_of_a_blocking_step_is_not_timed_with_the_forward_pass_in_flight(runner, pass_s):
    runner.submit(make_task().to_wire())
    report = runner.run_step()
    assert {timing.latency_s for timing in report.slices} == {0.0}
    assert report.finished[0].busy_s == 0.0


def test_slices_end_as_soon_as_somebody_waits_for_the_device(runner):
    runner.submit(make_task().to_wire())
    asked = iter([False, False, True])
    assert len(runner.run(60.0, 0, lambda: next(asked)).slices) == 2
    assert len(runner.run(60.0, 1, lambda: True).slices) == 1, "at least one slice is one slice"


def test_a_slice_that_does_not_fit_is_not_started(runner, monkeypatch):
    runner.submit(make_task().to_wire())
    monkeypatch.setattr(runner.admission, "upper_s", lambda kind, tokens: 5.0)
    assert runner.run(4.0, 0).slices == []
    assert len(runner.run(4.0, 1).slices) == 1


def test_an_estimate_that_bars_a_slice_is_relaxed_in_the_end(runner):
    runner.submit(make_task().to_wire())
    spec = (SliceKind.EMBED, 56)
    for _ in range(3):
        runner.admission.observe(*spec, 30.0)
    runner.admission.observe(*spec, 1e-6)
    runs = [bool(runner.run(0.05, 0).slices) for _ in range(40)]
    assert not runs[0]
    assert any(runs)


def test_one_slice_at_a_time_equals_all_at_once(runner):
    wire = make_task().to_wire()
    runner.submit(wire)
    [result] = finish(runner)
    stepwise = parameters(runner)
    runner.shadow.load_adapter(None)
    runner.submit(wire)
    [again] = runner.run(60.0, 10_000).finished
    assert result.metrics == again.metrics
    assert result.num_slices == again.num_slices
    assert all(torch.equal(stepwise[name], t) for name, t in parameters(runner).items())


def test_tasks_end_in_their_order(runner):
    for seed in range(3):
        runner.submit({**make_task(seed=seed).to_wire(), "task_id": str(seed)})
    ended = [result.task_id for _ in range(3) for result in finish(runner)]
    assert ended == ["0", "1", "2"]


def test_an_aborted_task_leaves_the_adapter_alone_and_the_next_one_runs(runner):
    before = parameters(runner)
    runner.submit({**make_task().to_wire(), "task_id": "a"})
    runner.submit({**make_task().to_wire(), "task_id": "b"})
    for _ in range(5):
        runner.run(0.0, 1)
    runner.abort("a")
    runner.abort("unknown")
    assert all(torch.equal(before[name], t) for name, t in parameters(runner).items())
    [result] = finish(runner)
    assert result.task_id == "b"


def test_an_aborted_evaluation_of_live_gives_the_shadow_back(runner):
    runner.submit(make_task().to_wire())
    finish(runner)
    before = parameters(runner)
    runner.submit(dataclasses.replace(make_task(kind=TaskKind.EVALUATE), on_live=True).to_wire())
    runner.run(0.0, 1)
    assert not all(torch.equal(before[name], t) for name, t in parameters(runner).items())
    runner.abort(make_task(kind=TaskKind.EVALUATE).task_id)
    assert all(torch.equal(before[name], t) for name, t in parameters(runner).items())


def test_a_diverging_step_is_a_named_result_and_changes_nothing(runner, monkeypatch):
    before = parameters(runner)
    monkeypatch.setattr(dpo, "MAX_LOSS", 1e-6)
    runner.submit(make_task().to_wire())
    [result] = finish(runner)
    assert result.error.startswith("DivergedError: ")
    assert result.metrics is None
    assert all(torch.equal(before[name], t) for name, t in parameters(runner).items())


def test_set_live_scores_a_saved_version(runner, tmp_path):
    runner.submit(make_task().to_wire())
    finish(runner)
    runner.shadow.save_adapter(str(tmp_path / "v"), "base")
    evaluate = make_task(kind=TaskKind.EVALUATE)
    runner.submit(evaluate.to_wire())
    [shadow] = finish(runner)
    runner.shadow.load_adapter(None)
    runner.shadow.set_live(str(tmp_path / "v"))
    runner.submit(dataclasses.replace(evaluate, on_live=True).to_wire())
    [live] = finish(runner)
    assert live.scores == shadow.scores
    assert runner.describe()["shared_bytes"] == 0


def fail_slices(monkeypatch, error, *, above_tokens=0, times=1000):
    """The device has no room for slices of more than `above_tokens` padded tokens, `times` times."""
    left = [times]
    run_layer = TrainableModel.run_layer

    def failing(self, i, hidden, *rest):
        if hidden.shape[0] * hidden.shape[1] > above_tokens and left[0]:
            left[0] -= 1
            raise error
        return run_layer(self, i, hidden, *rest)

    monkeypatch.setattr(TrainableModel, "run_layer", failing)


@pytest.mark.parametrize(
    "words",
    ["CUDA out of memory", "DefaultCPUAllocator: can't allocate memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED"],
)
def test_running_out_of_memory_starts_the_step_again_with_smaller_slices(runner, monkeypatch, words):
    task = make_task(num_pairs=4)
    error = torch.OutOfMemoryError(words) if "CUDA out" in words else RuntimeError(words)
    runner.set_slice_tokens(10_000)
    runner.submit(dataclasses.replace(task, kind=TaskKind.EVALUATE).to_wire())
    largest = runner.run(0.0, 1).slices[0].num_tokens
    finish(runner)
    fail_slices(monkeypatch, error, above_tokens=largest // 2)
    runner.submit(task.to_wire())
    reports = []
    while not reports or not reports[-1].finished:
        reports.append(runner.run(0.0, 1))
    assert any(report.out_of_memory for report in reports)
    assert reports[-1].finished[0].error is None
    assert runner.shadow.num_steps == 1


@pytest.mark.parametrize("num_pairs", [1, 4])
def test_nothing_of_a_slice_is_held_any_more_when_its_memory_is_released(runner, monkeypatch, num_pairs):
    """The frames of an exception hold the tensors of the slice; an allocator cannot give back what is held."""
    held, alive = [], []

    def failing(self, i, hidden, *rest):
        attention = hidden.new_zeros(8)
        held.append(weakref.ref(attention))
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(TrainableModel, "run_layer", failing)
    monkeypatch.setattr(
        "engine.training.runner.release_cached_memory",
        lambda device: alive.extend([reference() is not None for reference in held]),
    )
    runner.submit(make_task(num_pairs=num_pairs).to_wire())
    while not held:
        runner.run(0.0, 1)
    assert alive == [False]


def largest_slice(runner):
    report = runner.run(0.0, 1)
    return report.slices[0].num_tokens


@pytest.mark.parametrize("num_pairs", [1, 4])
def test_a_step_gives_way_to_a_forward_pass_that_finds_no_memory(runner, num_pairs):
    runner.submit(make_task(num_pairs=num_pairs).to_wire())
    before = largest_slice(runner)
    runner.run(0.0, 3)
    assert runner.run(0.0, 0).activation_bytes > 0
    runner.make_room("OutOfMemoryError: CUDA out of memory")
    report = runner.run(0.0, 0)  # no slice may run: inference comes first
    assert (report.activation_bytes, report.slices, report.out_of_memory) == (0, [], True)
    assert largest_slice(runner) < before or num_pairs == 1
    (result,) = finish(runner)
    assert result.error is None
    assert runner.shadow.num_steps == 1


def test_without_a_step_there_is_nothing_to_give(runner):
    runner.make_room("OutOfMemoryError")
    assert not runner.run(0.0, 0).out_of_memory
    runner.submit(make_task().to_wire())
    assert largest_slice(runner) > 0, "a request for room is not kept for later steps"


def test_what_forward_passes_take_back_is_not_free_for_training(runner, monkeypatch):
    monkeypatch.setattr("engine.training.runner.free_memory_bytes", lambda device: 100)
    runner.kept_free_bytes = 60
    runner.submit(make_task().to_wire())
    (result,) = finish(runner)
    assert result.free_bytes == 40


def test_on_a_device_with_nothing_left_a_task_fails_by_name_before_its_first_slice(runner, monkeypatch):
    monkeypatch.setattr("engine.training.runner.free_memory_bytes", lambda device: 50)
    runner.kept_free_bytes = 60
    runner.submit(make_task().to_wire())
    report = runner.run(0.0, 1)
    assert report.slices == []
    assert report.finished[0].error.startswith("DeviceMemoryError: no memory is left for training")
    assert report.finished[0].free_bytes == 0


def test_a_pair_that_is_too_large_by_itself_is_a_named_failure(runner, monkeypatch):
    fail_slices(monkeypatch, torch.OutOfMemoryError("no room"))
    runner.submit(make_task(num_pairs=2).to_wire())
    reports = [runner.run(0.0, 1) for _ in range(20)]
    (result,) = [result for report in reports for result in report.finished]
    assert result.error.startswith("DeviceMemoryError: out of device memory")
    assert runner.shadow.num_steps == 0


def test_a_blocking_step_runs_to_its_end_and_no_further(runner):
    for name in ("a", "b"):
        runner.submit(dataclasses.replace(make_task(), task_id=name).to_wire())
    report = runner.run_step()
    assert [result.task_id for result in report.finished] == ["a"]
    assert report.activation_bytes == 0
    assert runner.shadow.num_steps == 1


def test_what_a_step_holds_is_reported(runner):
    runner.submit(make_task().to_wire())
    reports = []
    while not reports or not reports[-1].finished:
        reports.append(runner.run(0.0, 1))
    assert all(report.activation_bytes > 0 for report in reports[:-1])
    assert reports[-1].activation_bytes == 0
    assert reports[-1].finished[0].peak_bytes == max(report.peak_bytes for report in reports)


def test_running_out_of_memory_ends_the_iteration(runner, monkeypatch):
    """Inference waits behind it: nothing more may run than was planned."""
    for name in ("a", "b", "c"):
        runner.submit(dataclasses.replace(make_task(num_pairs=4), task_id=name).to_wire())
    fail_slices(monkeypatch, torch.OutOfMemoryError("no room"), times=1)
    reports = [runner.run(0.0, 1) for _ in range(3)]
    assert [len(report.slices) for report in reports] == [1, 0, 1]
    assert [report.out_of_memory for report in reports] == [False, True, False]
    assert not any(report.finished for report in reports)


def test_a_device_too_full_to_start_again_is_a_named_failure(runner, monkeypatch):
    task = make_task(num_pairs=4)
    runner.submit(task.to_wire())
    runner.run(0.0, 1)
    fail_slices(monkeypatch, torch.OutOfMemoryError("no room"))

    def refuse(*_, **__):
        raise torch.OutOfMemoryError("still no room")

    monkeypatch.setattr("engine.training.runner.DpoStep", refuse)
    (result,) = runner.run(0.0, 1).finished
    assert "still no room" in result.error
    assert runner.run(0.0, 1).finished == []


@pytest.mark.parametrize(
    "broken", [{}, {"kind": "train"}, {"kind": "paint", "pairs": []}, {"kind": "train", "pairs": [1]}]
)
def test_a_malformed_task_is_a_failed_result_and_not_the_end_of_the_engine(runner, broken):
    runner.submit({"task_id": "bad", **broken})
    runner.submit(make_task().to_wire())
    first = runner.run(0.0, 1)
    assert [(result.task_id, result.metrics) for result in first.finished] == [("bad", None)]
    assert len(first.slices) == 1
    table = TaskTable()
    table.add(SimpleNamespace(request_id="bad"), broken, now_s=0.0)
    assert table.state(1.0).max_batch_tokens == 0

"""The optimizer beside the model: same steps, same files, and nothing of it on the model's device."""

import pytest
import torch

from core.batch import ForwardShape
from core.config import AppArgs
from core.errors import DivergedError
from engine.training.checkpoint import read_training_state, write_training_state
from engine.training.dpo import DpoStep
from engine.training.offload import measure_work, place_all
from engine.training.runner import FineTuneRunner
from engine.training.shadow import ShadowAdapter
from profiler.energy import EnergyMeter
from profiler.profile import Profile
from tests.support.simulated_device import make_profile
from tests.support.trainable_models import build, make_task, make_training, run, save_model, snapshot

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("qwen"), "qwen2")


def trained(directory, optimizer=None, steps=3, copies=None):
    config = make_training(max_grad_norm=0.05, weight_decay=0.01)
    model = build(directory)
    shadow = ShadowAdapter(model, config, optimizer, copies)
    results = [run(DpoStep(model, shadow, make_task(seed=seed), config)).result() for seed in range(steps)]
    return model, shadow, config, results


def is_same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("elsewhere", [{"optimizer": CPU}, {"copies": CPU}, {"optimizer": CPU, "copies": CPU}])
def test_steps_are_bit_equal_on_one_device_and_the_model_sees_them(qwen, elsewhere):
    here_model, here, _, here_results = trained(qwen, None)
    there_model, there, _, there_results = trained(qwen, **elsewhere)
    assert here_results == there_results
    assert is_same(snapshot(here), snapshot(there))
    for mine, theirs in zip(
        here_model.lora_parameters().values(), there_model.lora_parameters().values(), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_only_parameters_are_left_on_the_models_device(qwen):
    _, here, _, _ = trained(qwen, None, steps=0)
    _, there, _, _ = trained(qwen, CPU, steps=0)
    size = here.state_tensors()["flat"].nbytes
    assert sum(here.memory().values()) > 9 * size
    assert there.memory() == {"trainer": 2 * size, "state_copies": 0}
    _, half, _, _ = trained(qwen, copies=CPU, steps=0)
    assert half.memory() == {**here.memory(), "state_copies": 0}


def test_a_step_that_diverges_leaves_model_and_optimizer_as_they_were(qwen):
    model, shadow, _, _ = trained(qwen, CPU)
    before = snapshot(shadow)
    lora = {name: parameter.clone() for name, parameter in model.lora_parameters().items()}
    gradients, _ = shadow.new_gradients()
    gradients.fill_(float("nan"))
    with pytest.raises(DivergedError):
        shadow.apply(gradients)
    shadow.state_tensors()["exp_avg_sq"].fill_(float("inf"))
    with pytest.raises(DivergedError, match="not finite"):
        shadow.apply(torch.ones_like(gradients))
    assert is_same({name: parameter.detach() for name, parameter in model.lora_parameters().items()}, lora)
    assert torch.equal(snapshot(shadow)["flat"], before["flat"])


@pytest.mark.parametrize(("written_by", "read_by"), [(None, CPU), (CPU, None), (CPU, CPU)])
def test_a_checkpoint_goes_on_wherever_the_optimizer_is(qwen, tmp_path, written_by, read_by):
    _, whole, config, _ = trained(qwen, None, steps=4)
    _, first, _, _ = trained(qwen, written_by, steps=2)
    write_training_state(tmp_path / "state", first.checkpoint(), {})
    model = build(qwen, seed=77)
    second = ShadowAdapter(model, config, read_by)
    second.restore(read_training_state(tmp_path / "state")[0])
    for seed in (2, 3):
        run(DpoStep(model, second, make_task(seed=seed), config))
    assert is_same(snapshot(second), snapshot(whole))
    assert is_same(second.tensors(), whole.tensors())


def test_versions_are_loaded_reset_and_stand_in_as_ever(qwen, tmp_path):
    def life(device):
        model, shadow, config, _ = trained(qwen, device)
        shadow.save_adapter(tmp_path / f"{device}", "base")
        shadow.set_live(tmp_path / f"{device}")
        run(DpoStep(model, shadow, make_task(seed=5), config))
        shadow.put_live_in()
        while_live = shadow.tensors()
        kept = shadow.checkpoint()
        shadow.put_shadow_back()
        run(DpoStep(model, shadow, make_task(seed=6), config))
        stages = [while_live, dict(kept.tensors), snapshot(shadow)]
        shadow.load_adapter(tmp_path / f"{device}")
        run(DpoStep(model, shadow, make_task(seed=7), config))
        stages.append(snapshot(shadow))
        shadow.load_adapter(None)
        run(DpoStep(model, shadow, make_task(seed=8), config))
        return [*stages, snapshot(shadow), shadow.tensors()]

    for here, there in zip(life(None), life(CPU), strict=True):
        assert is_same(here, there)


CUDA = torch.device("cuda")
"""Only its name is needed: nothing is put there."""


class Counter:
    """A sensor whose joules grow by the same amount with each reading."""

    def __init__(self, *joules, name="ina"):
        self.readings, self.name = iter(joules), name

    def read_j(self):
        return next(self.readings)


def test_both_devices_are_measured_over_idle_and_nothing_is_changed():
    flat = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    before = flat.clone()
    # Readings before and after idling, and each kind here and there. One piece of work each, however long it takes.
    meter = EnergyMeter([Counter(0, 0, 5, 1005, 1005, 1006, 1006, 1008, 1008, 1508)])
    costs = measure_work(flat, AppArgs(), meter, measure_s=0.0)
    joules = {
        kind: {place: cost.seconds * cost.watts for place, cost in found.items()} for kind, found in costs.items()
    }
    assert joules["optimizer"] == pytest.approx({"engine": 1000, "cpu": 1})
    assert joules["checkpoint"] == pytest.approx({"engine": 2, "cpu": 500})
    assert torch.equal(flat, before)


@pytest.mark.parametrize("seen", [[], ["rapl"], ["nvml"]])
def test_without_sensors_of_both_devices_there_are_seconds_and_no_watts(seen):
    meter = EnergyMeter([Counter(*range(100), name=name) for name in seen])
    costs = measure_work(torch.zeros(10), AppArgs(), meter, measure_s=0.0)
    known = [cost for found in costs.values() for cost in found.values()]
    assert [cost.watts for cost in known] == [None] * 4
    assert all(cost.seconds > 0 for cost in known)


def optimizer_of(args, device):
    return place_all(args, device)["optimizer"]


def profiled(tmp_path, engine, cpu, **offload):
    """Settings with a profile in which AdamW has these seconds and watts."""
    work = {"optimizer": {"engine": dict(zip(("seconds", "watts"), engine, strict=True))}}
    work["optimizer"]["cpu"] = dict(zip(("seconds", "watts"), cpu, strict=True))
    make_profile().with_work(work).save(tmp_path / "profile.json")
    return AppArgs.model_validate({"profile": {"path": tmp_path / "profile.json"}, "offload": offload})


def test_the_profile_places_the_optimizer_of_an_engine_on_a_gpu(tmp_path):
    assert optimizer_of(profiled(tmp_path, (0.004, 250.0), (0.030, 60.0)), CUDA).place == "engine"
    assert optimizer_of(profiled(tmp_path, (0.020, 15.0), (0.040, 4.0)), CUDA).place == "cpu"
    both = place_all(profiled(tmp_path, (0.020, 15.0), (0.040, 4.0)), CUDA)
    assert both["checkpoint"].place == "cpu"
    assert both["checkpoint"].reason == "the optimizer is there"
    never = profiled(tmp_path, (0.020, 15.0), (0.040, 4.0), optimizer="never")
    assert optimizer_of(never, CUDA).place == "engine"


def test_a_forward_pass_has_its_time_before_the_optimizer(tmp_path):
    args = profiled(tmp_path, (0.001, 15.0), (0.1, 0.1))
    forward_s = Profile.load(args.profile.path).latency.forward_s(ForwardShape(num_decode=1))

    def placed(tbt_s):
        slo = args.slo.model_copy(update={"tbt_s": tbt_s / args.scheduler.slack_fraction})
        return optimizer_of(args.model_copy(update={"slo": slo}), CUDA).place

    assert placed(forward_s + 0.101) == "cpu"
    assert placed(forward_s + 0.099) == "engine"


@pytest.mark.parametrize("content", [None, "{}"])
def test_without_a_usable_profile_nothing_moves(tmp_path, content):
    path = tmp_path / "profile.json"
    if content:
        path.write_text(content)
    found = optimizer_of(AppArgs.model_validate({"profile": {"path": path}}), CUDA)
    assert found.place == "engine"
    assert "mace profile measure" in found.reason


def test_on_the_cpu_there_is_nothing_to_move_and_nothing_to_measure(qwen):
    args = AppArgs.model_validate({"offload": {"optimizer": "always"}, "lora": {"rank": 4}})
    runner = FineTuneRunner(model_dir=qwen, args=args, dtype=torch.float32, device=CPU, weights=None)
    for placed in runner.placements.values():
        assert placed.place == "engine"
        assert "nothing to move" in placed.reason
    assert runner.measure_work(EnergyMeter([])) == {}

"""The optimizer beside the model: same steps, same files, and nothing of it on the model's device."""

import pytest
import torch

from core.errors import DivergedError
from engine.training.checkpoint import read_training_state, write_training_state
from engine.training.dpo import DpoStep
from engine.training.shadow import ShadowAdapter
from tests.support.trainable_models import build, make_task, make_training, run, save_model, snapshot

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("qwen"), "qwen2")


def trained(directory, device, steps=3, **config):
    config = make_training(max_grad_norm=0.05, weight_decay=0.01, **config)
    model = build(directory)
    shadow = ShadowAdapter(model, config, device)
    results = [run(DpoStep(model, shadow, make_task(seed=seed), config)).result() for seed in range(steps)]
    return model, shadow, config, results


def is_same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_steps_are_bit_equal_on_one_device_and_the_model_sees_them(qwen):
    here_model, here, _, here_results = trained(qwen, None)
    there_model, there, _, there_results = trained(qwen, CPU)
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
    own = {tensor.data_ptr() for tensor in there.state_tensors().values()}
    assert there._flat.data_ptr() not in own


def test_a_step_that_diverges_leaves_model_and_optimizer_as_they_were(qwen):
    model, shadow, config, _ = trained(qwen, CPU)
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

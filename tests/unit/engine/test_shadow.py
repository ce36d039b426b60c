import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from core.errors import AdapterError, DamagedAdapterError, DivergedError
from engine.training.checkpoint import read_training_state, write_training_state
from engine.training.dpo import DpoStep
from engine.training.shadow import ShadowAdapter
from engine.training.trainable import TARGET_MODULES
from tests.support.trainable_models import (
    CONFIGS,
    build,
    make_task,
    make_training,
    run,
    run_to_loss,
    save_model,
    snapshot,
    start,
)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("qwen"), "qwen2")


def _same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _save(shadow, path, progress=None):
    write_training_state(path, shadow.checkpoint(), progress or {})


def _load(shadow, path):
    state, progress = read_training_state(path)
    shadow.restore(state)
    return progress


def _train(model, shadow, config, seeds):
    for seed in seeds:
        run(DpoStep(model, shadow, make_task(seed=seed), config))


def test_step_equals_torch_adamw_with_clipping(qwen):
    config = make_training(max_grad_norm=0.05)
    model, shadow, step = start(qwen, make_task(), config)
    parameters = [torch.nn.Parameter(tensor) for tensor in shadow.tensors().values()]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    for seed in range(3):
        step = DpoStep(model, shadow, make_task(seed=seed), config)
        run_to_loss(step)
        for parameter, grad in zip(parameters, step.gradients().values(), strict=True):
            parameter.grad = grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).item()
        optimizer.step()
        step.run_slice()
        assert norm > config.max_grad_norm
        assert step.result()[0].grad_norm == pytest.approx(norm, rel=1e-5)
    for parameter, tensor in zip(parameters, shadow.tensors().values(), strict=True):
        torch.testing.assert_close(parameter.detach(), tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", CONFIGS)
def test_save_loads_in_peft_with_equal_logits(tmp_path, kind):
    config, directory = make_training(), save_model(tmp_path / "model", kind)
    model, shadow, _ = start(directory, make_task(), config)
    _train(model, shadow, config, range(2))
    shadow.save_adapter(tmp_path / "v0001", base_model="org/base")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), tmp_path / "v0001")
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model.causal_lm(ids).logits, rtol=0, atol=1e-5)
    fields = json.loads((tmp_path / "v0001" / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == "org/base"
    assert fields["target_modules"] == sorted(TARGET_MODULES[kind])
    assert (fields["r"], fields["lora_alpha"], fields["inference_mode"]) == (4, 8, True)
    assert str(tmp_path) not in json.dumps(fields)
    assert sorted(path.name for path in (tmp_path / "v0001").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_load_takes_parameters_and_clears_the_optimizer(qwen, tmp_path):
    config = make_training()
    _, shadow, step = start(qwen, make_task(), config)
    run(step)
    shadow.save_adapter(tmp_path, "base")
    other = ShadowAdapter(build(qwen, seed=77), config)
    other.load_adapter(tmp_path)
    assert _same(other.tensors(), shadow.tensors())
    assert other.num_steps == 0
    assert not snapshot(other)["exp_avg"].any()


def test_damaged_adapters_are_refused_and_change_nothing(qwen, tmp_path):
    config = make_training()
    shadow = ShadowAdapter(build(qwen), config)
    before = snapshot(shadow)
    ShadowAdapter(build(qwen, rank=8), config).save_adapter(tmp_path / "rank8", "base")
    shadow.save_adapter(tmp_path / "good", "base")
    tensors = load_file(tmp_path / "good" / "adapter_model.safetensors")
    cases = {
        "missing": dict(list(tensors.items())[1:]),
        "nan": {name: torch.full_like(t, float("nan")) for name, t in tensors.items()},
    }
    for name, changed in cases.items():
        shadow.save_adapter(tmp_path / name, "base")
        save_file(changed, tmp_path / name / "adapter_model.safetensors")
    shadow.save_adapter(tmp_path / "torn", "base")
    (tmp_path / "torn" / "adapter_model.safetensors").write_bytes(b"xx")
    messages = {"missing": "1 tensors", "nan": "not finite", "torn": "read", "rank8": "rank 8", "absent": "read"}
    for name, message in messages.items():
        with pytest.raises(DamagedAdapterError, match=message):
            shadow.load_adapter(tmp_path / name)
    assert _same(before, snapshot(shadow))


def test_checkpoint_restore_and_reset(qwen):
    config = make_training()
    model = build(qwen, warm=False)
    shadow = ShadowAdapter(model, config)
    fresh = snapshot(shadow)
    _train(model, shadow, config, [0])
    state, before = shadow.checkpoint(), snapshot(shadow)
    state.is_leased = True
    _train(model, shadow, config, [1])
    after = snapshot(shadow)
    with torch.inference_mode():
        shadow.restore(state)
    assert _same(snapshot(shadow), before)
    _train(model, shadow, config, [1])
    assert _same(snapshot(shadow), after)
    assert shadow.num_steps == 2
    shadow.reset()
    assert _same(snapshot(shadow), fresh)


def test_training_state_resumes_bit_equal(qwen, tmp_path):
    config, path = make_training(), tmp_path / "state" / "training.safetensors"
    model, shadow, _ = start(qwen, make_task(), config)
    _train(model, shadow, config, range(2))
    _save(shadow, path)
    _train(model, shadow, config, range(2, 4))
    resumed = build(qwen, seed=99)
    resumed_shadow = ShadowAdapter(resumed, config)
    _load(resumed_shadow, path)
    assert resumed_shadow.num_steps == 2
    _train(resumed, resumed_shadow, config, range(2, 4))
    assert _same(snapshot(resumed_shadow), snapshot(shadow))
    assert [p.name for p in path.parent.iterdir()] == ["training.safetensors"]


def test_damaged_training_state(qwen, tmp_path, monkeypatch):
    config, path = make_training(), tmp_path / "training.safetensors"
    shadow = ShadowAdapter(build(qwen), config)
    with pytest.raises(DamagedAdapterError, match="cannot be read"):
        _load(shadow, path)
    _save(ShadowAdapter(build(qwen, rank=8), config), path)
    with pytest.raises(DamagedAdapterError, match="another model or LoRA shape"):
        _load(shadow, path)
    _save(shadow, path)
    good = path.read_bytes()

    def full(_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(AdapterError, match="no space left"):
        _save(shadow, path)
    assert path.read_bytes() == good
    assert [p.name for p in tmp_path.iterdir()] == ["training.safetensors"]
    path.write_bytes(good[:-4])
    with pytest.raises(DamagedAdapterError, match="cannot be read"):
        _load(shadow, path)


def test_a_state_of_the_first_format_loads_without_progress(qwen, tmp_path):
    config, path = make_training(), tmp_path / "training.safetensors"
    model, shadow, _ = start(qwen, make_task(), config)
    _train(model, shadow, config, range(2))
    state = snapshot(shadow)
    num_steps = int(state.pop("num_steps"))
    shapes = {name: list(tensor.shape) for name, tensor in shadow.tensors().items()}
    header = {"format": 1, "num_steps": num_steps, "shapes": shapes}
    save_file(state, path, metadata={"mace": json.dumps(header)})
    other = ShadowAdapter(build(qwen, seed=99), config)
    assert _load(other, path) == {}
    assert _same(snapshot(other), snapshot(shadow))
    save_file(state, path, metadata={"mace": json.dumps(header | {"format": 3})})
    with pytest.raises(DamagedAdapterError, match="unknown format 3"):
        _load(other, path)


def test_progress_and_random_numbers_come_back(qwen, tmp_path):
    config, path = make_training(), tmp_path / "training.safetensors"
    shadow = ShadowAdapter(build(qwen), config)
    progress = {"cursor": [3, 0.5], "candidate": {"pairs": ["a", "ä"]}, "none": None}
    _save(shadow, path, progress)
    drawn = torch.rand(3)
    torch.manual_seed(99)
    assert _load(shadow, path) == progress
    assert torch.equal(torch.rand(3), drawn)
    with pytest.raises(AdapterError, match="cannot be written"):
        _save(shadow, path, {"not JSON": object()})
    assert _load(shadow, path) == progress


def test_random_numbers_of_another_torch_are_left_out(qwen, tmp_path, monkeypatch):
    shadow, path = ShadowAdapter(build(qwen), make_training()), tmp_path / "training.safetensors"
    monkeypatch.setattr(
        "engine.training.shadow.random_state", lambda device: {"cpu": torch.zeros(7, dtype=torch.uint8)}
    )
    _save(shadow, path, {"step": 1})
    before = torch.get_rng_state()
    assert _load(shadow, path) == {"step": 1}
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["flat", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_leaves_a_value_that_is_not_finite_is_undone(qwen, monkeypatch, name, value):
    config = make_training()
    model, shadow, step = start(qwen, make_task(), config)
    run(step)
    before = snapshot(shadow)
    optimizer_step = torch.optim.AdamW.step

    def overflow(self, *args):
        optimizer_step(self, *args)
        shadow.state_tensors()[name][17] = value

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", overflow)
        with pytest.raises(DivergedError, match="not finite after the optimizer step"):
            run(DpoStep(model, shadow, make_task(seed=1), config))
    assert _same(before, snapshot(shadow))
    other_model = build(qwen)
    other = ShadowAdapter(other_model, config)
    _train(other_model, other, config, [0, 1])
    _train(model, shadow, config, [1])
    assert _same(snapshot(shadow), snapshot(other))


def test_a_checkpoint_stays_as_it_is_while_someone_reads_it(qwen):
    config = make_training()
    model, shadow, step = start(qwen, make_task(), config)
    run(step)
    state = shadow.checkpoint()
    assert shadow.checkpoint() is state  # nothing has changed: no second copy
    state.is_leased = True
    kept = {name: tensor.clone() for name, tensor in state.tensors.items()}
    _train(model, shadow, config, [1])
    second = shadow.checkpoint()
    _train(model, shadow, config, [2])
    assert _same(state.tensors, kept)
    later = shadow.checkpoint()
    assert later is second  # one copy beside the one that is read
    assert later is not state
    assert later.num_steps == 3
    assert not _same(later.tensors, kept)
    state.is_leased = False
    for number in (3, 4):
        _train(model, shadow, config, [number])
        latest = shadow.checkpoint()
        assert latest is state or latest is later  # memory is used again


def test_infinite_gradient_is_refused(qwen):
    shadow = ShadowAdapter(build(qwen), make_training())
    before = snapshot(shadow)
    gradients, _ = shadow.new_gradients()
    gradients[0] = float("inf")
    with pytest.raises(DivergedError, match="norm is inf"):
        shadow.apply(gradients)
    assert _same(before, snapshot(shadow))
    assert shadow.num_steps == 0

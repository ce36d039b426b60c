import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from core.errors import AdapterError, DamagedAdapterError, DivergedError
from engine.dpo import DpoStep
from engine.shadow import ShadowAdapter
from tests.unit.engine.trainable_models import build, make_task, make_training, run, run_to_loss, save_model, start


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("qwen"), "qwen2")


def _same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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


def test_save_loads_in_peft_with_equal_logits(qwen, tmp_path):
    config = make_training()
    model, shadow, _ = start(qwen, make_task(), config)
    _train(model, shadow, config, range(2))
    shadow.save(tmp_path / "v0001", base_model="org/base")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(qwen), tmp_path / "v0001")
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model.causal_lm(ids).logits, rtol=0, atol=1e-6)
    fields = json.loads((tmp_path / "v0001" / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == "org/base"
    assert fields["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
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
    shadow.save(tmp_path, "base")
    other = ShadowAdapter(build(qwen, seed=77), config)
    other.load(tmp_path)
    assert _same(other.tensors(), shadow.tensors())
    assert other.num_steps == 0
    assert not other.snapshot()["exp_avg"].any()


def test_damaged_adapters_are_refused_and_change_nothing(qwen, tmp_path):
    config = make_training()
    shadow = ShadowAdapter(build(qwen), config)
    before = shadow.snapshot()
    ShadowAdapter(build(qwen, rank=8), config).save(tmp_path / "rank8", "base")
    shadow.save(tmp_path / "good", "base")
    tensors = load_file(tmp_path / "good" / "adapter_model.safetensors")
    cases = {
        "missing": dict(list(tensors.items())[1:]),
        "nan": {name: torch.full_like(t, float("nan")) for name, t in tensors.items()},
    }
    for name, changed in cases.items():
        shadow.save(tmp_path / name, "base")
        save_file(changed, tmp_path / name / "adapter_model.safetensors")
    shadow.save(tmp_path / "torn", "base")
    (tmp_path / "torn" / "adapter_model.safetensors").write_bytes(b"xx")
    messages = {"missing": "1 tensors", "nan": "not finite", "torn": "read", "rank8": "rank 8", "absent": "read"}
    for name, message in messages.items():
        with pytest.raises(DamagedAdapterError, match=message):
            shadow.load(tmp_path / name)
    assert _same(before, shadow.snapshot())


def test_snapshot_restore_and_reset(qwen):
    config = make_training()
    model = build(qwen, warm=False)
    shadow = ShadowAdapter(model, config)
    fresh = shadow.snapshot()
    _train(model, shadow, config, [0])
    snapshot = shadow.snapshot()
    assert all(tensor.device.type == "cpu" for tensor in snapshot.values())
    _train(model, shadow, config, [1])
    after = shadow.snapshot()
    with torch.inference_mode():
        shadow.restore(snapshot)
    assert _same(shadow.snapshot(), snapshot)
    _train(model, shadow, config, [1])
    assert _same(shadow.snapshot(), after)
    assert shadow.num_steps == 2
    shadow.reset()
    assert _same(shadow.snapshot(), fresh)


def test_training_state_resumes_bit_equal(qwen, tmp_path):
    config, path = make_training(), tmp_path / "state" / "training.safetensors"
    model, shadow, _ = start(qwen, make_task(), config)
    _train(model, shadow, config, range(2))
    shadow.save_training_state(path)
    _train(model, shadow, config, range(2, 4))
    resumed = build(qwen, seed=99)
    resumed_shadow = ShadowAdapter(resumed, config)
    resumed_shadow.load_training_state(path)
    assert resumed_shadow.num_steps == 2
    _train(resumed, resumed_shadow, config, range(2, 4))
    assert _same(resumed_shadow.snapshot(), shadow.snapshot())
    assert [p.name for p in path.parent.iterdir()] == ["training.safetensors"]


def test_damaged_training_state(qwen, tmp_path, monkeypatch):
    config, path = make_training(), tmp_path / "training.safetensors"
    shadow = ShadowAdapter(build(qwen), config)
    with pytest.raises(DamagedAdapterError, match="cannot be read"):
        shadow.load_training_state(path)
    ShadowAdapter(build(qwen, rank=8), config).save_training_state(path)
    with pytest.raises(DamagedAdapterError, match="another model or LoRA shape"):
        shadow.load_training_state(path)
    shadow.save_training_state(path)
    good = path.read_bytes()

    def full(_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(AdapterError, match="no space left"):
        shadow.save_training_state(path)
    assert path.read_bytes() == good
    assert [p.name for p in tmp_path.iterdir()] == ["training.safetensors"]
    path.write_bytes(good[:-4])
    with pytest.raises(DamagedAdapterError, match="cannot be read"):
        shadow.load_training_state(path)


def test_infinite_gradient_is_refused(qwen):
    shadow = ShadowAdapter(build(qwen), make_training())
    before = shadow.snapshot()
    gradients, _ = shadow.new_gradients()
    gradients[0] = float("inf")
    with pytest.raises(DivergedError, match="norm is inf"):
        shadow.apply(gradients)
    assert _same(before, shadow.snapshot())
    assert shadow.num_steps == 0

"""Training on quantized checkpoints is training on the model that they mean, one unpacked layer at a time."""

import os
import shutil
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.config import AppArgs
from core.errors import ConfigError, UnsupportedModelError
from core.types import SliceKind
from engine.vllm import compat
from tests.support.quantized_models import FORMS, change_config, quantize
from tests.support.trainable_models import build, make_config, make_task, make_training, run, run_to_loss, start
from tests.support.trainable_models import save_model as save

FORMS_OF_KINDS = [
    *((form, "llama") for form in FORMS),
    *((form, "qwen2") for form in ("compressed_zeros", "awq")),
    *((form, "phi3") for form in ("compressed_zeros", "gptq", "awq", "fp8_block")),
    ("gptq", "gemma3_text"),
    *((form, "qwen3_moe") for form in ("compressed", "gptq", "awq", "fp8_block")),
]


@pytest.fixture
def plain(tmp_path):
    save(tmp_path / "plain", "llama")
    return tmp_path / "plain"


def edit(directory, change):
    """Rewrite the tensors of a checkpoint."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("form", "kind"), FORMS_OF_KINDS)
def test_loss_and_gradients_equal_those_on_the_dequantized_model(tmp_path, form, kind):
    save(tmp_path / "plain", kind, **({"moe_intermediate_size": 32} if kind == "qwen3_moe" else {}))
    meant = quantize(tmp_path / "plain", tmp_path / "packed", FORMS[form])
    found = []
    for directory in (tmp_path / "packed", meant, tmp_path / "plain"):
        _, _, step = start(str(directory), make_task())
        run_to_loss(step)
        gradients = step.gradients()
        metrics, scores = run(step).result()
        found.append((metrics, scores, gradients))
    (ours, our_scores, our_gradients), (theirs, their_scores, their_gradients), (_, other_scores, _) = found
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
    for our, their, other in zip(our_scores, their_scores, other_scores, strict=True):
        assert our.reference_chosen_logp == pytest.approx(their.reference_chosen_logp, rel=1e-5)
        assert our.policy_rejected_logp == pytest.approx(their.policy_rejected_logp, rel=1e-5)
        assert our.policy_rejected_logp != pytest.approx(other.policy_rejected_logp, rel=1e-5)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in our_gradients.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(
            gradient, their_gradients[name], rtol=1e-5, atol=1e-5 * float(gradient.abs().max())
        )


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_rounds_each_weight_once(plain, tmp_path, form):
    meant = quantize(plain, tmp_path / "packed", FORMS[form])
    expected = load_file(meant / "model.safetensors")
    model = build(str(tmp_path / "packed"), dtype=torch.bfloat16)
    for number, layer in enumerate(model.causal_lm.model.layers):
        for name in ("self_attn.k_proj", "mlp.down_proj"):
            weight = layer.get_submodule(name).base_layer.unpacked()
            wanted = expected[f"model.layers.{number}.{name}.weight"]
            assert weight.dtype == torch.bfloat16
            assert ((weight.float() - wanted).abs() <= 2**-8 * wanted.abs()).all()


def test_layers_that_the_checkpoint_has_unquantized_stay_so(plain, tmp_path):
    def is_plain(layer):
        return "layers.1." in layer or layer.endswith("down_proj")

    meant = quantize(plain, tmp_path / "packed", FORMS["compressed"], skip=is_plain)
    steps = [start(str(directory), make_task()) for directory in (tmp_path / "packed", meant)]
    assert steps[0][0].layer_weights == steps[1][0].layer_weights
    ours, theirs = (run(step).result()[0] for _, _, step in steps)
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)


class Alive:
    """Bytes of the weights given to torch's linear function that are not parameters and exist still."""

    def __init__(self, monkeypatch):
        self.sizes, self.most, self.count = {}, 0, 0
        linear = torch.nn.functional.linear

        def watched(hidden, weight, bias=None):
            if not isinstance(weight, torch.nn.Parameter):
                self._add(weight)
            return linear(hidden, weight, bias)

        monkeypatch.setattr(torch.nn.functional, "linear", watched)

    def _add(self, weight):
        storage, number = weight.untyped_storage(), self.count
        self.count += 1
        self.sizes[number] = storage.nbytes()
        weakref.finalize(weight, self.sizes.pop, number)
        self.most = max(self.most, self.now)

    @property
    def now(self):
        return sum(self.sizes.values())


@pytest.mark.parametrize("form", ["compressed", "gptq", "awq", "fp8"])
def test_only_one_layers_weights_exist_and_only_within_a_slice(plain, tmp_path, monkeypatch, form):
    quantize(plain, tmp_path / "packed", FORMS[form])
    alive = Alive(monkeypatch)
    model, _, step = start(str(tmp_path / "packed"), make_task(), make_training(max_slice_tokens=40))
    shape = make_config("llama")
    layer_bytes = 4 * (model.layer_weights - 2 * shape.hidden_size)
    assert model.unpacked_bytes == layer_bytes
    largest = 4 * shape.hidden_size * shape.intermediate_size
    most = {}
    while step.next_slice is not None:
        alive.most = 0
        kind = step.run_slice()
        assert alive.now == 0
        most[kind] = max(most.get(kind, 0), alive.most)
    assert most[SliceKind.REFERENCE_LAYER] == most[SliceKind.POLICY_LAYER] == largest
    assert layer_bytes - largest <= most[SliceKind.BACKWARD_LAYER] <= layer_bytes


def test_what_stays_is_a_quarter_of_sixteen_bits(tmp_path):
    save(tmp_path / "plain", "llama", hidden_size=128, head_dim=32, intermediate_size=256, num_hidden_layers=1)
    quantize(tmp_path / "plain", tmp_path / "packed", replace(FORMS["compressed"], group_size=128))
    sizes = [
        sum(one.nbytes for one in model.causal_lm.model.layers.parameters() if not one.requires_grad)
        for model in (build(str(tmp_path / name), dtype=torch.bfloat16) for name in ("packed", "plain"))
    ]
    assert sizes[0] / sizes[1] == pytest.approx(0.25 * (1 + 4 / 128), rel=0.01)


REFUSED = {
    "bitsandbytes": ({"quant_method": "bitsandbytes"}, "training knows"),
    "nvfp4": ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"),
    "transforms": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "transform_config": {"R1": {}}},
        "transforms",
    ),
    "gptq_3_bits": ({"quant_method": "gptq", "bits": 3, "group_size": 16, "sym": True}, "bits are 3"),
    "gptq_asymmetric": ({"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False}, "not symmetric"),
    "gptq_order": (
        {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True, "desc_act": True},
        "desc_act",
    ),
    "gptq_exception": (
        {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True, "dynamic": {"+:a": {"bits": 3}}},
        "bits are 3, 4",
    ),
    "awq_gemv": ({"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemv"}, "gemv"),
    "awq_without_zeros": ({"quant_method": "awq", "bits": 4, "zero_point": False}, "no zero points"),
}


SETTLED_AT_START = {
    "gptq": (FORMS["gptq"].config(FORMS["gptq"]), None),
    "compressed": (FORMS["compressed_zeros"].config(FORMS["compressed_zeros"]), None),
    "awq_without_zeros": (
        {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": False},
        "with awq: it has no zero points",
    ),
}


@pytest.mark.parametrize("config", [pytest.param(config, id=name) for name, config in REFUSED.items()])
def test_what_the_trainer_does_not_know_is_refused_by_name(plain, tmp_path, config):
    quantize(plain, tmp_path / "packed", FORMS["gptq"])
    change_config(tmp_path / "packed", quantization_config=config[0])
    with pytest.raises(UnsupportedModelError, match=f"{config[0]['quant_method']}: .*{config[1]}"):
        build(str(tmp_path / "packed"))


@pytest.mark.parametrize("config", [pytest.param(config, id=name) for name, config in SETTLED_AT_START.items()])
def test_an_engine_with_training_says_so_before_it_loads_anything(tmp_path, tiny_assistant, config, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))  # vLLM writes there
    directory = tmp_path / "packed"
    shutil.copytree(tiny_assistant, directory)
    change_config(directory, quantization_config=config[0], dtype="bfloat16")
    settings = {"model": {"model_source": str(directory)}}
    if config[1] is None:
        compat.make_config(AppArgs.model_validate(settings), str(directory))
    else:
        with pytest.raises(ConfigError, match=rf"{config[1]}\. .*training\.enabled: false"):
            compat.make_config(AppArgs.model_validate(settings), str(directory))
    compat.make_config(AppArgs.model_validate({**settings, "training": {"enabled": False}}), str(directory))


LAYER = "model.layers.1.mlp.down_proj"


def swap_scales(tensors):
    tensors[f"{LAYER}.weight_scale"] = tensors[f"{LAYER}.weight_scale"][:, :2].contiguous()


def add_order(tensors):
    tensors[f"{LAYER}.weight_g_idx"] = torch.arange(48, dtype=torch.int32)


def shorten(tensors):
    tensors[f"{LAYER}.weight_packed"] = tensors[f"{LAYER}.weight_packed"][:, :5].contiguous()


def make_bytes(tensors):
    tensors[f"{LAYER}.weight_packed"] = tensors[f"{LAYER}.weight_packed"].view(torch.uint8)


@pytest.mark.parametrize("change", [swap_scales, add_order, shorten, make_bytes])
def test_tensors_that_mean_something_else_are_refused_with_the_layers_name(plain, tmp_path, change):
    quantize(plain, tmp_path / "packed", FORMS["compressed"])
    edit(tmp_path / "packed", change)
    if change is swap_scales:  # two groups of 24 are a checkpoint of another group size
        build(str(tmp_path / "packed"))
        edit(tmp_path / "packed", lambda tensors: tensors.update({f"{LAYER}.weight_scale": torch.ones(32, 5)}))
    with pytest.raises(UnsupportedModelError, match=LAYER):
        build(str(tmp_path / "packed"))


def test_a_quantized_head_is_refused(plain, tmp_path):
    quantize(plain, tmp_path / "packed", FORMS["compressed"])

    def pack_head(tensors):
        tensors.pop("lm_head.weight")
        for leaf in ("weight_packed", "weight_scale"):
            tensors[f"lm_head.{leaf}"] = torch.zeros(61, 4 if leaf == "weight_packed" else 2).to(
                torch.int32 if leaf == "weight_packed" else torch.float32
            )

    edit(tmp_path / "packed", pack_head)
    with pytest.raises(UnsupportedModelError, match="lm_head is quantized"):
        build(str(tmp_path / "packed"))

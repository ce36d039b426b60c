import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, GPT2Config

from core.errors import ConfigError, ModelNotFoundError, UnsupportedModelError
from tests.support.trainable_models import CONFIGS, LONGROPE, build, make_task, run, save_model, start


def _forward(model, ids):
    with torch.no_grad():
        hidden = model.embed(ids)
        for i in range(model.num_layers):
            hidden = model.run_layer(i, hidden, model.rotary(i, ids.shape[1]))
        return functional.linear(model.final_norm(hidden), model.head_weight)


def _fused(directory: str) -> dict[str, torch.Tensor]:
    """Weights as vLLM holds them on CUDA: q, k, v and gate, up as rows of one tensor each."""
    weights = load_file(Path(directory) / "model.safetensors")
    for layer in {name.split(".")[2] for name in weights if ".layers." in name}:
        prefix = f"model.layers.{layer}."
        for block, parts in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
            for leaf in ("weight", "bias"):
                names = [f"{prefix}{block}.{part}_proj.{leaf}" for part in parts]
                if names[0] not in weights:
                    continue
                rows = [len(weights[name]) for name in names]
                fused = torch.cat([weights[name] for name in names])
                weights |= dict(zip(names, fused.split(rows), strict=True))
    return weights


@pytest.mark.parametrize(
    ("kind", "changes"),
    [*((kind, {}) for kind in CONFIGS), ("qwen3_moe", {"norm_topk_prob": False, "mlp_only_layers": [0]})],
)
def test_layer_by_layer_equals_hugging_face(tmp_path, kind, changes):
    directory = save_model(tmp_path, kind, **changes)
    model = build(directory)
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(directory)(ids).logits
    with model.adapter_disabled():
        torch.testing.assert_close(_forward(model, ids), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(_forward(model, ids), expected, atol=1e-3)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32, "rope_theta": 10000.0}
LONG = {"max_position_embeddings": 256, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(("kind", "scaling"), [("llama", LLAMA3), ("phi3", LONGROPE)])
def test_rotary_of_scaled_rope_and_growing_length(tmp_path, kind, scaling):
    directory = save_model(tmp_path, kind, **LONG, rope_parameters=scaling)
    model = build(directory, warm=False)
    reference = AutoModelForCausalLM.from_pretrained(directory)
    for length in (5, 32, 33, 130, 256, 20):
        ids = torch.arange(length).remainder(61).unsqueeze(0)
        with torch.no_grad():
            torch.testing.assert_close(_forward(model, ids), reference(ids).logits, rtol=1e-4, atol=1e-4)


def test_factors_of_longrope_are_those_of_the_longest_sequence_that_is_served(tmp_path):
    """As in vLLM, where a sequence that grows must not change what it has computed."""
    directory = save_model(tmp_path / "m", "phi3", **LONG, rope_parameters=LONGROPE)
    only_long = {**LONGROPE, "short_factor": LONGROPE["long_factor"]}
    reference = AutoModelForCausalLM.from_pretrained(
        save_model(tmp_path / "long", "phi3", **LONG, rope_parameters=only_long)
    )
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        found = {served: _forward(build(directory, warm=False, served_tokens=served), ids) for served in (32, 33)}
        torch.testing.assert_close(found[33], reference(ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[32], found[33], atol=1e-3)


def test_experts_that_a_checkpoint_lacks_or_has_otherwise_are_named(tmp_path):
    directory = save_model(tmp_path, "qwen3_moe")
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    experts = "model.layers.1.mlp.experts"
    for name, tensor, error in (
        (f"{experts}.3.up_proj.weight", None, f"no weight {experts}.gate_up_proj"),
        (f"{experts}.3.up_proj.weight", torch.ones(1, 32), f"{experts}.3.up_proj.weight is"),
        (f"{experts}.8.down_proj.weight", torch.ones(32, 24), f"{experts}.8.down_proj.weight is of an expert"),
    ):
        changed = {**weights, name: tensor}
        save_file({name: one for name, one in changed.items() if one is not None}, path, metadata={"format": "pt"})
        with pytest.raises(ConfigError, match=error):
            build(directory)


@pytest.mark.parametrize("inference", [False, True], ids=["normal", "inference_tensors"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_fused_views_are_adopted_without_copy_and_train(tmp_path, tied, inference):
    directory = save_model(tmp_path, "qwen2", tie_word_embeddings=tied)
    with torch.inference_mode(inference):
        weights = (
            {name: tensor.clone() for name, tensor in _fused(directory).items()}
            if inference
            else _fused(directory)
        )
    assert all(tensor.is_inference() == inference for tensor in weights.values())
    assert ("lm_head.weight" in weights) != tied
    with torch.inference_mode(inference):
        model, shadow, step = start(directory, make_task(), weights=weights)
    own = {n.replace(".base_layer", ""): p for n, p in model.causal_lm.named_parameters() if "lora_" not in n}
    for name, tensor in weights.items():
        assert own[name].data_ptr() == tensor.data_ptr()
        assert own[name].stride() == tensor.stride()
        assert not own[name].requires_grad
    if tied:
        assert model.head_weight.data_ptr() == weights["model.embed_tokens.weight"].data_ptr()
    before = {name: tensor.clone() for name, tensor in weights.items()}
    with torch.inference_mode(inference):
        run(step)
    assert all(torch.equal(before[name], weights[name]) for name in weights)
    _, plain_shadow, plain = start(directory, make_task())
    run(plain)
    assert all(
        torch.equal(a, b) for a, b in zip(shadow.tensors().values(), plain_shadow.tensors().values(), strict=True)
    )


def test_fused_inference_rows_are_views_of_one_storage(tmp_path):
    directory = save_model(tmp_path, "llama")
    with torch.inference_mode():
        whole = torch.cat([t.flatten() for t in load_file(tmp_path / "model.safetensors").values()])
        weights, offset = {}, 0
        for name, tensor in load_file(tmp_path / "model.safetensors").items():
            weights[name] = whole[offset : offset + tensor.numel()].view(tensor.shape)
            offset += tensor.numel()
    _, _, step = start(directory, make_task(), weights=weights)
    assert run(step).done


def test_lora_is_seeded_fp32_and_only_on_layers(tmp_path):
    directory = save_model(tmp_path, "qwen2")
    first, again, other = (build(directory, warm=False, seed=s, dtype=torch.bfloat16) for s in (5, 5, 6))
    parameters = first.lora_parameters()
    assert len(parameters) == 3 * 7 * 2
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in parameters
    assert all(p.dtype == torch.float32 and p.requires_grad for p in parameters.values())
    assert all(not p.any() for n, p in parameters.items() if ".lora_B." in n)
    assert all(torch.equal(p, again.lora_parameters()[n]) for n, p in parameters.items())
    assert any(not torch.equal(p, other.lora_parameters()[n]) for n, p in parameters.items())
    trained = [n for n, p in first.causal_lm.named_parameters() if p.requires_grad]
    assert len(trained) == len(parameters)


@pytest.mark.parametrize("kind", ["gemma3_text", "llama", "phi3", "qwen3_moe"])
def test_half_precision_trains(tmp_path, kind):
    directory = save_model(tmp_path, kind)
    exact = start(directory, make_task())[2]
    expected = run(exact).result()[0]
    for dtype in (torch.bfloat16, torch.float16):
        _, _, step = start(directory, make_task(), dtype=dtype)
        metrics = run(step).result()[0]
        assert metrics.loss == pytest.approx(expected.loss, rel=0.2)
        assert metrics.grad_norm == pytest.approx(expected.grad_norm, rel=0.3)


def test_unsupported_architectures_are_named(tmp_path):
    GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"gpt2.*llama, mistral, phi3, qwen2, qwen3, qwen3_moe"):
        build(str(tmp_path))
    config = json.loads(Path(save_model(tmp_path / "m", "llama"), "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="SequenceClassification"):
        build(str(tmp_path / "m"))
    save_model(tmp_path / "g", "gemma3_text", final_logit_softcapping=30.0)
    with pytest.raises(UnsupportedModelError, match="final_logit_softcapping"):
        build(str(tmp_path / "g"))


def test_missing_and_misfit_weights(tmp_path):
    directory = save_model(tmp_path, "llama")
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ConfigError, match=f"no weight {name}"):
        build(directory, weights={n: t for n, t in weights.items() if n != name})
    with pytest.raises(ConfigError, match=name):
        build(directory, weights=weights | {name: weights[name][:-1]})
    with pytest.raises(ConfigError, match="bfloat16"):
        build(directory, weights=weights | {name: weights[name].bfloat16()})
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelNotFoundError, match=r"model\.safetensors"):
        build(directory)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="safetensors"):
        build(directory)
    with pytest.raises(ModelNotFoundError):
        build(str(tmp_path / "absent"))

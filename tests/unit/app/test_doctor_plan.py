"""`mace doctor --plan`, and the documented examples: the command that stands above each says that it fits."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
import yaml
from typer.testing import CliRunner

from app.commands.doctor import doctor, examine, read_bytes
from core.errors import ConfigError
from engine.training.quantized import check_quantization
from profiler.energy import EnergyMeter

GIB = 1 << 30
PAGE = Path(__file__).parents[3] / "docs" / "configure.md"
KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
MODELS = {
    "Qwen2.5-7B-Instruct": (3584, 18944, 28, 28, 4, 152064, 32768),
    "Llama-3.1-8B-Instruct": (4096, 14336, 32, 32, 8, 128256, 131072),
}
"""Sizes in their `config.json`: those of `KEYS`, the vocabulary and the context."""


def write_model(directory, name, **changes):
    *sizes, vocabulary, context = MODELS[name]
    config = {**dict(zip(KEYS, sizes, strict=True)), "vocab_size": vocabulary, "max_position_embeddings": context}
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False, **changes}))
    return directory


def write_settings(path, args):
    path.write_text(yaml.safe_dump({"applications": [{"name": "mace", "args": args}]}))
    return path


@pytest.fixture
def mace(tmp_path):
    app = typer.Typer()
    app.command()(doctor)

    def run(model, memory, args=None, *words):
        config = write_settings(tmp_path / "serve.yaml", args or {})
        options = ["--plan", str(model), "--config", str(config), *words]
        return CliRunner().invoke(app, [*options, *(["--memory", memory] if memory else [])])

    return run


def examples():
    blocks = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    return [block for block in blocks if "num_gpus" in block or "gpu_memory_utilization" in block]


def test_there_are_examples_for_gpus():
    assert len(examples()) >= 2


@pytest.mark.parametrize("block", examples())
def test_the_documented_examples_fit_by_the_command_above_them(mace, tmp_path, block):
    command = re.match(r"# mace doctor --plan (\S+) --memory (\S+)\n", block)
    assert command is not None, "no command says that it fits"
    args = yaml.safe_load(block)["args"]
    assert args["model"]["model_source"].endswith(command[1])
    result = mace(write_model(tmp_path / command[1], command[1]), command[2], args)
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == "fits"


def test_a_plan_says_where_the_memory_goes_and_what_to_change(mace, tmp_path):
    model = write_model(tmp_path / "m", "Qwen2.5-7B-Instruct")
    args = {"model": {"max_model_len": 16384}, "engine": {"gpu_memory_utilization": 0.7}}
    result = mace(model, "24GiB", args)
    assert result.exit_code == 1
    for part in ("weights", "lora slots", "trainer state", "activations", "kv cache", "arena"):
        assert part in result.output
    assert "does not fit: the KV cache would have" in result.output
    assert "fits with engine.gpu_memory_utilization: 0.8" in result.output


def test_the_plan_as_json(mace, tmp_path):
    model = write_model(tmp_path / "m", "Qwen2.5-7B-Instruct")
    told = json.loads(mace(model / "config.json", "80GiB", {}, "--json").output)
    assert (told["fits"], told["problems"], told["changes"], told["memory"]) == (True, [], [], 80 * GIB)
    assert told["weights"] == pytest.approx(15.23e9, rel=1e-3)  # 7.62 billion parameters in 16 bits
    assert told["kv_cache"] > 30 * GIB


def test_what_cannot_be_planned_says_why(mace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where nothing was ever served
    assert "cannot be read" in mace(tmp_path / "nothing", "24GiB").output
    assert "is no size of memory; write 24GiB" in mace(tmp_path, "much").output
    assert "is not in state yet: `mace serve` puts it there" in mace(
        "builtin:smollm2", "8GiB", {"state_dir": "state"}
    ).output.replace("\n", " ")
    unknown = {"quant_method": "odd"}
    quantized = write_model(tmp_path / "q", "Qwen2.5-7B-Instruct", quantization_config=unknown)
    assert "quantized" in mace(quantized, "24GiB").output


W4A16 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 128}, "targets": ["Linear"]}},
    "ignore": ["lm_head"],
}


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_mixture_holds_all_its_experts_packed_and_one_layer_unpacked(mace, tmp_path, name):
    sizes = {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4}
    sizes |= {"vocab_size": 151_936, "intermediate_size": 768, "torch_dtype": "bfloat16", "model_type": name}
    sizes |= (
        {"moe_intermediate_size": 768, "num_experts": 128} if name == "qwen3_moe" else {"num_local_experts": 128}
    )
    model = tmp_path / "m"
    model.mkdir()
    config = {**sizes, "num_experts_per_tok": 8, "head_dim": 128, "max_position_embeddings": 4096}
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": W4A16}))
    told = json.loads(mace(model, "80GiB", {}, "--json").output)
    assert told["unpacked_layer"] == pytest.approx(128 * 3 * 768 * 2048 * 2, rel=0.05)
    assert told["weights"] == pytest.approx(32.6e9, rel=0.05)


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [
        (W4A16, 4.25),
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, 4.5),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8),
        ({"quant_method": "fp8"}, 8),
    ],
)
def test_packed_layers_are_there_for_vllm_and_for_the_trainer(mace, tmp_path, quantization, bits):
    model = write_model(tmp_path / "q", "Llama-3.1-8B-Instruct", quantization_config=quantization)
    layers, rest = 6.98e9, 1.05e9  # weights of the linear maps, and of embedding and head, which stay as they are
    told = json.loads(mace(model, "80GiB", {}, "--json").output)
    assert told["weights"] == pytest.approx(2 * rest + 2 * layers * bits / 8, rel=1e-2)
    assert told["unpacked_layer"] == pytest.approx(2 * layers / 32, rel=1e-2)
    alone = json.loads(mace(model, "80GiB", {"training": {"enabled": False}}, "--json").output)
    assert alone["weights"] == pytest.approx(2 * rest + layers * bits / 8, rel=1e-2)
    assert alone["unpacked_layer"] == 0


ORIN = PAGE.parents[1] / "serve_config.orin.yaml"


@pytest.mark.parametrize(
    "memory", ["22GiB", "52GiB"]
)  # of an Orin's 32 or 64 GB, 8 GiB are the system's and Ray's
def test_the_settings_for_an_orin_fit_and_have_explicit_memory(mace, tmp_path, memory):
    args = yaml.safe_load(ORIN.read_text())["applications"][0]["args"]
    assert args["model"]["model_source"].endswith("w4a16")
    assert (args["engine"]["max_num_seqs"], args["engine"]["kv_cache_memory_bytes"]) == (8, 4 * GIB)
    check_quantization(W4A16)  # the trainer knows it
    model = write_model(tmp_path / "m", "Llama-3.1-8B-Instruct", quantization_config=W4A16)
    result = mace(model, memory, args)
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == "fits"
    told = json.loads(mace(model, memory, args, "--json").output)
    assert told["kv_cache"] == 4 * GIB


def test_without_a_gpu_here_its_memory_has_to_be_named(mace, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = mace(write_model(tmp_path / "m", "Qwen2.5-7B-Instruct"), None)
    assert result.exit_code == 1
    assert "--memory 24GiB" in result.output


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * GIB),
        ("22.5 gib", 22.5 * GIB),
        ("24GB", 24e9),
        ("512M", 512e6),
        ("1024", 1024),
        ("8Gi", 8 * GIB),
    ],
)
def test_sizes_of_memory(text, size):
    assert read_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-3GiB", "24 bananas", "24GiBs"])
def test_words_that_are_no_size(text):
    with pytest.raises(ConfigError, match="is no size"):
        read_bytes(text)


@pytest.mark.parametrize(
    ("meter", "found"),
    [
        (EnergyMeter([], {"rapl": "RAPL is for root"}), "no joules: RAPL is for root"),
        (EnergyMeter([SimpleNamespace(name="rapl"), SimpleNamespace(name="nvml")]), "joules from rapl and nvml"),
    ],
)
def test_one_line_says_which_sensor_counts_joules(tmp_path, monkeypatch, meter, found):
    monkeypatch.setattr("profiler.energy.find_meter", lambda nvml: meter)
    line = next(finding for finding in examine(tmp_path) if finding.check == "energy")
    assert (line.status, line.found) == ("ok", found)

"""`mace profile pruning` from the config file to the verdict."""

import json
import os
import random

import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from app.commands.profile import app
from core.config import KvPruningConfig, ModelConfig
from core.errors import ConfigError
from engine.pruning.gate import PruningReport, decide
from engine.pruning.tasks import make_passage
from tests.support.trainable_models import save_model

CLI = CliRunner()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A Serve config of a random model with a word tokenizer."""
    home = tmp_path_factory.mktemp("pruning")
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    passages = [make_passage(400, 100, lambda text: len(text.split()), random.Random(seed)) for seed in range(20)]
    texts = [text for passage in passages for text in passage]
    words.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["<unk>", "<end>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>")
    save_model(
        home / "model", "llama", vocab_size=len(tokenizer), max_position_embeddings=512, num_hidden_layers=2
    )
    tokenizer.save_pretrained(home / "model")
    args = {
        "model": {"model_id": "random", "model_source": str(home / "model")},
        "state_dir": str(home / "state"),
        "kv_pruning": {"recent_tokens": 32},
        "engine": {"engine_kwargs": {"block_size": 16}},
    }
    (home / "serve.yaml").write_text(yaml.safe_dump({"applications": [{"args": args}]}), encoding="utf-8")
    return home / "serve.yaml"


def run(config, *options):
    return CLI.invoke(app, ["pruning", "--config", str(config), "--samples", "2", *options])


def test_the_report_is_written_where_the_engine_looks_and_the_verdict_is_its_own(config):
    result = run(config, "--json", "--context-tokens", "200")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    (path,) = (config.parent / "state" / "profiles").glob("*/random.pruning.json")
    assert document["path"] == str(path)
    report = PruningReport.load(path)
    assert [entry.fraction for entry in report.fractions] == [0.0, 0.1, 0.25, 0.5]
    assert (report.block_tokens, report.method) == (16, "keydiff")
    assert (report.sink_tokens, report.recent_tokens) == (32, 32)
    model = ModelConfig(model_id="random", model_source=str(config.parent / "model"))
    verdict = decide(report, KvPruningConfig(recent_tokens=32), model)
    assert document["decision"] == {"allowed": verdict.allowed, "reason": verdict.reason}
    assert "measured on 2 passages, 20 are needed" in verdict.reason


def test_a_table_says_which_task_cannot_decide(config, tmp_path):
    result = run(config, "--context-tokens", "200", "--out", str(tmp_path / "r.json"))
    assert result.exit_code == 0, result.output
    assert "random: keydiff, blocks of 16" in result.stdout
    assert "so this task cannot decide" in " ".join(result.stdout.split())
    assert "refused: KV pruning stays off" in result.stdout
    assert "6 of 6 contexts" in result.stderr


@pytest.mark.parametrize("name", ["texts.jsonl", "texts.csv", "texts.parquet", "saved"])
def test_text_of_ones_own_decides_the_log_prob(config, tmp_path, name):
    from datasets import Dataset

    text = "The river runs past the quiet hills in summer. " * 30
    table = Dataset.from_list([{"body": text}] * 3)
    writers = {
        "jsonl": table.to_json,
        "csv": table.to_csv,
        "parquet": table.to_parquet,
        "saved": table.save_to_disk,
    }
    writers[name.split(".")[-1]](str(tmp_path / name))
    options = ("--dataset", str(tmp_path / name), "--text-column", "body", "--context-tokens", "150")
    result = run(config, "--json", "--out", str(tmp_path / "r.json"), *options)
    assert result.exit_code == 0, result.output
    report = PruningReport.load(tmp_path / "r.json")
    assert report.dataset == str(tmp_path / name)
    assert report.fractions[-1].logprob_drop.num_samples == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--context-tokens", "500"), "the model takes 384"),
        (("--text-column", "text"), "columns need a --dataset"),
        (("--dataset", "{data}", "--prompt-column", "q"), "go together"),
        (("--dataset", "{data}"), "no column 'text'; there are q"),
        (("--dataset", "/nowhere.jsonl"), "there is no file or directory"),
        (("--model", "/nowhere"), "is no directory"),
    ],
)
def test_wrong_options_end_with_one_clear_line(config, tmp_path, options, said):
    (tmp_path / "data.jsonl").write_text('{"q": "x"}\n', encoding="utf-8")
    filled = [option.format(data=tmp_path / "data.jsonl") for option in options]
    result = run(config, "--out", str(tmp_path / "r.json"), *filled)
    assert result.exit_code in (1, 2), result.output
    assert said in result.stderr
    assert not (tmp_path / "r.json").exists()


def test_a_profile_of_latencies_is_measured_as_the_server_will_run(config, tmp_path, monkeypatch):
    """With pruning only if the gate lets it through: it is another runner of vLLM's and another attention."""
    from engine.vllm.engine import HybridEngine

    class Started(ConfigError):
        pass

    started = []

    async def start(args, model_dir):
        started.append(args.kv_pruning.start)
        raise Started("no engine in this test")

    monkeypatch.setattr(HybridEngine, "start", start)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    document = yaml.safe_load(config.read_text())
    for require_gate in (True, False):
        settings = {"start": "always", "require_gate": require_gate}
        document["applications"][0]["args"] |= {"kv_pruning": settings, "state_dir": str(tmp_path / "new")}
        (tmp_path / "serve.yaml").write_text(yaml.safe_dump(document))
        result = CLI.invoke(app, ["measure", "--config", str(tmp_path / "serve.yaml")])
        assert "no engine in this test" in result.stderr
    assert started == ["off", "always"]

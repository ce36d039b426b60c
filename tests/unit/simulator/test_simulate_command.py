import json
import re

import pytest
from typer import Typer
from typer.testing import CliRunner

from benchmarks.studies.simulate import simulate
from tests.support.simulated_device import make_profile

_TRACE = """
name: small
num_requests: 50
arrivals: {rate_per_s: 20}
prompt_tokens: {kind: uniform, low: 4, high: 60}
output_tokens: {kind: uniform, low: 2, high: 20}
batch_share: 0.3
args: {engine: {kv_cache_memory_bytes: 16777216}}
"""
_MODEL = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 256,
    "num_hidden_layers": 2,
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(_TRACE)
    (tmp_path / "config.json").write_text(json.dumps(_MODEL))
    make_profile().save(tmp_path / "profile.json")
    return tmp_path


def run(*arguments):
    app = Typer()
    app.command()(simulate)
    return CliRunner().invoke(app, list(arguments))


_DEVICE = ("--profile", "profile.json", "--model-config", "config.json")


def test_json_is_the_same_for_the_same_seed_and_draws_nothing(files):
    results = []
    for seed in ("3", "3", "4"):
        outcome = run("small.yaml", *_DEVICE, "--json", "--seed", seed)
        assert outcome.exit_code == 0, outcome.output
        results.append(json.loads(outcome.stdout))
        assert results[-1].pop("wall_s") > 0
        assert results[-1].pop("cpu_s") > 0
    assert results[0] == results[1] != results[2]
    assert results[0]["finished"] == 50
    tokens = results[0]["output_tokens_per_s"] * results[0]["virtual_s"]
    assert results[0]["tbt"]["count"] == pytest.approx(tokens - 50)
    assert not list(files.glob("*.png"))


def test_a_table_is_printed_and_a_picture_drawn(files):
    outcome = run("small.yaml", *_DEVICE, "--log", "events.jsonl")
    assert outcome.exit_code == 0, outcome.output
    for name in ("TTFT", "TTFT background", "TBT", "SLO attainment", "fine-tune pairs/s", "utilisation"):
        assert name in outcome.stdout
    assert (files / "small.png").read_bytes().startswith(b"\x89PNG")
    events = [json.loads(line)["event"] for line in (files / "events.jsonl").read_text().splitlines()]
    assert events.count("arrived") == events.count("first_token") == events.count("finished") == 50


def test_the_policy_can_be_overridden(files):
    outcome = run("small.yaml", *_DEVICE, "--json", "--policy", "inference_only")
    assert json.loads(outcome.stdout)["pairs"] == 0


_POWER = """
cpu: {idle_w: 20, forward_w: 50, training_w: 60}
gpu: {idle_w: 40, forward_w: 240, training_w: 340}
"""


def test_with_power_every_policy_is_told_what_it_takes(files):
    (files / "power.yaml").write_text(_POWER)
    outcome = run("small.yaml", *_DEVICE, "--json", "--power", "power.yaml")
    assert outcome.exit_code == 0, outcome.output
    found = json.loads(outcome.stdout)
    rows = {row.pop("policy"): row for row in found["policies"]}
    assert {row.pop("offload") for row in rows.values()} == {"engine"}
    assert list(rows) == ["mace", "inference_only", "periodic", "continuous"]
    assert rows["mace"] == {name: found.get(name, found["energy"].get(name)) for name in rows["mace"]}
    assert rows["inference_only"]["joules_per_pair"] is None
    forward_s, slices_s = (found[f"{name}_share"] * found["virtual_s"] for name in ("forward", "slices"))
    tokens = found["output_tokens_per_s"] * found["virtual_s"]
    assert found["energy"]["joules_per_1000_tokens"] == pytest.approx(1000 * 200 * forward_s / tokens)
    assert found["energy"]["joules_per_pair"] == pytest.approx(300 * slices_s / found["pairs"])
    assert found["energy"]["mean_w"] == pytest.approx(60 + (200 * forward_s + 300 * slices_s) / found["virtual_s"])
    assert rows["mace"]["mean_w"] > rows["inference_only"]["mean_w"]


def with_costs(files, *, engine_s, cpu_s):
    work = {
        "optimizer": {name: {"seconds": s, "watts": None} for name, s in (("engine", engine_s), ("cpu", cpu_s))}
    }
    make_profile().with_work(work).save(files / "profile.json")


_THRIFTY_CPU = "{cpu: {idle_w: 2, forward_w: 5, training_w: 5}, gpu: {idle_w: 3, forward_w: 20, training_w: 20}}"
_THRIFTY_GPU = (
    "{cpu: {idle_w: 20, forward_w: 90, training_w: 90}, gpu: {idle_w: 40, forward_w: 99, training_w: 99}}"
)


def test_two_power_profiles_place_the_optimizer_on_opposite_devices(files):
    with_costs(files, engine_s=0.002, cpu_s=0.004)
    found = {}
    for name, text in (("cpu", _THRIFTY_CPU), ("engine", _THRIFTY_GPU)):
        (files / "power.yaml").write_text(text)
        report = json.loads(run("small.yaml", *_DEVICE, "--json", "--power", "power.yaml").stdout)
        found[name] = report["optimizer"]["place"]
        here, there = (row for row in report["policies"] if "offload" in row["policy"])
        assert (here["offload"], there["offload"]) == ("engine", "cpu")
        cheaper = min((here, there), key=lambda row: row["joules_per_pair"])
        assert cheaper["offload"] == name
        assert report["energy"]["joules_per_pair"] == pytest.approx(cheaper["joules_per_pair"])
    assert found == {"cpu": "cpu", "engine": "engine"}


def test_an_optimizer_that_the_targets_leave_no_time_stays(files):
    with_costs(files, engine_s=0.002, cpu_s=0.5)
    (files / "power.yaml").write_text(_THRIFTY_CPU)
    report = json.loads(run("small.yaml", *_DEVICE, "--json", "--power", "power.yaml").stdout)
    assert report["optimizer"]["place"] == "engine"
    assert "only there it fits" in report["optimizer"]["reason"]
    here, there = (row for row in report["policies"] if "offload" in row["policy"])
    assert there["pairs_per_s"] < 0.5 * here["pairs_per_s"]  # AdamW takes the CPU 250 times as long


def test_the_trade_off_is_printed(files):
    (files / "power.yaml").write_text(_POWER)
    outcome = run("small.yaml", *_DEVICE, "--power", "power.yaml")
    assert "What the policies take" in outcome.stdout
    assert "J/pair" in outcome.stdout
    assert "energy is" not in outcome.stdout
    assert "not known: give --power" in run("small.yaml", *_DEVICE).stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu: {idle_w: 1, forward_w: 2, training_w: 3}", "cpu: Field required"),
        ("cpu: {idle_w: 9, forward_w: 2, training_w: 3}", "idle_w must not be above"),
    ],
)
def test_power_that_is_wrong_is_named(files, text, message):
    (files / "power.yaml").write_text(text)
    outcome = run("small.yaml", *_DEVICE, "--power", "power.yaml")
    assert outcome.exit_code == 1
    assert message in outcome.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("small.yaml", *_DEVICE, "--power", "none.yaml"), "power none.yaml cannot be read"),
        (("missing.yaml", *_DEVICE), "missing.yaml cannot be read"),
        (("config.json", *_DEVICE), "config.json is wrong: name: Field required"),
        (("small.yaml",), "no profile: measure one"),
        (("small.yaml", "--profile", "none.json"), "cannot read profile none.json"),
        (("small.yaml", "--profile", "config.json"), "Measure it again"),
        (("small.yaml", "--profile", "profile.json", "--model-config", "profile.json"), "lacks a size"),
        (("small.yaml", *_DEVICE, "--plot", "nowhere/x.png"), "cannot write plot"),
        (("small.yaml", *_DEVICE, "--plot", "x.nonsense"), "cannot write plot"),
        (("small.yaml", *_DEVICE, "--log", "nowhere/x"), "cannot write event log"),
    ],
)
def test_what_is_wrong_is_said_in_one_message(files, arguments, message):
    outcome = run(*arguments)
    assert outcome.exit_code == 1
    assert re.search(re.escape(message), outcome.stderr), outcome.stderr
    assert "Traceback" not in outcome.output

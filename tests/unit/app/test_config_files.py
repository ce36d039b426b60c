import re
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from app.main import parse_args
from core.errors import ConfigError

ROOT = Path(__file__).parents[3]


def commented_variant(text):
    """The on-premises variant: the comment lines from `cluster_name` on, uncommented."""
    block = text[text.index("#   cluster_name: mace-onprem") :]
    return "\n".join(re.sub(r"^#   ?", "", line) for line in block.splitlines())


def test_cluster_yaml_fits_rays_own_schema():
    document = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    assert validate_config(prepare_config(document)) is None  # raises what is wrong


def test_the_commented_on_premises_variant_fits_it_too():
    document = yaml.safe_load(commented_variant((ROOT / "cluster.yaml").read_text()))
    assert document["provider"]["type"] == "local"
    validate_config(prepare_config(document))


def test_a_key_that_ray_does_not_know_is_found():
    document = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    with pytest.raises(Exception, match="surprise"):
        validate_config(prepare_config({**document, "surprise": 1}))


def test_the_head_node_type_exists_and_gpu_nodes_start():
    document = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    types = document["available_node_types"]
    assert document["head_node_type"] in types
    assert types["gpu"]["min_workers"] >= 1


@pytest.mark.parametrize("name", ["serve_config.yaml", "serve_config.tiny.yaml", "serve_config.orin.yaml"])
def test_serve_config_is_valid_for_serve_and_for_us(name):
    document = yaml.safe_load((ROOT / name).read_text())
    ServeDeploySchema.model_validate(document)
    args = parse_args(document["applications"][0]["args"])
    assert args.state_dir.is_absolute()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"slo": {"ttft_s": -1.0}}, "slo.ttft_s"),
        ({"slo": {"tbt_s": 0}}, "slo.tbt_s"),
        ({"scheduler": {"lambda_memory": 0.4}}, "lambda_memory is now the constant 0.5"),
        ({"scheduler": {"packing": "first_fit"}}, "packing is now experiments.packing"),
        ({"scheduler": {"tau_mem": 1.01}}, "scheduler.tau_mem"),
        ({"scheduler": {"policy": "ekya"}}, "scheduler.policy"),
        ({"scheduler": {"retrain_rate_floor": 0.5, "retrain_rate_cap": 0.4}}, "must not be above"),
        ({"scheduler": {"tau_mme": 0.9}}, "scheduler.tau_mme"),
        ({"profile": {"measure_at_start": 7}}, "profile.measure_at_start"),
        ({"profile": {"max_measure_s": 9}}, "max_measure_s is now the constant 60 s"),
        ({"kv_pruning": {"method": "key_norm"}}, "blocks are always scored by KeyDiff"),
        ({"kv_pruning": {"sink_tokens": 4}}, "sink_tokens is now the constant 32"),
        ({"trainig": {}}, "trainig"),
        ({"model": {"model_id": "has space"}}, "model.model_id"),
    ],
)
def test_a_wrong_setting_is_named(wrong, named):
    with pytest.raises(ConfigError, match=re.escape(named)):
        parse_args(wrong)

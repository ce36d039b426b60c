import pytest

from core.config import ModelConfig
from core.errors import ModelNotFoundError
from engine.model_source import base_model_name, resolve_model
from tests.support.trainable_models import save_model


def resolve(source, tmp_path):
    return resolve_model(ModelConfig(model_source=source), tmp_path)


def test_a_local_directory_is_taken_as_it_is(tmp_path):
    directory = save_model(tmp_path / "mine", "llama")
    config = ModelConfig(model_source=directory)
    assert str(resolve_model(config, tmp_path)) == directory
    assert base_model_name(config, tmp_path / "mine") == "mine"


def test_a_directory_without_a_config_says_so(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        resolve(str(tmp_path), tmp_path)


@pytest.mark.parametrize("source", ["/no/such/dir", "./nothing", "builtin:other"])
def test_a_missing_directory_says_what_else_there_is(tmp_path, source):
    with pytest.raises(ModelNotFoundError, match="builtin:tiny-assistant"):
        resolve(source, tmp_path)


@pytest.mark.parametrize("source", ["not a repo", "nobody/nothing-of-that-name"])
def test_an_unknown_or_unreachable_hub_id_says_what_to_do(tmp_path, source, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match=r"model\.model_source"):
        resolve(source, tmp_path)


def test_the_built_in_model_is_named_after_its_build(tiny_assistant, model_cache):
    config = ModelConfig()
    assert resolve_model(config, model_cache) == tiny_assistant
    assert base_model_name(config, tiny_assistant).startswith("tiny-assistant-")

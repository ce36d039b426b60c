"""Runs vLLM's own tests of its HTTP server against plain vLLM and against MACE, one server after the other.

Both serve the built-in model, with one adapter that changes nothing, so that a difference is the server's. In MACE
the adapter is live. CHECKOUT is vLLM's source at the commit that stands in `expected.tsv`: a clone, or the
unpacked source distribution of that version from the package index, `vllm-0.32.0.tar.gz`. Its tests are copied to
the work directory, with the names of models and adapters replaced by ours; nothing of them is kept in this
repository but their ids and how they end.

The exit code is 1 if a test does not end as `expected.tsv` says; 2 if the checkout is another one.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import torch
import yaml

from alignment.versions.adapter_files import AdapterManifest
from alignment.versions.registry import AdapterRegistry
from benchmarks.harness.server import ServerProcess, free_port, own_servers
from core.config import AppArgs
from engine.fingerprint import fingerprint
from engine.tiny.build import ensure_tiny_assistant
from engine.training.shadow import ShadowAdapter
from engine.training.trainable import TARGET_MODULES, TrainableModel
from engine.vllm.compat import worker_binding

_ROOT = Path(__file__).parents[2]
_CONFIG = _ROOT / "serve_config.tiny.yaml"
_EXPECTED = Path(__file__).with_name("expected.tsv")
_COMMIT = "5df63a720"
"""vLLM v0.32.0."""
_NEEDS = ("pytest-asyncio==1.5.0", "pytest-rerunfailures==16.1", "tblib==3.2.2")
"""What vLLM's tests import and our environment lacks."""

_TESTS = """
tests/entrypoints/anthropic/test_messages.py
tests/entrypoints/generate/generative_scoring/test_generative_scoring_e2e.py
tests/entrypoints/generate/structured_decisions/test_structured_decisions_e2e.py
tests/entrypoints/openai/chat_completion
tests/entrypoints/openai/completion
tests/entrypoints/openai/models
tests/entrypoints/openai/responses
tests/entrypoints/openai/test_chunked_prompt.py
tests/entrypoints/openai/test_return_token_ids.py
tests/entrypoints/openai/test_return_tokens_as_ids.py
tests/entrypoints/openai/test_stop_token_ids.py
tests/entrypoints/serve/instrumentator
tests/entrypoints/serve/lora/test_lora_adapters.py
tests/entrypoints/serve/middleware/test_optional_middleware.py
tests/entrypoints/serve/sagemaker
tests/entrypoints/serve/tokenize/test_tokenization.py
tests/entrypoints/tool_parsers/test_hermes_tool_parser.py
tests/tool_use
"""
"""What talks to a server that generates text. Tests for gpt-oss alone (harmony, MCP) are left out."""
_MODEL, _VERSION = "mace-tiny", "v0001"
_ADAPTER = f"{_MODEL}@{_VERSION}"
_MODELS = re.compile(
    r"\b(?:HuggingFaceH4/zephyr-7b-beta|HuggingFaceTB/SmolLM2-135M-Instruct|NousResearch/Hermes-3-Llama-3\.1-8B"
    r"|Qwen/Qwen[\w.]+-[\w.]+B(?:-Instruct)?|facebook/opt-125m|hmellor/tiny-random-LlamaForCausalLM"
    r"|TinyLlama/TinyLlama-1\.1B-Chat-v1\.0|claude-3-7-sonnet-latest)(?=[\"'])"
)
_ADAPTERS = re.compile(r"\b(?:zephyr-lora|qwen3-lora|minpeter/LoRA-Llama-3\.2-1B-tool-vllm-ci)(?=[\"'])")

_FRONTEND = {
    "enable_auto_tool_choice": True,
    "tool_call_parser": "hermes",
    "enable_prompt_tokens_details": True,
    "enable_tokenizer_info_endpoint": True,
    "enable_server_load_tracking": True,
}
"""Options of both servers."""
_ENVIRONMENT = {
    "VLLM_ENABLE_RESPONSES_API_STORE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_KV_CACHE_BYTES = 512 << 20
_MAX_MODEL_LEN = 10_240
"""Tokens: more than the model was trained for, because tests ask for up to 10,000; nobody reads what it says there."""
_DEFAULT_MAX_TOKENS = 256
"""Of a request that does not say: the model ends no text of its own beyond the length that it was trained for."""
_START_S = 400.0
_STOP_S = 20.0
_TEST_S = 120
_RERUNS = 2
"""Of a test that fails: some throw dice, and assert what mostly comes."""
_WORDS = {"passed": "pass", "failed": "fail"}


def main() -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/vllm-suite", description=__doc__)
    parser.add_argument("checkout", type=Path, metavar="CHECKOUT", help="vLLM's source at the expected commit")
    parser.add_argument("--update", action="store_true", help="write what is seen as what is expected")
    parser.add_argument("-k", metavar="EXPRESSION", help="only tests whose names match, as in pytest")
    parser.add_argument("--work", type=Path, default=_ROOT / "build" / "vllm-suite", help="for copies and logs")
    options = parser.parse_args()
    if _COMMIT not in (commit := _commit_of(options.checkout)):
        sys.stderr.write(f"vllm-suite: {options.checkout} is vLLM at {commit or 'no commit'}, not at {_COMMIT}\n")
        return 2
    own_servers()
    suite = Suite(options.checkout, options.work.absolute(), ["-k", options.k] if options.k else [])
    with suite.plain_vllm() as url:
        plain = suite.run("plain", url)
    with suite.mace() as url:
        mace = suite.run("mace", url)
    seen = {name: (plain.get(name, "not run"), mace.get(name, "not run")) for name in sorted({*plain, *mace})}
    if options.update:
        _write(seen)
    return _report(seen, _read(), is_whole=options.k is None)


def _commit_of(checkout: Path) -> str:
    """The commit of a clone, or the one that a source distribution was made from."""
    version = checkout / "vllm" / "_version.py"
    if (checkout / ".git").exists():
        command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return version.read_text(encoding="utf-8").rpartition("commit_id = ")[2].strip() if version.exists() else ""


class Suite:
    """The copied tests and the two servers that they are run against.

    Args:
        checkout: vLLM's source.
        work: directory for copies, models, state and logs; its former content but the built model goes.
        selection: further options of pytest.
    """

    def __init__(self, checkout: Path, work: Path, selection: list[str]) -> None:
        self._work, self._selection = work, selection
        self._tests = work / "checkout"
        for name in ("checkout", "mace"):
            shutil.rmtree(work / name, ignore_errors=True)
        (work / "mace").mkdir(parents=True)
        self._copy(checkout)
        command = [sys.executable, "-m", "uv", "pip", "install", "-q", "--python", sys.executable, "--no-deps"]
        subprocess.run([*command, "--target", str(work / "site"), *_NEEDS], check=True)
        os.environ.update(_ENVIRONMENT)
        self._args = AppArgs.model_validate(_served_args())
        self._model = self._tests / _MODEL  # where tests load a tokenizer by the model's name
        shutil.copytree(ensure_tiny_assistant(work), self._model)
        _change(self._model / "config.json", max_position_embeddings=_MAX_MODEL_LEN)
        _change(self._model / "generation_config.json", max_new_tokens=_DEFAULT_MAX_TOKENS, temperature=0.0)
        self._adapter = self._make_adapter(work / "mace" / "state" / "adapters")

    def _copy(self, checkout: Path) -> None:
        """The tests with our names; without vLLM's package, which would hide the installed one."""
        shutil.copytree(checkout / "tests", self._tests / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        (self._tests / "examples").symlink_to((checkout / "examples").absolute())
        shutil.copy(checkout / "pyproject.toml", self._tests)
        for path in (self._tests / "tests").rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            path.write_text(_ADAPTERS.sub(_ADAPTER, _MODELS.sub(_MODEL, text)), encoding="utf-8")

    def _make_adapter(self, adapters: Path) -> Path:
        """Commit an untrained adapter, which changes nothing, as the first version."""
        model = TrainableModel.build(str(self._model), self._args.lora, dtype=torch.float32, device="cpu", seed=0)
        registry = AdapterRegistry.open(adapters, self._model.name, fingerprint(self._model))
        staging = registry.begin()
        ShadowAdapter(model, self._args.training).save_adapter(staging, self._model.name)
        manifest = AdapterManifest(base_model=self._model.name, fingerprint=fingerprint(self._model))
        return registry.commit(staging, manifest).path

    @contextmanager
    def plain_vllm(self) -> Iterator[str]:
        """The server that `vllm serve` starts, with nothing of MACE in it; yields its URL."""
        port, engine, lora = free_port(), self._args.engine, self._args.lora
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", _MODEL]
        command += ["--lora-modules", f"{_ADAPTER}={self._adapter}"]
        # Of all modules, vLLM would put LoRA on the head, and then its engine ends at log-probabilities of a prompt.
        command += ["--lora-target-modules", *TARGET_MODULES["llama"]]
        command += ["--enable-lora", "--max-lora-rank", str(lora.rank), "--host", "127.0.0.1", "--port", str(port)]
        command += ["--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(_KV_CACHE_BYTES)]
        command += ["--max-num-seqs", str(engine.max_num_seqs)]
        command += ["--max-num-batched-tokens", str(engine.max_num_batched_tokens)]
        for name, value in _FRONTEND.items():
            command += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
        environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": worker_binding(self._args, self._model)}
        log = self._work / "plain-server.log"
        with log.open("wb") as file:
            server = psutil.Popen(command, cwd=self._tests, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_healthy(url, server, log)
            yield url
        finally:
            family = [server, *server.children(recursive=True)] if server.poll() is None else []
            for one in family[:1]:
                one.send_signal(signal.SIGTERM)
            for one in psutil.wait_procs(family, timeout=_STOP_S)[1]:
                one.kill()

    @contextmanager
    def mace(self) -> Iterator[str]:
        """A `mace serve` with the adapter live; yields its URL."""
        directory = self._work / "mace"
        engine = {"frontend_kwargs": _FRONTEND, "kv_cache_memory_bytes": _KV_CACHE_BYTES}
        model = {"model_id": _MODEL, "model_source": str(self._model), "max_model_len": _MAX_MODEL_LEN}
        model["dtype"] = "float32"
        server = ServerProcess(directory, _CONFIG, sections={"engine": engine, "model": model})
        with server.running():
            server.call("POST", f"/v1/adapters/{_VERSION}/activate").raise_for_status()
            yield server.url

    def run(self, name: str, url: str) -> dict[str, str]:
        """Run the tests against the server at `url`: how each test ended, by its id."""
        outcomes = self._work / f"{name}.json"
        outcomes.unlink(missing_ok=True)
        environment = os.environ | {
            "MACE_SUITE_URL": url,
            "MACE_SUITE_ADAPTER": str(self._adapter),
            "MACE_SUITE_OUTCOMES": str(outcomes),
            "PYTHONPATH": os.pathsep.join([str(self._tests), str(self._work / "site"), str(_ROOT)]),
            "HF_HUB_OFFLINE": "1",
        }
        options = f"-q --tb=short --timeout={_TEST_S} --reruns={_RERUNS} -p scripts.vllm_suite.plugin"
        options += (
            " -p no:cacheprovider --continue-on-collection-errors --ignore-glob=*harmony* --ignore-glob=*mcp*"
        )
        with (self._work / f"{name}-tests.log").open("wb") as log:
            _say(f"{name}: {log.name}")
            subprocess.run(
                [sys.executable, "-m", "pytest", *options.split(), *self._selection, *_TESTS.split()],
                cwd=self._tests,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
            )
        found: dict[str, str] = json.loads(outcomes.read_text(encoding="utf-8"))
        return {one: _WORDS.get(outcome, outcome) for one, outcome in found.items()}


def _served_args() -> dict[str, object]:
    """The settings of `serve_config.tiny.yaml`."""
    document = yaml.safe_load(_CONFIG.read_text(encoding="utf-8"))
    args: dict[str, object] = document["applications"][0]["args"]
    return args


def _change(path: Path, **values: object) -> None:
    """Set values of a JSON file."""
    document = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps(document), encoding="utf-8")


def _wait_until_healthy(url: str, server: psutil.Popen, log: Path) -> None:
    """Wait until `/health` answers; RuntimeError with the end of the log if the server ends or takes too long."""
    for _ in range(int(_START_S)):
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        if psutil.wait_procs([server], timeout=1)[0]:
            break
    raise RuntimeError(f"plain vLLM did not start:\n{log.read_text(errors='replace')[-3000:]}")


def _read() -> dict[str, tuple[str, str]]:
    """What is expected, by test id: of plain vLLM and of MACE."""
    lines = _EXPECTED.read_text(encoding="utf-8").splitlines()[1:] if _EXPECTED.exists() else []
    rows = (line.split("\t") for line in lines)
    return {name: (plain, mace) for plain, mace, name in rows}


def _write(seen: dict[str, tuple[str, str]]) -> None:
    rows = [f"{_kind(plain)}\t{_kind(mace)}\t{name}" for name, (plain, mace) in seen.items()]
    _EXPECTED.write_text("\n".join([f"plain\tmace\tid, vLLM {_COMMIT} (v0.32.0)", *rows]) + "\n", encoding="utf-8")


def _kind(outcome: str) -> str:
    return "skip" if outcome.startswith("skipped") else outcome


def _report(seen: dict[str, tuple[str, str]], expected: dict[str, tuple[str, str]], *, is_whole: bool) -> int:
    """Print the table, the counts, and what is not as expected; returns the exit code."""
    for name, (plain, mace) in seen.items():
        if _kind(plain) != "skip":
            _say(f"{plain:8}{_kind(mace):8}{name}")
    kinds = {name: (_kind(plain), _kind(mace)) for name, (plain, mace) in seen.items()}
    titles = {
        ("pass", "pass"): "pass on both",
        ("pass", "fail"): "pass on plain vLLM only",
        ("fail", "pass"): "pass on MACE only",
        ("fail", "fail"): "fail on both",
        ("skip", "skip"): "cannot run here",
    }
    counts = Counter(titles.get(kind, " / ".join(kind)) for kind in kinds.values())
    _say()
    for title, count in counts.items():
        _say(f"{count:5}  {title}")
    reasons = Counter(plain for plain, _ in seen.values() if _kind(plain) == "skip")
    for reason, count in reasons.most_common():
        _say(f"{count:5}    {reason}")
    names = sorted({*kinds, *expected}) if is_whole else list(kinds)
    nothing = ("nothing", "nothing")
    changed = [name for name in names if kinds.get(name, nothing) != expected.get(name, nothing)]
    for name in changed:
        (plain, mace), (old_plain, old_mace) = kinds.get(name, nothing), expected.get(name, nothing)
        _say(f"not as expected: {name}: {plain} and {mace}, expected {old_plain} and {old_mace}")
    return 1 if changed else 0


def _say(line: str = "") -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())

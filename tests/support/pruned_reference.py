"""What a request with dropped KV blocks must answer: a Hugging Face cache with those entries removed."""

from collections.abc import Sequence

import torch
from transformers import DynamicCache

from core.config import KV_PRUNING_SINK_TOKENS, KvPruningConfig
from engine.pruning.scores import choose_blocks, score_blocks, summarize


class PrunedReference:
    """Greedy decoding that drops blocks by the rules of `engine.pruning.pruner` with `start: always`."""

    def __init__(self, model, config: KvPruningConfig, block_tokens: int) -> None:
        self._model = model
        self._config = config
        self._block_tokens = block_tokens
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.dropped: set[int] = set()

    @torch.no_grad()
    def decode(self, prompt: Sequence[int], num_tokens: int) -> tuple[list[int], list[torch.Tensor]]:
        """Token ids, and the log-probabilities of the whole vocabulary that each was chosen from."""
        log_probs = [self._forward(list(prompt), 0)]
        tokens = [int(log_probs[-1].argmax())]
        while len(tokens) < num_tokens:
            self._prune()
            log_probs.append(self._forward([tokens[-1]], len(prompt) + len(tokens) - 1))
            tokens.append(int(log_probs[-1].argmax()))
        return tokens, log_probs

    def _forward(self, ids: list[int], start: int) -> torch.Tensor:
        cache = DynamicCache()
        kept = [i for i in range(start) if i // self._block_tokens not in self.dropped]
        for layer, (keys, values) in enumerate(self._layers):
            cache.update(keys[:, :, kept], values[:, :, kept], layer)
        output = self._model(
            torch.tensor([ids]),
            position_ids=torch.arange(start, start + len(ids)).unsqueeze(0),
            past_key_values=cache,
        )
        new = [(layer.keys[:, :, len(kept) :], layer.values[:, :, len(kept) :]) for layer in cache.layers]
        self._layers = (
            [
                (torch.cat([k, nk], 2), torch.cat([v, nv], 2))
                for (k, v), (nk, nv) in zip(self._layers, new, strict=True)
            ]
            if self._layers
            else new
        )
        return output.logits[0, -1].log_softmax(-1)

    def _prune(self) -> None:
        config, size = self._config, self._block_tokens
        full = self._layers[0][0].shape[2] // size
        allowed = int(config.max_fraction * full) - len(self.dropped)
        left = [i for i in range(full) if i not in self.dropped]
        stats = [
            torch.stack(
                [summarize(k[0, :, i * size : (i + 1) * size].transpose(0, 1).unsqueeze(0))[0] for i in left]
            )
            for k, _ in self._layers
        ]
        scores = score_blocks(torch.stack(stats), len(left) * size).tolist()
        sinks, recent = -(-KV_PRUNING_SINK_TOKENS // size), -(-config.recent_tokens // size)
        protected = {n for n, i in enumerate(left) if i < sinks or i >= full - recent}
        self.dropped |= {left[n] for n in choose_blocks(scores, max(0, allowed), protected)}

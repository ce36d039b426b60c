"""A real hybrid engine on an event loop of its own, for synchronous tests."""

import asyncio
import itertools
import threading
from concurrent.futures import Future

from vllm import SamplingParams

from core.config import AppArgs
from engine.vllm.compat import configure_environment
from engine.vllm.engine import HybridEngine

_request_ids = (f"decode-{i}" for i in itertools.count())


class EngineThread:
    def __init__(self, model_dir, **sections):
        engine = {"kv_cache_memory_bytes": 128 << 20, "max_num_seqs": 16, **sections.pop("engine", {})}
        self.args = AppArgs.model_validate({"engine": engine, **sections})
        configure_environment(self.args, model_dir)
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.engine = self.run(HybridEngine.start(self.args, str(model_dir)))

    def start(self, coroutine) -> Future:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def run(self, coroutine, timeout_s=240):
        return self.start(coroutine).result(timeout_s)

    def close(self):
        async def shut_down():
            self.engine.shutdown()

        self.run(shut_down())
        self.loop.call_soon_threadsafe(self.loop.stop)

    async def generate(self, prompt_ids, request_id, max_tokens=48, lora=None):
        """Greedy token ids of one request."""
        return [ids async for ids in self.engine.decode(prompt_ids, request_id, max_tokens, lora)][-1]


async def decode(engine, prompt, num_tokens, **arguments):
    """Token ids and the log-probability of each, greedy."""
    params = SamplingParams(
        max_tokens=num_tokens, temperature=0.0, ignore_eos=True, logprobs=0, extra_args=arguments or None
    )
    final = None
    async for output in engine.engine.client.generate({"prompt_token_ids": prompt}, params, next(_request_ids)):
        final = output
    answer = final.outputs[0]
    ids = list(answer.token_ids)
    return ids, [answer.logprobs[i][token].logprob for i, token in enumerate(ids)], final.num_cached_tokens

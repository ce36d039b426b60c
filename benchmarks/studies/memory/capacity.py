"""How many requests of one length run at once in the KV cache of an engine, found by trying."""

import asyncio
import math
from collections.abc import Awaitable, Callable

import numpy as np
from pydantic import BaseModel, ConfigDict

from benchmarks.studies.memory.windows import LiveEngine

_OUTPUT_TOKENS = 64
_LIMIT_S = 120.0
"""For one try."""


class Capacity(BaseModel):
    """The largest batch that ran with nobody waiting and nobody preempted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    context_tokens: int
    """Of each request at its end, answer included."""
    batch: int
    fit_without_pruning: int
    """By arithmetic: blocks of the pool over blocks of a request."""
    tried: list[int]


Fits = Callable[[int], Awaitable[bool]]


async def largest_that_fits(guess: int, most: int, fits: Fits) -> tuple[int, list[int]]:
    """The largest number from 0 to `most` that fits, if whatever is smaller fits too; and what was tried.

    Args:
        guess: tried first; the search goes from there.
        most: not tried above this.
        fits: asked for one number at a time.
    """
    low, high, step, tried = 0, most + 1, 1, []
    number = min(max(1, guess), most)
    while low + 1 < high:
        tried.append(number)
        if await fits(number):
            low = number
        else:
            high = number
        bracketed = low > 0 and high <= most
        number = (low + high) // 2 if bracketed else (low + step if low else high - step)
        number = min(max(number, low + 1), high - 1)
        step *= 2
    return low, tried


async def measure_capacity(live: LiveEngine, context_tokens: int, fraction: float, vocabulary: int) -> Capacity:
    """Search for the largest batch of requests of `context_tokens` in all, on an idle engine.

    Args:
        live: the engine.
        context_tokens: prompt and answer together.
        fraction: of the blocks that the engine may drop; where the search begins follows from it.
        vocabulary: prompts are random ids below this.
    """
    config = live.engine.client.vllm_config
    cache = config.cache_config
    blocks_each = math.ceil(context_tokens / cache.block_size)
    plain = (cache.num_gpu_blocks - 1) // blocks_each
    rng = np.random.default_rng(context_tokens)

    async def fits(batch: int) -> bool:
        prompts = rng.integers(0, vocabulary, (batch, context_tokens - _OUTPUT_TOKENS)).tolist()
        live.stats.clear()
        await asyncio.wait_for(_run_all(live, prompts), _LIMIT_S)
        counts = live.stats.read()
        return counts.preemptions == 0 and counts.max_running == batch

    most = min(config.scheduler_config.max_num_seqs, 4 * plain)
    batch, tried = await largest_that_fits(int(plain / (1 - fraction)), most, fits)
    await live.engine.client.reset_prefix_cache()
    return Capacity(context_tokens=context_tokens, batch=batch, fit_without_pruning=plain, tried=tried)


async def _run_all(live: LiveEngine, prompts: list[list[int]]) -> None:
    async def one(number: int, prompt: list[int]) -> None:
        async for _ in live.engine.decode(prompt, f"capacity-{len(prompts)}-{number}", _OUTPUT_TOKENS):
            pass

    async with asyncio.TaskGroup() as group:
        for number, prompt in enumerate(prompts):
            group.create_task(one(number, prompt))

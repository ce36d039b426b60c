"""What the parts of memory sharing and pruning cost by themselves: microseconds of one core, medians.

    python -m benchmarks.studies.memory_costs --json

No engine runs: keys are random, prompts are random token ids, and nothing but the named call is timed.
"""

import asyncio
import json
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import typer

from core.config import SchedulerConfig
from deployments.routing.prefix_index import PrefixIndex, note_request
from deployments.routing.prefix_text import prefixes_of
from deployments.routing.sent_prefixes import cached_text_bytes
from scheduler.prefixes.hot import HotPrefixes
from scheduler.prefixes.tree import PrefixTree
from scheduler.queues.waiting import WaitingQueue

_REPEATS = 200
_HEADS, _HEAD_SIZE, _LAYERS = 2, 64, 24
_KV_BLOCKS, _KV_BLOCK_TOKENS = 512, 32
_TREE_BLOCK_TOKENS = 16
_PROMPT_TOKENS = 1024
_VOCABULARY = 150_000

Costs = dict[str, float]


def main(as_json: Annotated[bool, typer.Option("--json", help="The output is JSON either way")] = False) -> None:  # noqa: ARG001
    """Time them one after the other; about a minute."""
    report: dict[str, Any] = {
        "key_statistics_us": _key_statistics(),
        "prefix_tree_us_per_block": _prefix_tree(),
        "prefix_tree_bytes_per_block": _tree_bytes(),
        "names_us": _names(),
        "counting_a_prompt_us": _counting(),
        "forgetting_ms": _forgetting_ms(),
        "executor_report_us": _executor_report(),
        "waiting_order_us": _waiting_order(),
        "prefix_lookup_us": _prefix_lookup(),
    }
    typer.echo(json.dumps(report, indent=2))


def _median_us(run: Callable[[], object], repeats: int = _REPEATS) -> float:
    """Of single calls; a tenth of them before, unmeasured."""
    for _ in range(max(1, repeats // 10)):
        run()
    spent_s = []
    for _ in range(repeats):
        started_s = time.perf_counter()
        run()
        spent_s.append(time.perf_counter() - started_s)
    return round(1e6 * statistics.median(spent_s), 1)


def _key_statistics() -> Costs:
    """One layer's hook for so many tokens, and the scores of 64 blocks over 24 layers."""
    import torch

    from engine.pruning.worker import KeyStatistics

    torch.set_num_threads(1)
    costs: Costs = {}
    with torch.inference_mode():
        for method in ("keydiff",):
            statistic = KeyStatistics(_LAYERS, _KV_BLOCKS, _KV_BLOCK_TOKENS, torch.device("cpu"))
            for layer in range(_LAYERS):
                statistic.add(layer, torch.randn(1, _HEADS, _HEAD_SIZE), torch.zeros(1, dtype=torch.int64))
            for count in (1, 16, 64, 512):
                keys = torch.randn(count, _HEADS, _HEAD_SIZE)
                slots = torch.randint(0, _KV_BLOCKS * _KV_BLOCK_TOKENS, (count,))
                costs[f"{method}, {count} tokens, one layer"] = _median_us(partial(statistic.add, 0, keys, slots))
            ids = list(range(1, 65))
            costs[f"{method}, score of {len(ids)} blocks, {_LAYERS} layers"] = _median_us(
                partial(statistic.scores, ids)
            )
    return costs


def _prompts(count: int, num_tokens: int = _PROMPT_TOKENS) -> list[list[int]]:
    rng = random.Random(0)
    return [rng.choices(range(_VOCABULARY), k=num_tokens) for _ in range(count)]


def _hashes(prompt: int, count: int) -> list[bytes]:
    return [prompt.to_bytes(16, "big") + i.to_bytes(16, "big") for i in range(count)]


def _prefix_tree() -> Costs:
    """Prompts of 64 blocks of 16 tokens, all different."""
    prompts, blocks = _prompts(_REPEATS), _PROMPT_TOKENS // _TREE_BLOCK_TOKENS
    tree = PrefixTree(_TREE_BLOCK_TOKENS)
    spent: dict[str, list[float]] = {"store": [], "match": [], "remove": []}
    for number, prompt in enumerate(prompts):
        hashes = _hashes(number, blocks)
        calls: dict[str, Callable[[], object]] = {
            "store": partial(tree.store, "a", None, None, prompt, hashes, 0.0),
            "match": partial(tree.longest_match, None, prompt, 0.0),
            "remove": partial(tree.remove, "a", hashes),
        }
        for name, call in calls.items():
            started_s = time.perf_counter()
            call()
            spent[name].append(time.perf_counter() - started_s)
    return {name: round(1e6 * statistics.median(times) / blocks, 2) for name, times in spent.items()}


def _tree_bytes() -> Costs:
    """Python memory of a block beside its token ids, in long runs and in runs of two blocks."""
    costs: Costs = {}
    for blocks in (100, 2):
        prompts = _prompts(10_000 // blocks, blocks * _TREE_BLOCK_TOKENS)
        tree = PrefixTree(_TREE_BLOCK_TOKENS)
        tracemalloc.start()
        for number, prompt in enumerate(prompts):
            tree.store("a", None, None, prompt, _hashes(number, blocks), 0.0)
        used, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        costs[f"runs of {blocks}"] = round(used / tree.num_blocks - 4 * _TREE_BLOCK_TOKENS)
    return costs


def _names() -> Costs:
    """Naming a request's prefixes in the proxy, and looking for them in four replicas' reports in the router."""
    costs: Costs = {}
    for num_bytes in (2_000, 10_000, 100_000):
        body = {"model": "m", "messages": [{"role": "user", "content": "x" * num_bytes}]}
        costs[f"naming {num_bytes // 1000} kB"] = _median_us(partial(prefixes_of, body))
    prefixes = prefixes_of(body)
    assert prefixes is not None
    reports = [{*prefixes.digests[: 10 * i], *(f"{i}-{n:010x}" for n in range(500))} for i in range(4)]
    costs["matching in 4 reports"] = _median_us(
        lambda: [cached_text_bytes(prefixes, report) for report in reports]
    )
    return costs


def _counting() -> Costs:
    """`HotPrefixes.observe` of prompts that were not seen before, blocks of 16."""
    return {f"{num_tokens} tokens": _counting_us(num_tokens) for num_tokens in (1_100, 8_100)}


def _counting_us(num_tokens: int) -> float:
    hot, prompts = HotPrefixes(_TREE_BLOCK_TOKENS), iter(_prompts(24, num_tokens))
    return _median_us(lambda: hot.observe(next(prompts)), 20)


def _forgetting_ms() -> float:
    """Median of the calls that make the trie drop a quarter of itself, among prompts that fill it again and again."""
    hot, spent_s = HotPrefixes(_TREE_BLOCK_TOKENS), []
    for prompt in _prompts(800):
        before, started_s = hot.num_blocks, time.perf_counter()
        hot.observe(prompt)
        if hot.num_blocks < before:
            spent_s.append(time.perf_counter() - started_s)
    return round(1e3 * statistics.median(spent_s), 1)


def _executor_report() -> Costs:
    """`PrefixIndex.held_names` with 256 prompts of four bytes a token, all cached; once a second, in turns of 1 ms."""
    return {f"blocks of {block_tokens}": _report_us(block_tokens) for block_tokens in (16, 128)}


def _report_us(block_tokens: int) -> float:
    index = PrefixIndex("a", block_tokens, live_namespace=lambda: None)
    blocks = _PROMPT_TOKENS // block_tokens
    for number, prompt in enumerate(_prompts(256)):
        index.tree.store("a", None, None, prompt, _hashes(number, blocks), 0.0)
        body = {"model": "m", "messages": [{"role": "user", "content": f"{number} " + "x" * 4 * _PROMPT_TOKENS}]}
        named = prefixes_of(body)
        assert named is not None
        note_request(named, asks_live=True)
        index.on_prompt(None, prompt)
    return _median_us(lambda: asyncio.run(index.held_names()))


def _prefix_lookup() -> Costs:
    """How much of a waiting prompt is in vLLM's cache; the planner asks for at most eight in an iteration."""
    import torch
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.request import Request

    from engine.prefixes.lookup import PrefixLookup

    init_none_hash(sha256)
    block = _TREE_BLOCK_TOKENS
    spec = FullAttentionSpec(block_size=block, num_kv_heads=_HEADS, head_size=_HEAD_SIZE, dtype=torch.bfloat16)
    config = KVCacheConfig(1 << 13, [], [KVCacheGroupSpec(["layer"], spec)], hash_block_size=block)
    manager = KVCacheManager(config, 1 << 16, scheduler_block_size=block, hash_block_size=block)
    lookup, costs, rng = PrefixLookup(manager, block), Costs(), random.Random(0)
    hasher = get_request_block_hasher(block, sha256)
    for num_tokens in (1_024, 8_192, 32_768):
        prompt = [rng.randrange(_VOCABULARY) for _ in range(num_tokens)]
        request = Request("r", prompt, SamplingParams(max_tokens=1), None, block_hasher=hasher)
        costs[f"{num_tokens} tokens, none cached"] = _median_us(partial(lookup, request))
        manager.allocate_slots(request, num_tokens)
        costs[f"{num_tokens} tokens, cached and held"] = _median_us(partial(lookup, request))
        manager.free(request)
    return costs


def _waiting_order() -> Costs:
    """What every iteration does at 256 running and 1,000 waiting: say what runs, first eight, an arrival, a start."""
    costs: Costs = {}
    for title, ordered, num_groups in (
        ("arrival only", False, 1),
        ("1000 groups", True, 1000),
        ("200 groups", True, 200),
        ("20 groups", True, 20),
        ("1 group", True, 1),
    ):
        costs[title] = _median_us(_iteration(ordered, num_groups), 10 * _REPEATS)
    return costs


def _iteration(ordered: bool, num_groups: int) -> Callable[[], None]:
    rng = random.Random(0)
    queue: WaitingQueue[int] = WaitingQueue(SchedulerConfig(prefix_order=ordered))
    arrived = 0

    def arrive() -> None:
        nonlocal arrived
        arrived += 1
        group = rng.randrange(num_groups) if ordered else None
        queue.push(f"r{arrived}", arrived, 0.001 * arrived, 0, group)

    for _ in range(1_000):
        arrive()
    running = [rng.randrange(num_groups) for _ in range(256)]

    def iterate() -> None:
        now_s = 0.001 * arrived
        if ordered:
            queue.set_in_use(set(running))
        queue.head(8, now_s)
        arrive()
        queue.pop(now_s)
        running.append(rng.randrange(num_groups))
        del running[0]

    return iterate


if __name__ == "__main__":
    typer.run(main)

"""The names of the prefixes that an executor's cache holds now: the summary that request routers get.

The executor sees for each prompt both its names (`deployments.routing.prefix_names`, from the request's header) and
its token ids. A radix tree follows the engine's KV events. Together they tell which names stand for tokens that are
really in the cache: evicted and cleared ones drop out. Prompts for the live model are looked up under whatever version
is live at the time of the report: a publish takes their prefixes out, unless they were computed for the new version
before.
"""

import asyncio
import time
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

from deployments.routing.prefix_names import LENGTHS, TextPrefixes
from engine.prefix_cache import KvEventStream
from engine.vllm.engine import HybridEngine
from scheduler.prefixes.tree import PrefixChange, PrefixTree

MAX_NAMES = 512
"""Names in one report: 8 kB, once a second."""
_MAX_PROMPTS = 256
_MAX_PROMPT_TOKENS = 16_384
_MAX_REPORT_S = 0.02
"""Work for one report, once a second; what it leaves out is routed by load."""
_TURN_S = 0.001
"""Part of that work at a time: it runs on the executor's event loop, where tokens are waiting to be sent."""
_TREE_BYTES = 32 << 20

_current: ContextVar["tuple[TextPrefixes, bool] | None"] = ContextVar("mace_text_prefixes", default=None)
"""The names of the HTTP request that is being handled, and whether it asks for the live model."""


@dataclass(slots=True)
class _KnownPrompt:
    """The last prompt under one longest name."""

    prefixes: TextPrefixes
    namespace: str | None
    is_live: bool
    """It asked for the live model, so its names stand for whatever version that is later."""
    token_ids: "array[int]"
    """At most `_MAX_PROMPT_TOKENS`."""
    num_tokens: int
    """Length of the whole prompt."""

    def cached(self, num_cached: int) -> tuple[str, ...]:
        """Names of the prefixes within the first `num_cached` tokens, if text and tokens keep step."""
        share = num_cached / self.num_tokens
        names = self.prefixes.digests
        return names[: bisect_right(LENGTHS, share * self.prefixes.num_bytes, hi=len(names))]


class PrefixIndex:
    """The index of one executor, from the engine's events and its prompts."""

    def __init__(
        self,
        block_tokens: int,
        live_namespace: Callable[[], str | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tree = PrefixTree(block_tokens, _TREE_BYTES)
        self._live_namespace = live_namespace
        self._clock = clock
        self._prompts: OrderedDict[str, _KnownPrompt] = OrderedDict()
        self.num_changes = 0
        """Changes of the cache and prompts so far: without a new one the names are the same."""

    def on_change(self, change: PrefixChange) -> None:
        """The engine's cache has changed."""
        self.num_changes += 1
        self.tree.apply(change, self._clock())

    def on_prompt(self, namespace: str | None, token_ids: Sequence[int]) -> None:
        """A prompt of the HTTP request that is being handled enters the engine."""
        current = _current.get()
        if current is None:
            return
        self.num_changes += 1
        prefixes, is_live = current
        if is_live and namespace != self._live_namespace():
            return  # drawn for the version on trial: says nothing of most requests with these names
        tokens = array("I", token_ids[:_MAX_PROMPT_TOKENS])
        name = prefixes.digests[-1]
        self._prompts[name] = _KnownPrompt(prefixes, namespace, is_live, tokens, len(token_ids))
        self._prompts.move_to_end(name)
        if len(self._prompts) > _MAX_PROMPTS:
            self._prompts.popitem(last=False)

    def num_cached(self, namespace: str | None, token_ids: Sequence[int]) -> int:
        """Tokens at the start of a prompt that are in the cache now."""
        return self.tree.longest_match(namespace, token_ids, self._clock())

    async def cached_names(self) -> list[str]:
        """Names of prefixes that are in the cache, those used last first; at most `MAX_NAMES`. Gives way in between."""
        names: dict[str, None] = {}
        busy_s, turn_started_s = 0.0, time.perf_counter()
        for prompt in [*reversed(self._prompts.values())]:
            namespace = self._live_namespace() if prompt.is_live else prompt.namespace
            names.update(dict.fromkeys(prompt.cached(self.num_cached(namespace, prompt.token_ids))))
            turn_s = time.perf_counter() - turn_started_s
            if len(names) >= MAX_NAMES or busy_s + turn_s > _MAX_REPORT_S:
                break
            if turn_s > _TURN_S:
                await asyncio.sleep(0)
                busy_s, turn_started_s = busy_s + turn_s, time.perf_counter()
        return list(names)[:MAX_NAMES]


def note_request(prefixes: TextPrefixes | None, *, asks_live: bool) -> None:
    """Note of the HTTP request that this task handles what its header says, and whether it asks for `<name>`."""
    _current.set(None if prefixes is None else (prefixes, asks_live))


def follow_prefixes(
    engine: HybridEngine, live_namespace: Callable[[], str | None]
) -> tuple[PrefixIndex, KvEventStream] | tuple[None, None]:
    """Make the index of a started engine, and the stream that keeps it up to date while it runs.

    None if the engine's prefix cache or its KV events are off. What is served must stand behind something that calls
    `note_request`. `live_namespace` gives the adapter that `<name>` stands for now; None is the bare base model.
    """
    block_tokens = engine.prefix_block_tokens
    if block_tokens is None:
        return None, None
    index = PrefixIndex(block_tokens, live_namespace)
    stream = KvEventStream.of_engine(engine.client, index.on_change)
    if stream is None:
        return None, None
    engine.watch_prompts(index.on_prompt)
    return index, stream

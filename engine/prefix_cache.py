"""vLLM's prefix cache: its content, by KV events, and what it has served, by counters.

The events come from the EngineCore process to this one and become changes of a `scheduler.prefixes.tree.PrefixTree`.

vLLM publishes what enters and leaves its prefix cache over ZeroMQ, in numbered batches, and keeps the last batches for
those who missed some. The sockets are Unix sockets in a directory that only this user can enter: token ids of prompts
must not be readable from outside, and vLLM's default is a TCP port on every interface.

The stream may drop batches (a subscriber that falls behind). A gap in the numbers is filled from the replay buffer.
What cannot be filled is said as `CacheCleared`, followed by all that the buffer still has: what was removed meanwhile
is unknown, so nothing said before may stand. After a silence the numbers are compared too. So the listener may know
less than is cached until it is stored anew, and is not wrong for longer than `_SILENCE_S` and a replay.

vLLM keeps no count of copies: if two requests computed the same block at once, it says "removed" when the first copy
goes. Again less is known than is cached.
"""

import asyncio
import logging
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import prometheus_client

from scheduler.prefixes.tree import BlocksRemoved, BlocksStored, CacheCleared, PrefixChange

logger = logging.getLogger(__name__)

_QUERIED = "vllm:prefix_cache_queries_total"
_HIT = "vllm:prefix_cache_hits_total"
_GENERATED = "vllm:generation_tokens_total"

_MAX_PARENT_BYTES = 60
_SILENCE_S = 5.0
"""Without a batch for so long, ask whether one was missed."""
_REPLAY_TIMEOUT_S = 5.0
"""The publisher looks for replay requests at least ten times a second while it is alive."""
_RETRY_S = 1.0
_END = (1 << 64) - 1
"""Number of the message that ends a replay: -1, read as unsigned."""
_BUFFER_BATCHES = 900
"""One for each iteration that stored or removed a block: half a minute and more. vLLM's socket holds 1,000 messages for
a peer and drops what is beyond; a replay is sent in one go."""


def kv_events_config() -> Any:
    """vLLM's `KVEventsConfig` with private sockets of its own, for the engine argument `kv_events_config`."""
    from vllm.config.kv_events import KVEventsConfig

    directory, name = _private_directory().name, uuid.uuid4().hex[:8]
    return KVEventsConfig(
        enable_kv_cache_events=True,
        publisher="zmq",
        endpoint=f"ipc://{directory}/{name}",
        replay_endpoint=f"ipc://{directory}/{name}-replay",
        buffer_steps=_BUFFER_BATCHES,
    )


class KvEventStream:
    """Follows the events of one engine: `run` until cancelled."""

    def __init__(
        self, endpoint: str, replay_endpoint: str, block_tokens: int, on_change: Callable[[PrefixChange], None]
    ) -> None:
        """Connect nothing yet. Blocks of other sizes than `block_tokens` (partial ones) are passed over."""
        self._endpoint = endpoint
        self._replay_endpoint = replay_endpoint
        self._block_tokens = block_tokens
        self._on_change = on_change
        self._next = 0
        """Number of the batch to come."""
        self._decoder: Any = None
        self.num_batches = 0
        self.num_losses = 0
        """Times that batches were missed for good."""

    @classmethod
    def of_engine(cls, client: Any, on_change: Callable[[PrefixChange], None]) -> "KvEventStream | None":
        """The stream of a started `AsyncLLM`; None if its events are off, or go elsewhere by `engine_kwargs`."""
        config = client.vllm_config.kv_events_config
        is_off = config is None or not config.enable_kv_cache_events or config.replay_endpoint is None
        if is_off or not config.endpoint.startswith("ipc://"):
            return None
        return cls(config.endpoint, config.replay_endpoint, client.vllm_config.cache_config.block_size, on_change)

    def begin_anew(self) -> None:
        """The engine has died: nothing is cached, and the next one numbers its batches from the first."""
        self._next = 0
        self._lose()

    async def run(self) -> None:
        """Follow the events for good. Whatever fails, what is cached counts as unknown, and it begins anew."""
        while True:
            try:
                await self._listen()
            except Exception:  # an observer must not cost the replica
                logger.exception("KV events: the stream failed")
                self._lose()
                self._next = 0
                await asyncio.sleep(_RETRY_S)

    async def _listen(self) -> None:
        import msgspec
        import zmq
        import zmq.asyncio
        from vllm.distributed.kv_events import KVEventBatch

        self._decoder = msgspec.msgpack.Decoder(KVEventBatch)
        context = zmq.asyncio.Context()
        socket = context.socket(zmq.SUB)
        try:
            socket.setsockopt(zmq.SUBSCRIBE, b"")
            socket.connect(self._endpoint)
            while True:
                await self._fill(context)  # what was published before the subscription took effect, or got lost
                await self._follow(socket)
        finally:
            socket.close(linger=0)
            context.term()

    async def _follow(self, socket: Any) -> None:
        """Take batches as they come; returns at a gap, or after a silence."""
        while await socket.poll(int(1000 * _SILENCE_S)):
            _, number, payload = await socket.recv_multipart()
            if int.from_bytes(number, "big") > self._next:
                return  # the replay has this batch too
            self._take(int.from_bytes(number, "big"), payload)

    async def _fill(self, context: Any) -> None:
        """Ask for the batches from `_next` on. Without an answer nothing is known; the next silence asks again."""
        import zmq

        socket = context.socket(zmq.DEALER)
        try:
            socket.setsockopt(zmq.RCVHWM, 0)  # a replay must not be dropped on this side
            socket.connect(self._replay_endpoint)
            await socket.send_multipart([b"", self._next.to_bytes(8, "big")])
            while True:
                async with asyncio.timeout(_REPLAY_TIMEOUT_S):
                    _, _, number, payload = await socket.recv_multipart()
                if int.from_bytes(number, "big") == _END:
                    return
                self._take(int.from_bytes(number, "big"), payload)
                await asyncio.sleep(0)  # what has arrived is read without waiting; others want their turn
        except TimeoutError:
            logger.warning("KV events: no replay within %.0f s; what is cached is unknown", _REPLAY_TIMEOUT_S)
            self._lose()
            self._next = 0  # all that the buffer has, when it answers again
        finally:
            socket.close(linger=0)

    def _take(self, number: int, payload: bytes) -> None:
        """Take in one batch. Those before `_next` came already; one after it means that some are gone for good."""
        if number < self._next:
            return
        if number > self._next:
            self._lose()
        self._next = number + 1
        self.num_batches += 1
        try:
            for event in self._decoder.decode(payload).events:
                for change in changes_of(event, self._block_tokens):
                    self._on_change(change)
        except Exception:  # whatever it is, an unread batch is a lost batch
            logger.exception("KV events: a batch could not be read")
            self._lose()

    def _lose(self) -> None:
        self.num_losses += 1
        self._on_change(CacheCleared())


def changes_of(event: Any, block_tokens: int) -> Iterator[PrefixChange]:
    """The changes that one vLLM event says, of prompts that token ids alone identify.

    Passed over: further KV cache groups of a hybrid model (the first one stands for all), other storage tiers, partial
    blocks, and blocks whose content depends on more than tokens and adapter (images, prompt embeddings, cache salts).
    """
    kind = type(event).__name__
    if kind == "AllBlocksCleared":
        yield CacheCleared()
        return
    if event.group_idx not in (None, 0) or event.medium not in (None, "GPU"):
        return
    if kind == "BlockRemoved":
        yield BlocksRemoved(tuple(event.block_hashes))
    elif event.block_size == block_tokens and len(event.token_ids) == len(event.block_hashes) * block_tokens:
        count = _num_plain(event)
        if count:
            yield BlocksStored(
                namespace=event.lora_name,
                parent_hash=event.parent_block_hash,
                token_ids=tuple(event.token_ids[: count * block_tokens]),
                block_hashes=tuple(event.block_hashes[:count]),
            )


def _num_plain(event: Any) -> int:
    """Blocks before the first one with a key beside the adapter's name."""
    plain = ((), (event.lora_name,))
    odd = (i for i, key in enumerate(event.extra_keys or []) if key is not None and tuple(key) not in plain)
    return next(odd, len(event.block_hashes))


@dataclass(frozen=True, slots=True)
class PrefixCounts:
    """Prompt tokens of started requests since the start; a request that was preempted counts once."""

    prompt_tokens: int
    cached_tokens: int
    """Those among them whose keys and values were in the cache already."""


def read_prefix_counts() -> PrefixCounts | None:
    """The counts of all engines of this process; None if vLLM keeps no statistics (`disable_log_stats`)."""
    totals = _totals(_QUERIED, _HIT)
    return PrefixCounts(int(totals[_QUERIED]), int(totals.get(_HIT, 0))) if _QUERIED in totals else None


def read_generated_tokens() -> int | None:
    """Tokens that all engines of this process have generated; None as above."""
    total = _totals(_GENERATED).get(_GENERATED)
    return None if total is None else int(total)


def _totals(*names: str) -> dict[str, float]:
    """Counters of vLLM, each summed over its labels."""
    totals: dict[str, float] = {}
    for metric in prometheus_client.REGISTRY.restricted_registry(names).collect():
        for sample in metric.samples:
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return totals


@cache
def _private_directory() -> tempfile.TemporaryDirectory[str]:
    """A directory of this process that only its user can enter; removed when the process ends."""
    # Paths of Unix sockets may have 107 bytes.
    parent = "/tmp" if len(tempfile.gettempdir()) > _MAX_PARENT_BYTES else None
    return tempfile.TemporaryDirectory(prefix="mace-kv-", dir=parent)

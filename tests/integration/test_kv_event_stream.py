"""The stream of KV events against vLLM's own publisher, without an engine: losses, and what is passed over."""

import asyncio
from dataclasses import asdict

import pytest

from engine.prefix_cache import KvEventStream, kv_events_config
from scheduler.prefixes.tree import CacheCleared

pytestmark = pytest.mark.vllm

BLOCK = 32


class Publisher:
    """vLLM's own publisher without an engine."""

    def __init__(self, **settings):
        from vllm.distributed.kv_events import ZmqEventPublisher

        config = asdict(kv_events_config()) | settings
        self.endpoints = config["endpoint"], config["replay_endpoint"]
        del config["publisher"], config["enable_kv_cache_events"]
        self.inner = ZmqEventPublisher(0, **config)

    def store(self, number, **changes):
        from vllm.distributed.kv_events import BlockStored, KVEventBatch

        fields = {"medium": "GPU", "lora_name": None, "lora_id": None, "group_idx": 0, **changes}
        event = BlockStored([number], None, [number] * BLOCK, BLOCK, **fields)
        self.inner.publish(KVEventBatch(ts=0.0, events=[event]))

    def skip(self):
        """Number a batch that is never made."""
        return next(self.inner._seq_gen)  # noqa: SLF001 - vLLM loses nothing by itself

    def lose(self, payload):
        """Keep a batch for replays that is never sent."""
        self.inner._buffer.append((self.skip(), payload))  # noqa: SLF001 - as above


async def listen(publisher, act):
    """Run `act` while a stream listens; returns the changes and the stream."""
    changes = []
    stream = KvEventStream(*publisher.endpoints, BLOCK, changes.append)
    running = asyncio.create_task(stream.run())
    try:
        await act(stream, changes)
    finally:
        running.cancel()
        publisher.inner.shutdown()
    return changes, stream


def hashes(changes):
    return ["cleared" if isinstance(c, CacheCleared) else c.block_hashes[0] for c in changes]


async def until(check):
    async with asyncio.timeout(15):
        while not check():  # noqa: ASYNC110 - the stream under test signals nothing
            await asyncio.sleep(0.02)


def test_lost_batches_are_asked_for_again():
    publisher = Publisher()

    async def act(stream, changes):
        publisher.store(0)
        await until(lambda: stream.num_batches == 1)
        publisher.lose(await encoded(1))
        publisher.store(2)
        await until(lambda: stream.num_batches == 3)

    changes, stream = asyncio.run(listen(publisher, act))
    assert hashes(changes) == [0, 1, 2]
    assert stream.num_losses == 0


async def encoded(number):
    import msgspec
    from vllm.distributed.kv_events import BlockStored, KVEventBatch

    event = BlockStored([number], None, [number] * BLOCK, BLOCK, None, "GPU", None, group_idx=0)
    return msgspec.msgpack.encode(KVEventBatch(ts=0.0, events=[event]))


def test_batches_that_are_gone_for_good_clear_everything_before_what_is_left():
    publisher = Publisher(buffer_steps=2)

    async def act(stream, changes):
        publisher.store(0)
        await until(lambda: stream.num_batches == 1)
        for _ in range(3):
            publisher.skip()  # batches 1 to 3 vanish
        publisher.store(4)
        await until(lambda: stream.num_batches == 2)

    changes, stream = asyncio.run(listen(publisher, act))
    assert hashes(changes) == [0, "cleared", 4]
    assert stream.num_losses == 1


def test_a_loss_before_a_silence_is_found_without_a_further_batch(monkeypatch):
    monkeypatch.setattr("engine.prefix_cache._SILENCE_S", 0.3)
    publisher = Publisher()

    async def act(stream, changes):
        publisher.store(0)
        await until(lambda: stream.num_batches == 1)
        publisher.lose(await encoded(1))
        await until(lambda: stream.num_batches == 2)

    assert hashes(asyncio.run(listen(publisher, act))[0]) == [0, 1]


def test_a_batch_that_cannot_be_read_clears_everything():
    publisher = Publisher()

    async def act(stream, changes):
        publisher.store(0)
        await until(lambda: stream.num_batches == 1)
        publisher.lose(b"\xc1 no msgpack")
        publisher.store(2)
        await until(lambda: stream.num_batches == 3)

    assert hashes(asyncio.run(listen(publisher, act))[0]) == [0, "cleared", 2]


@pytest.mark.parametrize(
    "changes",
    [{"medium": "CPU"}, {"group_idx": 1}, {"extra_keys": [("salt",)]}, {"extra_keys": [(("image", 0),)]}],
)
def test_blocks_that_tokens_do_not_identify_are_passed_over(changes):
    publisher = Publisher()

    async def act(stream, _):
        publisher.store(0, **changes)
        publisher.store(1, lora_name="m@v1", extra_keys=[("m@v1",)])
        await until(lambda: stream.num_batches == 2)

    seen, _ = asyncio.run(listen(publisher, act))
    assert [(change.namespace, change.block_hashes) for change in seen] == [("m@v1", (1,))]

"""What an executor reports of its prefix cache."""

import asyncio
import itertools

from deployments.routing import prefix_index
from deployments.routing.prefix_index import MAX_NAMES, PrefixIndex, note_request
from deployments.routing.prefix_names import prefixes_of
from scheduler.prefixes.tree import BlocksRemoved, BlocksStored, CacheCleared

BLOCK = 16
clock = (float(i) for i in itertools.count())


class Executor:
    """An index, and an engine that computes whatever it is asked. Five bytes of text are one token."""

    def __init__(self):
        self.live = None
        self.index = PrefixIndex(BLOCK, lambda: self.live, lambda: next(clock))

    def ask(self, text, namespace=None, *, asks_live=True, is_computed=True):
        prefixes = prefixes_of({"prompt": text})
        tokens = [ord(text[i]) for i in range(0, len(text), 5)]
        note_request(prefixes, asks_live=asks_live)
        self.index.on_prompt(namespace, tokens)
        if is_computed:
            self.compute(tokens, namespace)
        return prefixes.digests if prefixes else ()

    def compute(self, tokens, namespace):
        count = len(tokens) // BLOCK
        hashes = tuple(hash((namespace, tuple(tokens[: (i + 1) * BLOCK]))) for i in range(count))
        self.index.on_change(BlocksStored(namespace, None, tuple(tokens[: count * BLOCK]), hashes))
        return hashes

    @property
    def held(self):
        return set(asyncio.run(self.index.cached_names()))


def test_prefixes_of_computed_prompts_are_held_and_of_others_not():
    executor = Executor()
    held, not_held = executor.ask("a" * 1100), executor.ask("b" * 1100, is_computed=False)
    assert len(held) == 4
    assert executor.held == set(held)
    assert not executor.held & set(not_held)


def test_of_any_prompt_the_cached_blocks_are_known_by_version_with_or_without_names():
    executor = Executor()
    executor.compute(list(range(5 * BLOCK)), "m@v0001")
    follow_up = [*range(3 * BLOCK), 9, 9]
    assert executor.index.num_cached("m@v0001", follow_up) == 3 * BLOCK
    assert executor.index.num_cached(None, follow_up) == 0
    executor.index.on_change(CacheCleared())
    assert executor.index.num_cached("m@v0001", follow_up) == 0


def test_a_prefix_is_held_as_far_as_its_blocks_are():
    executor = Executor()
    names = executor.ask("a" * 1100, is_computed=False)
    hashes = executor.compute([ord("a")] * 220, None)
    assert executor.held == set(names)
    executor.index.on_change(BlocksRemoved(hashes[8:]))  # 128 tokens are left, which are 640 bytes
    assert executor.held == set(names[:2])
    executor.index.on_change(CacheCleared())
    assert executor.held == set()


def test_a_publish_takes_prefixes_out_until_the_new_version_has_computed_them():
    executor = Executor()
    names = executor.ask("a" * 1100)
    executor.live = "m@v0001"
    assert executor.held == set()
    executor.compute([ord("a")] * 220, "m@v0001")  # warmed, or asked for again
    assert executor.held == set(names)


def test_a_version_asked_for_by_its_own_name_keeps_its_prefixes():
    executor = Executor()
    names = executor.ask("a" * 1100, "m@v0007", asks_live=False)
    executor.live = "m@v0008"
    assert executor.held == set(names)


def test_the_base_asked_for_by_its_own_name_keeps_its_prefixes_when_a_version_goes_live():
    executor = Executor()
    names = executor.ask("a" * 1100, asks_live=False)
    executor.live = "m@v0001"
    assert executor.held == set(names)


def test_a_request_drawn_for_the_canary_says_nothing_of_the_live_versions_cache():
    executor = Executor()
    names = executor.ask("a" * 1100)
    executor.ask("a" * 1100, "m@v0001")
    assert executor.held == set(names)
    executor.index.on_change(CacheCleared())
    executor.compute([ord("a")] * 220, "m@v0001")
    assert executor.held == set()


def test_requests_without_names_are_not_remembered():
    executor = Executor()
    assert executor.ask("short") == ()
    assert executor.held == set()


def test_the_report_is_bounded_and_keeps_what_was_used_last(monkeypatch):
    monkeypatch.setattr(prefix_index, "_MAX_REPORT_S", 10.0)  # however busy the machine is
    executor = Executor()
    for number in range(400):
        last = executor.ask(f"{number:05}" * 220)
    names = asyncio.run(executor.index.cached_names())
    assert len(names) == MAX_NAMES
    assert set(last) <= set(names)
    assert not set(executor.ask("00000" * 220, is_computed=False)) - executor.held

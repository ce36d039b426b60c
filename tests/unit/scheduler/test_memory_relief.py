import pytest

from core.batch import ForwardShape
from core.config import KvPruningConfig
from scheduler.memory.ledger import Pool
from scheduler.memory.relief import BlockBudget, MemoryRelief
from scheduler.view import FineTuneState, IterationView, PrefillTask, PruneOffer
from tests.support.known_device import KnownDevice, make_planner

BLOCK = 16
BYTES = 10
"""Of KV cache for one token."""
KV_BLOCKS = 100
OFFER = PruneOffer([i / 20 for i in range(20)])


def planner(start="memory_pressure", arena_bytes=16_000, arena_bytes_per_token=10.0, tau_mem=1.0, **device):
    limits = {"kv_bytes_per_token": BYTES, "arena_bytes_per_token": arena_bytes_per_token}
    made = make_planner(
        KnownDevice(**device),
        limits=limits,
        kv_bytes=KV_BLOCKS * BLOCK * BYTES,
        arena_bytes=arena_bytes,
        tau_mem=tau_mem,
        pruning=KvPruningConfig(start=start),
    )
    return made


def view(free, offer=OFFER, prefills=(), **kwargs):
    return IterationView(
        0.0,
        prefills=list(prefills),
        used_kv_bytes=(KV_BLOCKS - free) * BLOCK * BYTES,
        free_kv_blocks=free,
        block_tokens=BLOCK,
        prune_offer=offer,
        **kwargs,
    )


def test_decoding_gets_the_blocks_that_it_lacks_and_no_more():
    plan = planner().plan(view(2, num_decode=8, decode_blocks=5))
    assert (plan.prune_blocks, plan.prune_reason) == (3, "decode")
    assert not plan.defers_training
    assert planner().plan(view(5, num_decode=8, decode_blocks=5)).prune_blocks == 0


def test_when_all_that_is_offered_is_too_little_training_waits_and_all_of_it_goes():
    made = planner()
    state = view(0, PruneOffer([0.1, 0.2]), num_decode=8, decode_blocks=5, finetune=FineTuneState(0.0))
    plan = made.plan(state)
    assert (plan.prune_blocks, plan.defers_training) == (2, True)
    plan = made.settle(plan, state, ForwardShape(num_decode=8))
    assert (plan.finetune_budget_s, plan.min_slices) == (0, 0)
    enough = view(9, num_decode=8, decode_blocks=5, finetune=FineTuneState(0.0))
    assert made.settle(made.plan(enough), enough, ForwardShape(num_decode=8)).finetune_budget_s > 0


def test_the_ledger_holds_what_is_in_use_after_the_iteration():
    made = planner()
    made.plan(view(0, num_decode=8, decode_blocks=4))  # four are dropped, and given out
    assert made.memory.pool_used_bytes(Pool.KV) == KV_BLOCKS * BLOCK * BYTES
    made.plan(view(10, num_decode=8, decode_blocks=4))
    assert made.memory.pool_used_bytes(Pool.KV) == (KV_BLOCKS - 6) * BLOCK * BYTES
    started = PrefillTask("r", 0.0, 2 * BLOCK, context_tokens=BLOCK, is_running=True)
    made.plan(view(10, prefills=[started], num_decode=8))
    assert made.memory.pool_used_bytes(Pool.KV) == (KV_BLOCKS - 8) * BLOCK * BYTES
    made.memory.check_integrity()


def test_a_waiting_prompt_asks_for_the_whole_of_it_because_vllm_admits_no_less():
    prompt = PrefillTask("r", 0.0, 10 * BLOCK)
    plan = planner(token_s=0.001).plan(view(4, prefills=[prompt], num_decode=1, decode_blocks=1))
    assert plan.max_chunk_tokens < 10 * BLOCK  # the iteration has time for a part only
    assert (plan.prune_blocks, plan.prune_reason) == (7, "prefill")


def test_a_cached_prefix_that_somebody_holds_takes_no_block_and_one_that_nobody_holds_does():
    prompt = PrefillTask("r", 0.0, 5 * BLOCK, context_tokens=8 * BLOCK, held_tokens=3 * BLOCK)
    made = planner()
    plan = made.plan(view(12, prefills=[prompt], num_decode=1))
    assert (plan.token_budget, plan.prune_blocks) == (1 + 5 * BLOCK, 0)
    # Five blocks are computed, five were free and cached.
    assert made.memory.pool_used_bytes(Pool.KV) == (KV_BLOCKS - 2) * BLOCK * BYTES
    assert planner().plan(view(9, prefills=[prompt], num_decode=1)).prune_blocks == 1
    running = PrefillTask("r", 0.0, 5 * BLOCK, context_tokens=8 * BLOCK, is_running=True)
    assert planner().plan(view(5, prefills=[running], num_decode=1)).prune_blocks == 0


def test_nothing_is_dropped_for_a_prompt_that_has_no_seat():
    prompt = PrefillTask("r", 0.0, 10 * BLOCK)
    assert planner().plan(view(4, prefills=[prompt], num_decode=1, free_seats=0)).prune_blocks == 0


def test_a_waiting_prompt_that_nothing_makes_room_for_drops_nothing():
    plan = planner().plan(view(4, prefills=[PrefillTask("r", 0.0, 40 * BLOCK)], num_decode=1))
    assert plan.prune_blocks == 0


def test_a_prompt_in_progress_takes_blocks_for_its_chunk_only():
    started = PrefillTask("r", 0.0, 600, context_tokens=40, is_running=True)
    plan = planner(token_s=0.001).plan(view(0, prefills=[started], num_decode=1))
    assert plan.max_chunk_tokens == 64  # of 68 ms that decoding leaves, at 1 ms a token, in whole multiples
    assert plan.prune_blocks == 4  # up to position 104; there are three blocks, the third half empty


def test_a_prompt_in_progress_waits_for_blocks_rather_than_take_a_seat_away():
    started = PrefillTask("r", 0.0, 600, context_tokens=4 * BLOCK, is_running=True)
    plan = planner().plan(view(0, None, prefills=[started], num_decode=3))
    assert (plan.token_budget, plan.defers_training) == (3, True)
    alone = planner().plan(view(0, None, prefills=[started]))
    assert alone.token_budget > 0  # nobody else will ever free a block


def test_tokens_in_a_block_that_is_there_need_none():
    started = PrefillTask("r", 0.0, 600, context_tokens=4 * BLOCK - 6, is_running=True)
    assert planner().plan(view(0, None, prefills=[started], num_decode=3)).token_budget == 3 + 6


def test_a_few_more_tokens_of_a_prompt_are_not_worth_a_harmful_block_and_a_starved_prompt_is():
    """Memory is what the device is short of: a KV cache of 100 blocks, and tokens that cost next to no time."""
    quick = {"base_s": 0.0, "token_s": 1e-5}
    harmful = PruneOffer([0.9] * 20)
    prompt = PrefillTask("r", 0.0, 5 * BLOCK, context_tokens=BLOCK, is_running=True)
    almost = planner(**quick).plan(view(4, harmful, prefills=[prompt]))
    assert (almost.max_chunk_tokens, almost.prune_blocks) == (4 * BLOCK, 0)
    starved = planner(**quick).plan(view(0, harmful, prefills=[prompt]))
    assert (starved.max_chunk_tokens, starved.prune_blocks) == (5 * BLOCK, 5)


def test_a_chunk_that_fills_much_time_is_worth_a_block():
    prompt = PrefillTask("r", 0.0, 5 * BLOCK, context_tokens=BLOCK, is_running=True)
    slow = planner(token_s=0.003).plan(view(4, prefills=[prompt]))
    assert (slow.max_chunk_tokens, slow.prune_blocks) == (5 * BLOCK, 1)


def beside(used, **kwargs):
    """Decoding requests that hold `used` blocks, and a fine-tune task."""
    return view(KV_BLOCKS - used, num_decode=2, finetune=FineTuneState(0.0, **kwargs))


@pytest.mark.parametrize("decode_blocks", [0, 4])
def test_what_decoding_gets_is_no_room_for_slices(decode_blocks):
    made = planner(tau_mem=0.5625)  # 18,000 for both
    state = view(0, num_decode=2, decode_blocks=decode_blocks, finetune=FineTuneState(0.0, max_batch_tokens=232))
    plan = run(made, state)
    assert plan.finetune_budget_s > 0
    assert plan.prune_blocks == decode_blocks + 2  # 16,000 + 2,320 are 320 too many
    assert made.memory.used_bytes <= made.memory.capacity_bytes


def test_a_step_in_progress_keeps_the_memory_of_the_size_that_it_began_with():
    made = planner()
    run(made, beside(10, step_tokens=512, activation_bytes=100))
    assert made.memory.pool_used_bytes(Pool.ARENA) >= 5120
    small = planner()
    run(small, beside(10, activation_bytes=100, max_batch_tokens=32))
    assert small.memory.pool_used_bytes(Pool.ARENA) <= 5120


def run(made, state):
    return made.settle(made.plan(state), state, ForwardShape(num_decode=2))


def test_slices_get_smaller_before_anything_is_dropped_for_them():
    """16,000 bytes of KV cache and as many of arena share 20,800: 80 blocks of KV leave 8,000, for 256 tokens."""
    roomy, tight = (planner(tau_mem=0.65, arena_bytes_per_token=20.0) for _ in range(2))
    large = run(roomy, beside(10)).slice_tokens
    plan = run(tight, beside(80))
    assert (large, plan.slice_tokens) == (512, 256)
    assert (plan.prune_blocks, plan.finetune_budget_s > 0) == (0, True)


def test_blocks_are_dropped_for_slices_that_cannot_be_smaller():
    made = planner(tau_mem=0.5)  # 16,000 for both: the KV cache has taken nearly all
    plan = run(made, beside(100, max_batch_tokens=32))
    assert plan.slice_tokens == 32
    assert (plan.prune_blocks, plan.prune_reason) == (2, "finetune")  # 320 bytes at 160 a block
    assert plan.finetune_budget_s > 0
    assert made.memory.pool_used_bytes(Pool.ARENA) == 320
    assert made.memory.used_bytes <= made.memory.capacity_bytes


@pytest.mark.parametrize("offer", [None, PruneOffer([0.1])])
def test_slices_wait_when_too_little_is_offered(offer):
    state = beside(100, max_batch_tokens=32)
    state.prune_offer = offer
    plan = run(planner(tau_mem=0.5), state)
    assert (plan.prune_blocks, plan.finetune_budget_s, plan.min_slices) == (0, 0, 0)


def test_nothing_is_dropped_for_slices_that_have_no_time():
    state = view(0, num_decode=400, finetune=FineTuneState(0.0, max_batch_tokens=32))
    assert planner(tau_mem=0.5).plan(state).prune_blocks == 0


def test_scores_are_asked_for_early_and_until_there_is_enough():
    made = planner()
    asked = [made.plan(view(free, None, num_decode=1)).wants_prune_scores for free in (30, 12, 9, 12, 19, 21, 12)]
    assert asked == [False, False, True, True, True, False, False]


def test_scores_are_asked_for_when_the_first_prompt_in_line_does_not_fit():
    prompt = PrefillTask("r", 0.0, 31 * BLOCK)
    assert planner().plan(view(30, None, prefills=[prompt], num_decode=1, free_seats=0)).wants_prune_scores
    assert not planner().plan(view(60, None, prefills=[prompt], num_decode=1, free_seats=0)).wants_prune_scores


def test_scores_are_asked_for_always_or_never_if_that_is_how_it_is_set():
    assert planner("always").plan(view(90, None)).wants_prune_scores
    assert not planner("off").plan(view(0, None, num_decode=1)).wants_prune_scores


def test_a_quote_counts_the_harm_of_the_next_blocks_in_the_offer():
    blocks = BlockBudget(view(1, PruneOffer([0.0, 0.1, 0.2, 0.6])), BLOCK * BYTES)
    first = blocks.quote(3)
    assert (first.num_blocks, first.pruned_bytes, first.harm) == (2, 320.0, pytest.approx(0.05))
    blocks.take(3, first, "decode")
    second = blocks.quote(0, missing_bytes=161.0)
    assert (second.num_blocks, second.harm) == (2, pytest.approx(0.4))
    assert blocks.quote(3) is None
    blocks.take(0, second, "finetune")
    assert (blocks.pruned_blocks, blocks.reason, blocks.droppable_blocks) == (4, "decode", 0)


def test_blocks_of_requests_that_are_not_decoded_now_leave_no_negative_context():
    made = planner("always")
    relief = MemoryRelief(KvPruningConfig(start="always"), made.memory, BYTES)
    rest, dropped = relief.drop_at_once(view(2, num_decode=0, decode_context=0))
    assert (rest.decode_context, dropped) == (0, OFFER.num_blocks)

import json

from core.batch import ForwardShape, IterationSample, Plan
from core.types import SliceKind, SliceReport, SliceTiming, TaskKind, TaskResult


def test_a_chunk_counts_the_query_key_pairs_of_causal_attention():
    shape = ForwardShape(num_decode=2, decode_context=30)
    shape.add_chunk(10, 0)
    shape.add_chunk(4, 100)
    assert (shape.num_tokens, shape.num_prefill_tokens, shape.num_prefills) == (16, 14, 2)
    assert shape.prefill_attention == 10 * 5 + 4 * 102


def test_a_sample_survives_the_wire():
    report = SliceReport([SliceTiming(SliceKind.LOSS, 7, 0.01)], [], 8, 64, peak_bytes=9, out_of_memory=True)
    plan = Plan(100, 32, finetune_budget_s=0.2, prune_blocks=3, prune_reason="decode", predicted_forward_s=0.4)
    sample = IterationSample(ForwardShape(1, 2, 3, 4, 5), 0.5, 0.1, report, plan)
    assert IterationSample.from_wire(json.loads(json.dumps(sample.to_wire()))) == sample
    assert sample.slices_s == 0.01


def test_results_of_ended_tasks_do_not_travel_with_samples():
    report = SliceReport(finished=[TaskResult("t", TaskKind.TRAIN)], held_bytes=8)
    received = IterationSample.from_wire(IterationSample(ForwardShape(), 0.5, report=report).to_wire())
    assert (received.report.finished, received.report.held_bytes) == ([], 8)

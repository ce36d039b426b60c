import json

from core.batch import ForwardShape, IterationSample
from core.types import SliceKind, SliceTiming


def test_a_chunk_counts_the_query_key_pairs_of_causal_attention():
    shape = ForwardShape(num_decode=2, decode_context=30)
    shape.add_chunk(10, 0)
    shape.add_chunk(4, 100)
    assert (shape.num_tokens, shape.num_prefill_tokens, shape.num_prefills) == (16, 14, 2)
    assert shape.prefill_attention == 10 * 5 + 4 * 102


def test_a_sample_survives_the_wire():
    sample = IterationSample(
        shape=ForwardShape(1, 2, 3, 4, 5),
        forward_s=0.5,
        overhead_s=0.1,
        slices=[SliceTiming(SliceKind.LOSS, 7, 0.01)],
        predicted_forward_s=0.4,
        finetune_budget_s=0.2,
        held_bytes=8,
        peak_bytes=9,
        out_of_memory=True,
    )
    assert IterationSample.from_wire(json.loads(json.dumps(sample.to_wire()))) == sample
    assert sample.slices_s == 0.01

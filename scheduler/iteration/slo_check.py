"""Are the SLO targets within what the device can do? Asked at start, of the profile."""

from core.batch import ForwardShape
from core.config import SchedulerConfig, SloConfig
from core.ports import LatencyPredictor

_TYPICAL_CONTEXT = 256
_TYPICAL_PROMPT = 128


def slo_warnings(slo: SloConfig, config: SchedulerConfig, predictor: LatencyPredictor) -> list[str]:
    """Sentences about targets that cannot be met, or leave no time to train; empty if all is well or unknown."""
    decode_s = predictor.forward_s(ForwardShape(num_decode=1, decode_context=_TYPICAL_CONTEXT))
    prompt = ForwardShape()
    prompt.add_chunk(_TYPICAL_PROMPT, 0)
    prompt_s = predictor.forward_s(prompt)
    if decode_s is None or prompt_s is None:
        return []
    token_s = decode_s + predictor.overhead_s
    first_s = prompt_s + predictor.overhead_s
    warnings = []
    if token_s > slo.tbt_s:
        warnings.append(
            f"slo.tbt_s is {slo.tbt_s:g} s, but a token of a single request takes {token_s:.3g} s on this device: "
            "the target cannot be met, and training runs only while nobody is served"
        )
    elif token_s > config.slack_fraction * slo.tbt_s:
        warnings.append(
            f"slo.tbt_s is {slo.tbt_s:g} s, and a token of a single request takes {token_s:.3g} s on this device: "
            "nothing is left for training while somebody is served"
        )
    if first_s > slo.ttft_s:
        warnings.append(
            f"slo.ttft_s is {slo.ttft_s:g} s, but a prompt of {_TYPICAL_PROMPT} tokens takes {first_s:.3g} s on this "
            "device: the target cannot be met"
        )
    return warnings

"""Everything that touches vLLM, torch or PEFT: hybrid scheduler and worker, the sliced DPO step, adapters."""

"""The sliced DPO step on a LoRA adapter, on the base weights that vLLM serves."""

"""Routers that MACE adds to the OpenAI-compatible application of vLLM."""

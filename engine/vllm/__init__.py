"""The hybrid scheduler, worker and engine: vLLM's classes with our plan plugged in. Only here are vLLM's internals
used."""
